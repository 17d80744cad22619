"""Words for a report: the meaning of metrics and which way is better, captions, short numbers."""

from __future__ import annotations

from collections.abc import Mapping

_HIGHER, _LOWER = "higher is better", "lower is better"

# By the name of the metric, without its group; a name that is not here is looked for by its ending.
_METRICS: Mapping[str, tuple[str, str]] = {
  "loss": ("training loss of the step", _LOWER),
  "accuracy": ("share of examples that are judged right", _HIGHER),
  "test_accuracy": ("share of test examples that are classified right", _HIGHER),
  "validation_accuracy": ("share of validation examples that are classified right", _HIGHER),
  "training_accuracy": (
    "share of the training examples that are classified right; no test",
    _HIGHER,
  ),
  "clean_accuracy": ("share of uncorrupted test images that are classified right", _HIGHER),
  "corrupted_accuracy": ("share of corrupted test images that are classified right", _HIGHER),
  "spread": ("standard deviation of the accuracy over domains or clients", _LOWER),
  "auroc": (
    "chance that a right answer has a better score than a wrong one; 0.5 is chance",
    _HIGHER,
  ),
  "aupr": ("area under precision and recall, right answers being positive", _HIGHER),
  "aupr_incorrect": ("area under precision and recall, wrong answers being positive", _HIGHER),
  "fpr95": ("share of wrong answers accepted where 95 % of the right ones are", _LOWER),
  "fpr95_incorrect": ("share of right answers rejected where 95 % of the wrong ones are", _LOWER),
  "answered": ("share of texts that come to an answer", _HIGHER),
  "standing_paths": ("share of texts whose path through the layers does not move", ""),
  "f1": ("harmonic mean of precision and recall", _HIGHER),
  "precision": ("share of what was found that is meant to be found", _HIGHER),
  "recall": ("share of what is there to be found that was found", _HIGHER),
  "removed": ("share of the training examples that were removed", ""),
  "attack_before": ("success of the attack before the defence", _LOWER),
  "attack_after": ("success of the attack after the defence", _LOWER),
  "clean_before": ("accuracy on clean data before the defence", _HIGHER),
  "clean_after": ("accuracy on clean data after the defence", _HIGHER),
  "H": ("harmonic mean of Source and Target", _HIGHER),
  "Source": ("mean score on the old tasks, which are not tuned", _HIGHER),
  "Target": ("score on the new task, which is tuned", _HIGHER),
  "E": ("gain on the new task over the pretrained model", _HIGHER),
  "F": ("change on the old tasks; negative: forgotten", _HIGHER),
  "O": ("E + F", _HIGHER),
  "Avg": ("mean of Source and Target", _HIGHER),
  "Mean": ("mean over the tuned tasks", _HIGHER),
  "mergeable": ("1 if the update can be merged into the weights, else 0", ""),
  "params_percent": ("trained parameters, per cent of the model", _LOWER),
  "bytes_up": ("bytes that clients send in a round", _LOWER),
  "bytes_down": ("bytes that clients receive in a round", _LOWER),
  "rejected": ("updates that were not finite and left out", _LOWER),
  "temperature": ("temperature of the softmax", ""),
  "seconds": ("wall time of the step", _LOWER),
}
_ENDINGS: Mapping[str, tuple[str, str]] = {
  "accuracy": ("a share of examples that are judged right", _HIGHER),
  "loss": ("a part of the loss", _LOWER),
  "entropy": ("an entropy, in nats", ""),
  "norm": ("length of a vector", ""),
}
_CAPTIONS: Mapping[str, str] = {
  "curves": "Metrics over the steps of the run.",
  "comparison": "Mean and 95 % interval of every row; the small dots are single seeds.",
  "clients": "What every client holds and what it reaches.",
  "tradeoff": "New task against old tasks: the upper right corner is best.",
  "accuracy": "Accuracy on every part of the test.",
  "corruptions": "Images as the clients see them.",
  "pseudo_graphs": "Generated graphs before and after their optimisation.",
  "easy_to_hard": "How complex the generated graphs are, from the first to the last.",
  "spectra": "Filters that the clients learnt over the eigenvalues of their graphs.",
  "energy": "Kinetic energy over the layers, for right and wrong answers.",
  "auroc": "How well each score tells right from wrong answers.",
  "entropies": "Attention entropy of clean and poisoned examples.",
}


def metric(name: str) -> tuple[str, str]:
  """Returns (meaning, which way is better) of a metric; ("", "") of one that nobody described."""
  group, _, part = name.rpartition("/")
  if group and (found := metric(group))[0]:
    return f"{found[0]}: {part.replace('_', ' ')}", found[1]
  if name in _METRICS:
    return _METRICS[name]
  ending = name.rpartition("_")[2]
  if ending in _ENDINGS:
    return _ENDINGS[ending]
  return "", ""


def caption(name: str, panels: list[str]) -> str:
  """Returns a sentence on a picture: what is known of its name, else its name and its panels."""
  if name in _CAPTIONS:
    return _CAPTIONS[name]
  words = name.replace("_", " ").replace("/", ", ")
  panels = [one for panel in panels if (one := " ".join(panel.split())) != words]
  listed = "; ".join(panels[:4])
  more = "; ..." if len(panels) > 4 else ""
  return f"{words[:1].upper()}{words[1:]}{f': {listed}{more}' if listed else ''}."


def short(value: float) -> str:
  """Returns a number with at most four digits that say something."""
  if value != value or value in (float("inf"), float("-inf")):
    return "not finite"
  rounded = float(f"{value:.4g}")
  return f"{rounded:,.0f}" if 1e4 <= abs(rounded) < 1e12 else f"{value:.4g}"
