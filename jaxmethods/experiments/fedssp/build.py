"""Federated graph classification: clients, backbones and algorithms put together.

The heavy half of `experiments.fedssp`: nothing here is imported before a run really starts.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax
from flax import linen as nn

from jaxmethods import trees
from jaxmethods.data import records as data_records
from jaxmethods.data import sources
from jaxmethods.errors import InputError
from jaxmethods.experiments.fedssp import clients as graph_clients
from jaxmethods.experiments.fedssp import figures as graph_figures
from jaxmethods.experiments.fedssp.clients import TEST, VALIDATION, Clients
from jaxmethods.federated import algorithms, engine, gcfl
from jaxmethods.federated.algorithm import FederatedAlgorithm
from jaxmethods.federated.batching import Batches
from jaxmethods.graphs.packing import SpectralBatch
from jaxmethods.methods import fedssp as method
from jaxmethods.models.fedstar import FedStarBackbone
from jaxmethods.models.gin import GINBackbone
from jaxmethods.models.init import draw_variables, torch_linear
from jaxmethods.models.spectral_gnn import SpectralGNN
from jaxmethods.runtime import compiler
from jaxmethods.runtime.experiment import Experiment

if TYPE_CHECKING:
  from jaxmethods.experiments.fedssp.config import Config


class Backbone(NamedTuple):
  """A network that classifies graphs.

  Attributes:
    view: the part of a packed batch that it reads (the rest never reaches the device).
    init: (key, shapes of a batch, classes) -> (params, model state).
    features: (params, model state, batch, key or None) -> (representations, model state); a key
      means training.
    classify: (params, representations) -> logits (G, C).
    decoded: (params, model state, batch) -> the decoder's new spectra (N, M); None without a decoder.
  """

  view: Callable[[SpectralBatch], Any]
  init: Callable[[jax.Array, Any, int], tuple[Any, Any]]
  features: Callable[[Any, Any, Any, jax.Array | None], tuple[jax.Array, Any]]
  classify: Callable[[Any, jax.Array], jax.Array]
  decoded: Callable[[Any, Any, Any], jax.Array] | None = None


# --- backbones ------------------------------------------------------------------------------------


def make_backbone(config: Config) -> Backbone:
  """The network named by `config.backbone`."""
  if config.backbone == "spectral":
    return _spectral_backbone(
      SpectralGNN(config.hidden, config.heads, config.layers, config.dropout)
    )
  network = GINBackbone if config.backbone == "gin" else FedStarBackbone
  return _gin_backbone(
    lambda classes: network(classes, config.hidden, config.layers, config.dropout)
  )


def _spectral_backbone(model: SpectralGNN) -> Backbone:
  """FedSSP's network with a linear head."""

  def init(key, batch, classes):
    body, kernel_key, bias_key = jax.random.split(key, 3)
    variables = dict(draw_variables(model.init, body, batch))
    linear = torch_linear(model.hidden)
    head = {
      "kernel": linear["kernel_init"](kernel_key, (model.hidden, classes)),
      "bias": linear["bias_init"](bias_key, (classes,)),
    }
    return variables.pop("params") | {"head": head}, variables

  def features(params, model_state, batch, key):
    return _apply(model, params, model_state, batch, key)

  def classify(params, representation):
    return representation @ params["head"]["kernel"] + params["head"]["bias"]

  def decoded(params, model_state, batch):
    variables = {"params": params, **model_state}
    _, seen = model.apply(
      variables, batch, capture_intermediates=lambda module, _: module.name == "decoder"
    )
    return seen["intermediates"]["decoder"]["__call__"][0]

  return Backbone(lambda batch: batch, init, features, classify, decoded)


def _gin_backbone(model: Callable[[int], nn.Module]) -> Backbone:
  """A network that ends in its own head: its features are the logits."""

  def init(key, batch, classes):
    variables = dict(draw_variables(model(classes).init, key, batch))
    return variables.pop("params"), variables

  def features(params, model_state, batch, key):
    classes = params["head"]["bias"].shape[-1]
    return _apply(model(classes), params, model_state, batch, key)

  return Backbone(lambda batch: batch.graphs, init, features, lambda params, logits: logits)


