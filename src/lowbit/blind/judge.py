"""A model as judge of pairs of answers, over OpenAI's chat completions.

Each pair is judged twice, with the sides swapped, because judges prefer a side (Zheng et al. 2023, Judging
LLM-as-a-Judge with MT-Bench and Chatbot Arena, from where the form of the verdict is too): [[A]], [[B]] or [[C]] for a
tie. A verdict that flips with the side is a tie. A reply with no verdict, or with several that differ, is counted as
unreadable and never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lowbit.blind.answering import trimmed
from lowbit.blind.result import AnswerPair, Judged, Verdict
from lowbit.tasks.endpoint import Endpoint
from lowbit.tasks.kept import kept, kept_file, key_of

TOKENS = 1024  # of a reply; judges think aloud
SYSTEM = (
    "You compare the answers of two assistants to the same question. Judge which answers it better: correctness first, "
    "then whether it does what was asked, then clarity. Do not let the order of the answers, their length or their "
    "names influence you. Give your reason in one or two sentences. Then end with your verdict, in this form and "
    "nothing after it: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] for a tie."
)
_ASKED = "[Question]\n{}\n\n[Answer of assistant A]\n{}\n\n[Answer of assistant B]\n{}\n[End]"
_FORM = re.compile(r"\[\[([ABC])\]\]")


def read_verdict(reply: object) -> str | None:
    """ "A", "B" or "C"; None of a reply that has no verdict, or several that differ."""
    if not isinstance(reply, str):
        return None
    found = set(_FORM.findall(trimmed(reply, False).text))
    return found.pop() if len(found) == 1 else None


def combine(first: str | None, second: str | None) -> Verdict:
    """Of the verdict with a's answer first, and that with b's answer first."""
    if first is None or second is None:
        return "unreadable"
    straight = {"A": "a", "B": "b", "C": "tie"}[first]
    swapped = {"A": "b", "B": "a", "C": "tie"}[second]
    if straight == swapped:
        return straight  # type: ignore[return-value]
    return "half" if "tie" in (straight, swapped) else "flip"


def judge(
    pairs: Sequence[AnswerPair], server: Endpoint, done: Callable[[int], None] = lambda count: None
) -> tuple[Judged, Callable[[], None]]:
    """(the verdicts, how to remove the replies that were kept for a run that is stopped).

    done  called with the number of pairs that are through; pairs of equal answers are not asked
    """
    verdicts: list[Verdict | None] = []
    before = 0
    path = kept_file("blind", f"verdicts-{key_of(f'{server.url} {server.name}')}")
    with kept(path) as (known, add):
        for pair in pairs:
            replies = []
            for first, second in () if pair.same else ((pair.a, pair.b), (pair.b, pair.a)):
                key = key_of(pair.prompt, first, second)
                if key in known and isinstance(known[key], str | None):
                    before += 1
                else:
                    add(key, _reply(server, pair.prompt, first, second))
                replies.append(read_verdict(known[key]))
            verdicts.append(combine(*replies) if replies else None)
            done(len(verdicts))
    notes = (f"{before} replies of the judge are from a run that was stopped",) if before else ()
    return Judged(server.name, server.url, tuple(verdicts), notes), lambda: path.unlink(missing_ok=True)


def _reply(server: Endpoint, prompt: str, first: str, second: str) -> Any:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": _ASKED.format(prompt, first or "(no answer)", second or "(no answer)")},
    ]
    body = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
    message = server.choice("/v1/chat/completions", body).get("message")
    said = message.get("content") if isinstance(message, dict) else None
    return said if isinstance(said, str) else None
