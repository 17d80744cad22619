"""Runs rounds with `shard` over a mesh and prints the results; see test_devices.py.

usage: devices_worker.py DEVICES KIND [PROCESSES PROCESS PORT]
"""

import json
import sys

import jax

kind = sys.argv[2]
devices, processes, process, port = (int(sys.argv[1]), *map(int, sys.argv[3:]), 1, 0, 0)[:4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
if processes > 1:
  jax.distributed.initialize(f"localhost:{port}", processes, process)

import numpy as np  # noqa: E402
import problems  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

from jaxmethods.federated import engine  # noqa: E402

mesh = jax.make_mesh((devices * processes,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = jax.NamedSharding(mesh, jax.P())


def replicate(tree):
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x)), tree
  )


buckets = problems.buckets_of(kind)


def shared(path):
  return "head" not in path


fed = problems.algorithm(shared=shared)
server = replicate(fed.init(problems.params(), jax.random.key(0)))
clients = replicate(problems.states(buckets, shared=shared))
rest = replicate((buckets.data, buckets.weights, buckets.ids))


def one(server, clients, rest, seed):
  data, weights, ids = rest
  key = jax.random.key(seed)
  here = engine.sample_participants(key, 6, 5)
  return engine.federated_round(
    fed, server, clients, data, weights, key,
    ids=ids, taking_part=here, client_map="shard", mesh=mesh, drop_nonfinite=True,
  )  # fmt: skip


one = jax.jit(one, out_shardings=everywhere)
for r in range(3):
  server, clients, metrics = one(server, clients, rest, r)
# Everything is replicated, so each process holds all of it.
local = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), (server, clients, metrics))
multihost_utils.sync_global_devices("done")
if process == 0:
  # In one write, on a line of its own.
  text = json.dumps([x.astype(float).tolist() for x in jax.tree.leaves(local)])
  print(f"\nresult: {text}\n", end="", flush=True)
