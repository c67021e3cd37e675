"""`lowbit.allocate`: rules that quantize takes, within the bytes, and refusals by name."""

from __future__ import annotations

import pytest

import lowbit
from lora import make_adapter
from lowbit.allocation.offers import rules_of
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import LowbitError
from lowbit.formats.gguf.raw import RawGGUF
from models import FITS_ALL, SHORT_TEXT, make_model

TEXT = {"calib": SHORT_TEXT, "samples": 2, "seqlen": 32}
TYPES = ("Q2_K", "Q4_K", "Q6_K")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("allocating") / "model", **FITS_ALL)


@pytest.fixture(scope="module")
def done(model):
    return lowbit.allocate(model, model.parent / "like.types", types=TYPES, **TEXT)


def types_in(file) -> dict[str, str]:
    return {tensor.name: tensor.type_name for tensor in RawGGUF(file).tensors}


def test_the_rules_make_the_file_that_was_planned(model, done, tmp_path):
    out = tmp_path / "x.gguf"
    lowbit.quantize(model, out, scheme="Q4_K_M", tensor_type_file=str(done.path))
    assert out.stat().st_size == done.file_bytes <= done.budget
    found = types_in(out)
    assert {name: found[name] for name in done.types} == done.types
    assert set(done.types.values()) <= {*TYPES, "Q4_K", "Q6_K"}


def test_it_costs_no_more_than_the_mix_of_the_file_type(done):
    assert done.before is not None
    assert 0 < done.cost <= done.before


def test_every_matrix_of_the_blocks_and_outside_is_chosen(model, done):
    matrices = {name for name, kind in types_in_plan(model).items() if kind not in ("F32", "BF16")}
    assert set(done.types) == matrices


def types_in_plan(model):
    plan = lowbit.dry_run(model, scheme="Q4_K_M", format="gguf").plan
    return {tensor.name: tensor.stored_as for tensor in plan.tensors}


def test_a_size_is_kept(model, done, tmp_path):
    sizes = [done.file_bytes * share // 100 for share in (90, 110)]
    runs = [lowbit.allocate(model, tmp_path / f"{size}.types", target_size=size, types=TYPES, **TEXT) for size in sizes]
    assert all(run.file_bytes <= size for run, size in zip(runs, sizes, strict=True))
    assert runs[0].cost > done.cost > runs[1].cost
    assert runs[0].before is None


def test_the_same_text_and_seed_choose_the_same_types(model, done, tmp_path):
    again = lowbit.allocate(model, tmp_path / "again.types", types=TYPES, **TEXT)
    assert again.path.read_text() == done.path.read_text()


def test_rows_that_no_block_divides_get_what_stands_for_a_type(tmp_path):
    model = make_model(tmp_path / "model")  # rows of 128 and 192
    done = lowbit.allocate(model, tmp_path / "x.types", types=("Q3_K", "Q4_K", "Q6_K"), **TEXT)
    assert set(done.types.values()) <= {"Q4_0", "Q5_0", "Q8_0", "Q4_1"}


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2", "phi4"])
def test_experts_tied_heads_and_fused_matrices(tmp_path, architecture):
    model = make_model(tmp_path / "model", architecture)
    done = lowbit.allocate(model, tmp_path / "x.types", like="Q5_K_M", **TEXT)
    out = tmp_path / "x.gguf"
    lowbit.quantize(model, out, scheme="Q5_K_M", tensor_type_file=str(done.path))
    assert out.stat().st_size == done.file_bytes <= done.budget
    assert all(cost >= 0 for cost in (done.cost, done.before or 0.0))


def test_a_gguf_file_is_allocated_too(model, tmp_path):
    lowbit.quantize(model, tmp_path / "f16.gguf", scheme="F16")
    done = lowbit.allocate(tmp_path / "f16.gguf", tmp_path / "x.types", types=TYPES, **TEXT)
    lowbit.quantize(tmp_path / "f16.gguf", tmp_path / "x.gguf", scheme="Q4_K_M", tensor_type_file=str(done.path))
    assert (tmp_path / "x.gguf").stat().st_size <= done.budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_size": 1000}, "nothing fits into 1 kB"),
        ({"target_size": 1000, "like": "Q4_K_M"}, "the bytes of a file type and a size were given"),
        ({"like": "Q4_Z"}, "there is no GGUF file type 'Q4_Z'"),
        ({"types": ["W4A16", "Q4_K"]}, "Q4_K"),
        ({"like": "Q4_K_M", "types": ["W4A16"]}, "Q4_K_M"),
        ({"types": ["Q4"]}, "Q4"),
        ({"types": []}, "there is no type to choose from"),
        ({"calib": "missing.txt"}, "missing.txt"),
        ({"samples": 0}, "samples"),
        ({"method": "gtpq"}, "gtpq"),
        ({"method": "rtn", "quality": "good"}, "--quality good stands for"),
        ({"target_size": 0}, "nothing fits into 0 B"),
        ({"like": "BF16"}, "BF16 quantizes nothing of it"),
        ({"group_size": 32}, "--group-size 32 is read only by folders"),
    ],
)
def test_what_cannot_be_done_is_refused(model, tmp_path, given, message):
    with pytest.raises(LowbitError, match=message):
        lowbit.allocate(model, tmp_path / "x.types", **{**TEXT, **given})
    assert not (tmp_path / "x.types").exists()


