"""`lowbit advise`: what it prints can be read at 100 columns and run; --run runs it; JSON holds everything."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import typer
from advice_shapes import LLAMA_8B, QWEN3_30B_A3B
from typer.testing import CliRunner

import lowbit
from lowbit.advice import advise
from lowbit.advice.advise import GENERIC_NAME
from lowbit.checkpoint.base import report_path
from lowbit.cli.main import app
from lowbit.errors import UsageError
from lowbit.hardware import DEVICES
from lowbit.registry import ENGINES
from lowbit.schemes import is_gguf_name
from lowbit.settings import make_settings
from models import SHORT_TEXT

RUNNER = CliRunner()
COMMAND = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]


def run(*words: str, columns: int = 100):
    answer = RUNNER.invoke(app, ["advise", *words], env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)})
    if answer.exception is not None and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer


def every_advice():
    """Every engine on every kind of device, with every workload that it has."""
    for name in ("a100-80gb", "h100", "b200", "rtx-5090", "mi300x", "m2-max"):
        for engine in ENGINES:
            for workload in ("serve", "prefill", "finetune"):
                try:
                    yield advise(LLAMA_8B, hardware=name, engine=engine, workload=workload, context=65536)
                except UsageError:
                    continue


def test_every_printed_line_parses_as_our_own_command():
    """By the parser of `lowbit quantize`, and its settings are ones that quantizing takes."""
    lines = {option.quantize for advice in every_advice() for option in advice.options if option.quantize}
    assert len(lines) > 30
    for line in lines:
        program, command, *words = shlex.split(line)
        assert (program, command) == ("lowbit", "quantize")
        context = COMMAND.make_context("quantize", list(words), resilient_parsing=False)
        given = {name: value for name, value in context.params.items() if value not in (None, False, (), [])}
        assert given.pop("model") == "MODEL"
        output = Path(given.pop("output"))
        fields = {name: value for name, value in given.items() if name in ("scheme", "method", "format", "kv_cache",
                  "double_quant", "imatrix")}  # fmt: skip
        settings = make_settings(None, **fields)
        assert settings.writes_gguf(output) == is_gguf_name(settings.scheme)


def test_settings_say_what_the_line_says():
    for advice in every_advice():
        for option in advice.options:
            if option.settings is not None:
                settings = make_settings(None, **option.settings)
                assert settings.scheme == option.scheme
                assert (settings.kv_cache == "fp8") == option.fp8_cache
                assert option.output.endswith(".gguf") == settings.writes_gguf()


@pytest.mark.parametrize(
    ("engine", "hardware", "begins"),
    [
        ("vllm", "h100", "vllm serve "),
        ("sglang", "h100", "python -m sglang.launch_server --model-path "),
        ("tensorrt-llm", "h100", "trtllm-serve "),
        ("llama.cpp", "rtx-4090", "llama-server -m "),
        ("transformers", "rtx-4090", "transformers chat "),
    ],
)
def test_the_serving_line_loads_what_the_quantize_line_writes(engine, hardware, begins):
    option = next(each for each in advise(None, hardware=hardware, engine=engine).options if each.quantize)
    words = shlex.split(option.quantize)
    assert option.serve.startswith(begins + words[words.index("-o") + 1])


def test_the_table_fits_100_columns():
    answer = run("--hardware", "h100", "--context", "65536", "--price", "2.5", "--all")
    assert answer.exit_code == 0
    commands = ("make it:", "serve it:")
    for line in answer.stdout.splitlines():
        assert len(line) <= 100 or line.startswith(commands), line
    assert "FP8_DYNAMIC, FP8 cache" in answer.stdout
    assert "$/M out" in answer.stdout


def test_without_a_model_it_says_which_shape_it_took():
    answer = run("--hardware", "a100")
    assert GENERIC_NAME in answer.stdout
    assert "make it:   lowbit quantize MODEL -o model-W4A16 --scheme W4A16 --method gptq" in answer.stdout
    assert "serve it:  vllm serve model-W4A16 --max-model-len 2048" in answer.stdout


def test_what_lowbit_cannot_write_is_marked_and_the_other_tool_named():
    answer = run("--hardware", "a100", "--engine", "tensorrt-llm")
    assert "not by lowbit" in answer.stdout
    assert "--qformat int8_sq" in answer.stdout


def test_json_has_everything_and_nothing_else_on_stdout():
    answer = run("--hardware", "h100", "--price", "3", "--json")
    found = json.loads(answer.stdout)
    best = found["options"][0]
    assert found["engine"] == "vllm"
    assert found["device"]["bandwidth"] == DEVICES["h100"].bandwidth
    assert best["scheme"] == "FP8_DYNAMIC"
    assert best["fits"]
    memory = best["memory"]
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["overhead"]
    assert best["dollars_per_million_output_tokens"] == pytest.approx(
        3 / 3600 / best["decode_tokens_per_second_all"] * 1e6
    )
    assert best["quality"]["source"]
    assert found["assumptions"]
    assert [option["score"] for option in found["options"]] == sorted(
        (option["score"] for option in found["options"]), reverse=True
    )


def test_what_does_not_fit_comes_last_and_says_by_how_much():
    advice = advise(LLAMA_8B, hardware="rtx-3090", engine="vllm", memory=12 << 30, context=8192)
    fits = [option.memory.fits for option in advice.options]
    assert fits == sorted(fits, reverse=True)
    assert not all(fits)
    assert "more than the engine can use" in advice.options[-1].reason


def test_a_mixture_of_experts_reads_its_active_experts():
    advice = advise(QWEN3_30B_A3B, hardware="rtx-4090", engine="llama.cpp")
    dense = advise(LLAMA_8B, hardware="rtx-4090", engine="llama.cpp")
    assert advice.active_billions < 4 < 30 < advice.billions
    mixture, same = advice.option("Q4_K_M"), dense.option("Q4_K_M")
    assert mixture.memory.weights > 3 * same.memory.weights
    assert mixture.speed.decode > same.speed.decode


def test_a_cheaper_hour_is_a_cheaper_token():
    dear, cheap = (advise(LLAMA_8B, hardware="h100", price=price).best for price in (4.0, 2.0))
    assert dear.cost_output == pytest.approx(2 * cheap.cost_output)
    assert dear.cost_input < dear.cost_output


@pytest.mark.parametrize(
    "asked",
    [
        {"context": 1},
        {"batch": 0},
        {"context": 99999999999},
        {"batch": 99999999999},
        {"kv_cache": "int2"},
        {"price": 0.0},
        {"engine": "ollama"},
        {"goal": "cheap"},
        {"workload": "finetune", "engine": "vllm"},
        {"engine": "vllm", "hardware": "m1"},
        {"engine": "vllm", "hardware": "cpu", "kv_cache": "fp8"},
        {"engine": "llama.cpp", "kv_cache": "fp8"},
        {"workload": "finetune", "kv_cache": "fp8"},
    ],
)
def test_questions_that_make_no_sense_are_refused(asked):
    with pytest.raises(UsageError):
        advise(LLAMA_8B, **{"hardware": "h100", **asked})


def test_run_without_a_model_is_refused():
    with pytest.raises(UsageError, match="--run"):
        run("--hardware", "h100", "--run")
    with pytest.raises(UsageError, match="--run"):
        run("--hardware", "h100", "-o", "somewhere")


def test_of_a_folder_the_bytes_are_exact_and_a_small_model_is_warned_of(tiny_llama, tmp_path):
    advice = advise(tiny_llama, hardware="h100", engine="vllm")
    option = next(each for each in advice.options if each.settings is not None)
    made = lowbit.quantize(
        tiny_llama, tmp_path / "out", **{**option.settings, "calib": SHORT_TEXT, "samples": 1, "seqlen": 16}
    )
    written = sum(path.stat().st_size for path in made.path.glob("*.safetensors"))
    assert option.memory.weights == written
    assert any("loses more" in note for note in advice.notes)


@pytest.mark.parametrize(("engine", "hardware", "output"), [("vllm", "h100", "out"), ("llama.cpp", "this", "out.gguf")])
def test_run_quantizes_to_what_was_advised(tiny_llama, tmp_path, engine, hardware, output):
    target = tmp_path / output
    answer = run(str(tiny_llama), "--hardware", hardware, "--engine", engine, "--run", "-o", str(target))
    assert answer.exit_code == 0
    report = json.loads(report_path(target).read_text())
    advice = advise(tiny_llama, hardware=hardware, engine=engine)
    chosen = next(each for each in advice.options if each.settings is not None)
    assert report["settings"]["scheme"] == chosen.scheme


@pytest.mark.demo_model
def test_the_demo_model_for_llama_cpp_on_this_machine():
    answer = run("demo:smollm2", "--engine", "llama.cpp", "--hardware", "this", "--goal", "quality")
    assert answer.exit_code == 0
    assert "lowbit quantize demo:smollm2 -o smollm2-" in answer.stdout


def test_an_fp8_cache_is_refused_with_what_it_would_cost():
    with pytest.raises(UsageError, match=r"--kv-cache fp8: vLLM's CPU backend cuts the bits of FP8 values off"):
        advise(LLAMA_8B, hardware="cpu", engine="vllm", kv_cache="fp8")
