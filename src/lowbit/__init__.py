"""lowbit: any checkpoint in, any engine's low-bit checkpoint out, with proof of what it cost.

The public calls are loaded when they are first used; importing the package imports nothing heavy.

    lowbit.quantize("demo:smollm2", "out", scheme="W4A16")
    lowbit.convert("out", "out-gptq", format="gptq")
    lowbit.verify("out", engine="vllm")
    lowbit.evaluate("out", reference="demo:smollm2")
    lowbit.bench("out", engine="transformers")
    model, tokenizer = lowbit.load("out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowbit.version import __version__

_CALLS = {
    "quantize": "lowbit.api:quantize",
    "convert": "lowbit.api:convert",
    "dry_run": "lowbit.api:dry_run",
    "verify": "lowbit.verification:verify",
    "evaluate": "lowbit.evaluation:evaluate",
    "evaluate_kv_cache": "lowbit.evaluation:evaluate_kv_cache",
    "advise": "lowbit.advice:advise",
    "allocate": "lowbit.allocation:allocate",
    "bench": "lowbit.benchmark.run:bench",
    "compare": "lowbit.comparison:compare",
    "diagnose": "lowbit.diagnosis:diagnose",
    "estimate": "lowbit.estimation:estimate",
    "evaluate_tasks": "lowbit.tasks.run:evaluate_tasks",
    "inspect": "lowbit.api:inspect",
    "load": "lowbit.evaluation:load",
    "generate": "lowbit.evaluation:generate",
    "refine": "lowbit.refinement:refine",
    "imatrix": "lowbit.formats.gguf.imatrix:imatrix",
    "finetune": "lowbit.train.finetuning:finetune",
}

_PACKAGES = ("train",)  # of calls that have a name of their own in it

__all__ = ["__version__", *_CALLS, *_PACKAGES]

if TYPE_CHECKING:
    from lowbit import train as train
    from lowbit.advice import advise as advise
    from lowbit.allocation import allocate as allocate
    from lowbit.api import convert as convert
    from lowbit.api import dry_run as dry_run
    from lowbit.api import inspect as inspect
    from lowbit.api import quantize as quantize
    from lowbit.benchmark.run import bench as bench
    from lowbit.comparison import compare as compare
    from lowbit.diagnosis import diagnose as diagnose
    from lowbit.estimation import estimate as estimate
    from lowbit.evaluation import evaluate as evaluate
    from lowbit.evaluation import evaluate_kv_cache as evaluate_kv_cache
    from lowbit.evaluation import generate as generate
    from lowbit.evaluation import load as load
    from lowbit.formats.gguf.imatrix import imatrix as imatrix
    from lowbit.refinement import refine as refine
    from lowbit.tasks.run import evaluate_tasks as evaluate_tasks
    from lowbit.train.finetuning import finetune as finetune
    from lowbit.verification import verify as verify


def _with_near_names(call: Any) -> Any:
    """The call; its TypeError for a keyword that it does not have names the nearest one."""
    import functools
    import inspect

    from lowbit.spellings import meant_option

    parameters = inspect.signature(call).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):  # which says so itself
        return call

    @functools.wraps(call)
    def checked(*args: Any, **named: Any) -> Any:
        for name in named.keys() - parameters.keys():
            hint = meant_option(name, parameters, f"it takes {', '.join(parameters)}")
            raise TypeError(f"lowbit.{call.__name__}() has no argument {name!r}; {hint}")
        return call(*args, **named)

    return checked


def __getattr__(name: str) -> Any:
    if name in _CALLS:
        module, attribute = _CALLS[name].split(":")
        return _with_near_names(getattr(importlib.import_module(module), attribute))
    if name in _PACKAGES:
        return importlib.import_module(f"lowbit.{name}")
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public calls, which tab completion then lists before any is loaded."""
    return sorted(__all__)
