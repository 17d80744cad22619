"""Writes the tables of README.md and benchmarks/results/*.md from the JSON files beside those pages.

No number of a table is typed. A table stands between two comments:

  <!-- table: KIND ARGUMENTS -->
  ...
  <!-- end -->

KIND is `methods` (README), `index` (a line a method), `verdicts METHOD`, `expectations METHOD`,
`rows FILE METRIC ...` (every row of a results file, best first), `studies FILE ...` (verdicts of
`eval.compare --study`), `study FILE METRIC` (arms by levels), `measured FILE` (numbers by part, beside
aims) or `speed`. The claims are `claims.py`; every interval is a 95 % interval over seeds (Student's t),
unless the file gives bounds, and differences are paired by seed.

  python -m benchmarks.tables --check     # exit 1 and one line a page that differs from its JSON
  python -m benchmarks.tables --write
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import claims
from benchmarks.claims import Cell, Claim, Need
from demos import refresh
from jaxmethods.experiments import METHODS
from jaxmethods.runtime import seeds

RESULTS = Path(__file__).parent / "results"
README = RESULTS.parents[1] / "README.md"
TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
UNTESTABLE = "cannot be tested here"


class Figure(NamedTuple):
  """A measured number.

  Attributes:
    mean: over seeds.
    low: lower end of the 95 % interval; None where a single value has none.
    high: upper end.
    values: seed -> value; empty where only the mean was kept.
  """

  mean: float
  low: float | None
  high: float | None
  values: dict[str, float]


Rows = dict[str, dict[str, Figure]]  # row -> metric -> figure


# --- reading --------------------------------------------------------------------------------------


@cache
def rows_of(name: str) -> Rows:
  """Reads a results file, in whichever of four forms it is.

  Args:
    name: the file below results/ without its ending; `#PART` chooses a setting of fedssp_settings and
      a kind of student of the acgkd files.
  """
  file, _, part = name.partition("#")
  raw = json.loads((RESULTS / f"{file}.json").read_text())
  if isinstance(raw, list):
    found = _by_line(raw)
  elif "rows" in raw:
    found = {row["name"]: _summarised(row["metrics"]) for row in raw["rows"]}
  elif "runs" in raw:
    found = _by_student(raw, part)
  else:
    found = {row: _over_seeds(runs) for row, runs in raw[part].items()}
  whole = file in claims.PERCENT or (isinstance(raw, dict) and "unit" in raw)
  return found if whole else _in_percent(found)


def _summarised(metrics: Mapping[str, Mapping]) -> dict[str, Figure]:
  """Metrics as `eval.compare` writes them: a mean with its interval and the values of the seeds."""
  found = {}
  for name, x in metrics.items():
    values = {str(seed): value for seed, value in enumerate(x["values"])}
    if "low" in x:
      found[name] = Figure(x["mean"], x["low"], x["high"], values)
    else:
      found[name] = _with_interval(x["mean"], x["ci95"], values)
  return found


def _over_seeds(runs: Mapping[str, Mapping[str, float]]) -> dict[str, Figure]:
  """{seed: {metric: value}} as figures."""
  names = sorted(set.intersection(*(set(run) for run in runs.values())))
  return {name: figure({seed: run[name] for seed, run in runs.items()}) for name in names}


def _by_line(lines: Sequence[Mapping]) -> Rows:
  """The test lines of the tuning suite: one for a row and a seed."""
  runs: dict[str, dict[str, Mapping[str, float]]] = {}
  for line in lines:
    if line["split"] == "test":
      runs.setdefault(line["row"], {})[str(line["seed"])] = line["metrics"]
  return {row: _over_seeds(of) for row, of in runs.items()}


def _by_student(raw: Mapping, kind: str) -> Rows:
  """Students of one kind, each at the learning rate that validation chooses, as in `acgkd_tables`."""
  found = {}
  for name, tried in raw["runs"].items():
    row, _, student = name.rpartition(".")
    if student == kind:
      complete = max(map(len, tried.values()))
      rates = [rate for rate in tried if len(tried[rate]) == complete]
      best = max(rates, key=lambda rate, tried=tried: (_validation(tried[rate]), float(rate)))
      found[row] = _over_seeds(tried[best])
  return found


def _validation(runs: Mapping[str, Mapping[str, float]]) -> float:
  """Mean validation accuracy; 0 for rows without, which keep the published rate, the largest."""
  return sum(run.get("validation_accuracy", 0.0) for run in runs.values()) / len(runs)


def figure(values: Mapping[str, float]) -> Figure:
  """Mean and 95 % interval over seeds."""
  summary = seeds.summarize(list(values.values()))
  return _with_interval(summary["mean"], summary["ci95"], dict(values))


def _with_interval(mean: float, half: float | None, values: dict[str, float]) -> Figure:
  if half is None or len(values) == 1:
    return Figure(mean, None, None, values)
  return Figure(mean, mean - half, mean + half, values)


def _in_percent(rows: Rows) -> Rows:
  return {
    row: {
      name: Figure(
        100 * x.mean,
        None if x.low is None else 100 * x.low,
        None if x.high is None else 100 * x.high,
        {seed: 100 * value for seed, value in x.values.items()},
      )
      for name, x in metrics.items()
    }
    for row, metrics in rows.items()
  }


def read(cell: Cell) -> Figure:
  """The figure of a cell."""
  return rows_of(cell.file)[cell.row][cell.metric]


def difference(a: Figure, b: Figure) -> Figure | None:
  """Subtracts b from a, paired by seed; None where no seed is common."""
  common = [seed for seed in a.values if seed in b.values]
  return figure({seed: a.values[seed] - b.values[seed] for seed in common}) if common else None


# --- verdicts -------------------------------------------------------------------------------------


def best_rival(claim: Claim) -> str:
  """The rival with the best mean among those that the file has."""
  rows = rows_of(claim.ours.file)
  sign = -1 if claim.lower else 1
  known = [row for row in claim.rivals if row in rows]
  return max(known, key=lambda row: sign * rows[row][claim.ours.metric].mean)


def lead(claim: Claim) -> Figure | None:
  """By how much ours is better than the best rival, paired by seed."""
  pair = read(claim.ours), read(claim.ours._replace(row=best_rival(claim)))
  return difference(*(reversed(pair) if claim.lower else pair))


def limit(bound: float | Cell) -> float:
  """The number of a limit."""
  return read(bound).mean if isinstance(bound, Cell) else bound


def measured(need: Need) -> Figure | None:
  """The number that decides a precondition."""
  here = read(need.here)
  return here if need.minus is None else difference(here, read(need.minus))


def is_met(need: Need) -> bool:
  """Whether a precondition holds: the mean, or all of a difference's interval, is within the limits."""
  x = measured(need)
  if x is None:
    return False
  low, high = (x.low, x.high) if need.minus else (x.mean, x.mean)
  above = need.least is None or (low is not None and low >= limit(need.least))
  below = need.most is None or (high is not None and high <= limit(need.most))
  return above and below


