"""FedSSP against vectors recorded from the published model, client and server (float64)."""

import re

import chex
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
import pytest

from jaxmethods.graphs.packing import pack
from jaxmethods.graphs.spectral import laplacian_spectra, sine_encoding
from jaxmethods.methods import fedssp
from jaxmethods.models.spectral_gnn import SpectralGNN
from jaxmethods.trees import split

FORWARD = {"float64": {"rtol": 1e-6, "atol": 1e-7}, "float32": {"rtol": 2e-4, "atol": 2e-5}}

# Published module -> ours. Linear weights are (out, in) there and (in, out) here.
NAMES = [
  (r"base\.atom_encoder\.linear", "node_encoder"),
  (r"base\.eig_encoder_s\.eig_w", "eigenvalue_encoder"),
  (r"base\.mha_norm", "transformer/norm_1"),
  (r"base\.ffn_norm", "transformer/norm_2"),
  (r"base\.mha\.out_proj", "transformer/out"),
  (r"base\.ffn\.layer(\d)", r"transformer/ffn_\1"),
  (r"base\.decoder", "decoder"),
  (r"base\.filter_encoder_s\.0", "filter_encoder/linear_1"),
  (r"base\.filter_encoder_s\.1", "filter_encoder/norm_1"),
  (r"base\.filter_encoder_s\.3", "filter_encoder/linear_2"),
  (r"base\.filter_encoder_s\.4", "filter_encoder/norm_2"),
  (r"base\.convs\.(\d)\.pre_ffn\.0", r"conv_\1/message"),
  (r"base\.convs\.(\d)\.ffn\.0", r"conv_\1/linear_1"),
  (r"base\.convs\.(\d)\.ffn\.1", r"conv_\1/norm_1"),
  (r"base\.convs\.(\d)\.ffn\.3", r"conv_\1/linear_2"),
  (r"base\.convs\.(\d)\.ffn\.4", r"conv_\1/norm_2"),
  (r"head", "head"),
]


def ours(name: str, value: np.ndarray) -> dict[str, np.ndarray]:
  """Our path(s) and array(s) for one published parameter."""
  if name.startswith("base.mha.in_proj"):
    parts = np.split(value, 3)
    leaf = "kernel" if value.ndim == 2 else "bias"
    names = ("query", "key", "value")
    return {f"transformer/{n}/{leaf}": p.T for n, p in zip(names, parts, strict=True)}
  module, leaf = name.rsplit(".", 1)
  for pattern, replacement in NAMES:
    if re.fullmatch(pattern, module):
      module = re.sub(pattern, replacement, module)
      break
  else:
    raise KeyError(name)
  if module.split("/")[-1].startswith("norm"):
    leaf = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}[leaf]
    return {f"{module}/{leaf}": value}
  if leaf == "bias":
    return {f"{module}/bias": value}
  if module == "filter_encoder/linear_1":
    value = value[:, 1:]  # the identity base is zero on every edge: its column is not stored
  return {f"{module}/kernel": value.T}


def tree(flat: dict[str, np.ndarray], dtype) -> dict:
  nested: dict = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = jnp.asarray(value, dtype)
  return nested


def group(golden, prefix: str) -> dict[str, np.ndarray]:
  """All arrays below a prefix, under our names."""
  out: dict[str, np.ndarray] = {}
  for key in golden.files:
    if key.startswith(prefix):
      out |= ours(key.removeprefix(prefix), golden[key])
  return out


