"""Tensors of recorded checkpoints."""

import numpy as np


def below(golden, prefix: str) -> dict[str, np.ndarray]:
  """The arrays of a golden file whose name starts with `prefix`, without it."""
  return {k.removeprefix(prefix): golden[k] for k in golden.files if k.startswith(prefix)}


def assert_same_bytes(exported, tensors) -> None:
  """The same names, and under each the same bytes."""
  assert exported.keys() == tensors.keys()
  for name, tensor in tensors.items():
    assert exported[name].dtype == tensor.dtype, name
    assert exported[name].shape == tensor.shape, name
    assert exported[name].tobytes() == tensor.tobytes(), name
