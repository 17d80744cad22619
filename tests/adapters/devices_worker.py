"""Three data-parallel updates over 8 virtual devices; prints what comes out. See test_training.py."""

import json

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
import tiny_lm  # noqa: E402

from jaxmethods.adapters.adapter import split  # noqa: E402

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, rows = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
lm = tiny_lm.model()
params, tree = jax.device_put(tiny_lm.start(lm), everywhere)
state = jax.device_put(tiny_lm.optimiser().init(split(tiny_lm.ADAPTER, tree)[0]), everywhere)
update = jax.jit(tiny_lm.step(lm, accumulate=2))
losses = []
for seed in range(3):
  batch = jax.device_put(tiny_lm.batch(16, seed=seed), rows)
  tree, state, metrics = update(tree, state, params, batch, None)
  losses.append(float(metrics["loss"]))
assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
print(
  json.dumps({"losses": losses, "tree": [np.asarray(x).tolist() for x in jax.tree.leaves(tree)]})
)
