"""A Llama-shaped GGUF of random normal weights in BF16, for timing encoders. Without a tokenizer no engine loads it.

usage: make_random_gguf.py OUT.gguf [--weights 1.1e9] [--imatrix OUT.imatrix.gguf]

The layers are TinyLlama-1.1B's (2048 wide, 5632 in the MLP, 4 heads of values), as many as fit into --weights beside an
embedding of 8192 rows: 105e6 is two layers. Seeded. --imatrix also writes an importance matrix for it, log-normal, as
real ones roughly are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from gguf.constants import GGUFValueType as V

from lowbit.export import Piece
from lowbit.formats.gguf.write import GGUFWriter, StoredBlocks, packed_key_values
from lowbit.numerics import ggml

WIDTH, MLP, KEYS, ROWS = 2048, 5632, 256, 8192
LAYER = {
    "attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (KEYS, WIDTH), "attn_v": (KEYS, WIDTH),
    "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH),
    "ffn_down": (WIDTH, MLP),
}  # fmt: skip


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, in the order of the file."""
    blocks = {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in LAYER.items()}
    return {"token_embd.weight": (ROWS, WIDTH)} | blocks | {"output_norm.weight": (WIDTH,)}


def key_values(layers: int) -> dict[str, tuple]:
    return {
        "general.architecture": ("llama", V.STRING),
        "general.file_type": (32, V.UINT32),
        "llama.block_count": (layers, V.UINT32),
        "llama.context_length": (2048, V.UINT32),
        "llama.embedding_length": (WIDTH, V.UINT32),
        "llama.feed_forward_length": (MLP, V.UINT32),
        "llama.attention.head_count": (32, V.UINT32),
        "llama.attention.head_count_kv": (4, V.UINT32),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, V.FLOAT32),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--weights", type=float, default=1.1e9)
    arguments.add_argument("--imatrix", type=Path)
    args = arguments.parse_args()
    per_layer = sum(torch.Size(shape).numel() for shape in LAYER.values())
    layers = max(1, round((args.weights - ROWS * WIDTH) / per_layer))
    stored = []
    for name, shape in shapes(layers).items():
        kind = ggml.find_type("BF16" if len(shape) > 1 else "F32")
        stored.append(StoredBlocks(name, shape, kind.number, torch.Size(shape).numel() * kind.size))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.unlink(missing_ok=True)
    writer = GGUFWriter(args.output.parent, args.output.name, stored, packed_key_values(key_values(layers)))
    random = torch.Generator().manual_seed(0)
    for tensor in stored:
        values = torch.randn(tensor.shape, generator=random) * 0.02
        writer.write(Piece(tensor.name, values.bfloat16() if len(tensor.shape) > 1 else values + 1))
    writer.close()
    print(f"{args.output}: {layers} layers, {sum(torch.Size(t.shape).numel() for t in stored) / 1e6:.1f} M weights")
    if args.imatrix:
        write_importance(args.imatrix, layers)


def write_importance(path: Path, layers: int) -> None:
    from lowbit.formats.gguf.imatrix_file import write_imatrix
    from lowbit.formats.gguf.importance import ImportanceEntry, ImportanceMatrix

    random = torch.Generator().manual_seed(1)
    entries = {
        name: ImportanceEntry.of_means(torch.randn(1, shape[-1], generator=random).exp(), torch.tensor([65536]))
        for name, shape in shapes(layers).items()
        if len(shape) > 1 and name != "token_embd.weight"
    }
    write_imatrix(ImportanceMatrix(entries, ("random",), 128, 512), path)


if __name__ == "__main__":
    main()
