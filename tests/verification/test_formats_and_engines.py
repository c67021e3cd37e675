"""Which format a folder is of, what an engine takes of it, folders of floats; and the list of rules."""

import json
import re
from pathlib import Path

import pytest
from breaking import ATTENTION, assert_breaks, edit_config, edit_tensors, failures
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint.quantized import KINDS
from lowbit.errors import UsageError
from lowbit.registry import ENGINES
from lowbit.verification import rules, verify
from lowbit.verification.result import ALL

FOLDER_ENGINES = tuple(engine for engine in ENGINES if engine != "llama.cpp")
OUT = f"{ATTENTION}.o_proj"
TESTS = Path(__file__).parent


def claim(folder, **quantization):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(("scheme", "format", "claimed", "found"), [
    ("W4A16_ASYM", "awq", GPTQ, "awq"), ("W4A16", "gptq", AWQ, "gptq"),
    ("W4A16", "compressed-tensors", GPTQ, "compressed-tensors"), ("NF4", "bitsandbytes", AWQ, "bitsandbytes"),
    ("NVFP4A16", "modelopt", {"quant_method": "compressed-tensors", "config_groups": {}}, "modelopt"),
    ("W8A8", "compressed-tensors", {"quant_method": "modelopt", "quant_algo": "FP8"}, "compressed-tensors"),
])  # fmt: skip
def test_config_that_claims_one_format_and_tensors_that_are_another(broken, scheme, format, claimed, found):
    folder = broken(scheme, format=format)
    claim(folder, **claimed)
    verification = assert_breaks(
        folder, "format-known", f"config.json says {claimed['quant_method']}", f"laid out as {found}"
    )
    assert [check.rule for check in verification.failed] == ["format-known"]
    assert "tensors" in verification.unchecked


def test_quantization_config_over_plain_weights(models, tmp_path):
    import shutil

    folder = Path(shutil.copytree(models("llama"), tmp_path / "plain"))
    claim(folder, **GPTQ)
    assert_breaks(folder, "format-known", "the files hold no quantized weight")


def test_unknown_quant_method(broken):
    folder = broken("W4A16")
    claim(folder, quant_method="squeezellm", bits=4)
    verification = assert_breaks(folder, "format-known", "'squeezellm'")
    assert verification.format == ""
    assert "scales" in verification.unchecked
    assert "awq-keys" not in verification.unchecked


def test_rules_of_other_formats_are_not_listed(good):
    for format, name in (("gptq", "gptq-keys"), ("awq", "awq-keys")):
        verification = verify(good("W4A16", format=format))
        assert verification.format == format
        ran = {check.rule for check in verification.checks} | set(verification.unchecked)
        assert name in ran
        assert not any(rule.name in ran for rule in rules() if format not in rule.formats)


@pytest.mark.parametrize("engine", FOLDER_ENGINES)
@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen3_moe", "tied"])
def test_folder_of_floats_passes_and_says_what_it_is(models, model, engine):
    from lowbit.checkpoint import open_checkpoint

    verification = verify(models(model), source=open_checkpoint(models(model)), engine=engine)
    assert verification.failed == []
    assert verification.format == "plain"
    assert {check.rule: check.detail for check in verification.checks}["format-known"].startswith("not quantized")


def test_folder_of_rounded_floats_passes(good, source):
    folder = good("W4A16", format="float")
    assert failures(folder, source=source, engine="transformers") == {}


def test_folder_of_floats_of_another_model(models, tmp_path, source):
    from models import make_model

    other = make_model(
        tmp_path / "other", seed=1, hidden_size=128, intermediate_size=256, num_key_value_heads=4, head_dim=32
    )
    assert_breaks(other, "relative-error", "self_attn.q_proj.weight", source=source)


def test_folder_of_floats_with_a_norm_that_differs(broken, source):
    folder = broken("W4A16", format="float")
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert_breaks(folder, "unquantized", "model.norm.weight", source=source)


