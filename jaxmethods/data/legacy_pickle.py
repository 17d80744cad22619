"""Tensors out of PyTorch's first file format, without unpickling: nothing but arrays can be built.

Such a file is five pickles one after the other (magic number, version, facts about the machine, the
state dict, the keys of the storages) and then the storages: a count, then raw numbers. The pickles are
parsed into opcodes, which call nothing, and the few opcodes that a state dict is written with are
interpreted here. Any other opcode, any name but the four below, and any byte too few or too many is an
error.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxmethods.errors import InputError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_MARK = object()


class _Global(NamedTuple):
  """A name that the file mentions; it stays a name."""

  name: str


class _Storage(NamedTuple):
  """Numbers of one type behind one or more tensors."""

  dtype: np.dtype
  key: str
  size: int


class _Tensor(NamedTuple):
  """A view of a storage; offset and strides are counted in numbers."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


# Whatever the opcodes below make.
_Value: TypeAlias = object


def read_tensors(content: bytes, name: str) -> dict[str, np.ndarray]:
  """Reads a state dict.

  Args:
    content: of the file.
    name: of the file, for errors.

  Returns:
    Name -> float32 or int64 array, in the order of the file, contiguous.

  Raises:
    InputError: the file is no such state dict, is cut off or goes on behind its end, or holds a name
      or an opcode that no state dict of plain tensors needs.
  """
  stream = io.BytesIO(content)
  try:
    _expect(_interpret(stream) == _MAGIC, "does not start with the magic number")
    _expect(_interpret(stream) == _VERSION, f"is not of version {_VERSION}")
    machine = _interpret(stream)
    little = isinstance(machine, dict) and machine.get("little_endian") is True
    _expect(little, "is not little-endian")
    tensors, keys = _interpret(stream), _interpret(stream)
    _expect(isinstance(tensors, dict) and isinstance(keys, list), "holds no state dict")
    assert isinstance(tensors, dict) and isinstance(keys, list)  # for the type checker
    return _arrays(tensors, keys, stream)
  except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
    raise InputError(f"{name}: not a readable file of tensors ({error})") from None


def _arrays(
  tensors: Mapping[_Value, _Value], keys: list[_Value], stream: io.BytesIO
) -> dict[str, np.ndarray]:
  """Reads the storages, in the order of `keys`, and cuts the tensors out of them."""
  storages: dict[str, _Storage] = {}
  for name, tensor in tensors.items():
    _expect(isinstance(name, str) and isinstance(tensor, _Tensor), f"{name!r} is no tensor")
    assert isinstance(tensor, _Tensor)
    storage = tensor.storage
    _expect(storages.setdefault(storage.key, storage) == storage, "one key for two storages")
  _expect(len(set(map(str, keys))) == len(keys) == len(storages), "keys and tensors disagree")
  numbers = {key: _numbers(storages[str(key)], stream) for key in keys}
  _expect(not stream.read(1), "goes on behind its last storage")
  return {
    str(name): _view(tensor, numbers[tensor.storage.key])
    for name, tensor in tensors.items()
    if isinstance(tensor, _Tensor)
  }


def _numbers(storage: _Storage, stream: io.BytesIO) -> np.ndarray:
  size = int.from_bytes(stream.read(8), "little")
  _expect(size == storage.size, f"storage {storage.key}: {size} numbers, not {storage.size}")
  content = stream.read(size * storage.dtype.itemsize)
  _expect(len(content) == size * storage.dtype.itemsize, f"storage {storage.key}: cut off")
  return np.frombuffer(content, storage.dtype)


def _view(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
  """Cuts a tensor out; its last number must lie inside of the storage."""
  _, offset, shape, strides = tensor
  _expect(len(shape) == len(strides), "shape and strides of different lengths")
  counts = (offset, *shape, *strides)
  _expect(all(type(n) is int and n >= 0 for n in counts), "a shape that is no shape")
  if 0 in shape:
    return np.empty(shape, numbers.dtype)
  last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
  # A stride of 0 would let a small file ask for any amount of memory.
  _expect(last < len(numbers) and np.prod(shape, dtype=object) <= len(numbers), "beyond a storage")
  bytes_of = [step * numbers.itemsize for step in strides]
  view = np.lib.stride_tricks.as_strided(numbers[offset:], shape, bytes_of, writeable=False)
  return np.array(view, order="C")


def _expect(condition: bool, otherwise: str) -> None:
  if not condition:
    raise ValueError(otherwise)


# --- the opcodes ------------------------------------------------------------------------------------


class _Machine(NamedTuple):
  """The stack of values, and those that were put aside by number."""

  stack: list[_Value]
  memo: dict[int, _Value]

  def above_mark(self) -> list[_Value]:
    """Takes everything above the last mark off the stack, and the mark."""
    place = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
    values = self.stack[place + 1 :]
    del self.stack[place:]
    return values

  def top(self, count: int) -> list[_Value]:
    """Takes the last values off the stack."""
    _expect(len(self.stack) >= count, "an empty stack")
    values = self.stack[len(self.stack) - count :]
    del self.stack[len(self.stack) - count :]
    return values


def _interpret(stream: io.BytesIO) -> _Value:
  """Reads one pickle and returns its value."""
  machine = _Machine([], {})
  for opcode, argument, _ in _opcodes(stream):
    if opcode in _LITERALS:
      machine.stack.append(argument)
    elif opcode in _CONSTANTS:
      machine.stack.append(_CONSTANTS[opcode]())
    elif opcode in _RULES:
      _RULES[opcode](machine, argument)
    else:
      _expect(opcode in ("PROTO", "STOP"), f"opcode {opcode} has no place in a state dict")
  (value,) = machine.stack
  return value


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[str, _Value, int | None]]:
  for opcode, argument, place in pickletools.genops(stream):
    yield opcode.name, argument, place


