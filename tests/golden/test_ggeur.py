"""GGEUR against vectors from the published functions and from its equations (float64)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.federated import algorithms, corrections, guidance, partition
from jaxmethods.federated.engine import weighted_mean
from jaxmethods.methods import ggeur

TOLERANCE = {"float64": {"rtol": 1e-9, "atol": 1e-9}, "float32": {"rtol": 1e-5, "atol": 1e-5}}


@pytest.fixture(params=["float64", "float32"])
def golden(request, golden_file):
  """The file's arrays in one precision, and the tolerance that goes with it."""
  with jax.enable_x64(request.param == "float64"):
    arrays = {
      key: jnp.asarray(value.astype(request.param) if value.dtype.kind == "f" else value)
      for key, value in golden_file("ggeur").items()
    }
    yield arrays, TOLERANCE[request.param]


def client_moments(arrays):
  """Moments of every client from the features, stacked."""
  num_clients, num_classes = arrays["stats/counts"].shape
  parts = [
    ggeur.class_moments(
      arrays["stats/features"],
      arrays["stats/labels"],
      num_classes,
      arrays["stats/client"] == client,
    )
    for client in range(num_clients)
  ]
  return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def test_client_statistics(golden):
  arrays, tolerance = golden
  moments = client_moments(arrays)
  np.testing.assert_array_equal(moments.counts, arrays["stats/counts"])
  np.testing.assert_allclose(moments.mean, arrays["stats/means"], **tolerance)
  np.testing.assert_allclose(moments.covariance, arrays["stats/covariances"], **tolerance)


def test_aggregation(golden):
  arrays, tolerance = golden
  stacked = ggeur.Moments(*(arrays[f"stats/{k}"] for k in ("counts", "means", "covariances")))
  pooled = ggeur.aggregate(stacked)
  np.testing.assert_allclose(pooled.mean, arrays["stats/global_mean"], **tolerance)
  np.testing.assert_allclose(pooled.covariance, arrays["stats/global_covariance"], **tolerance)
  wrong = arrays["stats/pooled_covariance_unweighted_mean_only_wrong"]
  assert jnp.abs(pooled.covariance - wrong).max() > 100 * tolerance["atol"]
  shape = ggeur.geometric_shape(pooled.covariance)
  np.testing.assert_allclose(
    shape.eigenvalues, arrays["stats/global_eigenvalues_desc"], **tolerance
  )

  folded = jax.tree.map(lambda x: x[0], stacked)
  for client in range(1, stacked.counts.shape[0]):
    folded = ggeur.merge(folded, jax.tree.map(lambda x, k=client: x[k], stacked))
  np.testing.assert_array_equal(folded.counts, pooled.counts)
  np.testing.assert_allclose(folded.mean, pooled.mean, **tolerance)
  np.testing.assert_allclose(folded.covariance, pooled.covariance, **tolerance)


@pytest.mark.parametrize(
  ("scale", "expected", "implied"),
  [
    ("sqrt", "expected_code_sqrt_lambda", "implied_covariance_code"),
    ("lambda", "expected_paper_lambda", "implied_covariance_paper"),
  ],
)
def test_generated_embeddings(golden, scale, expected, implied):
  arrays, tolerance = golden
  values, vectors = arrays["sample/eigenvalues"], arrays["sample/eigenvectors_columns"]
  new = ggeur.perturb(arrays["sample/anchor"], arrays["sample/epsilon"], values, vectors, scale)
  np.testing.assert_allclose(new, arrays[f"sample/{expected}"], **tolerance)
  # Unit noise along every eigenvector gives the square root of the implied covariance.
  root = ggeur.perturb(jnp.zeros_like(vectors), jnp.eye(len(values)), values, vectors, scale)
  np.testing.assert_allclose(root.T @ root, arrays[f"sample/{implied}"], **tolerance)


@pytest.mark.parametrize(
  ("scaling", "expected"),
  [
    ("none", "expected_single_domain"),
    ("code", "expected_multi_domain_code_scaling"),
    ("intended", "expected_multi_domain_intended_scaling"),
  ],
)
def test_clipping_and_scaling(golden, scaling, expected):
  arrays, tolerance = golden
  shape = ggeur.geometric_shape(arrays["psd/input"][None], scaling)
  assert (jnp.diff(shape.eigenvalues[0]) <= 0).all()
  vectors = shape.eigenvectors[0]
  np.testing.assert_allclose(
    (vectors * shape.eigenvalues[0]) @ vectors.T, arrays[f"psd/{expected}"], **tolerance
  )


