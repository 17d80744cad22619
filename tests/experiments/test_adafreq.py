"""AdaFreq's room: every row trains, protocols and folders of the user, what is refused."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from scipy.ndimage import map_coordinates

from jaxmethods.data import coats
from jaxmethods.errors import InputError
from jaxmethods.experiments.adafreq import build as room, data as data_lib, training, views
from jaxmethods.experiments.adafreq.config import Config, rows
from jaxmethods.methods import adafreq
from jaxmethods.models.efficientnet import EfficientNet
from jaxmethods.runtime import command, config as config_lib
from tests.tensors import below

TINY = Config(
  steps=2, individuals=3, image_size=16, patch=4, stride=4, width=16, layers=1, heads=2, identities=4,
  images=2, resolutions=(32,), drawn_views=1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture
def random_frozen(monkeypatch):
  """Random weights in place of the package's."""

  def load(resolutions, moments):
    params = EfficientNet().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    return views.Frozen(params, resolutions, moments)

  monkeypatch.setattr(room, "load_frozen", load)


def trained(config, steps=2):
  experiment = room.build(config)
  state = experiment.init(jax.random.key(1))
  step, batches = jax.jit(experiment.step), experiment.batches(0)
  for _ in range(steps):
    state, metrics = step(state, next(batches))
  assert np.isfinite(metrics["loss"])
  return experiment, state


def check(config):
  experiment, state = trained(config)
  metrics = jax.jit(experiment.evaluate)(state, experiment.test)
  assert all(0 <= float(value) <= 100 for value in metrics.values()), metrics
  return metrics


def traced(config):
  """The metrics of a step and of an evaluation, by name, from shapes alone."""
  experiment = room.build(config)
  state = jax.eval_shape(experiment.init, jax.random.key(1))
  after, metrics = jax.eval_shape(experiment.step, state, next(experiment.batches(0)))
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert metrics["loss"].shape == ()
  return jax.eval_shape(experiment.evaluate, state, experiment.test).keys()


@pytest.mark.parametrize("name", rows(TINY))
def test_every_row(name):
  assert {"mAP", "mAP_noss"} <= traced(rows(TINY)[name])


@pytest.mark.parametrize("name", ["adafreq_code", "bot"])
def test_rows_train(name):
  check(rows(TINY)[name])


@pytest.mark.parametrize("network", ["pooled", "frozen", "hybrid"])
def test_on_frozen_maps(network, random_frozen):
  config = dataclasses.replace(TINY, network=network, select="none", view="plain")
  for row in rows(config).values():
    assert {"mAP", "mAP_noss"} <= traced(row)


def test_closed_protocol_searches_the_photographs_it_is_trained_on():
  config = dataclasses.replace(TINY, protocol="closed", optimizer="sgd")
  assert {"top1", "mAP", "top1_noss"} <= check(config).keys()
  data = data_lib.load(config)
  assert len(data.test.query) + len(data.test.gallery) == 12 * 8
  assert len(data.images) == len(data.test.gallery) and (data.test.itself == -1).all()


def test_individuals_of_the_test_are_new():
  data = data_lib.load(TINY)
  assert len(data.counts) + len(np.unique(data.test.identity)) == 12
  assert len(data.images) + len(data.test.images) == 96
  assert not (data.test.images[:, None] == data.images[None, :8]).all((2, 3, 4)).any()


def test_it_learns():
  config = dataclasses.replace(
    TINY, individuals=4, image_size=32, patch=8, stride=8, width=32, protocol="closed", view="none",
    learning_rate=2e-3, warmup_epochs=0, augment=False, drop_path=0.0, steps=60, identities=8, images=4,
  )  # fmt: skip
  experiment, state = trained(config, 60)
  evaluate = jax.jit(experiment.evaluate)
  before = evaluate(experiment.init(jax.random.key(1)), experiment.test)
  after = evaluate(state, experiment.test)
  assert after["mAP"] > before["mAP"] + 5


