"""Every format that is read, to every output: the same weights, or the error that the report states, or one sentence.

What docs/conversion.md has of formats that are written is in test_conversion.py, bit for bit; here are those that are
only read, GGUF files, and outputs that hold values of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lowbit
from checkpoint.test_auto_round_reader import PACKERS
from checkpoint.test_auto_round_reader import stated as stated_by_auto_round
from checkpoint.test_hqq_reader import linear as linear_of_hqq
from checkpoint.test_quark_reader import Files as QuarkFiles
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import LowbitError, NonFiniteError, VerificationError
from lowbit.numerics import grid_for
from lowbit.registry import FORMATS, folder_formats
from lowbit.rounding.rtn import round_to_nearest
from lowbit.schemes import SCHEMES
from lowbit.tensors import RangeSearch
from models import FITS_ALL, make_model

Packed = Callable[[str, Tensor], dict[str, Tensor]]


def of_linears(model: Path, folder: Path, pack: Packed, stated: dict) -> Path:
    """A folder of the model whose linears another tool has packed."""
    plain, tensors = open_checkpoint(model), dict[str, Tensor]()
    folder.mkdir()
    for name, info in plain.tensors.items():
        module, weight = name.removesuffix(".weight"), plain.read(name)
        packed = module.endswith("_proj") and len(info.shape) == 2
        tensors |= pack(module, weight.float()) if packed else {name: weight}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


def in_fp8_blocks(module: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = (size // 128 for size in weight.shape)
    scale = weight.reshape(rows, 128, columns, 128).abs().amax(dim=(1, 3)) / 448
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return {f"{module}.weight": (weight / spread).to(torch.float8_e4m3fn), f"{module}.weight_scale_inv": scale}


def in_fp8_rows(module: str, weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {f"{module}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale}


def by_hqq(module: str, weight: Tensor) -> dict[str, Tensor]:
    made, _ = linear_of_hqq(tuple(weight.shape), group=64)
    return {f"{module}.{leaf}": tensor for leaf, tensor in made.items()}


def by_auto_round(module: str, weight: Tensor) -> dict[str, Tensor]:
    scheme, exporter = SCHEMES["W4A16_ASYM"], PACKERS["auto_round:auto_gptq"]
    grid = grid_for(scheme.weight, exporter.scale_format(scheme, torch.bfloat16), exporter.lowest_zero_point(scheme))
    codes = round_to_nearest(weight, scheme.weight, grid, RangeSearch())
    pieces = exporter.pack(module, codes, scheme, 0, tuple(weight.shape), torch.bfloat16)
    return {piece.name: piece.values for piece in pieces if not piece.name.endswith("g_idx")}


def by_quark(model: Path, folder: Path, kind: str) -> Path:
    made = QuarkFiles(folder, kind)

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        files = QuarkFiles(folder, kind, shape=tuple(weight.shape))
        return {f"{module}{name[1:]}": tensor for name, tensor in files.tensors.items() if name.startswith("l.")}

    return of_linears(model, folder, pack, made.config)


def by_lowbit(model: Path, folder: Path, scheme: str, **settings) -> Path:
    is_file = settings.get("format") == "gguf"
    return lowbit.quantize(model, folder.with_suffix(".gguf") if is_file else folder, scheme=scheme, **settings).path


def with_packer(pack: Packed, stated: dict) -> Callable[[Path, Path], Path]:
    return partial(of_linears, pack=pack, stated=stated)


# Those that another test has with each other, once per kind of grid; then all that are only read.
WRITTEN: dict[str, Callable[[Path, Path], Path]] = {
    f"{format} {scheme}": partial(by_lowbit, scheme=scheme, format=format)
    for format, scheme in (
        ("compressed-tensors", "W4A16"), ("compressed-tensors", "W8A8"), ("compressed-tensors", "FP8_DYNAMIC"),
        ("compressed-tensors", "NVFP4A16"), ("compressed-tensors", "MXFP4A16"), ("gptq", "W4A16"),
        ("gptq_v2", "W4A16_ASYM"), ("awq", "W4A16_ASYM"), ("bitsandbytes", "NF4"), ("bitsandbytes", "INT8"),
        ("modelopt", "FP8_DYNAMIC"), ("modelopt", "NVFP4A16"), ("bitnet", "TERNARY"), ("codebook", "KMEANS4"),
        ("gguf", "F16"), ("gguf", "Q8_0"), ("gguf", "Q4_0"), ("gguf", "Q4_K"), ("gguf", "NVFP4"),
    )
}  # fmt: skip
READ = {
    "fp8": with_packer(in_fp8_blocks, {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                                       "weight_block_size": [128, 128]}),
    "fbgemm_fp8": with_packer(in_fp8_rows, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                                            "modules_to_not_convert": ["lm_head"]}),
    "hqq": with_packer(by_hqq, {"quant_method": "hqq"}),
    "auto-round": with_packer(by_auto_round, stated_by_auto_round(SCHEMES["W4A16_ASYM"], "auto_round:auto_gptq")),
    "quark uint4": partial(by_quark, kind="uint4 group"), "quark fp8": partial(by_quark, kind="fp8 row"),
    "quark mxfp4": partial(by_quark, kind="mxfp4"), "quark nvfp4": partial(by_quark, kind="nvfp4"),
}  # fmt: skip
SOURCES = WRITTEN | READ
GGUF_TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K", "NVFP4")
TARGETS = (*folder_formats(), *(f"gguf {name}" for name in GGUF_TYPES))


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("every") / "model", **FITS_ALL)


@pytest.fixture(scope="session")
def source_of(plain, tmp_path_factory):
    """name of a source → its folder or file, made when first asked for."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = SOURCES[name](plain, tmp_path_factory.mktemp("source") / "model")
        return made[name]

    return find


