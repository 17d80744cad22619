"""Clips of moving skeletons from every source, and what is wrong with some."""

import numpy as np
import pytest

from jaxmethods.data import bvh, duets, motion, motion_sources
from jaxmethods.errors import InputError

RNG = np.random.default_rng(0)
SMPL = RNG.normal(size=(5, 22, 3)).astype(np.float32)


def saved(path, values):
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, values)


def load(path, **options):
  return motion_sources.load(f"motion:{path}", **options)


# --- generated ------------------------------------------------------------------------------------


def test_duets_are_two_bodies_that_touch_where_their_action_says():
  data = motion_sources.load("embedded:duets")
  assert data.persons == 2 and len(data.label_names) == 8 and not data.source.real
  assert np.bincount(data.label).tolist() == [duets.PER_ACTION] * 8
  nearest = lambda clip: np.linalg.norm(clip[:, 0, :, None] - clip[:, 1, None], axis=-1).min()
  touched = {
    name: np.mean([nearest(data.clips[i]) < 0.25 for i in np.flatnonzero(data.label == k)])
    for k, name in enumerate(data.label_names)
  }
  assert min(touched[name] for name in ("hug", "shake hands", "hand over", "push")) > 0.8
  assert touched["depart"] < 0.3
  for joint, parent in enumerate(data.parents):
    if parent >= 0:
      length = np.linalg.norm(data.clips[0][:, :, joint] - data.clips[0][:, :, parent], axis=-1)
      assert length.std(0).max() < 0.02  # bones, with some noise of the capture
  low = np.concatenate([clip[..., 1].min((1, 2)) for clip in data.clips])
  assert np.abs(low - 0.08).max() < 0.05


def test_duets_come_from_the_seed():
  first, again, other = (duets.generate(seed).clips[3] for seed in (1, 1, 2))
  assert np.array_equal(first, again) and not np.array_equal(first[:9], other[:9])


def test_folds_deal_every_label_out_and_are_kept_where_given():
  data = motion_sources.load("embedded:duets")
  train, test = motion.split(data, 2)
  assert len(test) == len(data.clips) // 5 and not set(train) & set(test)
  dealt = motion.with_folds(data._replace(fold=np.full(len(data.clips), -1)), 4)
  counts = [np.bincount(data.label[dealt.fold == k], minlength=8) for k in range(4)]
  assert np.ptp(counts) == 0
  with pytest.raises(InputError, match="has 5 folds, got 4"):
    motion.with_folds(data, 4)


def test_a_label_that_is_never_trained():
  data = motion_sources.load("embedded:duets")
  fold = np.where(data.label == 5, 0, data.fold % 2 + 1)
  with pytest.raises(InputError, match="label 'hug' of embedded:duets is in fold 0 only"):
    motion.split(data._replace(fold=fold), 0)
  with pytest.raises(InputError, match="leaves no test clip"):
    motion.split(data, 7)


# --- the user's -----------------------------------------------------------------------------------


def packed(path, **changes):
  arrays = {
    "positions": RNG.normal(size=(9, 2, 3, 3)), "offsets": np.array([0, 4, 9]), "fps": 15.0,
    "label": np.array([1, 0]), "label_names": np.array(["hug", "push"]),
    "parents": np.array([-1, 0, 1]),
  } | changes  # fmt: skip
  np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
  return path


