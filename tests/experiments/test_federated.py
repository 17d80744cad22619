"""Plain federated learning: who holds what, every algorithm, own models, populations, bad input."""

import csv
import dataclasses
import io
import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.errors import InputError
from jaxmethods.experiments.federated import holdings, population
from jaxmethods.experiments.federated.build import build
from jaxmethods.experiments.federated.config import ALGORITHMS, STATELESS, Config, rows
from jaxmethods.runtime import config as config_lib
from tests import runs

D, C = 5, 3


def examples(seed=0, count=90):
  rng = np.random.default_rng(seed)
  y = rng.integers(0, C, count)
  return (3 * np.eye(C, D)[y] + rng.normal(size=(count, D))).astype(np.float32), y


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """Writes an archive of the given keys beside x and y; returns its name."""
  folder = tmp_path_factory.mktemp("data")

  def write(name="plain", count=90, **more):
    x, y = examples(count=count)
    np.savez(folder / f"{name}.npz", x=x, y=y, **more)
    return f"npz:{folder / name}.npz"

  return write


def config(data, **changes):
  small = {
    "data": data, "clients": 6, "steps": 6, "widths": (8,), "split_seed": 3, "alpha": 2.0,
    "learning_rate": 0.2,
  }  # fmt: skip
  return Config(**(small | changes))


def trained(config):
  experiment = build(config)
  _, state, metrics = runs.trained(experiment, config.seed)
  return experiment, state, metrics, jax.jit(experiment.evaluate)(state, experiment.test)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_with_half_of_the_clients_a_round(source, algorithm):
  cohort = 0 if algorithm == "centralised" else 3
  settings = config(source(), algorithm=algorithm, cohort=cohort, steps=12)
  _, state, metrics, result = trained(settings)
  assert result["test_accuracy"] > 0.75, result
  assert metrics["drift"] > 0
  assert state.round == 12
  clients = 1 if algorithm == "centralised" else 3
  model = 4 * (D * 8 + 8 + 8 * C + C)
  sent = {"local": 0, "fedper": 4 * (D * 8 + 8), "fedproto": 4 * (C * 8 + C), "scaffold": 2 * model}
  assert metrics["bytes_up"] == clients * sent.get(algorithm, model)


def test_accuracy_is_that_of_each_clients_own_test(source):
  experiment, state, metrics, result = trained(config(source(), algorithm="local"))
  assert result["drift"] == metrics["drift"] > 0 == result["bytes_up"]
  table = list(csv.DictReader(io.StringIO(experiment.files(state)["clients.csv"])))
  right = sum(float(row["test_accuracy"]) * int(row["test_examples"]) for row in table)
  tested = sum(int(row["test_examples"]) for row in table)
  np.testing.assert_allclose(result["test_accuracy"], right / tested, rtol=1e-5)
  assert tested + sum(int(row["train_examples"]) for row in table) == 90
  # By hand, for the last client in the list: its own parameters on its own test.
  own = experiment.test.own[0]
  place = int(experiment.test.order[-1])
  params = jax.tree.map(lambda x: x[place], state.clients[0].params)
  hidden = jax.nn.relu(own["x"][place] @ params["dense_0"]["kernel"] + params["dense_0"]["bias"])
  logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
  hits = (logits.argmax(-1) == own["y"][place])[own["mask"][place]]
  np.testing.assert_allclose(float(table[-1]["test_accuracy"]), hits.mean(), rtol=1e-5)
  assert set(experiment.figures(state)) == {"clients", "own_examples"}


def test_clients_of_an_archive_domains_and_a_published_test(source, tmp_path):
  ids = np.arange(90) % 4
  held = trained(config(source("own", client=ids), steps=1))[0]
  assert "4 clients (its own clients) with 22 to 23 examples" in held.about
  domains = source("domains", domain=ids % 2, domains=np.array(["photo", "sketch"]))
  held = build(config(domains, clients=4))
  assert "4 clients (by domain)" in held.about
  assert held.files(held.init(jax.random.key(0)))["clients.csv"].split("\n")[4][:8] == "sketch.1"
  (x, y), (u, v) = examples(), examples(1)
  np.savez(tmp_path / "both.npz", train_x=x, train_y=y, test_x=u, test_y=v)
  _, _, _, result = trained(config(f"npz:{tmp_path}/both.npz", split="shards", steps=12))
  assert result["published_accuracy"] > 0.75


def test_no_example_is_trained_and_tested_on_and_none_is_lost(source):
  pool = holdings.load(source(), 0)
  for split in ("iid", "dirichlet", "shards"):
    deal = holdings.Deal(split, 7, 0.3, 2, 2, 0.3, 5)
    held = holdings.deal_out(pool, deal, "plain")
    everything = np.concatenate([part["x"] for part in held.train + held.test])
    assert len(np.unique(everything, axis=0)) == len(everything) == 90
    assert all(len(part["y"]) for part in held.train + held.test)