def _apply(model: nn.Module, params, model_state, batch, key):
  variables = {"params": params, **model_state}
  if key is None:
    return model.apply(variables, batch), model_state
  collections = list(model_state)
  return model.apply(variables, batch, train=True, rngs={"dropout": key}, mutable=collections)


def _graphs(batch) -> jraph.GraphsTuple:
  return batch.graphs if isinstance(batch, SpectralBatch) else batch


def _target(batch) -> tuple[jax.Array, jax.Array]:
  about = _graphs(batch).globals
  return about["label"], about["mask"]


# --- algorithms -----------------------------------------------------------------------------------


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """The clients' optimiser, with PyTorch's two meanings of weight decay.

  Flat: one vector in place of some sixty arrays is a third less program to lower.
  """
  if config.optimizer == "adamw":
    return optax.flatten(optax.adamw(config.learning_rate, weight_decay=config.weight_decay))
  return optax.flatten(
    optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(config.learning_rate))
  )


# Input and output layers have the widths of a client's own data, so they never leave it.
OWN_LAYERS = ("node_encoder", "embed", "head")


def is_extractor(path: str) -> bool:
  """Everything but the input layer and the head."""
  return not set(OWN_LAYERS) & set(path.split("/"))


def is_convolution(path: str) -> bool:
  """The graph convolutions of GIN (what FedAvg and GCFL share in the published comparison)."""
  return path.startswith("conv_")


def is_structure(path: str) -> bool:
  """FedStar's structure branch."""
  return path.startswith("structure")


# FedSSP and its ablations: settings of one algorithm.
FEDSSP: dict[str, dict[str, Any]] = {
  "fedssp": {},
  "gsks": {"preference": None, "tau": 0.0},
  "pgpa": {"shared": trees.nothing},
  "share_extractor": {"shared": is_extractor},
}


class Setup(NamedTuple):
  """An algorithm and how its clients begin.

  Attributes:
    algorithm: the federated algorithm.
    client: (params, model state) -> the client's first state.
    offset: client state -> what is added to a representation when predicting, (H,) or 0.
  """

  algorithm: FederatedAlgorithm
  client: Callable[[Any, Any], Any]
  offset: Callable[[Any], Any]


def make_algorithm(config: Config, backbone: Backbone, num_clients: int) -> Setup:
  """The algorithm named by `config.algorithm` on a backbone."""
  optimizer = make_optimizer(config)
  if config.algorithm in FEDSSP:
    return _make_fedssp(config, backbone, optimizer)

  def loss(params, model_state, batch, key):
    representation, model_state = backbone.features(params, model_state, batch, key)
    labels, mask = _target(batch)
    value = method.cross_entropy(backbone.classify(params, representation), labels, mask)
    return value, (model_state, {})

  shared = is_extractor if config.backbone == "spectral" else is_convolution
  shared = {"fedper": is_extractor, "local": trees.nothing, "fedstar": is_structure}.get(
    config.algorithm, shared
  )
  options: dict[str, Any] = dict(
    shared=shared, local_epochs=config.local_epochs, keep_optimizer=True
  )
  if config.algorithm == "gcfl":
    algorithm = gcfl.gcfl(
      loss, optimizer, num_clients, mean_bound=config.gcfl_mean_bound,
      max_bound=config.gcfl_max_bound, first_rounds=config.gcfl_first_rounds, **options,
    )  # fmt: skip
  else:
    proximal = config.proximal if config.algorithm == "fedprox" else 0.0
    algorithm = algorithms.fedavg(loss, optimizer, proximal=proximal, **options)

  def start(params, model_state):
    return algorithms.init_client(params, model_state, shared=shared, optimizer=optimizer)

  return Setup(algorithm, start, lambda client: 0.0)


