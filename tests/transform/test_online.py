"""hadamard-down: the input of down_proj rotated by the engine, from the method to what is written, read, simulated."""

from __future__ import annotations

import json

import pytest
import torch

import lowbit
from calibrate.calibrated import calibrated, files_of, write_text
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.transform_config import parse_transform_config
from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.evaluation import load_model
from lowbit.evaluation.activations import simulated_activations
from lowbit.methods import parse_method
from lowbit.numerics.activations import quantize_activation
from lowbit.numerics.hadamard import Rotation, make_rotation, sylvester
from lowbit.settings import RunOptions
from lowbit.tensors import LayerStats
from lowbit.transform.online import block_size
from lowbit.transform.rotate import rotated_stats
from models import make_model

IDS = torch.tensor([[5, 77, 130, 9, 201, 33, 250, 18, 64, 101, 3, 140]])
DOWN = "model.layers.1.mlp.down_proj"
R4 = {"type": "hadamard", "head_dim": 64, "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("online") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def rotated(model, text):
    """W4A4, rotated and GPTQ'd, with its report."""
    out = model.parent / "rotated"
    return out, calibrated(model, out, text, "hadamard-down+gptq", scheme="W4A4")


def logits_of(folder, simulated=False):
    checkpoint = open_checkpoint(folder)
    network = load_model(checkpoint)
    with torch.inference_mode():
        if not simulated:
            return network(input_ids=IDS).logits
        with simulated_activations(network, checkpoint.schemes, {}, checkpoint.rotations):
            return network(input_ids=IDS).logits


def state(folder, change) -> None:
    """Change the transform_config of a folder."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"] = change
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("rotation", [sylvester(16), make_rotation(24, 3), make_rotation(29, 1)])
def test_back_undoes_columns(rotation: Rotation):
    values = torch.randn(5, 3 * rotation.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(rotation.back(rotation.columns(values)), values)
    block = rotation.matrix()
    expected = values.unflatten(1, (3, -1)) @ block
    assert torch.allclose(rotation.columns(values), expected.flatten(1))


def test_statistics_of_rotated_inputs_with_means_and_weighed_tokens():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)) + 1

    def stats(values, weights=None):
        weighted = values if weights is None else values * weights.sqrt()[:, None]
        return LayerStats(len(values), values.abs().amax(0), values.square().mean(0), values.abs().mean(0),
                          weighted.t() @ weighted, mean=values.mean(0))  # fmt: skip

    weights = torch.rand(50, generator=torch.Generator().manual_seed(2))
    whole = stats(x)
    whole = LayerStats(**{**vars(whole), "weighted": {"down": (stats(x, weights),)}})
    turned, expected = rotated_stats(whole, sylvester(16)), stats(sylvester(16).columns(x))
    assert turned is not None
    assert torch.allclose(turned.hessian, expected.hessian, rtol=1e-4, atol=1e-3)
    assert torch.allclose(turned.mean, expected.mean, atol=1e-5)
    again = stats(sylvester(16).columns(x), weights)
    assert torch.allclose(turned.weighted["down"][0].hessian, again.hessian, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("columns", "size"), [(14336, 2048), (11008, 256), (1536, 512), (65536, 32768), (24, 8)])
def test_blocks_are_the_largest_power_of_two(columns, size):
    assert block_size(columns) == size


def test_the_method_and_its_alias():
    assert parse_method("rotate+r4+gptq").name == "rotate+hadamard-down+gptq"
    assert parse_method("hadamard-down").needs_text


def test_what_learns_in_the_models_own_basis_is_refused():
    with pytest.raises(UsageError, match="learns in the model's own basis"):
        parse_method("hadamard-down+sign-sgd")


def test_config_json_says_what_engines_have_to_do(rotated):
    out, report = rotated
    assert report.verification.ok is False  # W4A4 has no kernel
    assert [check.rule for check in report.verification.checks if not check.passed] == ["engine-limits"]
    stated = json.loads((out / "config.json").read_text())["quantization_config"]["transform_config"]
    (group,) = stated["config_groups"].values()
    assert (group["type"], group["head_dim"]) == ("hadamard", 64)
    assert [(a["location"], a["inverse"], a["targets"]) for a in group["apply"]] == [
        ("input", False, ["re:.*\\.down_proj$"]), ("weight_input", True, ["re:.*\\.down_proj$"])]  # fmt: skip
    notes = [entry for entry in report.transforms if entry.what == "hadamard-down"]
    assert [note.point for note in notes] == ["model.layers.0.mlp.down_proj", DOWN]
    assert "192 columns in blocks of 64" in notes[0].detail


def test_left_out_linears_are_left_out_of_the_targets(model, tmp_path, text):
    calibrated(model, tmp_path / "out", text, "hadamard-down+gptq", ignore=(r"\.0\.mlp\.down_proj$",))
    stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["transform_config"]
    assert stated["config_groups"]["R4"]["apply"][0]["targets"] == [DOWN]
    assert list(open_checkpoint(tmp_path / "out").rotations) == [f"{DOWN}.weight"]


def test_reading_takes_the_rotation_back_out(model, rotated):
    out, _ = rotated
    checkpoint, original = open_checkpoint(out), open_checkpoint(model)
    weight = original.read(f"{DOWN}.weight")
    error = (checkpoint.read(f"{DOWN}.weight") - weight).norm() / weight.norm()
    stored = checkpoint.read_quantized(f"{DOWN}.weight").decode()
    assert error < 0.15
    assert torch.equal(checkpoint.read(f"{DOWN}.weight", 7, 20), sylvester(64).back(stored)[7:20])
    assert (stored - weight).norm() / weight.norm() > 1


def test_simulation_rotates_before_it_rounds(rotated):
    """Against the engine's order of things: x V, rounded, times the stored weight."""
    out, _ = rotated
    checkpoint = open_checkpoint(out)
    network, name = load_model(checkpoint), f"{DOWN}.weight"
    spec, seen = checkpoint.schemes[name].activation, []
    hook = network.get_submodule(DOWN).register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    raw = []
    pre = network.get_submodule(DOWN).register_forward_pre_hook(lambda _m, args: raw.append(args[0]))
    with simulated_activations(network, {name: checkpoint.schemes[name]}, {}, checkpoint.rotations):
        network(input_ids=IDS)
    hook.remove(), pre.remove()
    matrix = torch.block_diag(*[sylvester(64).matrix().float()] * 3)
    expected = quantize_activation(raw[0] @ matrix, spec) @ checkpoint.read_quantized(name).decode().t()
    assert torch.allclose(seen[0][1], expected, atol=1e-4)


def test_a_hidden_outlier_is_what_it_is_for(tmp_path, text):
    """One channel of up_proj is 40 times the others: 4-bit activations of down_proj break, rotated ones do not."""
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "model", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for block in range(2):
        tensors[f"model.layers.{block}.mlp.up_proj.weight"][5] *= 40
        tensors[f"model.layers.{block}.mlp.down_proj.weight"][:, 5] /= 40
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain = logits_of(folder)
    errors = {}
    for method in ("gptq", "hadamard-down+gptq"):
        calibrated(folder, tmp_path / method, text, method, scheme="W4A4")
        errors[method] = (logits_of(tmp_path / method, simulated=True) - plain).square().mean()
    assert errors["hadamard-down+gptq"] < 0.8 * errors["gptq"]


@pytest.mark.parametrize("method", ["hadamard+rotate+gptq", "hadamard+rotate+hadamard-down+gptq"])
def test_a_rotated_stream_is_compared_with_a_rotated_one(tmp_path, text, method):
    """The unquantized stream stays rotated where `rotate` rewrote what `hadamard` had rotated."""
    folder = make_model(tmp_path / "model", dtype=torch.float32, tie_word_embeddings=False)
    plain = logits_of(folder)
    errors = []
    for each in ("gptq", method):
        calibrated(folder, tmp_path / each, text, each)
        errors.append((logits_of(tmp_path / each) - plain).square().mean())
    assert errors[1] < 1.3 * errors[0]


def test_rounding_to_nearest_and_static_scales(model, tmp_path, text):
    """Without a Hessian; and a static scale measured on the rotated input."""
    report = calibrated(model, tmp_path / "out", text, "hadamard-down", scheme="W8A8_STATIC", group_size=None)
    assert report.verification.ok
    checkpoint = open_checkpoint(tmp_path / "out")
    plain = calibrated(model, tmp_path / "plain", text, "rtn", scheme="W8A8_STATIC", group_size=None)
    assert plain.verification.ok
    own = open_checkpoint(tmp_path / "plain").input_scales
    scales = checkpoint.input_scales
    down = f"{DOWN}.weight"
    assert scales[down] != pytest.approx(own[down], rel=0.05)
    assert scales[down.replace("down", "up")] == pytest.approx(own[down.replace("down", "up")], rel=0.05)
    network = load_model(checkpoint)
    with simulated_activations(network, checkpoint.schemes, scales, checkpoint.rotations), torch.inference_mode():
        found = network(input_ids=IDS).logits
    assert (found - logits_of(model)).std() < 0.1 * found.std()


def test_a_resumed_run_writes_the_same_bytes(model, rotated, tmp_path, text, monkeypatch):
    from lowbit.calibrate.one_block import CalibratedBlock

    whole = files_of(rotated[0])
    calibrate, count = CalibratedBlock.calibrate, []

    def stops(self, store):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        calibrate(self, store)

    monkeypatch.setattr(CalibratedBlock, "calibrate", stops)
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, tmp_path / "out", text, "hadamard-down+gptq", scheme="W4A4")
    calibrated(model, tmp_path / "out", text, "hadamard-down+gptq", scheme="W4A4", run=RunOptions(resume=True))
    assert files_of(tmp_path / "out") == whole


