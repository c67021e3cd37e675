"""Fuzzing of whole commands: models, files and recipes as they might arrive, damaged, through `lowbit COMMAND`.

Each try changes one or two files of a valid input (a value of a JSON file, bytes of weights, a file that is gone or is
a folder), runs a command on it, and judges what came out. Clean: exit code 0, or 1 or 2 with a message. Wrong: a
traceback, a message that blames lowbit, a hang, a death. Tries run in forks of one process, some dozens in each, so
that a death or a leak ends with it. A try has a number and can be repeated alone: `Fuzzed(folder).run(seed, number)`.

    python tests/command_fuzzing.py --tries 50000 [--seed 0] [--workers 2] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing import Sample, TooSlowError, bounded_memory, bounded_time, gguf_sample, mutate

CPU_SECONDS = 20.0  # of one command; the slowest clean one takes two
SPARE_BYTES = 4 << 30
BATCH = 40
BLAME = re.compile(r"Traceback \(most recent|bug of lowbit")

# Values that config files should not have.
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 10**9, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "0",
    "re:(a+)+$", "../../etc/passwd", "\x1b[31mred", "\ud800", "a" * 5000, "[bold]", "{{ x }}", [], [[]], [None],
    ["x"] * 50, {}, {"a": {}}, {"x": None},
]  # fmt: skip
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")

# Input → commands that take it. {in}: the input; {out}: a name that is free; {text}, {other}: short texts; {prompts}:
# two of them; {source}, {quantized}, {gguf}: a good model, and what was made of it.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "folder": (
        "inspect {in}", "inspect {in} --json", "estimate {in} --scheme W4A16", "advise {in}",
        "quantize {in} -o {out} --scheme W4A16 --dry-run", "quantize {in} -o {out} --scheme W4A16",
        "quantize {in} -o {out} --scheme FP8_DYNAMIC", "quantize {in} -o {out} --scheme NF4",
        "quantize {in} -o {out} --scheme MXFP4", "quantize {in} -o {out}.gguf --scheme Q4_K_M",
        "quantize {in} -o {out}.gguf --scheme Q8_0 --dry-run",
        "quantize {in} -o {out} --scheme W4A16 --method gptq --samples 4 --seqlen 64 --expert-tokens 1 --calib {text}",
        "evaluate {in} --text {text} --windows 1 --window-tokens 16", "generate {in} -p 'one two' --max-tokens 2",
        "imatrix {in} -o {out}.gguf --samples 1 --seqlen 16 --calib {text}",
        "compare {in} {gguf} --blind --prompts {prompts} --max-tokens 2 --temperature 1 -o {out}.html",
        "quantize {in} -o {out} --scheme W4A16 --method gptq --hessian guided --samples 4 --seqlen 64 --expert-tokens 1"
        " --calib {text}",
        "quantize {in} -o {out} --scheme W4A16 --method gptq+distill --distill-steps 1 --samples 4 --seqlen 64"
        " --expert-tokens 1 --calib {text}",
        "evaluate {in} --text {text} --windows 1 --window-tokens 16 --kv-cache fp8_e4m3,q8_0/q4_0",
        "evaluate {in} --tasks arithmetic --task-items 1",
        "finetune {in} -o {out} --scheme W4A16 --steps 1 --windows 2 --window-tokens 16 --data {text}",
        "finetune {in} -o {out} --lora 2 --lora-init loftq --steps 1 --windows 2 --window-tokens 16 --data {text}",
        "finetune {in} -o {out}.gguf --scheme Q4_0 --steps 1 --windows 2 --window-tokens 16 --data {text} --distill",
        "bench {in} --engine transformers --context 4 --tokens 8 --repeats 1 --warmups 0 --no-report",
    ),
    "reference": (
        "refine {quantized} --reference {in} -o {out} --samples 2 --seqlen 64 --sweeps 1 --windows 1 --window-tokens 32"
        " --expert-tokens 1 --calib {text} --text {other}",
        "verify {quantized} --reference {in}", "verify {gguf} --reference {in}",
        "evaluate {quantized} --reference {in} --text {text} --windows 1 --window-tokens 16 --no-report",
    ),
    "adapter": (
        "quantize {source} -o {out} --scheme W4A16 --adapter {in}",
        "quantize {source} -o {out}.gguf --scheme Q8_0 --adapter {in} --dry-run",
        "convert {in} --base {source} -o {out}.gguf --format gguf",
    ),
    "quantized": (
        "inspect {in}", "verify {in} --engine vllm", "verify {in} --engine transformers --reference {source}",
        "convert {in} -o {out} --format float", "convert {in} -o {out} --format gptq",
        "convert {in} -o {out}.gguf --format gguf --scheme Q8_0", "quantize {in} -o {out} --scheme W8A16",
        "evaluate {in} --reference {source} --text {text} --windows 1 --window-tokens 16",
        "generate {in} -p 'one two' --max-tokens 2",
        "compare {in} {gguf} --reference {source} --windows 1 --window-tokens 64 --no-report",
        "diagnose {in} --reference {source} --text {text}",
        "finetune {in} -o {out} --lora 2 --steps 1 --windows 2 --window-tokens 16 --data {text}",
        "refine {in} --reference {source} -o {out} --samples 2 --seqlen 64 --sweeps 1 --windows 1 --window-tokens 32"
        " --calib {text} --text {other}",
        "refine {in} --reference {source} -o {out} --samples 2 --seqlen 64 --dry-run",
        "evaluate {in} --text {text} --windows 1 --window-tokens 16 --kv-cache int4_per_token_head",
        "evaluate {in} --tasks facts --task-items 1",
        "finetune {in} -o {out} --scheme W4A16 --steps 1 --windows 2 --window-tokens 16 --data {text}",
        "advise {in}", "estimate {in} --scheme W4A16",
    ),
    "gguf": (
        "inspect {in}", "verify {in}", "verify {in} --reference {source}", "convert {in} -o {out} --format float",
        "quantize {in} -o {out}.gguf --scheme Q4_0", "quantize {in} -o {out} --scheme W4A16",
        "generate {in} -p 'one two' --max-tokens 2", "estimate {in} --scheme Q4_K_M", "advise {in}",
        "refine {in} --reference {source} -o {out}.gguf --samples 2 --seqlen 64 --sweeps 1 --windows 1"
        " --window-tokens 32 --calib {text} --text {other}",
        "evaluate {in} --text {text} --windows 1 --window-tokens 16 --kv-cache q8_0,q4_0",
        "evaluate {in} --tasks format --task-items 1",
        "bench {in} --engine llama.cpp --context 4 --tokens 64 --repeats 1 --warmups 0 --no-report",
    ),
    "wide": (
        "generate {in} -p 'one two' --max-tokens 2 --kv-cache int8",
        "generate {in} -p 'one two' --max-tokens 2 --kv-cache int2_hadamard",
        "evaluate {in} --text {text} --windows 1 --window-tokens 16 --kv-cache int4_hadamard --by-layer",
    ),
    "imatrix": ("imatrix {in} -o {out}.gguf", "quantize {source} -o {out}.gguf --scheme Q4_K_M --imatrix {in}"),
    "recipe": (
        "quantize {source} -o {out} --recipe {in} --dry-run",
        "quantize {source} -o {out} --recipe {in} --samples 8 --seqlen 32",
    ),
    "text": (
        "quantize {source} -o {out} --scheme W4A16 --method gptq --samples 4 --seqlen 32 --calib {in} --allow-fallback",
        "evaluate {source} --text {in} --windows 1 --window-tokens 16", "imatrix {source} -o {out} --calib {in}",
        "finetune {source} -o {out} --steps 1 --windows 16 --window-tokens 64 --data {in}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One try. verdict  "ok", "refused", or what is wrong"""

    number: int
    command: str
    changes: str
    verdict: str
    message: str

    @property
    def is_clean(self) -> bool:
        return self.verdict in ("ok", "refused")


