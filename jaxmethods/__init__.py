"""Federated learning, tuning, graphs and trustworthy language models as pure JAX functions.

`import jaxmethods as jm`; then `jm.federated.fedavg`, `jm.adapters.lora`, `jm.methods.spider`. Nothing
is loaded before it is used.
"""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)

__version__ = "0.1.0"