def test_an_npz_of_joints(tmp_path):
  data = load(packed(tmp_path / "ein Öl, #1.npz"))
  assert [len(clip) for clip in data.clips] == [4, 5] and data.persons == 2 and data.fps == 15
  assert [data.label_names[k] for k in data.label] == ["push", "hug"]
  assert "data of yours" in motion_sources.describe(data)
  whole = load(packed(tmp_path / "w.npz", positions=RNG.normal(size=(2, 4, 1, 3, 3)), offsets=None))
  assert len(whole.clips) == 2 and whole.persons == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"positions": None}, "no array positions"),
    ({"offsets": np.array([0, 4, 8])}, "offsets: expected numbers that rise from 0 to the 9"),
    ({"offsets": np.array([0, 1, 9])}, "clip 0 has 1 frame, expected at least 2"),
    ({"parents": None}, "parents of 3 joints are not given"),
    ({"parents": np.array([-1, 0])}, "parents: has 2 entries, positions 3 joints"),
    ({"parents": np.array([-1, -1, 0])}, "expected one root"),
    ({"fps": 0.0}, "no frame rate"),
    ({"label": np.array([0, 2])}, "label: clip 1 has 2, expected 0 .. 1"),
    ({"label": np.array([0])}, "label: expected one for each of 2 clips"),
    ({"positions": np.zeros((9, 2, 3, 2))}, r"expected positions \(..., 3\)"),
    (
      {"positions": np.zeros((9, 2, 3, 3))},
      "clip 0, frame 0, person 0: the bone 0 - 1 has length 0",
    ),
  ],
)
def test_a_bad_npz(tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    load(packed(tmp_path / "a.npz", **changes))


def test_joints_that_are_not_finite_are_named(tmp_path):
  values = RNG.normal(size=(9, 2, 3, 3))
  values[6, 1, 2, 0] = np.nan
  names = np.array(["hip", "knee", "foot"])
  with pytest.raises(InputError, match="clip 1, frame 2, person 1: joint foot is not finite"):
    load(packed(tmp_path / "a.npz", positions=values, joint_names=names))


def test_a_folder_as_humanml3d_keeps_it(tmp_path):
  for name in ("000 021", "M000021"):
    saved(tmp_path / "new_joints" / f"{name}.npy", SMPL)
    saved(tmp_path / "new_joint_vecs" / f"{name}.npy", np.zeros((5, 263)))
    (tmp_path / "texts").mkdir(exist_ok=True)
  text = "\ufeffa man waves, naïvely.#a/DET man/NOUN#0.0#0.0\rsomebody waves#x#0#0\r"
  (tmp_path / "texts" / "000 021.txt").write_text(text, encoding="utf-8", newline="")
  (tmp_path / "texts" / "M000021.txt").write_text("they Push.", encoding="utf-8")
  saved(tmp_path / "Mean.npy", np.zeros(263))
  data = load(tmp_path)
  assert data.names == ("000 021", "M000021") and data.fps == 20
  assert data.texts == ("a man waves, naïvely.", "they Push.")
  labelled = load(tmp_path, label_words=("push", "wave"))
  assert [labelled.label_names[k] for k in labelled.label] == ["wave", "push"]
  with pytest.raises(InputError, match=r"'they Push.', has none of wave"):
    load(tmp_path, label_words=("wave",))


def test_features_are_decoded_by_the_caller(tmp_path):
  saved(tmp_path / "a.npy", np.zeros((5, 263)))
  data = load(tmp_path, decoders={263: lambda x: np.broadcast_to(SMPL, (len(x), 22, 3))[:, None]})
  assert data.clips[0].shape == (5, 1, 22, 3)
  with pytest.raises(InputError, match=r"got \(5, 263\)"):
    load(tmp_path)


def test_a_folder_as_interhuman_keeps_it(tmp_path):
  raw = RNG.normal(size=(6, 492)).astype(np.float32)
  for person in ("person1", "person2"):
    saved(tmp_path / "motions_processed" / person / "17.npy", raw)
  (tmp_path / "motions_processed" / "annots").mkdir()
  (tmp_path / "motions_processed" / "annots" / "17.txt").write_text("two people fight")
  data = load(tmp_path / "motions_processed")
  assert data.persons == 2 and data.fps == 30 and data.texts == ("two people fight",)
  first = raw[:, :66].reshape(6, 22, 3)
  assert np.array_equal(data.clips[0][:, 0, :, 1], first[..., 2])  # z up becomes y up
  saved(tmp_path / "motions_processed" / "person1" / "18.npy", raw)
  with pytest.raises(InputError, match=r"person1/18.npy: its partner is missing"):
    load(tmp_path / "motions_processed")


def test_labels_by_folder_and_mixed_persons(tmp_path):
  saved(tmp_path / "hug" / "a.npy", np.stack([SMPL, SMPL + 1], axis=1))
  saved(tmp_path / "kick & run" / "b.npy", np.stack([SMPL, SMPL + 1], axis=1))
  data = load(tmp_path, fps=15)
  assert data.label_names == ("hug", "kick & run") and data.names[0] == "hug/a"
  with pytest.raises(InputError, match="no frame rate"):
    load(tmp_path)
  saved(tmp_path / "hug" / "c.npy", SMPL)
  with pytest.raises(InputError, match="clip hug/c has 1 persons, the others 2: its partner"):
    load(tmp_path, fps=15)


def test_texts_without_clips(tmp_path):
  saved(tmp_path / "a.npy", SMPL)
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "b.txt").write_text("hello")
  with pytest.raises(InputError, match=r"b.txt: a text without a clip"):
    load(tmp_path)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda p: p.mkdir(), "no .npy or .bvh clips"),
    (lambda p: None, "no such folder or npz"),
    (lambda p: saved(p / "a.npy", np.array(["x"])), "expected numbers"),
    (lambda p: saved(p / "a.npy", np.zeros((4, 15, 3))), "15 joints whose parents nobody knows"),
    (lambda p: (p.mkdir(), (p / "a.npy").write_bytes(b"\x93NUMPY?")), "not a readable npy"),
  ],
)
def test_bad_folders(tmp_path, make, message):
  make(tmp_path / "x")
  with pytest.raises(InputError, match=message):
    load(tmp_path / "x")


