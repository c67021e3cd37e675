"""LoRA on frozen, quantized weights (QLoRA: Dettmers et al. 2023, arXiv 2305.14314; LoRA: Hu et al. 2021, 2106.09685).

    y = Q·x + s·B·(A·x)        Q [N, K] decodes from frozen codes, A [r, K], B [N, r] are trained, s = alpha / r

A begins uniform within ±1/√K, as PEFT has it, and B at zero: the model begins as its quantized base. LoftQ (Li et al.
2023, arXiv 2310.08659) begins with matrices that make up for the rounding instead, and with codes that go with them:

    Q ← round(W − s·B·A),   s·B·A ← the best rank r of W − Q (randomized SVD, Halko et al. 2011),   5 times

The matrices see the input as the linear gets it, before a scheme rounds it. They sit on linears of decoder blocks that
are modules of their own; experts inside one parameter are quantized, and get none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lowbit.errors import UsageError
from lowbit.train.fake_quantize import FakeQuantize
from lowbit.train.options import LoRA

_LOFTQ_STEPS = 5
_SPARE, _POWERS = 16, 4  # of the randomized SVD: further directions, and multiplications by R·Rᵀ
_NAME = "lowbit_adapter"


class LowRankUpdate(nn.Module):
    """s·B·A beside a linear; hooks add it to the output.

    A, B   float32 [r, K], [N, r]
    start  s·B·A at the start, where that is not zero; None: zero
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, start: Tensor | None = None):
        super().__init__()
        self.A, self.B, self.scale, self.start = nn.Parameter(a), nn.Parameter(b), scale, start
        self._input: Tensor | None = None

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the input, before hooks behind this one round it."""
        self._input = inputs[0]

    def add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output with the update's share."""
        assert self._input is not None
        x, self._input = self._input, None
        return output + (x.to(self.A.dtype) @ self.A.t() @ self.B.t() * self.scale).to(output.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s·B·A, summed in float64, float32 [N, K]."""
        return (self.scale * (self.B.double() @ self.A.double())).float()


class Adapters:
    """The adapters on a model.

    updates  module → its update
    without  quantized linears that got none: experts inside one parameter
    """

    def __init__(self, model: nn.Module, lora: LoRA, updates: dict[str, LowRankUpdate], without: int):
        self.model, self.lora, self.updates, self.without = model, lora, updates, without
        self._hooks: list[Any] = []
        for name, update in updates.items():
            module = model.get_submodule(name)
            module.add_module(_NAME, update)
            self._hooks.append(module.register_forward_pre_hook(update.see, prepend=True))
            self._hooks.append(module.register_forward_hook(update.add))

    def detach(self) -> None:
        """Take them off the model; they stay here."""
        for hook in self._hooks:
            hook.remove()
        for name in self.updates:
            delattr(self.model.get_submodule(name), _NAME)

    @torch.no_grad()
    def merge(self) -> None:
        """Add what was learned to the float weights, which are rounded again from now on; the adapters come off."""
        self.detach()
        for name, update in self.updates.items():
            module = self.model.get_submodule(name)
            learned = update.delta() if update.start is None else update.delta() - update.start
            fake = fake_of(module)
            weight: Any = module.weight if fake is None else module.parametrizations["weight"].original  # type: ignore[index]
            weight += learned.t() if isinstance(module, Conv1D) else learned
        for module in self.model.modules():
            if isinstance(module, FakeQuantize):
                module.let_go()

    def note(self) -> str:
        """What a summary says of them."""
        count = sum(parameter.numel() for update in self.updates.values() for parameter in update.parameters())
        lacking = f"; {self.without} experts inside one parameter have none" if self.without else ""
        start = ", started by LoftQ" if self.lora.init == "loftq" else ""
        return (f"adapters of rank {self.lora.rank} (alpha {self.lora.effective_alpha:g}{start}) on "
                f"{len(self.updates)} linears, {count} weights{lacking}")  # fmt: skip


def attach(model: nn.Module, lora: LoRA, linears: dict[str, str], seed: int) -> Adapters:
    """Adapters on the linears of a model, in place; everything else of it is frozen.

    linears  linear → name of the parameter that holds it. Of parameters under fake quantization the codes are held

    UsageError where no linear can take one, or the rank is more than a side of a matrix.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters = {parameter: linear for linear, parameter in linears.items()}
    updates: dict[str, LowRankUpdate] = {}
    for parameter in parameters:
        owner, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(owner)
        takes_one = leaf == "weight" and isinstance(module, nn.Linear | Conv1D)
        fake = fake_of(module, leaf)
        if takes_one:
            updates[owner] = _update(owner, module, fake, lora, generator)
        elif fake is not None:
            fake.hold(module.parametrizations[leaf].original)  # type: ignore[index]
    if not updates:
        raise UsageError("no linear of this model can take an adapter: its experts lie inside one parameter",
                         "train the weights themselves: leave --lora out")  # fmt: skip
    owners = {f"{owner}.weight" for owner in updates}
    return Adapters(model, lora, updates, sum(parameter not in owners for parameter in linears.values()))


def fake_of(module: nn.Module, leaf: str = "weight") -> FakeQuantize | None:
    """The fake quantization of a module's parameter; None where it has none."""
    if not parametrize.is_parametrized(module, leaf):
        return None
    found = module.parametrizations[leaf][0]  # type: ignore[index]
    return found if isinstance(found, FakeQuantize) else None


@torch.no_grad()
def _update(
    name: str, module: nn.Module, fake: FakeQuantize | None, lora: LoRA, generator: torch.Generator
) -> LowRankUpdate:
    stored: Any = module.weight if fake is None else module.parametrizations["weight"].original  # type: ignore[index]
    turned = isinstance(module, Conv1D)
    rows, columns = reversed(stored.shape) if turned else stored.shape
    if lora.rank > min(rows, columns):
        raise UsageError(f"rank {lora.rank} is more than {name} has, [{rows}, {columns}]", "give a smaller rank")
    if lora.init == "loftq" and fake is not None:
        a, b = loftq(stored, fake, lora, turned, generator)
        return LowRankUpdate(a, b, lora.scale, (lora.scale * (b.double() @ a.double())).float())
    if fake is not None:
        fake.hold(stored)
    bound = 1 / math.sqrt(columns)
    a = torch.empty(lora.rank, columns).uniform_(-bound, bound, generator=generator)
    return LowRankUpdate(a.to(stored.device), torch.zeros(rows, lora.rank, device=stored.device), lora.scale)


@torch.no_grad()
def loftq(
    stored: Tensor, fake: FakeQuantize, lora: LoRA, turned: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(A, B) that make up for the rounding of a parameter; the codes that go with them are held.

    turned  the parameter has the weight as [K, N]
    """
    weight = stored.float()
    a = b = torch.zeros(0)
    residual = weight
    for _ in range(_LOFTQ_STEPS):
        fake.hold(residual)
        error = weight - fake(stored).float()
        b, a = best_of_rank(error.t() if turned else error, lora.rank, generator)
        a, b = a / math.sqrt(lora.scale), b / math.sqrt(lora.scale)
        update = lora.scale * (b @ a)
        residual = weight - (update.t() if turned else update)
    return a, b


def best_of_rank(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B [N, r], A [r, K]) with B·A near the best approximation of rank r, float32: U·√S and √S·Vᵀ."""
    size = min(rank + _SPARE, *matrix.shape)
    start = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return (basis @ left[:, :rank]) * root, root[:, None] * right[:rank]
