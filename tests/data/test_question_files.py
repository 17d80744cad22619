"""Files of questions: LLaVA's forms read as they are meant, or refused saying why."""

import json

import pytest
from PIL import Image

from jaxmethods.data.question_files import described, read_questions
from jaxmethods.errors import InputError

ASKED, ANSWERED = ("human", "<image>\nwhat colour"), ("gpt", "red")


@pytest.fixture
def read(tmp_path):
  Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

  def read(contents):
    (tmp_path / "q.json").write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return [(q.question, q.answer) for q in read_questions(tmp_path / "q.json")]

  return read


def talk(*turns, **changes):
  conversations = [{"from": who, "value": text} for who, text in turns]
  return {"image": "a.png", "conversations": conversations} | changes


def plain(question="what colour", answer="red", **changes):
  return {"image": "a.png", "question": question, "answer": answer} | changes


RED = ("what colour", "red")


@pytest.mark.parametrize(
  ("entry", "expected"),
  [
    (talk(ASKED, ANSWERED), RED),
    (talk(("gpt", "hello"), ASKED, ANSWERED), RED),
    (talk(("human", "what colour\n<image>"), ANSWERED), RED),
    (talk((None, "<image>\nwhat colour"), (None, "red")), RED),
    (talk(ASKED, ANSWERED, image=["a.png"]), RED),
    (talk(ASKED, ANSWERED, id="17"), RED),
    (plain(), RED),
    (plain(answer=3), ("what colour", "3")),
    (plain(answer="the <image> tag"), ("what colour", "the <image> tag")),
    (plain("größe? 大きさ", "groß 🙂"), ("größe? 大きさ", "groß 🙂")),
  ],
  ids=str,
)
def test_what_is_read(read, entry, expected):
  line = json.dumps(entry, ensure_ascii=False)
  assert read(line) == [expected]
  assert read(f"{line}\r\n{line}\r\n\r\n") == [expected] * 2
  assert read(f"\ufeff{line}\n{line}") == [expected] * 2
  assert read(json.dumps([entry, entry])) == [expected] * 2
  assert read("\ufeff\n" + json.dumps([entry, entry], indent=1)) == [expected] * 2


@pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_lines_end_at_line_feeds_alone(read, char):
  line = json.dumps(plain(f"what{char} colour"), ensure_ascii=False)
  if ord(char) < 32:  # escaped by JSON
    assert char not in line
  assert read(f"{line}\n{line}\n") == [(f"what{char} colour", "red")] * 2


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (talk(ASKED, ANSWERED, ("human", "and the shape"), ("gpt", "circle")), "4 turns"),
    (talk(("system", "you are kind"), ASKED, ANSWERED), "a turn from 'system'"),
    (talk(ANSWERED, ANSWERED), "must take turns"),
    (talk(ASKED, ASKED), "must take turns"),
    (talk(ASKED), "no question with an answer"),
    (talk(), "no question with an answer"),
    (talk(("gpt", "hello")), "no question with an answer"),
    (talk(("human", "say hi"), ("gpt", "hi"), image=None), "has no image"),
    (talk(ASKED, ANSWERED, image=["a.png", "a.png"]), "2 images"),
    (talk(("human", "<image> <image>\nwhich"), ANSWERED), "<image> stands 2 times"),
    (plain(answer=0.5), "answer: expected a text, got 0.5"),
    (plain(answer=True), "answer: expected a text, got True"),
    (plain(answer=["red"]), "answer: expected a text"),
    (plain(answer=None), "answer: expected a text"),
    (plain(image={"path": "a.png"}), "image: expected a path"),
    (plain(image="b.png"), "there is no image"),
    (talk(ASKED, ANSWERED, question="what"), "a conversation and a question"),
    (
      talk(ASKED, ANSWERED) | {"conversations": [{"from": "human", "value": "what"}, None]},
      "expected",
    ),
    (talk() | {"conversations": "what colour"}, "expected image"),
    (talk() | {"conversations": {"from": "human", "value": "what"}}, "expected image"),
    (
      talk() | {"conversations": [{"value": "what"}, {"value": "red", "weight": 0}]},
      "'weight' of a turn",
    ),
    (plain(image="x" * 5000), "there is no image"),
    (plain(image="a\0.png"), "there is no image"),
    ([1], "expected image, question and answer"),
    ("text", "expected image, question and answer"),
  ],
  ids=str,
)
def test_what_is_refused(read, entry, message):
  good = json.dumps(plain())
  if not isinstance(entry, list):
    with pytest.raises(InputError, match=f"line 2: .*{message}"):
      read(f"{good}\n{json.dumps(entry)}")
  with pytest.raises(InputError, match=f"entry 2: .*{message}"):
    read(json.dumps([plain(), entry]))


def test_broken_files(read):
  for contents, message in ((b"\xff\xfe", "cannot be read as text"), ("[1,", "is no JSON array")):
    with pytest.raises(InputError, match=message):
      read(contents)
  with pytest.raises(InputError, match="has no questions"):
    read("[]")


def test_no_key_stands_twice(read):
  with pytest.raises(InputError, match="line 1: expected"):
    read('{"image": "a.png", "question": "what", "question": "which", "answer": "red"}')


def test_the_digest_is_that_of_texts_and_pixels(tmp_path, read):
  def digest(colour, question="what"):
    Image.new("RGB", (4, 4), colour).save(tmp_path / "a.bmp")  # all of one size
    read(json.dumps(plain(question, image="a.bmp")))
    return described("q.json", read_questions(tmp_path / "q.json")).rpartition("sha256 ")[2]

  first = digest("red")
  assert digest("red") == first
  assert len({first, digest("blue"), digest("red", "which")}) == 3


def test_described(tmp_path, read):
  read("\n".join([json.dumps(plain())] * 3))
  questions = read_questions(tmp_path / "q.json")
  line = described("q.json", questions, 2)
  assert line.startswith("q.json (2 of 3 questions, sha256 ")
  assert described("q.json", questions).startswith("q.json (3 questions, sha256 ")
  other = [questions[0]._replace(answer="blue"), *questions[1:]]
  assert described("q.json", other, 2) != line