def test_published_size():
  config = dataclasses.replace(
    Config(), image_size=256, patch=16, stride=12, width=768, layers=12, heads=12
  )
  model, _ = room.vit_of(config, (256, 256, 3))
  assert model.config.grid == (21, 21)
  form = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
  # The ViT-B/16 of 85,798,656 parameters has 197 positions, this one 442.
  assert sum(x.size for x in jax.tree.leaves(form)) == 85_798_656 + (442 - 197) * 768


def test_published_step_lowers_for_accelerators():
  config = config_lib.load(Config, command.CONFIGS / "adafreq_paper.yaml")
  assert (config.identities * config.images, config.share, config.equilibrium) == (32, 0.5, 0.1)
  network = room.network_of(config, 100, room.vit_of(config, (256, 256, 3)))
  rates = training.Rates("sgd", config.learning_rate, config.weight_decay, 150, 100.0, 5)
  example = np.zeros((1, 256, 256, 3), np.uint8)
  parts = training.Parts(network, room.recipe_of(config), rates, 8, 4, example)
  state = jax.eval_shape(lambda key: training.init(parts, key), jax.random.key(0))
  number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  images = jax.ShapeDtypeStruct((400, 256, 256, 3), jnp.uint8)
  train = training.Train(images, None, number(100, 4), number(100))
  step = jax.jit(lambda state, train: training.step(parts, state, train))
  exported = jax.export.export(step, platforms=("tpu", "cuda"))(state, train)
  assert exported.platforms == ("tpu", "cuda")


@pytest.mark.parametrize("size", [1, 2])
def test_weights_of_hugging_face(golden_file, tmp_path, size):
  """Tokens of given weights, at their own size and at twice that; the published ones of transformers."""
  golden = golden_file("models")
  (tmp_path / "config.json").write_text(str(golden["vit/config_json"]))
  save_file(
    {name: np.asarray(x) for name, x in below(golden, "vit/params/").items()},
    tmp_path / "model.safetensors",
  )
  pixels = golden["vit/pixels_nchw"].transpose(0, 2, 3, 1)
  pixels = np.repeat(np.repeat(pixels, size, 1), size, 2)
  form = json.loads(str(golden["vit/config_json"]))
  config = dataclasses.replace(
    TINY, weights=f"hf:{tmp_path}", image_size=pixels.shape[1], patch=form["patch_size"],
    stride=form["patch_size"],
  )  # fmt: skip
  model, params = room.vit_of(config, pixels.shape[1:])
  tokens = adafreq.original_view(model, params, jnp.asarray(pixels)).tokens
  own = np.asarray(golden["vit/params/embeddings.position_embeddings"])
  side = int(np.sqrt(own.shape[1] - 1))
  if size == 1:
    np.testing.assert_allclose(tokens, golden["vit/expected_last_hidden"], atol=2e-5)
    return
  # Bilinear between half-pixel centres, by SciPy.
  old = own[0, 1:].reshape(side, side, -1)
  places = np.clip((np.arange(size * side) + 0.5) / size - 0.5, 0, side - 1)
  grid = np.meshgrid(places, places, indexing="ij")
  new = np.stack([map_coordinates(old[..., c], grid, order=1) for c in range(old.shape[-1])], -1)
  np.testing.assert_allclose(params["position"][0, 1:], new.reshape(-1, old.shape[-1]), atol=1e-6)
  np.testing.assert_array_equal(params["position"][0, 0], own[0, 0])
  assert tokens.shape[1] == 1 + (size * side) ** 2


def test_weights_of_another_size():
  tiny = (
    'random:{"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,'
    ' "intermediate_size": 32, "image_size": 32, "patch_size": 8}'
  )
  config = dataclasses.replace(TINY, weights=tiny, image_size=24, stride=4)
  model, params = room.vit_of(config, (24, 24, 3))
  assert params["position"].shape == (1, 26, 16) and model.config.grid == (5, 5)
  traced(config)
  with pytest.raises(InputError, match="is no plain ViT"):
    bert = 'random:{"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1,'
    bert += ' "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}'
    room.vit_of(dataclasses.replace(TINY, weights=bert), (24, 24, 3))


