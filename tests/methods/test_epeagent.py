"""Properties of the protocol of EPEAgent: rights, graphs, taint, retrieval, texts."""

import functools
import re
from pathlib import Path

import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.methods.epeagent import graph, minimise, policy, retrieval, scoring, taint
from jaxmethods.methods.epeagent.guard import Policy, guard
from tests.methods.epeagent_search import draw, rights, search

few = functools.partial(hypothesis.settings, deadline=None, database=None)
ACCESS = policy.access_matrix([[1], [1, 2], [], [3], [2, 3]], [1, 2, 3])


# --- rights ---------------------------------------------------------------------------------------


def test_default_deny():
  assert not ACCESS[2].any()
  with pytest.raises(ValueError, match="9 is no agent"):
    policy.access_matrix([[1], [9]], [1, 2, 3])
  assert policy.access_matrix([[], []], [1, 2]).sum() == 0


def test_a_grant_changes_one_cell_and_expires():
  none = policy.no_grants(2, 5, 3)
  cell = jnp.zeros((2, 5, 3), bool).at[1, 2, 0].set(True)
  given = policy.grant(none, cell, last=2, task=4)
  before = policy.allowed(ACCESS, none, round=0)
  for at, task, holds in [(0, 4, True), (2, 4, True), (3, 4, False), (0, 5, False)]:
    changed = np.argwhere(np.asarray(policy.allowed(ACCESS, given, round=at, task=task) ^ before))
    assert changed.tolist() == ([[1, 2, 0]] if holds else [])
  assert (policy.allowed(ACCESS, policy.revoke(given, cell), round=0, task=4) == before).all()


def test_servers_part_the_fields():
  parts = policy.servers(11, 3)
  assert (parts.sum(0) == 1).all()
  with pytest.raises(ValueError, match="count"):
    policy.servers(11, 0)


def plain_step(protocol, event):
  return STEP(protocol, policy.Event(*(jnp.int32(x) for x in event)))


STEP = jax.jit(policy.step)


class Conversation(hypothesis.stateful.RuleBasedStateMachine):
  """The jitted protocol beside dictionaries: whatever happens, both know the same."""

  USERS, FIELDS, AGENTS = 2, 5, 3
  index = (st.integers(0, 1), st.integers(0, 4), st.integers(0, 2))

  def __init__(self):
    super().__init__()
    self.state = policy.start(ACCESS, self.USERS)
    self.grants, self.known, self.ever = {}, set(), set()
    self.task = self.round = 0

  def may(self, user, field, agent):
    last, task = self.grants.get((user, field, agent), (-1, self.task))
    return bool(ACCESS[field, agent]) or (last >= self.round and task == self.task)

  def tell(self, user, agent, fields):
    permitted = {f for f in range(self.FIELDS) if self.may(user, f, agent)}
    self.ever |= {(user, f, agent) for f in permitted}
    self.known |= {(user, f, agent) for f in permitted & set(fields)}

  @hypothesis.stateful.rule(cell=st.tuples(*index), rounds=st.integers(1, 3))
  def consent(self, cell, rounds):
    self.grants[cell] = (self.round + rounds - 1, self.task)
    self.state = plain_step(self.state, (policy.GRANT, *cell, 0, rounds))

  @hypothesis.stateful.rule(cell=st.tuples(*index))
  def revoke(self, cell):
    self.grants.pop(cell, None)
    self.state = plain_step(self.state, (policy.REVOKE, *cell, 0, 0))

  @hypothesis.stateful.rule(user=index[0], agent=index[2])
  def look(self, user, agent):
    self.tell(user, agent, range(self.FIELDS))
    self.state = plain_step(self.state, (policy.VIEW, user, 0, agent, 0, 0))

  @hypothesis.stateful.rule(user=index[0], agent=index[2], peer=index[2])
  def send(self, user, agent, peer):
    self.tell(user, peer, {f for u, f, a in self.known if (u, a) == (user, agent)})
    self.state = plain_step(self.state, (policy.SEND, user, 0, agent, peer, 0))

  @hypothesis.stateful.rule(task=st.booleans())
  def advance(self, task):
    self.task, self.round = (self.task + 1, 0) if task else (self.task, self.round + 1)
    kind = policy.NEXT_TASK if task else policy.NEXT_ROUND
    self.state = plain_step(self.state, (kind, 0, 0, 0, 0, 0))

  @hypothesis.stateful.invariant()
  def same(self):
    cells = lambda array: {tuple(map(int, cell)) for cell in np.argwhere(np.asarray(array))}
    assert cells(self.state.known) == self.known
    assert cells(self.state.known & ~self.state.ever) == set()
    assert self.known <= self.ever == cells(self.state.ever)