def test_matrices_that_lie_transposed_are_rounded_by_their_rows(tmp_path):
    """GPT-2's; and NVFP4 only where llama.cpp applies a scale of the whole matrix, which takes bytes too."""
    model = make_model(tmp_path / "model", "gpt2")
    done = lowbit.allocate(model, tmp_path / "x.types", types=("NVFP4", "Q8_0"), target_size=450_000, **TEXT)
    out = tmp_path / "x.gguf"
    lowbit.quantize(model, out, scheme=done.scheme, tensor_type_file=str(done.path))
    assert out.stat().st_size == done.file_bytes <= done.budget
    found = types_in(out)
    assert {name: found[name] for name in done.types} == done.types
    assert {done.types[f"blk.{index}.ffn_up.weight"] for index in (0, 1)} <= {"IQ4_NL", "Q8_0"}
    assert "NVFP4" in done.types.values()


def test_types_that_need_an_importance_matrix_are_used_with_one(model, tmp_path):
    """The command asks for it, and what the file then says of it is in the size; other types were not asked for."""
    done = lowbit.allocate(model, tmp_path / "x.types", types=("IQ2_XXS", "Q4_K"), target_size=300_000, **TEXT)
    assert set(done.types.values()) == {"IQ2_XXS", "Q4_K"}
    assert f"--imatrix measure --calib {SHORT_TEXT}" in done.command
    out = tmp_path / "x.gguf"
    lowbit.quantize(model, out, scheme=done.scheme, tensor_type_file=str(done.path), imatrix="measure", **TEXT)
    assert out.stat().st_size == done.file_bytes <= done.budget


@pytest.mark.parametrize("less", [0, 1, 96])
def test_the_smallest_mix_is_found_or_refused_by_name(model, tmp_path, less):
    """Tensors are aligned, and headers differ: what seems to fit may not."""
    smallest = tmp_path / "smallest.gguf"
    lowbit.quantize(model, smallest, scheme="Q4_K_M", pure=True)
    size = smallest.stat().st_size - less
    given = {"types": ("Q4_K", "Q8_0"), "target_size": size, **TEXT}
    if less:
        with pytest.raises(LowbitError, match="nothing fits"):
            lowbit.allocate(model, tmp_path / "x.types", **given)
    else:
        assert lowbit.allocate(model, tmp_path / "x.types", **given).file_bytes == size


def test_the_command_merges_the_adapter_too(model, tmp_path):
    adapter = make_adapter(tmp_path / "my adapter", model, "q_proj")
    done = lowbit.allocate(model, tmp_path / "x.types", types=TYPES, options=OpenOptions(adapter=str(adapter)), **TEXT)
    assert f"--adapter '{adapter}'" in done.command


def test_an_existing_file_is_replaced_only_on_request(model, done):
    with pytest.raises(LowbitError, match="exists"):
        lowbit.allocate(model, done.path, types=TYPES, **TEXT)


def test_the_model_itself_is_not_overwritten(model):
    with pytest.raises(LowbitError, match="the model itself"):
        lowbit.allocate(model, model, types=TYPES, overwrite=True, **TEXT)


