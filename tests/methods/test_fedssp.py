"""FedSSP's equations on a small linear model, and its rounds on a real one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods import trees
from jaxmethods.experiments.fedssp import algorithms
from jaxmethods.experiments.fedssp.build import backbone_of, build, setup_of
from jaxmethods.experiments.fedssp.config import Config
from jaxmethods.federated import engine
from jaxmethods.methods import fedssp as method
from tests import tiny_graphs

WIDTH, CLASSES, TAU, MU = 4, 3, 3.0, 0.5
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NEAR = {"rtol": 1e-3, "atol": 1e-4}


# --- equations ------------------------------------------------------------------------------------


def problem(seed=0, graphs=6):
  """(representations, head, labels, mask, preference): the last two graphs are padding."""
  keys = jax.random.split(jax.random.key(seed), 4)
  head = {
    "kernel": jax.random.normal(keys[0], (WIDTH, CLASSES)),
    "bias": jax.random.normal(keys[1], (CLASSES,)),
  }
  representations = jax.random.normal(keys[2], (graphs, WIDTH))
  labels = jax.random.randint(keys[3], (graphs,), 0, CLASSES)
  return representations, head, labels, jnp.arange(graphs) < graphs - 2


def classify(params, representation):
  return representation @ params["head"]["kernel"] + params["head"]["bias"]


def test_cross_entropy_counts_real_graphs_only():
  representations, head, labels, mask = problem()
  logits = classify({"head": head}, representations)
  p = jax.nn.softmax(logits)[jnp.arange(4), labels[:4]]
  np.testing.assert_allclose(
    method.cross_entropy(logits, labels, mask), -jnp.log(p).mean(), rtol=1e-6
  )
  assert method.cross_entropy(logits, labels, jnp.zeros(6, bool)) == 0


def test_gradient_of_the_preference():
  """The gradient of CE is the mean over the graphs of (softmax - onehot) W^T."""
  representations, head, labels, mask = problem()
  p = jnp.linspace(-1, 1, WIDTH)

  def loss(p):
    return method.cross_entropy(classify({"head": head}, representations + p), labels, mask)

  probabilities = jax.nn.softmax(classify({"head": head}, representations + p))
  errors = (probabilities - jax.nn.one_hot(labels, CLASSES))[:4]
  np.testing.assert_allclose(jax.grad(loss)(p), (errors @ head["kernel"].T).mean(0), **CLOSE)


def test_gradient_of_the_alignment():
  """It is tau mu (m - G) / (H B) for every real graph, zero for padding, at m = G and for G itself."""
  representations, _, _, mask = problem()
  consensus = jnp.linspace(0, 1, WIDTH)

  def pull(representations, consensus):
    return TAU * method.alignment(method.scaled_mean(representations, mask, MU), consensus)

  mean = method.scaled_mean(representations, mask, MU)
  np.testing.assert_allclose(mean, MU * representations[:4].mean(0), rtol=1e-6)
  for_graphs, for_consensus = jax.grad(pull, (0, 1))(representations, consensus)
  expected = np.tile(TAU * MU * (mean - consensus) / (WIDTH * 4), (6, 1)) * mask[:, None]
  np.testing.assert_allclose(for_graphs, expected, **CLOSE)
  assert not for_consensus.any()
  assert pull(representations, mean) == 0
  assert not jax.grad(pull)(representations, mean).any()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: method.scaled_mean(jnp.ones((6, 4)), jnp.ones(5, bool), MU),
      r"^mask: expected shape \(G=6,\), got \(5,\)$",
    ),
    (
      lambda: method.scaled_mean(jnp.ones(4), jnp.ones(4, bool), MU),
      r"^representations: expected shape \(G, H\), got \(4,\)$",
    ),
    (
      lambda: method.alignment(jnp.ones(4), jnp.ones((4, 1))),
      r"^consensus: expected shape \(H=4,\), got \(4, 1\)$",
    ),
    (
      lambda: method.PREFERENCE_SGD(jnp.ones(4), jnp.ones(3), jnp.ones(4)),
      r"^gradient: expected shape \(H=4,\), got \(3,\)$",
    ),
    (
      lambda: toy().server(
        method.Server({}, jnp.ones(WIDTH), jnp.int32(0)), method.Upload({}, jnp.ones(WIDTH)),
        jnp.ones(2),
      ),
      r"^mean: expected shape \(clients=2, H\), got \(4,\)$",
    ),
  ],
)  # fmt: skip
def test_wrong_shapes_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# --- one client, against the specification step by step -------------------------------------------


def toy_extract(params, model_state, batch, key):
  del key
  h = jnp.tanh(batch["x"] @ params["filter_encoder"]["kernel"])
  return method.Output(h @ params["body"]["kernel"], {"seen": model_state["seen"] + 1})


def toy_target(batch):
  return batch["y"], batch["mask"]


def toy_params(seed=0):
  shapes = {"filter_encoder": (5, 6), "body": (6, WIDTH), "head": (WIDTH, CLASSES)}
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  params = {
    name: {"kernel": 0.5 * jax.random.normal(key, shape)}
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }
  params["head"]["bias"] = jnp.zeros(CLASSES)
  return params


def toy_data(seed=0, batches=3, graphs=6):
  keys = jax.random.split(jax.random.key(seed + 100), 2)
  return {
    "x": jax.random.normal(keys[0], (batches, graphs, 5)),
    "y": jax.random.randint(keys[1], (batches, graphs), 0, CLASSES),
    # The last batch is short, as last batches are.
    "mask": jnp.ones((batches, graphs), bool).at[-1, 2:].set(False),
  }


OPTIMIZER = optax.adamw(1e-2, weight_decay=5e-2)
PREFERENCE_LR = 0.1


def toy(**options):
  grad = options.pop("preference_grad", "clear")
  options = {
    "preference": method.PreferenceOptimizer(PREFERENCE_LR, grad),
    "tau": TAU,
    "momentum": MU,
    **options,
  }
  return method.fedssp(toy_extract, classify, toy_target, OPTIMIZER, **options)


def toy_client(params):
  zero = jnp.zeros(WIDTH)
  return method.Client(params, {"seen": jnp.int32(0)}, zero, zero, OPTIMIZER.init(params))


def reference(params, clients, rounds, *, reset, accumulate, ema, epochs):
  """The published algorithm written out: lists of clients, no scan, no masks."""
  params = [params(k) for k in range(len(clients))]
  p = [jnp.zeros(WIDTH)] * len(clients)
  summed = list(p)
  moments = [OPTIMIZER.init(w) for w in params]
  consensus = None
  for t in range(1, rounds + 1):
    means = []
    for k, batches in enumerate(clients):
      m = jnp.zeros(WIDTH)
      for x, y in batches * epochs:

        def loss(w, p, x=x, y=y, m=m, consensus=consensus):
          rep = jnp.tanh(x @ w["filter_encoder"]["kernel"]) @ w["body"]["kernel"]
          new = MU * rep.mean(0) + ((1 - MU) * m if ema else 0.0)
          logits = classify(w, rep if consensus is None else rep + p)
          value = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])
          if consensus is not None:
            value += TAU * jnp.mean(0.5 * (new - consensus) ** 2)
          return value, new

        (for_weights, for_p), m = jax.grad(loss, (0, 1), has_aux=True)(params[k], p[k])
        if reset:
          moments[k] = OPTIMIZER.init(params[k])
        updates, moments[k] = OPTIMIZER.update(for_weights, moments[k], params[k])
        params[k] = optax.apply_updates(params[k], updates)
        summed[k] = for_p + (summed[k] if accumulate else 0.0)
        p[k] = p[k] - PREFERENCE_LR * summed[k]
      means.append(m)
    consensus = jnp.mean(jnp.stack(means), 0)
    if t >= 2:
      shared = jnp.mean(jnp.stack([w["filter_encoder"]["kernel"] for w in params]), 0)
      params = [{**w, "filter_encoder": {"kernel": shared}} for w in params]
  return params, p, consensus


OPTIONS = {
  "default": {},
  "optimizer_reset": {"optimizer_reset": True},
  "accumulate": {"preference_grad": "accumulate"},
  "ema": {"mean_mode": "ema"},
  "two epochs": {"local_epochs": 2},
}


def stack(trees):
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rounds_are_the_published_ones(options):
  count = 3
  fed = toy(**options)
  data = stack([toy_data(k) for k in range(count)])
  clients = stack([toy_client(toy_params(k)) for k in range(count)])
  server = fed.init(toy_params(), jax.random.key(0))
  weights = jnp.array([1.0, 5.0, 2.0])  # sizes do not matter: the mean is uniform
  run = jax.jit(
    lambda s, c: engine.federated_round(fed, s, [c], [data], [weights], jax.random.key(0))
  )
  for _ in range(4):
    server, (clients,), _ = run(server, clients)
  batches = [
    [(d["x"][b][d["mask"][b]], d["y"][b][d["mask"][b]]) for b in range(3)]
    for d in map(toy_data, range(count))
  ]
  params, p, consensus = reference(
    toy_params,
    batches,
    4,
    reset="optimizer_reset" in options,
    accumulate="preference_grad" in options,
    ema="mean_mode" in options,
    epochs=options.get("local_epochs", 1),
  )
  close = {"rtol": 2e-3, "atol": 2e-4}  # Adam divides gradients by themselves: float noise grows
  np.testing.assert_allclose(server.consensus, consensus, **close)
  np.testing.assert_allclose(clients.preference, jnp.stack(p), **close)
  downloaded = [
    fed.params(server, jax.tree.map(lambda x, k=k: x[k], clients)) for k in range(count)
  ]
  chex.assert_trees_all_close(stack(downloaded), stack(params), **close)
  assert (clients.model_state["seen"] == 12 * options.get("local_epochs", 1)).all()


def test_options_differ():
  """The reference would not notice an option that both sides ignore."""
  data = toy_data()
  results = []
  for options in OPTIONS.values():
    fed = toy(**options)
    server, client = fed.init(toy_params(), jax.random.key(0)), toy_client(toy_params())
    for _ in range(2):
      client, upload, _ = fed.local(server, client, data, jax.random.key(0))
      server = fed.server(server, stack([upload]), jnp.ones(1))
    results.append(
      np.concatenate([client.preference, server.consensus, client.params["body"]["kernel"][0]])
    )
  for i, a in enumerate(results):
    for b in results[:i]:
      assert abs(a - b).max() > 1e-5


def test_without_tau_and_preference_the_loss_is_cross_entropy():
  fed = toy(tau=0.0, preference=None)
  server = method.Server({"filter_encoder": toy_params(7)["filter_encoder"]}, jnp.ones(WIDTH), 3)
  client, data = toy_client(toy_params()), toy_data(batches=1)
  params = fed.params(server, client)
  batch = jax.tree.map(lambda x: x[0], data)
  representation = toy_extract(params, client.model_state, batch, None).representation
  expected = method.cross_entropy(classify(params, representation), *toy_target(batch))
  _, _, metrics = fed.local(server, client, data, jax.random.key(0))
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_a_batch_of_padding_is_no_step():
  data = toy_data()
  fed = toy(preference_grad="accumulate", mean_mode="ema")
  server = fed.init(toy_params(), jax.random.key(0))._replace(round=jnp.int32(1))
  more = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:2])]), data)
  a, b = (fed.local(server, toy_client(toy_params()), d, jax.random.key(0)) for d in (data, more))
  chex.assert_trees_all_close(a, b, **CLOSE)
  nothing = jax.tree.map(jnp.zeros_like, data)
  start = toy_client(toy_params())
  client, upload, metrics = fed.local(server, start, nothing, jax.random.key(0))
  chex.assert_trees_all_equal(client, start)
  assert not upload.mean.any() and metrics["loss"] == 0


def test_averaging_identical_clients_changes_nothing():
  fed = toy()
  upload = method.Upload(trees.split(toy_params(), method.is_spectral_encoder)[0], jnp.ones(WIDTH))
  server = method.Server(upload.shared, upload.mean, jnp.int32(4))
  again = fed.server(server, stack([upload] * 5), jnp.arange(1.0, 6.0))
  chex.assert_trees_all_close(again, server._replace(round=jnp.int32(5)), rtol=1e-6)


def test_server_counts_those_who_took_part_once_each():
  fed = toy()
  uploads = stack([
    method.Upload({"filter_encoder": {"kernel": jnp.full((5, 6), v)}}, jnp.full(WIDTH, v))
    for v in (1.0, 2.0, 40.0)
  ])  # fmt: skip
  start = fed.init(toy_params(), jax.random.key(0))
  first = fed.server(start, uploads, jnp.array([9.0, 1.0, 0.0]))
  np.testing.assert_allclose(first.consensus, 1.5)
  chex.assert_trees_all_equal(first.shared, start.shared)  # not averaged in round 1
  second = fed.server(first, uploads, jnp.array([9.0, 1.0, 0.0]))
  np.testing.assert_allclose(second.shared["filter_encoder"]["kernel"], 1.5)
  # A round in which nobody took part leaves the server as it was.
  chex.assert_trees_all_equal(fed.server(second, uploads, jnp.zeros(3)), second)


# --- rounds of the real network -------------------------------------------------------------------


HIDDEN, HEADS = 8, 2


class Federation:
  """FedSSP's clients on the tiny TU sets: four of them in two groups of different widths.

  They train by plain SGD: Adam makes whole steps of the rounding errors of a gradient that is zero,
  such as that of a bias in front of a normalisation.
  """

  def __init__(self, **options):
    options = {"data": tiny_graphs.DATA, "clients_per_domain": 2, "batch_size": 8, **options}
    config = Config(hidden=HIDDEN, heads=HEADS, layers=1, **options)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(algorithms, "make_optimizer", lambda *settings: optax.sgd(0.02))
      self.experiment = build(config)
      self.algorithm = setup_of(config, backbone_of(config), 4).algorithm
    self.start = self.experiment.init(jax.random.key(0))
    batch = next(self.experiment.batches(0))
    self.groups = batch.train
    self.data, self.weights, self.ids = batch.train[0], batch.weights[0], jnp.arange(2)
    self._round = jax.jit(self._one, static_argnames="client_map")

  def _one(self, server, clients, data, weights, ids, key, client_map):
    server, (clients,), metrics = engine.federated_round(
      self.algorithm, server, [clients], [data], [weights], key, ids=[ids], client_map=client_map
    )
    return server, clients, metrics

  def round(self, server, clients, data=None, weights=None, ids=None, r=0, client_map=None):
    """One round of a single group."""
    data = self.data if data is None else data
    weights = self.weights if weights is None else weights
    ids = self.ids if ids is None else ids
    return self._round(server, clients, data, weights, ids, round_key(r), client_map)

  def rounds(self, count):
    """(server, clients) after each of `count` rounds, by the experiment's own step."""
    state, seen = self.start, []
    step = jax.jit(self.experiment.step)
    for r in range(count):
      state, _ = step(state, next(self.experiment.batches(r)))
      seen.append((state.server, state.clients))
    return seen


