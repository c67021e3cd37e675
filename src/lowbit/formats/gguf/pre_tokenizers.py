r"""Pre-tokenizers that llama.cpp knows by name (tokenizer.ggml.pre), as data, and tokenizers' form of each.

A byte-level BPE cuts text into words before it merges within them. Each row is a sequence of regular expressions,
applied one after the other: what one matches becomes a word of its own, and so does what lies between two matches.
That is a `Split` with behaviour "Isolated". The regexes are those of src/llama-vocab.cpp, in the spelling of the
models' tokenizer.json; `\p{N}` alone is tokenizers' `Digits`, and the GPT-2 regex is built into its `ByteLevel`.

kimi-k2 is written in C++ there; its regex is that of the code beside the model. Left out: other names whose cut is
written in C++ (afmoe, superbpe), and those of models that are not byte-level (gemma4, sarvam-moe, whitespace).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]"  # Unicode's and ASCII's, as tokenizers' Punctuation has it
_THREE_DIGITS = r"\p{N}{1,3}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CL100K = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_ENDS}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
_NOT_HAN = "&&[^\\p{Han}]]"
_KIMI_UPPER, _KIMI_LOWER = _UPPER[:-1] + _NOT_HAN, _LOWER[:-1] + _NOT_HAN
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SIGNS}|{_ENDS}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
_JAIS2 = (
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|"
    + "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_HAN_TO_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    name           what is written to tokenizer.ggml.pre
    splits         regular expressions, in order
    ignore_merges  a word that is in the vocabulary is one token, whatever the merges say
    add_bos        llama.cpp begins with BOS where the file does not say
    nfc            the models normalize to NFC first; llama.cpp does not
    also           other names that llama.cpp treats alike
    """

    name: str
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    also: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """tokenizer.json's "pre_tokenizer"."""
        *before, last = self.splits
        steps = [_step(regex) for regex in before]
        if last != GPT2:
            steps.append(_step(last))
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": last == GPT2})
        return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _step(regex: str) -> dict[str, Any]:
    if regex == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# How the vocabularies of "gemma4" are cut: newlines apart from everything else.
LINES = _step(r"[^\n]+|[\n]+")

# Where rows cut alike, the first is the one that gets written.
PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (GPT2,), also=(
        "olmo", "phi-2", "mpt", "jais", "trillion", "granite-docling", "exaone4", "mellum", "modern-bert", "gigachat",
        "a.x-4.0", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe",
    )),
    PreTokenizer("smollm", (DIGIT, GPT2), also=(
        "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    )),
    PreTokenizer("llama-bpe", (_CL100K,), ignore_merges=True, add_bos=True, also=(
        "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    )),
    PreTokenizer("glm4", (_CL100K,), ignore_merges=True, also=("glm5",)),
    PreTokenizer("dbrx", (_CL100K,), also=("smaug-bpe", "chatglm-bpe")),
    PreTokenizer("qwen2", (_QWEN2,), nfc=True, also=("deepseek-r1-qwen", "megrez", "f2llmv2")),
    PreTokenizer("stablelm2", (_QWEN2,), also=("hunyuan", "solar-open", "grok-2", "kormo")),
    PreTokenizer("qwen35", (_QWEN35,)),
    PreTokenizer("gpt-4o", (_O200K,), also=("llama4", "kanana2", "talkie", "minimax-m2")),
    PreTokenizer("kimi-k2", (_KIMI,)),
    PreTokenizer("tekken", (_TEKKEN,), ignore_merges=True, add_bos=True),
    PreTokenizer("deepseek-v3", (_THREE_DIGITS, "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3), also=(
        "hunyuan-dense", "joyai-llm", "hy_v4",
    )),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_TO_HANGUL, DIGIT)),
    PreTokenizer("deepseek-llm", (
        r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$", _HAN_TO_HANGUL, r"\p{N}+",
    )),
    PreTokenizer("falcon", (PUNCTUATION + "+", GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (_BLOOM,), also=("poro-chat", "gpt3-finnish")),
    PreTokenizer("viking", (_BLOOM, DIGIT)),
    PreTokenizer("jais-2", (_JAIS2,)),
    PreTokenizer("minicpm5", (
        _THREE_DIGITS, rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}+|{_SIGNS}|{_ENDS}",
    ), ignore_merges=True),
    PreTokenizer("seed-coder", (
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_ENDS}",
    )),
    PreTokenizer("bailingmoe", (
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",
    ), also=("bailingmoe2", "llada-moe")),
    PreTokenizer("youtu", (
        "[\uac00-\ud7a3\u3131-\u318e]+"
        "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
        "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _O200K.replace("{1,3}", ""),
    ), ignore_merges=True),
    PreTokenizer("exaone-moe", (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    )),
    PreTokenizer("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
    PreTokenizer("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", _O200K), also=("cohere2moe",)),
    PreTokenizer("ufakzeka", (rf"{_WORDS}|\p{{N}}|{_SIGNS}|{_ENDS}",)),
    PreTokenizer("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)  # fmt: skip

BY_NAME = {name: row for row in PRE_TOKENIZERS for name in (row.name, *row.also)}

# Other spellings of the same part of a regex, among models' files.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", _CONTRACTIONS),
    (r"(?:'(?i:[sdmt]|ll|ve|re))", _CONTRACTIONS),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    (r"(?i:'s|'t|'re|'ve|'m|'d|'ll)", _CONTRACTIONS),
    (r"\p{N}{1}|", r"\p{N}|"),
    ("|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+", "|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"),
    # possessive, where what follows cannot match what was taken
    (r"?+\p{L}", r"?\p{L}"),
    (r"\p{L}\p{N}]++[", r"\p{L}\p{N}]+["),
)


def canonical(regex: str) -> str:
    """A regex in the spelling of the table, if it is one of those that mean the same."""
    for spelling, meant in _SPELLINGS:
        regex = regex.replace(spelling, meant)
    return regex
