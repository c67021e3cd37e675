"""Measured importance: against a run by hand, expert by expert, cut as llama-imatrix cuts; what cannot be measured."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from checkpoint.checkpoint_files import write_tiny_gguf
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import ArchitectureError, CheckpointError, NonFiniteError, OutputError
from lowbit.formats.gguf.imatrix import measure_importance, text_of
from lowbit.formats.gguf.imatrix_file import read_imatrix
from lowbit.formats.gguf.table import MODEL_TYPES, row_of_model
from lowbit.text import Text
from models import ARCHITECTURES, make_model

TEXT = Text("sample", "Twelve windows of text that says nothing at all, again and again. " * 20)


def measure(folder, windows=3, tokens=32, **how):
    checkpoint = open_checkpoint(folder)
    return measure_importance(checkpoint, text_of(checkpoint, TEXT, windows, tokens), **how)


def test_values_are_the_mean_squares_of_a_run_by_hand(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(TEXT.content, add_special_tokens=False).input_ids[: 3 * 32]).reshape(3, 32)
    with torch.inference_mode():
        out = model.model(ids, output_hidden_states=True)
        into_attention = model.model.layers[1].input_layernorm(out.hidden_states[1])
    measured = measure(tiny_llama, process_output=True)
    entries = measured.matrix.entries
    assert measured.tokens == 96
    assert measured.notes == ()
    assert (measured.matrix.chunks, measured.matrix.chunk_tokens, measured.matrix.datasets) == (3, 32, ("sample",))
    expected = into_attention.reshape(-1, 128).square().mean(0)
    for name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.attn_v.weight"):
        torch.testing.assert_close(entries[name].values[0], expected, rtol=1e-5, atol=1e-7)
        assert entries[name].counts.tolist() == [96]
    head = out.last_hidden_state.reshape(-1, 128).square().mean(0)
    torch.testing.assert_close(entries["output.weight"].values[0], head, rtol=1e-5, atol=1e-7)
    leaves = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{block}.{leaf}.weight" for block in (0, 1) for leaf in leaves} | {"output.weight"}
    assert set(entries) == names


def test_the_head_is_measured_only_when_asked_for(tiny_llama):
    assert "output.weight" not in measure(tiny_llama).matrix.entries


def test_a_tied_head_is_given_under_the_name_of_the_embeddings_too(tmp_path):
    model = make_model(tmp_path / "tied", tie_word_embeddings=True)
    entries = measure(model, process_output=True).matrix.entries
    assert torch.equal(entries["output.weight"].values, entries["token_embd.weight"].values)


@pytest.mark.parametrize("architecture", [name for name, (kind, _) in ARCHITECTURES.items() if kind in MODEL_TYPES])
def test_every_family_that_gguf_has_gets_an_entry_for_each_matrix_of_its_blocks(tmp_path, architecture):
    model = make_model(tmp_path / architecture, architecture, dtype=torch.float32)
    checkpoint = open_checkpoint(model)
    entries = measure(model).matrix.entries
    columns = {2: [], 3: []}
    for name, entry in entries.items():
        columns[2 if len(entry.counts) == 1 else 3].append(name)
        assert entry.values.isfinite().all(), name
        assert entry.values.any(), name
    row = row_of_model(checkpoint.config(), checkpoint.source)
    experts = [name for name in columns[3] if "exps" in name]
    assert bool(experts) is row.stacks_experts
    assert all("exps" in name or "attn_v_b" in name for name in columns[3])  # latent attention: one matrix per head
    for name in experts:
        assert entries[name].counts.sum() == 96 * 2  # two experts a token


def test_experts_are_counted_one_by_one_and_unseen_ones_are_named(tmp_path):
    model = make_model(tmp_path / "moe", "qwen3_moe", dtype=torch.float32, num_experts_per_tok=1)
    tensors = load_file(model / "model.safetensors")
    for block in (0, 1):
        norm = tensors[f"model.layers.{block}.post_attention_layernorm.weight"]
        gate = tensors[f"model.layers.{block}.mlp.gate.weight"]
        norm[:], gate[:] = 1.0, 0.0
        gate[:, 0] = torch.tensor([1.0, -1.0, 0.5, 0.5])  # the sign of one channel chooses expert 0 or 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text(TEXT.content)
    done = lowbit.imatrix(model, tmp_path / "x.gguf", calib=tmp_path / "text.txt", samples=3, seqlen=32)
    matrix = read_imatrix(done.file)
    for name in ("blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"):
        entry = matrix.entries[name]
        assert entry.counts.sum() == 96
        assert (entry.counts[:2] > 0).all()
        assert entry.unseen == (2, 3)
        assert not entry.values[2:].any()
        weights = matrix.importance(name, (4, 64, entry.values.shape[1]))
        torch.testing.assert_close(weights[2:], entry.values[:2].mean(0).expand(2, -1))
        assert any(f"no token reached experts 2, 3 of {name}" in note for note in done.notes)
    router = matrix.entries["blk.0.ffn_gate_inp.weight"]
    seen = matrix.entries["blk.0.ffn_up_exps.weight"]
    assert router.counts.tolist() == [96]
    torch.testing.assert_close(seen.sums.sum(0), router.sums[0], rtol=1e-5, atol=1e-4)


def test_bos_takes_the_place_of_the_first_token_of_each_window(tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model = make_model(tmp_path / "bos", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save_pretrained(model)
    ids = tokenizer(TEXT.content, add_special_tokens=False).input_ids
    stream = torch.tensor([0, *ids])[: 3 * 32].reshape(3, 32)
    stream[:, 0] = 0
    with torch.inference_mode():
        run = load_model(open_checkpoint(model))
        x = run.model.layers[0].input_layernorm(run.model.embed_tokens(stream))
    found = measure(model).matrix.entries["blk.0.attn_q.weight"].values[0]
    torch.testing.assert_close(found, x.reshape(-1, 128).square().mean(0), rtol=1e-5, atol=1e-7)


def test_a_gguf_model_is_measured_through_its_hugging_face_names(tmp_path):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    names = set(measure(gguf, windows=1, tokens=16).matrix.entries)
    tensors = {tensor.name for tensor in open_checkpoint(gguf).raw.tensors}  # type: ignore[attr-defined]
    assert names < tensors


def test_a_text_too_short_for_one_window_is_refused(tiny_llama):
    with pytest.raises(CheckpointError, match="one window needs 32"):
        text_of(open_checkpoint(tiny_llama), Text("short", "few words"), 3, 32)


def test_a_text_too_short_for_all_windows_is_said(tiny_llama):
    measured = measure(tiny_llama, windows=1000)
    assert measured.matrix.chunks < 1000
    assert f"{measured.matrix.chunks} windows of 32, not the 1000 asked for" in measured.notes[0]


def test_inputs_that_are_not_finite_are_named(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.attention_input is not finite"):
        measure(tmp_path / "model")


def test_a_model_without_names_in_gguf_is_refused_before_it_runs(tmp_path):
    model = make_model(tmp_path / "opt", "opt")
    with pytest.raises(ArchitectureError, match="'opt' has no place in GGUF"):
        measure(model)


def test_the_public_call_measures_merges_and_converts(tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT.content)
    given = {"calib": tmp_path / "text.txt", "seqlen": 32}
    one = lowbit.imatrix(tiny_llama, tmp_path / "one.gguf", samples=2, **given)
    both = lowbit.imatrix(tiny_llama, tmp_path / "both.gguf", samples=3, merge_with=[one.file], **given)
    assert both.matrix.entries["blk.0.attn_q.weight"].counts.tolist() == [160]
    assert both.matrix.chunks == 5
    old = lowbit.imatrix(both.file, tmp_path / "both.dat", form="dat")
    assert old.tokens == 0
    again = read_imatrix(old.file).importance("blk.1.ffn_down.weight", (128, 192))
    torch.testing.assert_close(again, both.matrix.entries["blk.1.ffn_down.weight"].values)
    with pytest.raises(OutputError, match="exists already"):
        lowbit.imatrix(tiny_llama, one.file, samples=2, **given)
    assert read_imatrix(one.file).chunks == 2
    lowbit.imatrix(both.file, one.file, overwrite=True)
    assert read_imatrix(one.file).chunks == 5
