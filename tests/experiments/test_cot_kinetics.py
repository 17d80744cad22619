"""The CoT-Kinetics experiment: a small model that reasons, a given one, and the command line."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data import arithmetic, array_cache
from jaxmethods.data.model_sources import load_causal_lm
from jaxmethods.errors import InputError
from jaxmethods.experiments.cot_kinetics import (
  build,
  config as cot_kinetics,
  evidence as trust,
  exam,
  given,
  report,
  texts,
  trained,
)
from jaxmethods.methods import cot_kinetics as method
from jaxmethods.models.causal_lm import CausalLM
from jaxmethods.runtime import config as config_lib
from jaxmethods.stats import confidence
from jaxmethods.testbeds.language.writer import Writer, Written

SMALL = {
  "steps": 2, "num_problems": 12, "calibration": 6, "operations": 1, "width": 16, "layers": 2,
  "heads": 2, "batch_size": 32, "samples": 2, "dropout_passes": 2, "temperatures": (1.0,),
  "bootstrap": 20,
}  # fmt: skip
METHOD = ("--method", "cot_kinetics")
FLAGS = [
  word for key, value in SMALL.items() if key != "temperatures" for word in (f"--{key}", value)
]
RANDOM_MODEL = {
  "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
}  # fmt: skip


def config(**changes):
  return cot_kinetics.Config(**(SMALL | changes))


# --- the small model ------------------------------------------------------------------------------


def test_answers_are_read_from_the_tokens():
  texts = ["3+4=7#7.", "3+4=7;7*2=14#014.", "3+4=7", "3+4=7#.", "3+4=7#1+.", "#7.", "3+4=7#71"]
  size = max(map(len, texts))
  tokens = jnp.stack([jnp.asarray(arithmetic.encode(t.ljust(size))) for t in texts])
  reasoning, answer_at, value = exam.inspect(tokens, jnp.array([len(t) for t in texts]))
  np.testing.assert_array_equal(value, [7, 14, -1, -1, -1, 7, -1])
  np.testing.assert_array_equal(reasoning, [5, 12, 5, 5, 5, 3, 5])  # all, if nothing was thought
  np.testing.assert_array_equal(answer_at[:3], [6, 13, 4])
  parts = trust.segments(reasoning, jnp.array([len(t) for t in texts]), size)
  assert parts.shape == (7, 3, size)
  np.testing.assert_array_equal(parts[:, 1], parts[:, 0] | parts[:, 2])
  assert not (parts[:, 0] & parts[:, 2]).any()


def test_solutions_are_learned():
  """The loss of a model that is asked for one operation only."""
  settings = config(steps=150, width=32, learning_rate=1e-2)
  experiment = trained.build(settings)
  state, batches = experiment.init(jax.random.key(0)), experiment.batches(0)
  step = jax.jit(experiment.step)
  losses = []
  for _ in range(settings.steps):
    state, metrics = step(state, next(batches))
    losses.append(float(metrics["loss"]))
  assert losses[0] > 2.5
  assert np.mean(losses[-5:]) < 0.6 * losses[0]


@pytest.fixture(scope="module")
def evidence():
  """Hand-made evidence: 40 answers, the right ones move straight."""
  rng = np.random.default_rng(0)
  n, layers, width = 40, 4, 8
  correct = np.arange(n) % 2 == 0
  noise = np.where(correct, 0.1, 2.0)[:, None, None, None]
  z = np.cumsum(1 + noise * rng.normal(size=(n, 3, layers + 1, width)), 2).astype("f4")
  path = method.path(jnp.asarray(z))
  terms = jax.tree.map(lambda x: x.mean(-1), method.terms(path))
  chain = method.chain_of_embedding(z[:, 1])
  each = jnp.asarray(rng.random(n), jnp.float32)
  facts = trust.Facts(
    jnp.ones(n, bool), jnp.asarray(correct), jnp.ones(n, bool), jnp.full(n, 5), jnp.full(n, 6),
    each, each, each, jnp.ones(n, jnp.int32),
  )  # fmt: skip
  tokens = dict.fromkeys(("max_prob", "max_log_prob", "log_prob", "entropy", "energy"), each)
  scaled = jnp.where(correct[:, None], 0.9, 0.3) ** jnp.asarray(trust.SCALES)
  found = trust.Evidence(
    facts, {"residual": path, "with_final_norm": path}, terms,
    jnp.stack([chain.real, chain.complex], -1), tokens, scaled,
    confidence.DropoutStatistics(each, each, each),
  )  # fmt: skip
  return jax.tree.map(lambda x: x[None], found)


def test_judging(evidence):
  compared = cot_kinetics.trial(config(calibration=10))
  result = jax.jit(lambda e: trust.judge(e, compared))(evidence)
  assert result["auroc"] == result["auroc/cot_kinetics"]
  # All answers of the fixture are equally long: nothing is left out; and none has more steps.
  for name in ("cot_kinetics", "random", "max_prob"):
    np.testing.assert_allclose(
      result[f"auroc_same_length/{name}"], result[f"auroc/{name}"], atol=1e-5
    )
  assert result["auroc/steps"] == result["auroc/length"] == 0.5
  for name in ("cot_kinetics", "kinetics_calibrated", "temperature_scaled"):
    assert result[f"auroc/{name}"] == pytest.approx(1), name
  assert 0.2 < result["auroc/random"] < 0.8
  assert result["accuracy"] == 0.5
  assert set(result) >= {f"auroc/{name}" for name in compared.names}
  for name in ("max_prob", "length", "coe_r"):  # every number under its own name
    one = trust.judge(evidence, compared._replace(names=(name,), score=name))
    np.testing.assert_allclose(one["auroc"], result[f"auroc/{name}"], atol=1e-5)
  energy = np.asarray(trust.kinetics(jax.tree.map(lambda x: x[0], evidence), compared.energy))
  assert energy[::2].min() > energy[1::2].max()


def test_the_test_problems_do_not_touch_what_is_calibrated(evidence):
  """Other labels of the test problems change no score."""
  compared = cot_kinetics.trial(config(calibration=10))
  first = jax.tree.map(lambda x: x[0], evidence)
  correct = first.facts.correct
  flipped = first._replace(facts=first.facts._replace(correct=correct.at[10:].set(~correct[10:])))
  before, after = (trust.scores(e, compared) for e in (first, flipped))
  for name in compared.names:
    np.testing.assert_array_equal(before[name], after[name])


def test_padding_of_the_last_batch_is_not_judged(evidence):
  compared = cot_kinetics.trial(config(calibration=10))._replace(names=("cot_kinetics",))
  longer = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :7]], 1), evidence)
  real = jnp.arange(47) < 40
  longer = longer._replace(facts=longer.facts._replace(real=real[None]))
  for name, value in trust.judge(longer, compared).items():
    np.testing.assert_allclose(value, trust.judge(evidence, compared)[name])


def test_all_answers_right_is_said(evidence):
  compared = cot_kinetics.trial(config(calibration=10))._replace(names=("cot_kinetics", "length"))
  facts = evidence.facts._replace(correct=jnp.ones((1, 40), bool))
  right = evidence._replace(facts=facts)
  assert np.isnan(trust.judge(right, compared)["auroc"])
  text, _ = report.table(report.finished(right), compared, ["all of them"])
  assert "All answers are right" in text and "undefined" in text


def test_rows_share_one_model(tmp_path, monkeypatch):
  """A row takes the answers of the trained model from the cache, and they are what training gives."""
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  rows = cot_kinetics.rows(config())
  assert next(iter(rows)) == "cot_kinetics"
  key = jax.random.key(3)
  kept = {}
  for name in ("cot_kinetics", "kinetics_momentum", "max_prob"):
    experiment = build.build(rows[name])
    assert experiment.num_steps == 1
    kept[name] = experiment.init(key)
    result = experiment.evaluate(kept[name], experiment.test)
    np.testing.assert_array_equal(result["auroc"], result[f"auroc/{name}"])
  assert len(list((tmp_path / "reasoners").iterdir())) == 1
  plain = build.build(config())
  state, batches, step = plain.init(key), plain.batches(0), jax.jit(plain.step)
  for _ in range(SMALL["steps"]):
    state, _ = step(state, next(batches))
  evaluated = jax.jit(plain.evaluate)(state, plain.test)
  assert evaluated["answered"] == kept["max_prob"].facts.answered[:, SMALL["calibration"] :].mean()


@pytest.mark.parametrize("reuse", [False, True])
def test_a_start_without_values_and_steps_for_other_devices(reuse):
  experiment = build.build(config(reuse=reuse))
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
  batch = next(experiment.batches(0))
  exported = jax.export.export(jax.jit(experiment.step), platforms=["tpu", "cuda"])(state, batch)
  assert exported.platforms == ("tpu", "cuda")


def test_a_mesh_is_refused():
  mesh = jax.make_mesh((1,), ("clients",))
  for model in (cot_kinetics.TRAINED, "tiny:stories260k"):
    with pytest.raises(InputError, match="--mesh: cot_kinetics runs on one device"):
      build.build(config(model=model), mesh)


def test_kept_answers_outlive_a_rename():
  settings = config()
  assert array_cache.described(settings, "Config") == repr(settings).encode()


# --- a given model --------------------------------------------------------------------------------


class Spelling:
  """A tokenizer of single characters."""

  eos_token_id, chat_template = 1, None

  def encode(self, text):
    return [ord(c) % 62 + 2 for c in text]

  def decode(self, tokens, skip_special_tokens=True):
    return "".join(chr(int(t)) for t in tokens if t > 1)


@pytest.mark.parametrize(
  ("text", "reasoning", "answer_at"),
  [
    ("1+2=3</think>It is 3", 5, 19),
    ("1+2=3 Answer: 3", 6, 14),
    ("1+2=3", 5, 4),  # no marker
    ("aAnswer: 3", 10, 9),  # one token of reasoning
  ],
)
def test_the_reasoning_segment(text, reasoning, answer_at):
  tokens = np.array([[ord(c) for c in text]])
  n = len(text)
  written = Written(tokens, tokens > 0, np.array([n]), np.zeros(1), np.array([True]), [text])
  writer = Writer.__new__(Writer)
  writer.tokenizer = Spelling()
  assert texts.span(writer, written, 0, "</think>", n) == (reasoning, answer_at)


def test_a_given_model_steps_on_other_devices(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  loaded = load_causal_lm(f"random:{json.dumps(RANDOM_MODEL)}")
  loaded = loaded._replace(files=loaded.files._replace(tokenizer=Spelling))
  monkeypatch.setattr(given, "load_causal_lm", lambda name: loaded)
  settings = config(
    model="random", verbalised=False, max_new_tokens=4, num_problems=3, calibration=2, batch_size=3
  )
  experiment = build.build(settings)
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  batch = next(experiment.batches(0))
  assert batch.params is not None  # the weights are part of the step's input
  exported = jax.export.export(jax.jit(experiment.step), platforms=["tpu", "cuda"])(state, batch)
  assert exported.platforms == ("tpu", "cuda")
  one = loaded._replace(model=CausalLM(dataclasses.replace(loaded.model.config, num_layers=1)))
  monkeypatch.setattr(given, "load_causal_lm", lambda name: one)
  monkeypatch.setattr(given, "answer", None)  # refused before anything is written
  with pytest.raises(InputError, match="has 1 layer; the scores need at least 2"):
    build.build(settings)


def test_a_model_without_tokenizer_is_named():
  model = f"random:{json.dumps(RANDOM_MODEL)}"
  with pytest.raises(InputError, match="has no tokenizer"):
    build.build(config(model=model, verbalised=False))


# --- the command line -----------------------------------------------------------------------------

BAD = {
  "unknown score": ("train.run", ["--score", "vibes"], ["score", "vibes", "cot_kinetics"]),
  "score left out": (
    "train.run", ["--score", "self_consistency", "--samples", "0"], ["self_consistency"],
  ),
  "verbalised by the small model": ("train.run", ["--score", "verbalised"], ["verbalised"]),
  "one layer": ("train.run", ["--layers", "1"], ["layers", "at least 2"]),
  "unknown form": ("train.run", ["--form", "bent"], ["form", "turning, turning_sq"]),
  "odd width": ("train.run", ["--width", "30", "--heads", "4"], ["width", "30"]),
  "problems without a reader": (
    "train.run", ["--problems", "p.jsonl"], ["problems", "model"],
  ),
  "unknown model": (
    "eval.run", ["--model", "gpt"], ["unknown model 'gpt'", "hf:"],
  ),
  "missing problems": (
    "eval.run", ["--model", "tiny:stories260k", "--problems", "no.jsonl"], ["no.jsonl", "read"],
  ),
  "malformed problems": (
    "eval.run", ["--model", "tiny:stories260k", "--problems", "bad.jsonl"], ["bad.jsonl, line 2"],
  ),
  "nothing to judge on": (
    "eval.run", ["--model", "tiny:stories260k", "--problems", "p.jsonl"], ["calibration", "1"],
  ),
  "a reply missing": ("eval.run", ["--model", "x:y", "--examples", "[a]"], ["examples", "reply"]),
  "no run": ("eval.run", ["--workdir", "nowhere"], ["nowhere", "checkpoint"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(cli, tmp_path, case):
  (tmp_path / "p.jsonl").write_text('{"question": "2 + 2?", "answer": 4}\n')
  (tmp_path / "bad.jsonl").write_text('{"question": "2 + 2?", "answer": 4}\n{')
  module, arguments, words = BAD[case]
  result = cli(module, *METHOD, *arguments)
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  for word in words:
    assert word in line
  assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "bad.jsonl"}


def test_train_then_evaluate(cli, tmp_path):
  result = cli("train.run", *METHOD, *FLAGS, "--workdir", "w")
  assert result.returncode == 0, result.stderr
  assert "CoT-Kinetics is our reconstruction" in result.stdout
  result = cli("eval.run", *METHOD, "--workdir", "w")
  assert result.returncode == 0, result.stderr
  names = {path.name for path in (tmp_path / "w").iterdir()}
  assert {"energy.png", "auroc.png", "scores.md", "report.html", "results.json"} <= names
  assert "answers right" in (tmp_path / "w/scores.md").read_text()


def test_a_given_model_is_evaluated_without_training(cli, tmp_path):
  from jaxmethods.data.files import data_dir

  if not (data_dir() / "tiny_lm").is_dir():
    pytest.skip("no tiny_lm/ in $JAXMETHODS_DATA")
  questions = [f"Lily had {n} dogs." for n in range(5)]
  lines = [json.dumps({"question": q, "answer": "3"}) for q in questions]
  (tmp_path / "p.jsonl").write_text("\n".join(lines))
  command = (
    "eval.run", *METHOD, "--model", "tiny:stories260k", "--problems", "p.jsonl", "--batch_size", 2,
    "--max_new_tokens", 6, "--samples", 3, "--dropout_passes", 0, "--bootstrap", 20,
    "--workdir", "w", "--verbalised", "false",
  )  # fmt: skip
  cache = {"JAXMETHODS_CACHE": str(tmp_path / "cache")}
  result = cli(*command, **cache)
  assert result.returncode == 0, result.stderr
  ranked = [json.loads(line) for line in (tmp_path / "w/ranked.jsonl").read_text().splitlines()]
  # One of five calibrates: the default of 500 would leave none.
  assert [line["rank"] for line in ranked] == [1, 2, 3, 4]
  scores = [line["score"] for line in ranked]
  assert scores == sorted(scores, reverse=True)
  assert {line["question"] for line in ranked} == set(questions[1:])
  assert (tmp_path / "w/energy.png").exists()
  other = cli(*command, "--gamma", 0.5, **cache)
  assert other.returncode == 2 and "gamma (was 0.8, now 0.5)" in other.stderr


def test_the_config_files_are_what_they_say():
  folder = Path(__file__).parents[2] / "configs"
  for file in folder.glob("cot_kinetics*.yaml"):
    for short in (False, True):
      loaded = config_lib.load(cot_kinetics.Config, file, short=short, method="cot_kinetics")
      assert cot_kinetics.untrained(loaded) == (file.stem != "cot_kinetics"), file


def test_calibration_chooses_the_sign_too():
  energies = jnp.array([[1.0, 2, 3, 4, 9, 8], [0.0, 0, 1, 1, 5, 5]])
  correct = jnp.array([True, True, False, False, True, False])
  fit = jnp.arange(6) < 4
  np.testing.assert_array_equal(trust.best_form(energies, correct, fit), -energies[0])
  np.testing.assert_array_equal(trust.best_form(-energies, correct, fit), -energies[0])


def test_problems_of_two_kinds():
  problems = exam.make_exam(30, 3, 0, calibration=10, kinds=(2, 1))
  count = np.asarray((problems.prompts == arithmetic.CHARACTERS.index(";")).sum(1))
  assert count.tolist() == [2] * 10 + [1] * 20
  assert problems.prompts.shape[1] == arithmetic.sizes(3)[0]
  with pytest.raises(ValueError, match="exam_operations, calibration_operations"):
    config(exam_operations=1, calibration_operations=1)
  with pytest.raises(ValueError, match="exam_operations, calibration_operations"):
    config(exam_operations=4, calibration_operations=1)
  with pytest.raises(ValueError, match="calibration_problems"):
    config(calibration_problems="x.jsonl")
