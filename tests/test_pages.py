"""README and results pages say what the JSON files say, link to what exists, and their code runs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import claims, tables
from jaxmethods.data import problems
from jaxmethods.data.question_files import read_questions
from jaxmethods.data.sources import load_arrays
from jaxmethods.experiments import METHODS

ROOT = Path(__file__).parents[1]
PAGES = tables.pages()
names = lambda page: str(page.relative_to(ROOT))


def sections(text: str, language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_tables_are_those_of_the_json_files():
  assert [names(page) for page in tables.stale()] == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
  targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
  local = [target.split("#")[0] for target in targets if "://" not in target]
  assert [target for target in local if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_addresses_of_papers_are_whole(page):
  found = re.findall(r"\]\(https://arxiv.org/abs/([^)]*)\)", page.read_text())
  assert [number for number in found if not re.fullmatch(r"\d{4}\.\d{4,5}", number)] == []


def test_every_claimed_method_has_a_page_with_its_verdicts():
  for method in {claim.method for claim in claims.CLAIMS} | set(claims.TASKS):
    assert method in METHODS
    assert f"<!-- table: verdicts {method} -->" in (tables.RESULTS / f"{method}.md").read_text()
    assert any(claim.headline for claim in claims.CLAIMS if claim.method == method)


def test_cells_of_the_readme_are_short():
  cells = [
    re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell.strip())
    for line in tables.README.read_text().splitlines()
    if line.startswith("|")
    for cell in line.strip("|").split("|")
  ]
  assert len(cells) > 100
  assert [cell for cell in cells if len(cell) > 60] == []


def test_python_of_the_readme_runs():
  code, _ = sections(tables.README.read_text(), "python")
  found: dict = {}
  exec(compile(code, "README.md", "exec"), found)
  assert found["mask"].sum() == 6  # of 4 x 16
  assert found["metrics"]["loss"].shape == (3,)
  moved = jax.tree.map(lambda a, b: (a != b).any(), found["params"], found["server"].params)
  assert all(jax.tree.leaves(moved))
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found["tree"]))
  assert any((leaf["b"] != 0).any() for leaf in found["tree"].values())


def test_own_data_of_the_readme(cli, tmp_path, monkeypatch):
  text = tables.README.read_text()
  monkeypatch.chdir(tmp_path)
  exec(compile(sections(text, "python")[1], "README.md", "exec"), {})
  splits = lambda name: {k: len(y) for k, (_, y) in load_arrays(f"npz:{name}.npz").splits.items()}
  assert splits("all") == splits("pictures") == {"all": 120}
  assert splits("clients") == {"client 0": 40, "client 1": 40, "client 2": 40}
  assert splits("domains") == {"photo": 60, "sketch": 60}
  assert splits("splits") == {"train": 90, "test": 30}
  assert len(read_questions(tmp_path / "questions.jsonl")) == 6
  assert problems.load("problems.jsonl", 1)[0][0].check("4")
  first, *others = (line.split()[2:] for line in sections(text, "console")[-1].splitlines())
  small = ["--target=20", "--own_per_anchor=2", "--own_samples=20", "--prototype_samples=20"]
  for module, *words in (
    [*first, *small, "--batch_size=8"],
    *([*o, "--print_config"] for o in others),
  ):
    result = cli(module, *words)
    assert result.returncode == 0, (words, result.stderr)
  page = (tmp_path / "runs/own/clients/report.html").read_text()
  assert "npz:clients.npz (120 examples, sha256 " in page and "data of yours" in page


def test_commands_name_what_exists():
  for page in (page for page in PAGES if "<!-- table:" in page.read_text()):
    text = "\n".join(sections(page.read_text(), "console"))
    for module in re.findall(r"python -m ([\w.]+)", text):
      assert (ROOT / f"{module.replace('.', '/')}.py").exists(), (page, module)
    for method in re.findall(r"(?:--method |METHOD=)(\w+)", text):
      assert method in METHODS, (page, method)
    for config in re.findall(r"--config (\S+)", text):
      assert (ROOT / config).exists(), (page, config)


# --- the machinery --------------------------------------------------------------------------------


def figure(*values: float) -> tables.Figure:
  return tables.figure({str(seed): value for seed, value in enumerate(values)})


@pytest.fixture
def results(monkeypatch):
  """Puts rows in place of every results file: {row: {metric: figure}}."""

  def put(**rows: tables.Figure) -> None:
    monkeypatch.setattr(tables, "rows_of", lambda name: {k: {"m": x} for k, x in rows.items()})

  return put


CLAIM = claims.Claim(
  "x", "above", "data", claims.Cell("f", "ours", "m"), ("weak", "strong", "absent")
)


def test_interval_is_students():
  x = figure(1.0, 2.0, 3.0)
  assert x.mean == 2.0
  assert x.high - x.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
  assert figure(1.0).low is None


def test_difference_is_paired_by_seed():
  a = tables.figure({"1": 3.0, "2": 5.0, "4": 9.0})
  b = tables.figure({"1": 1.0, "2": 3.0, "3": 0.0})
  assert tables.difference(a, b).values == {"1": 2.0, "2": 2.0}
  assert tables.difference(a, tables.figure({"7": 1.0})) is None


@pytest.mark.parametrize(
  ("ours", "strong", "lower", "expected"),
  [
    ((3.0, 3.1, 3.2), (1.0, 1.1, 1.3), False, "came out"),
    ((3.0, 3.1, 3.2), (1.0, 1.1, 1.3), True, "did not"),
    ((1.0, 3.0, 2.0), (2.0, 1.0, 2.5), False, "did not"),
    ((3.0,), (1.0,), False, "one seed: ahead"),
  ],
)
def test_verdict_is_the_interval_of_the_lead(results, ours, strong, lower, expected):
  weak = [value + (2 if lower else -2) for value in strong]
  results(ours=figure(*ours), strong=figure(*strong), weak=figure(*weak))
  claim = CLAIM._replace(lower=lower)
  assert tables.best_rival(claim) == "strong"
  assert tables.verdict(claim) == expected


def test_a_failed_precondition_comes_first(results):
  results(ours=figure(3.0, 3.1, 3.2), weak=figure(1.0, 1.1, 1.2))
  need = lambda **limits: (claims.Need("text", "n", claims.Cell("f", "weak", "m"), **limits),)
  assert tables.verdict(CLAIM._replace(needs=need(least=1.0))) == "came out"
  untestable = tables.UNTESTABLE + ": n 1.1 ± 0.2, needed "
  assert tables.verdict(CLAIM._replace(needs=need(least=1.2))) == untestable + "≥ 1.2"
  assert tables.verdict(CLAIM._replace(needs=need(most=1.0))) == untestable + "≤ 1"


def test_of_a_difference_the_whole_interval_has_to_be_within_the_limit(results):
  need = claims.Need("text", "n", CLAIM.ours, minus=CLAIM.ours._replace(row="weak"), least=0.0)
  results(ours=figure(1.0, 1.1, 1.2), weak=figure(0.0, 0.2, 0.1))
  assert tables.is_met(need)
  results(ours=figure(1.0, 1.1, 3.0), weak=figure(0.0, 1.0, 0.0))
  assert tables.measured(need).mean > 1
  assert not tables.is_met(need)


def test_page_with_another_number_is_noticed():
  text = (tables.RESULTS / "spider.md").read_text()
  assert tables.filled(text) == text
  assert tables.filled(text.replace("spider 89.7", "spider 99.9")) == text


def test_shares_are_printed_in_per_cent_once():
  assert 50 < tables.read(claims.Cell("ggeur_office", "ggeur", "test_accuracy")).mean < 100
  assert 50 < tables.read(claims.Cell("spider", "spider", "H")).mean < 100
  assert 50 < tables.read(claims.Cell("mllm_tuning", "spider", "H")).mean < 100
  assert tables.read(claims.Cell("audit", "rahfl_cifar", "training_loss")).mean == 1.65
  assert 50 < tables.read(claims.Cell("rahfl_embedded", "ridge", "corrupted_accuracy")).mean < 100


def test_rows_whose_seeds_were_not_kept_say_so():
  assert "| spectral | - | 99.6 ± 0.4 |" in tables.rows_table("bye_second_tuning", "attack_after")


def test_students_are_those_that_validation_chooses():
  # As benchmarks.acgkd_tables wrote them down.
  log = (tables.RESULTS / "acgkd_mutag_students.md").read_text().split("## GIN student")[1]
  for row in ("acgkd", "gfkd", "random", "real"):
    written = float(re.search(rf"\| {row} \| ([\d.]+)", log)[1])
    mean = tables.read(claims.Cell("acgkd_mutag_students#gin", row, "test_accuracy")).mean
    assert mean / 100 == pytest.approx(written, abs=6e-4)
