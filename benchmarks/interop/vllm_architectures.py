"""Does a real vLLM load each model type that lowbit quantizes, and compute with the weights we mean?

usage: vllm_architectures.py --vllm PYTHON [--format compressed-tensors] [--scheme W4A16] [--write FILE] [TYPE ...]

For each type (all that vLLM's registry names, or those given; of tests/tiny_types.py or tests/models.py): a tiny random
model is quantized, and two engines give the log-probability of every token of one sequence: transformers with lowbit's
decoded weights in bfloat16, and vLLM on the CPU (vllm_perplexity.py beside this file says how to make its environment;
types that see images also want torchvision there). Random weights make every token about equally
likely, so perplexities would agree whatever vLLM loaded; what counts is the correlation of the log-probabilities, 1 for
the same weights and about 0 for others. The model itself, in 16 bits and loaded by transformers alone, is compared
first: it says how far the engines are apart without us, and which types vLLM does not run on a CPU at all.
`--scheme 16bit` does only that.

Beside it stand the layers that each side takes as quantized: ours from the plan, with every fused set and every block's
experts as one; vLLM's are the modules whose method is not an unquantized one. A layer that vLLM leaves in 16 bits
although the file has codes for it, or the other way round, shows there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

TOKENS = 200
VOCABULARY = 250
AT_ONCE = 24  # models that one vLLM process loads one after the other


def ids() -> list[int]:
    """Tokens in a fixed scrambled order."""
    return [3 + (97 * index * index + 31 * index) % VOCABULARY for index in range(TOKENS)]


@dataclass
class Ours:
    """What our side makes of a folder: log-probabilities and the number of layers that are quantized there."""

    folder: Path
    logprobs: list[float]
    quantized: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--vllm", required=True, help="the python of an environment with vLLM")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--head-dim", type=int, help="of wider models, for types whose kernels want 64 or 128")
    parser.add_argument("--write", type=Path, help="a document whose table of types in vLLM is renewed")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = compare(args, Path(scratch))
    if args.write:
        text = args.write.read_text(encoding="utf-8")
        table = f"<!-- vllm types -->\n\n{markdown(results, args.scheme)}\n\n<!-- end -->"
        args.write.write_text(re.sub(r"<!-- vllm types -->.*?<!-- end -->", lambda _: table, text, flags=re.S), "utf-8")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, dict[str, Any]]:
    """Type → {"16bit": how it went, scheme: how it went}, each as `judge` says."""
    results: dict[str, dict[str, Any]] = {}
    names = args.types or types_of_vllm(args.vllm)
    for start in range(0, len(names), AT_ONCE):
        ours: dict[tuple[str, str], Ours] = {}
        for name in names[start : start + AT_ONCE]:
            results[name] = {}
            for scheme in dict.fromkeys(("16bit", args.scheme)):
                try:
                    ours[name, scheme] = our_side(name, scheme, scratch, args)
                except Exception as error:  # one type's failure is its result
                    results[name][scheme] = {"refused": one_line(error), "by": "us"}
                    break
        theirs = their_side(args.vllm, [own.folder for own in ours.values()], scratch / "vllm.json")
        for (name, scheme), own in ours.items():
            results[name][scheme] = judge(own, theirs[str(own.folder)])
        for name in names[start : start + AT_ONCE]:
            for scheme, result in results[name].items():
                print(f"{name:24s} {scheme:8s} {said(result)}", flush=True)
    return results


def types_of_vllm(python: str) -> list[str]:
    """The types of transformers whose model class is in vLLM's registry."""
    from tiny_type_rows import NOT_MADE, NOT_RUN, WITH_IMAGE
    from tiny_types import model_types

    code = "from vllm.model_executor.models.registry import ModelRegistry as r; print(*r.get_supported_archs())"
    said = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    classes = set(said.stdout.split())
    left_out = {**NOT_MADE, **NOT_RUN, **WITH_IMAGE}
    return [name for name, known in model_types().items() if known in classes and name not in left_out]


def our_side(name: str, scheme: str, scratch: Path, args: argparse.Namespace) -> Ours:
    import lowbit

    source = scratch / f"{name}-16bit"
    if scheme == "16bit":
        make(name, source, args.head_dim)
        return Ours(source, logprobs_of_transformers(source))
    folder = scratch / name
    made = lowbit.quantize(source, folder, scheme=scheme, format=args.format, group_size=args.group_size)
    named = {entry.name for entry in made.report.tensors if entry.scheme is not None}
    return Ours(folder, logprobs_of_lowbit(folder), units(folder, named))


