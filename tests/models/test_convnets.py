"""The networks of RAHFL: published sizes, masks, and narrow ones."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.models.convnets import (
  ARCHITECTURES,
  Classifier,
  MobileNetBlock,
  ResNetBlock,
  ShuffleNetBlock,
  Trunk,
  classifier,
)

# RAHFL spec, without the projector that no loss reads.
PUBLISHED = {
  "resnet10": (4_903_242, 512),
  "resnet12": (4_977_226, 512),
  "shufflenet": (887_582, 800),
  "mobilenet": (2_296_922, 1280),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_sizes(name):
  count, width = PUBLISHED[name]
  net, x = classifier(name, 10), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
  assert params["head"]["kernel"].shape == (width, 10)


def gradients(net, variables, x, mask):
  def loss(params):
    state = {**variables, "params": params}
    logits, moved = net.apply(state, x, mask, train=True, mutable=["batch_stats"])
    return jnp.square(logits).sum(where=mask[:, None]), moved

  return jax.grad(loss, has_aux=True)(variables["params"])


def drawn(net, x, rng):
  """Variables without the cost of compiling their initialisation."""
  made = jax.eval_shape(net.init, jax.random.key(0), x)
  return jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), made)


def test_padding_has_no_influence_on_any_block():
  blocks = [
    functools.partial(ResNetBlock, 16, 2),
    functools.partial(MobileNetBlock, 8, expansion=2),
    functools.partial(ShuffleNetBlock, 16, 2),
  ]
  net, rng = Classifier(Trunk((8, 3), blocks), 3), np.random.default_rng(0)
  x, mask = rng.normal(size=(5, 4, 4, 3)).astype(np.float32), np.arange(5) < 3
  variables = drawn(net, x, rng)
  run = jax.jit(functools.partial(gradients, net))
  other = np.where(mask[:, None, None, None], x, np.float32(1e3))
  chex.assert_trees_all_close(run(variables, other, mask), run(variables, x, mask), rtol=1e-6)


def test_a_padded_batch_equals_a_smaller_one():
  net, rng = Classifier(Trunk((8, 3), (), last=8), 3), np.random.default_rng(0)
  x = rng.normal(size=(3, 4, 4, 3)).astype(np.float32)
  variables = drawn(net, x, rng)
  padded, mask = np.concatenate([x, x[:2]]), np.arange(5) < 3
  run = jax.jit(functools.partial(gradients, net))
  smaller = run(variables, x, np.ones(3, bool))
  chex.assert_trees_all_close(run(variables, padded, mask), smaller, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [(("resnet11", 3, 1), "resnet11.*resnet1"), (("resnet10", 3, 0), "narrow: must be at least 1")],
)
def test_bad_input(arguments, message):
  name, classes, narrow = arguments
  with pytest.raises(InputError, match=message):
    classifier(name, classes, narrow=narrow)
