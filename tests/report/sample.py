"""Reports made by code: a model shaped like SmolLM2-135M, with plausible numbers and as many blocks as asked for."""

from __future__ import annotations

import base64
import math
import random
import struct
from datetime import UTC, datetime

from lowbit.evaluation.result import Continuation, Evaluation, GeneratedSample, TextRecord
from lowbit.report.diagnosis import Contribution, Diagnosis, DiagnosisFinding, Flip, Suggestion
from lowbit.report.page import environment
from lowbit.report.schema import (
    Neighbour,
    Output,
    OutputFile,
    Report,
    ReportSettings,
    ReportSource,
    ServeLine,
    TensorEntry,
    Totals,
)
from lowbit.rounding.histogram import BINS, WeightHistogram
from lowbit.verification.result import Check, Verification

HIDDEN, INTERMEDIATE, KV, VOCABULARY = 576, 1536, 192, 49152
LINEARS = {
    "q_proj": ("self_attn", (HIDDEN, HIDDEN), 0.0102),
    "k_proj": ("self_attn", (KV, HIDDEN), 0.0114),
    "v_proj": ("self_attn", (KV, HIDDEN), 0.0078),
    "o_proj": ("self_attn", (HIDDEN, HIDDEN), 0.0083),
    "gate_proj": ("mlp", (INTERMEDIATE, HIDDEN), 0.0075),
    "up_proj": ("mlp", (INTERMEDIATE, HIDDEN), 0.0072),
    "down_proj": ("mlp", (HIDDEN, INTERMEDIATE), 0.0081),
}
# The tensors that hurt, as multiples of their role's usual error.
OUTLIERS = {("k_proj", 0): 4.1, ("q_proj", 0): 2.6, ("down_proj", 1): 3.3, ("down_proj", 29): 1.9, ("v_proj", 28): 0.4}
GROUP_NOTE = "group size 64: 128 does not divide 576"


def make_report(blocks: int = 30, seed: int = 0, **changes) -> Report:
    """A complete report; `changes` replace top-level fields."""
    tensors = make_tensors(blocks, seed)
    bytes_out = sum(tensor.bytes for tensor in tensors)
    weights = sum(_elements(tensor.shape) for tensor in tensors)
    quantized = [tensor for tensor in tensors if tensor.scheme]
    decoder_weights = sum(_elements(tensor.shape) for tensor in quantized)
    report = Report(
        lowbit="0.1.0",
        created=datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC),
        source=ReportSource(
            model="demo:smollm2",
            kind="gguf",
            architecture="LlamaForCausalLM",
            notes=("tensors are stored as Q4_1; errors are measured against the decoded Q4_1 weights",),
            bytes=98_412_576,
            sha256_of_headers="9f2c4be1d07a5e6c8b93f1a2d4470c55e01b6f88a7d2c93e4f5061728394a5b6",
        ),
        output=Output(
            format="compressed-tensors",
            files=(OutputFile(name="model.safetensors", bytes=bytes_out), OutputFile(name="config.json", bytes=1893)),
            bytes=bytes_out + 1893,
            dtype="bfloat16",
        ),
        settings=ReportSettings(
            scheme="W4A16", method="rtn", range="mse", given={"group_size": 64, "range": "mse", "ignore": ("lm_head",)}
        ),
        versions={
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "lowbit": "0.1.0",
            "kernels": "avx512",
        },
        totals=Totals(
            weights=weights,
            quantized_weights=decoder_weights,
            decoder_bits_per_weight=8 * sum(tensor.bytes for tensor in quantized) / decoder_weights,
            file_bits_per_weight=8 * bytes_out / weights,
            bytes_in=98_412_576,
            bytes_out=bytes_out + 1893,
            seconds=14.2,
            peak_memory_bytes=611_319_808,
        ),
        tensors=tensors,
        verification=make_verification(),
        evaluation=(make_evaluation(bytes_out),),
        serve=(
            ServeLine(engine="vllm", command="vllm serve /models/smollm2-w4a16 --max-model-len 4096"),
            ServeLine(engine="lowbit", command='lowbit generate /models/smollm2-w4a16 -p "…"'),
        ),
        command="lowbit quantize demo:smollm2 -o out --scheme W4A16",
        neighbours=make_neighbours(),
    )
    return report.model_copy(update=changes)


