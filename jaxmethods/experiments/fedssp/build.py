"""Federated graph classification: clients, network and algorithm put together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxmethods.data import records as data_records, sources
from jaxmethods.errors import InputError
from jaxmethods.experiments.fedssp import algorithms, clients as client_data, figures, rounds
from jaxmethods.experiments.fedssp.algorithms import Setup
from jaxmethods.experiments.fedssp.backbones import Backbone, make_backbone
from jaxmethods.experiments.fedssp.clients import Clients, Share
from jaxmethods.experiments.fedssp.config import OURS, Config
from jaxmethods.experiments.fedssp.rounds import Roster
from jaxmethods.experiments.fedssp.state import State, init_state
from jaxmethods.federated import engine
from jaxmethods.methods.fedssp import PreferenceOptimizer
from jaxmethods.runtime import checks, compiler
from jaxmethods.runtime.experiment import Experiment, Metrics


def build(config: Config, mesh: jax.sharding.Mesh | None = None) -> Experiment:
  """Composes the experiment of one row.

  Args:
    config: settings.
    mesh: with an axis "clients", over which the clients of each group are spread.

  Raises:
    InputError: data that are missing or cannot be used, or a client that cannot be trained.
  """
  if mesh is not None and engine.CLIENTS_AXIS not in mesh.shape:
    raise InputError(f"--mesh: needs an axis {engine.CLIENTS_AXIS!r}, got {dict(mesh.shape)}")
  records = sources.load_graphs(config.data)
  shares = [
    client_data.share_out(
      data,
      count=config.clients_per_domain,
      batch_size=config.batch_size,
      seed=config.split_seed,
    )
    for data in records
  ]
  checks.warn_alone(sum(len(share.names) for share in shares))
  backbone = backbone_of(config)
  groups = load_groups(config, shares, backbone, mesh)
  names = tuple(name for share in shares for name in share.names)
  setup = setup_of(config, backbone, len(names))
  roster = Roster(
    setup, backbone, names, tuple(group.ids for group in groups), config.participation,
    _client_map(config, mesh), mesh,
  )  # fmt: skip
  federation = rounds.federation_of(groups, prebatched=config.algorithm not in OURS)
  held_out = tuple(group.held_out for group in groups)
  one = rounds.as_one(roster, groups)
  programs = rounds.as_programs(roster) if not mesh and len(groups) > 1 else None
  about = data_records.describe(records)
  if dropped := sum(share.dropped for share in shares):
    about += f"; {dropped} graphs without edges left out"
  return Experiment(
    init=functools.partial(init_state, backbone, setup, groups),
    # Which clients take part is drawn from the key and the round of the state.
    batches=lambda step: itertools.repeat(federation),
    step=one.step,
    evaluate=one.evaluate,
    test=held_out,
    figures=functools.partial(
      draw_figures,
      roster,
      shares,
      groups,
      programs.evaluate if programs else compiler.jit(one.evaluate),
    ),
    num_steps=config.steps,
    about=about,
    programs=programs,
  )


def backbone_of(config: Config) -> Backbone:
  """Makes the network of a row."""
  return make_backbone(
    config.network,
    hidden=config.hidden,
    heads=config.heads,
    layers=config.layers,
    dropout=config.dropout,
  )


def setup_of(config: Config, backbone: Backbone, num_clients: int) -> Setup:
  """Sets up the algorithm of a row."""
  optimizer = algorithms.make_optimizer(config.optimizer, config.learning_rate, config.weight_decay)
  if config.algorithm in OURS:
    return algorithms.fedssp(
      config.algorithm,
      backbone,
      optimizer,
      eval_preference=config.eval_preference,
      tau=config.tau,
      momentum=config.mu,
      preference=PreferenceOptimizer(config.preference_lr, config.preference_grad),
      mean_mode=config.mean_mode,
      optimizer_reset=config.optimizer_reset,
      local_epochs=config.local_epochs,
    )
  return algorithms.averaging(
    config.algorithm,
    backbone,
    optimizer,
    extractor=config.network == "spectral",
    num_clients=num_clients,
    local_epochs=config.local_epochs,
    proximal=config.proximal,
    bounds=algorithms.Bounds(
      config.gcfl_mean_bound, config.gcfl_max_bound, config.gcfl_first_rounds
    ),
  )


def load_groups(
  config: Config, shares: Sequence[Share], backbone: Backbone, mesh: jax.sharding.Mesh | None
) -> list[Clients]:
  """Packs the clients, one group after the other straight to the device: the host keeps no copy."""
  everywhere = jax.NamedSharding(mesh, jax.P()) if mesh else None
  packed = functools.partial(
    client_data.pack_clients,
    shares,
    view=backbone.view,
    hidden=config.hidden,
    structure=config.network == "fedstar",
  )
  return [
    client_data.to_device(packed(members), everywhere)
    for members in client_data.similar_sets(shares, config.padding_slack)
  ]


def _client_map(config: Config, mesh: jax.sharding.Mesh | None) -> engine.ClientMap | None:
  """Chooses how clients are mapped; None: the default of the backend."""
  if mesh:
    return "shard"
  return None if config.client_map == "auto" else config.client_map


# --- pictures -------------------------------------------------------------------------------------


def draw_figures(
  roster: Roster,
  shares: Sequence[Share],
  groups: Sequence[Clients],
  evaluate: Callable[..., Metrics],
  state: State,
) -> dict[str, Figure]:
  """Draws accuracies and learned spectra.

  Args:
    roster: clients and how they are evaluated.
    shares: data sets.
    groups: clients on the device.
    evaluate: (state, held-out batches) -> metrics, jitted.
    state: trained state.
  """
  metrics = jax.device_get(evaluate(state, tuple(group.held_out for group in groups)))
  accuracy = {name: float(metrics[f"test_accuracy/{name}"]) for name in roster.names}
  majority = [share.majority for share in shares for _ in share.names]
  return figures.draw(accuracy, majority, _spectra(roster, shares, groups, state))


def _spectra(
  roster: Roster, shares: Sequence[Share], groups: Sequence[Clients], state: State
) -> dict[str, figures.Spectrum]:
  """Decodes the spectra of the first client of each domain; none without a decoder."""
  if roster.backbone.decoded is None:
    return {}
  decode = compiler.jit(functools.partial(rounds.decode, roster.setup, roster.backbone.decoded))
  spectra = {}
  for group, clients in zip(groups, state.clients, strict=True):
    for row, (number, name) in enumerate(zip(group.ids, group.names, strict=True)):
      if name in (share.names[0] for share in shares):
        client = jax.tree.map(lambda x, row=row: x[row], clients)
        batch = jax.tree.map(lambda x, row=row: x[row, 0], group.held_out)
        decoded = np.asarray(decode(state.server, number, client, batch))
        real = np.asarray(batch.graphs.nodes["mask"])
        # The first column of the encoding is the eigenvalue itself.
        spectra[name] = figures.Spectrum(np.asarray(batch.encoding)[real, 0], decoded[real])
  return {share.names[0]: spectra[share.names[0]] for share in shares}
