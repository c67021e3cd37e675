"""Which schemes each engine runs on which device, and what it computes in: a table of rows, the first that fits wins.

What a checkpoint must look like for an engine is verification's business (`lowbit.verification`), and a test holds this
table against it; the device is what verification cannot see, and what this table adds:

    compute       the dtype that matrices are multiplied in: "fp8", "int8", "fp4" natively, or "16" where weights are
                  decoded to 16 bits on the way to the multiplication (weight-only: fewer bytes, no quicker arithmetic)
    small_batch   weight-only kernels: sequences up to which a step stays as quick as the bytes allow. Beyond, decoding
                  the weights takes over, down to the speed of 16 bits
    fallback      True where the card has no arithmetic for the format and the engine decodes it instead (vLLM says so
                  in its log): FP8 on Ampere, FP4 before Blackwell
    format        what `lowbit quantize --format` writes for it; None: lowbit writes nothing that the engine loads so

Versions: vLLM 0.32, SGLang 0.5.23, TensorRT-LLM of autumn 2026, transformers 5.23, llama.cpp of autumn 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.errors import UsageError
from lowbit.hardware import Device

Compute = Literal["16", "fp8", "int8", "fp4"]
Capability = tuple[int, int]
ENGINES = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "transformers")
DOUBLE_QUANT = ("NF4", "FP4")  # written with quantized scales, as QLoRA has them
SIXTEEN = "16 bits"  # the unquantized model, which every engine runs

_ANY: Capability = (0, 0)
_TURING, _AMPERE, _ADA, _HOPPER, _BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)
_BELOW_ADA, _BELOW_HOPPER, _BELOW_BLACKWELL, _LATEST = (8, 8), (8, 9), (9, 9), (99, 0)


@dataclass(frozen=True)
class Support:
    """
    engine, schemes      what runs; names of schemes, or of GGUF file types
    kinds                of devices; least and most are compute capabilities, both inclusive, of CUDA devices alone
    method               what to round with for the quality that is expected of the scheme, a `--method`
    source               where it is written
    instead              where `format` is None: how the engine's own tools make such a checkpoint
    """

    engine: str
    schemes: tuple[str, ...]
    compute: Compute
    format: str | None
    source: str
    kinds: tuple[str, ...] = ("cuda",)
    least: Capability = _ANY
    most: Capability = _LATEST
    small_batch: int | None = None
    fallback: bool = False
    method: str = "rtn"
    finetune: bool = False
    note: str = ""
    instead: str = ""

    def runs_on(self, device: Device) -> bool:
        if device.kind not in self.kinds:
            return False
        return device.compute_capability is None or self.least <= device.compute_capability <= self.most


_INT4 = ("W4A16", "W4A16_ASYM")
_CT = "compressed-tensors"
_V = "vllm/model_executor/"
_WNA16 = f"{_V}layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py; Marlin, Machete"
_MARLIN_BATCH = 16  # "near-ideal ~4x speedups up to batchsizes of 16-32 tokens": github.com/IST-DASLab/marlin
_VLLM_FP8 = "docs.vllm.ai, FP8 W8A8: native from compute capability 8.9, weight-only (Marlin) from 7.5"
_FP8_SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK")
_NVFP4_KERNELS = f"{_V}kernels/linear/nvfp4: CUTLASS and FlashInfer from sm_100, Marlin decodes elsewhere"

_VLLM = (
    Support("vllm", _INT4, "16", _CT, f"{_WNA16}, get_min_capability 75", least=_TURING, small_batch=_MARLIN_BATCH,
            method="gptq"),
    Support("vllm", ("W8A16",), "16", _CT, f"{_WNA16}, get_min_capability 75", least=_TURING,
            small_batch=_MARLIN_BATCH),
    Support("vllm", ("W8A8",), "int8", _CT,
            "compressed_tensors_w8a8_int8.py, get_min_capability 75; docs.vllm.ai, INT8 W8A8: not on Blackwell",
            least=_TURING, most=_BELOW_BLACKWELL, method="smoothquant"),
    Support("vllm", _FP8_SCHEMES, "fp8", _CT, f"compressed_tensors_w8a8_fp8.py, get_min_capability 89; {_VLLM_FP8}",
            least=_ADA),
    Support("vllm", _FP8_SCHEMES, "16", _CT, f"compressed_tensors_w8a16_fp8.py, get_min_capability 75; {_VLLM_FP8}",
            least=_TURING, most=_BELOW_ADA, small_batch=_MARLIN_BATCH, fallback=True),
    Support("vllm", ("W4AFP8",), "fp8", _CT, "compressed_tensors_w4a8_fp8.py, 90; kernels/linear/mixed_precision/"
            "cutlass.py takes capability 90 alone", least=_HOPPER, most=_BELOW_BLACKWELL, method="gptq"),
    Support("vllm", ("NVFP4",), "fp4", _CT, _NVFP4_KERNELS, least=_BLACKWELL, method="gptq"),
    Support("vllm", ("NVFP4",), "16", _CT, _NVFP4_KERNELS, least=_TURING, most=_BELOW_BLACKWELL,
            small_batch=_MARLIN_BATCH, fallback=True, method="gptq"),
    Support("vllm", ("NVFP4A16",), "16", _CT, _NVFP4_KERNELS, least=_TURING, small_batch=_MARLIN_BATCH, fallback=True,
            method="gptq"),
    Support("vllm", ("MXFP4",), "fp4", _CT, f"{_V}kernels/linear/mxfp4/flashinfer.py: from sm_100", least=_BLACKWELL,
            method="gptq"),
    Support("vllm", ("MXFP4",), "16", _CT, "compressed_tensors_w4a4_mxfp4.py, get_min_capability 80; Marlin",
            least=_AMPERE, most=_BELOW_BLACKWELL, small_batch=_MARLIN_BATCH, fallback=True, method="gptq"),
    Support("vllm", ("MXFP4A16",), "16", _CT, "compressed_tensors_w4a4_mxfp4.py, get_min_capability 80; Marlin",
            least=_AMPERE, small_batch=_MARLIN_BATCH, fallback=True, method="gptq"),
    Support("vllm", ("MXFP8",), "fp8", _CT, f"{_V}kernels/linear/mxfp8/flashinfer.py: from sm_100", least=_BLACKWELL),
    Support("vllm", ("MXFP8",), "16", _CT, "compressed_tensors_w8a8_mxfp8.py, get_min_capability 75; Marlin",
            least=_TURING, most=_BELOW_BLACKWELL, small_batch=_MARLIN_BATCH, fallback=True),
    Support("vllm", _INT4, "16", _CT, f"{_V}kernels/linear/__init__.py: Triton, Conch and ExLlama on ROCm",
            kinds=("rocm",), small_batch=8, method="gptq"),
    Support("vllm", ("W8A8",), "int8", _CT, f"{_V}kernels/linear/__init__.py: AITER and Triton on ROCm",
            kinds=("rocm",), method="smoothquant"),
    Support("vllm", _FP8_SCHEMES, "fp8", _CT, f"{_V}kernels/linear/__init__.py: AITER and torch on ROCm",
            kinds=("rocm",)),
    Support("vllm", _INT4, "16", _CT, f"{_V}kernels/linear/mixed_precision/cpu.py: 4 bits only", kinds=("cpu",),
            small_batch=4, method="gptq"),
    Support("vllm", ("W8A8",), "int8", _CT, f"{_V}kernels/linear/scaled_mm/cpu.py", kinds=("cpu",),
            method="smoothquant"),
    Support("vllm", ("FP8_DYNAMIC",), "16", _CT, f"{_V}kernels/linear/__init__.py: CPU FP8 kernels", kinds=("cpu",),
            small_batch=4, fallback=True),
)  # fmt: skip

_SG = "sglang/srt/layers/quantization/compressed_tensors"
_SGLANG = (
    Support("sglang", _INT4, "16", _CT, f"{_SG}: schemes of packed 4- and 8-bit integers, Marlin", least=_AMPERE,
            small_batch=_MARLIN_BATCH, method="gptq"),
    Support("sglang", ("W8A16",), "16", _CT, f"{_SG}: schemes of packed 4- and 8-bit integers, Marlin", least=_AMPERE,
            small_batch=_MARLIN_BATCH),
    Support("sglang", ("W8A8",), "int8", _CT, f"{_SG}: compressed_tensors_w8a8_int8", least=_TURING,
            most=_BELOW_BLACKWELL, method="smoothquant"),
    Support("sglang", _FP8_SCHEMES, "fp8", _CT, f"{_SG}: compressed_tensors_w8a8_fp8", least=_ADA),
    Support("sglang", ("NVFP4",), "fp4", _CT, f"{_SG}: NVFP4 in groups of 16", least=_BLACKWELL, method="gptq"),
    Support("sglang", ("W8A8",), "int8", _CT, f"{_SG}: compressed_tensors_w8a8_int8", kinds=("rocm",),
            method="smoothquant"),
    Support("sglang", _FP8_SCHEMES, "fp8", _CT, f"{_SG}: compressed_tensors_w8a8_fp8", kinds=("rocm",)),
)  # fmt: skip

_CHOOSING = "nvidia.github.io/Model-Optimizer/guides/_choosing_quant_methods.html"
_TRT_DOCS = "nvidia.github.io/TensorRT-LLM/reference/precision.html"
_TRT_BATCH = 4  # "small-batch inference scenarios (batch size <= 4)": _CHOOSING
_TRT_TOOL = "python examples/quantization/quantize.py --model_dir MODEL --output_dir OUT --qformat {}"
_TENSORRT = (
    Support("tensorrt-llm", ("FP8",), "fp8", "modelopt", f"{_TRT_DOCS}; {_CHOOSING}", least=_ADA),
    Support("tensorrt-llm", ("FP8_DYNAMIC", "FP8_BLOCK"), "fp8", _CT,
            f"{_TRT_DOCS}: rowwise and block FP8; quant_config_utils.py", least=_HOPPER, most=_BELOW_BLACKWELL),
    Support("tensorrt-llm", ("FP8_BLOCK",), "fp8", _CT, f"{_TRT_DOCS}; quant_config_utils.py", least=_BLACKWELL),
    Support("tensorrt-llm", ("NVFP4",), "fp4", "modelopt", f"{_TRT_DOCS}", least=_BLACKWELL, method="gptq"),
    Support("tensorrt-llm", ("W8A8",), "int8", None, f"{_TRT_DOCS}: SmoothQuant; {_CHOOSING}: INT8 SQ on Ampere",
            least=_AMPERE, most=_BELOW_BLACKWELL, method="smoothquant",
            note="INT8 SmoothQuant of its TensorRT engines; lowbit writes no checkpoint of that kind",
            instead=_TRT_TOOL.format("int8_sq")),
    Support("tensorrt-llm", _INT4[:1], "16", None, f"{_TRT_DOCS}: W4A16 AWQ; {_CHOOSING}: INT4 AWQ for small batches",
            least=_AMPERE, small_batch=_TRT_BATCH, method="awq",
            note="INT4 AWQ in ModelOpt's W4A16_AWQ; lowbit's AWQ files are AutoAWQ's, which TensorRT-LLM passes over",
            instead=_TRT_TOOL.format("int4_awq")),
    Support("tensorrt-llm", ("W8A16",), "16", None, f"{_TRT_DOCS}: W8A16 weight-only", least=_AMPERE,
            small_batch=_TRT_BATCH, note="INT8 weight-only of its TensorRT engines; lowbit writes no such checkpoint",
            instead="python examples/models/core/llama/convert_checkpoint.py --model_dir MODEL --output_dir OUT "
            "--use_weight_only --weight_only_precision int8"),
)  # fmt: skip

# Of llama-quantize's file types, those in use for whole models; the legacy ones of 5 bits and the one-bit ones are left
# out: each has another of its size that loses less.
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_0", "Q3_K_L", "Q3_K_M",
              "IQ3_M", "IQ3_XXS", "Q2_K", "IQ2_M")  # fmt: skip
_LLAMA_BATCH = 8
# It multiplies prompts in integers or 16 bits, whichever a backend has; either way its own table has prompts of
# quantized types at 0.77 to 0.94 of the speed of F16, so nothing is gained by them: compute "16".
_LLAMA_DOCS = "github.com/ggml-org/llama.cpp, tools/quantize/README.md, Llama-3.1-8B: prompts no quicker than in F16"
_LLAMA_CPP = (
    Support("llama.cpp", GGUF_TYPES, "16", "gguf", _LLAMA_DOCS, kinds=("cpu", "cuda", "rocm", "metal"),
            small_batch=_LLAMA_BATCH),
)  # fmt: skip

_BNB = "huggingface.co/docs/bitsandbytes: LLM.int8() and 4-bit linears; peft trains adapters on them"
_HF = "transformers decodes compressed-tensors weights for every product, in torch: smaller, not quicker"
_ALL_KINDS = ("cuda", "rocm", "cpu")
_TRANSFORMERS = (
    Support("transformers", ("NF4", "FP4"), "16", "bitsandbytes", _BNB, kinds=_ALL_KINDS, small_batch=1,
            finetune=True),
    Support("transformers", ("INT8",), "16", "bitsandbytes", _BNB, kinds=_ALL_KINDS, small_batch=1, finetune=True),
    Support("transformers", (*_INT4, "W8A16"), "16", _CT, _HF, kinds=_ALL_KINDS, small_batch=0, method="gptq"),
)  # fmt: skip

SUPPORT: tuple[Support, ...] = (*_VLLM, *_SGLANG, *_TENSORRT, *_LLAMA_CPP, *_TRANSFORMERS)

# Devices that an engine runs on at all.
_KINDS: dict[str, tuple[str, ...]] = {
    "vllm": ("cuda", "rocm", "cpu"),
    "sglang": ("cuda", "rocm"),
    "tensorrt-llm": ("cuda",),
    "llama.cpp": ("cuda", "rocm", "metal", "cpu"),
    "transformers": ("cuda", "rocm", "metal", "cpu"),
}
# Formats whose files can carry the scales of a cache in FP8, and engines that keep one; docs/schemes.md, "KV cache".
FP8_CACHE_FORMATS = ("compressed-tensors", "modelopt")
FP8_CACHE_ENGINES = ("vllm", "sglang", "tensorrt-llm")


def engine_for(device: Device, finetune: bool = False) -> str:
    """The engine that one would take for a device if none is named."""
    if finetune:
        return "transformers"
    return "llama.cpp" if device.consumer or device.kind in ("cpu", "metal") else "vllm"


def supported(engine: str, device: Device) -> dict[str, Support]:
    """scheme → how `engine` runs it on `device`, for all that it runs there.

    Raises UsageError for an engine that does not run on such a device at all.
    """
    if device.kind not in _KINDS[engine]:
        others = [name for name, kinds in _KINDS.items() if device.kind in kinds]
        raise UsageError(f"{engine} does not run on {device.label} ({device.kind})", f"try {' or '.join(others)}")
    found: dict[str, Support] = {}
    for row in SUPPORT:
        if row.engine == engine and row.runs_on(device):
            for scheme in row.schemes:
                found.setdefault(scheme, row)
    return found


def left_out(engine: str, device: Device) -> list[str]:
    """Schemes that the engine runs on other devices, but not on this one."""
    elsewhere = dict.fromkeys(scheme for row in SUPPORT if row.engine == engine for scheme in row.schemes)
    return [scheme for scheme in elsewhere if scheme not in supported(engine, device)]
