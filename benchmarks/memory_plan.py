"""Published models at their published shapes, without weights: parameter counts and memory per device.

Traces and lowers a training step of each on abstract arrays, and adds up what a device must hold:
weights by the sharding table, adapters with their Adam state, and activations by formula (marked so).

  python -m benchmarks.memory_plan
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from jaxmethods.models.clip import CLIP, CLIPConfig, contrastive_loss
from jaxmethods.models.mllm import MLLM, MLLMConfig
from jaxmethods.models.sharding import bytes_per_device

RESULTS = Path(__file__).parent / "results"
GB = 1e9

# The published config.json files, with the defaults that they leave out.
_VISION = {
  "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
  "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "num_channels": 3,
  "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_vision_model",
}  # fmt: skip
CLIP_VIT_L_14_336 = {
  "model_type": "clip",
  "projection_dim": 768,
  "vision_config": _VISION,
  "text_config": {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "vocab_size": 49408,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2,
    "model_type": "clip_text_model",
  },
}  # fmt: skip
LLAVA_1_5_7B = {
  "model_type": "llava",
  "image_token_index": 32000,
  "projector_hidden_act": "gelu",
  "vision_feature_layer": -2,
  "vision_feature_select_strategy": "default",
  "vision_config": _VISION,
  "text_config": {
    "model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
  },
}  # fmt: skip
# Elements of the published safetensors files.
PUBLISHED = {"LLaVA-1.5-7B": 7_063_427_072, "CLIP ViT-L/14-336": 427_944_193}
LORA_RANK = 32


class Device(NamedTuple):
  """Devices of one kind, and the mesh over them."""

  name: str
  memory: float  # bytes of one
  mesh: AbstractMesh


DEVICES = (
  Device("v5e-8, fsdp=8", 16 * GB, AbstractMesh((8,), ("fsdp",))),
  Device("v5e-8, fsdp=4, tensor=2", 16 * GB, AbstractMesh((4, 2), ("fsdp", "tensor"))),
  Device("one H100", 80 * GB, AbstractMesh((1,), ("data",))),
)


def llava_step(batch: int, length: int) -> tuple[MLLM, Any, Any]:
  """LLaVA, its abstract variables, and its lowered step: the loss and the projector's gradient."""
  config = MLLMConfig.from_hugging_face(LLAVA_1_5_7B)
  model = MLLM(config, True, jnp.bfloat16, jnp.bfloat16, remat=True)
  ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  side = config.vision.image_size[0]
  pixels = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.bfloat16)
  drawn = jax.eval_shape(model.init, jax.random.key(0), ids, pixels)["params"]
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), drawn)

  def loss(projector, params, ids, pixels):
    logits = model.apply({"params": {**params, "projector": projector}}, ids, pixels).logits
    log = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log, ids[:, 1:, None], axis=-1).mean()

  step = jax.jit(jax.value_and_grad(loss))
  return model, params, step.lower(params["projector"], params, ids, pixels)


def clip_step(batch: int) -> tuple[CLIP, Any, Any]:
  """CLIP, its abstract variables, and its lowered step: contrastive loss and all gradients."""
  config = CLIPConfig.from_hugging_face(
    CLIP_VIT_L_14_336, scan_layers=True, remat=True, dtype=jnp.bfloat16
  )
  model = CLIP(config)
  side = config.vision.image_size[0]
  pixels = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((batch, config.text.context), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), pixels, ids)["params"]
  loss = lambda p, pixels, ids: contrastive_loss(
    model.apply({"params": p}, pixels, ids).logits_per_image
  )
  return model, params, jax.jit(jax.value_and_grad(loss)).lower(params, pixels, ids)


