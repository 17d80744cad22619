"""The choice among trials."""

import math

from jaxmethods import experiments
from jaxmethods.runtime import command, config as config_lib, search


def trial(**means):
  return {"metrics": {name: {"mean": mean} for name, mean in means.items()}}


def test_the_highest_wins_and_the_earlier_of_equals():
  assert search.best([trial(H=1), trial(H=3), trial(H=3)], "H", {}) == 1


def test_what_is_not_finite_never_wins():
  assert search.best([trial(H=None), trial(H=-5)], "H", {}) == 1


def test_a_floor_comes_first():
  trials = [trial(Mean=80, Source=0), trial(Mean=70, Source=40), trial(Mean=75, Source=30)]
  assert search.best(trials, "Mean", {"Source": 20}) == 2
  assert search.best(trials, "Mean", {"Source": 35}) == 1
  assert search.best(trials, "Mean", {"Source": 50}) == 1  # by least missed


def test_seeds():
  assert search.num_seeds(0) == search.num_seeds(399) == 3
  assert search.num_seeds(400) == 1


def test_grids():
  assert search.parse("a=1,2; b.c = x , y") == {"a": ["1", "2"], "b.c": ["x", "y"]}
  assert search.label({"a": 1e-4, "b": "x"}) == "a=0.0001 b=x"


def test_a_summary_says_whether_floors_are_met():
  rule = search.Selection(None, "Mean", {"Source": 20.0})
  points = [{"a": 1}, {"a": 2}]
  found = search.summary(rule, points, [trial(Mean=1, Source=10), trial(Mean=2, Source=math.nan)])
  assert found["chosen"] == {"a": 1}
  assert not found["floors_met"]


def test_every_room_says_what_it_chooses_by_and_on_what():
  chosen = {}
  for name in experiments.METHODS:
    room = experiments.load(name)
    config = config_lib.load(room.Config, command.CONFIGS / f"{name}.yaml", method=name)
    rule = room.selection(config)
    chosen[name] = rule and rule.metric
    if rule and hasattr(rule.config, "split"):
      assert rule.config.split == "validation"
  assert chosen["lorasculpt"] == chosen["spider"] == chosen["mllm_tuning"] == "H"
  assert chosen["thanora"] == "Mean"
  assert chosen["fedssp"] == chosen["rahfl"] == chosen["acgkd"] == "validation_accuracy"
  assert chosen["bye"] == "clean_accuracy"
  assert chosen["epeagent"] is None