class Fuzzed:
    """Valid inputs, made once in `folder`, and their tries."""

    def __init__(self, folder: Path):
        import lowbit
        from lora import make_adapter
        from models import make_model

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.text = folder / "text.txt"
        self.text.write_text("one two three four five six seven eight nine ten " * 80)
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("one two\nthree\n")
        self.other = folder / "other.txt"
        self.other.write_text("nine six two ten eight one four seven three five " * 80)
        self.source = make_model(folder / "llama", "llama")
        experts = make_model(folder / "experts", "qwen3_moe", norm_topk_prob=True)
        self.inputs: list[tuple[str, Path]] = [("folder", self.source), ("folder", experts)]
        for scheme in ("W4A16", "FP8_DYNAMIC"):
            lowbit.quantize(self.source, folder / scheme, scheme=scheme)
            self.inputs.append(("quantized", folder / scheme))
        lowbit.quantize(self.source, folder / "q4.gguf", scheme="Q4_0")
        lowbit.imatrix(self.source, folder / "imatrix.gguf", calib=self.text, samples=1, seqlen=16)
        recipe = folder / "recipe.yaml"
        recipe.write_text("scheme: W4A16\nmethod: gptq\ngroup_size: 32\nignore: [lm_head]\ndamping: 0.01\n")
        foreign = folder / "foreign.yaml"
        foreign.write_text(
            "s_stage:\n  s_modifiers:\n    GPTQModifier: {scheme: W4A16, ignore: [lm_head], targets: Linear}\n"
        )
        recipe_of_stages = folder / "stages.yaml"
        recipe_of_stages.write_text(
            "q_stage:\n  q_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n    QuantizationModifier:\n"
            "      ignore: [lm_head, 're:.*down_proj']\n      config_groups:\n        group_0:\n"
            "          targets: [Linear]\n"
            "          weights: {num_bits: 8, type: int, symmetric: true, strategy: channel}\n"
            "          input_activations: {num_bits: 8, type: int, dynamic: true, strategy: token}\n"
        )
        chat = folder / "chat.jsonl"
        chat.write_text("\n".join(
            json.dumps({"messages": [{"role": "user", "content": f"{number} one two three " * 9},
                                     {"role": "assistant", "content": "four five six " * 9}]})
            for number in range(20)
        ))  # fmt: skip
        self.inputs += [("gguf", folder / "q4.gguf"), ("imatrix", folder / "imatrix.gguf"), ("recipe", recipe),
                        ("recipe", foreign), ("recipe", recipe_of_stages), ("text", chat), ("reference", self.source),
                        ("wide", make_model(folder / "wide", "falcon3")),
                        ("adapter", make_adapter(folder / "adapter", self.source, "q_proj", "down_proj"))]  # fmt: skip
        self.samples = {
            path.name: gguf_sample(path.name, path.read_bytes(), folder) for _, path in self.inputs if path.is_file()
            and path.suffix == ".gguf"
        }  # fmt: skip

    def run(self, seed: int, number: int) -> Judged:
        """One try, in this process: its streams, its signals and its working files are taken."""
        rng = random.Random(f"{seed}/{number}")
        kind, original = rng.choice(self.inputs)
        command = rng.choice(_COMMANDS[kind])
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            place = Path(scratch)
            damaged = place / original.name
            if original.is_dir():
                shutil.copytree(original, damaged)
            else:
                shutil.copy(original, damaged)
            changes = "; ".join(self._change(damaged, rng) for _ in range(rng.choice((1, 1, 1, 2))))
            verdict, message = _judged(self._words(command, damaged, place), place)
        return Judged(number, command, changes, verdict, message)

    def run_undamaged(self) -> Iterator[Judged]:
        """Every command on its valid inputs."""
        for kind, original in self.inputs:
            for command in _COMMANDS[kind]:
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    verdict, message = _judged(self._words(command, original, Path(scratch)), Path(scratch))
                yield Judged(-1, command, original.name, verdict, message)

    def _words(self, command: str, damaged: Path, place: Path) -> list[str]:
        names = {"in": damaged, "out": place / "out", "text": self.text, "other": self.other, "prompts": self.prompts,
                 "source": self.source, "quantized": self.folder / "W4A16",
                 "gguf": self.folder / "q4.gguf"}  # fmt: skip
        return [word.format(**names).strip("'") for word in re.findall(r"'[^']*'|\S+", command)]

    def _change(self, damaged: Path, rng: random.Random) -> str:
        if damaged.is_file():
            if damaged.suffix == ".gguf":
                damaged.write_bytes(mutate(self.samples[damaged.name], list(self.samples.values()), rng))
                return "bytes of the GGUF"
            return _change_rows(damaged, rng) if damaged.suffix == ".jsonl" else _change_text(damaged, rng)
        files = sorted(path for path in damaged.iterdir() if path.is_file())
        if not files:
            return "nothing is left"
        path = rng.choice(files)
        choice = rng.random()
        if choice < 0.08:
            path.unlink()
            return f"{path.name} is gone"
        if choice < 0.12:
            path.unlink()
            path.mkdir()
            return f"{path.name} is a folder"
        if choice < 0.2:
            with path.open("r+b") as file:
                file.truncate(rng.randrange(path.stat().st_size + 1))
            return f"{path.name} is cut"
        with contextlib.suppress(IndexError):  # config.json more often than all others
            path = rng.choice([each for each in files if each.name in JSON_FILES + ("config.json",) * 3])
        if choice < 0.8 and path.suffix == ".json":
            return _change_json(path, rng)
        weights = [each for each in files if each.suffix == ".safetensors"]
        path = rng.choice(weights) if weights else path
        content = path.read_bytes()
        head = min(len(content), 8 + int.from_bytes(content[:8], "little"))
        path.write_bytes(
            mutate(Sample(path.name, content, max(head, 1)), [Sample(path.name, content, max(head, 1))], rng)
        )
        return f"bytes of {path.name}"


