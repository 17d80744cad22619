"""LoRASculpt, SPIDER and ThanoRA from the command line: one line for bad input, and their configs."""

from pathlib import Path

import pytest

from jaxmethods.experiments.lorasculpt import config as lorasculpt
from jaxmethods.experiments.spider import config as spider
from jaxmethods.experiments.thanora import config as thanora
from jaxmethods.runtime.config import load

CONFIGS = Path(__file__).parents[2] / "configs"
BAD = {
  "density": ("lorasculpt", ("--keep_ratio", "1.5"), "keep_ratio: must be in (0, 1], got 1.5"),
  "connector": ("lorasculpt", ("--connector", "half"), "connector"),
  "layers": ("spider", ("--last_layers", "-1"), "last_layers: must be at least 0, got -1"),
  "budget": ("thanora", ("--rank", "2"), "rank: 2 is too small for 2 tasks"),
  "no task": ("thanora", ("--tasks", "[]"), "tasks: must be one or more different tasks"),
  "unknown task": ("thanora", ("--tasks", "[digits,dogs]"), "target 'dogs': must be one of digits"),
  "temperature": ("thanora", ("--temperature", "0"), "temperature: must be positive"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli, tmp_path, case):
  method, arguments, said = BAD[case]
  result = cli("train.run", "--method", method, *arguments)
  assert result.returncode == 2
  assert said in result.stderr
  assert result.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [lorasculpt, spider, thanora])
def test_files_agree_with_what_they_say(method):
  name = method.__name__.split(".")[-1]
  for file in CONFIGS.glob(f"{name}*.yaml"):
    config = load(method.Config, file, method=name)
    short = load(method.Config, file, short=True, method=name)
    assert short.steps < config.steps
    rows = method.rows(config)
    assert rows[name] == config
    assert set(config.rates) <= set(rows)


def test_published_settings():
  """The defaults are the code's; the desk's file says what it changes."""
  paper = load(lorasculpt.Config, CONFIGS / "lorasculpt_paper.yaml", method="lorasculpt")
  plain = lorasculpt.Config()
  for key in ("rank", "alpha", "dropout", "keep_ratio", "prune_at", "cmr_weight", "omega",
              "learning_rate", "projector_rate", "connector"):  # fmt: skip
    assert getattr(paper, key) == getattr(plain, key)
  assert (plain.rank, plain.alpha, plain.prune_at, plain.keep_ratio) == (32, 64.0, 100, 0.1)
