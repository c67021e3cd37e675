"""Recipes of llm-compressor as settings, and keywords of other tools."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import yaml

import lowbit
from lowbit.errors import LowbitError, UsageError
from lowbit.foreign_recipes import KEYWORDS, find_equivalent
from lowbit.settings import RunOptions, Settings, make_settings

GPTQ_W8A8 = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
    GPTQModifier:
      ignore: ["lm_head", "re:.*down_proj"]
      scheme: "W8A8"
      targets: ["Linear"]
      dampening_frac: 0.05
"""
# As llm-compressor saves one beside a model: every group spelled out.
AWQ_GROUPS = """
default_stage:
  default_modifiers:
    AWQModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: false, group_size: 64, strategy: group, block_structure: null,
                    dynamic: false, actorder: null, observer: minmax, observer_kwargs: {}}
          input_activations: null
          output_activations: null
          format: null
      targets: [Linear]
      ignore: [lm_head]
      bypass_divisibility_checks: false
      mappings:
        - {smooth_layer: 're:.*input_layernorm$', balance_layers: ['re:.*q_proj$']}
      duo_scaling: true
"""


def settings_of(text: str, **flags) -> dict:
    return make_settings(text, **flags).given


def test_a_file_with_two_modifiers(tmp_path, caplog):
    path = tmp_path / "recipe.yaml"
    path.write_text(GPTQ_W8A8)
    caplog.set_level(logging.INFO, logger="lowbit")
    assert make_settings(path).given == {
        "scheme": "W8A8", "method": "smoothquant+gptq", "damping": 0.05, "ignore": (r"^lm_head$", "^(?:.*down_proj)"),
    }  # fmt: skip
    assert "not taken over: smoothing_strength (searched for each layer)" in caplog.text
    assert "method: smoothquant+gptq" in caplog.text


def test_a_recipe_as_it_is_saved(caplog):
    assert settings_of(AWQ_GROUPS) == {
        "scheme": "W4A16_ASYM", "method": "awq", "group_size": 64, "ignore": ("^lm_head$",), "range": "absmax",
    }  # fmt: skip
    for key in ("mappings", "duo_scaling", "bypass_divisibility_checks"):
        assert key in caplog.text


def test_flags_win_over_it():
    assert make_settings(GPTQ_W8A8, scheme="W4A16", method="gptq").given["scheme"] == "W4A16"


def one(modifier: str, **given) -> str:
    return yaml.safe_dump({"s_stage": {"s_modifiers": {modifier: given}}})


