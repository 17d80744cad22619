"""Photographs of individuals in every layout, and what is wrong with some."""

import csv
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data import coats, reid
from jaxmethods.errors import InputError


def photograph(path, colour=0, size=(9, 7)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (colour, 10, 20)).save(path)


def table(path, columns, *rows):
  with path.open("w", newline="") as stream:
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows(rows)


def test_folders_with_and_without_splits(tmp_path):
  for who in ("b", "a"):
    for i in range(2):
      photograph(tmp_path / who / f"{i}.png", 100)
  data = reid.load(f"reid:{tmp_path}", side=8)
  assert data.images.shape == (4, 8, 8, 3) and data.names == ["a", "b"]
  assert data.identity.tolist() == [0, 0, 1, 1] and set(data.split) == {""}
  for part, who in (("train", "a"), ("test", "z")):
    photograph(tmp_path / "parts" / part / who / "0.png")
  data = reid.load(f"reid:{tmp_path}/parts", side=8)
  assert data.split.tolist() == ["test", "train"] and data.names == ["a", "z"]


def test_market_names(tmp_path):
  for folder, name in (
    ("bounding_box_train", "0002_c1s1_000451_03.jpg"),
    ("query", "0007_c2s1_000451_03.jpg"),
    ("bounding_box_test", "0007_c3s1_000451_03.jpg"),
    ("bounding_box_test", "-1_c3s1_000451_03.jpg"),
  ):
    photograph(tmp_path / folder / name)
  data = reid.load(f"reid:{tmp_path}", side=8)
  assert data.names == ["0002", "0007"] and data.split.tolist() == ["train", "query", "gallery"]
  assert data.group.tolist() == [0, 1, 2]
  photograph(tmp_path / "query" / "cat.jpg")
  with pytest.raises(InputError, match=r"cat\.jpg: expected a name like 0002_c1s1"):
    reid.load(f"reid:{tmp_path}", side=8)


def test_tables_are_joined_by_file(tmp_path):
  for i in range(3):
    photograph(tmp_path / f"{i}.png")
  table(
    tmp_path / "index.csv", ("file", "identity", "split", "sighting"),
    ("0.png", "x", "train", "7"), ("1.png", "x", "train", "8"), ("2.png", "y", "test", "9"),
  )  # fmt: skip
  table(
    tmp_path / "other.csv", ("file", "identity", "md_split"),
    ("0.png", "x", "train"), ("1.png", "x", "test"), ("2.png", "y", "train"),
  )  # fmt: skip
  data = reid.load(f"reid:{tmp_path}", side=8)
  assert data.split.tolist() == ["train", "train", "test"] and data.group.tolist() == [0, 1, 2]
  data = reid.load(f"reid:{tmp_path}", side=8, split="md_split")
  assert data.split.tolist() == ["train", "test", "train"] and data.group.tolist() == [0, 1, 2]
  with pytest.raises(InputError, match="no CSV in it has the column 'fold'"):
    reid.load(f"reid:{tmp_path}", side=8, split="fold")


def test_wildlife_datasets_metadata(tmp_path):
  photograph(tmp_path / "img" / "0.png")
  photograph(tmp_path / "img" / "1.png")
  table(
    tmp_path / "metadata.csv", ("image_id", "identity", "path", "split"),
    ("a", "x", "img/0.png", "train"), ("b", "unknown", "img/1.png", "test"),
  )  # fmt: skip
  for name in (tmp_path, tmp_path / "metadata.csv"):
    data = reid.load(f"reid:{name}", side=8)
    assert data.identity.tolist() == [0, -1] and data.names == ["x"]


def test_missing_columns_are_named(tmp_path):
  table(tmp_path / "metadata.csv", ("image", "animal"), ("a.png", "x"))
  with pytest.raises(InputError, match=r"no column file \(or path.*it has image, animal"):
    reid.load(f"reid:{tmp_path}", side=8)
  table(tmp_path / "metadata.csv", ("path", "animal"), ("a.png", "x"))
  with pytest.raises(InputError, match="no column identity; it has path, animal"):
    reid.load(f"reid:{tmp_path}", side=8)


def test_few_unreadable_files_are_named_and_many_refused(tmp_path):
  for i in range(150):
    photograph(tmp_path / "a" / f"{i}.png", size=(8 + i % 3, 8))
  (tmp_path / "a" / "bad.png").write_bytes(b"no picture")
  data = reid.load(f"reid:{tmp_path}", side=8)
  assert len(data.images) == 150 == len(data.files)
  assert data.notes.startswith("left out: 1 of 151 files cannot be read: ")
  assert "bad.png" in data.notes
  (tmp_path / "a" / "worse.png").write_bytes(b"")
  with pytest.raises(InputError, match=r"2 of 152 files cannot be read: .*bad[.]png"):
    reid.load(f"reid:{tmp_path}", side=8)


def test_nothing_there(tmp_path):
  with pytest.raises(InputError, match="no such folder"):
    reid.load(f"reid:{tmp_path}/nowhere", side=8)
  with pytest.raises(InputError, match="no photographs in it"):
    reid.load(f"reid:{tmp_path}", side=8)


def test_photographs_of_nobody_known(tmp_path):
  photograph(tmp_path / "0.png")
  data = reid.load(f"reid:{tmp_path}", side=8)
  assert data.identity.tolist() == [-1] and data.names == []


