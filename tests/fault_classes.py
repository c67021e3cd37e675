"""The faults that were once counted, counted again: how many inputs of each class end well, and how many did before.

Each class is a list of inputs of one kind, made anew from a tiny model, and a judgement of what a command does with
each of them. "before" is what was counted when the fault was reported, against lowbit 0.1.0, on other inputs of the
same kind; nothing here runs that version.

    python tests/fault_classes.py            a table in Markdown, as in docs/reliability.md
    python tests/fault_classes.py --only blocks,shapes [--tries 100]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file

from command_fuzzing import _judged, prepare
from fuzzed_changes import change_json
from models import SHORT_TEXT, make_model

SECONDS = 120.0  # of CPU for one command, which tells a hang
GPTQ = ["--scheme", "W4A16", "--group-size", "32", "--method", "gptq", "--samples", "4", "--seqlen", "64",
        "--expert-tokens", "1"]  # fmt: skip
Verdict = tuple[str, str]


def run(words: list[str], place: Path) -> Verdict:
    """(verdict, message) of a command in a fork, as `command_fuzzing` judges it."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=lambda: writer.send(_judged(words, place, SECONDS)))
    process.start()
    writer.close()
    try:
        return reader.recv() if reader.poll(SECONDS * 20) else ("hangs", "")
    except EOFError:
        return "died", ""
    finally:
        process.kill()
        process.join()


def clean(verdict: Verdict) -> bool:
    return verdict[0] in ("ok", "refused")