def round_key(r):
  return jax.random.fold_in(jax.random.key(9), r)


@pytest.fixture(scope="module")
def federation(tiny_graphs_here):
  return Federation()


@pytest.fixture(scope="module")
def three_rounds(federation):
  return federation.rounds(3)


def one_by_one(clients):
  return [
    jax.tree.map(lambda x, k=k: x[k], group)
    for group in clients
    for k in range(group.preference.shape[0])
  ]


def phi_and_rest(params):
  return trees.split(params, method.is_spectral_encoder)


def test_round_one_shares_the_consensus_alone(federation, three_rounds):
  server, clients = three_rounds[0]
  assert server.round == 1
  chex.assert_trees_all_equal(server.shared, federation.start.server.shared)
  used = [federation.algorithm.params(server, client) for client in one_by_one(clients)]
  for mine, client in zip(used, one_by_one(clients), strict=True):
    chex.assert_trees_all_equal(mine, client.params)
    assert not client.preference.any()
  kernels = [
    np.asarray(phi_and_rest(mine)[0]["filter_encoder"]["linear_2"]["kernel"]) for mine in used
  ]
  for i in range(4):
    for j in range(i):
      assert (kernels[i] != kernels[j]).all()
  assert abs(server.consensus).max() > 0


@pytest.mark.parametrize("t", [2, 3])
def test_later_rounds_download_the_same_encoders(federation, three_rounds, t):
  server, clients = three_rounds[t - 1]
  assert server.round == t
  clients = one_by_one(clients)
  for client in clients:
    shared, local = phi_and_rest(federation.algorithm.params(server, client))
    chex.assert_trees_all_equal(shared, server.shared)
    chex.assert_trees_all_equal(
      local, phi_and_rest(client.params)[1]
    )  # never changed by the server
    assert client.preference.any()
  mean = jax.tree.map(lambda *x: sum(x) / 4, *(phi_and_rest(c.params)[0] for c in clients))
  chex.assert_trees_all_close(server.shared, mean, **CLOSE)


