"""The page: what it shows and hides, its reckoning in Node, and votes in headless Chromium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from browser import CHROMIUM, chromium, probe
from lowbit.blind.page import page_name, render_blind, seal, unseal
from lowbit.blind.result import AnswerPair, BlindTest, Judged, sign_test
from lowbit.report.page import TEMPLATES

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node on the PATH")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
ORDER = "abba"


def make_test(**changes):
    pairs = tuple(
        AnswerPair(
            f"prompt {index}", "facts" if index < 2 else "code", f"first says {index}", f"second says {index}", left
        )
        for index, left in enumerate(ORDER)
    )
    same = AnswerPair("prompt 4", "code", "both say so", "both say so", "b")
    judged = Judged("critic", "http://j", ("a", "b", "flip", "unreadable", None))
    pairs = (*pairs, same)
    test = BlindTest("models/alpha", "models/beta-Q4", pairs, 77, 256, 0.0, 0, judged, ("a note on alpha",))
    return BlindTest(**{**test.__dict__, **changes})


class Reader(HTMLParser):
    """Titles and texts of the answers, in order; the attributes of #ballots."""

    def __init__(self, html):
        super().__init__()
        self.said, self.ballots, self._in = [], {}, False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self._in = tag == "p" and values.get("class") == "said"
        if self._in:
            self.said.append("")
        if values.get("id") == "ballots":
            self.ballots = values

    def handle_endtag(self, tag):
        self._in = False

    def handle_data(self, data):
        if self._in:
            self.said[-1] += data


def test_answers_stand_in_the_order_that_was_drawn():
    assert Reader(render_blind(make_test())).said == [
        "first says 0", "second says 0", "second says 1", "first says 1", "second says 2", "first says 2",
        "first says 3", "second says 3", "both say so", "both say so",
    ]  # fmt: skip


def test_nothing_that_can_be_read_tells_which_model_is_which():
    test = make_test()
    html = render_blind(test)
    sealed = Reader(html).ballots["data-sealed"]
    shown = re.sub(r"<script>.*?</script>", "", html.replace(sealed, ""), flags=re.S)
    for word in ("alpha", "beta", "critic", "seed", ORDER, "a note on"):
        assert word not in shown, word
    assert not re.search(r"alpha|beta|abba", base64.b64decode(sealed).decode("latin-1"))
    assert unseal(sealed, page_name(test))["order"] == ORDER + "b"


def test_both_sides_are_marked_up_alike():
    """With answers and order swapped, the page is the same but for its name and key."""
    test = make_test()
    swapped = tuple(AnswerPair(p.prompt, p.kind, p.b, p.a, "b" if p.left == "a" else "a") for p in test.pairs)
    pages = [render_blind(test), render_blind(make_test(pairs=swapped))]
    plain = [re.sub(r'data-(page|sealed)="[^"]*"', "", page) for page in pages]
    assert plain[0] == plain[1]


def test_the_page_loads_nothing_and_only_its_own_script_runs():
    html = render_blind(make_test())
    assert not re.search(
        r'(src|href)="(?!#)|https?://(?!www\.w3\.org)|url\(', re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    )
    assert "default-src 'none'" in unescape(html)
    assert "script-src 'sha256-" in unescape(html)


@pytest.mark.parametrize(
    "text", ["</script><script>alert(1)</script>", '"><img src=x onerror=y>', "{{ 7 * 7 }}", "a\u202eb"]
)
def test_hostile_text_stays_text(text):
    pairs = (AnswerPair(text, text, text, text + "!", "a"),)
    html = render_blind(make_test(a=text, b=text, pairs=pairs, judged=None, notes=(text,)))
    assert "<img" not in html
    assert "alert(1)</script>" not in html
    assert "49" not in Reader(html).said[0]
    assert "\u202e" not in html
    assert html.count("<script>") == 1


def test_sealing_is_undone_and_another_page_cannot_undo_it():
    assert unseal(seal({"order": "ab", "a": "ü"}, "one"), "one") == {"order": "ab", "a": "ü"}
    with pytest.raises(ValueError, match=r"decode|Expecting|Extra data"):
        unseal(seal({"order": "ab" * 20}, "one"), "two")