def verdict(claim: Claim) -> str:
  """Says "came out" where the whole interval of the lead is above zero, else why not."""
  if claim.no_verdict:
    return claim.no_verdict
  for need in claim.needs:
    if not is_met(need):
      return f"{UNTESTABLE}: {need.short} {here(need)}, needed {bounds(need)}"
  x = lead(claim)
  if x is None:
    raise ValueError(f"{claim.method}, {claim.setting}: no seed is common to both rows")
  if x.low is None:
    return f"one seed: {'ahead' if x.mean > 0 else 'behind'}"
  return "came out" if x.low > 0 else "did not"


def here(need: Need) -> str:
  """The number that decides a precondition; norms and losses, which are small, with a digit more."""
  x = measured(need)
  return f"{x.mean:.2f}" if x and x.low is None and abs(x.mean) < 10 else shown(x)


def bounds(need: Need) -> str:
  """The limits of a precondition."""
  both = (("≥", need.least), ("≤", need.most))
  return ", ".join(f"{sign} {limit(bound):.3g}" for sign, bound in both if bound is not None)


# --- tables ---------------------------------------------------------------------------------------


def shown(x: Figure | None, sign: bool = False) -> str:
  """A figure with its interval; both bounds where they are not symmetric."""
  if x is None:
    return "-"
  mean = f"{x.mean:+.1f}" if sign else f"{x.mean:.1f}"
  if x.low is None or x.high is None:
    return mean
  if abs((x.low + x.high) / 2 - x.mean) > 0.05:
    return f"{mean} [{x.low:.1f}, {x.high:.1f}]"
  return f"{mean} ± {(x.high - x.low) / 2:.1f}"


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
  """A table."""
  lines = [header, ["---"] * len(header), *body]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number_of_seeds(claim: Claim) -> str:
  """How often the claim was run."""
  seen = len(read(claim.ours).values)
  return {0: "1 model", 1: "1 seed"}.get(seen, f"{seen} seeds")