# --- folders of the user ------------------------------------------------------------------------------


def write(folder: Path, data, places):
  for i in places:
    target = folder / data.names[data.identity[i]] / f"{i}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data.images[i]).save(target)


def test_query_and_gallery_by_command(tmp_path, cli):
  data = coats.load(16, coats.Herd(individuals=3))
  write(tmp_path / "query", data, [0, 8, 95])
  write(tmp_path / "gallery", data, [1, 2, 9, 10, 17])
  flags = ("--method", "adafreq", "--workdir", tmp_path / "run")
  keys = [
    word
    for name in ("steps", "individuals", "image_size", "patch", "stride", "width", "layers", "heads",
                 "identities", "images", "log_every", "eval_every")
    for word in (f"--{name}", getattr(dataclasses.replace(TINY, log_every=1, eval_every=2), name))
  ]  # fmt: skip
  assert cli("train.run", *flags, *keys).returncode == 0
  asked = ("--query", tmp_path / "query", "--gallery", tmp_path / "gallery", "--top", 3)
  done = cli("eval.run", *flags, *asked)
  assert done.returncode == 0, done.stderr
  absent = data.names[data.identity[95]]
  assert f"1 individuals of the queries are not in the gallery: {absent}" in done.stdout
  with (tmp_path / "run" / "neighbours.csv").open() as stream:
    found = list(csv.DictReader(stream))
  assert len(found) == 9 and [row["rank"] for row in found[:3]] == ["1", "2", "3"]
  near = [float(row["similarity"]) for row in found[:3]]
  assert near == sorted(near, reverse=True)
  with np.load(tmp_path / "run" / "embeddings.npz") as kept:
    assert kept["features"].shape == (8, 16) and kept["part"].tolist().count("query") == 3
    np.testing.assert_allclose(np.linalg.norm(kept["features"], axis=1), 1, rtol=1e-5)
  report = (tmp_path / "run" / "report.html").read_text()
  assert "neighbours.csv" in report and "matches.html" in report
  page = (tmp_path / "run" / "matches.html").read_text()
  assert page.count("<section>") == 3 and page.count("<figure") == 3 * 4
  assert page.count("data:image/jpeg") == len(set(re.findall(r'"p p(\d+)', page)))
  (tmp_path / "empty").mkdir()
  refused = cli("eval.run", *flags, "--query", tmp_path / "query", "--gallery", tmp_path / "empty")
  assert refused.returncode == 2 and "no photographs in it" in refused.stderr
  refused = cli("eval.run", *flags, "--query", tmp_path / "query")
  assert refused.returncode == 2 and "query: needs a gallery" in refused.stderr


def asked(query, gallery):
  return data_lib.asked(dataclasses.replace(TINY, query=str(query), gallery=str(gallery)))


def test_a_photograph_does_not_find_itself(tmp_path, capsys):
  """However the folders are spelled, and where one holds the other."""
  data = coats.load(16, coats.Herd(individuals=3))
  write(tmp_path / "all", data, range(6))
  (tmp_path / "link").symlink_to(tmp_path / "all")
  for other in ("all", "all/", "all/../all", "link"):
    assert asked(tmp_path / "all", f"{tmp_path}/{other}").itself.tolist() == list(range(6))
  one = next(iter(sorted((tmp_path / "all").rglob("*.png"))))
  assert asked(one, tmp_path / "all").itself.tolist() == [0]
  assert "copy in the gallery" not in capsys.readouterr().out
  write(tmp_path / "copy", data, [0])
  assert asked(tmp_path / "copy", tmp_path / "all").itself.tolist() == [-1]
  assert "1 queries have a copy in the gallery, which they will find" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"gallery: .* has nothing but the query itself"):
    asked(tmp_path / "copy", tmp_path / "copy")


