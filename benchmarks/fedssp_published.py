"""The published FedSSP (PyTorch, DGL) on our split of the data: seconds a round, accuracy a round.

None of the published code is here: `--code` is a copy of it (it needs
`models.py` and `client.py` as first published), run in an environment with torch, dgl, torch_geometric
and this package. Its network, its training, validation and test passes and its preprocessing are called
as they are, on the CPU; what is replaced is its reading of the data (our readers, the same split, the
batches that we form) and the few lines of its server. `benchmarks.fedssp_round` is our side of
the timing.

  JAXMETHODS_DATA=DIR python -m benchmarks.fedssp_published --code DIR [--data tu:SM] [--rounds 4] \
    [--seed 1] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jaxmethods.data import sources, splits


def load(data: str, size: int = 128, split_seed: int = 123) -> list[SimpleNamespace]:
  """Every client's batches of torch_geometric graphs, as `experiments.fedssp` forms them."""
  import torch
  from torch_geometric.data import Batch, Data

  clients = []
  for record in sources.load_graphs(data):
    graphs = record.graphs
    node = np.concatenate([[0], np.cumsum(graphs.n_node)])
    edge = np.concatenate([[0], np.cumsum(graphs.n_edge)])

    def one(i, graphs=graphs, node=node, edge=edge, labels=record.labels):
      ends = np.stack(
        [graphs.senders[edge[i] : edge[i + 1]], graphs.receivers[edge[i] : edge[i + 1]]]
      )
      return Data(
        x=torch.from_numpy(np.array(graphs.nodes[node[i] : node[i + 1]])),
        edge_index=torch.from_numpy((ends - node[i]).astype(np.int64)),
        y=torch.tensor([int(labels[i])]),
      )

    parts = splits.stratified_split(record.labels, (0.8, 0.1, 0.1), seed=split_seed)
    parts = [ids[np.asarray(graphs.n_edge)[ids] > 0] for ids in parts]
    batches = [
      [Batch.from_data_list([one(i) for i in ids[k : k + size]]) for k in range(0, len(ids), size)]
      for ids in parts
    ]
    clients.append(
      SimpleNamespace(
        width=graphs.nodes.shape[1], classes=record.num_classes,
        train=batches[0], validation=batches[1], test=batches[2],
      )
    )  # fmt: skip
  return clients


def build(code, models, data, args: SimpleNamespace) -> list:
  """The published client objects, with the batches that its preprocessing makes of ours."""
  from torch import nn

  clients = []
  for index, one in enumerate(data):
    network = models.SSP(one.classes, 3, [one.width], 0, one.width, 4, args.hidden)
    head, network.fc = network.fc, nn.Identity()
    loaders = {"train": None, "val": None, "test": None}
    client = code.Client_GC(models.Split_model(network, head), index, "", 0, loaders, None, args)
    for name, batches in (
      ("train", one.train), ("val", one.validation), ("test", one.test)
    ):  # fmt: skip
      ready = []
      for batch in batches:
        *arrays, valid = code.collate_pyg_to_dgl(batch)
        ready.append((*arrays, batch.y[valid], len(valid)))
      setattr(client, f"{name}_preprocessed_batches", ready)
    clients.append(client)
  return clients


def exchange(clients: list, average: bool) -> None:
  """The server: the mean of the means to everyone, and from round 2 the mean of the encoders."""
  consensus = sum(client.current_mean for client in clients) / len(clients)
  for client in clients:
    client.global_consensus = consensus.data.clone()
  if not average:
    return
  every = [dict(client.model.base.named_parameters()) for client in clients]
  for name in (name for name in every[0] if "encoder" in name and "atom" not in name):
    mean = sum(one[name].data for one in every) / len(every)
    for one in every:
      one[name].data = mean.clone()


def main() -> int:
  """Runs the rounds, prints a line each."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--code", type=Path, required=True)
  parser.add_argument("--data", default="tu:SM")
  parser.add_argument("--rounds", type=int, default=4)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--threads", type=int, default=1)
  parser.add_argument("--json", type=Path)
  options = parser.parse_args()
  sys.path.insert(0, str(options.code))
  import client as code
  import models
  import torch

  torch.set_num_threads(options.threads)
  torch.manual_seed(options.seed)
  args = SimpleNamespace(device="cpu", hidden=128, lr=0.005, tau_weight=100.0, momentum=0.5)
  clients = build(code, models, load(options.data), args)
  rows = []
  for step in range(1, options.rounds + 1):
    wall, cpu = time.perf_counter(), time.process_time()
    for client in clients:
      client.local_train(1)
    exchange(clients, average=step > 1)
    row = {"step": step, "seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    row["test"] = [client.evaluate()[1] for client in clients]
    rows.append(row)
    print(
      f"round {step}: {row['seconds']:.2f} s, {row['cpu']:.2f} CPU s, mean test accuracy "
      f"{np.mean(row['test']):.4f}",
      flush=True,
    )
    if options.json:
      options.json.write_text(json.dumps(rows) + "\n")
  last = rows[-20:]
  print(
    f"median {statistics.median(r['seconds'] for r in rows):.2f} s, "
    f"{statistics.median(r['cpu'] for r in rows):.2f} CPU s; best "
    f"{min(r['seconds'] for r in rows):.2f} s, {min(r['cpu'] for r in rows):.2f} CPU s; load "
    f"{os.getloadavg()[0]:.1f}; mean of the last {len(last)} rounds "
    f"{np.mean([r['test'] for r in last]):.4f}"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
