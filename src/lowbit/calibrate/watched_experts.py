"""Experts of a fused operation that does not describe its computation, observed by its products.

The module computes as it does. Every product (`F.linear`, `matmul`, `bmm`) with a part of its parameters is seen:

    F.linear(x, down_proj[3])                      x is the input of expert 3's down_proj
    torch.bmm(x, gate_proj.transpose(1, 2))        x[e] is the input of expert e's gate_proj, for all e

Which expert a matrix is of, its place in the parameter's memory says. So a class needs nothing here but to multiply one
expert's matrix, or all of them, at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lowbit.errors import ArchitectureError
from lowbit.methods import RUNS_NO_TEXT

Look = Callable[[int, Literal["input", "hidden"], Tensor], None]

_PRODUCTS = (
    functional.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
)  # fmt: skip


class WatchedExperts:
    """The forward of `experts` that shows `look` the input of every expert, once per call."""

    def __init__(self, experts: nn.Module, look: Look):
        self.experts, self.look = experts, look
        self.ran = self.saw = False

    def __call__(self, *arguments: Any, all_tokens: bool = False, **keywords: Any) -> Any:
        if all_tokens:
            raise ArchitectureError(
                f"{type(self.experts).__name__} does not describe its computation; not every expert can see every token"
            )
        self.ran = True
        with _SeenProducts(self):
            return type(self.experts).forward(self.experts, *arguments, **keywords)

    def check(self) -> None:
        """ArchitectureError if the module ran, and not one of its products was seen."""
        if self.ran and not self.saw:
            raise ArchitectureError(
                f"{type(self.experts).__name__} is a fused operation of transformers that does not describe its "
                f"computation, and multiplies by no matrix of one expert; its inputs cannot be measured",
                RUNS_NO_TEXT,
            )


class _SeenProducts(TorchFunctionMode):
    """One call of a module of experts."""

    def __init__(self, watched: WatchedExperts):
        super().__init__()
        self.watched = watched
        self.parameters = {
            value.untyped_storage().data_ptr(): (name, value)
            for name, value in watched.experts.named_parameters(recurse=False)
            if value.dim() == 3
        }
        self.shown: set[tuple[int, str]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            self._see(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, matrix: Tensor) -> None:
        name, parameter = self.parameters.get(matrix.untyped_storage().data_ptr(), (None, None))
        if name is None or parameter is None:
            return
        which: Literal["input", "hidden"] = "hidden" if name.startswith("down_proj") else "input"
        if matrix.dim() == 2 and matrix.numel() == parameter[0].numel():
            offset = matrix.storage_offset() - parameter.storage_offset()
            self._show(offset // parameter.stride(0), which, x)
        elif matrix.shape[0] == parameter.shape[0] == x.shape[0] and matrix.dim() == x.dim() == 3:
            for expert, each in enumerate(x):
                self._show(expert, which, each)

    def _show(self, expert: int, which: Literal["input", "hidden"], x: Tensor) -> None:
        self.watched.saw = True
        if (expert, which) not in self.shown and x.numel():
            self.shown.add((expert, which))
            self.watched.look(expert, which, x.reshape(-1, x.shape[-1]))
