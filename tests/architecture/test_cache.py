from __future__ import annotations

import json

import pytest

from lowbit.architecture import cache, discover, discover_once
from lowbit.errors import ArchitectureError
from models import ARCHITECTURES
from models import config_of as config


@pytest.fixture
def found(tmp_path, monkeypatch) -> list[str]:
    """Model types that were really discovered, with a cache of the test's own."""
    calls: list[str] = []

    def counted(config, folder, trust_remote_code=False, split_experts=False, own_names=False):
        calls.append(config["model_type"])
        return discover(config, folder, trust_remote_code, split_experts, own_names)

    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "discover", counted)
    return calls


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_kept_equals_what_was_found(found, architecture):
    given = config(architecture)
    first = discover_once(given, "x")
    assert discover_once(given, "y") == first == discover(given, "x")
    assert found == [ARCHITECTURES[architecture][0]]


def test_experts_taken_apart_are_kept_beside_those_that_are_not(found):
    whole, apart = discover_once(config("gpt_oss"), "x"), discover_once(config("gpt_oss"), "x", split_experts=True)
    assert discover_once(config("gpt_oss"), "x") == whole != apart
    assert discover_once(config("gpt_oss"), "x", split_experts=True) == apart
    assert found == ["gpt_oss", "gpt_oss"]


def test_another_config_is_discovered_anew_and_quantization_config_does_not_matter(found):
    discover_once(config("llama"), "x")
    discover_once(config("llama") | {"quantization_config": {"quant_method": "compressed-tensors"}}, "x")
    discover_once(config("llama", num_hidden_layers=3), "x")
    assert found == ["llama", "llama"]


def test_a_file_of_the_cache_is_read_once_while_it_stays_the_same(found, tmp_path):
    discover_once(config("llama"), "x")
    assert discover_once(config("llama"), "x") is discover_once(config("llama"), "x")
    (kept,) = (tmp_path / "architecture").iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"heads": 77}))
    assert discover_once(config("llama"), "x").heads == 77


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"blocks": 3}'])
def test_damaged_cache_is_discovered_anew(found, tmp_path, damage):
    discover_once(config("llama"), "x")
    (kept,) = (tmp_path / "architecture").iterdir()
    kept.write_text(damage)
    assert discover_once(config("llama"), "x") == discover(config("llama"), "x")
    assert found == ["llama", "llama"]
    assert json.loads(kept.read_text())


def test_cache_that_cannot_be_written_is_no_error(found, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    assert discover_once(config("llama"), "x").blocks
    assert discover_once(config("llama"), "x").blocks
    assert found == ["llama", "llama"]


def test_unknown_model_types_and_models_with_their_own_code_are_not_kept(found, tmp_path):
    with pytest.raises(ArchitectureError):
        discover_once({"model_type": "nothing"}, "x")
    discover_once(config("llama"), "x", trust_remote_code=True)
    assert not (tmp_path / "architecture").exists()
