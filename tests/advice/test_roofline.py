"""Speed from bytes and operations, against sums done by hand, and the bytes of the weights against known files."""

from __future__ import annotations

import pytest
from advice_shapes import LLAMA_3B, LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B

from lowbit.advice.roofline import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    FALLBACK_SHARE,
    LATENCY_DIRECT,
    LINK_SHARE,
    Load,
    exchange_seconds,
    speed,
)
from lowbit.engines import find_engine
from lowbit.engines.engine import SIXTEEN
from lowbit.engines.llama_cpp import GGUF_TYPES
from lowbit.estimation.footprint import active_weights, footprint, matrices, scheme_bits
from lowbit.hardware import DEVICES, find_device

H100, A100, B200 = (DEVICES[name] for name in ("h100", "a100-80gb", "b200"))

# GiB of llama-quantize's files of Llama-3.1-8B: tools/quantize/README.md of llama.cpp.
LLAMA_CPP_GIB = {
    "Q8_0": 7.95, "Q6_K": 6.14, "Q5_K_M": 5.33, "Q5_K_S": 5.21, "Q4_K_M": 4.58, "Q4_K_S": 4.36, "IQ4_NL": 4.38,
    "IQ4_XS": 4.17, "Q3_K_L": 4.02, "IQ3_M": 3.52, "IQ3_XXS": 3.04, "Q2_K": 2.95, "IQ2_M": 2.74,
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA_CPP_GIB)
def test_gguf_bytes_are_those_of_llama_quantize(name):
    assert name in GGUF_TYPES
    assert footprint(LLAMA_8B, name).total / 2**30 == pytest.approx(LLAMA_CPP_GIB[name], rel=0.01)


def test_weights_are_counted():
    assert sum(matrix.weights for matrix in matrices(LLAMA_8B)) == pytest.approx(8.03e9, rel=1e-3)
    assert sum(matrix.weights for matrix in matrices(LLAMA_70B)) == pytest.approx(70.6e9, rel=2e-3)
    assert sum(matrix.weights for matrix in matrices(QWEN3_30B_A3B)) == pytest.approx(30.5e9, rel=5e-3)
    assert active_weights(QWEN3_30B_A3B) == pytest.approx(3.0e9, rel=0.05)


def test_a_step_reads_everything_but_the_embedding():
    weights = footprint(LLAMA_8B, "W4A16")
    table = LLAMA_8B.vocab * LLAMA_8B.hidden * 2
    assert weights.embedding == weights.head == table
    assert weights.read_by_a_step(1) == weights.total - table
    assert weights.dense == pytest.approx(6.98e9 * scheme_bits("W4A16") / 8, rel=1e-3)


def test_bits_are_those_of_the_documents():
    """docs/schemes.md; NF4 and FP4 with quantized scales, as they are advised."""
    assert scheme_bits("W4A16") == pytest.approx(4.125, abs=1e-3)
    assert scheme_bits("FP8_DYNAMIC") == pytest.approx(8.004, abs=1e-3)
    assert scheme_bits("NF4") == scheme_bits("FP4") == pytest.approx(4.128, abs=1e-3)


def test_a_shared_output_layer_is_counted_once_and_read():
    weights = footprint(LLAMA_3B, SIXTEEN)
    assert weights.embedding == 0
    assert weights.read_by_a_step(1) == weights.total


def test_a_step_meets_more_experts_with_more_sequences():
    weights = footprint(QWEN3_30B_A3B, SIXTEEN)
    assert weights.touched(1) == pytest.approx(8 / 128)
    assert weights.touched(2) == pytest.approx(1 - (120 / 128) ** 2)
    assert weights.read_by_a_step(1) < 0.2 * weights.total
    assert weights.touched(1000) == pytest.approx(1.0)


def test_exact_bytes_scale_all_parts():
    weights = footprint(LLAMA_8B, "FP8_DYNAMIC")
    scaled = weights.scaled(weights.total * 1.01)
    assert scaled.total == pytest.approx(weights.total * 1.01)
    assert scaled.read_by_a_step(4) == pytest.approx(weights.read_by_a_step(4) * 1.01)


def decode(device, scheme, batch=1, cache=0.0, engine="vllm", context=1):
    how = None if scheme == SIXTEEN else find_engine(engine).supported(device)[scheme]
    sixteen = footprint(LLAMA_8B, SIXTEEN)
    weights = footprint(LLAMA_8B, scheme)
    return speed(LLAMA_8B, weights, sixteen, cache, how, device, Load(batch, context, 1024))


def test_decoding_one_sequence_is_bytes_over_bandwidth():
    expected = H100.bandwidth * BANDWIDTH_SHARE / footprint(LLAMA_8B, "FP8_DYNAMIC").read_by_a_step(1)
    found = decode(H100, "FP8_DYNAMIC")
    assert found.decode == pytest.approx(expected)
    assert found.decode_all == found.decode
    assert found.bound == "weights"


