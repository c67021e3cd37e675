"""A transformers model in memory as a `Checkpoint`: its parameters under the names that files would have.

    model.layers.0.mlp.experts.gate_up_proj      model.layers.0.mlp.experts.7.gate_proj.weight, … .up_proj.weight
        [E, 2I, H], one parameter                    [I, H] each, views of it

transformers renames and fuses while it loads; `disk_layout` is the way back, the one that `save_pretrained` takes.
Nothing is copied but the rows that are asked for, from whatever device they lie on. Config, generation config and
tokenizer are written into a temporary folder, from where everything else reads them as from any model's.

    model_in_memory(model, tokenizer)    opens
    put_back(model, checkpoint)          copies the weights of a checkpoint (decoded) into the parameters of the model

Refused, because what would be written is not what the model computes, or is not there: a model that is quantized
already, or holds an adapter that was not merged; parameters on the meta device, or sharded over processes; linears that
something replaced (LoRA, fake quantization, parametrizations); a model whose class transformers does not make of its
config; parameters that transformers made of files in a way that has no way back.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.architecture.building import build_without_weights
from lowbit.architecture.disk_layout import disk_layout
from lowbit.architecture.loading import Loader
from lowbit.architecture.structure import Part
from lowbit.checkpoint.base import (
    IN_MEMORY,
    Checkpoint,
    OpenOptions,
    TensorInfo,
    find_tensor,
    read_config,
    refuse_remote_code,
    row_range,
)
from lowbit.checkpoint.companions import has_tokenizer
from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.checkpoint.stated import StatedConfig, stated_quantization
from lowbit.errors import CheckpointError, LowbitError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORED_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}
_COMPILED = "_orig_mod"  # what a module of torch.compile has inside
_SAVE_FIRST = "save it with save_pretrained, and give the folder"


@dataclass
class _StatePlace:
    """Where a stored tensor lies: the dtype it is read in, its shape, and (tensor of the model, part of it, expert) of
    everything that lies in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[tuple[Tensor, Part, int | None]]

    def values(self) -> Tensor:
        """A view where one piece is all of it, else put together."""
        tensor, part, expert = self.pieces[0]
        if part.total is None:
            return part.of(tensor if expert is None else tensor[expert])
        values = tensor.new_empty(self.shape)
        for tensor, part, expert in self.pieces:
            part.of_stored(values).copy_(part.of(tensor if expert is None else tensor[expert]))
        return values


class ModelInMemory(StatedConfig):
    """See the module docstring. `tensors` has the names of files; reading takes the rows to the CPU.

    model  unwrapped; it is never written to
    """

    kind = IN_MEMORY

    def __init__(self, model: PreTrainedModel, folder: Path, places: dict[str, _StatePlace], notes: list[str]):
        self.model, self.folder, self.notes = model, folder, notes
        self.source = f"{type(model).__name__} in memory"
        self.metadata: dict[str, Any] = {}
        self._places = places
        self.tensors = {name: self._info(name, place) for name, place in places.items()}
        self._remove = weakref.finalize(self, shutil.rmtree, folder.parent, ignore_errors=True)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop; aliases the parameter where that is on the CPU and lies so."""
        start, stop, _ = row_range(find_tensor(self.tensors, name, self.source), start, stop)
        values = self._places[name].values()
        values = values[start:stop] if values.dim() else values
        return values.cpu().to(self._places[name].dtype).contiguous()

    def release(self, name: str) -> None:
        """Nothing: the memory is the model's."""

    def close(self) -> None:
        """Nothing: others may read on. `remove` ends it."""

    def remove(self) -> None:
        """Delete the temporary folder."""
        self._remove()

    def _info(self, name: str, place: _StatePlace) -> TensorInfo:
        shape = place.shape
        stored = _STORED_NAME.get(place.dtype, str(place.dtype).removeprefix("torch."))
        nbytes = math.prod(shape) * place.dtype.itemsize
        return TensorInfo(name, shape, place.dtype, stored, nbytes, Path(self.source))


def model_in_memory(
    model: Any, tokenizer: Any = None, options: OpenOptions | None = None, trained: bool = False,
    dtype: torch.dtype | None = None,
) -> ModelInMemory:  # fmt: skip
    """A transformers model, with what its output needs beside the weights.

    tokenizer  a tokenizer or processor; None: that of the folder or the hub id which the model was loaded from, with a
               note, where there is one
    dtype      of floats as they are read, where the model computes in another; None: the model's
    trained    the weights below the fake quantization of `lowbit.train` are meant; refused otherwise

    UsageError and CheckpointError for what the module refuses.
    """
    model = unwrapped(model)
    _refuse_quantized(model)
    if not trained and any(map(_is_fake_quantized, model.modules())):
        raise UsageError(
            "the model is prepared for training, with fake quantization on its linears",
            "lowbit.train.export writes the codes it computes with, lowbit.train.remove takes it off",
        )
    state = _plain_state(model)
    _refuse_unreadable(state)
    folder = Path(tempfile.mkdtemp(prefix="lowbit-model-")) / _folder_name(model)
    try:
        folder.mkdir()
        notes = _write_companions(model, tokenizer, folder, dtype or model.dtype)
        config = read_config(folder)
        refuse_remote_code(config, f"{type(model).__name__} in memory", options or OpenOptions())
        twin = build_without_weights(config, str(folder), (options or OpenOptions()).trust_remote_code)
        notes += _refuse_replaced(model, twin)
        return ModelInMemory(model, folder, _places(model, twin, state, dtype), notes)
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise


