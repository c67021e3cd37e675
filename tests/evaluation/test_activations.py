"""Each scheme against a few lines of numpy-like torch, and against compressed-tensors' own simulation."""

import pytest
import torch
from torch import nn

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.activations import simulated_activations
from lowbit.numerics.activations import quantize_activation, quantize_llm_int8
from lowbit.numerics.column_scales import ColumnScales
from lowbit.schemes import SCHEMES, ActivationSpec

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
DYNAMIC_TENSOR = ActivationSpec("int", 8, "tensor")


def activations(columns: int = 256, seed: int = 0) -> torch.Tensor:
    """[2, 9, columns], some channels far larger, one token all zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, columns, generator=generator)
    x[..., ::37] *= 30
    x[1, 4] = 0
    return x


def spec_of(name: str) -> ActivationSpec:
    spec = SCHEMES[name].activation
    assert spec is not None
    return spec


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """By distance to every value; ties to the even code."""
    distance = (values.abs()[..., None] - E2M1).abs()
    distance = distance + 1e-9 * (torch.arange(8) % 2)
    return E2M1[distance.argmin(-1)] * values.sign()


def fp8(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def in_groups(x: torch.Tensor, g: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, g))


def test_int8_per_token():
    x = activations()
    scale = x.abs().amax(-1, keepdim=True) / 127
    expected = torch.nan_to_num((x / scale).round().clamp(-128, 127) * scale)
    assert torch.equal(quantize_activation(x, spec_of("W8A8")), expected)


def test_int4_per_token_uses_all_sixteen_codes():
    x = activations()
    scale = x.abs().amax(-1, keepdim=True) / 7.5
    codes = torch.nan_to_num((x / scale).round().clamp(-8, 7))
    assert codes.unique().tolist() == list(range(-8, 8))
    assert torch.equal(quantize_activation(x, spec_of("W4A4")), codes * scale)


def test_int4_per_group_covers_the_range_of_every_group():
    x = activations()
    x[0, 0] = x[0, 0].abs() + 1  # a range that is widened to hold 0
    groups = in_groups(x, 128)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(high > low, (high - low) / 15, 1.0)
    zero = (-8 - low / scale).round()
    expected = (((groups / scale).round() + zero).clamp(-8, 7) - zero) * scale
    assert torch.equal(quantize_activation(x, spec_of("W4A4_GROUP")), expected.flatten(-2))


def test_int8_with_zero_points_covers_a_range_that_is_off_centre():
    x = activations().abs() + 3
    found = quantize_activation(x, spec_of("W8A8_ASYM"))
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    assert ((found - x).abs() <= 0.51 * step).all()
    symmetric = quantize_activation(x, spec_of("W8A8"))
    assert (found - x).square().sum() < 0.5 * (symmetric - x).square().sum()


def test_int8_static_saturates_at_both_ends_of_the_codes():
    x = torch.tensor([[1.0, -1.26, 100.0, -100.0, 0.24]])
    assert quantize_activation(x, spec_of("W8A8_STATIC"), 0.5).tolist() == [[1.0, -1.5, 63.5, -64.0, 0.0]]


def test_int8_static_needs_its_scale():
    with pytest.raises(UsageError, match="scale that calibration stored"):
        quantize_activation(torch.ones(1, 4), spec_of("W8A8_STATIC"))


def test_int8_asymmetric_covers_the_range_of_every_token():
    x = activations() + 3
    x[0, 0] = 7.0  # no range at all
    spec = ActivationSpec("int", 8, "token", symmetric=False)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 255
    found = quantize_activation(x, spec)
    assert ((found - x).abs() <= step * 0.5001 + 1e-5).all()
    symmetric = quantize_activation(x, spec_of("W8A8"))
    assert (found - x).square().mean() < (symmetric - x).square().mean()


def test_static_asymmetric_activations_use_the_stored_zero_point():
    """Codes −128 … 127 with zero point −28 and scale 0.5 cover −50 … 77.5."""
    x = torch.tensor([[1.0, -1.26, 100.0, -100.0, 0.24, 77.6]])
    found = quantize_activation(x, spec_of("W8A8_STATIC_ASYM"), 0.5, -28)
    assert found.tolist() == [[1.0, -1.5, 77.5, -50.0, 0.0, 77.5]]


def test_static_asymmetric_equals_compressed_tensors():
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=8, type="int", symmetric=False, strategy="tensor"
    )
    x = activations() + 2
    scale, zero_point = 0.37, -17
    theirs = forward.fake_quantize(x, torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int8), args)
    ours = quantize_activation(x, spec_of("W8A8_STATIC_ASYM"), scale, zero_point)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("scale", "zero_point"), [(None, 3), (0.5, None)])
def test_static_asymmetric_needs_its_scale_and_its_zero_point(scale, zero_point):
    with pytest.raises(UsageError, match="that calibration stored"):
        quantize_activation(torch.ones(1, 4), spec_of("W8A8_STATIC_ASYM"), scale, zero_point)


def test_a_model_without_the_zero_point_of_an_input_is_refused():
    model, scheme = nn.Sequential(nn.Linear(4, 4)), SCHEMES["W8A8_STATIC_ASYM"]
    with (
        pytest.raises(CheckpointError, match=r"0\.weight: scheme W8A8_STATIC_ASYM needs a stored zero point"),
        simulated_activations(model, {"0.weight": scheme}, {"0.weight": 0.5}),
    ):
        pass
    x = torch.tensor([[-3.0, 0.1, 40.0, 90.0]])
    with simulated_activations(model, {"0.weight": scheme}, {"0.weight": 0.5}, zero_points={"0.weight": -100}):
        found = model(x)
    assert torch.equal(found, model(quantize_activation(x, spec_of("W8A8_STATIC_ASYM"), 0.5, -100)))


def test_asymmetric_floats_are_refused():
    spec = ActivationSpec("e4m3", 8, "group", group_size=4, symmetric=False)
    with pytest.raises(CheckpointError, match="asymmetric 8-bit e4m3 activations, per group"):
        quantize_activation(torch.ones(1, 4), spec)


def test_fp8_per_token():
    x = activations()
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    assert torch.equal(quantize_activation(x, spec_of("FP8_DYNAMIC")), fp8(x / scale) * scale)


def test_fp8_per_group_of_128():
    x = activations()
    groups = in_groups(x, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    assert torch.equal(quantize_activation(x, spec_of("FP8_BLOCK")), (fp8(groups / scale) * scale).flatten(-2))


def test_fp8_static_saturates():
    x = torch.tensor([[1.0, -3.0, 1000.0, -1000.0]])
    assert quantize_activation(x, spec_of("FP8"), 0.5).tolist() == [[1.0, -3.0, 224.0, -224.0]]


@pytest.mark.parametrize(("name", "emax", "limit"), [("MXFP4", 2, 6.0), ("MXFP8", 8, 448.0)])
def test_mx_takes_the_floor_of_the_specification(name, emax, limit):
    x = activations()
    groups = in_groups(x, 32)
    absmax = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(absmax > 0, 2.0 ** (torch.floor(torch.log2(absmax)) - emax), 1.0)
    scaled = (groups / scale).clamp(-limit, limit)
    codes = nearest_e2m1(scaled) if name == "MXFP4" else fp8(scaled)
    assert torch.equal(quantize_activation(x, spec_of(name)), (codes * scale).flatten(-2))


def test_mx_scale_of_a_power_of_two_and_of_its_neighbours():
    for absmax, scale in [(4.0, 1.0), (7.99, 1.0), (8.0, 2.0), (8 - 2**-21, 1.0)]:
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1] = absmax, 0.5 * scale
        assert quantize_activation(x, spec_of("MXFP4"))[0, 1] == 0.5 * scale
        assert quantize_activation(x, spec_of("MXFP4"))[0, 0] == min(round(absmax / 2 / scale) * 2, 6) * scale


def test_nvfp4_local():
    x = activations()
    global_scale = x.abs().max().item() / (6 * 448)
    groups = in_groups(x, 16)
    scale = fp8(groups.abs().amax(-1, keepdim=True) / (6 * torch.tensor(global_scale))) * global_scale
    codes = nearest_e2m1((groups / torch.where(scale > 0, scale, 1.0)).clamp(-6, 6))
    assert torch.equal(quantize_activation(x, spec_of("NVFP4"), global_scale), (codes * scale).flatten(-2))


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([ties, torch.tensor([4.0]), torch.zeros(24)])[None]  # absmax 5: scale 1
    assert quantize_activation(x, spec_of("MXFP4"))[0, :7].tolist() == [0, 1, 1, 2, 2, 4, 4]


def test_dynamic_per_tensor_has_one_scale():
    x = activations()
    scale = x.abs().max() / 127
    assert torch.equal(quantize_activation(x, DYNAMIC_TENSOR), (x / scale).round() * scale)


@pytest.mark.parametrize("name", [n for n, s in SCHEMES.items() if s.activation])
def test_zeros_stay_zeros_and_dtype_and_shape_stay(name):
    x = activations(576).to(torch.bfloat16)  # 576 = 4.5 groups of 128
    quantized = quantize_activation(x, spec_of(name), 0.02, 11)
    assert (quantized.dtype, quantized.shape) == (x.dtype, x.shape)
    assert torch.equal(quantized[1, 4], x[1, 4])
    assert quantized.isfinite().all()


@pytest.mark.parametrize("name", ["FP8", "NVFP4", "MXFP4", "MXFP8"])  # whose scales are stored or powers of two
def test_quantizing_twice_changes_nothing_more(name):
    once = quantize_activation(activations(), spec_of(name), 0.05)
    assert torch.equal(quantize_activation(once, spec_of(name), 0.05), once)


def test_a_static_scheme_needs_its_scale():
    with pytest.raises(UsageError, match="static"):
        quantize_activation(activations(), spec_of("FP8"))


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))


def test_hooks_quantize_the_inputs_and_go_away():
    model, x = two_layers(), activations(32)
    plain = model(x)
    with simulated_activations(model, {"0.weight": SCHEMES["W8A8"], "1.weight": SCHEMES["W4A16"]}, {}):
        inside = model(x)
    assert torch.equal(inside, model[1](model[0](quantize_activation(x, spec_of("W8A8")))))
    assert not torch.equal(inside, plain)
    assert torch.equal(model(x), plain)


def test_hooks_take_the_stored_scale():
    model, x = two_layers(), activations(32)
    with simulated_activations(model, {"0.weight": SCHEMES["FP8"]}, {"0.weight": 0.25}):
        assert torch.equal(model(x), model[1](model[0](quantize_activation(x, spec_of("FP8"), 0.25))))


def test_a_scheme_without_its_scale_or_layer_is_named():
    model = two_layers()
    schemes = {"0.weight": SCHEMES["W8A8"], "1.weight": SCHEMES["NVFP4"]}
    with (
        pytest.raises(CheckpointError, match=r"1\.weight: scheme NVFP4 needs a stored input scale"),
        simulated_activations(model, schemes, {}),
    ):
        pass
    assert not model[0]._forward_pre_hooks
    with (
        pytest.raises(CheckpointError, match="7 has an activation scheme"),
        simulated_activations(model, {"7.weight": SCHEMES["W8A8"]}, {}),
    ):
        pass


# What compressed-tensors simulates. `scale_like_ours` replaces its scale where its rule differs on purpose.


def foreign(name: str, x: torch.Tensor, global_scale: float | None = None, scale: torch.Tensor | None = None):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = quantization.preset_name_to_scheme(name, ["Linear"]).input_activations
    divisor = None if global_scale is None else torch.tensor([1 / global_scale])
    if scale is None:
        scale, _ = compute_dynamic_scales_and_zp(x, args, nn.Module(), divisor)
    return fake_quantize(x, scale, None, args, divisor)


@pytest.mark.interop
def test_fp8_per_token_equals_compressed_tensors():
    x = activations()
    assert torch.equal(quantize_activation(x, spec_of("FP8_DYNAMIC")), foreign("FP8_DYNAMIC", x))


@pytest.mark.interop
def test_fp8_per_group_equals_compressed_tensors():
    x = activations()
    assert torch.equal(quantize_activation(x, spec_of("FP8_BLOCK")), foreign("FP8_BLOCK", x))


@pytest.mark.interop
def test_fp8_static_equals_compressed_tensors():
    x = activations()
    expected = foreign("FP8", x, scale=torch.tensor([0.05]))
    assert torch.equal(quantize_activation(x, spec_of("FP8"), torch.tensor(0.05).item()), expected)


@pytest.mark.interop
def test_nvfp4_equals_compressed_tensors():
    x = activations()
    ours = quantize_activation(x, spec_of("NVFP4"), 2.0**-5)
    assert torch.equal(ours, foreign("NVFP4", x, global_scale=2.0**-5))


@pytest.mark.interop
@pytest.mark.parametrize("name", ["W4A4", "W4A4_GROUP"])
def test_int4_equals_compressed_tensors(name):
    """No engine has a kernel of int4 activations; transformers runs them through this package."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x, spec = activations(), spec_of(name)
    args = quantization.QuantizationArgs(
        num_bits=4, symmetric=spec.symmetric, strategy=spec.per, group_size=spec.group_size, dynamic=True
    )
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, nn.Module()), args)
    torch.testing.assert_close(quantize_activation(x, spec), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.interop
def test_int8_equals_compressed_tensors_given_our_scale():
    """Its scale is absmax / 127.5; vLLM's kernel, which we follow, divides by 127."""
    x = activations()
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert torch.equal(quantize_activation(x, spec_of("W8A8")), torch.nan_to_num(foreign("W8A8", x, scale=scale)))
    assert not torch.equal(quantize_activation(x, spec_of("W8A8")), foreign("W8A8", x))


@pytest.mark.interop
@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_mx_equals_compressed_tensors_below_mantissa_1_75(name):
    """From 1.75 on it takes the next power of two; the OCP specification, which we follow, takes the floor."""
    x = activations()
    absmax = in_groups(x, 32).abs().amax(-1)
    same_rule = torch.frexp(absmax).mantissa < 0.875
    ours, theirs = in_groups(quantize_activation(x, spec_of(name)), 32), in_groups(foreign(name, x), 32)
    assert torch.equal(ours[same_rule], theirs[same_rule])
    assert same_rule.any()
    assert not torch.equal(ours[~same_rule], theirs[~same_rule])


def mixtral_experts(block, x, chosen, weights, spec):
    """Ten lines for what a fused operation of transformers computes, with x̂ in front of both matrices."""
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate, up = (block.gate_up_proj[expert] @ quantize_activation(x[token], spec)).chunk(2)
            hidden = quantize_activation(torch.nn.functional.silu(gate) * up, spec)
            out[token] += weight * (block.down_proj[expert] @ hidden)
    return out


@torch.inference_mode()
def test_fused_experts_are_simulated_inside_the_operation():
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowbit.architecture import discover
    from models import config_of

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of("mixtral"))).eval()
    experts = [n for of in discover(config_of("mixtral"), "x").expert_sets.values() for n in of]
    block = model.model.layers[0].mlp.experts
    for parameter in block.parameters():
        parameter.normal_(0.0, 0.1)
    x, chosen, weights = torch.randn(5, 128), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    plain = block(x, chosen, weights)
    with simulated_activations(model, {f"{name}.weight": SCHEMES["W8A8"] for name in experts}, {}):
        inside = block(x, chosen, weights)
    expected = mixtral_experts(block, x, chosen, weights, SCHEMES["W8A8"].activation)
    assert torch.allclose(inside, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-4)
    assert torch.equal(block(x, chosen, weights), plain)


