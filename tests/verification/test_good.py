"""What is written well passes, for every engine and every scheme."""

import json

import pytest
import torch
from breaking import ATTENTION, edit_config, edit_tensors, failures
from typer.testing import CliRunner

from lowbit.checkpoint import open_safetensors
from lowbit.errors import UsageError
from lowbit.registry import ENGINES
from lowbit.verification import rules, verify

SCHEMES = [
    "W4A16", "W4A16_ASYM", "W3A16", "W2A16", "W8A16", "W5A16", "W8A8", "W8A8_ASYM", "W8A8_TENSOR", "W4A8",
    "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16",
    "MXFP4", "MXFP4A16", "MXFP8",
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_of_a_good_checkpoint_passes(scheme, good, source):
    assert failures(good(scheme), source=source, nearest=True) == {}


@pytest.mark.parametrize("scheme", ["W4A4", "W4A4_GROUP"])
def test_four_bit_integer_activations_are_sound_files_that_no_kernel_runs(scheme, good, source):
    found = failures(good(scheme), source=source, nearest=True)
    assert found == {"engine-limits": "config_groups.group_0: no kernel has 4-bit integer activations"}


def test_without_a_source_comparisons_are_named_as_unchecked(good):
    verification = verify(good("W4A16"))
    assert verification.ok
    assert set(verification.unchecked) == {
        "checksums",
        "same-computation",
        "nearest-codes",
        "relative-error",
        "unquantized",
    }
    assert "no source" in verification.unchecked["relative-error"]


def test_nearest_is_read_from_the_report(broken, source):
    folder = broken()
    assert "nearest-codes" in verify(folder, source=source).unchecked
    (folder / "lowbit-report.json").write_text(json.dumps({"settings": {"method": "rtn"}}))
    assert "nearest-codes" not in verify(folder, source=source).unchecked
    (folder / "lowbit-report.json").write_text(json.dumps({"settings": {"method": "gptq"}}))
    assert "nearest-codes" in verify(folder, source=source).unchecked


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8_DYNAMIC", "NVFP4A16"])
def test_transformers_rules_hold_too(scheme, good, source):
    assert failures(good(scheme), source=source, nearest=True, engine="transformers") == {}


def test_ignored_sets_and_other_schemes_for_unfused_layers_pass(good, source):
    folder = good("W4A16", ignore=(r"\.0\.self_attn\.(q|k|v)_proj$",), overrides={"down_proj$": "W8A8"})
    assert failures(folder, source=source, nearest=True) == {}


def test_clipped_weights_decode_to_the_end_code(good, source):
    folder = good("W4A16", range="percentile", percentile=90.0)
    assert failures(folder, source=source, nearest=True) == {}


def test_sharded_checkpoint_passes(good, source):
    folder = good("W4A16", shard_size=1_000_000)
    assert failures(folder, source=source, nearest=True) == {}


def test_tied_output_layer_passes(tmp_path):
    from lowbit.pipeline import write_checkpoint
    from lowbit.plan.plan import Request, prepare
    from lowbit.settings import make_settings
    from models import make_model

    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    write_checkpoint(prepare(Request(tied, make_settings(scheme="W4A16"), threads=1)), tmp_path / "out")
    assert failures(tmp_path / "out", source=open_safetensors(tied), nearest=True) == {}


def static_fp8(folder):
    """FP8 with static activations, from a checkpoint with dynamic ones."""
    static = {"strategy": "tensor", "dynamic": False}
    edit_config(folder, lambda q: q["config_groups"]["group_0"]["input_activations"].update(static))

    def add(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor([0.01], dtype=torch.bfloat16)

    edit_tensors(folder, add)
    return folder


def test_static_activation_scales_pass(broken):
    assert failures(static_fp8(broken("FP8_DYNAMIC"))) == {}


def test_static_activation_scale_of_zero_fails(broken):
    folder = static_fp8(broken("FP8_DYNAMIC"))
    name = f"{ATTENTION}.o_proj.input_scale"
    edit_tensors(folder, lambda tensors: tensors[name].zero_())
    assert name in failures(folder)["activation-scales"]


def test_missing_static_activation_scale_fails(broken):
    folder = static_fp8(broken("FP8_DYNAMIC"))
    name = f"{ATTENTION}.o_proj.input_scale"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert name in failures(folder)["tensors"]


def test_unknown_engine_names_the_known_ones(good):
    with pytest.raises(UsageError) as error:
        verify(good("W4A16"), engine="ollama")
    assert all(engine in error.value.hint for engine in ENGINES)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(UsageError):
        verify(tmp_path / "absent")


def test_every_rule_says_what_it_is_about():
    names = [rule.name for rule in rules()]
    assert len(set(names)) == len(names)
    assert all(rule.summary and rule.check.__doc__ and engines for rule, engines in rules().items())


def test_progress_ends_at_all_bytes(good):
    seen = []
    verify(good("W4A16"), progress=lambda what, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]


def command():
    import typer

    from lowbit.cli.options import with_groups
    from lowbit.cli.verify import verify as verify_command

    app = typer.Typer()
    app.command()(with_groups(verify_command))
    return app


def test_command_prints_every_rule_and_exits_with_success(good):
    result = CliRunner().invoke(command(), [str(good("W4A16"))])
    assert result.exit_code == 0
    assert "fused-schemes" in result.stdout
    assert "not checked" in result.stdout


def test_command_prints_json_and_exits_with_failure(broken, original):
    folder = broken()
    (folder / "tokenizer.json").unlink()
    result = CliRunner().invoke(command(), [str(folder), "--json", "--reference", str(original)])
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert said["ok"] is False
    assert [check["rule"] for check in said["checks"] if not check["passed"]] == ["tokenizer"]
