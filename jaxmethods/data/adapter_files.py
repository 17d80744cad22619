"""Adapters as folders that the PEFT library reads and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxmethods.data.weights_files import read_json
from jaxmethods.errors import InputError
from jaxmethods.trees import Json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(folder: Path, config: Json, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes what `adapters.peft_format.to_peft` made; an adapter that lies there is replaced.

  Raises:
    InputError: the folder holds a model: transformers would load it with the adapter on top.
  """
  if (folder / "config.json").exists():
    raise InputError(
      f"{folder}: holds a model, on top of which the adapter would be loaded: choose another folder"
    )
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "adapter_model.bin").unlink(missing_ok=True)  # an older form of the same
  save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_peft(folder: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
  """Reads (config, tensors) for `adapters.peft_format.from_peft`.

  Raises:
    InputError: if a file is missing, truncated or no JSON.
  """
  try:
    return read_json(folder / CONFIG), load_file(folder / WEIGHTS)
  except OSError as error:
    raise InputError(f"{error.filename or folder / WEIGHTS}: cannot be read") from None
  except SafetensorError as error:
    raise InputError(f"{folder / WEIGHTS}: is no complete safetensors file: {error}") from None