def test_quantized_source_is_compared_decoded(good):
    from lowbit.checkpoint import open_checkpoint

    source = open_checkpoint(good("W4A16", format="gptq"))
    assert failures(good("W4A16", format="gptq"), source=source, nearest=True) == {}


@pytest.mark.parametrize(("scheme", "settings"), [
    ("W4A16", {"format": "compressed-tensors"}), ("W4A16", {"format": "gptq"}), ("W4A16_ASYM", {"format": "awq"}),
    ("NF4", {}), ("FP8_DYNAMIC", {"format": "modelopt"}),
])  # fmt: skip
def test_conv1d_is_compared_turned_round(good, models, scheme, settings):
    """GPT-2 stores its 16-bit weights as [in, out]."""
    from lowbit.checkpoint import open_checkpoint

    folder = good(scheme, model="gpt2", **settings)
    verification = verify(folder, source=open_checkpoint(models("gpt2")), nearest=True)
    assert verification.broken == []
    assert any(check.rule == "nearest-codes" and "8 linears" in check.detail for check in verification.checks)


@pytest.mark.parametrize(("scheme", "format", "taken"), [
    ("W4A16", "compressed-tensors", True), ("W4A16", "gptq", True), ("NVFP4A16", "compressed-tensors", True),
    ("W8A8", "compressed-tensors", False), ("FP8_DYNAMIC", "modelopt", False),
])  # fmt: skip
def test_gpt2_whose_weights_vllm_turns_round(good, scheme, format, taken):
    verification = verify(good(scheme, model="gpt2", format=format))
    assert [check.rule for check in verification.failed] == ([] if taken else ["turned-weights"])
    assert verification.broken == []


@pytest.mark.parametrize(("engine", "scheme", "format"), [
    ("vllm", "NF4", "bitsandbytes"), ("transformers", "FP8_DYNAMIC", "modelopt"), ("tensorrt-llm", "W4A16", "gptq"),
    ("tensorrt-llm", "W4A16", "awq"), ("tensorrt-llm", "INT8", "bitsandbytes"),
])  # fmt: skip
def test_engine_without_a_loader(good, engine, scheme, format):
    verification = verify(good(scheme, format=format), engine=engine)
    assert [check.rule for check in verification.failed] == ["engine-loader"]
    assert verification.broken == []


@pytest.mark.parametrize(("scheme", "taken"), [
    ("W4A16", True), ("W8A16", True), ("W4A16_ASYM", True), ("W8A8", True), ("FP8_DYNAMIC", True), ("FP8_BLOCK", True),
    ("NVFP4A16", True), ("W3A16", False), ("W4A8", False), ("MXFP4A16", False), ("MXFP8", False),
])  # fmt: skip
def test_schemes_of_sglang(good, scheme, taken):
    assert set(failures(good(scheme), engine="sglang")) == (set() if taken else {"sglang-schemes"})


@pytest.mark.parametrize(("scheme", "taken"), [
    ("FP8_DYNAMIC", True), ("FP8_BLOCK", True), ("MXFP4A16", True), ("W4A16", False), ("NVFP4A16", False),
    ("W8A8", False), ("MXFP8", False),
])  # fmt: skip
def test_algorithms_of_tensorrt(good, scheme, taken):
    assert set(failures(good(scheme), engine="tensorrt-llm")) == (set() if taken else {"tensorrt-algorithms"})


def test_class_targets_in_two_groups_that_tensorrt_does_not_match(broken):
    folder = broken("FP8_DYNAMIC")

    def edit(quantization):
        general = quantization["config_groups"]["group_0"]
        quantization["config_groups"] = {"own": {**general, "targets": [OUT]}, "group_0": general}

    edit_config(folder, edit)
    assert_breaks(folder, "tensorrt-algorithms", "'Linear'", engine="tensorrt-llm")


@pytest.mark.parametrize(("scheme", "format"), [("W4A16", "gptq"), ("W4A16", "awq"), ("FP8_DYNAMIC", "modelopt")])
def test_float32_model(broken, scheme, format):
    folder = broken(scheme, format=format)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    for engine in ("vllm", "sglang"):
        assert_breaks(folder, "engine-dtype", "float32", engine=engine)


