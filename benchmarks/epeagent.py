"""EPEAgent measured: modes by domain and channel, injections, a search for leaks, retrieval at size.

  python -m benchmarks.epeagent modes --data finance      # medicine, authors_finance, authors_medicine
  python -m benchmarks.epeagent attacks
  python -m benchmarks.epeagent search
  python -m benchmarks.epeagent scale
  python -m benchmarks.epeagent models                    # extras smollm2 and minilm

But for the last one agents answer by rule: these are checks of the protocol, not reproductions of the
paper's tables. The authors' profiles are read from $JAXMETHODS_DATA/epeagent.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.epeagent import build as build_lib, judging
from jaxmethods.experiments.epeagent.config import Config, rows
from jaxmethods.methods.epeagent import policy, retrieval, taint
from jaxmethods.runtime import seeds

RESULTS = Path(__file__).parent / "results"
SEEDS = 5
AUTHORS = {
  "authors_finance": "epeagent/financial_profiles.json",
  "authors_medicine": "epeagent/medical_profiles.json",
}
# Per cent already, or no share at all.
_WHOLE = {"balance", "utility", "privacy_choice", "privacy_open", "characters", "entries"}
_STEP, _SUMMARY = jax.jit(build_lib._step), jax.jit(judging.summary)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("part", choices=("modes", *PARTS))
  parser.add_argument("--data", choices=("finance", "medicine", *AUTHORS), default="finance")
  args = parser.parse_args()
  if args.part == "modes":
    write(f"epeagent_{args.data}", modes(args.data))
  else:
    write(f"epeagent_{args.part}", PARTS[args.part]())


def write(name: str, found: Mapping) -> None:
  """Writes a results file."""
  (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
  print(f"wrote {name}.json")


def measured(config: Config) -> dict[str, float]:
  """Metrics of a run; shares in per cent."""
  experiment = build_lib.build(config)
  state, batches = experiment.init(jax.random.key(0)), experiment.batches(0)
  for _ in range(experiment.num_steps):
    state, _ = _STEP(state, next(batches))
  values = {name: float(value) for name, value in _SUMMARY(state).items()}
  return {name: x if name in _WHOLE else 100 * x for name, x in values.items()}


def over_seeds(table: Mapping[str, Config], count: int) -> dict:
  """Every row from several seeds, in the form of eval.compare."""
  found = []
  for name, config in table.items():
    start = time.monotonic()
    runs = [measured(dataclasses.replace(config, seed=config.seed + i)) for i in range(count)]
    metrics = {m: seeds.summarize([run[m] for run in runs]) for m in runs[0]}
    found.append({"name": name, "metrics": metrics, "seconds": time.monotonic() - start})
    means = {m: metrics[m]["mean"] for m in ("utility", "taint_leak")}
    print(name, means, f"{found[-1]['seconds']:.0f} s", flush=True)
  return {"unit": "percent", "seeds": count, "rows": found}


def modes(data: str) -> dict:
  """All rows on one data set; a seed draws generated profiles, and the options of questions."""
  config = Config(stems=1, batch_size=128)
  if data in AUTHORS:
    config = dataclasses.replace(config, profiles=AUTHORS[data])
  else:
    config = dataclasses.replace(config, domain=data)
  return over_seeds(rows(config), SEEDS)


def attacks() -> dict:
  """Injections against no protection, a text filter, and messages composed anew."""
  base = Config(stems=1, users=6, batch_size=156, rounds=2)
  kinds = {
    "direct": base,
    "relayed": dataclasses.replace(base, untrusted=(1,)),
    "encoded": base,
    "split": base,
    "encoded_collusion": dataclasses.replace(base, colluding=(1, 3)),
  }
  table = {}
  for kind, config in kinds.items():
    config = dataclasses.replace(config, injection=kind.partition("_")[0])
    table[f"none.{kind}"] = dataclasses.replace(config, mode="none")
    table[f"epe_cut.{kind}"] = dataclasses.replace(config, deliver="cut")
    table[f"epe.{kind}"] = config
  return over_seeds(table, 3)


def single(table: Mapping[str, Mapping[str, float]]) -> list[dict]:
  """Rows of one value each, in the form of eval.compare."""
  number = lambda x: {"mean": x, "ci95": None, "values": [x]}
  return [
    {"name": name, "metrics": {metric: number(x) for metric, x in values.items()}}
    for name, values in table.items()
  ]


def models() -> dict:
  """Each path through a language model once, by the smallest one: that it runs, not how well."""
  found = Config(stems=1, users=5, batch_size=26, embedding="wheel:all-minilm-l6-v2")
  small = Config(stems=1, users=1, batch_size=26, backend="wheel:smollm2-135m")
  table = {
    "rule, entries by MiniLM": found,
    "SmolLM2": small,
    "SmolLM2, rights by llm": dataclasses.replace(small, matching="llm"),
    "SmolLM2, paraphrase": dataclasses.replace(small, mode="paraphrase"),
  }
  return over_seeds(table, 1)


# --- search ---------------------------------------------------------------------------------------

AGENTS, FIELDS, ROUNDS, DRAWS = 6, 19, 4, 100_000


def search() -> dict:
  """Draws conversations at the size of the combined profiles and counts leaks, by policy."""
  drawn = _conversations(np.random.default_rng(0))
  policies = {
    "epe": taint.Protection(True, taint.compose, taint.compose),
    "epe, conservative": taint.Protection(True, taint.withhold, taint.compose),
    "text filter": taint.Protection(True, taint.cut, taint.cut),
    "views only": taint.Protection(True, taint.open_delivery, taint.open_delivery),
    "messages only": taint.Protection(False, taint.compose, taint.open_delivery),
    "broken: rights of the sender": taint.Protection(True, _by_sender, taint.compose),
    "none": taint.Protection(False, taint.open_delivery, taint.open_delivery),
  }
  table = {}
  for name, protection in policies.items():
    start = time.monotonic()
    leaks = jax.block_until_ready(_leaks(protection)(*drawn))
    found = {channel: int(leaked.any(-1).sum()) for channel, leaked in leaks.items()}
    table[name] = {**found, "seconds": time.monotonic() - start}
    print(name, table[name], flush=True)
  size = {"draws": DRAWS, "agents": AGENTS, "fields": FIELDS, "rounds": ROUNDS}
  return {"unit": "conversations that leak", **size, "rows": single(table)}


def _by_sender(plain: jax.Array, hidden: jax.Array, sender: jax.Array, receiver: jax.Array):
  del receiver
  return (plain | hidden) & sender


def _leaks(protection: taint.Protection):
  def one(access, grants, network, conduct):
    now = lambda t: policy.allowed(access, grants, round=t, task=0)[0]
    allow = jax.vmap(now)(jnp.arange(ROUNDS))
    return taint.leaks(taint.flow(allow, network, conduct, protection), allow)

  return jax.jit(lambda *drawn: jax.lax.map(lambda x: one(*x), drawn, batch_size=2000))


def _conversations(random: np.random.Generator):
  flip = lambda share, *shape: random.random((DRAWS, *shape), dtype=np.float32) < share
  cells = (DRAWS, 1, FIELDS, AGENTS)
  last = np.where(flip(0.2, 1, FIELDS, AGENTS), random.integers(-1, ROUNDS, cells, np.int8), -1)
  grants = policy.Grants(last, random.integers(-1, 2, cells, np.int8))
  order = random.permuted(np.tile(np.arange(AGENTS), (DRAWS, 1)), axis=1)
  later = (order[:, :, None] < order[:, None])[:, None]
  network = taint.Network(
    flip(0.5, ROUNDS, AGENTS, AGENTS) & later,
    flip(0.3, ROUNDS, AGENTS, AGENTS) & ~np.eye(AGENTS, dtype=bool),
    flip(0.8, ROUNDS, AGENTS),
  )
  conduct = taint.Conduct(
    flip(0.4, ROUNDS, AGENTS, FIELDS), flip(0.3, ROUNDS, AGENTS, FIELDS), flip(0.3, AGENTS)
  )
  return flip(0.4, FIELDS, AGENTS), grants, network, conduct


# --- scale ----------------------------------------------------------------------------------------

USERS, ROLES, QUESTIONS, ENTRIES, WIDTH, K = 10_000, 3, 100, 11, 256, 4
_TIMED_USERS = 300  # that the loops are timed on; their time is proportional to users
_CHUNK = 50


def scale() -> dict:
  """Masked retrieval for every user, agent and question, beside loops in NumPy."""
  random = np.random.default_rng(0)
  items = random.normal(size=(USERS, ENTRIES, WIDTH)).astype(np.float32)
  queries = random.normal(size=(QUESTIONS, WIDTH)).astype(np.float32)
  mask = random.random((USERS, ROLES, ENTRIES)) < 0.5
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  @jax.jit
  def program(items, queries, mask):
    one = lambda x: retrieval.retrieve(x[0], queries, x[1], K)[0].astype(jnp.int8)
    return jax.lax.map(one, (items, mask), batch_size=_CHUNK)

  start = time.perf_counter()
  compiled = program.lower(items, queries, mask).compile()
  compile_seconds = time.perf_counter() - start
  on_device = [jnp.asarray(x) for x in (items, queries, mask)]
  times = []
  for _ in range(3):
    start = time.perf_counter()
    found = jax.block_until_ready(compiled(*on_device))
    times.append(time.perf_counter() - start)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  found, share = np.asarray(found), USERS / _TIMED_USERS
  loops = {}
  for name, loop in (("loop over questions", _loop), ("loop over users, vectorised", _by_user)):
    start = time.perf_counter()
    want = loop(items[:_TIMED_USERS], queries, mask[:_TIMED_USERS])
    loops[name] = share * (time.perf_counter() - start)
    assert (want == found[:_TIMED_USERS]).mean() > 0.999, name  # float ties may fall either way
  typical = float(np.median(times))
  table = {
    name: {"seconds": seconds, "times_ours": seconds / typical}
    for name, seconds in {"jax, median of 3": typical, **loops}.items()
  }
  return {
    "unit": "seconds", "users": USERS, "agents": ROLES, "questions": QUESTIONS, "entries": ENTRIES,
    "k": K, "times": times, "compile_seconds": compile_seconds, "memory_mb": (peak - before) / 1024,
    "timed_users": _TIMED_USERS, "rows": single(table),
  }  # fmt: skip


def _loop(items: np.ndarray, queries: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """A user, an agent and a question at a time."""
  found = np.full((len(items), ROLES, QUESTIONS, K), -1, np.int8)
  for u, a, q in np.ndindex(len(items), ROLES, QUESTIONS):
    z = np.where(mask[u, a], items[u] @ queries[q], -np.inf)
    best = np.argsort(-z, kind="stable")[:K]
    found[u, a, q] = np.where(mask[u, a, best], best, -1)
  return found


def _by_user(items: np.ndarray, queries: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """All questions of a user and an agent at once."""
  found = np.full((len(items), ROLES, QUESTIONS, K), -1, np.int8)
  for u, a in np.ndindex(len(items), ROLES):
    z = np.where(mask[u, a], queries @ items[u].T, -np.inf)
    best = np.argsort(-z, axis=1, kind="stable")[:, :K]
    found[u, a] = np.where(mask[u, a][best], best, -1)
  return found


PARTS = {"attacks": attacks, "search": search, "scale": scale, "models": models}


if __name__ == "__main__":
  main()
