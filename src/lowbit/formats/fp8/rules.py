"""Rules on native FP8 folders (DeepSeek's weight_scale_inv).

vLLM 0.32 fp8.py and utils/fp8_utils.py, SGLang 0.5 fp8.py, transformers 5 FineGrainedFP8Config, TensorRT-LLM's
model_config.py.
"""

from __future__ import annotations

from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject


def check_config(subject: Subject) -> Finding:
    """activation_scheme is stated; weight_block_size, where given, has two sizes, and activations are then dynamic."""
    stated, problems = subject.quantization, []
    activation, block = stated.get("activation_scheme"), stated.get("weight_block_size")
    if activation not in ("dynamic", "static"):
        problems.append(f"activation_scheme is {activation!r}; 'dynamic' or 'static' is needed")
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            problems.append(f"weight_block_size is {block!r}; [rows, columns] is needed")
        if activation == "static":
            problems.append("weight_block_size with activation_scheme 'static'; blocks take dynamic activations only")
    return Finding(problems, f"{activation} activations, blocks {block}" if block else f"{activation} activations")


RULES: tuple[Rule, ...] = (
    Rule("fp8-config", "config", ("fp8",), "activation_scheme and weight_block_size make sense", check_config,
         "Fp8Config.__init__ of fp8.py (vLLM, SGLang); FineGrainedFP8Config.post_init (transformers)"),
)  # fmt: skip
