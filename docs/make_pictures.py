"""The pictures of docs/methods, drawn from what lowbit's own code does: `python docs/make_pictures.py [NAME …]`.

Each function of PICTURES makes one picture. Data are drawn from seeds or are lowbit's tables, so the same versions give
the same file; tests/test_docs_pictures.py draws them again and compares.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from drawing import Picture
from torch import Tensor

from lowbit.architecture.structure import Linear
from lowbit.kernels.tables import FP4, MINIFLOATS, NF4
from lowbit.kernels.tables import values as minifloat_values
from lowbit.numerics import ggml
from lowbit.numerics.ggml.codebooks import IQ4_VALUES
from lowbit.numerics.ggml.iquant_layout import grid as iquant_grid
from lowbit.numerics.ggml.types import TYPES
from lowbit.numerics.hadamard import make_rotation
from lowbit.numerics.scalar_grids import IntGrid, MinifloatGrid
from lowbit.report.axes import Axis
from lowbit.rounding.error import layer_error
from lowbit.rounding.gptq import GPTQOptions, gptq
from lowbit.rounding.hessian import InputData
from lowbit.rounding.hqq import hqq
from lowbit.rounding.sign_sgd import SignSGDOptions, sign_sgd_block
from lowbit.rounding.target import GridTarget, LinearSlot
from lowbit.schemes import WeightSpec
from lowbit.tensors import Granularity, GroupParams, LayerStats, RangeSearch
from lowbit.transform.block import BlockTensors
from lowbit.transform.facts import ScalingPoint
from lowbit.transform.loss import RoundingLoss
from lowbit.transform.smoothquant import smoothing_scales

FOLDER = Path(__file__).parent / "pictures"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int_target(bits: int, group_size: int, symmetric: bool = True, search: str = "absmax") -> GridTarget:
    """Groups of integers with scales that are not rounded."""
    spec = WeightSpec("int", bits, Granularity.GROUP, group_size, symmetric)
    return GridTarget(spec, IntGrid(bits, symmetric, "float32"), RangeSearch(search))  # type: ignore[arg-type]


def stats_of(x: Tensor) -> LayerStats:
    """What calibration would measure of inputs x [tokens, K]."""
    return LayerStats(len(x), x.abs().amax(0), x.square().mean(0), x.abs().mean(0), x.T @ x)


# ── round to nearest ──────────────────────────────────────────────────────────────────────────────────────────────────


def rtn_range() -> Picture:
    normal = random(64, 128, seed=1)
    heavy = random(64, 128, seed=2) / random(4, 64, 128, seed=3).square().mean(0).sqrt()  # Student's t, 4 degrees
    alone = normal.clone()
    alone[:, 5] = 6.0
    grid = IntGrid(4, True, "float32")
    percents = list(range(100, 34, -1))

    def curve(weight: Tensor) -> list[float]:
        high = weight.abs().amax(1, keepdim=True)
        tried = [grid.params_from_range(-high * p / 100, high * p / 100) for p in percents]
        errors = [grid.error(weight, params, 128, None).mean().item() for params in tried]
        return [error / errors[0] for error in errors]

    picture = Picture("Is it worth covering the largest weight?")
    panel = picture.panel(
        Axis(35, 103, (40, 50, 60, 70, 80, 90, 100), "share of the range that is kept, %"),
        Axis(0, 1.6, (0, 0.5, 1.0, 1.5), "squared error, 1 = all is covered"),
    )
    rows = []
    for kind, name, weight in (
        ("a", "normal weights", normal), ("b", "heavy tails", heavy), ("c", "normal, and one weight of 6 σ", alone),
    ):  # fmt: skip
        errors = curve(weight)
        panel.line(percents, errors, kind)
        best = min(range(len(errors)), key=errors.__getitem__)
        panel.dots([percents[best]], [errors[best]], kind)
        rows.append((kind, f"{name}: best at {percents[best]} %"))
    panel.legend(425, 70, rows)
    return picture


# ── GPTQ ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def correlated_inputs(columns: int, tokens: int, seed: int) -> Tensor:
    """[tokens, columns] with a spectrum that falls as 1 / k, turned so that all channels share it."""
    turn = torch.linalg.qr(random(columns, columns, seed=seed).double()).Q.float()
    return (random(tokens, columns, seed=seed + 1) / torch.arange(1, columns + 1).sqrt()) @ turn


def gptq_error() -> Picture:
    columns = 256
    weight, x = random(256, columns, seed=4), correlated_inputs(columns, 4096, seed=5)
    stats, target = stats_of(x), int_target(3, 128, search="mse")
    assert stats.hessian is not None
    hessian = stats.hessian.double()
    signal = ((weight.double() @ hessian) * weight.double()).sum()
    options = GPTQOptions(act_order=False, scales="static", weighting="none", correction=0.0, refine=0)
    delta_gptq = (weight - gptq(weight, target, InputData(stats), options).decoded).double()
    delta_rtn = (weight - target.nearest(weight).decoded).double()
    inverse = torch.linalg.inv(hessian)

    def with_columns_left(delta: Tensor, done: int) -> float:
        """Error once the first `done` columns are rounded and the others make up for them as well as they can."""
        first = delta[:, :done]
        return ((first @ torch.linalg.inv(inverse[:done, :done])) * first).sum().item() / signal.item()

    def as_it_is(delta: Tensor, done: int) -> float:
        first = delta[:, :done]
        return ((first @ hessian[:done, :done]) * first).sum().item() / signal.item()

    marks = list(range(0, columns + 1, 8))
    rtn_curve = [100 * as_it_is(delta_rtn, done) if done else 0.0 for done in marks]
    gptq_curve = [100 * with_columns_left(delta_gptq, done) if done else 0.0 for done in marks]
    end = 100 * layer_error(weight, weight - delta_gptq.float(), stats.hessian)
    top = math.ceil(max(rtn_curve))
    picture = Picture("The layer's error while its columns are rounded")
    panel = picture.panel(
        Axis(0, 320, (0, 64, 128, 192, 256), "columns rounded"),
        Axis(0, top, tuple(range(top + 1)), "error of the output, % of its energy"),
    )
    panel.line(marks, rtn_curve, "b")
    panel.line(marks, gptq_curve, "a")
    panel.name(256, rtn_curve[-1], f"nearest {rtn_curve[-1]:.1f} %", "b")
    panel.name(256, gptq_curve[-1], f"GPTQ {end:.1f} %", "a")
    return picture


# ── transforms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def outlier_block(
    rows: int, columns: int, outliers: int, factor: float, seed: int
) -> tuple[BlockTensors, ScalingPoint]:
    """A block of one norm and one linear, whose input has some channels `factor` times as strong as the others."""
    x = random(2048, columns, seed=seed)
    strong = torch.randperm(columns, generator=torch.Generator().manual_seed(seed + 1))[:outliers]
    x[:, strong] *= factor
    linear = Linear("linear", "up_proj", (rows, columns), block=0, reads="input", fed_by="norm")
    block = BlockTensors((linear,), {"linear.weight": random(rows, columns, seed=seed + 2)}, {"input": stats_of(x)})
    return block, ScalingPoint("norm", "norm", ("input",), (linear,))


def awq_alpha() -> Picture:
    block, point = outlier_block(256, 256, 6, 20.0, seed=7)
    target = int_target(4, 128)
    loss = RoundingLoss(
        block, point.readers, lambda _, weight, importance: target.nearest(weight, importance).decoded, 256
    )
    alphas = [step / 20 for step in range(21)]
    mean_abs = block.stats["input"].mean_abs
    plain = loss.at(None)
    errors = [loss.at(mean_abs.pow(alpha)) / plain for alpha in alphas]
    best = min(range(len(errors)), key=errors.__getitem__)
    picture = Picture("How much scaling?")
    panel = picture.panel(
        Axis(0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1.0), "α: scales are mean|x|^α"),
        Axis(0, 1.2, (0, 0.25, 0.5, 0.75, 1.0), "error of the output, 1 = no scaling"),
    )
    panel.line(alphas, errors, "a")
    panel.dots(alphas, errors, "a", 2.6)
    panel.dots([alphas[best]], [errors[best]], "b", 5)
    panel.name(alphas[best], errors[best], f"α = {alphas[best]:.2f}: {errors[best]:.2f}", "b", 0, 22, "middle")
    return picture


def smoothquant_channels() -> Picture:
    block, point = outlier_block(64, 96, 5, 30.0, seed=11)
    scales = smoothing_scales(block, point, 0.5)
    x, weight = block.stats["input"].absmax, block.tensors["linear.weight"].abs().amax(0)
    picture = Picture("Outliers move from activations into weights", height=386)
    for row, (state, factor) in enumerate((("before", torch.ones(96)), ("after, α = 0.5", scales))):
        for column, (what, values) in enumerate((("largest |x|", x / factor), ("largest |W|", weight * factor))):
            top = float(max(x.max() if column == 0 and row == 0 else values.max() * 1.15, 1.0))
            whole = 10 ** math.floor(math.log10(top))
            ticks = [
                tick for tick in (whole * step for step in range(0, 10, 1 if top / whole < 4 else 2)) if tick <= top
            ]
            panel = picture.panel(
                Axis(0, 96, (), "96 input channels" if row else ""),
                Axis(0, top, ticks, f"{what} {state}"),
                left=62 + 345 * column, top=70 + 152 * row, width=285, height=104,
            )  # fmt: skip
            panel.bars(values.tolist(), "b" if column == 0 else "a")
    return picture


def rotation_channels() -> Picture:
    x = random(1, 128, seed=13)
    x[0, [17, 60, 101]] = torch.tensor([22.0, -16.0, 12.0])
    turned = make_rotation(128, seed=0).columns(x)
    picture = Picture("One vector, before and after a Hadamard rotation")
    for column, (state, values, kind) in enumerate((("before", x, "b"), ("after", turned, "a"))):
        magnitudes = values.abs()[0]
        panel = picture.panel(
            Axis(0, 128, (), f"128 channels, {state}: largest {magnitudes.max():.1f}"),
            Axis(0, 24, (0, 6, 12, 18, 24), "|x|" if column == 0 else ""),
            left=62 + 345 * column, width=285,
        )  # fmt: skip
        panel.bars(magnitudes.tolist(), kind)
    return picture


# ── other roundings ───────────────────────────────────────────────────────────────────────────────────────────────────


def hqq_errors() -> Picture:
    weight = random(512, 512, seed=17) / random(5, 512, 512, seed=18).square().mean(0).sqrt()
    target = int_target(4, 64, symmetric=False)
    xs = torch.tensor([10 ** (-2 + 3 * step / 200) for step in range(201)])
    picture = Picture("Smaller errors for the many, larger ones for a few")
    panel = picture.panel(
        Axis(0.01, 10, (0.01, 0.1, 1, 10), "error, in units of the mean |w|", log=True),
        Axis(0.001, 100, (0.001, 0.01, 0.1, 1, 10, 100), "weights with a larger error, %", log=True),
    )
    for kind, decoded in (("b", target.nearest(weight).decoded), ("a", hqq(weight, target).decoded)):
        error = ((decoded - weight).abs() / weight.abs().mean()).flatten().sort().values
        above = 100 - 100 * torch.searchsorted(error, xs).double() / len(error)
        seen = above > 0.001
        panel.line(xs[seen].tolist(), above[seen].tolist(), kind)
    panel.legend(470, 78, (("b", "the range covers all"), ("a", "HQQ")))
    return picture


def sign_sgd_steps() -> Picture:
    linear = torch.nn.Linear(128, 128, bias=False)
    with torch.no_grad():
        linear.weight.copy_(random(128, 128, seed=19) / 8)
    x = correlated_inputs(128, 16 * 32, seed=20).reshape(16, 32, 128)
    wanted = (x @ linear.weight.detach().T).float()
    target = int_target(3, 64)

    def error(decoded: Tensor) -> float:
        return (x @ decoded.T - wanted).square().mean().item()

    start = error(target.nearest(linear.weight.detach()).decoded)
    counts = (0, 10, 25, 50, 100, 200, 400)
    found = [1.0]
    for count in counts[1:]:
        options = SignSGDOptions(iterations=count, bfloat16=False)
        slots = {"linear": LinearSlot(linear, target)}
        done = sign_sgd_block(linear, lambda module, values: module(values), x, wanted, slots, options)
        found.append(error(done["linear"].decoded) / start)
    picture = Picture("Learning which way to round")
    panel = picture.panel(
        Axis(0, 430, (0, 50, 100, 200, 400), "iterations of a run"),
        Axis(0, 1.1, (0, 0.25, 0.5, 0.75, 1.0), "error of the output, 1 = nearest"),
    )
    panel.line(counts, found, "a")
    panel.dots(counts, found, "a")
    for index in (3, 5):
        panel.name(counts[index], found[index], f"{found[index]:.2f}", "a", 0, -12, "middle")
    return picture


# ── number formats ────────────────────────────────────────────────────────────────────────────────────────────────────


def ggml_types() -> Picture:
    weight = random(64, 1024, seed=23)
    families = {"legacy": ("e", "legacy"), "k": ("a", "K-quants"), "codebook": ("b", "4-bit codebooks"),
                "i": ("c", "IQ lattices"), "ternary": ("d", "ternary")}  # fmt: skip
    picture = Picture("What a bit buys: every ggml type on the same weights", height=560)
    panel = picture.panel(
        Axis(1.3, 10, (1.5, 2, 3, 4, 5, 6, 8), "bits per weight, scales included", log=True),
        Axis(0.003, 0.8, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5), "error ÷ weights (rms)",
             ("0.5 %", "1 %", "2 %", "5 %", "10 %", "20 %", "50 %"), log=True),
    )  # fmt: skip
    points = []
    for kind in TYPES.values():
        if kind.family in families:
            decoded = ggml.decode(kind.name, ggml.encode(kind.name, weight))
            error = ((decoded - weight).square().mean() / weight.square().mean()).sqrt().item()
            points.append((kind.bits_per_weight, error, kind.name, families[kind.family][0]))
    for bits, error, name, colour in points:
        panel.dots([bits], [error], colour)
        dx, dy = NUDGED.get(name, (8, 4))
        panel.name(bits, error, name, colour, dx, dy, "end" if dx < 0 else "start")
    panel.legend(570, 80, tuple(families.values()))
    return picture


# Where labels of `ggml_types` stand that would cover another: pixels from the dot; negative: at its left.
NUDGED = {"IQ1_S": (-8, 4), "IQ1_M": (4, 18), "TQ1_0": (-6, -8), "TQ2_0": (8, -3), "IQ2_XXS": (-8, 8),
          "IQ2_XS": (8, 0), "IQ2_S": (-8, 8), "IQ3_XXS": (-8, 6), "IQ3_S": (-8, 8), "Q3_K": (8, 1), "IQ4_XS": (-8, 4),
          "IQ4_NL": (-8, 14), "Q4_K": (8, 16), "Q4_0": (8, -2), "NVFP4": (8, -12), "Q5_K": (-8, 8)}  # fmt: skip


def _number_line(picture: Picture, row: int, name: str, note: str, values: list[float], kind: str) -> None:
    """Values within −1 … 1 as ticks on a line."""
    height, left, width = 76 + 48 * row, 190, 490
    picture.words(20, height, name, f"name {kind}")
    picture.words(20, height + 15, note)
    picture.segment(left, height, left + width, height, "grid")
    for value in values:
        across = left + (value + 1) / 2 * width
        picture.segment(across, height - 11, across, height + 11, f"tick {kind}")


def four_bit_values() -> Picture:
    integers = [float(code) / 8 for code in range(-8, 8)]
    e2m1 = sorted({float(value) / 6 for value in minifloat_values(MINIFLOATS["e2m1"])})
    iq4 = [value / 127 for value in IQ4_VALUES]
    picture = Picture("Sixteen codes, five sets of values", height=340)
    for row, (name, note, values, kind) in enumerate((
        ("int4", "even steps (W4A16, Q4_0)", integers, "e"),
        ("E2M1", "NVFP4, MXFP4", e2m1, "b"),
        ("FP4", "bitsandbytes", sorted(set(FP4.values)), "d"),
        ("NF4", "quantiles of a normal", list(NF4.values), "a"),
        ("IQ4_NL", "llama.cpp", iq4, "c"),
    )):  # fmt: skip
        _number_line(picture, row, name, note, values, kind)
    for value in (-1, -0.5, 0, 0.5, 1):
        picture.words(190 + (value + 1) / 2 * 490, 318, f"{value:g}", anchor="middle")
    return picture


def iq2_patterns() -> Picture:
    points = iquant_grid("IQ2_XXS")
    picture = Picture("12 of the 256 patterns of eight magnitudes in IQ2_XXS", height=250)
    for place in range(12):
        left, base = 28 + 114 * (place % 6), 122 + 96 * (place // 6)
        for column, value in enumerate(points[place * 21 + 3].tolist()):
            picture.box(left + 11 * column, base - value * 1.45, 8, value * 1.45, "fill c", 1)
        picture.segment(left - 4, base, left + 90, base, "axis")
        picture.words(left + 43, base + 15, f"index {place * 21 + 3}", anchor="middle")
    return picture


def nf4_values() -> Picture:
    scale = 1 / 2.4  # 64 draws of a normal distribution have a largest magnitude of about 2.4 standard deviations
    xs = [-1.1 + 2.2 * step / 220 for step in range(221)]
    density = [math.exp(-((x / scale) ** 2) / 2) for x in xs]
    picture = Picture("NF4: values are dense where weights are")
    panel = picture.panel(
        Axis(-1.1, 1.1, (-1, -0.5, 0, 0.5, 1), "weight ÷ largest of its group"), Axis(0, 1.1, (), "how many weights")
    )
    panel.area(xs, density, "e")
    panel.line(xs, density, "e")
    for value in NF4.values:
        height = math.exp(-((value / scale) ** 2) / 2)
        (x1, y1), (x2, y2) = panel.at(value, 0), panel.at(value, height)
        picture.segment(x1, y1, x2, y2, "tick a")
        panel.dots([value], [height], "a", 3.4)
    return picture


def fp8_error() -> Picture:
    grids = {"INT8": (IntGrid(8, True, "float32"), "b"), "E4M3": (MinifloatGrid(MINIFLOATS["e4m3"], "float32"), "a"),
             "E5M2": (MinifloatGrid(MINIFLOATS["e5m2"], "float32"), "c")}  # fmt: skip
    octaves = [step / 4 for step in range(67)]
    within = 2 ** (torch.arange(64) / 64)  # an octave, evenly in the logarithm
    picture = Picture("Relative error, from the largest value of a group downwards")
    panel = picture.panel(
        Axis(0, 17, (0, 3, 6, 9, 12, 15), "size, as a share of the group's largest value", ("1", "1/8", "1/64", "1/512",
             "1/4096", "1/32768")),
        Axis(0.0008, 1.6, (0.001, 0.01, 0.1, 1), "relative error (rms)", ("0.1 %", "1 %", "10 %", "100 %"), log=True),
    )  # fmt: skip
    for name, (grid, kind) in grids.items():
        one = torch.ones(1, 1)
        scale: GroupParams = grid.params_from_range(-one, one)
        errors = []
        for octave in octaves:
            values = (2.0**-octave / within)[None]
            decoded = grid.decode(grid.round(values, scale, 64), scale, 64)
            errors.append(((decoded - values) / values).square().mean().sqrt().item())
        panel.line(octaves, errors, kind)
        at, dy = {"INT8": (20, -10), "E4M3": (40, 20), "E5M2": (48, -10)}[name]
        panel.name(
            octaves[at], errors[at], name, kind, -6 if name == "INT8" else 0, dy, "end" if name == "INT8" else "middle"
        )
    return picture


def kv_cache() -> Picture:
    from lowbit.architecture.shape import shape_of
    from lowbit.estimation.serving import cache_of

    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }  # fmt: skip
    contexts = [1024 * step for step in (0, 16, 32, 48, 64, 80, 96, 112, 128)]
    picture = Picture("Memory of one long conversation, Llama 3.1 8B")
    panel = picture.panel(
        Axis(0, 168, (0, 32, 64, 96, 128), "context, thousands of tokens (1024)"),
        Axis(0, 20, (0, 5, 10, 15, 20), "GB (10⁹ bytes)"),
    )
    thousands = [context / 1024 for context in contexts]
    for bits, name, kind in ((16, "cache, 16 bits", "b"), (8, "cache, FP8", "a")):
        per_token = cache_of(shape_of(config), kv_cache=bits).bytes_per_token()
        panel.line(thousands, [context * per_token / 1e9 for context in contexts], kind)
        panel.name(128, contexts[-1] * per_token / 1e9, name, kind)
    matrices = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    outer = 2 * 128256 * 4096
    for name, gigabytes, dy in (("weights, 16 bits", 2 * (matrices + outer) / 1e9, -7),
                                ("weights, W4A16", (matrices * 4.125 / 8 + 2 * outer) / 1e9, -7)):  # fmt: skip
        (x1, y), (x2, _) = panel.at(0, gigabytes), panel.at(128, gigabytes)
        picture.segment(x1, y, x2, y, "tick e")
        picture.words(x1 + 8, y + dy, f"{name}: {gigabytes:.1f} GB", "name e")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "rtn-range": rtn_range,
    "gptq": gptq_error,
    "awq": awq_alpha,
    "smoothquant": smoothquant_channels,
    "rotation": rotation_channels,
    "hqq": hqq_errors,
    "sign-sgd": sign_sgd_steps,
    "ggml-types": ggml_types,
    "four-bit-values": four_bit_values,
    "iq2-patterns": iq2_patterns,
    "nf4": nf4_values,
    "fp8-error": fp8_error,
    "kv-cache": kv_cache,
}


def main(names: list[str]) -> None:
    """Draw the named pictures, or all."""
    torch.set_num_threads(1)  # sums in one order
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        (FOLDER / f"{name}.svg").write_text(PICTURES[name]().text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