def test_a_conversion_rounds_rotated_codes_anew_and_says_so(model, rotated, tmp_path):
    out, _ = rotated
    report = lowbit.convert(out, tmp_path / "again", format="compressed-tensors").report
    entry = next(entry for entry in report.tensors if entry.name == f"{DOWN}.weight")
    assert any("rotated columns" in note for note in entry.notes)
    other = next(entry for entry in report.tensors if entry.name == "model.layers.1.mlp.up_proj.weight")
    assert not any("requantized" in note for note in other.notes)
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["transform_config"] == {}
    lowbit.convert(out, tmp_path / "float", format="float")
    assert torch.allclose(logits_of(tmp_path / "float"), logits_of(out), atol=1e-4)


@pytest.mark.parametrize("target", [{"format": "gptq"}, {"format": "awq"}, {"scheme": "Q4_0"}, {"format": "modelopt"}])
def test_formats_without_a_place_for_it_are_refused(model, target):
    with pytest.raises(UsageError, match=r"hadamard-down .* the format \w+ cannot state one"):
        lowbit.dry_run(model, method="hadamard-down+gptq", **target)


@pytest.mark.parametrize(
    ("architecture", "changes", "why"),
    [("qwen3_moe", {}, "is an expert"), ("gpt2", {}, "Conv1D"), ("gpt_oss", {}, "experts are stored in one tensor"),
     ("llama", {"intermediate_size": 200}, "largest power of two is 8")],
)  # fmt: skip
def test_models_that_do_not_allow_it_are_refused(tmp_path, architecture, changes, why):
    folder = make_model(tmp_path / "model", architecture, **changes)
    with pytest.raises(UsageError, match=why):
        lowbit.dry_run(folder, scheme="W8A8", method="hadamard-down+gptq")


