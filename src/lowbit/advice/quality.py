"""Expected loss of quality per scheme: published figures and our own, each with its source. No figure, no row.

`expected` gives one number per scheme, `loss`: percent by which the quantized model is worse than the original, in the
metric of its source: 100 · ln(PPL / PPL of the original), or 100 − recovery of benchmark averages. GGUF types have the
former, all from one table; most others the latter. They are compared within an engine, where the metric is mostly the
same, and the metric is always named.

Published figures are for models of 8 billion weights. Smaller models lose more (SmolLM2-135M several times as much at
4 bits, see OURS), larger ones less. A scheme without a published 8B figure is scaled,

    loss = loss of the anchor · max(1, our mean KLD of the scheme / our mean KLD of the anchor)

from a related scheme that has one, both rounded to nearest; `Expectation.scaled_from` names it. The loss is never less
than the anchor's: one small model is no evidence that a scheme beats a published one. OURS are for demo:smollm2, by
`python benchmarks/scheme_quality.py demo:smollm2`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.engines.engine import SIXTEEN
from lowbit.kv.losses import CacheLoss, cache_loss


@dataclass(frozen=True)
class Figure:
    """One published figure. value  in the metric's own unit, as printed there; loss  in percent, see the module."""

    scheme: str
    metric: str
    value: str
    loss: float
    model: str
    method: str
    source: str


@dataclass(frozen=True)
class OurFigure:
    """One of ours: mean KLD per token against the original, its standard error, PPL ratio; activations simulated."""

    method: str
    kld: float
    kld_se: float
    ppl_ratio: float


@dataclass(frozen=True)
class Expectation:
    """loss in percent; says  the figure in words; scaled_from  a scheme where the figure is not the scheme's own."""

    loss: float
    says: str
    model: str
    source: str
    scaled_from: str | None = None

    @property
    def basis(self) -> str:
        """ "published", or what it was scaled from; of 16 bits "exact"."""
        return f"scaled from {self.scaled_from}" if self.scaled_from else "published" if self.source else "exact"


_LLAMA3 = "Llama-3-8B"
_SCOREBOARD = "github.com/ggml-org/llama.cpp, tools/perplexity/README.md, LLaMA 3 8b Scoreboard"
_F16_PPL = 6.231636  # 6.233160 of the F16 file − 0.001524, its difference to the base: same table
# GGUF type → (perplexity on WikiText-2, importance matrix)
_GGUF_PPL: dict[str, tuple[float, bool]] = {
    "Q8_0": (6.234284, False), "Q6_K": (6.253382, False), "Q5_K_M": (6.288607, False), "Q5_K_S": (6.336598, False),
    "Q4_K_M": (6.382937, True), "Q4_K_S": (6.409697, True), "IQ4_NL": (6.455593, True), "IQ4_XS": (6.459705, True),
    "Q4_0": (6.700147, False), "Q3_K_L": (6.671223, True), "Q3_K_M": (6.734255, True), "IQ3_M": (6.898327, True),
    "IQ3_XXS": (7.458436, True), "Q2_K": (8.647825, True), "IQ2_M": (8.600799, True),
}  # fmt: skip


def _gguf(name: str, ppl: float, imatrix: bool) -> Figure:
    return Figure(name, "PPL, WikiText-2", f"{ppl / _F16_PPL - 1:+.2%}", 100 * math.log(ppl / _F16_PPL), _LLAMA3,
                  "importance matrix" if imatrix else "no importance matrix", _SCOREBOARD)  # fmt: skip


_KURTIC = "Kurtic et al., Give Me BF16 or Give Me Death?, arXiv 2411.02355"
_W4A16_CARD = "huggingface.co/RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16"
_W8A16_CARD = "huggingface.co/RedHatAI/Meta-Llama-3-8B-Instruct-quantized.w8a16"
_TORCHAO = "github.com/pytorch/ao, pull request 3394"
_NVFP4_CARD = "huggingface.co/ISTA-DASLab/Llama-3.1-8B-Instruct-FPQuant-QAT-NVFP4, its RTN row; arXiv 2509.23202"
_INSTRUCT = "Llama-3.1-8B-Instruct"

# W4A16: recovery of Arena-Hard 93.0, OpenLLM v1 98.9, v2 96.1, HumanEval 99.7, HumanEval+ 97.4: mean 97.0.
# W8A8: the abstract gives 1 to 3 % for well-tuned INT8; which of it depends on the outliers of a model's activations,
# so the upper end counts. FP8 and MXFP8: word perplexity of WikiText, BF16 7.5472, FP8 per row 7.62, MXFP8 7.60.
PUBLISHED: dict[str, Figure] = {
    figure.scheme: figure
    for figure in (
        *(_gguf(name, *row) for name, row in _GGUF_PPL.items()),
        Figure("W4A16", "recovery, mean of five benchmarks", "97.0 %", 3.0, _INSTRUCT, "gptq", _W4A16_CARD),
        Figure("W8A8", "loss of accuracy, INT8 well tuned", "1 to 3 %", 3.0, "Llama-3.1 8B to 405B", "tuned", _KURTIC),
        Figure("W8A16", "recovery, OpenLLM v1", "99.8 %", 0.22, "Llama-3-8B-Instruct", "gptq", _W8A16_CARD),
        Figure("FP8_DYNAMIC", "word PPL, WikiText", "+0.96 %", 0.96, "Llama-3.1-8B", "rtn", _TORCHAO),
        Figure("MXFP8", "word PPL, WikiText", "+0.70 %", 0.70, "Llama-3.1-8B", "rtn", _TORCHAO),
        Figure("NVFP4", "recovery, mean of four benchmarks", "93.8 %", 6.2, _INSTRUCT, "rtn", _NVFP4_CARD),
    )
}  # fmt: skip

