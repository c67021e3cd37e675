"""What lowbit writes, held still: about 200 small outputs, as a table of the SHA-256 of every file but the report.

    python benchmarks/golden.py record TABLE [--only REGEX] [--work DIR]
    python benchmarks/golden.py compare OLD NEW       # differing and missing lines; exit 1 where there are any

Record a table before a change and one after it, on the same machine: sums depend on the processor, on the number of
threads (2, set here) and on the versions of torch and transformers. A line is

    OUTPUT    FILE    SHA-256    BYTES                 of a command that writes something
    OUTPUT    refused    EXIT CODE    ERROR            of one that must not

Covered: schemes × formats, group sizes, ranges, overrides, static activations, KV caches, methods, families of models,
GGUF file types with and without an importance matrix, conversions, split files, refusals, runs that are killed and
resumed (whose files are those of the `undisturbed` run beside them). Most of the outputs are in golden_outputs.txt.

The commands run one after the other in forks of this process, which has imported everything and computed nothing; those
that are killed and resumed are processes of their own. Every command runs in the work folder with relative paths, which
some files contain. Models are made by tests/models.py with fixed seeds; their files are in the table too. Whatever is
named in a command is used by it: an option without effect may become an error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import pkgutil
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "benchmarks" / "golden_outputs.txt"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "3000", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip

# name → (architecture of tests/models.py, what its config has beside its sizes there)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 2048}),
    "tall": ("llama", {"num_hidden_layers": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {"vocab_size": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32, "sliding_window": 8}),
    "phi3": ("phi3", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}
WEIGHT_ONLY = "W8A16 W4A16 W4A16_ASYM W3A16 W2A16"
FORMATS = {
    "compressed-tensors": f"{WEIGHT_ONLY} W8A8 W4A8 W4AFP8 FP8_DYNAMIC FP8_BLOCK NVFP4A16 MXFP4 MXFP4A16 MXFP8",
    "gptq": WEIGHT_ONLY,
    "gptq_v2": WEIGHT_ONLY,
    "awq": "W4A16 W4A16_ASYM",
    "bitsandbytes": "NF4 FP4 INT8",
    "modelopt": "FP8_DYNAMIC FP8_BLOCK NVFP4A16 MXFP8",
    "float": "W4A16 FP8_DYNAMIC NVFP4A16 NF4 INT8",
}
STATIC = {"compressed-tensors": "FP8 W8A8_STATIC NVFP4", "modelopt": "FP8 NVFP4"}  # these calibrate
GGUF_TYPES = (
    "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S IQ3_M "
    "IQ3_S Q2_K TQ2_0 TQ1_0 MXFP4_MOE NVFP4"
)
GGUF_WITH_IMATRIX = (
    "IQ3_XS IQ3_XXS Q2_K_S IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S Q4_K_M Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL IQ4_XS Q3_K_M Q2_K"
)
METHODS = (
    "gptq awq smoothquant sign-sgd rotate hadamard awq+gptq smoothquant+gptq rotate+gptq hadamard+gptq hadamard+hqq "
    "awq+hqq"
)

CALIB = "--samples 4 --seqlen 64"
SENTENCE = "a river carries stones down from the hills and grinds them small; take flour, two eggs, stir and wait"


def commands() -> dict[str, list[str]]:
    """Output → what makes it, in an order in which each finds what it reads."""
    lines = [f"{format}_{scheme}: quantize llama --scheme {scheme} --format {format}"
             for format, schemes in FORMATS.items() for scheme in schemes.split()]  # fmt: skip
    lines += [f"{format}_{scheme}: quantize llama --scheme {scheme} --format {format} {{calib}}"
              for format, schemes in STATIC.items() for scheme in schemes.split()]  # fmt: skip
    lines += [f"method_{method}: quantize llama --method {method} {{calib}}"
              + (" --iterations 15" if "sgd" in method else "") for method in METHODS.split()]  # fmt: skip
    gguf = [f"{kind}.gguf: quantize llama --scheme {kind}" for kind in GGUF_TYPES.split()]
    gguf += [f"{kind}_imatrix.gguf: quantize llama --scheme {kind} --imatrix @llama.imatrix.gguf"
             for kind in GGUF_WITH_IMATRIX.split()]  # fmt: skip
    lines += OUTPUTS.read_text().replace("{gguf}", "\n".join(gguf)).splitlines()
    pairs = (line.partition(": ") for line in lines if line and line[0] != "#")
    return {name: shlex.split(text.replace("{calib}", CALIB)) for name, _, text in pairs}


def path_of(output: str) -> str:
    return f"out/{output}/model{Path(output).suffix}" if output.endswith((".gguf", ".dat")) else f"out/{output}"


def resolved(word: str) -> str:
    """A word of a command as `lowbit` is given it."""
    if word in MODELS:
        return f"models/{word}"
    if not word.startswith("@"):
        return word
    output, slash, file = word[1:].partition("/")
    return f"out/{output}/{file}" if slash else path_of(output)


def forked(call: Callable[[], object], errors: str = os.devnull) -> int:
    """The exit code of a call in a child process; what it says goes to the file `errors`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        call()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def lowbit(arguments: list[str]) -> tuple[int, str]:
    """(exit code, the line that says what went wrong) of a command."""

    def call() -> None:
        sys.argv = ["lowbit", *arguments]
        runpy.run_module("lowbit", run_name="__main__", alter_sys=True)

    code = forked(call, "stderr.txt")
    lines = Path("stderr.txt").read_text().splitlines() or [""]
    return code, next((line for line in lines if line.startswith("error: ")), lines[-1])


