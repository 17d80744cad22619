"""Ways of tuning as one interface, and one training step."""

from jaxmethods.tuning import metrics as metrics, posterior as posterior, selective as selective
from jaxmethods.tuning.tuner import (
  Tuner as Tuner,
  TuningState as TuningState,
  adamw as adamw,
  adapted as adapted,
  init_state as init_state,
  tuning_step as tuning_step,
)
