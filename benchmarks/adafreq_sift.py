"""Finds individuals by local features alone: SIFT key points of OpenCV, matched by Lowe's ratio.

  python -m benchmarks.adafreq_sift DATA [--protocol closed --split md_split] [--json FILE]

OpenCV (`pip install opencv-python-headless`) is a peer of this file only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from jaxmethods.experiments.adafreq import data as data_lib
from jaxmethods.experiments.adafreq.config import Config

MOST, RATIO = 80, 0.8  # key points of a photograph; nearest against second nearest


def descriptors(images: np.ndarray) -> list[np.ndarray]:
  """Root SIFT of the strongest key points of each photograph."""
  import cv2

  sift = cv2.SIFT_create(nfeatures=MOST, contrastThreshold=0.02)
  found = []
  for image in images:
    _, x = sift.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
    x = np.zeros((1, 128), np.float32) if x is None else x[:MOST]
    found.append(np.sqrt(x / np.maximum(x.sum(1, keepdims=True), 1e-6)).astype(np.float32))
  return found


def counts(query: np.ndarray, flat: np.ndarray, starts: np.ndarray) -> np.ndarray:
  """Matches of a query with each photograph that pass the ratio; (g,)."""
  near = query @ flat.T
  first = np.maximum.reduceat(near, starts, axis=1)
  sizes = np.diff([*starts, near.shape[1]])
  near[near == np.repeat(first, sizes, axis=1)] = -1
  second = np.maximum.reduceat(near, starts, axis=1)
  apart = lambda x: np.sqrt(np.maximum(2 - 2 * np.clip(x, -1, 1), 0))
  return (apart(first) < RATIO * apart(np.where(second < 0, -1, second))).sum(0)


def search(found: data_lib.Search) -> dict[str, float]:
  """Top-1 and mAP in percent, with and without the own sighting."""
  x = descriptors(found.images)
  gallery = [x[i] for i in found.gallery]
  starts = np.cumsum([0, *(len(part) for part in gallery)])[:-1]
  flat = np.concatenate(gallery)
  others, groups = found.identity[found.gallery], found.group[found.gallery]
  result: dict[str, list[float]] = {"top1": [], "mAP": [], "top1_noss": [], "mAP_noss": []}
  for query, itself in zip(found.query, found.itself, strict=True):
    score = counts(x[query], flat, starts).astype(float)
    right = others == found.identity[query]
    own = right & (groups == found.group[query]) & (groups >= 0)
    for name, left_out in (("", np.zeros(len(right), bool)), ("_noss", own)):
      left = left_out.copy()
      if itself >= 0:
        left[itself] = True
      order = np.argsort(-np.where(left, -1, score), kind="stable")[: (~left).sum()]
      place = np.flatnonzero(right[order]) + 1
      result[f"top1{name}"].append(float(right[order[0]]))
      if len(place):
        result[f"mAP{name}"].append((np.arange(1, len(place) + 1) / place).mean())
  return {name: 100 * float(np.mean(values)) for name, values in result.items()}


def main() -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("data")
  parser.add_argument("--protocol", default="closed")
  parser.add_argument("--split", default="md_split")
  parser.add_argument("--json", type=Path)
  args = parser.parse_args()
  config = Config(data=args.data, protocol=args.protocol, split=args.split, image_size=128)
  result = search(data_lib.load(config).test)
  print(args.data, args.protocol, {name: round(value, 2) for name, value in result.items()})
  if args.json:
    args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
