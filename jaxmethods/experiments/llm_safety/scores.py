"""What a row of the suite comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias


class Scores(NamedTuple):
  """Metrics of a row; NaN: does not apply.

  Attributes:
    attack: success of the attack, the smaller the safer.
    utility: of what the model is for.
    extras: the columns of the task, all of them.
    epsilon: of the guarantee; infinite where training data have none.
  """

  attack: float
  utility: float
  extras: Mapping[str, float]
  epsilon: float = math.nan


Makers: TypeAlias = Mapping[str, Callable[[], Scores]]  # row -> what makes it
