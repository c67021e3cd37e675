"""The file of a vision tower: names, layouts, types and key-values; what is refused, and by which name."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import gguf
import pytest
import torch
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES, Keys
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.api import dry_convert
from lowbit.checkpoint import open_safetensors
from lowbit.errors import ArchitectureError, CheckpointError, LowbitError, UsageError
from lowbit.formats.gguf.mmproj.table import TOWERS
from lowbit.formats.gguf.raw import open_raw_gguf
from models import make_model
from vision_models import CASES, SPECIAL, make_vision

V = Keys.ClipVision


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("vision")
    return {case: make_vision(base / case, case) for case in CASES}


def written(folder: Path, output: Path, scheme: str = "F32") -> dict[str, torch.Tensor]:
    """Tensors of the file, decoded by the gguf package; float32."""
    lowbit.quantize(folder, output, mmproj=True, scheme=scheme)
    reader = gguf.GGUFReader(output)
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }


def source_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}


# SHA-256 over names, types, shapes and bytes of all tensors, sorted by name. llama.cpp's convert_hf_to_gguf.py --mmproj
# writes the same bytes of the same folders, but for v.token_embd.img_break, which it leaves out of these names.
GOLDEN = {
    "qwen2_vl": "a25df845bef2e206", "qwen2_5_vl": "ab581054476e73ff", "qwen3_vl": "dc68203736191bfd",
    "qwen3_vl_moe": "6ac794a56dba13be", "qwen3_5": "3e550f97addd2037", "gemma3": "326a9076d95ef894",
    "idefics3": "643527e405dccb9f", "smolvlm": "643527e405dccb9f", "pixtral": "feba7724db69af53",
    "mistral3": "0632e5e5bfe88dd3",
}  # fmt: skip


def digest(path: Path) -> str:
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        shape = ",".join(str(int(size)) for size in tensor.shape)
        found.update(f"{tensor.name} {tensor.tensor_type.name} {shape}\n".encode())
        found.update(tensor.data.tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_llama_cpps_converter(folders, case, tmp_path):
    lowbit.quantize(folders[case], tmp_path / "mmproj.gguf", mmproj=True)
    assert digest(tmp_path / "mmproj.gguf") == GOLDEN[case]


def test_frames_and_thirds_of_qwen2_vl(folders, tmp_path):
    ours, theirs = written(folders["qwen2_vl"], tmp_path / "mmproj.gguf"), source_of(folders["qwen2_vl"])
    patches = theirs["visual.patch_embed.proj.weight"]
    assert torch.equal(ours["v.patch_embd.weight"], patches[:, :, 0])
    assert torch.equal(ours["v.patch_embd.weight.1"], patches[:, :, 1])
    for suffix in ("weight", "bias"):
        thirds = [ours[f"v.blk.2.attn_{part}.{suffix}"] for part in "qkv"]
        assert torch.equal(torch.cat(thirds), theirs[f"visual.blocks.2.attn.qkv.{suffix}"])
    assert torch.equal(ours["v.post_ln.weight"], theirs["visual.merger.ln_q.weight"])
    assert torch.equal(ours["mm.2.weight"], theirs["visual.merger.mlp.2.weight"])


def test_rotary_pairs_and_the_break_token_of_pixtral(folders, tmp_path):
    ours, theirs = written(folders["pixtral"], tmp_path / "mmproj.gguf"), source_of(folders["pixtral"])
    q = theirs["vision_tower.transformer.layers.1.attention.q_proj.weight"]
    paired = q.reshape(2, 2, 8, 32).transpose(1, 2).reshape(32, 32)  # heads, halves, pairs
    assert torch.equal(ours["v.blk.1.attn_q.weight"], paired)
    embedding = theirs["language_model.model.embed_tokens.weight"]
    assert torch.equal(ours["v.token_embd.img_break"], embedding[SPECIAL["pixtral"]["[IMG_BREAK]"]])


def test_the_norm_of_gemmas_projector_is_one_more(folders, tmp_path):
    ours, theirs = written(folders["gemma3"], tmp_path / "mmproj.gguf"), source_of(folders["gemma3"])
    name = "multi_modal_projector.mm_soft_emb_norm.weight"
    assert torch.equal(ours["mm.soft_emb_norm.weight"], theirs[name] + 1)
    assert not any("head" in name for name in ours)


TYPES_OF = {  # of v.patch_embd.weight, v.position_embd.weight, v.blk.0.ffn_up.weight
    ("qwen3_vl", "F32"): ("F32", "F32", "F32"),
    ("qwen3_vl", "F16"): ("F16", "F32", "F16"),
    ("qwen3_vl", "BF16"): ("F32", "F32", "BF16"),
    ("qwen3_vl", "Q8_0"): ("F32", "F32", "Q8_0"),
    ("gemma3", "F16"): ("F32", "F32", "F16"),
    ("smolvlm", "Q8_0"): ("F32", "F32", "Q8_0"),
}


@pytest.mark.parametrize(("case", "scheme"), TYPES_OF)
def test_types_are_those_of_llama_cpps_converter(folders, case, scheme):
    plan = lowbit.dry_run(folders[case], mmproj=True, scheme=scheme).plan
    types = {tensor.name: tensor.stored_as for tensor in plan.tensors}
    names = ("v.patch_embd.weight", "v.position_embd.weight", "v.blk.0.ffn_up.weight")
    assert tuple(types[name] for name in names) == TYPES_OF[case, scheme]
    assert {types[name] for name in types if name.endswith("bias")} == {"F32"}
    assert all(tensor.reason for tensor in plan.tensors if tensor.stored_as != "Q8_0")


def test_rows_that_q8_0_does_not_divide_are_f16(tmp_path):
    odd = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = make_vision(tmp_path / "hf", "smolvlm", vision_config={**odd, "image_size": 64, "patch_size": 16})
    plan = lowbit.dry_run(folder, mmproj=True, scheme="Q8_0").plan
    down = next(tensor for tensor in plan.tensors if tensor.name == "v.blk.0.ffn_down.weight")
    assert (down.stored_as, down.reason) == ("F16", "F16, because rows of 72 do not divide by 32 (Q8_0)")


KEYS = {
    "qwen2_vl": {Keys.Clip.PROJECTOR_TYPE: "qwen2vl_merger", V.IMAGE_SIZE: 560, V.EMBEDDING_LENGTH: 32,
                 V.PROJECTION_DIM: 64, V.BLOCK_COUNT: 3},
    "qwen2_5_vl": {Keys.Clip.PROJECTOR_TYPE: "qwen2.5vl_merger", V.USE_SILU: True, V.N_WA_PATTERN: 2},
    "qwen3_vl": {Keys.Clip.PROJECTOR_TYPE: "qwen3vl_merger", V.IMAGE_SIZE: 64, V.SPATIAL_MERGE_SIZE: 2,
                 V.IS_DEEPSTACK_LAYERS: [True, True, False]},
    "qwen3_5": {V.IS_DEEPSTACK_LAYERS: [False, False, False]},
    "gemma3": {Keys.Clip.PROJECTOR_TYPE: "gemma3", V.Projector.SCALE_FACTOR: 2, V.USE_GELU: True},
    "smolvlm": {Keys.Clip.PROJECTOR_TYPE: "idefics3", V.Projector.SCALE_FACTOR: 2, V.PREPROC_IMAGE_SIZE: 128},
    "mistral3": {Keys.Clip.PROJECTOR_TYPE: "pixtral", V.SPATIAL_MERGE_SIZE: 2, V.USE_SILU: True},
    "pixtral": {V.USE_GELU: True, V.PATCH_SIZE: 14},
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_key_values_say_what_config_json_says(folders, case, tmp_path):
    lowbit.quantize(folders[case], tmp_path / "mmproj.gguf", mmproj=True)
    metadata = open_raw_gguf(tmp_path / "mmproj.gguf").metadata
    for key, value in KEYS[case].items():
        found = metadata[key]
        assert (list(found) if isinstance(value, list) else found) == value, key
    assert (metadata["general.architecture"], metadata["general.type"]) == ("clip", "mmproj")
    assert (metadata["clip.has_vision_encoder"], metadata["general.file_type"]) == (True, 1)
    mean = CASES[case][2]["image_mean"]
    assert all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(metadata[V.IMAGE_MEAN], mean, strict=True))


def test_every_tensor_of_the_table_is_one_of_the_gguf_package():
    known = set(MODEL_TENSORS[MODEL_ARCH.MMPROJ])
    for tower in TOWERS:
        for place in (*tower.outside.values(), *tower.inside.values()):
            assert set(place.tensors) <= known


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.model_types[0])
def test_names_agree_with_the_map_of_the_gguf_package(tower):
    """Where the package knows the name of the hub; q, k and v and Qwen3-VL's mergers are renamed before it is asked."""
    names = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, 4)
    places = {path: (place, None) for path, place in tower.outside.items()}
    places |= {f"{tower.blocks}.1.{path}": (place, 1) for path, place in tower.inside.items()}
    agreed = 0
    for path, (place, block) in places.items():
        found = names.get_name(path.removeprefix("model.") if path.startswith("model.visual") else path)
        if found is not None and len(place.tensors) == 1:
            number = block if place.number is None else place.number
            assert TENSOR_NAMES[place.tensors[0]].format(bid=number) == found
            agreed += 1
    assert agreed >= 8


