from pathlib import Path

import pytest

from lowbit.errors import UsageError
from lowbit.knobs import parse_bytes
from lowbit.schemes import SCHEMES
from lowbit.settings import QUALITIES, Settings, make_settings


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_recipe_says_the_same_as_flags(tmp_path):
    path = recipe(tmp_path, """
scheme: W4A16
group_size: 64
range: absmax
ignore: ['o_proj$']
overrides: {'down_proj$': W8A16}
shard_size: 300MB
""")  # fmt: skip
    flags = make_settings(
        scheme="W4A16", group_size=64, range="absmax", ignore=("o_proj$",), overrides={"down_proj$": "W8A16"},
        shard_size=300_000_000,
    )  # fmt: skip
    assert make_settings(path) == flags


def test_flags_win_over_the_recipe(tmp_path):
    assert make_settings(recipe(tmp_path, "scheme: W4A16"), scheme="W8A16", group_size=None).scheme == "W8A16"


def test_unknown_setting_is_named_with_its_file(tmp_path):
    path = recipe(tmp_path, "schema: W4A16")
    with pytest.raises(UsageError, match="schema") as caught:
        make_settings(path)
    assert str(path) in str(caught.value)
    assert "scheme" in caught.value.hint


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "a: [1"])
def test_recipe_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        make_settings(recipe(tmp_path, text))


@pytest.mark.parametrize("bad", [{"ignore": ("(",)}, {"overrides": {"(": "W8A16"}}])
def test_bad_regex_is_named(bad):
    with pytest.raises(UsageError, match="not a regular expression"):
        make_settings(**bad)


def test_override_with_unknown_scheme_is_refused():
    with pytest.raises(UsageError, match="no scheme 'W9A9'"):
        make_settings(overrides={"x": "W9A9"})


@pytest.mark.parametrize(("value", "field"), [({"method": "magic"}, "method"), ({"range": "max"}, "range")])
def test_unknown_choice_is_named(value, field):
    with pytest.raises(UsageError, match=field):
        make_settings(**value)


def test_auto_range_searches_only_narrow_codes():
    settings = Settings()
    assert settings.range_search(SCHEMES["W4A16"].weight).method == "wmse"
    assert settings.range_search(SCHEMES["NVFP4"].weight).method == "mse"
    assert settings.range_search(SCHEMES["W8A8"].weight).method == "absmax"
    assert Settings(range="mse").range_search(SCHEMES["W8A8"].weight).method == "mse"


def test_first_matching_override_wins():
    settings = Settings(overrides={"down_proj$": "W8A16", "proj$": "W2A16"})
    assert settings.override_for("model.layers.0.mlp.down_proj").name == "W8A16"
    assert settings.override_for("model.layers.0.mlp.up_proj").name == "W2A16"
    assert settings.override_for("lm_head") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5_000_000_000), ("8GiB", 8 << 30), ("300 mb", 300_000_000), ("17", 17), ("1.5k", 1500)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-3MB"])
def test_senseless_size_is_refused(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes(text)


def test_patterns_of_llm_compressor_are_anchored_at_the_beginning():
    settings = make_settings(ignore=("re:.*down_proj", "re:lm_head"), overrides={"re:.*q_proj$": "W8A16"})
    assert settings.ignored_by("model.layers.0.mlp.down_proj") == "^(?:.*down_proj)"
    assert settings.ignored_by("model.lm_head") is None
    assert settings.override_for("a.q_proj") is not None


def test_a_recipe_may_be_named_by_text(tmp_path):
    (tmp_path / "r.yaml").write_text("scheme: W8A16\n")
    assert make_settings(str(tmp_path / "r.yaml")).scheme == "W8A16"


def test_a_level_of_quality_stands_for_a_method_and_is_all_that_is_named():
    chosen = make_settings(quality="good", samples=64)
    assert chosen.method == "gptq"
    assert chosen.given == {"quality": "good", "samples": 64}
    assert make_settings(**chosen.given) == chosen
    assert make_settings(quality="good", method="GPTQ").given == {"quality": "good"}
    with pytest.raises(UsageError, match="--quality good stands for --method gptq, not for awq"):
        make_settings(quality="good", method="awq")


@pytest.mark.parametrize("level", QUALITIES)
def test_every_level_is_a_method_with_settings_of_the_table(level):
    assert QUALITIES[level].keys() <= Settings.model_fields.keys()
    chosen = make_settings(quality=level)
    assert {name: getattr(chosen, name) for name in QUALITIES[level]} == QUALITIES[level]


@pytest.mark.parametrize(
    "line", ["group_size: " + "9" * 5000, "scheme: !!bool maybe", "scheme: !!timestamp now", "samples: 2026-99-99",
             "scheme: " + "[" * 5000],
)  # fmt: skip
def test_a_recipe_that_yaml_cannot_construct_is_refused(tmp_path, line):
    """PyYAML raises ValueError, KeyError and AttributeError of these, which are none of its own errors."""
    (tmp_path / "recipe.yaml").write_text(line + "\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml: cannot be read as YAML"):
        make_settings(tmp_path / "recipe.yaml")


def test_python_is_told_the_hint_and_the_nearest_keyword():
    import lowbit

    with pytest.raises(UsageError) as caught:
        make_settings(shceme="W4A16")
    assert any("did you mean scheme?" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match=r"lowbit.evaluate\(\) has no argument 'refrence'; did you mean reference\?"):
        lowbit.evaluate("model", refrence="other")
    with pytest.raises(TypeError, match=r"lowbit.verify\(\) has no argument 'zzz'; it takes .*engine"):
        lowbit.verify("model", zzz=1)
