"""`evaluate_kv_cache`: what each KV-cache type costs a model, at each context length.

The model is its own reference: for every window the log-probabilities with a cache in the compute dtype are computed
once, and those with every cache type, simulated inside the forward pass (`lowbit.kv.simulated`), are compared with them
on the spot. Weights are as the checkpoint has them; where its scheme quantizes activations, both sides do so.

Scales that types need are those stored in the checkpoint, where it has them, else calibrated on the packaged
calibration text. Models that do not fit in memory run block by block, with the same figures.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.architecture.shape import ModelShape, shape_of
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.kv_cache import attention_layers
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import ArchitectureError, LowbitError, UsageError
from lowbit.evaluation.activations import simulation_of
from lowbit.evaluation.blockwise import BlockwiseRuns, Context, Steps, block_count, fill_head
from lowbit.evaluation.cache_result import CacheEvaluation, LayerLoss, context_label
from lowbit.evaluation.forward import Runner
from lowbit.evaluation.memory import Way, choose_way
from lowbit.evaluation.metrics import Scores
from lowbit.evaluation.opening import Opened, Opener
from lowbit.evaluation.perplexity import score
from lowbit.evaluation.result import TextRecord
from lowbit.formats.gguf.layout import heads_of
from lowbit.formats.gguf.table import look_up, row_of_model, targets_of
from lowbit.kv.calibrated import measure_facts
from lowbit.kv.codecs import GgmlBlock, SideFacts
from lowbit.kv.simulated import CacheFacts, quantized_layers, simulated_cache
from lowbit.kv.types import CacheType, asked_cache_types
from lowbit.measure import Meter
from lowbit.registry import ENGINES, load
from lowbit.text import Protocol, Text, Windows, cut_windows, read_text

Progress = Callable[[int, int], None]
Origin = Literal["none", "stored", "calibrated"]
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 16, 512


@dataclass(frozen=True)
class _Variant:
    """A cache type over some layers: all that it quantizes, or one alone."""

    type: CacheType
    layers: tuple[int, ...]
    alone: bool = False

    @property
    def name(self) -> str:
        return f"{self.type.name}@{self.layers[0]}" if self.alone else self.type.name


@dataclass(frozen=True)
class _Asked:
    """The model, how it runs, and what is measured of it. activations: the context of its scheme's own rounding;
    facts, key_order: as `simulated_cache` takes them; left_out: notes on types that the model does not take."""

    opened: Opened
    way: Way
    options: OpenOptions
    activations: Context
    variants: tuple[_Variant, ...]
    facts: CacheFacts | None
    key_order: Tensor | None
    left_out: tuple[str, ...] = ()

    def context(self, variant: _Variant | None) -> Context:
        """Makes the context that the model runs in, with this cache or with one in the compute dtype."""

        @contextlib.contextmanager
        def within(model: nn.Module) -> Iterator[None]:
            with self.activations(model):
                if variant is None:
                    yield
                    return
                with simulated_cache(model, variant.type, self.facts, variant.layers, self.key_order):
                    yield

        return within


def evaluate_kv_cache(
    model: str | Path,
    types: str | Sequence[str],
    *,
    contexts: Sequence[int] = (512,),
    text: str | Path | None = None,
    windows: int = 40,
    protocol: Protocol = "full",
    activations: Literal["auto", "none"] = "auto",
    by_layer: bool = False,
    bos: bool | Literal["auto"] = "auto",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int | None = None,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> list[CacheEvaluation]:
    """KL divergence of a model with a quantized KV cache from the model with one in the compute dtype.

    model        a folder, a .gguf file, a Hugging Face id, or demo:smollm2; quantized or not
    types        names of `lowbit.kv.CACHE_TYPES`, pairs such as q8_0/q4_0, and names of engines for all of their types
                 that the model takes: a note names the others
    contexts     tokens of a window, one row for each
    windows      of the shortest context; longer ones get as many as hold the same tokens, at least one
    activations  "none": the scheme's activations stay in the compute dtype
    by_layer     also measure every layer with its cache alone quantized: as many runs more as there are layers
    bos, dtype, max_memory, protocol, progress   as in `evaluate`

    UsageError for an unknown type, a context beyond the model's, a type that the checkpoint's engine lacks;
    ArchitectureError for a model without such a cache; ShapeError for heads that a type does not take.
    """
    wanted = asked_cache_types(types if isinstance(types, str) else ",".join(types))
    if activations not in ("auto", "none"):
        raise UsageError(f"there is no activations mode {activations!r} of a cache", "choose auto or none")
    contexts = sorted(set(contexts))
    if not contexts or contexts[0] < 8:
        raise UsageError("a context has 8 tokens or more", "give some, such as 512,2k,8k")
    judged_text = read_text(text)
    with contextlib.ExitStack() as stack:
        opener = Opener(stack, dtype, device, options or OpenOptions())
        opened = opener.open(model, opener.options.adapter)
        _check_engine(opened, [row for row, _ in wanted])
        _check_contexts(opened, contexts)
        variants, left_out = _variants(opened, wanted, by_layer)
        chosen = [each.type for each in variants if not each.alone]
        way = choose_way([opened.loader], 1 + len(variants), max_memory)
        if not way.block_by_block:
            opened.loader.fill()
        rounded: Context = contextlib.nullcontext if activations == "none" else simulation_of(opened.checkpoint)
        facts, origin = _facts(opened, way, opener.options, chosen, rounded)
        order = _key_order(opened) if any(isinstance(each.keys, GgmlBlock) for each in chosen) else None
        asked = _Asked(opened, way, opener.options, rounded, variants, facts, order, left_out)
        found: list[CacheEvaluation] = []
        tokens = windows * contexts[0]
        cuts = [cut_windows(judged_text, opened.tokenizer, max(1, tokens // length), length, protocol, bos)
                for length in contexts]  # fmt: skip
        steps = _steps(asked, cuts, progress)
        for cut in cuts:
            meter = Meter()
            scores = _block_by_block(asked, cut, steps) if way.block_by_block else _whole(asked, cut, steps)
            shared = _shared(opened, judged_text, cut, protocol, dtype) | {"seconds": meter.seconds}
            found += _rows(asked, scores, shared, origin, _notes(asked, cut, max(1, tokens // cut.ids.shape[1])))
        return found


def parse_contexts(text: str) -> tuple[int, ...]:
    """ "512,2k,8k" → (512, 2048, 8192)."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", word)
        if match is None:
            raise UsageError(f"--context {word.strip()!r} is no number of tokens", "give some, such as 512,2k,8k")
        found.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(found)