def test_the_cache_of_every_sequence_is_read():
    cache = 2e9
    seconds = (footprint(LLAMA_8B, SIXTEEN).read_by_a_step(1) + 16 * cache) / (H100.bandwidth * BANDWIDTH_SHARE)
    found = decode(H100, SIXTEEN, batch=16, cache=cache)
    assert found.decode == pytest.approx(1 / seconds)
    assert found.decode_all == pytest.approx(16 / seconds)
    assert found.bound == "KV cache"


def test_many_sequences_are_bound_by_arithmetic():
    batch = 4096
    ops = 2 * active_weights(LLAMA_8B) * batch
    found = decode(H100, "FP8_DYNAMIC", batch)
    attention = 4 * batch * LLAMA_8B.heads * LLAMA_8B.head_dim * LLAMA_8B.layers / (H100.peak["bf16"] * COMPUTE_SHARE)
    assert found.decode == pytest.approx(1 / (ops / (H100.peak["fp8"] * COMPUTE_SHARE) + attention))
    assert found.bound == "arithmetic"
    assert found.decode > 1.9 * decode(H100, SIXTEEN, batch).decode


def test_weight_only_kernels_fall_back_to_the_speed_of_16_bits():
    """Marlin: near-ideal to a batch of 16, then slower, never slower than 16 bits."""
    assert decode(A100, "W4A16", 16).decode == pytest.approx(decode(A100, "W4A16", 1).decode)
    gains = [decode(A100, "W4A16", batch).decode / decode(A100, SIXTEEN, batch).decode for batch in (16, 32, 64, 128)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 3
    assert gains[-1] == pytest.approx(1.0)


def test_a_fallback_is_slower_than_the_same_bytes_with_a_kernel():
    fallback, native = decode(A100, "FP8_DYNAMIC"), decode(A100, "W8A16")
    assert FALLBACK_SHARE < fallback.decode / native.decode < 1


def test_prefill_is_operations_over_the_peak_of_the_compute_dtype():
    fp8, sixteen = decode(H100, "FP8_DYNAMIC").prefill, decode(H100, SIXTEEN).prefill
    assert 1.6 < fp8 / sixteen < 1.8  # attention, and what lies between the products, stay in 16 bits
    assert decode(H100, "W4A16").prefill == pytest.approx(sixteen)
    assert decode(B200, "NVFP4").prefill > 2.5 * decode(B200, SIXTEEN).prefill
    inside = sum(matrix.weights for matrix in matrices(LLAMA_8B) if matrix.part == "dense")
    ops = 2 * inside * 1024 + 2 * 1024**2 * 4096 * 32
    between = 1024 * 32 * (8 * 4096 + 6 * 14336) * 2 / (H100.bandwidth * BANDWIDTH_SHARE)
    assert sixteen == pytest.approx(1024 / (ops / (H100.peak["bf16"] * COMPUTE_SHARE) + between), rel=1e-6)


def prefill(shape, device, load, scheme=SIXTEEN, ranks=1, pass_tokens=8192):
    how = None if scheme == SIXTEEN else find_engine("vllm").supported(device)[scheme]
    weights, sixteen = footprint(shape, scheme), footprint(shape, SIXTEEN)
    return speed(shape, weights, sixteen, 0.0, how, device, load, ranks, pass_tokens).prefill


def test_prompts_share_a_pass():
    """A mixture reads its experts once for eight prompts, and once for each of them alone."""
    one, eight = (prefill(QWEN3_30B_A3B, H100, Load(batch, 2048, 128)) for batch in (1, 8))
    assert eight > 4 * one
    crowded = prefill(QWEN3_30B_A3B, H100, Load(8, 2048, 128), pass_tokens=256)
    assert one < crowded < eight
    long = prefill(QWEN3_30B_A3B, H100, Load(1, 2048, 1024), pass_tokens=128)  # eight passes
    assert long == pytest.approx(one, rel=0.1)


def test_two_cards_decode_at_twice_the_bandwidth_less_their_exchange():
    scheme, batch = SIXTEEN, 4
    weights = footprint(LLAMA_8B, scheme)
    one, two = (speed(LLAMA_8B, weights, weights, 0.0, None, A100, Load(batch, 1, 1), ranks) for ranks in (1, 2))
    exchange = 2 * 32 * (LATENCY_DIRECT + 2 * (1 / 2) * batch * 4096 * 2 / (A100.link * LINK_SHARE))
    assert 1 / two.decode == pytest.approx(0.5 / one.decode + exchange)
    assert exchange_seconds(LLAMA_8B, A100, 1, batch) == 0


def test_cards_on_pci_express_exchange_slower():
    card = find_device("rtx-4090")
    assert exchange_seconds(LLAMA_8B, card, 2, 4096) > 5 * exchange_seconds(LLAMA_8B, H100, 2, 4096)


def test_a_kernel_that_converts_weights_reaches_less_of_the_arithmetic():
    fp8, converted = (decode(H100, scheme, 4096).decode for scheme in ("FP8_DYNAMIC", "W4AFP8"))
    assert converted < fp8
