"""The table that brings checkpoints in and out: every layout, both forms, every mistake."""

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmethods.models.weights import Rule, export_params, import_params

TABLE = (
  Rule("embed.weight", "embed/embedding", aliases=("head.weight",)),
  Rule("stem.weight", "stem/kernel", "conv"),
  Rule("h.{i}.fc.weight", "layers/fc/kernel", "transpose", aliases=("old.h.{i}.fc.weight",)),
  Rule("h.{i}.fc.bias", "layers/fc/bias"),
  Rule("h.{i}.gate.weight", "layers/gate/kernel", "transpose"),
)
LAYERS = 3


def checkpoint(dtype=np.float32, prefix=""):
  """A checkpoint as others store it: no layer is like another, and no axis as long as another."""
  draw = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)
  tensors = {"embed.weight": draw(7, 4), "stem.weight": draw(5, 3, 2, 6)}
  for i in range(LAYERS):
    tensors[f"{prefix}h.{i}.fc.weight"] = draw(4, 9) + dtype(i)
    tensors[f"h.{i}.fc.bias"] = draw(4) * dtype(i + 1)
  return tensors


def shapes(*, scanned):
  layer = {"fc": {"kernel": (9, 4), "bias": (4,)}}
  struct = lambda *lead: lambda shape: jax.ShapeDtypeStruct((*lead, *shape), np.float32)
  is_shape = lambda x: isinstance(x, tuple)
  tree = {"embed": {"embedding": (7, 4)}, "stem": {"kernel": (2, 6, 3, 5)}}
  tree = jax.tree.map(struct(), tree, is_leaf=is_shape)
  if scanned:
    return tree | {"layers": jax.tree.map(struct(LAYERS), layer, is_leaf=is_shape)}
  numbered = jax.tree.map(struct(), layer, is_leaf=is_shape)
  return tree | {f"layers_{i}": numbered for i in range(LAYERS)}


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_byte_identical(scanned, dtype):
  tensors = checkpoint(dtype)
  params = import_params(tensors, TABLE, shapes(scanned=scanned))
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, shapes(scanned=scanned)
  )
  back = export_params(params, TABLE)
  assert {k: (v.dtype, v.shape, v.tobytes()) for k, v in back.items()} == {
    k: (v.dtype, v.shape, v.tobytes()) for k, v in tensors.items()
  }


def test_layouts_and_both_forms_agree():
  tensors = checkpoint()
  stacked = import_params(tensors, TABLE, shapes(scanned=True))
  numbered = import_params(tensors, TABLE, shapes(scanned=False))
  np.testing.assert_array_equal(
    stacked["stem"]["kernel"][1, 4, 2, 3], tensors["stem.weight"][3, 2, 1, 4]
  )
  for i in range(LAYERS):
    kernel = numbered[f"layers_{i}"]["fc"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors[f"h.{i}.fc.weight"].T)
    np.testing.assert_array_equal(kernel, stacked["layers"]["fc"]["kernel"][i])


def test_other_names_of_a_tensor():
  old = checkpoint(prefix="old.")
  assert "old.h.0.fc.weight" in old
  old["head.weight"] = old["embed.weight"].copy()
  params = import_params(old, TABLE, shapes(scanned=True))
  assert set(export_params(params, TABLE)) == set(checkpoint())


def test_tensors_are_read_one_at_a_time():
  reads = []

  class Lazy(dict):
    def __getitem__(self, name):
      reads.append(name)
      return super().__getitem__(name)

  def place(path, tensors, stacked):
    before = len(reads)
    for k, _ in enumerate(tensors, 1):
      assert len(reads) == before + k
    return path, stacked

  placed = import_params(Lazy(checkpoint()), TABLE, shapes(scanned=True), place=place)
  assert placed["layers"]["fc"]["bias"] == ("layers/fc/bias", True)
  assert sorted(reads) == sorted(checkpoint())


def broken(name, value=None):
  tensors = checkpoint()
  tensors.pop(name, None)
  return tensors if value is None else tensors | {name: value}


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    (broken("h.1.fc.bias"), r"h\.1\.fc\.bias: .* no such tensor"),
    (broken("h.3.fc.bias", np.zeros(4)), r"h\.3\.fc\.bias: the model has no place"),
    (broken("h.2.fc.weight", np.zeros((9, 4))), r"h\.2\.fc\.weight: .*\(9, 4\).* needs \(4, 9\)"),
    (broken("stem.weight", np.zeros((2, 6, 3, 5))), r"stem\.weight: .* needs \(5, 3, 2, 6\)"),
    (broken("head.weight", np.zeros((7, 4))), r"head\.weight: differs from embed\.weight"),
  ],
)
def test_bad_checkpoints_name_the_tensor(tensors, message):
  with pytest.raises(ValueError, match=message):
    import_params(tensors, TABLE, shapes(scanned=True))


def test_buffers_are_ignored_by_pattern_and_a_parameter_without_rule_is_named():
  tensors = checkpoint() | {"h.0.rotary.inv_freq": np.zeros(2)}
  import_params(tensors, TABLE, shapes(scanned=True), ignore=("*.inv_freq",))
  unknown = shapes(scanned=True) | {"extra": {"kernel": np.zeros(1)}}
  with pytest.raises(ValueError, match="extra/kernel: no rule"):
    import_params(checkpoint(), TABLE, unknown)
