"""Runs the exchange of test_exchange.py over two devices and on one, and compares; see there."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import test_exchange as problem  # noqa: E402

from jaxmethods.federated import exchange  # noqa: E402

mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))


def run(accuracy, clients, batches, **options):
  weights = [jnp.ones(size) for size in problem.SIZES]
  return exchange.exchange(
    problem.NETWORKS, problem.by_accuracy, problem.ADAM, accuracy, clients, weights, batches,
    jax.random.key(0), **options,
  )  # fmt: skip


arguments = (jnp.array([0.2, 0.9, 0.5]), problem.peers(), problem.BATCHES)
one = jax.jit(run)(*arguments)
everywhere = jax.device_put(arguments, jax.NamedSharding(mesh, jax.P()))
two = jax.jit(lambda *a: run(*a, client_map="shard", mesh=mesh))(*everywhere)
for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
  np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), rtol=1e-5, atol=1e-6)
print("same on", len(two[0][0].params["w"].devices()), "devices")
