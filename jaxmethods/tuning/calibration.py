"""What the linear layers of the desk model are fed by a batch of questions."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import Params
from jaxmethods.adapters.preview import linear_inputs, linear_targets
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.trees import flatten, owner
from jaxmethods.tuning.tuner import PROJECTOR, Batch


def input_moments(
  model: DeskMLLM, params: Params, batch: Batch, targets: str
) -> dict[str, jax.Array]:
  """Sum over all tokens of x x^T, (in, in), by the path of the layer; to be jitted by the caller.

  Text is padded on the right to the length of the longest question of its task; those tokens count too
  where there are any (the targets have one question each, and none).

  Args:
    model: whose layers are not scanned.
    params: of it.
    batch: features (B, N, F), ids (B, K, T).
    targets: regular expression on kernel paths.
  """
  layers = [owner(path) for path in linear_targets(params, targets)]
  flat = flatten(params)
  moments: dict[str, jax.Array] = {}
  # The projector sees the images once; the language model sees images, and then texts.
  for calls in (1, 2):
    chosen = [path for path in layers if bool(re.search(PROJECTOR, f"{path}/")) == (calls == 1)]
    if not chosen:
      continue
    width = lambda path: flat[f"{path}/kernel"].shape[0]
    moments |= linear_inputs(
      lambda: model.apply({"params": params}, batch["ids"], features=batch["features"]),
      params,
      "|".join(rf"^{path}/kernel$" for path in chosen),
      lambda total, x, mask: total + jnp.einsum("...i,...j->ij", x, x),
      {path: jnp.zeros((width(path),) * 2) for path in chosen},
      (None,) * calls,
    )
  return moments
