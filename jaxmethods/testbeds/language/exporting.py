"""A tuned causal LM in the formats of others: PEFT's adapter files, Hugging Face checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path

from jaxmethods import trees
from jaxmethods.adapters import peft_format
from jaxmethods.adapters.peft_prompts import prompt_to_peft
from jaxmethods.data.adapter_files import write_peft
from jaxmethods.data.model_sources import LoadedLM, save_causal_lm, save_tokenizer
from jaxmethods.data.model_tokenizers import Tokenizer
from jaxmethods.models.causal_lm import table
from jaxmethods.runtime.experiment import Export
from jaxmethods.testbeds.language.tuners import Way
from jaxmethods.tuning.tuner import TuningState


def export_of(way: Way, loaded: LoadedLM, tokenizer: Tokenizer) -> Export:
  """Tells in which formats a model can leave.

  "peft": adapter files; "hf": the model before tuning, with these in its folder `adapter`; "merged": one
  checkpoint. Sparse and full updates have the last two, which are then the same.
  """
  has_peft, merges = _has_peft(way), way.tuner.finalize is not None
  formats = [
    *(["peft"] if has_peft else []),
    *(["hf"] if has_peft or merges else []),
    *(["merged"] if merges else []),
  ]
  return Export(
    tuple(formats),
    functools.partial(_write, way, loaded, tokenizer),
    loaded.files.source.name,
    "PEFT has no such adapter" if not has_peft else "the update cannot be merged",
  )


def _has_peft(way: Way) -> bool:
  if way.adapter is not None:
    return way.adapter.settings["kind"] in peft_format.KINDS
  return way.inputs


def _write(
  way: Way, loaded: LoadedLM, tokenizer: Tokenizer, state: TuningState, form: str, folder: Path
) -> None:
  """Writes the folder of a format."""
  if form == "peft":
    _write_adapter(way, loaded, state, folder, _base(loaded))
    return
  if form == "merged" or not _has_peft(way):
    assert way.tuner.finalize is not None
    save_causal_lm(folder, loaded, way.tuner.finalize(*state.tuner))
  else:
    save_causal_lm(folder, loaded)
    _write_adapter(way, loaded, state, folder / "adapter", str(folder.resolve()))
  save_tokenizer(folder, loaded.files, tokenizer)


def _base(loaded: LoadedLM) -> str:
  """Returns what PEFT finds the base model by; "" where it is no folder."""
  origin = loaded.files.source.origin
  return origin if Path(origin).is_dir() else ""


def _write_adapter(way: Way, loaded: LoadedLM, state: TuningState, folder: Path, base: str) -> None:
  """Writes the files of an adapter, or of learned inputs."""
  trainable, frozen, _ = state.tuner
  if way.adapter is None:
    written = prompt_to_peft(trainable["input"], loaded.model.config, base=base)
  else:
    tree = trees.merge(trainable["adapter"], frozen["adapter"])
    written = peft_format.to_peft(way.adapter, tree, table(loaded.model.config), base=base)
  write_peft(folder, *written)
