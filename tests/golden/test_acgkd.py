"""Recorded vectors of GFKD's official functions, and of an independent float64 ACGKD."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods import acgkd
from jaxmethods.models import graph_classifier
from jaxmethods.models.graph_classifier import batch_norm_gap, from_published
from jaxmethods.models.graph_layers import GAT

TOLERANCE = {"float64": {"rtol": 1e-7, "atol": 1e-9}, "float32": {"rtol": 1e-4, "atol": 1e-5}}


class Case:
  """Reads the recorded problem in one precision."""

  def __init__(self, golden, dtype):
    self.golden, self.dtype = golden, dtype
    self.num_nodes, self.mask = golden["graphs/num_nodes"], golden["graphs/mask"]
    self.labels = golden["graphs/labels"]
    self.slots = self.mask.shape[1]

  def __getitem__(self, key):
    value = self.golden[key]
    return jnp.asarray(value, self.dtype if value.dtype.kind == "f" else value.dtype)

  def network(self, prefix):
    weights = {
      name.removeprefix(prefix): np.asarray(self.golden[name], self.dtype)
      for name in self.golden.files
      if name.startswith(prefix)
    }
    return from_published(weights)

  @functools.cache  # noqa: B019, computed once, outside of compiled functions
  def all_pairs(self, form, directed):
    """Lists every pair of each graph."""
    with jax.ensure_compile_time_eval():
      return self.pairs(form, directed)

  def pairs(self, form, directed, kept=None):
    """Lists every pair of each graph, or those of the (P, n, n) mask `kept`."""
    source, target, counts = [], [], []
    for i, n in enumerate(self.num_nodes):
      allowed = np.zeros((self.slots, self.slots), bool)
      allowed[:n, :n] = ~np.eye(n, dtype=bool) if directed else np.triu(np.ones((n, n), bool), 1)
      j, k = np.nonzero(allowed if kept is None else allowed & (kept[i] > 0))
      source, target, counts = [*source, j], [*target, k], [*counts, len(j)]
    pad = lambda ends: jnp.asarray(
      [np.pad(e, (0, max(counts) - len(e)), constant_values=self.slots - 1) for e in ends], "int32"
    )
    source, target = pad(source), pad(target)
    order = None
    if form == "edges":
      order = jax.vmap(functools.partial(acgkd.receiver_order, directed=directed))(source, target)
    return acgkd.Pairs(source, target, jnp.asarray(counts), order)

  def batch(self, adjacency, features, form, directed):
    pairs = self.all_pairs(form, directed)
    weights = adjacency[np.arange(len(adjacency))[:, None], pairs.source, pairs.target]
    return acgkd.assemble(pairs, weights, features, jnp.asarray(self.num_nodes), directed=directed)

  def close(self, actual, key):
    expected = self.golden[key]
    np.testing.assert_allclose(np.asarray(actual), expected, **TOLERANCE[self.dtype], err_msg=key)


@pytest.fixture(params=["float64", "float32"])
def case(request, golden_file):
  with jax.enable_x64(request.param == "float64"):
    yield Case(golden_file("acgkd"), request.param)


@pytest.fixture(params=["dense", "edges"])
def form(request):
  return request.param


def check_terms(case, name, form, directed, structure, theta):
  """Checks loss, parts and feature gradient of one structure; returns the gradient for theta."""
  encoder, teacher = case.network("teacher/")
  bn_weight, entropy_weight = case[f"{name}/bn_coef"], case[f"{name}/onehot_coef"]

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
  def loss(theta, phi):
    batch = case.batch(structure(theta), jax.nn.softmax(phi), form, directed)
    pooled, gap = batch_norm_gap(encoder, teacher.variables, batch)
    logits = teacher.head(pooled)
    ce = acgkd.cross_entropy(logits, case.labels)
    terms = acgkd.Terms(ce, gap, acgkd.feature_entropy(phi, case.mask))
    return terms.total(bn_weight, entropy_weight), (terms, pooled, logits)

  phi = case["graphs/feature_logits"]
  (total, (terms, pooled, logits)), (d_theta, d_phi) = loss(theta, phi)
  case.close(logits, f"{name}/logits")
  case.close(pooled, f"{name}/pooled")
  case.close(terms.cross_entropy.mean(), f"{name}/cross_entropy")
  case.close(terms.batch_norm, f"{name}/bn_term")
  case.close(terms.entropy, f"{name}/entropy_term")
  case.close(total, f"{name}/total")
  case.close(np.where(case.mask[..., None], d_phi, 0), f"{name}/grad_feature_logits")
  return d_theta


def test_gfkd_loss(case, form):
  hard = acgkd.harden(case["graphs/structure_logits"])
  both = case.mask[:, :, None] & case.mask[:, None]
  np.testing.assert_array_equal(np.where(both, hard, 0), case.golden["gfkd_loss/hard_adjacency"])
  d_theta = check_terms(
    case, "gfkd_loss", form, True, acgkd.harden, case["graphs/structure_logits"]
  )
  assert not d_theta.any()  # why GFKD needs an estimator


def test_acgkd_generation(case, form):
  log_odds, uniform = case["graphs/structure_logits"], case["concrete/uniform"]
  temperature = case["concrete/temperature"]
  sample = lambda theta: acgkd.concrete(theta, uniform, temperature)
  gradient = check_terms(case, "acgkd_gen", form, False, sample, log_odds)
  case.close(gradient, "acgkd_gen/grad_log_alpha")


def test_gfkd_structure_gradient(case, form):
  encoder, teacher = case.network("teacher/")
  features = jax.nn.softmax(case["graphs/feature_logits"])

  def loss(edges):
    batch = case.batch(edges, features, form, True)
    pooled, gap = batch_norm_gap(encoder, teacher.variables, batch)
    return acgkd.cross_entropy(teacher.head(pooled), case.labels), gap

  gradient = acgkd.antithetic_gradient(
    case["graphs/structure_logits"], case["gfkd_structure_grad/uniform_noise"], loss,
    case["gfkd_structure_grad/bn_coef"],
  )  # fmt: skip
  expected = case.golden["gfkd_structure_grad/expected"]
  gradient = np.where(expected == 0, 0, gradient)  # recorded as 0 outside the graphs
  case.close(gradient, "gfkd_structure_grad/expected")
  inside = case.mask[:, :, None] & case.mask[:, None]
  assert (expected != 0)[inside].all() and not expected[~inside].any()


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_concrete(case, noise):
  uniform, temperature = case["concrete/uniform"], case["concrete/temperature"]
  assert float(case.golden["concrete/eps"]) == acgkd.UNIFORM_MARGIN
  sample = lambda theta: acgkd.concrete(theta, uniform, temperature, noise)
  theta = case["graphs/structure_logits"]
  case.close(sample(theta), f"concrete/sample_{noise}")
  gradient = jax.grad(lambda theta: (sample(theta) * case["concrete/weight"]).sum())(theta)
  case.close(gradient, f"concrete/grad_{noise}")


def test_spatial_complexity(case, form):
  xi = float(case.golden["xi/value"])
  mask = np.zeros_like(case.golden["xi/candidate_mask"])
  for i, n in enumerate(case.num_nodes):
    kept = case.golden["xi/permutation"][i][: acgkd.candidate_count(int(n), xi)]
    upper = [ends[kept] for ends in np.triu_indices(n, 1)]
    mask[i][*upper] = mask[i][*upper[::-1]] = 1
  np.testing.assert_array_equal(mask, case.golden["xi/candidate_mask"])
  sizes = acgkd.candidate_count(jnp.asarray(case.num_nodes), xi)
  np.testing.assert_array_equal(sizes, mask.sum((1, 2)) / 2)

  pairs = case.pairs(form, False, mask)
  soft = acgkd.concrete(
    case["graphs/structure_logits"], case["concrete/uniform"], case["concrete/temperature"]
  )
  weights = soft[np.arange(len(soft))[:, None], pairs.source, pairs.target]
  features = jnp.zeros((*case.mask.shape, 1), case.dtype)
  batch = acgkd.assemble(pairs, weights, features, jnp.asarray(case.num_nodes))
  case.close(dense_adjacency(batch, case.slots), "xi/adjacency")


def dense_adjacency(batch, slots):
  if batch.senders is None:
    return batch.edges["weight"]
  graphs = len(batch.n_node)
  adjacency = np.zeros((graphs, slots, slots))
  senders, receivers = np.asarray(batch.senders), np.asarray(batch.receivers)
  np.add.at(
    adjacency, (senders // slots, senders % slots, receivers % slots), batch.edges["weight"]
  )
  return adjacency


def test_gin(case, form):
  encoder, network = case.network("gin/params/")
  adjacency, phi = case["gfkd_loss/hard_adjacency"], case["graphs/feature_logits"]
  assert encoder.kind == "gin"

  @jax.jit
  def logits(features):
    batch = case.batch(adjacency, features, form, True)
    return network.head(encoder.apply(network.variables, batch))

  case.close(logits(jax.nn.softmax(phi)), "gin/logits_self_loops")


def test_projector(case, form):
  head = graph_classifier.Head(
    case["teacher/linears_prediction.weight"].T, case["teacher/linears_prediction.bias"]
  )
  params = {
    "kernel": case["projector/weight"],
    "source": case["projector/att_src"][None],
    "target": case["projector/att_dst"][None],
    "bias": case["projector/bias"],
  }
  nodes = case["projector/student_nodes"]
  batch = case.batch(case["gfkd_loss/hard_adjacency"], nodes, form, True)
  layer = GAT(params["kernel"].shape[1])
  edges = batch.senders, batch.receivers, batch.edges["weight"]
  projected, seen = layer.apply(
    {"params": params}, batch.nodes["features"], *edges, mutable=["intermediates"]
  )
  projected = projected.reshape(*nodes.shape[:2], -1)
  real = case.mask[..., None]
  projected = jnp.where(real, projected, 0)
  case.close(projected, "projector/projected")
  case.close(projected.sum(1), "projector/pooled")
  case.close(head(projected.sum(1)), "projector/logits")
  if form == "dense":
    (attention,) = seen["intermediates"]["attention"]
    inside = real & real[:, :, 0][:, None]
    case.close(np.where(inside, attention[..., 0], 0), "projector/attention")


def test_distillation_loss(case):
  student, teacher = case["kd/student_logits"], case["kd/teacher_logits"]
  names = [name for name in case.golden.files if name.startswith("kd/loss_T")]
  assert names
  for name in names:
    loss = acgkd.distillation_loss(student, teacher, float(name.removeprefix("kd/loss_T")))
    case.close(loss, name)


def test_temperature(case):
  low, high = (float(case.golden[f"temperature/{name}"]) for name in ("tmin", "tmax"))

  def loss(rho, student):
    tau = acgkd.adversarial_temperature(rho, low, high)
    return acgkd.distillation_loss(student, case["kd/teacher_logits"], tau)

  rho = case["temperature/theta"]
  value, (d_rho, d_student) = jax.value_and_grad(loss, (0, 1))(rho, case["kd/student_logits"])
  case.close(acgkd.adversarial_temperature(rho, low, high), "temperature/T")
  case.close(value, "temperature/loss")
  case.close(d_rho, "temperature/grad_theta")
  case.close(d_student, "temperature/grad_student_logits")
  lr, weight = case.golden["temperature/lr"], case.golden["temperature/reversal"]
  case.close(acgkd.ascend(rho, d_rho, float(lr), float(weight)), "temperature/theta_after")
  total = float(case.golden["temperature/schedule_total"])
  schedule = acgkd.reversal(case["temperature/schedule_epoch"], total)
  case.close(schedule, "temperature/schedule_expected")
  tau = float(case.golden["temperature/T"])
  assert math.isclose(acgkd.inverse_temperature(tau, low, high), float(rho), rel_tol=1e-6)


def test_curriculum(case):
  pairs = case.pairs("dense", False)
  adjacency = case["acgkd_gen/adjacency"]
  weights = adjacency[np.arange(len(adjacency))[:, None], pairs.source, pairs.target]
  complexity = acgkd.edge_complexity(weights, pairs.mask)
  case.close(complexity, "curriculum/complexity")
  order = acgkd.easy_to_hard(complexity)
  np.testing.assert_array_equal(order, case.golden["curriculum/order"])
  epochs = case["curriculum/epoch"]
  sizes = acgkd.curriculum_size(
    epochs, len(order), float(case.golden["curriculum/p0"]), float(case.golden["curriculum/t_grow"])
  )
  np.testing.assert_array_equal(sizes, case.golden["curriculum/num_available"])
  for size, selected in zip(sizes, case.golden["curriculum/selected"], strict=True):
    np.testing.assert_array_equal(np.isin(np.arange(len(order)), order[:size]), selected)
