"""The suite on a model that is pretrained for two steps: data order, columns, rows, bad input."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data import multimodal
from jaxmethods.errors import InputError
from jaxmethods.experiments.mllm_tuning.config import Config, rows
from jaxmethods.experiments.thanora import build as thanora
from jaxmethods.runtime import loop
from jaxmethods.runtime.config import load as load_config
from jaxmethods.stats.losses import IGNORED
from jaxmethods.testbeds.multimodal import pretraining, questions, suite, tuning
from jaxmethods.testbeds.multimodal.benchmark import limited, load
from jaxmethods.testbeds.multimodal.settings import Desk
from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS, Row
from jaxmethods.tuning.tuner import EVERYTHING, selected

DESK = Desk(
  width=16, num_layers=1, num_heads=2, mlp_width=32, tower_width=8, tower_layers=1, tower_heads=1,
  tower_steps=2, steps=2, limit=24,
)  # fmt: skip
CONFIG = Config(
  desk=DESK, steps=3, batch_size=4, probe_size=4, last=1, rank=4, vera_rank=8, oft_block=16, prune_at=1
)  # fmt: skip


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    first = load(DESK, ("digits", "captions"))
    again = load(DESK, ("digits", "captions"))
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
      np.testing.assert_array_equal(a, b)
    yield first


def test_questions_are_encoded_with_their_answers(benchmark):
  captions, words = benchmark.targets["captions"].train, benchmark.vocabulary
  assert captions.ids.shape[1:] == (1, 7)
  for ids, labels in zip(captions.ids[:, 0], captions.labels[:, 0], strict=True):
    place = list(ids).index(words.answer)
    answer = words.decode(labels[labels != IGNORED])
    assert np.flatnonzero(labels != IGNORED).tolist() == [place, place + 1, place + 2]
    assert answer.startswith("a ")
    assert words.decode(ids[place + 1 : place + 3]) == " ".join(answer.split()[:2])
  source = multimodal.easy_vqa()
  asked = benchmark.upstream.test
  kept = limited(source, DESK.limit)
  assert (asked.family >= 0).sum() == (kept.split == "test").sum()
  assert ((asked.labels != IGNORED).sum(-1) == (asked.family >= 0)).all()


def test_every_word_is_repeated(benchmark):
  """The texts of the pretraining's repeats: a word, and the same word as its answer."""
  words = benchmark.vocabulary
  ids, labels = (np.asarray(x) for x in pretraining.repeats(words, 6))
  assert sorted(words.decode(row[1:2]) for row in ids) == sorted(words.spoken)
  assert not set(words.spoken) & {"<pad>", "<bos>", "<ans>"}
  for row, label in zip(ids, labels, strict=True):
    assert row.tolist() == [words.begin, row[1], words.answer, *[words.pad] * 3]
    assert label.tolist() == [IGNORED, IGNORED, row[1], *[IGNORED] * 3]


def test_batches_are_an_epoch_and_follow_the_key(benchmark):
  train = benchmark.targets["digits"].train
  marked = train._replace(family=np.arange(len(train.ids))[:, None])
  draw = lambda key, step: questions.draw(marked, jax.random.key(key), step, 5)["family"][:, 0]
  epochs = [np.concatenate([draw(0, 4 * e + i) for i in range(4)]) for e in range(2)]
  for epoch in epochs:
    assert len(set(epoch.tolist())) == 20
  assert (epochs[0] != epochs[1]).any()
  assert (draw(0, 3) == draw(0, 3)).all()
  assert (draw(0, 3) != draw(1, 3)).any()


def test_families_are_chosen_alike(benchmark):
  upstream = benchmark.upstream.train
  batch = questions.draw(upstream, jax.random.key(0), 0, 8)
  chosen = questions.choose_questions(batch, jax.random.key(1), 4000)
  for row in range(8):
    present = np.unique(batch["family"][row][batch["family"][row] >= 0])
    found, counts = np.unique(chosen["family"][row], return_counts=True)
    np.testing.assert_array_equal(found, present)
    np.testing.assert_allclose(counts / 4000, 1 / len(present), atol=0.05)
  # The chosen texts are the image's own.
  texts = {tuple(t) for t in np.asarray(batch["ids"][0][batch["family"][0] >= 0]).tolist()}
  assert {tuple(t) for t in np.asarray(chosen["ids"][0]).tolist()} <= texts


def test_accuracy_counts_whole_answers():
  """A model that reads the answers off a table, wrong in one word of one caption."""
  words = 9
  labels = np.full((3, 2, 4), IGNORED, np.int32)
  labels[:, 0, 1:3] = [[1, 2], [3, 4], [5, 6]]
  labels[:2, 1, 3] = [7, 8]
  family = np.array([[0, 1], [0, 1], [0, -1]])
  says = np.where(labels == IGNORED, 0, labels)
  says[1, 0, 2] = 1
  split = questions.Split(np.arange(3.0), np.zeros((3, 2, 4), np.int32), labels, family)

  class Answer:
    def __init__(self, features):
      self.logits = jax.nn.one_hot(jnp.asarray(says)[features.astype(int)], words)

  result = questions.accuracies(
    lambda ids, features: Answer(features), split, ("caption", "word", "none")
  )
  np.testing.assert_allclose(result["caption"], 200 / 3, rtol=1e-6)
  assert (result["word"], result["none"]) == (100, 0)


# Rows whose evaluation differs from that of plain parameters, and one of those.
EVALUATED = ("base", "full", "dare", "tailor", "prompt", "prefix", "lora", "loramoe")


