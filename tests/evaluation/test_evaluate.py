import io
import json
import math
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, FakeCheckpoint, byte_tokenizer, save_model

import lowbit.checkpoint
from lowbit.architecture.loading import load_model
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.errors import CheckpointError, NonFiniteError, UsageError
from lowbit.evaluation import forward
from lowbit.evaluation.activations import simulated_activations
from lowbit.evaluation.forward import Runner, slices
from lowbit.evaluation.perplexity import evaluate, score
from lowbit.evaluation.result import evaluation_table, heading, sentence
from lowbit.schemes import SCHEMES
from lowbit.text import cut_windows, read_text

SETTINGS = {"windows": 6, "window_tokens": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(reference, perturbed) Llama folders."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "reference", "llama")
    shutil.copytree(root / "reference", root / "perturbed")
    perturb(root / "perturbed")
    return root / "reference", root / "perturbed"


def perturb(folder):
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in tensors:
        if "proj" in name:
            tensors[name] += 0.02 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def direct(reference, perturbed, ids, first_scored=1):
    """KLD and losses from whole logits, in float64."""
    p, q = (
        load_model(SafetensorsCheckpoint(folder))(ids).logits.double().log_softmax(-1)
        for folder in (reference, perturbed)
    )
    p, q, targets = p[:, first_scored - 1 : -1], q[:, first_scored - 1 : -1], ids[:, first_scored:]
    loss_p, loss_q = (-x.gather(-1, targets[..., None]) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1), loss_p, loss_q, p.argmax(-1) == q.argmax(-1)


@pytest.mark.parametrize("protocol", ["full", "second-half"])
@torch.inference_mode()
def test_figures_equal_a_direct_computation(models, text_file, protocol):
    [row] = evaluate(models[1], models[0], text_file, protocol=protocol, **SETTINGS)
    cut = cut_windows(read_text(text_file), byte_tokenizer(), 6, 32, protocol)
    kld, loss_p, loss_q, same = direct(*models, cut.ids, cut.first_scored)
    assert row.scored_tokens == kld.numel() == 6 * (31 if protocol == "full" else 15)
    assert row.kld_mean == pytest.approx(kld.mean().item(), rel=1e-4)
    assert row.kld_max == pytest.approx(kld.max().item(), rel=1e-4)
    assert row.ppl == pytest.approx(loss_q.mean().exp().item(), rel=1e-5)
    assert row.ppl_reference == pytest.approx(loss_p.mean().exp().item(), rel=1e-5)
    assert row.same_top1 == pytest.approx(same.double().mean().item())
    assert row.kld_mean > 0.001
    assert (row.protocol, row.windows, row.window_tokens, row.bos) == (protocol, 6, 32, False)


def test_a_model_against_itself_is_exactly_equal(models, text_file):
    [row] = evaluate(models[0], models[0], text_file, **SETTINGS)
    assert (row.kld_mean, row.kld_max, row.same_top1, row.ppl_ratio, row.ppl_ratio_se) == (0, 0, 1, 1, 0)
    assert "the reference is the model itself" in row.notes[-1]


def test_a_reference_of_other_sizes_is_said(models, text_file, tmp_path, monkeypatch):
    deeper = {**CONFIGS["llama"].to_dict(), "num_hidden_layers": 3, "layer_types": None}
    monkeypatch.setitem(CONFIGS, "deeper", type(CONFIGS["llama"])(**deeper))
    save_model(tmp_path, "deeper")
    [row] = evaluate(models[1], tmp_path, text_file, **SETTINGS)
    assert "the reference is another model (its num_hidden_layers is 3, here 2)" in row.notes[-1]
    [row] = evaluate(models[1], models[0], text_file, **SETTINGS)
    assert not row.notes


@pytest.mark.parametrize("family", CONFIGS)
@torch.inference_mode()
def test_sliced_logits_equal_whole_ones(family, tmp_path):
    save_model(tmp_path, family)
    model = load_model(SafetensorsCheckpoint(tmp_path))
    ids = torch.arange(40) * 7 % 300
    decoded = Runner(model).decode(ids[None], 0)
    parts = [decoded.log_probabilities(range(start, start + 10)) for start in range(0, 40, 10)]
    whole = model(ids[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids[None]).logits[0].log_softmax(-1), whole)  # the decoder runs again afterwards


@torch.inference_mode()
def test_slice_size_does_not_matter(models, text_file, monkeypatch):
    whole = evaluate(models[1], models[0], text_file, **SETTINGS)[0]
    monkeypatch.setattr(forward, "LOGIT_BYTES", 7 * 300 * 4)
    sliced = evaluate(models[1], models[0], text_file, **SETTINGS)[0]
    assert sliced.kld_mean == pytest.approx(whole.kld_mean, rel=1e-5)
    assert sliced.scored_tokens == whole.scored_tokens


def test_slices_cover_every_position_once(monkeypatch):
    monkeypatch.setattr(forward, "LOGIT_BYTES", 4 * 4 * 10)
    assert [list(part) for part in slices(range(3, 12), vocabulary=10)] == [[3, 4, 5, 6], [7, 8, 9, 10], [11]]


def test_without_reference_there_is_perplexity_alone(models, text_file):
    [row] = evaluate(models[0], None, text_file, **SETTINGS)
    assert row.ppl > 1
    assert (row.reference, row.reference_from, row.kld_mean, row.ppl_ratio) == (None, "none", None, None)
    assert "no reference" in sentence(row)


def write_report(folder, source, **totals):
    (folder / "lowbit-report.json").write_text(json.dumps({"source": {"model": str(source)}, "totals": totals}))


def test_the_report_names_the_reference(models, text_file, tmp_path):
    folder = shutil.copytree(models[1], tmp_path / "quantized")
    write_report(folder, models[0], decoder_bits_per_weight=4.5)
    [row] = evaluate(folder, None, text_file, **SETTINGS)
    assert (row.reference, row.reference_from) == (str(models[0]), "report")
    assert (row.bits_per_weight, row.bits_from) == (4.5, "report")
    assert row.kld_mean > 0


def test_a_reported_source_that_is_gone_is_said(models, text_file, tmp_path):
    folder = shutil.copytree(models[1], tmp_path / "quantized")
    write_report(folder, tmp_path / "gone")
    [row] = evaluate(folder, None, text_file, **SETTINGS)
    assert row.reference is None
    assert any("gone" in note and "does not open" in note for note in row.notes)
    with pytest.raises(CheckpointError):
        evaluate(folder, tmp_path / "gone", text_file, **SETTINGS)


def test_fewer_windows_than_asked_are_said(models, text_file):
    [row] = evaluate(models[0], None, text_file, windows=1000, window_tokens=200)
    assert (row.windows, row.windows_asked) == (15, 1000)
    assert any("15 windows of the 1000" in note for note in row.notes)


def test_size_figures_come_from_the_stored_tensors(models, text_file):
    [row] = evaluate(models[0], None, text_file, **SETTINGS)
    assert (row.bits_per_weight, row.bits_from) == (32.0, "tensors")
    assert row.file_bytes == (models[0] / "model.safetensors").stat().st_size
    assert row.peak_memory_bytes > 50e6
    assert row.text.sha256 == read_text(text_file).sha256
    assert row.text.tokens == 3000


def test_windows_longer_than_the_model_are_refused(models, text_file):
    with pytest.raises(UsageError, match="trained for 256"):
        evaluate(models[0], None, text_file, windows=2, window_tokens=300)


def test_a_reference_of_another_vocabulary_is_refused(models, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "small", type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "vocab_size": 280}))
    save_model(tmp_path, "small")
    with pytest.raises(UsageError, match="vocabulary of 300"):
        evaluate(models[0], tmp_path, text_file, **SETTINGS)


