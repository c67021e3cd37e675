"""Several cards, caches that a card's attention cannot read, and schemes that verify would refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from advice_shapes import LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B
from typer.testing import CliRunner

import lowbit
from lowbit.advice import advise
from lowbit.architecture.shape import shape_of
from lowbit.cli.advise import rough
from lowbit.cli.main import app
from lowbit.engines import find_engine
from lowbit.engines.engine import SIXTEEN
from lowbit.errors import UsageError
from lowbit.estimation.serving import deploy
from lowbit.hardware import DEVICES, find_device
from lowbit.hardware.table import PRICES
from models import make_model

LLAMA_2_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


def test_cards_add_up_and_each_has_its_own_overhead():
    one, two = (advise(LLAMA_70B, hardware=name, engine="vllm").option(SIXTEEN).memory for name in ("h100", "2xh100"))
    assert two.usable == pytest.approx(2 * one.usable, abs=2)
    assert (two.weights, two.cache) == (one.weights, one.cache)
    assert one.overhead < two.overhead < 2 * one.overhead  # columns of the MLP are divided, the rest is not
    assert two.fits is False or two.total <= two.usable


def test_one_card_in_four_bits_is_cheaper_than_two_in_sixteen():
    four = advise(LLAMA_70B, hardware="A100", engine="vllm").option("W4A16")
    sixteen = advise(LLAMA_70B, hardware="2xA100", engine="vllm").option(SIXTEEN)
    assert four.memory.fits
    assert sixteen.memory.fits
    assert not advise(LLAMA_70B, hardware="A100", engine="vllm").option(SIXTEEN).memory.fits
    assert four.cost_output < sixteen.cost_output / 3
    assert four.speed.decode > sixteen.speed.decode


def test_the_price_is_of_one_card_and_can_be_overridden():
    stated = advise(LLAMA_8B, hardware="2xH100")
    best = stated.best
    assert stated.price == PRICES["h100"]
    assert best.cost_output == pytest.approx(2 * PRICES["h100"] / 3600 / best.speed.decode_all * 1e6)
    assert advise(LLAMA_8B, hardware="2xH100", price=1.0).best.cost_output == pytest.approx(
        best.cost_output / PRICES["h100"]
    )
    assert advise(LLAMA_8B, hardware="A10").best.cost_output is None  # no price, no guess
    assert any("RunPod" in line for line in stated.assumptions)


def test_llama_cpp_gives_layers_to_cards():
    """Memory adds up; one sequence passes through one card after the other."""
    one, two = (advise(LLAMA_8B, hardware=name, engine="llama.cpp") for name in ("rtx-4090", "2xrtx-4090"))
    assert two.option("Q4_K_M").speed == one.option("Q4_K_M").speed
    assert two.best.memory.usable == pytest.approx(2 * one.best.memory.usable, abs=2)
    assert "tensor" not in two.best.serve
    assert any("whole layers" in line for line in two.assumptions)


@pytest.mark.parametrize(
    ("engine", "flag"), [("vllm", "--tensor-parallel-size 4"), ("sglang", "--tp 4"), ("tensorrt-llm", "--tp_size 4")]
)
def test_the_serving_line_names_the_cards(engine, flag):
    assert advise(LLAMA_70B, hardware="4xH100", engine=engine).best.serve.endswith(flag)
    assert "--t" not in advise(LLAMA_8B, hardware="H100", engine=engine).best.serve.replace("trtllm", "")


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match="32 heads") as caught:
        advise(LLAMA_8B, hardware="3xA100", engine="vllm")
    assert "2, 4, 8" in caught.value.hint
    with pytest.raises(UsageError, match="32 heads"):
        lowbit.estimate({**LLAMA_2_70B, "num_attention_heads": 32}, scheme="W8A16", hardware="3xA100")
    with pytest.raises(UsageError, match="fewer than 64"):
        advise(LLAMA_8B, hardware="64x3090", engine="llama.cpp")


def test_caches_that_cannot_be_divided_are_held_more_than_once():
    engine = find_engine("vllm")
    whole = deploy(engine, QWEN3_30B_A3B, 0).sequence_bytes(4096)
    assert deploy(engine, QWEN3_30B_A3B, 0, cards=4).sequence_bytes(4096) == whole  # 4 heads of keys
    assert deploy(engine, QWEN3_30B_A3B, 0, cards=8).sequence_bytes(4096) == 2 * whole
    latent = replace(LLAMA_8B, latent_rank=512, rope_dim=64)
    assert deploy(engine, latent, 0, cards=4).sequence_bytes(64) == 4 * deploy(engine, latent, 0).sequence_bytes(64)
    assert deploy(find_engine("llama.cpp"), latent, 0, cards=4).copies == 1  # whole layers


def test_estimate_counts_several_cards():
    one, two = (lowbit.estimate(LLAMA_2_70B, scheme="W4A16", hardware=name) for name in ("A100", "2xA100"))
    assert two.fit.memory == 2 * one.fit.memory
    assert two.serving.framework == 2 * one.serving.framework
    assert any("divided among 2 cards" in line for line in two.assumptions)


@pytest.mark.parametrize(
    ("card", "engine", "shape", "possible"),
    [
        ("a100-80gb", "vllm", LLAMA_8B, True),
        ("a100-80gb", "vllm", replace(LLAMA_8B, head_dim=96), False),
        ("a100-80gb", "vllm", replace(LLAMA_8B, latent_rank=512, rope_dim=64), False),
        ("a100-80gb", "vllm", replace(LLAMA_8B, model_type="gpt_oss", head_dim=64), False),
        ("a100-80gb", "tensorrt-llm", replace(LLAMA_8B, head_dim=96), True),
        ("t4", "vllm", LLAMA_8B, False),
        ("h100", "vllm", replace(LLAMA_8B, head_dim=96), True),
        ("m4", "llama.cpp", LLAMA_8B, False),
    ],
)
def test_an_fp8_cache_where_the_attention_has_it(card, engine, shape, possible):
    found = find_engine(engine).memory.keeps_fp8_cache(shape, DEVICES[card])
    assert (found is None) == possible
    if not possible:
        assert found


def test_no_fp8_cache_is_advised_where_there_is_none():
    odd = replace(LLAMA_8B, head_dim=96, kv_heads=32)
    assert not any(option.fp8_cache for option in advise(odd, hardware="A100", context=65536, memory=400 << 30).options)


@pytest.mark.parametrize(("dtype", "advised"), [("float16", False), ("bfloat16", True)])
def test_what_verify_would_refuse_is_left_out(dtype, advised):
    """vLLM's kernel of W4AFP8 takes bfloat16 models."""
    found = advise({**LLAMA_2_70B, "torch_dtype": dtype}, hardware="H100", engine="vllm")
    assert (found.option("W4AFP8") is not None) == advised
    assert found.option("W4A16") is not None
    if not advised:
        assert "engine-limits" in found.left_out["W4AFP8"]
        assert "bfloat16" in found.left_out["W4AFP8"]