ODD = ("Zoë [2] #1", "O'Neil & Söhne", "野生 動物", "a.b,c", "100%")


def test_odd_names_in_every_layout(tmp_path):
  """Spaces, brackets, accents, upper-case endings, and a BOM as Excel writes it."""
  for layout in ("folders", "table"):
    for i, who in enumerate(ODD):
      photograph(tmp_path / layout / who / f"IMG ({i}) [ä].JPG", 10 * i, size=(5 + i, 9 - i))
      photograph(tmp_path / layout / who / "x y.PNG", 10 * i)
  path = tmp_path / "table" / "meta data.csv"
  lines = [f'"{who}/IMG ({i}) [ä].JPG";"{who}";train' for i, who in enumerate(ODD)]
  path.write_text("\n".join(["path; identity ;split", *lines, ""]), encoding="utf-8-sig")
  for layout, each in (("folders", 2), ("table", 1)):
    data = reid.load(f"reid:{tmp_path}/{layout}", side=8)
    assert list(data.names) == sorted(ODD) and len(data.images) == each * len(ODD), layout
    assert all(path.is_file() for path in reid.paths(data))
    assert not data.notes


def test_files_of_a_table_written_elsewhere(tmp_path):
  """Accents in the other form (macOS) and the other slash (Windows)."""
  photograph(tmp_path / "img" / unicodedata.normalize("NFD", "zoë.png"))
  photograph(tmp_path / "img" / "b.png")
  spelled = unicodedata.normalize("NFC", "zoë.png")
  table(
    tmp_path / "metadata.csv", ("path", "identity"), (f"img\\{spelled}", "z"), ("img\\b.png", "b")
  )
  assert len(reid.load(f"reid:{tmp_path}", side=8).images) == 2


def test_market_names_in_one_folder_and_photographs_alone(tmp_path):
  for name in ("0007_c2s1_000451_03.JPG", "0009_c1s2_000001_00.jpg", "-1_c1s1_000001_00.jpg"):
    photograph(tmp_path / "query" / name)
  data = reid.load(f"{tmp_path}/query", side=8)
  assert data.names == ["0007", "0009"] and [data.groups[i] for i in data.group] == ["2", "1"]
  alone = reid.load(f"{tmp_path}/query/0007_c2s1_000451_03.JPG", side=8)
  assert alone.identity.tolist() == [-1] and len(alone.images) == 1


def test_files_without_a_place_are_named(tmp_path):
  photograph(tmp_path / "a" / "0.png")
  photograph(tmp_path / "stray.png")
  photograph(tmp_path / "a" / "deeper" / "1.png")
  (tmp_path / "a" / "2.heic").write_bytes(b"x")
  (tmp_path / "a" / ".hidden").write_bytes(b"x")
  (tmp_path / "empty").mkdir()
  data = reid.load(f"reid:{tmp_path}", side=8)
  assert len(data.images) == 1
  assert data.notes == (
    "not read: 3 files of other kinds or outside the layout: a/2.heic, a/deeper/1.png, stray.png"
  )


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ("file,identity\n0.png,x\n0.png,y\n", "lines 2 and 3 name the same file, 0.png"),
    ("file,identity\n0.png\n", "line 2 names no file or no identity"),
    ("file,identity\n,x\n", "line 2 names no file or no identity"),
    ("image;animal\n0.png;x\n", r"no column file .*it has image, animal"),
    ("", "no column file .*it has none"),
    (b"file,identity\n\xe9.png,x\n", "not a readable CSV file"),
    ("file,identity\nnowhere.png,x\n", "1 of 1 files cannot be read"),
  ],
)
def test_tables_that_are_wrong(tmp_path, lines, message):
  photograph(tmp_path / "0.png")
  path = tmp_path / "metadata.csv"
  path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
  with pytest.raises(InputError, match=message) as caught:
    reid.load(f"reid:{tmp_path}", side=8)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "folder", "huge"])
def test_corrupt_photographs(tmp_path, kind):
  path = tmp_path / "a" / "bad.jpg"
  photograph(path, size=(64, 64))
  if kind == "cut":
    path.write_bytes(path.read_bytes()[:-200])
  elif kind == "huge":  # a header that promises more than anybody would decode
    Image.new("1", (30_000, 30_000)).save(path.with_suffix(".png"))
    path.unlink()
  else:
    path.unlink()
    path.mkdir() if kind == "folder" else path.write_bytes(b"" if kind == "empty" else b"text")
  photograph(tmp_path / "a" / "good.png")
  with pytest.raises(InputError, match=r"1 of 2 files cannot be read: .*bad"):
    reid.load(f"reid:{tmp_path}", side=8)


def test_coats(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_CACHE", str(tmp_path))
  herd = coats.Herd(individuals=2, sightings=2, pictures=2)
  data = coats.load(16, herd)
  assert data.images.shape == (32, 16, 16, 3) and len(data.names) == 8
  assert (np.bincount(data.identity) == 4).all() and (np.bincount(data.group) == 2).all()
  assert not data.source.real
  # Files and names of an individual belong together.
  assert all(
    file.startswith(data.names[who]) for file, who in zip(data.files, data.identity, strict=True)
  )
  np.testing.assert_array_equal(coats.load(16, herd).images, data.images)
