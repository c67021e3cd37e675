"""A command that is stopped in the middle says so, soon, and leaves no half checkpoint."""

from __future__ import annotations

import signal
import time

import pytest
from commands import start

# The plainest compiled kernels: rounding takes long enough to be interrupted.
SLOW = {"LOWBIT_FORCE_ISA": "baseline"}


def start_and_wait_for_work(model, out):
    process = start("quantize", model, "-o", out, "--range", "mse", "--threads", "2", **SLOW)
    deadline = time.monotonic() + 60
    while not any(out.parent.glob(".out.partial-*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    return process


@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], 130)],
    ids=["Ctrl-C", "SIGTERM", "impatient"],
)
def test_stopped_in_the_middle(larger_llama, tmp_path, signals, code):
    process = start_and_wait_for_work(larger_llama, tmp_path / "out")
    began = time.monotonic()
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.1)
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == code
    assert stdout == ""
    assert "stopped" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_leaves_only_the_hidden_folder_and_the_next_run_succeeds(
    lowbit, larger_llama, tiny_llama, tmp_path
):
    process = start_and_wait_for_work(larger_llama, tmp_path / "out")
    process.kill()
    process.communicate()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert lowbit("quantize", tiny_llama, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
