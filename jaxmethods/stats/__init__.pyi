"""Losses, rankings, retrieval and other statistics."""

from jaxmethods.stats import dropout as dropout, mixtures as mixtures, retrieval as retrieval
from jaxmethods.stats.activations import gelu as gelu, swiglu as swiglu
from jaxmethods.stats.confidence import (
  self_consistency as self_consistency,
  token_statistics as token_statistics,
)
from jaxmethods.stats.losses import cross_entropy as cross_entropy, mean_of_real as mean_of_real
from jaxmethods.stats.matched import lost_at as lost_at
from jaxmethods.stats.poisoning import detection as detection, spectral_scores as spectral_scores
from jaxmethods.stats.ranking import (
  aupr as aupr,
  auroc as auroc,
  bootstrap as bootstrap,
  fpr_at as fpr_at,
  roc_curve as roc_curve,
)
from jaxmethods.stats.selection import top_share as top_share
