import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import diagnosed, english

import lowbit
from lowbit.diagnosis import Diagnosis


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text(english(60))
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    from models import make_model

    return make_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="session")
def quantized(llama, text, tmp_path_factory) -> Callable[..., Path]:
    """Settings → llama quantized so, made once: to look at, not to change."""
    made: dict[str, Path] = {}

    def make(scheme: str, **settings: Any) -> Path:
        key = f"{scheme} {settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "q"
            if settings.get("method", "rtn") != "rtn" or scheme == "FP8":  # which reads a text
                settings = {"calib": str(text), "samples": 12, "seqlen": 48} | settings
            lowbit.quantize(llama, made[key], scheme=scheme, **settings)
        return made[key]

    return make


@pytest.fixture
def w4a16(quantized, tmp_path) -> Path:
    """llama in W4A16, to damage."""
    return Path(shutil.copytree(quantized("W4A16", group_size=32), tmp_path / "w4a16"))


@pytest.fixture(scope="session")
def healthy(quantized, llama, text) -> Diagnosis:
    """Of the undamaged W4A16."""
    return diagnosed(quantized("W4A16", group_size=32), llama, text)