def _change_json(path: Path, rng: random.Random) -> str:
    """Another value at a random place, a key that is gone, or one more."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"{path.name} is no JSON any more"
    places = list(_places(value))
    if not places:
        path.write_text(json.dumps(rng.choice(ODD)), encoding="utf-8")
        return f"{path.name} is one value"
    holder, key = rng.choice(places)
    old = holder[key]
    change = rng.random()
    if change < 0.15 and isinstance(holder, dict):
        del holder[key]
        what = f"{key} is gone"
    elif change < 0.3 and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, old * 2, -old, old // 2 if old else 1, str(old), [old]))
        what = f"{key}: {old} → {holder[key]}"
    else:
        holder[key] = rng.choice(ODD)
        what = f"{key} → {str(holder[key])[:40]!r}"
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{path.name}: {what}"


def _places(value: Any, most: int = 3000) -> Iterator[tuple[Any, Any]]:
    """(dict or list, key) of the values in it, breadth first, the long lists of tokenizers cut."""
    waiting = [value] if isinstance(value, dict | list) else []
    while waiting and most > 0:
        holder = waiting.pop(0)
        keys = (
            list(holder) if isinstance(holder, dict) else list(range(len(holder))) if isinstance(holder, list) else []
        )
        for key in keys[:50]:
            most -= 1
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def _change_text(path: Path, rng: random.Random) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    index = rng.randrange(len(lines))
    key = lines[index].partition(":")[0]
    odd = rng.choice(ODD)
    lines[index] = rng.choice(
        (f"{key}: {odd}", f"{key}x: 1", f"{key}: [[[", f"{key}:\n  - {odd}", "\0", "&a [*a]", f"- {key}")
    )
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"line {index}: {lines[index]!r}"


def _change_rows(path: Path, rng: random.Random) -> str:
    """Another value in all rows, or in one; or a line that is no JSON."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        return "a line is no JSON any more"
    if rng.random() < 0.2:
        line = rng.choice(("{", "", "\0", "[1]", "null", '{"text": "a"}', "{" * 3000, "\udcff"))
        lines[rng.randrange(len(lines))] = line
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
        return f"a line is {line[:20]!r}"
    key, odd = "nothing", rng.choice(ODD)
    number = rng.randrange(max(1, len(list(_places(rows[0])))))
    for row in rows if rng.random() < 0.7 else rows[:1]:
        places = list(_places(row))
        if number < len(places):  # an earlier change may have left another shape
            holder, key = places[number]
            holder[key] = odd
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return f"{key} of rows → {str(odd)[:40]!r}"


