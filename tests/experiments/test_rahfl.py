"""The RAHFL experiment with two one-block networks: rounds, rules, uploads, bad input."""

import dataclasses
import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.errors import InputError
from jaxmethods.experiments.rahfl import clients, floor, peers, teaching
from jaxmethods.experiments.rahfl.build import build
from jaxmethods.experiments.rahfl.config import Config, rows
from jaxmethods.methods import rahfl as method
from jaxmethods.models import convnets
from jaxmethods.runtime import config as config_lib, workdir
from tests import runs

C, SIDE, CLIENTS = 3, 8, 3


def images(random, y, side=SIDE):
  """Each class has its own bright channel."""
  x = random.integers(0, 90, (len(y), side, side, 3))
  x[np.arange(len(y)), ..., y] += 120
  return x.astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  random, path = np.random.default_rng(0), tmp_path_factory.mktemp("data")
  y, few = np.tile(np.arange(C), 70), np.tile(np.arange(C), 20)
  fit, test = images(random, y), images(random, few)
  np.savez(path / "private.npz", train_x=fit, train_y=y, test_x=test, test_y=few)
  np.savez(path / "public.npz", x=images(random, few), y=few)
  np.savez(path / "large.npz", x=images(random, few, 12), y=few)
  np.savez(path / "sizes.npz", train_x=fit, train_y=y, test_x=images(random, few, 12), test_y=few)
  gone = {"train_x": fit[y > 0], "train_y": y[y > 0], "test_x": test, "test_y": few}
  np.savez(path / "gone.npz", **gone)
  return path


@pytest.fixture(scope="module", autouse=True)
def small_networks():
  """One block each: these tests are about what happens around the networks."""

  def trunk(stem, block, **options):
    return convnets.Trunk((8, stem), [block], patches=options["patches"], dtype=options["dtype"])

  kinds = {
    "resnet": functools.partial(trunk, 3, functools.partial(convnets.ResNetBlock, 8, 2)),
    "mobile": functools.partial(trunk, 1, functools.partial(convnets.MobileNetBlock, 8, 2, 2)),
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(convnets, "ARCHITECTURES", convnets.ARCHITECTURES | kinds)
    yield


def config(folder, **changes):
  small = {
    "data": f"npz:{folder}/private.npz", "public": f"npz:{folder}/public.npz", "pretrain": 8,
    "steps": 4, "kinds": ["contrast", "jpeg_compression"], "batch_size": 16, "private_examples": 70,
    "architectures": ["resnet", "mobile", "resnet10"][:2], "learning_rate": 0.01,
  }  # fmt: skip
  return Config(**(small | changes))


def trained(settings):
  experiment = build(settings)
  return experiment, *runs.trained(experiment, settings.seed)


@pytest.fixture(scope="module")
def run(folder):
  return trained(config(folder))


def test_it_learns(run):
  experiment, _, state, metrics = run
  result = experiment.evaluate(state, experiment.test)
  assert next(iter(result)) == "corrupted_accuracy"
  assert result["clean_accuracy"] > 0.8 and result["corrupted_accuracy"] > 0.6
  np.testing.assert_allclose(
    result["clean_accuracy"],
    np.mean([result[f"clean_accuracy/{name}.0"] for name in ("resnet", "mobile")]),
    rtol=1e-6,
  )
  assert metrics["rejected"] == 0 and metrics["distillation"] >= 0
  # Two clients; one accuracy each, and the answers to every public batch.
  assert metrics["bytes_up"] == 2 * (4 + 60 // 16 * 16 * C * 4)
  assert set(experiment.figures(state)) == {"accuracy", "private_images", "corruptions"}


def test_a_client_that_returns_nan_is_rejected_by_name_and_the_round_goes_on(run):
  experiment, step, state, _ = run
  first, second = state.peers
  broken = second._replace(params=jax.tree.map(lambda a: a * jnp.nan, second.params))
  batches = experiment.batches(8)
  after, metrics = step(state._replace(peers=(first, broken)), next(batches))
  assert (
    metrics["rejected"] == 1 and metrics["rejected/mobile.0"] and not metrics["rejected/resnet.0"]
  )
  assert np.isfinite(metrics["loss"])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.peers[0].params))
  # On these few images one round moves a client as much beside a healthy peer: look a round on.
  after, metrics = step(after, next(batches))
  assert metrics["rejected"] == 1
  result = experiment.evaluate(after, experiment.test)
  assert result["clean_accuracy/mobile.0"] == 0 and result["clean_accuracy/resnet.0"] > 0.8


