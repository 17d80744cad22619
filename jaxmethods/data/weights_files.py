"""Tensors in files: safetensors (one file or shards) and GGUF, read one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxmethods.errors import InputError
from jaxmethods.trees import Json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Read together with the weights by transformers, PEFT or us.
_COMPANIONS = (
  "adapter_*",
  "pytorch_model*",
  "tokenizer*",
  "*token*.json",
  "vocab*",
  "merges.txt",
  "spiece.model",
  "chat_template*",
  "generation_config.json",
  "*processor_config.json",
)
_SHARD_BYTES = 5_000_000_000  # what transformers writes


class Safetensors(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint folder or file; indexing reads one tensor, keys read none.

  Args:
    path: a `.safetensors` file, or a folder with `model.safetensors` or its sharded form.

  Raises:
    InputError: no such file, a shard is missing, or a file is damaged or cut short.
  """

  def __init__(self, path: Path) -> None:
    """Opens the files."""
    if not path.exists():
      raise InputError(f"{path}: no such file or folder")
    promised: dict[str, str] = {}
    if path.is_file():
      files = [path]
    elif (path / _INDEX).is_file():
      promised = _weight_map(path / _INDEX)
      files = [path / name for name in sorted(set(promised.values()))]
    elif (path / _WEIGHTS).is_file():
      files = [path / _WEIGHTS]
    else:
      raise InputError(f"{path}: holds neither {_WEIGHTS} nor {_INDEX}")
    self._handles: dict[str, Any] = {}
    for file in files:
      handle = _open(file)
      self._handles |= dict.fromkeys(handle.keys(), handle)
    for name, file_name in promised.items():
      if name not in self._handles:
        raise InputError(f"{path / file_name}: has no tensor {name}, which {_INDEX} promises")

  def __getitem__(self, name: str) -> np.ndarray:
    try:
      tensor: np.ndarray = self._handles[name].get_tensor(name)
    except (SafetensorError, TypeError, ValueError) as error:  # such as 8-bit floats
      raise InputError(f"{name}: cannot be read ({error})") from None
    if tensor.dtype.kind in "iub":
      raise InputError(
        f"{name}: has type {tensor.dtype}: quantised weights mean nothing without their scales, which "
        "are read from GGUF files only"
      )
    return tensor

  def __iter__(self) -> Iterator[str]:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)


def _weight_map(index: Path) -> dict[str, str]:
  """Returns the files of the tensors, as an index names them."""
  found = read_json(index).get("weight_map")
  if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
    raise InputError(f"{index}: weight_map: expected the file of every tensor, got {found!r:.80}")
  return found


def _open(file: Path) -> Any:
  try:
    return safe_open(file, framework="np")
  except FileNotFoundError:
    raise InputError(f"{file}: this part of the checkpoint is missing") from None
  except (SafetensorError, OSError) as error:
    raise InputError(f"{file}: is damaged or cut short ({error})") from None


