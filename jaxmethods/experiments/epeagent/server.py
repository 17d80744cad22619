"""The server agent: which profile entries it hands out, and what it makes of messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmethods.experiments.epeagent.profiles import ROLES, Profiles, text_of
from jaxmethods.methods.epeagent import minimise, policy, retrieval
from jaxmethods.methods.epeagent.scoring import answer_letter
from jaxmethods.testbeds.language.sentences import Embedder
from jaxmethods.testbeds.language.turns import Backend, Question, Turn

IDENTIFYING = ("name", "age", "gender")
_LETTER = re.compile(r"\(([a-d])\)", re.IGNORECASE)


class Server(NamedTuple):
  """What the server knows and does.

  Attributes:
    profiles: users and rights by label.
    matched: (U, F, N), rights that the server goes by; see `rights`.
    values: text of a field, [user][field]; what agents are shown, noised or masked by a baseline.
    atoms: parts of the true value, [user][field].
    present: (U, F), fields that a user has.
    vectors: (U, F, d), of the entries.
    views, messages, memory: which parts of EPE are on.
    forward: texts are forwarded with secrets cut; else composed anew.
    letters: chosen options are declassified.
    parts: (n, F), fields of each server.
    can_ask: a user may be asked for a permission.
  """

  profiles: Profiles
  matched: np.ndarray
  values: list[list[str]]
  atoms: list[list[tuple[str, ...]]]
  present: np.ndarray
  vectors: np.ndarray
  views: bool
  messages: bool
  memory: bool
  forward: bool
  letters: bool
  parts: np.ndarray
  can_ask: bool

  def sanitise(
    self, text: str, sender: int, user: int, read: set[int], allow: np.ndarray
  ) -> tuple[str, frozenset[int]]:
    """What of a message may reach a receiver with rights `allow` (F,), and the fields it carries."""
    if self.forward:
      given = self._cut(text, user, allow)
      return given, self.carried(user, given, read, [given], True)
    quoted = [f for f in sorted(read) if allow[f] and minimise.leaked(self.atoms[user][f], text)]
    found = {self.profiles.fields[f]: self.values[user][f] for f in quoted}
    letter = answer_letter(text) if self.letters else None
    # Known by construction: a value that happens to look like that of another field adds nothing.
    return minimise.compose(text, sender, letter, found), frozenset(quoted)

  def _cut(self, text: str, user: int, allow: np.ndarray) -> str:
    """Every server cuts the fields that are its part, one after the other."""
    for part in self.parts:
      text = minimise.cut(text, [self.atoms[user][f] for f in np.flatnonzero(part & ~allow)])
    return text if self.letters else _LETTER.sub(minimise.CUT, text)

  def carried(
    self, user: int, text: str, read: set[int], heard: Sequence[str], disguises: bool
  ) -> frozenset[int]:
    """Fields that a text carries: of those its writer had read, all that occur in it.

    Args:
      user: whom it is about.
      text: the message.
      read: fields that reached its writer.
      heard: texts of the same channel up to this one.
      disguises: whether encoded and split values are looked for.
    """
    atoms = self.atoms[user]
    return frozenset(
      f
      for f in read
      if minimise.leaked(atoms[f], text) or (disguises and minimise.disguised(atoms[f], heard))
    )


def entries(profiles: Profiles) -> tuple[list[list[str]], list[list[tuple[str, ...]]], np.ndarray]:
  """Values as texts, their atoms, and which fields there are, by user and field."""
  values, atoms = [], []
  for user in profiles.users:
    there = [user.get(field) for field in profiles.fields]
    values.append(["" if entry is None else text_of(entry.value) for entry in there])
    atoms.append([() if entry is None else minimise.atoms(entry.value) for entry in there])
  present = np.array([[field in user for field in profiles.fields] for user in profiles.users])
  return values, atoms, present


def rights(
  profiles: Profiles, matching: str, threshold: float, embed: Embedder, backend: Backend
) -> np.ndarray:
  """Rights that the server goes by, (U, F, N).

  Args:
    profiles: with labels.
    matching: `label`; `embedding`: likeness of self-description and field; `llm`: the back end is asked.
    threshold: least cosine.
    embed: text -> vector.
    backend: who is asked.
  """
  if matching == "label":
    return profiles.access
  words = [field.replace("_", " ") for field in profiles.fields]
  roles = [ROLES[agent] for agent in profiles.agents]
  if matching == "embedding":
    found = np.asarray(
      retrieval.match_roles(jnp.asarray(embed(roles)), jnp.asarray(embed(words)), threshold)
    )
  else:
    ask = lambda word: Question(
      f"match/{word}", word, f"Does your role need the user's {word}?", ("Yes", "No")
    )
    turns = [Turn(agent, role, (), (), ask(word)) for word in words
             for agent, role in zip(profiles.agents, roles, strict=True)]  # fmt: skip
    found = np.array([answer_letter(text) == "A" for text in backend(turns)])
    found = found.reshape(len(words), len(roles))
  return np.broadcast_to(found, profiles.access.shape)


def masked(
  profiles: Profiles, values: list[list[str]], atoms: list[list[tuple[str, ...]]]
) -> list[list[str]]:
  """Hides identifying fields and every number from all agents alike (baseline)."""
  shown = []
  for user, own in enumerate(values):
    places = [i for i, field in enumerate(profiles.fields) if field in IDENTIFYING]
    secrets = [atoms[user][i] for i in places]
    shown.append(
      [minimise.CUT if i in places else minimise.mask(text, secrets) for i, text in enumerate(own)]
    )
  return shown


def noised(
  profiles: Profiles, values: list[list[str]], epsilon: float, seed: int
) -> list[list[str]]:
  """Adds noise to every value, the same for all agents (baseline).

  Numbers: Laplace, of scale range / epsilon. Others: randomised response over the values of all users.
  """
  random = np.random.default_rng([seed, 7])
  shown = [list(own) for own in values]
  for f, field in enumerate(profiles.fields):
    raw = [user[field].value if field in user else None for user in profiles.users]
    numbers = [x for x in raw if isinstance(x, int | float) and not isinstance(x, bool)]
    column = [own[f] for own in values]
    if numbers and len(numbers) == sum(x is not None for x in raw):
      scale = (max(numbers) - min(numbers)) / epsilon
      # The noise of an absent value is drawn too, and shown to nobody.
      near = [x if isinstance(x, int | float) else 0 for x in raw]
      fresh = [str(round(x + random.laplace(0, scale))) for x in near]
    else:
      fresh = _responses(column, epsilon, random)
    for own, value in zip(shown, fresh, strict=True):
      own[f] = str(value) if own[f] else ""
  return shown


def _responses(column: list[str], epsilon: float, random: np.random.Generator) -> list[str]:
  kinds = sorted({text for text in column if text})
  if len(kinds) < 2:
    return column
  keep = np.exp(epsilon) / (np.exp(epsilon) + len(kinds) - 1)
  move = lambda text: kinds[(kinds.index(text) + random.integers(1, len(kinds))) % len(kinds)]
  return [text if not text or random.random() < keep else move(text) for text in column]


def split_fields(count: int, servers: int) -> np.ndarray:
  """Fields of each server, (n, F)."""
  return policy.servers(count, servers)