def rival_cell(claim: Claim) -> str:
  """Name and figure of the best rival."""
  row = best_rival(claim)
  return f"{row} {shown(read(claim.ours._replace(row=row)))}"


def methods_table(page: str = "benchmarks/results/") -> str:
  """The README's table: headline claims, a line each."""
  body, last = [], ""
  for claim in (claim for claim in claims.CLAIMS if claim.headline):
    method = METHODS[claim.method]
    again = claim.method == last
    last = claim.method
    body.append(
      (
        "" if again else f"[{claim.method}]({page}{claim.method}.md)",
        "" if again else claims.TASKS[claim.method],
        "" if again else linked(method.paper),
        f"{claim.setting}, {number_of_seeds(claim)}",
        shown(read(claim.ours)),
        rival_cell(claim),
        claim.published,
        verdict(claim),
      )
    )
  header = (
    "method",
    "task",
    "paper",
    "setting, seeds",
    "ours",
    "best rival",
    "published",
    "came out?",
  )
  return markdown(header, body)


def linked(paper: str) -> str:
  """'A et al., 2025, arXiv 1234.5678; B, arXiv 2345.6789' as links."""
  return re.sub(r"([^;\s][^;]*), arXiv (\d+\.\d+)", r"[\1](https://arxiv.org/abs/\2)", paper)


def index_table() -> str:
  """A line a method: how its claims came out."""
  body = []
  for name in claims.TASKS:
    seen = [verdict(claim) for claim in claims.CLAIMS if claim.method == name]
    counts = [
      str(sum(v.startswith(kind) for v in seen)) for kind in ("came out", "did not", "one seed")
    ]
    body.append(
      (
        f"[{METHODS[name].title}]({name}.md)",
        *counts,
        str(sum(v.startswith(UNTESTABLE) for v in seen)),
      )
    )
  return markdown(("method", "came out", "did not", "one seed", UNTESTABLE), body)


def verdicts_table(method: str) -> str:
  """The claims of a method, then the preconditions."""
  chosen = [claim for claim in claims.CLAIMS if claim.method == method]
  header = ("claim", "setting", "seeds", "ours", "best rival", "lead", "published", "verdict")
  body = [
    (
      claim.text,
      claim.setting,
      number_of_seeds(claim),
      f"{claim.ours.row} {shown(read(claim.ours))}",
      rival_cell(claim),
      shown(lead(claim), sign=True),
      claim.published,
      f"**{verdict(claim)}**",
    )
    for claim in chosen
  ]
  text = markdown(header, body)
  needs = list(dict.fromkeys(need for claim in chosen for need in claim.needs))
  if needs:
    text += "\n" + needs_table(needs)
  source = claims.SOURCES.get(method)
  return text + (f"\nPublished: {source}.\n" if source else "\nPublished: none could be read.\n")


def needs_table(needs: Sequence[Need]) -> str:
  """Preconditions with the numbers that decide them."""
  body = [
    (need.text, here(need), bounds(need), "yes" if is_met(need) else "**no**") for need in needs
  ]
  return markdown(("precondition", "here", "needed", "met"), body)


def expectations_table(method: str) -> str:
  """What was expected of a method in the mean, with the numbers that decide it."""
  body = []
  for need in claims.EXPECTATIONS[method]:
    x = measured(need)
    held = x is not None and all(
      bound is None or sign * (x.mean - limit(bound)) >= 0
      for sign, bound in ((1, need.least), (-1, need.most))
    )
    body.append((need.text, need.short, here(need), bounds(need), "yes" if held else "**no**"))
  return markdown(("expected", "row", "here", "needed", "held"), body)


def rows_table(file: str, *metrics: str) -> str:
  """Every row of a file, best first by the first metric."""
  rows = {row: of for row, of in rows_of(file).items() if metrics[0] in of}
  order = sorted(rows, key=lambda row: -rows[row][metrics[0]].mean)
  body = [
    (
      row,
      str(len(rows[row][metrics[0]].values) or "-"),
      *(shown(rows[row].get(metric)) for metric in metrics),
      " ".join(f"{value:.1f}" for value in rows[row][metrics[0]].values.values()) or "-",
    )
    for row in order
  ]
  names = [metric.replace("_", " ") for metric in metrics]
  return markdown(("row", "seeds", *names, f"{names[0]}, each seed"), body)


