"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, K]   r the rank
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [N, r]   W becomes W + s·B·A, s = alpha / r
    ….q_proj.lora_magnitude_vector                                   [N]      DoRA: rows of the sum get these norms
    ….embed_tokens.lora_embedding_A, lora_embedding_B                [r, V], [H, r]   W [V, H] becomes W + s·(B·A)ᵀ
    ….mlp.experts.lora_A.weight, lora_B.weight                       [r·E, in], [out, r·E]   of all experts at once
    ….lm_head.weight, ….q_proj.base_layer.bias                       stand for the base's (modules_to_save, bias)

Also read: the name of the adapter inside names (`lora_A.default.weight`), and names without `base_model.model.`.
Opening reads headers and adapter_config.json; what a name belongs to is settled with the architecture at hand
(lowbit.architecture.merging).

Refused: adapters of other kinds than LoRA; variants of it that change more than weights, or that trained on a changed
base; settings that lowbit does not know; a matrix without its partner; a rank other than adapter_config.json says.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoint.base import REPORT_NAME, OpenOptions, TensorInfo, read_json_object
from lowbit.checkpoint.companions import ADAPTER, ADAPTER_WEIGHTS, adapter_kind, is_lone_adapter, refuse_odd_file
from lowbit.checkpoint.hub import download_files, is_hub_id, list_files, local_copy
from lowbit.checkpoint.mapped_file import MappedFile
from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.checkpoint.safetensors_header import read_header
from lowbit.errors import CheckpointError, UsageError
from lowbit.files.hashes import file_digests
from lowbit.patterns import PatternError, compiled

_MATRIX = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")
_PREFIX = "base_model.model."

# Fields of adapter_config.json that say how an adapter was trained or found, and nothing about what it computes. What
# `bias` and `modules_to_save` announce is in the file under its own name.
_TOLD = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "target_parameters",
    "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "bias", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying", "target_modules_to_tie", "unsloth_fixed",
}  # fmt: skip
# Fields that make an adapter compute something else than W + s·B·A.
_VARIANTS = {
    "alora_invocation_tokens": "it acts only behind its invocation tokens (activated LoRA)",
    "arrow_config": "it chooses between several adapters for each token (Arrow)",
    "kasa_config": "it trained on a base with singular values taken out (KaSA)",
    "layer_replication": "it repeats layers of the base",
    "monteclora_config": "it samples its matrices (MonteCLoRA)",
    "trainable_token_indices": "it trains single rows of the embedding",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "use_qalora": "its input is pooled (QA-LoRA)",
}
# Starts that subtract from the base what the adapter begins with; others leave it as it is.
_CHANGED_BASE = re.compile(r"pissa|corda|olora|loftq|lora_ga", re.IGNORECASE)


@dataclass(frozen=True)
class LowRank:
    """A pair of matrices, by their names in the file; see the module's docstring for the shapes.

    module     that they change: "model.layers.0.self_attn.q_proj"
    magnitude  of DoRA
    bias       of B, added to the module's bias (lora_bias)
    embedding  True for lora_embedding_A and lora_embedding_B
    """

    module: str
    a: str
    b: str
    magnitude: str | None = None
    bias: str | None = None
    embedding: bool = False