def _make_fedssp(config: Config, backbone: Backbone, optimizer) -> Setup:
  preference = method.PreferenceOptimizer(config.preference_lr, config.preference_grad)

  def extract(params, model_state, batch, key):
    return method.Output(*backbone.features(params, model_state, batch, key))

  algorithm = method.fedssp(
    extract,
    backbone.classify,
    _target,
    optimizer,
    **{
      "tau": config.tau, "momentum": config.mu, "preference": preference,
      "mean_mode": config.mean_mode, "optimizer_reset": config.optimizer_reset,
      "local_epochs": config.local_epochs, **FEDSSP[config.algorithm],
    },
  )  # fmt: skip

  def start(params, model_state):
    zero = jnp.zeros(params["head"]["kernel"].shape[0])
    return method.Client(params, model_state, zero, zero, optimizer.init(params))

  # Until the first consensus is known the preference is zero, so adding it is always right.
  use = config.eval_preference
  return Setup(algorithm, start, lambda client: client.preference if use else 0.0)


# --- the experiment -------------------------------------------------------------------------------


class State(NamedTuple):
  """Everything a checkpoint needs."""

  server: Any
  clients: tuple[Any, ...]
  key: jax.Array
  round: jax.Array


def _prebatched(view) -> Batches:
  """Batches for the standard algorithms; one without a real graph is no step."""
  return Batches(view, _target(view)[1].any(-1))


