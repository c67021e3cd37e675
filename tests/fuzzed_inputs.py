"""Valid inputs of the fuzzing of whole commands, and the commands that take them."""

from __future__ import annotations

import json
import re
from pathlib import Path

# Commands that plan and look: some hundredths of a second each.
LIGHT = re.compile(r"--dry-run|--show|^(inspect|estimate|verify)")

# Kind of input → commands that take it. {in}: the input; {out}: a name that is free; {text}, {other}: short texts;
# {prompts}: two of them; {source}, {quantized}, {gguf}: a good model, and what was made of it.
COMMANDS: dict[str, tuple[str, ...]] = {
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
        "quantize {in} -o {out}.gguf --scheme IQ4_XS --dry-run",
        "quantize {in} -o {out} --scheme FP8_BLOCK --dry-run",
        "quantize {in} -o {out} --scheme NVFP4A16 --format modelopt --dry-run",
        "quantize {in} -o {out} --scheme W4A16 --method gptq --dry-run --calib {text}",
        "estimate {in} --scheme Q4_K_M --engine llama.cpp",
        "verify {in} --engine transformers",
        "imatrix {in} -o {out}.gguf --samples 4 --seqlen 16 --calib {text}:3,{other}:1",
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
        "quantize {source} -o {out} --scheme W4A16 --adapter {in} --dry-run",
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
        "inspect {in} --json",
        "quantize {in} -o {out}.gguf --scheme Q4_0 --dry-run",
        "verify {in} --engine sglang",
        "verify {in} --json",
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
        "inspect {in} --json",
        "quantize {in} -o {out}.gguf --scheme Q5_0 --dry-run",
        "quantize {in} -o {out} --scheme W4A16 --dry-run",
        "verify {in} --json",
    ),
    "wide": (
        "generate {in} -p 'one two' --max-tokens 2 --kv-cache int8",
        "generate {in} -p 'one two' --max-tokens 2 --kv-cache int2_hadamard",
        "evaluate {in} --text {text} --windows 1 --window-tokens 16 --kv-cache int4_hadamard --by-layer",
    ),
    "imatrix": (
        "imatrix {in} -o {out}.gguf", "imatrix {in} --show", "imatrix {in} --show --json",
        "quantize {source} -o {out}.gguf --scheme Q4_K_M --imatrix {in} --dry-run",
        "quantize {source} -o {out}.gguf --scheme Q4_K_M --imatrix {in}",
    ),
    "recipe": (
        "quantize {source} -o {out} --recipe {in} --dry-run",
        "quantize {source} -o {out} --recipe {in} --samples 8 --seqlen 32",
    ),
    "text": (
        "quantize {source} -o {out} --scheme W4A16 --method gptq --samples 4 --seqlen 32 --calib {in} --allow-fallback",
        "evaluate {source} --text {in} --windows 1 --window-tokens 16", 
        "imatrix {source} -o {out} --samples 4 --seqlen 32 --calib {in}",
        "finetune {source} -o {out} --steps 1 --windows 16 --window-tokens 64 --data {in}",
    ),
}  # fmt: skip


def commands(kind: str, light: bool) -> list[str]:
    """The commands that take this kind of input. light: those that plan and look only"""
    return [command for command in COMMANDS[kind] if not light or LIGHT.search(command)]


class Inputs:
    """Valid inputs, made once in `folder`: (kind, path). light: of one block, in more formats, for light commands"""

    def __init__(self, folder: Path, light: bool):
        import lowbit
        from lora import make_adapter
        from models import make_model

        folder.mkdir(parents=True, exist_ok=True)
        blocks = {"num_hidden_layers": 1} if light else {}
        self.names = {"text": folder / "text.txt", "other": folder / "other.txt", "prompts": folder / "prompts.txt",
                      "source": make_model(folder / "llama", "llama", **blocks), "quantized": folder / "W4A16",
                      "gguf": folder / "q4.gguf", "adapter": folder / "adapter"}  # fmt: skip
        self.names["text"].write_text("one two three four five six seven eight nine ten " * 80)
        self.names["other"].write_text("nine six two ten eight one four seven three five " * 80)
        self.names["prompts"].write_text("one two\nthree\n")
        source = self.names["source"]
        experts = make_model(folder / "experts", "qwen3_moe", norm_topk_prob=True, **blocks)
        self.all: list[tuple[str, Path]] = [("folder", source), ("folder", experts), ("reference", source)]
        schemes = {"W4A16": {}, "FP8_DYNAMIC": {}}
        if light:
            schemes |= {
                "NF4": {}, "W8A16": {"format": "gptq", "group_size": 64}, "NVFP4A16": {"format": "modelopt"},
                "W4A16_ASYM": {"format": "awq", "group_size": 64},
            }  # fmt: skip
        for scheme, how in schemes.items():
            self.all.append(("quantized", lowbit.quantize(source, folder / scheme, scheme=scheme, **how).path))
        self.all.append(("gguf", lowbit.quantize(source, self.names["gguf"], scheme="Q4_0").path))
        if light:
            self.all.append(("gguf", lowbit.quantize(experts, folder / "experts.gguf", scheme="Q4_K_M").path))
        matrix = lowbit.imatrix(source, folder / "imatrix.gguf", calib=self.names["text"], samples=1, seqlen=16).file
        adapter = make_adapter(self.names["adapter"], source, "q_proj", "down_proj")
        self.all += [("imatrix", matrix), ("adapter", adapter), *(("recipe", path) for path in _recipes(folder))]
        if not light:
            self.all += [("text", _chat(folder)), ("wide", make_model(folder / "wide", "falcon3"))]


def _recipes(folder: Path) -> list[Path]:
    """One of lowbit, and two of llm-compressor."""
    texts = {
        "recipe": "scheme: W4A16\nmethod: gptq\ngroup_size: 32\nignore: [lm_head]\ndamping: 0.01\n",
        "foreign": "s_stage:\n  s_modifiers:\n    GPTQModifier: {scheme: W4A16, ignore: [lm_head], targets: Linear}\n",
        "stages": (
            "q_stage:\n  q_modifiers:\n    SmoothQuantModifier: {smoothing_strength: 0.8}\n    QuantizationModifier:\n"
            "      ignore: [lm_head, 're:.*down_proj']\n      config_groups:\n        group_0:\n"
            "          targets: [Linear]\n"
            "          weights: {num_bits: 8, type: int, symmetric: true, strategy: channel}\n"
            "          input_activations: {num_bits: 8, type: int, dynamic: true, strategy: token}\n"
        ),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return [folder / f"{name}.yaml" for name in texts]


def _chat(folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{number} one two three " * 9},
                      {"role": "assistant", "content": "four five six " * 9}]}
        for number in range(20)
    ]  # fmt: skip
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "chat.jsonl"
