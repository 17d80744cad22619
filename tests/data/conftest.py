"""Fixtures of the data tests."""

from pathlib import Path

import pytest


@pytest.fixture
def data_folder(tmp_path, monkeypatch) -> Path:
  """An empty data folder that no test shares."""
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path))
  return tmp_path
