"""How much a quantized model differs from its source: perplexity, KL divergence, generated text."""

from lowbit.architecture.loading import load, load_model
from lowbit.evaluation.generation import generate
from lowbit.evaluation.perplexity import evaluate
from lowbit.evaluation.result import Evaluation, evaluation_table, heading, sentence

__all__ = ["Evaluation", "evaluate", "evaluation_table", "generate", "heading", "load", "load_model", "sentence"]
