"""Text that a model writes itself: what it begins with, what it repeats, what is refused."""

import hashlib

import pytest
import torch

from lowbit.architecture.loading import load
from lowbit.calibrate.self_text import GREEDY_TOKENS, generate_windows
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import NonFiniteError, UsageError
from models import make_model


@pytest.fixture
def checkpoint(tiny_llama):
    opened = open_checkpoint(str(tiny_llama))
    yield opened
    opened.close()


def test_windows_are_full_and_their_first_tokens_differ(checkpoint):
    seen = []
    found = generate_windows(
        checkpoint, 40, 12, dtype=torch.float32, progress=lambda what, done, total: seen.append((done, total))
    )
    assert found.ids.shape == (40, 12)
    assert found.ids.dtype == torch.int64
    first = found.ids[:, 0].tolist()
    assert len(set(first)) == 40
    assert not {0, 1, 2} & set(first)  # <s>, </s>, <unk>
    assert seen[-1] == (480, 480)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (found.name, found.asked, found.text_tokens) == ("self", 40, 480)
    assert found.sha256 == hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
    (note,) = found.notes
    assert "written by the model itself" in note
    assert "seed 0" in note


def test_tokens_after_the_first_are_the_most_likely_ones(checkpoint, tiny_llama):
    found = generate_windows(checkpoint, 3, 12, dtype=torch.float32)
    model, _ = load(tiny_llama)
    with torch.inference_mode():
        best = model(found.ids).logits.argmax(-1)
    assert torch.equal(found.ids[:, 1 : 1 + GREEDY_TOKENS], best[:, :GREEDY_TOKENS])
    assert not torch.equal(found.ids[:, 1 + GREEDY_TOKENS :], best[:, GREEDY_TOKENS:-1])


def test_sampled_tokens_follow_the_distribution_of_the_model(checkpoint, tiny_llama):
    """Mean log-likelihood of what was sampled ≈ minus the model's mean entropy."""
    found = generate_windows(checkpoint, 32, 64, dtype=torch.float32)
    model, _ = load(tiny_llama)
    with torch.inference_mode():
        logp = model(found.ids).logits[:, GREEDY_TOKENS:-1].log_softmax(-1)
    got = logp.gather(-1, found.ids[:, GREEDY_TOKENS + 1 :, None]).mean()
    entropy = -(logp.exp() * logp).sum(-1).mean()
    assert -got.item() == pytest.approx(entropy.item(), rel=0.01)


def test_a_seed_repeats_and_the_callers_generator_is_left_alone(checkpoint):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, again, other = (generate_windows(checkpoint, 4, 12, seed=seed, dtype=torch.float32).ids for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_bound_on_memory_makes_smaller_batches_or_is_refused(checkpoint):
    weights = sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values()) * 4
    cache = 2 * 2 * 2 * 32 * 4 * 12  # keys and values, blocks, heads, width, bytes, tokens
    found = generate_windows(checkpoint, 4, 12, dtype=torch.float32, max_memory=weights + 2 * cache)
    assert "2 windows in a batch" in found.notes[0]
    assert len(found.ids) == 4
    for bound in (weights + cache - 1, weights - 1):
        with pytest.raises(UsageError, match="--max-memory") as caught:
            generate_windows(checkpoint, 4, 12, dtype=torch.float32, max_memory=bound)
        assert "give a text" in caught.value.hint


def test_windows_longer_than_the_context_are_refused(checkpoint):
    with pytest.raises(UsageError, match="context of 256"):
        generate_windows(checkpoint, 1, 257)


def test_a_damaged_model_is_said_to_be_one(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(str(folder))
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        generate_windows(opened, 1, 8, dtype=torch.float32)
    opened.close()
