"""Prompt and prefix tuning of a causal LM that knows of neither."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lm

from jaxmethods.adapters import prompts
from jaxmethods.adapters.training import IGNORED, token_cross_entropy
from jaxmethods.errors import InputError
from jaxmethods.models.causal_lm import prefix_cache

LENGTH = 3


@pytest.fixture(scope="module")
def params():
  return tiny_lm.start(tiny_lm.model())[0]


def unrolled(params):
  rest = {name: branch for name, branch in params.items() if name != "layers"}
  for i in range(tiny_lm.CONFIG.num_layers):
    rest[f"layers_{i}"] = jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
  return rest


def test_a_prompt_goes_in_and_labels_stay_with_their_tokens(params):
  lm, batch = tiny_lm.model(), tiny_lm.batch(length=6)
  tree = prompts.init_prompt(jax.random.key(0), params, LENGTH)
  assert tree["prompt"].shape == (LENGTH, tiny_lm.CONFIG.width)

  def loss(tree):
    embedded = params["embed"]["embedding"][batch["ids"]]
    x, mask, labels = prompts.insert_prompt(
      tree["prompt"], embedded, batch["mask"], batch["labels"], position=2
    )
    logits = lm.apply({"params": params}, embeddings=x, mask=mask).logits
    labels = jnp.roll(labels, -1, axis=1).at[:, -1].set(IGNORED)
    return token_cross_entropy(logits, labels)[0], (x, mask, labels)

  gradient, (x, mask, labels) = jax.jit(jax.grad(loss, has_aux=True))(tree)
  assert (gradient["prompt"] != 0).any(axis=1).all()
  assert x.shape[1] == mask.shape[1] == labels.shape[1] == 6 + LENGTH
  assert mask[:, 2 : 2 + LENGTH].all()
  assert (labels != IGNORED).sum() == (batch["labels"][:, 1:] != IGNORED).sum()


def test_prefix_through_the_cache(params):
  """Equal in both forms, seen by the first token, differentiable, and cut off by an empty mask."""
  config, ids = tiny_lm.CONFIG, tiny_lm.batch(size=2, length=5)["ids"]
  tree = prompts.init_prefix(jax.random.key(0), config, LENGTH)
  tree = jax.tree.map(lambda x: 30 * x, tree)
  assert sum(x.size for x in jax.tree.leaves(tree)) == 2 * 2 * LENGTH * 2 * 4  # 2 L p d_kv

  def logits(tree, scan, **options):
    lm = tiny_lm.model(scan_layers=scan)
    variables = {"params": params if scan else unrolled(params)}
    cache = prefix_cache(tree, config, len(ids), ids.shape[1], scan_layers=scan)
    return lm.apply(variables, ids, cache=cache, **options).logits

  scanned, flat = jax.jit(lambda tree: (logits(tree, True), logits(tree, False)))(tree)
  np.testing.assert_allclose(scanned, flat, rtol=1e-4, atol=1e-5)
  plain = tiny_lm.model().apply({"params": params}, ids).logits
  assert (np.abs(scanned - plain).max(axis=(0, 2)) > 1e-3).all()
  gradient = jax.jit(jax.grad(lambda tree: logits(tree, True).sum()))(tree)
  assert all((x != 0).any(axis=(1, 2, 3)).all() for x in jax.tree.leaves(gradient))


def test_bad_lengths(params):
  with pytest.raises(InputError, match="prompt: length must be at least 1, got 0"):
    prompts.init_prompt(jax.random.key(0), params, 0)
  with pytest.raises(InputError, match="prefix: length must be at least 1"):
    prompts.init_prefix(jax.random.key(0), tiny_lm.CONFIG, -1)
