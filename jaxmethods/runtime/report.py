"""report.html: one page that shows a run to a person; its pictures are in it, and beside it as PNGs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from jaxmethods.runtime import meanings, metric_log, workdir
from jaxmethods.runtime.experiment import Values

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; }
td:last-child:not(:nth-child(-n+2)) { white-space: nowrap; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; }
figcaption, .about, .paper, .constant { color: #555; }
.short { background: #b3261e; color: white; padding: .6rem 1rem; font-weight: 600; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""
_PLOT: Any = {  # matplotlib types it by a list of all its keys
  "figure.dpi": 120,
  "font.size": 11,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.alpha": 0.25,
}
_COLUMNS = 2
_LEGEND = 12  # a panel with more curves shows their spread, not their names


class Facts(NamedTuple):
  """What a page says of a run beside its results.

  Attributes:
    title: name of the method, as the paper has it.
    paper: authors, place, year.
    summary: what the method does.
    short: whether it was a quick look, which is no result.
    run: (name, value) of the command, the settings that differ from the default, device, time, date.
  """

  title: str
  paper: str = ""
  summary: str = ""
  short: bool = False
  run: Sequence[tuple[str, str]] = ()


def write(
  directory: Path,
  *,
  facts: Facts,
  about: str,
  step: int,
  metrics: Mapping[str, object],
  figures: Mapping[str, Figure],
  files: Mapping[str, str | bytes],
) -> Path:
  """Writes report.html, its PNGs and the files into `directory`; returns the page.

  Args:
    directory: a workdir; the curves come from its metrics.jsonl.
    facts: what else the page says.
    about: the data: what, how many, where from, real or generated.
    step: step of the state that was evaluated.
    metrics: result of the evaluation.
    figures: the experiment's own pictures.
    files: its own files, name -> text or bytes.
  """
  lines = metric_log.read(directory) if (directory / metric_log.METRICS).exists() else []
  pictures, still = dict(figures), constants(lines) if len(lines) > 1 else {}
  if len(lines) > 1 and _panels(lines, still):
    pictures = {"curves": curves(lines), **pictures}
  table = _table(("metric", "value", "meaning", ""), _explained(metrics))
  body = [f"<h2>Results after step {step:,}</h2>", table]
  still = {name: value for name, value in still.items() if name not in metrics}
  if still:
    listed = ", ".join(f"{name} {meanings.short(value)}" for name, value in still.items())
    body.append(f"<p class='constant'>The same at every step: {html.escape(listed)}.</p>")
  for name, figure in pictures.items():
    body.append(_picture(directory, name, figure))
    body += _explained_curves(lines, metrics) if name == "curves" else []
  for name, content in files.items():
    if isinstance(content, bytes):
      workdir.write_bytes(directory / name, content)
    else:
      workdir.write_text(directory / name, content)
    body.append(f'<p><a href="{html.escape(name)}">{html.escape(name)}</a></p>')
  return _page(directory, facts, about, body)


def write_comparison(
  directory: Path,
  *,
  title: str,
  about: str,
  facts: Facts | None = None,
  header: Sequence[str],
  rows: Iterable[Sequence[str]],
  figures: Mapping[str, Figure],
) -> Path:
  """Writes the page of a comparison: its table, the meaning of its columns, and its pictures."""
  meant = [(name, *meanings.metric(name)) for name in header]
  explained = [row for row in meant if row[1]]
  body = [f"<h2>{html.escape(title)}</h2>", _table(header, rows)]
  body += [_table(("metric", "meaning", ""), explained)] if explained else []
  body += [_picture(directory, *named) for named in figures.items()]
  return _page(directory, facts or Facts(title), about, body)


def metric_rows(metrics: Mapping[str, object]) -> list[tuple[str, str]]:
  """Returns (name, text) of every metric."""
  return [(name, _text(value)) for name, value in metrics.items()]


def _explained(metrics: Mapping[str, object]) -> list[tuple[str, str, str, str]]:
  """Returns (name, text, meaning, better) of every metric; parts point to their whole."""
  rows = []
  for name, value in metrics.items():
    whole, _, part = name.rpartition("/")
    meaning, better = meanings.metric(name)
    if meaning and whole in metrics:
      meaning = f"the same of {part.replace('_', ' ')}"
    rows.append((name, _text(value), meaning, better))
  return rows


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
  """Prints a table to the terminal; on its side, a line a column, where it is too wide but so fits."""
  console = Console(highlight=False)
  if not console.is_terminal:
    console = Console(highlight=False, width=160)  # a file is not 80 columns wide
  lines: list[Sequence[str]] = [header, *rows]
  turned: list[Sequence[str]] = list(zip(*lines, strict=True))
  if _width(lines) > console.width and _width(turned) < _width(lines):
    lines = turned
  table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
  for name in lines[0]:
    table.add_column(name, overflow="fold")
  for line in lines[1:]:
    table.add_row(*line)
  console.print(table)


def _width(lines: Sequence[Sequence[str]]) -> int:
  """Characters that a table takes, with the blanks around its cells."""
  return sum(2 + max(map(len, column)) for column in zip(*lines, strict=True))


def curves(lines: Sequence[Values]) -> Figure:
  """Draws every scalar of metrics.jsonl against the step; `group/name` ones share a panel."""
  panels = _panels(lines, constants(lines))
  rows = max(-(-len(panels) // _COLUMNS), 1)
  with plt.rc_context(_PLOT):
    figure, axes = plt.subplots(
      rows, _COLUMNS, figsize=(9, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
      for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        marker = "o" if len(points) < 30 else ""
        label = name.rpartition("/")[2]
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)
      if 1 < len(names) <= _LEGEND:
        axis.legend(
          fontsize=8, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.3)
        )
      axis.set(title=title.replace("_", " "), xlabel="step")
      axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat[len(panels) :]:
      axis.set_axis_off()
    # Inches: a label must not touch the title below it.
    figure.set_layout_engine("constrained", h_pad=0.15)
  return figure


def constants(lines: Sequence[Values]) -> dict[str, float]:
  """Returns the scalars that have one value at all steps, two at least; a group only as a whole."""
  scalars = _scalars(lines)
  moving = {
    name.rpartition("/")[0] or name
    for name, values in scalars.items()
    if len(values) < 2 or len(set(values)) > 1
  }
  return {n: v[0] for n, v in scalars.items() if (n.rpartition("/")[0] or n) not in moving}


def _explained_curves(lines: Sequence[Values], known: Iterable[str]) -> list[str]:
  """Explains the curves that the table of results does not: parts of the page."""
  names = {name.partition("/")[0] for name in _scalars(lines)} - set(known)
  meant = [(name, *meanings.metric(name)) for name in sorted(names)]
  meant = [row for row in meant if row[1]]
  return [_table(("curve", "meaning", ""), meant)] if meant else []


def _scalars(lines: Sequence[Values]) -> dict[str, list[float]]:
  """Returns {name: finite values} of what can be drawn."""
  values: dict[str, list[float]] = {}
  for line in lines:
    for name, value in line.items():
      if name not in ("step", "seconds") and isinstance(value, int | float):
        values.setdefault(name, []).append(value)
  return values


def _panels(lines: Sequence[Values], still: Mapping[str, float]) -> dict[str, list[str]]:
  """Returns {title: metrics}; `group/name` ones share a panel, constant or lone values have none."""
  panels: dict[str, list[str]] = {}
  scalars = _scalars(lines)
  for name, values in scalars.items():
    # One value is no curve; it stands in the table of results.
    if name not in still and len(values) > 1:
      group, _, single = name.rpartition("/")
      panels.setdefault(f"{group}, each" if group else single, []).append(name)
  alone = {
    title
    for title, names in panels.items()
    if len(names) == 1 and scalars.get(names[0].rpartition("/")[0]) == scalars[names[0]]
  }
  return {title: names for title, names in panels.items() if title not in alone}


def intervals(rows: Sequence[Values], metrics: Sequence[str], *, highlight: str = "") -> Figure:
  """Draws mean, 95% interval and single seeds of every row, one panel for each metric.

  Args:
    rows: entries {"name", "metrics": {metric: {"mean", "ci95", "values"}}}, best read top down.
    metrics: which metrics to draw.
    highlight: name of the row in the accent colour: the method among its rivals.
  """
  with plt.rc_context(_PLOT):
    figure, axes = plt.subplots(
      1,
      len(metrics),
      figsize=(1.5 + 4.2 * len(metrics), 1.5 + 0.5 * len(rows)),
      sharey=True,
      squeeze=False,
      layout="constrained",
    )
    for axis, metric in zip(axes.flat, metrics, strict=True):
      _interval_panel(axis, rows, metric, highlight)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0, 0].invert_yaxis()
  return figure


def _interval_panel(axis: Axes, rows: Sequence[Values], metric: str, highlight: str) -> None:
  for height, row in enumerate(rows):
    result = row["metrics"].get(metric)
    if result is None or result["mean"] is None:
      continue
    color = "C1" if row["name"] == highlight else "C0"
    values = result["values"]
    axis.plot(
      values, [height + 0.22] * len(values), "o", ms=4.5, alpha=0.5, color=color, mec="none"
    )
    axis.errorbar(
      result["mean"], height, xerr=result["ci95"], fmt="o", ms=7, capsize=4, lw=2, color=color
    )
  axis.set(
    title=metric.replace("_", " "),
    xlabel="mean and 95 % interval; below: each seed",
    ylim=(-0.6, len(rows) - 0.4),
  )
  axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
  axis.margins(x=0.08)
  axis.grid(False, axis="y")


def _picture(directory: Path, name: str, figure: Figure) -> str:
  """Writes a PNG and returns it as a part of the page, which needs no file beside it."""
  stream = io.BytesIO()
  figure.savefig(stream, format="png", dpi=120, facecolor="white")
  panels = [title for axis in figure.axes if (title := axis.get_title())]
  plt.close(figure)
  workdir.write_bytes(directory / f"{name}.png", stream.getvalue())
  caption = html.escape(meanings.caption(name, panels))
  inline = base64.b64encode(stream.getvalue()).decode()
  return (
    f'<figure id="{html.escape(name)}"><img src="data:image/png;base64,{inline}" alt="{caption}">'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  def line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

  body = "\n".join(line(row, "td") for row in rows)
  return f"<table>\n{line(header, 'th')}\n{body}\n</table>"


def _page(directory: Path, facts: Facts, about: str, body: Sequence[str]) -> Path:
  title = html.escape(facts.title)
  top = [f"<p class='about'>{html.escape(about)}</p>"]
  if facts.short:
    top.append("<p class='short'>A quick look (--short): no result.</p>")
  top.append(f"<h1>{title}</h1>")
  if facts.paper:
    top.append(f"<p class='paper'>{html.escape(facts.paper)}: {html.escape(facts.summary)}</p>")
  end = ["<h2>The run</h2>", _table(("", ""), facts.run)] if facts.run else []
  text = "\n".join([*top, *body, *end])
  page = directory / workdir.REPORT
  workdir.write_text(
    page,
    "<!doctype html>\n<html lang='en'><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width'>"
    f"<title>{title}</title>\n<style>{_STYLE}</style>\n{text}\n</html>\n",
  )
  return page


def _text(value: object) -> str:
  if isinstance(value, list):
    cells = np.ravel(np.array(value, object))
    return ", ".join("-" if v is None else f"{v:.3g}" for v in cells)
  return meanings.short(value) if isinstance(value, int | float) else "not finite"
