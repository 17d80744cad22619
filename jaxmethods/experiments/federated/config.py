"""Plain federated learning: your data, your model, any algorithm of the engine by name.

python -m train.run --method federated --data npz:FILE --algorithm scaffold --model my_module:make_net

By default a hundred clients with skewed labels train a dense net on scikit-learn's digits.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

from jaxmethods.runtime import checks
from jaxmethods.runtime.experiment import RunConfig

Algorithm = Literal[
  "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedper", "scaffold", "feddyn", "moon",
  "fedntd", "fedproto", "local", "centralised",
]  # fmt: skip
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
# Their clients keep nothing from round to round, so nobody has to know them before they are drawn.
STATELESS: tuple[Algorithm, ...] = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedntd")
# They compare classes, which texts have not.
OF_CLASSES: tuple[Algorithm, ...] = ("moon", "fedntd", "fedproto")
GRAPHS = ("tu:", "tfds:tu/", "embedded:MUTAG", "embedded:Cuneiform", "embedded:digit-graphs")
TEXTS = ("jsonl:",)
# auto: by the source's own clients or domains where it has some, else by Dirichlet shares.
Split = Literal["auto", "clients", "domains", "dirichlet", "shards", "iid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Data, clients, a model and an algorithm."""

  seeds_vary: ClassVar[str] = "initialisation, the clients' shares and tests, and their batches"
  counted: ClassVar[tuple[str, ...]] = ("split_seed",)

  steps: int = 50  # communication rounds
  eval_every: int = 5
  checkpoint_every: int = 25
  keep_checkpoints: int = 1

  data: str = "digits"  # or any source of arrays, tu:NAME (graphs), jsonl:FILE (texts)
  image_size: int = 0  # side of the images of folder:PATH; 0: as they are
  split: Split = "auto"
  clients: int = 100  # unless the source says who they are
  alpha: float = 0.5  # of the Dirichlet shares
  shards_per_client: int = 2
  min_examples: int = 2  # that every client gets
  test_share: float = 0.2  # of every client's examples
  split_seed: int = 0  # of the shares and the tests; a comparison counts it on with the seed
  # Clients that exist as a number only: each is drawn from the data when a round needs it. 0: off.
  population: int = 0
  population_examples: int = 20  # of such a client, on average

  # mlp, linear, convnet, resnet, vit, or package.module:function, see `nets.make`; of graphs gin; of
  # texts a causal LM, as of the method tuning, which is tuned by low-rank factors.
  model: str = "mlp"
  widths: tuple[int, ...] = (128, 64)  # hidden layers of mlp, channels of convnet
  narrow: int = 4  # what the channels of resnet (64 to 512) are divided by
  vit_width: int = 64
  vit_layers: int = 2
  vit_heads: int = 4
  vit_patch: int = 4
  gin_width: int = 64
  gin_layers: int = 3
  adapter: Literal["lora", "rslora", "dora", "full"] = "lora"  # full: the whole LM is trained
  rank: int = 8
  lora_alpha: float = 16.0
  tokenizer: str = ""  # of texts: small:word-problems, or "" for the model's own
  max_length: int = 256  # tokens of a text; 0: the model's context

  algorithm: Algorithm = "fedavg"
  cohort: int = 0  # clients of a round; 0: all
  local_epochs: int = 2
  batch_size: int = 8
  optimizer: Literal["sgd", "adam"] = "sgd"  # of the clients; scaffold has sgd in any case
  learning_rate: float = 0.1
  weighted: bool = True  # average by numbers of examples (scaffold and feddyn never do)
  fedprox_mu: float = 0.01
  server_rate: float = 0.03  # of fedadam and fedyogi
  server_tau: float = 1e-3  # of fedadam and fedyogi
  server_momentum: float = 0.9  # of fedavgm
  scaffold_rate: float = 1.0  # of the server
  feddyn_alpha: float = 0.1
  personal: tuple[str, ...] = ("head",)  # parts of the model that fedper leaves at home
  moon_mu: float = 1.0
  moon_temperature: float = 0.5
  fedntd_beta: float = 1.0
  fedntd_temperature: float = 1.0
  fedproto_weight: float = 1.0

  def __post_init__(self) -> None:
    super().__post_init__()
    checks.at_least(
      self, 1, "clients", "shards_per_client", "min_examples", "local_epochs", "batch_size",
      "narrow", "vit_width", "vit_layers", "vit_heads", "vit_patch", "population_examples",
      "gin_width", "gin_layers", "rank",
    )  # fmt: skip
    checks.at_least(self, 0, "image_size", "population", "cohort", "fedprox_mu", "max_length")
    checks.positive(
      self,
      "alpha",
      "lora_alpha",
      "learning_rate",
      "server_rate",
      "server_tau",
      "scaffold_rate",
      "feddyn_alpha",
    )
    checks.within(self, "[0, 1)", "server_momentum")
    checks.within(self, "(0, 1)", "test_share")
    checks.require(
      all(width >= 1 for width in self.widths), "widths", f"must be positive, got {self.widths}"
    )
    checks.require(
      self.vit_width % self.vit_heads == 0,
      "vit_width", f"must be a multiple of {self.vit_heads} heads, got {self.vit_width}",
    )  # fmt: skip
    self._check_population()

  def _check_population(self) -> None:
    if not self.population:
      return
    need = checks.require
    need(
      not self.data.startswith(GRAPHS + TEXTS),
      "population",
      f"is drawn from arrays, not from {self.data}",
    )
    need(
      self.algorithm in STATELESS,
      "algorithm",
      f"{self.algorithm} keeps something for every client; with a population it is one of "
      f"{', '.join(STATELESS)}",
    )
    need(
      1 <= self.cohort <= self.population,
      "cohort",
      f"of a population of {self.population} it must be 1 to that, got {self.cohort}",
    )
    need(
      self.split in ("auto", "dirichlet"),
      "split",
      f"a population is drawn by Dirichlet shares, got {self.split}",
    )


def rows(config: Config) -> dict[str, Config]:
  """Every algorithm, and a linear model as the floor."""
  names = STATELESS if config.population else ALGORITHMS
  if config.data.startswith(TEXTS):
    names = tuple(name for name in names if name not in (*OF_CLASSES, "fedper"))
  table: dict[str, Config] = {name: dataclasses.replace(config, algorithm=name) for name in names}
  if config.model in ("mlp", "convnet", "resnet", "vit"):
    table["linear"] = dataclasses.replace(config, algorithm="fedavg", model="linear")
  return table
