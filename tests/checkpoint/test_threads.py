"""`read` and `release` from several threads at once, as quantizing and verifying do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import OpenOptions, open_checkpoint


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_a_release_in_one_thread_leaves_reads_in_others_whole(tmp_path, kind):
    tensors = {f"t{index}": torch.full((64, 32), float(index)) for index in range(8)}
    (tmp_path / "config.json").write_text("{}")
    if kind == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, OpenOptions(allow_pickle=True))

    def use(index: int) -> bool:
        name = f"t{index % 8}"
        whole = torch.equal(checkpoint.read(name, 1, 63), tensors[name][1:63])
        checkpoint.release(name)
        return whole

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(400)))
    checkpoint.close()
