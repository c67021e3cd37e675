"""Rotations folded into the weights: the parts of QuaRot (Ashkboos et al., arXiv 2404.00456) that need no support from
the engine. A rotation mixes all channels, so that no channel stands out when a group is rounded.

`rotate_values`: R [d, d] in every head, between v_proj and o_proj (attention mixes tokens, not channels):

    v_proj   W' = Rᵀ W   b' = Rᵀ b   per key/value head
    o_proj   W' = W R                per query head

`rotate_block`, `rotate_outside`: Q [H, H] on the residual stream. RMSNorm commutes with a rotation once its weight is
1, so every norm's weight is folded into its readers first:

    norm            w' = 1 (0 if the norm multiplies with 1 + w)
    its readers     W' = W diag(w) Q         q, k, v, gate, up, routers, the head
    writers         W' = Qᵀ W, b' = Qᵀ b     o_proj, down_proj
    embedding       E' = E Q

Statistics are transformed exactly where possible: H' = Qᵀ diag(w)⁻¹ H diag(w)⁻¹ Q, drift likewise, mean x² from the
diagonal. Largest and mean magnitudes become upper bounds:

    absmax_j    min( Σ_i |Q_ij| absmax_i,  sqrt(tokens · mean x²_j) )
    mean |x_j|  sqrt(mean x²_j)

Without a Hessian, or with zeros in a norm's weight, which hide its input, statistics are dropped and must be measured
again. It is best to rotate the residual stream before measuring: then the hidden states of the whole run are in the
rotated basis.

The residual stream cannot be rotated (`residual_refusal`) under LayerNorm, which subtracts the mean, with norms after
attention or MLP, or if something else reads or writes the stream (images, prediction blocks). A head that is tied to
the embedding becomes a tensor of its own, V · H more weights, since only the head takes the final norm's weight
(`needs_own_head`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import ArchitectureError, UsageError
from lowbit.numerics.hadamard import Rotation, make_rotation
from lowbit.tensors import LayerStats
from lowbit.transform.block import BlockTensors, FakeQuantize, TransformNote
from lowbit.transform.facts import ModelFacts, ScalingPoint
from lowbit.transform.fold import scaled_stats
from lowbit.transform.loss import RoundingLoss, quick_products

_ROWS = 512  # sampled per linear, for the errors


@dataclass(frozen=True)
class RotateOptions:
    """
    seed    of the random signs, the same for the whole model
    always  rotate values even if rounding does not gain
    """

    seed: int = 0
    always: bool = False


@dataclass(frozen=True)
class StreamRotations:
    """The rotations of a whole model, which are folded before anything is measured.

    name      of the transform that they belong to
    residual  of the residual stream, [H, H]
    values    block → of the values of every head, [d, d]; blocks without one keep theirs
    detail    what they are, for the report
    """

    name: str
    residual: Rotation
    values: Mapping[int, Rotation]
    detail: str


def apply_values(
    block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize, options: RotateOptions | None = None
) -> list[TransformNote]:
    """Rotate between v_proj and o_proj, unless both then round worse."""
    options = options or RotateOptions()
    points, left_out = facts.points(block.linears[0].block or 0)
    outputs = {linear.reads for linear in block.linears if linear.role == "o_proj"}
    notes = [TransformNote(each, "rotate", None, None, False, why) for each, why in left_out.items() if each in outputs]
    for point in points:
        if not point.feeds_output_projection:
            continue
        linears = [linear for linear in block.linears if linear.name == point.feeder] + list(point.readers)
        before = _errors(block, linears, fake_quantize)
        kept = BlockTensors(block.linears, dict(block.tensors), dict(block.stats), block.dtypes)
        rotation = make_rotation(point.columns // facts.heads, options.seed)
        rotate_values(block, point, rotation)
        after = _errors(block, linears, fake_quantize)
        applied = options.always or before is None or after is None or after < before
        if not applied:
            block.tensors, block.stats = kept.tensors, kept.stats
        detail = f"Hadamard rotation of {rotation.size} channels" if applied else "rounding gains nothing"
        notes.append(TransformNote(point.feeder, "rotate", before, after if applied else before, applied, detail))
    return notes


def apply_stream(
    block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize, rotations: StreamRotations
) -> list[TransformNote]:
    """Rotate a block's side of the residual stream, and its values where there is a rotation for them."""
    before = _errors(block, block.linears, fake_quantize)
    turn_block(block, facts, rotations)
    after = _errors(block, block.linears, fake_quantize)
    name = facts.architecture.blocks[block.linears[0].block or 0]
    return [TransformNote(name, rotations.name, before, after, True, rotations.detail)]


def turn_block(block: BlockTensors, facts: ModelFacts, rotations: StreamRotations) -> None:
    """Fold the rotations of a model into one block. Gradients pass, to the bases of the rotations."""
    index = block.linears[0].block or 0
    point = value_point(facts, index)
    if point is not None and index in rotations.values:
        rotate_values(block, point, rotations.values[index])
    rotate_block(block, rotations.residual, facts)


