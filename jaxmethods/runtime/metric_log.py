"""metrics.jsonl and TensorBoard events of a run, and what a person sees meanwhile."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from jaxmethods.runtime import workdir as workdir_lib
from jaxmethods.runtime.experiment import Metrics, Values

Number: TypeAlias = int | float | None  # None: not finite

METRICS = "metrics.jsonl"


class MetricLog:
  """Appends one JSON object per logged step, and the scalars to TensorBoard; a context manager."""

  def __init__(self, workdir: Path, step: int):
    """Opens the log of a run that continues after `step` (0: from the start).

    Lines after `step` belong to work that was lost with the process; they are cut off, since the
    steps are done again.
    """
    from tensorboardX import SummaryWriter  # 0.2 s

    file = workdir / METRICS
    if file.exists():
      kept = [json.dumps(line) + "\n" for line in read(workdir) if line["step"] <= step]
      workdir_lib.write_text(file, "".join(kept))
    self._lines = file.open("a", encoding="utf-8")
    self._events = SummaryWriter(str(workdir / "events"), purge_step=step + 1, flush_secs=10)

  def __enter__(self) -> MetricLog:
    return self

  def __exit__(self, *error: object) -> None:
    self.sync()
    self._lines.close()
    self._events.close()

  def write(self, step: int, metrics: Values) -> None:
    """Appends a line; `metrics` are what `plain` returns."""
    self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
    self._lines.flush()
    for name, value in metrics.items():
      if isinstance(value, int | float):
        self._events.add_scalar(name, value, step)

  def sync(self) -> None:
    """Brings everything to disk; called before a checkpoint that relies on it."""
    self._lines.flush()
    os.fsync(self._lines.fileno())


def read(workdir: Path) -> list[Values]:
  """Returns the complete lines of metrics.jsonl; a last line cut short by a kill is left out."""
  lines = []
  for text in (workdir / METRICS).read_text(encoding="utf-8").splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      break
  return lines


def plain(metrics: Metrics) -> Values:
  """Returns numpy metrics as numbers and lists that JSON can hold; None for what is not finite."""

  def number(x: np.ndarray | np.generic) -> Number:
    # Through text, because the shortest decimal of a float32 is 0.1, not 0.10000000149.
    value = float(str(x)) if isinstance(x, np.floating) else int(x)
    return value if math.isfinite(value) else None

  def convert(value: ArrayLike) -> Number | list:
    x = np.asarray(value)
    x = x.astype(np.float32) if x.dtype.kind == "V" else x  # bfloat16
    return number(x[()]) if x.ndim == 0 else [convert(row) for row in x]

  return {name: convert(value) for name, value in metrics.items()}


class Display:
  """A progress bar on a terminal, a line now and then elsewhere; a context manager."""

  def __init__(self, title: str, step: int, num_steps: int, *, quiet: bool = False):
    """Starts at `step` of `num_steps`; a quiet one shows nothing."""
    self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    self._bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=16),
      MofNCompleteColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.fields[metrics]}"),
      console=self._console,
      disable=quiet or not self._console.is_terminal,
    )
    self._title, self._num_steps, self._said = title, num_steps, -math.inf
    self._task = self._bar.add_task(title, total=num_steps, completed=step, metrics="")

  def __enter__(self) -> Display:
    self._bar.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, object] | None = None) -> None:
    """Shows that `step` is done, and as many of the metrics as fit."""
    if metrics is None:
      self._bar.update(self._task, completed=step)
      return
    room = self._console.width - len(self._title) - 36 if not self._bar.disable else 200
    text = _describe(metrics, room)
    self._bar.update(self._task, completed=step, metrics=text)
    due = time.monotonic() - self._said > 5 or step == self._num_steps
    if self._bar.disable and due:
      self._said = time.monotonic()
      self._console.print(f"{self._title} {step}/{self._num_steps} {text}", markup=False)


def _describe(metrics: Mapping[str, object], room: int) -> str:
  """Returns the scalar metrics as `name value` text, as many as have room."""
  text = ""
  for name, value in metrics.items():
    if isinstance(value, int | float):
      longer = f"{text}{name} {value:.4g} "
      if len(longer) > room:
        break
      text = longer
  return text.rstrip()
