"""The suite of the survey "Keeping Yourself is Important": every way of tuning, one model, one budget.

The model is pretrained on easy-VQA (four families of questions) and tuned on one target. A row is a way
of tuning; all rows of a seed see the same batches in the same order. Of the survey itself the abstract
and the list of methods could be read: the rows are the definitions of the cited methods.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmethods.runtime.experiment import Selection
from jaxmethods.testbeds.multimodal.settings import at_their_rates, selected_by
from jaxmethods.testbeds.multimodal.suite_settings import PARADIGMS, SuiteConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SuiteConfig):
  """The settings of the suite, as they are: `python -m train.run --method mllm_tuning --row lora`."""


def rows(config: Config) -> dict[str, Config]:
  """Lists all rows at their learning rates; `base` has one step, which changes nothing.

  The rate of `projector` is that of the projector, which the other rows train at `projector_rate`.
  """
  changes: dict[str, dict[str, Any]] = {name: {"row": name} for name in PARADIGMS}
  if "projector" in config.rates:
    changes["projector"]["projector_rate"] = config.rates["projector"]
  result = at_their_rates(config, config.rates, changes)
  base = dataclasses.replace(result["base"], steps=1, eval_every=1, log_every=1)
  return result | {"base": base}


def selection(config: Config) -> Selection | None:
  """Chooses settings by H on validation; see `testbeds.multimodal.settings`."""
  return selected_by(config, "H", "Target")
