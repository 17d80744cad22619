"""Says what a silent part of a run is waiting for, and since when."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

_FIRST, _GROWTH = (
  4.0,
  1.6,
)  # seconds of silence before the first line; factor from one line to the next
_under_way: list[str] = []  # the innermost last: the one that is said


@contextlib.contextmanager
def waiting(what: str, *, quiet: bool = False) -> Iterator[None]:
  """Prints `what` and the seconds so far, now and then, for as long as the block runs.

  Args:
    what: as in "training the encoder".
    quiet: whether another process says it.
  """
  over, begun = threading.Event(), time.monotonic()
  _under_way.append(what)
  thread = threading.Thread(target=_say, args=(what, over, begun), daemon=True)
  if not quiet:
    thread.start()
  try:
    yield
  finally:
    _under_way.remove(what)
    over.set()


def _say(what: str, over: threading.Event, begun: float) -> None:
  """Prints lines, at longer and longer intervals, while no other wait lies inside this one."""
  pause = _FIRST
  while not over.wait(pause):
    if _under_way and _under_way[-1] == what:
      print(f"{what}: {time.monotonic() - begun:.0f} s", flush=True)
    pause *= _GROWTH
