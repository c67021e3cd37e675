"""Does a real vLLM compute what `lowbit evaluate` says it will? Quantize, evaluate, serve, compare perplexities.

usage: compare_with_vllm.py --vllm PYTHON --text FILE [--model demo:smollm2] [--windows 8] [--more FLAGS]
                            [SCHEME[:FORMAT[:METHOD]] ...]

    --vllm   the python of an environment with vLLM; vllm_perplexity.py beside this file says how to make it
    SCHEME   those of `DEFAULT` unless given; FORMAT is compressed-tensors unless given, METHOD is rtn
    --more   flags for all `lowbit quantize`, such as "--samples 32 --calib FILE"

Both sides score every token but the first of the same 512-token windows, without BOS. lowbit computes in float32 with
activations quantized as the scheme says; vLLM computes in bfloat16. Exits with 1 if a pair differs by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT = ("W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "W4A16:gptq", "W4A16:gptq_v2", "W4A16:awq", "W4A16_ASYM:awq")
LARGEST_DIFFERENCE = 0.02


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("schemes", nargs="*", default=DEFAULT)
    arguments.add_argument("--vllm", required=True)
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--model", default="demo:smollm2")
    arguments.add_argument("--windows", type=int, default=8)
    arguments.add_argument("--more", default="")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {scheme: Path(scratch) / scheme.replace(":", "-") for scheme in args.schemes}
        ours = {scheme: quantize_and_evaluate(args, scheme, folder) for scheme, folder in folders.items()}
        theirs = vllm_perplexities(args, folders, Path(scratch) / "vllm.json")
    print(f"{args.model}, {args.windows} windows of 512 tokens of {Path(args.text).name}")
    worst = 0.0
    for scheme in args.schemes:
        difference = theirs[scheme] / ours[scheme] - 1
        worst = max(worst, abs(difference))
        print(
            f"{scheme:16s} lowbit evaluate {ours[scheme]:9.4f}   vLLM {theirs[scheme]:9.4f}   {100 * difference:+.2f} %"
        )
    sys.exit(1 if worst > LARGEST_DIFFERENCE else 0)


def quantize_and_evaluate(args: argparse.Namespace, scheme: str, folder: Path) -> float:
    """Perplexity as `lowbit evaluate` measures it, of the last row: activations simulated where there are any."""
    lowbit = str(Path(sys.executable).parent / "lowbit")
    name, format, method = [*scheme.split(":"), "", ""][:3]
    command = [lowbit, "quantize", args.model, "-o", str(folder), "--scheme", name, "--json", *shlex.split(args.more)]
    command += ["--format", format] if format else []
    command += ["--method", method] if method else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command = [lowbit, "evaluate", str(folder), "--reference", args.model, "--text", args.text, "--windows",
               str(args.windows), "--no-bos", "--json"]  # fmt: skip
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said)[-1]["ppl"]


def vllm_perplexities(args: argparse.Namespace, folders: dict[str, Path], output: Path) -> dict[str, float]:
    script = str(Path(__file__).parent / "vllm_perplexity.py")
    command = [args.vllm, script, *map(str, folders.values()), "--text", args.text, "--windows", str(args.windows),
               "--json", str(output)]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = json.loads(output.read_text())["results"]
    return {scheme: result["perplexity"] for scheme, result in zip(folders, results, strict=True)}


if __name__ == "__main__":
    main()