def leaves(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def upload_of(federation):
  client, data = (
    jax.tree.map(lambda x: x[0], tree) for tree in (federation.start.clients[0], federation.data)
  )
  _, upload, _ = jax.eval_shape(
    federation.algorithm.local, federation.start.server, client, data, jax.random.key(0)
  )
  return upload


def test_upload_is_the_encoders_and_one_vector(federation):
  upload = upload_of(federation)
  assert upload.mean.shape == (HIDDEN,)
  h, m = HIDDEN, HEADS
  assert {name: leaf.shape for name, leaf in leaves(upload.shared).items()} == {
    "['eigenvalue_encoder']['kernel']": (h + 1, h),
    "['eigenvalue_encoder']['bias']": (h,),
    # (M + 1, H) in the publication, but the filter of the identity base is zero on every edge.
    "['filter_encoder']['linear_1']['kernel']": (m, h),
    "['filter_encoder']['linear_1']['bias']": (h,),
    "['filter_encoder']['linear_2']['kernel']": (h, h),
    "['filter_encoder']['linear_2']['bias']": (h,),
    **{f"['filter_encoder']['norm_{i}']['{n}']": (h,) for i in (1, 2) for n in ("scale", "bias")},
  }
  numbers = h * (h + 1) + h + m * h + h + h * h + h + 4 * h + h
  assert sum(leaf.size for leaf in jax.tree.leaves(upload)) == numbers
  traffic = engine.traffic(
    federation.algorithm, federation.start.server, federation.start.clients, federation.groups
  )
  assert traffic.up.tolist() == [4 * numbers] * 4
  assert traffic.down.tolist() == [4 * numbers + 4] * 4  # and the number of the round


def test_the_server_sees_no_state_of_a_client(federation, three_rounds):
  """Whatever a client keeps for itself may change without changing what it sends."""
  server, clients = three_rounds[1]
  client, data = one_by_one(clients)[0], jax.tree.map(lambda x: x[0], federation.data)
  local = jax.jit(federation.algorithm.local)
  _, upload, _ = local(server, client, data, jax.random.key(0))
  other = client._replace(model_state=jax.tree.map(lambda x: x + 7, client.model_state))
  _, same, _ = local(server, other, data, jax.random.key(0))
  chex.assert_trees_all_equal(upload, same)  # training uses the statistics of the batch


# What follows needs no second group: two clients of one set, and what comes out of their round.


@pytest.fixture(scope="module")
def pair(tiny_graphs_here):
  return Federation(data="tu:RINGS")


@pytest.fixture(scope="module")
def second_round(pair):
  """(server, clients) before round 3, and what that round gives."""
  server, (clients,) = pair.rounds(2)[-1]
  return server, clients, pair.round(server, clients)


def test_order_of_clients_does_not_matter(pair, second_round):
  server, clients, expected = second_round
  flip = lambda tree: jax.tree.map(lambda x: x[::-1], tree)
  got, *rest = pair.round(
    server, flip(clients), flip(pair.data), flip(pair.weights), flip(pair.ids)
  )
  chex.assert_trees_all_close((got, *flip(rest)), tuple(expected), **NEAR)


def test_padding_clients_do_not_matter(pair, second_round):
  server, clients, expected = second_round
  twice = lambda tree: jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)
  weights = jnp.concatenate([pair.weights, jnp.zeros(2)])
  got, *rest = pair.round(server, twice(clients), twice(pair.data), weights, twice(pair.ids))
  half = jax.tree.map(lambda x: x[:2], rest)
  chex.assert_trees_all_close((got, *half), tuple(expected), **NEAR)


