"""Which tokens of a conversation are answers: those that an assistant's turn adds, for a loss on answers only.

    answer i = text of turns 0 … i  −  text of turns 0 … i − 1 with the prompt that opens an answer

Both are rendered by the chat template, and the whole conversation must begin with each: then the difference is what the
model itself has to write, the token that ends a turn included. A template with {% generation %} blocks says it itself.
Some templates write an earlier answer otherwise than the last (without its reasoning, say); such an answer cannot be
located, and counts for nothing. A token counts where it overlaps an answer.

    loss on    text without conversations    an answer that is not located    a conversation with no answer located
    auto       counts                        counts for nothing               counts whole
    answers    is refused                    counts for nothing               counts for nothing
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, cast

from lowbit.errors import UsageError
from lowbit.text.packing import Renderer, counted
from lowbit.text.rows import Document, Message, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Marking = Literal["auto", "answers"]
Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWERS = "assistant"


class AnswerMarker(Renderer):
    """A renderer that says of every token whether it belongs to an answer.

    split    conversations with an answer that was located
    lost     answers that were not located, in these
    whole    conversations in which none was located
    plain    documents that are no conversations
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, characters: int, marking: Marking):
        super().__init__(tokenizer, characters)
        self._marking = marking
        self.split = self.lost = self.whole = self.plain = 0

    def marked(self, document: Document) -> tuple[str, list[int], list[bool]]:
        """(text, token ids, whether each counts), the first two as `Renderer` makes them."""
        text, ids = self(document)
        if not ids:
            return text, ids, []
        others = self._marking == "auto"
        if isinstance(document, str):
            self.plain += 1
            return text, ids, [others] * len(ids)
        spans, answers = self._spans(document, text)
        counts = self._overlapping(text, ids, spans)
        if counts is None or not any(counts):
            self.whole += bool(answers)
            self.plain += not answers
            return text, ids, [others] * len(ids)
        self.split += 1
        self.lost += answers - len(spans)
        return text, ids, counts

    def notes(self) -> list[str]:
        """What rendering found, and which answers could not be located."""
        notes = super().notes()
        if self.lost:
            count, them = ("counts", "it") if self.lost == 1 else ("count", "them")
            notes.append(f"{counted(self.lost, 'answer')} {count} for nothing in the loss: the chat template writes "
                         f"{them} otherwise once the conversation goes on")  # fmt: skip
        if self.whole:
            count = "all of their tokens count" if self._marking == "auto" else "nothing of them counts in the loss"
            notes.append(f"the answers of {counted(self.whole, 'conversation')} could not be located in the chat "
                         f"template's text: {count}")  # fmt: skip
        return notes

    def _spans(self, document: list[Message], text: str) -> tuple[list[Span], int]:
        """(where answers lie in the text, in characters; how many answers there are)."""
        answers = [index for index, message in enumerate(document) if message["role"] == _ANSWERS]
        if not self._has_template:
            return self._joined_spans(document), len(answers)
        messages, template = self._messages_of(document), str(self._tokenizer.get_chat_template())
        if _GENERATION.search(template):
            return self._generated_spans(messages, template, text), len(answers)
        found: list[Span] = []
        for index in answers:
            try:
                before = self._apply_template(messages[:index], add_generation_prompt=True) if index else ""
                opened = before != (self._apply_template(messages[:index]) if index else "")
                after = text if index + 1 == len(messages) else self._apply_template(messages[: index + 1])
            except Exception:  # a template may raise anything: it refuses a conversation that ends there
                continue
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                continue
            start = len(before)
            if not opened:  # the template writes the role of the turn by itself, which is no part of the answer
                place = text.find(texts_of(document[index])[0].strip(), start, len(after))
                start = place if place > start else start
            found.append((start, len(after)))
        return found, len(answers)

    def _joined_spans(self, document: list[Message]) -> list[Span]:
        """Of turns that are joined by blank lines; the last one ends with the document."""
        found: list[Span] = []
        position = 0
        for message in document:
            said = texts_of(message)[0]
            if not said:
                continue
            if message["role"] == _ANSWERS:
                found.append((position, position + len(said) + 2))
            position += len(said) + 2
        return found

    def _generated_spans(self, messages: list[Message], template: str, text: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        with self._bounded():
            rendered, spans = render([messages], chat_template=self._dated(template), return_assistant_tokens_mask=True,
                                     **self._tokenizer.special_tokens_map)  # fmt: skip
        return [(int(first), int(last)) for first, last in spans[0]] if rendered[0] == text else []

    def _overlapping(self, text: str, ids: list[int], spans: list[Span]) -> list[bool] | None:
        """Whether each token overlaps a span; None for a tokenizer that does not say where its tokens lie."""
        tokenizer = self._tokenizer
        if not spans or not tokenizer.is_fast:
            return None
        suffix = "" if self._has_template or self._bos else "\n\n"
        encoded = tokenizer(text.rstrip("\n") + suffix if suffix else text, add_special_tokens=False, verbose=False,
                            return_offsets_mapping=True)  # fmt: skip
        places = cast("list[Span]", encoded["offset_mapping"])
        counts = [any(first < end and last > start for start, end in spans) for first, last in places]
        lead = len(ids) - len(counts) - (0 if self._has_template else len(self._eos))
        if lead < 0:
            return None
        closing = [bool(counts) and counts[-1]] * (len(ids) - lead - len(counts))
        return [False] * lead + counts + closing


def parse_loss_on(value: str | None) -> Literal["auto", "answers", "all"]:
    """`--loss-on`: answers, all, or None for what the data are."""
    if value is None:
        return "auto"
    if value not in ("answers", "all"):
        raise UsageError(f"a loss is not taken on {value!r}", "give answers or all")
    return cast('Literal["answers", "all"]', value)
