"""Keys and values rounded in training: what attention reads is what the simulated cache gives back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open

import lowbit
from lowbit.architecture.building import auto_class
from lowbit.calibrate.kv_cache import attention_layers, wrapped_attention
from lowbit.errors import UsageError
from lowbit.kv.simulated import simulated_cache
from lowbit.kv.types import CACHE_TYPES
from models import SHORT_TEXT, make_model

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def opened(folder):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config, config.architectures).from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tiny(tiny_llama):
    return opened(tiny_llama)


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", ["fp8_e4m3", "int4_per_token_head", "quarot3", "lmdeploy_int4"])
def test_attention_sees_what_the_cache_gives_back(tiny, name):
    model, plain = tiny[0], copy.deepcopy(tiny[0])
    lowbit.train.prepare(model, "W4A16", group_size=32, cache=name)
    lowbit.train.prepare(plain, "W4A16", group_size=32)
    with torch.no_grad():
        with simulated_cache(plain, CACHE_TYPES[name]):
            expected = plain(IDS).logits
        assert torch.equal(model(IDS).logits, expected)
        assert not torch.equal(plain(IDS).logits, expected)


def test_gradients_go_straight_through(tiny):
    """As of k + constant, where the constant makes up the rounding."""
    model, by_hand = tiny[0], copy.deepcopy(tiny[0])
    lowbit.train.prepare(model, "W4A16", group_size=32, cache="int4_per_token_head")
    lowbit.train.prepare(by_hand, "W4A16", group_size=32)
    codec, own = CACHE_TYPES["int4_per_token_head"].keys, set(attention_layers(by_hand))

    def wrap(attention):
        def rounded(module, query, key, value, *args, **kwargs):
            assert module in own
            key, value = (x + (codec.round_trip(x.detach()) - x.detach()) for x in (key, value))
            return attention(module, query, key, value, *args, **kwargs)

        return rounded

    found = gradients(model)
    with wrapped_attention(wrap):
        expected = gradients(by_hand)
    assert any("k_proj" in name for name in found)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_checkpointing_recomputes_with_the_cache(tiny):
    plain, model = copy.deepcopy(tiny[0]), tiny[0]
    model.gradient_checkpointing_enable()
    for each in (model, plain):
        lowbit.train.prepare(each.train(), "W4A16", group_size=32, cache="int4_per_token_head")
    found, expected = gradients(model), gradients(plain)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_cache_of_the_output_is_rounded_in_training_and_its_scales_are_stored(tiny, tmp_path):
    model, tokenizer = tiny
    plain = copy.deepcopy(model)
    lowbit.train.prepare(model, "W4A16", group_size=32, kv_cache="fp8", calib=SHORT_TEXT, samples=2, seqlen=32)
    lowbit.train.prepare(plain, "W4A16", group_size=32)
    with torch.no_grad(), simulated_cache(plain, CACHE_TYPES["fp8_calibrated"], "batch"):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    done = lowbit.train.export(model, tmp_path / "out", tokenizer=tokenizer)
    scales = [name for name in safe_open(done.path / "model.safetensors", "pt").keys() if name.endswith("k_scale")]  # noqa: SIM118
    stated = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert scales
    assert stated["kv_cache_scheme"]["num_bits"] == 8


def test_remove_takes_the_cache_off(tiny):
    model, plain = tiny[0], copy.deepcopy(tiny[0])
    lowbit.train.remove(lowbit.train.prepare(model, "W8A16", cache="quarot3"))
    lowbit.train.remove(lowbit.train.prepare(plain, "W8A16"))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_an_error_in_the_forward_pass_leaves_no_cache_behind(tiny):
    model = tiny[0]
    lowbit.train.prepare(model, "W8A16", cache="quarot3")
    attention = next(iter(attention_layers(model)))
    inner = attention.o_proj.forward
    attention.o_proj.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    attention.o_proj.forward = inner
    seen = []
    with wrapped_attention(lambda attention: seen.append(attention.__qualname__) or attention), torch.no_grad():
        model(IDS)
    assert not any("through_cache" in name for name in seen)


@pytest.mark.parametrize(
    ("name", "said"),
    [("kvquant4", "tables of a calibration text"), ("int4_per_head", "there is no cache type"), ("", "no cache type")],
)
def test_types_that_a_training_cannot_have(tiny, name, said):
    with pytest.raises(UsageError, match=said):
        lowbit.train.prepare(tiny[0], "W4A16", group_size=32, cache=name)
    lowbit.train.prepare(tiny[0], "W4A16", group_size=32)  # the model stayed as it was


def test_a_latent_cache_is_refused_by_name(tmp_path):
    model, _ = opened(make_model(tmp_path / "model", "deepseek_v3"))
    with pytest.raises(UsageError, match="latent"):
        lowbit.train.prepare(model, "W4A16", group_size=32, cache="int4_per_token_head")