def test_padding_batches_do_not_matter(pair, second_round):
  server, clients, expected = second_round
  longer = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1), pair.data)
  chex.assert_trees_all_close(pair.round(server, clients, longer), expected, **NEAR)


def test_client_maps_agree(pair, second_round):
  server, clients, _ = second_round
  a, b = (pair.round(server, clients, client_map=how) for how in ("scan", "vmap"))
  chex.assert_trees_all_close(a, b, **NEAR)


def test_one_client_is_its_own_federation(pair):
  """K = 1: local training with G = its own mean feature."""
  one = lambda tree: jax.tree.map(lambda x: x[:1], tree)
  clients, data, weights, ids = map(one, (pair.start.clients[0], pair.data, pair.weights, pair.ids))
  server = message = pair.start.server
  alone, alone_data = jax.tree.map(lambda x: x[0], (clients, data))
  local = jax.jit(pair.algorithm.local)
  for r in range(3):
    server, clients, _ = pair.round(server, clients, data, weights, ids, r)
    key = jax.random.fold_in(round_key(r), 0)
    alone, upload, _ = local(message, alone, alone_data, key)
    message = method.Server(phi_and_rest(alone.params)[0], upload.mean, jnp.int32(r + 1))
  chex.assert_trees_all_close(server.consensus, message.consensus, **NEAR)
  chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], clients.params), alone.params, **NEAR)


