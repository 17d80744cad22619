"""The model card of an export: data, settings, figures, how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from jaxmethods.runtime import meanings
from jaxmethods.runtime.report import Facts, metric_rows

NAME = "README.md"
MADE_BY = "library_name: jaxmethods"
_LOADING = {
  "peft": "from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, FOLDER)",
  "hf": (
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(FOLDER)  # the model before tuning; with an adapter:\n"
    "from peft import PeftModel\n"
    'model = PeftModel.from_pretrained(model, FOLDER + "/adapter")'
  ),
  "merged": (
    "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
  ),
}


def text(
  *, facts: Facts, about: str, step: int, metrics: Mapping[str, object], form: str, base: str
) -> str:
  """Returns the card.

  Args:
    facts: of the run.
    about: the data: what, how many, where from, real or generated.
    step: training steps that were done.
    metrics: result of the evaluation; epsilon and delta where the run was private.
    form: "peft", "hf" or "merged".
    base: name of the model that was tuned.
  """
  rows = [(name, value, meanings.metric(name)[0]) for name, value in metric_rows(metrics)]
  table = ["| figure | value | meaning |", "|---|---|---|"]
  table += [f"| {name} | {value} | {meaning} |" for name, value, meaning in rows]
  settings = [f"| {name} | {_cell(value)} |" for name, value in facts.run]
  lines = ["---", MADE_BY, "tags: [jaxmethods]", "---", "", f"# {base}, tuned by {facts.title}", ""]
  if facts.short:
    lines += ["**A quick look (`--short`), no result.**", ""]
  lines += [
    f"{facts.summary}. {facts.paper}", "", "## Data", "", about, "", f"## Figures after step {step:,}",
    "", *table, "", "## Settings", "", "| | |", "|---|---|", *settings, "", "## Loading", "",
    "```python", _LOADING[form], "```", "",
  ]  # fmt: skip
  private = "epsilon" in metrics
  if private:
    lines += [
      "## Privacy",
      "",
      "Epsilon and delta hold for one training example added or removed, for the trained weights alone: "
      "training losses in the log are not private, and noise comes from jax.random, which is no "
      "cryptographic generator.",
      "",
    ]
  return "\n".join(lines)


def _cell(value: str) -> str:
  return value.replace("|", r"\|").replace("\n", " ")
