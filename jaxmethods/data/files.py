"""Where bytes come from: the data folder, files inside dependency wheels, and downloads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import importlib.metadata
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxmethods import folders
from jaxmethods.errors import InputError

_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 18


def data_dir() -> Path:
  """The local data folder: `$JAXMETHODS_DATA`, by default `~/.cache/jaxmethods`."""
  return folders.data()


def local_path(name: str) -> Path:
  """A user's file or folder; a relative path that is not here is looked for in the data folder."""
  path = folders.expanded(name)
  inside = data_dir() / path
  return inside if not path.exists() and inside.exists() else path


def digest(*paths: Path) -> str:
  """Returns one sha256 of files; that of each is remembered while its size and time stay.

  Args:
    *paths: files, and folders, of which every file counts that is not hidden.

  Raises:
    InputError: a file cannot be read.
  """
  whole = hashlib.sha256()
  for path in paths:
    try:
      files = (
        sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
      )
      for file in files:
        name = file.relative_to(path)
        if not any(part.startswith(".") for part in name.parts):
          seen = file.stat()
          contents = _digest(file, seen.st_size, seen.st_mtime_ns)
          whole.update(f"{name} {contents}\n".encode(errors="surrogateescape"))
    except OSError as error:
      raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
  return whole.hexdigest()


@functools.cache
def _digest(file: Path, size: int, time: int) -> str:
  """Digest of a file that had this size at this time."""
  del size, time
  with file.open("rb") as stream:  # some are of gigabytes: not as one bytes object
    return hashlib.file_digest(stream, "sha256").hexdigest()


def wheel_file(package: str, path: str, sha256: str, extra: str = "data") -> tuple[bytes, str]:
  """Reads a file out of an installed wheel without importing the package.

  Args:
    package: distribution name, e.g. "grakel".
    path: path below site-packages.
    sha256: expected digest; another version of the wheel may carry other bytes.
    extra: of jaxmethods that installs the package.

  Returns:
    The content, and the origin ("grakel 0.1.11 (wheel)").

  Raises:
    InputError: if the package or the file is missing, or its bytes are not the expected ones.
  """
  (content,), origin = wheel_files(package, (path,), sha256, extra)
  return content, origin


def wheel_files(
  package: str, paths: Sequence[str], sha256: str, extra: str = "data"
) -> tuple[list[bytes], str]:
  """Like `wheel_file` for several files; the digest is that of their contents one after the other."""
  path = paths[0]
  try:
    wheel = importlib.metadata.distribution(package)
    contents = []
    for path in paths:
      contents.append(Path(str(wheel.locate_file(path))).read_bytes())
  except (importlib.metadata.PackageNotFoundError, OSError) as error:
    raise InputError(
      f"{path} of the package {package} is not installed: pip install 'jaxmethods[{extra}]'"
    ) from error
  digest = hashlib.sha256()
  for content in contents:
    digest.update(content)
  if (found := digest.hexdigest()) != sha256:
    others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    raise InputError(
      f"{package} {wheel.version}: {paths[0]}{others} has sha256 {found}, expected {sha256}: "
      f"another version of {package} changed the data"
    )
  return contents, f"{package} {wheel.version} (wheel)"


def download(url: str, target: Path) -> Path:
  """Fetches `url` into `target`; an interrupted download continues where it stopped.

  The bytes grow in `<target>.part`, which is renamed only when the server's length is reached, so
  `target` is complete or absent. Its sha256 is written to `<target>.sha256` (the format of
  `sha256sum -c`) and `verify_download` compares later reads with it.

  Raises:
    InputError: without network, on a server error, or if the folder cannot be written.
  """
  part = target.with_name(target.name + ".part")
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.parent):
      if target.exists():  # another process was faster
        return target
      _fetch(url, part)
      digest = hashlib.sha256(part.read_bytes()).hexdigest()
      _record(target).write_text(f"{digest}  {target.name}\n")
      os.replace(part, target)
  except urllib.error.HTTPError as error:
    raise InputError(f"{url}: the server answered {error.code} {error.reason}") from error
  except PermissionError as error:
    raise InputError(
      f"{target.parent}: cannot be written, so {url} was not downloaded; "
      "let JAXMETHODS_DATA name a folder of yours"
    ) from error
  except (OSError, EOFError, http.client.HTTPException) as error:
    reason = getattr(error, "reason", error)
    raise InputError(f"{url}: download failed ({reason})") from error
  return target


def verify_download(path: Path) -> None:
  """Compares a downloaded file with the sha256 recorded when it arrived, if there is a record."""
  record = _record(path)
  if not record.exists():
    return
  expected = record.read_text().split()[0]
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != expected:
    raise InputError(
      f"{path}: sha256 {found}, but {expected} was downloaded: delete it to fetch it again"
    )


def discard(path: Path) -> None:
  """Removes a download and its record."""
  path.unlink(missing_ok=True)
  _record(path).unlink(missing_ok=True)


def _record(path: Path) -> Path:
  return path.with_name(path.name + ".sha256")


def _fetch(url: str, part: Path) -> None:
  """Appends to `part` what is missing of `url`."""
  done = part.stat().st_size if part.exists() else 0
  request = urllib.request.Request(url, headers={"User-Agent": "jaxmethods"})
  if done:
    request.add_header("Range", f"bytes={done}-")
  try:
    response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
  except urllib.error.HTTPError as error:
    if error.code != 416 or not done:
      raise
    # The partial file is no prefix of what the server has now (or is already all of it).
    part.unlink()
    return _fetch(url, part)
  with response:
    if done and response.status != 206:  # the server ignores ranges: start over
      done = 0
    length = response.headers.get("Content-Length")
    total = None if length is None else done + int(length)
    with part.open("ab" if done else "wb") as file:
      while chunk := response.read(_CHUNK_BYTES):
        file.write(chunk)
      file.flush()
      os.fsync(file.fileno())
  size = part.stat().st_size
  if total is not None and size < total:
    raise EOFError(f"connection lost after {size} of {total} bytes; run again to continue")


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
  """Lets one process at a time download into `folder`; hosts and test workers start together."""
  try:
    import fcntl
  except ImportError:  # Windows: two simultaneous first downloads are the user's to avoid
    yield
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # some network file systems have no locks
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)
