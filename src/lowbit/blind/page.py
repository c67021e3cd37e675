"""`render_blind`: the page that people vote on. It says nothing of the models until the votes are opened.

The key (which side is whose, and what the models are called) is sealed, so that nobody reads it by accident:

    sealed = base64(payload XOR stream)     stream: xorshift32 from the FNV-1a hash of the page's name, a byte per step

This hides the key from a look at the page's source, and is no encryption: who wants to know runs the page's own script,
`blind_count.js`, which has the same two functions.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from lowbit.blind.result import BlindTest, judge_sentence
from lowbit.report.page import render_page

_MASK = 0xFFFFFFFF


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


def seal(payload: dict[str, Any], page: str) -> str:
    data = json.dumps(payload, ensure_ascii=True).encode()
    return base64.b64encode(bytes(a ^ b for a, b in zip(data, _stream(page), strict=False))).decode()


def unseal(sealed: str, page: str) -> dict[str, Any]:
    data = base64.b64decode(sealed)
    return json.loads(bytes(a ^ b for a, b in zip(data, _stream(page), strict=False)))


def _stream(page: str) -> Iterator[int]:
    state = 2166136261
    for byte in page.encode():
        state = ((state ^ byte) * 16777619) & _MASK
    while True:
        state ^= (state << 13) & _MASK
        state ^= state >> 17
        state ^= (state << 5) & _MASK
        yield state & 255
