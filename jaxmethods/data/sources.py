"""Data by name: the only door through which experiments get data.

| name | what |
| --- | --- |
| `digits` | scikit-learn's 1,797 digits, 8x8 |
| `embedded:graphs`, `embedded:MUTAG`, `embedded:Cuneiform`, `embedded:digit-graphs` | graphs |
| `embedded:mnist5k`, `embedded:digits`, `embedded:font-digits` | images |
| `embedded:digit-domains` | three sets of digits as domains |
| `tu:NAME`, `tu:SM`, `tu:BIO-SM`, `tu:MUTAG,BZR` | TUDataset graphs, one record per set |
| `tu:PATH` | your own graphs in that format: a folder or zip with NAME_A.txt, ... |
| `tfds:tu/NAME` | the same graphs through TensorFlow Datasets' storage |
| `tfds:NAME`, `tfds:NAME:SPLIT` | images of TensorFlow Datasets |
| `folder:PATH` | images as class/file or domain/class/file |
| `npz:PATH` | arrays: `x`, `y` or `train_x`, `train_y`, ...; see `local.load_npz` |

`$JAXMETHODS_DATA` (default `~/.cache/jaxmethods`) is the local data folder; a relative PATH that is not
below the working directory is looked for there. A missing source says what
to do about it; nothing falls back to other data.
"""

from __future__ import annotations

import difflib

import numpy as np

from jaxmethods.data import embedded, files, local, tu
from jaxmethods.data.records import ArrayData, GraphData, signed
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

  >>> [graphs.num_classes for graphs in jm.data.load_graphs("embedded:graphs")]
  [2, 30, 10]
  """
  kind, _, rest = name.partition(":")
  if kind == "tu" and rest:
    return [signed(tu.load(each, features, max_degree)) for each in tu.expand(rest)]
  if name.startswith("tfds:tu/"):
    from jaxmethods.data import tfds_sources

    found = tfds_sources.load_graphs(name.removeprefix("tfds:tu/"), features, max_degree)
    return [signed(each) for each in found]
  if name in _GRAPH_NAMES:
    if features != "auto" or max_degree is not None:
      raise InputError(f"{name}: its features are fixed; use tu:NAME to choose them")
    return embedded.load_graphs(rest)
  raise _unknown(name, "graphs", (*_GRAPH_NAMES, "tu:NAME", "tfds:tu/NAME"))


def load_arrays(name: str, *, image_size: int | None = None) -> ArrayData:
  """Loads labelled images or feature vectors.

  Args:
    name: `digits`, `embedded:NAME`, `tfds:NAME[:SPLIT]`, `folder:PATH` or `npz:PATH`; see the
      module docstring.
    image_size: side to which the images of a folder are resized.

  Returns:
    The record.

  Raises:
    InputError: for an unknown name, or missing or damaged data.

  >>> x, y = jm.data.load_arrays("digits").splits["all"]
  >>> x.shape
  (1797, 8, 8, 1)
  """
  kind, _, rest = name.partition(":")
  if image_size is not None and (kind != "folder" or image_size < 1):
    raise InputError(
      f"{name}: image_size={image_size}: expected a positive size, for folder:PATH only"
    )
  if name in _ARRAY_NAMES:
    return embedded.load_arrays(name.removeprefix("embedded:"))
  if kind == "tfds" and rest and not rest.startswith("tu/"):
    from jaxmethods.data import tfds_sources

    return signed(tfds_sources.load_arrays(rest))
  if kind == "folder" and rest:
    return signed(local.load_folder(files.local_path(rest), image_size))
  if kind == "npz" and rest:
    return signed(local.load_npz(files.local_path(rest)))
  raise _unknown(name, "arrays", (*_ARRAY_NAMES, "tfds:NAME", "folder:PATH", "npz:PATH"))


def load_domains(name: str) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[ArrayData]]:
  """Loads arrays of several domains.

  Args:
    name: `embedded:digit-domains` (three kinds of digits), or a name of `load_arrays`, whose splits
      are then the domains.

  Returns:
    {domain: (x, y)}, and the records they come from.

  Raises:
    InputError: as `load_arrays`.

  >>> domains, records = jm.data.load_domains("digits")
  >>> list(domains)
  ['all']
  """
  if name != "embedded:digit-domains":
    data = load_arrays(name)
    return dict(data.splits), [data]
  sets = [load_arrays(each) for each in ("embedded:mnist5k", "digits", "embedded:font-digits")]
  return {data.source.name.removeprefix("embedded:"): data.splits["all"] for data in sets}, sets


def _unknown(name: str, what: str, valid: tuple[str, ...]) -> InputError:
  """The error for a name that is no source of `what`."""
  known = f"sources of {what}: {', '.join(valid)}"
  if name.partition(":")[0] == "hf":
    return InputError(f"{name}: hf: names models, which jaxmethods.models reads, not data; {known}")
  if name in (*_GRAPH_NAMES, *_ARRAY_NAMES) or name.startswith("tfds:tu/"):
    return InputError(f"{name}: not a source of {what}; {known}")
  close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
  hint = f"did you mean {close[0]!r}? " if close else ""
  return InputError(f"unknown data {name!r}: {hint}{known}")