def test_an_own_model_with_dropout_and_statistics(source, monkeypatch):
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
      x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
      return nn.Dense(C, name="head")(x)

  module = type(sys)("mine")
  module.net = lambda classes: Net()
  module.wrong = lambda classes: nn.Dense(classes + 1)
  module.other = lambda classes: nn.Conv(4, (3, 3, 3, 3))
  module.number = lambda classes: 3
  monkeypatch.setitem(sys.modules, "mine", module)
  data = source()
  for algorithm in ("moon", "fedavg"):
    assert (
      trained(config(data, model="mine:net", algorithm=algorithm, steps=15))[3]["test_accuracy"]
      > 0.7
    )
  for function, said in (
    ("wrong", r"mine:wrong returns float32 \(2, 4\) for 2 examples, expected logits \(2, 3\)"),
    ("other", "mine:other fails on the data: "), ("number", "must return a flax.linen module"),
    ("none", "mine:none cannot be imported: AttributeError"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=said) as error:
      build(config(data, model=f"mine:{function}"))
    assert "\n" not in str(error.value)
  with pytest.raises(InputError, match="statistics that a client of a population loses"):
    build(config(data, model="mine:net", population=50, cohort=2))


@pytest.mark.parametrize("model", ["convnet", "resnet", "vit"])
def test_models_of_images(tmp_path, model):
  rng = np.random.default_rng(0)
  y = rng.integers(0, C, 40)
  x = (rng.random((40, 8, 8, 1)) * 60 + 60 * y[:, None, None, None]).astype(np.uint8)
  np.savez(tmp_path / "images.npz", x=x, y=y)
  small = {"narrow": 8, "vit_width": 8, "vit_layers": 1, "widths": (4,), "clients": 2, "steps": 2}
  experiment = build(config(f"npz:{tmp_path}/images.npz", model=model, **small))
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  assert "head" in state.server.params
  after, metrics = jax.eval_shape(experiment.step, state, next(experiment.batches(0)))
  assert after == state
  assert metrics["loss"].shape == ()


# --- populations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedadam", "fedntd"])
def test_a_population_learns(source, algorithm):
  settings = config(
    source(), algorithm=algorithm, population=10**6, cohort=4, steps=12, population_examples=9
  )
  experiment, state, metrics, result = trained(settings)
  assert result["published_accuracy"] > 0.75
  assert result["test_accuracy"] > 0.75
  assert metrics["bytes_up"] == 4 * 4 * (D * 8 + 8 + 8 * C + C)
  assert len(jax.tree.leaves(state.clients)) == 0 or len(jax.tree.leaves(state.clients)[0]) == 1
  assert "a population of 1,000,000 clients" in experiment.about


def test_a_client_of_a_population_is_the_same_whenever_it_is_drawn(source):
  people, test = population.make(holdings.load(source(), 0), 10**5, 10, 0.5, 0.2, 7)
  again, _ = population.make(holdings.load(source(), 0), 10**5, 10, 0.5, 0.2, 7)
  for number in (0, 99_999):
    one, other = population.client(people, number), population.client(again, number)
    np.testing.assert_array_equal(one["x"], other["x"])
    assert 5 <= len(one["y"]) <= 15
    assert not {*map(bytes, one["x"])} & {*map(bytes, test["x"])}
  assert len({len(population.client(people, k)["y"]) for k in range(30)}) > 3
  drawn = population.cohort(people, 100, 1, 5)
  assert len(set(drawn)) == 100
  rows, weights, numbers = next(population.batches(people, 100, 8, 1, 5))
  np.testing.assert_array_equal(numbers, drawn)
  assert rows["x"].shape == (100, 16, D)
  np.testing.assert_array_equal(weights, [len(population.client(people, k)["y"]) for k in drawn])


# --- rows, bad input ------------------------------------------------------------------------------


def test_rows_are_all_algorithms_and_the_floors():
  assert {*ALGORITHMS, "linear"} == set(rows(Config()))
  assert {*STATELESS, "linear"} == set(rows(Config(population=100, cohort=10)))


def test_unknown_algorithms_are_answered_by_a_list():
  with pytest.raises(InputError, match=r"fedavg.*scaffold"):
    config_lib.load(Config, None, overrides=[("algorithm", "fedsgd")])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"split": "clients"}, "split: npz:.* does not say who its clients are: an npz with x, y and"),
    ({"split": "domains"}, "split: npz:.* has no domains"),
    ({"clients": 60}, "clients: 60 clients with at least 2 examples each need 120, got 90"),
    ({"cohort": 7}, "cohort: 7 of 6 clients"),
    ({"model": "mlpp"}, "model: 'mlpp' is not known; the nearest is mlp"),
    ({"model": "resnet"}, r"model: resnet needs images \(h, w, c\), the data have .*\(5,\)"),
    ({"algorithm": "fedper", "personal": ("top",)}, "personal: the model has no part 'top'"),
  ],
)
def test_bad_input_is_one_line(source, changes, said):
  with pytest.raises(InputError, match=said) as error:
    build(config(source(), **changes))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"algorithm": "scaffold", "cohort": 5}, "scaffold keeps something for every client"),
    ({}, "cohort: of a population of 100 it must be 1 to that, got 0"),
    ({"cohort": 5, "split": "iid"}, "drawn by Dirichlet shares"),
  ],
)
def test_settings_that_a_population_does_not_allow(changes, said):
  with pytest.raises(ValueError, match=said):
    Config(population=100, **changes)