def kill_in_the_middle(arguments: list[str], output: Path, signum: int) -> None:
    """Start a command of its own and stop it when its first block is finished."""
    process = subprocess.Popen([sys.executable, "-m", "lowbit", *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    while process.poll() is None and not list(output.parent.glob(f".{output.name}.*/block-*")):
        time.sleep(0.002)
    process.send_signal(signum)
    process.wait()
    if output.exists():
        print(f"{output}: finished before it was killed", file=sys.stderr)


def rows_of(name: str, folder: Path) -> list[str]:
    """Lines of the table: every file below a folder but reports."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in files if not path.name.endswith(("lowbit-report.json", "report.html"))]
    return [
        f"{name}\t{path.relative_to(folder)}\t{hashlib.sha256(path.read_bytes()).hexdigest()}\t{path.stat().st_size}"
        for path in kept
    ]


def make(name: str, command: list[str]) -> list[str]:
    """Run one command; its lines of the table."""
    kind = command[0] if command[0] in ("killed", "refused") else ""
    words = command[{"killed": 2, "refused": 1, "": 0}[kind] :]
    output = path_of(name)
    arguments = [*map(resolved, words), "-o", output, *(["--threads", "2"] if words[0] != "imatrix" else [])]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    if kind == "killed":
        kill_in_the_middle(arguments, Path(output), signal.Signals[command[1]])
        arguments.append("--resume")
    code, error = lowbit(arguments)
    if code or kind == "refused":
        return [f"{name}\t{'refused' if code and kind == 'refused' else 'FAILED'}\t{code}\t{error}"]
    return rows_of(name, Path("out") / name)


def with_outliers(weights: Path) -> None:
    """Enlarge some channels of norms and some weights of matrices, so that transforms and searches have work."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    for name, values in tensors.items():
        if values.dim() == 1 and "norm" in name:
            values[::37] *= 4
        elif values.dim() > 1:
            values.view(-1)[::101] *= 4
            values[..., ::41] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})


def prepare() -> None:
    """Models and texts of the work folder; import what every command needs, so that forks begin there."""

    def models() -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        make_model = importlib.import_module("models").make_model
        for name, (architecture, changes) in MODELS.items():
            with_outliers(make_model(Path("models") / name, architecture, **changes) / "model.safetensors")

    words = SENTENCE.split()
    text = " ".join(words[(index * index + index // 7) % len(words)] for index in range(4000))
    Path("text.txt").write_text(text)
    rows = (text[begin : begin + 400] for begin in range(0, 8000, 400))
    Path("rows.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    Path("recipe.yaml").write_text("scheme: W4A16_ASYM\ngroup_size: 64\nrange: mse\nignore: ['\\.0\\.mlp\\.']\n"
                                   "overrides: {'1.mlp.down_proj$': W8A16}\n")  # fmt: skip
    import lowbit

    print(f"lowbit in {Path(lowbit.__file__).parent}", file=sys.stderr)
    for module in pkgutil.walk_packages(lowbit.__path__, "lowbit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for family in ("llama", "qwen2", "qwen3_moe", "gpt_oss", "gpt2"):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    if forked(models, "stderr.txt"):
        sys.exit(Path("stderr.txt").read_text())


def record(table: Path, only: str, work: Path) -> int:
    """Write the table of the outputs whose name has `only` in it; 1 where a command failed that should not."""
    os.environ.update(ENVIRONMENT)
    os.chdir(work)
    prepare()
    began, done = time.monotonic(), commands()
    chosen = {name for name in done if re.search(only, name)}
    needed = set(chosen)
    for name in reversed(done):
        if name in needed:
            needed |= {word[1:].partition("/")[0] for word in done[name] if word.startswith("@")}
    lines = [line for name in MODELS for line in rows_of(f"models/{name}", Path("models") / name)]
    failed = 0
    for name in filter(needed.__contains__, done):
        start, made = time.monotonic(), make(name, done[name])
        wrong = made[0] if "\tFAILED\t" in made[0] else ""
        failed += bool(wrong)
        lines += made if name in chosen else []
        print(f"{time.monotonic() - start:6.1f} s  {wrong or name}", file=sys.stderr, flush=True)
    table.write_text("".join(f"{line}\n" for line in sorted(lines)))
    seconds = time.monotonic() - began
    print(f"{len(chosen)} outputs, {len(lines)} lines, {failed} failed, {seconds:.0f} s", file=sys.stderr)
    return 1 if failed else 0


def compare(old: Path, new: Path) -> int:
    """Print what differs between two tables; 1 where anything does."""

    def read(path: Path) -> dict[tuple[str, str], str]:
        lines = (line.split("\t", 2) for line in path.read_text().splitlines())
        return {(output, file): rest for output, file, rest in lines}

    before, after = read(old), read(new)
    different = 0
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            different += 1
            print(*key, before.get(key, "absent"), "→", after.get(key, "absent"))
    print(f"{len(before)} lines before, {len(after)} after, {different} differ", file=sys.stderr)
    return 1 if different else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record", help="run everything and write the table")
    recording.add_argument("table", type=Path)
    recording.add_argument("--only", default="", metavar="REGEX", help="outputs whose name it is found in")
    recording.add_argument("--work", type=Path, metavar="DIR", help="an empty folder to work in, kept")
    comparing = actions.add_parser("compare", help="what differs between two tables")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.action == "compare":
        sys.exit(compare(args.old, args.new))
    table = args.table.absolute()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        sys.exit(record(table, args.only, args.work))
    with tempfile.TemporaryDirectory() as work:
        code = record(table, args.only, Path(work))
        os.chdir(ROOT)
    sys.exit(code)


if __name__ == "__main__":
    main()
