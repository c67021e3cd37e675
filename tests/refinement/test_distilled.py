"""`lowbit refine --distill`: behind codes, scales, norms and biases of a finished file are learned, in their places."""

from __future__ import annotations

import pytest

import lowbit
from lowbit.checkpoint import open_checkpoint
from lowbit.distillation import descent
from lowbit.errors import UsageError
from lowbit.report import schema
from models import make_model
from refinement.test_refining import contents, tensors

# Of few bits, so that codes leave something to learn.
FILES = {
    "q2_k.gguf": {"scheme": "Q2_K"},
    "gptq": {"scheme": "W2A16", "group_size": 64, "format": "gptq"},
    "bitsandbytes": {"scheme": "NF4", "double_quant": True},
}
LEARNS = {"distill": True, "samples": 8, "distill_samples": 0, "distill_steps": 8, "distill_rate": 2e-3,
          "compute": "float32"}  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Of two windows, so that there is more than one in a pass."""
    monkeypatch.setattr(descent, "STEP_TOKENS", 96)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FILES)
def test_scales_and_norms_are_learned_in_their_places(name, model, refine, tmp_path):
    start, out = tmp_path / name, tmp_path / f"refined-{name}"
    lowbit.quantize(model, start, **FILES[name])
    done = refine(start, out, model, **LEARNS)
    learned = done.report.distillation
    assert learned is not None
    methods = {tensor.method for tensor in done.report.tensors if tensor.layer_error is not None}
    assert done.after.kld_mean < done.before.kld_mean
    if not learned.kld_end < learned.kld_start:  # on so little text, nothing may be; then the codes alone count
        assert methods == {"refine"}
        return
    before, after = contents(start), contents(out)
    assert {file: len(data) for file, data in before.items()} == {file: len(data) for file, data in after.items()}
    changed = {tensor for tensor, data in tensors(out).items() if data != tensors(start)[tensor]}
    norms = {tensor for tensor in tensors(start) if "norm" in tensor}
    assert norms <= changed or name == "bitsandbytes", "whose few steps are less than a bfloat16 tells"
    assert not any("embd" in tensor or "embed" in tensor or "head" in tensor for tensor in changed)
    assert methods == {"refine+distill"}
    assert not done.report.verification.broken


def test_norms_that_the_file_stores_otherwise_are_written_as_it_stores_them(tmp_path, refine):
    """Gemma's norms lie in a GGUF file as w + 1."""
    source = make_model(tmp_path / "model", "gemma2", hidden_size=256, intermediate_size=256, num_hidden_layers=1,
                        head_dim=64, query_pre_attn_scalar=64)  # fmt: skip
    start, out = tmp_path / "start.gguf", tmp_path / "out.gguf"
    lowbit.quantize(source, start, scheme="Q2_K")
    done = refine(start, out, source, **LEARNS | {"distill_rate": 1e-4})
    assert done.report.distillation.kld_end < done.report.distillation.kld_start
    assert done.after.kld_mean < done.before.kld_mean
    held, kept = (open_checkpoint(str(path)) for path in (out, source))
    for name in (name for name in kept.tensors if "norm" in name):
        assert 0 < (held.read(name).float() - kept.read(name).float()).abs().max() < 0.01, "w, not w + 1"


def test_the_command_of_the_report_distills_again(model, refine, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    lowbit.quantize(model, start, scheme="W3A16", group_size=64)
    refine(start, out, model, **LEARNS)
    command = schema.load(out).command
    assert " --distill " in command
    assert "--distill-steps 8" in command


def test_what_a_distillation_reads_is_refused_without_one(model, refine, tmp_path):
    lowbit.quantize(model, tmp_path / "start", scheme="W4A16")
    with pytest.raises(UsageError, match="--distill-steps 4 is read only by distillation"):
        refine(tmp_path / "start", tmp_path / "out", model, distill_steps=4)
    with pytest.raises(UsageError, match="needs 4 windows"):
        refine(tmp_path / "start", tmp_path / "out", model, **LEARNS | {"samples": 3})
    assert not (tmp_path / "out").exists()
