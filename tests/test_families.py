"""Every architecture, from a random model of two blocks through quantize, verify and transformers' own loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.architecture import canonical_view, discover_once, open_described
from lowbit.architecture.building import auto_class
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from models import ARCHITECTURES, make_model, make_tokenizer

IDS = torch.arange(24)[None] * 7 % 300 + 3
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
SEEING = {"gemma3": ("vision_tower.", "multi_modal_projector."), "qwen2_5_vl": ("visual.",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """architecture → (source, W4A16 of it); made once. float32, so that other decoders have nothing to round."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(architecture: str) -> tuple[Path, Path]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            source = make_model(folder / "source", architecture, dtype=torch.float32)
            lowbit.quantize(source, folder / "w4", scheme="W4A16", threads=1)
            made[architecture] = source, folder / "w4"
        return made[architecture]

    return make


def transformers_model(folder: Path, **options):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return auto_class(config).from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def opened(folder: Path):
    """(architecture, checkpoint under its names)"""
    checkpoint = open_checkpoint(str(folder))
    architecture = discover_once(checkpoint.config(), str(folder))
    return architecture, canonical_view(checkpoint, architecture)


@pytest.mark.sampled(2, shared=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_verifies_and_only_the_linears_of_the_decoder_are_quantized(models, architecture):
    _, quantized = models(architecture)
    assert lowbit.verify(quantized).broken == []
    known, checkpoint = opened(quantized)
    wanted = {f"{x.name}.weight" for x in known.linears.values() if x.block is not None and x.keep is None}
    assert checkpoint.schemes
    assert set(checkpoint.schemes) == wanted
    assert {len(known.blocks), len({known.block_of(name) for name in wanted})} == {2}


@pytest.mark.sampled(2, shared=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_else_survives_to_the_bit(models, architecture):
    """Biases, q/k norms, sinks, routers, embeddings and whatever else a family has."""
    source, quantized = (opened(folder)[1] for folder in models(architecture))
    assert set(source.tensors) == set(quantized.tensors)
    kept = [name for name in source.tensors if name not in quantized.schemes]
    assert len(kept) > 3
    for name in kept:
        assert torch.equal(source.read(name), quantized.read(name)), name


@pytest.mark.sampled(2, shared=True)
@pytest.mark.interop
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2"}))
def test_transformers_loads_it_and_computes_what_our_decoded_weights_give(models, architecture):
    from transformers import CompressedTensorsConfig

    _, quantized = models(architecture)
    theirs = transformers_model(quantized, quantization_config=CompressedTensorsConfig(dequantize=True))
    ours = logits(load_model(open_checkpoint(str(quantized))))
    assert torch.equal(ours, logits(theirs))
    assert ours.std() > 0.01


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss", *EXPERTS])
def test_decoded_weights_saved_plainly_give_the_same_logits_in_transformers(models, architecture, tmp_path):
    """Without compressed-tensors' decoder; for GPT-2 the only way, because transformers decodes no Conv1D."""
    _, quantized = models(architecture)
    known, checkpoint = opened(quantized)
    transposed = {f"{linear.name}.weight" for linear in known.linears.values() if linear.transposed}
    assert bool(transposed) == (architecture == "gpt2")
    plain = {}
    for name in checkpoint.tensors:
        value = checkpoint.read(name)
        plain[name] = value.t().contiguous() if name in transposed and name in checkpoint.schemes else value
    save(plain, checkpoint.config(), tmp_path)
    assert torch.equal(logits(load_model(checkpoint)), logits(transformers_model(tmp_path)))


def save(tensors: dict[str, torch.Tensor], config: dict, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    make_tokenizer(folder)
    return folder


@pytest.mark.sampled(3)
@pytest.mark.parametrize("architecture", [*EXPERTS, "gemma3", "qwen2_5_vl", "gpt_neox"])
def test_a_file_with_transformers_own_names_gives_the_same_bytes(models, architecture, tmp_path):
    """Fused 3-D experts, and the prefixes of vision-language models, as a saved state_dict has them."""
    source, quantized = models(architecture)
    model = transformers_model(source)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    assert set(state) != set(open_checkpoint(str(source)).tensors)
    folder = save(state, json.loads((source / "config.json").read_text()), tmp_path / "fused")
    assert torch.equal(logits(load_model(open_checkpoint(str(folder)))), logits(model))
    lowbit.quantize(folder, tmp_path / "w4", scheme="W4A16", threads=1)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "w4", quantized))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom"])
def test_a_file_without_the_prefix_of_the_base_model_gives_the_same_bytes(models, architecture, tmp_path):
    """GPT-2 and BLOOM on the hub: h.0.…, and masks that no model computes with any more."""
    source, quantized = models(architecture)
    state = {
        name.removeprefix("transformer."): value for name, value in load_file(source / "model.safetensors").items()
    }
    mask = torch.tril(torch.ones(8, 8)) if architecture == "gpt2" else None
    if mask is not None:
        state["h.0.attn.bias"] = mask
    folder = save(state, json.loads((source / "config.json").read_text()), tmp_path / "hub")
    assert torch.equal(logits(load_model(open_checkpoint(str(folder)))), logits(transformers_model(source)))
    lowbit.quantize(folder, tmp_path / "w4", scheme="W4A16", threads=1)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "w4", quantized))
    if mask is not None:
        assert torch.equal(found.pop("h.0.attn.bias"), mask)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", SEEING)
