"""The i-quants: decoded as the gguf package does, encoded alike on every instruction set and better than llama.cpp."""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

from lowbit import kernels
from lowbit.kernels.choice import compiled
from lowbit.numerics.ggml import decode, encode, find_type, iquants
from lowbit.numerics.ggml.blocks import per_column
from lowbit.numerics.ggml.iquant_grids import grid

ISAS = kernels.available_isas()

# Relative weighted error, Σ importance·(x − x̂)² / Σ importance·x², of llama.cpp's ggml_quantize_chunk on the weights
# and the importance of `_recorded_case`.
LLAMA_CPP = {
    "IQ1_S": 0.215887,
    "IQ1_M": 0.149821,
    "IQ2_XXS": 0.095476,
    "IQ2_XS": 0.070143,
    "IQ2_S": 0.060754,
    "IQ3_XXS": 0.021988,
    "IQ3_S": 0.017102,
}
TYPES = list(LLAMA_CPP)


def _gguf_decode(name, blocks):
    with np.errstate(invalid="ignore"):
        decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(decoded.copy())


def _same(a, b):
    """Bit for bit; any NaN equals any other."""
    bits = [tensor.nan_to_num(0).view(torch.int32) for tensor in (a, b)]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*bits)


def _random_blocks(name, rows, count):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (rows, count * find_type(name).size), generator=generator, dtype=torch.uint8)


def _blocks_of_all_codes(name):
    """Blocks that hold every code of the type, at d = 0.25 and every sub-scale."""
    kind = find_type(name)
    blocks = iquants.unpack(kind, torch.zeros((1, kind.size), dtype=torch.uint8))
    bits = iquants._CODES[name]
    points = 2 if name == "IQ3_XXS" else 1
    every = torch.arange(1 << bits.point_bits)
    signs = torch.arange(1 << bits.sign_bits)
    codes = torch.cat([every * sum(1 << bits.point_bits * i for i in range(points)), signs << bits.point_bits * points])
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % blocks.codes.shape[1])).reshape(1, -1).int()
    count = codes.shape[1] // blocks.codes.shape[1]
    scales = torch.arange(count * blocks.stored["scale"].shape[1], dtype=torch.int32) % iquants._SEARCH[name].sub_scales
    stored = {"d": torch.full((1, count), 0.25, dtype=torch.float16), "scale": scales[None]}
    if "shift" in blocks.stored:
        stored["shift"] = torch.arange(count * 8, dtype=torch.int32)[None] % 2
    return iquants.pack(kind, iquants.Blocks(codes, blocks.scale, blocks.offset, stored)), codes


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TYPES)
def test_decodes_as_the_gguf_package_does(isa, name):
    every, _ = _blocks_of_all_codes(name)
    with kernels.use_isa(isa):
        for blocks in (every, _random_blocks(name, 3, 15)):
            assert _same(decode(name, blocks), _gguf_decode(name, blocks))


@pytest.mark.parametrize("name", TYPES)
def test_pack_undoes_unpack_and_decodes_scale_times_value(name):
    kind = find_type(name)
    blocks = _random_blocks(name, 3, 15)
    unpacked = iquants.unpack(kind, blocks)
    assert torch.equal(iquants.pack(kind, unpacked), blocks)
    every, codes = _blocks_of_all_codes(name)
    assert torch.equal(iquants.unpack(kind, every).codes, codes)
    values = iquants.value(kind, unpacked.codes)
    decoded = per_column(unpacked.scale, values.shape[1]) * values
    if unpacked.offset is not None:
        decoded = decoded + per_column(unpacked.offset, values.shape[1])
    assert _same(decoded, _gguf_decode(name, blocks))


def _hard_rows():
    torch.manual_seed(1)
    rows = {
        "normal": torch.randn(256) * 0.02,
        "heavy tails": torch.randn(256) ** 5,
        "zeros": torch.zeros(256),
        "constant": torch.full((256,), -0.1),
        "half zeros": torch.cat([torch.zeros(128), torch.randn(128)]),
        "subnormal": torch.randn(256) * 1e-41,
        "below every half": torch.randn(256) * 1e-10,
        "about the smallest half": torch.randn(256) * 3e-7,
        "huge": torch.randn(256) * 1e37,
        "one outlier": torch.nn.functional.one_hot(torch.tensor(70), 256).float() * 9 + 0.01,
        "ties": torch.randint(-3, 4, (256,)).float(),
    }
    return torch.stack(list(rows.values()))


def _importances():
    torch.manual_seed(2)
    some = torch.rand(256) ** 4
    some[:32] = 0
    some[100:110] = 0
    return {"none": None, "mixed": some, "zero": torch.zeros(256), "tiny": some * 1e-38, "huge": some * 1e38}


@pytest.mark.parametrize("importance", ["none", "mixed"])
@pytest.mark.parametrize("name", TYPES)
def test_every_instruction_set_makes_the_bytes_of_the_reference(name, importance):
    weight, weighed = _hard_rows(), _importances()[importance]
    expected = iquants.encode(find_type(name), weight, weighed)
    for isa in ISAS:
        if isa != "reference":
            with kernels.use_isa(isa):
                assert torch.equal(encode(name, weight, weighed), expected)
    assert decode(name, expected).isfinite().all()
    assert not decode(name, expected)[2].any(), "zeros stay zeros"


