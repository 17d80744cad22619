"""EPEAgent and its rivals: agents answer questions about users; what they tell each other is audited.

Nothing is trained. A step holds the conversations of some questions and scores them:

  python -m eval.run --method epeagent
  python -m eval.run --method epeagent --profiles FILE --questions FILE --backend http://HOST/v1

The seed draws generated profiles, the order of options, consent and noise.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig
from jaxmethods.testbeds.language.settings import RULE, ChatSettings, check_backend

Mode = Literal[
  "epe", "none", "masking", "paraphrase", "laplace", "views_only", "messages_only", "memory_only"
]
Domain = Literal["finance", "medicine", "combined"]
Injection = Literal["none", "direct", "relayed", "encoded", "split"]
GENERATED, HASHED = "generated", "hashed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Defaults are the paper's where it has any; (ours) marks the others."""

  steps: int = 1_000_000  # at most: all questions are worked off once
  log_every: int = 10
  eval_every: int = 1_000_000
  checkpoint_every: int = 10
  keep_checkpoints: int = 1

  profiles: str = GENERATED  # or a JSON file
  domain: Domain = "finance"  # of generated profiles; a file tells by its labels
  users: int = 25  # generated ones; of a file: at most this many
  questions: str = GENERATED  # or a JSON file
  stems: int = 5  # wordings of a generated question
  backend: str = RULE  # or http://HOST/v1, wheel:smollm2-135m, hf:PATH
  chat: ChatSettings = dataclasses.field(default_factory=ChatSettings)
  journal: str = ""  # file of the answers of an endpoint; default: in the cache folder

  mode: Mode = "epe"
  deliver: Literal["compose", "cut"] = "compose"  # cut: forwards the text, secrets cut out (paper)
  declassify: Literal["letter", "none"] = "letter"  # what passes of a chosen option (ours)
  matching: Literal["label", "embedding", "llm"] = "label"
  threshold: float = 0.3  # least cosine of `embedding` (ours)
  servers: int = 1
  rounds: int = 1
  edges: tuple[str, ...] = ()  # such as "1->3"; default: every agent of a domain to its last
  later_edges: tuple[
    str, ...
  ] = ()  # from one round to the next; default: the last one to the others
  k: int = 4  # profile entries, and memory items, that an agent gets (ours); 0: all it may see
  embedding: str = HASHED  # or wheel:all-minilm-l6-v2, hf:PATH of a BERT
  width: int = 256  # of the hashed embedding (ours)
  epsilon: float = 1.0  # of laplace
  consent: float = 0.0  # share of users who grant a permission that is asked for

  echo: bool = True  # agents by rule are careless: they repeat what they see
  obeys_policy: bool = True
  untrusted: tuple[int, ...] = ()  # agents that pass an injection on
  colluding: tuple[int, ...] = ()  # agents that share all they know behind the server's back
  injection: Injection = "none"
  reveal: bool = False  # show values in the page of messages

  batch_size: int = 64  # questions of a step

  @property
  def seeds_vary(self) -> str:
    """See `RunConfig`."""
    drawn = "profiles, " if self.profiles == GENERATED else ""
    return f"{drawn}order of options, consent and noise"

  @property
  def counted(self) -> tuple[str, ...]:
    """See `RunConfig`; `seed` itself: nothing is drawn while the method runs."""
    return ("seed",)

  def __post_init__(self) -> None:
    super().__post_init__()
    at_least_one = ("users", "stems", "servers", "rounds", "width", "batch_size")
    checks.at_least(self, 1, *at_least_one)
    checks.at_least(self, 0, "k")
    checks.positive(self, "epsilon")
    checks.within(self, "[0, 1]", "consent")
    checks.within(self, "[-1, 1]", "threshold")
    check_backend(self.backend)
    if self.mode == "paraphrase" and self.backend == RULE:
      raise ValueError("mode: paraphrase needs a back end that can write; rule cannot")
    if self.matching == "llm" and self.backend == RULE:
      raise ValueError("matching: llm needs a back end that can judge; rule cannot")
    if self.injection == "relayed" and not self.untrusted:
      raise ValueError("injection: relayed needs an agent that relays it: name it in untrusted")
    if self.injection in ("relayed", "split") and self.rounds < 2:
      raise ValueError(f"injection: {self.injection} needs rounds of at least 2")
    for name in ("edges", "later_edges"):
      for edge in getattr(self, name):
        pair(edge, name)


def pair(edge: str, name: str) -> tuple[int, int]:
  """Reads an edge, "1->3".

  Raises:
    ValueError: it is none.
  """
  ends = edge.split("->")
  if len(ends) != 2 or not all(end.strip().isdigit() for end in ends):
    raise ValueError(f"{name}: an edge is two agents, such as 1->3; got {edge!r}")
  return int(ends[0]), int(ends[1])


def untrained(config: Config) -> bool:
  """Nothing is trained."""
  del config
  return True


def rows(config: Config) -> dict[str, Config]:
  """Every mode; paraphrase where the back end can write. `epe_cut`: forwards texts (paper)."""
  modes = [m for m in get_args(Mode) if m != "paraphrase" or config.backend != RULE]
  table = {mode: dataclasses.replace(config, mode=mode) for mode in modes}
  return {**table, "epe_cut": dataclasses.replace(config, mode="epe", deliver="cut")}