def check_refusal(error: LowbitError, folder: Path) -> None:
    """One sentence and a hint, before anything was written."""
    assert not isinstance(error, VerificationError | NonFiniteError), error
    assert error.hint
    assert "\n" not in error.args[0]
    assert list(folder.iterdir()) == [], "it was refused after something had been written"


def test_every_format_that_is_read_is_here():
    read = {row.name for row in FORMATS.values() if row.read is not None or row.open is not None}
    # mxfp4 is of gpt-oss alone (export/test_mxfp4.py), torchao's files are made by torchao (checkpoint/)
    assert {name.split()[0] for name in SOURCES} - {"gptq_v2"} == read - {"mxfp4", "torchao"}


@pytest.mark.sampled(40)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_conversion_keeps_the_weights_or_states_the_error_or_is_refused(source, target, source_of, tmp_path):
    folder = source_of(source)
    format, _, scheme = target.partition(" ")
    output = tmp_path / ("out.gguf" if format == "gguf" else "out")
    try:
        report = lowbit.convert(folder, output, format=format, **({"scheme": scheme} if scheme else {})).report
    except LowbitError as error:
        check_refusal(error, tmp_path)
        return
    before, after = open_checkpoint(folder), open_checkpoint(output)
    entries = {tensor.name: tensor for tensor in report.tensors}
    assert set(after.tensors) == set(before.tensors)
    for name in before.tensors:
        one, other = before.read(name).float(), after.read(name).float()
        found = ((one - other).norm() / one.norm().clamp_min(1e-30)).item()
        stored = getattr(after, "stored_names", lambda name: [name])(name)
        entry = next(entries[each] for each in (name, *stored) if each in entries)
        told = 0.0 if entry.repacked else (entry.relative_error or 0.0) ** 0.5  # the report has it of squares
        cast = entry.scheme is None or target in ("float", "gguf F16")  # to 16 bits
        assert found <= told * 1.001 + (2.0**-8 if cast else 1e-6), entry
