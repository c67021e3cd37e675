"""A GGUF as llama-quantize writes it, where no llama-quantize is at hand: the encoders of llama.cpp inside xllamacpp.

usage: llama_encoders.py MODEL OUT.gguf --type Q2_K [--imatrix FILE]

lowbit writes the file, with the types that llama-quantize gives every tensor (held by tests/export/test_gguf_mix.py).
Then each quantized tensor is encoded again by `ggml_quantize_chunk`, the function that llama-quantize calls, from
float32 weights and with the same importance, and put in place of ours. So sizes and types are equal to the byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import gguf
import torch

import lowbit
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.importance import ImportanceMatrix
from lowbit.numerics.ggml import TYPES

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from llama_cpp import quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", required=True)
    parser.add_argument("--imatrix", type=Path)
    args = parser.parse_args()
    weighed = {"imatrix": str(args.imatrix)} if args.imatrix else {}
    matrix = read_imatrix(args.imatrix) if args.imatrix else None
    lowbit.quantize(args.model, args.out, scheme=args.type, **weighed)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as scratch:
        plain = Path(scratch) / "plain.gguf"
        lowbit.quantize(args.model, plain, scheme="F32")
        replaced = encode_again(args.out, plain, matrix)
    print(f"{args.out}: {replaced} tensors encoded by llama.cpp")


def encode_again(path: Path, plain: Path, matrix: ImportanceMatrix | None = None) -> int:
    """Each quantized tensor of a file anew, from the file of the same model in F32; returns how many."""
    sources = {tensor.name: tensor for tensor in gguf.GGUFReader(plain).tensors}
    replaced = 0
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        kind = TYPES.get(tensor.tensor_type.name)
        if kind is None or tensor.tensor_type.name in ("F32", "F16", "BF16"):
            continue
        weight = torch.from_numpy(sources[tensor.name].data.copy()).float()
        measured = None if matrix is None else matrix.entries.get(tensor.name)
        experts = weight.reshape(-1, *weight.shape[-2:])
        stored = tensor.data.reshape(len(experts), weight.shape[-2], -1)
        for index, rows in enumerate(experts):
            importance = None if measured is None else measured.values[index]
            stored[index] = quantized(kind.number, rows, kind.row_bytes(rows.shape[1]), importance).numpy()
        replaced += 1
    return replaced


if __name__ == "__main__":
    main()
