"""The capability table, against verification's tables and against vLLM's source where it says a number."""

from __future__ import annotations

import pytest

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.engines import all_engines, engine_for, find_engine, lmdeploy, sglang, tensorrt_llm, tgi, vllm
from lowbit.engines.engine import SIXTEEN, Engine, Support
from lowbit.engines.llama_cpp import GGUF_TYPES
from lowbit.errors import UsageError
from lowbit.export import find_exporter
from lowbit.formats.gguf.mix_table import FILE_TYPES
from lowbit.formats.modelopt.write import ALGORITHMS as MODELOPT
from lowbit.hardware import DEVICES
from lowbit.methods import parse_method
from lowbit.registry import ENGINES
from lowbit.schemes import SCHEMES, find_scheme

ROWS = [(engine, row) for engine in all_engines() for row in engine.support]
FOLDERS = [(engine, row) for engine, row in ROWS if row.format not in (None, "gguf")]


def row_name(value: Engine | Support) -> str:
    return value.name if isinstance(value, Engine) else value.schemes[0]


def group_of(scheme: str) -> Group:
    found = find_scheme(scheme)
    stored = find_exporter("compressed-tensors").storage_format(found)
    return Group("group_0", ("Linear",), found, stored)


def test_a_row_of_the_table_is_the_engine_of_that_name():
    assert [engine.name for engine in all_engines()] == list(ENGINES)


@pytest.mark.parametrize(("engine", "row"), ROWS, ids=row_name)
def test_rows_name_what_exists(engine, row):
    assert row.source
    assert set(row.kinds) <= set(engine.kinds)
    parse_method(row.method)
    for scheme in row.schemes:
        assert scheme in (FILE_TYPES if engine.loading.reads_gguf else SCHEMES)
    assert (row.format is None) == bool(row.instead)


@pytest.mark.parametrize(("engine", "row"), FOLDERS, ids=row_name)
def test_verification_would_let_the_engine_load_it(engine, row):
    """A scheme that the table offers has a loader and a kernel by the rules of `lowbit verify --engine`."""
    assert row.format not in engine.loading.no_loader
    for scheme in row.schemes:
        if row.format == "modelopt":
            algorithm = next(name for name, found in MODELOPT.items() if found.name == scheme)
            assert algorithm.upper() in engine.loading.quant_algos
        elif row.format == "compressed-tensors":
            group = group_of(scheme)
            if engine.name == "vllm":
                assert vllm._scheme_problem(group) is None
            elif engine.name == "sglang":
                assert sglang.scheme_problem(group) is None
            elif engine.name == "tensorrt-llm":
                assert tensorrt_llm.takes(group)
            elif engine.name in ("lmdeploy", "tgi"):
                assert (lmdeploy if engine.name == "lmdeploy" else tgi).group_problem(group) is None


def test_what_verification_refuses_is_not_offered():
    """TensorRT-LLM takes no integers of compressed-tensors, SGLang no MX formats: no writable row has them."""
    for engine, row in FOLDERS:
        if engine.name == "tensorrt-llm":
            assert "W8A8" not in row.schemes
            assert row.format == "modelopt" or not {"W4A16", "W8A16"} & set(row.schemes)
        if engine.name == "sglang":
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
    row = find_engine("vllm").supported(DEVICES[device])[scheme]
    assert (row.compute, row.fallback) == (compute, fallback)


def test_vllm_has_no_int8_on_blackwell():
    assert "W8A8" not in find_engine("vllm").supported(DEVICES["b200"])
    assert "W8A8" in find_engine("vllm").left_out(DEVICES["b200"])


def test_w4afp8_is_hoppers():
    engine = find_engine("vllm")
    devices = {name: device for name, device in DEVICES.items() if device.kind in engine.kinds}
    having = {name for name, device in devices.items() if "W4AFP8" in engine.supported(device)}
    assert having == {"h100", "h100-pcie", "h200", "h800", "h20"}


def test_native_arithmetic_is_of_devices_that_have_it():
    for device in DEVICES.values():
        for engine in all_engines():
            try:
                rows = engine.supported(device)
            except UsageError:
                continue
            for scheme, row in rows.items():
                assert row.compute == "16" or device.has(row.compute), (device.name, engine.name, scheme)


@pytest.mark.parametrize(("engine", "device"), [("vllm", "m2-max"), ("tensorrt-llm", "mi300x"), ("sglang", "m4")])
def test_an_engine_that_does_not_run_there_is_refused(engine, device):
    with pytest.raises(UsageError, match="does not run on") as caught:
        find_engine(engine).supported(DEVICES[device])
    assert "llama.cpp" in caught.value.hint


def test_gguf_types_are_file_types_and_16_bits_is_no_scheme():
    assert set(GGUF_TYPES) <= set(FILE_TYPES)
    assert SIXTEEN not in SCHEMES


@pytest.mark.parametrize(
    ("device", "engine"), [("h100", "vllm"), ("mi300x", "vllm"), ("rtx-4090", "llama.cpp"), ("m3-max", "llama.cpp")]
)
def test_the_engine_that_one_would_take(device, engine):
    assert engine_for(DEVICES[device]).name == engine
    assert engine_for(DEVICES[device], finetune=True).name == "transformers"
