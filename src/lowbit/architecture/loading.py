"""Load a checkpoint into a transformers model: transformers' own classes, filled tensor by tensor.

The model is built without weights (parameters on the meta device; the class computes buffers that no file stores, such
as rotary frequencies). Then every stored tensor is read in slabs of rows into its place in a parameter, without a
second copy: matrices of single experts go into the rows of transformers' fused parameter. `disk_layout` gives the
places. Tied parameters are read once.

    parameter[expert].of(part)  [rows, K]  ←  checkpoint.read(stored name, slab of rows)

Refused: a parameter that the checkpoint lacks, a tensor that the model does not know, a wrong shape, two tensors that
the config ties but that differ (engines disagree on which of them counts), and a model that brings its own code unless
the user trusts it. Passed over: buffers that classes compute today, and the multi-token prediction blocks that
config.json announces (num_nextn_predict_layers), which transformers does not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.architecture.building import build_without_weights
from lowbit.architecture.describing import describe_checkpoint
from lowbit.architecture.disk_layout import disk_layout, fit_rows
from lowbit.architecture.inspection import ENLARGE, embedding_rows
from lowbit.architecture.structure import COMPUTED_BUFFERS, Architecture, Part, Placement
from lowbit.architecture.view import holds_single_experts
from lowbit.checkpoint.base import OpenOptions, refuse_remote_code, row_slabs
from lowbit.checkpoint.companions import beyond_embedding, check_companions, code_of_tokenizer, has_tokenizer
from lowbit.errors import ArchitectureError, CheckpointError, UnsafeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowbit.checkpoint.base import Checkpoint

SLAB_BYTES = 64 * 1024 * 1024
# Slabs start at multiples of this, so that a square block of a quantized weight is never cut.
SLAB_ROWS = 128


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: OpenOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model of any readable format as (transformers model, tokenizer); quantized weights are decoded."""
    from lowbit.checkpoint import open_checkpoint

    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{dtype!r} is no dtype of torch", "write it as torch.bfloat16")
    options = options or OpenOptions()
    checkpoint = open_checkpoint(str(path), options)
    try:
        return load_model(checkpoint, dtype, device, options), load_tokenizer(checkpoint, options)
    finally:
        checkpoint.close()


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: OpenOptions | None = None,
) -> PreTrainedModel:
    """The checkpoint's weights in transformers' own model class, in evaluation mode, every parameter of `dtype`."""
    loader = Loader(checkpoint, dtype, device, options)
    loader.fill()
    return loader.model


