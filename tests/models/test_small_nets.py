"""The MLP and the convnet: shapes, and patches against lax.conv with the same parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models.convnet import ConvNet, max_pool_2x2
from jaxmethods.models.mlp import MLP


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (2, 7, 5, 3)])
def test_patches_and_conv_agree(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  nets = [ConvNet((4, 6), 5, patches=p) for p in (True, False, None)]
  params = nets[0].init(jax.random.key(1), x)
  chex.assert_trees_all_equal(params, nets[1].init(jax.random.key(1), x))

  def value_and_grad(net):
    return jax.jit(jax.value_and_grad(lambda p: (net.apply(p, x) ** 2).sum()))(params)

  a, b, c = map(value_and_grad, nets)
  chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_equal(c, a if jax.default_backend() == "cpu" else b)


def test_max_pool():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, 3)), jnp.float32)
  expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  np.testing.assert_array_equal(max_pool_2x2(x), expected)


def test_bfloat16_computes_low_and_keeps_float32_parameters():
  x = jnp.ones((2, 8, 8, 1))
  for net in (MLP((4,), 3, jnp.bfloat16), ConvNet((4,), 3, dtype=jnp.bfloat16)):
    params = net.init(jax.random.key(0), x)
    assert net.apply(params, x).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_mlp_flattens():
  net = MLP((5, 4), 3)
  params = net.init(jax.random.key(0), jnp.ones((2, 3, 2)))["params"]
  assert list(params) == ["dense_0", "dense_1", "head"]
  assert params["dense_0"]["kernel"].shape == (6, 5)
  assert net.apply({"params": params}, jnp.ones((2, 3, 2))).shape == (2, 3)