def test_what_cannot_be_simulated_in_fused_experts_is_named():
    from lowbit.architecture import build_without_weights, discover
    from lowbit.errors import ArchitectureError
    from models import config_of

    model = build_without_weights(config_of("mixtral"), "x")
    names = [f"{n}.weight" for n in next(iter(discover(config_of("mixtral"), "x").expert_sets.values()))]
    static = simulated_activations(model, dict.fromkeys(names, SCHEMES["FP8"]), dict.fromkeys(names, 0.1))
    with pytest.raises(CheckpointError, match="a scale per expert"), static:
        pass
    mixed = simulated_activations(model, dict.fromkeys(names, SCHEMES["W8A8"]) | {names[0]: SCHEMES["W4A8"]}, {})
    with pytest.raises(CheckpointError, match="different schemes"), mixed:
        pass
    model.set_experts_implementation("eager")
    block = model.model.layers[0].mlp.experts.to_empty(device="cpu")
    simulated = simulated_activations(model, dict.fromkeys(names, SCHEMES["W8A8"]), {})
    with pytest.raises(ArchitectureError, match="_apply_gate"), simulated:
        block(torch.zeros(3, 128), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))


def bitsandbytes_reference(x, threshold):
    """int8_vectorwise_quant and int8_mixed_scaled_mm, in their own words; x float16 [tokens, K] → x̂."""
    a = x.clone()
    outliers = a.abs() >= threshold
    columns = outliers.any(dim=0)
    a[outliers] = 0
    absmax = a.abs().amax(1).float()
    codes = torch.round(a * (127.0 / absmax[:, None])).to(torch.int8)
    codes[:, columns] = 0
    return torch.where(columns, x.float(), codes.float() * absmax[:, None] / 127)


