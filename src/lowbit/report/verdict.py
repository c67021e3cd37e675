"""What a measured divergence is called: one phrase per range of the mean KL divergence, and the page says which.

    mean KLD in nats per token      called
    at most 0.005                   practically the same as the source
    at most 0.02                    very close to the source
    at most 0.1                     slightly worse than the source
    at most 0.5                     noticeably worse than the source
    more                            much worse than the source

The phrases are a convention; the figures stand beside them. Where the standard error reaches over a limit, both are
given.
"""

from __future__ import annotations

import math
from itertools import pairwise

from lowbit.report.markup import Html, tag
from lowbit.report.schema import Evaluation
from lowbit.report.units import NBSP, significant

LEVELS = (
    (0.005, "practically the same as the source"),
    (0.02, "very close to the source"),
    (0.1, "slightly worse than the source"),
    (0.5, "noticeably worse than the source"),
    (math.inf, "much worse than the source"),
)


def words(evaluation: Evaluation | None) -> str | None:
    """ "slightly worse than the source"; two phrases where the error bar reaches over a limit; None if not compared."""
    if evaluation is None or evaluation.kld_mean is None:
        return None
    error = evaluation.kld_se or 0.0
    low, high = (level(evaluation.kld_mean + step) for step in (-error, error))
    return " or ".join(LEVELS[index][1] for index in range(low, high + 1))


def level(kld: float) -> int:
    """Index into `LEVELS`."""
    return next(index for index, (limit, _) in enumerate(LEVELS) if kld <= limit)


def explained() -> Html:
    """The limits, folded away."""
    limits = [significant(limit, 1) for limit, _ in LEVELS[:-1]]
    ranges = [f"at most {limits[0]}", *(f"{low} to {high}" for low, high in pairwise(limits)), f"above {limits[-1]}"]
    rows = (
        tag("tr", tag("td", f"{limits}{NBSP}nats"), tag("td", called))
        for limits, (_, called) in zip(ranges, LEVELS, strict=True)
    )
    why = (
        "By the mean KL divergence per token from the source, on the text of the evaluation. The words are a "
        "convention of lowbit's; a large model bears a given scheme better than a small one."
    )
    return tag(
        "details",
        tag("summary", tag("span", "How the verdict is worded")),
        tag("p", why, class_="caption"),
        tag("table", tag("tbody", *rows), class_="limits"),
        class_="wording",
    )
