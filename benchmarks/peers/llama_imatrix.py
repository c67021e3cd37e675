"""What the real llama-imatrix measures of tiny random models, for tests/calibrate/test_llama_imatrix.py.

Writes each model of `tests/gguf_models.py` as an F32 GGUF, runs llama-imatrix on a text that both tokenize into bytes,
with a float32 KV cache (its default, float16, rounds keys and values), and keeps the files it writes.

    python benchmarks/peers/llama_imatrix.py LLAMA_IMATRIX OUT [CASE …]

LLAMA_IMATRIX is the executable of a llama.cpp built with -DBUILD_SHARED_LIBS=OFF. The recorded files
(`llama qwen3_moe`, both forms, into tests/data/imatrix) are of the llama.cpp that llama-cpp-python 0.3.36 ships in its
sdist, under vendor/llama.cpp. With every case in place of those two, it is a check of all architectures: compare with

    lowbit imatrix OUT/CASE/model -o x.gguf --calib OUT/text.txt --samples 3 --seqlen 64
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

TEXT = "The quick brown fox jumps over the lazy dog, and 12 old men: they laugh. " * 4
CHUNKS, CHUNK_TOKENS = 3, 64


def record(executable: str, out: Path, case: str) -> None:
    from gguf_models import describe_folder, make_case, write_plain

    folder = make_case(out / case / "model", case)  # llama.cpp treats models whose name has "phi3" in it in its own way
    gguf = write_plain(*describe_folder(folder), out / f"{case}-f32.gguf")
    text = out / "text.txt"
    text.write_text(TEXT)
    for form in ("gguf", "dat"):
        subprocess.run(
            [executable, "-m", gguf, "-f", text.name, "-o", f"{case}.{form}", "--output-format", form, "--no-ppl",
             "-c", str(CHUNK_TOKENS), "-b", str(CHUNK_TOKENS), "--chunks", str(CHUNKS), "-t", "1", "-ngl", "0",
             "-ctk", "f32", "-ctv", "f32", "-fa", "off"],
            cwd=out, check=True, capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    target = Path(sys.argv[2]).absolute()
    target.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[3:] or ["llama", "qwen3_moe"]:
        record(sys.argv[1], target, name)
