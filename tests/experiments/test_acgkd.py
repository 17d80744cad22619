"""The experiment around ACGKD: teachers, rows, phases, bad input."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import acgkd_tables
from jaxmethods.errors import InputError
from jaxmethods.experiments.acgkd import generator, teachers
from jaxmethods.experiments.acgkd.build import build
from jaxmethods.experiments.acgkd.config import Config, rows
from jaxmethods.models.graph_classifier import GraphEncoder
from tests.graphs.random_graphs import from_adjacencies

CONFIG = Config(
  data="tu:RINGS", teacher="trained", teacher_layers=3, teacher_width=8, teacher_epochs=2,
  student_width=4, batch_size=8, pseudo_graphs=10, gen_iters=4, gen_chunk=2, steps=4,
)  # fmt: skip
ROWS = rows(CONFIG)


def run(config):
  """Returns the experiment, the states before and after every step, and the metrics of every step."""
  experiment = build(config)
  states = [experiment.init(jax.random.key(config.seed))]
  step, history = jax.jit(experiment.step), []
  for _, batch in zip(range(experiment.num_steps), experiment.batches(0), strict=False):
    state, metrics = step(states[-1], batch)
    states.append(state)
    history.append(jax.device_get(metrics))
  return experiment, states, history


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_graphs_here):
  """Trains ACGKD once."""
  return run(ROWS["acgkd"])


pytestmark = pytest.mark.usefixtures("tiny_graphs_here")


def test_phases_of_a_run(trained):
  experiment, states, history = trained
  assert experiment.num_steps == 2 + 4
  first, made, last = states[0], states[2], states[-1]
  chex.assert_trees_all_equal(made.student, first.student)  # generation leaves the student alone
  chex.assert_trees_all_equal(last.pseudo, made.pseudo)  # and distillation the graphs
  assert (made.pseudo.log_odds != first.pseudo.log_odds).any()
  assert history[1]["loss"] <= history[0]["loss"]  # the best so far
  assert [int(m["graphs"]) for m in history] == [0, 0, 3, 7, 10, 10]
  assert history[2]["temperature"] == pytest.approx(2)  # r(0) = 0: it has not moved
  assert history[-1]["temperature"] != history[2]["temperature"]
  assert all(np.isfinite(value) for metrics in history for value in metrics.values())
  for words in ("reconstruction", "tu:RINGS (30 graphs, ", "; data of yours; "):
    assert words in experiment.about


def test_the_learning_rate_comes_with_the_batch(trained):
  experiment, states, _ = trained
  step, batch = jax.jit(experiment.step), next(experiment.batches(2))
  assert batch.learning_rate == np.float32(CONFIG.learning_rate)
  chex.assert_trees_all_equal(step(states[2], batch)[0].student.params, states[3].student.params)
  still = step(states[2], batch._replace(learning_rate=jnp.float32(0)))[0]
  chex.assert_trees_all_equal(still.student.params, states[2].student.params)


def test_the_rate_with_the_best_validation_is_chosen():
  runs = lambda *values: {i: {"validation_accuracy": value} for i, value in enumerate(values)}
  tried = {0.01: runs(0.5, 0.6), 0.001: runs(0.8, 0.4), 0.0001: runs(0.9)}  # the last is unfinished
  assert acgkd_tables.best_rate(tried, 0.01) == 0.001
  unjudged = {rate: {1: {"test_accuracy": 1.0}} for rate in (0.03, 0.01)}
  assert acgkd_tables.best_rate(unjudged, 0.01) == 0.01
  assert acgkd_tables.best_rate(unjudged, 0.001) == 0.03


@pytest.mark.parametrize("name", ["acgkd", "gfkd", "real", "teacher"])
def test_a_run_traces_without_values(name):
  """`init` may be traced, and the step is a program for other backends; no weight is baked into it."""
  config = dataclasses.replace(ROWS[name], form="edges", student_width=32)
  experiment = build(config)
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  work = jax.eval_shape(lambda: next(experiment.batches(0)))
  exported = jax.export.export(jax.jit(experiment.step), platforms=("tpu", "cuda"))(state, work)
  assert exported.platforms == ("tpu", "cuda")
  teacher = jax.tree.leaves(work.teacher)
  consts = jax.make_jaxpr(experiment.step)(state, work).consts
  assert teacher and not any(x.shape == w.shape for x in consts for w in teacher)


def test_the_key_of_the_cached_teachers_is_that_of_the_first_version():
  training = teachers.Training(GraphEncoder("gin", 5, 64, symmetric=True), 300, 0.01, 0.5)
  assert teachers.described(training, 32) == (
    b"(GraphEncoder(\n    # attributes\n    kind = 'gin'\n    layers = 5\n    width = 64\n"
    b"    projection = 0\n    batch_norm = True\n    symmetric = True\n), 300, 32, 0.01, 0.5)"
  )


def test_the_teacher_is_never_changed(trained):
  experiment, states, _ = trained
  before, after = experiment.test.teacher, build(ROWS["acgkd"]).test.teacher
  chex.assert_trees_all_equal(before, after)  # the second comes from the cache
  assert set(states[-1].student.params) == {"encoder"}  # no classifier of its own
  assert "projection" in states[-1].student.params["encoder"]


def test_candidates_get_no_gradient_beyond_their_count(trained):
  _, (first, *_, last), _ = trained
  padding = ~np.asarray(first.pseudo.pairs.mask)
  assert padding.any()
  np.testing.assert_array_equal(
    np.asarray(first.pseudo.log_odds)[padding], np.asarray(last.pseudo.log_odds)[padding]
  )


def test_both_forms_make_the_same_graphs(trained):
  _, states, _ = trained
  _, others, _ = run(dataclasses.replace(ROWS["acgkd"], form="edges"))
  ours, theirs = (s[-1].pseudo for s in (states, others))
  assert ours.pairs.order is None and theirs.pairs.order is not None
  np.testing.assert_allclose(ours.best.loss, theirs.best.loss, rtol=1e-3)
  np.testing.assert_allclose(ours.best.log_odds, theirs.best.log_odds, rtol=1e-2, atol=1e-2)


def test_graphs_made_straight_through_survive_hardening():
  """The kept graphs equal those that the teacher saw, down to its batch-norm statistics."""
  material = teachers.load(CONFIG)

  def gaps(relaxation):
    """Returns the gaps of the hardened start, of the best iterate as seen, and of the final graphs."""
    config = dataclasses.replace(
      CONFIG, relaxation=relaxation, gen_iters=100, gen_chunk=100, structure_lr=1.0, xi=1.0,
      bn_weight=1.0,
    )  # fmt: skip
    sizes = generator.choose_sizes(config, material)
    made = generator.Generator(config, sizes, material.encoder)
    key = jax.random.key(0)
    first = generator.start(made, key, material.teacher)
    generate = jax.jit(functools.partial(generator.generate, made))
    last = generate(material.teacher, first, jnp.int32(0), key)
    assert set(np.unique(generator.final(made, last)[0])) <= {0, 1}
    return float(first.gap), float(last.best.terms["batch_norm"]), float(last.gap)

  before, seen, kept = gaps("straight_through")
  assert kept == pytest.approx(seen, rel=0.01)
  assert kept < before
  _, seen, kept = gaps("soft")
  assert kept != pytest.approx(seen, rel=0.01)  # so this is no property of the problem


def test_rows_that_differ_in_the_student_share_their_graphs(trained):
  _, states, _ = trained
  graphs_of = acgkd_tables.graphs_of
  for name in ("no_curriculum", "fixed_temperature", "own_classifier"):
    assert graphs_of(ROWS[name]) == graphs_of(ROWS["acgkd"])
  made = {acgkd_tables.graph_id(row) for row in ROWS.values()}
  assert len(made) == 8  # the four above, and each of the other rows
  _, others, _ = run(dataclasses.replace(ROWS["own_classifier"], student_kind="gin", steps=1))
  chex.assert_trees_all_equal(states[-1].pseudo, others[-1].pseudo)


@pytest.mark.parametrize("name", ["gfkd", "deepinversion", "random", "real", "teacher"])
def test_rivals(name):
  experiment, states, history = run(ROWS[name])
  evaluated = jax.jit(experiment.evaluate)(states[-1], experiment.test)
  assert all(np.isfinite(value) for value in evaluated.values())
  assert all(np.isfinite(metrics["loss"]) for metrics in history)
  pseudo = states[-1].pseudo
  if name in ("real", "teacher"):
    assert pseudo is None
  else:
    assert evaluated["structure_parameters"] == pseudo.pairs.mask.sum()
    fixed = (states[0].pseudo.log_odds == pseudo.log_odds).all()
    assert fixed == (name != "gfkd")
    assert (states[0].pseudo.features == pseudo.features).all() == (name == "random")
  assert ("validation_accuracy" in evaluated) == (name not in ("real", "teacher"))
  if name != "teacher":
    assert "head" in states[-1].student.params
    assert history[-1]["temperature"] == 2
  if name == "teacher":
    assert evaluated["test_accuracy"] == evaluated["teacher_accuracy"]


def test_rows():
  assert next(iter(ROWS)) == "acgkd"
  assert set(ROWS) == {
    "acgkd", "no_curriculum", "fixed_temperature", "own_classifier", "all_pairs",
    "soft", "gfkd", "deepinversion", "random", "real", "teacher",
  }  # fmt: skip
  protocol = ("data", "steps", "batch_size", "split_seed", "teacher", "student_width", "gen_iters")
  for row in ROWS.values():
    assert all(getattr(row, key) == getattr(CONFIG, key) for key in protocol)


def test_figures(trained):
  experiment, states, _ = trained
  assert set(experiment.figures(states[-1])) == {"pseudo_graphs", "easy_to_hard"}


def test_split_is_seeded_and_complete():
  train, test = teachers.split(188, 0.7, 29)
  assert len(train) == 131 and sorted([*train, *test]) == list(range(188))
  np.testing.assert_array_equal(train, teachers.split(188, 0.7, 29)[0])


def test_spatial_complexity_modes():
  material = teachers.load(CONFIG)
  sizes = {
    mode: generator.choose_sizes(dataclasses.replace(CONFIG, xi_mode=mode), material)
    for mode in ("pairs", "nodes", "penalty")
  }
  assert sizes["nodes"].high < sizes["pairs"].high == sizes["penalty"].high
  assert sizes["nodes"].low >= 2


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("key", "options"),
  [
    ("xi", {"xi": 0.0}),
    ("xi", {"xi": 1.5}),
    ("concrete_temperature", {"concrete_temperature": 0.0}),
    ("min_nodes", {"min_nodes": 1, "max_nodes": 4}),
    ("max_nodes", {"max_nodes": 4}),
    ("pseudo_graphs", {"pseudo_graphs": -1}),
    ("gen_iters", {"gen_iters": 5}),
    ("tau", {"tau": 9.0}),
    ("teacher", {"teacher": "mine"}),
    ("student_layers", {"student_layers": 1}),
    ("curriculum_start", {"curriculum_start": 0.0}),
    ("dropout", {"dropout": 1.0}),
  ],
)
def test_impossible_values_name_their_key(key, options):
  with pytest.raises(ValueError, match=f"^{key}: "):
    dataclasses.replace(CONFIG, **options)


def save_teacher(path, features=3, classes=2, width=4, norms=True):
  """Saves a GCN-2 under the published names."""
  rng = np.random.default_rng(0)
  arrays = {
    "gcnlayers.0.weight": rng.normal(size=(features, width)),
    "gcnlayers.0.bias": np.zeros(width),
    "linears_prediction.weight": rng.normal(size=(classes, width)),
    "linears_prediction.bias": np.zeros(classes),
  }
  if norms:
    arrays |= {f"norms.0.{leaf}": np.ones(width) for leaf in ("weight", "running_var")}
    arrays |= {f"norms.0.{leaf}": np.zeros(width) for leaf in ("bias", "running_mean")}
  np.savez(path, **{f"teacher/{k}": v.astype(np.float32) for k, v in arrays.items()})
  return dataclasses.replace(CONFIG, teacher=f"npz:{path}")


def test_a_teacher_without_batch_norm_is_used_and_said(tmp_path):
  config = save_teacher(tmp_path / "t.npz", norms=False)
  experiment, _, history = run(config)
  assert "without batch normalisation: that term of the generation is dropped" in experiment.about
  assert all(metrics["generation/batch_norm"] == 0 for metrics in history)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"classes": 3}, "teacher has 3 classes, tu:RINGS has 2"),
    ({"features": 5}, "teacher reads 5 features, the nodes of tu:RINGS have 3"),
  ],
)
def test_a_teacher_that_does_not_fit(tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    teachers.load(save_teacher(tmp_path / "t.npz", **options))


def test_teacher_files_that_cannot_be_read(tmp_path):
  config = dataclasses.replace(CONFIG, teacher=f"npz:{tmp_path / 't.npz'}")
  with pytest.raises(InputError, match="no such file"):
    teachers.load(config)
  (tmp_path / "t.npz").write_bytes(b"PK\x03\x04")
  with pytest.raises(InputError, match="not a readable npz"):
    teachers.load(config)
  np.savez(tmp_path / "t.npz", x=np.zeros(3))
  with pytest.raises(InputError, match="no arrays teacher"):
    teachers.load(config)
  np.savez(tmp_path / "t.npz", **{"teacher/other.weight": np.zeros(3)})
  with pytest.raises(InputError, match=r"other\.weight: not a weight of a GFKD network"):
    teachers.load(config)
  with pytest.raises(InputError, match="the published one belongs to"):
    teachers.load(dataclasses.replace(CONFIG, teacher="published"))


def test_zero_nodes(monkeypatch):
  data = from_adjacencies(
    [np.ones((3, 3)) - np.eye(3), np.zeros((0, 0))], [np.eye(3), np.zeros((0, 3))], [0, 1], 2
  )
  monkeypatch.setattr(teachers.sources, "load_graphs", lambda name, max_degree: [data])
  with pytest.raises(InputError, match="graph 1 has no nodes"):
    teachers.load(CONFIG)


def test_an_empty_part_of_the_split():
  with pytest.raises(InputError, match="train_share"):
    teachers.split(3, 0.1, 29)


def test_one_line_from_the_command_line(cli, tiny_graphs_environment):
  result = cli(
    "train.run", "--method", "acgkd", "--data", "tu:RINGS", "--xi", "1.5", **tiny_graphs_environment
  )
  assert result.returncode == 2
  assert result.stderr == "error: xi: must be in (0, 1], got 1.5\n"


def test_one_program_for_all_steps(trained):
  experiment, states, _ = trained
  once = chex.assert_max_traces(lambda state, work: experiment.step(state, work), n=1)
  step = jax.jit(once)
  batches = experiment.batches(0)
  state = states[0]
  for _ in range(3):
    state, _ = step(state, next(batches))
  assert jnp.isfinite(state.pseudo.best.loss)