TestConversation = Conversation.TestCase
TestConversation.settings = few(max_examples=30, stateful_step_count=25)


# --- graphs ---------------------------------------------------------------------------------------


@few(max_examples=40)
@hypothesis.given(st.integers(0, 2**30))
def test_levels_find_cycles(seed):
  import networkx as nx

  matrix = np.random.default_rng(seed).random((5, 5)) < 0.25
  peer = nx.from_numpy_array(matrix, create_using=nx.DiGraph)
  assert bool(graph.is_dag(jnp.asarray(matrix))) == nx.is_directed_acyclic_graph(peer)
  if nx.is_directed_acyclic_graph(peer):
    level = np.asarray(graph.levels(jnp.asarray(matrix)))
    assert all(level[i] < level[j] for i, j in np.argwhere(matrix))


def test_a_cycle_is_named():
  matrix = graph.from_edges([(1, 2), (2, 1), (2, 3)], [1, 2, 3])
  with pytest.raises(ValueError, match=r"through agents 1, 2$"):
    graph.check_dag(matrix, [1, 2, 3])
  with pytest.raises(ValueError, match="speak to itself"):
    graph.from_edges([(1, 1)], [1])
  with pytest.raises(ValueError, match="7 is no agent"):
    graph.from_edges([(1, 7)], [1, 2])


# --- taint ----------------------------------------------------------------------------------------


def test_no_field_leaks_whatever_is_drawn():
  """20,480 graphs x injections x grants x coalitions under full EPE, in one mapped program."""
  found = search(taint.Protection(True, taint.compose, taint.compose), draws=20480)
  assert found == dict.fromkeys(("views", "messages", "memory", "known"), 0)


@pytest.mark.parametrize(
  ("broken", "where"),
  [
    (taint.Protection(False, taint.compose, taint.compose), "views"),
    (taint.Protection(True, taint.open_delivery, taint.compose), "messages"),
    (taint.Protection(True, taint.cut, taint.compose), "messages"),  # encoded secrets pass
    (taint.Protection(True, taint.compose, taint.cut), "memory"),
    # The rights of the sender in place of those of the receiver.
    (taint.Protection(True, lambda p, h, sender, to: (p | h) & sender, taint.compose), "messages"),
    (
      taint.Protection(
        True,
        taint.by_servers(policy.servers(7, 3), jnp.array([True, False, True]), taint.compose),
        taint.compose,
      ),
      "messages",
    ),
  ],
  ids=["views", "messages", "text-filter", "memory", "sender", "server"],
)
def test_a_broken_policy_is_caught(broken, where):
  assert search(broken, draws=2048)[where] > 0


def test_grants_that_never_expire_are_caught():
  safe = taint.Protection(True, taint.compose, taint.compose)
  assert search(safe, draws=2048, expires=False)["views"] > 0


def test_withheld_messages_and_servers():
  assert search(taint.Protection(True, taint.withhold, taint.compose), 2048)["messages"] == 0
  parts = policy.servers(7, 3)
  split = taint.by_servers(parts, jnp.ones(3, bool), taint.compose)
  assert search(taint.Protection(True, split, split), 2048)["messages"] == 0


def test_the_search_has_something_to_find():
  access, grants, network, conduct = draw(512)
  allow = jax.vmap(rights)(access, grants)
  unprotected = taint.Protection(False, taint.open_delivery, taint.open_delivery)
  found = jax.jit(jax.vmap(lambda *x: taint.flow(*x, unprotected)))(allow, network, conduct)
  assert np.asarray(found.messages).any((1, 2, 3, 4)).mean() > 0.8
  absent = ~np.asarray(network.active)
  assert not np.asarray(found.messages)[
    np.broadcast_to(absent[:, :, None], found.messages.shape[:4])
  ].any()


