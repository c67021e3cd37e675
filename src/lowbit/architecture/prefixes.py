"""Prefixes of stored names: what a wrapper put in front of every name, or a base model left out.

    base_model.model.model.layers.0.…     state_dict() of a PEFT model
    _orig_mod.model.layers.0.…            of a compiled one; also inside a name: model._orig_mod.layers.0.…
    module.model.layers.0.…               of DataParallel
    layers.0.…                            of a base model class: transformers adds `model.` when it loads

A prefix is whatever makes the names those of the architecture; no list of prefixes and no model type is needed, but for
the wrappers that stand inside names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable

from lowbit.architecture.structure import Architecture

# Modules that wrap another one under its place: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def find_renaming(names: Iterable[str], architecture: Architecture) -> tuple[dict[str, str], list[str]]:
    """(stored name → name without wrappers and with the architecture's beginning, of those that differ; notes)."""
    names, known = list(names), _spellings(architecture)
    unwrapped = {name: _WRAPPERS.sub("", name) for name in names}
    wrapper = next(filter(None, map(_WRAPPERS.search, names)), None)
    notes = [] if wrapper is None else [f"{wrapper[0]!r} in the names of tensors was dropped"]
    if not any(known.get(name) for name in unwrapped.values()):
        dropped = _prefix_before(unwrapped.values(), known)
        added = _prefix_left_out(unwrapped.values(), known, architecture)
        if dropped:
            unwrapped = {name: inner.removeprefix(dropped) for name, inner in unwrapped.items()}
            notes.append(f"{dropped!r} at the beginning of the names of tensors was dropped")
        elif added:
            unwrapped = {name: inner if inner in known else added + inner for name, inner in unwrapped.items()}
            notes.append(f"names of tensors lack {added!r} at the beginning, as a base model class saves them")
    return {name: inner for name, inner in unwrapped.items() if name != inner}, notes


def _spellings(architecture: Architecture) -> dict[str, bool]:
    """Every name that a tensor of the architecture may have in files (its own, transformers', the family's other
    spellings of it) → whether it is in a decoder block."""
    known = {name: architecture.block_of(name) is not None for name in (*architecture.parameters, *architecture.tied)}
    for name, placement in architecture.layout.items():
        known.setdefault(name, any(architecture.block_of(part.name) is not None for part in placement.parts))
    known |= {saved: known[name] for saved, name in architecture.saved_names.items() if name in known}
    for found, canonical in architecture.spellings:
        others = {found + name.removeprefix(canonical): known[name] for name in known if name.startswith(canonical)}
        known = others | known
    return known


def _prefix_before(found: Iterable[str], known: Container[str]) -> str:
    """What stands before known names, the same for most of them; empty where nothing does."""
    prefixes: Counter[str] = Counter()
    for name in found:
        places = [at + 1 for at, character in enumerate(name) if character == "." and name[at + 1 :] in known]
        prefixes.update(name[:at] for at in places)
    return max(prefixes, key=lambda prefix: (prefixes[prefix], -len(prefix)), default="")


def _prefix_left_out(found: Iterable[str], known: Container[str], architecture: Architecture) -> str:
    """The beginning of the architecture's names that makes stored ones known; empty where none does."""
    parts = architecture.blocks[0].split(".")[:-2]
    beginnings = [".".join(parts[:count]) + "." for count in range(len(parts), 0, -1)]
    return next((start for start in beginnings if any(start + name in known for name in found)), "")
