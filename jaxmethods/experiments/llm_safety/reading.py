"""Texts of the user under the watermark detector and the perplexity filter: a step reads one text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods import folders
from jaxmethods.data.model_sources import LoadedLM, load_causal_lm, open_model
from jaxmethods.data.records import sealed
from jaxmethods.errors import InputError
from jaxmethods.experiments.llm_safety import figures
from jaxmethods.experiments.llm_safety.config import Config, resolved
from jaxmethods.methods.llm_safety import defences
from jaxmethods.runtime.experiment import Experiment
from jaxmethods.testbeds.language import text_tools, toy_world
from jaxmethods.testbeds.language.text_tools import Perplexity, Text

_CHUNK = 8  # texts that a model reads at once


class Line(NamedTuple):
  """A text as it joins the table: its number, and its columns."""

  number: jax.Array
  values: jax.Array


class Lines(NamedTuple):
  """The table so far, (texts, columns); NaN where nothing was read."""

  values: jax.Array


class Read(NamedTuple):
  """What a tool says of texts.

  Attributes:
    texts: of the user.
    columns: name -> value of every text; the verdict, if there is one, comes first.
    about: the line for reports.
  """

  texts: list[Text]
  columns: dict[str, np.ndarray]
  about: str


def experiment(config: Config) -> Experiment:
  """Reads the file of `text`.

  Raises:
    InputError: the file, a text in it, or the model.
  """
  read = (watermark if resolved(config.task) == "watermark" else perplexity)(config)
  names, values = list(read.columns), np.stack(list(read.columns.values()), 1).astype(np.float32)
  count = min(len(values), config.steps)

  def batches(step: int) -> Iterator[Line]:
    while True:
      yield Line(jnp.int32(step % count), jnp.asarray(values[step % count]))
      step += 1

  def step(state: Lines, line: Line) -> tuple[Lines, dict[str, jax.Array]]:
    return Lines(state.values.at[line.number].set(line.values)), {"loss": line.values[0]}

  def table(state: Lines) -> tuple[list[str], list[list[str]]]:
    rows = zip(read.texts, np.asarray(jax.device_get(state.values)), strict=True)
    return ["text", *names], [[text.where, *map(_number, row)] for text, row in rows]

  return Experiment(
    lambda key: Lines(jnp.full(values.shape, jnp.nan)),
    batches,
    step,
    lambda state, test: dict(zip(names, jnp.nanmean(state.values, 0), strict=True)),
    (),
    lambda state: {},
    count,
    read.about,
    lambda state: {"texts.md": f"{read.about}\n\n{figures.markdown(*table(state))}"},
    table=table,
  )


def watermark(config: Config) -> Read:
  """Looks for the watermark of the key; without a model, texts are ids of the toy world."""
  texts = text_tools.read_texts(folders.expanded(config.text))
  tokenizer, vocabulary, said = None, toy_world.VOCABULARY, "tokens of the toy world"
  if config.model:
    files = open_model(config.model)
    vocabulary = int(files.config["vocab_size"])
    said = sealed(config.model, files.source.digest, files.source.origin)
    tokenizer = files.tokenizer() if any(text.ids is None for text in texts) else None
  tokens = text_tools.tokens_of(texts, tokenizer, vocabulary)
  s = config.watermark
  found = text_tools.watermarks(texts, tokens, key=s.key, vocabulary=vocabulary, gamma=s.gamma)
  columns = {
    "marked": found.z > s.threshold, "z": found.z, "p_value": found.p_value,
    "pairs": found.scored, "green": found.green, "tokens": np.array([len(ids) for ids in tokens]),
  }  # fmt: skip
  about = (
    f"{len(texts)} texts of {config.text}, {said}; marked: z > {s.threshold:g} at gamma {s.gamma:g}, "
    "every distinct pair of tokens counts once"
  )
  return Read(texts, {name: np.asarray(x) for name, x in columns.items()}, about)


def perplexity(config: Config) -> Read:
  """Measures texts under a model; what lies above a quantile of benign texts is blocked."""
  if not config.model:
    raise InputError("model: the filter measures texts under a model: name one, such as hf:PATH")
  loaded = load_causal_lm(config.model)
  texts, lengths, found = _measured(loaded, config, "text", config.text)
  columns = {"log_perplexity": found.mean, "window": found.window, "tokens": lengths}
  said = "no benign texts were given, so that nothing is blocked"
  if config.benign:
    others, _, normal = _measured(loaded, config, "benign", config.benign)
    share = config.jailbreak.false_positives
    above = [
      np.asarray(defences.blocked(jnp.asarray(x), jnp.asarray(y), false_positives=share))
      for x, y in zip(found, normal, strict=True)
    ]
    columns = {"blocked": np.logical_or(*above), **columns}
    said = (
      f"blocked: on the whole or in a window above the {100 * (1 - share):g} % quantile of "
      f"{len(others)} texts of {config.benign}"
    )
  about = (
    f"{len(texts)} texts of {config.text} under {config.model}, windows of {config.window} tokens"
  )
  return Read(texts, columns, f"{about}; {said}")


def _measured(
  loaded: LoadedLM, config: Config, name: str, file: str
) -> tuple[list[Text], np.ndarray, Perplexity]:
  """Returns the texts of a file, their lengths in tokens, and their perplexity."""
  texts = text_tools.read_texts(folders.expanded(file), name=name)
  tokenizer = loaded.files.tokenizer() if any(text.ids is None for text in texts) else None
  tokens = text_tools.tokens_of(texts, tokenizer, int(loaded.files.config["vocab_size"]))
  found = text_tools.perplexities(texts, tokens, loaded, window=config.window, chunk=_CHUNK)
  return texts, np.array([len(ids) for ids in tokens]), found


def _number(value: float) -> str:
  if np.isnan(value):
    return "-"
  return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