# scheme → the one whose published figure is scaled to it, by the ratio of our KLDs
ANCHORS: dict[str, str] = {
    "W4A16_ASYM": "W4A16", "NVFP4A16": "W4A16", "MXFP4A16": "W4A16", "NF4": "W4A16", "FP4": "W4A16",
    "FP8": "FP8_DYNAMIC", "FP8_BLOCK": "FP8_DYNAMIC", "MXFP4": "NVFP4", "INT8": "W8A16",
}  # fmt: skip
# schemes with two errors: in the weights as the first, in the activations as the second
SUMS: dict[str, tuple[str, str]] = {"W4AFP8": ("W4A16", "FP8_DYNAMIC"), "W4AFP8_STATIC": ("W4A16", "FP8_DYNAMIC")}
OUR_MODEL = "SmolLM2-135M-Instruct"
OUR_COMMAND = "python benchmarks/scheme_quality.py demo:smollm2"
OURS: dict[str, OurFigure] = {
    "W8A16": OurFigure("rtn", 0.0015, 0.0000, 1.0024),
    "W4A16": OurFigure("rtn", 0.3156, 0.0046, 1.2755),
    "W4A16_ASYM": OurFigure("rtn", 0.2979, 0.0045, 1.2507),
    "W8A8": OurFigure("rtn", 0.0289, 0.0005, 1.0291),
    "FP8_DYNAMIC": OurFigure("rtn", 0.0267, 0.0005, 1.0199),
    "FP8": OurFigure("rtn", 0.0310, 0.0006, 1.0249),
    "FP8_BLOCK": OurFigure("rtn", 0.0158, 0.0004, 1.0122),
    "MXFP8": OurFigure("rtn", 0.0534, 0.0010, 1.0487),
    "NVFP4": OurFigure("rtn", 0.3788, 0.0058, 1.4318),
    "NVFP4A16": OurFigure("rtn", 0.1932, 0.0030, 1.1900),
    "MXFP4": OurFigure("rtn", 1.2822, 0.0182, 3.3671),
    "MXFP4A16": OurFigure("rtn", 0.4355, 0.0089, 1.4712),
    "NF4": OurFigure("rtn", 0.2483, 0.0036, 1.1890),
    "FP4": OurFigure("rtn", 0.4722, 0.0070, 1.4128),
    "INT8": OurFigure("rtn", 0.0029, 0.0001, 1.0018),
}

# The FP8 cache that is advised has scales in the checkpoint.
FP8_CACHE_TYPE = "fp8_calibrated"


def fp8_cache_loss() -> CacheLoss:
    """Measured; `lowbit.kv.losses` has the model and the command."""
    found = cache_loss(FP8_CACHE_TYPE)
    assert found is not None, "data/kv_cache_losses.json has it, by test"
    return found


# Adapters trained on NF4 recover its loss: abstract of the paper.
_QLORA = Expectation(
    0.0, "with trained adapters: full 16-bit fine-tuning task performance", "LLaMA 7B to 65B",
    "Dettmers et al., QLoRA, arXiv 2305.14314",
)  # fmt: skip


def expected(scheme: str, finetuned: bool = False) -> Expectation | None:
    """The expected loss of a scheme at 8 billion weights; None without a figure.

    finetuned  adapters are trained on it, with data of the task
    """
    if finetuned and scheme == "NF4":
        return _QLORA
    if scheme == SIXTEEN:
        return Expectation(0.0, "the original", "", "")
    figure = PUBLISHED.get(scheme)
    if figure is not None:
        return Expectation(figure.loss, f"{figure.metric}: {figure.value}", figure.model, figure.source)
    if scheme in SUMS:
        return _summed(*SUMS[scheme])
    anchor = ANCHORS.get(scheme)
    if anchor is None or scheme not in OURS or anchor not in OURS:
        return None
    ratio = max(1.0, OURS[scheme].kld / OURS[anchor].kld)
    published = PUBLISHED[anchor]
    return Expectation(
        published.loss * ratio,
        f"{ratio:.2f} times that of {anchor} ({published.metric}: {published.value}), as on {OUR_MODEL}",
        published.model,
        f"{published.source}; ours: {OUR_COMMAND}",
        anchor,
    )


def _summed(weights: str, activations: str) -> Expectation:
    first, second = PUBLISHED[weights], PUBLISHED[activations]
    return Expectation(
        first.loss + second.loss,
        f"{weights} ({first.metric}: {first.value}) and {activations} ({second.metric}: {second.value}), added",
        first.model,
        f"{first.source}; {second.source}",
        weights,
    )
