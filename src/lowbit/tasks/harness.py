"""Other tasks (mmlu, gsm8k, hellaswag …) by lm-eval, over a model that lowbit has loaded.

lm-eval is the field's own judge, so its figures are those that others publish; what it makes of each item with the
quantized model is paired here with what it makes of it with the reference. Data come from the Hub, or from its
cache. A name that ends in .yaml is a task file of lm-eval's own form, with data that it names.

Refused: lm-eval not installed, a task that it does not know (with the nearest), data that cannot be had, by name; a
task file that is not there or defines no task, or what `task_files` refuses.
"""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import CheckpointError, DependencyError, EngineFailure, LowbitError, UsageError, did_you_mean
from lowbit.tasks.task_files import bounded_tasks, check_task_file
from lowbit.text.hub import hub_or_cache
from lowbit.text.template_limits import bounded_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILE = ".yaml"
# The metric of an item that says right or wrong, the first that it has.
_METRICS = ("acc", "exact_match", "pass@1", "prompt_level_strict_acc", "acc_norm", "em", "f1")
_OFFLINE = ("connection", "offline", "couldn't reach", "couldn't find", "localentrynotfound", "name resolution",
            "max retries", "max retry", "hub", "proxy")  # fmt: skip
_NO_DATA = "these tasks fetch their data from the Hub; without a network run the packaged ones: --tasks all"


# Names that people use and lm-eval does not.
_SPELLINGS = {"arc": ("arc_easy", "arc_challenge")}


def spelled(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that lm-eval knows them by."""
    return tuple(each for name in names for each in _SPELLINGS.get(name, (name,)))


def check_tasks(names: tuple[str, ...], trust_remote_code: bool) -> str:
    """The name of the suite; DependencyError or UsageError where the tasks cannot be run."""
    names = spelled(names)
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
            hint = did_you_mean(name, known, "lm-eval ls tasks lists them", 3)
            raise UsageError(f"lm-eval has no task {name!r}", hint)
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
        with hub_or_cache(), bounded_tasks((str(path),)):
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
    judged: Any, names: tuple[str, ...], limit: int | None, chat: bool = False
) -> dict[tuple[str, str, str], bool]:
    """(task, filter, document) → right, of every item. judged: an `LM` of lm-eval"""
    return {
        (str(task), str(sample.get("filter", "none")), str(sample["doc_id"])): _is_right(task, sample)
        for task, found in samples(judged, names, limit, chat).items()
        for sample in found
    }


def whole_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> Any:
    """lm-eval's own `hf` model over a model that is in memory."""
    from lm_eval.models import huggingface  # type: ignore[import-not-found]

    own: Any = huggingface.HFLM  # lm-eval's decorator hides its type
    return own(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def samples(
    judged: Any, names: tuple[str, ...], limit: int | None, chat: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Task → what lm-eval keeps of each item: the document, the answers, its metrics. chat: by the chat template"""
    import lm_eval  # type: ignore[import-not-found]

    evaluate: Any = lm_eval.simple_evaluate  # as above
    try:
        if chat:
            _guard_template(judged)
        tasks = [str(Path(name).absolute()) if name.endswith(_FILE) else name for name in names]
        with hub_or_cache(), bounded_tasks(tuple(map(str, _files(names)))):
            found = evaluate(
                model=judged, tasks=tasks, limit=limit, log_samples=True, bootstrap_iters=0,
                task_manager=_manager(_files_only(names)), apply_chat_template=chat,
            )  # fmt: skip
    except LowbitError:
        raise
    except Exception as error:  # a task may raise anything: its data, its template, its metric
        text = f"{type(error).__name__}: {error}"
        if _names_the_hub(text):
            raise UsageError(f"{', '.join(names)}: the data cannot be had: {text[:300]}", _NO_DATA) from None
        hint = "run one task at a time to see which" if len(names) > 1 else "lm-eval's words say what is at fault"
        raise EngineFailure(f"lm-eval failed on {', '.join(names)}: {text[:300]}", hint) from None
    if getattr(judged, "unknown_greedy", False):
        _refuse_unknown(found.get("configs", {}))
    return found["samples"]


def _guard_template(judged: Any) -> None:
    """Have the model's chat template end, and fail by name."""
    name, render = str(judged.tokenizer.name_or_path), judged.apply_chat_template

    def guarded(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            with bounded_template(name):
                return render(history, add_generation_prompt)
        except LowbitError:
            raise
        except Exception as error:  # a template may raise anything
            raise CheckpointError(f"{name}: its chat template fails ({type(error).__name__}: {str(error)[:200]})",
                                  "repair it, or leave --chat-template out") from None  # fmt: skip

    judged.apply_chat_template = guarded


def _refuse_unknown(configs: dict[str, dict[str, Any]]) -> None:
    """EngineFailure where a task counts whether a continuation is the most probable one, which a server did not say."""
    asked = [task for task, config in configs.items() if config.get("output_type") == "loglikelihood"]
    if asked:
        raise EngineFailure(f"{asked[0]} counts the continuations that are the most probable; the server does not say "
                            "which those are", "vLLM, SGLang and llama.cpp do; or leave the task out")  # fmt: skip


def _is_right(task: str, sample: dict[str, Any]) -> bool:
    metric = next((name for name in _METRICS if isinstance(sample.get(name), int | float)), None)
    if metric is None:
        raise UsageError(
            f"{task} has no metric of right and wrong by item", f"tasks with one of {', '.join(_METRICS)} do"
        )
    return float(sample[metric]) >= 0.5
