"""What every adapter promises, on a small net in its unrolled and its scanned form."""

import functools
import operator
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.adapters import adalora, adapter as core, bottleneck, low_rank, scaling, selective
from jaxmethods.adapters.targets import BLOCK, matching
from jaxmethods.errors import InputError
from jaxmethods.trees import flatten

WIDTH, INNER, LAYERS = 8, 12, 2
TARGETS = r"layers.*/(up|down)/kernel"

KINDS = {
  "lora": low_rank.lora(3, 6.0, 0.0),
  "rslora": low_rank.rslora(3, 6.0, 0.0),
  "dora": low_rank.dora(3, 6.0, 0.0),
  "vera": low_rank.vera(5),
  "pissa": low_rank.pissa(3, 6.0, 0.0),
  "milora": low_rank.milora(3, 6.0, 0.0),
  "moslora": low_rank.moslora(3, 6.0, 0.0),
  "adalora": low_rank.adalora(3),
  "oft": scaling.oft(4),
  "ia3": scaling.ia3(),
  "added_bias": selective.added_bias(),
  "tuned": selective.tuned(),
  "masked": selective.tuned(0.3, selective.by_magnitude),
  "loramoe": low_rank.loramoe(3, 6.0, 0.0, 2),
  "hydralora": low_rank.hydralora(3, 6.0, 0.0, 2),
  "serial": bottleneck.serial(4),
  "parallel": bottleneck.parallel(4, 0.5),
}
MERGEABLE = [name for name, adapter in KINDS.items() if adapter.merge is not None]


class Block(nn.Module):
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x, _=None):
    h = nn.Dense(INNER, dtype=self.dtype, name="up")(nn.RMSNorm(dtype=self.dtype, name="norm")(x))
    return x + nn.Dense(WIDTH, dtype=self.dtype, name="down")(nn.gelu(h)), None


class Net(nn.Module):
  """Residual blocks, one after the other or under a scan, and a head."""

  scan: bool = True
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x):
    if self.scan:
      blocks = nn.scan(
        Block, variable_axes={"params": 0, "adapter": 0}, length=LAYERS,
        split_rngs={"params": True, "dropout": True},
      )  # fmt: skip
      x, _ = blocks(self.dtype, name="layers")(x, None)
    else:
      for i in range(LAYERS):
        x, _ = Block(self.dtype, name=f"layers_{i}")(x)
    return nn.Dense(5, dtype=self.dtype, name="head")(x)


def unrolled(tree):
  """Stacked layers as layers_0, layers_1, ..."""
  rest = {name: branch for name, branch in tree.items() if name != "layers"}
  each = {
    f"layers_{i}": jax.tree.map(operator.itemgetter(i), tree["layers"]) for i in range(LAYERS)
  }
  return rest | each