def _judged(words: list[str], place: Path) -> tuple[str, str]:
    """(verdict, the last lines on stderr) of a command in this process."""
    from lowbit.cli.main import run

    out, err = place / "stdout", place / "stderr"
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["lowbit", *words]
    code: Any = None
    try:
        with bounded_time(CPU_SECONDS):
            run()
    except SystemExit as exit_request:
        code = exit_request.code
    except TooSlowError:
        return f"more than {CPU_SECONDS:.0f} s", ""
    except BaseException as error:
        return f"{type(error).__name__} came through", str(error)[:300]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    printed = err.read_text(encoding="utf-8", errors="replace")
    if BLAME.search(printed) or BLAME.search(out.read_text(encoding="utf-8", errors="replace")):
        return "blames lowbit", printed[-600:]
    code = code or 0
    if code in (1, 2) and not printed.strip() and "verify" not in words[0]:
        return "says nothing", ""
    if code not in (0, 1, 2):
        return f"exit code {code}", printed[-300:]
    return ("refused" if code else "ok"), printed[-200:]


def tries(fuzzed: Fuzzed, seed: int, first: int, last: int, workers: int = 2,
          until: Callable[[], bool] = lambda: False) -> Iterator[Judged]:  # fmt: skip
    """All tries first..last, in forks; a fork that dies gives the try that it was at."""
    batches = [(start, min(start + BATCH, last)) for start in range(first, last, BATCH)]
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda batch: [] if until() else _batch(fuzzed, seed, *batch), batches):
            yield from found


