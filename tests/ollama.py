"""Ollama's side of a Modelfile, as far as ours go: its parser's rules, and Go's templates."""

from __future__ import annotations

import re
from typing import Any


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """(command, value) in order; of PARAMETER the command is its name. By the rules of parser/parser.go.

    A value ends with a line at whose end no quote is open. Characters that are not printable are dropped.
    """
    found, lines = [], iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        command, _, value = line.partition(" ")
        assert command.lower() in ("from", "template", "system", "parameter", "license"), line
        if command == "PARAMETER":
            command, _, value = value.partition(" ")
            assert re.fullmatch("[a-zA-Z0-9_]+", command)
        while (inner := unquoted(value.strip())) is None:
            value += "\n" + next(lines)
        kept = "".join(letter for letter in inner if letter.isprintable() or letter in "\n\t")
        found.append((command, kept))
    assert any(command == "FROM" for command, _ in found)
    return found


def unquoted(text: str) -> str | None:
    """None where a quote is still open."""
    for quote in ('"""', '"'):
        if text.startswith(quote):
            closed = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if closed else None
    return text


def render_go(template: str, messages: list[dict[str, str]], system: str = "") -> str:
    """The subset of text/template that our templates use. Ollama takes system messages out of the conversation too."""
    said = "\n\n".join(m["content"] for m in messages if m["role"] == "system") or system
    tokens = re.split(r"(\{\{.*?\}\})", template)
    tree, rest = _parsed(tokens)
    assert not rest
    names: dict[str, Any] = {"$": {"System": said, "Messages": messages}}
    return _run(tree, names["$"], names)


def _parsed(tokens: list[str]) -> tuple[list[Any], list[str]]:
    """Nodes up to `end` or `else`: texts, ("do", action), ("if", [(condition or None, nodes)]), ("range", nodes)."""
    nodes: list[Any] = []
    while tokens:
        token, *tokens = tokens
        action = token[2:-2].strip() if token.startswith("{{") else None
        if action is None:
            nodes.append(token)
        elif action == "end" or action.startswith("else"):
            return nodes, [token, *tokens]
        elif action.startswith("range "):
            assert action == "range $i, $_ := .Messages"
            inside, tokens = _parsed(tokens)
            nodes.append(("range", inside))
            tokens = tokens[1:]
        elif action.startswith("if "):
            branches, condition = [], action.removeprefix("if ")
            while True:
                inside, tokens = _parsed(tokens)
                branches.append((condition, inside))
                following = tokens[0][2:-2].strip()
                tokens = tokens[1:]
                if following == "end":
                    break
                condition = following.removeprefix("else").strip().removeprefix("if ") or None
            nodes.append(("if", branches))
        else:
            nodes.append(("do", action))
    return nodes, []


def _run(nodes: list[Any], dot: dict[str, Any], names: dict[str, Any]) -> str:
    text = ""
    for node in nodes:
        if isinstance(node, str):
            text += node
        elif node[0] == "range":
            for index, message in enumerate(names["$"]["Messages"]):
                names["$i"] = index
                text += _run(node[1], {"Role": message["role"], "Content": message["content"]}, names)
        elif node[0] == "if":
            chosen = next(
                (inside for condition, inside in node[1] if condition is None or _value(condition, dot, names)), []
            )
            text += _run(chosen, dot, names)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (true|false)", node[1]):
            names[assigned[1]] = assigned[2] == "true"
        else:
            text += _value(node[1], dot, names)
    return text


def _value(expression: str, dot: dict[str, Any], names: dict[str, Any]) -> Any:
    if compared := re.fullmatch(r'eq \.Role "(\w+)"', expression):
        return dot["Role"] == compared[1]
    if expression == "gt (len (slice $.Messages $i)) 1":
        return len(names["$"]["Messages"][names["$i"] :]) > 1
    if expression.startswith("and "):
        return all(_value(each, dot, names) for each in expression.split()[1:])
    if expression.startswith("$."):
        return names["$"][expression[2:]]
    return names[expression] if expression.startswith("$") else dot[expression[1:]]
