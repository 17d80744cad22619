"""Wrong shapes are refused at the door, in one line with the name of the argument."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods.federated import (
  algorithms,
  corrections,
  engine,
  exchange,
  gcfl,
  guidance,
  padding,
  partition,
)

TWO, THREE = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
ROWS = jnp.ones((4, 3))

DOORS = {
  "contrast": (
    lambda: guidance.model_contrast(ROWS, ROWS, ROWS[:2]),
    "z_previous: expected shape (B=4, h=3), got (2, 3)",
  ),
  "not_true": (
    lambda: guidance.not_true_divergence(ROWS, ROWS, jnp.zeros(3, int)),
    "labels: expected shape (B=4,), got (3,)",
  ),
  "divergence": (
    lambda: exchange.divergence(ROWS, ROWS[0]),
    "logits: expected shape (B=4, C=3), got (3,)",
  ),
  "exchange": (
    lambda: exchange.exchange([], None, optax.sgd(1), (), [], [], ROWS, None),
    "batches: expected shape (steps, V, B, ...), got (4, 3)",
  ),
  "cut": (lambda: gcfl.minimum_cut(ROWS), "weights: expected shape (n, n), got (4, 3)"),
  "cut_members": (
    lambda: gcfl.minimum_cut(jnp.ones((3, 3)), jnp.ones(2, bool)),
    "member: expected shape (3,), got (2,)",
  ),
  "clusters": (
    lambda: gcfl.split_clusters(jnp.zeros(4, int), THREE, jnp.ones(4, bool)),
    "updates: expected 4 rows, got an array of shape (3,)",
  ),
  "scaffold": (
    lambda: corrections.scaffold_control(TWO, TWO, TWO, THREE, 1, 0.1),
    "end: expected shape (2,) at w as in control, got (3,)",
  ),
  "proximal": (
    lambda: algorithms.proximal_term(TWO, {"v": jnp.ones(2)}, 0.1),
    "received: expected shape (2,) at w as in params, got nothing",
  ),
  "mean": (
    lambda: engine.weighted_mean(TWO, jnp.ones(3)),
    "uploads: expected 3 rows, got an array of shape (2,)",
  ),
  "mean_weights": (
    lambda: engine.weighted_mean(TWO, jnp.ones((2, 1))),
    "weights: expected shape (clients,), got (2, 1)",
  ),
  "finite": (
    lambda: engine.finite_rows(TWO, 3),
    "tree: expected 3 rows, got an array of shape (2,)",
  ),
  "padding": (
    lambda: padding.pad_clients(TWO, jnp.ones(3), 4),
    "groups: expected 3 rows, got an array of shape (2,)",
  ),
  "cuts": (
    lambda: padding.bucket_cuts(np.ones((2, 2), int), 2),
    "lengths: expected shape (n,), got (2, 2)",
  ),
  "proportions": (
    lambda: partition.owner_by_proportions(np.zeros(4, int), np.ones(3), np.arange(4)),
    "proportions: expected shape (C, clients), got (3,)",
  ),
  "counts": (
    lambda: partition.domain_label_counts(np.ones((2, 3)), np.ones(2)),
    "counts: expected shape (domains=2, C=3), got (2,)",
  ),
  "labels": (
    lambda: partition.deal_below_even_share(
      np.zeros((2, 2), int), np.ones((1, 2)), [np.arange(2)] * 2
    ),
    "labels: expected shape (n,), got (2, 2)",
  ),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_a_wrong_shape_is_one_line(door):
  call, expected = DOORS[door]
  with pytest.raises(ValueError) as error:
    call()
  assert str(error.value) == expected
