"""FPL against vectors from the published code, and from an independent float64 implementation."""

import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.federated import algorithms, engine, partition
from jaxmethods.federated.batching import Batches
from jaxmethods.methods import fpl
from jaxmethods.models.clip import CLIP, CLIP_TABLE, CLIPConfig
from jaxmethods.models.weights import import_params
from tests.tensors import below

LPT = {"lpt_end": "end", "lpt_middle": "middle", "lpt_front": "front"}
CASES = {
  **{name: {"text": "ctx"} for name in LPT},
  "lpt_class_specific": {"text": "ctx_class_specific"},
  "lpt_deep": {"text": "ctx", "text_deep": "text_deep"},
  "vpt_shallow": {"vision": "vision_shallow"},
  "vpt_shallow_after_ln": {"vision": "vision_shallow"},
  "vpt_deep": {"vision": "vision_deep"},
  "vpt_deep2": {"vision": "vision_deep"},
  "both_shallow": {"text": "ctx", "vision": "vision_shallow"},
  "both_deep": {"text": "ctx", "text_deep": "text_deep", "vision": "vision_deep"},
  "zero_shot": {},
}  # fmt: skip


class Case(NamedTuple):
  golden: object
  model: CLIP
  params: dict

  def texts(self, position="end"):
    golden = self.golden
    tokens, lengths = golden["inputs/tokens"], golden["inputs/name_len"]
    order = fpl.arrange(len(golden["prompts/ctx"]), lengths, tokens.shape[1], position)
    return fpl.ClassTexts(tokens, order, tokens.argmax(1))

  def scale(self):
    return jnp.exp(self.params["logit_scale"])

  def prompts(self, name):
    found = {key: self.golden[f"prompts/{stored}"] for key, stored in CASES[name].items()}
    if name == "vpt_deep2":
      found["vision"] = found["vision"][:2]
    return jax.tree.map(jnp.asarray, found)


def clip_config(state, config, scan):
  """The recorded config in the form of a config.json."""
  vocabulary, text = state["text_model.embeddings.token_embedding.weight"].shape
  vision = state["vision_model.embeddings.class_embedding"].shape[0]
  tower = lambda name, width, heads, layers: {
    "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
    "intermediate_size": state[f"{name}.encoder.layers.0.mlp.fc1.bias"].shape[0],
    "hidden_act": config["hidden_act"], "layer_norm_eps": config["layer_norm_eps"],
    "model_type": f"clip_{name}",
  }  # fmt: skip
  context = len(state["text_model.embeddings.position_embedding.weight"])
  return CLIPConfig.from_hugging_face({
    "model_type": "clip",
    "projection_dim": len(state["text_projection.weight"]),
    "text_config": tower("text_model", text, config["text_heads"], config["text_layers"])
    | {"vocab_size": vocabulary, "max_position_embeddings": context, "eos_token_id": config["eot"]},
    "vision_config": tower("vision_model", vision, config["vision_heads"], config["vision_layers"])
    | {"image_size": config["image"], "patch_size": config["patch"]},
  }, scan_layers=scan)  # fmt: skip


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def case(request, golden_file):
  golden = golden_file("fpl")
  state = below(golden, "clip/state_dict/")
  config = json.loads(str(golden["clip/config_json"]))
  model = CLIP(clip_config(state, config, request.param))
  pixels = jnp.zeros((1, config["image"], config["image"], 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), pixels, golden["inputs/tokens"])["params"]
  return Case(golden, model, jax.tree.map(jnp.asarray, import_params(state, CLIP_TABLE, shapes)))


UNROLLED = pytest.mark.parametrize("case", [False], ids=["unrolled"], indirect=True)


def features(case, prompts, params, pixels, texts, **options):
  text = fpl.text_features(case.model, params, prompts, texts)
  return fpl.image_features(case.model, params, prompts, pixels, **options), text


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(case, name):
  golden, labels = case.golden, case.golden["inputs/labels"]
  pixels = golden["inputs/images"].transpose(0, 2, 3, 1)
  texts = case.texts(LPT.get(name, "end"))
  options = {"behind_norm": name.endswith("after_ln")}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(prompts, params):
    image, text = features(case, prompts, params, pixels, texts, **options)
    loss = fpl.prompt_loss(image, text, case.scale(), labels)
    return loss, fpl.class_logits(image, text, case.scale())

  (loss, logits), grads = run(case.prompts(name), case.params)
  np.testing.assert_allclose(logits, golden[f"{name}/logits"], rtol=0, atol=1e-4)
  if name == "zero_shot":
    return
  np.testing.assert_allclose(loss, golden[f"{name}/loss"], rtol=0, atol=1e-5)
  recorded = below(golden, f"{name}/grad/")
  assert set(recorded) == set(CASES[name].values())
  for key, stored in CASES[name].items():
    want = recorded[stored][:2] if name == "vpt_deep2" else recorded[stored]
    atol = 2e-5 * np.abs(want).max()
    np.testing.assert_allclose(grads[key], want, rtol=0, atol=atol, err_msg=key)


FED = {"lpt": {"text": "ctx"}, "vpt": {"vision": "vision_shallow"}}
FED["both"] = FED["lpt"] | FED["vpt"]
FINAL = {"text": "final_ctx", "vision": "final_vis"}