def test_a_model_that_overflows_is_refused_with_its_window(models, text_file, tmp_path):
    folder = shutil.copytree(models[0], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="window 0"):
        evaluate(folder, models[0], text_file, **SETTINGS)


def test_bos_is_put_where_the_tokenizer_puts_it(text_file, tmp_path):
    save_model(tmp_path, "gemma3", add_bos=True)
    assert evaluate(tmp_path, None, text_file, **SETTINGS)[0].bos
    assert not evaluate(tmp_path, None, text_file, bos=False, **SETTINGS)[0].bos


def test_progress_counts_windows(models, text_file):
    seen = []
    evaluate(models[0], None, text_file, progress=lambda done, total: seen.append((done, total)), **SETTINGS)
    assert seen == [(i + 1, 6) for i in range(6)]


@pytest.fixture
def w8a8(models, monkeypatch):
    """Opening "quantized" gives the perturbed model with a W8A8 scheme on its decoder linears."""
    reference, perturbed = models
    tensors = load_file(perturbed / "model.safetensors")
    schemes = {name: SCHEMES["W8A8"] for name in tensors if "proj" in name}

    def open_checkpoint(path, _options):
        return FakeCheckpoint(tensors, perturbed, schemes) if path == "quantized" else SafetensorsCheckpoint(reference)

    monkeypatch.setattr(lowbit.checkpoint, "open_checkpoint", open_checkpoint)
    return schemes


