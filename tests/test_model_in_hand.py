"""`lowbit.quantize` of a transformers model in memory: the same bytes as from its folder, in place, what is refused."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lowbit
from lowbit.architecture.building import auto_class
from lowbit.architecture.in_memory import model_in_memory
from lowbit.checkpoint import OpenOptions
from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.report import schema
from lowbit.settings import RunOptions
from models import SHORT_TEXT, make_model

# What transformers transposes, fuses and renames on loading.
KINDS = ("gpt2", "mixtral", "qwen2_5_vl")
SMALL = {"samples": 4, "seqlen": 32}


def opened(folder: Path):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config, config.architectures).from_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tiny(tiny_llama):
    return opened(tiny_llama)


def values(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_becomes_what_its_folder_becomes(kind, tmp_path):
    folder = make_model(tmp_path / "model", kind)
    model, tokenizer = opened(folder)
    ours = lowbit.quantize(model, tmp_path / "a", tokenizer=tokenizer, scheme="W4A16", in_place=True)
    theirs = lowbit.quantize(folder, tmp_path / "b", scheme="W4A16")
    assert (ours.path / "model.safetensors").read_bytes() == (theirs.path / "model.safetensors").read_bytes()
    decoded, _ = lowbit.load(ours.path, dtype=torch.bfloat16)
    state = model.state_dict()
    assert all(torch.equal(state[name].bfloat16(), tensor) for name, tensor in decoded.state_dict().items())


def test_a_gguf_file_of_a_model_in_memory(tiny, tiny_llama, tmp_path):
    model, tokenizer = tiny
    lowbit.quantize(model, tmp_path / "a.gguf", tokenizer=tokenizer, scheme="Q4_0")
    lowbit.quantize(tiny_llama, tmp_path / "b.gguf", scheme="Q4_0")
    ours, theirs = lowbit.inspect(tmp_path / "a.gguf"), lowbit.inspect(tmp_path / "b.gguf")
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.tensors)
    assert ours.metadata["tokenizer.ggml.tokens"] == theirs.metadata["tokenizer.ggml.tokens"]
    assert ours.metadata["general.name"] == theirs.metadata["general.name"]
    done = lowbit.quantize(model, tokenizer=tokenizer, scheme="Q4_0")
    assert done.path.suffix == ".gguf"
    assert torch.equal(model.state_dict()["model.layers.1.self_attn.k_proj.weight"].float(),
                       theirs.read("model.layers.1.self_attn.k_proj.weight").bfloat16().float())  # fmt: skip


def test_in_place_the_model_gets_the_decoded_weights_and_stays_plain(tiny):
    model, tokenizer = tiny
    before, kinds = values(model), {name: type(module) for name, module in model.named_modules()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = lowbit.quantize(model, tokenizer=tokenizer, scheme="W4A16", group_size=32)
    assert done.model is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert len(optimizer.param_groups[0]["params"]) == len(identities)
    stored = lowbit.inspect(done.path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], stored.read(name).bfloat16())
    assert not torch.equal(model.state_dict()[name], before[name])
    assert torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_temporary_output_lives_as_long_as_the_result(tiny):
    done = lowbit.quantize(tiny[0], tokenizer=tiny[1], scheme="W8A16")
    path = done.path
    assert schema.load(path).settings.scheme == "W8A16"
    del done
    gc.collect()
    assert not path.parent.exists()


def test_with_an_output_the_model_stays_as_it_was(tiny, tmp_path):
    before = values(tiny[0])
    done = lowbit.quantize(tiny[0], tmp_path / "out", tokenizer=tiny[1], scheme="W4A16")
    assert same(values(tiny[0]), before)
    assert done.in_place is None
    assert not torch.equal(done.model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("method", ["gptq", "awq", "hadamard+gptq"])
def test_methods_calibrate_on_data_in_memory(tiny, tmp_path, method):
    model, tokenizer = tiny
    texts = Path(SHORT_TEXT).read_text().split("\n\n")
    before = model(torch.arange(64)[None]).logits
    done = lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W8A16", group_size=32, method=method,
                           calib=texts, in_place=True, **SMALL)  # fmt: skip
    calibration = done.report.settings.calibration
    assert (calibration.name, calibration.samples, calibration.sequence_length) == ("list in memory", 4, 32)
    assert done.report.command is None
    # transforms rewrite norms and embeddings too, and all of it is in the model
    after = model(torch.arange(64)[None]).logits
    assert ((after - before).norm() / before.norm()).item() < 0.1


def test_tied_weights_stay_tied_and_one_is_written(tmp_path):
    model, tokenizer = opened(make_model(tmp_path / "model", tie_word_embeddings=True))
    done = lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16", in_place=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in lowbit.inspect(done.path).tensors
    assert done.report.source.notes == ()


def test_weights_that_training_untied_are_both_kept(tmp_path):
    model, tokenizer = opened(make_model(tmp_path / "model", tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    done = lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= lowbit.inspect(done.path).tensors.keys()
    assert any("both are kept" in note for note in done.report.source.notes)


def test_frozen_parameters_and_training_mode_change_nothing(tiny, tiny_llama, tmp_path):
    model, tokenizer = tiny
    model.train().requires_grad_(False)
    done = lowbit.quantize(model, tmp_path / "a", tokenizer=tokenizer, scheme="W4A16", in_place=True)
    theirs = lowbit.quantize(tiny_llama, tmp_path / "b", scheme="W4A16")
    assert (done.path / "model.safetensors").read_bytes() == (theirs.path / "model.safetensors").read_bytes()
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_wrappers_are_looked_through(tiny, tmp_path):
    done = lowbit.quantize(nn.DataParallel(tiny[0]), tmp_path / "out", tokenizer=tiny[1], scheme="W4A16")
    assert done.report.source.model == "LlamaForCausalLM in memory"


def test_blocks_that_were_compiled_are_looked_through(tiny, tmp_path):
    """As training loops compile them, one by one; nothing is compiled here, since nothing runs them."""
    model, tokenizer = tiny
    plain = lowbit.quantize(model, tmp_path / "plain", tokenizer=tokenizer, scheme="W4A16")
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(block)
    done = lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16", in_place=True)
    assert (done.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    kept = model.model.layers[1]._orig_mod.mlp.up_proj.weight
    assert torch.equal(kept, lowbit.inspect(done.path).read(name).bfloat16())


def test_a_bias_that_the_config_does_not_know_is_not_lost(tiny, tmp_path):
    """As fine-tuning scripts add one: the output would compute something else, and nothing would tell."""
    model, tokenizer = tiny
    linear = model.model.layers[0].mlp.up_proj
    linear.bias = nn.Parameter(torch.ones(linear.out_features))
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\.up_proj\.bias: the model computes with it"):
        lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")


def test_pruned_and_dynamically_quantized_models_are_refused(tiny, tmp_path):
    from torch.nn.utils import prune

    model, tokenizer = tiny
    other = copy.deepcopy(model).float()
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    with pytest.raises(CheckpointError, match="weight is no parameter of the model: something put others") as caught:
        lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")
    assert "prune.remove" in caught.value.hint
    dynamic = torch.ao.quantization.quantize_dynamic(other, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CheckpointError, match="is quantized already"):
        lowbit.quantize(dynamic, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_hooks_and_another_forward_are_said_not_to_be_in_the_output(tiny, tmp_path, how):
    model, tokenizer = tiny
    plain = lowbit.quantize(model, tmp_path / "plain", tokenizer=tokenizer, scheme="W4A16")
    mlp = model.model.layers[0].mlp
    if how == "hook":
        mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    else:
        mlp.forward = lambda hidden: hidden
    done = lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")
    assert (done.path / "model.safetensors").read_bytes() == (plain.path / "model.safetensors").read_bytes()
    (said,) = set(done.report.source.notes) - set(plain.report.source.notes)
    assert said.startswith("model.layers.0.mlp: hooks, or another forward")


def test_weights_that_two_layers_share_stay_shared_where_their_codes_agree(tiny):
    model, tokenizer = tiny
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    tied = model.config.tie_word_embeddings
    lowbit.quantize(model, tokenizer=tokenizer, scheme="W4A16")
    assert second.weight is first.weight
    assert model.config.tie_word_embeddings == tied
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(CheckpointError, match=r"layers\.1 is a module that stands in another place too"):
        lowbit.quantize(model, tokenizer=tokenizer, scheme="W4A16")


def test_a_flag_that_was_changed_after_tying_is_believed(tmp_path):
    model, tokenizer = opened(make_model(tmp_path / "model", tie_word_embeddings=True))
    model.config.tie_word_embeddings = False
    done = lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")
    stored = lowbit.inspect(done.path)
    assert torch.equal(stored.read("lm_head.weight"), stored.read("model.embed_tokens.weight"))


def test_the_tokenizer_of_where_the_model_was_loaded_from_is_noted(tiny, tmp_path):
    done = lowbit.quantize(tiny[0], tmp_path / "out", scheme="W4A16")
    assert any("which the model was loaded from" in note for note in done.report.source.notes)
    tiny[0].config.name_or_path = ""
    done = lowbit.quantize(tiny[0], tmp_path / "other", scheme="W4A16")
    assert any("there is no tokenizer" in note for note in done.report.source.notes)
    with pytest.raises(UsageError, match="there is no tokenizer"):
        lowbit.quantize(tiny[0], tmp_path / "third", scheme="W4A16", method="gptq", calib=["a text"])
    for make in (lowbit.quantize, lambda model, output, **how: lowbit.dry_run(model, output=output, **how)):
        with pytest.raises(UsageError, match="a GGUF file holds the tokenizer, and none was given") as caught:
            make(tiny[0], tmp_path / "m.gguf", scheme="Q8_0")
        assert caught.value.hint.startswith("give tokenizer=, or no_tokenizer=True")


def test_token_ids_need_no_tokenizer(tiny, tmp_path):
    tiny[0].config.name_or_path = ""
    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    done = lowbit.quantize(tiny[0], tmp_path / "out", scheme="W4A16", method="gptq", group_size=32, calib=ids)
    assert done.report.settings.calibration.samples == 4
    assert done.report.settings.calibration.sequence_length == 32


def test_a_folder_is_calibrated_on_data_in_memory_too(tiny_llama, tmp_path):
    text = Path(SHORT_TEXT).read_text()
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": text}))
    asked = {"scheme": "W4A16", "group_size": 32, "method": "gptq", **SMALL}
    one = lowbit.quantize(tiny_llama, tmp_path / "a", calib=[text], **asked)
    other = lowbit.quantize(tiny_llama, tmp_path / "b", calib=str(path), **asked)
    assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


def test_an_importance_matrix_is_measured_on_data_in_memory(tiny, tmp_path):
    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    done = lowbit.quantize(tiny[0], tmp_path / "a.gguf", tokenizer=tiny[1], scheme="Q4_0", imatrix="measure", calib=ids)
    assert done.report.settings.calibration.name == "Tensor in memory"
    plain = lowbit.quantize(tiny[0], tmp_path / "b.gguf", tokenizer=tiny[1], scheme="Q4_0")
    assert done.path.read_bytes() != plain.path.read_bytes()


def test_a_stopped_run_resumes_only_with_the_same_weights(tiny, tmp_path, monkeypatch):
    from lowbit.calibrate.one_block import CalibratedBlock

    ids = torch.randint(0, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    asked = {"tokenizer": tiny[1], "scheme": "W4A16", "group_size": 32, "method": "gptq", "calib": ids}
    whole = lowbit.quantize(tiny[0], tmp_path / "whole", **asked)
    done: list[int] = []
    calibrate = CalibratedBlock.calibrate

    def stops(block, store):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        calibrate(block, store)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedBlock, "calibrate", stops)
        with pytest.raises(KeyboardInterrupt):
            lowbit.quantize(tiny[0], tmp_path / "out", **asked)
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.raises(LowbitError, match="a tensor of LlamaForCausalLM in memory is not what it was"):
        lowbit.quantize(other, tmp_path / "out", run=RunOptions(resume=True), **asked)
    resumed = lowbit.quantize(tiny[0], tmp_path / "out", run=RunOptions(resume=True), **asked)
    assert (resumed.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()


def test_a_dry_run_plans_the_same(tiny, tiny_llama):
    texts = ["one", "two"]
    ours = lowbit.dry_run(tiny[0], tokenizer=tiny[1], scheme="W4A16", method="gptq", calib=texts).plan
    assert ours.file_bytes == lowbit.dry_run(tiny_llama, scheme="W4A16", method="gptq").plan.file_bytes
    gguf = lowbit.dry_run(tiny[0], tokenizer=tiny[1], output="x.gguf", scheme="Q4_0", imatrix="measure", calib=texts)
    assert gguf.plan.quantized
    with pytest.raises(UsageError, match="tokenizer is for a model in memory"):
        lowbit.dry_run(tiny_llama, tokenizer=tiny[1], scheme="W4A16")


def test_the_result_shows_itself_in_one_line(tiny, tmp_path):
    shown = repr(lowbit.quantize(tiny[0], tmp_path / "out", tokenizer=tiny[1], scheme="W4A16"))
    assert "\n" not in shown
    assert len(shown) - len(str(tmp_path)) < 160
    assert all(part in shown for part in ("W4A16 by rtn", "bits per weight", "loads in vllm"))


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "bitsandbytes"])
def test_loading_needs_no_other_package(tiny_llama, tmp_path, monkeypatch, format):
    scheme = "NF4" if format == "bitsandbytes" else "W4A16"
    done = lowbit.quantize(tiny_llama, tmp_path / "out", scheme=scheme, format=format)
    for package in ("compressed_tensors", "bitsandbytes", "accelerate", "gptqmodel", "optimum"):
        monkeypatch.setitem(sys.modules, package, None)
    assert lowbit.load(done.path)[0](torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.interop
def test_plain_transformers_loads_what_the_model_in_hand_became(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    done = lowbit.quantize(tiny[0], tmp_path / "out", tokenizer=tiny[1], scheme="W4A16", in_place=True)
    theirs = AutoModelForCausalLM.from_pretrained(done.path)
    assert torch.equal(theirs(torch.arange(8)[None]).logits, tiny[0](torch.arange(8)[None]).logits)


def test_the_environment_of_the_demo_has_what_plain_transformers_needs():
    """And the version that the interop tests run with."""
    root = Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (needed,) = extras["transformers"]
    assert needed in extras["interop"]
    rule = (root / "Makefile").read_text().partition("$(VENV)/.installed:")[2].partition("touch")[0]
    assert "--editable '.[transformers]'" in rule
    assert re.search(rf"^{needed.partition('>')[0]}==", (root / "constraints.txt").read_text(), flags=re.M)


def test_the_calls_are_listed():
    assert {"quantize", "load", "evaluate", "verify"} <= set(dir(lowbit))


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def quantized(model, tokenizer=None, **settings):
    return lowbit.quantize(model, tokenizer=tokenizer, **({"scheme": "W4A16"} | settings))


def test_a_model_on_the_meta_device(tiny):
    with pytest.raises(CheckpointError, match="is on the meta device"):
        quantized(tiny[0].to("meta"))


def test_an_offloaded_part(tiny):
    tiny[0].model.layers[1].to("meta")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..* is on the meta device"):
        quantized(tiny[0])


def test_a_model_that_is_quantized_already(tiny):
    tiny[0].config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UsageError, match=r"quantized already \(gptq\)"):
        quantized(tiny[0])


def test_weights_of_another_class_of_tensors(tiny):
    class Coded(torch.Tensor):
        pass

    weight = tiny[0].model.layers[0].mlp.up_proj.weight.detach().as_subclass(Coded)
    tiny[0].model.layers[0].mlp.up_proj._parameters["weight"] = weight
    with pytest.raises(CheckpointError, match="is a Coded, not a plain tensor"):
        quantized(tiny[0])


def test_linears_that_something_replaced(tiny):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    tiny[0].model.layers[0].mlp.up_proj.__class__ = Adapted
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj is Adapted, where LlamaForCausalLM has Linear"):
        quantized(tiny[0])


def test_parametrizations(tiny):
    class Twice(nn.Module):
        def forward(self, x):
            return x * 2

    parametrize.register_parametrization(tiny[0].model.layers[0].mlp.up_proj, "weight", Twice())
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj is Parametrized"):
        quantized(tiny[0])


def test_modules_that_were_added(tiny):
    tiny[0].model.layers[0].mlp.lora = nn.Linear(4, 4)
    with pytest.raises(CheckpointError, match=r"mlp\.lora is Linear, where LlamaForCausalLM has nothing"):
        quantized(tiny[0])


def test_norms_of_another_class_are_noted(tiny, tmp_path):
    class FusedNorm(type(tiny[0].model.norm)):
        pass

    tiny[0].model.norm.__class__ = FusedNorm
    done = quantized(tiny[0], tiny[1], output=tmp_path / "out")
    assert any("FusedNorm" in note for note in done.report.source.notes)


def test_a_config_of_another_size(tiny):
    tiny[0].config.intermediate_size = 64
    with pytest.raises(CheckpointError, match=r"shape \[192, 128\], config.json says \[64, 128\]"):
        quantized(tiny[0])


def test_nan_in_a_weight_leaves_the_model_as_it_was(tiny):
    with torch.no_grad():
        tiny[0].model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    before = values(tiny[0])
    with pytest.raises(LowbitError, match=r"LlamaForCausalLM in memory: tensor model\.layers\.1\.mlp\.down_proj"):
        quantized(tiny[0], tiny[1])
    after = values(tiny[0])
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda tiny, out: {"model": nn.Linear(4, 4)}, "model is a Linear"),
        (lambda tiny, out: {"model": tiny[0], "tokenizer": "gpt2"}, "tokenizer is gpt2; the object"),
        (lambda tiny, out: {"model": tiny[0], "in_place": False}, "neither an output nor"),
        (lambda tiny, out: {"model": str(out), "tokenizer": tiny[1]}, "tokenizer is for a model in memory"),
        (lambda tiny, out: {"model": str(out), "in_place": True}, "in_place is for a model in memory"),
        (lambda tiny, out: {"model": str(out)}, "no output was named"),
        (lambda tiny, out: {"model": tiny[0], "calib": ["a"]}, "--calib list in memory is read only by runs"),
        (lambda tiny, out: {"model": tiny[0], "method": "gptq", "calib": ["a"], "seed": 3}, "--seed 3 is read only"),
        (lambda tiny, out: {"model": tiny[0], "options": OpenOptions(revision="main")}, "read only for a Hugging Face"),
    ],
)  # fmt: skip
def test_calls_that_make_no_sense(tiny, tmp_path, given, said):
    with pytest.raises(UsageError, match=said):
        lowbit.quantize(**({"scheme": "W4A16"} | given(tiny, tmp_path)))


def test_nothing_is_left_behind(tiny, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LowbitError):
        quantized(tiny[0], tiny[1], method="gptq", calib=[])
    lowbit.quantize(tiny[0], tmp_path / "out", tokenizer=tiny[1], scheme="W4A16")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("lowbit-")] == []


def test_the_parameters_are_read_where_they_lie(tiny):
    source = model_in_memory(*tiny)
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.read(name, 3, 9).data_ptr() == tiny[0].model.layers[0].mlp.up_proj.weight[3].data_ptr()
    source.remove()
    assert not source.folder.exists()