def test_guided_set(golden):
  arrays, _ = golden
  counts, total = arrays["guided_set/counts"], arrays["guided_set/class_total"]
  threshold = float(arrays["guided_set/threshold"])
  # The file gives the class size of the whole data set; the prefix is cut at a share of it.
  chosen = ggeur.guided_set(counts, threshold * total / counts.sum(0))
  np.testing.assert_array_equal(chosen, arrays["guided_set/expected_selected"])


def test_partitions(golden):
  arrays, _ = golden
  owner = partition.owner_by_proportions(
    *(arrays[f"partition/{name}"] for name in ("labels", "proportions", "shuffled_indices")),
    min_per_class=int(arrays["partition/min_per_class"]),
  )
  np.testing.assert_array_equal(owner, arrays["partition/expected_client_of_sample"])
  np.testing.assert_array_equal(
    partition.domain_label_counts(
      np.asarray(arrays["lds/dirichlet_client_by_class"]), np.asarray(arrays["lds/train_counts"])
    ),
    arrays["lds/expected_allocated"],
  )


def head(arrays, prefix="classifier"):
  names = {"classifier": ("weight_out_in", "bias"), "fedprox": ("global_weight", "global_bias")}
  weight, bias = (arrays[f"{prefix}/{name}"] for name in names[prefix])
  return {"head": {"kernel": weight.T, "bias": bias}}


@pytest.mark.parametrize("double_softmax", [False, True])
def test_classifier(golden, double_softmax):
  arrays, tolerance = golden
  x, y = arrays["classifier/x"], arrays["classifier/y"]

  def loss(params):
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return ggeur.cross_entropy(logits, y, jnp.ones(y.shape, bool), double_softmax)

  value, gradient = jax.value_and_grad(loss)(head(arrays))
  name = "classifier/" + ("double_softmax_code" if double_softmax else "cross_entropy")
  np.testing.assert_allclose(value, arrays[f"{name}/loss"], **tolerance)
  np.testing.assert_allclose(
    gradient["head"]["kernel"].T, arrays[f"{name}/grad_weight"], **tolerance
  )
  np.testing.assert_allclose(gradient["head"]["bias"], arrays[f"{name}/grad_bias"], **tolerance)


def test_fedprox(golden):
  arrays, tolerance = golden
  x, y, mu = arrays["classifier/x"], arrays["classifier/y"], float(arrays["fedprox/mu"])

  def loss(params):
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    ce = ggeur.cross_entropy(logits, y, jnp.ones(y.shape, bool))
    return ce + algorithms.proximal_term(params, head(arrays, "fedprox"), mu)

  value, gradient = jax.value_and_grad(loss)(head(arrays))
  np.testing.assert_allclose(value, arrays["fedprox/loss"], **tolerance)
  np.testing.assert_allclose(
    gradient["head"]["kernel"].T, arrays["fedprox/grad_weight"], **tolerance
  )


def test_moon(golden):
  arrays, tolerance = golden
  losses = guidance.model_contrast(
    arrays["moon/z"], arrays["moon/z_global"], arrays["moon/z_previous"],
    float(arrays["moon/temperature"]),
  )  # fmt: skip
  np.testing.assert_allclose(losses.mean(), arrays["moon/loss"], **tolerance)


def test_scaffold(golden):
  arrays, tolerance = golden
  g = {name: arrays[f"scaffold/{name}"] for name in (
    "global_params", "client_params_after", "client_controls", "global_control", "steps", "lr"
  )}  # fmt: skip
  controls = jax.vmap(corrections.scaffold_control, in_axes=(0, None, None, 0, None, None))(
    g["client_controls"], g["global_control"], g["global_params"], g["client_params_after"],
    g["steps"], g["lr"],
  )  # fmt: skip
  np.testing.assert_allclose(controls, arrays["scaffold/new_client_controls"], **tolerance)
  algorithm = corrections.scaffold(lambda *_: None, 0.1)
  uploads = corrections.ScaffoldUpload(g["client_params_after"], controls - g["client_controls"])
  weights = jnp.ones(len(controls), g["lr"].dtype)
  server = algorithm.server(
    corrections.Server(g["global_params"], g["global_control"]), uploads, weights
  )
  np.testing.assert_allclose(
    server.params, arrays["scaffold/new_global_params_server_lr1"], **tolerance
  )
  np.testing.assert_allclose(server.correction, arrays["scaffold/new_global_control"], **tolerance)


def test_fedavg(golden):
  arrays, tolerance = golden
  params, counts = arrays["fedavg/client_params"], arrays["fedavg/num_samples"]
  counts = counts.astype(params.dtype)
  np.testing.assert_allclose(
    weighted_mean(params, counts), arrays["fedavg/expected_weighted"], **tolerance
  )
  np.testing.assert_allclose(
    weighted_mean(params, (counts > 0).astype(params.dtype)),
    arrays["fedavg/expected_unweighted_code"],
    **tolerance,
  )