def test_rules_join_the_blocks_of_one_type():
    types = {"token_embd.weight": "Q6_K", "blk.0.attn_q.weight": "Q4_K", "blk.2.attn_q.weight": "Q4_K",
             "blk.10.attn_q.weight": "Q5_K"}  # fmt: skip
    assert rules_of(types, "# about").splitlines() == [
        "# about", r"^token_embd\.weight$ = Q6_K", r"^blk\.(0|2)\.attn_q\.weight$ = Q4_K",
        r"^blk\.(10)\.attn_q\.weight$ = Q5_K",
    ]  # fmt: skip


def test_a_folder_gets_a_recipe(model, tmp_path):
    """Schemes, one for each fused set, within a size between that of all in 4 and all in 8 bits."""
    sizes = [lowbit.dry_run(model, scheme=scheme).plan.file_bytes for scheme in ("W4A16", "W8A16")]
    done = lowbit.allocate(model, tmp_path / "x.yaml", target_size=sum(sizes) // 2, types=("W4A16", "W8A16"), **TEXT)
    assert set(done.types.values()) == {"W4A16", "W8A16"}
    assert sizes[0] < done.file_bytes <= done.budget
    out = tmp_path / "out"
    report = lowbit.quantize(model, out, recipe=done.path).report
    found = {tensor.name: tensor.scheme for tensor in report.tensors if tensor.scheme in ("W4A16", "W8A16")}
    for name, scheme in done.types.items():
        members = [its for weight, its in found.items() if weight.startswith(name.rpartition(".")[0])]
        assert scheme in members
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == done.file_bytes


def test_the_group_size_is_in_the_recipe(model, tmp_path):
    done = lowbit.allocate(
        model, tmp_path / "x.yaml", target_size=800_000, types=("W4A16", "W8A16"), group_size=32, **TEXT
    )
    lowbit.quantize(model, tmp_path / "out", recipe=done.path)
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) == done.file_bytes


def test_experts_of_a_block_get_one_scheme(tmp_path):
    model = make_model(tmp_path / "model", "mixtral")
    low, high = (lowbit.dry_run(model, scheme=scheme).plan.file_bytes for scheme in ("W4A16", "W8A16"))
    done = lowbit.allocate(
        model, tmp_path / "x.yaml", target_size=low + (high - low) * 4 // 5, types=("W4A16", "W8A16"), **TEXT
    )
    experts = {name: scheme for name, scheme in done.types.items() if "experts" in name}
    assert sorted(experts.values()) == ["W4A16", "W8A16"]  # of two blocks
    assert r".experts\.\d+\.w1$" in done.path.read_text()
    lowbit.quantize(model, tmp_path / "out", recipe=done.path)  # refuses what mixes schemes in a block


def test_the_bytes_of_a_scheme_are_kept(model, tmp_path):
    done = lowbit.allocate(model, tmp_path / "x.yaml", like="W4A16", types=("W3A16", "W4A16", "W8A16"), **TEXT)
    assert done.file_bytes <= done.budget == lowbit.dry_run(model, scheme="W4A16").plan.file_bytes
    assert done.cost <= done.before


def test_a_method_that_calibrates_leaves_half_of_what_linears_cost(model, done, tmp_path):
    """So the embedding and the head, which are rounded to nearest, are worth more bytes; the command makes it so."""
    made = lowbit.allocate(model, tmp_path / "x.types", types=TYPES, method="gptq", **TEXT)
    assert made.before is not None
    assert done.before is not None
    assert done.before / 2 < made.before < done.before
    assert made.cost <= made.before
    assert "--method gptq" in made.command
    assert f"--calib {SHORT_TEXT}" in made.command
    assert made.made_by == "gptq"


def test_a_recipe_holds_the_level_of_quality(model, tmp_path):
    done = lowbit.allocate(model, tmp_path / "x.yaml", like="W4A16", types=("W3A16", "W4A16", "W8A16"), quality="good",
                           **TEXT)  # fmt: skip
    assert "quality: good" in done.path.read_text().splitlines()
    assert "--calib" in done.command
    plan = lowbit.dry_run(model, recipe=done.path, calib=SHORT_TEXT).plan
    assert plan.settings.method == "gptq"
    assert plan.file_bytes == done.file_bytes
