"""Datasets of the Hugging Face hub: the short names, and their rows, through the package `datasets`.

    open_platypus   garage-bAInd/Open-Platypus          instruction and output    all 25 000 rows are shuffled
    ultrachat       HuggingFaceH4/ultrachat_200k        messages, train_sft
    c4              allenai/c4, en                      text
    wikitext        Salesforce/wikitext, wikitext-2-raw-v1    one running text, whose rows are its lines
    hub:OWNER/NAME[:CONFIG[:SPLIT]]                     any other

Calibration streams rows, so that only what is read is downloaded. Any error of `datasets`, which passes on those of
networks and files, becomes a UsageError that names the dataset. Where the Hub cannot be reached, what an earlier
download left is taken at once (`hub_or_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from lowbit.errors import DependencyError, UsageError

STREAM_BUFFER = 1000  # rows shuffled at a time, a few megabytes
_PATIENCE = 10.0  # seconds for the first answer of the Hub


@dataclass(frozen=True)
class HubDataset:
    """name     as the user types it
    buffer   rows that are shuffled at a time
    running  rows are the lines of one text, not documents
    """

    name: str
    repository: str
    config: str | None
    split: str
    buffer: int = STREAM_BUFFER
    running: bool = False


DATASETS = {
    # Its rows are sorted by origin (mathematics first), so only a shuffle of all of them is a mixture.
    "open_platypus": HubDataset("open_platypus", "garage-bAInd/Open-Platypus", None, "train", buffer=30_000),
    "ultrachat": HubDataset("ultrachat", "HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "wikitext": HubDataset("wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1", "train", running=True),
    "c4": HubDataset("c4", "allenai/c4", "en", "train"),
}


def is_dataset(name: str) -> bool:
    """True for a short name and for hub:…"""
    return name.startswith("hub:") or name.lower().replace("-", "_") in DATASETS


def find_dataset(name: str, split: str) -> HubDataset:
    """A dataset by its name; `split` where the name has none, and of wikitext."""
    known = DATASETS.get(name.lower().replace("-", "_"))
    if known is not None:
        return replace(known, name=name, split=split) if known.running else known
    parts = name.removeprefix("hub:").split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"{name!r} is not of the form hub:OWNER/NAME[:CONFIG[:SPLIT]]")
    config = parts[1] if len(parts) > 1 else None
    running = parts[0].rpartition("/")[2] == "wikitext"
    return HubDataset(name, parts[0], config, parts[2] if len(parts) > 2 else split, running=running)


def running_text(dataset: HubDataset) -> str:
    """Rows of the column `text` joined by blank lines, as in GPTQ's and transformers' perplexity recipes."""
    load_dataset = _load_dataset(dataset)
    try:
        with hub_or_cache():
            rows: Any = load_dataset(dataset.repository, dataset.config, split=dataset.split)
        return "\n\n".join(rows["text"])
    except KeyError as error:
        raise UsageError(
            f"the dataset {dataset.name} has no column `text`", "save the text to a file and give that"
        ) from error
    except Exception as error:
        raise _unreadable(dataset, error) from error


def stream_rows(dataset: HubDataset) -> Iterator[Any]:
    """Rows as dicts, in the dataset's order, downloaded as they are asked for."""
    load_dataset = _load_dataset(dataset)
    try:
        with hub_or_cache():
            rows = load_dataset(dataset.repository, dataset.config, split=dataset.split, streaming=True)
        yield from rows
    except Exception as error:
        raise _unreadable(dataset, error) from error


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Within it, where the Hub cannot be reached, its libraries take what an earlier download left, or fail at once;
    they would try every file six times, for half a minute each."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _reaches_the_hub():
        yield
        return
    places: list[Any] = [constants]
    with suppress(ImportError):
        from datasets import config  # type: ignore[import-not-found]

        places.append(config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _reaches_the_hub() -> bool:
    """One request, whose answer does not matter."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception:  # of whichever HTTP library there is: no name, no route, no answer in time, no proxy
        return False
    return True


def _load_dataset(dataset: HubDataset) -> Any:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise DependencyError(
            f"reading {dataset.name} needs the package `datasets`, which is not installed", 'pip install "lowbit[eval]"'
        ) from error
    return load_dataset


def _unreadable(dataset: HubDataset, error: Exception) -> UsageError:
    where = f"{dataset.repository}, config {dataset.config or 'default'}, split {dataset.split}"
    return UsageError(
        f"the dataset {dataset.name} ({where}) cannot be read: {str(error) or type(error).__name__}",
        "check its name, config and split, and the network; without one, give a file",
    )
