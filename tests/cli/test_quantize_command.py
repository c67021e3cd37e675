"""`lowbit quantize`: what a dry run promises is what a run writes; flags and recipe say the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from commands import start
from models import make_model

WEIGHTS = "model.safetensors"


def quantize(lowbit, model, out, *flags):
    outcome = lowbit("quantize", model, "-o", out, *flags)
    assert outcome.code == 0, outcome.stderr
    return (out / WEIGHTS).read_bytes()


def schemes(lowbit, model, *flags):
    """Module name → scheme of a dry run."""
    plan = json.loads(lowbit("quantize", model, "--dry-run", "--json", *flags).stdout)
    return {row["name"].removesuffix(".weight"): row["scheme"] for row in plan["tensors"]}


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "FP8_BLOCK", "NVFP4A16"])
def test_dry_run_writes_nothing_and_promises_the_exact_bytes(lowbit, tiny_llama, tmp_path, scheme):
    dry = lowbit("quantize", tiny_llama, "-o", tmp_path / "out", "--scheme", scheme, "--dry-run", "--json")
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(dry.stdout)
    written = quantize(lowbit, tiny_llama, tmp_path / "out", "--scheme", scheme)
    assert len(written) == plan["file_bytes"]
    header = 8 + int.from_bytes(written[:8], "little")
    assert header + sum(tensor["bytes"] for tensor in plan["tensors"]) == len(written)


def peak_of_a_run(*arguments) -> int:
    """As the kernel counts it for that process; `ru_maxrss` would count what it was forked from."""
    script = """
import atexit, sys
from lowbit.cli.main import run
from lowbit.measure import peak_memory
atexit.register(lambda: print(peak_memory(), file=sys.stderr))
run()
"""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-1])


@pytest.mark.slow
def test_predicted_peak_memory_is_near_the_measured_one(tmp_path):
    """A block of linears of more than a slab. Of FP8_DYNAMIC and of a GGUF file: tests/estimation/test_estimate.py."""
    model = make_model(tmp_path / "model", hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
                       num_key_value_heads=16, head_dim=64, num_hidden_layers=1, vocab_size=512)  # fmt: skip
    flags = ["quantize", model, "--scheme", "W4A16", "--threads", 2]
    plan = start(*flags, "--dry-run", "--json")
    predicted = json.loads(plan.communicate()[0])["peak_memory_bytes"]
    measured = peak_of_a_run(*flags, "-o", tmp_path / "out")
    assert 0.5 * measured < predicted < 1.5 * measured


def test_recipe_and_flags_make_the_same_bytes(lowbit, tiny_llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: W8A16\ngroup_size: 32\nrange: mse\nignore: ['layers\\.1\\.']\noverrides: {'down_proj$': W4A16}\n"
    )
    flags = ["--scheme", "W8A16", "--group-size", "32", "--range", "mse", "--ignore", r"layers\.1\.",
             "--override", "down_proj$=W4A16"]  # fmt: skip
    by_recipe = quantize(lowbit, tiny_llama, tmp_path / "a", "--recipe", recipe)
    assert quantize(lowbit, tiny_llama, tmp_path / "b", *flags) == by_recipe
    assert quantize(lowbit, tiny_llama, tmp_path / "c", "--scheme", "W8A16") != by_recipe


def test_flags_win_over_the_recipe(lowbit, tiny_llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("scheme: W8A16\n")
    chosen = schemes(lowbit, tiny_llama, "--recipe", recipe, "--scheme", "w4a16")
    assert chosen["model.layers.0.mlp.down_proj"] == "W4A16"


def test_overrides_and_ignores_reach_the_plan(lowbit, tiny_llama):
    chosen = schemes(
        lowbit, tiny_llama, "--override", "down_proj$=W8A16",
        "--override", r"s\.0\.self_attn\.(q|k|v)_proj=FP8_DYNAMIC",
        "--override", "lm_head=W8A16", "--ignore", r"layers\.1\.mlp",
    )  # fmt: skip
    assert chosen["model.layers.0.mlp.down_proj"] == "W8A16"
    assert chosen["model.layers.0.self_attn.k_proj"] == "FP8_DYNAMIC"
    assert chosen["model.layers.1.self_attn.k_proj"] == "W4A16"
    assert chosen["model.layers.1.mlp.down_proj"] is None
    assert chosen["lm_head"] == "W8A16"
    assert chosen["model.embed_tokens"] is None


def test_the_summary_names_what_differs_from_the_rest(lowbit, tiny_llama, tmp_path):
    printed = lowbit(
        "quantize", tiny_llama, "-o", tmp_path / "out", "--group-size", "32", "--method", "hqq",
        "--override", "down_proj$=W8A16", "--method-override", "o_proj=rtn",
    ).stdout  # fmt: skip
    assert "down_proj$: W8A16; o_proj: rtn" in printed


def test_overwrite_replaces_an_earlier_output_of_ours(lowbit, tiny_llama, tmp_path):
    first = quantize(lowbit, tiny_llama, tmp_path / "out")
    assert lowbit("quantize", tiny_llama, "-o", tmp_path / "out", "--scheme", "W8A16").code == 1
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == first
    assert quantize(lowbit, tiny_llama, tmp_path / "out", "--scheme", "W8A16", "--overwrite") != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_overwrite_keeps_the_earlier_output(lowbit, tiny_llama, tmp_path):
    first = quantize(lowbit, tiny_llama, tmp_path / "out")
    assert lowbit("quantize", tiny_llama, "-o", tmp_path / "out", "--overwrite", "--ignore", ".").code == 1
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == first


def test_pickle_is_read_when_it_is_allowed(lowbit, tiny_llama, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    expected = quantize(lowbit, tiny_llama, tmp_path / "expected")
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    written = quantize(lowbit, model, tmp_path / "out", "--allow-pickle")
    assert sorted(written) == sorted(expected)