def test_the_same_key_gives_the_same_round(run):
  experiment, step, state, _ = run
  batch = next(experiment.batches(8))
  twice = [jax.tree.leaves(step(state, batch)[0].peers) for _ in range(2)]
  for one, other in zip(*twice, strict=True):
    np.testing.assert_array_equal(one, other)


def test_rows_share_the_time_alone(folder, tmp_path, monkeypatch):
  """Computed once; and every row starts with the networks that a run of its own would have by then."""
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  made = rows(config(folder, pretrain=1, architectures=["resnet", "mobile"]))
  key = jax.random.key(3)
  nets = lambda state: [(peer.params["net"], peer.model_state) for peer in state.peers]

  alone = build(dataclasses.replace(made["fedproto"], reuse=False))
  expected, _ = jax.jit(alone.step)(alone.init(key), next(alone.batches(0)))
  for name in ("fedproto", "rahfl"):
    experiment = build(made[name])
    state = experiment.init(key)
    chex.assert_trees_all_close(nets(state), nets(expected), atol=1e-4)
    assert state.round == expected.round == 1
    assert "public" in next(experiment.batches(0)) and experiment.num_steps == 4
    assert len(list((tmp_path / "trained_alone").iterdir())) == 1


def test_ridge_is_the_best_linear_reader_of_pixels(folder):
  """Its images are those of the other rows, and its solution that of the normal equations."""
  settings = rows(config(folder))["ridge"]
  experiment, _, state, metrics = trained(settings)
  assert experiment.num_steps == 1
  networks = build(config(folder)).init(jax.random.key(settings.seed))
  chex.assert_trees_all_equal(state.held, networks.held)
  data = clients.load(settings)
  held = jax.tree.map(np.asarray, state.held)
  x = np.asarray(data.pool)[held.rows[0]].astype(np.float64)
  x = ((x / 255 - data.scale[0][0]) / data.scale[0][1]).reshape(len(x), -1)
  x = np.c_[x, np.ones(len(x))][held.y[0] >= 0]
  target = np.eye(C)[held.y[0][held.y[0] >= 0]]
  weights = np.asarray(state.weights[0])
  errors = [
    abs(x.T @ (x @ weights - target) + penalty * weights).max() / penalty
    for penalty in floor.PENALTIES
  ]
  assert min(errors) < 1e-3
  result = experiment.evaluate(state, experiment.test)
  assert result["clean_accuracy"] > 0.8
  assert 0 <= result["validation_accuracy"] <= 1 and metrics["loss"] > 0


def test_digits_are_not_mirrored():
  image = jnp.zeros((8, 8, 3)).at[:, :4].set(200)
  left = lambda x: x[..., :, :4, :].mean((-3, -2, -1)) > x[..., :, 4:, :].mean((-3, -2, -1))
  draw = lambda flip: jax.vmap(
    lambda key: method.private_views(key, image, strong=False, weak=False, flip=flip)
  )(jax.random.split(jax.random.key(0), 64))
  assert bool(left(draw(False)).all()) and not bool(left(draw(True)).all())
  config_file = Path(__file__).parents[2] / "configs/rahfl.yaml"
  assert not config_lib.load(Config, config_file, method="rahfl").flip


def test_public_steps_are_limited(folder):
  _, _, _, all_steps = trained(config(folder, pretrain=1, steps=1))
  _, _, _, one = trained(config(folder, pretrain=1, steps=1, public_steps=1, public_rate=1e-4))
  assert (all_steps["bytes_up"] - 8) == 3 * (one["bytes_up"] - 8)


# The leaves that leave a client after its own training, beside its answers to public images and, in
# RAHFL, its accuracy.
UPLOADS = {
  "rahfl": [], "rahfl_symmetric": [], "rahfl_local": [], "aughfl": [], "local": [],
  "local_augmix": [], "fedmd": [], "feddf": [], "fedproto": [(C,), (C, 64)], "rhfl": [()],
}  # fmt: skip


@pytest.mark.parametrize("name", UPLOADS)
def test_what_leaves_a_client(folder, name):
  made = rows(config(folder))
  assert list(made) == [*UPLOADS, "ridge"]
  settings = made[name]
  net, optimizer = convnets.classifier("resnet", C), optax.adam(1e-3)
  random = np.random.default_rng(0)
  shapes = peers.variable_shapes(net, SIDE, 64 if settings.exchange == "fedproto" else 0)
  params, batch_stats = peers.draw_variables(shapes, random, random)
  client = peers.Peer(params, batch_stats, optimizer.init(params))
  algorithm = peers.private_training(peers.network_of(net), settings, optimizer)
  standing = teaching.first_standing(settings.exchange, 2, C, 64)
  views = {"ce": 1, "sce": 1, "jsd": 3, "dcl": 4}[settings.local]
  data = {
    "views": jnp.zeros((16, views, SIDE, SIDE, 3)),
    "y": jnp.zeros(16, jnp.int32),
    "mask": jnp.ones(16, bool),
  }
  message = jax.eval_shape(algorithm.download, standing, 0)
  after, upload, _ = jax.eval_shape(algorithm.local, message, client, data, jax.random.key(0))
  assert [leaf.shape for leaf in jax.tree.leaves(upload)] == UPLOADS[name]
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, client)


