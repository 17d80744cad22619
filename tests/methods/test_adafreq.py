"""Properties of AdaFreq."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.methods import adafreq
from jaxmethods.models.transformer import EncoderConfig
from jaxmethods.models.vit import ViT, ViTConfig, resized_position

ENCODER = EncoderConfig(width=16, num_layers=2, heads=2, hidden=32)
MODEL = ViT(ViTConfig(encoder=ENCODER, image_size=(16, 16), patch=4))


def picture(seed=0, shape=(16, 20, 3)):
  return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]


@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
def test_filter_is_zero_at_its_centre_and_lets_the_rest_through(size):
  weight = adafreq.high_pass(*size, 1.0)
  row, column = (size[0] - 1) // 2, (size[1] - 1) // 2
  assert weight[row, column] == 0 and weight.max() > 0.99
  sharp = adafreq.high_pass(*size, 1e-3)
  assert float(sharp.sum()) == size[0] * size[1] - 1
  assert float(adafreq.high_pass(*size, 1e6).max()) < 1e-6
  with pytest.raises(ValueError, match="deviation: must be positive, got 0"):
    adafreq.high_pass(*size, 0)


def test_box_of_no_size_gives_the_high_pass_and_the_whole_one_the_image():
  level, everywhere = adafreq.grey(picture()), adafreq.Box(*map(jnp.int32, (0, 0, 16, 20)))
  nothing = adafreq.mixing_box(16, 20, 0.0, jnp.array([3, 3]))
  plain = adafreq.mixed(level, 4.0, nothing, "none")
  np.testing.assert_allclose(adafreq.mixed(level, 4.0, nothing), plain, atol=1e-6)
  whole = adafreq.mixed(level, 4.0, everywhere)
  np.testing.assert_allclose(whole, adafreq.stretched(jnp.abs(level)), atol=1e-5)


@given(st.integers(0, 2**31 - 1), st.sampled_from(["none", "paper", "code"]))
@settings(max_examples=15, deadline=None)
def test_views_are_shares(seed, mix):
  view = adafreq.high_frequency_view(jax.random.key(seed), picture(seed), deviation=4.0, mix=mix)
  assert view.shape == (16, 20, 3) and view.min() >= 0 and view.max() <= 1
  np.testing.assert_array_equal(view[..., 0], view[..., 2])


@pytest.mark.parametrize("mix", ["none", "paper", "code"])
def test_constant_image_gives_numbers(mix):
  view = adafreq.high_frequency_view(
    jax.random.key(0), jnp.full((8, 8, 3), 0.5), deviation=4.0, mix=mix
  )
  assert jnp.isfinite(view).all()


@given(st.floats(0, 1), st.integers(0, 15), st.integers(0, 19))
@settings(max_examples=30, deadline=None)
def test_boxes_stay_inside(side, row, column):
  box = adafreq.mixing_box(16, 20, side, jnp.array([row, column]))
  assert 0 <= box.top <= box.bottom <= 16 and 0 <= box.left <= box.right <= 20
  area = (box.bottom - box.top) * (box.right - box.left)
  assert adafreq.inside(box, 16, 20).sum() == area


def test_views_differ_from_image_to_image():
  keys = jax.random.split(jax.random.key(0), 2)
  same = jnp.stack([picture()] * 2)
  views = jax.vmap(lambda k, x: adafreq.high_frequency_view(k, x, deviation=4.0))(keys, same)
  assert jnp.abs(views[0] - views[1]).max() > 1e-3


def test_selection_has_its_size_and_the_highest():
  scores = jax.random.uniform(jax.random.key(0), (3, 11))
  kept = adafreq.selected(scores, 0.5)
  assert kept.shape == (3, 6) and (kept[:, 0] == 0).all()
  assert (jnp.diff(kept, axis=1) > 0).all()
  assert all(int(best) + 1 in row for best, row in zip(scores.argmax(1), kept, strict=True))
  order = jax.random.permutation(jax.random.key(1), 11)
  moved = adafreq.selected(scores[:, order], 0.5)[:, 1:] - 1
  np.testing.assert_array_equal(jnp.sort(order[moved], axis=1), kept[:, 1:] - 1)


def test_ties_go_to_the_lowest_place_and_nothing_kept_is_an_error():
  np.testing.assert_array_equal(adafreq.selected(jnp.ones((1, 4)), 0.5), [[0, 1, 2]])
  with pytest.raises(ValueError, match=r"share: 0.1 keeps 0 of 4 patches"):
    adafreq.selected(jnp.ones((1, 4)), 0.1)


def test_branches_agree_where_everything_is_kept(params):
  image = picture(shape=(2, 16, 16, 3))
  view = adafreq.original_view(MODEL, params, image)
  kept = adafreq.selected(view.scores, 1.0)
  high = adafreq.high_view(MODEL, params, image, kept).tokens
  np.testing.assert_allclose(high, view.tokens, atol=1e-5)
  assert adafreq.equilibrium(view.tokens, high) < 1e-8


def test_gradients_reach_both_branches_and_not_the_selection(params):
  image, high = picture(shape=(2, 16, 16, 3)), picture(5, (2, 16, 16, 3))

  def loss(params, scores):
    kept = adafreq.selected(scores, 0.5)
    tokens = adafreq.original_view(MODEL, params, image).tokens
    other = adafreq.high_view(MODEL, params, high, kept).tokens
    return adafreq.equilibrium(adafreq.taken(tokens, kept), other)

  scores = adafreq.original_view(MODEL, params, image).scores
  by_params, by_scores = jax.grad(loss, (0, 1))(params, scores)
  assert not by_scores.any()
  assert jnp.abs(by_params["patch_embedding"]["kernel"]).max() > 0
  one, other = jax.grad(adafreq.equilibrium, (0, 1))(jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3)))
  np.testing.assert_allclose(one, -other)
  assert one.any()


def test_sum_and_mean_of_the_equilibrium():
  one, other = jnp.ones((4, 2, 3)), jnp.zeros((4, 2, 3))
  assert adafreq.equilibrium(one, other) == 4 * adafreq.equilibrium(one, other, "mean") == 2.0
  with pytest.raises(ValueError, match="high: expected the shape"):
    adafreq.equilibrium(one, other[:, :1])


def test_triplet_of_equal_distances_and_of_equal_images():
  pairs = adafreq.Hardest(jnp.ones(3), jnp.ones(3))
  np.testing.assert_allclose(adafreq.triplet(pairs), np.log(2), rtol=1e-6)
  labels = jnp.array([0, 0, 1, 1])
  slope = jax.grad(lambda x: adafreq.triplet(adafreq.hardest(x, labels)))(jnp.zeros((4, 3)))
  assert jnp.isfinite(slope).all()
  alone = adafreq.hardest(jnp.eye(2), jnp.zeros(2, int))
  assert adafreq.triplet(alone) == 0


def test_losses_do_not_depend_on_the_order_of_the_batch():
  features, labels = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) // 2
  order = jax.random.permutation(jax.random.key(1), 8)
  for got, want in zip(
    adafreq.branch_terms(features[order], features[order], labels[order]),
    adafreq.branch_terms(features, features, labels),
    strict=True,
  ):
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_jigsaw_deals_every_patch_once():
  tokens = jnp.arange(18.0).reshape(1, 18, 1)
  groups = adafreq.jigsaw(tokens, groups=4, shift=5)
  assert groups.shape == (4, 1, 4, 1)
  assert len(np.unique(groups)) == 16
  np.testing.assert_array_equal(groups[0, 0, :, 0], [5, 13, 6, 14])


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None)
def test_batches_are_balanced(seed):
  counts = np.array([1, 2, 5, 9])
  members = np.full((4, 9), -1)
  for i, count in enumerate(counts):
    members[i, :count] = 100 * i + np.arange(count)
  images, labels = adafreq.balanced_batch(
    jax.random.key(seed), jnp.array(members), jnp.array(counts), identities=3, images=4
  )
  np.testing.assert_array_equal(images // 100, labels)
  drawn, each = np.unique(labels, return_counts=True)
  assert len(drawn) == 3 and (each == 4).all() and (images >= 0).all()
  for label in drawn:
    distinct = len(np.unique(images[labels == label]))
    assert distinct == 4 if counts[label] >= 4 else distinct <= counts[label]


def test_too_few_identities_for_a_batch():
  with pytest.raises(ValueError, match="identities: 3 a batch, but there are 2"):
    adafreq.balanced_batch(
      jax.random.key(0), jnp.zeros((2, 1), int), jnp.ones(2, int), identities=3, images=2
    )


def test_positions_stay_where_the_grid_does():
  table = picture(shape=(1, 10, 4))
  assert resized_position(table, (3, 3)) is table
  assert resized_position(table, (2, 5)).shape == (1, 11, 4)
  np.testing.assert_array_equal(resized_position(table, (2, 5))[:, 0], table[:, 0])
  with pytest.raises(ValueError, match="no square grid"):
    resized_position(table[:, :9], (2, 2))
