"""The GGUF architectures that lowbit writes and reads: all rows of `families/`, by the model type of config.json.

Names of tensors and keys are those of the gguf package; what a row says beyond them follows llama.cpp: its converter
(conversion/*.py: layouts, keys) and its loader (src/models/*.cpp: which tensors and keys are required, what is computed
whatever the file says). docs/gguf-architectures.md explains the rows.

Refused: a model type without a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

from gguf.constants import MODEL_TENSOR as T

from lowbit.checkpoint.base import as_transformers_has_it, transformers_config
from lowbit.errors import ArchitectureError
from lowbit.formats.gguf.families import (
    dense,
    experts,
    falcon_h1,
    gated_delta,
    gemma,
    gemma3n,
    gemma4,
    gpt,
    granite_hybrid,
    kimi_linear,
    lfm2,
    llama,
    mamba,
    nemotron_h,
    qwen,
    seeing,
)
from lowbit.formats.gguf.layout import Lookup
from lowbit.formats.gguf.row import GGUFArchitecture, RowTarget

# Computed from the config, or of the modules behind the model: it has no such tensor itself.
DERIVED = frozenset({
    T.ROPE_FREQS, T.ATTN_ROT_EMBD, T.ROPE_FACTORS_LONG, T.ROPE_FACTORS_SHORT, T.DENSE_2_OUT, T.DENSE_3_OUT,
    T.CLS_OUT,
})  # fmt: skip

# Keys of config.json that count the experts of a block.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")

# Several rows of a model type, or of an arch, stand in the order in which their conditions are asked.
ROWS: tuple[GGUFArchitecture, ...] = (
    *llama.ROWS, *qwen.ROWS, *gemma.ROWS, *gpt.ROWS, *seeing.ROWS, *gemma.EMBEDDING_ROWS, *dense.ROWS, *experts.ROWS,
    *gated_delta.ROWS, *kimi_linear.ROWS, *lfm2.ROWS, *mamba.ROWS, *granite_hybrid.ROWS, *nemotron_h.ROWS,
    *falcon_h1.ROWS, *gemma3n.ROWS, *gemma4.ROWS,
)  # fmt: skip
MODEL_TYPES = tuple(dict.fromkeys([*(row.model_type for row in ROWS), *seeing.AROUND]))
# Model type → why it has no row, where that is more than that nobody made one.
REFUSED: dict[str, str] = {
    **dense.REFUSED, **experts.REFUSED, **seeing.REFUSED,
    "minimax": "lowbit does not write the lightning attention of llama.cpp's minimax-01",
    **dict.fromkeys(("recurrent_gemma", "zamba", "zamba2"), "llama.cpp has no such architecture"),
    **dict.fromkeys(
        ("bert", "distilbert", "xlm-roberta", "camembert", "nomic_bert", "jina_embeddings_v3"),
        "its vocabulary is of WordPiece or unigram kind, which lowbit does not write",
    ),
    **dict.fromkeys(("roberta", "modernbert", "eurobert"), "encoders have no rows"),
}  # fmt: skip


def row_of_model(config: dict[str, Any], where: str) -> GGUFArchitecture:
    """The row of a config.json; ArchitectureError names the model types that there are.

    A model that sees or hears gets that of its text decoder, under the names that it has in this model; so does a
    decoder that is saved without an output (embedding models).
    """
    model_type = config.get("model_type")
    around = seeing.AROUND.get(str(model_type))
    if around is None:
        row = _row_of_decoder(model_type, partial(look_up, config, where), where)
        named = config.get("architectures")
        name = str(named[0]) if isinstance(named, list) and named else ""
        bare = name.endswith("Model") and not name.endswith("LMHeadModel")
        return row.around(row.model_type, name, "", "lm_head", ()) if bare else row
    get = look_up(config, where)
    decoder = _row_of_decoder(get("model_type"), lambda: get, where)
    return decoder.around(str(model_type), around.model_class, around.stem, around.head, around.left_out)


def _row_of_decoder(model_type: Any, looked_up: Callable[[], Lookup], where: str) -> GGUFArchitecture:
    rows = [row for row in ROWS if row.model_type == model_type]
    if not rows and model_type in REFUSED:
        raise ArchitectureError(f"{where}: {model_type} models do not become GGUF files: {REFUSED[model_type]}")
    if not rows:
        raise ArchitectureError(
            f"{where}: model type {str(model_type)[:80]!r} has no place in GGUF that lowbit knows",
            f"it writes {', '.join(MODEL_TYPES)}",
        )
    if len(rows) == 1:
        return rows[0]
    get = looked_up()
    row = next((row for row in rows if row.when(get)), None)
    if row is None:
        raise ArchitectureError(f"{where}: llama.cpp computes no {model_type} model of this kind", CANNOT_RUN)
    return row


CANNOT_RUN = "llama.cpp cannot run this variant of the model"


def parse_config(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """config.json as transformers' class has it, and its text decoder's; ArchitectureError where that refuses it."""
    config = {key: value for key, value in as_transformers_has_it(config).items() if key != "quantization_config"}
    try:
        parsed = transformers_config(config)
        return parsed, parsed.get_text_config()
    except Exception as error:  # transformers' validators can raise anything
        raise ArchitectureError(f"{where}: transformers does not take config.json: {error}") from error


def look_up(config: dict[str, Any], where: str) -> Lookup:
    """A look-up in config.json, completed with the defaults and the spellings of transformers' class: in the part that
    describes the text decoder, and what that does not have, in the whole. "rope_parameters.factor" is a key in a part.
    """
    parsed, text = parse_config(config, where)

    def get(key: str) -> Any:
        first, *others = key.split(".")
        value = getattr(text, first, getattr(parsed, first, None))
        for part in others:
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        return value

    return get


def look_up_first(config: dict[str, Any], where: str) -> Lookup:
    """`look_up` of what config.json itself does not say: importing transformers takes 110 MB and a second."""
    completed: list[Lookup] = []

    def get(key: str) -> Any:
        if key in config:
            return config[key]
        if not completed:
            completed.append(look_up(config, where))
        return completed[0](key)

    return get


def row_of_file(metadata: dict[str, Any], names: Container[str], where: str) -> GGUFArchitecture:
    """The row for reading a GGUF file of these key-values and tensors; ArchitectureError if there is none."""
    arch = metadata.get("general.architecture")
    experts = metadata.get(f"{arch}.expert_count", 0) if isinstance(arch, str) else 0
    readable = [row for row in ROWS if row.read_back and row.arch == arch]
    if not readable:
        if arch == "clip":
            raise ArchitectureError(f"{where}: a vision tower (mmproj), which is no language model by itself",
                                    "name the GGUF file of the language model that it belongs to")  # fmt: skip
        known = sorted({row.arch for row in ROWS if row.read_back})
        near = difflib.get_close_matches(str(arch)[:80], known, n=3)
        raise ArchitectureError(
            f"{where}: GGUF architecture {str(arch)[:80]!r} cannot be read",
            f"use the safetensors checkpoint of the model; {len(known)} architectures can be read"
            + (f", the nearest are {', '.join(near)}" if near else "")
            + " (docs/gguf-architectures.md has the list)",
        )
    for row in readable:
        fits = all(name in names for name in row.of_tensors)
        if fits and row.stacks_experts is (type(experts) is int and experts > 0) and row.of_file(metadata):
            return row
    raise ArchitectureError(
        f"{where}: {arch} with {str(experts)[:80]} experts cannot be read from GGUF",
        "use the safetensors checkpoint of the model",
    )


def gguf_names(config: dict[str, Any], parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Hugging Face tensor name → GGUF tensor names: one, or several that share its rows. The experts of a block share.

    Names are those of lowbit's `Architecture`: experts one by one. Left out are parts that GGUF keeps in other files
    (vision) and tensors that become a number of a key-value. ArchitectureError for a model type without a row, and for
    a name that has no place in it.
    """
    row = row_of_model(config, "config.json")
    return {
        name: tuple(target.name for target in targets_of(row, name, "config.json"))
        for name in parameters
        if not row.leaves_out(name) and not row.is_scalar(name)
    }


def targets_of(row: GGUFArchitecture, parameter: str, where: str) -> tuple[RowTarget, ...]:
    """Where a parameter goes; ArchitectureError if nowhere."""
    targets = row.find(parameter)
    if not targets:
        raise ArchitectureError(
            f"{where}: {parameter!r} has no place in a GGUF file of architecture {row.arch}", CANNOT_RUN
        )
    return targets
