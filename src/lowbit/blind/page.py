"""`render_blind`: the page that people vote on. It says nothing of the models until the votes are opened."""

from __future__ import annotations

import hashlib
import json

from lowbit.blind.result import BlindTest, judge_sentence
from lowbit.blind.seal import seal
from lowbit.report.page import render_page


def render_blind(test: BlindTest) -> str:
    """The whole page. Names, order, notes and verdicts are sealed; the visible text is the same whichever is which."""
    name = page_name(test)
    judged = test.judged
    payload = {
        "a": test.a,
        "b": test.b,
        "order": "".join(pair.left for pair in test.pairs),
        "seed": test.seed,
        "notes": list(test.notes),
        "judge": None if judged is None else {
            "name": judged.model, "sentence": judge_sentence(judged, test.a, test.b), "verdicts": judged.verdicts,
        },
    }  # fmt: skip
    rows = [
        {"prompt": pair.prompt, "kind": pair.kind, "same": pair.same,
         "sides": (("Left", pair.a if pair.left == "a" else pair.b), ("Right", pair.b if pair.left == "a" else pair.a))}
        for pair in test.pairs
    ]  # fmt: skip
    return render_page(
        "blind.html.j2", ("blind_count.js", "blind.js", "page.js"), name=name, pairs=rows, sealed=seal(payload, name),
        same=test.same, max_tokens=test.max_tokens, temperature=test.temperature,
    )  # fmt: skip


def page_name(test: BlindTest) -> str:
    """Under which a browser keeps the votes: another page, another name. A digest, which tells nothing of the order."""
    return hashlib.sha256(json.dumps(test.to_dict()).encode()).hexdigest()[:16]
