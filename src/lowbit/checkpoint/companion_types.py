"""The types of those values of companion files that transformers, engines and lowbit compute with.

transformers takes any JSON and fails on first use: a number that is a string raises TypeError in the middle of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


_IDS = (lambda v: _is_id(v) or (isinstance(v, list) and v and all(map(_is_id, v))), "a token id, or a list of them")
_ID = (_is_id, "a token id")
_NUMBER = (_is_number, "a number")
_COUNT = (_is_id, "a whole number")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_TEXT = (lambda v: isinstance(v, str), "a text")
_TOKEN = (_is_token, "a token")
_SIDE = (lambda v: v in ("left", "right"), "left or right")

# File → key → what its value must be; null, or no such key, is right everywhere.
_TYPES = {
    "generation_config.json": {
        **dict.fromkeys(("eos_token_id",), _IDS),
        **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), _ID),
        **dict.fromkeys(
            ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
             "length_penalty", "encoder_repetition_penalty"), _NUMBER,
        ),
        **dict.fromkeys(
            ("top_k", "num_beams", "max_length", "min_length", "max_new_tokens", "min_new_tokens",
             "num_return_sequences", "no_repeat_ngram_size"), _COUNT,
        ),
        **dict.fromkeys(("do_sample", "use_cache", "output_attentions", "output_hidden_states"), _FLAG),
    },
    "tokenizer_config.json": {
        "model_max_length": _NUMBER,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
                        _TOKEN),
        **dict.fromkeys(("tokenizer_class", "name_or_path"), _TEXT),
        **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
        **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces",
                         "split_special_tokens"), _FLAG),
    },
}  # fmt: skip


def check_types(path: Path, document: dict[str, Any]) -> None:
    """CheckpointError for a value that no loader can compute with."""
    for key, (is_right, wanted) in _TYPES.get(path.name, {}).items():
        value = document.get(key)
        if value is not None and not is_right(value):
            raise CheckpointError(
                f"{path}: {key} is {str(value)[:60]!r}; {wanted} is needed", "mend the file, or download it again"
            )
