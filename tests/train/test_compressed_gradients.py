"""Compressed gradients: the codes by hand, and two processes that train with them."""

from __future__ import annotations

import json
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import lowbit
from commands import GUARD, end, process
from lowbit.errors import UsageError
from lowbit.train.gradients import (
    BLOCK,
    CompressedGradients,
    compress_gradients,
    decode_bits,
    decode_top,
    encode_bits,
    encode_top,
)

WAYS = {"32 bits": None, "8 bits": {"bits": 8}, "4 bits": {"bits": 4}, "Top-K": {"top_k": 0.1},
        "4 bits without feedback": {"bits": 4, "error_feedback": False}}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_values_come_back_within_half_a_step(bits, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    message = encode_bits(values, bits)
    blocks = -(-count // BLOCK)
    assert message.dtype is torch.uint8
    assert len(message) == blocks * (BLOCK * bits // 8 + 4)
    found = decode_bits(message, count, bits)
    limit = 2 ** (bits - 1) - 1
    for start in range(0, count, BLOCK):  # the formula, written out
        part = values[start : start + BLOCK]
        scale = part.abs().max() / limit
        assert torch.equal(found[start : start + BLOCK], (part / scale).round() * scale)


def test_the_bytes_of_four_values():
    message = encode_bits(torch.tensor([7.0, -7.0, 1.0, -3.0]), 4)
    assert message[:2].tolist() == [0x1F, 0x59]  # 7 + 8 = 15 low, −7 + 8 = 1 high; 9 low, 5 high
    assert message[-4:].view(torch.float32).item() == 1.0


def test_zeros_stay_zeros_and_nan_is_not_hidden():
    values = torch.zeros(512)
    assert torch.equal(decode_bits(encode_bits(values, 8), 512, 8), values)
    for bad in (torch.nan, torch.inf):
        values[300] = bad
        found = decode_bits(encode_bits(values, 8), 512, 8)
        assert torch.equal(found[:256], torch.zeros(256))
        assert found[256:].isnan().all()


def test_top_k_keeps_the_largest():
    values = torch.tensor([0.1, -5.0, 0.2, 3.0, -0.3, 0.0, 0.0, 0.0, 0.0, 0.0])
    message = encode_top(values, 0.2)
    assert len(message) == 2 * 8
    assert decode_top(message, 10).tolist() == [0, -5.0, 0, 3.0, 0, 0, 0, 0, 0, 0]
    assert decode_top(encode_top(values, 1e-9), 10).count_nonzero() == 1


@pytest.mark.parametrize("how", [{"bits": 3}, {"bits": None}, {"bits": 8, "top_k": 0.1}, {"bits": None, "top_k": 0.0}])
def test_a_choice_that_makes_no_sense(how):
    with pytest.raises(UsageError):
        CompressedGradients(**how)


def test_a_model_that_sends_nothing():
    with pytest.raises(UsageError, match="sends no gradients"):
        compress_gradients(nn.Linear(2, 2))
    assert lowbit.train.compress_gradients is compress_gradients


def train_on_two(rank: int, folder: str) -> None:
    """One of two processes: regression on data of its own, in every way; results as JSON."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=GUARD)
    )
    generator = torch.Generator().manual_seed(100 + rank)
    x, mixing = (
        torch.randn(64, 32, generator=generator),
        torch.randn(32, 16, generator=torch.Generator().manual_seed(7)),
    )
    results = {}
    for name, how in WAYS.items():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16)))
        state = None if how is None else compress_gradients(model, **how)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.2), []
        for _ in range(60):
            loss = (model(x) - x @ mixing).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        total = sum(parameter.double().sum().item() for parameter in model.parameters())
        results[name] = {"losses": losses, "sum": total, "ratio": None if state is None else state.plain / state.sent}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    os._exit(0)  # gloo's destructors may wait for each other for ever


def fail_or_wait(rank: int) -> None:
    if rank == 0:
        raise SystemExit(3)
    threading.Event().wait()


def test_a_rank_that_fails_is_not_waited_for():
    """Its peer would wait in a collective: the test that started both has to end."""
    runs = [process(fail_or_wait, rank) for rank in range(2)]
    end(runs)
    assert [run.exitcode for run in runs] == [3, -signal.SIGKILL]


def test_two_processes_train_as_with_32_bits(tmp_path):
    runs = [process(train_on_two, rank, str(tmp_path)) for rank in range(2)]
    end(runs)
    assert [run.exitcode for run in runs] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for name in WAYS:
        assert first[name]["sum"] == second[name]["sum"], f"{name}: the ranks hold different weights"
    plain = first["32 bits"]["losses"][-1]
    assert plain < 0.1 * first["32 bits"]["losses"][0]
    assert abs(first["8 bits"]["losses"][-1] / plain - 1) < 0.01
    assert abs(first["4 bits"]["losses"][-1] / plain - 1) < 0.05
    assert abs(first["Top-K"]["losses"][-1] / plain - 1) < 0.25
    assert 3.7 < first["8 bits"]["ratio"] < 4  # the last block of each bucket is padded
    assert 7.2 < first["4 bits"]["ratio"] < 8
    assert 4.9 < first["Top-K"]["ratio"] < 5.1  # 8 bytes for each tenth value of 4


def test_feedback_recovers_what_rounding_loses():
    """A gradient below half a step of its block is lost without feedback, and sent on average with it."""
    values = torch.full((256,), 0.02)
    values[0] = 1.0  # the step of 4 bits is 1/7
    sums = {}
    for feedback in (True, False):
        error, total = torch.zeros(256), torch.zeros(256)
        for _ in range(100):
            wanted = values + error * feedback
            sent = decode_bits(encode_bits(wanted, 4), 256, 4)
            error, total = wanted - sent, total + sent
        sums[feedback] = (total / 100)[1:].mean().item()
    assert sums[False] == 0.0
    assert abs(sums[True] - 0.02) < 0.002
