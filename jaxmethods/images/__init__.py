"""Image functions on the device: one image and a key in, an image out, for the caller to vmap."""
