from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path) -> Path:
    """3000 bytes, so 3000 tokens of the byte tokenizer."""
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (3000,), generator=generator)
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters.tolist())))
    return path
