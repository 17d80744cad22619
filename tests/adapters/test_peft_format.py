"""Adapters in PEFT's format without PEFT: there and back, and what cannot be read."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm

from jaxmethods.adapters import adapter as core, low_rank, prompts, scaling, selective
from jaxmethods.adapters.peft_format import from_peft, to_peft
from jaxmethods.adapters.peft_prompts import prompt_from_peft, prompt_to_peft
from jaxmethods.adapters.targets import BLOCK
from jaxmethods.data.adapter_files import CONFIG, WEIGHTS, read_peft, write_peft
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import table
from jaxmethods.trees import flatten, unflatten

TABLE = table(tiny_lm.CONFIG)
TARGETS = r"(query|down)/kernel"
SAME = {
  "lora": low_rank.lora(4, 6.0, 0.1),
  "rslora": low_rank.rslora(4, 6.0),
  "dora": low_rank.dora(4, 6.0),
  "vera": low_rank.vera(6),
  "adalora": low_rank.adalora(4),
  "oft": scaling.oft(4),
  "ia3": scaling.ia3(),
}


def random_like(tree, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def shapes(scan):
  lm = tiny_lm.model(scan_layers=scan)
  return jax.eval_shape(lm.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]


def tree_of(adapter, params):
  return random_like(jax.eval_shape(lambda p: adapter.init(jax.random.key(0), p, TARGETS), params))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", SAME)
def test_there_and_back(kind, scan, tmp_path):
  adapter, params = SAME[kind], shapes(scan)
  tree = tree_of(adapter, params)
  write_peft(tmp_path, *to_peft(adapter, tree, TABLE))
  again, back = from_peft(*read_peft(tmp_path), TABLE, params)
  assert dict(again.settings) == dict(adapter.settings)
  expected, found = flatten(tree), flatten(back)
  assert expected.keys() == found.keys()
  for path, leaf in expected.items():
    np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("kind", ["pissa", "milora", "moslora"])
def test_written_as_lora_of_the_same_update(kind):
  adapter, params = getattr(low_rank, kind)(3, 6.0), shapes(True)
  tree = tree_of(adapter, params)
  lora, plain = from_peft(*to_peft(adapter, tree, TABLE), TABLE, params)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
  ours, theirs = flatten(adapter.merge(zeros, tree)), flatten(lora.merge(zeros, plain))
  for path, leaf in ours.items():
    np.testing.assert_allclose(theirs[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)


def test_names_and_layout():
  adapter, params = SAME["lora"], shapes(True)
  tree = tree_of(adapter, params)
  config, tensors = to_peft(adapter, tree, TABLE, base="some/model")
  name = "base_model.model.model.layers.1.self_attn.q_proj"
  np.testing.assert_array_equal(
    tensors[f"{name}.lora_A.weight"], tree["layers"]["attention"]["query"]["a"][1]
  )
  assert tensors[f"{name}.lora_B.weight"].shape == (16, 4)
  assert config["base_model_name_or_path"] == "some/model"
  assert "model.layers.0.mlp.down_proj" in config["target_modules"]


def test_what_has_no_form():
  params = shapes(True)
  adapter = selective.tuned()
  with pytest.raises(InputError, match="tuned: PEFT has no such adapter"):
    to_peft(adapter, tree_of(adapter, params), TABLE)


def test_what_cannot_be_read():
  params = shapes(True)
  config, tensors = to_peft(SAME["lora"], tree_of(SAME["lora"], params), TABLE)
  read = lambda config, tensors: from_peft(config, tensors, TABLE, params)
  with pytest.raises(InputError, match=r"layers\.7\.up\.lora_A: this model has no place"):
    read(config, tensors | {"layers.7.up.lora_A": np.zeros(1)})
  fewer = {name: t for name, t in tensors.items() if "layers.1.mlp" not in name}
  with pytest.raises(InputError, match=r"no tensors for model\.layers\.1\.mlp\.down_proj"):
    read(config, fewer)
  fewer = {name: t for name, t in tensors.items() if "down_proj.lora_B" not in name}
  with pytest.raises(InputError, match=r"no lora_B\.weight for layers/mlp/down"):
    read(config, fewer)
  for option, message in (
    ({"peft_type": "LOHA"}, "peft_type 'LOHA' cannot be read"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"bias": "all"}, "bias 'all'"),
    ({"use_dora": True, "use_rslora": True}, "use_dora with use_rslora"),
  ):
    with pytest.raises(InputError, match=message):
      read(config | option, tensors)
  with pytest.raises(InputError, match="query/a has shape"):
    read(config | {"r": 2}, tensors)
  for name, value in (("r", 0), ("r", "4"), ("lora_alpha", float("nan")), ("lora_alpha", None)):
    with pytest.raises(InputError, match=f"{name}: expected a"):
      read(config | {name: value}, tensors)
  without = {name: value for name, value in config.items() if name != "r"}
  with pytest.raises(InputError, match=r"r: expected a positive whole number .*, got None"):
    read(without, tensors)
  with pytest.raises(InputError, match="has no tensors"):
    read({**config, "target_modules": None}, {})


# Values that change nothing, and values that change what B A is added to, or when, or how.
HARMLESS = [
  {"init_lora_weights": True}, {"init_lora_weights": False}, {"init_lora_weights": "gaussian"},
  {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
  {"fan_in_fan_out": True}, {"peft_version": "0.21.2"}, {"layer_replication": None},
  {"use_qalora": False, "qalora_group_size": 16}, {"loftq_config": {}}, {"of_tomorrow": None},
  {"trainable_token_indices": None}, {"arrow_config": None}, {"megatron_core": "megatron.core"},
]  # fmt: skip
CHANGING = [
  *({"init_lora_weights": kind} for kind in (
    "pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "mica", "of_tomorrow"
  )),
  {"layer_replication": [[0, 2], [1, 2]]}, {"alora_invocation_tokens": [5, 6]}, {"use_qalora": True},
  {"use_bdlora": {"nblocks": 2}}, {"lora_bias": True}, {"target_parameters": ["experts.w"]},
  {"trainable_token_indices": [1]}, {"alpha_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]},
  {"arrow_config": {"top_k": 3}}, {"kasa_config": {"a": 1}}, {"megatron_config": {"a": 1}},
  {"of_tomorrow": 1}, {"of_tomorrow": 0}, {"of_tomorrow": "x"}, {"bias": "lora_only"},
]  # fmt: skip


@pytest.mark.parametrize("option", HARMLESS, ids=str)
def test_options_that_change_nothing(option):
  params, tree = shapes(True), tree_of(SAME["lora"], shapes(True))
  config, tensors = to_peft(SAME["lora"], tree, TABLE)
  _, back = from_peft(config | option, tensors, TABLE, params)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize("option", CHANGING, ids=str)
def test_options_that_change_the_adapter_are_named(option):
  config, tensors = to_peft(SAME["lora"], tree_of(SAME["lora"], shapes(True)), TABLE)
  with pytest.raises(InputError, match=f"^{next(iter(option))} .*cannot be read"):
    from_peft(config | option, tensors, TABLE, shapes(True))


@pytest.mark.parametrize(
  ("targets", "kept", "message"),
  [
    ({"target_modules": ["q_proj", "v_proj"]}, r"q_proj|v_proj", None),
    ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, r"q_proj|v_proj", None),
    ({"target_modules": r".*\.(q|v)_proj"}, r"q_proj|v_proj", None),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, r"1\.self_attn\.q_proj", None),
    ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
     r"1\.self_attn\.q_proj", None),
    ({"target_modules": "all-linear", "exclude_modules": ["mlp.down_proj"]},
     r"^(?!.*down_proj).*$", None),
    ({"target_modules": ["q_proj", "v_proj"]}, r"q_proj", "no tensors for .*v_proj"),
    ({"target_modules": ["q_proj"]}, r"1\.self_attn\.q_proj", r"no tensors for .*layers\.0"),
    ({"target_modules": ["q_proj"]}, r"q_proj|v_proj", "do not name .*v_proj"),
    ({"target_modules": "(q_proj"}, r"q_proj", "not a regular expression"),
    ({"target_modules": {"q_proj": 1}}, r"q_proj", "expected names of modules"),
  ],
)  # fmt: skip
def test_targets_and_tensors_agree(targets, kept, message):
  params, lora = shapes(False), SAME["lora"]
  every = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, BLOCK), params)
  config, tensors = to_peft(lora, random_like(every), TABLE)
  tensors = {name: x for name, x in tensors.items() if re.search(kept, name)}
  config |= targets
  if message:
    with pytest.raises(InputError, match=message):
      from_peft(config, tensors, TABLE, params)
  else:
    adapter, tree = from_peft(config, tensors, TABLE, params)
    assert to_peft(adapter, tree, TABLE)[1].keys() == tensors.keys()


def test_bad_files(tmp_path):
  with pytest.raises(InputError, match=f"{CONFIG}: cannot be read"):
    read_peft(tmp_path)
  write_peft(tmp_path, *to_peft(SAME["ia3"], tree_of(SAME["ia3"], shapes(True)), TABLE))
  weights = (tmp_path / WEIGHTS).read_bytes()
  (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
  with pytest.raises(InputError, match="is no complete safetensors file"):
    read_peft(tmp_path)
  (tmp_path / WEIGHTS).unlink()
  with pytest.raises(InputError, match=f"{WEIGHTS}: cannot be read"):
    read_peft(tmp_path)
  (tmp_path / CONFIG).write_text("{")
  with pytest.raises(InputError, match="is not JSON"):
    read_peft(tmp_path)


def linear_stack(layers, **widths):
  """Shapes of a stack of linear layers: name -> (in, out)."""
  return {
    f"layers/{name}/kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)
    for name, shape in widths.items()
  }


def test_lora_on_llava_7b_has_the_published_number_of_parameters():
  d, m = 4096, 11008
  square = dict.fromkeys(("query", "key", "value", "out"), (d, d))
  flat = linear_stack(32, **square, gate=(d, m), up=(d, m), down=(m, d))
  params = {"language": unflatten(flat)}
  for rank, expected in ((32, 79_953_920), (16, 39_976_960), (64, 159_907_840)):
    adapter = low_rank.lora(rank)
    init = functools.partial(adapter.init, jax.random.key(0), targets="^language/.*kernel")
    tree = jax.eval_shape(init, params)
    assert core.num_trainable(adapter, tree) == expected


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_there_and_back(kind, tmp_path):
  params = shapes(True)
  start = {
    "prompt": lambda key: prompts.init_prompt(
      key, jax.tree.map(lambda x: jnp.zeros(x.shape), params), 3
    ),
    "prefix": lambda key: prompts.init_prefix(key, tiny_lm.CONFIG, 3),
  }
  tree = random_like(start[kind](jax.random.key(0)))
  write_peft(tmp_path, *prompt_to_peft(tree, tiny_lm.CONFIG))
  settings, tensors = read_peft(tmp_path)
  back = prompt_from_peft(settings, tensors, tiny_lm.CONFIG)
  assert back.keys() == tree.keys()
  jax.tree.map(np.testing.assert_array_equal, back, tree)
  cut = {"prompt_embeddings": tensors["prompt_embeddings"][:, :-1]}
  with pytest.raises(InputError, match=r"prompt_embeddings: has shape .*, this model needs \(3, "):
    prompt_from_peft(settings, cut, tiny_lm.CONFIG)
  with pytest.raises(InputError, match="other: a PEFT prompt has the tensor"):
    prompt_from_peft(settings, tensors | {"other": cut["prompt_embeddings"]}, tiny_lm.CONFIG)
  with pytest.raises(InputError, match="peft_type 'LORA': is no prompt"):
    prompt_from_peft(settings | {"peft_type": "LORA"}, tensors, tiny_lm.CONFIG)


@pytest.mark.parametrize(
  ("option", "is_read"),
  [
    ({"peft_type": "P_TUNING", "encoder_hidden_size": 64, "encoder_dropout": 0.1}, True),
    ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "be kind"}, True),
    ({"tokenizer_kwargs": {"a": 1}, "inference_mode": False, "modules_to_save": None}, True),
    ({"num_transformer_submodules": None}, True),
    ({"num_transformer_submodules": 2}, False),
    ({"modules_to_save": ["lm_head"]}, False),
    ({"prompt_scale": 2.0}, False),
    ({"of_tomorrow": "x"}, False),
    ({"encoder_dropout": 0.1}, False),  # of another kind
    ({"peft_type": "CPT", "cpt_mask": [1]}, False),
    ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2}, False),
  ],
  ids=str,
)
def test_options_of_prompts(option, is_read):
  tree = {"prompt": np.ones((3, tiny_lm.CONFIG.width), np.float32)}
  settings, tensors = prompt_to_peft(tree, tiny_lm.CONFIG)
  if is_read:
    back = prompt_from_peft(settings | option, tensors, tiny_lm.CONFIG)
    np.testing.assert_array_equal(back["prompt"], tree["prompt"])
  else:
    with pytest.raises(InputError, match=r"cannot be read|is no prompt"):
      prompt_from_peft(settings | option, tensors, tiny_lm.CONFIG)
