"""Zero-shot accuracy of two towers out of packages on photographs and drawings of the data folder.

The recipe is `testbeds.vision_language.dual`; pictures are 32x32, enlarged to 224. One model and one
test set each: no seeds. Every recipe is shown; none was chosen on these pictures here.

  JAXMETHODS_DATA=DIR python -m benchmarks.dual_encoder
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxmethods.data.files import data_dir
from jaxmethods.testbeds.vision_language import dual, tasks

OUT = Path(__file__).parent / "results" / "dual_encoder.json"
CIFAR_IMAGES = 1000
# ConSE alone, without centring; the ridge alone; both; both, each domain centred on its own mean.
RECIPES = ("conse_uncentred", "ridge", "ridge_conse", "ridge_conse_domain_mean")


def sets() -> dict[str, tuple[str, np.ndarray, np.ndarray, list[str]]]:
  """Domain -> its data set, images, labels, class names."""
  found = {}
  for name, file, domains in (
    ("pacs", "pacs/pacs32.npz", ("art", "cartoon", "photo", "sketch")),
    ("office", "office_caltech10/images32.npz", ("amazon", "caltech", "dslr", "webcam")),
  ):
    with np.load(data_dir() / file) as arrays:
      x, y, domain = arrays["x"], arrays["y"], arrays["domain"]
      classes = [str(c) for c in arrays["classes"]]
    for number, key in enumerate(domains):
      found[key] = name, x[domain == number], y[domain == number], classes
  with np.load(data_dir() / "cifar10_jpeg/cifar10_jpeg.npz") as arrays:
    offsets = arrays["test_offset"][: CIFAR_IMAGES + 1]
    x = tasks.decoded(arrays["test_jpeg"], offsets)
    found["cifar10"] = "cifar10", x, arrays["test_y"][: len(x)], [str(c) for c in arrays["classes"]]
  return found


def main() -> None:
  """Embeds everything once and writes the table."""
  towers, data = dual.load(), sets()
  features = {
    key: jnp.asarray(dual.image_features(towers.image_params, x, key))
    for key, (_, x, _, _) in data.items()
  }
  rows: dict[str, dict[str, float]] = {recipe: {} for recipe in ("chance", *RECIPES)}
  for key, (name, _, y, classes) in data.items():
    whole = jnp.concatenate([features[k] for k in data if data[k][0] == name]).mean(0)
    prompts = [dual.TEMPLATE.format(c) for c in classes]
    texts = dual.embed_texts(towers.text, towers.text_params, prompts, towers.tokens, key)
    centred = jnp.asarray(texts) - towers.bridge.mean
    centred = centred / jnp.linalg.norm(centred, axis=-1, keepdims=True)
    f = features[key]
    images = (
      dual.image_embeddings(towers.bridge, f, jnp.zeros_like(whole), ridge=False),
      dual.image_embeddings(towers.bridge, f, whole, conse=False),
      dual.image_embeddings(towers.bridge, f, whole),
      dual.image_embeddings(towers.bridge, f, f.mean(0)),
    )
    rows["chance"][key] = 100 / len(classes)
    for recipe, v in zip(RECIPES, images, strict=True):
      rows[recipe][key] = 100 * float((np.asarray(v @ centred.T).argmax(1) == y).mean())
  number = lambda value: {"mean": value, "ci95": None, "values": [value]}
  listed = [
    {"name": recipe, "metrics": {key: number(value) for key, value in of.items()}}
    for recipe, of in rows.items()
  ]
  sources = [source._asdict() for source in towers.sources]
  OUT.write_text(json.dumps({"unit": "%", "sources": sources, "rows": listed}, indent=1) + "\n")
  for recipe, of in rows.items():
    print(recipe, {key: round(value, 1) for key, value in of.items()})


if __name__ == "__main__":
  main()
