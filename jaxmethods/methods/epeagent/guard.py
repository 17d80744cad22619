"""The protection around any agent program whose agents are plain callables.

guarded = guard(Policy({"income": {2}, "name": {1, 2}}, profile), agent=2)(my_agent)
text = guarded(message, receiver=3)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from jaxmethods.methods.epeagent import minimise
from jaxmethods.methods.epeagent.minimise import Value
from jaxmethods.methods.epeagent.scoring import answer_letter


class Policy(NamedTuple):
  """Who may know which field of a profile.

  Attributes:
    labels: field -> agents that may see it; a field that is not named is hidden from everybody.
    profile: field -> value.
    forward: whether a message is forwarded with its secrets cut; else it is composed anew, which
      stops encoded secrets too.
  """

  labels: Mapping[str, Collection[int]]
  profile: Mapping[str, Value]
  forward: bool = False


def view(policy: Policy, agent: int) -> dict[str, Value]:
  """The part of the profile that an agent may see."""
  return {f: v for f, v in policy.profile.items() if agent in policy.labels.get(f, ())}


def deliver(policy: Policy, text: str, sender: int, receiver: int) -> str:
  """What of a message reaches its receiver."""
  permitted = view(policy, receiver)
  if policy.forward:
    secrets = [minimise.atoms(v) for f, v in policy.profile.items() if f not in permitted]
    return minimise.cut(text, secrets)
  told = view(policy, sender)
  found = {
    f: ", ".join(minimise.atoms(v))
    for f, v in permitted.items()
    if f in told and minimise.leaked(v, text)
  }
  return minimise.compose(text, sender, answer_letter(text), found)


def guard(policy: Policy, agent: int) -> Callable[[Callable[..., str]], Callable[..., str]]:
  """Wraps an agent, a function (view, message) -> text, so that it is told and tells what it may.

  Args:
    policy: rights and the profile.
    agent: number of the agent.

  Returns:
    A decorator; the wrapped function is (message, receiver) -> what the receiver gets.
  """

  def wrap(function: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(function)
    def guarded(message: str, receiver: int) -> str:
      return deliver(policy, function(view(policy, agent), message), agent, receiver)

    return guarded

  return wrap
