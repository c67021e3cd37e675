"""Documents and conversations as one stream of tokens, cut into windows, so that nothing is padded.

    stream    a document       tokenizer that adds BOS:  [BOS] text [EOS]       any other:  text, blank line
              a conversation   the chat template's text, behind [BOS] where the tokenizer adds one and the template none
    window i  the next window_tokens of the stream; where the tokenizer adds BOS: BOS and the next window_tokens − 1,
              and a BOS of the stream that would come second is dropped

The template gets the text of a turn where it takes text, or a list of parts where it wants that; parts that are no text
are dropped and counted. Tool calls and reasoning go to the template as they are: it decides what it shows.

Documents are tokenized one by one, without other special tokens. Attention crosses documents inside a window, as in the
packing of pre-training. Without a chat template the turns of a conversation are joined by blank lines. Templates that
write today's date get a fixed one. Conversations that the template refuses are skipped and counted (many templates
require user and assistant to alternate).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from lowbit.text.rows import Document, Message, texts_of
from lowbit.text.template_limits import bounded_template
from lowbit.text.windows import wants_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put before templates that write today's date, so that the same run makes the same text on another day. A macro, since
# transformers hands no functions on to templates; the plus sign keeps a line break that the template begins with.
FIXED_DATE = "{% macro strftime_now(format) -%}01 Jan 2025{%- endmacro +%}"


class Renderer:
    """Documents as (text, token ids with what separates documents).

    characters  limit per plain document
    refused     conversations that the chat template refused
    no_text     parts of turns that are no text (pictures, sounds), which were dropped
    silent      turns without text, which call tools
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, characters: int):
        self._characters = characters
        self._tokenizer = tokenizer
        self._bos = opening_bos(tokenizer)
        eos = cast("int | None", tokenizer.eos_token_id)
        self._eos = [eos] if self._bos and eos is not None else []
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self.refused = self._templated = self._joined = self.no_text = self.silent = 0
        self._refusal = ""

    def __call__(self, document: Document) -> tuple[str, list[int]]:
        """("", []) for a conversation that the chat template refuses."""
        if isinstance(document, str):
            return self._plain(document[: self._characters])
        if not self._has_template:
            self._joined += 1
            return self._plain("\n\n".join(filter(None, (texts_of(message)[0] for message in document))))
        self.no_text += sum(texts_of(message)[1] for message in document)
        self.silent += sum(not texts_of(message)[0] for message in document)
        try:
            text = self._rendered(document)
        except Exception as error:  # a template is a program of the model's authors and may raise anything
            self.refused += 1
            self._refusal = self._refusal or str(error).strip().split("\n")[0]
            return "", []
        self._templated += 1
        ids = self._ids(text)
        return text, ids if ids[:1] == self._bos else self._bos + ids

    def notes(self) -> list[str]:
        notes = []
        if self._templated:
            notes.append(f"chat template applied to {counted(self._templated, 'conversation')}")
        if self.no_text:
            are = "it is" if self.no_text == 1 else "they are"
            notes.append(f"{counted(self.no_text, 'part')} of turns dropped: {are} no text")
        if self.silent:
            notes.append(f"{counted(self.silent, 'turn')} without text, which call{'s' * (self.silent == 1)} tools")
        if self._joined:
            notes.append(
                f"the tokenizer has no chat template: the turns of {counted(self._joined, 'conversation')} are joined "
                f"by blank lines"
            )
        if self.refused:
            notes.append(
                f"{counted(self.refused, 'conversation')} passed over: the chat template refuses "
                f"{'it' if self.refused == 1 else 'them'} ({self._refusal})"
            )
        return notes

    def _plain(self, text: str) -> tuple[str, list[int]]:
        text = encodable(text)
        if self._bos:
            return text, [*self._bos, *self._ids(text), *self._eos]
        return text, self._ids(text.rstrip("\n") + "\n\n")

    def _rendered(self, document: list[Message]) -> str:
        """The template's text. Some templates take the arguments of a tool call as text, others as an object."""
        messages = [message | {"content": self._content(message)} for message in document]
        try:
            return self._apply_template(messages)
        except Exception:  # as in __call__
            if not any(message.get("tool_calls") for message in messages):
                raise
            return self._apply_template([_with_parsed_arguments(message) for message in messages])

    def _messages_of(self, document: list[Message]) -> list[Message]:
        """The turns of a conversation that was rendered, as its template took them."""
        messages = [message | {"content": self._content(message)} for message in document]
        if any(message.get("tool_calls") for message in messages):
            try:
                self._apply_template(messages)
            except Exception:  # as in __call__
                return [_with_parsed_arguments(message) for message in messages]
        return messages

    def _content(self, message: Message) -> Any:
        text = texts_of(message)[0]
        return [{"type": "text", "text": text}] if self._wants_parts and text else text

    @cached_property
    def _wants_parts(self) -> bool:
        """True for a template that shows the text of parts, and not that of a plain string."""
        probe = "lowbit"
        shown = []
        for content in (probe, [{"type": "text", "text": probe}]):
            try:
                shown.append(probe in self._apply_template([{"role": "user", "content": content}]))
            except Exception:  # as in __call__
                shown.append(False)
        return shown == [False, True]

    def _apply_template(self, messages: list[Message], **more: Any) -> str:
        apply: Callable[..., Any] = self._tokenizer.apply_chat_template
        template = self._dated(str(self._tokenizer.get_chat_template()))
        with self._bounded():
            return encodable(apply(messages, tokenize=False, chat_template=template, **more))

    def _dated(self, template: str) -> str:
        return FIXED_DATE + template if "strftime_now" in template else template

    def _bounded(self) -> AbstractContextManager[None]:
        return bounded_template(str(getattr(self._tokenizer, "name_or_path", "the model")))

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _with_parsed_arguments(message: Message) -> Message:
    """The same turn with the arguments of its tool calls as objects."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):
                call = call | {"function": function | {"arguments": json.loads(function["arguments"])}}
        calls.append(call)
    return message | {"tool_calls": calls}


class Packer:
    """The stream of all documents' tokens, and the windows cut from it so far.

    step    tokens of the stream in a window
    counts  of each window, whether its tokens count in a loss; BOS counts for nothing
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int):
        self._bos = opening_bos(tokenizer)
        self._windows = windows
        self.step = window_tokens - len(self._bos)
        self.stream: list[int] = []
        self.cut: list[list[int]] = []
        self.counts: list[list[bool]] = []
        self._counted: list[bool] = []
        self._at = 0

    def add(self, ids: list[int], counted: list[bool] | None = None) -> None:
        """Append a document; `counted` says of each token whether it counts, None: all do."""
        self.stream += ids
        self._counted += [True] * len(ids) if counted is None else counted
        while len(self.cut) < self._windows:
            start = self._at
            if self._bos and self.stream[start : start + 1] == self._bos:
                start += 1
            if len(self.stream) - start < self.step:
                return
            self.cut.append(self._bos + self.stream[start : start + self.step])
            self.counts.append([False] * len(self._bos) + self._counted[start : start + self.step])
            self._at = start + self.step


def opening_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer itself adds it, [] for any other."""
    return [cast(int, tokenizer.bos_token_id)] if wants_bos(tokenizer, "auto") else []


def spaced(number: int) -> str:
    """12 345"""
    return f"{number:,}".replace(",", " ")


def counted(number: int, what: str) -> str:
    """1 row, 12 345 rows"""
    return f"{spaced(number)} {what}{'s' * (number != 1)}"


def encodable(text: str) -> str:
    """Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
