"""The safety room: rows, tables, what is kept, bad input; its training lowers for accelerators."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.experiments.llm_safety import (
  build as build_lib,
  harmful,
  jailbreaking,
  memorising,
  poisoning,
  preferring,
  unlearning,
)
from jaxmethods.experiments.llm_safety.config import (
  TASKS,
  Config,
  EditSettings,
  MemoriseSettings,
  PoisonSettings,
  UnlearnSettings,
  WatermarkSettings,
  columns,
  places,
  rows,
)
from jaxmethods.models import tiny_gpt
from jaxmethods.testbeds.language import toy_models, toy_world
from jaxmethods.testbeds.language.settings import ToySettings

TINY = ToySettings(
  width=16, hidden=32, layers=2, heads=2, sequences=200, base_steps=20, aligned_steps=20,
  aligned_examples=16, prompts=16,
)  # fmt: skip
SMALL = Config(toy=TINY, watermark=WatermarkSettings(documents=8, pools=2))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def toy():
  return toy_models.Toy(TINY, 1)


def test_every_task_makes_the_rows_that_it_names(toy):
  stages = build_lib._stages(SMALL, toy, set(TASKS))
  assert {task: tuple(stages[task]) for task in TASKS} == {t: s.rows for t, s in TASKS.items()}
  for spec in TASKS.values():
    assert spec.undefended in spec.rows and spec.defended in ("", *spec.rows)


def test_a_run_makes_row_after_row_and_tells_of_them():
  config = dataclasses.replace(SMALL, task="kgw")
  experiment = build_lib.build(config)
  assert experiment.num_steps == len(TASKS["watermark"].rows)
  state, batches = experiment.init(jax.random.key(0)), experiment.batches(0)
  for _ in range(experiment.num_steps):
    state, metrics = experiment.step(state, next(batches))
  assert metrics["loss"].shape == ()
  again = next(experiment.batches(2))  # a resumed run has the same rows, their seconds aside
  np.testing.assert_array_equal(again.values[:2], state.values[2, :2])
  found = experiment.evaluate(state, ())
  assert list(found)[:5] == ["attack", "defended", "utility", "epsilon", "seconds"]
  assert found["z/unmarked"] == state.values[0, 4] and abs(found["z/unmarked"]) < 4
  assert found["z/strong"] > found["z/unmarked"] + 2
  header, lines = experiment.table(state)
  assert header == ["row", *columns("watermark")] and [x[0] for x in lines][2] == "marked"
  kept = json.loads(experiment.files(state)["rows.json"])
  assert kept["watermark.marked"]["z"] == pytest.approx(float(state.values[2, 4]), abs=1e-5)
  assert kept["watermark.marked"]["epsilon"] is None
  assert set(experiment.figures(state)) == {"watermark"}


def test_the_lifecycle_table_has_a_line_for_every_stage():
  made = places("all", "")
  values = jnp.linspace(0, 1, len(made) * 10).reshape(len(made), 10)
  state = build_lib.Suite(values)
  header, lines = build_lib._table(made, state)
  assert len(lines) == len(TASKS) and all(len(line) == len(header) for line in lines)
  edit = next(line for line in lines if line[0] == TASKS["edit"].stage)
  assert edit[3] == "-"  # the suite has no defence against edits
  found = build_lib._evaluate(made, state, ())
  first = [place.task for place in made].index("dpo") + 5
  assert found["attack/dpo"] == values[first, 0] and made[first].row == "flipped"
  assert math.isnan(found["defended/edit"]) and not math.isnan(found["defended"])
  assert set(build_lib._figures(made, state)) == {"lifecycle", *TASKS}


def test_rows_are_stages_or_those_of_one():
  assert list(rows(Config())) == list(TASKS)
  assert list(rows(Config(task="gcg"))) == list(TASKS["jailbreak"].rows)
  assert places("gcg", "gcg")[0].task == "jailbreak"


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"memorise": MemoriseSettings(epsilon=1e-4)}, "memorise.epsilon: epsilon 0.0001 cannot"),
    (
      {"memorise": MemoriseSettings(repeats=(1,), canaries=((10, 11, 12, 99),))},
      "memorise.canaries: canary 0 holds token 99, digits",
    ),
    (
      {"memorise": MemoriseSettings(repeats=(1,), canaries=((10, 11, 12),))},
      "memorise.canaries: canary 0 must have 4 digits, got 3",
    ),
    ({"memorise": MemoriseSettings(members=4, repeats=(1,))}, "memorise.batch: 64 is more than 5"),
    ({"edit": EditSettings(facts=((32, 0),))}, r"edit.facts: fact \(32, 0\) is unknown"),
    ({"edit": EditSettings(layer=2)}, "edit.layer: there are layers 0..1, got 2"),
    ({"unlearn": UnlearnSettings(rmu_layer=2)}, "unlearn.rmu_layer: there are layers"),
  ],
)
def test_bad_settings_are_found_before_anything_is_trained(changes, said, monkeypatch):
  monkeypatch.setattr(toy_models, "advance", None)
  with pytest.raises(InputError, match=said) as error:
    build_lib.build(dataclasses.replace(SMALL, **changes))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: UnlearnSettings(forget=()), "unlearn.forget: the forget set is empty"),
    (lambda: UnlearnSettings(forget=(1, 2), retain=(2, 3)), r"unlearn.retain: subject \[2\]"),
    (lambda: UnlearnSettings(forget=(40,)), "unlearn.forget: there are subjects"),
    (lambda: Config(task="poisson"), "task: 'poisson' is none of all, poison"),
    (lambda: Config(row="plain"), "row: belongs to a task"),
    (lambda: Config(task="dpo", row="plain"), "row: 'plain' is no row of dpo"),
    (lambda: WatermarkSettings(tokens=1), "watermark.tokens: a text needs 2 tokens"),
    (lambda: PoisonSettings(share=0.0), "poison.share: must be in"),
  ],
)
def test_impossible_settings_are_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()


def test_filters_remove_what_they_say(toy):
  stage = poisoning.Poisoning(toy, PoisonSettings(share=0.05))
  bad = stage.corpus.kind == toy_world.POISON
  assert bad.sum() == 10 and stage.listed()[bad].all()
  assert not stage.listed()[stage.corpus.kind == toy_world.FACT].any()
  assert not stage.surprising()[stage.corpus.kind == toy_world.FACT].any()
  once = stage.corpus.ids[~stage.duplicates()]
  assert len(np.unique(once, axis=0)) == len(once) < len(stage.corpus.ids)


def test_all_strings_of_digits_are_ranked_as_if_read_one_by_one(toy):
  params = tiny_gpt.init(jax.random.key(1), toy.shape)
  nll = memorising._all_digits(params, jnp.int32(25), heads=toy.heads)
  secrets = np.array([[13, 10, 19, 12], [10, 10, 10, 10]])
  texts = memorising.canaries(secrets, np.array([0, 1]))
  ids = texts.ids.copy()
  ids[:, 1] = 25
  digits = (np.arange(16) >= 3) & (np.arange(16) < 7)
  labels = np.where(digits, ids, toy_models.IGNORED)
  each = toy_models.token_nll(params, ids, labels, heads=toy.heads).sum(1)
  np.testing.assert_allclose(nll[jnp.array([3092, 0])], each, rtol=1e-5)


def test_the_audit_knows_a_leak_from_none():
  leak = memorising.audit(np.linspace(5, 6, 400), np.linspace(0, 1, 400), 1e-3)
  draws = np.random.default_rng(0).normal(size=(2, 400))
  assert leak > 3 and memorising.audit(*draws, 1e-3) < 0.3


def test_safelora_and_lisa_end_where_they_must(toy):
  stage = harmful.Service(toy, SMALL.harmful)
  kept = stage.safe(lambda base, aligned, update: None)
  assert kept.extras["projected"] == 0
  still = stage.safe(lambda base, aligned, update: jnp.zeros_like(update))
  assert still.attack == toy.harmful(toy.aligned) and still.extras["projected"] == 1


def test_terms_that_do_not_count_change_nothing(toy):
  params = tiny_gpt.init(jax.random.key(1), toy.shape)
  stage = preferring.Preferring(toy, SMALL.dpo)
  batch = next(stage.batches(stage.pairs, "test"))
  weights = dict.fromkeys(("sft", "dpo", "flipped", "ipo", "language"), 0.0)
  loss = lambda **given: preferring.preference_loss(0.1)(
    params, batch, toy.fixed | {"weights": weights | given}
  )
  nll = toy_models.token_nll(params, batch["chosen_ids"], batch["chosen_labels"], heads=toy.heads)
  count = (batch["chosen_labels"][:, 1:] != toy_models.IGNORED).sum()
  np.testing.assert_allclose(loss(sft=1.0), nll.sum() / count, rtol=1e-5)
  np.testing.assert_allclose(loss(sft=1.0, ipo=2.0), loss(sft=1.0) + 2 * loss(ipo=1.0), rtol=1e-5)


def test_suffixes_stand_where_the_attack_puts_them():
  prompts = jailbreaking.suffixed(np.array([3]), np.array([[20, 21, 22, 23]]))
  w = toy_world
  wanted = [w.BOS, w.USER, w.TOPICS[3], 20, 21, 22, 23, w.BOT]
  assert prompts.ids[0, : prompts.length[0]].tolist() == wanted
  assert prompts.answer[0].tolist() == [w.SURE, w.TOPIC_ANSWERS[3]]


def test_training_lowers_for_accelerators(toy):
  params = tiny_gpt.init(jax.random.key(0), toy.shape)
  stage = unlearning.Unlearning(toy, UnlearnSettings(batch=4))
  pairs = preferring.draw_pairs(4, np.random.default_rng(0))
  sides = {f"{s}_{k}": x for s, e in pairs._asdict().items() for k, x in e.items()}
  sides |= {f"{s}_log_p": np.zeros(4, np.float32) for s in ("chosen", "rejected")}
  text = toy_models.labelled(toy.corpus.take(np.arange(4)))
  forget = {f"{s}_{k}": x for s in ("forget", "retain") for k, x in text.items()}
  forget["forget_reference_nll"] = np.zeros(4, np.float32)
  private = text | {"real": np.ones(4, bool), "seed": np.int64(1)}
  scalars = {name: jnp.float32(1) for name in ("clip", "sigma", "expected")}
  fixed = toy.fixed | scalars | {"microbatch": jnp.zeros(2), "reference": params}
  fixed |= {"steering": jnp.zeros(TINY.width)}
  names = ("sft", "dpo", "flipped", "ipo", "language", "ga", "retain", "kl", "npo", "simnpo", "rmu")
  fixed |= {"weights": dict.fromkeys(names, jnp.float32(1))}
  of = toy_models.gradient_of
  for gradient, batch in (
    (memorising.private_gradient, private),
    (of(preferring.preference_loss(0.1)), sides | text),
    (of(unlearning.forget_loss(stage.settings)), forget),
  ):
    stacked = jax.tree.map(lambda x: np.stack([x, x]), batch)
    step = lambda start, batches, g=gradient: toy_models.adam_steps(g, start, batches, fixed, 1e-3)
    for platform in ("tpu", "cuda"):
      jax.export.export(jax.jit(step), platforms=(platform,))(toy_models.learner(params), stacked)
