"""A server of chat completions that answers by a function, for models and for judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from local_servers import JsonHandler, listening

# body → a reply, or (reply, HTTP status)
Say = Callable[[dict[str, Any]], Any]


@contextmanager
def chatting(
    say: Say, names: tuple[str, ...] = ("tiny",), chat: bool = True, owner: str = "somebody"
) -> Iterator[tuple[str, list[dict]]]:
    """(address, bodies that were posted). chat: False for a server that refuses messages, as of a base model"""
    asked: list[dict[str, Any]] = []

    class Handler(JsonHandler):
        def do_GET(self):
            self.send_json({"data": [{"id": name, "owned_by": owner} for name in names]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
            if "messages" in body and not chat:
                return self.send_json({"error": "no chat template"}, 400)
            said = say(body)
            if isinstance(said, tuple):
                return self.send_json({"error": said[0]}, said[1])
            words = {"message": {"content": said}} if "messages" in body else {"text": said}
            return self.send_json({"choices": [words | {"finish_reason": "stop"}]})

    with listening(Handler) as address:
        yield address, asked


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]
