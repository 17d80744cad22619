"""Federated training of a linear head on embeddings: data, GGEUR and the algorithms put together.

The heavy half of `experiments.ggeur`. The partition, the exchange of moments and the generation happen
in `init`, so every seed draws its own; what is drawn is part of the state and of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from jaxmethods.data import records as data_records
from jaxmethods.data import sources, splits
from jaxmethods.errors import InputError
from jaxmethods.federated import algorithms, corrections, engine, guidance, partition
from jaxmethods.federated.algorithm import FederatedAlgorithm
from jaxmethods.federated.batching import shuffled
from jaxmethods.methods import ggeur as method
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.federated_images import encoder

if TYPE_CHECKING:
  from jaxmethods.experiments.ggeur.config import Config


class Pool(NamedTuple):
  """Examples of several domains, padded to the largest.

  Attributes:
    x: embeddings, (D, n, d).
    y: labels, (D, n) int32; -1 where there is none.
  """

  x: Any
  y: Any


class Data(NamedTuple):
  """What an experiment reads.

  Attributes:
    domains: names.
    num_classes: C.
    train: what clients may hold.
    test: real examples of every domain.
    about: first line of the report.
  """

  domains: list[str]
  num_classes: int
  train: Pool
  test: Pool
  about: str


class State(NamedTuple):
  """Everything a checkpoint needs; `data`, `weights` and `own` are fixed once drawn.

  Attributes:
    server: of the algorithm.
    clients: of the algorithm, stacked.
    data: "x" (K, n, d), "y", "mask" (K, n); with generation, class by class, own embeddings first.
    weights: (K,) examples.
    own: (K, C) own examples of every class, before anything was generated.
    key: of the rounds.
    round: rounds completed.
  """

  server: Any
  clients: Any
  data: dict[str, jax.Array]
  weights: jax.Array
  own: jax.Array
  key: jax.Array
  round: jax.Array


# --- data ---------------------------------------------------------------------------------------


def load(config: Config) -> Data:
  """Reads the domains, embeds images, splits off the tests, scales.

  Raises:
    InputError: data that are missing, domains that disagree, a class that no client could have.
  """
  domains, sets = sources.load_domains(config.data)
  ranks = {x.ndim for x, _ in domains.values()}
  if not ranks <= {2} and not ranks <= {4}:
    raise InputError(f"{config.data}: expected feature vectors or images in every domain")
  num_classes = max(data.num_classes for data in sets)
  about = data_records.describe(sets)
  test, train = {}, {}
  for name, (x, y) in domains.items():
    fit, held_out = splits.stratified_split(
      y, (1 - config.test_share, config.test_share), seed=config.split_seed
    )
    test[name], train[name] = (x[held_out], y[held_out]), (x[fit], y[fit])
  if ranks == {4}:
    train, test = _embedded(train, test, num_classes, config)
    about += f"; embedded by a convnet trained on {config.encoder_share:.0%} of it, set aside"
  missing = set(range(num_classes)) - set(np.concatenate([y for _, y in train.values()]).tolist())
  if missing:
    raise InputError(f"{config.data}: no client can have class {min(missing)}: no training example")
  if config.norm:
    everything = np.concatenate([x for x, _ in train.values()])
    scale = config.norm / np.sqrt((everything**2).sum(1).mean())
    train, test = ({k: (x * scale, y) for k, (x, y) in part.items()} for part in (train, test))
  return Data(list(domains), num_classes, _pool(train), _pool(test), about)


def _embedded(train, test, num_classes: int, config: Config):
  """Both parts embedded; the encoder's share of the training part is left out of it."""
  small = lambda x: encoder.resized(x, config.image_size)
  fit_x, fit_y, rest = [], [], {}
  for name, (x, y) in train.items():
    share = config.encoder_share
    aside, kept = splits.stratified_split(y, (share, 1 - share), seed=config.split_seed + 1)
    fit_x.append(small(x[aside]))
    fit_y.append(y[aside])
    rest[name] = small(x[kept]), y[kept]
  channels = {x.shape[-1] for x in fit_x}
  if len(channels) > 1:
    raise InputError(f"{config.data}: domains with {sorted(channels)} channels")
  parts = [*rest.values(), *((small(x), y) for x, y in test.values())]
  fit = np.concatenate(fit_x), np.concatenate(fit_y)
  everything = np.concatenate([x for x, _ in parts])
  embedded = encoder.embed(everything, fit, num_classes, config.encoder_epochs)
  pieces = np.split(embedded, np.cumsum([len(x) for x, _ in parts])[:-1])
  pairs = [(x, y) for x, (_, y) in zip(pieces, parts, strict=True)]
  return dict(zip(rest, pairs, strict=False)), dict(zip(test, pairs[len(rest) :], strict=True))


