"""Methods: what is done to weights before they are rounded, and how codes are chosen.

    rtn   gptq   awq   awq+gptq   smoothquant+gptq   rotate+gptq   gptq+sign-sgd   hqq …

A method is transforms in the order given, then one rounding; a transform alone is followed by rounding to nearest.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lowbit.errors import UsageError

TRANSFORMS = {
    "smoothquant": "scales that move outliers of activations into weights (2211.10438)",
    "awq": "scales that protect weights which meet large activations (2306.00978)",
    "rotate": "a Hadamard rotation of each value head (QuaRot, 2404.00456)",
    "hadamard": "a Hadamard rotation of the residual stream (QuaRot, 2404.00456)",
}
ROUNDINGS = {
    "rtn": "round to nearest, no data",
    "hqq": "half-quadratic search of scales and zero points, no data",
    "gptq": "rounding with error feedback through the Hessian of the inputs (2210.17323)",
    "sign-sgd": "rounding and ranges learned block by block by signed gradients (AutoRound, 2309.05516); slow",
}
_ALIASES = {"autoround": "sign-sgd", "signsgd": "sign-sgd", "smooth": "smoothquant", "quarot": "hadamard"}


@dataclass(frozen=True)
class Method:
    """transforms in the order they are applied, then the roundings: one, or gptq and sign-sgd, which starts from it."""

    transforms: tuple[str, ...]
    roundings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The method as one would type it."""
        shown = self.transforms + self.roundings
        return "+".join(name for name in shown if name != "rtn") or "rtn"

    @property
    def rounding(self) -> str:
        """How each linear is rounded by itself."""
        return self.roundings[0]

    @property
    def learns(self) -> bool:
        """True where a whole block is optimised at once."""
        return "sign-sgd" in self.roundings

    @property
    def is_blockwise(self) -> bool:
        """True where calibration text runs through the model, block by block."""
        return bool(self.transforms) or not set(self.roundings) <= {"rtn", "hqq"}


def parse_method(text: str) -> Method:
    """ "smoothquant+gptq" → Method; UsageError names what is unknown or stands in the wrong order."""
    transforms: list[str] = []
    roundings: list[str] = []
    for part in text.lower().split("+"):
        name = _ALIASES.get(part.strip(), part.strip())
        if name in TRANSFORMS and not roundings and name not in transforms:
            transforms.append(name)
        elif name in ROUNDINGS and name not in roundings:
            roundings.append(name)
        elif name in TRANSFORMS or name in ROUNDINGS:
            raise UsageError(f"method {text!r}: {name} stands there twice, or behind a rounding",
                             "transforms come first: smoothquant+gptq")  # fmt: skip
        else:
            known = [*TRANSFORMS, *ROUNDINGS]
            near = difflib.get_close_matches(name, known, n=2)
            raise UsageError(f"there is no method {name!r}", f"did you mean {' or '.join(near)}?" if near else
                             f"choose from {', '.join(known)}, joined by +")  # fmt: skip
    if len(roundings) > 1 and roundings != ["gptq", "sign-sgd"]:
        raise UsageError(f"method {text!r} rounds twice", "only gptq+sign-sgd does: the second starts from the first")
    if not roundings:
        roundings = ["rtn"]
    if roundings == ["sign-sgd"]:
        roundings = ["rtn", "sign-sgd"]
    return Method(tuple(transforms), tuple(roundings))
