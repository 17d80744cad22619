"""Ways to tune a model without forgetting, behind one interface and one training step."""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
