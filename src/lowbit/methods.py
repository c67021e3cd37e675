"""Methods: transforms that rewrite weights, the rounding that chooses codes, and what learns behind it.

    rtn   gptq   awq   awq+gptq   smoothquant+gptq   rotate+gptq   gptq+sign-sgd   hqq   squeezellm
    gptq+distill   spinquant+gptq …

A method is transforms in the order given, then one rounding, then at most one finish; the default is rounding to
nearest. A row names its function as "module:function", imported when it runs, and its needs; other code tests these
attributes, never a name. A new method is a module and a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from lowbit.errors import UsageError, did_you_mean
from lowbit.registry import load

# The hint where a model cannot be run, or not in this memory. A level of quality stands for a method that runs a text.
RUNS_NO_TEXT = "lowbit quantize --method rtn, without --quality, runs no text"


@dataclass(frozen=True)
class Transform:
    """Rewrites the weights of a block so that they round better; the float output of the model stays the same.

    function  (block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize) → list[TransformNote]
    paper     arXiv
    stream    (facts) → StreamRotations, of the residual stream: folded before any measurement; `function` gets them as
              a fourth argument
    learns    `stream` learns them from the text: (RotationJob, BlockStore) → StreamRotations
    refuses   (facts) → None; UsageError names why a model does not allow it, before any work
    online    (architecture, quantized linears) → linear → rotation of its input that the engine applies as the model
              runs; `function` is then empty, since only what is rounded is rotated. For formats that state it
    """

    name: str
    function: str
    summary: str
    paper: str
    aliases: tuple[str, ...] = ()
    stream: str | None = None
    learns: bool = False
    refuses: str | None = None
    online: str | None = None

    @property
    def needs_statistics(self) -> bool:
        return self.stream is None and self.online is None


@dataclass(frozen=True)
class Rounding:
    """Chooses codes.

    function       (weight [N, K], target: Target, data: InputData, options) → Rounded; if it `learns`,
                   (block, call, inputs, targets, linears, options) → Rounded by linear, see `rounding.sign_sgd`
    options        dataclass of its knobs, with a constructor `of(settings)`; None if it has none
    paper          arXiv, or a web page
    needs_hessian  needs calibration text; linears that too few tokens reach are rounded to nearest. Its options say
                   whether it also `needs_drift` and `needs_lost`
    grids_only     does not work on ggml types
    scales_only    moves scales of fixed values, and has no way for values that are fitted (k-means, logarithmic)
    learns         tunes all linears of a block together, starting from the codes of one of `starts`, or of rtn
    refines        starts from the codes of a finished file, which its function takes as a fifth argument; for
                   `lowbit refine` alone
    """

    name: str
    function: str
    summary: str
    paper: str | None = None
    options: str | None = None
    aliases: tuple[str, ...] = ()
    needs_hessian: bool = False
    grids_only: bool = False
    scales_only: bool = False
    learns: bool = False
    refines: bool = False
    starts: tuple[str, ...] = ()

    @property
    def needs_text(self) -> bool:
        """True if calibration text runs through the model, block by block."""
        return self.needs_hessian or self.learns

    def options_of(self, settings: Any) -> Any:
        """Its options from `lowbit.settings.Settings`."""
        return None if self.options is None else load(self.options).of(settings)


@dataclass(frozen=True)
class Finish:
    """Improves the rounded model as a whole, its codes fixed.

    function  (calibrated: Calibrated, job: FinishJob) → (Calibrated, whose store has the result; Distilled)
    paper     arXiv
    """

    name: str
    function: str
    summary: str
    paper: str


TRANSFORMS = {row.name: row for row in (
    Transform("smoothquant", "lowbit.transform.smoothquant:apply",
              "scales that move outliers of activations into weights", "2211.10438", ("smooth",)),
    Transform("awq", "lowbit.transform.awq:apply",
              "scales that protect weights which meet large activations", "2306.00978"),
    Transform("rotate", "lowbit.transform.rotate:apply_values",
              "a Hadamard rotation of each value head (R2 of QuaRot)", "2404.00456", ("r2",)),
    Transform("hadamard", "lowbit.transform.rotate:apply_stream",
              "a Hadamard rotation of the residual stream (R1 of QuaRot)", "2404.00456", ("quarot", "r1"),
              stream="lowbit.transform.rotate:hadamard_rotations", refuses="lowbit.transform.rotate:refuse_residual"),
    Transform("spinquant", "lowbit.transform.rotate:apply_stream",
              "rotations of the residual stream and of each value head, learned from the unquantized model; slow",
              "2405.16406", stream="lowbit.distillation.rotations:learned_rotations", learns=True,
              refuses="lowbit.transform.rotate:refuse_residual"),
    Transform("hadamard-down", "",
              "a Hadamard rotation of the input of down_proj, by the engine as the model runs (R4 of QuaRot)",
              "2404.00456", ("r4",), online="lowbit.transform.online:down_rotations",
              refuses="lowbit.transform.online:refuse_down"),
)}  # fmt: skip
# Methods of the field that are none here → what to take instead, and why.
NOT_HERE = {
    "r3": "leave it out: it turns queries and keys for the cache alone, and no engine here applies it; lowbit evaluate "
          "--kv-cache quarot4 measures such a cache",
    "atom": "no engine's format has columns in 8 bits beside those in 4; take quarot+r2+r4+gptq, or spinquant+r4+gptq",
    "omniquant": "take awq+gptq+sign-sgd: scales are searched, ranges and codes are learned",
}  # fmt: skip
ROUNDINGS = {row.name: row for row in (
    Rounding("rtn", "lowbit.rounding.target:nearest", "round to nearest, no data"),
    Rounding("hqq", "lowbit.rounding.hqq:hqq", "half-quadratic search of scales and zero points, no data",
             "mobiusml.github.io/hqq_blog", "lowbit.rounding.hqq:HqqOptions", grids_only=True, scales_only=True),
    Rounding("gptq", "lowbit.rounding.gptq:gptq",
             "rounding with error feedback through the Hessian of the inputs", "2210.17323",
             "lowbit.rounding.gptq:GPTQOptions", needs_hessian=True),
    Rounding("squeezellm", "lowbit.rounding.squeezellm:squeezellm",
             "round to nearest; k-means tables and ranges weighed by the Hessian's diagonal", "2306.07629",
             "lowbit.rounding.squeezellm:SqueezeOptions", needs_hessian=True),
    Rounding("sign-sgd", "lowbit.rounding.sign_sgd:sign_sgd_block",
             "rounding and ranges learned block by block by signed gradients (AutoRound); slow", "2309.05516",
             "lowbit.rounding.sign_sgd:SignSGDOptions", ("autoround", "signsgd"), grids_only=True, scales_only=True,
             learns=True, starts=("gptq",)),
)}  # fmt: skip
FINISHES = {row.name: row for row in (
    Finish("distill", "lowbit.distillation.stage:distill_store",
           "scales, norms and biases learned from the unquantized model, end to end; codes stay", "1503.02531"),
)}  # fmt: skip
RTN = ROUNDINGS["rtn"]
REFINE = Rounding("refine", "lowbit.rounding.descent:refine",
                  "coordinate descent from the codes of a finished file", "2309.01885",
                  "lowbit.rounding.descent:RefineOptions", needs_hessian=True, refines=True,
                  scales_only=True)  # fmt: skip
_BY_NAME = {
    name: row for row in (*TRANSFORMS.values(), *ROUNDINGS.values(), REFINE) for name in (row.name, *row.aliases)
}


@dataclass(frozen=True)
class Method:
    """Transforms in order, the rounding of each linear by itself, the rounding that then learns a block, and the finish
    that learns the model, if any."""

    transforms: tuple[Transform, ...]
    rounding: Rounding
    learned: Rounding | None = None
    finish: Finish | None = None

    @property
    def name(self) -> str:
        """The method as the user types it."""
        rows = (*self.transforms, self.rounding, *([self.learned] if self.learned else []))
        names = [row.name for row in rows if row is not RTN] or [RTN.name]
        return "+".join([*names, *([self.finish.name] if self.finish else [])])

    @property
    def needs_text(self) -> bool:
        """True if calibration text runs through the model, block by block."""
        return bool(self.transforms) or self.rounding.needs_text or bool(self.learned or self.finish)

    @property
    def learns_rotations(self) -> bool:
        """True if rotations of the whole model are learned from the text, before anything is rounded."""
        return any(row.learns for row in self.transforms)


@cache  # asked for every linear of a model
def parse_method(text: str) -> Method:
    """ "smoothquant+gptq" → Method; UsageError names what is unknown or stands in the wrong order."""
    transforms: list[Transform] = []
    roundings: list[Rounding] = []
    parts = text.lower().split("+")
    finish = FINISHES.get(parts[-1].strip())
    for part in parts[:-1] if finish else parts:
        if part.strip() in FINISHES:
            raise UsageError(f"method {text!r}: {part.strip()} works on the rounded model",
                             f"it comes last, once: gptq+{part.strip()}")  # fmt: skip
        row = _BY_NAME.get(part.strip())
        if row is None:
            known = [*TRANSFORMS, *ROUNDINGS, *FINISHES]
            hint = did_you_mean(part.strip(), known, f"choose from {', '.join(known)}, joined by +", 2)
            raise UsageError(f"there is no method {part.strip()!r}", NOT_HERE.get(part.strip().lower(), hint))
        if row in transforms or row in roundings or (isinstance(row, Transform) and roundings):
            raise UsageError(f"method {text!r}: {row.name} appears twice, or after a rounding",
                             "transforms come first: smoothquant+gptq")  # fmt: skip
        if isinstance(row, Transform):
            transforms.append(row)
        else:
            roundings.append(row)
    learned = roundings.pop() if roundings and roundings[-1].learns else None
    if len(roundings) > 1 or (learned and roundings and roundings[0].name not in learned.starts):
        pairs = [f"{start}+{row.name}" for row in ROUNDINGS.values() for start in row.starts]
        raise UsageError(f"method {text!r} rounds twice",
                         f"only {' and '.join(pairs)} does: the second starts from the first")  # fmt: skip
    streams = [row.name for row in transforms if row.stream is not None]
    if len(streams) > 1:
        raise UsageError(f"method {text!r} rotates the residual stream twice", f"take one of {' and '.join(streams)}")
    if any(row.learns for row in transforms) and TRANSFORMS["rotate"] in transforms:
        raise UsageError(f"method {text!r} rotates values twice: spinquant learns a rotation of each value head",
                         "leave rotate out")  # fmt: skip
    online = next((row.name for row in transforms if row.online is not None), None)
    if online is not None and learned:
        raise UsageError(f"method {text!r}: {learned.name} learns in the model's own basis, {online} rounds in another",
                         f"take {online}+gptq")  # fmt: skip
    return Method(tuple(transforms), roundings[0] if roundings else RTN, learned, finish)
