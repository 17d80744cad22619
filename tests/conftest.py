"""Fixtures for all tests."""

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def golden_file():
  """Opens reference vectors by name from $JAXMETHODS_GOLDEN, else tests/golden."""
  folder = Path(os.environ.get("JAXMETHODS_GOLDEN") or Path(__file__).parent / "golden")
  return lambda name: np.load(folder / f"{name}.npz")
