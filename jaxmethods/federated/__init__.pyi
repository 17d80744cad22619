"""Federated algorithms, rounds, and clients of their data."""

from jaxmethods.federated import gcfl as gcfl
from jaxmethods.federated.algorithm import FederatedAlgorithm as FederatedAlgorithm
from jaxmethods.federated.algorithms import (
  ClientState as ClientState,
  ServerState as ServerState,
  fedadam as fedadam,
  fedavg as fedavg,
  fedavgm as fedavgm,
  fedper as fedper,
  fedprox as fedprox,
  fedyogi as fedyogi,
  init_client as init_client,
  local_only as local_only,
)
from jaxmethods.federated.batching import prebatched as prebatched, shuffled as shuffled
from jaxmethods.federated.corrections import feddyn as feddyn, scaffold as scaffold
from jaxmethods.federated.engine import (
  client_params as client_params,
  federated_round as federated_round,
  sample_cohort as sample_cohort,
  sample_participants as sample_participants,
  traffic as traffic,
  weighted_mean as weighted_mean,
)
from jaxmethods.federated.guidance import fedntd as fedntd, moon as moon
from jaxmethods.federated.padding import (
  bucket_clients as bucket_clients,
  pad_clients as pad_clients,
)
from jaxmethods.federated.partition import (
  by_domain as by_domain,
  dirichlet as dirichlet,
  iid as iid,
  shards as shards,
)
from jaxmethods.federated.prototypes import fedproto as fedproto
