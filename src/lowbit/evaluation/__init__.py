"""How much a quantized model differs from its source: perplexity, KL divergence, generated text."""

from lowbit.architecture.loading import load, load_model
from lowbit.evaluation.generation import generate
from lowbit.evaluation.kv_cache import evaluate_kv_cache
from lowbit.evaluation.perplexity import evaluate
from lowbit.evaluation.result import Evaluation, evaluation_table, heading, sentence

__all__ = [
    "Evaluation", "evaluate", "evaluate_kv_cache", "evaluation_table", "generate", "heading", "load", "load_model",
    "sentence",
]  # fmt: skip
