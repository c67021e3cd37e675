"""GGUF file types on a model that no search was tuned on: lowbit's two roundings beside llama.cpp's encoders.

usage: gguf_held_out.py --prose c4.txt [--types Q4_0,…] [--windows 24] [--steps 300] [--model MODEL]
                        [--work build/held-out]

    --prose   a text of prose; its last tenth is judged on, the rest trained on and calibrated on
    --model   that is quantized in place of the trained one; nothing is trained then

The model: a Llama of 8 million float32 weights (two blocks of width 512) with a byte-level vocabulary of 2048, trained
for --steps of 8 windows of 128 tokens on --prose, the packaged calibration text and modules of Python's library. Judged
on the prose that is kept back and on the code of `domain_texts.py`, whose modules are not trained on. One importance
matrix, of `lowbit imatrix`, serves all three:

    llama.cpp   what llama-quantize writes (peers/llama_encoders.py)
    rtn         `lowbit quantize`, round to nearest with the matrix
    rtn, gain   the file of rtn, in which the half-precision factors of each block are multiplied so that
                Σ importance·w·ŵ = Σ importance·w²: a trial (docs/log.md), not what lowbit writes
    gptq        `lowbit quantize --method gptq`, which needs no matrix and sees the same text

Files of a type have the same types of tensors, and the same bytes but for a few key-values. A cell: mean KLD to the
unquantized model per token in thousandths of a nat, its ratio to llama.cpp's, and the ratio of perplexities. What is in
--work is not made again, so that the script can be stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
from pathlib import Path
from typing import Any

import gguf
import torch
from domain_texts import PYTHON_MODULES, domain_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lowbit
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.importance import ImportanceMatrix
from lowbit.numerics.ggml import TYPES as KINDS
from lowbit.numerics.ggml import decode
from lowbit.text import read_text

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from llama_encoders import encode_again

TYPES = "Q4_0,Q4_K_M,Q3_K_M,Q2_K,IQ4_XS,IQ3_S,IQ2_XS"
VOCABULARY, CONTEXT, BATCH, WARMUP, RATE = 2048, 128, 8, 30, 1.5e-3
CODE_TRAINED = 1_500_000  # characters
# Type → where in a block its half-precision factors begin.
FACTORS = {"Q4_0": (0,), "Q5_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
           "IQ4_XS": (0,), "IQ4_NL": (0,), "IQ3_S": (0,), "IQ3_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,)}  # fmt: skip
SAMPLES, SEQLEN = 64, CONTEXT  # of calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model")
    parser.add_argument("--work", type=Path, default=Path("build/held-out"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    seen, texts = divided(args.prose, args.work)
    model = args.model or str(trained(args.work / "model", seen, args.steps))
    matrix = args.work / "model.imatrix"
    if not matrix.exists():
        lowbit.imatrix(model, matrix, calib=str(seen), samples=SAMPLES, seqlen=SEQLEN)
    made = tuple(texts)
    print(f"| type | bytes | | {' | '.join(made)} |\n|---|---:|---|{'---:|' * len(made)}")
    for name in args.types.split(","):
        peer: dict[str, Any] = {}
        for way in ("llama.cpp", "rtn", "rtn, gain", "gptq"):
            row = judged(model, name, way, matrix, seen, texts, args)
            peer = peer or row
            cells = [cell(row[text], peer[text]) for text in made]
            print(f"| {name} | {row['bytes']:,} | {way} | {' | '.join(cells)} |", flush=True)


def cell(found: dict[str, float], peer: dict[str, float]) -> str:
    kld, error = 1e3 * found["kld"], 1e3 * found["se"]
    return f"{kld:.3f} ± {error:.3f}, {found['kld'] / peer['kld']:.2f} ({found['ppl']:.3f})"


def divided(prose: Path, work: Path) -> tuple[Path, dict[str, Path]]:
    """The text that is trained on, and those that are judged on."""
    text = prose.read_text(encoding="utf-8")
    cut = text.rindex("\n", 0, len(text) * 9 // 10)
    seen, kept = work / "seen.txt", work / "prose.txt"
    seen.write_text(text[:cut], encoding="utf-8")
    kept.write_text(text[cut:], encoding="utf-8")
    (code,) = domain_texts(domains=("code",))
    return seen, {"prose, kept back": kept, "code": code.path}


def trained(folder: Path, seen: Path, steps: int) -> Path:
    """The folder of the small model, made unless it is there."""
    if (folder / "config.json").exists():
        return folder
    parts = [seen.read_text(encoding="utf-8"), read_text(None, "calibration").content, library()]
    tokenizer = byte_level(parts)
    ids = torch.cat([torch.tensor(tokenizer.encode(part).ids) for part in parts])
    windows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    model = small_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}e6 weights, {len(ids):,} tokens", file=sys.stderr)
    train(model, windows, steps)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=None, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder


def library() -> str:
    """Modules of Python's library that the domain of code has not."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("*.py"))
    return "\n".join((root / name).read_text(encoding="utf-8") for name in names if name not in PYTHON_MODULES)[
        :CODE_TRAINED
    ]