@pytest.mark.parametrize("name", ["aughfl", "fedproto", "rhfl", "local_augmix"])
def test_a_round_of_other_rows_fits_together(folder, name):
  """Traced, not compiled: RAHFL's own round is run above."""
  settings = dataclasses.replace(rows(config(folder))[name], reuse=False)
  experiment = build(settings)
  state = experiment.init(jax.random.key(0))
  batch = next(experiment.batches(settings.pretrain))
  after, metrics = jax.eval_shape(experiment.step, state, batch)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert ("distillation" in metrics) == (settings.exchange not in ("none", "fedproto"))


@pytest.mark.parametrize("exchange", ["asym", "hfl", "rhfl", "aughfl", "fedmd", "feddf"])
def test_teachers(exchange):
  """Distributions made of the present clients alone, and none where there is nobody to learn from."""
  teach = teaching.make_teach(exchange, 0.5)
  views = 3 if exchange == "aughfl" else 1
  logits = jax.random.normal(jax.random.key(0), (CLIENTS, views, 4, C))
  answers = jax.nn.log_softmax(logits)
  standing = teaching.first_standing(exchange, CLIENTS, C, 64)
  if exchange == "asym":
    standing = {"accuracy": jnp.array([0.5, 0.7, 0.6])}
  present = jnp.array([True, False, True])
  answers = jnp.where(present[:, None, None, None], answers, 0)  # as the engine does
  teachers = jax.jit(teach)(standing, answers, present)
  assert np.isfinite(teachers.probabilities).all()
  p = np.exp(answers[:, 0])
  first = np.asarray(teachers.probabilities[0])
  match exchange:
    case "asym":
      np.testing.assert_array_equal(teachers.present, [True, False, False])
      np.testing.assert_allclose(first, p[2], rtol=1e-5)
    case "hfl":
      np.testing.assert_allclose(first, p[2], rtol=1e-5)
    case "rhfl":  # the first round: 1 / (K - 1) each
      np.testing.assert_allclose(first, p[2] / 2, rtol=1e-5)
    case "aughfl":
      weights = method.augmentation_weights(answers[jnp.array([0, 2])])
      np.testing.assert_allclose(first, weights[1] * p[2], rtol=1e-4)
    case "fedmd":
      np.testing.assert_allclose(first, (p[0] + p[2]) / 2, rtol=1e-5)
    case "feddf":
      mean = jax.nn.softmax((answers[0, 0] + answers[2, 0]) / 2)
      np.testing.assert_allclose(first, mean, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_clients_are_disjoint_and_keep_a_validation_part(folder, alpha):
  settings = config(folder, alpha=alpha, batch_size=4)
  data = clients.load(settings)
  held = clients.draw_clients(np.random.default_rng(0), data.labels, C, settings)
  parts = [np.asarray(a[b >= 0]) for a, b in zip(held[::2], held[1::2], strict=True)]
  together = np.concatenate(parts)
  assert len(np.unique(together)) == len(together)
  assert len(together) == (len(data.labels) if alpha else 2 * 70)
  np.testing.assert_array_equal(held.y[held.y >= 0], data.labels[parts[0]])
  if not alpha:
    assert held.validation.shape == (2, 7)


def test_overlapping_clients(folder):
  settings = config(folder, overlap=True, private_examples=200)
  data = clients.load(settings)
  held = clients.draw_clients(np.random.default_rng(0), data.labels, C, settings)
  assert held.rows.shape == (2, 180)
  assert len(np.intersect1d(*np.asarray(held.rows))) > 100


@pytest.mark.parametrize(
  "changes",
  [{}, {"overlap": True}, {"alpha": 0.5, "batch_size": 4}, {"exchange": "fedproto"},
   {"reuse": True, "pretrain": 1}],
)  # fmt: skip
def test_the_first_state_has_the_shapes_of_its_trace(folder, tmp_path, monkeypatch, changes):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  experiment = build(config(folder, **changes))
  key = jax.random.key(0)
  described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert described(jax.eval_shape(experiment.init, key)) == described(experiment.init(key))


def test_a_compiled_first_state_is_the_same(folder):
  experiment, key = build(config(folder)), jax.random.key(0)
  chex.assert_trees_all_close(jax.jit(experiment.init)(key).peers, experiment.init(key).peers)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_steps_are_programs_for_any_accelerator(folder, platform):
  experiment = build(config(folder, pretrain=1))
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  for step in (0, 1):
    batch = next(experiment.batches(step))
    exported = jax.export.export(jax.jit(experiment.step), platforms=[platform])(state, batch)
    assert exported.platforms == (platform,)


def test_the_report_counts_what_is_used_and_knows_the_data_again(folder):
  about = build(config(folder, private_examples=50, public_examples=48)).about
  assert "210 to train on, at most 50 for each of 2 clients" in about
  assert "60 to test on" in about and "48 of npz:" in about
  assert len(workdir.digests(about)) == 2


BAD = {
  "public images of another size": ({"public": "large"}, "large.npz: images of 12 pixels"),
  "a class that nobody has": ({"data": "gone"}, "no client can have class 0"),
  "no validation image": ({"private_examples": 17, "validation_share": 0.05}, "client resnet.0"),
  "test images of another size": ({"data": "sizes"}, "test images of 12 pixels, the others of"),
  "fewer images than a batch": ({"batch_size": 64}, "public.npz: 60 images"),
  "a client smaller than a batch": ({"private_examples": 16}, "fewer than one batch_size"),
  "an unknown kind": ({"kinds": ["fogg"]}, "fog"),
  "an unknown architecture": ({"architectures": ["resnet10", "resnt12"]}, "resnet12"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folder, case):
  changes, message = BAD[case]
  names = {key: f"npz:{folder}/{changes[key]}.npz" for key in ("data", "public") if key in changes}
  with pytest.raises(InputError, match=message):
    build(config(folder, **(changes | names))).init(jax.random.key(0))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"corruption": 1.5}, "corruption"),
    ({"temperature": 0.0}, "temperature"),
    ({"validation_share": 0.0}, "validation_share"),
    ({"architectures": ["resnet10"]}, "nobody to learn from"),
    ({"architectures": ["resnet10", "resnet10"]}, "repeats"),
    ({"batch_size": 0}, "batch_size"),
  ],
)
def test_impossible_settings(folder, changes, message):
  with pytest.raises(ValueError, match=message):
    config(folder, **changes)


