"""The experiment around FedSSP: clients, rows, metrics, options; and that it learns."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jaxmethods.data import sources, splits
from jaxmethods.errors import InputError
from jaxmethods.experiments.fedssp import clients as client_data
from jaxmethods.experiments.fedssp.algorithms import VARIANTS
from jaxmethods.experiments.fedssp.build import build
from jaxmethods.experiments.fedssp.config import OURS, Config, rows
from jaxmethods.runtime import loop
from tests import tiny_graphs
from tests.graphs.random_graphs import from_adjacencies

pytestmark = pytest.mark.usefixtures("tiny_graphs_here")

CONFIG = Config(
  data=tiny_graphs.DATA, hidden=8, heads=2, layers=1, batch_size=8, steps=2, average_last=1
)
ONE_SET = dataclasses.replace(CONFIG, data="tu:RINGS")
ROWS = rows(CONFIG)


def run(config, rounds=None):
  """(experiment, final state, metrics of every round)."""
  experiment = build(config)
  state = experiment.init(jax.random.key(config.seed))
  step, _ = loop.compile_experiment(experiment, state, None)
  history = []
  for _, batch in zip(range(rounds or config.steps), experiment.batches(0), strict=False):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return experiment, state, history


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_the_method_its_ablations_and_its_rivals():
  assert set(ROWS) == {
    "fedssp", "fedssp_adam", "no_preference", "gsks", "pgpa", "share_extractor",
    "fedavg", "fedprox", "fedper", "gcfl", "local",
    "fedstar", "fedavg_spectral", "fedprox_spectral", "gcfl_spectral", "local_spectral",
  }  # fmt: skip
  protocol = ("data", "steps", "batch_size", "split_seed", "clients_per_domain", "average_last")
  for name, row in ROWS.items():
    assert row.algorithm == name.removesuffix("_spectral").removesuffix("_adam")
    ours = name in OURS or name == "fedssp_adam"
    assert (row.backbone == "spectral") == (name.endswith("_spectral") or ours)
    assert all(getattr(row, key) == getattr(CONFIG, key) for key in protocol)


def test_ablations_have_settings():
  assert set(VARIANTS) == set(OURS)


@pytest.mark.parametrize(
  "algorithm", sorted({row.algorithm for row in ROWS.values()} - {"fedstar"})
)
def test_an_algorithm_alone_runs_on_the_spectral_network(algorithm):
  assert dataclasses.replace(CONFIG, algorithm=algorithm).network == "spectral"


def test_fedstar_alone_picks_its_network():
  config = dataclasses.replace(CONFIG, algorithm="fedstar")
  assert config.network == "fedstar"
  experiment, _, history = run(config, rounds=1)
  assert np.isfinite(history[0]["loss"]) and experiment.about


def test_rows_for_any_width():
  """The rivals' own width need not fit the heads that only FedSSP's network has."""
  assert len(rows(dataclasses.replace(CONFIG, hidden=12, heads=3))) == len(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains(name):
  experiment, state, history = run(ROWS[name])
  for metrics in history:
    assert all(np.isfinite(value).all() for value in metrics.values()), metrics
    exchanged = {"local": 0, "local_spectral": 0, "pgpa": 2 * 4 * CONFIG.hidden}.get(name)
    assert metrics["bytes_up"] == exchanged if exchanged is not None else metrics["bytes_up"] > 0
  assert state.round == 2
  evaluated = jax.device_get(jax.jit(experiment.evaluate)(state, experiment.test))
  norm = evaluated.pop("preference_norm", None)
  assert (norm is None) == (ROWS[name].algorithm not in OURS)
  assert norm is None or (norm > 0) == (name not in ("gsks", "no_preference"))
  assert set(evaluated) == {
    "test_accuracy", "validation_accuracy", "test_accuracy/RINGS", "test_accuracy/TREES"
  }  # fmt: skip
  assert all(0 <= value <= 1 for value in evaluated.values())
  mean = (evaluated["test_accuracy/RINGS"] + evaluated["test_accuracy/TREES"]) / 2
  np.testing.assert_allclose(evaluated["test_accuracy"], mean, rtol=1e-6)
  figures = experiment.figures(state)
  spectral = ROWS[name].network == "spectral"
  assert set(figures) == ({"accuracy", "spectra"} if spectral else {"accuracy"})
  drawn = [text.get_text() for text in figures["accuracy"].axes[0].get_yticklabels()]
  assert drawn == ["RINGS", "TREES"]
  if spectral:
    panels = [axes for axes in figures["spectra"].axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["RINGS", "TREES"]
    for axes in panels:
      points = [line.get_ydata() for line in axes.get_lines() if len(line.get_ydata())]
      assert len(points) == CONFIG.heads and np.isfinite(points).all()
  for figure in figures.values():
    plt.close(figure)


@pytest.mark.parametrize("name", ["fedssp", "gcfl", "fedstar"])
def test_state_shapes_need_no_computation(name, monkeypatch):
  """One group of two widths, so that an input layer is padded, and one of three classes."""
  sets = [*sources.load_graphs(tiny_graphs.DATA), rings(20, features=lambda k: np.ones((5, 4)))]
  monkeypatch.setattr(sources, "load_graphs", lambda name: sets)
  experiment = build(dataclasses.replace(ROWS[name], padding_slack=9.0))
  shapes = jax.eval_shape(experiment.init, jax.random.key(0))
  drawn = experiment.init(jax.random.key(0))
  assert len(shapes.clients) == 2
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, drawn)
  # And traced it draws the same numbers.
  chex.assert_trees_all_equal(jax.jit(experiment.init)(jax.random.key(0)), drawn)


# --- the loop -------------------------------------------------------------------------------------


def test_one_trace_per_run_and_the_recorded_metrics(tmp_path):
  config = dataclasses.replace(ONE_SET, steps=4, checkpoint_every=2)
  experiment = build(config)
  counted = experiment._replace(
    # Lambdas: chex counts plain functions only.
    step=chex.assert_max_traces(lambda *args: experiment.step(*args), n=1),
    evaluate=chex.assert_max_traces(lambda *args: experiment.evaluate(*args), n=1),
  )
  workdir = tmp_path / "run"
  loop.train(counted, config, workdir, create_workdir=workdir.mkdir, title="test")
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  for line in lines:
    assert set(line) == {
      "step", "seconds", "loss", "cross_entropy", "alignment", "preference_norm", "bytes_up",
      "bytes_down", "test_accuracy", "validation_accuracy", "test_accuracy/RINGS",
    }  # fmt: skip
    assert line["loss"] == pytest.approx(line["cross_entropy"] + 100 * line["alignment"], rel=1e-4)
  assert lines[0]["alignment"] == lines[0]["preference_norm"] == 0
  assert lines[1]["alignment"] > 0 and lines[1]["preference_norm"] > 0
  for words in ("tu:RINGS (30 graphs, ", "; data of yours; "):
    assert words in experiment.about


@pytest.mark.parametrize("participation", [1, 0.5])
def test_programs_of_data_sets_and_one_program_agree(participation):
  config = dataclasses.replace(CONFIG, participation=participation)
  experiment = build(config)
  one, batch = experiment.init(jax.random.key(0)), next(experiment.batches(0))
  several, (step, evaluate) = one, experiment.programs
  whole_step, whole_evaluate = jax.jit(experiment.step), jax.jit(loop.ordered(experiment).evaluate)
  for _ in range(2):
    (one, expected), (several, found) = whole_step(one, batch), step(several, batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
  # A bias before a batch norm has no gradient but rounding errors, and Adam moves it all the same.
  for (path, a), b in zip(
    jax.tree.leaves_with_path(several.server), jax.tree.leaves(one.server), strict=True
  ):
    name = jax.tree_util.keystr(path)
    idle = "filter_encoder" in name and "linear" in name and "bias" in name
    np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=6 * config.learning_rate if idle else 1e-5, err_msg=name
    )
  expected, found = whole_evaluate(one, experiment.test), evaluate(several, experiment.test)
  assert list(found) == list(expected) and next(iter(found)) == "test_accuracy"
  chex.assert_trees_all_close(found, expected)
  assert build(ONE_SET).programs is None


@pytest.mark.parametrize("row", ["fedssp", "gcfl"])
def test_sets_in_one_shape_train_as_in_their_own(row, monkeypatch):
  """Two sets of different feature widths, one of three classes between them; also on a mesh."""
  (own, odd) = sources.load_graphs(tiny_graphs.DATA)
  wider = rings(40, features=lambda k: np.eye(5, 4) + k % 2, labels=np.arange(40) // 2 % 2)
  monkeypatch.setattr(sources, "load_graphs", lambda name: [own, odd, wider])
  config = dataclasses.replace(ROWS[row], dropout=0.0)
  mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
  found = []
  for slack, where in ((0.0, None), (9.0, mesh if row == "gcfl" else None)):
    experiment = build(dataclasses.replace(config, padding_slack=slack), where)
    state = experiment.init(jax.random.key(0))
    step, evaluate = loop.compile_experiment(experiment, state, where)
    history = []
    for _, batch in zip(range(3), experiment.batches(0), strict=False):
      state, metrics = step(state, batch)
      history.append(jax.device_get((metrics, evaluate(state, experiment.test))))
    assert len(state.clients) == (3 if slack == 0 else 2)
    found.append(history)
  chex.assert_trees_all_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_it_learns():
  """Ten kinds of digits shared out between two clients: chance, and the largest class, are 0.1."""
  config = Config(
    data="embedded:digit-graphs", clients_per_domain=2, hidden=16, heads=2, layers=1,
    batch_size=32, steps=20, average_last=1, learning_rate=5e-3,
  )  # fmt: skip
  experiment, state, history = run(config)
  evaluated = jax.jit(experiment.evaluate)(state, experiment.test)
  assert history[-1]["cross_entropy"] < 0.8 * history[0]["cross_entropy"]
  assert evaluated["test_accuracy"] > 0.35
  assert evaluated["validation_accuracy"] > 0.35


# --- options --------------------------------------------------------------------------------------


def test_preference_in_evaluation_is_an_option():
  answers = {}
  for use in (True, False):
    config = dataclasses.replace(ONE_SET, eval_preference=use)
    experiment = build(config)
    start = experiment.init(jax.random.key(0))
    (client,) = start.clients
    evaluate = jax.jit(experiment.evaluate)
    for sign in (-1, 1):
      # Pushes every answer to the one class or to the other.
      kernel = client.params["head"]["kernel"][0]
      push = 1e3 * sign * (kernel[:, 1] - kernel[:, 0])
      moved = start._replace(clients=(client._replace(preference=push[None]),))
      answers[use, sign] = float(evaluate(moved, experiment.test)["test_accuracy"])
  assert answers[False, -1] == answers[False, 1]
  assert answers[True, -1] + answers[True, 1] == pytest.approx(1)
  assert answers[True, -1] != answers[True, 1]


def test_participation():
  config = dataclasses.replace(ONE_SET, clients_per_domain=4, participation=0.5)
  experiment = build(config)
  state = experiment.init(jax.random.key(0))
  step, batch = jax.jit(experiment.step), next(experiment.batches(0))
  h, m = config.hidden, config.heads
  upload = 4 * (h * (h + 1) + h + m * h + h + h * h + h + 4 * h + h)
  drawn = []
  for _ in range(6):
    before = state.clients[0].params["head"]["kernel"]
    state, metrics = step(state, batch)
    moved = jnp.any(state.clients[0].params["head"]["kernel"] != before, (1, 2))
    drawn.append(tuple(moved.tolist()))
    assert sum(drawn[-1]) == 2 and np.isfinite(metrics["loss"])
    assert metrics["bytes_up"] == 2 * upload
  assert len(set(drawn)) > 1


# --- clients --------------------------------------------------------------------------------------


def make_clients(data, config):
  share = client_data.share_out(
    data, count=config.clients_per_domain, batch_size=config.batch_size, seed=config.split_seed
  )
  return client_data.pack_clients([share], (0,), lambda batch: batch, hidden=config.hidden)


def graph_ids(batches):
  """The graphs of each client, in order."""
  ids = batches.graphs.globals["id"]
  return [client[client >= 0] for client in ids.reshape(len(ids), -1)]


def test_one_client_holds_the_published_split():
  (data, _) = sources.load_graphs(tiny_graphs.DATA)
  clients = make_clients(data, CONFIG)
  assert clients.names == ["RINGS"] and clients.counts.tolist() == [24]
  train, validation, test = splits.stratified_split(data.labels, seed=123)
  ids = clients.train.graphs.globals["id"][0]
  for batch, expected in zip(ids, np.split(train, [8, 16]), strict=True):  # in the published order
    assert sorted(batch[batch >= 0]) == sorted(expected)
  held_out = clients.held_out.graphs.globals
  for number, expected in ((1, validation), (2, test)):
    assert sorted(held_out["id"][held_out["split"] == number]) == sorted(expected)
  assert (held_out["split"][held_out["id"] < 0] == 0).all()


def test_clients_of_one_domain_share_its_graphs():
  (data, _) = sources.load_graphs(tiny_graphs.DATA)
  config = dataclasses.replace(CONFIG, clients_per_domain=3, batch_size=4)
  clients = make_clients(data, config)
  assert clients.names == ["RINGS.0", "RINGS.1", "RINGS.2"]
  train, held_out = graph_ids(clients.train), graph_ids(clients.held_out)
  assert clients.counts.tolist() == [len(ids) for ids in train] == [8, 8, 8]
  assert sorted(np.concatenate(train + held_out)) == list(range(30))
  labels = clients.train.graphs.globals
  np.testing.assert_array_equal(
    labels["label"][labels["mask"]], data.labels[labels["id"][labels["mask"]]]
  )


def rings(count=20, without_edges=(), labels=None, features=None):
  ring = np.roll(np.eye(5), 1, 0) + np.roll(np.eye(5), -1, 0)
  return from_adjacencies(
    [0 * ring if k in without_edges else ring for k in range(count)],
    [np.ones((5, 2)) if features is None else features(k) for k in range(count)],
    np.arange(count) % 2 if labels is None else labels,
    2,
  )


def test_graphs_without_edges_are_left_out_and_counted(monkeypatch):
  lonely = {0, 3, 8}
  clients = make_clients(rings(without_edges=lonely), CONFIG)
  used = np.concatenate(graph_ids(clients.train) + graph_ids(clients.held_out))
  assert sorted(used) == sorted(set(range(20)) - lonely)
  monkeypatch.setattr(sources, "load_graphs", lambda name: [rings(without_edges=lonely)])
  assert build(CONFIG).about.endswith("; 3 graphs without edges left out")


@pytest.mark.parametrize(
  ("data", "options", "message"),
  [
    (rings(without_edges=range(20)), {}, "client random: no training graphs with edges"),
    (rings(labels=np.zeros(20, int)), {}, "client random: its training graphs all have class 0"),
    (
      rings(features=lambda k: np.full((5, 2), np.nan if k == 7 else 1.0)),
      {},
      "random: graph 7 has features that are not finite",
    ),
    (rings(), {"clients_per_domain": 21}, "clients_per_domain: .*21 .*random.* 20 graphs"),
    (rings(), {"clients_per_domain": 10}, "client random.0: 2 examples are too few"),
  ],
)
def test_clients_that_cannot_be_trained_are_named(data, options, message):
  with pytest.raises(InputError, match=message):
    make_clients(data, dataclasses.replace(CONFIG, **options))


@pytest.mark.parametrize(
  ("key", "options"),
  [
    ("hidden", {"hidden": 9}),
    ("heads", {"heads": 0}),
    ("participation", {"participation": 0.0}),
    ("participation", {"participation": 1.5}),
    ("dropout", {"dropout": 1.0}),
    ("batch_size", {"batch_size": 0}),
    ("clients_per_domain", {"clients_per_domain": 0}),
    ("local_epochs", {"local_epochs": 0}),
    ("backbone", {"backbone": "gin"}),
    ("backbone", {"algorithm": "fedstar", "backbone": "spectral"}),
    ("backbone", {"algorithm": "fedavg", "backbone": "fedstar"}),
    ("steps", {"steps": 0}),
    ("learning_rate", {"learning_rate": 0.0}),
    ("weight_decay", {"weight_decay": -1.0}),
    ("tau", {"tau": float("nan")}),
    ("mu", {"mu": 1.5}),
    ("padding_slack", {"padding_slack": float("inf")}),
  ],
)
def test_impossible_values_name_their_key(key, options):
  with pytest.raises(ValueError, match=f"^{key}: "):
    dataclasses.replace(CONFIG, **options)
