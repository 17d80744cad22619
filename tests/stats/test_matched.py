"""Losses at equal gain, interpolated along a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.stats.matched import lost_at


@pytest.mark.parametrize(
  ("level", "lost"),
  [(-1.0, 0.0), (0.0, 0.0), (25.0, 5.0), (50.0, 10.0), (60.0, 30.0), (71.0, np.nan)],
)
def test_between_points(level, lost):
  gained, kept = jnp.array([0.0, 50, 70, 40]), jnp.array([90.0, 80, 40, 90])
  assert float(lost_at(gained, kept, level)) == pytest.approx(lost, nan_ok=True)


def test_the_first_time_counts():
  gained, kept = jnp.array([0.0, 60, 10, 60]), jnp.array([90.0, 70, 90, 10])
  assert float(lost_at(gained, kept, 60.0)) == pytest.approx(20)


def test_a_point_that_stands_still():
  assert float(lost_at(jnp.array([5.0, 5, 5]), jnp.array([9.0, 1, 1]), 5.0)) == 0


def test_points_on_the_way_of_a_straight_line_change_nothing():
  x = np.sort(np.random.default_rng(0).uniform(0, 100, 20))
  x[0], x[-1] = 0, 100
  both = [float(lost_at(jnp.asarray(p), 100 - 0.5 * jnp.asarray(p), 37.0)) for p in (x, x[[0, -1]])]
  assert both == pytest.approx([18.5, 18.5], rel=1e-5)


def test_vmap_and_jit():
  gained = jnp.array([[0.0, 10], [0, 20]])
  lost = jax.jit(jax.vmap(lost_at, (0, 0, None)))(gained, -gained, 5.0)
  assert lost.tolist() == [5, 5]


def test_lengths_that_differ():
  with pytest.raises(ValueError, match="kept"):
    lost_at(jnp.zeros(2), jnp.zeros(3), 1.0)
