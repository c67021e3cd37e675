"""GPTQ checkpoints, version 1 (AutoGPTQ) and 2 (GPTQModel), loaded by vLLM, SGLang, GPTQModel and transformers.

For a linear `L` with weight [N, K], b = 2, 3, 4 or 8 bits, G groups; everything lies transposed:

    L.qweight  int32 [K·b/32, N]     u = code + 2^(b−1), dense, low bits first, down the columns (along K)
    L.qzeros   int32 [G, N·b/32]     zero point, dense, low bits first, along N; 2^(b−1) where the scheme is symmetric
    L.scales   float16 [G, N]
    L.g_idx    int32 [K]             column // g

    decoded = (u − zero) · scale     v2 stores `zero`; v1 stores `zero − 1`

A zero of 0 in version 1 would be stored as −1, and readers disagree on the field for it: AutoGPTQ's
packer lets −1 run over all the neighbours above it; a field of all ones is 0 to the torch path of its qlinear_cuda_old
with 2, 4 and 8 bits, 2^b there with 3 bits and in qlinear_cuda and the Triton kernels; and in GPTQModel, which adds 1
to whole words, it carries into the next field. So version 1 never stores it:

    - quantizing chooses ranges whose zero is at least 1 (`lowest_zero_point`)
    - codes that come with a zero of 0 are moved up by one together with it, which decodes to the same bits
    - a group that also uses the code 2^b − 1 cannot move: `inexact` says so, and `pack` raises FormatError

Refused: other bit widths (GPTQModel's planar 5 to 7 bits), activation quantization, rows and columns that do not fill
words, groups that do not divide K.
Spec: AutoGPTQ 0.7.1 qlinear_cuda_old.py; GPTQModel 7.7 qlinear/__init__.py, utils/model.py; vLLM 0.32 auto_gptq.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit import kernels
from lowbit.errors import FormatError
from lowbit.export import Piece, float16_scales, fused_names, none_needless, usual_engine
from lowbit.export.safetensors_writer import StoredTensor
from lowbit.schemes import Scheme, WeightSpec
from lowbit.tensors import Granularity, InputRange, QuantizedTensor
from lowbit.version import __version__

ROWS_PER_WORDS = {2: 16, 3: 32, 4: 8, 8: 4}  # by bits: the fewest codes that fill whole 32-bit words

_HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class GptqExporter:
    """See `lowbit.export.Exporter`. `version` is 1 or 2: how zero points are stored."""

    FORMAT: str
    version: int

    def storage_format(self, scheme: Scheme) -> str:
        """FORMAT; FormatError for what GPTQ cannot hold."""
        weight = scheme.weight
        grouped = weight.granularity in (Granularity.GROUP, Granularity.CHANNEL)
        plain = weight.number == "int" and weight.scale_format == "model" and not weight.narrow
        if scheme.activation is not None or not plain or not grouped or weight.bits not in ROWS_PER_WORDS:
            raise FormatError(
                f"{self.FORMAT} cannot hold {scheme.name}: it stores integer weights of 2, 3, 4 or 8 bits with a scale "
                f"per group or row, and leaves activations alone",
                "choose W4A16, W8A16, W3A16 or W2A16, or leave --format out",
            )
        return self.FORMAT

    def unfit(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Why a shape cannot be stored: codes must fill 32-bit words both ways, groups must divide the row."""
        rows, columns = shape
        bits, group_size = scheme.weight.bits, scheme.weight.columns_per_scale(columns)
        if columns % group_size:
            return f"{columns} columns do not divide into groups of {group_size}"
        for count, what in ((columns, "columns"), (rows, "rows")):
            if count * bits % 32:
                return f"{count} {what} of {bits}-bit codes do not fill 32-bit words; GPTQ packs {what} whole"
        return None

    def scale_format(self, scheme: Scheme, dtype: torch.dtype) -> str:
        return float16_scales(scheme, dtype)

    def lowest_zero_point(self, scheme: Scheme) -> int | None:
        """Version 1 cannot store a zero of 0, see above."""
        if scheme.weight.symmetric or self.version == 2:
            return None
        return 1 - (1 << (scheme.weight.bits - 1))

    def stored_tensors(
        self, linear: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
    ) -> list[StoredTensor]:
        rows, columns = shape
        bits = scheme.weight.bits
        groups = scheme.weight.granularity.scale_shape(rows, columns, scheme.weight.columns_per_scale(columns))[1]
        return [
            StoredTensor(f"{linear}.qweight", torch.int32, (columns * bits // 32, rows)),
            StoredTensor(f"{linear}.qzeros", torch.int32, (groups, rows * bits // 32)),
            StoredTensor(f"{linear}.scales", torch.float16, (groups, rows)),
            StoredTensor(f"{linear}.g_idx", torch.int32, (columns,)),
        ]

    def row_multiple(self, scheme: Scheme, shape: tuple[int, int]) -> int:
        """Rows whose zero points fill whole words."""
        return ROWS_PER_WORDS[scheme.weight.bits]

    def pack(self, linear: str, quantized: QuantizedTensor, scheme: Scheme, first_row: int, shape: tuple[int, int],
             dtype: torch.dtype, input_range: InputRange | None = None) -> list[Piece]:  # fmt: skip
        """A slab of rows: a strip of columns of every stored tensor; g_idx comes with the slab at row 0.

        FormatError where a zero point cannot be stored (see above).
        """
        bits = scheme.weight.bits
        codes, zeros, problem = self._stored_codes(quantized, bits)
        if problem is not None:
            raise FormatError(f"{linear}: {problem}", "write --format gptq_v2, or a symmetric scheme")
        words = kernels.pack_dense(codes, bits).t().contiguous()
        pieces = [
            Piece(f"{linear}.qweight", words, column=first_row),
            Piece(f"{linear}.qzeros", kernels.pack_dense(zeros.t(), bits, offset=0), column=first_row * bits // 32),
            Piece(f"{linear}.scales", quantized.scale.to(torch.float16).t().contiguous(), column=first_row),
        ]
        if first_row == 0:
            columns = torch.arange(shape[1], dtype=torch.int32)
            pieces.append(Piece(f"{linear}.g_idx", columns // scheme.weight.columns_per_scale(shape[1])))
        return pieces

    def inexact(self, quantized: QuantizedTensor, scheme: Scheme, dtype: torch.dtype) -> str | None:
        """Why a source's codes would change: permuted columns, a zero point or a scale that has no place."""
        if quantized.g_idx is not None:
            return "its groups are not of consecutive columns (activation order)"
        if not torch.equal(quantized.scale.to(torch.float16).to(torch.float32), quantized.scale):
            return "one of its scales is no float16"
        return self._stored_codes(quantized, scheme.weight.bits)[2]

    def quantization_config(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """config.json's `quantization_config`: the most common scheme, and `dynamic` for linears that differ.

        GPTQModel and vLLM match `dynamic` with re.match on the module's name, the first hit wins: "+:" overrides bits,
        group_size and sym, "-:" leaves alone. transformers (optimum) knows no `dynamic`, but
        modules_in_block_to_quantize; vLLM reads that too, and finds out from the files otherwise.
        """
        settings = {name: _settings(scheme.weight) for name, scheme in schemes.items()}
        common = Counter(settings.values()).most_common(1)[0][0]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": common[0],
            "group_size": common[1],
            "sym": common[2],
            "desc_act": False,
            "lm_head": any(head in schemes for head in _HEADS),
            "checkpoint_format": self.FORMAT,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"lowbit:{__version__}"]},
        }
        in_blocks = [name for name in ignored if _BLOCK.search(name)]
        dynamic = _dynamic(settings, common, in_blocks)
        if dynamic:
            config["dynamic"] = dynamic
        if in_blocks:
            config["modules_in_block_to_quantize"] = [_quantized_modules(list(schemes), in_blocks)]
        return config

    def companion_files(self, schemes: dict[str, Scheme], ignored: list[str]) -> dict[str, dict[str, Any]]:
        """quantize_config.json, the same as in config.json: where AutoGPTQ and GPTQModel look first."""
        return {"quantize_config.json": self.quantization_config(schemes, ignored)}

    def engine_of(self, schemes: dict[str, Scheme]) -> str | None:
        return usual_engine(schemes)

    def needless(self, scheme: Scheme) -> tuple[str, ...]:
        return none_needless(scheme)

    def _stored_codes(self, quantized: QuantizedTensor, bits: int) -> tuple[Tensor, Tensor, str | None]:
        """Codes int8 [N, K]; zero points uint8 [N, G] as they are stored; what is wrong with them, or None."""
        codes, half = quantized.codes, 1 << (bits - 1)
        if quantized.zero_point is None:
            zeros = torch.full(quantized.scale.shape, half, dtype=torch.int32)
        else:
            zeros = quantized.zero_point + half
        outside = (zeros < 0) | (zeros >= 2 * half)
        if bool(outside.any()):
            found = int(zeros[outside][0])
            return codes, zeros, f"a zero point of {found} does not fit {bits} bits"
        if self.version == 2:
            return codes, zeros.to(torch.uint8), None
        at_zero = zeros == 0
        if bool(at_zero.any()):
            rows, groups = zeros.shape
            top = codes.reshape(rows, groups, -1).amax(dim=2) == half - 1
            if bool((at_zero & top).any()):
                count = int((at_zero & top).sum())
                return codes, zeros, (
                    f"{count} of its {rows * groups} groups have a zero point of 0 and use the code {2 * half - 1}, "
                    f"which GPTQ v1 cannot store"
                )  # fmt: skip
            # code and zero point move together: scale · (code − zero) stays what it was
            codes = codes + at_zero.repeat_interleave(codes.shape[1] // groups, dim=1)
            zeros = zeros + at_zero
        return codes, (zeros - 1).to(torch.uint8), None


GPTQ_V1 = GptqExporter("gptq", version=1)
GPTQ_V2 = GptqExporter("gptq_v2", version=2)


def _settings(weight: WeightSpec) -> tuple[int, int, bool]:
    """(bits, group_size, sym), with −1 for one scale per row."""
    return weight.bits, -1 if weight.group_size is None else weight.group_size, weight.symmetric


_BLOCK = re.compile(r"\.(\d+)\.")  # the index of a block within a module name


def _dynamic(
    settings: dict[str, tuple[int, int, bool]], common: tuple[int, int, bool], ignored: list[str]
) -> dict[str, dict[str, Any]]:
    """Pattern → override, for linears that differ from the common settings and for linears that are left alone."""
    everything = [*settings, *ignored]
    dynamic = {}
    for different in dict.fromkeys(settings.values()):
        if different != common:
            members = [name for name, own in settings.items() if own == different]
            override = dict(zip(("bits", "group_size", "sym"), different, strict=True))
            dynamic |= {f"+:{pattern}": dict(override) for pattern in _patterns(members, everything)}
    return dynamic | {f"-:{pattern}": {} for pattern in _patterns(ignored, everything)}


def _patterns(members: list[str], everything: list[str]) -> list[str]:
    """Regexes that match the names of `members`, whole, and what vLLM calls them; one for a linear of many blocks.

    Fused linears are known to vLLM by the fused name, and the experts of a layer by the name of their container.
    """
    blocks_of: dict[tuple[str, str], list[str]] = {}
    for name in [*members, *fused_names(members), *_expert_containers(members, everything)]:
        found = _BLOCK.search(name)
        parts = (name, "") if found is None else (name[: found.start(1)], name[found.end(1) :])
        blocks_of.setdefault(parts, []).extend([] if found is None else [found[1]])
    patterns = []
    for (before, after), blocks in blocks_of.items():
        index = f"(?:{'|'.join(blocks)})" if len(blocks) > 1 else "".join(blocks)
        patterns.append(f"{re.escape(before)}{index}{re.escape(after)}$")
    return patterns


def _expert_containers(members: list[str], everything: list[str]) -> Iterable[str]:
    present = set(members)
    for container in dict.fromkeys(name[: name.index(".experts.") + 8] for name in members if ".experts." in name):
        if all(name in present for name in everything if name.startswith(f"{container}.")):
            yield container


def _quantized_modules(quantized: list[str], ignored: list[str]) -> list[str]:
    """What to quantize in a block, as optimum (a suffix) and vLLM (a substring) match it: short names if they do."""
    names = [name for name in quantized if _BLOCK.search(name)]
    short = list(dict.fromkeys(name[_BLOCK.search(name).end() :] for name in names))  # type: ignore[union-attr]
    return names if any(part in name for part in short for name in ignored) else short
