"""A page of all messages: who told whom, what was withheld from whom and why. One file, no network."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence

from jaxmethods.experiments.epeagent.conversation import CHANNELS, SERVER, USER, Message
from jaxmethods.experiments.epeagent.profiles import ROLES, Profiles
from jaxmethods.experiments.epeagent.questions import Case

_NAMES = {SERVER: "server", USER: "user"}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --cut: #b8434f; --told: #1f6f8b; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.35rem; margin: 0 0 .3rem; }
p.about { margin: 0 0 1rem; opacity: .75; }
form { display: flex; flex-wrap: wrap; gap: .7rem; position: sticky; top: 0; padding: .7rem 0;
  background: Canvas; border-bottom: 1px solid var(--line); }
label { display: grid; font-size: .75rem; opacity: .9; }
select, input { font: inherit; padding: .25rem .4rem; min-width: 8rem; }
label.tick { grid-auto-flow: column; align-items: end; gap: .4rem; }
label.tick input { min-width: 0; margin-bottom: .5rem; }
#count { margin: .8rem 0; font-variant-numeric: tabular-nums; }
article { border-bottom: 1px solid var(--line); padding: .6rem 0; display: grid;
  grid-template-columns: 14rem 1fr; gap: .2rem 1rem; }
.who { font-weight: 600; }
.where { font-size: .8rem; opacity: .7; grid-column: 1; }
.body { grid-column: 2; grid-row: 1 / span 3; overflow-wrap: anywhere; white-space: pre-wrap; }
.asked { font-size: .8rem; opacity: .7; }
.withheld { color: var(--cut); font-size: .85rem; }
.carries { color: var(--told); font-size: .85rem; }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; }
  .body { grid-column: 1; grid-row: auto; } }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const form = document.querySelector('form'), list = document.getElementById('list');
const STEP = 200;
let shown = STEP;
const name = (n) => n > 0 ? 'agent ' + n : data.names[n];
function line(parent, kind, text) {
  if (!text) return;
  const e = document.createElement('div');
  e.className = kind; e.textContent = text; parent.append(e);
}
function matches(m, f) {
  const [kase, , channel, from, to, text, , held] = m;
  return (!f.user || data.cases[kase][0] == f.user)
    && (!f.agent || from == f.agent || to == f.agent)
    && (!f.channel || data.channels[channel] == f.channel)
    && (!f.held || held.length)
    && (!f.words || data.texts[text].toLowerCase().includes(f.words.toLowerCase())
      || data.cases[kase][1].toLowerCase().includes(f.words.toLowerCase()));
}
function show() {
  const f = Object.fromEntries(new FormData(form));
  const found = data.messages.filter(m => matches(m, f));
  document.getElementById('count').textContent =
    found.length + ' of ' + data.messages.length + ' messages';
  list.replaceChildren();
  for (const [kase, round, channel, from, to, text, carries, held, why, written]
       of found.slice(0, shown)) {
    const e = document.createElement('article'), [user, asked] = data.cases[kase];
    line(e, 'who', name(from) + ' \\u2192 ' + name(to));
    line(e, 'where', data.channels[channel] + ', round ' + (round + 1) + ', user ' + user);
    const body = document.createElement('div'); body.className = 'body'; e.append(body);
    line(body, 'asked', asked);
    line(body, 'text', data.texts[text] || '(nothing)');
    if (written >= 0) line(body, 'asked', 'as written: ' + data.texts[written]);
    if (carries.length) line(body, 'carries', 'carries ' + carries.map(i => data.fields[i]).join(', '));
    if (held.length) line(body, 'withheld', 'withheld from ' + name(to) + ': '
      + held.map(i => data.fields[i]).join(', ') + (why ? ' (' + why + ')' : ''));
    else line(body, 'withheld', why);
    list.append(e);
  }
  document.getElementById('more').hidden = found.length <= shown;
}
new URLSearchParams(location.hash.slice(1)).forEach((value, key) => {
  const e = form.elements[key];
  if (e) e.type == 'checkbox' ? e.checked = true : e.value = value;
});
form.addEventListener('input', () => { shown = STEP; show(); });
form.addEventListener('submit', e => e.preventDefault());
document.getElementById('more').addEventListener('click', () => { shown += STEP; show(); });
show();
"""


def render(
  log: Sequence[Message],
  cases: Sequence[Case],
  profiles: Profiles,
  hide: Callable[[str], str],
  about: str,
) -> str:
  """Writes the page.

  Args:
    log: messages in order.
    cases: that they are about.
    profiles: users, agents and fields.
    hide: what is applied to every text before it is written to disk.
    about: first line.
  """
  texts: dict[str, int] = {}
  place = lambda text: texts.setdefault(hide(text), len(texts))
  messages = [
    (
      m.case, m.round, CHANNELS.index(m.channel), m.sender, m.receiver, place(m.text), sorted(m.taint),
      m.withheld, m.why, place(m.written) if m.written else -1,
    )
    for m in log
  ]  # fmt: skip
  data = {
    "channels": CHANNELS,
    "fields": profiles.fields,
    "names": {str(number): name for number, name in _NAMES.items()},
    "cases": [(case.user, f"{case.task}: {case.text}") for case in cases],
    "texts": list(texts),
    "messages": messages,
  }
  # "<" is all that could end the element that the data stand in.
  packed = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
  users = [(str(i), f"user {i}") for i in range(len(profiles.users))]
  agents = [(str(a), f"{a} {ROLES[a].partition(':')[0]}") for a in profiles.agents]
  filters = "".join(
    [
      _select("user", users),
      _select("agent", agents),
      _select("channel", [(c, c) for c in CHANNELS]),
    ]
  )
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Messages of agents</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>Who was told what</h1><p class="about">{html.escape(about)}. Values are {_shown(hide)}.</p>
<form>{filters}<label>text<input name="words" type="search"></label>
<label class="tick"><input name="held" type="checkbox" value="1">withheld only</label></form>
<div id="count" role="status"></div><main id="list"></main><button id="more">more</button>
<script type="application/json" id="data">{packed}</script><script>{_SCRIPT}</script></body></html>
"""


def _shown(hide: Callable[[str], str]) -> str:
  return "shown" if hide is str else "hidden: the field stands in place of its value"


def _select(name: str, options: Sequence[tuple[str, str]]) -> str:
  shown = "".join(
    f'<option value="{html.escape(value)}">{html.escape(text)}</option>' for value, text in options
  )
  return f'<label>{name}<select name="{name}"><option value="">all</option>{shown}</select></label>'
