"""RAHFL's losses and AugMix's operations against vectors from the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.federated import partition
from jaxmethods.images import augment
from jaxmethods.methods import rahfl

TOLERANCE = {"float64": {"rtol": 1e-9, "atol": 1e-9}, "float32": {"rtol": 1e-5, "atol": 2e-6}}


@pytest.fixture(params=["float64", "float32"])
def golden(request, golden_file):
  """The file's arrays in one precision, and the tolerance that goes with it."""
  file = golden_file("rahfl")
  names = [n for n in file.files if not n.startswith(("blocks", "corrupt", "augment", "plasma"))]
  with jax.enable_x64(request.param == "float64"):
    arrays = {
      name: jnp.asarray(
        file[name].astype(request.param) if file[name].dtype.kind == "f" else file[name]
      )
      for name in names
    }
    yield arrays, TOLERANCE[request.param]


def test_supervised_contrast(golden):
  arrays, tolerance = golden
  views = arrays["supcon/features"].swapaxes(0, 1)
  loss = lambda z: rahfl.supervised_contrast(
    z, arrays["supcon/labels"], arrays["supcon/temperature"], arrays["supcon/base_temperature"]
  )
  value, gradient = jax.value_and_grad(loss)(views)
  np.testing.assert_allclose(value, arrays["supcon/loss"], **tolerance)
  np.testing.assert_allclose(gradient.swapaxes(0, 1), arrays["supcon/grad"], **tolerance)


@pytest.mark.parametrize("name", ["dcl", "dcl_relu"])
def test_diversity_contrast(golden, name):
  arrays, tolerance = golden
  views = [arrays[f"{name}/{view}"] for view in ("original", "weak", "strong")]
  labels = arrays[f"{name}/labels"]
  value, gradients = jax.value_and_grad(rahfl.diversity_contrast, (0, 1, 2))(*views, labels)
  np.testing.assert_allclose(value, arrays[f"{name}/loss"], **tolerance)
  for view, gradient in zip(("original", "weak", "strong"), gradients, strict=True):
    np.testing.assert_allclose(gradient, arrays[f"{name}/grad_{view}"], **tolerance)
  original, weak, strong = views
  contrast = rahfl.supervised_contrast(jnp.stack([original, weak]), labels)
  np.testing.assert_allclose(contrast, arrays[f"{name}/contrast_term"], **tolerance)
  for form, key in (("code", "ddm_term"), ("plain", "ddm_term_plain_softmax")):
    term = rahfl.distribution_matching(weak, strong, original, form=form)
    np.testing.assert_allclose(term, arrays[f"{name}/{key}"], **tolerance)


def test_jensen_shannon(golden):
  arrays, tolerance = golden
  views = [arrays[f"jsd/logits_{view}"] for view in ("clean", "aug1", "aug2")]
  labels = arrays["jsd/labels"]

  def loss(clean, first, second):
    consistency = rahfl.jensen_shannon(jnp.stack([clean, first, second]))
    ce = rahfl.cross_entropy(clean, labels)
    return ce + 12 * consistency, (ce, consistency)

  (value, (ce, consistency)), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*views)
  np.testing.assert_allclose(ce, arrays["jsd/ce"], **tolerance)
  np.testing.assert_allclose(consistency, arrays["jsd/jsd"], **tolerance)
  np.testing.assert_allclose(value, arrays["jsd/loss"], **tolerance)
  for view, gradient in zip(("clean", "aug1", "aug2"), gradients, strict=True):
    np.testing.assert_allclose(gradient, arrays[f"jsd/grad_{view}"], **tolerance)


def test_collaboration(golden):
  arrays, tolerance = golden
  logits, accuracy = arrays["hfl/logits"], arrays["hfl/accuracy"]
  allowed = rahfl.knowledge_transfer(accuracy)
  np.testing.assert_array_equal(allowed, arrays["hfl/knowledge_transfer_matrix"])
  everyone = ~jnp.eye(len(accuracy), dtype=bool)
  for name, matrix in (("symmetric", everyone), ("asymmetric", allowed)):
    weights = rahfl.transfer_weights(matrix)
    losses = rahfl.collaboration(logits, weights)
    np.testing.assert_allclose(losses, arrays[f"hfl/loss_{name}"], **tolerance)
    # Teachers receive nothing, so the gradient of the sum is that of each loss to its own client.
    gradient = jax.grad(lambda z, w=weights: rahfl.collaboration(z, w).sum())(logits)
    np.testing.assert_allclose(gradient, arrays[f"hfl/grad_{name}"], **tolerance)


