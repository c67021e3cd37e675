"""Which cases of a matrix the default suite runs: of a test marked `sampled(n, keep=(...), shared=False)`, one in n."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from zlib import crc32


def left_out(cases: Sequence[str], part: int, keep: Collection[str] = (), shared: bool = False) -> set[str]:
    """Node ids ("…::test[case]") that only `make test-all` runs: all but one in `part`, rounded up.

    The hash of its name draws a case, so that a new one changes what is drawn by one at most. Where the tests of a
    module share what they make of a case, `shared` draws the same cases for all. A word of `keep` in its id keeps one.
    """

    def place(case: str) -> int:
        test, _, parameters = case.partition("[")
        return crc32(f"{'' if shared else test.rpartition('::')[2]}[{parameters}".encode())

    drawn = sorted(cases, key=place)
    rest = drawn[-(-len(drawn) // part) :]
    return {case for case in rest if not any(word in case.partition("[")[2] for word in keep)}
