"""What the program itself takes, without a model: interpreter, torch, transformers where a run needs it.

    folder       rtn, into a folder
    gguf         rtn, into a GGUF file: parses a tokenizer
    calibrated   gptq, into a folder: builds the transformers model and runs it

No formula gives these, and of small models they are most of the run. Two ways:

    assumed_program    what this process holds before it opens a model, and what the run imports later (constants)
    measured_program   the peak of quantizing a model of 100 kB in a process of its own. Kept in the cache folder
                       (LOWBIT_CACHE) per installation: versions and processors. The first process of each kind fills
                       lowbit's other caches, the second is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Literal

from lowbit import __version__
from lowbit.checkpoint.gguf_folder import cache_root
from lowbit.errors import LowbitError

Kind = Literal["folder", "gguf", "calibrated"]
_SETTINGS: dict[Kind, dict[str, object]] = {
    "folder": {"scheme": "W4A16"},
    "gguf": {"scheme": "Q8_0"},
    "calibrated": {"scheme": "W4A16", "method": "gptq", "samples": 2, "seqlen": 16},
}
_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 64,
    "max_position_embeddings": 256, "dtype": "bfloat16", "tie_word_embeddings": True,
}  # fmt: skip
_RUN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import lowbit
work, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
shapes = json.loads((work / "shapes.json").read_text())
torch.manual_seed(0)
weights = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
save_file(weights, work / "model.safetensors", {"format": "pt"})
(work / "shapes.json").unlink()
output = work.parent / sys.argv[3]
print(lowbit.quantize(work, output, **settings).report.totals.peak_memory_bytes)
"""


# What a run imports later, in bytes, beside a process that has imported lowbit's pipelines: measured with transformers
# 5.23 and the processor build of torch 2.13. Less the last where transformers' models were imported before.
_LATER: dict[Kind, int] = {"folder": 15_000_000, "gguf": 95_000_000, "calibrated": 245_000_000}


class NotMeasuredError(LowbitError):
    """The measurement did not run."""


def has_models() -> bool:
    """True where this process has imported transformers' models, which a run in it would not do again."""
    return "transformers.modeling_utils" in sys.modules


def assumed_program(kind: Kind, resident: int, had_models: bool) -> int:
    """Peak resident bytes of a run whose model takes nothing.

    resident    of this process before it opened anything
    had_models  `has_models` at that time
    """
    return resident + _LATER["folder" if had_models else kind]


def measured_program(kind: Kind) -> int:
    """The same, measured now where it never was.

    Raises NotMeasuredError where a small run fails here.
    """
    path = cache_root() / "program-memory.json"
    known = _known(path)
    key = _key(kind)
    if key not in known:
        _run(kind)
        known = _known(path) | {key: _run(kind)}
        _keep(path, known)
    return known[key]


def _key(kind: Kind) -> str:
    versions = [metadata.version(name) for name in ("torch", "transformers")]
    python = ".".join(map(str, sys.version_info[:2]))
    return " ".join((kind, __version__, python, *versions, str(os.cpu_count())))


def _run(kind: Kind) -> int:
    with tempfile.TemporaryDirectory(prefix="lowbit-program-") as made:
        work = Path(made) / "model"
        work.mkdir()
        _write_model(work)
        output = "out.gguf" if kind == "gguf" else "out"
        command = [sys.executable, "-c", _RUN, str(work), json.dumps(_SETTINGS[kind]), output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = done.stdout.strip().rpartition("\n")[2]
        if done.returncode or not last.isdigit():
            said = done.stderr.strip().rpartition("\n")[2]
            raise NotMeasuredError(f"the memory of the program itself could not be measured: {said}")
        return int(last)


def _write_model(work: Path) -> None:
    """config.json, tokenizer and the shapes of a model of 100 kB. A token of it is new every time, since the tokenizer
    of a GGUF file that was seen before is not parsed again."""
    hidden = 128
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [320, hidden], "model.norm.weight": [hidden],
        **{f"{block}{name}.weight": [hidden] for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"{block}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"},
        **{f"{block}mlp.{name}_proj.weight": [hidden, hidden] for name in ("gate", "up", "down")},
    }  # fmt: skip
    letters = [chr(each) for each in _byte_letters()]
    new = f"<{Path(work).parent.name}>"
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", new, *letters])}
    added = [
        {"id": vocabulary[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for text in ("<s>", "</s>", new)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level, "truncation": None, "padding": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    files = {"shapes.json": shapes, "config.json": _CONFIG, "tokenizer.json": tokenizer, "tokenizer_config.json": about}
    for name, content in files.items():
        (work / name).write_text(json.dumps(content), encoding="utf-8")


def _byte_letters() -> list[int]:
    """Code points that stand for the bytes 0..255 in a byte-level vocabulary, as GPT-2 has them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + number for number in range(256 - len(printable))]


def _known(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if type(v) is int} if isinstance(found, dict) else {}


def _keep(path: Path, known: dict[str, int]) -> None:
    """Write beside, then rename; where that fails it is measured again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(known, file)
        os.replace(beside, path)
    except OSError:
        return