@pytest.mark.parametrize("name", TYPES)
def test_every_instruction_set_makes_the_same_bytes(name):
    torch.manual_seed(4)
    wide = torch.cat([_hard_rows(), torch.randn(11, 512)], dim=1)
    for importance in _importances().values():
        columns = None if importance is None else importance.repeat(3)
        results = []
        for isa in (isa for isa in ISAS if isa != "reference"):
            with kernels.use_isa(isa):
                results.append(encode(name, wide, columns))
                for dtype in (torch.bfloat16, torch.float16):
                    narrow = wide.clamp(-6e4, 6e4).to(dtype)
                    assert torch.equal(encode(name, narrow, columns), encode(name, narrow.float(), columns))
        assert all(torch.equal(result, results[0]) for result in results)
        if results:
            assert decode(name, results[0]).isfinite().all()


@pytest.mark.parametrize("name", TYPES)
def test_blocks_do_not_influence_each_other(name):
    weight, importance = _hard_rows(), _importances()["mixed"]
    together = encode(name, weight, importance)
    assert torch.equal(torch.cat([encode(name, row[None], importance) for row in weight]), together)


def _relative_error(weight, decoded, importance):
    weight, decoded, importance = weight.double(), decoded.double(), importance.double()
    return ((importance * (weight - decoded) ** 2).sum() / (importance * weight**2).sum()).item()


def _recorded_case():
    rng = np.random.default_rng(7)
    weight = (rng.standard_t(5, size=(16, 1024)) * 0.02).astype(np.float32)
    importance = rng.gamma(0.5, size=1024).astype(np.float32) + np.float32(0.01)
    return torch.from_numpy(weight), torch.from_numpy(importance)


@pytest.mark.skipif(kernels.isa() == "reference", reason="the reference makes the same bytes, slowly")
@pytest.mark.parametrize("name", TYPES)
def test_the_error_is_a_tenth_below_that_of_llama_cpp(name):
    weight, importance = _recorded_case()
    error = _relative_error(weight, decode(name, encode(name, weight, importance)), importance)
    assert error < 0.9 * LLAMA_CPP[name]


@pytest.mark.parametrize("name", TYPES)
def test_importance_is_heeded(name):
    weight, importance = _recorded_case()
    weight, importance = weight[:2, :512], importance[:512]
    weighed = _relative_error(weight, decode(name, encode(name, weight, importance)), importance)
    assert weighed < 0.97 * _relative_error(weight, decode(name, encode(name, weight)), importance)


@pytest.mark.parametrize("name", TYPES)
def test_rounding_to_the_scales_of_blocks_is_no_worse_than_their_codes(name):
    kind = find_type(name)
    weight, importance = _recorded_case()
    weight, importance = weight[:2, :512], importance[:512]
    blocks = iquants.unpack(kind, encode(name, weight, importance))
    rounded = iquants.pack(kind, blocks.with_codes(iquants.round(kind, weight, blocks, importance)))
    assert _relative_error(weight, decode(name, rounded), importance) <= (1 + 1e-5) * _relative_error(
        weight, decode(name, iquants.pack(kind, blocks)), importance
    )


@pytest.mark.parametrize("name", TYPES)
def test_rounding_finds_the_nearest_code_of_all(name):
    """Against every code there is, for single codes, with scales of both signs."""
    kind, code = find_type(name), iquants._CODES[name]
    torch.manual_seed(5)
    weight, importance = torch.randn(3, code.columns), torch.rand(code.columns) + 0.1
    scale = torch.tensor([[0.7], [-0.9], [1.3]]) / grid(name).float().square().mean().sqrt()
    offset = scale / 8 if name == "IQ1_S" else None
    params = iquants.Blocks(torch.empty((3, 0), dtype=torch.int32), scale, offset)
    found = iquants.round(kind, weight, params, importance)
    point_bits = code.point_bits * (code.columns // grid(name).shape[1])
    least = torch.full((3,), torch.inf)
    for row in range(3):
        natural = (weight[row] * scale[row] < 0).int()[: code.sign_bits]
        natural = int((natural << torch.arange(len(natural))).sum())
        signs = [natural] + [natural ^ 1 << bit for bit in range(code.sign_bits)]  # two flips are never better
        points = torch.arange(1 << point_bits, dtype=torch.int32)
        every = (points | torch.tensor(signs, dtype=torch.int32)[:, None] << point_bits).reshape(1, -1)
        decoded = scale[row] * iquants.value(kind, every).reshape(-1, code.columns)
        decoded = decoded + (offset[row] if offset is not None else 0)
        least[row] = (importance * (weight[row] - decoded) ** 2).sum(dim=1).amin()
    decoded = scale * iquants.value(kind, found) + (offset if offset is not None else 0)
    assert torch.allclose((importance * (weight - decoded) ** 2).sum(dim=1), least, rtol=1e-4)


@pytest.mark.skipif(kernels.isa() == "reference", reason="there are no compiled kernels here")
def test_the_core_refuses_a_grid_that_is_not_one():
    core = compiled(torch.device("cpu"))
    assert core is not None
    points, number = grid("IQ3_S"), find_type("IQ3_S").number
    core.set_ggml_grid(number, points)  # once more is fine
    for wrong in (points[:256], points.flip(0), points[:, :2]):
        with pytest.raises(ValueError, match="grid"):
            core.set_ggml_grid(number, wrong.contiguous())


@pytest.mark.skipif(kernels.isa() == "reference", reason="there are no compiled kernels here")
def test_the_core_says_so_when_it_has_no_grid():
    script = """
import numpy as np
from lowbit.kernels import _core
core = _core.Isa(_core.available_isas()[0])
core.ggml_decode(21, np.zeros((1, 110), np.uint8), np.zeros((1, 256), np.float32))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "RuntimeError: the grid of this ggml type has not been set" in process.stderr
