"""The corruptions against vectors from the published functions, fed with their random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.data import corruptions
from jaxmethods.data.files import data_dir
from jaxmethods.images import corrupt


def inputs(file, kind, severity):
  """The recorded random inputs of a kind, as its function takes them."""
  given = lambda name: file[f"corrupt/inputs/{name}"]
  match kind:
    case "gaussian_noise" | "speckle_noise":
      return (given("normal"),)
    case "shot_noise":
      return (given(f"shot_counts_s{severity}"),)
    case "impulse_noise":
      return given("flip_uniform"), given("salt_uniform")
    case "glass_blur":
      # Recorded in the order of the visits, from the last pixel back.
      inner = file["image"].shape[0] - 2
      visits = given("glass_offsets")[: 2 * inner**2].reshape(2, inner, inner, 2)
      return (visits[:, ::-1, ::-1],)
    case "motion_blur":
      return (given("motion_angle").astype(np.float32),)
    case "snow":
      return given("snow_normal"), given("snow_angle").astype(np.float32)
    case "frost":
      which, row, column = given(f"frost_index_x_y_s{severity}")
      side = file["image"].shape[0]
      pixels = corruptions.frost_textures().pixels[which]
      return (pixels[row : row + side, column : column + side],)
    case "fog":
      return (given(f"fog_map_s{severity}"),)
    case "elastic_transform":
      return given("elastic_points"), given("elastic_dx"), given("elastic_dy")
  return ()


@pytest.mark.parametrize("kind", corrupt.FUNCTIONS)
def test_kinds(golden_file, kind):
  if kind == "frost" and not (data_dir() / "frost_textures").is_dir():
    pytest.skip("frost needs $JAXMETHODS_DATA/frost_textures")
  file = golden_file("rahfl")
  apply = jax.jit(corrupt.FUNCTIONS[kind])
  for severity in file["corrupt/severities"]:
    made = np.asarray(apply(file["image"], severity, *inputs(file, kind, severity)))
    assert made.dtype == np.uint8
    expected = file[f"corrupt/{kind}/s{severity}"].astype(int)
    assert np.abs(made - expected).max() <= 1, severity


def test_jpeg(golden_file):
  file = golden_file("rahfl")
  for severity in file["corrupt/severities"]:
    made = corruptions.jpeg_compression(file["image"], int(severity))
    expected = file[f"corrupt/jpeg_compression/s{severity}"].astype(int)
    assert np.abs(made - expected).max() <= 3, severity


def test_plasma(golden_file):
  file = golden_file("rahfl")
  decay = float(file["plasma/wibble_decay"])
  # Recorded as U(-roughness, roughness), three sets a level.
  sizes = file["plasma/draw_shapes"].prod(1)
  roughness = 100 / decay ** np.repeat(np.arange(len(sizes)) // 3, sizes)
  with jax.enable_x64(True):
    made = jax.jit(corrupt.plasma)(
      jnp.asarray(file["plasma/uniform_draws_flat"] / roughness), decay
    )
  np.testing.assert_allclose(made, file["plasma/expected"], rtol=1e-9, atol=1e-9)