def node(expression):
    """The value of an expression behind blind_count.js."""
    script = (TEMPLATES / "blind_count.js").read_text(encoding="utf-8")
    code = f"{script}\nconsole.log(JSON.stringify({expression}))"
    assert NODE is not None
    done = subprocess.run([NODE, "-e", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_node
def test_the_page_opens_what_python_sealed():
    payload = {"order": "abba" * 50, "a": "Modell ü", "notes": ["…"]}
    assert node(f"unseal({json.dumps(seal(payload, 'a1b2'))}, 'a1b2')") == payload


@needs_node
def test_the_sign_test_of_the_page_is_that_of_python():
    cases = [(a, b) for a in range(0, 14, 3) for b in range(0, 14, 2)] + [(300, 340), (1000, 900)]
    found = node(f"{json.dumps(cases)}.map(([a, b]) => signTest(a, b))")
    assert found == pytest.approx([sign_test(a, b) for a, b in cases], rel=1e-9)


@needs_node
def test_votes_are_counted_for_the_model_and_not_for_the_side():
    pairs = [{"kind": "x", "same": False}] * 5 + [{"kind": "y", "same": True}, {"kind": "y", "same": False}]
    votes = {"0": "left", "1": "left", "2": "right", "3": "tie", "4": "bad"}
    found = node(f"tally({json.dumps(votes)}, 'abbaabb', {json.dumps(pairs)})")
    assert found["all"] == {"a": 2, "b": 1, "tie": 1, "bad": 1, "same": 1, "none": 1}
    assert found["kinds"]["y"] == {"a": 0, "b": 0, "tie": 0, "bad": 0, "same": 1, "none": 1}
    assert found["p"] == pytest.approx(sign_test(2, 1))


@needs_node
@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ("{", "not JSON"),
        ("[]", "no votes"),
        ("null", "no votes"),
        ('{"page": "p", "votes": 3}', "no votes"),
        ('{"page": "q", "votes": {}}', "another page"),
        ('{"page": "p", "votes": {"0": "both"}}', "a vote that cannot be: both on 0"),
        ('{"page": "p", "votes": {"9": "left"}}', "a vote that cannot be: left on 9"),
        ('{"page": "p", "votes": {"1": "left"}}', "a vote that cannot be: left on 1"),
    ],
)
def test_a_file_of_votes_that_is_none_is_refused(saved, says):
    pairs = '[{"same": false}, {"same": true}]'
    words = f"readVotes({json.dumps(saved)}, 'p', {pairs})"
    found = node(f"(() => {{ try {{ return {words} }} catch (e) {{ return e.message }} }})()")
    assert says in found


@needs_node
def test_saved_votes_are_read_again():
    saved = '{"page": "p", "votes": {"0": "bad"}, "opened": true}'
    assert node(f"readVotes({json.dumps(saved)}, 'p', [{{}}])") == {"votes": {"0": "bad"}, "opened": True}


@needs_node
def test_the_sentence_prefers_only_what_chance_does_not_explain():
    words = "((a, b) => sentence({ all: { a, b, tie: 1, bad: 0 }, p: signTest(a, b) }, 'X', 'Y'))"
    said = "Wins: 12 for X, 1 for Y; ties: 1; both bad: 0. Sign test: p = 0.003, X is preferred."
    assert node(f"{words}(12, 1)") == said
    assert "no preference" in node(f"{words}(3, 2)")
    assert node(f"{words}(0, 0)") == "Nobody won a pair."


VOTE = """
  window.confirm = () => true;
  const vote = (pair, name) => $(`#pair-${pair} [data-vote=${name}]`).click();
  found.before = document.body.innerText.includes("alpha");
  vote(0, "left"); vote(1, "left"); vote(2, "right"); vote(2, "right"); vote(3, "tie");
  found.standing = $("#standing").textContent;
  found.kept = Object.values(localStorage).join();
  $("#open").click();
  vote(0, "right");
  found.verdict = $("#verdict").textContent;
  found.sides = [...document.querySelectorAll("#pair-1 h4")].map((h) => h.textContent);
  found.rows = [...$("#by-kind").rows].map((row) => [...row.cells].map((cell) => cell.textContent).join(" "));
  found.judge = $("#judge").textContent;
  found.notes = $("#notes").textContent;
  found.pressed = $("#pair-0 [aria-pressed=true]").dataset.vote;
"""


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_voting_and_opening_in_a_browser(tmp_path, width):
    found = probe(render_blind(make_test()), tmp_path, VOTE, width=width)
    assert found["content"] <= width
    assert found["before"] is False
    assert found["standing"] == "3 of 4 voted"
    assert '"1":"left"' in found["kept"]
    assert found["verdict"].startswith("Wins: 1 for models/alpha, 1 for models/beta-Q4; ties: 1; both bad: 0.")
    assert found["sides"] == ["Left: models/beta-Q4", "Right: models/alpha"]
    assert found["rows"] == ["facts 1 1 0 0 0 0", "code 0 0 1 0 1 1", "all 1 1 1 0 1 1"]
    assert found["judge"].startswith("Judge critic: wins: 1 for models/alpha, 1 for models/beta-Q4; ties: 1")
    assert found["judge"].endswith("you agreed on 2 of 2.")
    assert "seed 77" in found["notes"]
    assert found["pressed"] == "left"  # once opened, votes stay


@pytest.mark.browser
@needs_browser
def test_saved_votes_are_loaded_in_a_browser(tmp_path):
    test = make_test()
    saved = json.dumps({"page": page_name(test), "votes": {"0": "right", "3": "bad"}, "opened": False})
    # Chromium's virtual time does not wait for the disk, so that a busy machine would be asked before the file is read.
    script = f"""
      const transfer = new DataTransfer();
      transfer.items.add(new File([{json.dumps(saved)}], "votes.json"));
      File.prototype.text = async () => {json.dumps(saved)};
      $("#load").files = transfer.files;
      $("#load").dispatchEvent(new Event("change"));
      setTimeout(() => parent.postMessage({{ problems, standing: $("#standing").textContent,
        said: $("#said").textContent }}, "*"), 200);
    """
    found = probe(render_blind(test), tmp_path, script)
    assert found["standing"] == "2 of 4 voted"
    assert found["said"] == "2 votes loaded."


@pytest.mark.browser
@needs_browser
def test_the_page_runs_under_its_own_policy_without_complaint(tmp_path):
    (tmp_path / "blind.html").write_text(render_blind(make_test()))
    ran = chromium(tmp_path, "--dump-dom", (tmp_path / "blind.html").as_uri())
    assert "CONSOLE" not in ran.stderr
    assert "0 of 4 voted" in unescape(ran.stdout)