def test_every_advised_scheme_passes_the_rules_that_judged_the_plan(tmp_path):
    """Of the files themselves, for the schemes that need no text."""
    source = make_model(tmp_path / "source", dtype=torch.float16)
    answer = advise(source, hardware="H100", engine="vllm", kv_cache="bf16")
    made = 0
    for option in answer.options:
        if option.settings is not None and "method" not in option.settings:
            folder = lowbit.quantize(source, tmp_path / option.scheme, **option.settings).path
            checks = lowbit.verify(folder, engine="vllm").failed
            assert not [check for check in checks if check.limit], (option.scheme, checks)
            made += 1
    assert made >= 4


def test_layers_that_do_not_split_at_whole_groups_are_left_out_for_several_cards():
    narrow = {**LLAMA_2_70B, "intermediate_size": 1152}  # 576 columns a card, blocks of 128
    two = advise(narrow, hardware="2xH100", engine="vllm")
    assert two.option("FP8_BLOCK") is None
    assert "does not split among 2 cards" in two.left_out["FP8_BLOCK"]


def test_smaller_groups_are_advised_where_several_cards_cannot_split_the_usual_ones():
    narrow = {**LLAMA_2_70B, "intermediate_size": 1152}  # 576 columns a card, groups of 128
    assert "--group-size" not in advise(narrow, hardware="H100", engine="vllm").option("W4A16").quantize
    two = advise(narrow, hardware="2xH100", engine="vllm")
    assert "--group-size 64" in two.option("W4A16").quantize
    assert "W4A16" not in two.left_out
    assert two.option("W4A16").memory.weights > advise(narrow, hardware="H100").option("W4A16").memory.weights