def test_gsks_holds_the_preference_at_zero(tiny_graphs_here):
  for _, clients in Federation(algorithm="gsks", data="tu:RINGS").rounds(3):
    assert not any(client.preference.any() for client in one_by_one(clients))


def test_pgpa_shares_nothing(tiny_graphs_here):
  federation = Federation(algorithm="pgpa", data="tu:RINGS")
  assert upload_of(federation).shared == {}
  server, clients = federation.rounds(3)[-1]
  for client in one_by_one(clients):
    assert client.preference.any()
    chex.assert_trees_all_equal(federation.algorithm.params(server, client), client.params)


def test_share_extractor_keeps_input_layer_and_head(tiny_graphs_here):
  federation = Federation(algorithm="share_extractor", data="tu:RINGS")
  every = set(leaves(federation.start.clients[0].params))
  own = {name for name in every if name.startswith(("['node_encoder']", "['head']"))}
  assert len(own) == 4
  assert set(leaves(upload_of(federation).shared)) == every - own


def test_the_preference_under_adam_takes_steps_of_its_rate():
  step = method.PreferenceOptimizer(0.01, "adam")
  p, gradient = jnp.zeros(3), jnp.array([1e-4, -1e-6, 2.0])
  buffer = step.init(p)
  assert buffer.shape == (3, 3)
  for count in (1, 2):
    p, buffer = step(p, gradient, buffer)
    np.testing.assert_allclose(p, -0.01 * count * jnp.array([1, -0.99, 1]), rtol=0.02)
  expected, state = optax.adam(0.01), None
  q = jnp.zeros(3)
  state = expected.init(q)
  for _ in range(2):
    updates, state = expected.update(gradient, state)
    q = optax.apply_updates(q, updates)
  np.testing.assert_allclose(p, q, rtol=1e-5)
  with pytest.raises(ValueError, match="buffer"):
    step(p, gradient, jnp.zeros(3))