@pytest.mark.parametrize(
    ("scheme", "args"),
    [
        ("FP8_DYNAMIC", {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                         "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}),
        ("NVFP4A16", {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}),
        ("W8A16", {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128}}),
    ],
)  # fmt: skip
def test_groups_are_schemes(scheme, args):
    found = settings_of(one("QuantizationModifier", config_groups={"g": {"targets": ["Linear"], **args}}))
    assert found == {"scheme": scheme, "method": "rtn"}


def test_other_targets_become_overrides():
    found = settings_of(one("QuantizationModifier", scheme={"W4A16": ["Linear"], "W8A16": ["re:.*o_proj$", "lm_head"]}))
    assert found["scheme"] == "W4A16"
    assert found["overrides"] == {"^(?:.*o_proj$)": "W8A16", "^lm_head$": "W8A16"}


def test_a_quantized_cache():
    args = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert settings_of(one("QuantizationModifier", scheme="FP8_DYNAMIC", kv_cache_scheme=args))["kv_cache"] == "fp8"
    with pytest.raises(UsageError, match="kv_cache_scheme"):
        settings_of(one("QuantizationModifier", scheme="FP8_DYNAMIC", kv_cache_scheme=args | {"num_bits": 4}))


def test_modifiers_as_objects():
    class GPTQModifier:
        def __init__(self, **given):
            self.given = given

        def model_dump(self, exclude_unset):
            assert exclude_unset
            return self.given

    modifier = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    for recipe in (modifier, [modifier]):
        assert make_settings(recipe).given == {"scheme": "W4A16", "method": "gptq", "ignore": ("^lm_head$",)}
    with pytest.raises(UsageError, match="recipe holds a dict"):
        make_settings([{}])


def test_a_mapping_of_lowbits_own_settings():
    assert make_settings({"scheme": "W8A16"}).given == {"scheme": "W8A16"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (one("SparseGPTModifier", sparsity=0.5), "SparseGPTModifier has no counterpart"),
        (one("GPTQModifier", scheme="W4A16", colour=3), r"GPTQModifier\.colour has no counterpart"),
        (one("GPTQModifier", scheme="W4A16", ignore=["LlamaAttention"]), "'LlamaAttention' is the name of a class"),
        (one("GPTQModifier", scheme="W4A16", targets=["re:.*q_proj"]), "quantizes only"),
        (one("GPTQModifier", scheme="W5A5"), "there is no scheme 'W5A5'"),
        (one("QuantizationModifier", config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 9}}}),
         r"QuantizationModifier\.config_groups\.g\.weights"),
        (one("QuantizationModifier", config_groups={"g": {"targets": ["Linear"], "weights": {
            "num_bits": 5, "type": "int", "strategy": "channel", "symmetric": False}}}), "no scheme of lowbit"),
        (one("QuantizationModifier", config_groups={
            "a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}},
            "b": {"targets": ["re:.*o_proj"], "weights": {"num_bits": 8, "group_size": 32}}}), "groups of 32 and 64"),
        ("a_stage:\n  GPTQModifier: {scheme: W4A16}\n  QuantizationModifier: {scheme: W8A16}\n", "disagree"),
        ("a_stage:\n  GPTQModifier: 7\n", "a mapping is needed"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        make_settings(text)


def test_the_command_line_reads_it(tiny_llama, tmp_path):
    from typer.testing import CliRunner

    from lowbit.cli.main import app
    from models import SHORT_TEXT

    (tmp_path / "recipe.yaml").write_text(one("GPTQModifier", scheme="W4A16", targets="Linear", ignore=["lm_head"]))
    done = CliRunner().invoke(app, ["quantize", str(tiny_llama), "-o", str(tmp_path / "out"), "--recipe",
                                    str(tmp_path / "recipe.yaml"), "--calib", SHORT_TEXT, "--samples", "4", "--seqlen",
                                    "32", "--group-size", "32"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_lm_head_may_be_ignored_where_it_is_tied(tmp_path):
    from models import make_model

    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    recipe = one("QuantizationModifier", scheme="W4A16", ignore=["lm_head"])
    assert lowbit.dry_run(folder, recipe=recipe).plan.quantized


# ── keywords ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_keyword_of_other_tools_has_an_answer():
    assert not {*KEYWORDS} & {*Settings.model_fields, *RunOptions.model_fields}
    for keyword in KEYWORDS:
        for value in (4, "x", [1], True):
            said = find_equivalent(keyword, value)
            assert said, (keyword, value)
            assert "{value" not in said, (keyword, value)
            assert "{{" not in said, (keyword, value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_calibration_samples": 512}, "here it is samples=512"),
        ({"max_seq_length": 2048}, "here it is seqlen=2048"),
        ({"w_bit": 4}, 'here it is scheme="W4A16"'),
        ({"bits": 8}, 'here it is scheme="W8A16"'),
        ({"q_group_size": 64}, "here it is group_size=64"),
        ({"targets": "Linear"}, "here it is ignore="),
        ({"dataset": "open_platypus"}, "here it is calib='open_platypus'"),
        ({"quant_config": {"w_bit": 4}}, "here it is scheme="),
        ({"load_in_4bit": True}, 'here it is scheme="NF4"'),
        ({"igmore": ("a",)}, "did you mean ignore?"),
        ({"device": "cuda"}, "give it as run=RunOptions(device=…)"),
    ],
)
def test_the_error_names_what_stands_here(tiny_llama, tmp_path, given, said):
    with pytest.raises(UsageError, match=f"there is no setting {next(iter(given))}") as caught:
        lowbit.quantize(str(tiny_llama), str(tmp_path / "out"), **given)
    assert said in caught.value.hint


def test_paths_may_be_text_or_paths(tiny_llama, tmp_path):
    done = lowbit.quantize(str(tiny_llama), str(tmp_path / "a"), scheme="W4A16")
    assert done.path == Path(tmp_path / "a")
    assert lowbit.verify(str(done.path)).ok
    assert lowbit.convert(str(done.path), str(tmp_path / "b"), format="gptq").path.is_dir()


# ── damaged recipes ───────────────────────────────────────────────────────────────────────────────────────────────────

ODD = [None, True, -1, 7, 0.5, float("nan"), "", "x", "re:(", "a\nb", [], [[]], [7], {}, {"a": {}}, {7: 7}, {"x": None}]
CACHED = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
WHOLE = [yaml.safe_load(text) for text in (
    GPTQ_W8A8, AWQ_GROUPS, one("QuantizationModifier", scheme={"W4A16": ["Linear"]}, kv_cache_scheme=CACHED),
)]  # fmt: skip


def places(value, path=()):
    """Paths to everything in a recipe."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("recipe", range(len(WHOLE)))
def test_whatever_stands_anywhere_is_taken_or_refused(recipe):
    for path in places(WHOLE[recipe]):
        for odd in ODD if path else ():
            damaged = copy.deepcopy(WHOLE[recipe])
            inner = damaged
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = odd
            try:
                make_settings(damaged)
            except LowbitError:
                pass
            except Exception as error:
                raise AssertionError(f"{odd!r} at {path}") from error
