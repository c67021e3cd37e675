"""What a blind comparison has: pairs of answers, who stands on which side, and a judge's verdicts.

    p = P(as uneven or more | each win is as likely to be the other's), two-sided, exact

the sign test of the wins: ties say nothing and are left out (Dixon and Mood 1946). It is the same sum as McNemar's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.tasks.result import mcnemar

Side = Literal["left", "right"]
Verdict = Literal["a", "b", "tie", "flip", "half", "unreadable"]


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p; 1 where nobody won."""
    return mcnemar(wins, losses)


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt. left  whose answer stands on the left: "a" or "b" """

    prompt: str
    kind: str
    a: str
    b: str
    left: Literal["a", "b"]

    @property
    def same(self) -> bool:
        """The same words: there is nothing to choose."""
        return self.a == self.b


@dataclass(frozen=True)
class Judged:
    """What a model made of the pairs that differ, each asked twice, with the sides swapped.

    verdicts  one per pair, None of a pair of equal answers:
              "a", "b"     won on either side
              "tie"        called a tie both times
              "flip"       the same side won both times, whoever stood there: a tie
              "half"       won once, called a tie once: a tie
              "unreadable" one of the two answers was not of the form asked for: not counted
    """

    model: str
    url: str
    verdicts: tuple[Verdict | None, ...]
    notes: tuple[str, ...] = ()

    def count(self, *kinds: Verdict) -> int:
        return sum(verdict in kinds for verdict in self.verdicts)

    @property
    def readable(self) -> int:
        return sum(verdict not in (None, "unreadable") for verdict in self.verdicts)

    @property
    def share_of_flips(self) -> float | None:
        """Of the pairs that were judged readably; None where none was."""
        return self.count("flip") / self.readable if self.readable else None

    @property
    def p(self) -> float:
        return sign_test(self.count("a"), self.count("b"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model, "url": self.url, "pairs": sum(verdict is not None for verdict in self.verdicts),
            "wins_a": self.count("a"), "wins_b": self.count("b"), "ties": self.count("tie", "flip", "half"),
            "flips": self.count("flip"), "share_of_flips": self.share_of_flips, "won_once": self.count("half"),
            "unreadable": self.count("unreadable"), "p": self.p, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class BlindTest:
    """`seed` of the order of sides; `sampling_seed` of the answers: a's to prompt i has it + i, b's the next ones."""

    a: str
    b: str
    pairs: tuple[AnswerPair, ...]
    seed: int
    max_tokens: int
    temperature: float
    sampling_seed: int
    judged: Judged | None = None
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> int:
        """Pairs whose answers are the same, word for word."""
        return sum(pair.same for pair in self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; not blind."""
        verdicts: Sequence[Any] = (None,) * len(self.pairs) if self.judged is None else self.judged.verdicts
        return {
            "a": self.a, "b": self.b, "prompts": len(self.pairs), "same_answers": self.same, "seed": self.seed,
            "max_tokens": self.max_tokens, "temperature": self.temperature, "sampling_seed": self.sampling_seed,
            "notes": list(self.notes), "judge": None if self.judged is None else self.judged.to_dict(),
            "pairs": [
                {"prompt": pair.prompt, "kind": pair.kind, "a": pair.a, "b": pair.b, "left": pair.left,
                 "same": pair.same, "verdict": verdict}
                for pair, verdict in zip(self.pairs, verdicts, strict=True)
            ],
        }  # fmt: skip


def judge_sentence(judged: Judged, a: str, b: str) -> str:
    """ "wins: 12 for A, 5 for B; ties: 4; sign test p = 0.14: neither is preferred; 14% of the verdicts flipped …" """
    wins, losses, ties = judged.count("a"), judged.count("b"), judged.count("tie", "flip", "half")
    if not judged.readable:
        return "no verdict of the judge can be read, so nothing is said of the models"
    favoured = (
        "neither is preferred" if judged.p > 0.05 or wins == losses else f"{a if wins > losses else b} is preferred"
    )
    return (f"wins: {wins} for {a}, {losses} for {b}; ties: {ties}; sign test p = {judged.p:.2g}: {favoured}; "
            f"{judged.share_of_flips:.0%} of the verdicts flipped with the side")  # fmt: skip