class Adapter:
    """An open adapter.

    source    what the user typed
    tensors   name in the file → header entry
    pairs     every pair of matrices
    replaced  parameter → tensor of the file that stands for it
    """

    def __init__(self, folder: Path, source: str):
        self.folder, self.source = folder, source
        self.config = read_json_object(folder / ADAPTER)
        self._refuse_variants()
        self._file = MappedFile(folder / ADAPTER_WEIGHTS)
        entries, _ = read_header(self._file)
        self._entries = {entry.name: entry for entry in entries}
        self.tensors = {
            entry.name: TensorInfo(entry.name, entry.shape, TORCH_DTYPE[entry.dtype], entry.dtype,
                                   entry.stop - entry.start, folder / ADAPTER_WEIGHTS)
            for entry in entries
        }  # fmt: skip
        self.pairs, self.replaced = self._sorted_out()
        if not self.pairs and not self.replaced:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: holds no tensors", "save the adapter again")

    @property
    def base(self) -> str | None:
        """The model it was trained on, by its own word."""
        stated = self.config.get("base_model_name_or_path")
        return stated if isinstance(stated, str) and stated else None

    def read(self, name: str) -> Tensor:
        """A whole tensor; CheckpointError where it holds NaN or inf."""
        info, entry = self.tensors[name], self._entries[name]
        values = self._file.tensor(info.dtype, info.shape, entry.start, entry.stop)
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{info.file}: tensor {name} is {info.stored}, and floats are needed",
                                  "save the adapter with save_pretrained of PEFT")  # fmt: skip
        values = values.float() if info.dtype.itemsize == 1 else values  # torch computes nothing in 8 bits
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{info.file}: tensor {name} holds NaN or inf",
                                  "the training diverged, or the file is damaged")  # fmt: skip
        return values

    def close(self) -> None:
        self._file.close()

    def scale(self, pair: LowRank, parameter: str, experts: int = 1) -> float:
        """s of a pair that changes `parameter`; CheckpointError where its rank is not the one of adapter_config.json.

        parameter  what rank_pattern and alpha_pattern are matched with: the module, or MODULE.PARAMETER of experts
        """
        told = self._number("r", self._matched("rank_pattern", parameter))
        alpha = self._number("lora_alpha", self._matched("alpha_pattern", parameter))
        rank = self.tensors[pair.a].shape[0]
        if told != int(told) or told * experts != rank:
            raise CheckpointError(
                f"{self.source}: {pair.a} has {rank} rows, adapter_config.json gives {parameter} rank {told:g}"
                f"{f' for each of {experts} experts' if experts > 1 else ''}",
                "adapter_config.json is of another adapter, or the adapter was saved from a part of the GPUs",
            )
        if alpha == 0:
            raise CheckpointError(f"{self.source}: lora_alpha is 0, so that the adapter does not change {parameter}",
                                  "adapter_config.json is damaged, or of another adapter")  # fmt: skip
        return alpha / math.sqrt(told) if self.config.get("use_rslora") else alpha / told

    def _number(self, key: str, matched: Any) -> float:
        value: Any = self.config.get(key) if matched is None else matched
        if type(value) not in (int, float) or not math.isfinite(value) or (key == "r" and value < 1):
            raise CheckpointError(f"{self.folder / ADAPTER}: {key} is {value!r}; a number is needed")
        return float(value)

    def _matched(self, key: str, parameter: str) -> Any:
        """The value of the first pattern that PEFT would find at the end of the name; None without one."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self.folder / ADAPTER}: {key} is {patterns!r}; a mapping is needed")
        for pattern, value in patterns.items():
            try:
                if compiled(rf"(.*\.)?({pattern})$").match(parameter):
                    return value
            except PatternError as error:
                raise CheckpointError(
                    f"{self.folder / ADAPTER}: {key}: {pattern[:80]!r} is no pattern that can be matched: {error}"
                ) from error
        return None

    def _refuse_variants(self) -> None:
        where, hint = f"{self.source}: this is {adapter_kind(self.folder)}", (
            "merge it with peft (merge_and_unload), and quantize the result"
        )  # fmt: skip
        if str(self.config.get("peft_type")).upper() != "LORA":
            raise CheckpointError(f"{where}; lowbit merges LoRA only", hint)
        for key, why in _VARIANTS.items():
            if self.config.get(key):
                raise CheckpointError(f"{where} with {key}: {why}, so that it cannot be merged by W + s·B·A", hint)
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and _CHANGED_BASE.match(start):
            raise CheckpointError(
                f"{where} with init_lora_weights {start!r}: it trained on a base that its start had changed",
                "save it with path_initial_model_for_weight_conversion, or, if MODEL is that changed base, set "
                "init_lora_weights to true in adapter_config.json",
            )
        if self._changed_base():
            raise CheckpointError(
                f"{where} with a base of its own, {self.base}: LoftQ made its codes up together with it",
                "no other base goes with it; `lowbit finetune --lora … --merge` writes one checkpoint",
            )
        for key in ("use_rslora", "use_dora"):
            if not isinstance(self.config.get(key), bool | None):
                raise CheckpointError(
                    f"{self.folder / ADAPTER}: {key} is {self.config[key]!r}; true or false is needed"
                )
        unknown = sorted(key for key, value in self.config.items()
                         if value and key not in _TOLD and key not in _VARIANTS)  # fmt: skip
        if unknown:
            raise CheckpointError(
                f"{where} with {', '.join(unknown)} in adapter_config.json, of which lowbit does not know the meaning",
                f"{hint}; or remove the field if it changes nothing",
            )

    def _changed_base(self) -> bool:
        """True where lowbit's report beside it says that its base was changed; PEFT's config cannot say so."""
        if not (self.folder / REPORT_NAME).is_file():
            return False
        lora = read_json_object(self.folder / REPORT_NAME).get("lora")
        return isinstance(lora, dict) and bool(lora.get("changed_base"))

    def _sorted_out(self) -> tuple[list[LowRank], dict[str, str]]:
        """(pairs, replaced parameters)."""
        found: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        adapters: set[str | None] = set()
        for name in self.tensors:
            inner = name.removeprefix(_PREFIX)
            match = _MATRIX.fullmatch(inner)
            if match is None:
                parameter = _SAVED.sub("", inner).replace(".base_layer.", ".")
                if parameter in replaced:
                    raise CheckpointError(f"{self.source}: {parameter} is there twice, as {replaced[parameter]} and "
                                          f"as {name}", "save the adapter again")  # fmt: skip
                replaced[parameter] = name
                continue
            adapters.add(match["adapter"])
            part = match["part"] if match["leaf"] != "bias" else f"{match['part']}.bias"
            found.setdefault(match["module"], {})[part] = name
        if len(adapters) > 1:
            named = ", ".join(sorted(map(str, adapters)))
            raise CheckpointError(f"{self.source}: holds several adapters: {named}", "save the one that is meant")
        return [self._pair(module, parts) for module, parts in found.items()], replaced

    def _pair(self, module: str, parts: dict[str, str]) -> LowRank:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        missing = [part for part in (a, b) if part not in parts]
        if missing:
            raise CheckpointError(f"{self.source}: {module} has no {missing[0]}, only {', '.join(parts)}",
                                  "the file is incomplete; save the adapter again")  # fmt: skip
        known = {a, b, "lora_magnitude_vector", "lora_B.bias"}
        surplus = sorted(parts.keys() - known)
        if surplus:
            raise CheckpointError(f"{self.source}: {module} has {', '.join(surplus)}, of which lowbit does not know "
                                  "the meaning", "merge it with peft (merge_and_unload)")  # fmt: skip
        magnitude, bias = parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")
        shapes = [self.tensors[parts[part]].shape for part in (a, b)]
        if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise CheckpointError(
                f"{self.source}: {module} has A {list(shapes[0])} and B {list(shapes[1])}; [r, K] and [N, r] are "
                "needed",
                "an adapter of a convolution is not merged; one whose matrices are empty or flat was saved from a part "
                "of the GPUs",
            )
        if (magnitude is not None) is not bool(self.config.get("use_dora")):
            there = "has a" if magnitude is not None else "lacks its"
            raise CheckpointError(
                f"{self.source}: {module} {there} lora_magnitude_vector, and use_dora is "
                f"{self.config.get('use_dora')!r}",
                "adapter_config.json is of another adapter",
            )
        if magnitude is not None and (embedding or bias is not None):
            what = "of an embedding" if embedding else "with a bias of its own"
            raise CheckpointError(f"{self.source}: {module}: DoRA {what} is not merged",
                                  "merge it with peft (merge_and_unload)")  # fmt: skip
        module = module.replace(".base_layer", "")
        return LowRank(module, parts[a], parts[b], magnitude, bias, embedding)


def open_adapter(name: str | Path) -> Adapter:
    """Open an adapter: a folder, or the Hugging Face id of one."""
    folder = find_adapter(name)
    for file in (ADAPTER, ADAPTER_WEIGHTS):
        refuse_odd_file(folder / file)
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"{name}: there is no {ADAPTER}, so this is no adapter of PEFT",
                              "give the folder that save_pretrained of PEFT wrote")  # fmt: skip
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise CheckpointError(f"{name}: there is no {ADAPTER_WEIGHTS}{pickled}",
                              "save the adapter with save_pretrained of a current PEFT")  # fmt: skip
    return Adapter(folder, str(name))


def is_adapter(name: str | Path) -> bool:
    """True for a local folder that holds an adapter and no model."""
    folder = Path(name).expanduser()
    return folder.is_dir() and is_lone_adapter(folder)


def adapter_files(options: OpenOptions) -> list[Path]:
    """The files of the adapter that is merged; none without one."""
    if options.adapter is None:
        return []
    folder = find_adapter(options.adapter)
    return [folder / ADAPTER, folder / ADAPTER_WEIGHTS]


def adapter_sha256(options: OpenOptions) -> str | None:
    """SHA-256 of the SHA-256s of each MiB of these files; None without an adapter."""
    digests = [file_digests(path) for path in adapter_files(options)]
    return hashlib.sha256(b"".join(digests)).hexdigest() if digests else None


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter; a Hugging Face id is downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not is_hub_id(str(name)):
        raise UsageError(f"{name}: there is no such folder, and it is no Hugging Face id (org/name) either",
                         "give the folder that holds adapter_config.json")  # fmt: skip
    files = list_files(str(name), OpenOptions())
    if files is None:
        return local_copy(str(name), OpenOptions())
    wanted = [file for file in files if "/" not in file and not file.endswith((".bin", ".pt", ".pth", ".gguf"))]
    return download_files(str(name), OpenOptions(), wanted)
