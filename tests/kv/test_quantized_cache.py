"""`QuantizedCache` against a plain computation, its memory, and what generation asks of a cache."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig

from lowbit.errors import ShapeError, UsageError
from lowbit.kv import CACHE_TYPES, QuantizedCache
from lowbit.kv.cache import QuantizedCacheLayer, cache_for, own_cache
from tiny_types import build_tiny

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def states(tokens: int, seed: int = 0, size: int = 64) -> Tensor:
    return torch.randn(2, 3, tokens, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [name for name in CACHE_TYPES if name.startswith("int") and "token" not in name])
@torch.inference_mode()
def test_the_cache_gives_back_what_its_type_says(name):
    """Tokens come one, two and many at a time; at every step the quantized part is the codec's, the rest exact."""
    cache_type = CACHE_TYPES[name]
    cache = own_cache(name, LlamaConfig(**SIZES))
    keys, values = states(400), states(400, 1)
    at = 0
    for count in (150, 1, 2, 60, 1, 100, 86):
        seen = [each.clone() for each in cache.update(keys[:, :, at : at + count], values[:, :, at : at + count], 0)]
        for side, found, exact in zip(("keys", "values"), seen, (keys, values), strict=True):
            quantized = cache_type.window.quantized(at, side)
            expected = exact[:, :, : at + count].clone()
            if quantized:
                codec = getattr(cache_type, side)
                expected[:, :, :quantized] = codec.round_trip(exact[:, :, :quantized])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        at += count
        assert cache.get_seq_length() == at


@pytest.mark.parametrize(("bits", "share"), [(8, 0.55), (4, 0.30), (2, 0.17)])
@torch.inference_mode()
def test_memory_at_16k_tokens(bits, share):
    """Group 64, window 128: at most this share of a cache in 16 bits, all that is kept between steps counted."""
    cache = QuantizedCache(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), bits=bits)
    tokens = 16384
    kept = torch.randn(1, 2, tokens, 64, dtype=torch.bfloat16)
    cache.update(kept, kept, 0)
    cache.update(kept[:, :, :1], kept[:, :, :1], 0)
    layer = cache.layers[0]
    packed = [part for each in layer._packed.values() for part in each.parts()]
    held = sum(tensor.untyped_storage().nbytes() for tensor in (layer.keys, layer.values, *packed))
    assert held == cache.nbytes
    assert held <= share * 2 * kept.nbytes


@torch.inference_mode()
def test_generation_with_8_bits_is_that_of_the_plain_cache(llama):
    ids = torch.randint(0, 64, (2, 200), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0  # left padding
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 40,
        "min_new_tokens": 40,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain = llama.generate(ids, **settings)
    cache = QuantizedCache(llama.config, bits=8)
    assert torch.equal(llama.generate(ids, past_key_values=cache, **settings)[:, :210], plain[:, :210])
    assert cache.get_seq_length() == 239
    assert cache.layers[0].quantized_tokens == 64
    coarse = llama.generate(ids, past_key_values=QuantizedCache(llama.config, bits=2), **settings)
    assert coarse.shape == plain.shape


@torch.inference_mode()
def test_beams_are_reordered(llama):
    ids = torch.randint(0, 64, (1, 210), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    found = llama.generate(ids, past_key_values=QuantizedCache(llama.config, bits=8), **settings)
    assert torch.equal(found, llama.generate(ids, **settings))


@torch.inference_mode()
def test_batches_are_selected_and_repeated_and_the_cache_reset():
    cache = QuantizedCache(LlamaConfig(**SIZES))
    keys = states(300)
    cache.update(keys, keys, 0)
    whole = cache.update(keys[:, :, :1], keys[:, :, :1], 0)[0].clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    new = keys[:, :, :1]
    assert torch.equal(cache.update(new, new, 0)[0][:, :, :301], whole[[1, 0]])
    cache.batch_repeat_interleave(2)
    new = new.repeat_interleave(2, 0)
    assert torch.equal(cache.update(new, new, 0)[0][:, :, :301], whole[[1, 1, 0, 0]])
    cache.batch_select_indices(torch.tensor([3]))
    assert torch.equal(cache.update(new[:1], new[:1], 0)[0][:, :, :301], whole[[0]])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(cache.update(keys, keys, 0)[0], keys)


@torch.inference_mode()
def test_what_is_in_the_window_can_be_cropped_and_no_more():
    cache = QuantizedCache(LlamaConfig(**SIZES))
    keys = states(300)
    cache.update(keys, keys, 0)  # 300 − 128 = 172: two groups of 64 are quantized, 172 tokens are in the window
    cache.crop(-50)
    assert cache.get_seq_length() == 250
    with pytest.raises(UsageError, match="crop of 123 tokens reaches into the quantized part of the cache; 122 are"):
        cache.crop(-123)
    with pytest.raises(UsageError, match="names a length"):
        cache.crop(10)
    with pytest.raises(UsageError, match="not offloaded"):
        cache.layers[0].offload()


@torch.inference_mode()
def test_states_are_kept_in_the_models_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cache = QuantizedCache(LlamaConfig(**SIZES))
        keys = states(200).to(dtype)
        cache.update(keys, keys, 0)
        assert cache.update(keys[:, :, :1], keys[:, :, :1], 0)[0].dtype == dtype


def test_gradients_get_states_of_their_own():
    cache = QuantizedCache(LlamaConfig(**SIZES))
    keys = states(200)
    cache.update(keys, keys, 0)
    first = cache.update(keys[:, :, :1], keys[:, :, :1], 0)[0]
    kept = first.clone()
    cache.update(keys[:, :, 5:6], keys[:, :, 5:6], 1)
    cache.update(keys[:, :, 5:6], keys[:, :, 5:6], 0)
    assert torch.equal(first, kept)


def test_sliding_layers_keep_their_window():
    config = Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    assert [isinstance(layer, QuantizedCacheLayer) for layer in QuantizedCache(config).layers] == [False, True]
    with pytest.raises(UsageError, match="mistral has no layer that attends to every token"):
        QuantizedCache(MistralConfig(**SIZES, sliding_window=16))


def test_what_makes_no_cache_is_named():
    config = LlamaConfig(**SIZES)
    with pytest.raises(UsageError, match="a cache of 3 bits"):
        QuantizedCache(config, bits=3)
    with pytest.raises(UsageError, match="groups of 12 tokens"):
        QuantizedCache(config, group=12)
    narrow_config = LlamaConfig(**SIZES | {"head_dim": 48})
    narrow = QuantizedCache(narrow_config)
    with pytest.raises(
        ShapeError, match="int4 has groups of 64 along the head, which do not divide heads of 48"
    ) as error:
        narrow.update(states(4, size=48), states(4, size=48), 0)
    assert "QuantizedCache(model.config, bits=4, group=16)" in error.value.hint
    QuantizedCache(narrow_config, bits=4, group=16).update(states(4, size=48), states(4, size=48), 0)
    recurrent = build_tiny("rwkv")
    with pytest.raises(UsageError, match="RwkvForCausalLM keeps a state of its own"):
        cache_for("int4", recurrent)  # its forward would take the cache and leave it empty
    with pytest.raises(UsageError, match=r"q8_0 is run by llama.cpp; `generate` keeps its cache in int8"):
        own_cache("q8_0", config)
    with pytest.raises(UsageError, match="kivi2 is only measured here"):
        own_cache("kivi2", config)