@torch.no_grad()
def put_back(model: Any, checkpoint: Checkpoint, options: OpenOptions | None = None) -> None:
    """Copy a checkpoint's weights, decoded, into the parameters of the model that it was made of.

    Each keeps its identity, its dtype and its device, so that optimizers and hooks stay valid; rounding to the dtype of
    the parameter comes on top. Where the checkpoint unties what the model ties, the output layer gets a parameter of
    its own. Takes the memory of the largest parameter in float32.
    """
    model = unwrapped(model)
    written: dict[int, str] = {}
    for names, value in Loader(checkpoint, torch.float32, "cpu", options).values():
        for name in names:
            owner_name, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner_name)
            tensor = getattr(owner, leaf)
            shared = written.setdefault(id(tensor), names[0]) != names[0]
            if shared and not torch.equal(tensor.detach(), value.to(tensor)):
                tensor = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
                setattr(owner, leaf, tensor)
                if owner is model.get_output_embeddings():
                    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
            tensor.detach().copy_(value)


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside of DistributedDataParallel, DataParallel and torch.compile."""
    from transformers import PreTrainedModel

    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, parallel):
            model = model.module
        elif hasattr(model, _COMPILED):
            model = getattr(model, _COMPILED)
        elif hasattr(model, "merge_and_unload"):
            raise UsageError("the model holds an adapter that was not merged", "give model.merge_and_unload()")
        else:
            raise UsageError(
                f"model is a {type(model).__name__}; a transformers model, a folder, a file or a Hugging Face id is "
                f"needed",
                "of a trainer give trainer.model, of a pipeline pipeline.model",
            )
    return model


def _refuse_quantized(model: PreTrainedModel) -> None:
    stated = stated_quantization(model.config.to_dict())
    if getattr(model, "hf_quantizer", None) is not None or stated is not None:
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        raise UsageError(
            f"the model is quantized already ({getattr(method, 'value', method) or 'by transformers'})",
            "load the 16-bit model and quantize that; of a quantized folder `lowbit.convert` keeps the codes",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError("the model holds an adapter that was not merged",
                         "load it with PEFT and merge it (merge_and_unload), or give quantize(…, "
                         "options=OpenOptions(adapter=FOLDER)) and the base model")  # fmt: skip


def _is_fake_quantized(module: nn.Module) -> bool:
    """True for a module all of whose parametrizations are those of `lowbit.train`."""
    if not parametrize.is_parametrized(module):
        return False
    steps = [step for steps in module.parametrizations.values() for step in steps]  # type: ignore[union-attr,operator]
    return all(getattr(step, "lowbit_fake_quantization", False) for step in steps)


def _plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of the model without its fake quantization and compiled blocks: its parameters under the names that
    they had before."""
    found = {}
    for compiled, tensor in model.state_dict().items():
        name = _before_compiling(compiled)
        owner, parametrized, rest = name.partition(".parametrizations.")
        if parametrized:
            leaf, _, which = rest.partition(".")
            if which != "original":
                continue
            name = f"{owner}.{leaf}"
        found[name] = tensor
    return found


