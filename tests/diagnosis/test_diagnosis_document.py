"""The thresholds that docs/diagnose.md states are those of the code."""

from pathlib import Path

import pytest

from lowbit.diagnosis import contributions, findings, inputs, pair

TEXT = " ".join((Path(__file__).parents[2] / "docs" / "diagnose.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize(
    "stated",
    [
        f"1/{pair.FACTOR:g} … {pair.FACTOR:g}",
        f"more than {100 * pair.ROWS_SHARE:g} % of its rows outside 1/{pair.ROW_FACTOR:g} …",
        f"at least {findings.FEWER_BITS:g} bits less",
        f"head in under {findings.LOW_HEAD_BITS:g} bits",
        f"at least {100 * findings.OUTSTANDING:g} % of the KLD and four times the median",
        f"{100 * findings.ENDS_MORE:g} points more, and three times as many",
        f"≥ {inputs.OUTLIER_ABSMAX:g} (the rule of LLM.int8()) and {inputs.OUTLIER_RATIO:g} times",
        f"more than {inputs.MISMATCH_LEAST:g} and more than {inputs.MISMATCH_RATIO:g} times that of the halves",
        f"lacks more than {100 * inputs.UNSEEN:g} % of this text's tokens",
        f"over {100 * contributions.SHARE:g} % of the KLD",
    ],
)
def test_stated_threshold(stated):
    assert stated in TEXT
    assert (findings.TIMES_MEDIAN, findings.ENDS_TIMES, inputs.CLIPPED_RATIO) == (4, 3, 2)
    assert contributions.SIGNIFICANT == 2
