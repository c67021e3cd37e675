"""A command that is stopped in the middle says so, soon, and leaves no half checkpoint."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from commands import start

# The plainest compiled kernels: rounding takes long enough to be interrupted.
SLOW = {"LOWBIT_FORCE_ISA": "baseline"}


def start_and_wait_for_work(model, out):
    process = start("quantize", model, "-o", out, "--range", "mse", "--threads", "2", **SLOW)
    while not any(out.parent.glob(".out.partial-*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.2)
    return process


def cpu_seconds(pid):
    """That a process used so far; None where the system does not tell."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        pytest.param([signal.SIGINT], 130, marks=pytest.mark.slow),
        ([signal.SIGTERM], 143),
        ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], 130),
    ],
    ids=["Ctrl-C", "SIGTERM", "impatient"],
)
def test_stopped_in_the_middle(larger_llama, tmp_path, signals, code):
    process = start_and_wait_for_work(larger_llama, tmp_path / "out")
    begun = cpu_seconds(process.pid)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.1)
    stdout, stderr = process.communicate()
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    if begun is not None:  # soon: not after as much work again
        assert total.ru_utime - others.ru_utime + total.ru_stime - others.ru_stime < 2 * begun
    assert process.returncode == code
    assert stdout == ""
    assert "stopped" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_leaves_hidden_folders_which_the_next_run_removes(
    lowbit, larger_llama, tiny_llama, tmp_path
):
    process = start_and_wait_for_work(larger_llama, tmp_path / "out")
    process.kill()
    process.communicate()
    work, partial = sorted(path.name for path in tmp_path.iterdir())
    assert work == ".out.lowbit-work"
    assert partial.startswith(".out.partial-")
    assert lowbit("quantize", tiny_llama, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
