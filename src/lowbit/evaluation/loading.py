"""A checkpoint as a running transformers model: transformers' own classes, filled tensor by tensor.

The model is built without weights (parameters on the meta device; buffers that no file stores, such as rotary
frequencies, are computed as the class computes them), then every parameter is read in slabs of rows straight into
place, so there is never a second copy. Tied parameters are read once.

Refused: a parameter that the checkpoint lacks, a tensor that the model does not know, a wrong shape, two tensors that
the config ties but that differ (engines disagree on which of them counts), and a model that brings its own code unless
the user trusts it. Nothing is renamed or skipped: models whose layout transformers changes on load (fused experts) are
refused by name, not loaded half.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.base import OpenOptions
from lowbit.checkpoint.rows import row_slabs
from lowbit.errors import ArchitectureError, CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowbit.checkpoint.base import Checkpoint

SLAB_BYTES = 64 * 1024 * 1024
# Slabs start at multiples of this, so that a square block of a quantized weight is never cut.
SLAB_ROWS = 128
# Old checkpoints store these; today's classes compute them.
_COMPUTED_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


def load(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    options: OpenOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model of any readable format as (transformers model, tokenizer); quantized weights come decoded."""
    from lowbit.checkpoint import open_checkpoint

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
    _check_device(device)
    model = _empty_model(checkpoint, dtype, options or OpenOptions())
    slots = _slots(model)
    _check_names(checkpoint, slots)
    for names in slots.groups:
        stored = [name for name in names if name in checkpoint.tensors]
        value = _read_whole(checkpoint, stored[0], slots.shapes[stored[0]], dtype, device)
        for other in stored[1:]:
            _check_equal(checkpoint, stored[0], other, value)
        parameter = nn.Parameter(value, requires_grad=False)
        for name in names:
            _put(model, name, parameter)
    nn.Module.to(model, device)  # moves the computed buffers; the parameters are there already
    return model.eval()


def load_tokenizer(checkpoint: Checkpoint, options: OpenOptions | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint's folder."""
    from transformers import AutoTokenizer

    trust = (options or OpenOptions()).trust_remote_code
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.source}: its tokenizer cannot be loaded: {error}",
            "copy tokenizer.json and tokenizer_config.json from the original model into the folder",
        ) from error


@dataclass(frozen=True)
class _Slots:
    """Where tensors go: the stored parameters and persistent buffers of a model.

    shapes   name → shape, every name that a file may use
    groups   lists of names that share one tensor: one name, or the tied ones
    ignored  patterns of names that the model class itself says it does not want
    """

    shapes: dict[str, tuple[int, ...]]
    groups: list[list[str]]
    ignored: list[str]

    def wants(self, name: str) -> bool:
        return not (_COMPUTED_BUFFERS.search(name) or any(re.search(pattern, name) for pattern in self.ignored))


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
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from lowbit.checkpoint.trust import refuse_remote_code

    refuse_remote_code(checkpoint.config(), checkpoint.source, options)
    trust = options.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    except (ValueError, KeyError, OSError) as error:
        kind = checkpoint.config().get("model_type")
        raise ArchitectureError(
            f"{checkpoint.source}: transformers cannot build a causal language model of type {kind!r}: {error}",
            "check config.json, or upgrade transformers if the model is newer than it",
        ) from error
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules constructed inside get parameters without storage; buffers are computed as usual.

    `torch.device("meta")` would take the buffers along, and what a class computes for them in __init__ would be lost.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied one is there already: keep its identity
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _slots(model: PreTrainedModel) -> _Slots:
    shapes: dict[str, tuple[int, ...]] = {}
    by_identity: dict[int, list[str]] = {}
    persistent = set(model.state_dict(keep_vars=True))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name in persistent:
            shapes[name] = tuple(tensor.shape)
            by_identity.setdefault(id(tensor), []).append(name)
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    return _Slots(shapes, list(by_identity.values()), ignored)


def _check_names(checkpoint: Checkpoint, slots: _Slots) -> None:
    """Every parameter has its tensor, every tensor its parameter, with one shape."""
    missing = [names[0] for names in slots.groups if not any(name in checkpoint.tensors for name in names)]
    unexpected = [name for name in checkpoint.tensors if name not in slots.shapes and slots.wants(name)]
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
    for name, shape in slots.shapes.items():
        info = checkpoint.tensors.get(name)
        if info is not None and tuple(info.shape) != shape:
            raise CheckpointError(
                f"{checkpoint.source}: {name} has shape {list(info.shape)}; config.json asks for {list(shape)}",
                "config.json and the weights belong to different models",
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _slabs(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[tuple[Any, Tensor]]:
    """(index of the rows, the rows) of a tensor, SLAB_BYTES at a time; its pages are released after each slab."""
    if not shape:
        yield ..., checkpoint.read(name)
        return
    for start, stop in row_slabs(shape, SLAB_BYTES // 4, SLAB_ROWS):
        yield slice(start, stop), checkpoint.read(name, start, stop)
        checkpoint.release(name)


def _read_whole(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """The tensor in memory of our own, of `dtype` if it is a float."""
    is_float = checkpoint.tensors[name].dtype.is_floating_point
    value = torch.empty(shape, dtype=dtype if is_float else checkpoint.tensors[name].dtype, device=device)
    for rows, slab in _slabs(checkpoint, name, shape):
        value[rows] = slab.to(value.dtype)
    return value


def _check_equal(checkpoint: Checkpoint, kept: str, other: str, value: Tensor) -> None:
    for rows, slab in _slabs(checkpoint, other, tuple(value.shape)):
        if not torch.equal(value[rows], slab.to(device=value.device, dtype=value.dtype)):
            raise CheckpointError(
                f"{checkpoint.source}: config.json ties {other} to {kept}, but the file stores two different tensors",
                'set "tie_word_embeddings": false in config.json if both are meant, or remove one of them',
            )


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put the tensor under its name; tied names get the same Parameter."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = parameter.data
    else:
        owner._parameters[leaf] = parameter