def size(params: Mapping[str, Any]) -> int:
  """Number of elements."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def lora_size(params: Mapping[str, Any], rank: int) -> int:
  """Elements of LoRA factors on the seven linear layers of every block of the language model."""
  total = 0
  for path, leaf in flatten_dict(params["language"], sep="/").items():
    if re.search(r"(query|key|value|out|gate|up|down)/kernel$", path):
      total += rank * sum(leaf.shape[-2:]) * math.prod(leaf.shape[:-2])
  return total


def llava_memory(params: Any, device: Device, batch: int, length: int) -> dict[str, float]:
  """Bytes on one device in a LoRA step; bf16 weights, float32 adapters, every block recomputed."""
  text = MLLMConfig.from_hugging_face(LLAVA_1_5_7B).language
  local = batch // (device.mesh.size // device.mesh.shape.get("tensor", 1))
  heads = text.num_heads // device.mesh.shape.get("tensor", 1)
  rows = local * length
  layers = params["language"]["layers"]
  one_layer = 2 * size(layers) / text.num_layers if "fsdp" in device.mesh.shape else 0
  return {
    "weights": bytes_per_device(params, device.mesh),
    "layer gathered": 2 * one_layer / device.mesh.shape.get("tensor", 1),  # and the next
    "LoRA, gradient, Adam": 4 * 4 * lora_size(params, LORA_RANK),
    "block inputs": 2 * text.num_layers * rows * text.width,
    # One block: scores in float32 and weights in bf16, three MLP activations and their gradients.
    "one block": local * heads * length**2 * 6 + 2 * 6 * rows * text.mlp_width,
    "logits": 2 * 4 * rows * text.vocab_size,
  }


def clip_memory(params: Any, device: Device, batch: int) -> dict[str, float]:
  """Bytes on one device in a full fine-tuning step; float32 weights, bf16 computation."""
  config = CLIPConfig.from_hugging_face(CLIP_VIT_L_14_336)
  local = batch // (device.mesh.size // device.mesh.shape.get("tensor", 1))
  vision, text = config.vision.encoder, config.text.encoder
  tokens = config.vision.num_tokens
  kept = (
    vision.num_layers * tokens * vision.width + text.num_layers * config.text.context * text.width
  )
  return {
    "weights": bytes_per_device(params, device.mesh),
    "gradient, Adam": 3 * bytes_per_device(params, device.mesh),
    "block inputs": 2 * local * kept,
    "one block": local * (vision.heads * tokens**2 * 6 + 2 * 6 * tokens * vision.hidden),
  }


def main() -> None:
  """Prints the plan and writes it to the results."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--batch", type=int, default=8, help="of the whole step, images and texts")
  parser.add_argument("--length", type=int, default=1024, help="tokens of a LLaVA text")
  args = parser.parse_args()
  if args.batch < 1 or args.batch % 8:
    parser.error(f"--batch: must be a multiple of 8 devices, got {args.batch}")
  if args.length < 577:
    parser.error(f"--length: an image alone has 576 tokens, got {args.length}")

  record: dict[str, Any] = {"batch": args.batch, "length": args.length}
  lines = [
    "# Memory plan at published shapes, without weights",
    f"Batch {args.batch} in all, {args.length} tokens a text; bfloat16 computation, layers scanned, "
    "every block recomputed in the backward pass. Weights by the table of `models/sharding.py`; "
    "activations are estimates by formula, not measured on the device. GB = 1e9 bytes.",
  ]
  begin = time.perf_counter()
  _, llava, lowered = llava_step(args.batch, args.length)
  llava_seconds = time.perf_counter() - begin
  begin = time.perf_counter()
  _, clip, clip_lowered = clip_step(args.batch)
  clip_seconds = time.perf_counter() - begin
  for name, what, params, program, seconds, memory in (
    ("LLaVA-1.5-7B", f"LoRA r={LORA_RANK}, bf16 weights", llava, lowered, llava_seconds,
     lambda device: llava_memory(llava, device, args.batch, args.length)),
    ("CLIP ViT-L/14-336", "full fine-tuning, float32 weights", clip, clip_lowered, clip_seconds,
     lambda device: clip_memory(clip, device, args.batch)),
  ):  # fmt: skip
    count = size(params)
    assert count == PUBLISHED[name], (name, count)
    text = len(program.as_text())
    lines += [
      "",
      f"## {name}: {count:,} parameters (as published)",
      f"{what}. Traced and lowered in {seconds:.1f} s (busy machine), {text / 1e6:.1f} MB of program.",
      "",
    ]
    plans = {device.name: memory(device) for device in DEVICES}
    parts = list(next(iter(plans.values())))
    lines += [
      f"| GB per device | {' | '.join(parts)} | sum | has |",
      "| --- |" + " --- |" * (len(parts) + 2),
    ]
    for device in DEVICES:
      plan = plans[device.name]
      total = sum(plan.values())
      cells = " | ".join(f"{value / GB:.2f}" for value in plan.values())
      fits = "" if total < device.memory else ", too small"
      lines.append(
        f"| {device.name} | {cells} | **{total / GB:.2f}** | {device.memory / GB:.0f}{fits} |"
      )
    record[name] = {"parameters": count, "lower_seconds": round(seconds, 2), "bytes": plans}
  factors = lora_size(llava, LORA_RANK)
  record["lora_parameters"] = factors
  lines += ["", f"LoRA r={LORA_RANK} on LLaVA-1.5-7B: {factors:,} parameters."]
  report = "\n".join([*lines, ""])
  print(report)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / "memory_plan.md").write_text(report)
  (RESULTS / "memory_plan.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
  main()