def make(name: str, folder: Path, head_dim: int | None) -> None:
    from models import ARCHITECTURES, make_model
    from tiny_types import TEXT, Sizes, make_tiny, model_types

    if name in ARCHITECTURES and name not in model_types():
        make_model(folder, name)
    else:
        wide = TEXT if head_dim is None else Sizes(hidden=4 * head_dim, intermediate=6 * head_dim, head_dim=head_dim)
        make_tiny(folder, name, wide)


def units(folder: Path, quantized: set[str]) -> int:
    """Quantized layers as engines see them: a fused set is one layer, the experts of a block are one."""
    from lowbit.architecture.describing import open_described
    from lowbit.checkpoint.base import OpenOptions

    checkpoint, architecture = open_described(str(folder), OpenOptions())
    checkpoint.close()
    linears = [linear for linear in architecture.linears.values() if quantized & {linear.name, f"{linear.name}.weight"}]
    single = {linear.fused or linear.name for linear in linears if linear.expert is None}
    return len(single) + len({linear.block for linear in linears if linear.expert is not None})


def logprobs_of_lowbit(folder: Path) -> list[float]:
    import torch

    import lowbit

    return logprobs(lowbit.load(folder, dtype=torch.bfloat16)[0])


def logprobs_of_transformers(folder: Path) -> list[float]:
    import torch
    import transformers

    (named,) = json.loads((folder / "config.json").read_text())["architectures"]
    return logprobs(getattr(transformers, named).from_pretrained(folder, dtype=torch.bfloat16).eval())


def logprobs(model: Any) -> list[float]:
    """The log-probability of every token but the first."""
    import torch

    tokens = torch.tensor([ids()])
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits.float()
    scored = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
    return scored[:, 0].tolist()


def their_side(python: str, folders: list[Path], output: Path) -> dict[str, Any]:
    """Folder → what vLLM makes of it; a folder on which its process ends is left behind, and a new one goes on."""
    found: dict[str, Any] = {}
    left = [str(folder) for folder in folders]
    while left:
        output.write_text("{}")
        command = [python, str(HERE / "vllm_logprobs.py"), *left, "--json", str(output)]
        environment = {**os.environ, "VLLM_MLA_DISABLE": "1"}  # its kernels take the sizes of released models only
        ran = subprocess.run(
            command, check=False, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        answered = json.loads(output.read_text())
        found |= answered
        left = [folder for folder in left if folder not in found]
        if left and (ran.returncode != 0 or not answered):
            last = ran.stderr.strip().splitlines()[-1:]
            found[left.pop(0)] = {"refused": f"its process ended ({ran.returncode}): {' '.join(last)[:200]}"}
    return found


def judge(own: Ours, theirs: dict[str, Any]) -> dict[str, Any]:
    import torch

    if "refused" in theirs:
        return {**theirs, "by": "vLLM"}
    pair = torch.stack([torch.tensor(own.logprobs), torch.tensor(theirs["logprobs"])])
    return {
        "correlation": torch.corrcoef(pair)[0, 1].item(),
        "difference": (pair[0] - pair[1]).abs().mean().item(),
        "quantized": own.quantized,
        "quantized_by_vllm": len(theirs["quantized"]),
    }


def said(result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"refused by {result['by']}: {result['refused']}"
    return (
        f"correlation {result['correlation']:.4f}   mean difference {result['difference']:.4f} nats   "
        f"quantized layers {result['quantized']}, in vLLM {result['quantized_by_vllm']}"
    )


def markdown(results: dict[str, dict[str, Any]], scheme: str) -> str:
    """The table of docs/interop.md: types that vLLM runs in 16 bits, and a line of those that it does not run here."""
    lines = [f"| type | 16 bits | {scheme} | quantized layers: vLLM, ours |", "|---|---:|---:|---:|"]
    not_run = []
    for name, found in sorted(results.items()):
        plain, ours = found.get("16bit", {}), found.get(scheme, {})
        if "correlation" not in plain:
            not_run.append(f"`{name}`")
        elif "correlation" in ours:
            layers = f"{ours['quantized_by_vllm']}, {ours['quantized']}"
            lines.append(f"| `{name}` | {plain['correlation']:.4f} | {ours['correlation']:.4f} | {layers} |")
        else:
            lines.append(
                f"| `{name}` | {plain['correlation']:.4f} | {ours.get('refused', '')[:90].replace('|', '/')} | |"
            )
    return "\n".join([*lines, "", f"Not run by this vLLM in 16 bits either: {', '.join(not_run) or 'none'}."])


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
