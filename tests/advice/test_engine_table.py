"""The capability table, against verification's tables and against vLLM's source where it says a number."""

from __future__ import annotations

import pytest

from lowbit.advice.engines import ENGINES, GGUF_TYPES, SIXTEEN, SUPPORT, engine_for, left_out, supported
from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.errors import UsageError
from lowbit.estimation.engines import ENGINES as ESTIMATED
from lowbit.export import find_exporter
from lowbit.export.gguf_mix_table import FILE_TYPES
from lowbit.export.modelopt import ALGORITHMS as MODELOPT
from lowbit.hardware import DEVICES
from lowbit.methods import parse_method
from lowbit.schemes import SCHEMES, find_scheme
from lowbit.verification import engine_limits, engines, modelopt
from lowbit.verification.table import ALL_ENGINES

FOLDERS = [row for row in SUPPORT if row.format not in (None, "gguf")]


def group_of(scheme: str) -> Group:
    found = find_scheme(scheme)
    stored = find_exporter("compressed-tensors").storage_format(found)
    return Group("group_0", ("Linear",), found, stored)


def test_the_engines_are_those_of_verification_and_of_estimates():
    assert set(ENGINES) == set(ALL_ENGINES) == set(ESTIMATED)


@pytest.mark.parametrize("row", SUPPORT, ids=lambda row: f"{row.engine} {row.schemes[0]}")
def test_rows_name_what_exists(row):
    assert row.engine in ENGINES
    assert row.source
    parse_method(row.method)
    for scheme in row.schemes:
        assert scheme in (FILE_TYPES if row.engine == "llama.cpp" else SCHEMES)
    assert (row.format is None) == bool(row.instead)


@pytest.mark.parametrize("row", FOLDERS, ids=lambda row: f"{row.engine} {row.schemes[0]}")
def test_verification_would_let_the_engine_load_it(row):
    """A scheme that the table offers has a loader and a kernel by the rules of `lowbit verify --engine`."""
    assert row.format not in engines.NO_LOADER.get(row.engine, {})
    for scheme in row.schemes:
        if row.format == "modelopt":
            algorithm = next(name for name, found in MODELOPT.items() if found.name == scheme)
            assert algorithm.upper() in modelopt.ALGORITHMS[row.engine]
        elif row.format == "compressed-tensors":
            group = group_of(scheme)
            if row.engine == "vllm":
                assert engine_limits._scheme_problem(group) is None
            elif row.engine == "sglang":
                assert engines._sglang_problem(group) is None
            elif row.engine == "tensorrt-llm":
                assert engines._tensorrt_takes(group)


def test_what_verification_refuses_is_not_offered():
    """TensorRT-LLM takes no packed integers of ours, SGLang no MX formats: they are in no writable row."""
    for row in FOLDERS:
        if row.engine == "tensorrt-llm":
            assert not {"W4A16", "W8A16", "W8A8"} & set(row.schemes)
        if row.engine == "sglang":
            assert not {"MXFP4", "MXFP8", "W4AFP8"} & set(row.schemes)


@pytest.mark.parametrize(
    ("device", "scheme", "compute", "fallback"),
    [
        ("a100-80gb", "FP8_DYNAMIC", "16", True),
        ("rtx-3090", "FP8_DYNAMIC", "16", True),
        ("l4", "FP8_DYNAMIC", "fp8", False),
        ("h100", "FP8_DYNAMIC", "fp8", False),
        ("a100-80gb", "W8A8", "int8", False),
        ("h100", "NVFP4", "16", True),
        ("b200", "NVFP4", "fp4", False),
        ("rtx-5090", "NVFP4", "fp4", False),
        ("mi300x", "FP8_DYNAMIC", "fp8", False),
        ("a100-80gb", "W4A16", "16", False),
    ],
)
def test_vllm_computes_in(device, scheme, compute, fallback):
    """docs/schemes.md: FP8 activations need capability 8.9, FP4 ones Blackwell; older cards decode (Marlin)."""
    row = supported("vllm", DEVICES[device])[scheme]
    assert (row.compute, row.fallback) == (compute, fallback)


def test_vllm_has_no_int8_on_blackwell():
    assert "W8A8" not in supported("vllm", DEVICES["b200"])
    assert "W8A8" in left_out("vllm", DEVICES["b200"])


def test_w4afp8_is_hoppers():
    having = {
        name for name, device in DEVICES.items() if device.kind != "metal" and "W4AFP8" in supported("vllm", device)
    }
    assert having == {"h100", "h100-pcie", "h200"}


def test_native_arithmetic_is_of_devices_that_have_it():
    for device in DEVICES.values():
        for engine in ENGINES:
            try:
                rows = supported(engine, device)
            except UsageError:
                continue
            for scheme, row in rows.items():
                assert row.compute == "16" or device.has(row.compute), (device.name, engine, scheme)


@pytest.mark.parametrize(("engine", "device"), [("vllm", "m2-max"), ("tensorrt-llm", "mi300x"), ("sglang", "m4")])
def test_an_engine_that_does_not_run_there_is_refused(engine, device):
    with pytest.raises(UsageError, match="does not run on") as caught:
        supported(engine, DEVICES[device])
    assert "llama.cpp" in caught.value.hint


def test_gguf_types_are_file_types_and_16_bits_is_no_scheme():
    assert set(GGUF_TYPES) <= set(FILE_TYPES)
    assert SIXTEEN not in SCHEMES


@pytest.mark.parametrize(
    ("device", "engine"), [("h100", "vllm"), ("mi300x", "vllm"), ("rtx-4090", "llama.cpp"), ("m3-max", "llama.cpp")]
)
def test_the_engine_that_one_would_take(device, engine):
    assert engine_for(DEVICES[device]) == engine
    assert engine_for(DEVICES[device], finetune=True) == "transformers"