def grouped(**changes):
    return {"config_groups": {"R4": {**R4, **changes}}}


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"groups": {}}, "config_groups alone"),
        ({"config_groups": {"R4": 3}}, "a mapping"),
        (grouped(kind="x"), "no such key"),
        (grouped(type="cayley"), "one of hadamard"),
        (grouped(type="random-matrix"), "orthogonal"),
        (grouped(randomize=True), "permutation"),
        (grouped(head_dim=0), "positive number"),
        (grouped(apply={}) | {"x": 1}, "config_groups alone"),
        (grouped(apply=[{"targets": ["x"], "location": "middle"}]), "one of weight_input"),
        (grouped(apply=[{"targets": ["x"], "location": "output"}]), "rotated outputs"),
        (grouped(apply=[{"targets": 4, "location": "input"}]), "a list of names"),
        (grouped(apply=[{"targets": ["re:("], "location": "input"}]), "regular expression"),
        (grouped(apply=[{"targets": ["x"], "location": "input", "inverse": 1}]), "true or false"),
        (grouped(apply=[{"targets": ["re:.*self_attn$"], "location": "q_attn"}]), "the same rotation of both"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(stated, named):
    with pytest.raises(CheckpointError, match=named):
        parse_transform_config(stated)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (grouped(head_dim=50), "50 of transform R4 do not divide"),
        (grouped(head_dim=None), "size 192, which is no power of two"),
        (grouped(type="random-hadamard"), "is not in the files"),
        ({"config_groups": {"A": R4, "B": R4}}, "rotates the input of .* twice"),
        (grouped(apply=[{"targets": ["Linear"], "location": "input"}]), "lm_head may be one or not"),
    ],
)
def test_a_folder_whose_rotation_cannot_be_undone_is_not_opened(rotated, tmp_path, change, named):
    import shutil

    folder = shutil.copytree(rotated[0], tmp_path / "broken")
    state(folder, change)
    if "lm_head" in named:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = torch.zeros(384, 128)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LowbitError, match=named):
        open_checkpoint(folder)


