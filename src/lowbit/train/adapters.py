"""LoRA on frozen, quantized weights (QLoRA: Dettmers et al. 2023, arXiv 2305.14314; LoRA: Hu et al. 2021, 2106.09685).

    y = Q·x + s·B·(A·x)        Q [N, K] decodes from frozen codes, A [r, K], B [N, r] are trained, s = alpha / r

A begins uniform within ±1/√K, as PEFT has it, and B at zero: the model begins as its quantized base. LoftQ (Li et al.
2023, arXiv 2310.08659) begins with matrices that make up for the rounding instead, and with codes that go with them:

    Q ← round(W − s·B·A),   s·B·A ← the best rank r of W − Q (randomized SVD, Halko et al. 2011),   5 times

QA-LoRA (Xu et al. 2023, arXiv 2309.14717) sums the inputs of each group of g weights first, A [r, K / g]:

    y = Q·x + s·B·(A·x̄),   x̄_j = Σ of the inputs of group j        so every weight of a group moves by (s·B·A)[n, j]

That is a shift of the group's minimum m, of targets that store one as a float: merging adds it to m, rounded as the
file stores it, and keeps every code and scale. (The paper's pooled mean is x̄ / g, and its layers multiply it by g.) A
begins within ±1/√K here too, so that A·x̄ begins as large as A·x of LoRA.

The matrices see the input as the linear gets it, before a scheme rounds it. They sit on linears of decoder blocks that
are modules of their own; experts inside one parameter are quantized, and get none.

Weights beside held codes are kept in the dtype of the model where that is exact, and computed with in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
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

    A, B   float32 [r, K], [N, r]; of QA-LoRA [r, K / group]
    start  s·B·A at the start, where that is not zero; None: zero
    group  inputs that are summed before A; 1 but for QA-LoRA
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, start: Tensor | None = None, group: int = 1):
        super().__init__()
        self.A, self.B, self.scale, self.start, self.group = nn.Parameter(a), nn.Parameter(b), scale, start, group
        self._input: Tensor | None = None

    def see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the input, before hooks behind this one round it."""
        self._input = inputs[0]

    def add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output with the update's share."""
        assert self._input is not None
        x, self._input = self._input, None
        x = x if self.group == 1 else x.unflatten(-1, (-1, self.group)).sum(-1)
        return output + (x.to(self.A.dtype) @ self.A.t() @ self.B.t() * self.scale).to(output.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s·B·A, summed in float64, float32 [N, K], or [N, K / group]."""
        return (self.scale * (self.B.double() @ self.A.double())).float()

    def learned(self) -> Tensor:
        """What was learned of the weight, float32 [N, K]."""
        delta = self.delta().repeat_interleave(self.group, dim=1)
        return delta if self.start is None else delta - self.start


class Adapters:
    """The adapters on a model.

    updates  module → its update
    without  why quantized linears got none → how many
    """

    def __init__(self, model: nn.Module, lora: LoRA, updates: dict[str, LowRankUpdate], without: Mapping[str, int]):
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
        """Add what was learned to the float weights; the adapters come off.

        The weights are rounded again from now on. Of QA-LoRA the codes stay held, and their minima are shifted.
        """
        self.detach()
        for name, update in self.updates.items():
            module = self.model.get_submodule(name)
            learned = update.learned()
            weight = _weight_of(module)
            weight.data = weight.float() + (learned.t() if isinstance(module, Conv1D) else learned)
            if self.lora.qa:
                fake = fake_of(module)
                assert fake is not None
                fake.shift(update.delta())
        for module in self.model.modules():
            if isinstance(module, FakeQuantize) and not self.lora.qa:
                module.let_go()

    def note(self) -> str:
        """What a summary says of them."""
        count = sum(parameter.numel() for update in self.updates.values() for parameter in update.parameters())
        lacking = "".join(f"; {number} {why} have none" for why, number in self.without.items())
        start = ", started by LoftQ" if self.lora.init == "loftq" else ""
        kind = " of QA-LoRA" if self.lora.qa else ""
        return (f"adapters{kind} of rank {self.lora.rank} (alpha {self.lora.effective_alpha:g}{start}) on "
                f"{len(self.updates)} linears, {count} weights{lacking}")  # fmt: skip


def attach(model: nn.Module, lora: LoRA, linears: dict[str, str], seed: int, dtype: torch.dtype) -> Adapters:
    """Adapters on the linears of a model, in place; everything else of it is frozen.

    linears  linear → name of the parameter that holds it. Of parameters under fake quantization the codes are held
    dtype    of the model's files, which the weights beside held codes go back to, where that is exact

    UsageError where no linear can take one, or the rank is more than a side of a matrix.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    parameters = {parameter: linear for linear, parameter in linears.items()}
    updates: dict[str, LowRankUpdate] = {}
    without: Counter[str] = Counter()
    for parameter in parameters:
        owner, _, leaf = parameter.rpartition(".")
        module = model.get_submodule(owner)
        fake = fake_of(module, leaf)
        why = _takes_none(module, leaf, fake, lora)
        if why is None:
            updates[owner] = _update(owner, module, fake, lora, generator)
        else:
            without[why] += sum(held == parameter for held in linears.values())
            if fake is not None:
                fake.hold(_weight_of(module, leaf))
        if fake is not None:
            _narrow(_weight_of(module, leaf), dtype)
    if not updates:
        why = " and ".join(f"{number} are {why}" for why, number in without.items())
        raise UsageError(f"no linear of this model can take an adapter: {why}",
                         "train the weights themselves: leave --lora out")  # fmt: skip
    return Adapters(model, lora, updates, without)


def _takes_none(module: nn.Module, leaf: str, fake: FakeQuantize | None, lora: LoRA) -> str | None:
    """Why a parameter gets no adapter, as what its linears are; None: it gets one."""
    if leaf != "weight" or not isinstance(module, nn.Linear | Conv1D):
        return "experts inside one parameter"
    if lora.qa and (fake is None or fake.parts[0].target.columns_per_minimum is None):
        return f"linears in {'16 bits' if fake is None else fake.parts[0].target.name}, without float minima,"
    return None


def _weight_of(module: nn.Module, leaf: str = "weight") -> nn.Parameter:
    """The parameter itself, below fake quantization if there is any."""
    if parametrize.is_parametrized(module, leaf):
        return module.parametrizations[leaf].original  # type: ignore[index,return-value]
    return module.get_parameter(leaf)


def _narrow(weight: nn.Parameter, dtype: torch.dtype) -> None:
    """Keep a weight whose codes are held in another dtype, if no bit of it is lost."""
    narrow = weight.data.to(dtype)
    if torch.equal(narrow.to(weight.dtype), weight.data):
        weight.data = narrow


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
    stored = _weight_of(module)
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
    group = fake.parts[0].target.columns_per_minimum if lora.qa and fake is not None else None
    group = group or 1
    a = torch.empty(lora.rank, columns // group).uniform_(-bound, bound, generator=generator).to(stored.device)
    return LowRankUpdate(a, torch.zeros(rows, lora.rank, device=stored.device), lora.scale, group=group)


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
