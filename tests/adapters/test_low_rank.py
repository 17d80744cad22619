"""The low-rank product and its own backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters.low_rank import low_rank

RANK, IN, OUT, SCALE = 2, 5, 7, 1.5


def draw(*shape, seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def written_out(x, a, b):
  return SCALE * x @ (a.T @ b)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)])
def test_value_and_gradients_are_those_of_the_full_product(batch):
  x, a, b = draw(*batch, IN, seed=0), draw(RANK, IN, seed=1), draw(RANK, OUT, seed=2)
  weights = draw(*batch, OUT, seed=3)
  both = [
    jax.jit(jax.value_and_grad(lambda *args, f=f: (weights * f(*args)).sum(), argnums=(0, 1, 2)))
    for f in (lambda x, a, b: low_rank(x, a, b, SCALE), written_out)
  ]
  ours, plain = (f(x, a, b) for f in both)
  jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), ours, plain)


def test_factors_of_every_client():
  x, a, b = draw(4, 3, IN, seed=0), draw(4, RANK, IN, seed=1), draw(4, RANK, OUT, seed=2)
  square = lambda f: lambda x, a, b: (f(x, a, b) ** 2).sum()
  gradient = lambda f: jax.jit(jax.vmap(jax.grad(square(f), argnums=(1, 2))))(x, a, b)
  ours, plain = gradient(lambda x, a, b: low_rank(x, a, b, SCALE)), gradient(written_out)
  jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-4), ours, plain)


def test_dtypes_are_those_of_the_arguments():
  x, a, b = (
    draw(3, IN, seed=0).astype(jnp.bfloat16),
    draw(RANK, IN, seed=1),
    draw(RANK, OUT, seed=2),
  )
  loss = lambda x, a, b: low_rank(x, a, b, SCALE).astype(jnp.float32).sum()
  assert low_rank(x, a, b).dtype == jnp.bfloat16
  gradients = jax.grad(loss, argnums=(0, 1, 2))(x, a, b)
  assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
