"""What llama.cpp computes of Kimi-K2's YaRN with and without --yarn-beta-fast 1, by the length of the text.

    python benchmarks/yarn_betas.py [TOKENS ...]
    python benchmarks/yarn_betas.py --loaders

A tiny random model with Kimi-K2's rotary embedding (64 dimensions, base 50000, factor 32 of 4096, beta_fast 1), as a
GGUF file in F32. For each length, behind a random text: the Kullback-Leibler divergence of llama.cpp's next-token
distribution from transformers', and the largest difference of a log-probability, in nats.

--loaders prints the loaders of llama.cpp that ask for yarn_beta_fast, out of how many: those of its functions
`load_arch_hparams` and `load_hparams` that call `get_key` with the number of that key. They are disassembled out of the
wheel xllamacpp with nm and objdump (x86-64).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests")]

LENGTHS = (10, 40, 160, 640, 2560)


def main() -> int:
    if "--loaders" in sys.argv:
        return print_loaders()
    from gguf_models import describe_folder, make_case, write_plain
    from llama_cpp import top_logprobs
    from lowbit.architecture.loading import load_model
    from lowbit.checkpoint import open_safetensors

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_case(Path(scratch) / "hf", "kimi_k2")
        path = write_plain(*describe_folder(folder), Path(scratch) / "f32.gguf")
        model = load_model(open_safetensors(folder))
        print("| tokens | KLD without | largest difference without | largest difference with |\n|---:|---:|---:|---:|")
        for length in [int(word) for word in sys.argv[1:]] or LENGTHS:
            ids = torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = model(ids).logits[0, -1].double().log_softmax(-1)
            divergence, largest = [], []
            for beta in ({}, {"yarn_beta_fast": 1.0}):
                # the bias makes it say a letter, as it gives no probabilities of half a character
                found = top_logprobs(
                    path, ids[0].tolist(), len(expected), options={"n_ctx": 4096, "n_batch": 4096, **beta}, letter=True
                )
                theirs = torch.tensor([found[token] for token in range(len(expected))], dtype=torch.float64)
                divergence.append((expected.exp() * (expected - theirs)).sum().item())
                largest.append((expected - theirs).abs().max().item())
            print(f"| {length} | {divergence[0]:.1e} | {largest[0]:.1e} | {largest[1]:.1e} |", flush=True)
    return 0


def print_loaders() -> int:
    import xllamacpp

    library = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    number = number_of_key(library, ".rope.scaling.yarn_beta_fast")
    asks = f"mov +\\$0x{number:x},%esi"
    functions = [words for words in map(str.split, run("nm", "-S", library)) if len(words) == 4 and words[2] in "TW"
                 and re.match(r"_ZN\d+llama_model_\w+?(17load_arch_hparams|12load_hparams)ER", words[3])]  # fmt: skip
    found = []
    for start, size, _, name in functions:
        stop = int(start, 16) + int(size, 16)
        code = run(
            "objdump", "-d", "--no-show-raw-insn", f"--start-address=0x{start}", f"--stop-address={stop}", library
        )
        before = ""
        for line in code:
            before = line if "%esi" in line else before
            if "get_keyIfE" in line and re.search(asks, before):
                found.append(re.sub(r"_ZN\d+llama_model_(\w+?)\d\dload_.*", r"\1", name))
                break
    print(f"{len(found)} of {len(functions)} loaders ask for yarn_beta_fast: {', '.join(sorted(found))}")
    return 0


def run(*command: object) -> list[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def number_of_key(library: Path, ending: str) -> int:
    """The number by which llama.cpp knows a key-value: `LLM_KV(LLM_ARCH_LLAMA)(number)` is the key, a std::string."""
    call = ctypes.CDLL(str(library))._ZNK6LLM_KVclE6llm_kv
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    keys = (ctypes.c_uint64 * 2)(1, 0)  # the architecture, no suffix
    for number in range(400):
        text = ctypes.c_char_p()  # a string of the wheel is one pointer
        call(ctypes.addressof(text), ctypes.addressof(keys), number)
        if (text.value or b"").endswith(ending.encode()):
            return number
    raise SystemExit(f"llama.cpp has no key {ending}")


if __name__ == "__main__":
    sys.exit(main())
