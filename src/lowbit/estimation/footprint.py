"""Bytes of a model's weights in a scheme, and the bytes that a decoding step reads, from its shape alone.

    dense     attention, MLPs outside of experts, routers, norms: read by every step
    head      the output layer: read by every step; in 16 bits in folders, in its own type in GGUF files
    experts   of E experts with k per token, a step of B tokens meets E · (1 − (1 − k/E)^B) on average
    embedding looked up, so a step reads one row; counted once if the output layer shares it

Bits per weight are the exporter's own (`stored_tensors` of a 4096 × 4096 linear), or those of the types that a GGUF
file type gives the tensors of a Llama. `Footprint.scaled` corrects them to the exact bytes of the files if they are
known. Biases and vision towers are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from lowbit.architecture.shape import ModelShape
from lowbit.engines.engine import DOUBLE_QUANT, SIXTEEN
from lowbit.schemes import is_gguf_name
from lowbit.settings import make_settings

_SIDE = 4096  # of the linear that bits per weight are taken from
_SIXTEEN_BITS = 16.0


class Matrix(NamedTuple):
    """A weight [rows, columns] of one layer, or of none. part  "dense", "experts", "head" or "embedding"."""

    name: str
    layer: int | None
    rows: int
    columns: int
    part: str
    copies: int = 1

    @property
    def weights(self) -> int:
        return self.rows * self.columns * self.copies


@dataclass(frozen=True)
class Footprint:
    """Bytes. experts  of all experts of all layers; of `expert_count` in each, `experts_used` per token."""

    dense: float
    head: float
    embedding: float
    experts: float = 0.0
    expert_count: int = 0
    experts_used: int = 0

    @property
    def total(self) -> float:
        return self.dense + self.head + self.embedding + self.experts

    def read_by_a_step(self, batch: int) -> float:
        """Bytes that one decoding step of `batch` sequences reads of the weights."""
        return self.dense + self.head + self.experts * self.touched(batch)

    def touched(self, batch: int) -> float:
        """Share of the experts that a step meets, if tokens choose them independently."""
        if not self.expert_count:
            return 0.0
        return 1.0 - (1.0 - self.experts_used / self.expert_count) ** batch

    def scaled(self, total: float) -> Footprint:
        """The same in proportion, with this total: the exact bytes of the files."""
        factor = total / self.total
        return replace(self, dense=self.dense * factor, head=self.head * factor, embedding=self.embedding * factor,
                       experts=self.experts * factor)  # fmt: skip


def footprint(shape: ModelShape, scheme: str, group_size: int | None = None) -> Footprint:
    """The bytes of a model in a scheme, a GGUF file type, or `SIXTEEN`. group_size  None: the scheme's."""
    bits = _gguf_bits(shape, scheme) if is_gguf_name(scheme) else _folder_bits(shape, scheme, group_size)
    parts: dict[str, float] = dict.fromkeys(("dense", "head", "embedding", "experts"), 0.0)
    for matrix, each in zip(matrices(shape), bits, strict=True):
        parts[matrix.part] += matrix.weights * each / 8
    return Footprint(
        parts["dense"], parts["head"], parts["embedding"], parts["experts"], shape.experts, shape.experts_per_token
    )  # fmt: skip


def active_weights(shape: ModelShape) -> int:
    """Weights that one token is multiplied with, the output layer included."""
    share = shape.experts_per_token / shape.experts if shape.experts else 0.0
    counted = {"dense": 1.0, "head": 1.0, "experts": share, "embedding": float(shape.tied)}
    return round(sum(matrix.weights * counted[matrix.part] for matrix in matrices(shape)))


@lru_cache(maxsize=8)
def matrices(shape: ModelShape) -> tuple[Matrix, ...]:
    """Every matrix of the model under its name in GGUF. A shared output layer is the embedding, read by every step."""
    found = [
        Matrix("token_embd.weight", None, shape.vocab, shape.hidden, "head" if shape.tied else "embedding"),
        *(matrix for layer in range(shape.layers) for matrix in _layer(shape, layer)),
    ]
    if not shape.tied:
        found.append(Matrix("output.weight", None, shape.vocab, shape.hidden, "head"))
    return tuple(found)


