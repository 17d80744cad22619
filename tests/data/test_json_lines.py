"""Lines of JSON files: where they end, and one clear line for those that are damaged."""

import json

import pytest
from PIL import Image

from jaxmethods.data import json_lines
from jaxmethods.data.question_files import read_questions
from jaxmethods.errors import InputError


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_a_line_ends_at_the_line_feed_only(tmp_path, mark):
  entry = {"question": f"a{mark}b"}
  text = json.dumps(entry, ensure_ascii=False)
  (tmp_path / "f.jsonl").write_bytes(f"\ufeff{text}\r\n\n{text}\n".encode())
  found = list(json_lines.read(tmp_path / "f.jsonl"))
  assert [line.entry for line in found] == [entry, entry]
  assert [line.where.rpartition(", ")[2] for line in found] == ["line 1", "line 3"]


def test_questions_about_images_are_read_so_too(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
  entry = {"image": "a.png", "question": "what is\u2028 this", "answer": "red"}
  text = "\ufeff" + "\n".join([json.dumps(entry, ensure_ascii=False)] * 2)
  (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
  assert [q.question for q in read_questions(tmp_path / "q.jsonl")] == [entry["question"]] * 2


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"a": 1}\n{', "f.jsonl, line 2: is not JSON, got {"),
    (b"[" * 100000, "line 1: is not JSON"),
    (b'{"a": "\\ud800"}', "line 1: a string is no Unicode text"),
    (b'{"a": "\xff"}', "cannot be read as text"),
    (b"9" * 5000, "line 1: is not JSON"),
  ],
)
def test_damaged_files_are_named(tmp_path, content, message):
  (tmp_path / "f.jsonl").write_bytes(content)
  with pytest.raises(InputError, match=message):
    list(json_lines.read(tmp_path / "f.jsonl"))
