"""Steps and evaluations of every method lower for TPU and GPU: nothing in them may run on CPU only.

A method of the registry is covered as it is, by the `short:` part of its config. What makes that
quicker, and what stands in for files that a paper config reads, is in the two tables.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import experiments
from jaxmethods.errors import InputError
from jaxmethods.runtime import compiler, config as config_lib, host
from jaxmethods.testbeds.multimodal import pretraining
from tests import tiny_llava

CONFIGS = Path(__file__).parents[2] / "configs"
PLATFORMS = ("tpu", "cuda")

DESK = {
  "desk.limit": 40, "desk.width": 16, "desk.num_heads": 2, "desk.mlp_width": 32,
  "desk.tower_width": 8, "desk.tower_layers": 1, "desk.tower_heads": 2,
}  # fmt: skip
TOY = {
  "task": "watermark",
  "toy.base_steps": 2,
  "toy.sequences": 40,
  "watermark.documents": 4,
  "watermark.pools": 1,
}
SMALLER = {
  "acgkd": {"teacher_epochs": 1, "teacher_layers": 3, "teacher_width": 8},
  "bye": DESK,
  "cot_kinetics": {
    "num_problems": 12, "calibration": 6, "operations": 1, "width": 16, "layers": 2, "samples": 2,
    "temperatures": [1.0],
  },
  "epeagent": {"users": 4, "batch_size": 16},
  "ggeur": {"encoder_epochs": 1},
  "llm_safety": TOY,
  "lorasculpt": DESK,
  "mllm_tuning": DESK,
  "spider": DESK,
  "thanora": DESK,
}  # fmt: skip

# The paper configs: published settings, on what is there. FOLDER: of `tests.tiny_llava`.
QUESTIONS = {
  "checkpoint.model": "hf:FOLDER", "checkpoint.train": "FOLDER/train.jsonl",
  "checkpoint.test": "FOLDER/test.jsonl", "checkpoint.upstream": {"other": "FOLDER/other.jsonl"},
}  # fmt: skip
PAPER = {
  "acgkd": {"data": "embedded:MUTAG", "teacher": "trained", "teacher_epochs": 1},
  "adafreq": {"data": "embedded:coats", "individuals": 4},
  "bye": {**DESK, "rank": 4},
  "fedssp": {"data": "embedded:MUTAG"},
  "ggeur": {"data": "embedded:digit-domains", "encoder_epochs": 1},
  "llm_safety": TOY,
  "lorasculpt": {**QUESTIONS, "rank": 4},
  "mllm_tuning": {**QUESTIONS, "rank": 4},
  "rahfl": {
    "data": "embedded:mnist5k", "public": "digits", "image_size": 16, "private_examples": 300,
    "public_examples": 256, "kinds": ["contrast"],
  },
  "spider": QUESTIONS,
  "thanora": {
    "tasks": ["cups", "others"], "checkpoint.model": "hf:FOLDER", "rank": 4,
    "train": {"cups": "FOLDER/train.jsonl", "others": "FOLDER/test.jsonl"},
    "test": {"cups": "FOLDER/other.jsonl", "others": "FOLDER/other.jsonl"},
    "checkpoint.upstream": {"other": "FOLDER/other.jsonl"},
  },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nothing_from_before(tmp_path_factory):
  """A cache of this module, and no data but the embedded."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("JAXMETHODS_CACHE", "JAXMETHODS_DATA"):
      patch.setenv(name, str(tmp_path_factory.mktemp("empty")))
    patch.setattr(pretraining, "pretrained", random_parameters)
    yield


def random_parameters(model, *_):
  """In place of the desk model's pretraining, which is no part of a step."""
  start = lambda key: model.init(key, jnp.zeros((1, 8), int), pixels=jnp.zeros((1, 64, 64, 3)))
  form = jax.eval_shape(start, jax.random.key(0))["params"]
  random = np.random.default_rng(0)
  return jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), form)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
  return tiny_llava.write(tmp_path_factory.mktemp("llava"))


