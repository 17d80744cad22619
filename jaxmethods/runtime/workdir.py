"""The directory of a run: its config, and files that are never half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import yaml

from jaxmethods.errors import InputError
from jaxmethods.runtime import config as config_lib, failures
from jaxmethods.runtime.experiment import RunConfig

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
FINISHED = "finished.json"  # that the report shows the last step, and of which files it speaks
DATA = "data.json"  # digests of the data, from the first line of the report


def check(workdir: Path, config: RunConfig, *, may_extend: bool = False, **header: object) -> None:
  """Raises `InputError` if the run in `workdir` has another config than this one.

  Args:
    workdir: directory of the run; need not exist.
    config: config of the run that is about to start.
    may_extend: whether more `steps` than before are allowed: a finished run may go on.
    **header: further entries of the file that must agree, such as the method.
  """
  parents = [workdir, *workdir.parents]
  file = workdir / CONFIG
  try:
    if blocking := next((path for path in parents if path.exists() and not path.is_dir()), None):
      raise InputError(f"--workdir {workdir}: {blocking} is a file, a directory is needed")
    if not file.exists():
      return
  except OSError as error:  # a name too long, a folder that may not be looked into
    raise failures.of_system(error, f"--workdir {workdir}") from None
  try:
    old = yaml.safe_load(file.read_text(encoding="utf-8"))
    new = yaml.safe_load(config_lib.to_yaml(config, **header))
    differing = config_lib.differences(old, new)
  except (OSError, ValueError, AttributeError, yaml.YAMLError):
    raise InputError(f"{file}: is not the config of a run; choose another --workdir") from None
  before, now = differing.get("steps", (0, 0))
  longer = may_extend and isinstance(before, int) and isinstance(now, int) and before < now
  if longer:
    del differing["steps"]
  if differing:
    listed = ", ".join(f"{key} (was {a!r}, now {b!r})" for key, (a, b) in differing.items())
    raise InputError(
      f"--workdir {workdir}: holds a run with another config: {listed}; "
      "--workdir NEW starts one beside it"
    )
  if longer:
    print(f"{workdir}: going on from {before} to {now} steps")


def check_data(workdir: Path, about: str) -> None:
  """Raises `InputError` if the run in `workdir` was made with other data under the same name.

  Args:
    workdir: directory of the run; need not exist.
    about: first line of the report, with the digests of the data that are there now.
  """
  old, new = _kept_data(workdir), digests(about)
  changed = [name for name in new if name in old and new[name] != old[name]]
  if changed:
    listed = ", ".join(f"{name} (was sha256 {old[name]}, now {new[name]})" for name in changed)
    raise InputError(
      f"--workdir {workdir}: the data have changed since this run began: {listed}; put the old ones "
      "back, or choose another --workdir"
    )


def keep_data(workdir: Path, about: str) -> None:
  """Writes the digests of the data that a run is made with."""
  write_json(workdir / DATA, _kept_data(workdir) | digests(about))


def digests(about: str) -> dict[str, str]:
  """Finds {name: digest} in the first line of a report."""
  found: dict[str, str] = {}
  for name, digest in re.findall(r"(\S+) \((?:[^()]*, )?sha256 ([0-9a-f]+)\)", about):
    # Paths may end alike after a space.
    found[name if name not in found else f"{name} #{len(found) + 1}"] = digest
  return found


def _kept_data(workdir: Path) -> dict[str, str]:
  file = workdir / DATA
  try:
    kept = json.loads(file.read_text(encoding="utf-8"))
    return {str(name): str(digest) for name, digest in kept.items()}
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, AttributeError):
    raise InputError(f"{file}: cannot be read; choose another --workdir") from None


def create(workdir: Path, config: RunConfig, **header: object) -> None:
  """Makes the directory and writes its config."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(workdir / CONFIG, config_lib.to_yaml(config, **header))
  except OSError as error:
    raise failures.of_system(error, f"--workdir {workdir}: cannot be written") from None


def keep_finished(workdir: Path, step: int) -> None:
  """Notes that the report is that of the last step, of the checkpoint as it is on disk now."""
  write_json(workdir / FINISHED, {"step": step, "files": _stamps(workdir, step)})


def read_finished(workdir: Path) -> int | None:
  """Returns the last step of a finished run; None if anything of it has been touched since."""
  try:
    kept = json.loads((workdir / FINISHED).read_text(encoding="utf-8"))
    step = kept["step"]
    return step if kept["files"] == _stamps(workdir, step) != {} else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _stamps(workdir: Path, step: int) -> dict[str, list[int]]:
  """Returns {file: [size, time]} of the checkpoint of a step, the config and the report."""
  newest = workdir / CHECKPOINTS / str(step)
  files = sorted(path for path in newest.rglob("*") if path.is_file()) if newest.is_dir() else []
  if not files:
    return {}
  seen = {path: path.stat() for path in [*files, workdir / CONFIG, workdir / REPORT]}
  return {str(path.relative_to(workdir)): [s.st_size, s.st_mtime_ns] for path, s in seen.items()}


def write_text(file: Path, text: str) -> None:
  """Replaces `file` in one step: readers, and a kill, see the old text or the new."""
  write_bytes(file, text.encode(errors="backslashreplace"))


def write_bytes(file: Path, contents: bytes) -> None:
  """Does the same with bytes."""
  temporary = file.with_name(f".{file.name}.{os.getpid()}")
  with temporary.open("wb") as stream:
    stream.write(contents)
    stream.flush()
    os.fsync(stream.fileno())
  temporary.replace(file)


def write_json(file: Path, value: object) -> None:
  """Replaces `file` by `value` as JSON, in one step."""
  write_text(file, json.dumps(value, indent=2) + "\n")


def empty(folder: Path, mark: str) -> None:
  """Makes a folder, or empties one that an earlier export filled.

  Args:
    folder: to be written to.
    mark: name of the file by which an earlier export is known.

  Raises:
    InputError: it holds something else, or cannot be written.
  """
  try:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      card = folder / mark
      if not (card.is_file() and "jaxmethods" in card.read_text(encoding="utf-8")[:200]):
        raise InputError(f"{folder}: holds something else: choose an empty folder")
      shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise failures.of_system(error, str(folder)) from None