def test_offline_rotations_and_those_of_attention_change_nothing(rotated):
    places = [{"targets": ["re:.*self_attn$"], "location": place} for place in ("q_attn", "k_cache")]
    folded = [{"targets": ["Embedding"], "location": "weight_output"}]
    read = parse_transform_config(grouped(apply=[*places, *folded]))
    assert read.attention
    assert read.of(DOWN) is None
    assert parse_transform_config({}).of(DOWN) is None


def test_engines_that_ignore_it_are_named(rotated):
    for engine in ("transformers", "sglang"):
        check = next(c for c in lowbit.verify(rotated[0], engine=engine).checks if c.rule == "no-transforms")
        assert not check.passed
        assert "does not read transform_config" in check.detail
        assert check.outcome == "misreads"
    checks = {c.rule: c for c in lowbit.verify(rotated[0], engine="vllm").checks}
    assert checks["engine-transforms"].passed
    assert "2 inputs rotated" in checks["engine-transforms"].detail
    assert checks["transforms"].passed


def test_verify_with_the_source_turns_it_too(model, text, tmp_path):
    calibrated(model, tmp_path / "out", text, "hadamard-down", scheme="W8A8", group_size=None)
    found = lowbit.verify(tmp_path / "out", source=open_checkpoint(model))
    assert found.ok, found.failed
    state(tmp_path / "out", {})
    assert "relative-error" in {
        check.rule for check in lowbit.verify(tmp_path / "out", source=open_checkpoint(model)).failed
    }


def test_the_names_of_the_papers():
    assert parse_method("r1+r2+r4+gptq") == parse_method("hadamard+rotate+hadamard-down+gptq")
    for name, word in (("r3", "quarot4"), ("atom", "spinquant"), ("omniquant", "sign-sgd")):
        with pytest.raises(UsageError, match=f"there is no method '{name}'") as caught:
            parse_method(f"{name}+gptq")
        assert word in caught.value.hint
    parse_method("awq+gptq+sign-sgd"), parse_method("spinquant+r4+gptq")  # what the hints take