def _global(machine: _Machine, name: _Value) -> None:
  _expect(name in (*_DTYPES, _DICT, _TENSOR), f"{name} has no place in a state dict")
  machine.stack.append(_Global(str(name)))


def _reduce(machine: _Machine, _: _Value) -> None:
  function, arguments = machine.top(2)
  if function == _Global(_DICT) and arguments == ():
    machine.stack.append({})
    return
  _expect(function == _Global(_TENSOR) and isinstance(arguments, tuple), "a call of no tensor")
  assert isinstance(arguments, tuple)
  # storage, offset, shape, strides, requires_grad, backward hooks
  storage, offset, shape, strides, *rest = arguments
  _expect(isinstance(storage, _Storage) and len(rest) == 2, "a call of no tensor")
  machine.stack.append(_Tensor(storage, offset, shape, strides))


def _persistent(machine: _Machine, _: _Value) -> None:
  (value,) = machine.top(1)
  _expect(isinstance(value, tuple) and len(value) == 6, "a reference to no storage")
  assert isinstance(value, tuple)
  word, kind, key, _place, size, view = value
  whole = word == "storage" and view is None and type(size) is int and size >= 0
  _expect(whole and isinstance(kind, _Global) and isinstance(key, str), "a reference to no storage")
  machine.stack.append(_Storage(_DTYPES[kind.name], key, size))  # type: ignore[attr-defined, arg-type]


def _set_items(machine: _Machine, pairs: list[_Value]) -> None:
  _expect(bool(machine.stack) and isinstance(machine.stack[-1], dict), "items of no dict")
  _expect(len(pairs) % 2 == 0, "a key without a value")
  target = machine.stack[-1]
  assert isinstance(target, dict)
  target.update(zip(pairs[::2], pairs[1::2], strict=True))


def _append(machine: _Machine, values: list[_Value]) -> None:
  _expect(bool(machine.stack) and isinstance(machine.stack[-1], list), "items of no list")
  target = machine.stack[-1]
  assert isinstance(target, list)
  target.extend(values)


def _build(machine: _Machine, _: _Value) -> None:
  """A state dict has versions of its modules beside the tensors: they are dropped."""
  _, below = machine.top(1), machine.stack
  _expect(bool(below) and isinstance(below[-1], dict), "a state of no dict")


def _put(machine: _Machine, place: _Value) -> None:
  _expect(isinstance(place, int) and bool(machine.stack), "nothing to put aside")
  assert isinstance(place, int)
  machine.memo[place] = machine.stack[-1]


def _get(machine: _Machine, place: _Value) -> None:
  assert isinstance(place, int)
  machine.stack.append(machine.memo[place])


_LITERALS = frozenset({"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"})
_CONSTANTS: dict[str, Callable[[], _Value]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_TUPLE": lambda: (),
  "EMPTY_DICT": dict,
  "EMPTY_LIST": list,
  "MARK": lambda: _MARK,
}
_RULES: dict[str, Callable[[_Machine, _Value], None]] = {
  "GLOBAL": _global,
  "REDUCE": _reduce,
  "BINPERSID": _persistent,
  "BUILD": _build,
  "APPEND": lambda machine, _: _append(machine, machine.top(1)),
  "APPENDS": lambda machine, _: _append(machine, machine.above_mark()),
  "SETITEM": lambda machine, _: _set_items(machine, machine.top(2)),
  "SETITEMS": lambda machine, _: _set_items(machine, machine.above_mark()),
  "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.above_mark())),
  "TUPLE1": lambda machine, _: machine.stack.append(tuple(machine.top(1))),
  "TUPLE2": lambda machine, _: machine.stack.append(tuple(machine.top(2))),
  "TUPLE3": lambda machine, _: machine.stack.append(tuple(machine.top(3))),
  "BINPUT": _put,
  "LONG_BINPUT": _put,
  "BINGET": _get,
  "LONG_BINGET": _get,
}
