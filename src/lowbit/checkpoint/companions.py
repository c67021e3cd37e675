"""The files beside the weights: tokenizer, generation config, chat templates, licence, custom code.

    check_companions    before any work: a damaged one is refused by its name, and notes say what will not be copied
    find_companions     which of them belong into an output
    gather_companions   those of a base and its adapter, in one folder
    token_without_row   a token whose id lies beyond the embedding

Links are followed within the model's folder and into the blobs of a Hugging Face cache, nowhere else: what a link of a
downloaded folder points to may be anything on this machine. Sub-folders of configs and templates are copied
(`additional_chat_templates`, `1_Pooling`), those of weights and of training are not. An adapter's config is not: beside
an output, transformers would look for the adapter.

The values that transformers, engines and lowbit compute with are checked by type too: transformers takes any JSON and
fails on first use, and a number that is a string raises TypeError in the middle of a run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.base import REPORT_NAME, read_json_object, refuse_half_pairs
from lowbit.errors import CheckpointError
from lowbit.files.regular import kind_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "tiktoken.model")
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Read as JSON objects by transformers and by engines.
OBJECTS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.json", "vocab.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
# What training may change of a tokenizer.
_OF_TOKENIZER = {
    *TOKENIZERS, *CHAT_TEMPLATES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "vocab.txt", "additional_chat_templates",
}  # fmt: skip
_NEEDED = {*OBJECTS, *TOKENIZERS, *CHAT_TEMPLATES, "merges.txt", "vocab.txt"}
_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".vocab", ".spm"}
# Rewritten, or of an earlier quantization or an adapter, which would contradict config.json.
_LEFT = {"config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", ADAPTER, REPORT_NAME}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".npz"}
_TRAINING = re.compile(r"(checkpoint|global_step|runs?|logs?|wandb|original)([-_]?\d+)?$")
_GENERATION = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")
# Tokens that a processor replaces by what a picture or a sound shows; no row of the embedding is looked up.
_PLACEHOLDER = re.compile(r"image|audio|video|vision", re.IGNORECASE)


def check_companions(folder: Path, source: str) -> list[str]:
    """Notes on what an output will lack. CheckpointError for a file that a loader would stumble over.

    source  what the user typed, for notes
    """
    stated: dict[str, dict[str, Any]] = {}
    for name in sorted(_NEEDED):
        path = folder / name
        refuse_odd_file(path)
        if path.exists() and name in OBJECTS:
            stated[name] = read_json_object(path)
            check_types(path, stated[name])
            if name not in TOKENIZERS:  # those that load hold none
                refuse_half_pairs(path, stated[name])
        elif path.suffix == ".txt" and path.exists():
            _utf8(path)
    load_tokenizer_file(folder)
    notes = passed_over(folder) + broken_templates(folder, stated)
    if not has_tokenizer(folder):
        notes.append(f"there is no tokenizer in {source}; engines will ask for one")
    return notes + adapter_beside(folder, source)


def refuse_odd_file(path: Path) -> None:
    """CheckpointError for a name that is there and no file to be read; a file that is absent is none."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: a link to {os.readlink(path)}, which is not there", _MEND)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is {kind_of(path.stat().st_mode)}, and a file is needed", _MEND)
    if path.exists() and not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read (permission denied)", "make it readable")


def broken_templates(folder: Path, stated: dict[str, dict[str, Any]]) -> list[str]:
    """A note on each chat template that is no Jinja template; all else works without it.

    stated  name → content of the folder's JSON files
    """
    return [
        f"{where}: the chat template does not compile ({error}); it is taken as it is, and no chat can be rendered"
        for where, template in _templates(folder, stated)
        if (error := _syntax_error(template))
    ]


def _templates(folder: Path, stated: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(place, text) of every chat template, wherever transformers looks for one."""
    for path in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        if path.is_file() and leads_out(path, folder) is None:
            yield str(path.relative_to(folder)), _utf8(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = stated.get(name, {}).get("chat_template")
        for one in found if isinstance(found, list) else [{"template": found}]:
            template = one.get("template") if isinstance(one, dict) else None
            if isinstance(template, str):
                yield name, template


def _utf8(path: Path) -> str:
    """The text of a companion. CheckpointError if it is not UTF-8, which no loader takes."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error})", _MEND) from error


def _syntax_error(template: str) -> str | None:
    """What Jinja says of it, with the line. Nothing of it is run."""
    from jinja2 import Environment, TemplateSyntaxError

    known = _GENERATION.sub("", template)  # a tag of transformers
    try:
        Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]).parse(known)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except RecursionError:
        return "nested too deeply"
    return None