def read_json(file: Path) -> dict[str, Any]:
  """A JSON object."""
  try:
    contents = json.loads(file.read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise InputError(f"{file}: cannot be read: {error.strerror}") from None
  except ValueError as error:
    raise InputError(f"{file}: is not JSON: {error}") from None
  if not isinstance(contents, dict):
    raise InputError(f"{file}: must hold a JSON object")
  return contents


_WHOLE = {
  "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
  "image_size", "patch_size", "num_channels", "projection_dim", "max_position_embeddings",
}  # fmt: skip
_WHOLE_OR_NULL = {"num_key_value_heads", "head_dim", "sliding_window"}
_NUMBERS = {"rms_norm_eps", "layer_norm_eps", "rope_theta"}
_PARTS = {"text_config", "vision_config"}


def check_config(config: Json, where: str) -> None:
  """Raises for the contents of a `config.json` that no model can have.

  Args:
    config: contents.
    where: file or name, for errors.

  Raises:
    InputError: a size that is no positive whole number, a rate that is no number, quantised weights.
  """
  for key, value in config.items():
    number = isinstance(value, int | float) and not isinstance(value, bool)
    whole = number and isinstance(value, int) and value > 0
    if key in _WHOLE and not (whole or (key == "image_size" and isinstance(value, list))):
      raise InputError(f"{where}: {key}: expected a positive whole number, got {value!r}")
    if key in _WHOLE_OR_NULL and not (whole or value is None):
      raise InputError(f"{where}: {key}: expected a positive whole number or null, got {value!r}")
    if key in _NUMBERS and not number:
      raise InputError(f"{where}: {key}: expected a number, got {value!r}")
    if key == "model_type" and not isinstance(value, str):
      raise InputError(f"{where}: {key}: expected a text, got {value!r}")
    if key == "quantization_config" and value:
      raise InputError(f"{where}: {key}: quantised weights are read from GGUF files only")
    if key in _PARTS:
      if not isinstance(value, dict):
        raise InputError(f"{where}: {key}: expected an object, got {value!r}")
      check_config(value, f"{where}: {key}")


def save_checkpoint(
  folder: Path,
  tensors: Mapping[str, np.ndarray],
  config: Json,
  *,
  shard_bytes: int = _SHARD_BYTES,
  origin: Path | None = None,
) -> None:
  """Writes a Hugging Face checkpoint: `config.json` and safetensors, in shards if it is large.

  A checkpoint that lies there is replaced as a whole: none of its shards, nor its index, stays.

  Args:
    folder: made if needed.
    tensors: name -> tensor.
    config: contents of `config.json`.
    shard_bytes: size at which another file is begun.
    origin: folder the model came from: its tokenizer and the like may lie in `folder` too.

  Raises:
    InputError: the folder cannot be written, or holds files of something else that readers would take as
      part of this model.
  """
  _refuse_companions(folder, origin, config)
  shards: list[dict[str, np.ndarray]] = [{}]
  size = 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  names = [f"model-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
  names = names if len(shards) > 1 else [_WEIGHTS]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # First, so that a save which is cut short leaves a checkpoint that is refused, never a mixture.
    (folder / _INDEX).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
      with _replacing(folder / name) as temporary:
        save_file(shard, temporary, metadata={"format": "pt"})
    for old in folder.glob("model*.safetensors"):
      if old.name not in names:
        old.unlink()
    if len(shards) > 1:
      weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
      total = sum(tensor.nbytes for tensor in tensors.values())
      index = {"metadata": {"total_size": total}, "weight_map": weight_map}
      with _replacing(folder / _INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n")
    with _replacing(folder / "config.json") as temporary:
      temporary.write_text(json.dumps(dict(config), indent=2) + "\n")
  except OSError as error:
    raise InputError(f"{folder}: cannot be written: {error.strerror}") from None


def copy_companions(origin: Path, folder: Path) -> bool:
  """Copies tokenizer, processor and the like of a model's folder; whether there was a tokenizer."""
  if not origin.is_dir():
    return False
  names = {found.name for pattern in _COMPANIONS[2:] for found in origin.glob(pattern)}
  for name in sorted(names):
    shutil.copyfile(origin / name, folder / name)
  return any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names)


def _refuse_companions(folder: Path, origin: Path | None, config: Json) -> None:
  """Raises for a file that would be read with the saved weights and is not the model's own.

  Its own are those that are the same, byte by byte, in the folder it came from. A model from no folder
  owns the files beside a checkpoint of the same config, but for adapters.
  """
  old = folder / "config.json"
  homeless = origin is None or not origin.is_dir()
  same = homeless and old.is_file() and read_json(old) == json.loads(json.dumps(dict(config)))
  for file in sorted({found for pattern in _COMPANIONS for found in folder.glob(pattern)}):
    adapter = file.name.startswith("adapter_")
    if same and not adapter:
      continue
    own = origin / file.name if origin and not adapter else None
    if own is None or not own.is_file() or own.read_bytes() != file.read_bytes():
      raise InputError(
        f"{file}: would be read as a part of the saved model, and is of another: choose an empty "
        "folder, or move the file away"
      )


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
  """A file beside `file` that takes its place when it is complete."""
  temporary = file.with_name(f".{file.name}.{os.getpid()}")
  try:
    yield temporary
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)


class Gguf(NamedTuple):
  """A GGUF file in the terms of Hugging Face.

  Attributes:
    config: as `config.json` has it.
    tensors: under the names of the family's checkpoints, dequantised to float32 when read.
    fields: metadata by GGUF key, the tokenizer among it.
  """

  config: dict[str, Any]
  tensors: Mapping[str, np.ndarray]
  fields: Json


_GGUF_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}


