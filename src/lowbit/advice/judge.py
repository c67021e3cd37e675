"""Would `lowbit verify` refuse what a plan writes? Asked before anything is written.

The files of the plan are made without their weights: config.json, the format's own JSON files, and a safetensors file
that is all header. The engine's rules about its kernels and loaders (`Rule.limit`) need no more, but for those that
look at values (`Rule.reads_values`), so the same functions judge the plan and, later, the files: model dtype, bits,
group sizes, shapes, formats without a loader, experts, models whose class refuses a format; and for several cards,
whether every layer splits at whole groups.

Of a shape without files a stand-in is planned: transformers' class of its model type, with the shape's widths, one
layer of each kind and a few experts, in bfloat16. Rules speak of kinds of layers and of widths, so it is judged as the
model would be. Of a model type that transformers does not have nothing is known, and nothing is refused.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lowbit.architecture.shape import SPELLINGS, ModelShape, shape_of
from lowbit.checkpoint.base import OpenOptions, transformers_config
from lowbit.checkpoint.remote import folder_for_copies, safetensors_without_weights
from lowbit.checkpoint.safetensors import TORCH_DTYPE
from lowbit.engines import Engine, find_engine
from lowbit.engines.servers import split_problem
from lowbit.errors import LowbitError
from lowbit.estimation.weights import open_headers, plan_of
from lowbit.plan.folder import FolderPlan
from lowbit.plan.plan import Prepared
from lowbit.settings import make_settings
from lowbit.verification import rules
from lowbit.verification.result import PLAIN, shortened
from lowbit.verification.subject import Subject

_NAMES = {dtype: name for name, dtype in TORCH_DTYPE.items()}


def why_refused(prepared: Prepared, engine: Engine, options: OpenOptions, ranks: int = 1) -> str | None:
    """Why an engine would not load the files of a plan; None where no rule speaks against them, and for GGUF files.

    ranks  cards that divide every matrix among them
    """
    plan = prepared.plan
    if not isinstance(plan, FolderPlan):
        return None
    with folder_for_copies("planned") as folder:
        for name, content in plan.json_files(prepared.checkpoint).items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        tensors = {tensor.name: (_NAMES[tensor.dtype], tensor.shape) for tensor in plan.stored}
        described = {tensor.name: tensor.described for tensor in plan.stored if tensor.described is not None}
        safetensors_without_weights(folder / "model.safetensors", tensors, described)
        subject = Subject(folder=folder, engine=engine.name, options=options)
        try:
            return _first_problem(subject, engine, ranks)
        finally:
            subject.close()


def _first_problem(subject: Subject, engine: Engine, ranks: int) -> str | None:
    if subject.format == PLAIN:
        return None
    for rule in rules(engine.name, subject.format):
        if rule.limit and not rule.reads_values:
            try:
                problems = rule.check(subject).problems
            except LowbitError as error:
                problems = [str(error)]
            if problems:
                return f"{engine.label} would refuse it ({rule.name}): {shortened(problems[:1])}"
    problem = None if ranks == 1 else split_problem(subject, ranks)
    return None if problem is None else f"it does not split among {ranks} cards: {problem}"


def why_shape_refused(shape: ModelShape, settings: dict[str, Any], engine: Engine, ranks: int = 1) -> str | None:
    """The same of a model of which only the shape is known, judged by its stand-in."""
    small = replace(shape, layers=shape.dense_layers + 1, experts=min(shape.experts, 2 * shape.experts_per_token),
                    layer_types=(), max_positions=None)  # fmt: skip
    return _stand_in_refused(small, json.dumps(settings, sort_keys=True), engine.name, ranks)


@lru_cache(maxsize=1024)
def _stand_in_refused(small: ModelShape, settings: str, engine: str, ranks: int) -> str | None:
    config, options = stand_in(small), OpenOptions()
    if config is None:
        return None
    with open_headers(config, options) as headers:
        try:
            prepared, _ = plan_of(headers, make_settings(None, **json.loads(settings)), options)
        except LowbitError as error:
            return str(error)
        try:
            return why_refused(prepared, find_engine(engine), options, ranks)
        finally:
            prepared.checkpoint.close()


@lru_cache(maxsize=64)
def stand_in(shape: ModelShape) -> dict[str, Any] | None:
    """config.json of a model of this type and shape, in bfloat16; None where transformers has no language model of the
    type, or its class does not take the numbers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(shape.model_type)
    if named is None:
        return None
    about = {"model_type": shape.model_type, "dtype": "bfloat16", "tie_word_embeddings": shape.tied,
             "architectures": [named if isinstance(named, str) else named[0]]}  # fmt: skip
    try:
        spelled = transformers_config({"model_type": shape.model_type}).to_dict()
        numbers = {name: getattr(shape, what) for what, names in SPELLINGS.items() for name in names
                   if name in spelled and getattr(shape, what)}  # fmt: skip
        if shape.head_dim != shape.hidden // shape.heads:
            numbers["head_dim"] = shape.head_dim  # the defaults of some classes leave it out
        if shape.dense_layers and "first_k_dense_replace" in spelled:
            numbers["first_k_dense_replace"] = shape.dense_layers
        config = about | numbers
        taken = shape_of(config)
    except Exception:  # whatever the validators of the class raise
        return None
    wanted = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "experts", "expert_intermediate")
    return config if all(getattr(taken, what) == getattr(shape, what) for what in wanted) else None
