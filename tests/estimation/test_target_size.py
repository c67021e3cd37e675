"""`--target-size`: what fits is found by the plan, and the files that are then written have that size."""

from __future__ import annotations

import pytest

import lowbit
from commands import command
from lowbit.errors import ShapeError, UsageError
from lowbit.estimation.target_size import FILE_TYPES, FOLDER_SCHEMES, WITH_IMPORTANCE, scheme_within
from lowbit.estimation.weights import weight_bytes


@pytest.mark.parametrize("gguf", [True, False])
def test_it_is_the_largest_that_fits(tiny_llama, gguf):
    candidates = FILE_TYPES if gguf else FOLDER_SCHEMES
    grouped = {} if gguf else {"group_size": 32}
    sizes = {name: weight_bytes(tiny_llama, name, **grouped).files for name in candidates}
    largest, smallest = max(sizes.values()), min(sizes.values())
    for target in (largest, (largest + smallest) // 2, smallest):
        found = scheme_within(tiny_llama, target, gguf, **grouped)
        assert found.bytes == sizes[found.scheme] <= target
        above = list(candidates)[: list(candidates).index(found.scheme)]
        assert all(sizes[name] > target for name in above)
        assert found.larger == (above[-1] if above else None)
    with pytest.raises(UsageError, match=candidates[-1]):
        scheme_within(tiny_llama, smallest - 1, gguf, **grouped)


def test_with_an_importance_matrix_there_are_smaller_ones(tiny_llama):
    assert scheme_within(tiny_llama, 1 << 30, True, imatrix="measure").scheme == WITH_IMPORTANCE[0]
    assert set(WITH_IMPORTANCE) - set(FILE_TYPES) == {
        name for name in WITH_IMPORTANCE if name.startswith(("IQ1", "IQ2", "IQ3"))
    }


def test_what_no_candidate_takes_is_refused_by_the_plan(tiny_llama):
    with pytest.raises(ShapeError):
        scheme_within(tiny_llama, 1 << 30, False, group_size=7)


def test_the_command_writes_what_it_chose(tiny_llama, tmp_path):
    target = weight_bytes(tiny_llama, "Q5_K_M").files
    out = tmp_path / "out.gguf"
    done = command(tmp_path, "quantize", tiny_llama, "-o", out, "--target-size", target)
    assert done.code == 0, done.stderr
    chosen = scheme_within(tiny_llama, target, True)
    assert f"--target-size {target}: {chosen.scheme} takes" in done.stderr
    assert out.stat().st_size == chosen.bytes <= target
    assert lowbit.inspect(out) is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [(("--scheme", "Q4_K_M"), "chooses the scheme"), (("--recipe", "r.yaml"), "a recipe names its scheme")],
)
def test_two_choices_are_refused(tiny_llama, tmp_path, given, said):
    (tmp_path / "r.yaml").write_text("scheme: W4A16\n")
    given = [str(tmp_path / each) if each == "r.yaml" else each for each in given]
    done = command(tmp_path, "quantize", tiny_llama, "-o", tmp_path / "x.gguf", "--target-size", "1GB", *given)
    assert done.code == 2
    assert said in done.stderr
    assert not (tmp_path / "x.gguf").exists()
