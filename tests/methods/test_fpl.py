"""Properties of prompts in a CLIP with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods import fpl
from jaxmethods.models.clip import CLIP, CLIPConfig, TextConfig
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViTConfig

START, END, DOT, X, PHRASE = 18, 19, 2, 1, [3, 4, 5, 6]
NAMES = [[7], [8, 9], [10, 11, 12]]


@functools.cache
def clip():
  encoder = lambda layers: EncoderConfig(
    width=8, num_layers=layers, heads=2, hidden=16, activation="quick_gelu"
  )
  config = CLIPConfig(
    vision=ViTConfig(encoder=encoder(3), image_size=(8, 8), patch=4, clip=True),
    text=TextConfig(encoder=encoder(2), vocabulary=20, context=12, eos=END),
    projection=6,
  )
  model = CLIP(config)
  start = jax.jit(model.init)(jax.random.key(0), pixels(), jnp.zeros((1, 12), int))
  # Larger weights than the first ones, so that what is put in shows.
  return model, jax.tree.map(lambda x: 3 * x, start["params"])


def pixels():
  return jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


def texts(words, position="end"):
  rows = [[START, *words, *name, DOT, END] for name in NAMES]
  ids = np.array([row + [0] * (12 - len(row)) for row in rows])
  order = fpl.arrange(len(words), jnp.array([1, 2, 3]), 12, position)
  return fpl.ClassTexts(jnp.asarray(ids), order, jnp.asarray(ids.argmax(1)))


@functools.partial(jax.jit, static_argnames="position")
def text(prompts, num, position="end"):
  model, params = clip()
  return fpl.text_features(model, params, prompts, texts([X] * len(num), position))


@jax.jit
def image(prompts, x):
  return fpl.image_features(*clip(), prompts, x)


def random(*shape, seed=2):
  return jax.random.normal(jax.random.key(seed), shape)


def test_arrangements():
  lengths, order = jnp.array([1, 3]), {}
  for position in fpl.POSITIONS:
    order[position] = fpl.arrange(3, lengths, 9, position).tolist()
  # Tokens of the text are 3 + place: 7 and on the name.
  assert order["end"] == [[3, 0, 1, 2, 7, 8, 9, 10, 11]] * 2
  assert order["front"] == [[3, 7, 0, 1, 2, 8, 9, 10, 11], [3, 7, 8, 9, 0, 1, 2, 10, 11]]
  assert order["middle"] == [[3, 0, 7, 1, 2, 8, 9, 10, 11], [3, 0, 7, 8, 9, 1, 2, 10, 11]]


def test_without_prompts_it_is_clip():
  model, params = clip()
  seen = text({"text": jnp.zeros((0, 8))}, ())
  plain = texts([])
  call = jax.jit(lambda x, ids: model.apply({"params": params}, x, ids))
  output = call(pixels(), plain.ids)
  np.testing.assert_allclose(seen, text({}, ()), atol=1e-6)
  np.testing.assert_allclose(seen, output.text_embeddings, atol=1e-6)
  without = image({"vision": jnp.zeros((1, 0, 8))}, pixels())
  np.testing.assert_allclose(image({}, pixels()), without, atol=1e-6)
  np.testing.assert_allclose(image({}, pixels()), output.image_embeddings, atol=1e-6)
  for position in ("front", "middle"):
    np.testing.assert_allclose(text({"text": jnp.zeros((0, 8))}, (), position), seen, atol=1e-6)


def test_embeddings_of_a_phrase_are_the_phrase():
  model, params = clip()
  words = params["text"]["token"]["embedding"][jnp.array(PHRASE)]
  want = jax.jit(lambda: fpl.text_features(model, params, {}, texts(PHRASE)))()
  np.testing.assert_allclose(text({"text": words}, (X,) * 4), want, atol=1e-6)


@pytest.mark.parametrize("position", fpl.POSITIONS)
def test_one_prompt_a_class(position):
  shared = random(3, 8)
  each = jnp.stack([shared] * 3)
  gradient = jax.grad(lambda v: (text({"text": v}, (X,) * 3, position) ** 3).sum())
  same = text({"text": shared}, (X,) * 3, position), text({"text": each}, (X,) * 3, position)
  np.testing.assert_allclose(*same, atol=1e-6)
  np.testing.assert_allclose(gradient(shared), gradient(each).sum(0), atol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
def test_a_common_prefix_is_written_once(deep):
  model, params = clip()
  prompts = {"text": random(3, 8)} | ({"text_deep": random(1, 3, 8, seed=4)} if deep else {})
  shared = fpl.share_prefix(texts([X] * 3), 3)
  assert shared.ids.shape == (1, 4 + 3 + 4 + 5)
  loss = lambda features: jax.jit(jax.value_and_grad(lambda v: (features(v) ** 3).sum()))(prompts)
  found = loss(lambda v: fpl.shared_text_features(model, params, v, shared))
  want = loss(lambda v: text(v, (X,) * 3))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, want)


def test_order_counts_for_texts_and_not_for_images():
  vision = random(3, 4, 8)
  turned = vision[:, jnp.array([2, 0, 3, 1])]
  same = image({"vision": vision}, pixels()), image({"vision": turned}, pixels())
  np.testing.assert_allclose(*same, atol=1e-5)
  assert jnp.abs(same[0] - image({}, pixels())).max() > 0.01
  context = random(3, 8)
  seen = text({"text": context}, (X,) * 3), text({"text": context[::-1]}, (X,) * 3)
  assert jnp.abs(seen[0] - seen[1]).max() > 1e-3


def test_deep_prompts_stand_where_the_first_ones_do():
  prompts = {"text": random(2, 8), "text_deep": random(1, 2, 8, seed=3)}
  for position in fpl.POSITIONS:
    changed = text(prompts, (X,) * 2, position) - text(
      {"text": prompts["text"]}, (X,) * 2, position
    )
    assert jnp.abs(changed).max() > 1e-3
  order = fpl.arrange(2, jnp.array([2]), 6, "front")
  hidden = fpl.replace_context(jnp.array([[1.0], [2.0]]), jnp.zeros((1, 6, 1)), order)
  assert hidden[0, :, 0].tolist() == [0, 0, 0, 1, 2, 0]


def test_no_gradient_is_computed_for_the_frozen_weights():
  model, params = clip()

  def loss(prompts, params):
    f = fpl.image_features(model, params, prompts, pixels())
    g = fpl.text_features(model, params, prompts, texts([X] * 2))
    return fpl.prompt_loss(f, g, jnp.float32(10), jnp.array([0, 2]))

  prompts = {"text": random(2, 8), "vision": random(1, 2, 8)}
  grads = jax.eval_shape(jax.grad(loss), prompts, params)
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, prompts)
  # A product that makes the gradient of a kernel has a kernel's shape with the tokens summed over.
  program = str(jax.make_jaxpr(jax.grad(loss))(prompts, params))
  assert "f32[8,16] = dot_general" not in program


def test_drift():
  update = random(3, 8)
  alike = fpl.drift(jnp.stack([update, 2 * update, 0 * update]), update)
  np.testing.assert_allclose(alike.to_global, [1, 1, 0], atol=1e-6)
  np.testing.assert_allclose(alike.pairwise, [[0, 1, 0], [1, 0, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: fpl.arrange(2, jnp.ones(3, int), 9, "back"), "position: 'back'"),
    (lambda: fpl.arrange(-1, jnp.ones(3, int), 9), "num_prompts: must be at least 0"),
    (lambda: fpl.per_layer(jnp.zeros((3, 2, 8)), 3), "depth: must be at most 3"),
    (lambda: fpl.append_prompts(jnp.zeros((2, 5, 8)), jnp.zeros((2, 7))), "vectors: expected"),
    (lambda: fpl.drift(jnp.zeros((2, 3, 8)), jnp.zeros((4, 8))), "updates: expected"),
  ],
)
def test_doors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