@pytest.fixture(params=["float64", "float32"])
def case(request, golden_file):
  """The recorded problem in our layout: golden arrays, model, variables, batch, slot maps."""
  golden = golden_file("fedssp")
  dtype = request.param
  with jax.enable_x64(dtype == "float64"):
    sizes = golden["data/num_nodes"]
    adjacency = golden["data/adj"]
    nodes, senders, receivers, n_edge, start = [], [], [], [], 0
    for a, x, n in zip(adjacency, golden["data/x"], sizes, strict=True):
      j, i = np.nonzero(a[:n, :n])
      nodes.append(x[:n])
      senders.append(j + start)
      receivers.append(i + start)
      n_edge.append(len(j))
      start += n
    graphs = jraph.GraphsTuple(
      nodes=np.concatenate(nodes), edges=None, globals=None, senders=np.concatenate(senders),
      receivers=np.concatenate(receivers), n_node=sizes, n_edge=np.array(n_edge),
    )  # fmt: skip
    flat = group(golden, "params/")
    stats = {k: v for k, v in flat.items() if k.endswith(("/mean", "/var"))}
    params = tree({k: v for k, v in flat.items() if k not in stats}, dtype)
    hidden = golden["params/head.weight"].shape[1]
    layers = len([p for p in params if p.startswith("conv_")])
    model = SpectralGNN(hidden, golden["params/base.decoder.bias"].size, layers, dropout=0.0)
    batch = pack(
      graphs, golden["data/y"], laplacian_spectra(graphs), [np.arange(len(sizes))], hidden,
      dtype=np.dtype(dtype),
    )  # fmt: skip
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    ids = np.asarray(batch.graphs.globals["id"])
    graph_slot = np.array([np.flatnonzero(ids == k)[0] for k in range(len(sizes))])
    slot_start = np.concatenate([[0], np.cumsum(batch.graphs.n_node)])[graph_slot]
    node_slot = np.concatenate([s + np.arange(n) for s, n in zip(slot_start, sizes, strict=True)])
    yield {
      "golden": golden, "dtype": dtype, "model": model, "params": params, "graphs": graphs,
      "stats": tree(stats, dtype), "batch": batch, "graph_slot": graph_slot,
      "node_slot": node_slot,
    }  # fmt: skip


def close(case, actual, key):
  np.testing.assert_allclose(
    np.asarray(actual), case["golden"][key], **FORWARD[case["dtype"]], err_msg=key
  )


def logits_of(params, representation):
  return representation @ params["head"]["kernel"] + params["head"]["bias"]


def test_spectrum(case):
  golden, graphs = case["golden"], case["graphs"]
  spectra = laplacian_spectra(graphs)
  start = square = 0
  for k, n in enumerate(golden["data/num_nodes"]):
    e = spectra.eigenvalues[start : start + n]
    u = spectra.eigenvectors[square : square + n * n].reshape(n, n)
    want_e, want_u = (
      golden["spectral/eigenvalues"][k, :n],
      golden["spectral/eigenvectors"][k, :n, :n],
    )
    np.testing.assert_allclose(e, want_e, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
      golden["spectral/official_eigenvalues_f32"][k, :n], e, atol=2e-4, rtol=0
    )
    # Vectors only through a function of the matrix: bases of an eigenspace may differ.
    heat = lambda e, u: u @ np.diag(np.exp(-e)) @ u.T
    np.testing.assert_allclose(heat(e, u), heat(want_e, want_u), rtol=1e-6, atol=1e-7)
    start, square = start + n, square + n * n


def rounding_of_eigenvalues(case) -> dict[str, float]:
  """How far float32 eigenvalues may move what is made of them: sines of 100 times an eigenvalue.

  The encoder is linear: a change of at most half a unit in the last place of an eigenvalue, times the
  slope of every sine. For what follows it, twice what rounding the eigenvalues themselves changes.
  """
  batch, model = case["batch"], case["model"]
  encoding = np.asarray(batch.encoding, np.float64)
  value = encoding[..., 0]
  frequency = 100 * np.exp(-np.arange(0, model.hidden, 2) * np.log(1e4) / model.hidden)
  slope = np.concatenate([[1], frequency, frequency])
  kernel = np.abs(case["params"]["eigenvalue_encoder"]["kernel"])
  encoded = np.abs(value).max() * 2.0**-24 * (slope @ kernel).max()

  rounded = sine_encoding(value.astype(np.float32).astype(np.float64), model.hidden)
  real = np.abs(encoding).sum(-1, keepdims=True) > 0
  moved = batch._replace(encoding=jnp.asarray(np.where(real, rounded, 0), batch.encoding.dtype))
  variables = {"params": case["params"], "batch_stats": case["stats"]}
  decoded = [
    model.apply(variables, b, capture_intermediates=True)[1]["intermediates"]["decoder"]["__call__"][0]
    for b in (batch, moved)
  ]  # fmt: skip
  return {
    "eigenvalue_encoder": encoded,
    "decoder": 2 * float(jnp.abs(decoded[1] - decoded[0]).max()),
  }


