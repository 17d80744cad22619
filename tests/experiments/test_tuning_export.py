"""Rows of the tuning methods start without values, and their steps compile for TPU and GPU."""

import jax
import pytest

from jaxmethods.experiments.lorasculpt import build as lorasculpt
from jaxmethods.experiments.lorasculpt.config import Config as LoRASculptConfig
from jaxmethods.experiments.spider import build as spider
from jaxmethods.experiments.spider.config import Config as SpiderConfig
from jaxmethods.experiments.thanora import desk as thanora
from jaxmethods.experiments.thanora.config import Config as ThanoRAConfig
from jaxmethods.testbeds.multimodal import suite
from jaxmethods.testbeds.multimodal.suite_settings import SuiteConfig
from tests.tiny_questions import DESK, benchmark

SMALL = {"desk": DESK, "steps": 3, "batch_size": 4, "probe_size": 4}
LOW = {"rank": 4, "alpha": 8.0, "prune_at": 1}
SUITE = SuiteConfig, {"last": 1, "oft_block": 8} | LOW, suite.build
SCULPT = LoRASculptConfig, LOW | {"keep_ratio": 0.25}, lorasculpt.build
SPIDER = SpiderConfig, {"last_layers": 1}, spider.build
THANORA = ThanoRAConfig, {"rank": 6, "alpha": 12.0, "preview": 8}, thanora.build
ROWS = [
  *((SUITE, row) for row in ("ewc", "gradient_mask", "tailor", "prefix", "pissa", "corda", "adalora")),
  *((SCULPT, row) for row in ("lorasculpt", "orth_reg")),
  *((SPIDER, row) for row in ("spider", "half", "random_mask")),
  *((THANORA, row) for row in ("thanora", "corda", "hydralora", "dare")),
]  # fmt: skip


@pytest.mark.parametrize(
  ("method", "row"), ROWS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_row_starts_without_values_and_compiles_for_accelerators(method, row):
  kind, changes, build = method
  experiment = build(kind(row=row, **SMALL, **changes), benchmark=benchmark())
  state = jax.eval_shape(experiment.init, jax.random.key(0))
  batch = jax.eval_shape(lambda: next(experiment.batches(0)))
  exported = jax.export.export(jax.jit(experiment.step), platforms=["tpu", "cuda"])(state, batch)
  after = jax.tree.unflatten(exported.out_tree, exported.out_avals)[0]
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert describe(after) == describe(state)
  assert exported.platforms == ("tpu", "cuda")
