"""Federated algorithms, rounds as one program, and clients of their data."""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