def value_point(facts: ModelFacts, block: int) -> ScalingPoint | None:
    """Where the values of a block's attention can be rotated."""
    return next((point for point in facts.points(block)[0] if point.feeds_output_projection), None)


def hadamard_rotations(facts: ModelFacts, seed: int = 0) -> StreamRotations:
    """A Hadamard rotation of the residual stream, and none of values."""
    rotation = residual_rotation(facts, seed)
    kind = "Hadamard" if rotation.hadamard else "random orthogonal"
    return StreamRotations("hadamard", rotation, {}, f"{kind} rotation of {rotation.size} channels, seed {seed}")


def residual_rotation(facts: ModelFacts, seed: int = 0) -> Rotation:
    """The rotation of a model's residual stream; UsageError if there can be none."""
    refuse_residual(facts)
    return make_rotation(facts.hidden, seed)


def refuse_residual(facts: ModelFacts) -> None:
    """UsageError if the residual stream of a model cannot be rotated."""
    why = residual_refusal(facts)
    if why is not None:
        raise UsageError(
            f"the residual stream of {facts.architecture.class_name} cannot be rotated: {why}",
            "omit `hadamard`; `rotate` rotates the values of attention, which every model allows",
        )


def rotate_values(block: BlockTensors, point: ScalingPoint, rotation: Rotation) -> None:
    """Rotate the values of every head at a point v → o; rotation of the columns per head."""
    for leaf in ("weight", "bias"):
        name = f"{point.feeder}.{leaf}"
        if name in block.tensors:
            values = block.tensors[name].clone()
            rows = slice(None) if point.rows is None else point.rows.to(values.device)
            values[rows] = rotation.rows(values[rows])
            block.tensors[name] = values
    for reader in point.readers:
        block.tensors[f"{reader.name}.weight"] = rotation.columns(block.weight(reader))
    for source in point.sources:
        _turn_stats(block, source, rotation)


def rotate_block(block: BlockTensors, rotation: Rotation, facts: ModelFacts) -> None:
    """Fold the norms of a block into their readers, then rotate what reads and what writes the residual stream."""
    norms: dict[str, list[Linear]] = {}
    for linear in block.linears:
        if reads_residual(linear, facts):
            norms.setdefault(linear.fed_by or "", []).append(linear)
    for norm, readers in norms.items():
        name, one = f"{norm}.weight", float(facts.adds_one(norm))
        weight = block.tensors[name] + one
        block.tensors[name] = torch.full_like(weight, 1.0 - one)
        for reader in readers:
            block.tensors[f"{reader.name}.weight"] = rotation.columns(block.weight(reader) * weight)
        for source in dict.fromkeys(reader.reads for reader in readers if reader.reads in block.stats):
            if bool((weight == 0).any()):
                del block.stats[source]
            else:
                block.stats[source] = scaled_stats(block.stats[source], weight)
                _turn_stats(block, source, rotation)
    for linear in block.linears:
        if writes_residual(linear, facts):
            for name in (f"{linear.name}.weight", f"{linear.name}.bias"):
                if name in block.tensors:
                    block.tensors[name] = rotation.rows(block.tensors[name])


def rotate_outside(tensors: dict[str, Tensor], rotation: Rotation, facts: ModelFacts) -> dict[str, Tensor]:
    """Embedding, final norm and head, rotated; `tensors` holds the three under their stored names.

    To untie a tied head, pass the embedding under its name too, and write both with tie_word_embeddings false. Without
    a head, a final norm of equal weights stays and the tie holds; UsageError for any other norm.
    """
    outside = facts.outside
    one = float(facts.adds_one(outside.norm.removesuffix(".weight")))
    embedding, norm = tensors[outside.embedding], tensors[outside.norm] + one
    turned = {outside.embedding: rotation.columns(embedding), outside.norm: tensors[outside.norm]}
    head = tensors.get(outside.head)
    if head is not None:
        turned[outside.head] = rotation.columns(head * norm)
        turned[outside.norm] = torch.full_like(norm, 1.0 - one)
    elif not bool((norm == norm[0]).all()):
        raise UsageError(
            f"{outside.head} is tied to {outside.embedding}, and the final norm {outside.norm} has weights that only "
            f"the head may take",
            f"untie them: the head becomes a tensor of its own, {embedding.numel():,} more weights in the file",
        )
    return turned


def needs_own_head(checkpoint: Checkpoint, facts: ModelFacts) -> bool:
    """True for a tied head whose final norm has weights, which only the head may take once the stream is rotated."""
    norm = checkpoint.read(facts.outside.norm)
    return facts.outside.head not in checkpoint.tensors and not bool((norm == norm[0]).all())


