"""Training some of the model's own parameters: tuned copies that stand in for the frozen ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmethods.adapters.adapter import (
  Adapter,
  Factors,
  Interceptor,
  Linear,
  Params,
  Rule,
  Tree,
  key_of,
  on_linears,
)
from jaxmethods.adapters.targets import matching
from jaxmethods.errors import InputError
from jaxmethods.stats.selection import top_share
from jaxmethods.trees import below, flatten, is_stacked, owner, unflatten

# (key, path, parameter) -> scores of its shape; the entries with the highest scores are tuned.
Score = Callable[[jax.Array, str, jax.Array], jax.Array]

# What BitFit trains: biases, and the scales of norms, which take their place in LLaMA-type models.
VECTORS = r"(bias|scale)$"


def tuned(share: float = 1.0, score: Score | None = None, **settings: object) -> Adapter:
  """Tunes the targets themselves: theta <- F theta_0 + (1 - F) theta_tuned with a fixed mask F.

  The tree holds a float32 "value" of every target, equal to it at the start, and a boolean "mask" of the
  entries that count; without scores every entry does. Targets may be any parameters.

  Args:
    share: of the entries of each tensor that is tuned, in (0, 1]; exactly floor(share * size) of them.
    score: ranks the entries, e.g. `by_magnitude`; needed for a share below 1.
    **settings: recorded in the adapter.

  Raises:
    InputError: if `share` is outside (0, 1], or below 1 without scores.
  """
  settings = {"kind": "tuned", **settings}
  if not 0.0 < share <= 1.0:
    raise InputError(f"{settings['kind']}: share must be in (0, 1], got {share}")
  if share < 1.0 and score is None:
    raise InputError(f"{settings['kind']}: share {share} needs scores to choose the entries by")

  def init(key: jax.Array, params: Params, targets: str) -> Tree:
    flat, tree = flatten(params), {}
    for path in matching(flat, targets):
      leaf = flat[path]
      tree[below(path, "value")] = jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
      if share < 1.0 and score is not None:
        choose = functools.partial(top_share, share=share)
        stacked = is_stacked(path)  # each layer of a stack has its own share
        scores = score(key_of(key, path), path, leaf)
        tree[below(path, "mask")] = (jax.vmap(choose) if stacked else choose)(scores)
    return unflatten(tree)

  def merge(params: Params, tree: Tree) -> Tree:
    flat, entries = dict(flatten(params)), flatten(tree)
    for name, value in entries.items():
      path, mask = owner(name), entries.get(below(owner(name), "mask"))
      if not name.endswith("/value"):
        continue
      shape = jnp.shape(flat[path]) if path in flat else None
      if shape != value.shape:
        raise InputError(f"the adapter's {path} has shape {value.shape}, this model has {shape}")
      new = value.astype(flat[path].dtype)
      flat[path] = new if mask is None else jnp.where(mask, new, flat[path])
    return unflatten(flat)

  def interceptor(tree: Tree) -> Interceptor:
    del tree
    return lambda next_fun, args, kwargs, context: next_fun(*args, **kwargs)

  variables = lambda params, tree: {"params": merge(params, tree)}
  settings["share"] = share
  return Adapter(init, variables, interceptor, merge, frozenset({"mask"}), settings)


def bitfit() -> Adapter:
  """BitFit: train vectors only; use the targets `VECTORS` (Ben Zaken et al., arXiv 2106.10199).

  >>> adapter = jm.adapters.bitfit()
  >>> jm.adapters.num_trainable(adapter, adapter.init(key, params, "bias"))
  18
  """
  return tuned(kind="bitfit")


def added_bias() -> Adapter:
  """Trains a bias, zero at the start, on top of linear layers: BitFit where there are none (inferred).

  It merges into layers that have a bias.
  """

  def init(key, linear, path):
    return {"bias": jnp.zeros(linear.kernel.shape[1])}

  def forward(f: Factors, x, linear, dense, drop):
    return dense(x) + f["bias"].astype(x.dtype)

  def merge(f: Factors, linear: Linear) -> Linear:
    return linear._replace(bias=f["bias"] + (0 if linear.bias is None else linear.bias))

  return on_linears(Rule(init, forward, merge), kind="added_bias")


def by_magnitude(key: jax.Array, path: str, parameter: jax.Array) -> jax.Array:
  """Tunes the smallest weights: what is large stays as it was."""
  del key, path
  return -jnp.abs(parameter)


def by_gradient(gradients: Params) -> Score:
  """Tunes what has the largest accumulated |gradient| of a probe pass.

  Args:
    gradients: a tree like the parameters.
  """
  flat = flatten(gradients)

  def score(key, path, parameter):
    del key
    if parameter.shape != flat[path].shape:
      raise InputError(f"{path}: gradients of shape {flat[path].shape}, expected {parameter.shape}")
    return jnp.abs(flat[path])

  return score


def at_random(key: jax.Array, path: str, parameter: jax.Array) -> jax.Array:
  """Tunes a random share."""
  del path
  return jax.random.uniform(key, parameter.shape)