class Federation(NamedTuple):
  """What stays on the device for the whole run; one entry per group of clients."""

  train: tuple[Any, ...]
  weights: tuple[jax.Array, ...]


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Args:
    config: of `experiments.fedssp`.
    mesh: with an axis "clients" the clients of each group are spread over it.

  Raises:
    InputError: data that are missing or cannot be used, or a client that cannot be trained.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  records = sources.load_graphs(config.data)
  shares = [graph_clients.share_out(data, config) for data in records]
  backbone = make_backbone(config)
  everywhere = jax.NamedSharding(mesh, jax.P()) if mesh else None
  # One group after the other straight to the device: the host keeps no second copy.
  groups = [
    _to_device(graph_clients.pack_clients(shares, members, config, backbone.view), everywhere)
    for members in graph_clients.similar_sets(shares, config.padding_slack)
  ]
  names = [name for share in shares for name in share.names]
  firsts = [share.names[0] for share in shares]
  majority = [share.majority for share in shares for _ in share.names]
  # Clients are known by their number in the data sets' order, whatever group they are in.
  ids = tuple(group.ids for group in groups)
  positions = np.argsort(np.concatenate(ids))
  setup = make_algorithm(config, backbone, len(names))
  client_map: engine.ClientMap | None = "shard" if mesh else None
  if not mesh and config.client_map != "auto":
    client_map = config.client_map

  views = tuple(group.train for group in groups)
  federation = Federation(
    views if config.algorithm in FEDSSP else tuple(map(_prebatched, views)),
    tuple(group.counts for group in groups),
  )
  held_out = tuple(group.held_out for group in groups)

  def init(key):
    model_key, round_key = jax.random.split(key)
    first, clients = None, []
    for group in groups:
      members = []
      for number, width in zip(group.ids.tolist(), group.widths, strict=True):
        model = _init_model(backbone, jax.random.fold_in(model_key, number), group, width)
        members.append(setup.client(*model))
        first = model[0] if number == 0 else first
      # On the host: jnp would compile a program for every shape.
      clients.append(jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves)), *members))
    server = setup.algorithm.init(first, round_key)
    return State(server, tuple(clients), round_key, jnp.zeros((), jnp.int32))

  def batches(step: int) -> Iterator[Federation]:
    del step  # which clients take part is drawn from the state's key and round
    while True:
      yield federation

  def draw(key, round_) -> tuple[jax.Array, jax.Array | None]:
    """The key of a round, and who takes part in it (None: all)."""
    work_key, cohort_key = jax.random.split(jax.random.fold_in(key, round_))
    if config.participation == 1:
      return work_key, None
    drawn = max(1, round(config.participation * len(names)))
    taking_part = engine.sample_participants(cohort_key, len(names), drawn)
    return work_key, taking_part[np.concatenate(ids)]

  def report(metrics, taking_part) -> dict[str, jax.Array]:
    share = jnp.ones(len(names)) if taking_part is None else taking_part.astype(jnp.float32)
    sums = {name: value @ share for name, value in metrics.items()}
    # Bytes are those of the whole round, everything else is a mean over its clients.
    return {
      name: total if name.startswith("bytes") else total / share.sum()
      for name, total in sums.items()
    }

  def accuracies(counts) -> OrderedDict[str, jax.Array]:
    # nan where a client has no validation graphs
    validation, test = jnp.concatenate([hits / totals for hits, totals in counts])[positions].T
    return OrderedDict(
      {"test_accuracy": test.mean(), "validation_accuracy": jnp.nanmean(validation)},
      **{f"test_accuracy/{name}": test[i] for i, name in enumerate(names)},
    )

  def count_hits(server, index, client, view):
    """Right and all answers of one client on (validation, test), (2,) each."""
    params = setup.algorithm.params(setup.algorithm.download(server, index), client)

    def score(batch):
      representation, _ = backbone.features(params, client.model_state, batch, None)
      logits = backbone.classify(params, representation + setup.offset(client))
      about = _graphs(batch).globals
      part = about["split"][:, None] == jnp.array([VALIDATION, TEST])
      right = logits.argmax(-1) == about["label"]
      return (part & right[:, None]).sum(0), part.sum(0)

    def one(batch):
      # In a conditional, as in training, for what `fedssp` of `methods.fedssp` says about it.
      nothing = jnp.zeros(2, jnp.int32)
      return jax.lax.cond(_target(batch)[1].any(), score, lambda _: (nothing, nothing), batch)

    hits, totals = jax.lax.map(one, view)
    return hits.sum(0), totals.sum(0)

  def compose(run_round: Callable, count_all: Callable, jit: Callable) -> tuple[Callable, Callable]:
    """(step, evaluate) around what all clients do; `jit` is for the parts that stand beside it."""
    begin, end, summary = jit(draw), jit(report), jit(accuracies)
    index = jnp.split(jnp.arange(len(names)), np.cumsum([len(group) for group in ids])[:-1])

    def step(state: State, batch: Federation):
      key, taking_part = begin(state.key, state.round)
      server, clients, metrics = run_round(
        state.server, state.clients, batch.train, batch.weights, key,
        taking_part=taking_part, ids=ids,
      )  # fmt: skip
      state = State(server, clients, state.key, state.round + 1)
      return state, end(metrics, taking_part)

    def evaluate(state: State, test) -> OrderedDict[str, jax.Array]:
      return summary(count_all(state.server, list(zip(index, state.clients, test, strict=True))))

    return step, evaluate

  run_round, count_all = engine.federated_round, engine.map_clients
  if mesh:
    run_round, count_all = _apart(groups)
  count_map: engine.ClientMap = "shard" if mesh else "scan"
  counting = [count_hits] * (len(shares) if mesh else len(groups))
  step, evaluate = compose(
    functools.partial(run_round, setup.algorithm, client_map=client_map, mesh=mesh),
    functools.partial(count_all, counting, client_map=count_map, mesh=mesh),
    jit=lambda part: part,
  )
  programs = None
  if not mesh and len(groups) > 1:
    programs = compose(
      engine.round_programs(
        [setup.algorithm] * len(groups), jit=compiler.jit, client_map=client_map
      ),
      engine.map_programs(counting, jit=compiler.jit, client_map=count_map),
      jit=compiler.jit,
    )

  def figures(state: State):
    evaluate_now = programs[1] if programs else compiler.jit(evaluate)
    metrics = jax.device_get(evaluate_now(state, held_out))
    accuracy = {name: float(metrics[f"test_accuracy/{name}"]) for name in names}
    pictures = {"accuracy": graph_figures.accuracy_bars(accuracy, majority)}
    if backbone.decoded:
      spectra = {
        name: _decoded_spectrum(backbone, clients, group.held_out, row)
        for group, clients in zip(groups, state.clients, strict=True)
        for row, name in enumerate(group.names)
        if name in firsts
      }
      in_order = {name: spectra[name] for name in firsts}
      pictures["spectra"] = graph_figures.learned_spectra(in_order)
    return pictures

  about = data_records.describe(records)
  if dropped := sum(share.dropped for share in shares):
    about += f"; {dropped} graphs without edges left out"
  return Experiment(
    init, batches, step, evaluate, held_out, figures, config.steps, about, programs=programs
  )