def make_neighbours() -> tuple[Neighbour, ...]:
    """One planned, two measured."""
    return (
        Neighbour(origin="plan", label="W3A16", scheme="W3A16", bytes=99_900_000, bits_per_weight=3.25),
        Neighbour(origin="compare", label="NVFP4A16", scheme="NVFP4A16", bytes=116_492_336, bits_per_weight=4.5,
                  kld_mean=0.0583, kld_se=0.0006, same_top1=0.871),
        Neighbour(origin="compare", label="FP8_DYNAMIC", scheme="FP8_DYNAMIC", bytes=163_227_736, bits_per_weight=8.023,
                  kld_mean=0.0061, kld_se=0.0001, same_top1=0.952),
    )  # fmt: skip


def make_diagnosis(text: str = "k_proj of block 0 has doubled scales") -> Diagnosis:
    """One fault found, two contributions, one flip, one command."""
    command = "lowbit quantize demo:smollm2 -o out --override k_proj=W8A16"
    contributions = (
        Contribution(block=0, role="qkv_proj", tensor=None, kld=0.21, se=0.004, bytes=500_000, level="set",
                     name=text, significant=True),
        Contribution(block=1, role="down_proj", tensor="model.layers.1.mlp.down_proj.weight", kld=-0.0002, se=0.001,
                     bytes=470_000, level="tensor", name="model.layers.1.mlp.down_proj", significant=False),
    )  # fmt: skip
    return Diagnosis(
        verdict=text, healthy=False, model="/models/smollm2-w4a16", reference="demo:smollm2",
        text=TextRecord(name="packaged", sha256="0b7e" * 16, tokens=4096), windows=4, window_tokens=512,
        scored_tokens=2044, dtype="float32", kld=0.4, kld_se=0.01, same_top1=0.6,
        findings=(DiagnosisFinding(kind="scale", severity="fault", title=text, detail="ratio 2.0", kld=0.21,
                                   share=0.5),),
        contributions=contributions,
        flips=(Flip(window=0, position=7, context="a bright cold day", token=" in", reference=text, reference_p=0.9,
                    quantized=" of", quantized_p=0.4, kld=2.5),),
        suggestions=(Suggestion(text="Give k_proj 8 bits.", command=command, gain=0.2, gain_se=0.01, bytes=450_000),),
        forward_passes=6.5, seconds=81.0, peak_memory_bytes=900_000_000, versions={"torch": "2.13.0"},
    )  # fmt: skip


def make_samples() -> tuple[GeneratedSample, ...]:
    """One that parts, one that does not."""
    return (
        GeneratedSample(
            prompt="Why is the sky blue?", chat=True, shared="The sky is blue because of", shared_tokens=6,
            reference=Continuation(token=" a", rest=" process called scattering.", tokens=6, token_probability=0.72),
            quantized=Continuation(token=" the", rest=" way light travels.", tokens=5, token_probability=0.2),
        ),
        GeneratedSample(prompt="Count to three.", chat=True, shared="One, two, three.", shared_tokens=7),
    )  # fmt: skip


