"""Good checkpoints of a tiny model, one per scheme, made once; `broken` is a copy to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowbit.checkpoint import open_safetensors

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    from models import make_model

    return make_model(tmp_path_factory.mktemp("verify") / "original", **SIZES)


@pytest.fixture
def source(original):
    checkpoint = open_safetensors(original)
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="session")
def good(original, tmp_path_factory):
    """Scheme (and settings) → folder."""
    from lowbit.pipeline import prepare, write_checkpoint
    from lowbit.settings import make_settings

    made: dict[str, Path] = {}

    def make(scheme: str, **settings) -> Path:
        key = f"{scheme} {settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp("good") / "model"
            write_checkpoint(prepare(original, make_settings(scheme=scheme, **settings), threads=1), folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def broken(good, tmp_path):
    """A copy of a good folder."""

    def copy(scheme: str = "W4A16", **settings) -> Path:
        return Path(shutil.copytree(good(scheme, **settings), tmp_path / "broken"))

    return copy
