"""A Llama checkpoint of any size with random weights: for timing quantizers, not for judging them.

usage: make_random_llama.py OUT [--weights 1.1e9 | --blocks 22] [--shard-size 2GB] [--seed 0] [--tokenizer DIR]
                            [--hidden 2048 --intermediate 5632 --heads 32 --kv-heads 4 --vocab 32000]

1.1e9 weights is TinyLlama-1.1B tensor for tensor (hidden 2048, 22 layers, intermediate 5632, 32 heads, 4 kv heads,
vocabulary 32000, untied). Other --weights keep the width and change only the number of layers, so the largest tensor,
and with it the least memory that a streaming tool can need, stays the same while the total grows. --blocks gives the
number of layers itself. The first four layers of a Llama-3-8B, 3.8 GB:

    make_random_llama.py OUT --blocks 4 --hidden 4096 --intermediate 14336 --heads 32 --kv-heads 8 --vocab 128256

Matrices are independent normals (std 0.02, the usual initialisation) drawn in float32 and rounded to bfloat16; norms
are ones. One generator runs through the tensors in file order: a (shape, seed) pair is one set of weights, however it
is sharded. The folder is what transformers and vLLM load: config.json, safetensors shards with an index, and a
tokenizer (a byte-level one of 258 tokens unless --tokenizer names a folder to copy it from).

Memory: 100 MB beside Python and torch (a slab of a tensor). Refuses to write into a folder that exists, a hidden size
that the heads do not divide, and a tokenizer with more tokens than the vocabulary.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

STD = 0.02
BYTE_TOKENS = 258  # 256 bytes, <s> and </s>
SLAB_WEIGHTS = 1 << 24  # a multiple of 16, the unit of torch's generator: slabs draw what one whole tensor would


@dataclass(frozen=True)
class Shape:
    """What config.json says of the sizes."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one transformer block, in file order."""
        kv_dim = self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv_dim, self.hidden),
            "self_attn.v_proj": (kv_dim, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def layers_of(self, weights: float) -> int:
        """How many layers come nearest to a number of weights; at least one."""
        outside = 2 * self.vocab * self.hidden + self.hidden
        per_layer = sum(math.prod(shape) for shape in self.layer().values())
        return max(1, round((weights - outside) / per_layer))


TOKENIZER_FILES = [
    *["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"],
    *["added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"],
]


def tensor_shapes(shape: Shape, layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in file order."""
    ends = (shape.vocab, shape.hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in shape.layer().items()}
    return shapes | {"model.norm.weight": (shape.hidden,), "lm_head.weight": ends}


def split_shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the list, in order, before the tensor that would overfill a shard."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def random_slabs(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The tensors end to end, bfloat16, at most SLAB_WEIGHTS at a time."""
    for shape in shapes.values():
        if len(shape) == 1:
            yield torch.ones(shape, dtype=torch.bfloat16)
            continue
        total = math.prod(shape)
        for start in range(0, total, SLAB_WEIGHTS):
            # Not torch.empty(bfloat16).normal_(): that draws its uniforms in bfloat16 too, 8 bits of randomness.
            slab = torch.empty(min(SLAB_WEIGHTS, total - start))
            yield slab.normal_(0, STD, generator=generator).to(torch.bfloat16)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], slabs: Iterator[torch.Tensor]) -> int:
    """A safetensors file, slab by slab (the library's own writer wants all tensors at once); returns data bytes.

    Layout: u64 little-endian header length, JSON header padded with spaces to 8 bytes, the tensors end to end.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slab in slabs:
            file.write(slab.contiguous().view(torch.uint8).numpy().data)
    return end


def write_config(out: Path, shape: Shape, layers: int) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": STD,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_byte_tokenizer(out: Path) -> None:
    """One token a byte: any text can be encoded, and there is nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def check_tokenizer(source: Path, vocab: int) -> None:
    size = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab_size()
    if size > vocab:
        raise SystemExit(f"error: the tokenizer in {source} has {size} tokens, the model {vocab}\n\n"
                         "hint: leave --tokenizer out, a byte-level one is written")  # fmt: skip


def parse_bytes(text: str) -> int:
    """'2GB', '500MB', '1.5GiB' -> bytes."""
    found = re.fullmatch(r"([\d.]+)\s*([KMG]?)(i?)B", text, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB or 500MiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMG".index(prefix.upper() or " "))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--weights", type=float, default=1.1e9, help="number of weights aimed at (default 1.1e9)")
    depth.add_argument("--blocks", type=int, help="number of transformer blocks, whatever the weights")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--shard-size", type=parse_bytes, default="2GB", help="largest shard (default 2GB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder to copy a tokenizer from")
    args = parser.parse_args()
    sizes = ("hidden", "intermediate", "heads", "kv_heads", "vocab")
    if min(getattr(args, name) for name in sizes) < 1 or (args.blocks is not None and args.blocks < 1):
        parser.error("sizes and --blocks are at least 1")
    if args.hidden % (2 * args.heads) or args.heads % args.kv_heads:
        parser.error("--hidden must be a multiple of 2 x --heads (rotary pairs), --heads of --kv-heads")
    if args.vocab < BYTE_TOKENS and not args.tokenizer:
        parser.error(f"--vocab must be at least {BYTE_TOKENS}, the tokens of the byte-level tokenizer")
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists\n\nhint: delete it or name another folder")
    return args


def main() -> None:
    args = parse_arguments()
    shape = Shape(args.hidden, args.intermediate, args.heads, args.kv_heads, args.vocab)
    if args.tokenizer:
        check_tokenizer(args.tokenizer, shape.vocab)
    layers = args.blocks or shape.layers_of(args.weights)
    shards = split_shards(tensor_shapes(shape, layers), args.shard_size)

    args.out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(args.seed)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        total_bytes += write_shard(args.out / name, shapes, random_slabs(shapes, generator))
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (args.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_config(args.out, shape, layers)
    copy_tokenizer(args.tokenizer, args.out) if args.tokenizer else write_byte_tokenizer(args.out)
    print(f"{args.out}: {total_bytes // 2:,} weights, {layers} layers, {len(shards)} shard(s)", file=sys.stderr)


if __name__ == "__main__":
    main()
