"""Composes profiles, questions, agents and server to conversations that are held and scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxmethods import folders
from jaxmethods.data.files import digest, local_path
from jaxmethods.data.model_sources import open_model
from jaxmethods.data.records import sealed
from jaxmethods.errors import InputError
from jaxmethods.experiments.epeagent import conversation, judging, page, profiles, questions, server
from jaxmethods.experiments.epeagent.config import GENERATED, HASHED, Config, pair
from jaxmethods.experiments.epeagent.conversation import CHANNELS, Held, Stage
from jaxmethods.experiments.epeagent.figures import leak_bars, scores_bars, table, trade
from jaxmethods.experiments.epeagent.judging import Facts, Likeness, Results
from jaxmethods.experiments.epeagent.profiles import DOMAINS, Profiles
from jaxmethods.experiments.epeagent.questions import Case
from jaxmethods.experiments.epeagent.redaction import hider, namer, restorer
from jaxmethods.methods.epeagent import graph, minimise, retrieval
from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import Experiment, Values
from jaxmethods.testbeds.language import rules
from jaxmethods.testbeds.language.sentences import Embedder, bert, remembered
from jaxmethods.testbeds.language.settings import RULE, is_endpoint
from jaxmethods.testbeds.language.turns import Backend


class Batch(NamedTuple):
  """Conversations of one step, as arrays, and the number of the first."""

  facts: Facts
  likeness: Likeness
  start: jax.Array


def build(config: Config, mesh: Mesh | None = None) -> Experiment:
  """Returns the experiment.

  Raises:
    InputError: bad profiles, questions, agents, edges or back end; a mesh.
  """
  checks.no_mesh("epeagent", mesh)
  people, cases = _people(config)
  stage = _stage(config, people)
  size = min(config.batch_size, len(cases))
  count = min(-(-len(cases) // size), config.steps)
  users = stage.embed(_user_texts(stage))

  @functools.cache
  def held(i: int) -> Held:
    return conversation.hold(stage, cases[i * size : (i + 1) * size], i * size)

  @functools.lru_cache(maxsize=1)
  def batch(i: int) -> Batch:
    part = cases[i * size : (i + 1) * size]
    facts = judging.facts_of(stage.server, part, held(i), size)
    likeness = judging.likeness_of(stage.server, users, part, held(i), size, stage.embed)
    return Batch(facts, likeness, jnp.int32(i * size))

  def init(key: jax.Array) -> Results:
    del key  # nothing is drawn here
    shapes = jax.eval_shape(judging.score, *_form(stage, size))
    return jax.tree.map(lambda s: jnp.zeros((count * size, *s.shape[1:]), s.dtype), shapes)

  def batches(step: int) -> Iterator[Batch]:
    while True:
      yield batch(step % count)
      step += 1

  def numbers(state: Results) -> dict[str, float]:
    return judging.metrics_of(jax.jit(judging.summary)(state))

  def figures(state: Results) -> dict[str, Figure]:
    return {"leaks": leak_bars(numbers(state), CHANNELS), "scores": scores_bars(numbers(state))}

  def files(state: Results) -> dict[str, str]:
    log = [message for i in range(count) for message in held(i).log]
    hide = str if config.reveal else namer(stage.server.atoms, people.fields)
    messages = page.render(log, cases, people, hide, about)
    return {"messages.html": messages, "scores.md": f"{about}\n\n{table(numbers(state))}"}

  about = _about(config, people, cases) + _agreement(stage)
  return Experiment(init, batches, _step, _evaluate, (), figures, count, about, files)


def _step(state: Results, batch: Batch) -> tuple[Results, dict[str, jax.Array]]:
  part = judging.score(batch.facts, batch.likeness)
  place = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, batch.start, 0)
  right = (batch.facts.predicted == batch.facts.answer) & (batch.facts.predicted >= 0)
  return jax.tree.map(place, state, part), {"loss": 1 - right.mean(where=batch.facts.real)}


def _evaluate(state: Results, test: tuple) -> dict[str, jax.Array]:
  del test
  return judging.summary(state)


def comparison(rows: list[Values]) -> dict[str, Figure]:
  """Leak, utility and privacy of every row."""
  mean = lambda row, name: row["metrics"][name]["mean"]
  points = {
    row["name"]: (mean(row, "taint_leak"), mean(row, "utility"), mean(row, "privacy_choice"))
    for row in rows
  }
  return {"trade": trade(points)}


def _people(config: Config) -> tuple[Profiles, list[Case]]:
  if config.profiles == GENERATED:
    people = profiles.generate(config.seed, config.users, config.domain)
  else:
    people = profiles.read(config.profiles, config.users)
  for name in ("untrusted", "colluding"):
    if stranger := set(getattr(config, name)) - set(people.agents):
      raise InputError(f"{name}: {min(stranger)} is no agent, agents are {list(people.agents)}")
  return people, questions.build(people, config.questions, config.stems, config.seed)


def _form(stage: Stage, size: int) -> tuple[Facts, Likeness]:
  """Zeros in the form of a batch: a start must not hold a conversation."""
  users, fields, width = stage.server.vectors.shape
  flag, number = jnp.zeros(size, bool), jnp.zeros(size, jnp.int32)
  told = jnp.zeros((size, len(CHANNELS), fields), jnp.int32)
  kinds = (flag, flag, flag, number, number, flag, flag, number, number, flag)
  likeness = Likeness(
    jnp.zeros((size, judging.SENTENCES, width)),
    jnp.zeros((size, width)),
    jnp.zeros((users, fields, width)),
    jnp.zeros((users, width)),
    jnp.zeros((size, fields), bool),
  )
  return Facts(*kinds, told, told, told, number, number), likeness


def _stage(config: Config, people: Profiles) -> Stage:
  """Everything conversations are held with."""
  embed = remembered(_embedder(config))
  values, atoms, present = server.entries(people)
  backend = _backend(config, people, atoms)
  words = [f"{f.replace('_', ' ')} {own[i]}" for own in values for i, f in enumerate(people.fields)]
  on = lambda mode: config.mode in ("epe", mode)
  shown = values
  if config.mode == "masking":
    shown = server.masked(people, values, atoms)
  elif config.mode == "laplace":
    shown = server.noised(people, values, config.epsilon, config.seed)
  desk = server.Server(
    people,
    server.rights(people, config.matching, config.threshold, embed, backend),
    shown,
    atoms,
    present,
    embed(words).reshape(*present.shape, -1),
    on("views_only"),
    on("messages_only"),
    on("memory_only"),
    config.deliver == "cut",
    config.declassify == "letter",
    server.split_fields(len(people.fields), config.servers),
    on("views_only") and config.consent > 0,
  )
  spatial, temporal, levels = _edges(config, people)
  return Stage(
    desk, backend, embed, spatial, temporal, levels, config.rounds, config.k, config.colluding,
    config.injection, config.mode == "paraphrase", functools.partial(_consents, config),
  )  # fmt: skip


def _consents(config: Config, case: Case) -> bool:
  """A user says the same to the same question, whatever the mode."""
  return retrieval.fnv1a(f"{config.seed}/{case.key}") % 1000 < 1000 * config.consent


def _edges(config: Config, people: Profiles) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  teams = [team for team in DOMAINS.values() if len(team) == 3 and set(team) <= set(people.agents)]
  within = [(agent, team[-1]) for team in teams for agent in team[:-1]]
  later = [(b, a) for a, b in within]
  if config.edges:
    within = [pair(edge, "edges") for edge in config.edges]
  if config.later_edges:
    later = [pair(edge, "later_edges") for edge in config.later_edges]
  try:
    spatial = graph.from_edges(within, people.agents)
    graph.check_dag(spatial, people.agents)
    temporal = graph.from_edges(later, people.agents)
  except ValueError as error:
    raise InputError(f"edges: {error}") from None
  return spatial, temporal, np.asarray(graph.levels(jnp.asarray(spatial)))


def _embedder(config: Config) -> Embedder:
  if config.embedding != HASHED:
    return bert(config.embedding)
  return lambda texts: retrieval.embed(texts, config.width).astype(np.float32)


def _backend(config: Config, people: Profiles, atoms: list[list[tuple[str, ...]]]) -> Backend:
  """Who answers for the agents."""
  if config.backend == RULE:
    behaviour = rules.Rules(
      minimise.REFUSAL, retrieval.fnv1a, config.obeys_policy, config.echo, config.untrusted,
      rules.PLAIN if config.injection == "relayed" else "",
    )  # fmt: skip
    return functools.partial(rules.reply, rules=behaviour)
  if not is_endpoint(config.backend):
    from jaxmethods.testbeds.language.local import LocalModel

    return LocalModel(config.backend, config.chat, minimise.REFUSAL)
  from jaxmethods.testbeds.language.endpoint import Endpoint
  from jaxmethods.testbeds.language.journal import Journal

  file = folders.cache() / "epeagent" / f"{retrieval.fnv1a(_purpose(config)):08x}.jsonl"
  path = folders.expanded(config.journal) if config.journal else file
  journal = Journal(path, hider(atoms), restorer(atoms))
  return Endpoint(config.backend, config.chat, minimise.REFUSAL, journal).__call__


def _purpose(config: Config) -> str:
  """What tells journals of endpoints apart; the requests inside are told apart by themselves."""
  return f"{config.profiles} {config.seed} {config.users} {config.domain} {config.backend}"


def _user_texts(stage: Stage) -> list[str]:
  """All of a user as one text."""
  return [" ".join(atom for atoms in own for atom in atoms) for own in stage.server.atoms]


def _asked(config: Config) -> str:
  """Names the file of questions for reports."""
  if config.questions == GENERATED:
    return ""
  return f" from {sealed(config.questions, digest(local_path(config.questions)))}"


def _model(name: str) -> str:
  """Names a model for reports; what is none stands for itself."""
  if name in (RULE, HASHED) or is_endpoint(name):
    return name
  source = open_model(name).source
  return sealed(source.name, source.digest)


def _agreement(stage: Stage) -> str:
  """How far rights that were matched agree with the labels; nothing where the labels decide."""
  desk = stage.server
  if desk.matched is desk.profiles.access:
    return ""
  matched, labels = jnp.asarray(desk.matched[0]), jnp.asarray(desk.profiles.access.all(0))
  found = retrieval.precision_recall(matched, labels)
  precision, recall = (f"{float(share):.2f}" for share in found)
  return f"; matching against the labels: precision {precision}, recall {recall}"


def _about(config: Config, people: Profiles, cases: list[Case]) -> str:
  kind = "from a file" if people.real else "generated, nobody in them exists"
  check = " (a check of the protocol, no measure of a model)" if config.backend == RULE else ""
  settings = dataclasses.asdict(config)
  shown = ", ".join(f"{name} {settings[name]}" for name in ("mode", "deliver", "matching"))
  return (
    f"{len(people.users)} profiles ({kind}: {people.origin}), {len(cases)} questions{_asked(config)}, "
    f"domain {people.domain}; agents answered by {_model(config.backend)}{check}; "
    f"vectors: {_model(config.embedding)}; {shown}{profiles.unseen(people)}"
  )
