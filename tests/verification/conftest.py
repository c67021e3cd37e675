"""Good checkpoints of tiny models, one per scheme and format, made once; `broken` is a copy to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowbit.checkpoint import open_checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}
# Architectures beside the general one, by what is special about them.
OTHERS = {"qwen3_moe": {}, "mixtral": {}, "deepseek_v3": {}, "gpt2": {}, "gpt_oss": {}, "qwen3": SIZES,
          "tied": {"tie_word_embeddings": True, **SIZES}}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Name → folder of a 16-bit model."""
    from models import make_model

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("verify") / "original"
            special = SIZES if name == "llama" else OTHERS[name]
            made[name] = make_model(folder, "llama" if name == "tied" else name, **special)
        return made[name]

    return make


@pytest.fixture(scope="session")
def original(models) -> Path:
    return models("llama")


@pytest.fixture
def source(original):
    checkpoint = open_checkpoint(original)
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="session")
def good(models, tmp_path_factory):
    """Scheme (and settings, model) → folder."""
    from lowbit.pipeline import calibrate, write_checkpoint
    from lowbit.plan.plan import Request, prepare
    from lowbit.settings import make_settings

    made: dict[str, Path] = {}

    def make(scheme: str, model: str = "llama", **settings) -> Path:
        key = f"{scheme} {model} {settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp("good") / "model"
            prepared = prepare(Request(models(model), make_settings(scheme=scheme, **settings), threads=1))
            write_checkpoint(calibrate(prepared, folder), folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def broken(good, tmp_path):
    """A copy of a good folder."""

    def copy(scheme: str = "W4A16", **settings) -> Path:
        return Path(shutil.copytree(good(scheme, **settings), tmp_path / "broken"))

    return copy