def test_llm_int8_keeps_outlier_columns_of_the_batch():
    x = activations()[:, :4].reshape(-1, 256).half()
    found = quantize_llm_int8(x.float(), 6.0)
    assert torch.allclose(found, bitsandbytes_reference(x, 6.0), rtol=1e-6, atol=1e-6)
    kept = (x.abs() >= 6).any(0)
    assert 0 < kept.sum() < 30
    assert torch.equal(found[:, kept], x.float()[:, kept])
    assert not torch.equal(found[:, ~kept], x.float()[:, ~kept])


def test_llm_int8_without_a_threshold_rounds_every_column_and_zeros_stay():
    x = activations()
    found = quantize_llm_int8(x, 0.0)
    assert found[1, 4].abs().max() == 0
    scale = x.half().float().abs().amax(-1, keepdim=True) / 127
    assert ((found - x).abs() <= 0.51 * scale + 1e-3 * x.abs()).all()
    # a value that float16 makes 6 counts as one
    assert quantize_llm_int8(torch.tensor([[5.999, 1.003]]), 6.0)[0, 0] == torch.tensor(5.999)


def test_llm_int8_is_simulated_for_linears_of_the_scheme():
    linear = nn.Sequential(nn.Linear(256, 8))
    x = activations()
    plain = linear(x)
    with simulated_activations(linear, {"0.weight": SCHEMES["INT8"]}, {}, int8_threshold=6.0):
        rounded = linear(x)
    assert torch.allclose(rounded, linear(quantize_llm_int8(x, 6.0)))
    assert 0 < (rounded - plain).abs().max() < 0.1
    assert torch.equal(linear(x), plain)


def test_scaled_inputs_are_rounded_scaled():
    """pre_quant_scale: the engine rounds x p, and the model here has the weight of x."""
    scale = torch.tensor([0.25, 4.0, 1.0, 2.0])
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    model[0].weight.data = torch.eye(4)
    x = torch.tensor([[1.0, -1.26, 100.0, 0.24]])
    with simulated_activations(model, {"0.weight": SCHEMES["W8A8_STATIC"]}, {"0.weight": 0.5},
                               {"0.weight": ColumnScales(scale)}):  # fmt: skip
        found = model(x)
    expected = quantize_activation(x * scale, spec_of("W8A8_STATIC"), 0.5) / scale
    assert torch.equal(found, expected)
    assert not torch.equal(found, quantize_activation(x, spec_of("W8A8_STATIC"), 0.5))
