"""The table of rules, in checking order: a new one is a function in the file of its topic, and a row here."""

from __future__ import annotations

from lowbit.verification import configuration, engine_limits, files, fused, tensors, values
from lowbit.verification.result import Rule

ENGINES = ("vllm", "transformers")
_VLLM = ("vllm",)

RULES: tuple[Rule, ...] = (
    Rule("files", ENGINES, "every shard is there, whole, and agrees with the index", files.check_files, gate=True),
    Rule("quantization-config", ENGINES, "quantization_config parses strictly",
         configuration.check_quantization_config, gate=True),
    Rule("format", ENGINES, "every group states a storage format that holds its numbers", configuration.check_format,
         gate=True),
    Rule("architecture", ENGINES, "the model can be built and its linears are known", configuration.check_architecture,
         gate=True),
    Rule("tokenizer", ENGINES, "a tokenizer is there and loads", files.check_tokenizer),
    Rule("generation-config", ENGINES, "generation_config.json parses", files.check_generation_config),
    Rule("chat-template", ENGINES, "a chat template is there if the source has one", files.check_chat_template),
    Rule("sparsity", ENGINES, "sparsity_config is empty", configuration.check_sparsity),
    Rule("activation-order", ENGINES, "columns are not permuted", configuration.check_activation_order),
    Rule("activations", _VLLM, "weight-only formats come without activations", configuration.check_activations),
    Rule("kv-cache", _VLLM, "a KV-cache scheme is one that vLLM knows", configuration.check_kv_cache),
    Rule("fused-ignore", _VLLM, "`ignore` covers whole fused sets", fused.check_fused_ignore),
    Rule("fused-patterns", _VLLM, "regexes mean the same under fused names", fused.check_fused_patterns),
    Rule("fused-schemes", _VLLM, "q/k/v and gate/up have one scheme", fused.check_fused_schemes),
    Rule("engine-groups", _VLLM, "vLLM gives every layer the scheme meant for it", fused.check_engine_groups),
    Rule("coverage", ENGINES, "every linear is quantized or ignored, in config.json as in the files",
         tensors.check_coverage),
    Rule("tensors", ENGINES, "every tensor is there, with the right dtype and shape", tensors.check_tensors),
    Rule("leftovers", ENGINES, "no tensor that a loader would not know", tensors.check_leftovers),
    Rule("sizes", ENGINES, "bytes are as predicted from shapes", files.check_sizes),
    Rule("engine-limits", _VLLM, "kernels exist for bits, group sizes and dtypes", engine_limits.check_engine_limits),
    Rule("tensor-parallel", _VLLM, "layers split at whole groups; sizes beyond 1 are informational",
         engine_limits.check_tensor_parallel),
    Rule("fused-global-scales", _VLLM, "NVFP4's scale per tensor is shared in fused sets",
         fused.check_fused_global_scales),
    Rule("activation-scales", ENGINES, "static activation scales are finite and positive",
         tensors.check_activation_scales),
    Rule("zero-points", ENGINES, "symmetric groups ship none; others are packed cleanly", tensors.check_zero_points),
    Rule("scales", ENGINES, "no scale is NaN, infinite, negative or wrongly zero", values.check_scales),
    Rule("codes", ENGINES, "codes are in range, padding bits are zero", values.check_codes),
    Rule("finite", ENGINES, "unquantized tensors hold neither NaN nor inf", values.check_finite),
    Rule("nearest-codes", ENGINES, "every code is the nearest one to the source's weight", values.check_nearest,
         needs_source=True, needs_nearest=True),
    Rule("relative-error", ENGINES, "decoded weights are the source's within a bound by bits",
         values.check_relative_error, needs_source=True),
    Rule("unquantized", ENGINES, "unquantized tensors equal the source's", values.check_unquantized,
         needs_source=True),
)  # fmt: skip
