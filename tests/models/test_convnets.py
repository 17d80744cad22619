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


def test_padding_changes_nothing():
  blocks = [
    functools.partial(ResNetBlock, 16, 2),
    functools.partial(MobileNetBlock, 8, expansion=2),
    functools.partial(ShuffleNetBlock, 16, 2),
  ]
  net = Classifier(Trunk((8, 3), blocks, last=8), 3)
  x = np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32)
  variables = jax.jit(net.init)(jax.random.key(1), x)
  padded = np.concatenate([x, np.full((2, 4, 4, 3), 1e3, np.float32)])
  mask = np.arange(5) < 3

  @jax.jit
  def step(variables, x, mask):
    def loss(params):
      logits, state = net.apply(
        {**variables, "params": params}, x, mask, train=True, mutable=["batch_stats"]
      )
      return jnp.square(logits).sum(where=mask[:, None]), state

    return jax.grad(loss, has_aux=True)(variables["params"])

  grads, state = step(variables, x, np.ones(3, bool))
  padded_grads, padded_state = step(variables, padded, mask)
  chex.assert_trees_all_close(padded_state, state, rtol=1e-4, atol=1e-5)
  scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(grads))
  chex.assert_trees_all_close(padded_grads, grads, rtol=1e-3, atol=1e-5 * scale)
  moved = state["batch_stats"]["trunk"]["stem"]["norm"]["mean"]
  assert np.abs(moved).max() > 0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [(("resnet11", 3, 1), "resnet11.*resnet1"), (("resnet10", 3, 0), "narrow: must be at least 1")],
)
def test_bad_input(arguments, message):
  name, classes, narrow = arguments
  with pytest.raises(InputError, match=message):
    classifier(name, classes, narrow=narrow)
