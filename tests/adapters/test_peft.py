"""Adapters written for PEFT and read from it; marked `peft`, needs torch, transformers and peft.

python -m venv peft-venv && peft-venv/bin/pip install -e '.[test]' torch peft
peft-venv/bin/python -m pytest -m peft tests/adapters
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.adapters import adapter as core, low_rank, prompts, scaling
from jaxmethods.adapters.peft_format import from_peft, to_peft
from jaxmethods.adapters.peft_prompts import prompt_from_peft, prompt_to_peft
from jaxmethods.adapters.training import next_token_loss, update_step
from jaxmethods.data.adapter_files import read_peft, write_peft
from jaxmethods.models.causal_lm import CausalLM, CausalLMConfig, prefix_cache, table
from jaxmethods.models.weights import export_params, import_params

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.peft
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TARGETS = r"layers.*/(query|value|gate|down)/kernel"
THEIRS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
KINDS = {
  "lora": low_rank.lora(4, 6.0, 0.1),
  "rslora": low_rank.rslora(4, 6.0),
  "dora": low_rank.dora(4, 6.0),
  "vera": low_rank.vera(6),
  "pissa": low_rank.pissa(3, 6.0),
  "milora": low_rank.milora(3, 6.0),
  "moslora": low_rank.moslora(4, 6.0),
  "adalora": low_rank.adalora(4),
  "oft": scaling.oft(4),
  "ia3": scaling.ia3(),
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return random_base(tmp_path_factory.mktemp("base"), initializer_range=0.3)


def random_base(folder, initializer_range):
  """A random model of theirs on disk, ids, and the same model as ours."""
  torch.manual_seed(0)
  shape = transformers.LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
    initializer_range=initializer_range,
  )  # fmt: skip
  theirs = transformers.LlamaForCausalLM(shape).eval()
  theirs.save_pretrained(folder)
  config = CausalLMConfig.from_hugging_face(shape.to_dict())
  ours = CausalLM(config, scan_layers=True)
  shapes = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
  tensors = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
  params = jax.tree.map(jnp.asarray, import_params(tensors, table(config), shapes))
  ids = np.random.default_rng(0).integers(0, 48, (3, 9))
  return folder, ids, ours, params, table(config)


def fresh(folder):
  return transformers.LlamaForCausalLM.from_pretrained(folder).eval()


def logits_of(model, ids):
  with torch.no_grad():
    return model(input_ids=torch.tensor(ids)).logits.numpy()


def trained(adapter, params):
  """A tree that is not at its start."""
  tree = adapter.init(jax.random.key(1), params, TARGETS)
  moving, rest = core.split(adapter, tree)
  leaves, structure = jax.tree.flatten(moving)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  leaves = [
    leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
  ]
  return core.join(jax.tree.unflatten(structure, leaves), rest)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_write(base, kind, tmp_path):
  folder, ids, ours, params, names = base
  adapter = KINDS[kind]
  tree = trained(adapter, params)
  write_peft(tmp_path, *to_peft(adapter, tree, names, base=str(folder)))
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*(missing|unexpected).*")
    theirs = peft.PeftModel.from_pretrained(fresh(folder), tmp_path).eval()
  expected = jax.jit(lambda tree: core.apply(adapter, ours, params, tree, ids).logits)(tree)
  plain = ours.apply({"params": params}, ids).logits
  assert np.abs(expected - plain).max() > 1e-2
  np.testing.assert_allclose(logits_of(theirs, ids), expected, **TOLERANCE)


CONFIGS = {
  "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=THEIRS),
  "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=THEIRS),
  "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=THEIRS),
  "vera": lambda: peft.VeraConfig(r=6, target_modules=THEIRS),
  "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=THEIRS),
  "oft": lambda: peft.OFTConfig(
    r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=THEIRS
  ),
  "ia3": lambda: peft.IA3Config(
    target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
  ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_we_load_what_peft_writes(base, kind, tmp_path):
  folder, ids, ours, params, names = base
  theirs = peft.get_peft_model(fresh(folder), CONFIGS[kind]()).eval()
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      if p.requires_grad and "ranknum" not in name:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
  theirs.save_pretrained(tmp_path)
  adapter, tree = from_peft(*read_peft(tmp_path), names, params)
  output = jax.jit(lambda tree: core.apply(adapter, ours, params, tree, ids).logits)(tree)
  np.testing.assert_allclose(output, logits_of(theirs, ids), **TOLERANCE)


def with_prompt(ours, params, tree, ids):
  """Logits of the text behind a prompt or a prefix."""
  config = ours.config
  if "prompt" in tree:
    embedded = params["embed"]["embedding"][ids]
    everything = jnp.ones(ids.shape, bool), jnp.zeros(ids.shape, int)
    x, mask, _ = prompts.insert_prompt(jnp.asarray(tree["prompt"]), embedded, *everything)
    return ours.apply({"params": params}, embeddings=x, mask=mask).logits
  cache = prefix_cache(tree, config, *ids.shape, scan_layers=True)
  return ours.apply({"params": params}, ids, cache=cache).logits


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_loads_our_prompts(base, kind, tmp_path):
  folder, ids, ours, params, _ = base
  config = ours.config
  key = jax.random.key(5)
  start = prompts.init_prompt(key, params, 3)
  if kind == "prefix":
    start = prompts.init_prefix(key, config, 3)
  tree = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape), start)
  write_peft(tmp_path, *prompt_to_peft(tree, config, base=str(folder)))
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*(missing|unexpected).*")
    theirs = peft.PeftModel.from_pretrained(fresh(folder), tmp_path).eval()
  expected = with_prompt(ours, params, tree, ids)
  plain = ours.apply({"params": params}, ids).logits
  assert np.abs(expected[:, -ids.shape[1] :] - plain).max() > 1e-2
  np.testing.assert_allclose(logits_of(theirs, ids), expected, **TOLERANCE)


PROMPTS = {
  "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
  "p-tuning": lambda: peft.PromptEncoderConfig(
    num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8
  ),
  "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
  "projected prefix": lambda: peft.PrefixTuningConfig(
    num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=8
  ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_we_load_prompts_that_peft_writes(base, kind, tmp_path):
  folder, ids, ours, params, _ = base
  torch.manual_seed(4)
  theirs = peft.get_peft_model(fresh(folder), PROMPTS[kind]()).eval()
  theirs.save_pretrained(tmp_path)
  tree = prompt_from_peft(*read_peft(tmp_path), ours.config)
  np.testing.assert_allclose(
    with_prompt(ours, params, tree, ids), logits_of(theirs, ids), **TOLERANCE
  )


def test_merged_model_is_a_hugging_face_checkpoint(base, tmp_path):
  folder, ids, ours, params, names = base
  adapter = KINDS["dora"]
  tree = trained(adapter, params)
  theirs = fresh(folder)
  merged = export_params(adapter.merge(params, tree), names)
  missing = theirs.load_state_dict({k: torch.tensor(v) for k, v in merged.items()}, strict=True)
  assert not missing.missing_keys and not missing.unexpected_keys
  theirs.save_pretrained(tmp_path)
  expected = core.apply(adapter, ours, params, tree, ids).logits
  np.testing.assert_allclose(logits_of(fresh(tmp_path), ids), expected, **TOLERANCE)


def test_training_on_left_padded_sentences_follows_peft(tmp_path):
  """Four sentences, LoRA of rank 8, AdamW at 3e-2, 60 steps: the losses are PEFT's.

  The model starts as published ones do: large weights make differences of rounding grow faster.
  """
  folder, _, ours, params, names = random_base(tmp_path, initializer_range=0.02)
  rng = np.random.default_rng(1)
  ids = rng.integers(0, 48, (4, 10))
  mask = np.arange(10) >= np.array([[0], [2], [3], [6]])
  behind_padding = mask & ~np.roll(mask, 1, axis=1)
  labels = np.where(mask & ~behind_padding, ids, -100)
  theirs = peft.get_peft_model(
    fresh(folder), peft.LoraConfig(r=8, lora_alpha=16, target_modules=THEIRS)
  )
  with torch.no_grad():
    weights = peft.get_peft_model_state_dict(theirs)
    config = theirs.peft_config["default"].to_dict()
    tensors = {name: x.clone().numpy() for name, x in weights.items()}
  adapter, tree = from_peft(config, tensors, names, params)
  optimiser = optax.adamw(3e-2, weight_decay=0.0)
  update = jax.jit(update_step(adapter, next_token_loss(adapter, ours), optimiser))
  trained, _ = core.split(adapter, tree)
  state = optimiser.init(trained)
  # The label behind padding is left to our rule.
  batch = {"ids": ids, "mask": mask, "labels": np.where(mask, ids, -100)}
  batch = jax.tree.map(jnp.asarray, batch)
  adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-2, weight_decay=0.0)
  inputs = {
    "input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long(),
    "labels": torch.tensor(labels),
  }  # fmt: skip
  for _ in range(60):
    expected = theirs(**inputs).loss
    adamw.zero_grad()
    expected.backward()
    adamw.step()
    tree, state, metrics = update(tree, state, params, batch, None)
    np.testing.assert_allclose(metrics["loss"], expected.item(), atol=1e-4)
  assert metrics["loss"] < 3.7  # from 3.87