def _batch(fuzzed: Fuzzed, seed: int, first: int, last: int) -> list[Judged]:
    context = multiprocessing.get_context("fork")
    found: list[Judged] = []
    while first < last:
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(fuzzed, seed, first, last, writer))
        process.start()
        writer.close()
        try:
            while reader.poll(CPU_SECONDS * 10):
                found.append(reader.recv())
                first += 1
        except EOFError:
            pass
        process.kill()
        process.join()
        if first < last:
            found.append(Judged(first, "?", "?", f"died with {process.exitcode}, or hung", ""))
            first += 1
    return found


def _child(fuzzed: Fuzzed, seed: int, first: int, last: int, writer: Any) -> None:
    with bounded_memory(SPARE_BYTES):
        for number in range(first, last):
            writer.send(fuzzed.run(seed, number))
    writer.close()
    os._exit(0)


def _all_work(fuzzed: Fuzzed) -> None:
    stream = os.fdopen(os.dup(1), "w")
    wrong = [judged for judged in fuzzed.run_undamaged() if judged.verdict != "ok"]
    for judged in wrong:
        print(json.dumps(judged.__dict__), file=stream, flush=True)
    os._exit(int(bool(wrong)))


def prepare() -> None:
    """What every command imports is imported before the forks."""
    import torch
    import transformers
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    import lowbit.cli.main  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--undamaged", action="store_true", help="first see that every command works on a good input")
    args = parser.parse_args()
    prepare()
    verdicts: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LOWBIT_CACHE"] = f"{scratch}/cache"
        fuzzed = Fuzzed(Path(scratch) / "inputs")
        if args.undamaged:
            context = multiprocessing.get_context("fork")
            good = context.Process(target=_all_work, args=(fuzzed,))
            good.start()
            good.join()
            if good.exitcode:
                return 1
        over = (lambda: time.monotonic() - began > args.seconds) if args.seconds else (lambda: False)
        for judged in tries(fuzzed, args.seed, args.first, args.first + args.tries, args.workers, over):
            verdicts["clean: " + judged.verdict if judged.is_clean else judged.verdict] += 1
            if not judged.is_clean:
                print(json.dumps(judged.__dict__), flush=True)
    print(f"{sum(verdicts.values())} tries from seed {args.seed}, {time.monotonic() - began:.0f} s: {dict(verdicts)}")
    return int(any(not verdict.startswith("clean") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