def test_order_of_parallel_agents_does_not_matter():
  access, grants, network, conduct = jax.tree.map(lambda x: x[3], draw(512))
  allow = np.asarray(rights(access, policy.Grants(*grants)))
  turn = np.array([2, 0, 3, 1])
  moved = taint.Network(
    network.spatial[:, turn][:, :, turn],
    network.temporal[:, turn][:, :, turn],
    network.active[:, turn],
  )
  other = taint.Conduct(conduct.plain[:, turn], conduct.hidden[:, turn], conduct.coalition[turn])
  safe = taint.Protection(True, taint.compose, taint.compose)
  speak = jax.jit(lambda *x: taint.flow(*x, safe))
  one = speak(allow, network, conduct)
  two = speak(allow[..., turn], moved, other)
  np.testing.assert_array_equal(one.messages[:, turn][:, :, turn], two.messages)
  np.testing.assert_array_equal(one.known[turn], two.known)


def test_taint_goes_by_grant_only():
  on = lambda *bits: jnp.array(bits, bool)
  left = taint.declassify(on(1, 1, 1), on(0, 1, 0), on(0, 0, 1))
  assert left.tolist() == [True, False, False]


# --- retrieval ------------------------------------------------------------------------------------


@few(max_examples=30)
@hypothesis.given(st.integers(0, 2**30), st.integers(1, 5))
def test_masked_rows_change_nothing(seed, k):
  random = np.random.default_rng(seed)
  scores, mask = random.integers(-3, 4, 12).astype(np.float32), random.random(12) < 0.4
  found, valid = TOP[k](scores, mask)
  other = np.where(mask, scores, random.choice([np.nan, np.inf, 99], 12)).astype(np.float32)
  assert (TOP[k](other, mask)[0] == found).all()
  want = sorted(np.flatnonzero(mask), key=lambda i: (-scores[i], i))[:k]
  assert list(found) == want + [-1] * (k - len(want))
  assert valid.sum() == len(want)


TOP = {k: jax.jit(functools.partial(retrieval.top_k, k=k)) for k in range(1, 6)}


def test_the_lowest_permitted_row_beats_every_masked_one():
  scores = jnp.array([jnp.inf, jnp.nan, -jnp.inf, jnp.nan])
  found, valid = retrieval.top_k(scores, jnp.array([False, True, True, False]), 3)
  assert found.tolist() == [1, 2, -1] and valid.tolist() == [True, True, False]
  assert retrieval.top_k(scores, jnp.zeros(4, bool), 3)[0].tolist() == [-1, -1, -1]
  with pytest.raises(ValueError, match="k"):
    retrieval.top_k(scores, jnp.ones(4, bool), 0)


def test_users_side_by_side_agree_with_a_loop():
  random = np.random.default_rng(0)
  items, queries = random.normal(size=(3, 6, 8)), random.normal(size=(5, 8))
  mask = random.random((3, 2, 6)) < 0.5
  found, _ = jax.jit(retrieval.retrieve_users, static_argnums=3)(
    *map(jnp.float32, (items, queries)), mask, 2
  )
  for u, n, q in np.ndindex(3, 2, 5):
    z = np.where(mask[u, n], items[u] @ queries[q], -np.inf)
    want = [i if mask[u, n, i] else -1 for i in np.argsort(-z, kind="stable")[:2]]
    assert found[u, n, q].tolist() == want


def test_roles_match_fields():
  labels = jnp.array([[True, False], [False, True]])
  matched = retrieval.match_roles(jnp.eye(2), jnp.array([[1.0, 0], [1.0, 0]]))
  precision, recall = retrieval.precision_recall(matched, labels)
  assert (float(precision), float(recall)) == (0.5, 0.5)


# --- texts ----------------------------------------------------------------------------------------

VALUES = {
  "income": 62000,
  "goal": ["Wealth Accumulation", "Growth"],
  "pill": {"name": "Lisinopril"},
}
SECRETS = [minimise.atoms(value) for value in VALUES.values()]


@pytest.mark.parametrize(
  "text",
  [
    "She earns 62,000 a year.",
    "WEALTH   accumulation!",
    "takes lisinopril.",
    "ﬁne: ６２０００",
    "«62000»",
  ],
)
def test_cut_leaves_nothing(text):
  cut = minimise.cut(text, SECRETS)
  assert any(minimise.leaked(value, text) for value in VALUES.values())
  assert not any(minimise.leaked(value, cut) for value in VALUES.values())
  assert minimise.cut(cut, SECRETS) == cut


@few(max_examples=60)
@hypothesis.given(st.text(alphabet="62000, .-Lisinopril wealth accumulation", max_size=40))
def test_cut_of_any_text(text):
  cut = minimise.cut(text, SECRETS)
  assert not any(minimise.leaked(value, cut) for value in VALUES.values())
  assert minimise.cut(cut, SECRETS) == cut


