"""The Flower app of test_flower.py: SCAFFOLD, where clients and server both remember something."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import problems

from jaxmethods.federated import corrections, flower, padding
from jaxmethods.federated.batching import shuffled

SIZES = (5, 9)
ROUNDS = 2
FED = corrections.scaffold(problems.loss, 0.1, local_epochs=2, batches=shuffled(4))
KEY = jax.random.key(7)


def load(index, sizes=SIZES):
  """Client `index` with its examples, padded for itself."""
  mine = padding.bucket_clients([problems.clients(sizes)[index]], multiple=4)
  data = jax.tree.map(lambda x: x[0], mine.data[0])
  return flower.Site(corrections.init_client(problems.params()), data, float(mine.weights[0][0]))


def upload_form(fed=FED, site=None):
  """What the server has to expect of a client."""
  site = site or load(0)
  key = jax.random.key(0)
  message = fed.download(fed.init(problems.params(), key), 0)
  return jax.eval_shape(fed.local, message, site.client, site.data, key)[1]


def write_result(r, state, metrics):
  """After the last round: parameters, controls and losses, into $FLOWER_RESULT."""
  if r + 1 == ROUNDS:
    arrays = [*jax.tree.leaves(state), metrics["loss"]]
    Path(os.environ["FLOWER_RESULT"]).write_text(
      json.dumps([np.asarray(x).tolist() for x in arrays])
    )


server = flower.server_app(
  FED,
  problems.params(),
  num_clients=len(SIZES),
  num_rounds=ROUNDS,
  key=KEY,
  upload=upload_form(),
  report=write_result,
)
client = flower.client_app(FED, problems.params(), load)