def _to_device(clients: Clients, sharding) -> Clients:
  arrays = jax.device_put((clients.train, clients.held_out, clients.counts), sharding)
  return clients._replace(**dict(zip(("train", "held_out", "counts"), arrays, strict=True)))


def _init_model(backbone: Backbone, key: jax.Array, group: Clients, width: int) -> tuple[Any, Any]:
  """Parameters drawn for a client's own number of features, and model state.

  Where the group's batches have more, the input layer gets rows of zeros: nothing reaches them, so they
  have no gradient and stay zero.
  """

  def init(features: int):
    # Shapes alone: the parameters are drawn without compiling or running a forward pass.
    batch = jax.tree.map(lambda x: x, group.example)
    nodes = _graphs(batch).nodes
    nodes["features"] = jax.ShapeDtypeStruct((len(nodes["mask"]), features), jnp.float32)
    return backbone.init(key, batch, group.num_classes)

  model = init(width)
  if width == max(group.widths):
    return model
  widen = lambda x, to: np.pad(x, [(0, m - n) for n, m in zip(x.shape, to.shape, strict=True)])
  return jax.tree.map(widen, model, jax.eval_shape(lambda: init(max(group.widths))))


def _apart(groups: Sequence[Clients]) -> tuple[Callable, Callable]:
  """`engine.federated_round` and `engine.map_clients` with every data set as a group of its own.

  For a mesh: clients of one data set are about equally large and can be spread over it, single ones are
  dealt to its devices by their size.
  """
  spans = []
  for group in groups:
    cuts = np.flatnonzero(np.diff(group.sets)) + 1
    spans.append([slice(*cut) for cut in itertools.pairwise([0, *cuts, len(group.sets)])])

  def apart(trees: Sequence[Any]) -> list[Any]:
    return [
      jax.tree.map(lambda x, span=span: x[span], tree)
      for tree, within in zip(trees, spans, strict=True)
      for span in within
    ]

  def together(parts: Sequence[Any]) -> tuple[Any, ...]:
    left = iter(parts)
    join = lambda *xs: jnp.concatenate(xs)
    return tuple(jax.tree.map(join, *itertools.islice(left, len(within))) for within in spans)

  def run_round(algorithm, server, clients, data, weights, key, *, ids, **options):
    server, parts, metrics = engine.federated_round(
      algorithm, server, apart(clients), apart(data), apart(weights), key, ids=apart(ids), **options
    )
    return server, together(parts), metrics

  def map_clients(functions, shared, parts, **options):
    return together(engine.map_clients(functions, shared, apart(parts), **options))

  return run_round, map_clients


def _decoded_spectrum(backbone: Backbone, clients, held_out, row: int) -> graph_figures.Spectrum:
  """Eigenvalues and decoder outputs of a client's first held-out batch."""
  client = jax.tree.map(lambda x: x[row], clients)
  batch = jax.tree.map(lambda x: x[row, 0], held_out)
  assert backbone.decoded
  decoded = compiler.jit(backbone.decoded)(client.params, client.model_state, batch)
  real = np.asarray(batch.graphs.nodes["mask"])
  # The first column of the encoding is the eigenvalue itself.
  return graph_figures.Spectrum(np.asarray(batch.encoding)[real, 0], np.asarray(decoded)[real])