def _layer(shape: ModelShape, layer: int) -> list[Matrix]:
    hidden, prefix = shape.hidden, f"blk.{layer}."
    if shape.is_latent:  # as one matrix of as many weights; latent projections differ from model to model
        rank, rope, nope = shape.latent_rank or 0, shape.rope_dim or 0, shape.nope_dim or 0
        value = shape.value_dim or nope
        down = hidden * (shape.heads * (nope + rope) + rank + rope)
        weights = down + rank * shape.heads * (nope + value) + shape.heads * value * hidden
        found = [Matrix(f"{prefix}attn_output.weight", layer, weights // hidden, hidden, "dense")]
    else:
        queries, values = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        found = [
            Matrix(f"{prefix}attn_q.weight", layer, queries, hidden, "dense"),
            Matrix(f"{prefix}attn_k.weight", layer, values, hidden, "dense"),
            Matrix(f"{prefix}attn_v.weight", layer, values, hidden, "dense"),
            Matrix(f"{prefix}attn_output.weight", layer, hidden, queries, "dense"),
        ]
    if not shape.experts or layer < shape.dense_layers:
        return found + _mlp(prefix, layer, shape.intermediate, hidden, "dense", "")
    found += _mlp(prefix, layer, shape.expert_intermediate, hidden, "experts", "_exps", shape.experts)
    if shape.shared_experts:
        found += _mlp(prefix, layer, shape.expert_intermediate * shape.shared_experts, hidden, "dense", "_shexp")
    return found


def _mlp(
    prefix: str, layer: int, inner: int, hidden: int, part: str, suffix: str, copies: int = 1
) -> list[Matrix]:  # fmt: skip
    return [
        Matrix(f"{prefix}ffn_gate{suffix}.weight", layer, inner, hidden, part, copies),
        Matrix(f"{prefix}ffn_up{suffix}.weight", layer, inner, hidden, part, copies),
        Matrix(f"{prefix}ffn_down{suffix}.weight", layer, hidden, inner, part, copies),
    ]


def _folder_bits(shape: ModelShape, scheme: str, group_size: int | None) -> list[float]:
    """Embeddings and output layer stay in 16 bits, as `lowbit quantize` leaves them."""
    inside = _SIXTEEN_BITS if scheme == SIXTEEN else scheme_bits(scheme, group_size)
    return [inside if matrix.part in ("dense", "experts") else _SIXTEEN_BITS for matrix in matrices(shape)]


@lru_cache(maxsize=64)
def scheme_bits(scheme: str, group_size: int | None = None) -> float:
    """Bits per weight of a scheme in the format that it is written in by default, scales and zero points included."""
    import torch

    from lowbit.export import default_format, find_exporter

    settings = make_settings(None, scheme=scheme, group_size=group_size, double_quant=scheme in DOUBLE_QUANT)
    found = settings.base_scheme()
    stored = find_exporter(default_format(found)).stored_tensors("l", (_SIDE, _SIDE), found, torch.bfloat16)
    return 8 * sum(tensor.nbytes for tensor in stored) / _SIDE**2


@lru_cache(maxsize=64)
def _gguf_bits(shape: ModelShape, file_type: str) -> list[float]:
    from lowbit.formats.gguf.mix import MixFacts, TensorShape, choose_types
    from lowbit.numerics.ggml.types import TYPES

    facts = MixFacts("llama", shape.layers, shape.experts, shape.heads, shape.kv_heads, "BF16")
    found = matrices(shape)
    tensors = [
        TensorShape(m.name, (m.copies, m.rows, m.columns) if m.copies > 1 else (m.rows, m.columns)) for m in found
    ]
    choices = choose_types(file_type, tensors, facts, has_imatrix=True)
    return [TYPES[choices[matrix.name].type_name].bits_per_weight for matrix in found]