def byte_level(parts: list[str]) -> Tokenizer:
    """GPT-2's pre-tokenizer, a vocabulary of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=["<|endoftext|>"])  # fmt: skip
    tokenizer.train_from_iterator(parts, trainer)
    return tokenizer


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1536, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
                         tie_word_embeddings=False, bos_token_id=None, eos_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: Any, windows: torch.Tensor, steps: int) -> None:
    """AdamW with a cosine, multiplications in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    drawn = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(windows), generator=drawn) for _ in range(steps * BATCH // len(windows) + 1)])
    model.train()
    for step in range(steps):
        falls = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * falls
        batch = windows[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval()


def keep_gain(path: Path, plain: Path, matrix: ImportanceMatrix) -> None:
    """Multiply the factors of every block of a file, so that it is as large along its weights as they are."""
    sources = {tensor.name: tensor for tensor in gguf.GGUFReader(plain).tensors}
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        kind, measured = tensor.tensor_type.name, matrix.entries.get(tensor.name)
        if kind not in FACTORS or measured is None:
            continue
        weight = torch.from_numpy(sources[tensor.name].data.copy()).float()
        blocks = torch.from_numpy(tensor.data.copy()).reshape(len(weight), -1, KINDS[kind].size)
        parts = len(weight), -1, KINDS[kind].weights
        weighed = measured.values[0] * weight
        along = (weighed * decode(kind, blocks.flatten(1))).reshape(parts).sum(-1)
        gain = (weighed * weight).reshape(parts).sum(-1) / along
        gain = torch.where(along > 0, gain, torch.ones_like(gain))
        for first in FACTORS[kind]:
            factor = blocks[..., first : first + 2].contiguous().view(torch.float16).float() * gain[..., None]
            blocks[..., first : first + 2] = factor.half().view(torch.uint8)
        tensor.data[:] = blocks.reshape(tensor.data.shape).numpy()


def judged(
    model: str, name: str, way: str, matrix: Path, seen: Path, texts: dict[str, Path], args: argparse.Namespace
) -> dict[str, Any]:
    """Bytes and figures of one file."""
    record = args.work / f"{name}-{way}.json"
    if record.exists():
        return json.loads(record.read_text())
    out = record.with_suffix(".gguf")
    out.unlink(missing_ok=True)
    plain = args.work / "plain.gguf"
    if not plain.exists():
        lowbit.quantize(model, plain, scheme="F32")
    if way == "gptq":
        lowbit.quantize(model, out, scheme=name, method="gptq", calib=str(seen), samples=SAMPLES, seqlen=SEQLEN)
    else:
        lowbit.quantize(model, out, scheme=name, imatrix=str(matrix))
        others = {"llama.cpp": encode_again, "rtn, gain": keep_gain}
        if way in others:
            others[way](out, plain, read_imatrix(matrix))
    row: dict[str, Any] = {"bytes": out.stat().st_size}
    for text, path in texts.items():
        (found,) = lowbit.evaluate(out, reference=model, text=str(path), windows=args.windows,
                                 window_tokens=CONTEXT, bos=False)  # fmt: skip
        row[text] = {"kld": found.kld_mean, "se": found.kld_se, "ppl": found.ppl_ratio}
    record.write_text(json.dumps(row))
    for path in args.work.glob(f"{out.name}*"):
        path.unlink()
    return row


if __name__ == "__main__":
    main()
