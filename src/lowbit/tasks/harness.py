"""Other tasks (mmlu, gsm8k, hellaswag …) by lm-eval, over a model that lowbit has loaded.

lm-eval is the field's own judge, so its figures are those that others publish; what it makes of each item with the
quantized model is paired here with what it makes of it with the reference. Data come from the Hub, or from its
cache. A name that ends in .yaml is a task file of lm-eval's own form, with data that it names.

Refused: lm-eval not installed, a task that it does not know (with the nearest), data that cannot be had, by name; a
task file that is not there or defines no task, or what `task_files` refuses.
"""

from __future__ import annotations

import difflib
import functools
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import DependencyError, EngineFailure, LowbitError, UsageError
from lowbit.tasks.task_files import bounded_tasks, check_task_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILE = ".yaml"
# The metric of an item that says right or wrong, the first that it has.
_METRICS = ("acc", "exact_match", "pass@1", "prompt_level_strict_acc", "acc_norm", "em", "f1")
_OFFLINE = ("connection", "offline", "couldn't reach", "couldn't find", "localentrynotfound", "name resolution",
            "max retries", "max retry", "hub", "proxy")  # fmt: skip
_NO_DATA = "these tasks fetch their data from the Hub; without a network run the packaged ones: --tasks all"


def check_tasks(names: tuple[str, ...], trust_remote_code: bool) -> str:
    """The name of the suite; DependencyError or UsageError where the tasks cannot be run."""
    for path in _files(names):
        if not path.is_file():
            raise UsageError(f"{path}: there is no such task file",
                             "give the path of a task's YAML, or a name of lm-eval's")  # fmt: skip
        check_task_file(path, trust_remote_code)
    try:
        manager = _manager(_files_only(names))
    except ImportError as error:
        raise DependencyError(
            f"{', '.join(names)}: tasks beyond the packaged ones need lm-eval ({error})",
            "pip install 'lowbit[eval]'; the packaged tasks are arithmetic, facts, format, code",
        ) from None
    known = manager.all_tasks
    for path in _files(names):
        _load(path, manager)
    for name in names:
        if not name.endswith(_FILE) and name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UsageError(f"lm-eval has no task {name!r}", f"did you mean {', '.join(near)}?" if near else
                             "lm-eval ls tasks lists them")  # fmt: skip
    return f"lm-eval {metadata.version('lm_eval')}"


def _files_only(names: tuple[str, ...]) -> bool:
    return all(name.endswith(_FILE) for name in names)


@functools.cache
def _manager(files_only: bool) -> Any:
    """lm-eval's index of tasks; reading its own takes ten seconds, and task files need none of them."""
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    return TaskManager(include_defaults=not files_only)


def _files(names: tuple[str, ...]) -> list[Path]:
    """Those names that are task files."""
    return [Path(name) for name in names if name.endswith(_FILE)]


def _load(path: Path, manager: Any) -> None:
    """UsageError unless lm-eval finds a task in the file."""
    try:
        with bounded_tasks((str(path),)):
            manager.load(str(path.absolute()))
    except LowbitError:
        raise
    except Exception as error:  # YAML, fields, functions, data: whatever lm-eval says of them
        text, hint = f"{type(error).__name__}: {error}", "lm-eval's words say which field is at fault"
        if isinstance(error, FileNotFoundError):
            hint = "paths of data_files are absolute, or from the folder that you are in"
        elif _names_the_hub(text):
            hint = _NO_DATA
        raise UsageError(f"{path}: lm-eval cannot load this task: {text[:300]}", hint) from None


def _names_the_hub(text: str) -> bool:
    """True for an error of fetching data."""
    return any(word in text.lower() for word in _OFFLINE)


def outcomes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...], limit: int | None, batch: int
) -> dict[tuple[str, str, str], bool]:
    """(task, filter, document) → right, of every item."""
    return {
        (str(task), str(sample.get("filter", "none")), str(sample["doc_id"])): _is_right(task, sample)
        for task, found in samples(model, tokenizer, names, limit, batch).items()
        for sample in found
    }


def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: tuple[str, ...], limit: int | None, batch: int
) -> dict[str, list[dict[str, Any]]]:
    """Task → what lm-eval keeps of each item: the document, the answers, its metrics."""
    import lm_eval  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    try:
        judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        tasks = [str(Path(name).absolute()) if name.endswith(_FILE) else name for name in names]
        with bounded_tasks(tuple(map(str, _files(names)))):
            found: Any = lm_eval.simple_evaluate(
                model=judged, tasks=tasks, limit=limit, log_samples=True, bootstrap_iters=0,
                task_manager=_manager(_files_only(names)),
            )  # fmt: skip
    except LowbitError:
        raise
    except Exception as error:  # a task may raise anything: its data, its template, its metric
        text = f"{type(error).__name__}: {error}"
        if _names_the_hub(text):
            raise UsageError(f"{', '.join(names)}: the data cannot be had: {text[:300]}", _NO_DATA) from None
        hint = "run one task at a time to see which" if len(names) > 1 else "lm-eval's words say what is at fault"
        raise EngineFailure(f"lm-eval failed on {', '.join(names)}: {text[:300]}", hint) from None
    return found["samples"]


def _is_right(task: str, sample: dict[str, Any]) -> bool:
    metric = next((name for name in _METRICS if isinstance(sample.get(name), int | float)), None)
    if metric is None:
        raise UsageError(
            f"{task} has no metric of right and wrong by item", f"tasks with one of {', '.join(_METRICS)} do"
        )
    return float(sample[metric]) >= 0.5
