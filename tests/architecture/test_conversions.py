"""Parameters that transformers makes of other tensors than files have: found by its own operations, both ways."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate, ConversionOps, PermuteForRope

from lowbit.architecture import discover
from lowbit.architecture.conversions import Conversions, ConvertedGroup
from lowbit.architecture.describing import describe_checkpoint
from lowbit.architecture.disk_layout import disk_layout
from lowbit.architecture.in_memory import model_in_memory
from lowbit.architecture.loading import Loader, load_model
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.evaluation.activations import simulated_activations
from lowbit.schemes import SCHEMES
from tiny_types import build_tiny, make_tiny, tiny_config

# Joined q, k and v; rows permuted within heads; experts of text and images in one list; gate and up in turn; shards of
# an embedding. The convolution of olmo_hybrid and the prefix of qwen2_5_omni_thinker have tests of their own.
TYPES = ("molmo2", "kimi_k25", "ernie4_5_vl_moe", "inkling2_text", "qwen4_exp_text")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = make_tiny(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return folder


@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_come_out_of_the_files_as_transformers_saved_them(folders, model_type):
    folder = folders(model_type)
    checkpoint = SafetensorsCheckpoint(folder)
    loaded = load_model(checkpoint)
    expected = type(loaded).from_pretrained(folder, dtype=torch.float32).state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], values) for name, values in expected.items())
    _, view = describe_checkpoint(checkpoint)
    back = model_in_memory(loaded, dtype=torch.float32)
    assert set(back.tensors) == set(view.tensors) - set(Loader(checkpoint).architecture.tied)
    assert all(torch.equal(back.read(name), view.read(name).float()) for name in back.tensors)


def rewritten(folder, changed, target):
    """A copy of a model with other tensors."""
    save_file({name: values.contiguous() for name, values in changed.items()}, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return SafetensorsCheckpoint(target)


def test_names_with_the_prefix_of_the_hub_are_those_without(folders, tmp_path):
    folder = folders("qwen2_5_omni_thinker")
    state = load_file(folder / "model.safetensors")
    hub = rewritten(folder, {f"thinker.{name}": values for name, values in state.items()}, tmp_path)
    with_prefix, without = (describe_checkpoint(each)[1] for each in (hub, SafetensorsCheckpoint(folder)))
    assert set(with_prefix.tensors) == set(without.tensors) == set(hub.tensors)


def test_the_decoder_of_kimi_has_the_names_of_the_hub(folders, tmp_path):
    folder = folders("kimi_k25")
    state = load_file(folder / "model.safetensors")
    named = {name.replace("language_model.model.blocks.", "language_model.model.layers."): values
             for name, values in state.items()}  # fmt: skip
    assert named.keys() != state.keys()
    assert describe_checkpoint(SafetensorsCheckpoint(folder))[1].tensors.keys() == named.keys()
    assert rewritten(folder, named, tmp_path).tensors.keys() == named.keys()


def test_joined_tensors_may_be_cut_at_other_rows_than_transformers_cuts_them(folders, tmp_path):
    folder = folders("olmo_hybrid")
    state = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.linear_attn.{each}_conv1d.weight" for each in "qkv"]
    whole = torch.cat([state[name] for name in names])
    cut = rewritten(folder, state | dict(zip(names, whole.split((64, 64, 128)), strict=True)), tmp_path)
    assert [cut.tensors[name].shape[0] for name in names] != [state[name].shape[0] for name in names]
    assert torch.equal(load_model(cut).model.layers[0].linear_attn.conv1d.weight, whole.float())


def test_gradients_and_values_of_a_joined_matrix(folders):
    loader = Loader(SafetensorsCheckpoint(folders("molmo2")))
    loader.fill()
    name = "model.transformer.blocks.0.self_attn.att_proj.weight"
    attention = loader.model.model.language_model.layers[0].self_attn
    values = torch.arange(256 * 128.0).reshape(256, 128)
    loader.put({name: values})
    modules = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert torch.equal(torch.cat([module.weight for module in modules]), values)
    loader.watch([name])
    sum((module.weight * factor).sum() for factor, module in enumerate(modules, 1)).backward()
    gradient = loader.take_gradients([name])[name]
    assert gradient[:, 0].unique_consecutive(return_counts=True)[1].tolist() == [128, 64, 64]


def test_the_input_of_a_joined_matrix_is_rounded_in_every_module(folders):
    model = build_tiny("molmo2")
    schemes = {"model.transformer.blocks.0.self_attn.att_proj.weight": SCHEMES["W8A8"]}
    with simulated_activations(model, schemes, {}):
        hooked = {name for name, module in model.named_modules() if module._forward_pre_hooks}
    path = "model.language_model.layers.0.self_attn."
    assert hooked == {path + each for each in ("q_proj", "k_proj", "v_proj")}


def test_modules_of_a_joined_tensor_have_their_names_in_transformers():
    found = discover(tiny_config("step3p7").to_dict(), "x").loaded_names
    path = "model.vision_model.layers.0.self_attn."
    joined = found["vision_model.transformer.resblocks.0.attn.in_proj_weight"]
    assert set(joined) == {path + each for each in ("q_proj", "k_proj", "v_proj")}


class Backwards(ConversionOps):
    """An operation that transformers does not have: halves in another order."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (values,) = input_dict.values()
        return {target_patterns[0]: torch.cat(values[0].chunk(2)[::-1])}


