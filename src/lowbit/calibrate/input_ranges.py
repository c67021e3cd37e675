"""The largest |input| of linears over a calibration text: what static activation scales are made of.

    absmax[L] = max over tokens and channels of |x|, x the input of linear L

The model runs as transformers has it, in its own dtype, one window at a time; hooks on the linears look at inputs. The
whole model is in memory while it runs (an engine that holds one block at a time is planned).

Refused: linears whose input no hook can see (experts that transformers computes in one fused operation), NaN and inf in
an input, and a linear that no token reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.architecture import Architecture
from lowbit.architecture.loading import load_model, load_tokenizer, module_names
from lowbit.checkpoint.base import Checkpoint, OpenOptions
from lowbit.errors import ArchitectureError, NonFiniteError
from lowbit.text import Text, cut_windows

Progress = Callable[[str, int, int], None]


def measure_input_ranges(
    checkpoint: Checkpoint,
    architecture: Architecture,
    linears: Iterable[str],
    text: Text,
    windows: int,
    window_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, float], int]:
    """(linear → largest |input|, number of windows there were) over the first windows of a text.

    linears   module names as the files have them
    progress  called with (what, windows done, windows in all)

    Raises CheckpointError where the text is shorter than a window.
    """
    tokenizer = load_tokenizer(checkpoint, options)
    ids = cut_windows(text, tokenizer, windows, window_tokens).ids
    model = load_model(checkpoint, dtype, device, options)
    names = module_names(model, architecture)
    modules = {linear: _linear_module(model, names.get(linear), linear) for linear in linears}
    found: dict[str, Tensor] = {}
    handles = [module.register_forward_pre_hook(partial(_look, linear, found)) for linear, module in modules.items()]
    try:
        with torch.inference_mode():
            for index, window in enumerate(ids):
                model.base_model(input_ids=window[None].to(device), use_cache=False)  # type: ignore[operator]
                if progress is not None:
                    progress("calibration", index + 1, len(ids))
    finally:
        for handle in handles:
            handle.remove()
    return {linear: _checked(linear, found.get(linear)) for linear in modules}, len(ids)


def _look(linear: str, found: dict[str, Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    absmax = arguments[0].detach().abs().amax().float()
    found[linear] = torch.maximum(found[linear], absmax) if linear in found else absmax


def _linear_module(model: nn.Module, name: str | None, linear: str) -> nn.Module:
    if name is None:
        raise ArchitectureError(
            f"{linear} runs inside a fused operation of transformers; its input cannot be measured",
            "use a scheme with dynamic activations (FP8_DYNAMIC, NVFP4A16), or --ignore the experts",
        )
    return model.get_submodule(name)


def _checked(linear: str, absmax: Tensor | None) -> float:
    if absmax is None:
        raise ArchitectureError(f"no token of the calibration text reached {linear}", "give a longer text")
    value = absmax.item()
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the input of {linear} is {value} for some token of the calibration text",
            "run it in float32, or look for damage with `lowbit evaluate`",
        )
    return max(value, 1e-6)
