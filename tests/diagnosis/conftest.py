from pathlib import Path

import pytest
import torch
from faults import english

import lowbit


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


@pytest.fixture
def w4a16(llama, tmp_path) -> Path:
    lowbit.quantize(llama, tmp_path / "w4a16", scheme="W4A16", group_size=32)
    return tmp_path / "w4a16"