def test_forward_eval(case):
  golden, batch = case["golden"], case["batch"]
  variables = {"params": case["params"], "batch_stats": case["stats"]}
  rep, seen = case["model"].apply(variables, batch, capture_intermediates=True)
  seen = seen["intermediates"]
  out = lambda name: seen[name]["__call__"][0]
  slots = case["node_slot"]
  close(case, jax.nn.relu(out("node_encoder"))[slots], "forward_eval/atom_encoded")
  real = golden["data/mask"]
  tolerance, rounding = FORWARD[case["dtype"]], rounding_of_eigenvalues(case)
  for name, key in (("eigenvalue_encoder", "eig_encoded"), ("decoder", "decoder_out")):
    np.testing.assert_allclose(
      out(name)[slots], golden[f"forward_eval/{key}"][real], rtol=tolerance["rtol"],
      atol=tolerance["atol"] + rounding[name], err_msg=key,
    )  # fmt: skip
  where = {
    (int(j), int(i)): e
    for e, (j, i) in enumerate(zip(batch.graphs.senders, batch.graphs.receivers, strict=True))
    if batch.graphs.edges["mask"][e]
  }
  source, target = slots[golden["forward_eval/edge_src"]], slots[golden["forward_eval/edge_dst"]]
  edges = np.array([where[j, i] for j, i in zip(source, target, strict=True)])
  close(case, out("filter_encoder")[batch.twin[edges]], "forward_eval/filter_encoded")
  close(case, seen["edge_softmax"][0][edges], "forward_eval/edge_weights_after_softmax")
  for i in range(case["model"].layers):
    close(case, out(f"conv_{i}")[slots], f"forward_eval/conv{i}_out")
  close(case, rep[case["graph_slot"]], "forward_eval/pooled")
  close(case, rep[case["graph_slot"]], "forward_eval/representation")
  close(case, logits_of(case["params"], rep)[case["graph_slot"]], "forward_eval/logits")


@pytest.mark.parametrize("name", ["loss_round1", "loss_later"])
def test_loss_and_gradients(case, name):
  golden, batch, later = case["golden"], case["batch"], name == "loss_later"
  dtype = case["dtype"]
  label, mask = batch.graphs.globals["label"], batch.graphs.globals["mask"]
  momentum = float(golden["loss_later/momentum"])
  tau = float(golden["loss_later/tau"])
  hidden = golden["params/head.weight"].shape[1]
  p = jnp.asarray(golden["loss_later/preference"] if later else np.zeros(hidden), dtype)

  def loss(params, p):
    variables = {"params": params, "batch_stats": case["stats"]}
    rep, _ = case["model"].apply(variables, batch, train=True, mutable=["batch_stats"])
    mean = fedssp.scaled_mean(rep, mask, momentum)
    logits = logits_of(params, rep + p)
    ce, pull = fedssp.cross_entropy(logits, label, mask), jnp.zeros(())
    if later:
      pull = fedssp.alignment(mean, jnp.asarray(golden["loss_later/global_consensus"], dtype))
    return ce + tau * pull, (rep, logits, mean, ce, pull)

  (value, aux), (grads, grad_p) = jax.value_and_grad(loss, (0, 1), has_aux=True)(case["params"], p)
  rep, logits, mean, ce, pull = aux
  close(case, value, f"{name}/loss")
  close(case, rep[case["graph_slot"]], f"{name}/representation")
  close(case, logits[case["graph_slot"]], f"{name}/logits")
  close(case, mean, f"{name}/current_mean")
  if later:
    close(case, ce, f"{name}/cross_entropy")
    close(case, pull, f"{name}/alignment_mse")
  want = {k.removeprefix(f"{name}/grad/"): golden[k] for k in golden.files if f"{name}/grad/" in k}
  preference = want.pop("preference", None)
  got = flatten(grads)
  checked = 0
  for key, value in want.items():
    for path, expected in ours(key, value).items():
      scale = np.abs(value).max()
      atol = 2e-5 * scale + 1e-7 if dtype == "float64" else 2e-3 * scale + 1e-5
      np.testing.assert_allclose(got[path], expected, rtol=0, atol=atol, err_msg=path)
      checked += 1
  assert checked >= len(want)
  if preference is not None:
    np.testing.assert_allclose(grad_p, preference, rtol=1e-5, atol=1e-6)


