"""The rules of each engine, in checking order: COMMON, which hold in every engine; those of each format (its row in
`lowbit.registry.FORMATS`); and the engine's own (`Loading.rules`).

A new rule is a function in the file of its topic and a row. `follows` names the place in a loader's source: vLLM 0.32,
SGLang 0.5.23, transformers 5.23 and the main branch of TensorRT-LLM in autumn 2026. Paths are below
vllm/model_executor/layers/quantization, sglang/srt/layers/quantization, transformers and tensorrt_llm.
"""

from __future__ import annotations

from lowbit.registry import ENGINES, FORMATS, load
from lowbit.verification import configuration, files, layers, tensors
from lowbit.verification.result import ALL, GGUF_FILES, QUANTIZED, STAGES, Rule, loading_of

_OURS = "our own: what no format allows"
_SCALED = ("compressed-tensors", "modelopt", "fp8")  # formats that state scales of activations and of a KV cache

COMMON: tuple[Rule, ...] = (
    Rule("files", "files", ALL, "every shard is there, whole, and agrees with the index", files.check_files,
         "the safetensors format; model_loader/weight_utils.py, filter_duplicate_safetensors_files (vLLM)", gate=True),
    Rule("checksums", "files", ALL, "the weight files are, to the bit, those that lowbit wrote",
         files.check_written_bytes, "our own: SHA-256 of each MiB, in the report", needs_checksums=True,
         then="misreads"),
    Rule("format-known", "files", ALL, "config.json names a known format, and the files are laid out as it",
         files.check_format_known, "get_quant_config (vLLM), quantizers/auto.py (transformers)", gate=True),
    Rule("quantization-config", "parse", QUANTIZED, "quantization_config parses strictly, and fits the files",
         files.check_quantization_config, "QuantizationConfig of compressed-tensors; each format's from_config",
         gate=True),
    Rule("architecture", "model", ALL, "the model can be built and its linears are known", files.check_architecture,
         "the model's own class in transformers", gate=True),
    Rule("tokenizer", "model", ALL, "a tokenizer is there; tokenizer.json loads", files.check_tokenizer,
         "AutoTokenizer (transformers)"),
    Rule("generation-config", "model", ALL, "generation_config.json parses", files.check_generation_config,
         "GenerationConfig (transformers)"),
    Rule("token-ids", "model", ALL, "every token of the tokenizer has a row in the embedding", files.check_token_ids,
         "get_input_embeddings of the model classes: an index out of range, or a token that is refused"),
    Rule("chat-template", "model", ALL, "a chat template is there if the source has one", files.check_chat_template,
         "chat_template of the tokenizer (transformers)", then="misreads"),
    Rule("kv-cache-scales", "format", _SCALED, "a quantized KV cache has its scales, in every layer",
         tensors.check_cache_scales, "CompressedTensorsKVCacheMethod.create_weights, KVCacheScaleParameter of "
         "kv_cache.py, get_cache_scale_mapper of base_config.py (vLLM): absent ones are 1.0 in silence",
         then="misreads"),
    Rule("cache-scales-read", "limits", _SCALED, "the engine reads the scales of a quantized KV cache",
         tensors.check_cache_scales_read, "get_quant_method of compressed_tensors.py, modelopt.py, fp8.py (vLLM); of "
         "compressed_tensors.py and modelopt_quant.py (SGLang), whose compressed-tensors loader has no branch for "
         "attention; kv_cache_compression (TensorRT-LLM)", limit=True, then="costs"),
    Rule("coverage", "layers", QUANTIZED, "every linear is quantized or left out, in config.json as in the files",
         tensors.check_coverage, "our own: nothing is skipped in silence"),
    Rule("tensors", "layers", ALL, "every tensor is there, with the right dtype and shape", tensors.check_tensors,
         "create_weights of each quantization method (vLLM); the modules of transformers"),
    Rule("leftovers", "layers", ALL, "no tensor that a loader would not know", tensors.check_leftovers,
         "load_weights of the model classes (vLLM): KeyError, or passed over"),
    Rule("sizes", "layers", ALL, "bytes are as predicted from shapes", files.check_sizes, "the safetensors format",
         then="costs"),
    Rule("groups-fit", "layers", _SCALED, "in_features divide by the groups of weights and of activations",
         layers.check_groups_fit, "per_token_group_quant_fp8 of utils/fp8_utils.py, create_weights of "
         "compressed_tensors_wNa16.py and of KNvfp4Static, KMxfp8Static, KFp8Block128 in modelopt.py (vLLM); act_quant "
         "of integrations/finegrained_fp8.py, quantize of compressed-tensors' forward.py (transformers)"),
    Rule("engine-loader", "limits", QUANTIZED, "the engine has a loader for the format", files.check_loader,
         "QuantizationMethods of __init__.py (vLLM), BASE_QUANTIZATION_METHODS of __init__.py (SGLang), "
         "AUTO_QUANTIZATION_CONFIG_MAPPING of quantizers/auto.py (transformers), load_hf_quant_config of "
         "_torch/model_config.py (TensorRT-LLM)", limit=True),
    Rule("same-computation", "values", ALL, "config.json states the computation of the source",
         configuration.check_same_computation, "our own: no weight shows another rope_theta", needs_source=True),
    Rule("activation-scales", "values", _SCALED, "static activation scales are finite and positive",
         tensors.check_activation_scales, _OURS),
    Rule("scales", "values", QUANTIZED, "no scale is NaN, infinite, negative or wrongly zero", tensors.check_scales,
         _OURS),
    Rule("codes", "values", QUANTIZED, "codes are in range, padding bits are zero", tensors.check_codes, _OURS),
    Rule("finite", "values", ALL, "unquantized tensors hold neither NaN nor inf", tensors.check_finite, _OURS),
    Rule("nearest-codes", "values", QUANTIZED, "every code is the nearest one to the source's weight",
         tensors.check_nearest, "our own: round to nearest", needs_source=True, needs_nearest=True),
    Rule("relative-error", "values", ALL, "decoded weights are the source's within a bound by bits",
         tensors.check_relative_error, "our own: foreign weights are √2 apart", needs_source=True,
         compares_weights=True),
    Rule("unquantized", "values", ALL, "unquantized tensors equal the source's", tensors.check_unquantized,
         "our own: they are copied", needs_source=True, compares_weights=True),
)  # fmt: skip


def rules_of(engine: str) -> list[Rule]:
    """Every rule of an engine."""
    loading = loading_of(engine)
    general = (*COMMON, *(rule for row in FORMATS.values() if row.rules is not None for rule in load(row.rules)))
    fitting = [rule for rule in general if any(name in GGUF_FILES for name in rule.formats) == loading.reads_gguf]
    return _in_order((*fitting, *loading.rules))


def all_rules() -> dict[Rule, tuple[str, ...]]:
    """Every rule of any engine → the engines that have it."""
    engines: dict[Rule, tuple[str, ...]] = {}
    for engine in ENGINES:
        for rule in rules_of(engine):
            engines[rule] = (*engines.get(rule, ()), engine)
    return {rule: engines[rule] for rule in _in_order(tuple(engines))}


def _in_order(rules: tuple[Rule, ...]) -> list[Rule]:
    return sorted(rules, key=lambda rule: STAGES.index(rule.stage))
