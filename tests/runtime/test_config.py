"""Values of the command line and of files mean what their field says, not what YAML would guess."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, strategies as st

from jaxmethods import experiments
from jaxmethods.errors import InputError
from jaxmethods.runtime import config as config_lib
from jaxmethods.runtime.experiment import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  name: str = "a"
  files: dict[str, str] = dataclasses.field(default_factory=lambda: {"first": "1.npz"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  text: str = ""  # a text
  # Stands above,
  # in two lines.
  choice: Literal["on", "off", "no"] = "no"
  flag: bool = False
  rate: float = 0.1  # per step
  shift: float = -1.0
  temperature: float = 1.0
  data_seed: int = 0
  stages: int | None = 3
  words: list[str] = dataclasses.field(default_factory=list)
  numbers: tuple[float, ...] = (0.5,)
  rates: dict[str, float] = dataclasses.field(default_factory=dict)
  group: Group = dataclasses.field(default_factory=Group)


def loaded(*overrides: tuple[str, str]) -> Config:
  return config_lib.load(Config, None, overrides=overrides)


@pytest.mark.parametrize(
  "text",
  ["off", "no", "on", "010", "1:30", "run #1.npz", "a: b", 'random:{"a": 1}', "[1", "null", "~", "${x}",
   "1e5", "0x10", "'quoted'", "- a", "&a", "*b", "!c", "%d", "@e", "2020-01-01", " spaced ", "a\nb",
   "ü"],
)  # fmt: skip
def test_a_text_is_what_was_typed(tmp_path, text):
  config = loaded(("text", text), ("group.name", text), ("group.files.v.2", text))
  assert config.text == config.group.name == config.group.files["v.2"] == text
  assert config.group.files["first"] == "1.npz"
  for write in (config_lib.to_yaml, config_lib.explained):  # and comes back from the file of a run
    file = tmp_path / "config.yaml"
    file.write_text(write(config), encoding="utf-8")
    assert config_lib.load(Config, file) == config


@given(
  text=st.text(st.characters(exclude_categories=["Cs", "Cc"])), key=st.text("ab.#: {no", min_size=1)
)
def test_any_text_survives_the_file_of_a_run(tmp_path_factory, text, key):
  config = Config(text=text, words=[text], group=Group(files={key: text}))
  file = tmp_path_factory.mktemp("run") / "config.yaml"
  file.write_text(config_lib.to_yaml(config), encoding="utf-8")
  again = config_lib.load(Config, file)
  assert (again.text, again.words, again.group.files[key]) == (text, [text], text)


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("steps", "010", 10), ("steps", "+7", 7), ("steps", "1_000", 1000), ("choice", "off", "off"),
    ("choice", "no", "no"), ("flag", "on", True), ("flag", "No", False), ("flag", "1", True),
    ("rate", "1", 1.0),
    ("rate", "1e-3", 1e-3), ("rate", ".5", 0.5), ("shift", "-2", -2.0), ("stages", "null", None),
    ("stages", "08", 8), ("words", "[no, 1:30, 'null']", ["no", "1:30", "null"]), ("words", "[]", []),
    ("numbers", "[1, 2e0]", (1.0, 2.0)), ("rates", "{no: 1, a.b: 2}", {"no": 1.0, "a.b": 2.0}),
    ("rates.a.b", "3", {"a.b": 3.0}), ("group", "{name: off}", Group(name="off")),
    ("group.files", "{}", Group(files={})),
  ],
)  # fmt: skip
def test_values_have_the_type_of_their_field(key, text, value):
  config = loaded((key, text))
  assert getattr(config, key.split(".")[0]) == value
  assert type(getattr(config, key.split(".")[0])) is type(value)


@pytest.mark.parametrize(
  ("key", "text", "words"),
  [
    ("steps", "1:30", "steps: expected int, got '1:30'"),
    ("steps", "true", "expected int"),
    ("steps", "1e3", "expected int"),
    ("steps", "٣", "expected int"),
    ("rate", "1:30", "expected float"),
    ("rate", ".", "expected float"),
    ("rate", "-0.1", "rate: must be at least 0, got -0.1"),
    ("rate", "nan", "rate: must be finite"),
    ("rate", "inf", "rate: must be finite"),
    ("temperature", "0", "temperature: must be positive"),
    ("flag", "maybe", "expected bool"),
    ("choice", "false", "expected one of on, off, no"),
    ("seed", "-1", "seed: must be at least 0"),
    ("seed", str(2**32), "seed: must be at most 4294967295"),
    ("data_seed", str(2**70), "data_seed: must be at most"),
    ("rates.a", "-1", "rates.a: must be at least 0"),
    ("words", "a", "expected list[str]"),
    ("words", "[a", "is not a YAML value"),
    ("words", "[[a]]", "expected list[str]"),
    ("steps.a", "1", "steps.a: unknown key; steps has no parts"),
    ("rates.", "1", "rates.: unknown key"),
    ("group", "a", "expected a mapping with the keys name, files"),
  ],
)
def test_what_a_field_does_not_mean_is_refused_by_its_name(key, text, words):
  with pytest.raises(InputError) as error:
    loaded((key, text))
  assert words in str(error.value)


@pytest.mark.parametrize(
  "contents",
  ["seed: 1\nseed: 2", "? [a]\n: 1", "a: &x [*x]", "[" * 3000, "seed: 1\n---\nseed: 2",
   "seed:\t1\n\tb: 2", "seed:",
   "group: {files: 3}", "rates: [1]", "seed: {a: 1}", "\x00", "short: 1", "method: [a]"],
)  # fmt: skip
def test_a_malformed_file_is_one_line(tmp_path, contents):
  file = tmp_path / "a.yaml"
  file.write_text(contents, encoding="utf-8")
  with pytest.raises(InputError) as error:
    config_lib.load(Config, file, method="tests.tiny")
  assert "a.yaml" in str(error.value)


def test_names_in_files_keep_their_words_and_dots(tmp_path):
  file = tmp_path / "a.yaml"
  file.write_text(
    "\ufeffgroup:\n  files:\n    no: a\n    vqa.v2: off\n    010: b\nrates: {on: 1}\n", "utf-8"
  )
  config = config_lib.load(Config, file)
  assert config.group.files == {"first": "1.npz", "no": "a", "vqa.v2": "off", "010": "b"}
  assert config.rates == {"on": 1.0}


def test_print_config_has_comments_and_choices():
  lines = config_lib.explained(Config(), method="m").splitlines()
  assert lines[0] == "method: m"
  assert "text: ''  # a text" in lines
  assert "choice: 'no'  # one of on, off, no; Stands above, in two lines." in lines
  assert "rate: 0.1  # per step" in lines
  assert "stages: 3  # int or null" in lines
  assert "flag: false  # true or false" in lines
  assert "  name: a  # str" in lines


@pytest.mark.parametrize("method", experiments.METHODS)
def test_every_config_comes_back_from_its_print(tmp_path, method):
  schema = experiments.load(method).Config
  for file in sorted(Path(__file__).parents[2].glob(f"configs/{method}*.yaml")):
    config = config_lib.load(schema, file, method=method)
    text = config_lib.explained(config, method=method)
    assert yaml.safe_load(text) == {"method": method, **config_lib.plain(config)}
    (tmp_path / "b.yaml").write_text(text, encoding="utf-8")
    assert config_lib.load(schema, tmp_path / "b.yaml", method=method) == config
  keys = [line for line in text.splitlines() if line[0] not in "- " and not line.endswith(":")]
  assert all("  # " in line for line in keys[1:])