def test_folders_of_the_user_need_no_split(tmp_path):
  data = coats.load(16, coats.Herd(individuals=3))
  write(tmp_path / "q", data, [0, 8])
  write(tmp_path / "g" / "images", data, [1, 9])
  rows_of = ["path,identity,camera"] + [
    f"images/{data.names[data.identity[i]]}/{i}.png,{data.names[data.identity[i]]},c{i}"
    for i in (1, 9)
  ]
  (tmp_path / "g" / "metadata.csv").write_text("\n".join(rows_of))
  config = dataclasses.replace(
    TINY, query=str(tmp_path / "q"), gallery=str(tmp_path / "g"), split="md_split"
  )
  search = data_lib.asked(config)
  assert search.identity.tolist() == [0, 1, 0, 1] and search.group.tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize(
  ("query", "gallery", "message"),
  [
    ("q", "nowhere", r"nowhere: no such folder"),
    ("q", "empty", r"empty: no photographs in it$"),
    ("empty", "q", r"empty: no photographs in it$"),
    ("q", "text", r"text: no photographs in it; not read: 1 files .*: notes.txt"),
    ("q", "text/notes.txt", r"notes.txt: no column file"),
    ("q", "broken", r"broken: 1 of 1 files cannot be read: .*not a readable image"),
  ],
)
def test_folders_that_cannot_be_searched(tmp_path, query, gallery, message):
  write(tmp_path / "q", coats.load(16, coats.Herd(individuals=3)), [0, 8])
  for name in ("empty", "text", "broken"):
    (tmp_path / name).mkdir()
  (tmp_path / "text" / "notes.txt").write_text("hello")
  (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
  with pytest.raises(InputError, match=message) as caught:
    asked(tmp_path / query, tmp_path / gallery)
  assert "\n" not in str(caught.value)


def test_splits_of_a_table(tmp_path):
  data = coats.load(16, coats.Herd(individuals=3))
  write(tmp_path, data, range(96))

  def load(parts):
    lines = [
      f"{data.names[data.identity[i]]}/{i}.png,{data.names[data.identity[i]]},{parts(data.identity[i])}"
      for i in range(96)
    ]
    (tmp_path / "index.csv").write_text("\n".join(["file,identity,split", *lines]))
    return data_lib.load(dataclasses.replace(TINY, data=f"reid:{tmp_path}"))

  found = load(lambda who: ("train", "train", "test", "val")[who % 4])
  assert len(found.images) == 48 and len(found.test.images) == 24
  with pytest.raises(InputError, match=r"expected splits train and test, got .*'fold 3'"):
    load(lambda who: ("train", "test", "fold 3")[who % 3])
  with pytest.raises(InputError, match="48 photographs have no split"):
    load(lambda who: ("train", "test", "", "")[who % 4])


def test_data_that_cannot_be_used(tmp_path):
  data = coats.load(16, coats.Herd(individuals=3))
  source = lambda **changes: dataclasses.replace(TINY, data=f"reid:{tmp_path}", **changes)
  write(tmp_path / "train", data, range(16))
  write(tmp_path / "test", data, [16, 24])
  with pytest.raises(InputError, match=r"identities: 4 in each batch, but .* has 2 to train on"):
    data_lib.load(source(test_data="embedded:coats"))
  with pytest.raises(InputError, match="no query has a photograph of the same individual"):
    data_lib.load(source(identities=2))
  write(tmp_path / "test", data, [0, 1])
  with pytest.raises(InputError, match="1 individuals are in both parts"):
    data_lib.load(source(identities=2))
  with pytest.raises(InputError, match="data: 'digits' is no source of individuals"):
    data_lib.load(dataclasses.replace(TINY, data="digits"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"patch": 32}, "patch: must be at most image_size 16"),
    ({"share": 0.0}, r"share: must be in \(0, 1\]"),
    ({"local_groups": 4}, "local_groups: must be even, and is for view=none"),
    ({"network": "resnet"}, "select: resnet has no patches"),
    ({"weights": "hf:x", "network": "hybrid"}, "weights: is for network=vit"),
  ],
)
def test_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes)


def test_nothing_kept():
  with pytest.raises(InputError, match=r"share: 0.01 keeps none of 16 patches"):
    room.build(dataclasses.replace(TINY, share=0.01))
