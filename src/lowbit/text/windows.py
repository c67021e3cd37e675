"""One running text, and the consecutive windows of tokens it is cut into.

A text is a file, a dataset of the Hugging Face hub (`wikitext`, or `hub:OWNER/NAME[:CONFIG[:SPLIT]]`), or, by default,
the packaged text. Evaluation uses the split `test` of a dataset, calibration the split `train`. The text is tokenized
once, without special tokens.

    full          window i = [BOS] + text[i·step : (i+1)·step], step = window_tokens − (1 with BOS);
                  every token but the first of the window is scored
    second-half   llama.cpp's (tools/perplexity/perplexity.cpp): the stream is [BOS] + text, window i is
                  stream[i·window_tokens : (i+1)·window_tokens] with its first token overwritten by BOS, and positions
                  window_tokens/2 .. window_tokens − 2 predict what is scored; without BOS nothing is put or overwritten

Refused: a text shorter than one window; an unknown name; BOS where the tokenizer has none.

A text that says nothing: one token again and again, the same sentence again and again, or hardly a word.

Statistics of such a text are of low rank, and what is calibrated on it fits nothing else. (A file that was preallocated
and never written is zero bytes.)

    entropy   −Σ p log2 p over the tokens, p their shares; a text in single bytes has 4 bits, others 6 to 10
    packed    size after DEFLATE; of prose two fifths, of logs and tables a tenth
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowbit.errors import CheckpointError, UsageError
from lowbit.files.regular import open_text
from lowbit.text.hub import find_dataset, running_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Protocol = Literal["full", "second-half"]
PROTOCOLS: tuple[Protocol, ...] = ("full", "second-half")
PackagedText = Literal["evaluation", "calibration"]
PACKAGED = "packaged"  # name of the calibration text in --calib


_LONGEST_NAME = 255  # characters, of a file on every common file system


@dataclass(frozen=True)
class Text:
    """name as the user would type it; sha256 of the UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of one text.

    ids           int64 [windows, window_tokens]
    first_scored  index in a window of the first token that is scored; every later one is scored too
    bos           whether a BOS token opens each window
    text_tokens   tokens in the whole text
    """

    ids: Tensor
    first_scored: int
    bos: bool
    text_tokens: int

    @property
    def scored_tokens(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - self.first_scored)


def read_text(source: str | Path | None, packaged: PackagedText = "evaluation") -> Text:
    """A file, a hub dataset, or the packaged text for None (for calibration also by its name, "packaged").

    packaged  the purpose of the text; it also chooses the split of a dataset whose split is not named
    """
    if source is None or (packaged == "calibration" and source == PACKAGED and not Path(source).exists()):
        file = resources.files("lowbit") / "data" / f"{packaged}.txt"
        return Text(f"packaged {packaged} text", file.read_text(encoding="utf-8"))
    name = str(source)
    split = "test" if packaged == "evaluation" else "train"
    if name == "wikitext" or name.startswith("hub:"):
        return Text(name, running_text(find_dataset(name, split)))
    path = Path(name)
    if not os.path.isfile(name):  # False, where Path.is_file fails for names that are too long
        refuse_no_name(name)
        one = "; figures are of one text, not of a mixture" if "," in name else ""
        raise UsageError(
            f"there is no text {name!r}: no such file",
            f"give a text file, wikitext, or hub:OWNER/NAME:CONFIG:SPLIT{one}",
        )
    if packaged == "evaluation" and path.suffix.lower() in (".jsonl", ".parquet"):
        raise UsageError(f"{name} holds rows, and figures are of one running text",
                         "write the texts of its rows into a .txt file; named .txt itself, it is measured as it is "
                         "written, braces and all")  # fmt: skip
    return Text(name, read_plain(path))


def refuse_no_name(name: str) -> None:
    """UsageError for a text in the place of its name, of which a file system says no more than that it is too long."""
    if not os.path.exists(name) and ("\n" in name or max(map(len, name.split("/"))) > _LONGEST_NAME):
        raise UsageError(f"a text is given by its name, and {name[:40]!r} … is one of {len(name)} characters",
                         "write it to a file and name that, or give Python a list: calib=[text]")  # fmt: skip


def read_plain(path: Path, characters: int = -1) -> str:
    """The start of a UTF-8 file; all of it where `characters` is -1."""
    try:
        with open_text(path) as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error}",
            f"convert it: iconv -f utf-16 -t utf-8 {path} > NEW.txt, or from what it is written in",
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def wants_bos(tokenizer: PreTrainedTokenizerBase, bos: bool | Literal["auto"]) -> bool:
    """Whether windows open with BOS. "auto": if the tokenizer adds it, as in the model's training."""
    has_bos = tokenizer.bos_token_id is not None
    if bos == "auto":
        return has_bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if bos and not has_bos:
        raise UsageError("the tokenizer has no BOS token", "leave --bos out")
    return bos


