"""Weights of tokens by the gradient of the loss, and the Hessians made with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from calibrate.calibrated import calibrated, files_of, write_text
from lowbit.architecture.loading import load_model, module_names
from lowbit.calibrate import loop
from lowbit.calibrate.block_modules import BlockInput
from lowbit.calibrate.blocks import BlockRunner
from lowbit.calibrate.gradients import TokenWeights, token_weights
from lowbit.calibrate.memory import block_memory, weights_memory
from lowbit.calibrate.statistics import InputKeeper, InputStatistics
from lowbit.calibrate.store import BlockStore
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import UsageError
from lowbit.rounding import row_feedback
from lowbit.rounding.gptq import CORRECTION, CORRECTION_WITH_ROWS, GPTQOptions, gptq, share_corrected
from lowbit.rounding.hessian import InputData, row_groups
from lowbit.rounding.row_feedback import parts_of
from lowbit.settings import RunOptions, make_settings
from models import make_model
from rounding.gptq_cases import problem, target_of
from tiny_types import make_tiny

IDS = torch.randint(3, 250, (5, 24), generator=torch.Generator().manual_seed(0))
BLOCKS = 3
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
         "num_hidden_layers": BLOCKS}  # fmt: skip
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("gradients") / "model", **SMALL)


@pytest.fixture(scope="module")
def text(model):
    return write_text(model.parent)


@pytest.fixture(scope="module")
def finished(model, text):
    """Hessian → (folder, report) of a run, made when first asked for."""
    runs = {}

    def run(hessian: str = "inputs"):
        if hessian not in runs:
            out = model.parent / f"finished {hessian.replace(':', ' ')}"
            given = {} if hessian == "inputs" else {"hessian": hessian}
            runs[hessian] = out, calibrated(model, out, text, **given)
        return runs[hessian]

    return run


def weights_of(model, groups: int = 1, memory: int = PLENTY, runner: BlockRunner | None = None) -> TokenWeights:
    runner = runner or BlockRunner(open_checkpoint(model))
    linears = [name for name, linear in runner.architecture.linears.items() if linear.block is not None]
    return token_weights(runner, IDS, dict.fromkeys(linears, groups), 7, memory)


def by_autograd(model) -> dict[str, torch.Tensor]:
    """Gradients by the outputs of all linears, of the whole model at once: the definition, without blocks."""
    whole, outputs = load_model(open_checkpoint(model)), {}
    for name, path in module_names(whole, BlockRunner(open_checkpoint(model)).architecture).items():
        keep = lambda _module, _arguments, out, name=name: (out.retain_grad(), outputs.update({name: out}))[1]  # noqa: E731
        whole.get_submodule(path).register_forward_hook(keep)
    logits = whole(inputs_embeds=whole.get_input_embeddings()(IDS).requires_grad_()).logits.flatten(0, 1)
    drawn = torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(7))
    labels = torch.searchsorted(logits.detach().softmax(-1).cumsum(-1), drawn)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return {name: out.grad for name, out in outputs.items() if "layers" in name}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_weights_are_the_squared_gradients_of_the_whole_model(family, groups, tmp_path):
    """gemma2 caps its logits and norms what attention puts out."""
    folder = make_model(tmp_path / "model", family, **SMALL)
    found = weights_of(folder, groups)
    squares = {name: grad.square().unflatten(-1, (groups, -1)).mean(-1).sqrt()
               for name, grad in by_autograd(folder).items()}  # fmt: skip
    expected = {name: each / each.mean(dim=(0, 1)) for name, each in squares.items()}
    assert not found.missing
    assert found.weights.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(found.weights[name], values, rtol=2e-3, atol=1e-4, msg=name)


def test_curvature_of_outputs_is_that_of_the_whole_model(model, monkeypatch):
    monkeypatch.setattr(row_feedback, "LARGEST_PART", 40)
    runner, kept = BlockRunner(open_checkpoint(model)), {}
    linears = [name for name, linear in runner.architecture.linears.items() if linear.block is not None]
    token_weights(runner, IDS, dict.fromkeys(linears, 1), 7, PLENTY, keep=lambda _index, found: kept.update(found))
    assert kept.keys() == set(linears)
    for name, gradient in by_autograd(model).items():
        for part, found in zip(parts_of(gradient.shape[-1]), kept[name], strict=True):
            each = gradient[..., part].flatten(0, 1)
            each = each[each.any(dim=1)]  # no loss depends on the last key
            expected = (each.T / each.square().mean(dim=1).sqrt()) @ each
            assert_close(found, expected, rtol=5e-3, atol=1e-3 * expected.abs().max().item(), msg=name)


def test_the_inputs_of_all_blocks_may_lie_in_a_file(model):
    found, expected = weights_of(model, memory=0), weights_of(model)
    for name, values in expected.weights.items():
        assert torch.equal(found.weights[name], values)


def test_hessians_are_weighed_sums(model):
    """H_g = Σ s x xᵀ, and D = C (H + λ)⁻¹ with C = Σ (x₀ − x) xᵀ of tokens that count alike."""
    runner = BlockRunner(open_checkpoint(model))
    source = next(each for each in runner.inputs if each.name.endswith("attention_input"))
    q, k, v = (linear.name for linear in source.linears)
    generator = torch.Generator().manual_seed(1)
    x, x0 = torch.randn(2, 90, 64, generator=generator)
    s = {q: torch.rand(90, 2, generator=generator), k: torch.rand(90, 1, generator=generator)}
    keeper = InputKeeper()
    keeper.look(source, x0)
    statistics = InputStatistics(torch.float32, False, keeper)
    statistics.weights = lambda source: s
    statistics.look(source, x)
    statistics.end_of_unquantized()
    stats = statistics.take()[source.name]
    assert_close(stats.hessian, x.T @ x)  # for v, which has no weights
    assert v not in stats.weighted
    damped = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(64)
    assert_close(stats.drift, (x0 - x).T @ x @ damped.inverse(), rtol=1e-3, atol=1e-4)
    for name, groups in s.items():
        assert len(stats.weighted[name]) == groups.shape[1]
        for group, weights in zip(stats.weighted[name], groups.T, strict=True):
            assert_close(group.hessian, (x.T * weights) @ x, rtol=1e-4, atol=1e-4)
            assert group.drift is stats.drift
            assert_close(group.mean_sq, x.square().mean(0))


def test_without_a_plain_reader_no_plain_hessian_is_summed():
    source = BlockInput("x", ())
    statistics = InputStatistics(torch.float32, False)
    statistics.weights = lambda source: {"a": torch.full((30, 1), 0.5)}
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    statistics.look(source, x)
    stats = statistics.take()["x"]
    assert stats.hessian is None
    assert_close(stats.mean_sq, x.square().mean(0))
    assert_close(stats.weighted["a"][0].hessian, x.T @ x / 2)


@pytest.mark.parametrize("scheme", ["W4A16", "MXFP4", "W8A8"])
def test_groups_of_rows_are_rounded_as_by_themselves(scheme):
    weight, stats = problem(rows=40)
    target, others = target_of(scheme, weight), problem(rows=41)[1]
    data = InputData(stats, (InputData(stats), InputData(others), InputData(stats)))
    together = gptq(weight, target, data, GPTQOptions())
    for (rows, part), own in zip(data.by_rows(40), data.parts, strict=True):
        assert part is own
        assert torch.equal(together.decoded[rows], gptq(weight[rows], target, own, GPTQOptions()).decoded)
    assert torch.equal(together.stored.decode(), together.decoded)
    assert torch.equal(together.stored.codes[13:26], gptq(weight[13:26], target, data.parts[1]).stored.codes)


def test_row_groups_cover_all_rows_once():
    for rows, groups in ((40, 3), (3, 4), (5, 1), (64, 4)):
        parts = row_groups(rows, groups)
        assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
        assert len(parts) == min(rows, groups)
        assert max(part.stop - part.start for part in parts) - min(part.stop - part.start for part in parts) <= 1


def test_equal_weights_change_nothing():
    """One group in which every token counts 1 has the plain Hessian."""
    weight, stats = problem()
    whole = InputData(stats)

    own = InputData(replace(stats, weighted={"a": (stats,)})).of("a")
    target = target_of("W4A16", weight)
    assert torch.equal(gptq(weight, target, own).decoded, gptq(weight, target, whole).decoded)
    assert InputData(stats).of("a").stats is stats


@pytest.mark.parametrize("hessian", ["guided", "guided:3", "kronecker"])
def test_a_run_lowers_the_weighed_error(finished, hessian):
    folder, report = finished(hessian)
    errors = [(each.layer_error, each.nearest_error) for each in report.tensors if each.layer_error is not None]
    assert len(errors) == 7 * BLOCKS
    assert all(error < nearest for error, nearest in errors)
    assert not [note for note in report.source.notes if "Hessian" in note]
    assert report.settings.given["hessian"] == hessian
    other, plain = finished()
    assert files_of(other) != files_of(folder)
    assert report.totals.bytes_out == plain.totals.bytes_out


@pytest.mark.parametrize("method", ["awq+gptq", "hadamard+gptq", "gptq+sign-sgd"])
def test_it_goes_with_transforms_and_with_learning(text, tmp_path, method):
    source = make_model(tmp_path / "model", **SMALL, tie_word_embeddings=False)
    few = {"iterations": 5} if "sgd" in method else {}
    report = calibrated(source, tmp_path / "out", text, method, hessian="guided:2", **few)
    assert {each.method for each in report.tensors if each.method} >= {"gptq+sign-sgd" if "sgd" in method else "gptq"}


def test_experts_count_all_tokens_alike_and_say_so(text, tmp_path):
    source = make_model(tmp_path / "model", "qwen3_moe")
    report = calibrated(source, tmp_path / "out", text, hessian="guided", expert_tokens=1, allow_fallback=True)
    noted = [
        each for each in report.tensors if any("its Hessian counts all tokens alike" in note for note in each.notes)
    ]
    assert {".experts." in each.name for each in noted} == {True}
    counted = [note for note in report.source.notes if "counts all tokens alike: it runs inside a fused" in note]
    assert len(counted) == 1
    assert "linears)" in counted[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "stablelm_parallel", "deepseek_v3"])
def test_every_linear_has_weights_or_a_reason(family, tmp_path):
    """Conv1D, a decoder inside a decoder, stacked rows, MLP beside attention, experts with their router."""
    found = weights_of(make_model(tmp_path / "model", family))
    experts = {name for name in found.missing if ".experts." in name}
    assert set(found.missing) - experts == {name for name in found.missing if name.endswith(".gate")}
    assert bool(experts) == (family == "deepseek_v3")
    for values in found.weights.values():
        assert values.shape == (*IDS.shape, 1)
        assert_close(values.mean(), torch.tensor(1.0))
        assert bool((values >= 0).all())


def test_blocks_before_one_without_a_gradient_have_no_weights(model, monkeypatch):
    runner = BlockRunner(open_checkpoint(model))
    middle = runner.blocks[1].module
    inner = middle.forward
    monkeypatch.setattr(middle, "forward", torch.no_grad()(inner))
    found = weights_of(model, runner=runner)
    assert {runner.architecture.linears[name].block for name in found.weights} == {2}
    assert {runner.architecture.linears[name].block for name in found.missing} == {0, 1}
    assert all("no gradient comes through model.layers.1" in why for why in found.missing.values())
    assert weights_of(model).weights.keys() == found.weights.keys() | found.missing.keys()


def test_a_model_without_a_head_has_no_weights(model, monkeypatch):
    runner = BlockRunner(open_checkpoint(model))
    monkeypatch.setattr(runner.model, "get_output_embeddings", lambda: None)
    found = weights_of(model, runner=runner)
    assert not found.weights
    assert len(found.missing) == 7 * BLOCKS
    assert all("LlamaForCausalLM has no head" in why for why in found.missing.values())


def test_llama4_has_a_head(tmp_path):
    """`base_model` of it is the model itself, whose forward must not be replaced."""
    found = weights_of(make_tiny(tmp_path / "model", "llama4_text"))
    assert {name.split(".")[-1] for name in found.weights} >= {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_linear_that_runs_twice_has_no_weights(model, monkeypatch):
    runner = BlockRunner(open_checkpoint(model))
    mlp = runner.blocks[1].module.mlp
    monkeypatch.setattr(mlp, "forward", lambda x, inner=mlp.forward: inner(x) + inner(2 * x))
    found = weights_of(model, runner=runner)
    assert {name.split(".mlp.")[1] for name in found.missing} == {"gate_proj", "up_proj", "down_proj"}
    assert set(found.missing.values()) == {"it runs 2 times"}


def test_no_weights_at_all_are_refused(model, text, finished, tmp_path, monkeypatch):
    nothing = TokenWeights({}, {"model.layers.0.mlp.up_proj": "of a reason"})
    monkeypatch.setattr(loop, "token_weights", lambda *_arguments: nothing)
    with pytest.raises(UsageError, match="of a reason"):
        calibrated(model, tmp_path / "out", text, hessian="guided")
    calibrated(model, tmp_path / "out", text, hessian="guided", allow_fallback=True)
    assert files_of(tmp_path / "out") == files_of(finished()[0])


def test_a_level_of_quality_goes_on_without_gradients(model, text, tmp_path, monkeypatch):
    nothing = TokenWeights({}, {"model.layers.0.mlp.up_proj": "of a reason"})
    monkeypatch.setattr(loop, "token_weights", lambda *_arguments: nothing)
    report = calibrated(model, tmp_path / "out", text, quality="good")
    noted = [each.name for each in report.tensors if any("of a reason" in note for note in each.notes)]
    assert noted == ["model.layers.0.mlp.up_proj.weight"]


def test_the_correction_is_smaller_where_rows_are_fed():
    """By linear: one without a gradient is rounded as without feedback."""
    options = GPTQOptions.of(make_settings(quality="good"))
    shares = [share_corrected(options.correction, feeds_rows) for feeds_rows in (False, True)]
    assert shares == [CORRECTION, CORRECTION_WITH_ROWS]
    given = GPTQOptions.of(make_settings(quality="good", correction=0.1))
    assert [share_corrected(given.correction, feeds_rows) for feeds_rows in (False, True)] == [0.1, 0.1]
    assert not GPTQOptions.of(make_settings(method="gptq", correction=0.0)).needs_drift


class Stopped(Exception):
    pass


@pytest.mark.parametrize("hessian", ["guided:3", "kronecker"])
def test_a_resumed_run_takes_the_weights_it_has(model, text, finished, tmp_path, monkeypatch, hessian):
    whole, _ = finished(hessian)
    save = BlockStore.save

    def save_and_stop(self, index, *arguments):
        save(self, index, *arguments)
        if index == 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", save_and_stop)
        with pytest.raises(Stopped):
            calibrated(model, tmp_path / "out", text, hessian=hessian)
    stored = tmp_path / ".out.lowbit-work" / "token-weights.safetensors"
    assert stored.is_file()
    monkeypatch.setattr(loop, "token_weights", lambda *_arguments: pytest.fail("they are stored"))
    calibrated(model, tmp_path / "out", text, hessian=hessian, run=RunOptions(resume=True))
    assert files_of(tmp_path / "out") == files_of(whole)
    assert not stored.exists()


@pytest.mark.parametrize("damaged", ["token-weights.safetensors", "outputs-00002.safetensors"])
def test_damaged_weights_are_computed_again(model, text, finished, tmp_path, monkeypatch, damaged):
    whole, _ = finished("kronecker")

    def damage_and_stop(self, index, *_arguments):
        path = self.folder / damaged
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(BlockStore, "save", damage_and_stop)
        with pytest.raises(Stopped):
            calibrated(model, tmp_path / "out", text, hessian="kronecker")
    calibrated(model, tmp_path / "out", text, hessian="kronecker", run=RunOptions(resume=True))
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.parametrize(
    "value", ["guided:", "guided:0", "guided:-1", "guided:x", "fisher", "", "inputs:2", "kronecker:2"]
)
def test_another_value_is_refused(value):
    with pytest.raises(UsageError, match="there is no Hessian"):
        make_settings(hessian=value)


@pytest.mark.parametrize("transform", ["awq", "smoothquant", "hadamard", "rotate", "spinquant"])
def test_transforms_that_change_outputs_refuse_feedback_between_rows(transform):
    with pytest.raises(
        UsageError, match=f"kronecker knows the outputs of the model as given, which {transform} changes"
    ):
        make_settings(method=f"{transform}+gptq", hessian="kronecker")
    assert make_settings(method="hadamard-down+gptq", hessian="kronecker").feeds_rows  # which turns an input alone


def test_methods_without_a_hessian_refuse_it(model, tmp_path):
    import lowbit

    with pytest.raises(UsageError, match="--hessian guided is read only by GPTQ"):
        lowbit.quantize(model, tmp_path / "out", scheme="W4A16", hessian="guided")


def test_memory_counts_a_hessian_for_every_group_of_rows(model):
    """Attention: three readers of 64 columns and one of 64; MLP: two of 64 and one of 96."""
    architecture = BlockRunner(open_checkpoint(model)).architecture
    plain = block_memory(architecture, torch.float32, True, False)
    guided = block_memory(architecture, torch.float32, True, False, groups=2)
    assert plain["statistics of inputs"] == 4 * (2 * (64 * 64 + 96 * 96) + 3 * 96 * 96)
    assert guided["statistics of inputs"] == 4 * (2 * (64 * 64 + 96 * 96) + 2 * (2 * 64 * 64 + 96 * 96) + 3 * 96 * 96)
    assert guided["a batch of activations"] > plain["a batch of activations"]
    kronecker = block_memory(architecture, torch.float32, True, False, 1, outputs=True)
    rows = 2 * 64 * 64 + 2 * 32 * 32 + 2 * 96 * 96 + 64 * 64  # q, o; k, v; gate, up; down
    assert kronecker["curvature of outputs"] == 4 * (rows + 3 * row_feedback.LARGEST_PART**2)
    assert weights_memory(architecture, 2, 1000) == 4 * 1000 * 7 * BLOCKS * 2
    assert token_weights_bytes(weights_of(model, 2)) == weights_memory(architecture, 2, IDS.numel())


def token_weights_bytes(found: TokenWeights) -> int:
    return sum(values.nbytes for values in found.weights.values())


def test_estimates_know_the_pass_back(model):
    import lowbit

    plain, guided = (
        lowbit.estimate(model, scheme="W4A16", method="gptq", hessian=hessian, measure=False).run
        for hessian in ("inputs", "guided")
    )
    assert "gradients" not in plain.work
    assert guided.work["gradients"] > 0
    assert guided.work["Hessians"] > plain.work["Hessians"]
    assert guided.memory["weights of tokens"] == 4 * 128 * 512 * 7 * BLOCKS
    assert guided.memory["hidden states"] >= plain.memory["hidden states"]
