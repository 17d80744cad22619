"""The page of a run: what it says, and that it needs no file beside it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from jaxmethods.experiments import METHODS
from jaxmethods.runtime import meanings, report

ROOT = Path(__file__).parents[2]
LINES = [
  {"step": k, "loss": 1 / k, "still": 3.0, "accuracy/a": k, "accuracy/b": 2} for k in (1, 2, 3)
]


def test_the_page_of_a_short_run(cli, tmp_path):
  assert (
    cli("train.run", "--method", "ggeur", "--short", "--steps", 3, "--workdir", "w").returncode == 0
  )
  page = (tmp_path / "w/report.html").read_text()
  for words in (METHODS["ggeur"].title, METHODS["ggeur"].paper, "no result",
                "--short --steps 3 --workdir w",
                "steps 3 (default 30)", "cpu", "seconds of training", "higher is better"):  # fmt: skip
    assert words in page, words
  assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d", page)
  assert not re.search(r'(src|href)="(?!data:)', page)  # one file that can be sent
  assert (tmp_path / "w/curves.png").exists()
  HTMLParser().feed(page)


def test_an_evaluation_knows_that_its_run_was_short(cli, tmp_path):
  words = ("--method", "ggeur", "--workdir", "w")
  assert cli("train.run", *words, "--short").returncode == 0
  (tmp_path / "w/report.html").unlink()
  assert cli("eval.run", *words).returncode == 0
  assert "no result" in (tmp_path / "w/report.html").read_text()


def test_constant_metrics_are_a_line_and_no_panel(tmp_path):
  assert report.constants(LINES) == {"still": 3.0}
  figure = report.curves(LINES)
  titles = [axis.get_title() for axis in figure.axes if axis.axison]
  plt.close(figure)
  assert titles == ["loss", "accuracy, each"]
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "still": 3.0}\n{"step": 2, "still": 3.0}\n')
  page = report.write(
    tmp_path, facts=report.Facts("m"), about="a", step=2, metrics={}, figures={}, files={}
  )
  assert "The same at every step: still 3." in page.read_text()
  assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.123456, "0.1235"), (1797, "1797"), (12345.6, "12,350"), (1234567, "1,235,000"), (3, "3"),
   (1e-7, "1e-07"), (float("nan"), "not finite"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_have_four_digits(value, text):
  assert meanings.short(value) == text


def test_metrics_and_pictures_have_words():
  assert meanings.metric("test_accuracy/MUTAG")[0].endswith(": MUTAG")
  assert meanings.metric("loss")[1] == "lower is better"
  assert meanings.metric("no_such_thing") == ("", "")
  assert meanings.caption("weights", ["evidence\nfor 0", "evidence for 1"]) == (
    "Weights: evidence for 0; evidence for 1."
  )


def test_every_metric_of_every_comparison_has_a_meaning():
  # Parts by task or timings of a benchmark are no metrics of a run.
  names = set()
  for file in (ROOT / "benchmarks" / "results").glob("*.json"):
    if any(file.stem.startswith(method) for method in METHODS):
      kept = json.loads(file.read_text())
      rows = kept.get("rows", []) if isinstance(kept, dict) else []
      names |= {name for row in rows for name in row.get("metrics", {})}
  assert len(names) > 60
  own = {"times_ours", "known", "memory", "messages", "views"}  # of scripts, no report shows them
  assert sorted(name for name in names - own if not meanings.metric(name)[0]) == []


def test_curves_need_two_points_and_a_meaning(tmp_path):
  lines = [{"step": k, "loss": 1.0 / k, "field_leak/a": k, "field_leak": k} for k in (1, 2, 3)]
  lines[-1]["test_accuracy"] = 0.5
  figure = report.curves(lines)
  assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["loss", "field leak"]
  assert report._explained_curves(lines, ["loss"])[0].count("<tr>") == 3
  plt.close(figure)


def test_a_table_that_is_too_wide_is_printed_on_its_side(capsys):
  header = ["", *(f"a long name of a metric, number {i}" for i in range(12))]
  report.print_table("t", header, [["ours", *"0123456789ab"], ["rival", *"cdefghijklmn"]])
  printed = [line.split() for line in capsys.readouterr().out.splitlines()]
  assert ["ours", "rival"] in printed
  assert printed[-2][-3:] == ["11", "b", "n"]


def test_a_table_that_fits_stands_upright(capsys):
  report.print_table("t", ["", "metric"], [["ours", "1"]])
  assert ["ours", "1"] in [line.split() for line in capsys.readouterr().out.splitlines()]
