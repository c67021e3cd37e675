"""Values of `general.name` that llama.cpp acts on (llama_vocab::impl::load of llama-vocab.cpp).

    phi3, phi-3    whitespace behind special tokens is dropped, as Phi-3's tokenizer does; the file does not load
                   where the vocabulary lacks one of four tokens
    modern-bert    whitespace before [MASK] is dropped

A file is named after a folder, which must not decide how text is tokenized. So what the tokenizer does decides: a name
with one of these in it is respelled unless the tokenizer strips so, and one without is completed where it does.
Everything else in llama.cpp goes by general.architecture and the numbers beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PHI3 = "Phi-3"
# Part of a name → tokens that must be there
NAMES_THAT_NEED_TOKENS = {
    "phi-3": ("</s>", "<unk>", "<s>", "<|endoftext|>"), "phi3": ("</s>", "<unk>", "<s>", "<|endoftext|>"),
    "modern-bert": ("[MASK]",),
}  # fmt: skip
PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")  # tokens behind which whitespace stays


def loadable_name(name: str, tokens: Iterable[str] | None) -> tuple[str, str | None]:
    """(a general.name with which llama.cpp loads a vocabulary, a note where it is another than `name`)."""
    if missing_tokens(name, tokens) is None:
        return name, None
    other = _respelled(name)
    return other, (
        f"general.name is {other!r}, not {name!r}: for such names llama.cpp looks up tokens that this vocabulary lacks"
    )


def name_for_tokenizer(name: str, strips_as_phi3: bool) -> tuple[str, str | None]:
    """(a general.name with which llama.cpp tokenizes as the model's tokenizer does, a note where it is another).

    strips_as_phi3  the tokenizer drops whitespace behind special tokens, as Phi-3's does
    """
    asks = any(part in name.lower() for part in ("phi-3", "phi3"))
    if strips_as_phi3 and not asks:
        respelled = re.sub(r"(?i)\bphi[ _.]?3", PHI3, name)
        other = respelled if respelled != name else f"{name} ({PHI3})"
        why = "the tokenizer drops whitespace behind special tokens, which llama.cpp does for names with Phi-3 in them"
    elif any(part in name.lower() for part in NAMES_THAT_NEED_TOKENS) and not (strips_as_phi3 and asks):
        other = _respelled(name)
        why = "for such names llama.cpp drops whitespace beside special tokens, which this tokenizer does not"
    else:
        return name, None
    return other, f"general.name is {other!r}, not {name!r}: {why}"


def missing_tokens(name: str, tokens: Iterable[str] | None) -> str | None:
    """A token that llama.cpp looks up because of a name, and does not find."""
    known = set(tokens or ())
    needed = [token for part, texts in NAMES_THAT_NEED_TOKENS.items() if part in name.lower() for token in texts]
    return next((token for token in needed if token not in known), None)


def _respelled(name: str) -> str:
    return re.sub(r"(?i)phi-?3", "Phi 3", re.sub(r"(?i)modern-bert", "ModernBert", name))