def test_quantized_activations_get_a_row_of_their_own(w8a8, models, text_file):
    weights, simulated = evaluate("quantized", "reference", text_file, **SETTINGS)
    assert (weights.activations, simulated.activations) == ("none", "simulated")
    assert (weights.label, simulated.label) == ("W8A8", "W8A8 with activations simulated")
    assert weights.ppl_reference == simulated.ppl_reference
    assert simulated.kld_mean != weights.kld_mean
    alone = load_model(SafetensorsCheckpoint(models[1]))
    cut = cut_windows(read_text(text_file), byte_tokenizer(), **SETTINGS)
    with simulated_activations(alone, w8a8, {}):
        reference = Runner(load_model(SafetensorsCheckpoint(models[0])))
        by_hand = score(reference, {"simulated": Runner(alone)}, cut)["simulated"]
    assert by_hand.divergence.kld_mean == simulated.kld_mean


def test_activation_rows_can_be_chosen(w8a8, text_file):
    for mode in ("none", "simulated"):
        assert [e.activations for e in evaluate("quantized", None, text_file, activations=mode, **SETTINGS)] == [mode]


def test_a_compressed_tensors_folder_is_judged_by_what_it_stores(models, text_file, tmp_path):
    folder = shutil.copytree(models[0], tmp_path / "quantized")
    save_w8a8(folder)
    weights, simulated = evaluate(folder, models[0], text_file, **SETTINGS)
    assert (weights.scheme, simulated.scheme) == ("W8A8", "W8A8")
    assert 0 < weights.kld_mean < simulated.kld_mean < 0.1
    assert 8 < weights.bits_per_weight < 9  # the scales of such short rows count
    assert weights.file_bytes == (folder / "model.safetensors").stat().st_size


def save_w8a8(folder):
    """Rewrite a folder as compressed-tensors int-quantized: int8 rows with float32 scales."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_nothing_to_simulate_is_refused(models, text_file):
    with pytest.raises(UsageError, match="nothing to simulate"):
        evaluate(models[0], None, text_file, activations="simulated", **SETTINGS)


def test_a_row_is_json(models, text_file):
    [row] = evaluate(models[1], models[0], text_file, **SETTINGS)
    document = json.loads(json.dumps(row.model_dump(mode="json")))
    assert document["kld_mean"] == row.kld_mean
    assert document["text"]["tokens"] == 3000
    assert document["versions"]["torch"] == torch.__version__


def test_sentence_and_table_state_the_figures(models, text_file):
    rows = evaluate(models[1], models[0], text_file, **SETTINGS)
    change = 100 * (rows[0].ppl_ratio - 1)
    said = sentence(rows[0])
    assert said.startswith(f"perturbed keeps {100 * rows[0].same_top1:.1f} % of top-1 tokens; perplexity ")
    assert ("rises" in said) == (change > 0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(evaluation_table(rows))
    shown = console.export_text()
    assert f"{rows[0].kld_mean:.5f} ± {rows[0].kld_se:.5f}" in shown
    assert "6 windows × 32 tokens, full; 186 tokens scored" in heading(rows)


def test_an_unchanged_model_is_said_to_be_unchanged(models, text_file):
    [row] = evaluate(models[0], models[0], text_file, **SETTINGS)
    assert sentence(row) == "reference keeps 100.0 % of top-1 tokens; perplexity is unchanged"
