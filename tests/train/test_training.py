"""Fake quantization: the codes of the trained forward pass are those of the files, for every scheme and ggml type."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lowbit
from lowbit.architecture.building import auto_class
from lowbit.architecture.structure import Part
from lowbit.errors import CheckpointError, NonFiniteError, UsageError
from lowbit.export import default_format
from lowbit.numerics import ggml, grid_for
from lowbit.numerics.activations import fake_quantize_activation
from lowbit.rounding.target import GridTarget, ScaledBlocks
from lowbit.schemes import SCHEMES, is_gguf_name
from lowbit.tensors import QuantizedTensor, RangeSearch
from lowbit.train.fake_quantize import FakeQuantize, QuantizedPart, absmean_ternary
from models import SHORT_TEXT, SIZES, make_model

IDS = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))
FOLDERS = [name for name, scheme in SCHEMES.items() if default_format(scheme) == "compressed-tensors"]
GGML = [name for name, kind in ggml.TYPES.items() if kind.family != "plain" and is_gguf_name(name)] + ["NVFP4"]


def opened(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config, config.architectures).from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tiny(tiny_llama):
    return opened(tiny_llama)


def train(model, steps: int = 2, rate: float = 3e-3) -> list[float]:
    """Losses of a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_weights(model) -> dict[str, tuple]:
    """Linear → (codes and scales, the weight of the forward pass, in the model's dtype [N, K])."""
    training, found = model.lowbit_training, {}
    for linear, parameter in training.linears.items():
        owner, _, leaf = parameter.rpartition(".")
        held = model.get_submodule(owner).parametrizations[leaf]
        index = next(index for index, part in enumerate(held[0].parts) if part.linear == linear)
        weight = held[0].parts[index].of(getattr(model.get_submodule(owner), leaf).detach())
        found[linear] = ((held[0].parts[index].target.name, held[0].rounded(index, held.original)[0]), weight)
    return found


def decoded_of(stored) -> torch.Tensor:
    """Float32, by the types' own decoders."""
    name, stored = stored
    if isinstance(stored, QuantizedTensor):
        return stored.decode()
    blocks, scale = (stored.blocks, stored.scale) if isinstance(stored, ScaledBlocks) else (stored, 1.0)
    return ggml.decode(name, blocks) * scale


def check_exported(model, output, tokenizer, **how):
    """Codes, scales and weights of the files are those of the forward pass, bit for bit."""
    trained = trained_weights(model)
    done = lowbit.train.export(model, output, tokenizer=tokenizer, **how)
    stored = lowbit.inspect(done.path)
    for linear, (codes, weight) in trained.items():
        name = f"{linear}.weight"
        read = stored.read(name)
        assert torch.equal(read.to(weight.dtype), weight), linear
        assert torch.equal(read, decoded_of(codes)), linear
        if name in getattr(stored, "schemes", {}):
            read = stored.read_quantized(name)
            assert torch.equal(read.codes.short(), codes[1].codes.short()), linear
            assert torch.equal(read.scale, codes[1].scale), linear
    return done


def test_every_scheme_of_folders(tmp_path):
    """A block for each scheme."""
    folder = make_model(tmp_path / "model", num_hidden_layers=len(FOLDERS), intermediate_size=128, dtype=torch.float32)
    model, tokenizer = opened(folder)
    schemes = {rf"layers\.{index}\.": name for index, name in enumerate(FOLDERS)}
    lowbit.train.prepare(model, "W4A16", group_size=32, overrides=schemes, ignore=(r"(q|k|v|gate|up)_proj$",),
                         calib=SHORT_TEXT, samples=2, seqlen=32)  # fmt: skip
    before = trained_weights(model)
    train(model)
    for linear, (_, weight) in trained_weights(model).items():
        assert not torch.equal(weight, before[linear][1]), f"{linear} was not trained"
    done = check_exported(model, tmp_path / "out", tokenizer)
    chosen = {t.name.split(".")[2]: t.scheme for t in done.report.tensors if t.scheme}
    assert [chosen[str(index)] for index in range(len(FOLDERS))] == FOLDERS
    assert done.report.settings.method == "qat"