def test_an_output_is_verified_against_its_model_and_a_changed_byte_is_found(folders, tmp_path):
    path = tmp_path / "mmproj.gguf"
    done = lowbit.quantize(folders["mistral3"], path, mmproj=True, scheme="Q8_0")
    assert (done.report.verification.ok, done.report.verification.format) == (True, "mmproj")
    assert done.report.serve[0].command.startswith("llama-server -m MODEL.gguf --mmproj ")
    report = path.with_name("mmproj.lowbit-report.json")
    report.unlink()  # so that the weights are looked at, not the checksums
    raw = open_raw_gguf(path)
    q = next(tensor for tensor in raw.tensors if tensor.name == "v.blk.0.attn_q.weight")
    k = next(tensor for tensor in raw.tensors if tensor.name == "v.blk.0.attn_k.weight")
    content = bytearray(path.read_bytes())
    content[q.start : q.stop], content[k.start : k.stop] = content[k.start : k.stop], content[q.start : q.stop]
    path.write_bytes(bytes(content))
    checked = lowbit.verify(path, source=open_safetensors(folders["mistral3"]))
    assert [check.rule for check in checked.checks if not check.passed] == ["gguf-weights"]


def test_convert_writes_f16_where_no_type_is_given_and_names_the_way_to_the_rest(folders, tmp_path):
    folder = folders["gemma3"]
    plan = dry_convert(folder, format="gguf", mmproj=True).plan
    assert plan.scheme_name == "F16"
    pooling, language = (note for note in plan.notes if "left out" in note)
    assert "pooling head" in pooling
    assert f"lowbit quantize {folder} -o model.gguf --scheme Q4_K_M" in language
    text = lowbit.dry_run(folder, scheme="Q8_0").plan
    assert any(f"lowbit convert {folder} --format gguf --mmproj" in note for note in text.notes)
    done = lowbit.convert(folder, tmp_path / "mmproj.gguf", format="gguf", mmproj=True)
    assert done.path.stat().st_size == plan.file_bytes


