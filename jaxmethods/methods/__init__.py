"""One module per paper: its equations, nothing else."""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
