"""A server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, Ollama, or a service.

    http://localhost:8000            the first model that it lists
    http://localhost:11434#qwen3:4b  the model of that name

`LOWBIT_API_KEY` of the environment is sent as a bearer token, to the address asked and not where it redirects to.

Refused: an address that is no http(s) URL (UsageError), a server that cannot be asked or answers no JSON object
(EngineFailure), one that answers with an error (EndpointRefusal, with the status).
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import Any

from lowbit.errors import EngineFailure, UsageError

KEY = "LOWBIT_API_KEY"
_TIMEOUT = 600  # seconds, of a silence and of an answer
_LARGEST = 64 * 2**20  # bytes of an answer; no model writes as much


_HINTS = {
    401: f"set {KEY} to its key",
    403: f"set {KEY} to its key",
    404: "start the server with this model, and under this name",
    429: "too many requests: wait, and run the same command again",
}
_TOO_LONG = ("context", "too long", "maximum length")  # what servers say of a prompt that they cannot hold


class EndpointRefusal(EngineFailure):
    """The server answered with an HTTP error.

    status  its number
    """

    def __init__(self, message: str, hint: str, status: int):
        super().__init__(message, hint)
        self.status = status


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


class Endpoint:
    """A model behind an address; `name` is what the server calls it ("" where it lists none)."""

    def __init__(self, address: str, name: str | None = None):
        url, _, named = address.partition("#")
        if not is_url(url):
            raise UsageError(f"{address!r} is no address of a server", "write it as http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        models = self._models(needed=not (name or named))
        self.name = name or named or next((model["id"] for model in models if isinstance(model.get("id"), str)), "")
        # llama.cpp computes a prompt in other pieces where its cache holds the beginning, and then may say other words
        alone = any(model.get("owned_by") == "llamacpp" for model in models)
        self._always: dict[str, Any] = {"cache_prompt": False} if alone else {}

    def _models(self, needed: bool) -> list[dict[str, Any]]:
        """What it lists. needed: False where a server may refuse to list"""
        try:
            listed = self.ask("/v1/models").get("data")
        except EndpointRefusal:
            if needed:
                raise
            return []
        return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []

    def ask(self, place: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers at `place`: to a body that is posted, or to a plain request."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + place, data, {"Content-Type": "application/json"})
            if key := os.environ.get(KEY, "").strip():
                request.add_unredirected_header("Authorization", f"Bearer {key}")
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                read = _whole(answer)
        except urllib.error.HTTPError as error:
            words = _words_of(error)
            raise EndpointRefusal(f"{self.url}{place} answers {error.code}: {words}", _hint(error.code, words),
                                  error.code) from None  # fmt: skip
        except (OSError, ValueError, HTTPException) as error:
            raise EngineFailure(f"{self.url}{place} cannot be asked: {getattr(error, 'reason', error)}",
                                "start the server; the same command then goes on from the answers that are there",
                                ) from None  # fmt: skip
        try:
            found = json.loads(read)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise EngineFailure(f"{self.url}{place} answers no JSON object", "is it OpenAI's protocol?")
        return found

    def choice(self, place: str, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of an answer; EngineFailure where there is none, or where another model answers."""
        answer = self.ask(place, {"model": self.name} | self._always | body)
        said = answer.get("model")
        if isinstance(said, str) and said and self.name and not _one_name(said, self.name):
            raise EngineFailure(f"{self.url} was asked for {self.name!r}, and {said[:200]!r} answers",
                                f"if that model is meant, name it: {self.url}#{said[:200]}")  # fmt: skip
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EngineFailure(f"{self.url} answers no choices: {str(answer)[:200]}", "is it OpenAI's protocol?")
        return choices[0]


def _one_name(one: str, other: str) -> bool:
    """Whether two names may be of one model: servers answer with a path's last part, or with a version added."""
    one, other = one.casefold(), other.casefold()
    return one in other or other in one


def _whole(answer: HTTPResponse) -> bytes:
    """The answer, as far as it may be long; TimeoutError for one that comes drop by drop."""
    until, parts, size = time.monotonic() + _TIMEOUT, [], 0
    while size < _LARGEST and (part := answer.read1(1 << 16)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise TimeoutError(f"its answer is not whole after {_TIMEOUT} seconds")
    return b"".join(parts)


def _words_of(error: urllib.error.HTTPError) -> str:
    """What the server says of its error, as far as it comes."""
    try:
        return error.read(200).decode(errors="replace")
    except (OSError, ValueError, HTTPException):
        return ""


def _hint(status: int, words: str) -> str:
    """What to do about an error of the server that says `words`."""
    if any(each in words.lower() for each in _TOO_LONG):
        return "shorten the prompt, or start the server with a longer context (-c, --max-model-len)"
    if status >= 500:
        return "the server failed; its log says why"
    return _HINTS.get(status, "the server does not take this question; its words say why")
