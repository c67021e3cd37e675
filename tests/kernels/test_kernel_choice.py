"""Which implementation runs: forced, best, or the reference; never a silent fallback."""

import os
import subprocess
import sys

import pytest
import torch

from lowbit import kernels
from lowbit.errors import UsageError
from lowbit.kernels import choice


@pytest.fixture
def undecided(monkeypatch):
    """The state of a process that has not used a kernel."""
    monkeypatch.setattr(choice, "_chosen", choice._UNDECIDED)
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    return monkeypatch


def test_the_best_available_is_chosen(undecided):
    assert kernels.isa() == kernels.available_isas()[0]


@pytest.mark.parametrize("name", kernels.available_isas())
def test_the_environment_variable_forces_an_instruction_set(undecided, name):
    undecided.setenv("LOWBIT_FORCE_ISA", name)
    assert kernels.isa() == name


def test_a_name_that_is_not_available_is_refused_and_the_hint_lists_those_that_are(undecided):
    undecided.setenv("LOWBIT_FORCE_ISA", "avx1024")
    with pytest.raises(UsageError, match="avx1024") as error:
        kernels.round_int(torch.ones(1, 4), 4, torch.ones(1, 1), None, -8, 7)
    assert "reference" in error.value.hint


def test_use_isa_ends_with_its_block():
    before = kernels.isa()
    with kernels.use_isa("reference"):
        assert kernels.isa() == "reference"
    assert kernels.isa() == before


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (ModuleNotFoundError("No module named 'lowbit.kernels._core'"), "there are no compiled kernels here"),
        (ImportError("undefined symbol: x"), "cannot be loaded (undefined symbol: x)"),
    ],
)
def test_without_a_core_the_reference_runs_and_says_so_once(undecided, capsys, reason, said):
    undecided.setattr(choice, "_import_core", lambda: reason)
    for _ in range(2):
        low, high = kernels.group_range(torch.tensor([[1.0, -2.0]]), 2)
    assert (low.item(), high.item()) == (-2.0, 1.0)
    assert kernels.isa() == "reference"
    notice = capsys.readouterr().err
    assert notice.count("torch reference") == 1
    assert said in notice


def test_without_a_core_a_forced_instruction_set_is_refused(undecided):
    undecided.setattr(choice, "_import_core", lambda: ModuleNotFoundError())
    undecided.setenv("LOWBIT_FORCE_ISA", "avx2")
    with pytest.raises(UsageError, match="avx2"):
        kernels.isa()


def test_importing_the_kernels_decides_and_says_nothing():
    code = "import lowbit.kernels.choice as c; assert c._chosen == c._UNDECIDED"
    environment = {**os.environ, "LOWBIT_FORCE_ISA": "nonsense"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_meta_tensors_take_the_reference_path():
    w = torch.empty(4, 32, device="meta")
    scale = torch.empty(4, 2, device="meta")
    assert kernels.round_int(w, 16, scale, None, -8, 7).shape == (4, 32)