def adapter_beside(folder: Path, source: str) -> list[str]:
    """A note on an adapter in the model's folder."""
    if not (folder / ADAPTER).is_file():
        return []
    way = f"--adapter {source} merges it" if _is_lora(folder) else "merge it first (peft: merge_and_unload)"
    return [f"{adapter_kind(folder)} lies beside the model and is not in the result; to have it there, {way}"]


_MEND = "copy it from the original model, or download it again"


def refuse_lone_adapter(folder: Path, source: str) -> None:
    """CheckpointError for a folder that holds an adapter of PEFT and no model."""
    if is_lone_adapter(folder):
        base = _stated_base(folder)
        hint = (
            f"merge it first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {source!r})"
            f".merge_and_unload().save_pretrained(FOLDER), copy the tokenizer, and give that FOLDER"
        )
        if _is_lora(folder):
            merge = f"lowbit quantize {base or 'MODEL'} -o OUT --adapter {source}"
            hint = f"merge it into that model as it is quantized: {merge}"
            if _is_quantized(base):
                hint = (
                    "its base is quantized: let PEFT or an engine load the two, or merge it into the 16-bit model that "
                    f"{base} was made of: lowbit quantize MODEL -o OUT --adapter {source}"
                )
        raise CheckpointError(f"{source}: this is {adapter_kind(folder)}, not a model", hint)


def is_lone_adapter(folder: Path) -> bool:
    """True for a folder that holds an adapter of PEFT and no model."""
    if not (folder / ADAPTER).is_file():
        return False
    weights = [path.name for path in folder.iterdir() if path.suffix in _WEIGHTS]
    return all(name.startswith(("adapter_", "training_args", "optimizer", "scheduler", "rng_state"))
               for name in weights)  # fmt: skip


def _stated_base(folder: Path) -> str | None:
    stated = read_json_object(folder / ADAPTER).get("base_model_name_or_path")
    return str(stated) if stated else None


def _is_quantized(base: str | None) -> bool:
    """True where the base lies on this machine and has codes."""
    if base is None or base.endswith(".gguf"):
        return base is not None
    config = Path(base) / "config.json"
    return config.is_file() and "quantization_config" in read_json_object(config)


def _is_lora(folder: Path) -> bool:
    return str(read_json_object(folder / ADAPTER).get("peft_type")).upper() == "LORA"


def adapter_kind(folder: Path) -> str:
    """ "a LoRA adapter of org/base" """
    kind = str(read_json_object(folder / ADAPTER).get("peft_type") or "PEFT")
    kind = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr"}.get(kind, kind)
    base = _stated_base(folder) or "a model that it does not name"
    return f"{'an' if kind[0] in 'AEIO' else 'a'} {kind} adapter of {base}"


def has_tokenizer(folder: Path) -> bool:
    """True if a file of a tokenizer is there that may be read."""
    return any((folder / name).is_file() and leads_out(folder / name, folder) is None for name in TOKENIZERS)


def code_of_tokenizer(folder: Path) -> str | None:
    """The class that alone says how text is cut by tiktoken.model, in Python code that comes with the model; None for
    other tokenizers. Without it transformers would cut text by another rule, or not at all."""
    if not (folder / "tiktoken.model").is_file() or (folder / "tokenizer.json").is_file():
        return None
    path = folder / "tokenizer_config.json"
    code = (read_json_object(path) if path.is_file() else {}).get("auto_map")
    named = code.get("AutoTokenizer") if isinstance(code, dict) else code
    classes = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    return classes[0] if classes else None


def load_tokenizer_file(folder: Path) -> Tokenizer | None:
    """tokenizer.json as the tokenizers library has it; None without one. CheckpointError where it does not load."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    state = path.stat()
    return _loaded_tokenizer(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)
def _loaded_tokenizer(path: Path, changed: int, size: int) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: does not load as a tokenizer ({error})", _MEND) from error


def token_without_row(folder: Path, rows: int) -> tuple[str, int] | None:
    """(text, id) of the first token that has no row in an embedding of `rows` rows; None if all have one."""
    beyond = {text: token_id for text, token_id in _tokens(folder).items()
              if token_id >= rows and not _PLACEHOLDER.search(text)}  # fmt: skip
    return min(beyond.items(), key=lambda item: item[1], default=None)


def beyond_embedding(folder: Path, rows: int) -> str | None:
    """`token_without_row` as a sentence."""
    found = token_without_row(folder, rows)
    return None if found is None else f"token {found[0]!r} has id {found[1]}, and the embedding {rows} rows"


def _tokens(folder: Path) -> dict[str, int]:
    """Text → id, as tokenizer.json has it, or the files of slow tokenizers."""
    loaded = load_tokenizer_file(folder)
    if loaded is not None:
        return loaded.get_vocab(with_added_tokens=True)
    tokens: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            tokens |= {text: value for text, value in read_json_object(folder / name).items() if type(value) is int}
    return tokens


def find_companions(folder: Path) -> list[Path]:
    """Paths, relative to the model's folder, of the files to copy into an output."""
    return [path.relative_to(folder) for path, why in _candidates(folder) if why is None]


