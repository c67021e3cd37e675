"""Models whose hidden states are not [windows, tokens, H], or whose blocks hand states to later ones: block by block
their linears see the inputs of the whole model."""

from __future__ import annotations

import pytest
import torch

import lowbit
from lowbit.architecture.loading import load_model, module_names
from lowbit.calibrate import blocks
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.stream_axes import StreamAxes, find_axes
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import ArchitectureError
from tiny_types import make_tiny

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


class Inputs:
    """Σ x² and rows of every linear, by name."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}

    def look(self, source, x: torch.Tensor) -> None:
        for linear in source.linears:
            self.add(linear.name, x)

    def add(self, name: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.sums[name] = self.sums.get(name, 0) + x.double().square().sum(0)
        self.rows[name] = self.rows.get(name, 0) + len(x)

    def finish(self, block: int) -> None:
        pass


def of_the_whole_model(path, architecture) -> tuple[Inputs, torch.Tensor]:
    model, expected = load_model(open_checkpoint(path)), Inputs()
    for linear, module in module_names(model, architecture).items():
        if architecture.linears[linear].block is not None:
            model.get_submodule(module).register_forward_pre_hook(
                lambda _, arguments, linear=linear: expected.add(linear, arguments[0])
            )
    with torch.inference_mode():
        last = [model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0] for window in IDS]
    return expected, torch.stack(last)


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("model_type", ["xlnet", "prophetnet", "gemma3n_text", "gemma4_text"])
def test_inputs_are_those_of_the_whole_model(folder, model_type, windows, monkeypatch):
    """In batches of one window and of two, of which the last is smaller."""
    monkeypatch.setattr(blocks, "BATCH_TOKENS", windows * IDS.shape[1])
    path = folder / model_type
    if not path.exists():
        make_tiny(path, model_type)
    runner = BlockRunner(open_checkpoint(path))
    seen = Inputs()
    states = runner.run(IDS, seen)
    expected, last = of_the_whole_model(path, runner.architecture)
    assert set(seen.sums) <= set(expected.sums)
    assert len(seen.sums) > len(runner.blocks)
    for name, sums in seen.sums.items():
        assert seen.rows[name] == expected.rows[name], name
        torch.testing.assert_close(sums, expected.sums[name], rtol=1e-3, atol=1e-5)
    head = torch.cat(list(runner.head_inputs(IDS, states)))
    torch.testing.assert_close(head, last.reshape(head.shape), rtol=1e-3, atol=1e-3)


SHAPES = {
    "usual": (lambda w, t: (w, t, 8), StreamAxes(0, 1, 1, (8,))),
    "tokens first": (lambda w, t: (t, w, 8), StreamAxes(1, 0, 1, (8,))),
    "several streams": (lambda w, t: (4, w, t, 8), StreamAxes(1, 2, 1, (4, 8))),
    "streams one after another": (lambda w, t: (w, 3 * t, 8), StreamAxes(0, 1, 3, (8,))),
    "heads": (lambda w, t: (w, 2, t, 8), StreamAxes(0, 2, 1, (2, 8))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_axes_are_found_and_turned_back(name):
    """Also where the numbers of windows, tokens and channels are equal."""
    shape, wanted = SHAPES[name]
    ids = torch.zeros((8, 8), dtype=torch.long)
    axes = find_axes("Model", lambda some: torch.Size(shape(*some.shape)), ids)
    assert axes == wanted
    assert axes.usual == (name == "usual")
    hidden = torch.randn(shape(8, 8))
    flat = axes.flat(hidden)
    assert flat.shape[:2] == (8, 8)
    assert torch.equal(axes.unflat(flat), hidden)


REFUSED = {
    "axis 1 is no multiple of the tokens": lambda w, t: (w, t + 1, 8),
    "no axis changes with the number of tokens": lambda w, t: (w, 256, 8),
    "no axis changes with the number of windows": lambda w, t: (t, 8),
    "axis 0 counts windows and tokens in one": lambda w, t: (w * t, 8),
    "more than one axis changes with the number of tokens": lambda w, t: (w, t, t),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refusal_names_the_axis(reason):
    with pytest.raises(ArchitectureError, match=reason) as caught:
        find_axes("Model", lambda some: torch.Size(REFUSED[reason](*some.shape)), torch.zeros((2, 8), dtype=torch.long))
    assert "--method rtn" in caught.value.hint


@pytest.mark.parametrize("model_type", ["xlnet", "prophetnet", "gemma3n_text"])
def test_gptq_chooses_codes(folder, model_type, tmp_path):
    path = folder / model_type
    if not path.exists():
        make_tiny(path, model_type)
    made = lowbit.quantize(path, tmp_path / "out", scheme="W4A16", group_size=32, method="gptq", samples=8, seqlen=64)
    quantized = [entry for entry in made.report.tensors if entry.scheme is not None]
    assert quantized
    # A text alone has nothing for ProphetNet's decoder to attend to across.
    assert all((entry.method == "gptq") != ("cross_attn" in entry.name) for entry in quantized)
