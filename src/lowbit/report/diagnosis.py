"""What `lowbit diagnose` found, as the report keeps it: findings, contributions, flipped tokens, commands.

`lowbit.diagnosis` makes these; the page shows them. Frozen, unknown fields refused, no NaN or inf: a figure that could
not be measured is None.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1 + 1e-6)]

Level = Literal["outside", "everywhere", "blocks", "block", "set", "tensor"]
Severity = Literal["fault", "warning", "note"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Contribution(_Part):
    """By how much the mean KLD falls when some tensors get the reference's weights back, all others left as they are.

    level       what was restored:
                "outside"     one tensor outside the decoder blocks: lm_head, embedding
                "everywhere"  one set of linears in all blocks: role "down_proj", block None
                "blocks"      a run of blocks, `block` to `last_block`; role "blocks"
                "block"       all of one block; role "block"
                "set"         linears of a block that engines fuse and that share a scheme: role "qkv_proj", "down_proj"
                "tensor"      one linear, whose weight's name is `tensor`; or an expert, or some of a block's experts
    name        what it is called: model.layers.3.self_attn.qkv_proj
    kld, se     nats per token, and the standard error of the difference, paired over tokens; negative where the model
                got worse
    significant False where |kld| is under two standard errors: noise
    bytes       what its tensors take in the quantized files
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


class Finding(_Part):
    """One thing that was found.

    kind      what it is about: "scale", "broken", "bits", "calibration", "spread" …
    severity  "fault": something is wrong; "warning": costs quality; "note": worth knowing
    title     one sentence
    kld, se   what it costs, where that was measured; share: of the whole KLD
    """

    kind: str
    severity: Severity
    title: str
    detail: str = ""
    tensors: tuple[str, ...] = ()
    kld: float | None = None
    se: NonNegative | None = None
    share: float | None = None


class Flip(_Part):
    """A token whose most probable successor changed.

    context             the text in front of it
    token               what came in the text
    reference, quantized   what each model holds most probable, and how probable
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


class Suggestion(_Part):
    """What to do: a command, what it is expected to gain (nats of mean KLD) and to cost (bytes of the files)."""

    text: str
    command: str
    gain: float | None = None
    gain_se: NonNegative | None = None
    bytes: int | None = None


class DiagnosisText(_Part):
    """Which text: name, SHA-256 of its bytes, tokens in all of it."""

    name: str
    sha256: str
    tokens: Count


class Diagnosis(_Part):
    """
    verdict         which thing hurts most, and why: one sentence
    healthy         True where nothing is wrong: no finding is a fault
    kld, kld_se     mean KL(reference ‖ quantized) per token, weights alone; None where it is not finite
    forward_passes  windows through all blocks and the head, added up, over the number of windows
    notes           what was left out, and why
    """

    verdict: str
    healthy: bool
    model: str
    reference: str
    text: DiagnosisText
    windows: Count
    window_tokens: Count
    scored_tokens: Count
    dtype: str
    kld: float | None
    kld_se: NonNegative | None
    same_top1: Annotated[float, Field(ge=0, le=1)] | None
    findings: tuple[Finding, ...]
    contributions: tuple[Contribution, ...]
    flips: tuple[Flip, ...]
    suggestions: tuple[Suggestion, ...]
    forward_passes: NonNegative
    seconds: NonNegative
    peak_memory_bytes: Count
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")
