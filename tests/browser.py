"""Pages looked at in a headless browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def document(file: Path, query: str, picture: Path | None = None) -> str:
  """Opens `file`#`query`; returns its document, or takes a picture. Skips without a browser."""
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if chromium is None:
    pytest.skip("no chromium on this machine")
  what = ["--dump-dom"] if picture is None else [f"--screenshot={picture}"]
  return subprocess.run(
    [chromium, "--headless", "--no-sandbox", "--disable-gpu",
     f"--user-data-dir={file.parent}/browser", "--window-size=900,800",
     "--virtual-time-budget=1000", *what, f"{file.as_uri()}#{query}"],
    capture_output=True, text=True, timeout=120,
  ).stdout  # fmt: skip