def cut_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, windows: int, window_tokens: int, protocol: Protocol = "full",
    bos: bool | Literal["auto"] = "auto",
) -> Windows:  # fmt: skip
    """The first `windows` windows of the text, or as many as it has."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"there is no protocol {protocol!r}", f"choose one of {', '.join(PROTOCOLS)}")
    if windows < 1 or window_tokens < 4:
        raise UsageError(f"{windows} windows of {window_tokens} tokens cannot be scored", "use at least 1 of 4 tokens")
    with_bos = wants_bos(tokenizer, bos)
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    text_tokens = len(ids)
    first = torch.tensor([tokenizer.bos_token_id if with_bos else 0], dtype=torch.long)
    if with_bos and protocol == "second-half":
        ids = torch.cat([first, ids])
    step = window_tokens - 1 if with_bos and protocol == "full" else window_tokens
    count = min(windows, len(ids) // step)
    if count == 0:
        raise CheckpointError(
            f"the text {text.name!r} has {text_tokens} tokens; one window needs {step}",
            "give a longer text, or smaller windows",
        )
    cut = ids[: count * step].reshape(count, step)
    refuse_degenerate(cut, tokenizer, text.name)
    if with_bos and protocol == "full":
        cut = torch.cat([first.expand(count, 1), cut], dim=1)
    elif with_bos:
        cut = torch.cat([first.expand(count, 1), cut[:, 1:]], dim=1)
    first_scored = 1 if protocol == "full" else window_tokens // 2 + 1
    return Windows(cut, first_scored, with_bos, text_tokens)


_SAME = 0.95  # share of one token at which a text is refused
_FEWEST_WORDS = 0.3  # share of letters and digits below which a note says so
_LOOKED_AT = 4096  # tokens
# tokens → bits, below which a note says so: of eight tokens of equal shares, or of three where a text is short, since
# 32 bytes of a table or of digits often have less than three
_LEAST_ENTROPY = {64: 3.0, 32: 1.5}
_LEAST_PACKED = 0.05  # of its size, below which a note says that a text repeats itself
_PACKED_TOKENS = 256  # in a text that is judged by its packed size, of which a part does not shrink


def refuse_degenerate(ids: Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """CheckpointError where nearly all tokens, int64 [windows, T], are one and the same."""
    tokens, counts = torch.unique(ids, return_counts=True)
    most = int(counts.argmax())
    share = counts[most].item() / ids.numel()
    if ids.numel() >= 32 and share >= _SAME:
        token = int(tokens[most])
        raise CheckpointError(
            f"the text {name!r} is one token again and again: {share:.0%} of its tokens are {token} "
            f"({tokenizer.decode([token])!r})",
            "give a text of the kind that the model will see",
        )


def degenerate_notes(ids: Tensor, tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Notes where a text says the same again and again, or has hardly a letter or a digit in it."""
    notes, counts = [], torch.unique(ids, return_counts=True)[1].double()
    shares = counts / ids.numel()
    entropy = -float((shares * shares.log2()).sum())
    text = str(tokenizer.decode(ids.reshape(-1)[:_LOOKED_AT].tolist(), skip_special_tokens=True))
    raw = text.encode("utf-8", errors="replace")
    packed = len(zlib.compress(raw)) / max(len(raw), 1)
    least = next((bits for tokens, bits in _LEAST_ENTROPY.items() if ids.numel() >= tokens), 0.0)
    if entropy < least or (ids.numel() >= _PACKED_TOKENS and packed < _LEAST_PACKED):
        notes.append(
            f"the text {name!r} says the same again and again: {len(counts)} different tokens, an entropy of "
            f"{entropy:.1f} bits a token; its first {min(_LOOKED_AT, ids.numel()):,} tokens pack to {packed:.1%} of "
            f"their size"
        )
    characters = [character for character in text if not character.isspace()]
    share = sum(character.isalnum() for character in characters) / len(characters) if characters else 0.0
    if share < _FEWEST_WORDS:
        notes.append(f"the text {name!r} has hardly a word in it ({share:.0%} letters and digits)")
    return notes
