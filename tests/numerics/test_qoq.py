"""Scales of two levels that are integers below one float per row (QoQ), so that int4 decodes to int8 exactly."""

from __future__ import annotations

import pytest
import torch

import lowbit
from calibrate.calibrated import calibrated, write_text
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import FormatError
from lowbit.numerics import grid_for
from lowbit.numerics.scales import row_steps
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData
from lowbit.rounding.target import GridTarget
from lowbit.schemes import SCHEMES
from lowbit.tensors import LayerStats, RangeSearch
from models import make_model

SPEC = SCHEMES["W4A8_QOQ"].with_group_size(32).weight


def target(method="absmax") -> GridTarget:
    return GridTarget(SPEC, grid_for(SPEC, "bfloat16"), RangeSearch(method))


def weights() -> torch.Tensor:
    """Rows of all magnitudes, an outlier, a group and a row of zeros."""
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-4, 3, 24)[:, None]
    weight[3, 40] = 30 * weight[3].abs().max()
    weight[5, 32:64] = 0
    weight[6] = 0
    return weight


def reference(row: torch.Tensor, group: int) -> tuple[torch.Tensor, float, list[int]]:
    """The paper's progressive quantization of one row, with a rounded step: (int8 values, step, m of each group)."""
    step = row.abs().max().item() / 119
    power = 2.0 ** (int(torch.tensor(step).log2().floor()) - 3)
    step = power * -(-step // power)  # four significant bits
    values, scales = [], []
    for part in row.split(group):
        scale = min(max(round(part.abs().max().item() / 7.5 / step), 1), 16)
        values.append((part / (scale * step)).round().clamp(-8, 7) * scale)
        scales.append(scale)
    return torch.cat(values), step, scales


def test_a_row_is_quantized_as_the_paper_has_it():
    weight = weights()
    stored = target().nearest(weight).stored
    for row in (0, 3, 11, 23):
        values, step, scales = reference(weight[row], 32)
        assert (stored.scale[row] / step).tolist() == scales
        torch.testing.assert_close(stored.decode()[row], values * step, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["absmax", "wmse"])
def test_codes_times_integers_are_int8_below_one_scale_per_row(method):
    weight = weights()
    stored = target(method).nearest(weight).stored
    steps = row_steps(weight.abs().amax(1, keepdim=True))
    multiples = stored.scale / steps
    assert torch.equal(multiples, multiples.round())
    assert multiples.min() >= 1
    assert multiples.max() <= 16
    eight = stored.codes.view(24, 3, 32) * multiples[:, :, None]
    assert eight.min() >= -128
    assert eight.max() <= 127
    assert torch.equal(eight.flatten(1) * steps, stored.decode())
    assert torch.equal(stored.scale.bfloat16().float(), stored.scale)
    assert torch.equal(stored.decode()[6], torch.zeros(96))


def test_weights_that_are_not_finite_stay_visible():
    weight = weights()
    weight[2, 7] = torch.nan
    assert not torch.isfinite(target().nearest(weight).decoded[2]).all()


def test_error_feedback_keeps_the_steps_of_whole_rows():
    weight, x = weights()[12:20], torch.randn(200, 96, generator=torch.Generator().manual_seed(1))
    x = x @ torch.randn(96, 96, generator=torch.Generator().manual_seed(2))
    hessian = x.T @ x
    stats = LayerStats(200, x.abs().amax(0), x.square().mean(0), x.abs().mean(0), hessian)
    rounded = gptq(weight, target(), InputData(stats), GPTQOptions())
    multiples = rounded.stored.scale / row_steps(weight.abs().amax(1, keepdim=True))
    assert torch.equal(multiples, multiples.round())

    def error(decoded):
        return ((decoded - weight) @ hessian * (decoded - weight)).sum()

    assert error(rounded.decoded) < 0.8 * error(target().nearest(weight).decoded)


@pytest.mark.parametrize("method", ["rtn", "gptq+distill", "sign-sgd"])
def test_a_folder_of_it_is_what_stock_loaders_read_as_w4a8(tmp_path, method):
    """Scales keep their two levels whatever else is learned; the scheme is in the values alone."""
    model, text = make_model(tmp_path / "model", dtype=torch.bfloat16), write_text(tmp_path)
    few = {"iterations": 3} if method == "sign-sgd" else {"distill_steps": 2} if "distill" in method else {}
    if method == "rtn":
        report = lowbit.quantize(model, tmp_path / "out", scheme="W4A8_QOQ", group_size=32).report
    else:
        report = calibrated(model, tmp_path / "out", text, method, scheme="W4A8_QOQ", **few)
    assert report.verification.ok
    written = open_checkpoint(tmp_path / "out")
    assert {scheme.name for scheme in written.schemes.values()} == {"W4A8"}
    for name in written.schemes:
        stored = written.read_quantized(name)
        ratio = stored.scale / stored.scale.amin(1, keepdim=True)  # of m's of one row
        whole = torch.stack([((ratio * m).round() - ratio * m).abs().amax(1) < 1e-4 for m in range(1, 17)])
        assert whole.any(0).all(), name


@pytest.mark.parametrize("format", ["gptq", "awq", "modelopt", "bitsandbytes"])
def test_other_formats_are_refused(tmp_path, format):
    with pytest.raises(FormatError):
        lowbit.dry_run(make_model(tmp_path / "model"), scheme="W4A8_QOQ", format=format)


def test_finetune_fits_its_scales_anew():
    from lowbit.train.fake_quantize import learns_scales

    assert not learns_scales(target())
