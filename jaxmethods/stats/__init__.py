"""Arrays in, arrays out: losses, rankings, retrieval, mixtures."""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
