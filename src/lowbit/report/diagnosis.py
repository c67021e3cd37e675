"""The records of `lowbit diagnose` in a report: findings, contributions, flipped tokens, commands.

Frozen, without unknown fields, NaN or inf: a figure that could not be measured is None.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowbit.evaluation.result import TextRecord
from lowbit.records import Count, NonNegative, Record, Share

Probability = Annotated[float, Field(ge=0, le=1 + 1e-6)]

Level = Literal["outside", "everywhere", "blocks", "block", "set", "tensor"]
Severity = Literal["fault", "warning", "note"]


class Contribution(Record):
    """The drop of the mean KLD when some tensors get the reference's weights back, all others unchanged.

    level       the restored group:
                "outside"     one tensor outside the decoder blocks: lm_head, embedding
                "everywhere"  one set of linears in all blocks: role "down_proj", block None
                "blocks"      a run of blocks, `block` to `last_block`; role "blocks"
                "block"       all of one block; role "block"
                "set"         linears of a block that engines fuse and that share a scheme: role "qkv_proj", "down_proj"
                "tensor"      one linear, whose weight's name is `tensor`; or an expert, or some of a block's experts
    name        model.layers.3.self_attn.qkv_proj
    kld, se     nats per token, and the standard error of the difference, paired over tokens; negative if the model got
                worse
    significant False if |kld| is under two standard errors: noise
    bytes       of its tensors in the quantized files
    """

    block: Count | None
    role: str
    tensor: str | None = None
    kld: float
    se: NonNegative
    bytes: Count
    level: Level
    name: str
    last_block: Count | None = None
    significant: bool


class DiagnosisFinding(Record):
    """One finding.

    kind      "scale", "replaced", "bits", "calibration", "spread" …
    severity  "fault": something is wrong; "warning": costs quality; "note": worth knowing
    title     one sentence
    kld, se   its cost, if measured; share: of the whole KLD
    """

    kind: str
    severity: Severity
    title: str
    detail: str = ""
    tensors: tuple[str, ...] = ()
    kld: float | None = None
    se: NonNegative | None = None
    share: float | None = None


class Flip(Record):
    """A token whose most probable successor changed.

    context             the text before it
    token               the next token of the text
    reference, quantized   most probable token of each model, with its probability
    kld                 nats at this token
    """

    window: Count
    position: Count
    context: str
    token: str
    reference: str
    reference_p: Probability
    quantized: str
    quantized_p: Probability
    kld: NonNegative


class Suggestion(Record):
    """A command with its expected gain (nats of mean KLD) and cost (bytes of the files)."""

    text: str
    command: str
    gain: float | None = None
    gain_se: NonNegative | None = None
    bytes: int | None = None


class Diagnosis(Record):
    """
    verdict         the worst problem and its cause, in one sentence
    healthy         True if no finding is a fault
    kld, kld_se     mean KL(reference ‖ quantized) per token, weights alone; None if it is not finite
    forward_passes  windows through all blocks and the head, added up, over the number of windows
    notes           what was left out, and why
    """

    verdict: str
    healthy: bool
    model: str
    reference: str
    text: TextRecord
    windows: Count
    window_tokens: Count
    scored_tokens: Count
    dtype: str
    kld: float | None
    kld_se: NonNegative | None
    same_top1: Share | None
    findings: tuple[DiagnosisFinding, ...]
    contributions: tuple[Contribution, ...]
    flips: tuple[Flip, ...]
    suggestions: tuple[Suggestion, ...]
    forward_passes: NonNegative
    seconds: NonNegative
    peak_memory_bytes: Count
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
