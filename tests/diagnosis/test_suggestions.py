"""What is suggested parses as a command line of ours, and costs and gains what is said."""

import shlex

import pytest
import typer
from faults import diagnosed, multiply_scales

import lowbit
from lowbit.cli.main import app
from lowbit.cli.options import of_table
from lowbit.patterns import pattern_for
from lowbit.schemes import SCHEMES, WIDER, find_scheme, is_gguf_name
from lowbit.settings import Settings, make_settings
from models import make_model

COMMANDS = typer.main.get_command(app).commands


def parsed(command):
    """(name of the command, its parameters); the parser refuses what does not exist."""
    words = shlex.split(command)
    assert words[0] == "lowbit"
    return words[1], COMMANDS[words[1]].make_context(words[1], words[2:]).params


def settings_of(command):
    name, params = parsed(command)
    assert name == "quantize"
    table = of_table(Settings)
    return make_settings(None, **table.value({option.name: params[option.name] for option in table.options}))


def test_every_suggestion_parses(healthy):
    assert len(healthy.suggestions) == 5  # three sets, all of them, and one role in all blocks
    for each in healthy.suggestions:
        settings = settings_of(each.command)
        assert settings.scheme == "W4A16"
        assert settings.group_size == 32
        assert settings.overrides
        assert each.gain > 0
        assert each.bytes > 0


def test_cost_and_gain_of_a_suggestion(healthy, w4a16, llama, text, tmp_path):
    first = healthy.suggestions[0]
    done = lowbit.quantize(llama, tmp_path / "wider", **settings_of(first.command).given)
    assert done.report.totals.bytes_out - lowbit_bytes(w4a16) == first.bytes
    (row,) = lowbit.evaluate(tmp_path / "wider", llama, text, windows=4, window_tokens=64)
    assert healthy.kld - row.kld_mean == pytest.approx(first.gain, rel=0.1)


def lowbit_bytes(folder):
    from lowbit.report.schema import load

    return load(folder).totals.bytes_out


def test_damaged_files_are_written_anew_and_verified(w4a16, llama, text):
    multiply_scales(w4a16, ".layers.1.mlp.up_proj", 2)
    first, second = diagnosed(w4a16, llama, text, budget=1).suggestions
    assert parsed(first.command)[0] == "verify"
    assert settings_of(second.command) == make_settings(None, scheme="W4A16", group_size=32)


def test_writing_anew_loses_no_setting(llama, text, tmp_path):
    asked = {"scheme": "W4A16", "group_size": 32, "range": "percentile", "percentile": 99.5, "ignore": ("0.*o_proj$",),
             "overrides": {"down_proj$": "W8A16"}, "shard_size": 500_000_000}  # fmt: skip
    lowbit.quantize(llama, tmp_path / "q", **asked)
    multiply_scales(tmp_path / "q", ".layers.1.mlp.up_proj", 2)
    _, anew, *_ = diagnosed(tmp_path / "q", llama, text, budget=1).suggestions
    assert settings_of(anew.command) == make_settings(None, **asked)


def test_a_conversion_is_made_anew_with_the_scheme_of_its_files(llama, text, tmp_path):
    lowbit.quantize(llama, tmp_path / "ct", scheme="W8A16", group_size=32)
    lowbit.convert(tmp_path / "ct", tmp_path / "q", format="gptq")
    settings = settings_of(diagnosed(tmp_path / "q", llama, text).suggestions[0].command)
    assert (settings.scheme, settings.format, settings.group_size) == ("W8A16", "gptq", 32)


def test_without_a_report_the_scheme_is_read_from_the_files(llama, text, tmp_path):
    folder = tmp_path / "q"
    lowbit.quantize(llama, folder, scheme="W4A16", group_size=32, format="gptq")
    (folder / "lowbit-report.json").unlink()
    settings = settings_of(diagnosed(folder, llama, text).suggestions[0].command)
    assert (settings.scheme, settings.format, settings.group_size) == ("W4A16", "gptq", 32)


def test_gguf_types_are_widened_by_the_names_of_the_file(tmp_path, text):
    source = make_model(tmp_path / "llama", hidden_size=256, intermediate_size=512)
    lowbit.quantize(source, tmp_path / "q.gguf", scheme="Q4_K_S")
    found = diagnosed(tmp_path / "q.gguf", source, text)
    settings = settings_of(found.suggestions[0].command)
    assert set(settings.overrides.values()) <= {"Q5_K", "Q6_K", "Q8_0"}
    plan = lowbit.dry_run(source, output=tmp_path / "x.gguf", **settings.given).plan
    assert plan.file_bytes - (tmp_path / "q.gguf").stat().st_size == found.suggestions[0].bytes


NAMES = [f"model.layers.{i}.self_attn.{x}_proj" for i in (1, 11) for x in "qkvo"] + ["lm_head", "model.lm_head_2"]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["lm_head"], r"^lm_head$"),
        (["model.layers.1.self_attn.o_proj"], r"^model\.layers\.1\.self_attn\.o_proj$"),
        (["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"],
         r"^model\.layers\.1\.self_attn\.(k_proj|q_proj)$"),
        ([name for name in NAMES if ".11." in name], r"^model\.layers\.11\.self_attn\."),
        ([name for name in NAMES if "o_proj" in name], r"^model\.layers\.\d+\.self_attn\.o_proj$"),
        ([name for name in NAMES if name[-6] in "qk"], r"^model\.layers\.\d+\.self_attn\.(k_proj|q_proj)$"),
    ],
)  # fmt: skip
def test_patterns_find_just_what_they_should(names, pattern):
    assert pattern_for(names, NAMES) == pattern


@pytest.mark.parametrize("scheme", WIDER)
def test_wider_schemes_exist_and_are_wider(scheme):
    from lowbit.numerics.ggml import TYPES

    for wider in WIDER[scheme]:
        if is_gguf_name(scheme):
            own, other = TYPES[scheme], TYPES[wider]
            assert other.size / other.weights > own.size / own.weights
        else:
            assert find_scheme(wider).weight.bits > SCHEMES[scheme].weight.bits
