"""Two runs at once, on one output name: exactly one wins, and nothing else is left.

    python benchmarks/races.py --rounds 200

Each round starts two processes that quantize a tiny model to one name, folder and GGUF in turns, with a pause of 0 to
60 ms between the starts. Exactly one must end with 0, the other with a refusal and no traceback; the output must be
whole, and no hidden folder may be left. Prints a line of counts; exits with 1 where a round broke a rule.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]


def quantize(model: Path, output: Path, scheme: str, pause: float, answer: multiprocessing.SimpleQueue) -> None:
    """One run, in a process of its own; answers "won", or the message of the refusal."""
    import torch

    import lowbit
    from lowbit.errors import OutputError

    torch.set_num_threads(1)
    time.sleep(pause)
    try:
        lowbit.quantize(model, output, scheme=scheme, threads=1)
        answer.put("won")
    except OutputError as error:
        said = str(error)
        known = ("written by another run", "exists already", "appeared")
        answer.put(next((f"refused: {words}" for words in known if words in said), said))
    except BaseException as error:
        answer.put(f"BROKE: {type(error).__name__}: {error}")


def one_round(
    context: multiprocessing.context.BaseContext, model: Path, folder: Path, draw: random.Random
) -> list[str]:
    """Two runs; their answers, and what is wrong with what they left."""
    import lowbit

    gguf = draw.random() < 0.5
    output = folder / ("out.gguf" if gguf else "out")
    answer = context.SimpleQueue()
    pauses = (0.0, draw.random() * 0.06)
    runs = [context.Process(target=quantize, args=(model, output, "Q4_0" if gguf else "W8A16", pause, answer))
            for pause in pauses]  # fmt: skip
    for run in runs:
        run.start()
    answers = [answer.get() for _ in runs]
    for run in runs:
        run.join()
    if answers.count("won") != 1:
        answers.append("BROKE: not exactly one won")
    if list(folder.glob(".*")):
        answers.append(f"BROKE: left {[path.name for path in folder.glob('.*')]}")
    if not lowbit.verify(output).ok:
        answers.append("BROKE: the output does not verify")
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lowbit.api", "transformers.models.llama.modeling_llama"])
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        from models import make_model

        model = make_model(Path(scratch) / "model", num_hidden_layers=1)
        for number in range(arguments.rounds):
            folder = Path(scratch) / f"round-{number}"
            folder.mkdir()
            counts.update(one_round(context, model, folder, draw))
    for answer, count in sorted(counts.items()):
        print(f"{count:5}  {answer}")
    sys.exit(any(answer.startswith("BROKE") for answer in counts))


if __name__ == "__main__":
    main()