def flip(path: Path, draw: random.Random, start: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def blocks(place: Path, tries: int) -> Iterator[bool]:
    """Finished blocks of a stopped run, damaged; well: the bytes of an undisturbed run, or a message."""
    model, out, draw = make_model(place / "model"), place / "out", random.Random(0)
    words = ["quantize", str(model), "-o", str(out), *GPTQ, "--calib", SHORT_TEXT, "--resume"]
    assert run(words, place)[0] == "ok"
    undisturbed = digest(out / "model.safetensors")
    shutil.rmtree(out)
    work, kept = place / ".out.lowbit-work", place / "kept"
    stop_after_blocks(words, place, work)
    shutil.copytree(work, kept)
    first, second = work / "block-00000.safetensors", work / "block-00001.safetensors"

    def swap() -> None:
        first.rename(work / "x")
        second.rename(first)
        (work / "x").rename(second)

    damage: list[Callable[[], object]] = [
        lambda: flip(first, draw), lambda: flip(second, draw), lambda: first.write_bytes(first.read_bytes()[:-100]),
        lambda: first.write_bytes(b""), swap, first.unlink, lambda: flip(work / "blocks.json", draw),
        lambda: (work / "blocks.json").write_text("[]"), lambda: shutil.copy(second, first),
    ]  # fmt: skip
    for harm in damage:
        for path in (out, work):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(kept, work)
        harm()
        verdict = run(words, place)
        yield clean(verdict) and (verdict[0] == "refused" or digest(out / "model.safetensors") == undisturbed)


def stop_after_blocks(words: list[str], place: Path, work: Path) -> None:
    """Run the command in a fork and kill it when its second block is finished."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_judged, args=(words, place, SECONDS))
    process.start()
    while process.is_alive() and not (work / "block-00001.safetensors").exists():
        process.join(0.002)
    process.kill()
    process.join()
    assert (work / "block-00001.safetensors").exists(), "the run was over before it could be killed"


def shapes(place: Path, tries: int) -> Iterator[bool]:
    """config.json and tensors disagree, to GGUF; well: refused with a message."""
    good = make_model(place / "good")
    config = json.loads((good / "config.json").read_text())
    keys = ("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    changes: list[tuple[str, Callable[[int], int]]] = [(key, by) for key in keys for by in (_double, _half)]
    for key, by in changes:
        folder = _copy(good, place)
        if key not in config:
            continue
        (folder / "config.json").write_text(json.dumps(config | {key: by(config[key])}))
        yield run(["quantize", str(folder), "-o", str(place / "o.gguf"), "--scheme", "Q8_0"], place)[0] == "refused"
    for part in ("down_proj", "k_proj", "up_proj", "embed_tokens"):
        folder = _copy(good, place)
        tensors = load_file(folder / "model.safetensors")
        changed = {name: tensor.t().contiguous() if part in name else tensor for name, tensor in tensors.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        yield run(["quantize", str(folder), "-o", str(place / "o.gguf"), "--scheme", "Q8_0"], place)[0] == "refused"


def _double(value: int) -> int:
    return 2 * value


def _half(value: int) -> int:
    return value // 2


def _copy(folder: Path, place: Path) -> Path:
    shutil.rmtree(place / "model", ignore_errors=True)
    return shutil.copytree(folder, place / "model")


def bits(scheme: str) -> Callable[[Path, int], Iterator[bool]]:
    def flipped(place: Path, tries: int) -> Iterator[bool]:
        """One bit of an output's tensors flipped; well: `verify` says that it is damaged."""
        model, draw = make_model(place / "model"), random.Random(1)
        out = place / ("out.gguf" if scheme.startswith("Q") else "out")
        assert run(["quantize", str(model), "-o", str(out), "--scheme", scheme], place)[0] == "ok"
        path = out if out.is_file() else out / "model.safetensors"
        good = path.read_bytes()
        for _ in range(16):
            path.write_bytes(good)
            flip(path, draw, len(good) // 2)  # behind headers, which are found by reading
            yield run(["verify", str(out), "--reference", str(model)], place)[0] == "refused"

    return flipped


def generation(place: Path, tries: int) -> Iterator[bool]:
    """Odd generation_config.json and chat templates, in `generate`; well: a result or a message."""
    good = make_model(place / "good")
    configs = ["", "[]", "null", '{"eos_token_id": []}', '{"eos_token_id": "x"}', '{"temperature": "hot"}',
               '{"top_k": -1}', '{"max_length": 1e99}', '{"bos_token_id": {}}']  # fmt: skip
    templates = ["{{ raise_exception('no') }}", "{% for %}", "{{ messages[0]['a']['b'] }}", "{{ 1/0 }}",
                 "{{ messages | nothing }}", "{{ 'x' * 10**10 }}", "{% for i in range(10**9) %}x{% endfor %}",
                 "{{ messages.pop().pop() }}", "{{" + "(" * 20_000]  # fmt: skip
    for name, texts in (("generation_config.json", configs), ("chat_template.jinja", templates)):
        for text in texts:
            folder = _copy(good, place)
            (folder / name).write_text(text)
            yield clean(run(["generate", str(folder), "-p", "one", "--max-tokens", "2"], place))


def tokenizers(place: Path, tries: int) -> Iterator[bool]:
    """Tokenizer files with another value or other bytes, in three commands; well: a result or a message."""
    good, draw = make_model(place / "good"), random.Random(2)
    text = place / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    tails = (["evaluate", "{}", "--text", str(text), "--windows", "1", "--window-tokens", "16"],
             ["generate", "{}", "-p", "one two", "--max-tokens", "2"],
             ["imatrix", "{}", "-o", str(place / "m.gguf"), "--samples", "1", "--seqlen", "16", "--calib",
              str(text)])  # fmt: skip
    for _ in range(tries):
        folder = _copy(good, place)
        path = folder / draw.choice(("tokenizer.json", "tokenizer_config.json"))
        if draw.random() < 0.5:
            change_json(path, draw)
        else:
            flip(path, draw)
        (place / "m.gguf").unlink(missing_ok=True)
        yield clean(run([word.format(folder) for word in draw.choice(tails)], place))


# name → (what is tried, its inputs, (clean, of) before)
CLASSES: dict[str, tuple[str, Callable[[Path, int], Iterator[bool]], tuple[int, int]]] = {
    "blocks": ("finished blocks of a stopped run, damaged or swapped, then `--resume`", blocks, (0, 9)),
    "shapes": ("config.json and tensors disagree, to GGUF", shapes, (0, 16)),
    "bits-q8": ("one bit of a Q8_0 file flipped, then `verify --reference`", bits("Q8_0"), (1, 16)),
    "bits-q4": ("one bit of a Q4_0 file flipped, then `verify --reference`", bits("Q4_0"), (2, 16)),
    "bits-folder": ("one bit of a W4A16 folder flipped, then `verify --reference`", bits("W4A16"), (13, 16)),
    "generation": ("odd generation_config.json and chat templates, in `generate`", generation, (8, 18)),
    "tokenizers": ("damaged tokenizer files, in `evaluate`, `generate`, `imatrix`", tokenizers, (323, 400)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CLASSES), help="names of classes: " + ", ".join(CLASSES))
    parser.add_argument("--tries", type=int, default=400, help="of tokenizer files")
    args = parser.parse_args()
    prepare()
    wrong = 0
    print("| class of fault | before: clean | now: clean |\n|---|---:|---:|", flush=True)
    for name in args.only.split(","):
        words, inputs, (well, of) = CLASSES[name]
        with tempfile.TemporaryDirectory() as scratch:
            found = list(inputs(Path(scratch), args.tries))
        wrong += len(found) - sum(found)
        print(f"| {words} | {well} of {of} | {sum(found)} of {len(found)} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