def test_refusal_passes_and_what_cannot_be_cut_is_withheld():
  assert minimise.cut(minimise.REFUSAL, [("authority",)]) == minimise.REFUSAL
  assert minimise.cut("the word withheld", [("withheld",)]) == minimise.WITHHELD


@pytest.mark.parametrize(
  "texts",
  [
    ["TGlzaW5vcHJpbCBkYWlseQ=="],
    ["6c6973696e6f7072696c"],
    ["lirponisil"],
    ["yvfvabcevy"],
    ["part 1 of 2: lisin", "part 2 of 2: opril"],
    ["l i s i n o p r i l"],
  ],
)
def test_disguises_are_measured(texts):
  assert minimise.disguised(VALUES["pill"], texts)
  assert not minimise.disguised("Metformin", texts)


def test_composed_messages_hold_no_word_of_the_original():
  text = minimise.compose("62000 secretly (B)", 2, "B", {"goal": "Growth"})
  assert text == "Agent 2: goal: Growth. I choose (b)."
  assert minimise.compose("62000", 2, None, {}) == minimise.WITHHELD


def test_guard_in_ten_lines():
  rights = Policy({"income": {2}, "goal": {1, 2}}, VALUES)

  @guard(rights, agent=2)
  def agent(view, message):
    assert set(view) == {"income", "goal"}
    return f"{message}: {view['income']}, NjIwMDA= and {view['goal'][1]}, so (c)"

  told = agent("please", receiver=1)
  assert told == "Agent 2: goal: wealth accumulation, growth. I choose (c)."
  forwarded = guard(rights._replace(forward=True), agent=2)(agent.__wrapped__)("please", receiver=1)
  assert forwarded == "please: [withheld], NjIwMDA= and Growth, so (c)"


def test_guard_around_an_agent_framework():
  """The page's example, as it stands: the model reads a view, its text is composed anew."""
  pytest.importorskip("pydantic_ai", reason="pip install 'jaxmethods[agents]'")
  page = Path(__file__).parents[2] / "benchmarks" / "results" / "epeagent.md"
  code = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  names: dict = {}
  exec(compile("\n".join(code), str(page), "exec"), names)
  assert len(code) == 1 and names["told"].startswith("Agent 2: goal: growth.")
  read = [part.content for message in names["risk"].run_sync("?", deps={}).all_messages()
          for part in message.parts if part.part_kind == "tool-return"]  # fmt: skip
  assert read == [{}]


# --- scores ---------------------------------------------------------------------------------------


def test_refusal_is_strict_unless_asked():
  assert scoring.refuses(minimise.REFUSAL)
  assert not scoring.refuses(minimise.REFUSAL + " ")
  assert scoring.refuses(minimise.REFUSAL + " ", strict=False)


def test_audit_counts_what_outputs_hide():
  on = lambda *bits: jnp.array(bits, bool)
  found = scoring.audit(on(1, 0, 0, 0), on(1, 1, 1, 0), on(0, 0, 0, 0))
  np.testing.assert_allclose(found, [0.25, 0.75, 0.75, 0.5, 2 / 3], rtol=1e-6)
  clean = scoring.audit(*[on(0, 0)] * 3)
  assert [float(x) for x in clean] == [0, 0, 0, 0, 0]


def test_padding_changes_no_score():
  random = np.random.default_rng(1)
  positive, negative = random.integers(0, 5, (2, 9)).astype(np.float32)
  real = random.random(9) < 0.6
  padded = scoring.auc(*map(jnp.asarray, (positive, negative, real, real)))
  short = scoring.auc(jnp.asarray(positive[real]), jnp.asarray(negative[real]))
  np.testing.assert_allclose(padded, short, rtol=1e-6)


def test_letters_tell_values_where_they_do():
  letter = jnp.array([0, 1, 0, 1, 0, 1])
  fit = jnp.array([True] * 4 + [False] * 2)
  table, majority = scoring.attribute_inference(letter, letter, fit, ~fit, values=3)
  assert (float(table), float(majority)) == (1.0, 0.5)


def test_randomised_response_keeps_its_share():
  value = jnp.zeros(20000, jnp.int32)
  kept = (scoring.randomised_response(jax.random.key(0), value, 4, 1.0) == 0).mean()
  np.testing.assert_allclose(kept, np.e / (np.e + 3), atol=0.02)
