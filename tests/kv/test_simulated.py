"""Cache types inside the forward pass, against a cache that is really quantized token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma3TextConfig, LlamaConfig
from transformers.cache_utils import DynamicCache

from lowbit.errors import ArchitectureError, ShapeError, UsageError
from lowbit.kv.calibrated import k_means, measure_facts
from lowbit.kv.simulated import TwoVersions, quantized_layers, simulated_cache, windowed_attention
from lowbit.kv.types import CACHE_TYPES, Window, find_cache_type, find_cache_types
from tiny_types import build_tiny

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}  # fmt: skip
IDS = torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(0))


def made(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def llama():
    return made(LlamaConfig(**SIZES))


@torch.inference_mode()
def decoded(model, cache_type, ids: Tensor) -> Tensor:
    """Logits of one token after the other: what a decoding engine does, in the plainest way.

    The states of all layers are kept exact; before each step, those that the type has quantized by then are replaced.
    """
    exact: list[list[Tensor]] = []
    logits = []
    for step in range(ids.shape[1]):
        cache = DynamicCache()
        for layer, states in enumerate(exact):
            cache.update(*(partly_quantized(each, cache_type, side, step)
                           for each, side in zip(states, ("keys", "values"), strict=True)), layer)  # fmt: skip
        logits.append(model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
        new = [[layer.keys[..., -1:, :], layer.values[..., -1:, :]] for layer in cache.layers]
        for states, found in zip(exact, new, strict=False):
            states[:] = [torch.cat(pair, -2) for pair in zip(states, found, strict=True)]
        exact = exact or new
    return torch.cat(logits, dim=1)


def partly_quantized(states: Tensor, cache_type, side: str, before: int) -> Tensor:
    count = cache_type.window.quantized(before, side)
    codec = getattr(cache_type, side)
    return torch.cat([codec.round_trip(states[..., :count, :]), states[..., count:, :]], -2) if count else states


@pytest.mark.parametrize("name", ["kivi2", "int4", "quanto_int2"])
@torch.inference_mode()
def test_one_pass_equals_decoding_token_by_token(llama, name):
    cache_type = CACHE_TYPES[name]
    window = replace(cache_type.window, tokens=16, group=8 if cache_type.window.group > 1 else 1)
    small = {"kivi2": 8, "int4": 8, "quanto_int2": 32}[name]
    cache_type = replace(cache_type, window=window, keys=replace(cache_type.keys, group=small),
                         values=replace(cache_type.values, group=small))  # fmt: skip
    ids = IDS[:, :45]
    with simulated_cache(llama, cache_type):
        at_once = llama(ids).logits
    torch.testing.assert_close(at_once, decoded(llama, cache_type, ids), rtol=1e-3, atol=1e-3)
    assert (at_once - llama(ids).logits).abs().max() > 0.05


@torch.inference_mode()
def test_keys_and_values_are_rounded_where_attention_reads_them(llama):
    """With a window that never quantizes nothing changes; afterwards transformers is as it was."""
    plain = llama(IDS).logits
    with simulated_cache(llama, CACHE_TYPES["kivi4"]):
        within = llama(IDS[:, :100]).logits
    torch.testing.assert_close(within, plain[:, :100], rtol=1e-4, atol=1e-4)
    for name in ("q4_0", "int8_per_token_head", "kvquant4"):
        cache_type = CACHE_TYPES[name]
        facts = measure_facts(llama, (cache_type,), lambda: llama(IDS)) if cache_type.needs else None
        with simulated_cache(llama, cache_type, facts):
            assert not torch.equal(llama(IDS).logits, plain)
    assert torch.equal(llama(IDS).logits, plain)


@torch.inference_mode()
def test_more_bits_lose_less(llama):
    def loss(name: str) -> float:
        cache_type = find_cache_type(name)
        with simulated_cache(llama, cache_type):
            return float((llama(IDS).logits - plain).square().mean())

    plain = llama(IDS).logits
    losses = [loss(name) for name in ("f32", "bf16", "q8_0", "q5_1", "q4_0")]
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert loss("q4_0/q8_0") > loss("q8_0/q8_0")


@torch.inference_mode()
def test_one_layer_alone(llama):
    plain = llama(IDS).logits
    with simulated_cache(llama, CACHE_TYPES["q4_0"], only=(1,)):
        second = llama.model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(second[1], llama.model(IDS, output_hidden_states=True).hidden_states[1])
    with simulated_cache(llama, CACHE_TYPES["q4_0"], only=()):
        assert torch.equal(llama(IDS).logits, plain)


@torch.inference_mode()
def test_sliding_windows_and_soft_caps_in_a_window_of_16_bits():
    model = made(Gemma3TextConfig(**SIZES, sliding_window=24, query_pre_attn_scalar=32,
                                  layer_types=["sliding_attention", "full_attention"]))  # fmt: skip
    plain = model(IDS).logits
    with simulated_cache(model, CACHE_TYPES["kivi4"]):
        torch.testing.assert_close(model(IDS[:, :120]).logits, plain[:, :120], rtol=1e-3, atol=1e-3)
        assert (model(IDS).logits - plain)[:, 200:].abs().max() > 1e-4


@torch.inference_mode()
def test_windowed_attention_equals_plain_attention_with_sinks_and_softcap():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=generator)
    scores = query @ keys.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = 5.0 * torch.tanh(scores / 5.0)
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    weights = torch.cat([scores, sinks.reshape(1, 4, 1, 1).expand(1, 4, 40, 1)], -1).softmax(-1)[..., :-1]
    expected = (weights @ values.repeat_interleave(2, 1)).transpose(1, 2)
    both = (query, TwoVersions(keys, keys), TwoVersions(values, values), Window(8))
    mask = torch.zeros(1, 1, 40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    for given in (None, mask, mask == 0):
        found = windowed_attention(*both, given, 0.3, 5.0, sinks)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def latent():
    return made(DeepseekV3Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=64, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, max_position_embeddings=512,
    ))  # fmt: skip


@torch.inference_mode()
def test_latent_attention_rounds_its_latent():
    model = latent()
    plain = model(IDS).logits
    with simulated_cache(model, find_cache_type("fp8")):
        assert not torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)
    with pytest.raises(UsageError, match="one latent vector per token; cache type kivi2 has no form for it"):
        quantized_layers(model, CACHE_TYPES["kivi2"])


def test_what_cannot_be_simulated_is_named(llama):
    for model_type, said in (
        ("mamba", "its layers keep a recurrent state of fixed size"),
        ("bloom", "it does not run its attention through transformers'"),
        ("zamba2", "one Zamba2Attention runs as several layers"),
    ):
        with pytest.raises(ArchitectureError, match=f"has no KV cache that can be measured: {said}"):
            quantized_layers(build_tiny(model_type), CACHE_TYPES["q8_0"])
    odd = made(LlamaConfig(**SIZES | {"head_dim": 24}))
    for name in ("q8_0", "int4_hadamard", "nvfp4"):
        with pytest.raises(ShapeError, match="24 values"):
            quantized_layers(odd, CACHE_TYPES[name])
    with (
        pytest.raises(UsageError, match="fp8_calibrated needs ranges"),
        simulated_cache(llama, CACHE_TYPES["fp8_calibrated"]),
    ):
        pass


def test_names_are_read_as_engines_write_them():
    assert find_cache_type("FP8").name == "fp8_e4m3"
    assert find_cache_type("q8_0/q4_0").name == find_cache_type("k=q8_0,v=q4_0").name == "q8_0/q4_0"
    assert find_cache_type("v=q4_0, k=f16").name == "f16/q4_0"
    assert find_cache_type("q8_0/q8_0") is CACHE_TYPES["q8_0"]
    pair = find_cache_type("q8_0/q4_0")
    assert (pair.keys, pair.values, pair.bits(64)) == (CACHE_TYPES["q8_0"].keys, CACHE_TYPES["q4_0"].values, 6.5)
    names = [each.name for each in find_cache_types("kivi2,k=q8_0,v=q4_0,llama.cpp,q8_0")]
    assert names[:2] == ["kivi2", "q8_0/q4_0"]
    assert {"q8_0", "iq4_nl", "f16"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("int4_per_token", "there is no cache type 'int4_per_token'", "did you mean int4_per_token_head"),
        ("zzz", "there is no cache type 'zzz'", "docs/kv-cache.md"),
        ("q8_0,,q4_0", "empty name", "one comma"),
        ("q8_0/kivi2", "'kivi2' cannot be one of a pair", "q4_0"),
        ("q8_0/q9_9", "there is no cache type 'q9_9'", "q4_0"),
        ("k=q8_0", "does not name a type for keys and one for values", "k=q8_0,v=q4_0"),
    ],
)
def test_bad_names_are_named(text, said, hint):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as error:
        find_cache_types(text)
    assert hint in error.value.hint


def test_windows_count_as_their_papers_do():
    kivi = CACHE_TYPES["kivi2"].window
    assert [kivi.quantized(t, "keys") for t in (0, 127, 128, 255, 256)] == [0, 0, 128, 128, 256]
    assert [kivi.quantized(t, "values") for t in (0, 128, 129, 256)] == [0, 0, 1, 128]
    own = CACHE_TYPES["int4"].window
    assert [own.quantized(t, "keys") for t in (128, 191, 192, 255, 256)] == [0, 0, 64, 64, 128]


def test_k_means_finds_separate_clusters():
    values = torch.cat([torch.full((100,), each) for each in (-3.0, -1.0, 2.0, 7.0)]) + 0.01 * torch.randn(400)
    torch.testing.assert_close(k_means(values, 4), torch.tensor([-3.0, -1.0, 2.0, 7.0]), rtol=0, atol=0.01)


def test_the_document_has_every_type_with_its_bits():
    document = (Path(__file__).parents[2] / "docs" / "kv-cache.md").read_text(encoding="utf-8")
    for each in CACHE_TYPES.values():
        row = f"| `{each.name}` | {', '.join(each.engines) or '–'} | {each.bits(128):.2f} | {each.per} | {each.how} |"
        assert row in document
