"""Environments of the peers that we are timed beside: one each, below `.peers/`, from the registry.

python -m benchmarks.peers fedavg      # makes it if need be; its Python is the last line that is printed
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

FOLDER = Path(".peers")
# Benchmark -> what its peer's script imports.
PEERS = {
  "fedavg": ("fedjax>=0.0.17", "scikit-learn>=1.6"),
  "fpl": ("torch", "numpy"),
  "gin": ("torch", "torch_geometric"),
  "jax_privacy": ("jax-privacy>=2.0",),
  "lora": ("torch", "peft", "transformers"),
  "nanogcg": ("torch", "nanogcg>=0.3", "transformers<5"),
  "opacus": ("torch", "opacus>=1.6", "transformers"),
}


def python(name: str) -> Path:
  """Returns the Python of a peer's environment, which is made where it is missing."""
  folder = (FOLDER / name).resolve()
  found, ready = folder / "bin" / "python", folder / ".ready"
  if ready.exists() and ready.read_text() == "\n".join(PEERS[name]):
    return found
  said(f"making {folder} with {', '.join(PEERS[name])}: minutes, once")
  begin = time.monotonic()
  venv.create(folder, with_pip=True, clear=True)
  install = [
    str(found),
    "-m",
    "pip",
    "install",
    "--disable-pip-version-check",
    "--progress-bar",
    "off",
  ]
  done = subprocess.run([*install, *PEERS[name]], stdout=sys.stderr)
  if done.returncode:
    sys.exit(f"{name}: its peer cannot be installed; leave --peer_python out to time ours only")
  ready.write_text("\n".join(PEERS[name]))
  said(f"{folder} is ready after {time.monotonic() - begin:.0f} s")
  return found


def said(line: str) -> None:
  """Prints progress, apart from results."""
  print(line, file=sys.stderr, flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description="Makes the environment of a peer")
  parser.add_argument("name", choices=PEERS)
  print(python(parser.parse_args().name))


if __name__ == "__main__":
  main()
