"""Words for a report: the meaning of metrics and which way is better, captions, short numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

_HIGHER, _LOWER = "higher is better", "lower is better"

# By the name of the metric, without its group; a name that is not here is looked for by its ending.
_METRICS: Mapping[str, tuple[str, str]] = {
  "loss": ("training loss of the step", _LOWER),
  "accuracy": ("share of examples that are judged right", _HIGHER),
  "test_accuracy": ("share of test examples that are classified right", _HIGHER),
  "validation_accuracy": ("share of validation examples that are classified right", _HIGHER),
  "preference_norm": ("length of the clients' preferences; near 0 they do nothing", ""),
  "training_accuracy": (
    "share of the training examples that are classified right; no test",
    _HIGHER,
  ),
  "token_accuracy": ("share of the tokens of the clients' test answers that are foretold", _HIGHER),
  "published_accuracy": ("test_accuracy on the source's own test, of one model for all", _HIGHER),
  "client_accuracy": ("mean over clients of the accuracy on a client's own test", _HIGHER),
  "low_accuracy": ("accuracy that nine tenths of the clients reach on their own tests", _HIGHER),
  "client_loss": ("mean cross-entropy on the clients' own tests", _LOWER),
  "drift": ("how far a client's parameters go in a round, mean over clients", ""),
  "clean_accuracy": ("share of uncorrupted test images that are classified right", _HIGHER),
  "corrupted_accuracy": ("share of corrupted test images that are classified right", _HIGHER),
  "spread": ("standard deviation of the accuracy over domains or clients", _LOWER),
  "auroc": (
    "chance that a right answer has a better score than a wrong one; 0.5 is chance",
    _HIGHER,
  ),
  "auroc_same_length": (
    "the same among answers of equally many reasoning tokens, so that length tells nothing",
    _HIGHER,
  ),
  "aupr": ("area under precision and recall, right answers being positive", _HIGHER),
  "aupr_incorrect": ("area under precision and recall, wrong answers being positive", _HIGHER),
  "fpr95": ("share of wrong answers accepted where 95 % of the right ones are", _LOWER),
  "fpr95_incorrect": ("share of right answers rejected where 95 % of the wrong ones are", _LOWER),
  "test_loss": ("mean cross-entropy of the tokens of test answers", _LOWER),
  "task_loss": ("training loss of the step without the penalty", _LOWER),
  "before_accuracy": ("the accuracy of the model before tuning", ""),
  "before_test_loss": ("the test loss of the model before tuning", ""),
  "epsilon": ("privacy loss of the whole run, see delta", _LOWER),
  "delta": ("chance that the privacy loss is exceeded", _LOWER),
  "answered": ("share of texts that come to an answer", _HIGHER),
  "standing_paths": ("share of texts whose path through the layers does not move", ""),
  "f1": ("harmonic mean of precision and recall", _HIGHER),
  "precision": ("share of what was found that is meant to be found", _HIGHER),
  "recall": ("share of what is there to be found that was found", _HIGHER),
  "removed": ("share of the training examples that were removed", ""),
  "kept": ("training examples that were kept", ""),
  "attack_success": ("share of test images with trigger that get the planted answer", _LOWER),
  "layers_used": ("layers whose attention separates the examples in two groups", ""),
  "layers_reversed": ("layers of them where the suspects have the greater entropy", ""),
  "saved_by_guard": ("examples that only the guard kept", ""),
  "missing": ("attention entropies that were missing", _LOWER),
  "null_separation": ("separation that data without poison reach; layers below are not used", ""),
  "separation": ("how far the two groups of a layer are apart", ""),
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
  "worst_domain": ("test accuracy of the domain where it is lowest", _HIGHER),
  "macro_f1": ("mean over the classes of the harmonic mean of precision and recall", _HIGHER),
  "own_accuracy": (
    "mean over the clients of the accuracy on test examples like their own",
    _HIGHER,
  ),
  "agreement": ("mean cosine between the changes that clients made and their average", ""),
  "alignment": ("part of the loss that brings a client's features to the common ones", _LOWER),
  "distillation": ("part of the loss that brings the answers of clients together", _LOWER),
  "graphs": ("pseudo-graphs that the student has seen", ""),
  "generation": ("a part of the loss of the generation", _LOWER),
  "teacher_accuracy": ("share of test graphs that the teacher classifies right", _HIGHER),
  "pseudo_accuracy": ("share of pseudo-graphs that the teacher puts into their class", _HIGHER),
  "pseudo_gap": ("distance of the batch statistics of pseudo-graphs from the teacher's", _LOWER),
  "pseudo_edges": ("mean number of edges of a pseudo-graph", ""),
  "structure_parameters": ("pairs of nodes whose edge is learnt, over all pseudo-graphs", _LOWER),
  "average": ("mean accuracy in per cent over all tasks, after every task", _HIGHER),
  "last": ("accuracy in per cent after the last task, mean over the tasks", _HIGHER),
  "transfer": ("accuracy in per cent on tasks that have not been trained on yet", _HIGHER),
  "learnt": ("accuracy in per cent on every task when it has just been trained on", _HIGHER),
  "forget": ("change in per cent points from when a task was trained on to the end", _HIGHER),
  "mAP": ("mean average precision of the searches, per cent", _HIGHER),
  "mAP_at_R": ("precision among the first R with R right photographs, averaged, per cent", _HIGHER),
  "mINP": ("share of right ones up to the last right photograph, per cent", _HIGHER),
  "colour": ("accuracy on questions for a colour, per cent", _HIGHER),
  "shape": ("accuracy on questions for a shape, per cent", _HIGHER),
  "yesno_colour": ("accuracy on yes-no questions on colours, per cent", _HIGHER),
  "yesno_shape": ("accuracy on yes-no questions on shapes, per cent", _HIGHER),
  "digits": ("accuracy on the digits, per cent", _HIGHER),
  "counting": ("accuracy on counting, per cent", _HIGHER),
  "balance": ("mean of utility and privacy, per cent", _HIGHER),
  "utility": ("answers that are right where an answer is allowed, per cent", _HIGHER),
  "privacy_choice": ("multiple choices that are refused where they must be, per cent", _HIGHER),
  "privacy_open": ("open questions that are refused where they must be, per cent", _HIGHER),
  "over_refusal": ("share of allowed questions that are refused", _LOWER),
  "unanswered": ("share of questions without any answer", _LOWER),
  "field_leak": ("share of barred values that stand in texts that agents were sent", _LOWER),
  "attack": ("success of the attack without a defence, or of a row", _LOWER),
  "defended": ("success of the attack after the defence", _LOWER),
  "marked": ("share of texts whose z passes the threshold of the watermark", ""),
  "blocked": ("share of texts that the perplexity filter blocks", ""),
  "log_perplexity": ("mean -log p of a token under the model, in nats", ""),
  "taint_leak": ("share of barred values that went into texts that agents were sent", _LOWER),
  "cases": ("share of conversations in which a barred value was told", _LOWER),
  "audit_gap": ("share that leaks in messages less share that leaks in answers", _LOWER),
  "missed": ("share of leaking conversations whose answer shows nothing", _LOWER),
  "embedding_leak_auc": (
    "chance that messages are nearer to a barred value than to another's",
    _LOWER,
  ),
  "reidentified_mrr": ("mean of 1 / rank of the user when users are sorted by likeness", _LOWER),
  "reidentified_top1": ("share of conversations whose user is the likest of all", _LOWER),
  "membership_auc": ("chance that the user is likelier than another one; 0.5 is chance", _LOWER),
  "letters_tell": ("share of barred values that the chosen letters give away", _LOWER),
  "letters_majority": ("the same by always guessing the most frequent value", ""),
  "characters": ("characters that agents were sent in a conversation", _LOWER),
  "entries": ("entries that the server returned in a conversation", _LOWER),
  "seconds": ("wall time of the step", _LOWER),
  # --- human_interaction
  "fid": ("distance between evaluator's features of drawn and real motions", _LOWER),
  "diversity": ("mean distance of two motions in the evaluator's features; real ones' is best", ""),
  "multimodality": ("the same of two motions of one condition", _HIGHER),
  "interval": ("half width of the 95 % interval over replications", _LOWER),
  "nearest_train_cm": ("distance to the nearest training clip, cm; 0 is a copy", ""),
  "foot_sliding": ("way of feet that should rest, mm a frame (OMOMO)", _LOWER),
  "sliding_share": ("frames in which the lowest joint slides, per cent (CHOIS)", _LOWER),
  "skating": ("frames in which a foot on the ground skates, per cent (GMD)", _LOWER),
  "pfc": ("physical foot contact (EDGE)", _LOWER),
  "bone_change_cm": ("standard deviation of the bones' lengths over a clip, cm", _LOWER),
  "penetration_cm": ("mean depth of bodies in each other, cm", _LOWER),
  "penetration_share": ("frames in which bodies penetrate, per cent", _LOWER),
  "contact_share": ("frames in which the two persons touch, per cent; real clips' is best", ""),
  # --- llm_safety
  "clean_lost": ("share of clean training examples that the filter drops too", _LOWER),
  "exposure": ("bits by which planted numbers are likelier than others (exposure)", _LOWER),
  "extracted": ("share of planted numbers that rank first among all", _LOWER),
  "tpr_at_5": ("share of members found at 5 % false alarms", _LOWER),
  "min_k_auc": ("chance that a member has likelier rarest tokens than a stranger", _LOWER),
  "audit_epsilon": ("lower bound of epsilon by the attack; never above the accountant's", ""),
  "member_nll": ("mean negative log-likelihood of a member's token, nats", ""),
  "facts": ("share of the facts that are still answered", _HIGHER),
  "projected": ("share of the layers whose update is projected", ""),
  "margin": ("mean implicit reward of the chosen answer above the rejected one", _HIGHER),
  "chosen_change": ("mean change of the chosen answer's log-probability, nats", ""),
  "paraphrase": ("share of edits that hold in other words", _HIGHER),
  "neighbourhood": ("share of neighbouring facts that stay", _HIGHER),
  "other_relations": ("share of the subject's other facts that stay", _HIGHER),
  "score": ("harmonic mean of success, paraphrase and neighbourhood", _HIGHER),
  "forget_probability": ("mean probability of the answers to forget", _LOWER),
  "retain_facts": ("share of the facts to keep that are answered", _HIGHER),
  "chat": ("share of chat that is answered as before", _HIGHER),
  "log10_quality": ("log10 of the p-value: no different from a model that never saw them", _HIGHER),
  "forget_truth": ("truth ratio of the facts to forget", _HIGHER),
  "detected": ("share of attacks that the filter blocks", _HIGHER),
  "false_alarms": ("share of benign prompts that it blocks", _LOWER),
  "naive_attack": ("injected orders obeyed, plainly written", _LOWER),
  "delimiter_attack": ("injected orders obeyed, behind a forged delimiter", _LOWER),
  "naive_utility": ("users' orders obeyed beside a plain injection", _HIGHER),
  "delimiter_utility": ("users' orders obeyed beside a forged delimiter", _HIGHER),
  "z": ("mean z-score of the watermark over distinct pairs of tokens", _HIGHER),
  "z_all": ("mean z-score over every pair of tokens, repeated ones too", _HIGHER),
  "nll": ("mean negative log-likelihood of a written token, nats", _LOWER),
}
_ENDINGS: Mapping[str, tuple[str, str]] = {
  "accuracy": ("a share of examples that are judged right", _HIGHER),
  "loss": ("a part of the loss", _LOWER),
  "entropy": ("an entropy, in nats", ""),
  "norm": ("length of a vector", ""),
}
# Endings that change what is counted.
_VARIANTS: Mapping[str, str] = {
  "_noss": "without photographs of the same sighting",
  "_output": "in final answers",
  "_messages": "in messages between agents",
  "_arguments": "in what agents ask the server",
  "_returns": "in what the server returns",
  "_memory": "in what agents keep",
  "_any": "anywhere",
  "_before": "before the defence",
}
_CAPTIONS: Mapping[str, str] = {
  "generations": "What the tuned model writes to the first prompts of the test; green: judged right.",
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
  "own_examples": "How many examples of every class each client holds.",
  "private_images": "How many images of every class each client holds.",
  "agreement": "Cosines between the changes that the clients made to the prompts in the last round.",
  "generated_embeddings": "Embeddings of one class: what clients hold, and what is generated for them.",
  "leaks": "Barred values that were told, by the way they took: found in texts, and by the record.",
  "scores": "Right answers where they are allowed, refusals where they are not.",
  "trade": "Leak against utility of every row: the upper left corner is best.",
  "matches": "Queries and the photographs that the model finds nearest.",
  "views": "Photographs and the high frequencies that are left of them.",
  "changed_entries": "Share of the entries of every layer that the tuning changed.",
  "importances": "Which entries matter to the old tasks, and which to the new one.",
  "update_density": "Share of entries that are not zero in the update of every layer.",
  "course": "Accuracy on every task while one task after the other is trained on.",
  "ranks": "Ranks that the tasks are given in every layer.",
  "entropy": "Spectral entropy of what every layer reads, task by task, over the layers.",
  "removed": "Examples that the defence removed, clean and poisoned.",
  "attention": "Attention to the image for clean and poisoned examples.",
  "kept": "Generated graphs at the end.",
  "entropies": "Attention entropy of clean and poisoned examples.",
}


def metric(name: str) -> tuple[str, str]:
  """Returns (meaning, which way is better) of a metric; ("", "") of one that nobody described."""
  group, _, part = name.rpartition("/")
  if group and (found := metric(group))[0]:
    return f"{found[0]}: {part.replace('_', ' ')}", found[1]
  if name in _METRICS:
    return _METRICS[name]
  if top := re.fullmatch(r"(?:rank|top)(\d+)", name):
    return f"queries with a right photograph among the first {top[1]}, per cent", _HIGHER
  for suffix, words in _VARIANTS.items():
    if name.endswith(suffix) and (meaning := metric(name.removesuffix(suffix)))[0]:
      return f"{meaning[0]}; {words}", meaning[1]
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