MIXTURES = {
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 128},
    "glm4_moe": {"n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 128,
                 "first_k_dense_replace": 1, "n_shared_experts": 1},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip
ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM", "mixtral": "MixtralForCausalLM"}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize(
    ("engine", "hardware"),
    [("tensorrt-llm", "A100"), ("tensorrt-llm", "H100"), ("tgi", "A100"), ("lmdeploy", "A100"), ("vllm", "2xA100")],
)
def test_a_shape_is_judged_as_its_model_is(kind, engine, hardware):
    """Experts, shapes, groups and classes: the same schemes with config.json as with nothing but the shape."""
    about = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "dtype": "bfloat16"}
    config = {**LLAMA_2_70B, **about, **MIXTURES[kind]}
    model, shape = (advise(each, hardware=hardware, engine=engine) for each in (config, shape_of(config)))
    assert {option.label for option in shape.options} == {option.label for option in model.options}
    assert shape.left_out.keys() == model.left_out.keys()


def test_experts_in_4_bits_without_activations_are_not_advised_for_tensorrt_llm():
    found = advise(QWEN3_30B_A3B, hardware="A100", engine="tensorrt-llm", goal="memory")
    assert "W4A8_AWQ" in found.left_out["W4A16"]
    assert advise(LLAMA_8B, hardware="A100", engine="tensorrt-llm").option("W4A16") is not None


def test_rules_about_stored_numbers_do_not_judge_a_plan():
    """TensorRT-LLM takes experts in W4A8 AWQ; their input scales are no numbers before they are written."""
    config = {**LLAMA_2_70B, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **MIXTURES["mixtral"]}
    found = advise(config, hardware="H100", engine="tensorrt-llm")
    assert found.option("W4AFP8_STATIC") is not None, found.left_out


def test_experts_in_nf4_are_left_out_for_the_reason_that_verify_has():
    found = advise(QWEN3_30B_A3B, hardware="A100", workload="finetune")
    assert found.best.scheme == SIXTEEN
    for scheme in ("NF4", "FP4", "INT8"):
        assert "transformers merges the experts" in found.left_out[scheme]
    assert advise(LLAMA_8B, hardware="A100", workload="finetune").best.scheme == "NF4"


def test_a_shape_of_an_unknown_type_is_not_refused():
    unknown = advise(replace(LLAMA_8B, model_type="nobody-has-it"), hardware="A100", engine="vllm")
    assert unknown.option("W4A16") is not None


def test_an_engine_without_kernels_for_a_device_says_so():
    with pytest.raises(UsageError, match="does not run on") as caught:
        advise(LLAMA_8B, hardware="gaudi3")
    assert "lowbit estimate" in caught.value.hint
    assert lowbit.estimate(LLAMA_2_70B, scheme="W8A16", hardware="ascend-910b").fit.fits


def test_machines_are_compared():
    answer = CliRunner().invoke(app, ["advise", "--hardware", "A100, 2xA100", "--engine", "vllm"],
                                env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})  # fmt: skip
    assert answer.exit_code == 0
    assert answer.stdout.count("16 bits") == 2
    assert all(len(line) <= 100 for line in answer.stdout.splitlines())
    both = json.loads(CliRunner().invoke(app, ["advise", "--hardware", "A100,2xA100", "--json"]).stdout)
    assert [each["device"]["count"] for each in both] == [1, 2]


@pytest.mark.parametrize("words", [["--hardware", "A100,"], ["m", "--hardware", "A100,H100", "--run"]])
def test_comparisons_that_make_no_sense_are_refused(words):
    answer = CliRunner().invoke(app, ["advise", *words])
    assert isinstance(answer.exception, UsageError)


@pytest.mark.parametrize(
    ("value", "text"),
    [(13158.2, "13,000"), (285.2, "290"), (9.97, "10"), (9.94, "9.9"), (0.2189, "0.22"), (0.0384, "0.038"), (0.0, "0"),
     (1.0, "1.0"), (None, "")],
)  # fmt: skip
def test_rough_figures_have_two_digits(value, text):
    assert rough(value) == text


def test_every_figure_says_what_it_is():
    option = advise(LLAMA_8B, hardware="H100", engine="vllm")
    kinds = {each.scheme: each.expectation.basis for each in option.options}
    assert kinds["W4A16"] == "published"
    assert kinds["NVFP4A16"] == "scaled from W4A16"
    assert kinds[SIXTEEN] == "exact"
    assert find_device("H100").source