def passed_over(folder: Path) -> list[str]:
    """Notes on files beside the weights that are not copied."""
    return [f"not copied: {path.relative_to(folder).as_posix()}, {why}"
            for path, why in _candidates(folder) if why is not None]  # fmt: skip


def gather_companions(base: Path, adapter: Path, into: Path) -> list[str]:
    """Copy config.json and the companions of a base model; the adapter's tokenizer files and chat templates go before
    the base's. Returns the names of those that the adapter gave."""

    def copy(folder: Path, path: Path) -> None:
        (into / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, into / path)

    for path in (Path("config.json"), *find_companions(base)):
        copy(base, path)
    given = [path for path in find_companions(adapter) if path.parts[0] in _OF_TOKENIZER]
    for path in given:
        copy(adapter, path)
    return [path.as_posix() for path in given]


def _candidates(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(file that could be copied, why it is not or None), of the folder and its sub-folders."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inside = leads_out(path, folder) is None and not path.name.startswith((".", "_"))
            if inside and not _TRAINING.match(path.name) and not any(p.suffix in _WEIGHTS for p in path.iterdir()):
                for file in sorted(path.iterdir()):
                    if file.suffix.lower() in _SUFFIXES and not file.is_dir():
                        yield file, _unfit(file, folder)
            continue
        if is_companion(path) and path.name not in _LEFT and not path.name.endswith(".index.json"):
            yield path, _unfit(path, folder)


def is_companion(path: Path) -> bool:
    """True for a file of the kinds that lie beside weights."""
    return path.suffix.lower() in _SUFFIXES or path.name.upper().startswith(("LICENSE", "NOTICE"))


def _unfit(path: Path, folder: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is not there"
    if not path.is_file():
        return "no regular file"
    return leads_out(path, folder) or (None if os.access(path, os.R_OK) else "which cannot be read")


def leads_out(path: Path, folder: Path) -> str | None:
    """Why a link is not followed: it leads out of the model's folder, and not into a Hugging Face cache."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(home):
        return None
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return None if in_cache else f"a link out of the folder, to {target}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


_IDS = (lambda v: _is_id(v) or (isinstance(v, list) and v and all(map(_is_id, v))), "a token id, or a list of them")
_ID = (_is_id, "a token id")
_NUMBER = (_is_number, "a number")
_COUNT = (_is_id, "a whole number")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_TEXT = (lambda v: isinstance(v, str), "a text")
_TOKEN = (_is_token, "a token")
_SIDE = (lambda v: v in ("left", "right"), "left or right")

# File → key → what its value must be; null, or no such key, is right everywhere.
_TYPES = {
    "generation_config.json": {
        **dict.fromkeys(("eos_token_id",), _IDS),
        **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), _ID),
        **dict.fromkeys(
            ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
             "length_penalty", "encoder_repetition_penalty"), _NUMBER,
        ),
        **dict.fromkeys(
            ("top_k", "num_beams", "max_length", "min_length", "max_new_tokens", "min_new_tokens",
             "num_return_sequences", "no_repeat_ngram_size"), _COUNT,
        ),
        **dict.fromkeys(("do_sample", "use_cache", "output_attentions", "output_hidden_states"), _FLAG),
    },
    "tokenizer_config.json": {
        "model_max_length": _NUMBER,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
                        _TOKEN),
        **dict.fromkeys(("tokenizer_class", "name_or_path"), _TEXT),
        **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces",
                         "split_special_tokens"), _FLAG),
    },
}  # fmt: skip


def check_types(path: Path, document: dict[str, Any]) -> None:
    """CheckpointError for a value that no loader can compute with."""
    for key, (is_right, wanted) in _TYPES.get(path.name, {}).items():
        value = document.get(key)
        if value is not None and not is_right(value):
            raise CheckpointError(
                f"{path}: {key} is {str(value)[:60]!r}; {wanted} is needed", "mend the file, or download it again"
            )
