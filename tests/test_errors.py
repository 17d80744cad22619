"""Guesses at mistyped names."""

import pytest

from jaxmethods.errors import hint, nearest


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("adm", "the nearest is adam"),
    ("adma", "the nearest is adam"),
    ("x", "rows are sgd, adam"),
    ("momentum", "rows are sgd, adam"),
  ],
)
def test_a_near_name_or_the_list(name, expected):
  assert hint(name, ["sgd", "adam"], "rows") == expected


def test_long_lists_are_cut():
  names = [f"method{i:02}" for i in range(20)]
  text = hint("x", names, "methods")
  assert text.startswith("methods are method00, method01")
  assert text.endswith("method11, ...")
  assert hint("x", [], "rows") == "there are no rows"


def test_the_last_part_of_a_dotted_key_counts():
  keys = ["steps", "optimizer.learning_rate", "optimizer.name"]
  assert nearest("learning_rat", keys) == "optimizer.learning_rate"
  assert hint("learning_rate", keys, "keys") == "the nearest is optimizer.learning_rate"
