"""Adapters as folders that the PEFT library reads and writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxmethods.errors import InputError
from jaxmethods.trees import Json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_peft(folder: Path, config: Json, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes what `adapters.peft_format.to_peft` made."""
  folder.mkdir(parents=True, exist_ok=True)
  save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
  (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_peft(folder: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
  """Reads (config, tensors) for `adapters.peft_format.from_peft`.

  Raises:
    InputError: if a file is missing, truncated or no JSON.
  """
  try:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config, load_file(folder / WEIGHTS)
  except OSError as error:
    raise InputError(f"{error.filename or folder / WEIGHTS}: cannot be read") from None
  except json.JSONDecodeError as error:
    raise InputError(f"{folder / CONFIG}, line {error.lineno}: is not JSON") from None
  except SafetensorError as error:
    raise InputError(f"{folder / WEIGHTS}: is no complete safetensors file: {error}") from None
