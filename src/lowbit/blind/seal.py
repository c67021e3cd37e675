"""The key of a page, so that nobody reads it by accident: which side is whose, and what the models are called.

    sealed = base64(payload XOR stream)     stream: xorshift32 from the FNV-1a hash of the page's name, a byte per step

It hides the key from a look at the page's source, and is no encryption: who wants to know runs the page's own script,
`blind_count.js`, which has the same two functions.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

_MASK = 0xFFFFFFFF


def seal(payload: dict[str, Any], page: str) -> str:
    data = json.dumps(payload, ensure_ascii=True).encode()
    return base64.b64encode(bytes(a ^ b for a, b in zip(data, _stream(page), strict=False))).decode()


def unseal(sealed: str, page: str) -> dict[str, Any]:
    data = base64.b64decode(sealed)
    return json.loads(bytes(a ^ b for a, b in zip(data, _stream(page), strict=False)))


def _stream(page: str) -> Iterator[int]:
    state = 2166136261
    for byte in page.encode():
        state = ((state ^ byte) * 16777619) & _MASK
    while True:
        state ^= (state << 13) & _MASK
        state ^= state >> 17
        state ^= (state << 5) & _MASK
        yield state & 255
