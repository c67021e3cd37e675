"""`--modelfile`: what Ollama needs beside a GGUF file, made of the file's own key-values.

    FROM ./model-Q4_K_M.gguf       one line for each part of a split model
    TEMPLATE, SYSTEM               `chat_format.py`
    PARAMETER stop …               the tokens that end an answer
    PARAMETER temperature …        general.sampling.*
    PARAMETER num_ctx              at most _CONTEXT, and no more than the model was trained on
    LICENSE                        LICENSE of the folder, or what the file says of it

A value is one line, or any text between triple quotes; there is no escape. Quotes end at a line that ends with three of
them; Ollama drops characters that are not printable. What cannot be written so is left out with a note.

Spec: parser/parser.go and docs of ollama/ollama, as of November 2026.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import Keys, TokenType

from lowbit.checkpoint.companions import leads_out
from lowbit.errors import UsageError
from lowbit.formats.gguf.chat_format import find_chat_format, written
from lowbit.formats.gguf.keys import shortest

NAME = "Modelfile"
_CONTEXT = 8192  # tokens; a cache for as many fits beside a model on most machines
_LICENSE_BYTES = 1 << 18
_STOPS = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
# Key of the GGUF file → Ollama's parameter, of which there are fewer
_PARAMETERS = {
    Keys.General.SAMPLING_TEMP: "temperature", Keys.General.SAMPLING_TOP_K: "top_k",
    Keys.General.SAMPLING_TOP_P: "top_p", Keys.General.SAMPLING_MIN_P: "min_p",
    Keys.General.SAMPLING_PENALTY_REPEAT: "repeat_penalty", Keys.General.SAMPLING_PENALTY_LAST_N: "repeat_last_n",
}  # fmt: skip


@dataclass(frozen=True)
class Modelfile:
    """A Modelfile without its FROM lines, which need the names of the files."""

    body: str
    notes: tuple[str, ...]

    def text(self, parts: Iterable[str]) -> str:
        """parts  names of the GGUF files beside it"""
        lines = [f"FROM {_quoted(f'./{part}')}\n" for part in parts]
        split = ["# Ollama reads split files since 0.35.0; older versions need one file.\n"] if len(lines) > 1 else []
        return "".join((*split, *lines, self.body))


def make_modelfile(
    values: Mapping[str, Any], source: str, folder: Path | None = None, ends: Iterable[int] = ()
) -> Modelfile:
    """The Modelfile of a GGUF file.

    values  its key-values
    source  for messages
    folder  of the model, for its LICENSE
    ends    ids of more tokens that end an answer (generation_config.json)
    """
    lines: list[str] = []
    notes: list[str] = []
    template, system = _template(values, source, notes)
    for command, text in (("TEMPLATE", template), ("SYSTEM", system)):
        if text:
            lines.append(f"{command} {_quoted(text)}")
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(values, ends, notes)]
    for key, name in _PARAMETERS.items():
        value = values.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            lines.append(f"PARAMETER {name} {shortest(value) if isinstance(value, float) else value}")
    context = values.get(f"{values.get(Keys.General.ARCHITECTURE)}.context_length")
    if isinstance(context, int) and context > 0:
        lines.append(f"# The model was trained on up to {context} tokens; more context takes more memory.")
        lines.append(f"PARAMETER num_ctx {min(context, _CONTEXT)}")
    said = _license(values, folder, notes)
    if said:
        lines.append(f"LICENSE {_quoted(said)}")
    return Modelfile("".join(f"{line}\n" for line in lines), tuple(notes))


def refuse_unwritable_name(output: Path) -> None:
    """UsageError where FROM cannot name the file."""
    if not written(output.name) or "\n" in output.name or "\t" in output.name:
        raise UsageError(f"{str(output)!r}: a Modelfile cannot name this file", "choose a name of printable characters")


def _template(values: Mapping[str, Any], source: str, notes: list[str]) -> tuple[str, str]:
    """(TEMPLATE, SYSTEM); "" for none."""
    template = values.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if not isinstance(template, str) or not template:
        return "", ""
    tokens = values.get(Keys.Tokenizer.LIST)
    bos, eos = (_token(tokens, values.get(key)) for key in (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID))
    adds_bos = bool(values.get(Keys.Tokenizer.ADD_BOS))
    found, why = find_chat_format(template, bos, eos, adds_bos, source)
    if found is None:
        notes.append(
            f"the Modelfile has no TEMPLATE, since the chat template cannot be said in Go's ({why}); Ollama takes the "
            f"one of its own that is most like it, or none"
        )
        return "", ""
    if "tools" in template:
        notes.append("TEMPLATE of the Modelfile has no tool calls, which the chat template has")
    if "strftime" in template:
        notes.append("the chat template asks for the date; the Modelfile has that of today")
    system = found.default_system or ""
    if system and not written(system):
        notes.append("the Modelfile has no SYSTEM: Ollama's quotes cannot hold what the chat template says by default")
        system = ""
    return found.go_template, system


def _stops(values: Mapping[str, Any], ends: Iterable[int], notes: list[str]) -> list[str]:
    """Texts of the special tokens that end an answer."""
    tokens, types = values.get(Keys.Tokenizer.LIST), values.get(Keys.Tokenizer.TOKEN_TYPE)
    normal = str(int(TokenType.NORMAL))
    found: list[str] = []
    for token_id in (*(values.get(key) for key in _STOPS), *ends):
        text = _token(tokens, token_id)
        if text and _token(types, token_id) != normal and written(text) and "\n" not in text:
            found.append(text)
        elif text:
            notes.append(f"the Modelfile does not have {text!r} as a stop: it is no text that Ollama could look for")
    return list(dict.fromkeys(found))


def _token(tokens: Any, token_id: Any) -> str:
    """An entry of a list of the tokenizer, as text; "" where there is none."""
    known = isinstance(token_id, int) and hasattr(tokens, "__len__") and 0 <= token_id < len(tokens)
    return str(tokens[token_id]) if known else ""


def _license(values: Mapping[str, Any], folder: Path | None, notes: list[str]) -> str:
    """The text of a LICENSE file, or what general.license says."""
    for path in sorted(folder.glob("LICENSE*")) if folder is not None else ():
        if path.is_file() and leads_out(path, folder or path) is None:
            with path.open("rb") as file:
                content = file.read(_LICENSE_BYTES + 1)
            text = content.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\f", "").strip("\ufeff\n")
            kept = "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)
            if len(content) <= _LICENSE_BYTES and written(kept) and kept:
                return kept
            notes.append(f"{path.name} is not in the Modelfile: it is empty, too long, or has quotes that would end it")
            break
    named = [values.get(key) for key in (Keys.General.LICENSE, Keys.General.LICENSE_NAME, Keys.General.LICENSE_LINK)]
    text = ", ".join(text for text in named if isinstance(text, str) and text)
    return text if written(text) and "\n" not in text else ""


def _quoted(text: str) -> str:
    """As it is, where one line of it stands for itself; else in triple quotes."""
    bare = "\n" not in text and text == text.strip() and not text.startswith('"')
    return text if bare else f'"""{text}"""'
