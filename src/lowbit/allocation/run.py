"""`allocate`: the type of every tensor, chosen for one model by what each costs it.

plan of the file type or scheme     what may be stored in which type, and the bytes to stay within    offers
cost of every tensor in every type  on a text, by gradients                                           costs
the mix of least cost               in these bytes                                                    choose
the plan with that mix              its bytes, headers included
a file that quantize reads          rules for --tensor-type-file, or a recipe
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.allocation.choose import choose_within
from lowbit.allocation.costs import PASSES, Costs, Tensors, Weighed, measure_costs
from lowbit.allocation.offers import MARK, FolderOffers, GGUFOffers, Offers
from lowbit.architecture.loading import load_tokenizer
from lowbit.calibrate.blocks import MAX_MEMORY, BlockRunner
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import UsageError
from lowbit.estimation.target_size import FILE_TYPES, scheme_within
from lowbit.export.atomic import atomic_files, refuse_existing_file
from lowbit.files.system import refuse_sources
from lowbit.formats.gguf.mix import find_file_type
from lowbit.formats.gguf.mix_table import EMBEDDING, OUTPUT
from lowbit.formats.gguf.mix_table import FILE_TYPES as GGUF_FILE_TYPES
from lowbit.formats.gguf.stored_types import asked_type
from lowbit.knobs import command_line
from lowbit.measure import human_bytes
from lowbit.numerics.ggml import TYPES
from lowbit.plan.plan import Request, prepare
from lowbit.schemes import SCHEMES, find_scheme
from lowbit.settings import make_settings
from lowbit.settings.unread import refuse_unread
from lowbit.text import context_length, stream_windows

# What every kernel of llama.cpp runs fast, from few bits to many.
GGML_CANDIDATES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FOLDER_CANDIDATES = ("W4A16", "W8A16")
CALIBRATED = (
    0.5  # of what nearest rounding costs linears, about, is left by methods that read a text (docs/allocate.md)
)


@dataclass(frozen=True)
class Allocation:
    """
    path        the file of rules, or the recipe
    scheme      whose rules choose the types of all other tensors: a file type of GGUF, or a scheme
    file_bytes  of the weight files with these types; budget: what was allowed
    types       tensor, or fused set → type
    sizes       tensor → weights
    cost        sum over the tensors, nats per token, made by the method that was named; before: with the scheme's own
                types, if that was the measure
    made_by     that method, or level of quality
    command     of `lowbit quantize` that reads the file
    """

    path: Path
    scheme: str
    file_bytes: int
    budget: int
    types: dict[str, str]
    sizes: dict[str, int]
    cost: float
    before: float | None
    made_by: str
    command: str
    tokens: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Running:
    """How the model is run; arguments of `allocate`."""

    dtype: torch.dtype
    device: str
    max_memory: int
    options: OpenOptions
    progress: Callable[[int, int], None] | None


def allocate(
    model: str | Path,
    output: str | Path,
    *,
    like: str | None = None,
    target_size: int | None = None,
    types: Sequence[str] | None = None,
    method: str | None = None,
    quality: str | None = None,
    samples: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int = MAX_MEMORY,
    options: OpenOptions | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Allocation:
    """Choose the type of every tensor by what it costs this model, within the bytes of a file type or a size, and write
    the choice for `lowbit quantize`: rules for a GGUF file, or a recipe for a folder.

    model        a folder, a GGUF file, a Hugging Face id
    like         the file type or scheme whose bytes to stay within; Q4_K_M by default
    target_size  bytes of the weight files, instead of `like`
    types        to choose from: ggml types (`GGML_CANDIDATES` by default), or schemes, which make a folder
    method       that the output will be made with, or `quality`: methods that read a text leave about half of the cost
                 of linears, and nothing less of the embedding and head, which they round to nearest; rtn by default
    samples      windows of the text
    max_memory   bytes of hidden states that stay in memory
    settings     of `lowbit.settings.Settings`: calib, seqlen, seed; group_size and the like of a folder

    Raises UsageError for a size that nothing fits into.
    """
    began, output = time.perf_counter(), Path(output)
    how = Running(dtype, device, max_memory, options or OpenOptions(), progress)
    if like is not None and target_size is not None:
        raise UsageError("the bytes of a file type and a size were given", "leave out --like or --target-size")
    refuse_sources([output], [Path(model)])
    refuse_existing_file(output, overwrite, _is_ours, "file that lowbit allocate wrote")
    made_by = {name: value for name, value in (("method", method), ("quality", quality)) if value is not None}
    make_settings(None, **made_by)  # refuses an unknown method
    offers = _offers(str(model), like, target_size, types, made_by, how.options, {"samples": samples, **settings})
    prepared = offers.prepared
    try:
        budget = prepared.plan.file_bytes if target_size is None else target_size
        if not offers.by_name:
            raise UsageError(f"{model}: {offers.settings.scheme} quantizes nothing of it, so there is no choice",
                             "name another file type or scheme with --like")  # fmt: skip
        _refuse_too_small(offers, budget)
        with atomic_files(output, overwrite) as work:
            costs, tokens, notes = _measure(offers, how)
            mix, file_bytes = _within(offers, costs, budget, work)
            about = f"{MARK} {' '.join(str(model).split())}: {human_bytes(file_bytes)}, by {tokens:,} tokens"
            (work / output.name).write_text(offers.text(mix, about), encoding="utf-8")
    finally:
        prepared.checkpoint.close()
    own = {name: offer.own for name, offer in offers.by_name.items()}
    return Allocation(
        output, offers.settings.scheme, file_bytes, budget, mix,
        {name: offer.weights for name, offer in offers.by_name.items()},
        sum(costs[name][kind] for name, kind in mix.items()),
        sum(costs[name][kind] for name, kind in own.items()) if target_size is None else None,
        method or quality or "rtn", _command(model, offers, mix, output, how.options), tokens,
        time.perf_counter() - began, notes,
    )  # fmt: skip


def _command(model: str | Path, offers: Offers, mix: dict[str, str], file: Path, opened: OpenOptions) -> str:
    where, read = offers.how_to_use(mix, file)
    return command_line("quantize", str(model), where, read, vars(opened))


def _offers(
    model: str, like: str | None, size: int | None, types: Sequence[str] | None, made_by: dict[str, str],
    options: OpenOptions, settings: dict[str, Any],
) -> Offers:  # fmt: skip
    """The types of a GGUF file, unless a scheme of folders is named."""
    if types is not None and not types:
        raise UsageError("there is no type to choose from", "give several: --types Q3_K,Q4_K,Q6_K")
    named = [name.upper() for name in (*(types or ()), *([] if like is None else [like]))]
    if any(name in SCHEMES and name not in TYPES and name not in GGUF_FILE_TYPES for name in named):
        schemes = tuple(find_scheme(name).name for name in types or FOLDER_CANDIDATES)
        chosen = make_settings(None, scheme=find_scheme(like or schemes[0]).name, **settings)
        return FolderOffers(prepare(Request(model, chosen, options, preview=True)), chosen, schemes, made_by)
    candidates = tuple(asked_type(name).name for name in types or GGML_CANDIDATES)
    file_type = find_file_type(like or _largest_within(model, size, options)).name
    measured = ("calib", "samples", "seqlen", "seed")
    others = {name: value for name, value in settings.items() if name not in measured}
    refuse_unread(make_settings(None, scheme=file_type, format="gguf", **others))
    # a method that calibrates, so that types that need an importance matrix are let through
    chosen = make_settings(None, scheme=file_type, format="gguf", method="gptq", **settings)
    prepared = prepare(Request(model, chosen, options, preview=True))
    return GGUFOffers(prepared, chosen, candidates, made_by, model, with_own=size is None or types is None)


def _largest_within(model: str, size: int | None, options: OpenOptions) -> str:
    """The file type whose rules choose the types of what is not measured: Q4_K_M, or the largest that fits."""
    if size is None:
        return "Q4_K_M"
    try:
        return scheme_within(model, size, True, options).scheme
    except UsageError:
        return FILE_TYPES[-1]


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def _refuse_too_small(offers: Offers, budget: int) -> None:
    least = offers.fixed_bytes + sum(min(offer.sizes.values()) for offer in offers.by_name.values())
    if least > budget:
        raise _too_small(budget, least)


def _too_small(budget: int, least: int) -> UsageError:
    return UsageError(f"nothing fits into {human_bytes(budget)}: the smallest of these types take {human_bytes(least)}",
                      "allow more bytes, or give smaller types with --types")  # fmt: skip


def _within(offers: Offers, costs: Costs, budget: int, work: Path) -> tuple[dict[str, str], int]:
    """(the mix of least cost, bytes of its files)."""
    options = {
        name: {kind: (size, costs[name][kind]) for kind, size in offer.sizes.items()}
        for name, offer in offers.by_name.items()
    }
    room, planned = budget - offers.fixed_bytes, budget
    while (mix := choose_within(options, room)) is not None:
        planned = offers.bytes_of(mix, work)
        if planned <= budget:
            return mix, planned
        used = sum(offers.by_name[name].sizes[kind] for name, kind in mix.items())
        room = used - (planned - budget)  # tensors are aligned, and have names: another mix from here on
    raise _too_small(budget, planned)


def _measure(offers: Offers, how: Running) -> tuple[Costs, int, tuple[str, ...]]:
    """(costs, tokens of the text, notes)."""
    checkpoint, settings = offers.prepared.checkpoint, offers.settings
    text = stream_windows(settings.calib, load_tokenizer(checkpoint, how.options), settings.samples, settings.seqlen,
                          seed=settings.seed, longest=context_length(checkpoint.config()))  # fmt: skip
    runner = BlockRunner(checkpoint, how.dtype, how.device, how.options, how.max_memory)
    by_name = {name: Weighed(name, its.sources, tuple(its.sizes)) for name, its in offers.by_name.items()}
    embedding = by_name.pop(EMBEDDING, None)
    head = by_name.pop(OUTPUT, embedding if runner.architecture.tied else None)
    total, done = PASSES * len(runner.blocks) * len(text.ids), 0

    def tick(windows: int) -> None:
        nonlocal done
        done += windows
        if how.progress is not None:
            how.progress(done, total)

    costs = measure_costs(
        runner, checkpoint, text.ids, Tensors(tuple(by_name.values()), embedding, head), offers.round_to,
        settings.seed, how.max_memory, tick,
    )  # fmt: skip
    of_source = {f"{name}.weight": math.prod(each.shape) for name, each in runner.architecture.linears.items()}
    for name, its in by_name.items():  # what several tensors are cut from counts for each in proportion
        share = offers.by_name[name].weights / sum(of_source[source] for source in its.sources)
        left = min(1.0, share) * (CALIBRATED if offers.is_calibrated else 1.0)
        costs[name] = {kind: cost * left for kind, cost in costs[name].items()}
    return costs, text.ids.numel(), (*checkpoint.notes, *runner.notes, *text.notes)