def changed_config(folder: Path, target: Path, **vision) -> Path:
    """The folder with another vision_config, weights and all."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    config["vision_config"] |= vision
    (target / "config.json").write_text(json.dumps(config))
    return target


REFUSED = {
    "hidden_act": ("qwen2_vl", {"hidden_act": "gelu"}, "hidden_act of vision_config is gelu"),
    "window_size": ("qwen2_5_vl", {"window_size": 56}, "window_size of vision_config is 56"),
    "fullatt_block_indexes": ("qwen2_5_vl", {"fullatt_block_indexes": [1]}, r"fullatt_block_indexes is \[1\]"),
    "rope_theta": ("qwen3_vl", {"rope_parameters": {"rope_type": "axial", "rope_theta": 5000.0}}, "rope_theta"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(folders, tmp_path, what):
    case, vision, message = REFUSED[what]
    folder = changed_config(folders[case], tmp_path / "hf", **vision)
    with pytest.raises(ArchitectureError, match=message):
        lowbit.dry_run(folder, mmproj=True)


def test_a_square_mlp_that_llama_cpp_would_swap_is_refused(tmp_path):
    square = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = make_vision(tmp_path / "hf", "smolvlm", vision_config={**square, "image_size": 64, "patch_size": 16})
    with pytest.raises(ArchitectureError, match="for swapped"):
        lowbit.dry_run(folder, mmproj=True)


def test_models_without_a_tower_that_can_be_written_are_refused_by_name(tmp_path):
    blind = make_model(tmp_path / "llama")
    with pytest.raises(ArchitectureError, match="llama has no vision tower"):
        lowbit.dry_run(blind, mmproj=True)
    for config, message in (
        ({"model_type": "qwen2_5_omni", "thinker_config": {"audio_config": {"d_model": 64}}}, "has an audio tower"),
        ({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}, r"llava \(clip_vision_model\)"),
        ({"model_type": "gemma4", "vision_config": {}, "audio_config": {"hidden_size": 8}}, "gemma4 has an audio"),
    ):
        (blind / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArchitectureError, match=message):
            lowbit.dry_run(blind, mmproj=True)


def test_a_folder_without_its_image_processor_is_refused_before_work(folders, tmp_path):
    folder = changed_config(folders["smolvlm"], tmp_path / "hf")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": "half"}))
    with pytest.raises(CheckpointError, match="image_mean"):
        lowbit.dry_run(folder, mmproj=True)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no image_mean in preprocessor_config\.json"):
        lowbit.dry_run(folder, mmproj=True)


def test_a_missing_tensor_is_named(folders, tmp_path):
    folder = changed_config(folders["smolvlm"], tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.connector.modality_projection.proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match=r"modality_projection\.proj\.weight"):
        lowbit.dry_run(folder, mmproj=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "Q4_K_M"}, "not stored as Q4_K_M"),
        ({"method": "gptq"}, "--method gptq is read only by"),
        ({"imatrix": "measure"}, "--imatrix measure is read only by GGUF files of language models"),
        ({"ignore": ("v",)}, "--ignore is read only by"),
        ({"shard_size": "5MB"}, "--shard-size"),
        ({"format": "gptq"}, "--mmproj is read only by GGUF files"),
    ],
)
def test_settings_that_a_tower_does_not_read_are_refused(folders, settings, message):
    with pytest.raises(UsageError, match=message):
        lowbit.dry_run(folders["smolvlm"], **{"mmproj": True, **settings})


def test_a_gguf_file_is_no_source_of_a_tower(folders, tmp_path):
    text = lowbit.quantize(folders["gemma3"], tmp_path / "text.gguf", scheme="Q8_0").path
    with pytest.raises(UsageError, match="holds no vision tower"):
        lowbit.dry_run(text, mmproj=True)


def test_a_tower_is_rounded_again_and_is_no_language_model(folders, tmp_path):
    whole = lowbit.quantize(str(folders["qwen3_vl"]), tmp_path / "whole.gguf", scheme="F16", mmproj=True)
    smaller = lowbit.quantize(str(whole.path), tmp_path / "smaller.gguf", scheme="Q8_0")
    assert {line.engine for line in smaller.report.serve} == {"llama.cpp"}
    assert not smaller.report.next_steps  # which `lowbit quantize` and the report show: evaluate, --quality good
    assert any(tensor.scheme == "Q8_0" for tensor in smaller.report.tensors)
    with pytest.raises(ArchitectureError, match="no language model by itself") as caught:
        lowbit.evaluate(str(whole.path))
    assert "language model that it belongs to" in caught.value.hint
