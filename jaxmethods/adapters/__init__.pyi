"""Low-rank and other updates beside frozen parameters."""

from jaxmethods.adapters.adapter import (
  Adapter as Adapter,
  Linear as Linear,
  applied as applied,
  apply as apply,
  num_trainable as num_trainable,
  split as split,
)
from jaxmethods.adapters.low_rank import (
  dora as dora,
  hydralora as hydralora,
  lora as lora,
  loramoe as loramoe,
  milora as milora,
  moslora as moslora,
  pissa as pissa,
  rslora as rslora,
  vera as vera,
)
from jaxmethods.adapters.peft_format import from_peft as from_peft, to_peft as to_peft
from jaxmethods.adapters.scaling import ia3 as ia3, oft as oft
from jaxmethods.adapters.selective import bitfit as bitfit
from jaxmethods.adapters.targets import matching as matching
from jaxmethods.adapters.training import (
  next_token_loss as next_token_loss,
  update_step as update_step,
)