def make_histogram(error: float | None) -> WeightHistogram:
    """A bell; with an error also a second, somewhat wider one."""

    def bell(width: float) -> str:
        counts = [round(65535 * math.exp(-(((i - BINS // 2) / width) ** 2))) for i in range(BINS)]
        return base64.b64encode(struct.pack(f"<{BINS}H", *counts)).decode()

    decoded = None if error is None else bell(10 + 20 * error)
    return WeightHistogram(reach=0.31, rows=28, values=16_128, largest=816, source=bell(10), decoded=decoded)


def make_tensors(blocks: int, seed: int = 0) -> tuple[TensorEntry, ...]:
    """Embedding, `blocks` of seven linears and two norms, final norm."""
    noise = random.Random(seed)
    tensors = [_left_alone("model.embed_tokens.weight", "embedding", None, (VOCABULARY, HIDDEN), "not a linear layer")]
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(_left_alone(f"{prefix}.{norm}.weight", "norm", block, (HIDDEN,), "norms stay in 16 bits"))
        for role, (module, shape, usual) in LINEARS.items():
            depth = 1 - 0.25 * block / blocks
            error = usual * depth * OUTLIERS.get((role, block), 1.0) * noise.lognormvariate(0, 0.09)
            tensors.append(_quantized(f"{prefix}.{module}.{role}.weight", role, block, shape, error))
    tensors.append(_left_alone("model.norm.weight", "norm", None, (HIDDEN,), "norms stay in 16 bits"))
    return tuple(tensors)


def make_verification(failing: bool = False) -> Verification:
    rules = (
        ("config names a quantization method that vLLM knows", "compressed-tensors"),
        ("fused layers share one scheme", "30 × qkv_proj, 30 × gate_up_proj"),
        ("ignore list covers all of a fused set or none", "lm_head"),
        ("every expected linear is quantized", "210 of 210"),
        ("packed shapes agree with the config", "210 tensors of int32"),
        ("scales are finite and positive", "210 tensors"),
    )
    checks = tuple(Check(rule=rule, passed=True, detail=detail) for rule, detail in rules)
    if failing:
        checks += (
            Check(
                rule="group size divides the row at tensor-parallel size 2",
                passed=False,
                detail="model.layers.0.mlp.down_proj: 768 columns per rank are not a multiple of 512",
            ),
        )
    return Verification(ok=not failing, engine="vllm", checks=checks)


def make_evaluation(file_bytes: int = 116_000_000, **changes) -> Evaluation:
    evaluation = Evaluation(
        model="/models/smollm2-w4a16",
        reference="demo:smollm2",
        reference_from="given",
        scheme="W4A16",
        text=TextRecord(name="frankenstein.txt", sha256="0b7e" * 16, tokens=98_304),
        protocol="48 windows of 2048 tokens without overlap, the second half of each scored",
        windows=48,
        windows_asked=48,
        window_tokens=2048,
        bos=True,
        scored_tokens=49_152,
        activations="none",
        dtype="float32",
        ppl=23.817,
        ppl_se=0.412,
        ppl_reference=22.948,
        ppl_ratio=1.03787,
        ppl_ratio_se=0.00142,
        kld_mean=0.04713,
        kld_se=0.00051,
        kld_median=0.02196,
        kld_p99=0.3921,
        kld_p999=1.1874,
        kld_max=3.902,
        same_top1=0.8874,
        same_top1_se=0.00143,
        delta_p_mean=-0.00412,
        delta_p_rms=0.0617,
        seconds=194.6,
        peak_memory_bytes=1_402_306_560,
        file_bytes=file_bytes,
        bits_per_weight=4.2512,
        bits_from="report",
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        reference_sha256="7303" * 16,
        samples=make_samples(),
    )
    return evaluation.model_copy(update=changes)


def _quantized(name: str, role: str, block: int, shape: tuple[int, int], error: float) -> TensorEntry:
    rows, columns = shape
    stored = rows * columns // 2 + 2 * rows * (columns // 64) + 16
    return TensorEntry(
        name=name,
        role=role,
        block=block,
        shape=shape,
        scheme="W4A16",
        bits_per_weight=8 * stored / (rows * columns),
        bytes=stored,
        relative_error=error,
        max_error=0.9 * error**0.5,
        notes=(GROUP_NOTE,) if columns == HIDDEN else (),
        histogram=make_histogram(error),
    )


def _left_alone(name: str, role: str, block: int | None, shape: tuple[int, ...], reason: str) -> TensorEntry:
    elements = _elements(shape)
    return TensorEntry(
        name=name, role=role, block=block, shape=shape, bits_per_weight=16.0, bytes=2 * elements, reason=reason
    )


def _elements(shape: tuple[int, ...]) -> int:
    elements = 1
    for side in shape:
        elements *= side
    return elements


def with_hostile_name(name: str, **changes) -> Report:
    """A small report whose first quantized tensor is called `name`."""
    tensors = list(make_tensors(1))
    tensors[3] = tensors[3].model_copy(update={"name": name, **changes})
    return make_report(blocks=1, tensors=tuple(tensors))


def draw(macro: str, view: object) -> str:
    """The markup that charts.html.j2 makes of a picture; nothing of None."""
    return "" if view is None else str(getattr(environment().get_template("charts.html.j2").module, macro)(view))