def test_clients_with_one_example_are_named(source, capsys):
  ids = np.minimum(np.arange(90), 3)  # three clients with one example each
  experiment = build(config(source("short", client=ids)))
  assert "warning: client 0 and 2 others have one example" in capsys.readouterr().err
  result = experiment.evaluate(experiment.init(jax.random.key(0)), experiment.test)
  assert np.isfinite(result["client_accuracy"])


def test_a_client_whose_update_is_not_finite_is_left_out(source):
  experiment = build(config(source()))
  state = experiment.init(jax.random.key(0))
  batch = next(experiment.batches(0))
  data = {**batch.data[0], "x": batch.data[0]["x"].at[2].set(jnp.nan)}
  after, metrics = experiment.step(state, batch._replace(data=(data,)))
  assert metrics["rejected"] == 1
  assert np.isfinite(metrics["loss"])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.server))


def test_a_config_can_be_changed_and_kept():
  assert dataclasses.replace(Config(), widths=(4, 4)).widths == (4, 4)


# --- graphs and texts -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedproto", "centralised"])
def test_graphs_by_gin(algorithm):
  settings = Config(
    data="embedded:MUTAG", model="gin", clients=4, algorithm=algorithm, steps=10, gin_width=8,
    gin_layers=2, batch_size=16, learning_rate=0.02, optimizer="adam",
  )  # fmt: skip
  experiment, state, _, result = trained(settings)
  majority = 125 / 188
  assert result["test_accuracy"] > majority
  table = list(csv.DictReader(io.StringIO(experiment.files(state)["clients.csv"])))
  assert sum(int(row["train_examples"]) + int(row["test_examples"]) for row in table) == 188


def lines(path, entries):
  path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  return f"jsonl:{path}"


LM = {
  "model_type": "llama", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 24,
  "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": 0,
}  # fmt: skip


def test_texts_of_named_clients_by_lora(tmp_path):
  entries = [
    {"prompt": f"Say {name}", "completion": f"I say {name}.", "client": name}
    for name in ("ann", "ben", "eve")
    for _ in range(6)
  ]
  settings = Config(
    data=lines(tmp_path / "texts.jsonl", entries), model=f"random:{json.dumps(LM)}",
    tokenizer="small:word-problems", max_length=64, optimizer="adam", learning_rate=0.05, steps=15,
    batch_size=4, rank=4,
  )  # fmt: skip
  experiment, state, metrics, result = trained(settings)
  before = experiment.evaluate(experiment.init(jax.random.key(1)), experiment.test)
  assert "3 clients (its own clients)" in experiment.about
  assert result["token_accuracy"] > before["token_accuracy"] + 0.2
  trained_size = sum(x.size for x in jax.tree.leaves(state.server.params))
  assert metrics["bytes_up"] == 3 * 4 * trained_size
  assert trained_size < sum(x.size for x in jax.tree.leaves(state.fixed))
  table = experiment.files(state)["clients.csv"].split("\n")
  assert [row.split(",")[0] for row in table[1:4]] == ["client ann", "client ben", "client eve"]
  assert not {"moon", "fedproto"} & set(rows(settings))
  with pytest.raises(InputError, match="moon compares classes; texts have none"):
    build(dataclasses.replace(settings, algorithm="moon"))
  lines(tmp_path / "texts.jsonl", [*entries, {"text": "nobody's"}])
  with pytest.raises(InputError, match='line 19: has no "client", as other lines have'):
    build(settings)
  lines(tmp_path / "texts.jsonl", [{"text": "a b c"}, {"text": "c d"}] * 4)
  with pytest.raises(InputError, match='does not say who its clients are: a field "client" does'):
    build(dataclasses.replace(settings, split="clients"))
  assert "2 clients (i.i.d.)" in build(dataclasses.replace(settings, clients=2)).about