@pytest.mark.parametrize("name", ["rahfl", "rahfl_paper"])
def test_configs(name):
  file = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
  loaded = config_lib.load(Config, file, method="rahfl")
  assert dataclasses.replace(rows(loaded)["rahfl"], reuse=False) == loaded


# --- the commands ---------------------------------------------------------------------------------


def command(folder, **changes):
  small = {
    "data": f"npz:{folder}/private.npz", "public": f"npz:{folder}/public.npz", "local": "ce",
    "exchange": "fedmd", "architectures": "[resnet10]", "clients_per_architecture": 2, "narrow": 8,
    "stages": 1, "pretrain": 1, "steps": 1, "batch_size": 16, "private_examples": 70,
    "kinds": "[jpeg_compression]", "image_size": 0,
  }  # fmt: skip
  return [word for key, value in (small | changes).items() for word in (f"--{key}", value)]


def test_train_eval_and_compare(cli, folder, tmp_path):
  call = ("--method", "rahfl", "--workdir", "run")
  for module, more in (("train.run", command(folder)), ("eval.run", ())):
    result = cli(module, *call, *more)
    assert result.returncode == 0, result.stderr
  assert "corrupted_accuracy" in result.stdout
  assert (tmp_path / "run/report.html").exists()
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]
  reached = json.loads((tmp_path / "run/results.json").read_text())["metrics"]

  result = cli(
    "eval.compare", "--method", "rahfl", "--workdir", "compare", "--rows", "fedmd", "--seeds", 2,
    *command(folder), JAXMETHODS_CACHE=str(tmp_path / "cache"),
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  (row,) = json.loads((tmp_path / "compare/compare.json").read_text())["rows"]
  values = row["metrics"]["corrupted_accuracy"]["values"]
  assert len(values) == 2
  assert values[0] == pytest.approx(reached["corrupted_accuracy"], abs=1e-6)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"public": "large"}, ["large.npz", "image_size"]),
    ({"validation_share": 0}, ["validation_share"]),
    ({"architectures": "[resnt]"}, ["resnt", "resnet"]),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(cli, folder, tmp_path, changes, words):
  if "public" in changes:
    changes = {"public": f"npz:{folder}/large.npz"}
  result = cli(
    "train.run", "--method", "rahfl", "--workdir", "run", *command(folder, **changes),
    JAXMETHODS_CACHE=str(tmp_path / "cache"),
  )  # fmt: skip
  assert result.returncode == 2, result.stderr
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ") and all(word in line for word in words)
  assert not (tmp_path / "run").exists()
