"""Public rooms of jaxmethods."""

from jaxmethods import (
  adapters as adapters,
  data as data,
  federated as federated,
  graphs as graphs,
  images as images,
  methods as methods,
  models as models,
  stats as stats,
  tuning as tuning,
)

__version__: str
