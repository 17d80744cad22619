"""Data by name: the only door through which experiments get data.

| name | what |
| --- | --- |
| `digits` | scikit-learn's 1,797 digits, 8x8 |
| `embedded:graphs`, `embedded:MUTAG`, `embedded:Cuneiform`, `embedded:digit-graphs` | graphs |
| `embedded:mnist5k`, `embedded:digits` | images |
| `tu:NAME`, `tu:SM`, `tu:BIO-SM`, `tu:MUTAG,BZR` | TUDataset graphs, one record per set |
| `tfds:tu/NAME` | the same graphs through TensorFlow Datasets' storage |
| `tfds:NAME`, `tfds:NAME:SPLIT` | images of TensorFlow Datasets |
| `folder:PATH` | images as class/file or domain/class/file |
| `npz:PATH` | arrays |

`$JAXMETHODS_DATA` (default `~/.cache/jaxmethods`) is the local data folder. A missing source says what
to do about it; nothing falls back to other data.
"""

from __future__ import annotations

import difflib

from jaxmethods.data import embedded, tu
from jaxmethods.data.records import ArrayData, GraphData
from jaxmethods.data.tu_format import Features
from jaxmethods.errors import InputError

_GRAPH_NAMES = ("embedded:graphs", *(f"embedded:{name}" for name in embedded.GRAPH_SETS))
_ARRAY_NAMES = ("digits", *(f"embedded:{name}" for name in embedded.ARRAY_SETS))


def load_graphs(
  name: str, *, features: Features = "auto", max_degree: int | None = None
) -> list[GraphData]:
  """Loads labelled graphs.

  Args:
    name: `embedded:graphs`, `tu:SELECTION` or `tfds:tu/SELECTION`; see the module docstring.
    features: node features of TU sets, see `tu_format.node_features`. Embedded sets have fixed ones.
    max_degree: clips degree features, see `tu_format.node_features`.

  Returns:
    One record per set: a group name gives several.

  Raises:
    InputError: for an unknown name, or missing or damaged data.
  """
  kind, _, rest = name.partition(":")
  if kind == "tu" and rest:
    return [tu.load(each, features, max_degree) for each in tu.expand(rest)]
  if name in _GRAPH_NAMES:
    if features != "auto" or max_degree is not None:
      raise InputError(f"{name}: its features are fixed; use tu:NAME to choose them")
    return embedded.load_graphs(rest)
  raise _unknown(name, "graphs", (*_GRAPH_NAMES, "tu:NAME", "tfds:tu/NAME"), _ARRAY_NAMES)


def load_arrays(name: str) -> ArrayData:
  """Loads labelled images or feature vectors."""
  if name in _ARRAY_NAMES:
    return embedded.load_arrays(name.removeprefix("embedded:"))
  valid = (*_ARRAY_NAMES, "tfds:NAME", "folder:PATH", "npz:PATH")
  raise _unknown(name, "arrays", valid, _GRAPH_NAMES)


def _unknown(name: str, what: str, valid: tuple[str, ...], other: tuple[str, ...]) -> InputError:
  if name in other:
    return InputError(
      f"data {name!r} is not a source of {what}: expected one of {', '.join(valid)}"
    )
  close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return InputError(f"unknown data {name!r}: {hint}sources of {what}: {', '.join(valid)}")
