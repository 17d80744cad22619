"""Image functions on the device: one image and a key in, an image out, for the caller to vmap."""

from jaxmethods.public import attach as _attach

__getattr__, __dir__, __all__ = _attach(__name__, __file__)
