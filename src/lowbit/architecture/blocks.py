"""The decoder blocks of a transformers model: the list of modules with most weights in its text decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lowbit.architecture.trace import is_experts, is_linear
from lowbit.errors import ArchitectureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_blocks(model: PreTrainedModel) -> list[str]:
    """Module names of the decoder blocks: of the lists of modules in the text decoder, the one with most weights."""
    found = _largest_list(_text_decoder(model)) or _largest_list(model)
    if found is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no list of decoder blocks with linears",
            "lowbit quantizes decoders that transformers builds of repeated blocks",
        )
    names = {module: name for name, module in model.named_modules()}
    stored = _with_own_weights(model, names[found])
    return [f"{stored}.{index}" for index in range(len(found))]


def _text_decoder(model: PreTrainedModel) -> nn.Module | None:
    """What the class calls its decoder. One that has none, of several models (Qwen-Omni: one thinks, one talks), names
    the config that text goes through, and the model inside it that has a config of that class is meant."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    kind = type(model.config.get_text_config())
    if decoder is not model or kind is type(model.config):
        return decoder
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model)
    return next((part for part in parts if type(part.config) is kind), decoder)


def _with_own_weights(model: PreTrainedModel, blocks: str) -> str:
    """The list of blocks whose weights files hold, where `blocks` shares all of them with another (DiffusionGemma)."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    matrices = [name for name, value in model.get_submodule(blocks).named_parameters(blocks) if value.dim() > 1]
    paths = {tied[name].removesuffix(name.removeprefix(blocks)) if name in tied else blocks for name in matrices}
    return paths.pop() if len(paths) == 1 else blocks


def _largest_list(model: nn.Module | None) -> nn.ModuleList | None:
    """The outermost list of modules with linears that has most weights."""
    modules = () if model is None else model.modules()
    lists = [module for module in modules if isinstance(module, nn.ModuleList)
             and any(is_linear(part) or is_experts(part) for part in module.modules())]  # fmt: skip
    nested = {part for each in lists for part in each.modules() if part is not each}

    def weights(blocks: nn.ModuleList) -> int:
        return sum(value.numel() for value in blocks.parameters() if value.dim() > 1)

    return max((each for each in lists if each not in nested), key=weights, default=None)
