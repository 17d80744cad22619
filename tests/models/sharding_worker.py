"""A forward pass and a training step on 8 virtual devices; see test_sharding.py."""

import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import sharding_problem as problem  # noqa: E402

from jaxmethods.models.sharding import batch_sharding, param_shardings, placement  # noqa: E402
from jaxmethods.models.weights import export_params, import_params  # noqa: E402

axes = dict(pair.split("=") for pair in sys.argv[1].split(","))
sizes = tuple(map(int, axes.values()))
mesh = jax.make_mesh(sizes, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
on_one = jax.device_get(problem.params())
streamed = import_params(
  export_params(on_one, problem.TABLE),
  problem.TABLE,
  on_one,
  place=placement(on_one, mesh, jit=jax.jit),
)
wanted = param_shardings(on_one, mesh)
jax.tree.map(
  lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), streamed, wanted
)
jax.tree.map(np.testing.assert_array_equal, streamed, on_one)
batch = jax.device_put(problem.batch(), batch_sharding(mesh))
logits, loss, params = jax.jit(problem.step)(streamed, batch)
query = params["layers"]["attention"]["query"]["kernel"]
print(
  json.dumps(
    {
      "shard": query.sharding.shard_shape(query.shape),
      "logits": np.asarray(logits).tolist(),
      "loss": float(loss),
      "params": [np.asarray(x).tolist() for x in jax.tree.leaves(params)],
    }
  )
)
