"""Keys and values of a run against the cache that transformers itself fills, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lowbit.architecture.loading import load_model
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.input_ranges import InputRanges, measure_ranges
from lowbit.calibrate.kv_cache import CacheRanges, observed_cache
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import ArchitectureError, NonFiniteError
from models import make_model

IDS = torch.randint(3, 250, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def cached(model_folder) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Largest |K| and |V| of every head that a DynamicCache holds after each window."""
    from transformers import DynamicCache

    model = load_model(open_checkpoint(model_folder))
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode():
        for window in IDS:
            cache = DynamicCache()
            model.base_model(input_ids=window[None], past_key_values=cache, use_cache=True)
            for layer, states in enumerate(cache.layers):
                both = tuple(values.abs().amax(dim=(0, 2, 3)).float() for values in (states.keys, states.values))
                old = found.get(layer, both)
                found[layer] = (torch.maximum(old[0], both[0]), torch.maximum(old[1], both[1]))
    return found


# sdpa; norms of keys; sliding windows; an attention of its own ("eager", sinks); stacked q, k and v
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_oss", "phi3"])
def test_ranges_are_those_of_the_cache(folder, architecture):
    model = make_model(folder / architecture, architecture, dtype=torch.float32)
    ranges = measure_ranges(open_checkpoint(model), [], IDS, cache=True, dtype=torch.float32)
    assert ranges.cache is not None
    found, expected = ranges.cache.absmax(), cached(model)
    assert list(found) == list(expected) == [0, 1]
    for layer, (keys, values) in expected.items():
        assert found[layer][0].shape == keys.shape
        assert found[layer][0].dtype is torch.float32
        torch.testing.assert_close(found[layer][0], keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[layer][1], values, rtol=1e-4, atol=1e-5)


def test_watching_changes_nothing_and_leaves_nothing(tiny_llama):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    alone = BlockRunner(open_checkpoint(tiny_llama)).run(IDS, InputRanges())
    runner = BlockRunner(open_checkpoint(tiny_llama))
    with observed_cache(runner.model) as ranges:
        watched = runner.run(IDS, InputRanges())
    assert torch.equal(alone.values, watched.values)
    assert sorted(ranges.k) == [0, 1]
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_another_model_is_not_counted(tiny_llama):
    watched, other = (BlockRunner(open_checkpoint(tiny_llama)) for _ in range(2))
    with pytest.raises(ArchitectureError, match="attention of layer 0"), observed_cache(watched.model) as ranges:
        other.run(IDS, InputRanges())
    assert not ranges.k


@pytest.mark.parametrize(("architecture", "said"), [("deepseek_v3", "latent"), ("bloom", "attention functions")])
def test_models_without_keys_and_values_to_scale_are_refused(folder, architecture, said):
    model = make_model(folder / architecture, architecture)
    with pytest.raises(ArchitectureError, match=said):
        measure_ranges(open_checkpoint(model), [], IDS, cache=True)


def test_keys_that_are_not_finite_name_their_layer():
    keys = torch.ones(1, 2, 3, 4)
    keys[0, 1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="keys of layer 7, head 1"):
        CacheRanges().look(7, keys, torch.ones(1, 2, 3, 4))
