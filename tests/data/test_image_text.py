"""Folders that a text-to-image model leaves behind."""

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data.image_text import FILE, read_image_texts
from jaxmethods.errors import InputError


def write(folder, rows, images, header="image,text"):
  lines = [header, *(f'{image},"{text}"' for image, text in rows)]
  (folder / FILE).write_text("\n".join(lines) + "\n")
  for name, value in images.items():
    Image.fromarray(np.full((12, 20, 3), value, np.uint8)).save(folder / name)


def test_reads_in_the_order_of_names_without_black_ones(tmp_path):
  rows = [("b.png", "a dog, happy"), ("a.png", "a cat"), ("c.png", "nothing"), ("d.png", "a cow")]
  write(tmp_path, rows, {"a.png": 10, "b.png": 20, "c.png": 0, "d.png": 30})
  read = read_image_texts(tmp_path, 10, 8)
  assert read.texts == ["a cat", "a dog, happy", "a cow"]
  assert read.images.shape == (3, 8, 8, 3)
  assert read.images[:, 0, 0, 0].tolist() == [10, 20, 30]
  assert read.left_out == "1 black"
  assert read_image_texts(tmp_path, 2, 8).texts == ["a cat", "a dog, happy"]


def test_few_missing_images_are_counted_and_named(tmp_path):
  rows = [(f"{i:03d}.png", f"text {i}") for i in range(200)]
  write(tmp_path, rows, {name: 9 for name, _ in rows if name != "007.png"})
  read = read_image_texts(tmp_path, 500, 8)
  assert len(read.texts) == 199 and "text 7" not in read.texts
  assert read.left_out == "1 missing (007.png)"


@pytest.mark.parametrize(
  ("rows", "images", "header", "reason"),
  [
    ([("a.png", "x"), ("b.png", "y")], {"a.png": 1}, "image,text", "1 of 2 images are missing"),
    ([("a.png", "x")], {"a.png": 1}, "file,text", "needs the columns image and text"),
    ([("a.png", "")], {"a.png": 1}, "image,text", "line 2: has no text"),
    ([], {}, "image,text", "has no rows"),
    ([("a.png", "x")], {"a.png": 0}, "image,text", "no pair that can be used"),
  ],
)
def test_bad_folders(tmp_path, rows, images, header, reason):
  write(tmp_path, rows, images, header)
  with pytest.raises(InputError, match=reason):
    read_image_texts(tmp_path, 5, 8)


def test_no_folder(tmp_path):
  with pytest.raises(InputError, match="cannot be read"):
    read_image_texts(tmp_path / "none", 5, 8)


def test_no_image(tmp_path):
  (tmp_path / "a.png").write_text("no image")
  write(tmp_path, [("a.png", "x")], {})
  with pytest.raises(InputError, match="not a readable image"):
    read_image_texts(tmp_path, 5, 8)
