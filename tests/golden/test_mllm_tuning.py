"""Posterior edits, penalties and metrics of the suite against recorded vectors.

The adapters of the same file are in `test_adapters.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.stats.selection import top_share
from jaxmethods.tuning import metrics, posterior, selective

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def golden(golden_file):
  with jax.enable_x64(True):
    yield {key: jnp.asarray(value) for key, value in golden_file("mllm_tuning").items()}


def close(actual, expected, tolerance=TOLERANCE):
  np.testing.assert_allclose(actual, expected, **tolerance)


def weights(golden):
  return golden["W"], golden["tuned/W"]


def test_dare(golden):
  before, after = weights(golden)
  new = posterior.dare(before, after, golden["dare/drop_mask"], float(golden["dare/p"]))
  close(new, golden["dare/expected"])


def test_grafting(golden):
  before, after = weights(golden)
  share = float(golden["grafting/ratio"])
  mask = top_share(jnp.abs(after - before), share)
  np.testing.assert_array_equal(mask, golden["grafting/expected_mask"].astype(bool))
  close(posterior.grafting(before, after, share), golden["grafting/expected"])


def test_random_mask(golden):
  before, after = weights(golden)
  mask = golden["random_mask/update_mask"].astype(bool)
  close(posterior.masked(before, after, mask), golden["random_mask/expected"])


def test_ties(golden):
  share, scale = float(golden["ties/keep"]), float(golden["ties/lam"])
  merged = posterior.ties(golden["W"], golden["ties/deltas"], share, scale)
  close(merged, golden["ties/expected"])


def test_penalties(golden):
  before, after = ({"layer": {"kernel": w}} for w in weights(golden))
  close(selective.l2_sp(after, before, float(golden["l2sp/lam"])), golden["l2sp/expected_penalty"])
  fisher = {"layer": {"kernel": golden["ewc/fisher"]}}
  penalty = selective.ewc(after, before, fisher, float(golden["ewc/lam"]))
  close(penalty, golden["ewc/expected_penalty"])


def test_tailor(golden):
  before, after = golden["tailor/W_pre"], golden["tailor/W_tuned"]
  samples = golden["tailor/calib_x"]
  moment = jnp.einsum("nti,ntj->ij", samples, samples)
  hessian = posterior.hessian(moment, len(samples))
  tolerance = {"rtol": 1e-4, "atol": 1e-4}
  close(hessian, golden["tailor/expected_H"], tolerance)
  new = posterior.tailor(before, after, hessian, float(golden["tailor/sparsity"]))
  close(new, golden["tailor/expected_W_official"], tolerance)
  np.testing.assert_array_equal(new != before, golden["tailor/expected_update_mask"].astype(bool))


def test_metrics(golden):
  names = ("source_before", "source_after", "target_before", "target_after")
  result = metrics.summary(*(golden[f"metrics/{name}"] for name in names))
  for ours, theirs in (
    ("Source", "source_avg"), ("Avg", "avg"), ("H", "hmean"), ("E", "E"), ("F", "F"), ("O", "O")
  ):  # fmt: skip
    close(result[ours], golden[f"metrics/expected_{theirs}"])
