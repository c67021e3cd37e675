r"""The llama.cpp pre-tokenizer of a tokenizer.json.

Its "pre_tokenizer" is normalized to the form of `lowbit.formats.gguf.pre_tokenizers`, a sequence of regular expressions
whose matches and gaps are words, and looked up there:

    Split, "Isolated" (or "Removed" of all but the matches)  the regex
    Digits                                                   \p{N} or \p{N}+
    Punctuation                                              [\p{P}\$\+<=>\^~\|`] or the same, repeated
    ByteLevel                                                the GPT-2 regex, unless use_regex is false

The row must split a test text exactly as the tokenizer does. Refused: anything else, with the nearest row, since a
wrong pre-tokenizer makes a model worse without any error. A row named by the user is taken, with a note on differences.
"""

from __future__ import annotations

import difflib
import json
from itertools import pairwise
from typing import Any

from lowbit.errors import ArchitectureError, UsageError
from lowbit.formats.gguf.pre_tokenizers import (
    BY_NAME,
    DIGIT,
    GPT2,
    PRE_TOKENIZERS,
    PUNCTUATION,
    PreTokenizer,
    canonical,
)
from lowbit.formats.gguf.tokenizer_files import calling_tokenizers, flat_steps

# What pre-tokenizers differ on: runs of spaces and newlines, digits, contractions in both cases, letters beside signs,
# scripts with marks or without spaces, upper case within words, emoji with joiners, code.
HARD_TEXT = (
    "Hello, World! I'm, YOU'RE, they'Ll, it'D  be 'Tis  l'été\n \n\n  \n\t\tx\r\n\r\nend   \n"
    "1 12 123 1234 12345678 3.14 1,000,000 ٣٤٥ ²½ Ⅷ v2a3b 0x1F 50%\n"
    "camelCaseWords HTTPServer ÉCOLE straße ﬁn İstanbul naïve e\u0301te\u0301 हिन्दी भाषा ภาษาไทย\n"
    "你好，世界！こんにちは カタカナ 한국어 中文abc123中文 Привет, мир… “quoted” ‘single’ «guillemets»\n"
    "🙂🙃👩\u200d👩\u200d👧 ✅🚀 a\u00a0b\u3000c\u2003d  \u200b…\n"
    "def f(x):\n    return x**2  # comment\n\tif (a!=b && c||d) { e[0]=='f'; }//end\n"
    "<|x|> </s> ==== ----- ...... !!!???\n"
    " leading  double   triple    quad/path/to\\file_name.txt user@example.com https://a.b/c?d=e&f#g $5+£6=€7"
)
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def identify(tokenizer: dict[str, Any], where: str, name: str | None = None) -> tuple[PreTokenizer, list[str]]:
    """(the row of a parsed tokenizer.json, notes). `name` overrides what would be found."""
    steps = flat_steps(tokenizer["pre_tokenizer"], "pretokenizers", where)
    plain = [step | {"add_prefix_space": False} if step.get("type") == "ByteLevel" else step for step in steps]
    expected = _words({"type": "Sequence", "pretokenizers": plain}, where)
    if name is not None:
        row = _named(name)
        return row, _differences(row, expected, where)
    splits, odd = _splits(tokenizer["pre_tokenizer"], where)
    if odd is not None:
        raise _unknown(odd, expected, where)
    rows = [row for row in PRE_TOKENIZERS if row.splits == splits]
    if not rows:
        raise _unknown(" then ".join(splits), expected, where)
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    nfc = any(step.get("type") == "NFC" for step in flat_steps(tokenizer.get("normalizer"), "normalizers", where))
    rows.sort(key=lambda row: (row.ignore_merges != ignores, row.nfc != nfc))  # stable: the first of the best
    if _words(rows[0].to_json(), where) != expected:
        raise _unknown(" then ".join(splits), expected, where)
    return rows[0], []