def optimizer_of(golden):
  rate, momentum, decay = map(float, golden["fed/lr_momentum_wd"])
  return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum))


def loss_of(case):
  texts = case.texts()

  def loss(prompts, model_state, batch, key):
    del key
    image, text = features(case, prompts, case.params, batch["x"], texts)
    value = fpl.prompt_loss(image, text, case.scale(), batch["y"])
    return value, (model_state, {})

  return loss


def start_of(case, kind):
  stored = {key: case.golden[f"prompts/{name}"] for key, name in FED[kind].items()}
  return jax.tree.map(jnp.asarray, stored)


def rounds_of(golden):
  """Batches of every round, stacked over clients."""
  pixels = golden["fed/images"].transpose(0, 1, 2, 3, 5, 6, 4)
  real = jnp.ones(pixels.shape[1:3], bool)
  return [
    Batches({"x": jnp.asarray(x), "y": jnp.asarray(y)}, real)
    for x, y in zip(pixels, golden["fed/labels"], strict=True)
  ]


def check_final(golden, at, prompts):
  for key, value in prompts.items():
    np.testing.assert_allclose(value, golden[f"{at}/{FINAL[key]}"], rtol=0, atol=2e-5)


@UNROLLED
@pytest.mark.parametrize("kind", FED)
@pytest.mark.parametrize("average", ["weighted", "uniform"])
def test_rounds(case, kind, average):
  golden, at = case.golden, f"fed/{kind}/{average}"
  algorithm = algorithms.fedavg(loss_of(case), optimizer_of(golden), weighted=average == "weighted")
  sizes = jnp.asarray(golden["fed/client_sizes"], jnp.float32)
  server = algorithm.init(start_of(case, kind), jax.random.key(0))
  client = algorithms.init_client(server.params)
  states = jax.tree.map(lambda x: jnp.stack([x] * len(sizes)), client)

  @jax.jit
  def run(server, data):
    return engine.federated_round(
      algorithm, server, (states,), (data,), (sizes,), jax.random.key(1), client_map="vmap"
    )

  for data, losses in zip(rounds_of(golden), golden[f"{at}/losses"], strict=True):
    server, _, metrics = run(server, data)
    np.testing.assert_allclose(metrics["loss"], losses.mean(1), rtol=0, atol=1e-4)
  check_final(golden, at, server.params)


@UNROLLED
@pytest.mark.parametrize("kind", FED)
def test_rounds_with_momentum_of_the_client_before(case, kind):
  golden, at = case.golden, f"fed/{kind}/weighted_momentum_carried"
  optimizer, loss = optimizer_of(golden), loss_of(case)
  prompts = start_of(case, kind)
  sizes = jnp.asarray(golden["fed/client_sizes"], jnp.float32)

  def train(prompts, moments, data):
    state = (prompts, (), moments)
    (prompts, _, moments), metrics = algorithms.local_sgd(
      loss, optimizer, state, data, jax.random.key(0)
    )
    return prompts, moments, metrics

  moments, run = optimizer.init(prompts), jax.jit(functools.partial(fpl.carried, train))
  for data, losses in zip(rounds_of(golden), golden[f"{at}/losses"], strict=True):
    uploads, moments, metrics = run(prompts, moments, data)
    np.testing.assert_allclose(metrics["loss"], losses.mean(1), rtol=0, atol=1e-4)
    prompts = engine.weighted_mean(uploads, sizes)
  check_final(golden, at, prompts)


@pytest.mark.parametrize("kind", ["lpt", "vpt"])
def test_drift(golden_file, kind):
  recorded = below(golden_file("fpl"), f"drift/{kind}/")
  seen = fpl.drift(jnp.asarray(recorded["local_updates"]), jnp.asarray(recorded["global_update"]))
  np.testing.assert_allclose(seen.to_global, recorded["cos_global_local"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(seen.pairwise, recorded["cos_pairwise"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", ["0", "0.5"])
def test_partition_with_the_seed_bug(golden_file, beta):
  """The published code seeds the generator anew for every class."""
  recorded = below(golden_file("fpl"), "partition/")
  labels = {part: recorded[f"{part}_labels"] for part in ("train", "test")}
  owners = {part: recorded[f"beta{beta}/{part}_client"] for part in labels}
  num_clients, classes = owners["train"].max() + 1, np.unique(labels["train"])
  order, shares = {part: [] for part in labels}, []
  for label in classes:
    random = np.random.RandomState(0)
    for part in labels:
      members = np.flatnonzero(labels[part] == label)
      random.shuffle(members)
      order[part].append(members)
    shares.append(random.dirichlet([float(beta)] * num_clients) if float(beta) else None)
  rows = {part: jnp.asarray(np.concatenate(order[part])) for part in labels}
  if not float(beta):
    for part in labels:
      seen = partition.owner_evenly(labels[part], len(classes), num_clients, rows[part])
      np.testing.assert_array_equal(seen, owners[part])
    return
  with jax.enable_x64(True):
    shares = jnp.asarray(np.array(shares))
    seen, shares = partition.owner_below_even_share(labels["train"], shares, rows["train"])
    np.testing.assert_array_equal(seen, owners["train"])
    seen = partition.owner_by_shares(labels["test"], shares, rows["test"])
    np.testing.assert_array_equal(seen, owners["test"])
