"""The pieces that a chat template puts around messages, found by rendering it; and Ollama's template made of them.

A Jinja template is a program, and Ollama's templates are Go's. Most programs do one simple thing: they put fixed text
before and behind every message. That is found out, not parsed: conversations of known words are rendered, and what
stands between the words are the pieces.

    before rule behind | user question reply | answer … end | user question reply      with a system message
                         user question reply | answer … end | user question reply      without

The pieces are right if they render other conversations as the template does. Where they do not (dates, tools, system
messages in the last turn), there is no `ChatFormat`, and Ollama is left to what it makes of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit.errors import CheckpointError
from lowbit.text.template_limits import bounded_template

Messages = Sequence[tuple[str, str]]  # (role, content)
_RULE, _QUESTIONS, _ANSWERS = "Speak kindly", ("Why is it blue", "And at night", "Really"), ("It scatters", "It is not")


@dataclass(frozen=True)
class ChatFormat:
    """The fixed text around messages.

    before, behind   of a system message; `inside`: both stand in the first question's turn, behind `user`
    user             before a question
    reply            behind a question, up to where the model goes on
    answer           between that and an answer of an earlier turn
    end              behind such an answer
    default_system   what the template says where there is no system message; None: nothing, not even `before`
    """

    before: str
    behind: str
    inside: bool
    user: str
    reply: str
    answer: str
    end: str
    default_system: str | None = None

    def render(self, messages: Messages) -> str:
        """The prompt for the next answer, as Ollama makes it of `go_template`."""
        system = next((content for role, content in messages if role == "system"), self.default_system)
        said = "" if system is None else f"{self.before}{system}{self.behind}"
        text = "" if self.inside else said
        for role, content in messages:
            if role == "user":
                text += f"{self.user}{said if self.inside else ''}{content}{self.reply}"
                said = "" if self.inside else said
            elif role == "assistant":
                text += f"{self.answer}{content}{self.end}"
        return text

    @property
    def go_template(self) -> str:
        """For Ollama's TEMPLATE: .System, .Messages with .Role and .Content. What stands last is not ended."""
        if self.inside:
            start = "{{ $first := true }}"
            said = f"{self.before}{{{{ $.System }}}}{self.behind}"
            said = f"{{{{ if and $first $.System }}}}{said}{{{{ end }}}}{{{{ $first = false }}}}"
        else:
            start, said = f"{self.before}{{{{ .System }}}}{self.behind}", ""
            if self.default_system != "":
                start = f"{{{{ if .System }}}}{start}{{{{ end }}}}"
        ended = f"{self.answer}{{{{ .Content }}}}{self.end}"
        return (
            f'{start}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{self.user}{said}{{{{ .Content }}}}'
            f'{self.reply}{{{{ else if eq .Role "assistant" }}}}{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{ended}'
            "{{ else }}{{ .Content }}{{ end }}{{ end }}{{ end }}"
        )


def find_chat_format(template: str, bos: str, eos: str, adds_bos: bool, source: str) -> tuple[ChatFormat | None, str]:
    """(what the template does or None, why not).

    bos, eos  texts of these tokens; adds_bos: the engine puts BOS before every prompt
    source    for messages
    """
    render = _renderer(template, bos, eos, source)
    short: list[tuple[str, str]] = [("user", _QUESTIONS[0])]
    long = [*short]
    for question, answer in zip(_QUESTIONS[1:], _ANSWERS, strict=True):
        long += [("assistant", answer), ("user", question)]
    ruled = [("system", _RULE), *long]
    other = [("user", "x1"), ("assistant", "y2"), ("user", "z3")]
    try:
        texts = [render(messages) for messages in (short, long, ruled, other)]
    except CheckpointError as error:
        return None, str(error)
    prompts = [text.removeprefix(bos) if text is not None and adds_bos else text for text in texts]
    if prompts[0] is None or prompts[1] is None:
        return None, "it cannot be rendered"
    found = _pieces(prompts[0], prompts[1], prompts[2])
    cases = [pair for pair in zip((short, long, ruled, other), prompts, strict=True) if pair != (ruled, None)]
    if found is None or _unwritable(found) or any(found.render(messages) != text for messages, text in cases):
        return None, "it does more than to put fixed text around messages"
    return found, ""


def _renderer(template: str, bos: str, eos: str, source: str) -> Callable[[Messages], str | None]:
    """messages → the prompt for an answer; None where the template raises, CheckpointError where it does not end."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: Messages) -> str | None:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            with bounded_template(source):
                return render_jinja_template(
                    [conversation], chat_template=template, add_generation_prompt=True, bos_token=bos, eos_token=eos
                )[0][0]
        except CheckpointError:
            raise
        except Exception:  # a template may raise anything; most often that it knows no system messages
            return None

    return render


def _pieces(short: str, long: str, ruled: str | None) -> ChatFormat | None:
    """Of the prompts for a question, for a longer conversation, and for that with a system message."""
    words = [part for pair in zip(_QUESTIONS, (*_ANSWERS, ""), strict=True) for part in pair][:-1]
    between, alone = _between(long, words), _between(short, words[:1])
    if between is None or alone is None or not between[1].startswith(alone[1]):
        return None
    head, reply = alone
    answer, turn = between[1].removeprefix(reply), between[2]
    if turn.endswith(head) and ruled is None:  # knows no system message: it goes before the first question
        return ChatFormat("", "\n\n", True, head, reply, answer, turn.removesuffix(head))
    with_rule = None if ruled is None else _between(ruled, [_RULE, *words])
    if with_rule is None:
        return None
    before, behind = with_rule[:2]
    if turn.endswith(head) and behind.endswith(head):
        return ChatFormat(before, behind.removesuffix(head), False, head, reply, answer, turn.removesuffix(head))
    if turn.endswith(head) and before.startswith(head):
        return ChatFormat(before.removeprefix(head), behind, True, head, reply, answer, turn.removesuffix(head))
    user = _opening(behind, before)
    if user and turn.endswith(user) and head.startswith(before) and head.endswith(behind):
        said = head[len(before) : len(head) - len(behind)]  # without a system message it says something of its own
        return ChatFormat(before, behind.removesuffix(user), False, user, reply, answer, turn.removesuffix(user), said)
    return None


def _between(text: str, words: Sequence[str]) -> list[str] | None:
    """What stands before, between and behind words that occur once each, in this order."""
    pieces = []
    for word in words:
        piece, found, text = text.partition(word)
        if not found or word in text:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _opening(text: str, model: str) -> str:
    """The end of `text` that begins as `model` does: "<|im_start|>user\\n" of "<|im_end|>\\n<|im_start|>user\\n"."""
    for length in range(len(model), 1, -1):
        if model[:length] in text:
            return text[text.index(model[:length]) :]
    return ""


def _unwritable(found: ChatFormat) -> bool:
    """Pieces that Go would read as its own, or that Ollama drops."""
    pieces = (found.before, found.behind, found.user, found.reply, found.answer, found.end)
    return any("{{" in piece or piece.endswith("{") or not written(piece) for piece in pieces)


def written(text: str) -> bool:
    """Whether Ollama keeps every character: it drops what is not printable, and three quotes end a text that stand at
    the end of a line."""
    kept = all(letter.isprintable() or letter in "\n\t" for letter in text)
    return kept and not any(line.rstrip().endswith('"""') for line in text.split("\n")[:-1])