class Loader:
    """A model whose parameters are filled and dropped part by part, for models that do not fit in memory.

    model         on the meta device but for computed buffers, in evaluation mode
    checkpoint    under the names of the model's family
    architecture  of the model
    notes         what is not taken of the files, or otherwise than they say
    layout        parameter of the model → its placement in the checkpoint
    beside        stored tensors that the model has no parameter for, as those of blocks for multi-token prediction

    split_experts  name experts one by one also where the files hold them in one tensor
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        options: OpenOptions | None = None,
        split_experts: bool = False,
    ):
        _check_device(device)
        self.dtype, self.device, options = dtype, device, options or OpenOptions()
        refuse_remote_code(checkpoint.config(), checkpoint.source, options)
        self.architecture, self.checkpoint = describe_checkpoint(checkpoint, options.trust_remote_code, split_experts)
        self.notes = tuple(note for note in self.checkpoint.notes if note not in checkpoint.notes)
        self.model = _empty_model(self.checkpoint, dtype, options)
        self.layout = _layout(self.model, self.checkpoint, self.architecture.own_names)
        self._slots = _slots(self.model, self.layout, self.checkpoint)
        self.beside = _check_names(self.checkpoint, self.model, self._slots, self.architecture)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def fill(self, chosen: Callable[[str], bool] = lambda name: True) -> None:
        """Read every parameter with a chosen name, or all; tied ones get the same Parameter."""
        for slot in self._slots:
            if any(chosen(name) for name in slot.names):
                value = _filled(self.checkpoint, self.model, slot, self.dtype, self.device)
                _put(self.model, slot.names, value)

    def drop(self, chosen: Callable[[str], bool]) -> None:
        """Free every parameter with a chosen name."""
        for slot in self._slots:
            if any(chosen(name) for name in slot.names):
                _put(self.model, slot.names, torch.empty(slot.shape, dtype=self.dtype, device="meta"))

    def values(self) -> Iterator[tuple[list[str], Tensor]]:
        """(names in the model, value) of every parameter and persistent buffer, one at a time; tied ones once."""
        for slot in self._slots:
            yield slot.names, _filled(self.checkpoint, self.model, slot, self.dtype, self.device)

    def put(self, values: dict[str, Tensor], find: Callable[[str], Tensor] | None = None) -> None:
        """Replace values in filled parameters, by stored names and with stored shapes.

        find  parameter name → tensor to write to; by default the model's parameter
        """
        find = self.model.get_parameter if find is None else find
        for stored, part, parameter, place in self._places(set(values)):
            place(find(parameter).data).copy_(part.of_stored(values[stored]))

    def watch(self, names: Collection[str]) -> None:
        """Have the filled parameters that hold these stored tensors collect gradients."""
        for _, _, parameter, _ in self._places(names):
            self.model.get_parameter(parameter).requires_grad_()

    def take_gradients(self, names: Collection[str]) -> dict[str, Tensor]:
        """Stored name → gradient with the stored shape, of the watched tensors that got one; the next ones begin at
        zero."""
        found: dict[str, Tensor] = {}
        used = set()
        for stored, part, name, place in self._places(names):
            gradient = self.model.get_parameter(name).grad
            if gradient is None:
                continue
            used.add(name)
            if part.total is None:
                found[stored] = place(gradient)
            else:
                whole = found.setdefault(stored, gradient.new_zeros(part.shape_in(tuple(gradient.shape))))
                part.of_stored(whole).copy_(place(gradient))
        for name in used:
            self.model.get_parameter(name).grad = None
        return found

    def _places(self, names: Collection[str]) -> Iterator[tuple[str, Part, str, Callable[[Tensor], Tensor]]]:
        """(stored name, part, parameter, view of the part in a tensor of the parameter's shape)."""
        for slot in self._slots:
            for stored, part, expert in (piece for source in slot.sources for piece in source):
                if stored in names:
                    turned = _lies_transposed(self.checkpoint, self.model, slot, stored)
                    yield stored, part, slot.names[0], partial(_place, part, expert, turned)


def _place(part: Part, expert: int | None, turned: bool, values: Tensor) -> Tensor:
    place = part.of(values if expert is None else values[expert])
    return place.t() if turned else place


def _layout(model: PreTrainedModel, checkpoint: Checkpoint, own_names: bool) -> dict[str, Placement]:
    """transformers parameter → placement in the checkpoint; ArchitectureError where that is not known."""
    layout = disk_layout(model, holds_single_experts(checkpoint), own_names=own_names)
    layout |= fit_rows(layout, {name: info.shape for name, info in checkpoint.tensors.items()})
    unknown = [name for name, placement in layout.items() if not placement.parts]
    if unknown:
        raise ArchitectureError(
            f"{checkpoint.source}: transformers makes {_some(unknown)} of the files' tensors in a way that lowbit does "
            f"not know; the model can be quantized, not run",
            "load it with transformers",
        )
    return layout


def module_names(model: PreTrainedModel, architecture: Architecture) -> dict[str, str]:
    """Linear → name of its module in a transformers model; without linears in a fused parameter."""
    names = {}
    for parameter, placement in disk_layout(model, own_names=architecture.own_names).items():
        part = next(iter(placement.parts), None)
        if part is None or not part.whole or not part.name.endswith(".weight"):
            continue
        linear = part.name.removesuffix(".weight")
        if linear in architecture.linears:
            names[linear] = parameter.removesuffix(".weight")
    return names


def load_tokenizer(checkpoint: Checkpoint, options: OpenOptions | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint's folder. UnsafeError where it needs code that the user has not allowed."""
    from transformers import AutoTokenizer

    trust = (options or OpenOptions()).trust_remote_code
    hint = "copy tokenizer.json and tokenizer_config.json from the original model into the folder"
    if checkpoint.kind == "gguf":
        hint = "use a GGUF file that has one, or the folder that the file was made of"
    else:
        check_companions(checkpoint.folder, checkpoint.source)
    if not has_tokenizer(checkpoint.folder) and not trust:
        raise CheckpointError(f"there is no tokenizer in {checkpoint.source}", hint)
    if checkpoint.kind != "gguf":
        code = code_of_tokenizer(checkpoint.folder)
        if code is not None and not trust:
            raise UnsafeError(
                f"{checkpoint.source}: how tiktoken.model cuts text stands in Python code that comes with the model "
                f"({code}), and transformers cannot load the tokenizer without it",
                "read that code, then pass --trust-remote-code",
            )
        refuse_tokens_without_row(checkpoint)
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust)
    except Exception as error:  # tokenizers are programs of their authors
        raise CheckpointError(f"{checkpoint.source}: its tokenizer cannot be loaded: {error}", hint) from error


def refuse_tokens_without_row(checkpoint: Checkpoint) -> None:
    """CheckpointError where the tokenizer has a token that the embedding has no row for."""
    rows = embedding_rows(checkpoint.tensors)
    problem = None if rows is None else beyond_embedding(checkpoint.folder, rows)
    if problem is not None:
        raise CheckpointError(f"{checkpoint.source}: {problem}", ENLARGE)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        found = str(error).split("\n")[0].rstrip(".")
        raise UsageError(
            f"device {device!r} cannot be used: {found}", "give cpu, or cuda where torch sees one"
        ) from error


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype, options: OpenOptions) -> PreTrainedModel:
    """The model of config.json with parameters on the meta device and real buffers."""
    from transformers import GenerationConfig

    model = build_without_weights(checkpoint.config(), str(checkpoint.folder), options.trust_remote_code, dtype)
    if (checkpoint.folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        except Exception as error:  # as above
            raise CheckpointError(
                f"{checkpoint.folder / 'generation_config.json'}: transformers does not take it: {error}",
                "copy it from the original model, or remove it",
            ) from error
    return model


@dataclass(frozen=True)
class _Slot:
    """One parameter or persistent buffer of the model.

    names     its names in the model: one, or the tied ones
    sources   stored tensors that fill it, (name, part, expert) each: all of `parts[0]`, or one of several tied ones
    """

    names: list[str]
    shape: tuple[int, ...]
    sources: list[list[tuple[str, Part, int | None]]]


def _slots(model: PreTrainedModel, layout: dict[str, Placement], checkpoint: Checkpoint) -> list[_Slot]:
    by_identity: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name in layout:
            by_identity.setdefault(id(tensor), []).append(name)
            shapes[id(tensor)] = tuple(tensor.shape)
    return [
        _Slot(names, shapes[key], [_sources(name, layout[name], checkpoint) for name in names])
        for key, names in by_identity.items()
    ]


def _sources(name: str, placement: Placement, checkpoint: Checkpoint) -> list[tuple[str, Part, int | None]]:
    """The stored tensors of a parameter; the parameter itself where the file has it under transformers' own name."""
    pieces = list(placement.pieces())
    if name in checkpoint.tensors and not any(stored in checkpoint.tensors for stored, _, _ in pieces):
        return [(name, Part(name), None)]
    return pieces


def _check_names(
    checkpoint: Checkpoint, model: PreTrainedModel, slots: list[_Slot], architecture: Architecture
) -> list[str]:
    """Every parameter has its tensors, every tensor its parameter, with one shape. Returns the tensors beside them."""
    known: set[str] = set()
    missing = []
    for slot in slots:
        known.update(stored for source in slot.sources for stored, _, _ in source)
        absent = [[stored for stored, _, _ in source if stored not in checkpoint.tensors] for source in slot.sources]
        missing += min(absent, key=len)
    surplus = [name for name in checkpoint.tensors if name not in known]
    unexpected = [name for name in surplus if not _is_passed_over(name, checkpoint, architecture)]
    if missing or unexpected:
        complaints = [
            f"{what} {_some(names)}"
            for what, names in (("it lacks", missing), ("the model has no place for", unexpected))
            if names
        ]
        raise CheckpointError(
            f"{checkpoint.source}: the tensors are not those of its config.json: {'; '.join(complaints)}",
            "a download may be incomplete, or transformers lays this model out differently from the file",
        )
    for slot in slots:
        for stored, part, _ in (piece for source in slot.sources for piece in source):
            info = checkpoint.tensors.get(stored)
            expected = part.shape_in(slot.shape)
            if info is not None and _lies_transposed(checkpoint, model, slot, stored):
                expected = expected[::-1]
            if info is not None and tuple(info.shape) != expected:
                raise CheckpointError(
                    f"{checkpoint.source}: {stored} has shape {list(info.shape)}; config.json asks for "
                    f"{list(expected)}",
                    "config.json and the weights belong to different models",
                )
    return [name for name in surplus if architecture.stands_beside(name) and not COMPUTED_BUFFERS.search(name)]


def _is_passed_over(name: str, checkpoint: Checkpoint, architecture: Architecture) -> bool:
    """True for tensors that the model correctly has no parameter for."""
    if architecture.stands_beside(name):
        return True
    # AutoGPTQ writes a bias for every linear; where the model has none it is zeros.
    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and f"{owner}.weight" in checkpoint.schemes and not checkpoint.read(name).any().item()


def _lies_transposed(checkpoint: Checkpoint, model: PreTrainedModel, slot: _Slot, stored: str) -> bool:
    """Decoded weights are [N, K]; a Conv1D computes with [K, N]."""
    from transformers.pytorch_utils import Conv1D

    owner = model.get_submodule(slot.names[0].rpartition(".")[0])
    return isinstance(owner, Conv1D) and stored in checkpoint.schemes


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _filled(checkpoint: Checkpoint, model: PreTrainedModel, slot: _Slot, dtype: torch.dtype, device: str) -> Tensor:
    """The parameter, read into new memory; floats in `dtype`."""
    whole = [source for source in slot.sources if all(name in checkpoint.tensors for name, _, _ in source)]
    stored = checkpoint.tensors[whole[0][0][0]].dtype
    if stored.is_floating_point:
        # transformers keeps some parameters in float32 whatever the model's dtype (the balance of DeepSeek's routers)
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        stays = any(re.search(rf"(^|\.){module}($|\.)", slot.names[0]) for module in kept)
        stored = torch.float32 if stays else dtype
    value = torch.empty(slot.shape, dtype=stored, device=device)
    for name, part, expert in whole[0]:
        place = part.of(value if expert is None else value[expert])
        place = place.t() if _lies_transposed(checkpoint, model, slot, name) else place
        for rows, slab in _slabs(checkpoint, name, tuple(place.shape), part):
            place[rows] = slab.to(device=place.device, dtype=place.dtype)
    for (other, _, _), *_ in whole[1:]:
        for rows, slab in _slabs(checkpoint, other, tuple(value.shape), Part(other)):
            if not torch.equal(value[rows], slab.to(device=value.device, dtype=value.dtype)):
                raise CheckpointError(
                    f"{checkpoint.source}: config.json ties {other} to {whole[0][0][0]}, but the file stores two "
                    f"different tensors",
                    'set "tie_word_embeddings": false in config.json if both are meant, or remove one of them',
                )
    return value


def _slabs(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], part: Part) -> Iterator[tuple[Any, Tensor]]:
    """(index of the rows, the rows) of a part of a tensor, of this shape, SLAB_BYTES at a time; its pages are released
    after each slab."""
    if not shape:
        yield ..., checkpoint.read(name)
        return
    for start, stop in row_slabs(shape, SLAB_BYTES // 4, SLAB_ROWS):
        yield slice(start, stop), _rows(checkpoint, name, part, start, stop)
        checkpoint.release(name)


def _rows(checkpoint: Checkpoint, name: str, part: Part, start: int, stop: int) -> Tensor:
    """Rows start … stop of a part (entries of its first dimension)."""
    if part.total is None or part.dim:
        return part.of_stored(checkpoint.read(name, start, stop))
    first, last = (part.at + row * part.stride for row in (start, stop - 1))
    return checkpoint.read(name, first, last + 1)[:: part.stride]


def _put(model: nn.Module, names: list[str], value: Tensor) -> None:
    """Put the tensor under its names; tied ones get the same Parameter."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = parameter.data
        else:
            owner._parameters[leaf] = parameter