def test_tampered_decoder_of_every_format_is_a_broken_file_not_a_limit(broken):
    folder = broken("W4A16", format="gptq")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.scales"].view(-1)[0].fill_(float("nan")))
    assert [check.rule for check in verify(folder).broken] == ["scales"]


def test_rules_can_be_chosen_by_engine_and_format():
    assert {rule.name for rule in rules("vllm", "awq")} <= {rule.name for rule in rules("vllm")}
    assert not any(rule.name.startswith("gptq") for rule in rules(format="awq"))
    for bad in ({"engine": "ollama"}, {"format": "zip"}):
        with pytest.raises(UsageError):
            rules(**bad)


def test_every_rule_says_whom_it_follows_and_is_about_known_formats():
    for rule in rules():
        assert rule.follows, rule.name
        assert rule.formats, rule.name
        assert set(rule.formats) <= {"plain", "gguf", "mmproj", *KINDS}, rule.name
        assert not (rule.gate and rule.limit), rule.name


def test_every_rule_has_a_test_that_names_it():
    text = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    for rule in rules():
        assert f'"{rule.name}"' in text, rule.name


def document_rows() -> dict[str, tuple[str, str, str]]:
    """Rule → (engines, formats, what it checks) of the tables of docs/verification.md."""
    text = (TESTS.parent.parent / "docs" / "verification.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)`(?: \*| †)* \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", text, flags=re.M)
    assert len({row[0] for row in rows}) == len(rows)
    return {name: (engines, formats, said) for name, engines, formats, said in rows}


def test_document_lists_the_rules():
    from lowbit.cli.verify import formats_said

    expected = {}
    for rule, engines in rules().items():
        named = "all" if engines == FOLDER_ENGINES else ", ".join(engines)
        expected[rule.name] = (named, formats_said(rule.formats), rule.summary)
    assert document_rows() == expected


def command():
    import typer

    from lowbit.cli.options import with_groups
    from lowbit.cli.verify import verify as verify_command

    app = typer.Typer()
    app.command()(with_groups(verify_command))
    return app


def test_command_lists_rules_without_a_folder():
    result = CliRunner().invoke(command(), ["--rules", "--engine", "vllm", "--format", "gptq"])
    assert result.exit_code == 0
    assert "gptq-column-order" in result.stdout
    assert "normalize_and_validate_gptq_desc_act" in result.stdout
    assert "awq-keys" not in result.stdout


def test_command_lists_rules_as_json():
    result = CliRunner().invoke(command(), ["--rules", "--json"])
    said = json.loads(result.stdout)
    assert [rule["name"] for rule in said] == [rule.name for rule in rules()]
    assert said[0]["formats"] == list(ALL)
    assert all(set(rule) >= {"engines", "formats", "checks", "follows", "limit"} for rule in said)


@pytest.mark.parametrize(
    "arguments", [[], ["folder", "--rules"], ["folder", "--format", "gptq"], ["--rules", "--engine", "x"]]
)
def test_command_refuses_what_makes_no_sense(arguments):
    result = CliRunner().invoke(command(), arguments)
    assert isinstance(result.exception, UsageError)


def test_command_says_where_only_the_engine_is_at_fault(good):
    result = CliRunner().invoke(command(), [str(good("NF4")), "--engine", "vllm"])
    assert result.exit_code == 1
    assert "the files are sound" in result.stderr


def test_a_folder_that_holds_one_gguf_stands_for_it(tiny_llama, tmp_path):
    """As every command that opens a model takes it."""
    file = lowbit.quantize(tiny_llama, tmp_path / "x.gguf", scheme="Q8_0").path
    found = verify(tmp_path, reference=tiny_llama)
    assert found.ok
    assert [check.rule for check in found.checks] == [check.rule for check in verify(file, reference=tiny_llama).checks]
    (tmp_path / "y.gguf").write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match=r"the folder holds 2 GGUF models: x\.gguf, y\.gguf"):
        verify(tmp_path)