def _check_engine(opened: Opened, types: Sequence[CacheType]) -> None:
    """UsageError for a type that no engine runs over such files: GGUF files are for llama.cpp. The demo model, which
    comes as one, stands for any model."""
    if opened.checkpoint.kind != "gguf" or opened.checkpoint.source.startswith("demo:"):
        return
    reading = {name for name, place in ENGINES.items() if load(place).loading.reads_gguf}
    for each in types:
        if each.engines and not reading & set(each.engines):
            raise UsageError(
                f"{opened.checkpoint.source} is a GGUF file, for {' and '.join(sorted(reading))}; cache type "
                f"{each.name} is one of {', '.join(each.engines)}",
                "choose q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl, or give the 16-bit model",
            )


def _check_contexts(opened: Opened, contexts: Sequence[int]) -> None:
    longest = getattr(opened.model.config, "max_position_embeddings", None)
    if longest is not None and contexts[-1] > longest:
        fits = [each for each in contexts if each <= longest] or [longest]
        raise UsageError(f"a context of {contexts[-1]} tokens; the model was trained for {longest}",
                         f"--context {','.join(map(str, fits))}")  # fmt: skip


def _key_order(opened: Opened) -> Tensor | None:
    """The value of a key head that is each of llama.cpp's, int64 [D]; None where it keeps the order, or has no such
    model."""
    architecture = opened.loader.architecture
    linears = [] if architecture is None else list(architecture.linears.values())
    keys = [linear for linear in linears if linear.role == "k_proj"][:1]
    config, order = opened.checkpoint.config(), None
    for linear in keys:
        try:
            [target] = targets_of(row_of_model(config, "config.json"), f"{linear.name}.weight", "config.json")
            get, rows = look_up(config, "config.json"), target.place.layout.rows
            if rows is not None:
                order = rows(get, linear.shape[0])[: linear.shape[0] // heads_of(get, "num_key_value_heads")]
        except (ArchitectureError, ValueError):  # a model without a place in GGUF
            return None
    return None if order is None else torch.from_numpy(order)


def _variants(
    opened: Opened, wanted: Sequence[tuple[CacheType, bool]], by_layer: bool
) -> tuple[tuple[_Variant, ...], tuple[str, ...]]:
    """(what is measured; notes on types that only an engine's name stands for and that the model does not take). The
    error of a type that does not fit, where it was asked for by name or none fits."""
    found: list[_Variant] = []
    unfit: list[LowbitError] = []
    for each, by_name in wanted:
        try:
            found.append(_Variant(each, _layers_of(opened, each)))
        except LowbitError as error:
            if by_name:
                raise
            unfit.append(error)
    if not found:
        raise unfit[0]
    if by_layer:
        found += [_Variant(each.type, (layer,), True) for each in list(found) for layer in each.layers]
    return tuple(found), tuple(dict.fromkeys(f"left out: {error}" for error in unfit))


def _layers_of(opened: Opened, cache_type: CacheType) -> tuple[int, ...]:
    layers = quantized_layers(opened.model, cache_type)
    if not layers:
        raise UsageError(
            f"cache type {cache_type.name} keeps {cache_type.skip_ends} layers at each end in 16 bits, which are all "
            f"that the model has",
            "choose a type that quantizes every layer, such as int4_per_token_head",
        )
    return layers


def _facts(
    opened: Opened, way: Way, options: OpenOptions, types: Sequence[CacheType], activations: Context
) -> tuple[CacheFacts | None, dict[str, Origin]]:
    """(what the types need, None for nothing; type → where that is from). Ranges that the checkpoint stores count for
    every type that needs ranges; distributions are always measured."""
    stored = opened.checkpoint.kv_cache
    measured = tuple(each for each in types if each.needs and (stored is None or "distribution" in each.needs))
    origin: dict[str, Origin] = {
        each.name: "none" if not each.needs else "calibrated" if each in measured else "stored" for each in types
    }
    facts: dict[int, tuple[SideFacts, SideFacts]] = {}
    if measured:
        longest = getattr(opened.model.config, "max_position_embeddings", None) or CALIBRATION_TOKENS
        cut = cut_windows(read_text(None, "calibration"), opened.tokenizer, CALIBRATION_WINDOWS,
                          min(CALIBRATION_TOKENS, longest))  # fmt: skip
        facts = dict(_measured(opened, way, options, measured, activations, cut.ids))
    if stored is not None:
        for layer, ranges in stored.absmax.items():
            keys, values = facts.get(layer, (SideFacts(ranges[0]), SideFacts(ranges[1])))
            facts[layer] = (replace(keys, range=ranges[0].float()), replace(values, range=ranges[1].float()))
    return facts or None, origin


@torch.inference_mode()
def _measured(
    opened: Opened, way: Way, options: OpenOptions, types: tuple[CacheType, ...], activations: Context, ids: Tensor
) -> CacheFacts:
    if way.block_by_block:
        blocks = BlockRunner(opened.checkpoint, opened.loader.dtype, opened.loader.device, options, way.states_memory)
        with activations(blocks.model):
            return measure_facts(blocks.model, types, lambda: blocks.run(ids, None))
    runner = Runner(opened.model)

    def run() -> None:
        for index in range(len(ids)):
            runner.decode(ids, index)

    with activations(opened.model):
        return measure_facts(opened.model, types, run)


def _whole(asked: _Asked, cut: Windows, steps: Steps) -> dict[str, Scores]:
    model = asked.opened.model
    base = Runner(model, partial(asked.context(None), model))
    runners = {each.name: Runner(model, partial(asked.context(each), model)) for each in asked.variants}
    scores = score(base, runners, cut, lambda done, _: steps.within(done))
    steps.finish(len(cut.ids))
    return scores


def _block_by_block(asked: _Asked, cut: Windows, steps: Steps) -> dict[str, Scores]:
    runs = BlockwiseRuns(cut.ids, asked.way.states_memory, asked.options, steps)
    base = runs.run(asked.opened, asked.context(None))
    runners = {each.name: runs.run(asked.opened, asked.context(each)) for each in asked.variants}
    fill_head(asked.opened)
    scores = score(base, runners, cut, lambda done, _: steps.within(done))
    steps.finish(len(cut.ids))
    return scores


def _steps(asked: _Asked, cuts: Sequence[Windows], progress: Progress | None) -> Steps:
    """A window counts once; block by block once for every block and run, and once more."""
    windows = sum(len(cut.ids) for cut in cuts)
    each = 1 + block_count(asked.opened) * (1 + len(asked.variants)) if asked.way.block_by_block else 1
    return Steps(windows * each, progress)


def _shared(opened: Opened, text: Text, cut: Windows, protocol: Protocol, dtype: torch.dtype) -> dict[str, Any]:
    """The fields that all rows of one context share."""
    schemes = {scheme.name for scheme in opened.checkpoint.schemes.values()}
    return {
        "model": opened.checkpoint.source,
        "scheme": " + ".join(sorted(schemes)) or None,
        "text": TextRecord(name=text.name, sha256=text.sha256, tokens=cut.text_tokens),
        "protocol": protocol,
        "context": cut.ids.shape[1],
        "windows": len(cut.ids),
        "first_scored": cut.first_scored,
        "scored_tokens": cut.scored_tokens,
        "bos": cut.bos,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _notes(asked: _Asked, cut: Windows, windows: int) -> tuple[str, ...]:
    notes = (*asked.opened.checkpoint.notes, *asked.way.notes, *asked.left_out)
    if len(cut.ids) < windows:
        notes += (f"{len(cut.ids)} windows of {cut.ids.shape[1]} tokens instead of {windows}: the text has "
                  f"{cut.text_tokens} tokens",)  # fmt: skip
    return notes


def _rows(
    asked: _Asked, scores: dict[str, Scores], shared: dict[str, Any], origin: dict[str, Origin], notes: tuple[str, ...]
) -> list[CacheEvaluation]:
    blocks = int(getattr(asked.opened.model.config.get_text_config(), "num_hidden_layers", 0))
    shape = _shape(asked.opened)
    rows = []
    for variant in asked.variants:
        if variant.alone:
            continue
        figures = scores[variant.name]
        assert figures.divergence is not None, "the model is its own reference"
        found = figures.divergence
        kept = variant.type
        alone = [LayerLoss(layer=each.layers[0], **_loss(scores[each.name])) for each in asked.variants
                 if each.alone and each.type is kept]  # fmt: skip
        bits, size = _bits(shape, variant, asked.opened)
        said = notes
        if len(variant.layers) < blocks:
            said += (f"{kept.name} quantizes the cache of {len(variant.layers)} of the {blocks} layers",)
        if not kept.rounds_at(shared["context"]):
            at = context_label(shared["context"])
            said += (f"at {at} tokens {kept.name} rounds nothing: its window keeps them all in 16 bits",)
        rows.append(CacheEvaluation(
            **shared, type=kept.name, engines=kept.engines, per=kept.per, how=kept.how, source=kept.source,
            bits_per_value=bits, bytes_per_token=size,
            scales=origin[kept.name], layers=variant.layers, by_layer=tuple(alone), notes=said, ppl=figures.ppl,
            **{name: getattr(found, name) for name in ("kld_mean", "kld_se", "kld_p99", "kld_max", "same_top1",
                                                       "same_top1_se", "ppl_ratio", "ppl_ratio_se")},
        ))  # fmt: skip
    return rows


def _loss(scores: Scores) -> dict[str, float]:
    assert scores.divergence is not None, "the model is its own reference"
    return {"kld_mean": scores.divergence.kld_mean, "kld_se": scores.divergence.kld_se}


def _shape(opened: Opened) -> ModelShape | None:
    try:
        return shape_of(opened.model.config.to_dict())
    except ArchitectureError:
        return None


def _head_sizes(shape: ModelShape | None) -> tuple[int, int | None]:
    """(values of a key, of a value); of MLA of the latent vector; 128 where config.json says too little."""
    if shape is None:
        return 128, None
    if shape.is_latent:
        return (shape.latent_rank or 0) + (shape.rope_dim or 0), None
    return shape.head_dim, None


def _bits(shape: ModelShape | None, variant: _Variant, opened: Opened) -> tuple[float, float | None]:
    """(bits of a value over all layers with a cache of their own, those that are not quantized in 16 bits; bytes of a
    token)."""
    key, value = _head_sizes(shape)
    config = opened.model.config.get_text_config()
    layers = sorted(set(attention_layers(opened.model).values()))
    own = layers[: len(layers) - int(getattr(config, "num_kv_shared_layers", 0) or 0)]
    quantized = len(set(own) & set(variant.layers))
    bits = (quantized * variant.type.bits(key, value) + (len(own) - quantized) * 16.0) / len(own)
    if shape is None:
        return bits, None
    values = key if shape.is_latent else 2 * shape.kv_heads * key
    return bits, len(own) * values * bits / 8