def rotated_outside(checkpoint: Checkpoint, facts: ModelFacts, rotation: Rotation) -> dict[str, Tensor]:
    """Stored name → embedding, final norm and head of a model whose residual stream is rotated, float32."""
    outside = facts.outside
    tensors = {name: checkpoint.read(name).float() for name in (outside.embedding, outside.norm, outside.head)
               if name in checkpoint.tensors}  # fmt: skip
    return rotate_outside(tensors, rotation, facts)


def reads_residual(linear: Linear, facts: ModelFacts) -> bool:
    return linear.fed_by is not None and _is_block_norm(linear.fed_by, facts)


def writes_residual(linear: Linear, facts: ModelFacts) -> bool:
    return linear.role in ("o_proj", "down_proj") and linear.shape[0] == facts.hidden


def residual_refusal(facts: ModelFacts) -> str | None:
    """The reason why the residual stream cannot be rotated, or None."""
    architecture = facts.architecture
    kinds = {facts.architecture.norms.get(linear.fed_by or "") for linear in architecture.linears.values()}
    if "layer" in kinds:
        return "its LayerNorms subtract the mean of all channels, which a rotation changes"
    try:
        facts.outside  # noqa: B018  raises where there is more than one embedding, norm or head
    except ArchitectureError as error:
        return str(error)
    if "experts" in architecture.roles.values():
        return "its experts are stored in one tensor"
    if architecture.prediction_blocks:
        return f"its {architecture.prediction_blocks} blocks for multi-token prediction read the stream too"
    feeding = {linear.fed_by for linear in architecture.linears.values()}
    for name, role in architecture.roles.items():
        owner = name.rpartition(".")[0]
        if role == "norm" and _is_block_norm(owner, facts) and owner not in feeding:
            return f"{owner} follows attention or MLP, not before linears"
    for linear in architecture.linears.values():
        inner = linear.fed_by is not None and not reads_residual(linear, facts)
        if linear.block is not None and not (inner or reads_residual(linear, facts) or writes_residual(linear, facts)):
            return f"{linear.name} reads the stream with no norm of its own before it"
    return beside_stream(facts)


def beside_stream(facts: ModelFacts) -> str | None:
    """A tensor outside the blocks that is not embedding, final norm or head, as a reason."""
    outside = facts.outside
    known = {outside.embedding, outside.norm, outside.head, outside.head.removesuffix("weight") + "bias"}
    for name in facts.architecture.parameters:
        if facts.architecture.block_of(name) is None and name not in known:
            return f"{name} is neither in a block nor the embedding, the final norm or the head"
    return None


def _is_block_norm(name: str, facts: ModelFacts) -> bool:
    """True for a norm of a block on the residual stream, not inside its attention."""
    block = facts.architecture.block_of(name + ".")
    return block is not None and name.rpartition(".")[0] == facts.architecture.blocks[block] \
        and facts.architecture.roles.get(f"{name}.weight") == "norm"  # fmt: skip


def _turn_stats(block: BlockTensors, source: str, rotation: Rotation) -> None:
    stats = block.stats.get(source)
    if stats is not None:
        turned = rotated_stats(stats, rotation)
        if turned is None:
            del block.stats[source]
        else:
            block.stats[source] = turned


def rotated_stats(stats: LayerStats, rotation: Rotation) -> LayerStats | None:
    """Statistics of x Q, some of them bounds (module docstring); None without a Hessian."""
    if stats.hessian is None:
        return None
    hessian = rotation.sandwich(stats.hessian)
    total = hessian.diagonal().clamp(min=0.0)
    magnitudes = rotation.matrix().abs().to(stats.absmax)
    bound = (stats.absmax.reshape(-1, rotation.size) @ magnitudes).flatten()
    return replace(
        stats,
        absmax=torch.minimum(bound, total.sqrt()),
        mean_sq=total / max(stats.tokens, 1),
        mean=None if stats.mean is None else rotation.columns(stats.mean),
        mean_abs=(total / max(stats.tokens, 1)).sqrt(),
        hessian=hessian,
        drift=None if stats.drift is None else rotation.sandwich(stats.drift),
        lost=None if stats.lost is None else rotation.columns(stats.lost),
        weighted={
            linear: tuple(turned for part in parts if (turned := rotated_stats(part, rotation)) is not None)
            for linear, parts in stats.weighted.items()
        },
    )


def _errors(
    block: BlockTensors, linears: list[Linear] | tuple[Linear, ...], fake_quantize: FakeQuantize
) -> float | None:
    """Mean relative rounding error of the linears; None without statistics."""
    errors = []
    with quick_products():
        for linear in linears:
            loss = RoundingLoss(block, [linear], fake_quantize, _ROWS)
            if loss.rounded:
                errors.append(loss.relative(loss.at(None)))
    return sum(errors) / len(errors) if errors else None
