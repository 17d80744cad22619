"""Second moments of the inputs of linear layers, over a batch of questions."""

from __future__ import annotations

import re

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.adapters.adapter import Params
from jaxmethods.adapters.preview import linear_inputs, linear_targets
from jaxmethods.models.desk_mllm import DeskMLLM
from jaxmethods.stats import shapes
from jaxmethods.trees import flatten, owner
from jaxmethods.tuning.tuner import PROJECTOR, Batch


def input_moments(
  model: DeskMLLM, params: Params, batch: Batch, targets: str
) -> dict[str, Float[Array, "in in"]]:
  """Sums x x^T over all tokens, by the path of the layer; to be jitted by the caller.

  Text is padded on the right to the length of the longest question of its task; those tokens count too
  where there are any (the targets have one question each, and none).

  Args:
    model: small model whose layers are not scanned.
    params: parameters of the model.
    batch: features (B, N, F), ids (B, K, T).
    targets: regular expression on kernel paths.

  Raises:
    ValueError: wrong shapes.
  """
  shapes.check(features=(batch["features"], "B N F"), ids=(batch["ids"], "B K T"))
  layers = [owner(path) for path in linear_targets(params, targets)]
  flat = flatten(params)
  moments: dict[str, Array] = {}
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