def config_of(method, file, changes):
  text = lambda value: value if isinstance(value, str) else json.dumps(value)
  pairs = [(key, text(value)) for key, value in changes.items()]
  schema = experiments.load(method).Config
  return config_lib.load(schema, CONFIGS / file, short=True, overrides=pairs, method=method)


def abstract(tree):
  return jax.eval_shape(lambda x: x, tree)


def lower(function, *args):
  """Exports `function` for every platform; returns the form of its results."""
  for platform in PLATFORMS:
    exported = jax.export.export(jax.jit(function), platforms=(platform,))(*map(abstract, args))
  return jax.tree.unflatten(exported.out_tree, list(map(as_struct, exported.out_avals)))


def as_struct(aval):
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def zeros(form):
  """An array of that form; of keys, the first."""
  if jax.dtypes.issubdtype(form.dtype, jax.dtypes.prng_key):
    return jnp.broadcast_to(jax.random.key(0), form.shape)
  return jnp.asarray(np.zeros(form.shape, form.dtype))


def check(method, config, monkeypatch):
  """Lowers the step and the evaluation of a run, whole and, if it has them, as several programs.

  Only an evaluation may call the host (texts are judged there); a callback lowers for nothing but
  the devices that are there.
  """
  room = experiments.load(method)
  experiment = room.build(config)
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  batch = next(iter(experiment.batches(0)))
  after, metrics = lower(experiment.step, state, batch)
  assert jax.tree.map(as_struct, after) == jax.tree.map(as_struct, state)
  assert metrics["loss"].shape == ()
  with monkeypatch.context() as patch:
    patch.setattr(host, "call", lambda function, shapes, *arrays: jax.tree.map(zeros, shapes))
    assert lower(experiment.evaluate, state, experiment.test)
  if experiment.programs:
    lowered = []
    monkeypatch.setattr(compiler, "jit", lowering(lowered))
    step, evaluate = room.build(config).programs
    lowered.clear()
    after, metrics = step(jax.tree.map(zeros, state), batch)
    assert jax.tree.map(as_struct, after) == jax.tree.map(as_struct, state)
    evaluate(after, experiment.test)
    assert len(lowered) > 2


def lowering(lowered):
  """Stands for `compiler.jit`: programs are lowered and answered with zeros, not run."""

  def jit(function, static_argnums=(), **options):
    def program(*args):
      fixed = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
      free = [i for i in range(len(args)) if i not in fixed]

      def bound(*given):
        every = list(args)
        for i, value in zip(free, given, strict=True):
          every[i] = value
        return function(*every)

      lowered.append(function)
      return jax.tree.map(zeros, lower(bound, *(args[i] for i in free)))

    return program

  return jit


@pytest.mark.parametrize("method", experiments.METHODS)
def test_short_runs(method, monkeypatch):
  check(method, config_of(method, f"{method}.yaml", SMALLER.get(method, {})), monkeypatch)


@pytest.mark.parametrize("method", PAPER)
def test_published_settings(method, monkeypatch, llava):
  changes = json.loads(json.dumps(PAPER[method]).replace("FOLDER", str(llava)))
  check(method, config_of(method, f"{method}_paper.yaml", changes), monkeypatch)


@pytest.mark.parametrize("method", sorted({*experiments.METHODS} - {*PAPER}))
def test_published_settings_that_need_files_say_so(method):
  with pytest.raises(InputError):
    experiments.load(method).build(config_of(method, f"{method}_paper.yaml", {}))


@pytest.mark.parametrize(
  "step",
  [
    lambda x: jax.pure_callback(np.sin, x, x),
    lambda x: jnp.linalg.eigvals(jnp.outer(x, x)).real,
    lambda x: x + np.asarray(x),
  ],
  ids=["callback", "eigenvalues", "numpy"],
)
def test_what_runs_on_cpu_only_is_found(step):
  with pytest.raises((NotImplementedError, ValueError, jax.errors.TracerArrayConversionError)):
    lower(step, jnp.ones(3))
