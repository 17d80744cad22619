"""The command line from outside: what it prints, how it fails, what it leaves behind."""

import json
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxmethods.experiments import METHODS

TINY = ("--method", "tests.tiny")


def lines(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("module", ["train.run", "eval.run", "eval.compare"])
def test_help_is_quick(process, module):
  process(module, "--help")  # the disk's cache
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    result = process(module, "--help")
    seconds.append(time.perf_counter() - start)
  assert result.returncode == 0
  assert "--method" in result.stdout
  assert min(seconds) < 0.3 * slowness()


def slowness() -> float:
  """Returns how much longer than on an idle machine things take now: other tests may be running."""
  start = time.perf_counter()
  sum(range(2_000_000))
  return max(1.0, (time.perf_counter() - start) / 0.03)


@pytest.mark.parametrize(
  "arguments",
  [["--help"], ["--list"], [*TINY, "--print_config"], [*TINY, "--stepz", "3"], ["--method", "x"]],
)
def test_answers_without_jax(arguments):
  code = (
    "import sys, runpy\n"
    f"sys.argv = ['train.run', *{list(arguments)!r}]\n"
    "try: runpy.run_module('train.run', run_name='__main__')\n"
    "except SystemExit: pass\n"
    "print('heavy:', [m for m in ('jax', 'flax', 'optax', 'sklearn', 'orbax') if m in sys.modules])"
  )
  import subprocess

  result = subprocess.run(
    [sys.executable, "-c", code],
    env={"PYTHONPATH": str(Path(__file__).parents[1]), "JAXMETHODS_ALLOCATOR": "0", "HOME": "/tmp"},
    capture_output=True,
    text=True,
  )
  assert result.stdout.splitlines()[-1] == "heavy: []", result


def test_list_has_every_method(cli):
  result = cli("train.run", "--list")
  assert result.returncode == 0
  for name, method in METHODS.items():
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
    assert method.summary in line
    assert method.embedded_run in line


def test_print_config_is_resolved_and_can_be_used(cli, tmp_path):
  (tmp_path / "a.yaml").write_text("seed: 5\noptimizer: {name: adam}\nshort: {steps: 4}\n")
  result = cli(
    "train.run", *TINY, "--config", "a.yaml", "--short", "--optimizer.learning_rate=1e-3",
    "--print_config",
  )  # fmt: skip
  config = yaml.safe_load(result.stdout)
  assert config["method"] == "tests.tiny"
  assert (config["seed"], config["steps"], config["batch_size"]) == (5, 4, 64)
  assert config["optimizer"] == {"learning_rate": 0.001, "name": "adam"}
  (tmp_path / "b.yaml").write_text(result.stdout)
  again = cli("train.run", *TINY, "--config", "b.yaml", "--print_config")
  assert again.stdout == result.stdout


BAD = {
  # name: (module, arguments, words of the one line)
  "unknown_method": ("train.run", ["--method", "fedsps"], ["fedsps", "nearest is fedssp"]),
  "no_method": ("train.run", [], ["--method"]),
  "no_module": ("train.run", ["--method", "tests.nothing"], ["tests.nothing"]),
  "not_a_method": ("train.run", ["--method", "tests.conftest"], ["Config", "build"]),
  "unknown_key": ("train.run", [*TINY, "--stepz", "3"], ["stepz", "nearest", "steps"]),
  "unknown_nested_key": (
    "train.run", [*TINY, "--optimizer.learning_rat=3"],
    ["optimizer.learning_rat", "nearest", "optimizer.learning_rate"],
  ),
  "ungrouped_key": ("train.run", [*TINY, "--learning_rate", "1"], ["optimizer.learning_rate"]),
  "wrong_type": ("train.run", [*TINY, "--steps", "many"], ["steps", "'many'", "int"]),
  "fraction": ("train.run", [*TINY, "--steps", "1.5"], ["steps", "1.5", "int"]),
  "wrong_choice": (
    "train.run", [*TINY, "--optimizer.name", "sdg"], ["optimizer.name", "sdg", "sgd, adam"],
  ),
  "group_as_value": ("train.run", [*TINY, "--optimizer", "3"], ["optimizer", "learning_rate"]),
  "zero_steps": ("train.run", [*TINY, "--steps", "0"], ["steps", "at least 1", "0"]),
  "no_value": ("train.run", [*TINY, "--steps"], ["steps", "needs a value"]),
  "abbreviated": ("train.run", ["--meth", "tests.tiny"], ["method"]),
  "positional": ("train.run", [*TINY, "steps"], ["'steps'", "--key VALUE"]),
  "missing_yaml": ("train.run", [*TINY, "--config", "no.yaml"], ["no.yaml", "No such file"]),
  "yaml_is_directory": ("train.run", [*TINY, "--config", "."], ["directory"]),
  "malformed_yaml": ("train.run", [*TINY, "--config", "malformed.yaml"], ["malformed.yaml, line 2"]),
  "binary_yaml": ("train.run", [*TINY, "--config", "binary.yaml"], ["binary.yaml", "text"]),
  "list_yaml": ("train.run", [*TINY, "--config", "list.yaml"], ["list.yaml", "key: value"]),
  "unknown_in_yaml": ("train.run", [*TINY, "--config", "typo.yaml"], ["typo.yaml", "sed", "seed"]),
  "twice_in_yaml": ("train.run", [*TINY, "--config", "twice.yaml"], ["twice.yaml", "seed"]),
  "typo_in_short": ("train.run", [*TINY, "--config", "short.yaml"], ["short", "stps", "steps"]),
  "other_method": ("train.run", [*TINY, "--config", "other.yaml"], ["other.yaml", "'fedssp'"]),
  "no_short": ("train.run", [*TINY, "--short"], ["--short"]),
  "workdir_is_file": ("train.run", [*TINY, "--workdir", "list.yaml"], ["list.yaml", "is a file"]),
  "workdir_below_file": ("train.run", [*TINY, "--workdir", "list.yaml/run"], ["list.yaml"]),
  "malformed_mesh": ("train.run", [*TINY, "--mesh", "clients"], ["--mesh", "clients=8"]),
  "process_without_id": (
    "train.run", [*TINY, "--coordinator", "localhost:1"], ["--num_processes", "--process_id"],
  ),
  "process_count": ("train.run", [*TINY, "--num_processes", "two"], ["--num_processes", "two"]),
  "unknown_data": ("train.run", [*TINY, "--data", "digit"], ["data", "'digit'", "digits"]),
  "nothing_to_evaluate": ("eval.run", [*TINY, "--workdir", "nowhere"], ["nowhere", "checkpoint"]),
  "unknown_row": ("eval.compare", [*TINY, "--rows", "sgd,adm"], ["'adm'", "nearest is adam"]),
  "far_row": ("eval.compare", [*TINY, "--rows", "x"], ["unknown row 'x'; rows are sgd, adam"]),
  "far_method": ("train.run", ["--method", "x"], ["methods are acgkd, adafreq, bye,", "--list"]),
  "zero_seeds": ("eval.compare", [*TINY, "--seeds", "0"], ["--seeds", "at least 1"]),
  "json_nowhere": ("eval.compare", [*TINY, "--json", "no/where.json"], ["no/where.json"]),
  "tune_no_value": ("eval.compare", [*TINY, "--tune", "seed"], ["'seed'", "KEY=VALUE"]),
  "tune_run": ("eval.compare", [*TINY, "--tune", "steps=1,2"], ["steps", "the run"]),
  "tune_one": ("eval.compare", [*TINY, "--tune", "pause=1"], ["pause", "two different"]),
  "tune_typo": ("eval.compare", [*TINY, "--tune", "batch_sise=1,2"], ["batch_sise", "batch_size"]),
  "tune_text": ("eval.compare", [*TINY, "--tune", "batch_size=1,x"], ["batch_size", "'x'", "int"]),
  "tune_equal": ("eval.compare", [*TINY, "--tune", "pause=1,1.0"], ["pause", "one value twice"]),
  "tune_twice": ("eval.compare", [*TINY, "--tune", "pause=1,2;pause=3,4"], ["pause", "twice"]),
  "tune_untold": (
    "eval.compare", ["--method", "ggeur", "--tune", "learning_rate=1,2"], ["ggeur has no validation"],
  ),
  "along_one": ("eval.compare", [*TINY, "--along", "1"], ["--along", "at least 2"]),
  "along_untold": ("eval.compare", ["--method", "fedssp", "--along", "3"], ["--along", "no metric"]),
  "seed_map": ("eval.compare", [*TINY, "--seed_map", "pmap"], ["seed_map", "vmap", "scan"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(cli, tmp_path, case):
  files = {
    "malformed.yaml": b"seed: [1\nsteps: 2",
    "binary.yaml": b"\xff\xfe\x00\x80",
    "list.yaml": b"[1, 2]",
    "typo.yaml": b"sed: 1",
    "twice.yaml": b"seed: 1\nseed: 2",
    "short.yaml": b"short: {stps: 2}",
    "other.yaml": b"method: fedssp",
  }
  for name, contents in files.items():
    (tmp_path / name).write_bytes(contents)
  module, arguments, words = BAD[case]
  result = cli(module, *arguments)
  assert result.returncode == 2, result
  assert len(result.stderr.splitlines()) == 1, result.stderr
  assert "Traceback" not in result.stdout + result.stderr
  for word in words:
    assert word in result.stderr
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


OWN = """
from tests.tiny import Config, build, rows
"""


@pytest.mark.parametrize("method", ["mine", "ideas.mine"])
def test_a_method_of_ones_own_is_one_file(process, tmp_path, method):
  file = tmp_path / f"{method.replace('.', '/')}.py"
  file.parent.mkdir(exist_ok=True)
  file.write_text(OWN)
  found = f"{tmp_path}:{Path(__file__).parents[1]}"
  result = process("train.run", "--method", method, "--steps", 3, PYTHONPATH=found)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "runs" / method / "default/report.html").exists()
  shown = process("eval.compare", "--method", method, "--list_rows", PYTHONPATH=found)
  assert shown.stdout.split() == ["sgd", "adam"]


@pytest.mark.parametrize("method", ["mine", "ideas.mine"])
@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("import no_such_library\n", ["No module named 'no_such_library'", "mine.py, line 1"]),
    ("x = 1\ny = 1 / 0\n", ["ZeroDivisionError", "mine.py, line 2"]),
    ("def build(:\n", ["SyntaxError", "mine.py, line 1"]),
    ("from jaxmethods import nothing\n", ["cannot import name 'nothing'", "mine.py, line 1"]),
  ],
)
def test_a_fault_in_ones_own_module_is_one_line(process, tmp_path, method, source, words):
  file = tmp_path / f"{method.replace('.', '/')}.py"
  file.parent.mkdir(exist_ok=True)
  file.write_text(source)
  found = f"{tmp_path}:{Path(__file__).parents[1]}"
  result = process("train.run", "--method", method, PYTHONPATH=found)
  assert result.returncode == 2, result
  (line,) = result.stderr.splitlines()
  assert line.startswith(f"error: --method {method}: cannot be imported: ")
  for word in words:
    assert word in line
  assert not (tmp_path / "runs").exists()


def test_train_then_evaluate(cli, tmp_path):
  result = cli("train.run", *TINY, "--workdir", "w", "--steps", 30, "--log_every", 5, "--debug")
  assert result.returncode == 0, result.stderr
  assert "allocator: " in result.stdout
  workdir = tmp_path / "w"
  assert [line["step"] for line in lines(workdir)] == [5, 10, 15, 20, 25, 30]
  for line in lines(workdir):
    assert list(line)[:3] == ["step", "loss", "accuracy"]
    assert line["seconds"] > 0
  assert yaml.safe_load((workdir / "config.yaml").read_text())["log_every"] == 5
  assert list((workdir / "events").glob("events.out.tfevents.*"))
  assert_report(workdir, ["curves.png", "weights.png"])
  assert not (workdir / "results.json").exists()

  result = cli("eval.run", *TINY, "--workdir", "w")
  assert result.returncode == 0, result.stderr
  results = json.loads((workdir / "results.json").read_text())
  assert results["method"] == "tests.tiny"
  assert results["step"] == 30
  last = lines(workdir)[-1]
  assert results["metrics"] == {name: last[name] for name in ("accuracy", "a_loss", "per_class")}
  assert "accuracy" in result.stdout
  assert_report(workdir, ["curves.png", "weights.png"])


def assert_report(workdir: Path, pictures: list[str]) -> None:
  page = (workdir / "report.html").read_text()
  assert "1,797 handwritten digits" in page.split("<h1>")[0]
  for picture in pictures:
    name = picture.removesuffix(".png")
    assert f'<figure id="{name}"><img src="data:image/png;base64,' in page
    assert (workdir / picture).read_bytes().startswith(b"\x89PNG")


def test_another_config_stops_and_names_the_keys(cli, tmp_path):
  def run(*arguments):
    return cli("train.run", *TINY, "--workdir", "w", "--seed", 1, *arguments)

  assert run("--steps", 10).returncode == 0
  before = (tmp_path / "w/metrics.jsonl").read_text()

  result = run("--steps", 10, "--batch_size", 32, "--optimizer.name", "adam")
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert "batch_size (was 64, now 32)" in result.stderr
  assert "optimizer.name (was 'sgd', now 'adam')" in result.stderr
  assert "seed" not in result.stderr
  assert run("--steps", 5).returncode == 2  # a shorter run cannot be what was meant
  assert (tmp_path / "w/metrics.jsonl").read_text() == before

  longer = run("--steps", 15)
  assert longer.returncode == 0, longer.stderr
  assert "from 10 to 15 steps" in longer.stdout
  assert [line["step"] for line in lines(tmp_path / "w")] == list(range(1, 16))
  assert (tmp_path / "w/metrics.jsonl").read_text().startswith(before)


def test_compare_chooses_settings_on_validation(cli, tmp_path):
  arguments = (
    *TINY, "--steps", 20, "--eval_every", 20, "--workdir", "t", "--seeds", 2, "--along", 2,
    "--tune", "optimizer.learning_rate=1e-9,0.01;batch_size=32,64",
  )  # fmt: skip
  result = cli("eval.compare", *arguments)
  assert result.returncode == 0, result.stderr
  found = json.loads((tmp_path / "t/compare.json").read_text())
  for name in ("sgd", "adam"):
    search = found["tune"][name]
    assert search["chosen"]["optimizer.learning_rate"] == 0.01
    scores = [trial["metrics"]["accuracy"]["mean"] for trial in search["trials"]]
    assert len(scores) == 4
    best = search["trials"][scores.index(max(scores))]
    assert best["point"] == search["chosen"]
    assert best["seeds"] == 1  # 450 items
  assert "[0." in result.stdout
  # The chosen rate is the one that is run: the row of a plain run with it.
  chosen = found["tune"]["adam"]["chosen"]
  plain = cli(
    "train.run", *TINY, "--steps", 20, "--eval_every", 20, "--workdir", "w", "--optimizer.name",
    "adam", *(f"--{key}={value}" for key, value in chosen.items()),
  )  # fmt: skip
  assert plain.returncode == 0, plain.stderr
  (adam,) = [row for row in found["rows"] if row["name"] == "adam"]
  assert adam["metrics"]["accuracy"]["values"][0] == pytest.approx(
    lines(tmp_path / "w")[-1]["accuracy"], rel=1e-4
  )
  assert adam["along"]["steps"] == [0, 10, 20]
  assert adam["along"]["metrics"]["accuracy"][-1] == adam["metrics"]["accuracy"]["values"]
  assert found["matched"]["rows"]["sgd"]["reached"] == 2  # the first row sets the level

  again = cli("eval.compare", *arguments)  # from what is kept
  assert again.returncode == 0, again.stderr
  kept = json.loads((tmp_path / "t/compare.json").read_text())
  assert kept == found
  other = cli("eval.compare", *arguments[:-1], "batch_size=32,64")
  assert other.returncode == 2
  assert "tune" in other.stderr


def test_compare(cli, tmp_path):
  arguments = ("--steps", 20, "--average_last", 3, "--eval_every", 2, "--workdir", "c")
  result = cli("eval.compare", *TINY, *arguments, "--seeds", 3, "--json", "out.json")
  assert result.returncode == 0, result.stderr
  rows = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert [row["name"] for row in rows] == ["sgd", "adam"]
  for row in rows:
    assert list(row["metrics"]) == ["accuracy", "a_loss"]  # the vector is left out
    accuracy = row["metrics"]["accuracy"]
    assert len(accuracy["values"]) == 3
    assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 3)
    assert accuracy["ci95"] >= 0
    assert 0 < row["step_seconds"] < row["seconds"]
    assert row["step_bytes"] > 0
    assert row["name"] in result.stdout
  assert_report(tmp_path / "c", ["comparison.png"])

  # One seed of it is a plain run with that seed, its last three evaluations averaged.
  plain = cli("train.run", *TINY, *arguments[:6], "--workdir", "w", "--seed", 1)
  assert plain.returncode == 0, plain.stderr
  last = [line["a_loss"] for line in lines(tmp_path / "w") if line["step"] in (16, 18, 20)]
  assert rows[0]["metrics"]["a_loss"]["values"][0] == pytest.approx(sum(last) / 3, rel=1e-4)

  # All ways to map seeds agree; only one row is asked for.
  for seed_map in ("vmap", "scan"):
    result = cli(
      "eval.compare", *TINY, *arguments[:6], "--workdir", seed_map, "--seeds", 3, "--seed_map",
      seed_map, "--rows", "adam",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (adam,) = json.loads((tmp_path / seed_map / "compare.json").read_text())["rows"]
    assert adam["metrics"]["a_loss"]["values"] == pytest.approx(
      rows[1]["metrics"]["a_loss"]["values"], rel=1e-4
    )
