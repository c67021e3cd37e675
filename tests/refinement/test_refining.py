"""A finished file is refined: nearer to its reference, and the same in everything else, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit import kernels
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.report import schema
from models import make_model

# name → settings of `lowbit quantize` that make the file
FILES = {
    "q4_0.gguf": {"scheme": "Q4_0"},
    "q4_k.gguf": {"scheme": "Q4_K_M"},
    "q2_k.gguf": {"scheme": "Q2_K"},
    "iq3_s.gguf": {"scheme": "IQ3_S"},
    "gptq": {"scheme": "W4A16", "group_size": 64, "format": "gptq"},
    "gptq_v2": {"scheme": "W4A16_ASYM", "group_size": 64, "format": "gptq_v2"},
    "awq": {"scheme": "W4A16_ASYM", "group_size": 64, "format": "awq"},
    "compressed-tensors": {"scheme": "W4A16", "group_size": 64},
    "modelopt": {"scheme": "NVFP4A16", "format": "modelopt"},
    "bitsandbytes": {"scheme": "NF4", "double_quant": True},
}


def contents(path: Path) -> dict[str, bytes]:
    """File name → bytes, without reports."""
    if path.is_file():
        return {path.suffix: path.read_bytes()}
    reports = ("lowbit-report.json", "report.html")
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name not in reports}


def tensors(path: Path) -> dict[str, bytes]:
    """Stored name → bytes of the tensor."""
    if path.is_file():
        raw = open_raw_gguf(path)
        return {tensor.name: bytes(raw.bytes(tensor)) for tensor in raw.tensors}
    found = load_file(path / "model.safetensors")
    return {name: values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, values in found.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_only_codes_and_scales_of_linears_change(name, model, refine, tmp_path):
    start, out = tmp_path / name, tmp_path / f"refined-{name}"
    lowbit.quantize(model, start, **FILES[name])
    done = refine(start, out, model)
    assert done.path == out
    assert done.after.kld_mean < done.before.kld_mean
    before, after = contents(start), contents(out)
    assert {file: len(data) for file, data in before.items()} == {file: len(data) for file, data in after.items()}
    changed = {tensor for tensor, data in tensors(out).items() if data != tensors(start)[tensor]}
    assert list(tensors(out)) == list(tensors(start))
    linears = ("_proj", "attn_", "ffn_")
    assert changed
    assert all(any(part in tensor for part in linears) and "norm" not in tensor for tensor in changed)
    others = [file for file in before if not file.endswith((".safetensors", ".gguf"))]
    assert all(before[file] == after[file] for file in others)
    refined = [tensor for tensor in done.report.tensors if tensor.method == "refine"]
    assert len(refined) == 7
    assert sum(tensor.layer_error for tensor in refined) < 0.8 * sum(tensor.start_error for tensor in refined)
    assert not done.report.verification.broken


def test_the_report_keeps_both_figures_and_the_command(model, refine, tmp_path, calibration, held_out):
    start, out = tmp_path / "start", tmp_path / "out"
    lowbit.quantize(model, start, scheme="W4A16")
    done = refine(start, out, model)
    report = schema.load(out)
    assert report.refinement.file == str(start)
    assert report.refinement.before == done.before
    assert report.refinement.after == done.after == report.evaluation[0]
    assert report.refinement.before.text == report.refinement.after.text
    assert report.refinement.before.kld_mean > report.refinement.after.kld_mean
    assert report.source.model == str(model)
    named = f"--text {held_out} --windows 3 --window-tokens 32 --calib {calibration}"
    assert report.command.startswith(f"lowbit refine {start} -o {out} --reference {model} {named}")
    assert lowbit.evaluate(out, text=None, windows=1, window_tokens=32)[0].reference == str(model)
    assert report.settings.method == "refine"
    assert "refine" in (out / "report.html").read_text()
    assert report.settings.calibration.samples == 6


def test_llama_cpp_computes_what_was_judged(model, refine, tmp_path):
    """The refined file in llama.cpp and as lowbit decodes it, which is what the verdict is about."""
    pytest.importorskip("xllamacpp")
    from gguf_models import prompt_and_logprobs
    from llama_cpp import top_logprobs

    start, out = tmp_path / "start.gguf", tmp_path / "out.gguf"
    lowbit.quantize(model, start, scheme="Q4_K_S")
    refine(start, out, model)
    ids, _ = prompt_and_logprobs(model)
    with torch.no_grad():
        wanted = lowbit.load(out)[0](torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    found = top_logprobs(out, ids)  # llama.cpp rounds activations to 8 bits
    assert max(abs(value - wanted[token].item()) for token, value in found.items()) < 0.1


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_experts_and_tied_heads(out, refine, tmp_path):
    """Experts are refined one by one, also where a file stacks them; a tied head keeps its bytes, with the reason."""
    model = make_model(tmp_path / "model", "mixtral", num_hidden_layers=1, tie_word_embeddings=True)
    start = tmp_path / f"start{out.removeprefix('out')}"
    scheme = {"scheme": "Q4_0"} if out.endswith("gguf") else {"scheme": "W4A16", "group_size": 32}
    lowbit.quantize(model, start, **scheme)
    done = refine(start, tmp_path / out, model, all_experts=True)
    refined = {tensor.name for tensor in done.report.tensors if tensor.method == "refine"}
    assert len(refined) == (7 if out.endswith("gguf") else 4 + 3 * 4)
    names = ("token_embd.weight", "model.embed_tokens.weight")
    head = next(tensor for tensor in done.report.tensors if tensor.name in names)
    assert head.name not in refined
    assert head.reason or any("not refined" in note for note in head.notes)


def test_experts_that_no_text_reached_keep_their_codes(refine, tmp_path):
    model = make_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
    start = tmp_path / "start"
    lowbit.quantize(model, start, scheme="W4A16", group_size=32)
    done = refine(start, tmp_path / "out", model, expert_tokens=200)
    kept = [tensor for tensor in done.report.tensors if tensor.method == "kept"]
    assert kept
    assert all("experts" in tensor.name and "refine needs 200" in tensor.notes[0] for tensor in kept)
    for tensor in kept:
        weight = f"{tensor.name.removesuffix('.weight')}.weight_packed"
        assert tensors(tmp_path / "out")[weight] == tensors(start)[weight]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scales_that_a_tool_folded_are_found(method, model, refine, tmp_path, calibration):
    """The norms of the file stay, and the reference is brought to its scales."""
    start = tmp_path / "start"
    lowbit.quantize(model, start, scheme="W4A16", group_size=64, method=method, calib=str(calibration), samples=4,
                    seqlen=48, positive_scales=True)  # fmt: skip
    norm = "model.layers.0.input_layernorm.weight"
    assert tensors(start)[norm] != tensors(model)[norm]
    done = refine(start, tmp_path / "out", model)
    assert done.after.kld_mean < 0.6 * done.before.kld_mean
    assert any("carry scales" in note for note in done.report.source.notes)
    assert tensors(tmp_path / "out")[norm] == tensors(start)[norm]


def in_activation_order(folder: Path) -> None:
    """A GPTQ folder with the groups of one linear scattered over its columns, as desc_act leaves them."""
    stored, linear = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj"
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    codes = kernels.unpack_dense(stored[f"{linear}.qweight"].t().contiguous(), 4, 256)
    scale = stored[f"{linear}.scales"].t().float()
    weight = codes.float() * scale.repeat_interleave(64, dim=1)
    sorted_columns = weight[:, order].reshape(256, 4, 64)
    scales = (sorted_columns.abs().amax(dim=2) / 7.5).half()
    anew = (sorted_columns / scales.float()[:, :, None]).round().clamp(-8, 7).reshape(256, 256).to(torch.int8)
    back = order.argsort()
    stored[f"{linear}.qweight"] = kernels.pack_dense(anew[:, back].contiguous(), 4).t().contiguous()
    stored[f"{linear}.scales"] = scales.t().contiguous()
    stored[f"{linear}.g_idx"] = (torch.arange(256) // 64)[back].to(torch.int32)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def test_gptq_files_in_activation_order(model, refine, tmp_path):
    start = tmp_path / "start"
    lowbit.quantize(model, start, **FILES["gptq"])
    in_activation_order(start)
    done = refine(start, tmp_path / "out", model)
    name = "model.layers.0.mlp.down_proj"
    (entry,) = (tensor for tensor in done.report.tensors if tensor.name == f"{name}.weight")
    assert entry.method == "refine"
    assert entry.layer_error < 0.8 * entry.start_error
    assert tensors(tmp_path / "out")[f"{name}.g_idx"] == tensors(start)[f"{name}.g_idx"]


def test_shards_and_split_files_keep_their_names(model, refine, tmp_path):
    parts = tmp_path / "parts.gguf"
    lowbit.quantize(model, parts, scheme="Q8_0", shard_size="1MB", token_embedding_type="F32", output_type="F32")
    (first, *others) = sorted(tmp_path.glob("parts-*.gguf"))
    assert others
    done = refine(first, tmp_path / "out.gguf", model)
    made = sorted(tmp_path.glob("out-*.gguf"))
    assert done.path == made[0]
    assert [path.stat().st_size for path in made] == [path.stat().st_size for path in (first, *others)]


def test_codes_only_never_rounds_anew(model, refine, tmp_path):
    start = tmp_path / "start"
    lowbit.quantize(model, start, scheme="W4A16")
    done = refine(start, tmp_path / "out", model, codes_only=True)
    assert done.after.kld_mean < done.before.kld_mean
    assert not any("anew" in note for tensor in done.report.tensors for note in tensor.notes)


def test_a_gguf_file_of_floats_is_a_reference_too(model, refine, tmp_path):
    reference, start = tmp_path / "bf16.gguf", tmp_path / "start.gguf"
    lowbit.quantize(model, reference, scheme="BF16")
    lowbit.quantize(model, start, scheme="Q4_0")
    done = refine(start, tmp_path / "out.gguf", reference)
    assert done.after.kld_mean < done.before.kld_mean


def test_hidden_states_of_the_file_are_those_it_will_have(model, refine, tmp_path):
    """The file's own norms and embedding run in the quantized stream: a damaged one is compensated behind it, though
    the linears by themselves then lie further from their weights."""
    start = tmp_path / "start.gguf"
    lowbit.quantize(model, start, scheme="Q4_0", token_embedding_type="Q2_K")
    done = refine(start, tmp_path / "out.gguf", model, correction=1.0)
    embedding = next(tensor for tensor in done.report.tensors if tensor.name == "token_embd.weight")
    assert embedding.scheme == "Q2_K"
    assert done.after.kld_mean < done.before.kld_mean
