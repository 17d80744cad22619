"""Checkpoints that survive a kill at any moment, and a damaged newest one."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxmethods.errors import InputError
from jaxmethods.runtime.experiment import State


class Checkpoints:
  """The states of a run on disk, the newest `keep` of them; a context manager.

  A save is written in the background under a temporary name and renamed when complete, so a killed
  run leaves nothing half-written that could be mistaken for a checkpoint.
  """

  def __init__(self, directory: Path, keep: int = 1, *, read_only: bool = False):
    """Opens `directory`; a reader leaves the files of a run that may be going on alone."""
    self._directory = directory.resolve()
    self._aliases = contextlib.ExitStack()
    self._read_only = read_only
    if read_only:
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      if jax.process_index() == 0:
        # Saves that a kill interrupted. Orbax can clear them too, but in a thread that it does not
        # join when nothing is saved, and which then complains at exit.
        for unfinished in self._directory.glob("*.orbax-checkpoint-tmp*"):
          shutil.rmtree(unfinished)
        self._directory.mkdir(parents=True, exist_ok=True)
      options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    alias = self._aliases.enter_context(_alias(self._directory))
    self._manager = ocp.CheckpointManager(alias, options=options)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *error: object) -> None:
    with self._aliases:
      self._manager.close()  # waits for the save under way

  def save(self, step: int, state: State) -> None:
    """Saves in the background; returns once `state` may be donated."""
    if step != self._manager.latest_step():
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def wait(self) -> None:
    """Returns when everything saved so far is complete on disk."""
    self._manager.wait_until_finished()

  def restore(self, like: State) -> tuple[int, State] | None:
    """Returns (step, state) of the newest checkpoint that can be read, None if there is none.

    Damaged newer ones are named and moved aside, to `damaged-<step>`.

    Args:
      like: a state of the same structure; arrays get its shapes, dtypes and shardings.

    Raises:
      InputError: if there are checkpoints and none can be read.
    """

    def describe(x: object) -> object:
      if not isinstance(x, jax.Array):  # numpy comes back as numpy
        return x
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    abstract = jax.tree.map(describe, like)
    damaged: list[int] = []
    reason = ""
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
      except Exception as error:  # whatever a damaged file makes orbax raise
        damaged.append(step)
        reason = reason or str(error).strip().split("\n", 1)[0]
      else:
        for newer in damaged:
          self._set_aside(newer, instead=step)
        return step, state
    if damaged:
      raise InputError(
        f"{self._directory}: no checkpoint can be read (step {damaged[0]}: {reason[:300]}); "
        "it is damaged or of another program version: choose another --workdir"
      )
    return None

  def _set_aside(self, step: int, instead: int) -> None:
    source, target = self._directory / str(step), self._directory / f"damaged-{step}"
    first = jax.process_index() == 0
    if first:
      outcome = "" if self._read_only else f", moved to {target.name}"
      print(f"checkpoint {source} is damaged{outcome}; using step {instead}", flush=True)
    if self._read_only:
      return
    if first:
      source.rename(_unused(target))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"set aside {step}")
    self._manager.reload()


@contextlib.contextmanager
def _alias(directory: Path) -> Iterator[Path]:
  """Gives orbax, which takes folder names for patterns, a name without any letter that means more."""
  if re.fullmatch(r"[A-Za-z0-9_./-]*", str(directory)):
    yield directory
    return
  with tempfile.TemporaryDirectory(prefix="jaxmethods-") as folder:
    link = Path(folder, "checkpoints")
    link.symlink_to(directory, target_is_directory=True)
    yield link


def _unused(path: Path) -> Path:
  """Returns `path`, or `path-2`, `path-3`, ...: the first that is not there."""
  candidates = (path.with_name(f"{path.name}-{n}" if n > 1 else path.name) for n in range(1, 1000))
  return next(candidate for candidate in candidates if not candidate.exists())
