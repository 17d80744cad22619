"""Seeds of a comparison whose splits count on with them."""

from jaxmethods.experiments.fedssp.config import Config
from jaxmethods.runtime import seeds


def test_joined():
  parts = [
    seeds.Trained({"accuracy": [value]}, seconds=2.0, step_seconds=step, step_bytes=None)
    for value, step in ((0.5, 0.1), (0.7, None), (0.6, 0.3))
  ]
  assert seeds.joined(parts) == seeds.Trained({"accuracy": [0.5, 0.7, 0.6]}, 6.0, 0.2, None)


def test_the_split_of_fedssp_counts_on():
  assert Config().counted == ("split_seed",)
  assert "split" in Config().seeds_vary