def test_sets_that_are_not_there_and_unknown_names(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXMETHODS_DATA", str(tmp_path))
  with pytest.raises(InputError, match=r"sbu: .* is missing"):
    motion_sources.load("sbu")
  with pytest.raises(InputError, match="unknown motion 'embedded:duet'; the nearest is"):
    motion_sources.load("embedded:duet")


# --- BVH ------------------------------------------------------------------------------------------

BVH = """HIERARCHY
ROOT Hips
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Knee
  {
    OFFSET 0 -90 0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {
      OFFSET 0 -80 10
    }
  }
}
MOTION
Frames: 2
Frame Time: 0.04
0 170 0 0 0 0 0 0 0
10 170 -20 90 0 0 0 90 0
"""


def test_bvh_by_hand(tmp_path):
  for ends, mark in (("\n", ""), ("\r\n", "\ufeff"), ("\r", "")):
    file = tmp_path / "Müller no. 1.bvh"
    file.write_bytes((mark + BVH.replace("\n", ends)).encode())
    clip = bvh.read(file)
    assert clip.names == ("Hips", "Knee", "Knee_end") and clip.parents == (-1, 0, 1)
    assert clip.unit == "cm" and clip.fps == pytest.approx(25)
    # Frame 1: the root turns x to y, so the thigh points to +x; the shank turns about x before.
    expected = [
      [[0, 1.7, 0], [0, 0.8, 0], [0, 0, 0.1]],
      [[0.1, 1.7, -0.2], [1, 1.7, -0.2], [1.1, 1.7, -1]],
    ]
    np.testing.assert_allclose(clip.positions, expected, atol=1e-6)


def test_pairs_of_bvh(tmp_path):
  for person in (1, 2):
    (tmp_path / f"hug 1_person{person}.bvh").write_text(BVH)
  data = load(tmp_path)
  assert data.persons == 2 and data.names == ("hug 1",)
  (tmp_path / "hug 1_person2.bvh").unlink()
  with pytest.raises(InputError, match="its partner is missing: expected one of person2"):
    load(tmp_path)


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("HIERARCHY", "HELLO", "not a BVH file"),
    ("Zposition", "Wposition", "unknown channel 'Wposition'"),
    ("Frames: 2", "Frames: 3", "18 numbers of motion, expected 3 frames of 9 channels"),
    ("Frames: 2", "Frames: x", "expected Frames:"),
    ("OFFSET 0 -90 0", "OFFSET 0 -90 a", "damaged hierarchy"),
    ("-90", "-90000", "neither metres nor centimetres"),
    ("}\nMOTION", "\nMOTION", "brackets do not close"),
  ],
)
def test_bad_bvh(tmp_path, old, new, message):
  (tmp_path / "a.bvh").write_text(BVH.replace(old, new, 1))
  with pytest.raises(InputError, match=message):
    bvh.read(tmp_path / "a.bvh")
