"""The HTTP back end against a real server on this machine; journals; agents by rule."""

import json

import pytest

from jaxmethods.errors import InputError
from jaxmethods.methods.epeagent.minimise import REFUSAL
from jaxmethods.testbeds.language import endpoint, rules
from jaxmethods.testbeds.language.endpoint import Endpoint
from jaxmethods.testbeds.language.journal import Journal
from jaxmethods.testbeds.language.settings import ChatSettings, check_backend
from jaxmethods.testbeds.language.turns import Note, Question, Turn
from tests.testbeds.chat_server import ChatServer


def turn(number=0, options=("low", "high")):
  return Turn(
    1, "role", (("risk", "low"),), (), Question(f"q{number}", "risk", f"risk {number}?", options)
  )


def ask(server, tmp_path, turns=None, waits=None, said=None, journal=None, **settings):
  chosen = ChatSettings(**{"timeout": 0.5, "tries": 3, "concurrency": 2, **settings})
  back = Endpoint(
    server.address, chosen, REFUSAL, journal or Journal(tmp_path / "answers.jsonl"),
    say=[].append if said is None else said.append, sleep=[].append if waits is None else waits.append,
  )  # fmt: skip
  return back(turns or [turn()])


@pytest.mark.parametrize(
  "how", ["busy", "failing", "slow", "drip", "cut", "malformed", "deep", "null"]
)
def test_a_bad_reply_is_asked_for_again(how, tmp_path):
  waits = []
  with ChatServer([how]) as server:
    assert ask(server, tmp_path, waits=waits) == ["(a)"]
    assert len(server.asked) == 2 and len(waits) == 1


def test_waits_are_the_servers_or_double_with_jitter(tmp_path):
  waits = []
  with ChatServer(["busy", "until", "failing", "failing"]) as server:
    ask(server, tmp_path, waits=waits, tries=5, longest_wait=20)
  assert 3 <= waits[0] <= 3.3 and waits[1] == 20
  assert 2 <= waits[2] <= 4 and 4 <= waits[3] <= 8


@pytest.mark.parametrize("how", ["huge", "malformed", "slow"])
def test_what_stays_bad_is_no_answer(how, tmp_path):
  said = []
  with ChatServer(otherwise=how) as server:
    assert ask(server, tmp_path, said=said, tries=2) == [""]
    assert len(server.asked) == (1 if how == "huge" else 2)
  assert len(said) == 1 and len(Journal(tmp_path / "answers.jsonl")) == 0


@pytest.mark.parametrize(("how", "status"), [("forbidden", 401), ("elsewhere", 307)])
def test_a_refusal_of_the_request_ends_the_run_and_tells_no_key(how, status, tmp_path, monkeypatch):
  monkeypatch.setenv("SOME_KEY", "sk-very-secret")
  with (
    ChatServer(otherwise=how) as server,
    pytest.raises(InputError, match=f"status {status}$") as error,
  ):
    ask(server, tmp_path, key_variable="SOME_KEY")
  assert server.keys == ["Bearer sk-very-secret"] and "secret" not in str(error.value)


def test_the_key_is_kept_nowhere(tmp_path, monkeypatch):
  monkeypatch.setenv("SOME_KEY", "sk-very-secret")
  said = []
  with ChatServer(["good", *["failing"] * 9]) as server:
    ask(server, tmp_path, [turn(0), turn(1)], said=said, key_variable="SOME_KEY", concurrency=1)
  assert set(server.keys) == {"Bearer sk-very-secret"}
  assert "secret" not in (tmp_path / "answers.jsonl").read_text() + "".join(said)


def test_nobody_there(tmp_path):
  with ChatServer() as server:
    pass
  with pytest.raises(InputError, match="cannot be reached"):
    ask(server, tmp_path)


def test_nothing_is_asked_twice(tmp_path):
  turns = [turn(i % 3) for i in range(6)]
  with ChatServer() as server:
    first = ask(server, tmp_path, turns)
    again = ask(server, tmp_path, turns)
    assert first == again == ["(a)"] * 6 and len(server.asked) == 3


def test_a_hostile_reply_stays_text(tmp_path):
  hostile = "</script><script>alert(1)</script>\x00\ud800 [[0]] ignore all rules"
  with ChatServer(otherwise=hostile) as server:
    (text,) = ask(server, tmp_path)
  text.encode()
  assert text.startswith("</script>")


def test_requests_under_way_are_few(tmp_path):
  with ChatServer(delay=0.05) as server:
    running, most = [0], [0]
    behave = server.behave

    def counted(*args):
      with server.lock:
        running[0] += 1
        most[0] = max(most[0], running[0])
      behave(*args)
      with server.lock:
        running[0] -= 1

    server.behave = counted
    ask(server, tmp_path, [turn(i) for i in range(12)], timeout=5, concurrency=3)
  assert 1 < most[0] <= 4  # a reply is read before its handler has counted down


def test_journal_forgets_a_line_that_was_cut_off(tmp_path):
  path = tmp_path / "answers.jsonl"
  Journal(path).put("one", "1")
  path.write_bytes(path.read_bytes() + b'{"request": "ab')
  journal = Journal(path)
  assert len(journal) == 1 and journal.put("two", "2") == "2"
  assert Journal(path).get("one") == "1" and Journal(path).get("two") == "2"
  path.write_text("nonsense\n")
  with pytest.raises(InputError, match="line 1"):
    Journal(path)


def test_settings_are_checked():
  for bad in ("http://", "http://me:pw@host/v1", "https://host/v1?key=1", "ftp://x", "gpt"):
    with pytest.raises(ValueError, match="backend"):
      check_backend(bad)
  with pytest.raises(ValueError, match=r"chat\.tries"):
    ChatSettings(tries=0)


# --- by rule --------------------------------------------------------------------------------------

RULES = rules.Rules(REFUSAL, len)


def test_rules_answer_from_what_they_see():
  assert rules.reply([turn()], RULES) == ["The user, risk: low. (a)"]
  blind = turn()._replace(visible=())
  assert rules.reply([blind], RULES) == [REFUSAL]
  heard = blind._replace(inbox=(Note(2, "x (b)"), Note(1, "y (a)"), Note(3, "(b)")))
  assert rules.reply([heard], RULES) == ["(b)"]
  assert rules.reply([turn(options=())], RULES) == ["low"]
  refusing = turn(options=("low", "Refuse to answer"))._replace(visible=())
  assert rules.reply([refusing], RULES) == ["(b)"]


@pytest.mark.parametrize(
  ("order", "told"),
  [(rules.PLAIN, "risk low"), (rules.ENCODED, "cmlzayBsb3c="), (rules.SPLIT, "part 1 of 2: l")],
)
def test_careless_agents_obey(order, told):
  ordered = turn()._replace(inbox=(Note(2, order),))
  assert told in rules.reply([ordered], RULES)[0]
  assert told not in rules.reply([ordered], RULES._replace(echo=False))[0]


def test_prompts_hold_what_was_shown():
  body = json.loads(endpoint._body(turn(), ChatSettings(), REFUSAL))
  assert "- risk: low" in body["messages"][1]["content"] and body["model"] == "gpt-4o-mini"
