"""Questions about images: what is in them, and that no image is in two parts."""

import numpy as np
import pytest
from scipy import ndimage

from jaxmethods.data import embedded, multimodal
from jaxmethods.data.records import describe
from jaxmethods.errors import InputError


@pytest.mark.parametrize("name", ["easy-vqa", *multimodal.TARGETS])
def test_parts_share_no_image(name):
  data = multimodal.load(name)
  assert data.images.shape[1:] == (multimodal.IMAGE_SIZE,) * 2 + (3,)
  assert data.images.dtype == np.uint8
  assert len({len(column) for column in data[1:6]}) == 1
  parts = [set(data.image[data.split == part]) for part in ("train", "validation", "test")]
  assert all(parts)
  assert sum(map(len, parts)) == len(set.union(*parts))
  assert data.source.real == (name != "counting")
  assert f"{len(data.question)} questions about" in describe([data])


def test_easy_vqa_has_its_published_sizes():
  data = multimodal.easy_vqa()
  test = data.split == "test"
  assert (test.sum(), (~test).sum()) == (9673, 38575)
  assert set(data.family) == set(multimodal.FAMILIES)
  yes_no = np.isin(data.answer, ("yes", "no"))
  assert (yes_no & test).sum() == 7136
  for family in multimodal.FAMILIES:
    assert yes_no[data.family == family].all() == family.startswith("yesno")


def test_labels_agree_with_every_question():
  data = multimodal.easy_vqa()
  shapes, colours = multimodal.image_labels(data)
  for family, names, labels in (
    ("shape", multimodal.SHAPES, shapes),
    ("colour", multimodal.COLOURS, colours),
  ):
    rows = data.family == family
    assert [names[label] for label in labels[data.image[rows]]] == data.answer[rows].tolist()
    # "is there a NAME": yes exactly if it is the label, the other way round with "no" or "not".
    rows = np.flatnonzero(data.family == f"yesno_{family}")
    for row in rows[labels[data.image[rows]] >= 0]:
      words = data.question[row].split()
      present = names[labels[data.image[row]]] in words
      negated = bool({"no", "not"} & set(words))
      assert data.answer[row] == ("no" if present == negated else "yes")


def test_digits_are_the_published_ones_in_large():
  data = multimodal.digits()
  x, labels = embedded.load_arrays("digits").splits["all"]
  assert [multimodal.NUMBERS[label] for label in labels] == data.answer.tolist()
  small = data.images[:, 4::8, 4::8].astype(float)
  ink = 1 - small / small.max(axis=(1, 2), keepdims=True)
  np.testing.assert_allclose(ink.mean(-1), x[..., 0], atol=0.03)
  assert [(data.split == part).sum() for part in ("train", "validation", "test")] == [
    1167,
    130,
    500,
  ]


def test_counted_shapes_are_there():
  data = multimodal.counting(train=40, validation=2, test=2)
  for image, answer in zip(data.images, data.answer, strict=True):
    dark = (image.max(-1) < 200) | (image.min(-1) < 180)
    assert ndimage.label(dark)[1] == multimodal.NUMBERS.index(answer)


def test_captions_say_what_the_questions_say():
  data, source = multimodal.captions(), multimodal.easy_vqa()
  caption = dict(zip(data.image.tolist(), data.answer.tolist(), strict=True))
  what = ~np.isin(source.answer, ("yes", "no"))
  for image, answer in zip(source.image[what].tolist(), source.answer[what].tolist(), strict=True):
    assert image not in caption or answer in caption[image].split()


def test_checks_ask_about_the_digit_that_is_there():
  data, source = multimodal.checking(), multimodal.digits()
  np.testing.assert_array_equal(data.split, source.split)
  named = np.array([question.split()[-1] for question in data.question])
  np.testing.assert_array_equal(data.answer == "yes", named == source.answer)
  assert 0.45 < (data.answer == "yes").mean() < 0.55
  # No word of its own: the vocabulary, and so the pretrained model, is the same with and without it.
  others = [multimodal.load(name) for name in ("easy-vqa", "digits", "counting", "captions")]
  assert multimodal.vocabulary([*others, data]) == multimodal.vocabulary(others)


def test_vocabulary():
  words = multimodal.vocabulary([multimodal.digits()], extra=("backdoor",))
  text = "which digit is shown"
  assert words.decode(words.encode(text)) == text
  assert words.prompt(text) == [words.begin, *words.encode(text), words.answer]
  assert len(words.words) == 3 + 4 + 10 + 1
  with pytest.raises(InputError, match="'triangle' is not in the vocabulary"):
    words.encode("which triangle")


def test_unknown_name():
  with pytest.raises(InputError, match="nearest is digits"):
    multimodal.load("digit")
