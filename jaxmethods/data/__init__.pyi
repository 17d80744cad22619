"""Named sources of data and weights."""

from jaxmethods.data.model_sources import (
  load_causal_lm as load_causal_lm,
  save_causal_lm as save_causal_lm,
)
from jaxmethods.data.records import (
  ArrayData as ArrayData,
  GraphData as GraphData,
  Source as Source,
)
from jaxmethods.data.sources import (
  load_arrays as load_arrays,
  load_domains as load_domains,
  load_graphs as load_graphs,
)