class Doubled(ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (values,) = input_dict.values()
        return {target_patterns[0]: values[0] * 2 + 1}


def parts_of(operations, members, sources, targets, heads=2):
    model = SimpleNamespace(config=SimpleNamespace(num_attention_heads=heads))
    converter = SimpleNamespace(operations=operations, source_patterns=sources, target_patterns=targets)
    return Conversions(model).parts(ConvertedGroup(converter, f"x.{targets[0]}", members))


def stored_by(parts, values, name):
    """The stored tensor, put together of the parts in the parameters."""
    shape = next(part.shape_in(tuple(values[each].shape)) for each, found in parts.items() for part in found)
    stored = torch.full(shape, -1.0)
    for each, found in parts.items():
        for part in found:
            assert part.name == name
            part.of_stored(stored).copy_(part.of(values[each]))
    return stored


def test_an_operation_that_nobody_told_of_is_followed():
    parts = parts_of([Backwards()], [("a", "x.a", (8, 5))], ["a"], ["b"])
    values = torch.rand(8, 5)
    assert torch.equal(stored_by(parts, {"x.a": values}, "x.b"), torch.cat((values[4:], values[:4])))


def test_rows_permuted_in_heads_and_joined_with_others():
    operations = [PermuteForRope(permute_layer_names=["q"], inverse=True), Concatenate(0)]
    members = [("q", "x.q", (16, 3)), ("v", "x.v", (4, 3))]
    values = {"x.q": torch.rand(16, 3), "x.v": torch.rand(4, 3)}
    parts = parts_of(operations, members, ["q", "v"], ["qv"])
    turned = values["x.q"].reshape(2, 2, 4, 3).transpose(1, 2).reshape(16, 3)
    assert torch.equal(stored_by(parts, values, "x.qv"), torch.cat((turned, values["x.v"])))
    assert len(parts["x.q"]) == 4
    assert len(parts["x.v"]) == 1


def test_what_changes_values_has_no_parts():
    assert parts_of([Doubled()], [("a", "x.a", (8, 5))], ["a"], ["b"]) == {}


def test_groups_that_differ_in_names_alone_are_followed_once(monkeypatch):
    calls = []
    followed = Conversions._followed
    monkeypatch.setattr(Conversions, "_followed", lambda self, group: calls.append(group.key) or followed(self, group))
    assert all(placed.parts for placed in disk_layout(build_tiny("kimi_k25")).values())
    assert len(calls) == 4  # weights and biases of wqkv, gate and up, down: of two blocks each