def _before_compiling(name: str) -> str:
    """The name without the wrappers that torch.compile puts around blocks; they hand on what is asked of them."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _refuse_unreadable(state: dict[str, Tensor]) -> None:
    """Every tensor of the state is there, whole, and an ordinary one."""
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}, not a tensor: the model is quantized already",
                                  "load the 16-bit model and quantize that")  # fmt: skip
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"{name} is on the meta device: it has a shape and no values",
                "load the model with from_pretrained onto the CPU or one GPU; where parts of it are offloaded, "
                "give the folder or the id instead",
            )
        if type(tensor.detach()) is not Tensor:
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, not a plain tensor: it is sharded, or quantized already",
                "gather it first (full_tensor), or " + _SAVE_FIRST,
            )


def _refuse_replaced(model: PreTrainedModel, twin: PreTrainedModel) -> list[str]:
    """Notes on modules of other classes than transformers makes of the config (the twin); CheckpointError for linears
    among them, and where the modules are other ones."""
    if type(twin) is not type(model):
        raise CheckpointError(
            f"{type(model).__name__}: transformers makes a {type(twin).__name__} of its config, so that an output "
            f"would be another model",
            _SAVE_FIRST,
        )
    fake = [_before_compiling(name) for name, module in model.named_modules() if _is_fake_quantized(module)]
    under = tuple(f"{name}.parametrizations" for name in fake)
    # a wrapper comes before what it has inside, which then stands for it
    named = ((_before_compiling(name), module) for name, module in model.named_modules())
    ours = {name: module for name, module in named if not (under and name.startswith(under))}
    theirs = dict(twin.named_modules())
    differ = [name for name in theirs if name not in ours] + [name for name in ours if name not in theirs]
    kind_of = {name: type(module).__bases__[0] if name in fake else type(module) for name, module in ours.items()}
    replaced = [name for name in ours if name in theirs and kind_of[name] is not type(theirs[name])]
    computing = [name for name in replaced if getattr(getattr(theirs[name], "weight", None), "ndim", 0) > 1]
    for name in [*computing, *differ]:
        again = name in dict(model.named_modules(remove_duplicate=False))
        absent = "a module that stands in another place too" if again else "nothing"
        kind = type(ours[name]).__name__ if name in ours else absent
        usual = type(theirs[name]).__name__ if name in theirs else "nothing"
        raise CheckpointError(
            f"{name} is {kind}, where {type(model).__name__} has {usual}: something replaced modules of the model, and "
            f"their weights may not be what it computes with",
            "merge adapters, remove parametrizations and wrappers, or " + _SAVE_FIRST,
        )
    kinds = sorted({type(ours[name]).__name__ for name in replaced})
    notes = [f"taken for transformers' own: modules of class {', '.join(kinds)}"] if kinds else []
    changing = [name or "the model" for name, module in ours.items() if _has_another_forward(module)]
    if changing and not fake:
        more = f" and {len(changing) - 1} more" if len(changing) > 1 else ""
        notes.append(f"{changing[0]}{more}: hooks, or another forward, which the output does not have; nothing that "
                     f"they change was measured")  # fmt: skip
    return notes


def _has_another_forward(module: nn.Module) -> bool:
    """True for a module with hooks, or a forward, that its class does not give it; accelerate's move values alone."""
    if hasattr(module, "_hf_hook"):
        return False
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _places(
    model: PreTrainedModel, twin: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, _StatePlace]:
    """Stored name → place of everything that `save_pretrained` would write; the twin says under which names."""
    places: dict[str, _StatePlace] = {}
    tied = getattr(twin, "all_tied_weights_keys", None) or {}  # by the config: its flag may have changed since
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, placement in disk_layout(twin).items():
        if name not in state:
            raise CheckpointError(
                f"{name} is no parameter of the model: something put others in its place, as pruning does",
                "take it off (torch.nn.utils.prune.remove), or " + _SAVE_FIRST,
            )
        tensor, other = state[name], state.get(tied.get(name, ""))
        if name in ignored or (other is not None and other.data_ptr() == tensor.data_ptr()):
            continue
        if not placement.parts:
            raise CheckpointError(
                f"{type(model).__name__}: transformers makes {name} of the files' tensors in a way that lowbit cannot "
                f"turn back",
                _SAVE_FIRST,
            )
        own = tensor.dtype if dtype is None or tensor.dtype is not model.dtype else dtype
        for stored, part, expert in placement.pieces():
            place = places.setdefault(stored, _StatePlace(own, part.shape_in(tuple(tensor.shape)), []))
            place.pieces.append((tensor, part, expert))
    more = sorted(state.keys() - twin.state_dict().keys())
    if more:
        raise CheckpointError(
            f"{', '.join(more[:3])}{' …' if len(more) > 3 else ''}: the model computes with it, and "
            f"{type(model).__name__} of its config has no place for it, so that an output would be another model",
            "change the config (attention_bias, mlp_bias …) to what the model is, or fold it into others",
        )
    return places


def _folder_name(model: PreTrainedModel) -> str:
    """The name that a GGUF file keeps of a model: that of the folder or the id which it was loaded from."""
    return Path(str(model.config.name_or_path or "")).name or type(model).__name__


def _write_companions(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write config.json, generation_config.json and the tokenizer's files; notes."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    loaded_from = Path(str(model.config.name_or_path or ""))
    if getattr(config, "auto_map", None) and loaded_from.is_dir():  # modelling code that lies beside the weights
        for path in loaded_from.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)
    notes = []
    if tokenizer is None:
        tokenizer = _tokenizer_of(str(model.config.name_or_path or ""))
        if tokenizer is not None:
            notes.append(f"the tokenizer is that of {model.config.name_or_path}, which the model was loaded from")
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)
    return notes


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    save = getattr(tokenizer, "save_pretrained", None)
    if isinstance(tokenizer, str | Path) or save is None:
        raise UsageError(
            f"tokenizer is {tokenizer if isinstance(tokenizer, str | Path) else type(tokenizer).__name__}; the object "
            f"is needed",
            "give AutoTokenizer.from_pretrained(…), or the processor of a model that sees",
        )
    try:
        save(folder)
    except Exception as error:  # tokenizers are programs of their authors
        raise UsageError(f"the tokenizer cannot be saved: {error}", "give another tokenizer object") from error
    if not has_tokenizer(folder):
        raise UsageError(f"{type(tokenizer).__name__} saves no tokenizer", "give the tokenizer or the whole processor")


def _tokenizer_of(name_or_path: str) -> Any:
    """The tokenizer of a local folder or of a cached id; None where there is none. Downloads nothing."""
    from transformers import AutoTokenizer

    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True, trust_remote_code=False)
    except LowbitError:
        raise
    except Exception:  # as above; what needs a tokenizer says so
        return None