@jax.jit
def noisy(key, tree):
  """The tree with every float leaf moved: what an adapter is after training."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  move = lambda key, leaf: (
    leaf + 0.3 * jax.random.normal(key, leaf.shape) if leaf.dtype != bool else leaf
  )
  return jax.tree.unflatten(structure, map(move, keys, leaves))


def moved(key, adapter, tree):
  trained, rest = core.split(adapter, tree)
  return core.join(noisy(key, trained), rest)


@functools.cache
def problem():
  """An input, and parameters with biases and norms of their own."""
  x = jax.random.normal(jax.random.key(0), (4, 6, WIDTH))
  params = jax.jit(Net().init)(jax.random.key(1), x)["params"]
  return x, noisy(jax.random.key(2), params)


class Seen(NamedTuple):
  scanned: jax.Array
  unrolled: jax.Array
  merged: jax.Array | None
  merged_unrolled: jax.Array | None
  gradients: core.Tree


@functools.cache
def case(name):
  """An adapter, its tree at the start and later, and what the model does with each: one compilation."""
  adapter = KINDS[name]
  x, params = problem()
  tree = jax.jit(adapter.init, static_argnums=2)(jax.random.key(3), params, TARGETS)

  def see(tree):
    shared = {name: branch for name, branch in tree.items() if name == core.SHARED}
    own = {name: branch for name, branch in tree.items() if name != core.SHARED}
    flat_tree, flat_params = unrolled(own) | shared, unrolled(params)
    trained, rest = core.split(adapter, tree)
    output = lambda trained: core.apply(adapter, Net(), params, core.join(trained, rest), x)
    plain = one_by_one = None
    if adapter.merge is not None:
      merged = adapter.merge(params, tree)
      chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
      plain = Net().apply({"params": merged}, x)
      one_by_one = Net(scan=False).apply({"params": adapter.merge(flat_params, flat_tree)}, x)
    return Seen(
      output(trained), core.apply(adapter, Net(scan=False), flat_params, flat_tree, x), plain,
      one_by_one, jax.grad(lambda trained: jnp.sum(output(trained) ** 2))(trained),
    )  # fmt: skip

  see = jax.jit(see)
  later = moved(jax.random.key(4), adapter, tree)
  return adapter, tree, see(tree), see(later)


every_kind = pytest.mark.parametrize("name", KINDS)


@every_kind
def test_start_changes_nothing_and_training_does(name):
  _, _, start, later = case(name)
  x, params = problem()
  plain = Net().apply({"params": params}, x)
  for output in (start.scanned, start.unrolled):
    np.testing.assert_allclose(output, plain, atol=1e-5)
  np.testing.assert_allclose(later.scanned, later.unrolled, rtol=1e-5, atol=1e-5)
  assert np.abs(later.scanned - plain).max() > 1e-2


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_equals_unmerged(name):
  for seen in case(name)[2:]:
    tolerance = 1e-5 * np.abs(seen.scanned).max()
    np.testing.assert_allclose(seen.merged, seen.scanned, rtol=0, atol=tolerance)
    np.testing.assert_allclose(seen.merged_unrolled, seen.unrolled, rtol=0, atol=tolerance)


@every_kind
def test_what_is_trained_gets_finite_gradients(name):
  adapter, tree, start, later = case(name)
  chex.assert_tree_all_finite((start.gradients, later.gradients))
  assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(later.gradients))
  mask = flatten(core.trainable(adapter, tree))
  assert {path for path, wanted in mask.items() if wanted} == set(flatten(later.gradients))


# Closed forms, per layer, of the two targets (8 -> 12 and 12 -> 8).
SUM, BOTH = WIDTH + INNER, WIDTH * INNER
COUNTS = {
  "lora": 2 * 3 * SUM,
  "rslora": 2 * 3 * SUM,
  "pissa": 2 * 3 * SUM,
  "milora": 2 * 3 * SUM,
  "dora": 2 * 3 * SUM + SUM,
  "vera": 2 * 5 + SUM,
  "moslora": 2 * (3 * SUM + 3**2),
  "adalora": 2 * (3 * SUM + 3),
  "oft": (4 * 3 // 2) * SUM // 4,
  "ia3": INNER + INNER,  # up: outputs; down: inputs
  "added_bias": SUM,
  "tuned": 2 * BOTH,
  "masked": 2 * int(0.3 * BOTH),
  "loramoe": 2 * (2 * 3 * SUM) + 2 * SUM,
  "hydralora": 3 * SUM + 2 * 3 * SUM + 2 * SUM,
  "serial": (2 * INNER + 2 * WIDTH) * 4 + (4 + INNER) + (4 + WIDTH),
  "parallel": 2 * 4 * SUM + (4 + INNER) + (4 + WIDTH),
}


@every_kind
def test_number_of_parameters(name):
  adapter, tree, *_ = case(name)
  assert core.num_trainable(adapter, tree) == LAYERS * COUNTS[name]


def test_a_target_starts_the_same_whatever_the_others_are():
  _, params = problem()
  adapter = low_rank.lora(2)
  alone, both = (
    adapter.init(jax.random.key(0), params, targets)["layers"]["up"]
    for targets in ("up/kernel", TARGETS)
  )
  chex.assert_trees_all_equal(alone, both)
  a = alone["a"]
  assert a.shape == (LAYERS, 2, WIDTH)
  assert jnp.all(jnp.abs(a) <= WIDTH**-0.5)
  assert not jnp.allclose(a[0], a[1])  # each layer of a stack has its own start


def test_float32_adapters_in_bfloat16_compute():
  x, params = problem()
  for adapter in (low_rank.lora(3, 6.0, 0.0), low_rank.dora(3), scaling.oft(4), scaling.ia3()):
    tree = moved(jax.random.key(4), adapter, adapter.init(jax.random.key(0), params, TARGETS))
    net = Net(dtype=jnp.bfloat16)
    low = core.apply(adapter, net, params, tree, x)
    assert low.dtype == jnp.bfloat16
    full = core.apply(adapter, Net(), params, tree, x)
    assert jnp.abs(low - full).max() < 0.1 * jnp.abs(full).max()
    gradients = jax.grad(
      lambda tree: core.apply(adapter, net, params, tree, x).astype(jnp.float32).sum()  # noqa: B023
    )(tree)
    assert {leaf.dtype for leaf in jax.tree.leaves((tree, gradients))} == {jnp.dtype("float32")}


def test_merging_into_bfloat16_kernels_rounds_once():
  _, params = problem()
  low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  adapter = low_rank.lora(3)
  tree = moved(jax.random.key(4), adapter, adapter.init(jax.random.key(0), low, TARGETS))
  wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
  expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter.merge(wide, tree))
  chex.assert_trees_all_equal(adapter.merge(low, tree), expected)


def test_dropout_only_with_its_stream_and_only_on_the_branch():
  x, params = problem()
  plain, adapter = low_rank.lora(3, 6.0, 0.0), low_rank.lora(3, 6.0, 0.5)
  start = adapter.init(jax.random.key(0), params, TARGETS)
  tree = moved(jax.random.key(4), adapter, start)
  run = lambda adapter, tree, **kw: core.apply(adapter, Net(), params, tree, x, **kw)
  np.testing.assert_array_equal(run(plain, tree), run(adapter, tree))
  first, again, other = (
    run(adapter, tree, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert jnp.abs(first - other).max() > 1e-3 < jnp.abs(first - run(plain, tree)).max()
  # B is zero at the start: the frozen path is not dropped.
  np.testing.assert_array_equal(
    run(adapter, start, rngs={"dropout": jax.random.key(0)}), run(plain, start)
  )


def test_oft_keeps_angles():
  kernel = jax.random.normal(jax.random.key(0), (6, 5))
  adapter = scaling.oft(6)
  tree = {"skew": jax.random.normal(jax.random.key(1), (1, 15))}
  rotation = scaling.orthogonal(scaling.skew_symmetric(tree["skew"], 6))[0]
  np.testing.assert_allclose(rotation.T @ rotation, jnp.eye(6), atol=1e-5)
  turned = adapter.merge({"kernel": kernel}, tree)["kernel"]
  np.testing.assert_allclose(turned.T @ turned, kernel.T @ kernel, atol=1e-4)


def test_dora_norms_are_the_magnitudes_and_a_dead_output_is_harmless():
  _, params = problem()
  dead = jax.tree.map(jnp.array, params)
  dead["head"]["kernel"] = dead["head"]["kernel"].at[:, 0].set(0.0)
  adapter = low_rank.dora(3)
  tree = adapter.init(jax.random.key(0), dead, "head")
  x = jnp.ones((2, 4, WIDTH))
  gradients = jax.grad(lambda tree: core.apply(adapter, Net(), dead, tree, x).sum())(tree)
  chex.assert_tree_all_finite(gradients)
  tree["head"]["b"] = tree["head"]["b"] + 0.1
  merged = adapter.merge(dead, tree)["head"]["kernel"]
  np.testing.assert_allclose(
    jnp.linalg.norm(merged, axis=0), tree["head"]["magnitude"], rtol=1e-5, atol=1e-6
  )


def test_tuned_leaves_come_from_any_parameter_and_masked_entries_stay():
  _, params = problem()
  bitfit = selective.bitfit()
  tree = bitfit.init(jax.random.key(0), params, selective.VECTORS)
  assert set(flatten(tree)) == {
    f"{path}/value" for path in flatten(params) if path.endswith(("bias", "scale"))
  }
  for score in (selective.by_magnitude, selective.at_random, selective.by_gradient(params)):
    adapter = selective.tuned(0.25, score)
    tree = adapter.init(jax.random.key(0), params, r"up/kernel|head/kernel")
    mask = tree["layers"]["up"]["kernel"]["mask"]
    assert (mask.sum((1, 2)) == int(0.25 * BOTH)).all()
    tuned = adapter.merge(params, moved(jax.random.key(1), adapter, tree))
    old, new = (p["layers"]["up"]["kernel"] for p in (params, tuned))
    np.testing.assert_array_equal(old == new, ~mask)
    chex.assert_trees_all_equal(params["layers"]["down"], tuned["layers"]["down"])
  smallest = selective.tuned(0.25, selective.by_magnitude).init(jax.random.key(0), params, "head/k")
  mask, size = smallest["head"]["kernel"]["mask"], jnp.abs(params["head"]["kernel"])
  assert size[mask].max() <= size[~mask].min()


def test_adalora_prunes_to_its_budget():
  _, params = problem()
  adapter = low_rank.adalora(4)
  tree = moved(jax.random.key(1), adapter, adapter.init(jax.random.key(0), params, TARGETS))
  scores = adalora.update_scores(adalora.zero_scores(tree), tree, noisy(jax.random.key(2), tree))
  chex.assert_trees_all_equal_shapes(scores.importance, tree)
  total = 2 * LAYERS * 4
  counts = [int(adalora.budget(step, total, 6, 10, 50)) for step in (0, 10, 30, 50, 90)]
  assert counts[0] == counts[1] == total > counts[2] > counts[3] == counts[4] == 6
  pruned = adalora.prune(tree, scores, jnp.asarray(6))
  left = jnp.concatenate([f["lam"].ravel() for f in core.layers_of(pruned).values()]) != 0
  assert left.sum() == 6
  ranked = jnp.concatenate([v.ravel() for v in adalora.triplet_scores(scores).values()])
  assert ranked[left].min() >= ranked[~left].max()
  orthonormal = {"head": {"a": jnp.eye(3, 7), "b": jnp.eye(3, 5), "lam": jnp.ones(3)}}
  assert adalora.orthogonality(orthonormal) == 0


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: low_rank.lora(0), "rank must be at least 1, got 0"),
    (lambda: low_rank.vera(-1), "rank must be at least 1"),
    (lambda: low_rank.lora(4, alpha=0.0), "alpha must be positive"),
    (lambda: low_rank.lora(4, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    (lambda: low_rank.dora(4, dropout=-0.1), r"dropout must be in \[0, 1\)"),
    (lambda: scaling.oft(1), "block_size must be at least 2"),
    (lambda: bottleneck.serial(0), "width must be at least 1"),
    (lambda: selective.tuned(0.0), r"share must be in \(0, 1\]"),
    (lambda: selective.tuned(0.5), "needs scores"),
  ],
)
def test_bad_settings(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_targets():
  _, params = problem()
  adapter = low_rank.lora(4)
  with pytest.raises(InputError, match=r"'attn/dwon' matches no .* nearest: layers/down/kernel"):
    adapter.init(jax.random.key(0), params, "attn/dwon")
  with pytest.raises(InputError, match=r"'\(up' is not a regular expression"):
    adapter.init(jax.random.key(0), params, "(up")
  with pytest.raises(InputError, match="matches no parameter path"):  # a norm is no linear layer
    adapter.init(jax.random.key(0), params, "norm")
  assert matching(["layers/attention/out/kernel", "head/kernel"], BLOCK) == [
    "layers/attention/out/kernel"
  ]


def test_rank_and_blocks_must_fit():
  _, params = problem()
  said = r"rank 9 exceeds the kernel of layers/down, \(12, 8\)"
  for adapter in (low_rank.pissa(9), low_rank.vera(9), low_rank.adalora(9)):
    with pytest.raises(InputError, match=said):
      adapter.init(jax.random.key(0), params, "down")
  with pytest.warns(UserWarning, match=said):  # LoRA needs no singular components: wasteful only
    low_rank.lora(9).init(jax.random.key(0), params, "down")
  with pytest.raises(InputError, match="block_size 5 does not divide the 12 inputs of layers/down"):
    scaling.oft(5).init(jax.random.key(0), params, "down")


def test_tree_of_another_model():
  x, params = problem()
  adapter = low_rank.lora(3)
  tree = adapter.init(jax.random.key(0), params, TARGETS)
  with pytest.raises(InputError, match="acts on layers/down, which is no linear layer"):
    core.apply(adapter, Net(scan=False), unrolled(params), tree, x)
  other = jax.tree.map(jnp.zeros_like, params)
  other["layers"]["up"]["kernel"] = jnp.zeros((LAYERS, WIDTH, INNER + 1))
  other["layers"]["up"]["bias"] = jnp.zeros((LAYERS, INNER + 1))
  with pytest.raises(
    InputError, match=r"up/b has shape \(2, 3, 12\), this model needs \(2, 3, 13\)"
  ):
    adapter.merge(other, tree)
  with pytest.raises(
    InputError, match=r"down/a has shape \(2, 3, 12\), this model needs \(2, 2, 12\)"
  ):
    low_rank.lora(2).merge(params, tree)
  with pytest.raises(InputError, match=r"down/magnitude has shape None, .* \(2, 8\)"):
    low_rank.dora(3).variables(params, tree)
  vera = low_rank.vera(3)
  with pytest.raises(InputError, match="shared/a has shape None"):
    vera.variables(params, {"layers": vera.init(jax.random.key(0), params, TARGETS)["layers"]})
  del tree["layers"]["up"]["a"]
  with pytest.raises(InputError, match="up/a has shape None"):
    adapter.merge(params, tree)
  tuned = selective.tuned()
  with pytest.raises(InputError, match="up/kernel has shape"):
    tuned.merge(other, tuned.init(jax.random.key(0), params, "up/kernel"))


def test_a_bias_needs_a_bias_to_merge_into():
  adapter = selective.added_bias()
  params = {"head": {"kernel": jnp.ones((3, 2))}}
  tree = adapter.init(jax.random.key(0), params, "head")
  with pytest.raises(InputError, match="head has no bias"):
    adapter.merge(params, tree)