def test_the_vision_tower_stays_in_16_bits(models, architecture):
    _, quantized = models(architecture)
    seeing = {n: t for n, t in load_file(quantized / "model.safetensors").items() if n.startswith(SEEING[architecture])}
    assert len(seeing) > 10
    assert {tensor.dtype for tensor in seeing.values()} == {torch.float32}
    known, _ = opened(quantized)
    reported = json.loads((quantized / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name for name, linear in known.linears.items() if linear.block is None} <= set(reported)


@pytest.fixture
def with_mtp(models, tmp_path) -> Path:
    """A DeepSeek-V3 with a multi-token prediction block and the rotary buffers of old checkpoints."""
    source, _ = models("deepseek_v3")
    state = load_file(source / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): value + 1 for name, value in state.items() if ".layers.1." in name}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(128, 256)
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(16)
    return save({**state, **extra}, json.loads((source / "config.json").read_text()), tmp_path / "mtp")


def test_multi_token_prediction_blocks_and_rotary_buffers_survive(models, with_mtp, tmp_path):
    lowbit.quantize(with_mtp, tmp_path / "w4", scheme="W4A16", threads=1)
    found, source = load_file(tmp_path / "w4" / "model.safetensors"), load_file(with_mtp / "model.safetensors")
    extra = [name for name in source if "layers.2." in name or "rotary" in name]
    assert len(extra) == len(source) - len(load_file(models("deepseek_v3")[0] / "model.safetensors"))
    for name in extra:
        assert torch.equal(found[name], source[name]), name
    _, without = models("deepseek_v3")
    loaded = load_model(open_checkpoint(str(tmp_path / "w4")))
    assert torch.equal(logits(loaded), logits(load_model(open_checkpoint(str(without)))))


def test_blocks_that_config_json_does_not_announce_are_left_out_and_said_to_be(with_mtp):
    config = json.loads((with_mtp / "config.json").read_text())
    (with_mtp / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    checkpoint, _ = open_described(str(with_mtp), OpenOptions())
    assert not any(name.startswith("model.layers.2.") for name in checkpoint.tensors)
    assert any("beyond the 2 that config.json counts (num_hidden_layers)" in note for note in checkpoint.notes)


def test_the_embedding_of_tied_models_is_stored_once(models):
    for architecture in ("gemma2", "phi4", "gpt2", "gemma3"):
        names = load_file(models(architecture)[1] / "model.safetensors")
        assert not [name for name in names if "lm_head" in name]


def test_gpt_oss_keeps_its_experts_as_loaders_read_them(models):
    source, quantized = models("gpt_oss")
    stored, given = load_file(quantized / "model.safetensors"), load_file(source / "model.safetensors")
    experts = [name for name in given if ".experts." in name]
    assert len(experts) == 8
    assert all(torch.equal(stored[name], given[name]) for name in experts)


def test_decoded_weights_of_conv1d_are_written_as_its_class_has_them(tmp_path):
    """Square ones too, whose shape does not tell [K, N] from [N, K]; transformers loads what `convert` writes."""
    import transformers

    source = make_model(tmp_path / "source", "gpt2")
    lowbit.quantize(source, tmp_path / "quantized", scheme="W4A16", group_size=32)
    lowbit.convert(tmp_path / "quantized", tmp_path / "decoded", format="float")

    ours, _ = lowbit.load(tmp_path / "quantized", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.bfloat16)
    with torch.inference_mode():
        ids = torch.arange(3, 19)[None]
        assert torch.equal(ours(ids).logits, theirs.eval()(ids).logits)