def test_every_ggml_type(tmp_path):
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": len(GGML),
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip
    folder = make_model(tmp_path / "model", ("llama", sizes), dtype=torch.float32)
    model, tokenizer = opened(folder)
    types = {rf"blk\.{index}\.(attn|ffn)_[a-z]+\.": name for index, name in enumerate(GGML)}
    ignored = (r"(attn_.*|ffn_gate|ffn_up)\.weight",)  # one linear of each type suffices
    lowbit.train.prepare(model, "Q8_0", overrides=types, ignore=ignored)
    train(model, steps=1)
    done = check_exported(model, tmp_path / "out.gguf", tokenizer)
    stored = {t.name: t.scheme for t in done.report.tensors}
    assert [stored[f"blk.{index}.ffn_down.weight"] for index in range(len(GGML))] == GGML


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("llama", {"scheme": "W4A16", "format": "gptq"}),
        ("llama", {"scheme": "W4A16_ASYM", "format": "awq"}),
        ("llama", {"scheme": "NVFP4A16", "format": "modelopt"}),
        ("llama", {"scheme": "NF4", "double_quant": True}),
        ("llama", {"scheme": "INT8"}),
        ("gpt2", {"scheme": "W4A16", "group_size": 32}),
        ("mixtral", {"scheme": "W8A16", "group_size": 32}),
        ("mixtral", {"scheme": "Q4_0"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_other_formats_and_kinds_of_models(tmp_path, kind, asked):
    model, tokenizer = opened(make_model(tmp_path / "model", kind, num_hidden_layers=1), torch.bfloat16)
    lowbit.train.prepare(model, **asked)
    train(model, steps=1)
    check_exported(model, tmp_path / f"out{'.gguf' if asked['scheme'] == 'Q4_0' else ''}", tokenizer)


def test_ternary_codes_are_absmean(tmp_path):
    """BitNet b1.58: one scale per matrix, the mean of |w|; TQ1_0 and TQ2_0 hold it."""
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model, tokenizer = opened(make_model(tmp_path / "model", ("llama", sizes)))
    lowbit.train.prepare(model, "TQ2_0")
    train(model)
    module = model.model.layers[0].mlp.up_proj
    raw, weight = module.parametrizations.weight.original.detach(), module.weight.detach()
    scale = raw.abs().mean().half().float()
    assert weight.unique().tolist() == [-scale.item(), 0.0, scale.item()]
    assert torch.equal(weight / scale, (raw / raw.abs().mean()).round().clamp(-1, 1))
    check_exported(model, tmp_path / "out.gguf", tokenizer)
    assert torch.equal(absmean_ternary(torch.zeros(2, 4)), torch.zeros(2, 4))


# ── gradients ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def fake(scheme: str, weight: torch.Tensor) -> FakeQuantize:
    spec = SCHEMES[scheme].weight if weight.shape[1] >= 128 else SCHEMES[scheme].with_group_size(8).weight
    return FakeQuantize(
        weight, [QuantizedPart("l", GridTarget(spec, grid_for(spec, "float32"), RangeSearch()), Part("l.weight"))]
    )


def test_the_gradients_are_those_of_lsq():
    """Esser et al. 2020, equation 3, with s = s0 · exp(θ) in float32 scales: written out."""
    weight = nn.Parameter(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        weight[0, 0] = 9.0  # beyond the range after the scale is made smaller
    one = fake("W4A16", weight)
    with torch.no_grad():
        one.changes["0"] -= 0.5
    g = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    out = one(weight)
    (out * g).sum().backward()
    scale = one.rounded(0, weight)[0].scale.repeat_interleave(8, dim=1)
    v = weight.detach() / scale
    inside = (v >= -8) & (v <= 7)
    assert not inside.all()
    of_scale = torch.where(inside, v.round() - v, v.clamp(-8, 7))  # ∂ŵ/∂s
    assert torch.equal(out.detach(), v.round().clamp(-8, 7) * scale)
    assert torch.allclose(weight.grad, g * inside)
    expected = (g * of_scale * scale).reshape(4, 2, 8).sum(2)  # ∂ŵ/∂θ = s · ∂ŵ/∂s
    assert torch.allclose(one.changes["0"].grad, expected, atol=1e-5)


def test_the_gradients_of_zero_points_are_those_of_lsq_plus():
    """Bhalgat et al. 2020: a code of the offset more moves what is beyond the range by −s, and nothing within it."""
    weight = nn.Parameter(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    one = fake("W4A16_ASYM", weight)
    with torch.no_grad():
        one.changes["0"] -= 0.5
        one.shifts["0"] += 2.2 / 15
    g = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    out = one(weight)
    (out * g).sum().backward()
    kept = one.rounded(0, weight)[0]
    scale, zero = (each.float().repeat_interleave(8, dim=1) for each in (kept.scale, kept.zero_point))
    assert torch.equal(kept.zero_point, (one.zero_point_0 + 2).clamp(-8, 7))
    v = weight.detach() / scale + zero
    inside = (v >= -8) & (v <= 7)
    assert not inside.all()
    assert torch.equal(out.detach(), ((v - zero).round() + zero).clamp(-8, 7).sub(zero) * scale)
    expected = (g * -scale * ~inside * 15).reshape(4, 2, 8).sum(2)
    assert torch.allclose(one.shifts["0"].grad, expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16", "FP8_BLOCK"])
def test_gradients_reach_weights_and_scales_of_other_grids(scheme):
    weight = nn.Parameter(torch.randn(130, 256, generator=torch.Generator().manual_seed(0)))
    spec = SCHEMES[scheme].weight
    target = GridTarget(spec, grid_for(spec, "float32"), RangeSearch()).with_range([weight.detach()])
    one = FakeQuantize(weight, [QuantizedPart("l", target, Part("l.weight"))])
    (one(weight) * torch.randn(130, 256, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.count_nonzero() > 0.9 * weight.numel()
    assert one.changes["0"].grad.count_nonzero() > 0


def test_activations_have_the_gradient_of_what_they_were():
    x = torch.randn(2, 3, 128, requires_grad=True)
    for name in ("W8A8", "W8A8_STATIC_ASYM", "FP8", "NVFP4", "MXFP8"):
        rounded = fake_quantize_activation(x, SCHEMES[name].activation)
        assert not torch.equal(rounded, x)
        assert (rounded - x).abs().max() < 0.6 * x.abs().max()
        assert torch.equal(torch.autograd.grad(rounded.sum(), x)[0], torch.ones_like(x))


def test_training_repairs_what_rounding_to_2_bits_broke(tiny):
    model, _ = tiny
    reference = copy.deepcopy(model)
    lowbit.train.prepare(model, "W2A16", group_size=32)
    with torch.no_grad():
        wanted = reference(IDS).logits
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = (model(IDS).logits - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_zero_points_that_were_learned_are_those_of_the_files(tiny, tmp_path, format):
    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16_ASYM", group_size=32, format=format)
    before = {linear: kept[1].zero_point.clone() for linear, (kept, _) in trained_weights(model).items()}
    with torch.no_grad():
        for name, each in model.named_parameters():
            if ".shifts." in name:
                each += torch.linspace(-0.2, 0.2, each.numel()).reshape(each.shape)
    moved = [kept[1].zero_point for kept, _ in trained_weights(model).values()]
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), moved, strict=True))
    check_exported(model, tmp_path / "out", tokenizer)


def test_learned_scales_move_and_fitted_ones_follow_the_weights(tiny):
    learned, fitted = tiny[0], copy.deepcopy(tiny[0])
    lowbit.train.prepare(learned, "W4A16", group_size=32)
    lowbit.train.prepare(fitted, "W4A16", group_size=32, learn_scales=False)
    train(learned), train(fitted)
    assert all(change.count_nonzero() for name, change in learned.named_parameters() if ".changes." in name)
    assert not any(".changes." in name for name, _ in fitted.named_parameters())


# ── trainers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_checkpointing_and_bfloat16(tiny_llama, tmp_path):
    model, tokenizer = opened(tiny_llama, torch.bfloat16)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for each in (model, plain):
        lowbit.train.prepare(each, "W4A16", group_size=32)
        train(each.train())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    check_exported(model, tmp_path / "out", tokenizer)


def test_distributed_data_parallel(tiny, tmp_path):
    from torch import distributed

    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16", group_size=32)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(wrapped)
        check_exported(model, tmp_path / "out", tokenizer)
        assert lowbit.train.export(wrapped, tmp_path / "same", tokenizer=tokenizer).path.is_dir()
    finally:
        distributed.destroy_process_group()


@pytest.mark.interop
def test_the_trainer_of_transformers(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16", group_size=32)
    before = trained_weights(model)
    arguments = TrainingArguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=2, save_steps=1,
                                  report_to=[], use_cpu=True, learning_rate=1e-3, disable_tqdm=True)  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(weight, before[linear][1]) for linear, (_, weight) in trained_weights(model).items())
    check_exported(trainer.model, tmp_path / "out", tokenizer)


@pytest.mark.interop
def test_sft_of_trl(tiny, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16", group_size=32)
    before = trained_weights(model)
    text = Path(SHORT_TEXT).read_text(encoding="utf-8")
    rows = datasets.Dataset.from_dict({"text": [text[start : start + 300] for start in range(0, 1200, 300)]})
    arguments = trl.SFTConfig(tmp_path / "run", max_steps=2, per_device_train_batch_size=2, max_length=32, bf16=False,
                              report_to=[], use_cpu=True, learning_rate=1e-3, disable_tqdm=True)  # fmt: skip
    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert any(not torch.equal(weight, before[linear][1]) for linear, (_, weight) in trained_weights(model).items())
    check_exported(trainer.model, tmp_path / "out", tokenizer)


@pytest.mark.interop
def test_optimizer_states_of_8_bits(tiny, tmp_path):
    """bitsandbytes keeps them; parameters of fewer than 4096 values stay in 32 bits."""
    optim = pytest.importorskip("bitsandbytes").optim
    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16", group_size=32)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    kept = {value.dtype for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)}
    assert torch.uint8 in kept
    assert losses[-1] < losses[0]
    check_exported(model, tmp_path / "out", tokenizer)


def test_a_state_is_saved_and_loaded(tiny, tmp_path):
    """What a trainer keeps holds the learned scales; a model that is prepared alike goes on from it."""
    model, again = tiny[0], copy.deepcopy(tiny[0])
    lowbit.train.prepare(model, "W4A16", group_size=32)
    train(model)
    lowbit.train.prepare(again, "W4A16", group_size=32)
    again.load_state_dict(model.state_dict())
    ours, theirs = trained_weights(model), trained_weights(again)
    assert all(torch.equal(ours[linear][1], theirs[linear][1]) for linear in ours)


def test_remove_leaves_a_plain_model_with_the_decoded_weights(tiny):
    model = tiny[0]
    kinds = {name: type(module) for name, module in model.named_modules()}
    lowbit.train.prepare(model, "W8A8")
    train(model)
    weights = {linear: weight for linear, (_, weight) in trained_weights(model).items()}
    lowbit.train.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(torch.equal(model.get_submodule(linear).weight, weight) for linear, weight in weights.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert lowbit.train.prepare(model, "W4A16") is model


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_was_nan_is_named_by_the_linear_it_reached(tiny, tmp_path):
    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.parametrizations.weight.original[0, 0] = torch.nan
    for call in (lambda: model(IDS), lambda: lowbit.train.export(model, tmp_path / "out", tokenizer=tokenizer)):
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or inf"):
            call()
    assert not (tmp_path / "out").exists()


def test_frozen_parameters(tiny, tmp_path):
    model, tokenizer = tiny
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="every parameter of the model is frozen"):
        lowbit.train.prepare(model, "W4A16")
    model.model.layers[0].requires_grad_(True)
    lowbit.train.prepare(model, "W4A16", group_size=32)
    held = model.model.layers[1].mlp.up_proj.parametrizations.weight
    start = held.original.clone()
    train(model)
    assert torch.equal(held.original, start)
    check_exported(model, tmp_path / "out", tokenizer)


def test_tied_weights(tmp_path):
    model, tokenizer = opened(make_model(tmp_path / "model", tie_word_embeddings=True))
    lowbit.train.prepare(model, "W4A16", group_size=32)
    train(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    done = check_exported(model, tmp_path / "out", tokenizer)
    stored = lowbit.inspect(done.path)
    assert "lm_head.weight" not in stored.tensors
    assert torch.equal(stored.read("model.embed_tokens.weight"), model.lm_head.weight)


def test_a_model_that_is_prepared_or_quantized_already(tiny, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(UsageError, match="is not prepared"):
        lowbit.train.export(model, tmp_path / "out", tokenizer=tokenizer)
    lowbit.train.prepare(model, "W4A16")
    with pytest.raises(UsageError, match="prepared already"):
        lowbit.train.prepare(model, "W4A16")
    with pytest.raises(UsageError, match="prepared for training"):
        lowbit.quantize(model, tmp_path / "out", tokenizer=tokenizer, scheme="W4A16")
    lowbit.train.remove(model)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UsageError, match="quantized already"):
        lowbit.train.prepare(model, "W4A16")


def test_a_model_on_the_meta_device(tiny):
    with pytest.raises(CheckpointError, match="meta device"):
        lowbit.train.prepare(tiny[0].to("meta"), "W4A16")


def test_a_model_that_cannot_be_prepared_stays_as_it_was(tmp_path):
    """Experts run in one operation, whose inputs no hook sees; and a weight that is damaged already."""
    model, _ = opened(make_model(tmp_path / "model", "mixtral", num_hidden_layers=1))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match="runs inside a fused operation"):
        lowbit.train.prepare(model, "W8A8")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="o_proj"):
        lowbit.train.prepare(model, "W8A8", activations=False)
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model, "lowbit_training")


def test_modules_that_a_trainer_replaced(tiny, tmp_path):
    model, tokenizer = tiny
    lowbit.train.prepare(model, "W4A16")
    model.model.layers[0].mlp.up_proj = nn.Linear(128, 192, bias=False)
    with pytest.raises(CheckpointError, match=r"up_proj is a Linear without fake quantization: something replaced it"):
        lowbit.train.export(model, tmp_path / "out", tokenizer=tokenizer)
    parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    with pytest.raises(CheckpointError, match="something replaced it"):
        lowbit.train.export(model, tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("setting", [{"method": "gptq"}, {"imatrix": "measure"}])
def test_settings_of_runs_with_a_text(tiny, setting):
    with pytest.raises(UsageError, match="not read by a training"):
        lowbit.train.prepare(tiny[0], "W4A16", **setting)


def test_an_output_of_the_wrong_name(tiny, tmp_path):
    lowbit.train.prepare(tiny[0], "Q4_0")
    with pytest.raises(UsageError, match="is written as one GGUF file"):
        lowbit.train.export(tiny[0], tmp_path / "out", tokenizer=tiny[1])
