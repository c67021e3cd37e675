"""The advice that the field gives comes out of the tables and the score. Nothing in lowbit.advice names a device.

Each test takes several sizes of model. Outside of them the ranking may differ for good reasons: below 7 billion weights
the 16-bit output layer is so much of the model that 4 bits gain little, and a 70B model does not fit one H100 in FP8.
"""

from __future__ import annotations

import pytest
from advice_shapes import COMMON, LLAMA_8B, LLAMA_70B, MISTRAL_7B, QWEN3_14B

from lowbit.advice import advise
from lowbit.errors import UsageError
from lowbit.hardware import Device

SIZES = pytest.mark.parametrize("shape", COMMON.values(), ids=COMMON)
# As `--hardware this` describes one: the ranking must not hang on how busy the machine of the tests is.
PROCESSOR = Device("this", "a desktop processor", "cpu", 64 << 30, 60e9, {"f32": 1e12}, "made up for tests")
FOUR_BIT_INTEGERS = ("W4A16", "W4A16_ASYM")  # what GPTQ and AWQ make


def _name(hardware: str | Device) -> str:
    return hardware if isinstance(hardware, str) else hardware.kind


@SIZES
@pytest.mark.parametrize("card", ["A100-80GB", "A100-40GB"])
def test_vllm_on_an_a100_gets_w4a16(shape, card):
    assert advise(shape, hardware=card, engine="vllm").best.scheme in FOUR_BIT_INTEGERS


def test_vllm_on_an_a100_gets_w4a16_for_70b_too():
    best = advise(LLAMA_70B, hardware="A100-80GB", engine="vllm").best
    assert best.scheme in FOUR_BIT_INTEGERS
    assert best.memory.fits


@SIZES
@pytest.mark.parametrize("card", ["H100", "H200"])
def test_vllm_on_hopper_gets_fp8(shape, card):
    best = advise(shape, hardware=card, engine="vllm").best
    assert best.scheme == "FP8_DYNAMIC"
    assert best.how.compute == "fp8"


@SIZES
@pytest.mark.parametrize("hardware", [PROCESSOR, "RTX-4090", "RTX-3090", "M2-Max"], ids=_name)
def test_llama_cpp_gets_q4_k_m(shape, hardware):
    advice = advise(shape, hardware=hardware, engine="llama.cpp", memory=64 << 30)
    assert advice.best.scheme == "Q4_K_M"


@SIZES
@pytest.mark.parametrize("hardware", [PROCESSOR, "RTX-4090", "M2-Max"], ids=_name)
def test_llama_cpp_gets_q5_k_m_for_more_quality(shape, hardware):
    advice = advise(shape, hardware=hardware, engine="llama.cpp", goal="quality", memory=64 << 30)
    assert advice.best.scheme == "Q5_K_M"


@SIZES
@pytest.mark.parametrize("hardware", [PROCESSOR, "RTX-4090", "M2-Max"], ids=_name)
def test_llama_cpp_gets_iq4_xs_for_less_memory(shape, hardware):
    advice = advise(shape, hardware=hardware, engine="llama.cpp", goal="memory", memory=64 << 30)
    assert advice.best.scheme == "IQ4_XS"


def test_llama_cpp_gets_iq4_xs_where_four_and_a_half_bits_no_longer_fit():
    roomy = advise(LLAMA_8B, hardware="RTX-4090", engine="llama.cpp")
    small, larger = (roomy.option(scheme).memory.total for scheme in ("IQ4_XS", "Q4_K_S"))
    share = roomy.best.memory.usable / roomy.device.memory_bytes
    tight = advise(LLAMA_8B, hardware="RTX-4090", engine="llama.cpp", memory=int((small + larger) / 2 / share))
    assert tight.best.scheme == "IQ4_XS"
    assert not tight.option("Q4_K_M").memory.fits


@SIZES
def test_tensorrt_llm_on_an_h100_gets_fp8(shape):
    best = advise(shape, hardware="H100", engine="tensorrt-llm").best
    assert best.scheme.startswith("FP8")
    assert best.writable


@SIZES
def test_tensorrt_llm_on_an_a100_gets_int8_smoothquant(shape):
    best = advise(shape, hardware="A100-80GB", engine="tensorrt-llm").best
    assert best.scheme == "W8A8"
    assert best.how.method == "smoothquant"


@SIZES
def test_tensorrt_llm_on_an_a100_gets_int4_awq_for_the_least_memory(shape):
    best = advise(shape, hardware="A100-80GB", engine="tensorrt-llm", goal="memory").best
    assert (best.scheme, best.how.method) == ("W4A16", "awq")


def test_what_lowbit_cannot_write_for_tensorrt_llm_says_so():
    best = advise(LLAMA_8B, hardware="A100-80GB", engine="tensorrt-llm").best
    assert not best.writable
    assert best.quantize is None
    assert "int8_sq" in best.instead
    assert "lowbit writes no" in best.reason


def test_int8_weights_for_tensorrt_llm_are_written_with_one_scale_per_row():
    found = advise(LLAMA_8B, hardware="A100-80GB", engine="tensorrt-llm").option("W8A16")
    assert found.writable
    assert found.quantize == ("lowbit quantize MODEL -o model-W8A16 --scheme W8A16 --group-size -1 --format modelopt")


@pytest.mark.parametrize("shape", [MISTRAL_7B, QWEN3_14B, LLAMA_70B], ids=["7B", "14B", "70B"])
@pytest.mark.parametrize("hardware", ["RTX-3090", "RTX-4090", "A100-80GB"])
def test_fine_tuning_gets_nf4(shape, hardware):
    advice = advise(shape, hardware=hardware, workload="finetune")
    assert advice.engine == "transformers"
    assert advice.best.scheme == "NF4"
    assert "--double-quant" in advice.best.quantize


@SIZES
@pytest.mark.parametrize(("card", "compute"), [("A100-80GB", "int8"), ("H100", "fp8"), ("L40S", "fp8")])
def test_throughput_of_prompts_gets_eight_bit_arithmetic(shape, card, compute):
    advice = advise(shape, hardware=card, engine="vllm", workload="prefill", memory=80 << 30)
    assert advice.best.how.compute == compute
    assert advice.best.scheme in ("W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")


@SIZES
@pytest.mark.parametrize("card", ["A100-80GB", "H100"])
def test_long_contexts_get_an_fp8_cache_and_short_ones_do_not(shape, card):
    long = advise(shape, hardware=card, engine="vllm", context=32768, memory=200 << 30)
    assert long.best.fp8_cache
    assert "--kv-cache fp8" in long.best.quantize
    short = advise(shape, hardware=card, engine="vllm", context=1024)
    assert not short.best.fp8_cache


def test_four_bit_arithmetic_is_blackwells():
    """NVFP4 is taken for speed where the card has FP4, and is a fallback elsewhere."""
    fast = advise(LLAMA_8B, hardware="B200", engine="vllm", goal="speed").option("NVFP4")
    assert fast.how.compute == "fp4"
    assert fast.ratios.prefill > 2.5
    slow = advise(LLAMA_8B, hardware="H100", engine="vllm", goal="speed").option("NVFP4")
    assert slow.how.fallback
    assert slow.ratios.prefill == pytest.approx(1.0)


@pytest.mark.parametrize("asked", [{"price": float("nan")}, {"price": float("inf")}, {"memory": 0}])
def test_a_price_or_a_memory_that_cannot_be_is_refused(asked):
    with pytest.raises(UsageError, match=next(iter(asked))):
        advise(LLAMA_8B, hardware="H100", engine="vllm", **asked)