def _pool(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> Pool:
  longest = max(len(y) for _, y in parts.values())
  pad = lambda x, value: np.pad(
    x, [(0, longest - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=value
  )
  x = np.stack([pad(x, 0) for x, _ in parts.values()])
  y = np.stack([pad(y, -1) for _, y in parts.values()])
  return Pool(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))


# --- clients ------------------------------------------------------------------------------------


def draw_domain_clients(key, pool: Pool, config: Config, num_classes: int):
  """One client per domain; class c of domain g keeps int(P[g, c] n) examples, P[:, c] ~ Dir(alpha).

  Returns:
    x (K, n, d), y (K, n), mask (K, n).
  """
  num_domains = pool.y.shape[0]
  share_key, order_key = jax.random.split(key)
  counts = jax.nn.one_hot(pool.y, num_classes, dtype=jnp.int32).sum(1)  # (K, C)
  kept = counts
  if config.alpha:
    alphas = jnp.full(num_domains, config.alpha)
    shares = jax.random.dirichlet(share_key, alphas, (num_classes,)).T
    kept = jnp.minimum(
      jnp.maximum(partition.domain_label_counts(shares, counts), config.min_per_class), counts
    )
  rank = jax.vmap(_class_rank)(jax.random.split(order_key, num_domains), pool.y)
  limit = jnp.take_along_axis(kept, jnp.maximum(pool.y, 0), 1)
  return pool.x, pool.y, (pool.y >= 0) & (rank < limit)


def draw_label_clients(key, pool: Pool, config: Config, num_classes: int):
  """Label skew over the pooled data: a floor per class, the rest cut by P[c] ~ Dir(alpha).

  Returns:
    x (K, n, d), y (K, n), mask (K, n).
  """
  x, y = pool.x.reshape(-1, pool.x.shape[-1]), pool.y.reshape(-1)
  share_key, order_key = jax.random.split(key)
  even = jnp.full((num_classes, config.clients), 1 / config.clients)
  alphas = jnp.full(config.clients, config.alpha)
  shares = jax.random.dirichlet(share_key, alphas, (num_classes,)) if config.alpha else even
  order = jax.random.permutation(order_key, y.shape[0])
  parts = partition.deal_by_proportions(
    np.asarray(y), np.asarray(shares), np.asarray(order), min_per_class=config.min_per_class
  )
  mask = np.zeros((config.clients, y.shape[0]), bool)
  for client, part in enumerate(parts):
    mask[client, part] = True
  repeat = lambda a: jnp.broadcast_to(a, (config.clients, *a.shape))
  return repeat(x), repeat(y), jnp.asarray(mask)


def _class_rank(key, y):
  """Position of every example in a random order of its class, (n,)."""
  order = jax.random.permutation(key, y.shape[0])
  by_class = order[jnp.argsort(y[order], stable=True)]
  sorted_y = y[by_class]
  start = jnp.searchsorted(sorted_y, sorted_y, side="left")
  return jnp.zeros_like(y).at[by_class].set(jnp.arange(y.shape[0]) - start)


def exchange(key, x, y, mask, config: Config, num_classes: int):
  """The one exchange of GGEUR: what clients report, and what the server makes of it.

  Returns:
    The reported moments, stacked over clients, and the geometric shape.
  """
  moments = jax.vmap(method.class_moments, in_axes=(0, 0, None, 0))(x, y, num_classes, mask)
  report = lambda key, m: method.share(
    m, min_count=config.min_count_to_share, noise=config.moment_noise, key=key
  )
  reported = jax.vmap(report)(jax.random.split(key, x.shape[0]), moments)
  if config.skew == "labels":
    chosen = method.guided_set(reported.counts, config.guided_threshold)
    reported = method.select(reported, chosen)
  pooled = method.aggregate(reported)
  shape = method.geometric_shape(pooled.covariance, config.top_scaling)
  width = shape.eigenvalues.shape[-1]
  if config.geometry == "isotropic":  # the same trace without directions
    level = shape.eigenvalues.mean(-1, keepdims=True)
    identity = jnp.broadcast_to(jnp.eye(width), shape.eigenvectors.shape)
    shape = method.Shape(jnp.broadcast_to(level, shape.eigenvalues.shape), identity)
  elif config.geometry == "none":
    shape = shape._replace(eigenvalues=jnp.zeros_like(shape.eigenvalues))
  return reported, shape


def make_generator(config: Config, data: Data):
  """The exchange and the generation as one function, compiled once for all seeds.

  Returns:
    (key, x (K, n, d), y (K, n), mask (K, n)) -> the enlarged x (K, C R, d), y, mask.
  """
  num_classes = data.num_classes
  holdings = np.asarray(data.train.y)
  holdings = holdings.reshape(1, -1) if config.skew == "labels" else holdings
  largest = max(np.bincount(y[y >= 0]).max() for y in holdings)  # class of a client, at most
  options: dict[str, Any] = {
    "target": config.target,
    "rows": max(config.target, int(largest)),
    "scale": config.scale,
  }

  def generate(key, x, y, mask):
    exchange_key, own_key = jax.random.split(key)
    reported, shape = exchange(exchange_key, x, y, mask, config, num_classes)
    num_clients = x.shape[0]

    def one(args):
      key, index, x, y, mask = args
      if config.skew == "labels":
        return method.enlarge(key, x, y, mask, shape, **options)
      others = (jnp.arange(num_clients) != index)[:, None] & (reported.counts > 0)
      if config.enlarge == "own":
        others = jnp.zeros_like(others)
      return method.enlarge_across_domains(
        key, x, y, mask, shape, reported.mean, others,
        own_samples=config.own_samples, own_per_anchor=config.own_per_anchor,
        prototype_samples=config.prototype_samples, **options,
      )  # fmt: skip

    keys = jax.random.split(own_key, num_clients)
    result = jax.lax.map(one, (keys, jnp.arange(num_clients), x, y, mask))
    flat = lambda a: a.reshape(num_clients, -1, *a.shape[3:])
    labels = jnp.broadcast_to(jnp.arange(num_classes)[:, None], result.mask.shape)
    return flat(result.x), flat(labels), flat(result.mask)

  return compiler.jit(generate)


def repeated(x, y, mask, config: Config, num_classes: int):
  """Own examples over and over, as many as a client has after generation: as many steps, nothing new.

  Returns:
    x (K, C R, d), y, mask.
  """
  own = np.asarray((jax.nn.one_hot(y, num_classes, dtype=jnp.int32) * mask[..., None]).sum(1))
  filled = np.full_like(own, config.target)
  if config.skew == "labels":  # a class that a client lacks stays empty, a large one stays large
    filled = np.where(own > 0, np.maximum(own, config.target), 0)
  total = filled.sum(1)
  place = np.arange(total.max())
  order = np.argsort(~np.asarray(mask), axis=1, kind="stable")
  source = np.take_along_axis(order, place % own.sum(1, keepdims=True), 1)
  take = jax.vmap(lambda a, rows: a[rows])
  return take(x, source), take(y, source), jnp.asarray(place < total[:, None])


# --- algorithms ---------------------------------------------------------------------------------


def logits_of(params, batch):
  """Linear head: (B, d) -> (B, C)."""
  return batch["x"] @ params["head"]["kernel"] + params["head"]["bias"]


def make_algorithm(config: Config) -> tuple[FederatedAlgorithm, Any]:
  """The algorithm and the function that makes a client from its parameters."""

  def loss(params, model_state, batch, key):
    del key
    value = method.cross_entropy(
      logits_of(params, batch), batch["y"], batch["mask"], config.double_softmax
    )
    return value, (model_state, {})

  adam = optax.adam(config.learning_rate)
  local: dict[str, Any] = {
    "local_epochs": config.local_epochs,
    "batches": shuffled(config.batch_size),
  }
  average = {"weighted": config.weighted, **local}
  start = algorithms.init_client
  guided = lambda params: algorithms.init_client(params, keep_previous=True)
  match config.algorithm:
    case "fedavg" | "centralised":
      return algorithms.fedavg(loss, adam, **average), start
    case "fedprox":
      return algorithms.fedprox(loss, adam, config.fedprox_mu, **average), start
    case "fedadam":
      return algorithms.fedadam(loss, adam, config.server_rate, **average), start
    case "local":
      algorithm = algorithms.local_only(loss, adam, **average)
      return algorithm, lambda params: start(params, shared=lambda path: False, optimizer=adam)
    case "moon":
      options = config.moon_mu, config.moon_temperature
      return guidance.moon(loss, adam, logits_of, *options, **average), guided
    case "fedntd":
      options = config.fedntd_temperature, config.fedntd_beta
      return guidance.fedntd(loss, adam, logits_of, *options, **average), guided
    case "scaffold":
      return corrections.scaffold(loss, config.sgd_rate, **local), corrections.init_client
    case "feddyn":
      return corrections.feddyn(loss, adam, config.feddyn_alpha, **local), corrections.init_client
  raise ValueError(config.algorithm)


# --- the experiment -----------------------------------------------------------------------------


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Raises:
    InputError: data that are missing or cannot be used.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  data = load(config)
  width = data.train.x.shape[-1]
  algorithm, make_client = make_algorithm(config)
  generate = make_generator(config, data)
  draw = draw_label_clients if config.skew == "labels" else draw_domain_clients

  def init(key) -> State:
    partition_key, enlarge_key, algorithm_key, round_key = jax.random.split(key, 4)
    x, y, mask = draw(partition_key, data.train, config, data.num_classes)
    _check_clients(mask, data, config)
    own = (jax.nn.one_hot(y, data.num_classes, dtype=jnp.int32) * mask[..., None]).sum(1)
    if config.enlarge == "repeat":
      x, y, mask = repeated(x, y, mask, config, data.num_classes)
    elif config.enlarge != "none":
      x, y, mask = generate(enlarge_key, x, y, mask)
    if config.algorithm == "centralised":
      x, y, mask = (a.reshape(1, -1, *a.shape[2:]) for a in (x, y, mask))
    num_clients = x.shape[0]
    head = {"kernel": jnp.zeros((width, data.num_classes)), "bias": jnp.zeros(data.num_classes)}
    client = make_client({"head": head})
    clients = jax.tree.map(lambda a: jnp.broadcast_to(a, (num_clients, *a.shape)), client)
    held = {"x": x, "y": jnp.maximum(y, 0), "mask": mask}
    weights = mask.sum(1).astype(jnp.float32)
    server = algorithm.init({"head": head}, algorithm_key)
    return State(server, clients, held, weights, own, round_key, jnp.zeros((), jnp.int32))

  def batches(step: int) -> Iterator[tuple]:
    del step  # the order of examples follows from the state's key and round
    while True:
      yield ()

  def step(state: State, batch):
    del batch
    server, (clients,), metrics = engine.federated_round(
      algorithm, state.server, (state.clients,), (state.data,), (state.weights,),
      jax.random.fold_in(state.key, state.round),
      client_map="shard" if mesh else None, mesh=mesh, drop_nonfinite=True,
    )  # fmt: skip
    means = {
      name: value.sum() if name.startswith("bytes") or name == "rejected" else value.mean()
      for name, value in metrics.items()
    }
    return state._replace(server=server, clients=clients, round=state.round + 1), means

  def evaluate(state: State, test: Pool):
    size = state.weights.shape[0]
    params = engine.client_params(algorithm, state.server, (state.clients,), (size,))[0]

    def accuracy(params):
      logits = logits_of(params, {"x": test.x})
      right = (logits.argmax(-1) == test.y).sum(-1)
      return right / (test.y >= 0).sum(-1)

    # A method with one global head has the same one at every client.
    per_domain = jax.vmap(accuracy)(params).mean(0)
    return {
      "test_accuracy": per_domain.mean(),
      "spread": per_domain.std(),  # over domains, as published
      **{f"test_accuracy/{name}": per_domain[i] for i, name in enumerate(data.domains)},
    }

  def figures(state: State):
    metrics = jax.device_get(compiler.jit(evaluate)(state, data.test))
    accuracy = [float(metrics[f"test_accuracy/{name}"]) for name in data.domains]
    pictures = {"accuracy": _bars(data.domains, accuracy)}
    own = np.asarray(jax.device_get(state.own))
    names = data.domains if config.skew == "domains" else [f"client {k}" for k in range(len(own))]
    pictures["own_examples"] = _counts(own, names)
    if config.enlarge in ("own", "full") and config.algorithm != "centralised":
      pictures["generated_embeddings"] = _generated(state, data, names)
    return pictures

  return Experiment(init, batches, step, evaluate, data.test, figures, config.steps, data.about)


def _check_clients(mask, data: Data, config: Config) -> None:
  sizes = np.asarray(jax.device_get(mask.sum(1)))
  if (empty := np.flatnonzero(sizes == 0)).size:
    k = int(empty[0])
    name = f" ({data.domains[k]})" if config.skew == "domains" else ""
    raise InputError(f"client {k}{name} is empty: raise alpha or min_per_class")


def _bars(names: list[str], values: list[float]) -> Figure:
  figure, axes = plt.subplots(figsize=(6, 1.2 + 0.4 * len(names)), layout="constrained")
  axes.barh(names, values, height=0.6, color="#1f6f8b")
  for row, value in enumerate(values):
    axes.text(value + 0.01, row, f"{value:.3f}", va="center", fontsize=9)
  axes.set(xlim=(0, 1.1), xlabel=f"test accuracy of the head (mean {np.mean(values):.3f})")
  axes.invert_yaxis()
  axes.spines[["top", "right"]].set_visible(False)
  return figure


def _counts(counts: np.ndarray, names: list[str]) -> Figure:
  """How many examples of each class every client holds."""
  figure, axes = plt.subplots(figsize=(7, 1.2 + 0.4 * len(counts)), layout="constrained")
  axes.imshow(np.sqrt(counts), aspect="auto", cmap="Blues")
  for (client, label), count in np.ndenumerate(counts):
    dark = count > 0.4 * counts.max()
    axes.text(
      label, client, count, ha="center", va="center", fontsize=8, color="white" if dark else "black"
    )
  axes.set_yticks(range(len(names)), names)
  axes.set(xlabel="class", title="own examples")
  axes.spines[:].set_visible(False)
  return figure


def _generated(state: State, data: Data, names: list[str], panels: int = 4) -> Figure:
  """Own, generated and unseen test embeddings of one class, in its two main directions.

  The class is the one that the clients share out most unevenly; clients are the first `panels`.
  """
  own, held = jax.device_get((state.own, state.data))
  label = int((own.max(0) - own.min(0)).argmax())
  unseen = np.asarray(data.test.x)[np.asarray(data.test.y) == label]
  centre = unseen.mean(0)
  directions = np.linalg.svd(unseen - centre, full_matrices=False)[2][:2].T
  shown = min(panels, len(own))
  figure, axes = plt.subplots(
    1,
    shown,
    figsize=(3 * shown, 3.2),
    sharex=True,
    sharey=True,
    squeeze=False,
    layout="constrained",
  )
  for client, axis in enumerate(axes.flat):
    mine = held["x"][client][(held["y"][client] == label) & held["mask"][client]]
    count = own[client, label]
    for points, name, style in (
      (unseen, "test, all domains", {"color": "0.8", "s": 8}),
      (mine[count:], "generated", {"color": "#edae49", "s": 10, "alpha": 0.7}),
      (mine[:count], "own", {"color": "#1f6f8b", "s": 16}),
    ):
      flat = (points - centre) @ directions
      axis.scatter(flat[:, 0], flat[:, 1], label=name, linewidths=0, **style)
    axis.set(title=f"{names[client]}: {count} own", xticks=[], yticks=[])
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  figure.suptitle(f"embeddings of class {label}, two main directions", fontsize=10)
  return figure
