"""Chat templates that would not end, or would fill the memory, are stopped; ordinary ones render as ever."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lowbit.errors import CheckpointError
from lowbit.text import template_limits
from lowbit.text.template_limits import bounded_template

TURNS = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]]
ORDINARY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}"
DOUBLES = "{% set n = namespace(x='a' * 999) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


AT_ONCE = "{% set n = messages[0].content * 999999999 %}{{ n|length }}"


def render(template):
    with bounded_template("model"):
        return render_jinja_template(TURNS, chat_template=template)[0][0]


def test_an_ordinary_template():
    assert render(ORDINARY) == "<user>hello<assistant>good day"


@pytest.mark.parametrize(("template", "says"), [(LOOPS, "steps"), (DOUBLES, "MiB"), (AT_ONCE, "MiB")])
def test_a_template_that_would_not_end(monkeypatch, template, says):
    monkeypatch.setattr(template_limits, "STEPS", 10_000)
    monkeypatch.setattr(template_limits, "MEMORY", 64 << 10)
    with pytest.raises(CheckpointError, match=f"model: its chat template takes more than .* {says}"):
        render(template)
    assert len(bytearray(256 << 20)) == 256 << 20  # and afterwards the process may grow as before
