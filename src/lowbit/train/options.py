"""What the user says of a training: `Course`, how the model is trained, and `LoRA`, which adapters.

Fields with their `Knob`s are the options of `lowbit finetune`. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from lowbit.errors import UsageError
from lowbit.knobs import CALIBRATION, METHODS, Knob, Options

INITS = ("zero", "loftq")


@dataclass(frozen=True)
class Course(Options):
    """How a model is trained.

    steps          optimizer steps; 0: once through the windows
    batch          windows per step
    learning_rate  of weights and norms; scales have `loop.SCALE_RATE` times it. None: 1e-5, of adapters 2e-4
    windows        of `window_tokens` tokens, some of which are held out
    distill        towards the next-token distribution of the float model; else the loss of the next token
    fit_scales     fit scales of grids to the weights in every forward pass, instead of learning them
    loss_on        "answers" of conversations, "all" tokens; None: answers where there are any
    """

    steps: Annotated[int, Knob("Optimizer steps; 0: once through the windows", CALIBRATION)] = 0
    batch: Annotated[int, Knob("Windows per step", CALIBRATION)] = 4
    learning_rate: Annotated[
        float | None, Knob("Learning rate", CALIBRATION, absent="1e-5, of adapters 2e-4")
    ] = None  # fmt: skip
    seed: Annotated[int, Knob("Seed of the order of windows", CALIBRATION)] = 0
    windows: Annotated[int, Knob("Windows of text; one in eight is held out", CALIBRATION)] = 128
    window_tokens: Annotated[int, Knob("Tokens per window", CALIBRATION)] = 512
    distill: Annotated[
        bool, Knob("Train towards the next-token distribution of the float model", CALIBRATION)
    ] = False  # fmt: skip
    fit_scales: Annotated[
        bool, Knob("Fit scales to the weights at every step instead of learning them", CALIBRATION)
    ] = False  # fmt: skip
    loss_on: Annotated[
        Literal["answers", "all"] | None,
        Knob("Tokens that the loss is taken on", CALIBRATION, metavar="WHAT",
             absent="answers, where there are conversations"),
    ] = None  # fmt: skip

    def __post_init__(self):
        if self.batch < 1 or self.steps < 0 or not 0 < self.rate < 1:
            raise UsageError(f"{self.steps} steps of {self.batch} windows at rate {self.learning_rate}",
                             "take at least one window, and a rate such as 1e-5")  # fmt: skip

    @property
    def rate(self) -> float:
        """The learning rate, or its default for weights."""
        return 1e-5 if self.learning_rate is None else self.learning_rate


@dataclass(frozen=True)
class LoRA(Options):
    """Which adapters are trained.

    rank   r
    alpha  s = alpha / r; None: twice the rank
    init   "zero" or "loftq"
    merge  merge them, instead of keeping them apart: into the 16-bit weights, which are rounded again
    qa     QA-LoRA: they shift the minima of groups, so that merging keeps every code
    """

    rank: Annotated[int, Knob("Train adapters of this rank; the codes stay", METHODS, flag="--lora")]
    alpha: Annotated[
        float | None, Knob("Adapters count alpha / rank", METHODS, absent="twice the rank", flag="--lora-alpha")
    ] = None
    init: Annotated[
        Literal["zero", "loftq"], Knob("How adapters begin", METHODS, metavar="INIT", flag="--lora-init")
    ] = "zero"
    merge: Annotated[bool, Knob("Merge adapters into the 16-bit weights, and round these again", METHODS)] = False
    qa: Annotated[
        bool,
        Knob("QA-LoRA: adapters shift the minima of groups, and --merge keeps every code; Q4_1 and Q5_1", METHODS,
             flag="--qa-lora"),
    ] = False  # fmt: skip

    def __post_init__(self):
        if self.rank < 1:
            raise UsageError(f"adapters of rank {self.rank} change nothing", "give a rank such as 16")
        if self.alpha is not None and not (0 < self.alpha < math.inf):
            raise UsageError(f"alpha {self.alpha} is not a positive number", "give one such as twice the rank")
        if self.init not in INITS:
            raise UsageError(f"adapters do not begin as {self.init!r}", f"choose one of {', '.join(INITS)}")
        if self.qa and not self.merge:
            raise UsageError("QA-LoRA trains adapters to merge them, and these are kept apart",
                             "add --merge, or leave --qa-lora out")  # fmt: skip
        if self.qa and self.init != "zero":
            raise UsageError(f"adapters of QA-LoRA begin at zero, not as {self.init!r}",
                             "leave --lora-init out, or --qa-lora")  # fmt: skip

    @property
    def effective_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.effective_alpha / self.rank