def what_llama_cpp_leaves_out(tokenizer: dict[str, Any], where: str) -> list[str]:
    """Notes about what is done to the text before it is cut; refused where every text would differ."""
    notes = []
    for step in flat_steps(tokenizer.get("normalizer"), "normalizers", where):
        if step.get("type") not in _NORMAL_FORMS:
            found = json.dumps(step, ensure_ascii=False)[:200]
            raise ArchitectureError(f"{where}: llama.cpp has no normalizer {found} for byte-level models")
        form = step["type"]
        notes.append(f"the tokenizer normalizes text to {form}; llama.cpp does not, so decomposed accents differ there")
    steps = flat_steps(tokenizer["pre_tokenizer"], "pretokenizers", where)
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        notes.append("the tokenizer puts a space before the text; llama.cpp does not")
    return notes


def _splits(pre_tokenizer: Any, where: str) -> tuple[tuple[str, ...], str | None]:
    """(the canonical regexes, what has no such form)."""
    steps = flat_steps(pre_tokenizer, "pretokenizers", where)
    splits = [_split(step) for step in steps]
    for step, split in zip(steps, splits, strict=True):
        if split is None:
            return (), json.dumps(step, ensure_ascii=False)
    if not any(step["type"] == "ByteLevel" for step in steps):
        return (), "no ByteLevel step"
    return tuple(split for split in splits if split), None


def _split(step: dict[str, Any]) -> str | None:
    """The regex of one step; "" where it does not cut, None where it is something else."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return DIGIT if step.get("individual_digits") else DIGIT + "+"
    if kind == "Punctuation" and step.get("behavior") in ("Isolated", "Contiguous"):
        return PUNCTUATION + ("+" if step["behavior"] == "Contiguous" else "")
    if kind == "Split" and isinstance(step.get("pattern"), dict) and isinstance(step["pattern"].get("Regex"), str):
        regex = canonical(step["pattern"]["Regex"])
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        # all but the matches is removed: the same where the regex matches everything
        covering = step.get("behavior") == "Removed" and step.get("invert") and regex.endswith(r"|\s+")
        return regex if isolated or covering else None
    return None


def _words(pre_tokenizer: dict[str, Any], where: str) -> list[str]:
    """How tokenizers cuts the hard text, in byte-level letters."""
    from tokenizers import Tokenizer

    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    shell |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    with calling_tokenizers(where):
        cutter = Tokenizer.from_str(json.dumps(shell | {"pre_tokenizer": pre_tokenizer})).pre_tokenizer
        return [word for word, _ in cutter.pre_tokenize_str(HARD_TEXT)]


def _named(name: str) -> PreTokenizer:
    row = BY_NAME.get(name)
    if row is not None:
        return row
    near = ", ".join(difflib.get_close_matches(name, BY_NAME, n=3, cutoff=0.4)) or ", ".join(BY_NAME)
    raise UsageError(f"--pre-tokenizer {name!r} is not known", f"the nearest are: {near}")


def _differences(row: PreTokenizer, expected: list[str], where: str) -> list[str]:
    alike = _likeness(row, expected, where)
    if alike == 1.0:
        return []
    return [
        f"--pre-tokenizer {row.name} cuts {100 * (1 - alike):.1f} % of a test text otherwise than tokenizer.json does; "
        f"llama.cpp will see other tokens there"
    ]


def _likeness(row: PreTokenizer, expected: list[str], where: str) -> float:
    """Share of equal word boundaries (Jaccard index), 1.0 if all."""
    found, wanted = _boundaries(_words(row.to_json(), where)), _boundaries(expected)
    return len(found & wanted) / len(found | wanted)


def _boundaries(words: list[str]) -> set[int]:
    ends = [0]
    for word in words:
        ends.append(ends[-1] + len(word))
    return {stop for _, stop in pairwise(ends)}


def _unknown(found: str, expected: list[str], where: str) -> ArchitectureError:
    likeness = {row.name: _likeness(row, expected, where) for row in PRE_TOKENIZERS}
    nearest = max(likeness, key=likeness.__getitem__)
    return ArchitectureError(
        f"{where}: llama.cpp has no pre-tokenizer {found[:300]}; the nearest, {nearest}, cuts "
        f"{100 * (1 - likeness[nearest]):.1f} % of a test text otherwise",
        f"if that is good enough, pass --pre-tokenizer {nearest}; else llama.cpp cannot run this model faithfully",
    )
