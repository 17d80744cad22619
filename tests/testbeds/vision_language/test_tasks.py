"""The stage of GIFT and FPL: texts, rendered pictures, tasks, and the zero-shot classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data import scenes
from jaxmethods.errors import InputError
from jaxmethods.models.clip import CLIPOutput
from jaxmethods.testbeds.vision_language import encoder, pretraining, tasks, words
from jaxmethods.testbeds.vision_language.settings import EMBEDDED_TASKS, SmallClip, TaskSize

TINY = SmallClip(
  width=16, layers=1, text_width=16, text_layers=1, heads=2, projection=8, pairs=64, steps=2,
  batch_size=16, patch=16,
)  # fmt: skip
TOKENS = words.word_tokens(12)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXMETHODS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def stage():
  return encoder.load("small", TINY)


def test_texts():
  ids = words.class_texts(["circle", "red star"], ["a photo of a {}.", "{}"], TOKENS)
  assert ids.shape == (2, 2, 9)
  assert (ids[..., 0] == TOKENS.start).all() and ids.max() == TOKENS.end
  assert ((ids == TOKENS.end).sum(-1) == 1).all()
  np.testing.assert_array_equal(ids[0, 1, 3:], TOKENS.pad)


def test_bad_texts_are_named():
  for classes, template, reason in (
    (["circle", " "], "a {}.", r"class 1 \(' '\): its name has no tokens"),
    ([], "a {}.", "there are none"),
    (["circle"], "a a a a a a a a a a a {}.", "needs 15 tokens, the model reads 12"),
    (["circl"], "a {}.", "'circl' is unknown; the nearest is circle"),
  ):
    with pytest.raises(InputError, match=reason):
      words.class_texts(classes, [template], TOKENS)


def test_pretraining_leaves_pairs_and_styles_out():
  drawn = scenes.draw_attributes(np.random.default_rng(0), 2000, glyphs=0.3)
  assert not scenes.held_out(drawn.colour, drawn.shape).any()
  assert drawn.style.max() < len(scenes.STYLES) and drawn.font.max() < len(scenes.FONTS)
  pairs = scenes.pretraining_pairs(20, 0)
  again = scenes.pretraining_pairs(20, 0)
  np.testing.assert_array_equal(pairs.images, again.images)
  assert pairs.captions == again.captions
  words.pack(pairs.captions, words.word_tokens(40))  # every word is known


def test_captions_are_true_of_their_pictures():
  pairs = scenes.pretraining_pairs(400, 1)
  fits = np.asarray(pretraining.fitting(jnp.asarray(pairs.shown), jnp.asarray(pairs.named)))
  assert fits.diagonal().all()
  assert 0.02 < fits.mean() < 0.2  # most are not true of others
  at = scenes.ATTRIBUTES.index
  letters = pairs.shown[:, at("glyph")] >= 0
  assert 0.3 < letters.mean() < 0.5
  assert not fits[letters][:, ~letters].any() and not fits[~letters][:, letters].any()
  for caption, named in zip(pairs.captions[:50], pairs.named, strict=False):
    shape, colour = named[at("shape")], named[at("colour")]
    assert (shape >= 0) == any(name in caption for name in scenes.SHAPES)
    assert (colour >= 0) == any(name in caption.split() for name in scenes.COLOURS)


def test_equal_pairs_share_the_probability():
  """With two copies of every pair the least loss is that of a choice between two."""
  pairs = scenes.pretraining_pairs(2, 0)
  twice = lambda x: jnp.concatenate([jnp.asarray(x)] * 2)
  logits = 50.0 * twice(twice(jnp.eye(2)).T)

  class Told:
    def apply(self, variables, images, ids):
      return CLIPOutput(None, None, logits)

  ids, shown, named = (twice(x) for x in (np.zeros((2, 4), int), np.eye(2), np.eye(2)))
  images = twice(pairs.images)
  loss = pretraining.pair_loss(Told(), {}, images, ids, shown.astype(int), named.astype(int))
  np.testing.assert_allclose(loss, np.log(2), atol=1e-4)


@pytest.mark.parametrize(("name", "seen"), [("shapes", True), ("colours", True), ("pairs", False)])
def test_only_one_task_has_pairs_that_pretraining_lacks(name, seen, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    scenes,
    "render",
    lambda of, random: drawn.append(of) or np.zeros((len(of), 32, 32, 3), np.uint8),
  )
  tasks.load_task(name, TaskSize(train=41, test=30, validation=7))
  assert (scenes.held_out(drawn[0].colour, drawn[0].shape) != seen).all()


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_validation_is_apart(name):
  task = tasks.load_task(name, TaskSize(train=50, test=30, validation=20))
  parts = [{x.tobytes() for x in part[0]} for part in (task.train, task.test, task.validation)]
  assert [len(part[1]) for part in (task.train, task.test, task.validation)] == [50, 30, 20]
  assert not parts[2] & (parts[0] | parts[1])
  assert not len(tasks.load_task(name, TaskSize(train=5, test=3)).validation[1])


def test_prompts_are_depicted():
  random = np.random.default_rng(0)
  prompts = ["a picture of a red star.", "a picture of the digit two.", "a picture of three objects.",
             "a picture of a object on navy.", "a picture of a object at the left."]  # fmt: skip
  of = scenes.named_attributes(prompts, random, 0.0)
  assert (list(scenes.COLOURS)[of.colour[0]], scenes.SHAPES[of.shape[0]]) == ("red", "star")
  assert scenes.GLYPHS[of.glyph[1]] == "two" and (of.glyph[[0, 2, 3, 4]] == -1).all()
  assert of.count.tolist() == [0, 0, 2, 0, 0]
  assert list(scenes.BACKGROUNDS)[of.background[3]] == "navy"
  assert scenes.PLACES[of.place[4]] == "left"
  many = scenes.named_attributes(prompts[:1] * 400, random, 0.25)
  assert 0.65 < (many.colour == 0).mean() < 0.9
  assert scenes.depict(prompts, random, 0.0).shape == (5, 32, 32, 3)


@pytest.mark.parametrize("name", EMBEDDED_TASKS)
def test_tasks(name):
  size = TaskSize(train=60, test=40)
  task = tasks.load_task(name, size)
  for x, y in (task.train, task.test):
    assert x.shape[1:] == (32, 32, 3) and x.dtype == np.uint8 and y.dtype == np.int32
    assert len(x) == len(y) and y.max() < len(task.classes)
  assert len(task.train[1]) == 60 and len(task.test[1]) == 40
  words.class_texts(task.classes, task.templates, words.word_tokens(40))
  rows = {x.tobytes() for x in task.train[0]}
  assert not rows.intersection(x.tobytes() for x in task.test[0])
  again = tasks.load_task(name, size)
  np.testing.assert_array_equal(again.train[0], task.train[0])


def test_bad_tasks():
  size = TaskSize(train=5, test=5)
  for names, reason in (
    ([], "at least one"),
    (["shapes", "shapes"], "'shapes' comes twice"),
    (["shape"], "unknown task 'shape'; the nearest is shapes"),
  ):
    with pytest.raises(InputError, match=reason):
      tasks.load_tasks(names, size)
  with pytest.raises(InputError, match="must be at least 1"):
    TaskSize(train=0)
  with pytest.raises(InputError, match="validation: must be at least 0"):
    TaskSize(validation=-1)
  with pytest.raises(InputError, match="none is left to train with"):
    tasks.load_task("digits", TaskSize(validation=5000))


def test_missing_folder_says_where(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path))
  with pytest.raises(InputError, match=r"pacs/pacs32\.npz"):
    tasks.load_task("pacs-art", TaskSize())


def test_domains_share_classes():
  domains = tasks.load_domains("rendered-shapes", TaskSize(train=10, test=5))
  assert len(domains) == 7
  assert len({task.classes for task in domains.values()}) == 1


def test_pretraining_is_kept(stage, monkeypatch):
  assert sum(x.size for x in jax.tree.leaves(stage.params)) < 500_000
  monkeypatch.setattr(pretraining, "_train", None)  # must not be called again
  again = encoder.load("small", TINY)
  jax.tree.map(np.testing.assert_array_equal, again.params, stage.params)


def test_default_size():
  settings = SmallClip()
  tokens = words.word_tokens(settings.context)
  model = pretraining.model_of(settings, tokens)
  init = lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 4), jnp.int32))
  count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))
  assert count <= 500_000


def test_zero_shot(stage):
  task = tasks.load_task("shapes", TaskSize(train=5, test=7))
  ids = words.class_texts(task.classes, task.templates, stage.tokens)
  logits = encoder.zero_shot(stage, stage.params, jnp.asarray(task.test[0]), ids, chunk=3)
  assert logits.shape == (7, 10)
  image = encoder.image_embeddings(stage.model, stage.params, stage.pixels(task.test[0]))
  text = encoder.class_embeddings(stage.model, stage.params, ids)
  np.testing.assert_allclose(logits, 100 * image @ text.T, atol=1e-3)
  np.testing.assert_allclose(jnp.linalg.norm(text, axis=-1), 1, atol=1e-5)
