"""The public names: documented by an example that runs, and functions under jit, vmap and grad."""

import doctest
import inspect
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmethods as jm
from jaxmethods import console
from tests.example_names import names

ROOMS = [name for name in jm.__all__ if name != "methods"]
PUBLIC = [f"{room}.{name}" for room in ROOMS for name in getattr(jm, room).__all__]
# Named records of values: their docstrings list their fields, and functions return them.
RECORDS = {
  "adapters.Adapter", "adapters.Linear", "data.ArrayData", "data.GraphData", "data.Source",
  "federated.ClientState", "federated.FederatedAlgorithm", "federated.ServerState",
  "graphs.BatchShape", "graphs.LabelledGraphs", "graphs.Spectra", "models.BertConfig",
  "models.CLIPConfig", "models.CausalLMConfig", "models.ViTConfig", "tuning.Tuner",
  "tuning.TuningState",
}  # fmt: skip


def public(path):
  room, name = path.split(".")
  return getattr(getattr(jm, room), name)


MODULES = {path for path in PUBLIC if isinstance(public(path), types.ModuleType)}
FUNCTIONS = [path for path in PUBLIC if path not in MODULES | RECORDS]


@pytest.mark.parametrize("path", FUNCTIONS)
def test_example_runs(path):
  value = public(path)
  examples = doctest.DocTestFinder(recurse=False).find(value, path, globs=names())
  assert len(examples) == 1 and examples[0].examples, f"{path} has no example"
  shown: list[str] = []
  result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples[0], out=shown.append)
  assert result.failed == 0, "".join(shown)


def test_every_public_name_has_a_docstring():
  assert [path for path in PUBLIC if not inspect.getdoc(public(path))] == []
  assert [name for name in jm.methods.__all__ if not getattr(jm.methods, name).__doc__] == []


def test_no_public_function_is_hidden_by_a_module():
  for room in ROOMS:
    package = getattr(jm, room)
    for name in package.__all__:
      if not isinstance(getattr(package, name), types.ModuleType):
        assert f"{package.__name__}.{name}" not in sys.modules


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'fedsgd'"):
    jm.federated.fedsgd  # noqa: B018


def test_nothing_is_loaded_before_it_is_used():
  code = "import jaxmethods, sys; assert 'jax' not in sys.modules; print(jaxmethods.__version__)"
  shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert shown.stdout.strip() == jm.__version__


# --- transformations ------------------------------------------------------------------------------

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
IMAGE = jnp.asarray(RNG.integers(0, 256, (8, 8, 3)), jnp.float32)
YES = jnp.array([True, False, True, True, False, False])
CURVE = jm.stats.roc_curve(X[:, 0], YES)
# Functions of arrays: arguments, and the transformations that make sense. All run under jit and vmap;
# those that are differentiable have a gradient for their first argument. The rest of the public names
# makes something (adapters, algorithms, models, steps, splits) or reads files, on the host: their
# arguments are static.
ARRAYS = {
  "federated.sample_participants": (
    lambda key: jm.federated.sample_participants(key, 6, 2),
    (KEY,),
  ),
  "federated.weighted_mean": (jm.federated.weighted_mean, (X, jnp.ones(6))),
  "images.augmix": (lambda image: jm.images.augmix(KEY, image), (IMAGE,)),
  "images.crop_and_flip": (lambda image: jm.images.crop_and_flip(KEY, image), (IMAGE,)),
  "images.normalise": (jm.images.normalise, (IMAGE, jnp.ones(3), jnp.ones(3))),
  "images.weak_view": (lambda image: jm.images.weak_view(KEY, image), (IMAGE,)),
  "stats.aupr": (jm.stats.aupr, (CURVE,)),
  "stats.auroc": (jm.stats.auroc, (CURVE,)),
  "stats.bootstrap": (lambda s, p: jm.stats.bootstrap(KEY, s, p, draws=5), (X[:, 0], YES)),
  "stats.cross_entropy": (jm.stats.cross_entropy, (X, jnp.arange(6) % 4)),
  "stats.detection": (jm.stats.detection, (YES, ~YES)),
  "stats.fpr_at": (jm.stats.fpr_at, (CURVE,)),
  "stats.gelu": (jm.stats.gelu, (X,)),
  "stats.lost_at": (lambda a, b: jm.stats.lost_at(a, b, 0.5), (jnp.arange(6.0), X[:, 0])),
  "stats.mean_of_real": (jm.stats.mean_of_real, (X[:, 0], YES)),
  "stats.roc_curve": (jm.stats.roc_curve, (X[:, 0], YES)),
  "stats.self_consistency": (jm.stats.self_consistency, (jnp.arange(12).reshape(4, 3) % 2,)),
  "stats.spectral_scores": (jm.stats.spectral_scores, (X,)),
  "stats.swiglu": (jm.stats.swiglu, (X, X)),
  "stats.token_statistics": (jm.stats.token_statistics, (X, jnp.arange(6) % 4)),
  "stats.top_share": (lambda x: jm.stats.top_share(x, 0.5), (X,)),
}
DIFFERENTIABLE = {
  "federated.weighted_mean", "images.normalise", "stats.cross_entropy", "stats.gelu",
  "stats.mean_of_real", "stats.swiglu", "stats.token_statistics",
}  # fmt: skip
HOST_ROOMS = ("adapters", "data", "federated", "graphs", "models", "tuning")
HOST = {path for path in FUNCTIONS if path.split(".")[0] in HOST_ROOMS and path not in ARRAYS}


def test_every_function_is_of_arrays_or_of_the_host():
  assert sorted({*ARRAYS, *HOST}) == sorted(FUNCTIONS)
  assert set(ARRAYS).isdisjoint(HOST) and set(ARRAYS) >= DIFFERENTIABLE


def close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize("path", ARRAYS)
def test_jit_and_vmap(path):
  function, arguments = ARRAYS[path]
  plain = function(*arguments)
  close(jax.jit(function)(*arguments), plain)
  twice = jax.tree.map(lambda x: jnp.stack([x, x]), arguments)
  mapped = jax.vmap(function)(*twice)
  close(jax.tree.map(lambda x: x[0], mapped), plain)
  close(jax.tree.map(lambda x: x[1], mapped), plain)


@pytest.mark.parametrize("path", sorted(DIFFERENTIABLE))
def test_gradient(path):
  function, (first, *others) = ARRAYS[path]
  total = lambda x: sum(leaf.sum() for leaf in jax.tree.leaves(function(x, *others)))
  gradient, step = jax.grad(total)(first), 1e-2
  direction = jnp.asarray(RNG.normal(size=first.shape), jnp.float32)
  slope = (total(first + step * direction) - total(first - step * direction)) / (2 * step)
  np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-2, atol=1e-3)


# --- the console command --------------------------------------------------------------------------


def test_the_console_command(capsys):
  assert console.main(["--help"]) == 0
  assert "jaxmethods train|eval|compare|export" in capsys.readouterr().out
  assert console.main(["trian", "--method", "fedssp"]) == 2
  assert "expected one of train, eval, compare, export, got 'trian'" in capsys.readouterr().err


def test_the_console_command_is_the_entry_point(capsys, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_ALLOCATOR", "0")
  assert console.main(["train", "--list"]) == 0
  assert "fedssp" in capsys.readouterr().out