def open_gguf(file: Path) -> Gguf:
  """Opens a GGUF file of the Llama, Qwen2 or Qwen3 architecture.

  Raises:
    InputError: no such file, the `gguf` package is not installed, the file is damaged or cut short,
      or it holds another architecture.
  """
  try:
    import gguf
  except ImportError:
    raise InputError(f"{file}: needs the gguf package: pip install 'jaxmethods[gguf]'") from None
  if not file.is_file():
    raise InputError(f"{file}: no such file")
  try:
    reader = gguf.GGUFReader(file)
    fields = _Fields(reader.fields)
    family = fields["general.architecture"]
    stored = {_from_gguf(tensor.name): tensor for tensor in reader.tensors}
  except (ValueError, IndexError, OSError, KeyError) as error:
    raise InputError(f"{file}: is damaged or cut short, or is no GGUF file ({error})") from None
  if family not in ("llama", "qwen2", "qwen3"):
    raise InputError(f"{file}: architecture {family!r} is not supported (llama, qwen2, qwen3)")

  get = lambda name, default=None: fields.get(f"{family}.{name}", default)
  heads = get("attention.head_count")
  config = {
    "model_type": family,
    "hidden_size": get("embedding_length"),
    "intermediate_size": get("feed_forward_length"),
    "num_hidden_layers": get("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", heads),
    "head_dim": get("attention.key_length") or get("embedding_length") // heads,
    "max_position_embeddings": get("context_length"),
    "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
    "rope_theta": get("rope.freq_base", 10000.0),
    "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    "tie_word_embeddings": "lm_head.weight" not in stored,
    "hidden_act": "silu",
  }
  interleaved = (
    {"q_proj": heads, "k_proj": config["num_key_value_heads"]} if family == "llama" else {}
  )
  return Gguf(config, _GgufTensors(stored, interleaved), fields)


def _from_gguf(name: str) -> str:
  """model.layers.3.self_attn.q_proj.weight of blk.3.attn_q.weight; unknown names stay."""
  module, _, leaf = name.rpartition(".")
  block, _, part = module.rpartition(".")
  if part not in _GGUF_NAMES:
    return name
  prefix = f"model.layers.{block.removeprefix('blk.')}." if block else ""
  return f"{prefix}{_GGUF_NAMES[part]}.{leaf}"


class _Fields(Json):
  """Metadata of a GGUF file as plain values, each converted when it is asked for."""

  def __init__(self, fields: Json) -> None:
    self._fields = fields

  def __getitem__(self, name: str) -> Any:
    return self._fields[name].contents()

  def __iter__(self) -> Iterator[str]:
    return iter(self._fields)

  def __len__(self) -> int:
    return len(self._fields)


class _GgufTensors(Mapping[str, np.ndarray]):
  """Dequantises when read; undoes the row order of interleaved rotary pairs."""

  def __init__(self, stored: Json, interleaved: Mapping[str, int]) -> None:
    self._stored, self._interleaved = stored, interleaved

  def __getitem__(self, name: str) -> np.ndarray:
    import gguf

    stored = self._stored[name]
    tensor = np.asarray(gguf.dequantize(stored.data, stored.tensor_type), np.float32)
    tensor = tensor.reshape(tuple(int(n) for n in stored.shape[::-1]))
    heads = self._interleaved.get(name.split(".")[-2])
    return tensor if heads is None else split_halves(tensor, heads)

  def __iter__(self) -> Iterator[str]:
    return iter(self._stored)

  def __len__(self) -> int:
    return len(self._stored)


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
  """Brings the rows (heads * d, ...) of each head from interleaved rotary pairs to halves."""
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
