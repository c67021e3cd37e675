"""`allocate`: the types of a GGUF file's tensors, chosen for one model by what each costs it.

plan of the file type            which tensors are quantized, and the bytes to stay within
costs of every tensor, by type   costs
the mix of least cost            choose
the plan with that mix           its bytes, to the byte
a file of rules                  for --tensor-type-file, which llama-quantize reads too
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.allocation.choose import choose_within
from lowbit.allocation.costs import PASSES, Costs, Tensors, Weighed, measure_costs
from lowbit.architecture.loading import load_tokenizer
from lowbit.calibrate.blocks import MAX_MEMORY, BlockRunner
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UsageError
from lowbit.estimation.target_size import FILE_TYPES, scheme_within
from lowbit.export.atomic import atomic_files, refuse_existing_file
from lowbit.files.system import refuse_sources
from lowbit.formats.gguf.mix import find_file_type
from lowbit.formats.gguf.mix_table import EMBEDDING, FALLBACKS, OUTPUT
from lowbit.formats.gguf.stored_types import asked_type
from lowbit.measure import human_bytes
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import PlannedTensor, Prepared, Request, prepare
from lowbit.rounding.target import GgmlTarget
from lowbit.settings import Settings, make_settings
from lowbit.text import context_length, stream_windows

# What every kernel of llama.cpp runs fast, from few bits to many.
CANDIDATES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
MARK = "# lowbit allocate"  # how a file of rules begins
_TRIES = 8  # plans until the alignment of tensors is accounted for
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Allocation:
    """
    path        the file of rules
    file_type   whose rules choose the types of all other tensors
    file_bytes  of the GGUF file with these types; budget: what was allowed
    types       tensor → type
    sizes       tensor → weights
    cost        sum over the tensors, nats per token, rounded to nearest; before: with the file type's own mix, if that
                was the measure
    """

    path: Path
    file_type: str
    file_bytes: int
    budget: int
    types: dict[str, str]
    sizes: dict[str, int]
    cost: float
    before: float | None
    tokens: int
    seconds: float
    notes: tuple[str, ...]


def allocate(
    model: str | Path,
    output: str | Path,
    *,
    like: str | None = None,
    target_size: int | None = None,
    types: Sequence[str] = CANDIDATES,
    samples: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int = MAX_MEMORY,
    options: OpenOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Allocation:
    """Choose the ggml type of every tensor by what it costs this model, within the bytes of a file type or a size, and
    write the choice as rules for `lowbit quantize --tensor-type-file`.

    model        a folder, a GGUF file, a Hugging Face id
    like         the file type whose bytes to stay within; Q4_K_M by default
    target_size  bytes of the GGUF file, instead of `like`
    types        the ggml types to choose from
    samples      windows of the text
    max_memory   bytes of hidden states that stay in memory
    settings     of `lowbit.settings.Settings`: calib, seqlen, seed

    Raises UsageError for a size that nothing fits into.
    """
    began, output = time.perf_counter(), Path(output)
    how = Running(dtype, device, max_memory, options or OpenOptions(), progress)
    if like is not None and target_size is not None:
        raise UsageError("the bytes of a file type and a size were given", "leave out --like or --target-size")
    refuse_sources([output], [Path(model)])
    refuse_existing_file(output, overwrite, _is_of_rules, "file of rules that lowbit wrote")
    candidates = tuple(asked_type(name).name for name in types)
    if not candidates:
        raise UsageError("there is no type to choose from", "give several: --types Q3_K,Q4_K,Q6_K")
    file_type = find_file_type(like or _largest_within(model, target_size, how.options)).name
    chosen = make_settings(None, scheme=file_type, format="gguf", method="gptq", samples=samples, **settings)
    request = Request(str(model), chosen, how.options, preview=True)
    prepared = prepare(request)
    try:
        budget = target_size or prepared.plan.file_bytes
        weighed = _weighed(prepared)
        offered = {tensor.name: _offered(tensor, candidates) for tensor in weighed}
        _refuse_too_small(prepared, offered, budget)
        with atomic_files(output, overwrite) as work:
            costs, tokens, notes = _measure(prepared, chosen, weighed, offered, how)
            mix, file_bytes = _within(request, prepared, offered, costs, budget, work)
            about = f"{MARK} {' '.join(str(model).split())}: {human_bytes(file_bytes)}, by {tokens:,} tokens"
            (work / output.name).write_text(rules_of(mix, about), encoding="utf-8")
    finally:
        prepared.checkpoint.close()
    own = {tensor.name: tensor.stored_as for tensor in weighed}
    return Allocation(
        output, file_type, file_bytes, budget, mix, {tensor.name: tensor.weights for tensor in weighed},
        sum(costs[name][kind] for name, kind in mix.items()),
        sum(costs[name][kind] for name, kind in own.items()) if target_size is None else None,
        tokens, time.perf_counter() - began, notes,
    )  # fmt: skip


@dataclass(frozen=True)
class Running:
    """How the model is run; arguments of `allocate`."""

    dtype: torch.dtype
    device: str
    max_memory: int
    options: OpenOptions
    progress: Callable[[int, int], None] | None


def rules_of(types: Mapping[str, str], about: str) -> str:
    """Rules for `--tensor-type-file`, one for the tensors of one type and name in all their blocks."""
    blocks: dict[tuple[str, str], list[int]] = defaultdict(list)
    lines = [about]
    for name, kind in types.items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            lines.append(f"^{re.escape(name)}$ = {kind}")
        else:
            blocks[found[2], kind].append(int(found[1]))
    for (name, kind), its in sorted(blocks.items()):
        lines.append(rf"^blk\.({'|'.join(map(str, sorted(its)))})\.{re.escape(name)}$ = {kind}")
    return "\n".join(lines) + "\n"


def _is_of_rules(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def _largest_within(model: str | Path, size: int | None, options: OpenOptions) -> str:
    """The file type whose rules choose the types of what is not measured: Q4_K_M, or the largest that fits."""
    if size is None:
        return "Q4_K_M"
    try:
        return scheme_within(model, size, True, options).scheme
    except UsageError:
        return FILE_TYPES[-1]


def _weighed(prepared: Prepared) -> list[PlannedTensor]:
    """The quantized tensors that the measure covers: made of linears of decoder blocks, the embedding, the head."""
    assert prepared.plan.architecture is not None
    linears = {f"{linear.name}.weight" for linear in prepared.plan.architecture.linears.values()
               if linear.block is not None}  # fmt: skip
    return [
        tensor for tensor in prepared.plan.tensors
        if tensor.is_quantized and tensor.source.names
        and (tensor.name in (EMBEDDING, OUTPUT) or linears.issuperset(tensor.source.names))
    ]  # fmt: skip


def _offered(tensor: PlannedTensor, candidates: Sequence[str]) -> dict[str, int]:
    """Type → bytes, of the candidates, or of what stands for them in rows that they do not divide, and of its own."""
    columns = tensor.shape[-1]
    fitting = (name if columns % TYPES[name].weights == 0 else FALLBACKS.get(name) for name in candidates)
    names = dict.fromkeys((*fitting, tensor.stored_as))
    rows = tensor.weights // columns
    return {
        name: rows * TYPES[name].row_bytes(columns)
        for name in names if name is not None and columns % TYPES[name].weights == 0
    }  # fmt: skip


def _refuse_too_small(prepared: Prepared, offered: Mapping[str, Mapping[str, int]], budget: int) -> None:
    least = _fixed_bytes(prepared, offered) + sum(min(sizes.values()) for sizes in offered.values())
    if least > budget:
        what = f"the smallest of these types take {human_bytes(least)}"
        raise UsageError(f"nothing fits into {human_bytes(budget)}: {what}",
                         "allow more bytes, or give smaller types with --types")  # fmt: skip


def _fixed_bytes(prepared: Prepared, offered: Mapping[str, Mapping[str, int]]) -> int:
    """Bytes of the file without the tensors whose types are chosen."""
    tensors = {tensor.name: tensor for tensor in prepared.plan.tensors}
    return prepared.plan.file_bytes - sum(offered[name][tensors[name].stored_as] for name in offered)


def _within(
    request: Request,
    prepared: Prepared,
    offered: Mapping[str, Mapping[str, int]],
    costs: Costs,
    budget: int,
    work: Path,
) -> tuple[dict[str, str], int]:
    """(the mix of least cost, bytes of its file); planned, since tensors are aligned and the header may differ."""
    options = {
        name: {kind: (size, costs[name][kind]) for kind, size in sizes.items()} for name, sizes in offered.items()
    }
    room = budget - _fixed_bytes(prepared, offered)
    rules = work / "planned.types"
    for _ in range(_TRIES):
        mix = choose_within(options, room)
        assert mix is not None, "the fewest bytes were found to fit"
        rules.write_text(rules_of(mix, MARK), encoding="utf-8")
        settings = request.settings.model_copy(update={"tensor_type_file": str(rules)})
        planned = prepared.plan_again(settings).file_bytes
        rules.unlink()
        if planned <= budget:
            return mix, planned
        room -= planned - budget
    raise AssertionError("a plan exceeds what its tensors take, whatever they are")


def _measure(
    prepared: Prepared, settings: Settings, weighed: Sequence[PlannedTensor],
    offered: Mapping[str, Mapping[str, int]], how: Running,
) -> tuple[Costs, int, tuple[str, ...]]:  # fmt: skip
    """(costs, tokens of the text, notes)."""
    checkpoint = prepared.checkpoint
    text = stream_windows(settings.calib, load_tokenizer(checkpoint, how.options), settings.samples, settings.seqlen,
                          seed=settings.seed, longest=context_length(checkpoint.config()))  # fmt: skip
    runner = BlockRunner(checkpoint, how.dtype, how.device, how.options, how.max_memory)
    by_name = {
        tensor.name: Weighed(tensor.name, tuple(dict.fromkeys(tensor.source.names)), tuple(offered[tensor.name]))
        for tensor in weighed
    }
    embedding = by_name.pop(EMBEDDING, None)
    head = by_name.pop(OUTPUT, embedding if runner.architecture.tied else None)
    total, done = PASSES * len(runner.blocks) * len(text.ids), 0

    def tick(windows: int) -> None:
        nonlocal done
        done += windows
        if how.progress is not None:
            how.progress(done, total)

    costs = measure_costs(
        runner, checkpoint, text.ids, Tensors(tuple(by_name.values()), embedding, head), _rounded,
        settings.seed, how.max_memory, tick,
    )  # fmt: skip
    of_source = {f"{name}.weight": math.prod(each.shape) for name, each in runner.architecture.linears.items()}
    for tensor in by_name.values():  # what several tensors are cut from counts for each in proportion
        share = next(t.weights for t in weighed if t.name == tensor.name) / sum(of_source[n] for n in tensor.sources)
        costs[tensor.name] = {kind: cost * min(1.0, share) for kind, cost in costs[tensor.name].items()}
    return costs, text.ids.numel(), (*checkpoint.notes, *runner.notes, *text.notes)


def _rounded(type_name: str, weight: Tensor, importance: Tensor | None) -> Tensor:
    return GgmlTarget(type_name).nearest(weight, importance).decoded
