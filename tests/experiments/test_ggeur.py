"""The GGEUR experiment on small feature vectors: partition, exchange, rows, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.experiments.ggeur import data as room
from jaxmethods.experiments.ggeur.build import build
from jaxmethods.experiments.ggeur.config import Config, rows
from jaxmethods.experiments.ggeur.generation import Holdings, exchange
from jaxmethods.runtime import config as config_lib
from jaxmethods.testbeds.federated_images import clients
from tests import runs

D = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Three domains of four Gaussian classes, each domain shifted."""
  rng = np.random.default_rng(0)
  centres = 4 * rng.normal(size=(4, D))
  arrays = {}
  for name, shift in (("a", 0.0), ("b", 1.0), ("c", -1.0)):
    y = np.repeat(np.arange(4), 20)
    arrays[f"{name}_x"] = (centres[y] + shift + rng.normal(size=(80, D))).astype(np.float32)
    arrays[f"{name}_y"] = y
  path = tmp_path_factory.mktemp("data") / "features.npz"
  np.savez(path, **arrays)
  return f"npz:{path}"


def config(source, **changes):
  small = {
    "data": source, "steps": 8, "local_epochs": 2, "batch_size": 16, "learning_rate": 0.05,
    "target": 25, "own_samples": 30, "own_per_anchor": 8, "prototype_samples": 20,
  }  # fmt: skip
  return Config(**(small | changes))


def trained(config):
  experiment = build(config)
  _, state, metrics = runs.trained(experiment, config.seed)
  return experiment, state, metrics


def test_it_learns_and_beats_nothing_at_all(source):
  experiment, state, metrics = trained(config(source))
  result = experiment.evaluate(state, experiment.test)
  assert result["test_accuracy"] > 0.9
  assert metrics["bytes_up"] == 3 * 4 * (D * 4 + 4)
  np.testing.assert_allclose(
    result["test_accuracy"], np.mean([result[f"test_accuracy/{n}"] for n in "abc"]), rtol=1e-6
  )
  assert set(experiment.figures(state)) == {"accuracy", "own_examples", "generated_embeddings"}


@pytest.mark.parametrize("skew", ["domains", "labels", "both"])
def test_every_client_is_filled_to_the_target(source, skew):
  settings = config(source, skew=skew, clients=4)
  experiment = build(settings)
  state = experiment.init(jax.random.key(0))
  counts = (jax.nn.one_hot(state.data["y"], 4) * state.data["mask"][..., None]).sum(1)
  if skew != "labels":
    np.testing.assert_array_equal(counts, settings.target)
  else:
    assert (counts >= settings.target).all()


@pytest.mark.parametrize("skew", ["domains", "labels"])
def test_repeated_examples_are_as_many_as_generated_ones_and_the_clients_own(source, skew):
  def start(enlarge):
    settings = config(source, skew=skew, clients=4, enlarge=enlarge)
    return build(settings).init(jax.random.key(0))

  plain, full, again = map(start, ("none", "full", "repeat"))
  np.testing.assert_array_equal(again.weights, full.weights)
  for client in range(len(again.weights)):
    held, own = (s.data["x"][client][s.data["mask"][client]] for s in (again, plain))
    rows, counts = np.unique(held, axis=0, return_counts=True)
    np.testing.assert_array_equal(rows, np.unique(own, axis=0))
    assert counts.max() - counts.min() <= 1


def test_all_clients_report_moments_and_nothing_else(source):
  settings = config(source)
  data = room.load(settings)
  key = jax.random.key(0)
  deal = clients.draw_clients(key, data.train.y, 4, settings)
  held = Holdings(data.train.x[deal.domain], data.train.y[deal.domain], deal.mask)
  reported, shape = exchange(key, held, 4, settings)
  assert [leaf.shape for leaf in jax.tree.leaves(reported)] == [(3, 4), (3, 4, D), (3, 4, D, D)]
  assert (reported.counts != 1).all()  # one example would be the embedding itself
  assert shape.eigenvalues.shape == (4, D)


def test_every_row_runs(source):
  made = rows(config(source, steps=2, local_epochs=1))
  assert next(iter(made)) == "ggeur"
  for name in ("ggeur_isotropic", "local", "centralised", "scaffold", "moon_ggeur", "feddyn",
               "fedadam", "fedntd", "fedprox"):  # fmt: skip
    experiment, state, metrics = trained(made[name])
    assert np.isfinite(metrics["loss"]), name
    assert np.isfinite(experiment.evaluate(state, experiment.test)["test_accuracy"]), name


def test_a_client_that_returns_nan_is_rejected_and_the_round_goes_on(source):
  experiment = build(config(source, enlarge="none"))
  state = experiment.init(jax.random.key(0))
  broken = state._replace(data=state.data | {"x": state.data["x"].at[1].set(jnp.nan)})
  state, metrics = jax.jit(experiment.step)(broken, ())
  assert metrics["rejected"] == 1
  assert np.isfinite(state.server.params["head"]["kernel"]).all()


@pytest.mark.parametrize(
  "changes",
  [
    {"skew": "domains"}, {"skew": "labels", "clients": 4}, {"skew": "both", "clients": 4},
    {"enlarge": "repeat"}, {"enlarge": "repeat", "skew": "labels", "clients": 4}, {"alpha": 0.0},
    {"algorithm": "centralised"},
  ],
)  # fmt: skip
def test_the_first_state_has_the_shapes_of_its_trace(source, changes):
  experiment = build(config(source, **changes))
  key = jax.random.key(0)
  described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert described(jax.eval_shape(experiment.init, key)) == described(experiment.init(key))


@pytest.mark.parametrize("name", ["ggeur", "scaffold", "fedntd", "moon", "local"])
def test_a_step_is_a_program_for_any_accelerator(source, name):
  experiment = build(rows(config(source))[name])
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  for platform in ("tpu", "cuda"):
    exported = jax.export.export(jax.jit(experiment.step), platforms=[platform])(state, ())
    assert exported.platforms == (platform,)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"test_share": 1.0}, "test_share"),
    ({"alpha": -1.0}, "alpha"),
    ({"guided_threshold": 0.0}, "guided_threshold"),
    ({"target": 0}, "target"),
    ({"classes_per_client": 2}, "classes_per_client: needs skew labels"),
  ],
)
def test_impossible_settings(source, changes, message):
  with pytest.raises(ValueError, match=message):
    config(source, **changes)


def test_bad_data(tmp_path, source):
  with np.load(source.removeprefix("npz:")) as archive:
    arrays = dict(archive)
  gone = {k: v + (v >= 2) if k.endswith("_y") else v for k, v in arrays.items()}
  np.savez(tmp_path / "gone.npz", **gone)
  with pytest.raises(InputError, match="no client can have class 2"):
    build(config(f"npz:{tmp_path / 'gone.npz'}"))
  with pytest.raises(InputError, match=r"client \d .* is empty"):
    for seed in range(20):
      lonely = config(source, alpha=0.001, min_per_class=0)
      build(lonely).init(jax.random.key(seed))


def test_the_embedded_default_is_what_the_file_says():
  from pathlib import Path

  file = Path(__file__).parents[2] / "configs" / "ggeur.yaml"
  loaded = config_lib.load(Config, file, method="ggeur")
  assert loaded.data == "embedded:digit-domains"
