"""FPL as an experiment: who holds what, what travels, baselines, bad input, published sizes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data.records import Source
from jaxmethods.errors import InputError
from jaxmethods.experiments.fpl import build, deal, rounds
from jaxmethods.experiments.fpl.config import Config, rows, studies
from jaxmethods.experiments.fpl.data import Data, Images
from jaxmethods.experiments.fpl.learner import Frozen, make_learner, num_parameters
from jaxmethods.experiments.fpl.texts import prompt_texts
from jaxmethods.experiments.fpl.towers import clip_towers, plain_texts
from jaxmethods.federated import engine
from jaxmethods.models.clip import CLIP, CLIPConfig, TextConfig
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViTConfig
from jaxmethods.runtime import studies as studies_lib
from jaxmethods.testbeds.vision_language import pretraining, words
from jaxmethods.testbeds.vision_language.encoder import Stage
from jaxmethods.testbeds.vision_language.settings import SmallClip

CLASSES = ("red circle", "star", "cat")
SMALL = SmallClip(width=8, layers=2, text_width=8, text_layers=2, heads=2, projection=8)
TINY = Config(
  clip=SMALL, clients=3, skew="labels", alpha=0.5, text_prompts=2, vision_prompts=2, batch_size=4,
  learning_rate=0.1, weight_decay=0.0,
)  # fmt: skip
SOURCE = Source("noise", "here", "none", "none", real=False)


def change(config=TINY, **changes):
  return dataclasses.replace(config, **changes)


@functools.cache
def stage():
  """The small CLIP, not pretrained."""
  tokens = words.word_tokens(SMALL.context)
  model = pretraining.model_of(SMALL, tokens)
  start = lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 5), int))["params"]
  form, random = jax.eval_shape(start, jax.random.key(0)), np.random.default_rng(0)
  params = jax.tree.map(lambda x: random.normal(size=x.shape, scale=0.3).astype(np.float32), form)
  return Stage(model, params | {"logit_scale": np.float32(2)}, tokens, pretraining.scaled, SOURCE)


@functools.cache
def noise(domains=2):
  random = np.random.default_rng(0)
  part = lambda n: Images(
    random.integers(0, 256, (domains, n, 32, 32, 3), dtype=np.uint8),
    np.tile(np.arange(n, dtype=np.int32) % 3, (domains, 1)),
  )
  return Data([f"d{k}" for k in range(domains)], CLASSES, ("a {}.",), part(18), part(6), "noise")


@functools.cache
def parts_of(config):
  return build.make_parts(config, noise(), clip_towers(stage(), config.behind_norm))


@functools.cache
def after_rounds(config, count=1):
  """The first state, the last, and the metrics of the last round."""
  parts = parts_of(config)
  make = jax.jit(functools.partial(rounds.first_state, parts))
  first = rounds.init(parts, jax.random.key(0), make)
  step = jax.jit(functools.partial(rounds.step, parts))
  state, metrics = first, {}
  for _ in range(count):
    state, metrics = step(state, parts.work)
  return first, state, metrics


# --- who holds what -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
  {"alpha": 0.0}, {"alpha": 0.3}, {"classes_per_client": 2}, {"skew": "domains"},
  {"skew": "both", "alpha": 0.0, "clients": 5}, {"skew": "both", "clients": 5},
])  # fmt: skip
def test_clients_share_the_examples_out(changes):
  config, data = change(**changes), noise()
  draw = functools.partial(
    deal.draw, num_classes=3, settings=config, min_examples=1,
    size=deal.capacity(config, data.train.y, 3),
  )  # fmt: skip
  run = jax.jit(lambda key: draw(key, jnp.asarray(data.train.y), jnp.asarray(data.test.y)))
  for seed in range(3):
    found = run(jax.random.key(seed))
    held = np.asarray(found.rows)[np.asarray(found.mask)]
    np.testing.assert_array_equal(np.sort(held), np.arange(36))
    assert (np.asarray(found.own).sum(0) == 1).all()
    sizes = np.asarray(found.mask).sum(1)
    assert sizes.min() >= 1
    if config.alpha == 0 and config.skew == "labels":
      assert np.ptp(sizes) <= 1
    if config.skew != "labels":
      pairs = zip(np.asarray(found.rows), np.asarray(found.mask), strict=True)
      domains = [set((row[real] // 18).tolist()) for row, real in pairs]
      assert all(len(each) == 1 for each in domains)


def test_a_minimum_that_no_draw_reaches_is_refused():
  with pytest.raises(InputError, match="min_examples: client 0 gets 12 of at least 13"):
    rounds.init(parts_of(change(alpha=0.0, min_examples=13)), jax.random.key(0))


# --- what travels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "numbers"),
  [
    ({"trained": "text"}, 2 * 8),
    ({"trained": "vision", "vision_depth": 2}, 2 * 2 * 8),
    ({"trained": "both"}, 2 * 8 + 2 * 8),
    ({"trained": "text", "class_specific": True, "text_depth": 2}, 3 * 2 * 8 + 2 * 8),
    ({"trained": "none"}, 0),
    ({"trained": "text", "training": "local"}, 0),
  ],
)
def test_only_prompts_travel(changes, numbers):
  parts = parts_of(change(**changes))
  state = jax.eval_shape(functools.partial(rounds.init, parts), jax.random.key(0))
  algorithm = rounds.make_algorithm(parts, parts.work)
  data = {"rows": state.deal.rows, "mask": state.deal.mask}
  sent = engine.traffic(algorithm, state.server, (state.clients,), (data,))
  assert sent.up.tolist() == sent.down.tolist() == [4 * numbers] * 3


def test_the_model_stays_as_it_is_and_the_bytes_are_reported():
  before = jax.tree.map(np.copy, parts_of(change(trained="both")).work.frozen)
  first, state, metrics = after_rounds(change(trained="both"))
  after = parts_of(change(trained="both")).work.frozen
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert metrics["bytes_up"] == metrics["bytes_down"] == 3 * 4 * (2 * 8 + 2 * 8)
  for name in ("text", "vision"):
    moved = state.server.inner.params["prompts"][name] - first.server.inner.params["prompts"][name]
    assert jnp.abs(moved).max() > 0
    assert -1 <= metrics[f"agreement/{name}"] <= 1


def test_equal_clients_may_weigh_the_same():
  """A theorem (H5): with equal sizes both averages are one."""
  weighted, equal = (
    after_rounds(change(alpha=0.0, weighted=each))[1].server.inner.params for each in (True, False)
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), weighted, equal)


def test_one_client_in_a_round_gives_its_prompts():
  config = change(participation=0.3, random_participation=False, clients=3)
  _, state, _ = after_rounds(config)
  _, alone, _ = after_rounds(change(training="local"))
  own = alone.clients.params["prompts"]["text"][0]
  np.testing.assert_allclose(state.server.inner.params["prompts"]["text"], own, atol=1e-6)
  assert state.server.drift["text"].to_global.shape == (1,)


def test_momentum_that_goes_from_client_to_client():
  """The first client has none yet: without momentum both rounds are the same."""
  plain, carried = (
    after_rounds(change(momentum=0.0, carry_momentum=each))[1].server.inner.params
    for each in (False, True)
  )
  # The order of examples follows from a client's key, which the two ways draw alike only in law.
  assert jax.tree.structure(plain) == jax.tree.structure(carried)
  _, state, metrics = after_rounds(change(carry_momentum=True))
  assert any(jnp.abs(x).max() > 0 for x in jax.tree.leaves(state.moments))
  assert np.isfinite(metrics["loss"])


# --- evaluation and rows --------------------------------------------------------------------------


def test_zero_shot_is_the_same_for_every_row_before_training():
  """The vision row starts from the hand-written texts; without prompts it is zero-shot."""
  values = []
  for changes in ({"trained": "none"}, {"trained": "vision", "vision_prompts": 0}):
    parts = parts_of(change(**changes))
    state = rounds.init(parts, jax.random.key(0))
    values.append(jax.jit(functools.partial(rounds.evaluate, parts))(state, parts.test))
  for name in ("test_accuracy", "worst_domain", "macro_f1", "own_accuracy"):
    np.testing.assert_allclose(*(value[name] for value in values), atol=1e-6, err_msg=name)


def test_prompts_that_start_from_words_are_the_hand_written_text():
  data = noise()._replace(templates=("a picture of a {}.",))
  values = []
  for changes in ({"trained": "none"}, {}, {"class_specific": True}):
    config = change(text_prompts=4, initial_phrase="a picture of a", **changes)
    parts = build.make_parts(config, data, clip_towers(stage()))
    state = rounds.init(parts, jax.random.key(0))
    params = state.server.inner.params
    values.append(parts.learner.logits(params, parts.work.frozen, parts.work.x))
  assert params["prompts"]["text"].shape == (3, 4, 8)
  for value in values[1:]:
    np.testing.assert_allclose(value, values[0], atol=1e-3)


@pytest.mark.parametrize(
  ("name", "rate"), [("lpt_local", 3.0), ("probe", 0.01), ("fedavg_image_tower", 0.01)]
)
def test_rows_learn_their_training_examples(name, rate):
  # Whole clients as batches and small steps: the loss must fall.
  plain = change(learning_rate=rate, tower_rate=1e-3, momentum=0.0, batch_size=36)
  config = rows(plain)[name]
  parts = parts_of(config)
  first, _, metrics = after_rounds(config, 4)
  before = jax.jit(functools.partial(rounds.step, parts))(first, parts.work)[1]["loss"]
  assert metrics["loss"] < before


def test_every_study_has_its_rows_and_claims():
  for name, study in studies(TINY).items():
    named = studies_lib.rows(study)
    assert len(named) == len(study.cells) > 0
    for claim in study.claims:
      assert set(claim.terms) <= set(study.cells), name
      assert abs(sum(claim.terms.values())) < 1e-9


def test_verdicts():
  study = studies(TINY)["H2"]
  value = lambda *each: {"mean": float(np.mean(each)), "ci95": 0.1, "values": list(each)}
  result = lambda arm, *each: {
    "name": f"{arm} at shift domains",
    "metrics": {"test_accuracy": value(*each), "worst_domain": value(*each[::-1])},
  }
  better = [result("VPT", 0.8, 0.81, 0.82), result("LPT", 0.5, 0.5, 0.5)]
  assert [v.verdict for v in studies_lib.judge(study, better)] == ["held", "held"]
  worse = [result("VPT", 0.2, 0.21, 0.22), result("LPT", 0.5, 0.5, 0.5)]
  assert studies_lib.judge(study, worse)[0].verdict == "did not hold"
  noisy = [result("VPT", 0.2, 0.9, 0.5), result("LPT", 0.5, 0.5, 0.5)]
  assert studies_lib.judge(study, noisy)[0].verdict == "unclear"
  assert studies_lib.judge(study, better[:1]) == []  # a claim about one row that was not run
  header, lines = studies_lib.table(study, better, "test_accuracy")
  assert header == ["test_accuracy by shift", "domains"]
  assert lines[2] == ["VPT", "0.810 ± 0.1"]


def test_a_study_is_one_command(cli, tmp_path):
  done = cli(
    "eval.compare", "--method", "fpl", "--study", "H2", "--short", "--seeds", 2, "--workdir", "run",
    "--rows", "zero-shot at shift domains,LPT at shift domains",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "LPT is better than zero-shot" in done.stdout
  assert "VPT is better than LPT" not in done.stdout
  assert (tmp_path / "run" / "study.png").stat().st_size > 1000
  stored = json.loads((tmp_path / "run" / "compare.json").read_text())
  assert [row["name"] for row in stored["rows"]][1] == "LPT at shift domains"
  assert {"question", "verdicts"} <= set(stored)


@pytest.mark.parametrize(("method", "message"), [("fpl", "the nearest is"), ("ggeur", "has none")])
def test_unknown_studies(cli, method, message):
  done = cli("eval.compare", "--method", method, "--study", "H9")
  assert done.returncode == 2
  assert "--study: unknown study 'H9'" in done.stderr
  assert message in done.stderr


# --- bad input ------------------------------------------------------------------------------------


def test_texts_that_do_not_fit_are_named():
  tokens = words.word_tokens(12)
  texts = prompt_texts(CLASSES, 7, "end", tokens)
  assert texts.ids.shape == (3, 12)
  assert texts.end.tolist() == [11, 10, 10]
  with pytest.raises(InputError, match=r"8 prompts and class 0 \('red circle'\) need 13 tokens"):
    prompt_texts(CLASSES, 8, "end", tokens)
  with pytest.raises(InputError, match=r"class 1 \(' '\): its name has no tokens"):
    prompt_texts(("cat", " "), 2, "end", tokens)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"text_depth": 3}, "text_depth: must be at most 2, got 3"),
    ({"trained": "vision", "vision_depth": 3}, "vision_depth: must be at most 2, got 3"),
    ({"text_prompts": 3, "initial_phrase": "a cat"}, "initial_phrase: 'a cat' has 2 tokens"),
  ],
)
def test_prompts_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(InputError, match=message):
    make_learner(change(**changes), clip_towers(stage()), 3)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"text_depth": 0}, "text_depth: must be at least 1"),
    ({"text_prompts": -1}, "text_prompts: must be at least 0"),
    ({"participation": 0.0}, "participation: must be in"),
    ({"carry_momentum": True, "fedprox_mu": 0.1}, "carry_momentum: needs"),
    ({"min_per_class": 1}, "min_per_class: has no effect"),
    ({"test_share": 0.5}, "test_share: has no effect here, use size.test"),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    change(**changes)


# --- published sizes ------------------------------------------------------------------------------


def published():
  """CLIP ViT-B/16 and Office-Home's 65 classes, as shapes."""
  encoder = lambda width, heads: EncoderConfig(
    width=width, num_layers=12, heads=heads, hidden=4 * width, activation="quick_gelu",
    scan_layers=True,
  )  # fmt: skip
  vision = ViTConfig(encoder=encoder(768, 12), image_size=(224, 224), patch=16, clip=True)
  text = TextConfig(encoder=encoder(512, 8), vocabulary=49408, context=77, eos=49407)
  model = CLIP(CLIPConfig(vision=vision, text=text, projection=512))
  example = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), int)
  params = jax.eval_shape(lambda key: model.init(key, *example), jax.random.key(0))["params"]
  tokens = words.Tokens(lambda name: [ord(c) for c in name], 49406, 49407, 0, 77, 49408)
  return clip_towers(Stage(model, params, tokens, lambda x: x / 255, SOURCE))