def flatten(tree_, prefix=""):
  if not isinstance(tree_, dict):
    return {prefix[:-1]: tree_}
  return {k: v for name, sub in tree_.items() for k, v in flatten(sub, f"{prefix}{name}/").items()}


def test_adamw_with_fresh_moments(golden_file):
  golden = golden_file("fedssp")
  optimizer = optax.adamw(1e-3, weight_decay=5e-4)
  prefix = "adamw_fresh_step/"
  names = [
    k.removeprefix(prefix + "before/") for k in golden.files if k.startswith(prefix + "before")
  ]
  assert names
  with jax.enable_x64(True):
    for name in names:
      before, grad, after = (
        jnp.asarray(golden[f"{prefix}{part}/{name}"]) for part in ("before", "grad", "after")
      )
      updates, _ = optimizer.update(grad, optimizer.init(before), before)
      np.testing.assert_allclose(before + updates, after, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
  ("mode", "key"), [("accumulate", "official_accumulating"), ("clear", "plain_sgd")]
)
def test_preference_optimizer(golden_file, mode, key):
  golden = golden_file("fedssp")
  with jax.enable_x64(True):
    step = fedssp.PreferenceOptimizer(float(golden["preference_sgd/lr"]), mode)
    grads = jnp.asarray(golden["preference_sgd/grads"])
    p = buffer = jnp.zeros(grads.shape[1])
    trace = []
    for grad in grads:
      p, buffer = step(p, grad, buffer)
      trace.append(p)
    recorded = golden[f"preference_sgd/{key}"]
    # The trace starts at the recorded p_0; only its steps are compared.
    np.testing.assert_allclose(jnp.stack(trace), recorded, rtol=1e-6, atol=1e-7)


def test_aggregation(golden_file):
  golden = golden_file("fedssp")
  clients = sorted({k.split("/")[2] for k in golden.files if k.startswith("aggregate/before/")})
  with jax.enable_x64(True):
    before = [tree(group(golden, f"aggregate/before/{c}/"), "float64") for c in clients]
    after = [tree(group(golden, f"aggregate/after/{c}/"), "float64") for c in clients]
    algorithm = fedssp.fedssp(None, None, None, None)
    state = fedssp.Server(
      split(before[0], fedssp.is_spectral_encoder)[0], jnp.zeros(3), jnp.asarray(1)
    )
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *before)
    uploads = fedssp.Upload(
      split(stacked, fedssp.is_spectral_encoder)[0], jnp.ones((len(clients), 3))
    )
    # Sizes must not matter: the mean is uniform.
    state = algorithm.server(state, uploads, jnp.arange(1.0, len(clients) + 1))
    for old, new in zip(before, after, strict=True):
      client = fedssp.Client(old, None, None, None, None)
      chex.assert_trees_all_close(algorithm.params(state, client), new, rtol=1e-6, atol=1e-7)
  for name in golden["aggregate/shared_parameter_names"]:
    if "running" not in name and "num_batches" not in name:
      paths = ours(str(name), np.zeros((16, 16)) if "weight" in name else np.zeros(16))
      assert all(map(fedssp.is_spectral_encoder, paths))
  for name in golden["aggregate/local_parameter_names"]:
    assert not any(part in str(name) for part in ("eig_encoder_s", "filter_encoder_s"))
