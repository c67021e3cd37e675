"""What the tests of `lowbit refine` share: a tiny model, two texts, and a way to run."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowbit
from models import SHORT_TEXT, make_model

# Rows of 256, for K-quants.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("refine") / "model", **SIZES)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory) -> Path:
    """The first half of the text; `held_out` is the second."""
    path = tmp_path_factory.mktemp("texts") / "calibration.txt"
    path.write_text(Path(SHORT_TEXT).read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def held_out(calibration) -> Path:
    path = calibration.with_name("held-out.txt")
    path.write_text(Path(SHORT_TEXT).read_text(encoding="utf-8")[3000:], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def refine(calibration, held_out):
    """refine(file, output, reference, **settings), with few short windows."""

    def run(file, output, reference, **settings):
        small = {"calib": str(calibration), "samples": 6, "seqlen": 48, "expert_tokens": 8, "sweeps": 1}
        judged = {"text": held_out, "windows": 3, "window_tokens": 32}
        return lowbit.refine(file, output, reference=reference, **(small | judged | settings))

    return run