def test_rivals(golden):
  arrays, tolerance = golden
  views = arrays["aughfl/logits_clean_aug1_aug2"]
  weights = rahfl.augmentation_weights(views)
  np.testing.assert_allclose(weights, arrays["aughfl/weights"], **tolerance)
  others = weights * ~jnp.eye(len(weights), dtype=bool)
  np.testing.assert_allclose(
    rahfl.collaboration(views[:, 0], others), arrays["aughfl/loss_intended"], **tolerance
  )
  np.testing.assert_allclose(
    rahfl.confidence_weights(
      arrays["rhfl/previous_mean_loss"], arrays["rhfl/current_mean_loss"], arrays["rhfl/beta"]
    ),
    arrays["rhfl/weights"],
    **tolerance,
  )
  loss = lambda z: rahfl.symmetric_cross_entropy(
    z, arrays["sce/labels"], arrays["sce/alpha"], arrays["sce/beta"]
  )
  value, gradient = jax.value_and_grad(loss)(arrays["sce/logits"])
  # The published one-hot targets are float32.
  np.testing.assert_allclose(value, arrays["sce/loss"], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(gradient, arrays["sce/grad"], rtol=1e-6, atol=2e-6)


def test_partition(golden_file):
  file = golden_file("rahfl")
  labels = file["partition/labels"]
  by_class = np.split(
    file["partition/shuffled_indices"], np.cumsum(file["partition/shuffled_sizes"])[:-1]
  )
  parts = partition.deal_below_even_share(labels, file["partition/proportions"], by_class)
  owner = np.full(len(labels), -1)
  for client, part in enumerate(parts):
    owner[part] = client
  np.testing.assert_array_equal(owner, file["partition/expected_client_of_sample"])


def test_fresh_adam(golden):
  """A step of a new Adam has the size of the learning rate whatever the gradient."""
  arrays, tolerance = golden
  optimizer = optax.adam(arrays["fresh_adam/lr"])
  param = arrays["fresh_adam/param"]
  updates, _ = optimizer.update(arrays["fresh_adam/grad"], optimizer.init(param))
  np.testing.assert_allclose(param + updates, arrays["fresh_adam/expected"], **tolerance)


# Published name -> function; the parameter is its argument, if it has one.
AUGMENT = {
  "autocontrast": lambda x, _: augment.autocontrast(x),
  "equalize": lambda x, _: augment.equalize(x),
  "posterize_bits": augment.posterize,
  "rotate_degrees": augment.rotate,
  "solarize_threshold": augment.solarize,
  "shear_x": augment.shear_x,
  "shear_y": augment.shear_y,
  "translate_x": augment.translate_x,
  "translate_y": augment.translate_y,
  "color": augment.color,
  "contrast": augment.contrast,
  "brightness": augment.brightness,
  "sharpness": augment.sharpness,
}


@pytest.mark.parametrize("name", AUGMENT)
def test_operations(golden_file, name):
  file = golden_file("rahfl")
  image = jnp.asarray(file["image"])
  expected = file[f"augment/{name}/expected"].astype(int)
  for parameter, wanted in zip(file[f"augment/{name}/parameter"], expected, strict=True):
    made = np.asarray(jax.jit(AUGMENT[name])(image, jnp.float32(parameter)))
    assert made.dtype == np.float32
    difference = np.abs(made - wanted)
    assert difference.max() <= (1 if name.startswith(("shear", "rotate")) else 0)


def test_mixing(golden_file):
  file = golden_file("rahfl")
  mixed = augment.mix(
    file["image"].astype(np.float32),
    file["augmix/chain_images"].astype(np.float32),
    file["augmix/chain_weights"].astype(np.float32),
    file["augmix/mix_weight"].astype(np.float32),
  )
  made = augment.normalise(mixed, file["augmix/mean"], file["augmix/std"])
  np.testing.assert_allclose(made, file["augmix/expected_normalised"], rtol=1e-5, atol=1e-5)