def test_the_published_model_has_its_size_and_lowers():
  towers = published()
  assert num_parameters(towers.params) == 149_620_737
  config = Config(
    trained="both", clients=8, skew="both", alpha=0.0, augment=True, text_prompts=16, vision_prompts=16,
  )  # fmt: skip
  classes = tuple(chr(97 + k % 26) * (1 + k // 26) for k in range(65))
  shape, y = jax.ShapeDtypeStruct, np.tile(np.arange(64, dtype=np.int32), (4, 1))
  plain = plain_texts(jnp.asarray(words.pack(classes, towers.tokens)), towers.tokens)
  texts = build.texts_of(config, classes, towers)
  assert texts.ids.shape[1] == 17 + sum(len(name) + 2 for name in classes)
  frozen = Frozen(towers.params, texts, plain, shape((65, 512), jnp.float32))
  pixels = lambda n: shape((n, 224, 224, 3), jnp.uint8)
  work = rounds.Work(frozen, pixels(256), jnp.asarray(y.reshape(-1)))
  data = Data(
    ["a", "b", "c", "d"], classes, ("{}",), Images(pixels(256), y), Images(pixels(256), y), ""
  )
  size = deal.capacity(config, y, 65)
  learner = make_learner(config, towers, 65)
  parts = rounds.Parts(
    config, data, [""] * 8, learner, rounds.sgd(0.1, 0.9, 0.0), work, work, size, None
  )
  state = jax.eval_shape(functools.partial(rounds.init, parts), jax.random.key(0))
  assert num_parameters(state.server.inner.params) == 16 * 512 + 16 * 768
  for platform in ("tpu", "cuda"):
    step = jax.jit(functools.partial(rounds.step, parts))
    abstract = jax.tree.map(lambda x: shape(x.shape, x.dtype), (state, work))
    exported = jax.export.export(step, platforms=(platform,))(*abstract)
    assert len(exported.out_avals) > 0
