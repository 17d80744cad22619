"""Sets of images made corrupt, once, before training: what RAHFL's clients hold.

The corruptions are those of `jaxmethods.images.corrupt`, and JPEG, which needs a host codec.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from jaxmethods.data.files import data_dir
from jaxmethods.errors import InputError, hint
from jaxmethods.images import corrupt
from jaxmethods.images.corrupt import FrostTextures

# The order of CIFAR-10-C.
KINDS = (
  "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
  "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
  "jpeg_compression",
)  # fmt: skip

_JPEG_QUALITY = (80, 65, 58, 50, 40)
_TEXTURES_SHA256 = "d0eb01335e6324b0ecddfb2f75099b1f1eb5e953da2f9922feff93f26aa514ee"
_TEXTURES = tuple(f"frost{i}" for i in range(1, 6))  # of six, the published draw takes five (code)
_CHUNK = 64  # images a call: one program a kind, whatever the number of images


class Corrupted(NamedTuple):
  """A set of images, and what was done to each."""

  images: np.ndarray  # (N, side, side, 3) uint8
  kind: np.ndarray  # (N,) int, index into the kinds asked for; -1: left alone
  severity: np.ndarray  # (N,) int; 0: left alone


def corrupt_images(
  key: Array,
  images: np.ndarray,
  share: float,
  *,
  severities: Sequence[int] = (1, 2, 3, 4),
  kinds: Sequence[str] = KINDS,
) -> Corrupted:
  """Corrupts floor(share * N) images drawn at random, each by a kind and at a severity of its own.

  A larger share corrupts the same images in the same way, and more.

  Args:
    key: random key.
    images: (N, side, side, 3) uint8.
    share: xi, in [0, 1].
    severities: drawn from evenly; the published code never draws 5 (code).
    kinds: drawn from evenly. "frost" needs its textures, see `frost_textures`.

  Raises:
    InputError: for images, a share, kinds or severities that cannot be used, or textures that are
      missing or too small.
  """
  _check(images, share, severities, kinds)
  subset_key, kind_key, severity_key, image_key = jax.random.split(key, 4)
  count = len(images)
  chosen = np.zeros(count, bool)
  # 0.29 * 100 is 28.999...; a share of N that is whole is meant whole.
  order = np.asarray(jax.random.permutation(subset_key, count))
  chosen[order[: math.floor(share * count + 1e-9)]] = True
  kind = np.asarray(jax.random.randint(kind_key, (count,), 0, len(kinds)))
  severity = np.asarray(severities)[jax.random.randint(severity_key, (count,), 0, len(severities))]
  kind, severity = np.where(chosen, kind, -1), np.where(chosen, severity, 0)
  keys = jax.random.split(image_key, count)

  textures = None
  if "frost" in kinds and chosen.any():
    textures = frost_textures()
    side, smallest = images.shape[1], int(textures.sizes.min())
    if side >= smallest:
      raise InputError(f"images: frost needs a side below {smallest}, got {side}")

  out = images.copy()
  for i, name in enumerate(kinds):
    members = np.flatnonzero(kind == i)
    if name == "jpeg_compression":
      for member in members:
        out[member] = jpeg_compression(images[member], int(severity[member]))
      continue
    for start in range(0, len(members), _CHUNK):
      # A short last chunk is filled with its own images again.
      chunk = np.resize(members[start : start + _CHUNK], _CHUNK)
      out[chunk] = _corrupt(keys[chunk], images[chunk], severity[chunk], textures, kind=name)
  return Corrupted(out, kind, severity)


def jpeg_compression(image: np.ndarray, severity: int) -> np.ndarray:
  """Encoded and decoded: (height, width, 3) uint8."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY[severity - 1])
  return np.asarray(Image.open(file))


def frost_textures() -> FrostTextures:
  """The textures of "frost", from `frost_textures/frost_textures.npz` in the data folder.

  Raises:
    InputError: if the file is missing or is another one.
  """
  path = data_dir() / "frost_textures" / "frost_textures.npz"
  try:
    content = path.read_bytes()
  except OSError as error:
    raise InputError(
      f"frost: cannot read {path}: put the textures of hendrycks/robustness there, set "
      f"JAXMETHODS_DATA, or leave frost out of the kinds"
    ) from error
  if hashlib.sha256(content).hexdigest() != _TEXTURES_SHA256:
    raise InputError(f"frost: {path} is not the expected file, sha256 {_TEXTURES_SHA256}")
  with np.load(io.BytesIO(content)) as archive:
    pictures = [archive[name] for name in _TEXTURES]
  sizes = np.array([picture.shape[:2] for picture in pictures])
  pixels = np.zeros((len(pictures), *sizes.max(0), 3), np.uint8)
  for target, picture in zip(pixels, pictures, strict=True):
    target[: picture.shape[0], : picture.shape[1]] = picture
  return FrostTextures(jnp.asarray(pixels), jnp.asarray(sizes))


@functools.partial(jax.jit, static_argnames="kind")
def _corrupt(
  keys: Array, images: Array, severity: Array, textures: FrostTextures | None, *, kind: str
) -> Array:
  one = lambda key, image, s: corrupt.corrupt(key, kind, image, s, textures)
  return jax.vmap(one)(keys, images, severity)


def _check(
  images: np.ndarray, share: float, severities: Sequence[int], kinds: Sequence[str]
) -> None:
  square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
  if not square or images.dtype != np.uint8:
    raise InputError(
      f"images: expected square RGB images (N, side, side, 3) uint8, got {images.shape} {images.dtype}"
    )
  if not 0 <= share <= 1:
    raise InputError(f"share: expected 0 to 1, got {share}")
  valid = (*corrupt.FUNCTIONS, "jpeg_compression")
  for kind in kinds:
    if kind not in valid:
      raise InputError(f"kinds: unknown {kind!r}; {hint(kind, valid, 'kinds')}")
  for severity in severities:
    if severity not in range(1, len(_JPEG_QUALITY) + 1):
      raise InputError(f"severities: expected 1 to 5, got {severity}")
  if not len(kinds) or not len(severities):
    raise InputError("kinds and severities: at least one of each is needed")
