"""The advice matrix, models × cards × engines: `python docs/make_advice.py` writes docs/advice-matrix.md.

tests/advice/test_advice_matrix.py holds the page against the code, and the code against the field's advice.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lowbit.advice import Advice, advise
from lowbit.architecture.shape import ModelShape
from lowbit.engines.engine import SIXTEEN

PAGE = Path(__file__).parent / "advice-matrix.md"
MODELS: dict[str, tuple[str, ModelShape]] = {
    "1B": ("Llama 3.2 1B", ModelShape("llama", 2048, 16, 32, 8, 64, 8192, 128256, tied=True)),
    "7B": ("Llama 2 7B, full multi-head attention", ModelShape("llama", 4096, 32, 32, 32, 128, 11008, 32000)),
    "8B": ("Llama 3.1 8B", ModelShape("llama", 4096, 32, 32, 8, 128, 14336, 128256)),
    "14B": ("Qwen3 14B", ModelShape("qwen3", 5120, 40, 40, 8, 128, 17408, 151936)),
    "32B": ("Qwen3 32B", ModelShape("qwen3", 5120, 64, 64, 8, 128, 25600, 151936)),
    "70B": ("Llama 3.1 70B", ModelShape("llama", 8192, 80, 64, 8, 128, 28672, 128256)),
    "120B MoE": (
        "GLM 4.5 Air, 107B with 14B active",
        ModelShape("glm4_moe", 4096, 46, 96, 8, 128, 10944, 151552, experts=128, experts_per_token=8,
                   expert_intermediate=1408, shared_experts=1, dense_layers=1),
    ),
    "235B MoE": (
        "Qwen3 235B-A22B",
        ModelShape("qwen3_moe", 4096, 94, 64, 4, 128, 12288, 151936, experts=128, experts_per_token=8,
                   expert_intermediate=1536),
    ),
}  # fmt: skip
# (heading, arguments of advise, the schemes of the field's advice)
CASES: tuple[tuple[str, dict[str, str], tuple[str, ...]], ...] = (
    ("vLLM, A100 80 GB", {"engine": "vllm", "hardware": "A100-80GB"}, ("W4A16",)),
    ("vLLM, H100", {"engine": "vllm", "hardware": "H100"}, ("FP8_DYNAMIC",)),
    ("SGLang, A100 80 GB", {"engine": "sglang", "hardware": "A100-80GB"}, ("W4A16",)),
    ("SGLang, H100", {"engine": "sglang", "hardware": "H100"}, ("FP8_DYNAMIC",)),
    ("TensorRT-LLM, A100 80 GB", {"engine": "tensorrt-llm", "hardware": "A100-80GB"}, ("W8A8",)),
    ("TensorRT-LLM, H100", {"engine": "tensorrt-llm", "hardware": "H100"}, ("FP8_DYNAMIC", "FP8")),
    ("llama.cpp, RTX 4090", {"engine": "llama.cpp", "hardware": "RTX-4090"}, ("Q4_K_M",)),
    ("the same, quality", {"engine": "llama.cpp", "hardware": "RTX-4090", "goal": "quality"}, ("Q5_K_M",)),
    ("the same, memory", {"engine": "llama.cpp", "hardware": "RTX-4090", "goal": "memory"}, ("IQ4_XS",)),
    ("llama.cpp, M4 Max", {"engine": "llama.cpp", "hardware": "M4-Max"}, ("Q4_K_M",)),
    ("QLoRA, A100 80 GB", {"workload": "finetune", "hardware": "A100-80GB"}, ("NF4",)),
)
_COUNTS = (1, 2, 4, 8, 16)
ROOM = {"W4A16": "W8A16", "Q4_K_M": "Q5_K_M", "Q5_K_M": "Q6_K", "IQ4_XS": "Q4_K_M", "NF4": "NF4"}


@cache
def asked(model: str, case: int) -> tuple[int, Advice]:
    """(cards, advice) for the fewest cards on which a larger scheme than the expected one fits as well, so that it is
    chosen and not merely all that fits."""
    shape = MODELS[model][1]
    _, arguments, expected = CASES[case]
    larger = ROOM.get(expected[0], expected[0])
    for count in _COUNTS:
        several = f"{count}x{arguments['hardware']}" if count > 1 else arguments["hardware"]
        single = arguments["hardware"].startswith("M")
        chosen = arguments | {"hardware": arguments["hardware"] if single else several}
        answer = advise(shape, **chosen)  # type: ignore[arg-type]
        option = answer.option(SIXTEEN if larger in answer.left_out else larger)
        if single or (option is not None and option.memory.fits):
            return count, answer
    raise AssertionError(f"{shape} in {larger} fits no number of {arguments['hardware']}")


def cell(model: str, case: int) -> str:
    count, answer = asked(model, case)
    best = answer.best
    times = f" ({count} cards)" if count > 1 else ""
    cache = " + FP8 cache" if best.fp8_cache else ""
    size = best.how.group_size if best.how is not None else None
    groups = f" in groups of {size}" if size else ""
    scheme = best.scheme if best.scheme == SIXTEEN else f"`{best.scheme}`"
    return f"{scheme}{groups}{cache}{times}" if best.memory.fits else "none fits"


def cards_table() -> str:
    """2 × A100 in 16 bits against 1 × A100 in four: memory, tokens per second, cost."""
    rows = ["| model | cards | scheme | memory | fits | decode, one | decode, all of 8 | $ per million tokens |",
            "|---|---|---|---:|---|---:|---:|---:|"]  # fmt: skip
    for name in ("8B", "32B", "70B"):
        for hardware, scheme in (("1xA100-80GB", "W4A16"), ("1xA100-80GB", SIXTEEN), ("2xA100-80GB", SIXTEEN),
                                 ("2xA100-80GB", "W4A16")):  # fmt: skip
            option = advise(MODELS[name][1], hardware=hardware, engine="vllm", kv_cache="bf16").option(scheme)
            assert option is not None
            speeds = (
                (f"{rough(option.speed.decode)} tok/s", f"{rough(option.speed.decode_all)} tok/s",
                 rough(option.cost_output or 0.0)) if option.memory.fits else ("–", "–", "–")
            )  # fmt: skip
            rows.append(f"| {name} | {hardware[0]} × A100 | {scheme} | {rough(option.memory.total / 1e9)} GB | "
                        f"{'yes' if option.memory.fits else 'no'} | {' | '.join(speeds)} |")  # fmt: skip
    return "\n".join(rows)


def rough(value: float) -> str:
    from lowbit.cli.advise import rough as two_digits

    return two_digits(value)


def page() -> str:
    head = f"| | {' | '.join(f'{name}' for name in MODELS)} |"
    rule = "|---|" + "---|" * len(MODELS)
    rows = [
        f"| {heading} | {' | '.join(cell(model, case) for model in MODELS)} |"
        for case, (heading, _, _) in enumerate(CASES)
    ]
    shapes = "\n".join(f"- {name}: {what}" for name, (what, _) in MODELS.items())
    table = "\n".join((head, rule, *rows))
    return f"""# What advise says: models × cards × engines

Written by `python docs/make_advice.py`; a test holds it to the code. [advise.md](advise.md) says why.

{table}

{shapes}

Each cell is the first scheme of `lowbit advise` at its default load (servers: 8 sequences of 2048 tokens; llama.cpp:
one) on the fewest cards (1, 2, 4, 8, 16) on which a scheme larger than the field's usual one fits too: with less room
the answer is what fits.

Mixtures are fine-tuned in 16 bits: transformers merges the experts of a block as it loads them, and its integration of
bitsandbytes quantizes linears only, so a folder in NF4 would not load. Groups smaller than the usual 128 stand where
the cards cannot split those.

Some cells are near ties: of a 1B model on an A100 `W8A16` scores within 0.02 of `W4A16`, of the 235B model on four H100
`W4A16` within 0.02 of FP8. Where two are so near, take the one whose loss you have measured.

## More cards in 16 bits, or one in four bits

{cards_table()}

Upper bounds of vLLM at 8 sequences of 2048 tokens, in two digits; the price is of [hardware.md](hardware.md#prices). A
model in four bits on one card makes its tokens for less than half of what two cards in 16 bits cost, and loses what
[advise.md](advise.md#expected-quality) says; two cards in four bits are quicker for one reader and dearer by the token.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
