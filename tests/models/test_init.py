"""Drawing variables without a forward pass gives what the initialiser gives."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxmethods.models.init import draw_variables, torch_linear


class Net(nn.Module):
  """A layer, statistics, and a forward pass that needs its input's values."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(3, **torch_linear(x.shape[-1]))(x)
    x = nn.BatchNorm(use_running_average=False)(nn.relu(x))
    return nn.LayerNorm()(jnp.where(x > x.mean(), x, 0.0))


@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)])
def test_variables_are_those_of_init(key):
  shapes = jax.ShapeDtypeStruct((4, 5), jnp.float32)
  drawn = draw_variables(Net().init, key, shapes)
  chex.assert_trees_all_equal(drawn, Net().init(key, jnp.ones((4, 5))))
  assert set(drawn) == {"params", "batch_stats"}


def test_the_forward_pass_is_not_run():
  def init(key, x):
    # a petabyte, if anybody asked for it
    unused = jnp.ones((x.shape[0], 10**14)).sum()
    return {"kernel": jax.random.uniform(key, (2,)), "bias": jnp.zeros_like(unused, shape=(2,))}

  drawn = draw_variables(init, jax.random.key(0), jax.ShapeDtypeStruct((4,), jnp.float32))
  chex.assert_trees_all_equal(drawn["kernel"], jax.random.uniform(jax.random.key(0), (2,)))
  chex.assert_trees_all_equal(drawn["bias"], jnp.zeros(2))


def test_values_of_the_inputs_are_refused():
  with pytest.raises(ValueError, match="reads the values of its inputs"):
    draw_variables(lambda key, x: jax.random.uniform(key, (2,)) + x, jax.random.key(0), jnp.ones(2))