def studies_table(*files: str) -> str:
  """The claims of studies and what came of them; differences in points."""
  body = []
  for file in files:
    raw = json.loads((RESULTS / f"{file}.json").read_text())
    for i, each in enumerate(raw["verdicts"]):
      question = raw["question"].partition(":")[0] if i == 0 else ""
      number = "-" if each["mean"] is None else f"{100 * each['mean']:+.1f}"
      spread = "" if each["ci95"] is None else f" ± {100 * each['ci95']:.1f}"
      body.append((question, each["claim"], number + spread, f"**{each['verdict']}**"))
  return markdown(("", "claim", "difference, points", "verdict"), body)


def study_table(file: str, metric: str) -> str:
  """One metric of a study, arms down and levels across; names of rows are "ARM at FACTOR LEVEL"."""
  rows = rows_of(file)
  split = {name: name.split(" at ", 1) for name in rows}
  arms, levels = (list(dict.fromkeys(pair[i] for pair in split.values())) for i in (0, 1))
  cell = lambda arm, level: shown(rows.get(f"{arm} at {level}", {}).get(metric))
  body = [(arm, *(cell(arm, level) for level in levels)) for arm in arms]
  return markdown((metric.replace("_", " "), *levels), body)


def three_digits(value: float) -> str:
  """A number with three digits at least, and no exponent."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def measured_table(file: str) -> str:
  """Every number of a file of parts, and the aims that it names: {part: {measure: [">=", 5]}}."""
  raw = json.loads((RESULTS / f"{file}.json").read_text())
  aims = raw.pop("aims", {})
  body = []
  for part, numbers in raw.items():
    for i, (name, value) in enumerate(numbers.items()):
      sign, bound = aims.get(part, {}).get(name, ("", 0.0))
      met = {"": "", ">=": value >= bound, "<=": value <= bound}[sign]
      aim = f"{sign} {bound:g}: {'reached' if met else '**not reached**'}" if sign else ""
      body.append(("" if i else part, name.replace("_", " "), three_digits(value), aim))
  return markdown(("part", "measure", "value", "aim"), body)


def speed_table() -> str:
  """Our CPU time divided by a peer's."""
  body = []
  for ratio in claims.SPEED:
    raw = json.loads((RESULTS / f"{ratio.file}.json").read_text())
    value = _at(raw, ratio.path) / (_at(raw, ratio.over) if ratio.over else 1.0)
    link = f"[{ratio.file}](benchmarks/results/{ratio.file}.md)"
    body.append((ratio.text, ratio.peer, f"{value:.2f}", link))
  return markdown(("CPU time", "beside", "ours / peer's", "log"), body)


def _at(tree, path: Sequence[str | int]) -> float:
  for key in path:
    tree = tree[key]
  return float(tree)


def notebooks_line() -> str:
  """The README's line of notebooks, each of which opens in Colab."""
  return ",\n".join(f"[{name}]({refresh.colab(name)})" for name in METHODS) + "\n"


KINDS = {
  "notebooks": notebooks_line,
  "methods": methods_table,
  "index": index_table,
  "verdicts": verdicts_table,
  "expectations": expectations_table,
  "rows": rows_table,
  "studies": studies_table,
  "study": study_table,
  "measured": measured_table,
  "speed": speed_table,
}


# --- pages ----------------------------------------------------------------------------------------


def filled(text: str) -> str:
  """A page with all its tables made anew."""

  def table(match: re.Match[str]) -> str:
    kind, *arguments = match[2].split()
    return f"{match[1]}{KINDS[kind](*arguments)}{match[3]}"

  return TABLE.sub(table, text)


def pages() -> list[Path]:
  """Every page that may have tables."""
  return [README, *sorted(RESULTS.glob("*.md"))]


def stale() -> list[Path]:
  """Pages that differ from their JSON."""
  return [page for page in pages() if page.read_text() != filled(page.read_text())]


def main() -> int:
  """Writes the tables, or names the pages that are not up to date."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--write", action="store_true", help="write the tables")
  what.add_argument("--check", action="store_true", help="name pages that are not up to date")
  args = parser.parse_args()
  different = stale()
  for page in different:
    print(
      f"{page.relative_to(README.parent)} {'written' if args.write else 'differs from its JSON'}"
    )
    if args.write:
      page.write_text(filled(page.read_text()))
  return 1 if different and args.check else 0


if __name__ == "__main__":
  sys.exit(main())