def test_every_row_starts_and_keeps_its_shape(benchmark):
  """Traced, not compiled: a step maps the state to one like it, and all columns are there."""
  assert set(PARADIGMS) == set(Row.__args__)
  columns = None
  for name, config in rows(CONFIG).items():
    experiment = loop.ordered(suite.build(config, benchmark=benchmark))
    state = jax.eval_shape(experiment.init, jax.random.key(0))
    after, metrics = jax.eval_shape(experiment.step, state, next(experiment.batches(0)))
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert describe(after) == describe(state), name
    assert metrics["loss"].shape == ()
    if name not in EVALUATED:
      continue
    evaluated = list(jax.eval_shape(experiment.evaluate, state, experiment.test))
    assert evaluated[0] == "H"
    assert columns is None or evaluated == columns
    columns = evaluated
  assert set(multimodal.FAMILIES) < set(columns)


def test_training_forgets_reproducibly(benchmark):
  """Two runs from one seed end alike; other seeds see the data in another order."""
  config = dataclasses.replace(CONFIG, row="full", steps=12, learning_rate=3e-2)
  experiment = suite.build(config, benchmark=benchmark)
  step = jax.jit(experiment.step)

  def run(seed):
    state, losses = experiment.init(jax.random.key(seed)), []
    for _, batch in zip(range(config.steps), experiment.batches(0), strict=False):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
    return state, losses

  (one, first), (two, second), (_, other) = run(1), run(1), run(2)
  assert first == second
  assert first[0] != other[0]
  assert np.mean(first[-3:]) < 0.8 * first[0]
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_array_equal(a, b)
  result = jax.jit(experiment.evaluate)(one, experiment.test)
  before = experiment.test["before"]
  change = [result[name] - before["source"][name] for name in multimodal.FAMILIES]
  np.testing.assert_allclose(result["F"], np.mean(change), atol=1e-3)
  assert result["params_percent"] < 100
  assert result["mergeable"] == 1
  assert set(experiment.figures(one)) == {"accuracy"}


def test_a_mixture_has_both_tasks(benchmark):
  parts = (benchmark.targets["digits"].train, benchmark.upstream.train)
  batch = tuning.batch_of(parts, jax.random.key(0), jnp.int32(0), 5)
  assert batch["ids"].shape == (5, 1, parts[1].ids.shape[-1])
  digit = benchmark.vocabulary.words.index("digit")
  assert (batch["ids"] == digit).any(-1)[:, 0].tolist() == [True] * 3 + [False] * 2
  alone = tuning.batch_of(parts[:1], jax.random.key(0), jnp.int32(0), 3)
  np.testing.assert_array_equal(alone["features"], batch["features"][:3])
  assert ((batch["labels"] != IGNORED).sum((1, 2)) == 1).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dare_rate": 1.0}, "dare_rate: must be in"),
    ({"rank": 0}, "rank: must be at least 1"),
    ({"last": 2}, "last: must be at most the 1 layers"),
    ({"rates": {"loar": 0.1}}, "rates: 'loar' is no row"),
    ({"projector_rate": -1.0}, "projector_rate: must be at least 0"),
    ({"desk": {"steps": 0}}, "desk.steps: must be at least 1"),
  ],
)
def test_impossible_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    if "desk" in changes:
      dataclasses.replace(DESK, **changes["desk"])
    else:
      dataclasses.replace(CONFIG, **changes)


def test_keys_of_the_cache_outlive_names_of_classes():
  """The bytes of the first version: a pretrained model is not trained anew."""
  described = pretraining.described_model(pretraining.model_of(Desk(), 77))
  assert described.startswith(
    b"DeskMLLM(\n    # attributes\n    config = DeskConfig(language=Causal"
  )
  assert described.endswith(
    b"image_size=64, stem=32)\n    scan_layers = False\n    dtype = float32\n)"
  )
  assert hashlib.sha256(described).hexdigest()[:16] == "35f6761782e9bef7"


def test_a_mesh_is_refused(benchmark):
  mesh = jax.make_mesh((1,), ("data",))
  with pytest.raises(InputError, match="--mesh: the small model runs on one device"):
    suite.build(CONFIG, mesh, benchmark)
  with pytest.raises(InputError, match="--mesh: the small model runs on one device"):
    thanora.build(thanora.Config(desk=DESK), mesh)


def test_bad_input(benchmark):
  with pytest.raises(InputError, match="batch_size: 100 is more than the 24 training images"):
    tuning.build(
      dataclasses.replace(CONFIG, batch_size=100),
      selected(EVERYTHING),
      benchmark=benchmark,
    )
  with pytest.raises(InputError, match="target 'digit': must be one of"):
    load(DESK, ("digit",))
  with pytest.raises(InputError, match="row: expected one of base"):
    load_config(Config, None, overrides=[("row", "lorra")])


def test_the_command(cli, tmp_path):
  """Pretrains shortly, and compares two rows."""
  compared = cli(
    "eval.compare", "--method", "mllm_tuning", "--short", "--rows", "base,full", "--seeds", "1",
    "--json", "out.json",
    JAXMETHODS_CACHE=str(tmp_path / "cache"),
  )  # fmt: skip
  assert compared.returncode == 0, compared.stderr
  assert "easy-vqa" in compared.stdout
  assert "real data" in compared.stdout
  found = json.loads((tmp_path / "out.json").read_text())["rows"]
  base, full = (row["metrics"] for row in found)
  assert next(iter(base)) == "H"
  assert base["F"]["mean"] == base["E"]["mean"] == base["params_percent"]["mean"] == 0
  assert full["params_percent"]["mean"] > 50
  assert found[1]["step_bytes"] > 1.5 * found[0]["step_bytes"]  # gradients, two moments of Adam
  (folder,) = (tmp_path / "runs/mllm_tuning").glob("compare-*")
  assert (folder / "tradeoff.png").stat().st_size > 10_000
