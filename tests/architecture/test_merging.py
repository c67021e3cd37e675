"""Adapters merged as a checkpoint is read: every value against W + s·B·A in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fuzzing import bounded_time
from lora import CONFIG, PREFIX, linears_of, make_adapter, matrices, summed, tensors_of, write_adapter
from lowbit.architecture.describing import open_described
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import CheckpointError, LowbitError, UsageError
from models import make_model

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name → folder of a small model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def model(name: str = "llama", **changes) -> Path:
        key = name + json.dumps(changes)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(name), name, **changes)
        return made[key]

    return model


def read_merged(base: Path, adapter: Path, split_experts: bool | None = False) -> dict[str, torch.Tensor]:
    """Every tensor of the merged model."""
    checkpoint, _ = open_described(base, OpenOptions(adapter=str(adapter)), split_experts)
    try:
        return {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    finally:
        checkpoint.close()


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(LowbitError) as caught:
        open_checkpoint(base, OpenOptions(adapter=str(adapter)))
    return f"{caught.value}; {caught.value.hint}"


def assert_is_sum(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted.float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_linears_are_the_sum_rounded_once_and_all_else_is_the_bases(models, tmp_path, rslora):
    base, leaves = models(), ("q_proj", "v_proj", "up_proj", "down_proj")
    adapter = make_adapter(tmp_path / "a", base, *leaves, use_rslora=rslora)
    before, matrices_, after = tensors_of(base), load(adapter), read_merged(base, adapter)
    modules = linears_of(base, *leaves)
    assert len(modules) == 8
    for name, values in after.items():
        module = name.removesuffix(".weight")
        if module in modules:
            assert_is_sum(values, summed(before[name], matrices_, module, rslora=rslora))
        else:
            assert torch.equal(values.double(), before[name])


def load(adapter: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors_of(adapter).items()}


def test_slabs_of_rows_are_bit_for_bit_the_rows_of_the_whole(models, tmp_path):
    base = models()
    adapter = make_adapter(tmp_path / "a", base)
    checkpoint = open_checkpoint(base, OpenOptions(adapter=str(adapter)))
    whole = checkpoint.read(f"{Q}.weight")
    assert checkpoint.read(f"{Q}.weight", 5, 5).shape == (0, 128)
    for rows in (1, 7, 50):
        pieces = [checkpoint.read(f"{Q}.weight", at, min(at + rows, 128)) for at in range(0, 128, rows)]
        assert torch.equal(torch.cat(pieces), whole)


def test_patterns_give_modules_a_rank_and_an_alpha_of_their_own(models, tmp_path):
    base = models()
    tensors = matrices({Q: (128, 128)}, rank=2) | matrices({UP: (192, 128)}, rank=4)
    adapter = write_adapter(
        tmp_path / "a", tensors, r=4, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.\d+\.mlp\.up_proj": 3}
    )
    before, after = tensors_of(base), read_merged(base, adapter)
    assert_is_sum(after[f"{Q}.weight"], summed(before[f"{Q}.weight"], tensors, Q, alpha=8))
    assert_is_sum(after[f"{UP}.weight"], summed(before[f"{UP}.weight"], tensors, UP, alpha=3))


def test_dora_gives_rows_the_norms_that_it_learned(models, tmp_path):
    base = models()
    tensors = matrices({Q: (128, 128)}) | {f"{Q}.lora_magnitude_vector": torch.rand(128) + 0.5}
    after = read_merged(base, write_adapter(tmp_path / "a", tensors, use_dora=True))[f"{Q}.weight"]
    assert_is_sum(after, summed(tensors_of(base)[f"{Q}.weight"], tensors, Q))
    torch.testing.assert_close(after.norm(dim=1), tensors[f"{Q}.lora_magnitude_vector"])


@pytest.mark.parametrize("dora", [False, True])
def test_conv1d_of_gpt2_gets_the_transpose(models, tmp_path, dora):
    base, module = models("gpt2"), "transformer.h.0.attn.c_attn"
    tensors = matrices({module: (384, 128)})
    tensors |= {f"{module}.lora_magnitude_vector": torch.rand(384) + 0.5} if dora else {}
    adapter = write_adapter(tmp_path / "a", tensors, use_dora=dora, fan_in_fan_out=True)
    before, after = tensors_of(base)[f"{module}.weight"], read_merged(base, adapter)[f"{module}.weight"]
    assert_is_sum(after, summed(before.t(), tensors, module).t())


@pytest.mark.parametrize("spelling", ["lora_{}.default.weight", "lora_{}.other.weight"])
def test_names_with_the_name_of_the_adapter_and_without_the_prefix_are_read(models, tmp_path, spelling):
    from safetensors.torch import save_file

    base, tensors = models(), matrices({Q: (128, 128)})
    adapter = write_adapter(tmp_path / "a", tensors)
    save_file({f"{Q}.{spelling.format(side)}": tensors[f"{Q}.lora_{side}.weight"] for side in "AB"},
              adapter / "adapter_model.safetensors")  # fmt: skip
    after = read_merged(base, adapter)[f"{Q}.weight"]
    assert_is_sum(after, summed(tensors_of(base)[f"{Q}.weight"], tensors, Q))


def test_names_of_the_loaded_model_find_the_files_of_a_vision_language_model(models, tmp_path):
    base = models("gemma3")
    named = "model.language_model.layers.0.self_attn.q_proj"
    stored = "language_model.model.layers.0.self_attn.q_proj"
    shape = linears_of(base, "q_proj")[stored]
    tensors = matrices({named: shape})
    after = read_merged(base, write_adapter(tmp_path / "a", tensors))[f"{stored}.weight"]
    assert_is_sum(after, summed(tensors_of(base)[f"{stored}.weight"], tensors, named))


def experts_adapter(folder: Path, module: str, experts: int, out: int, into: int, target: str) -> Path:
    torch.manual_seed(1)
    tensors = {f"{module}.lora_A.weight": torch.randn(4 * experts, into) * 0.1,
               f"{module}.lora_B.weight": torch.randn(out, 4 * experts) * 0.1}  # fmt: skip
    return write_adapter(folder, tensors, target_parameters=[target])


def test_experts_that_peft_trained_in_one_parameter_are_merged_one_by_one(models, tmp_path):
    base, module = models("mixtral"), "model.layers.1.mlp.experts"
    adapter = experts_adapter(tmp_path / "a", module, 4, 384, 128, "mlp.experts.gate_up_proj")
    tensors, before, after = load(adapter), tensors_of(base), read_merged(base, adapter)
    a = tensors[f"{module}.lora_A.weight"].reshape(4, 4, 128)
    b = tensors[f"{module}.lora_B.weight"].reshape(384, 4, 4)
    delta = 2 * torch.einsum("ore,eri->eoi", b, a)  # as PEFT's ParamWrapper has it
    for expert in range(4):
        for name, rows in (("w1", slice(0, 192)), ("w3", slice(192, 384))):
            stored = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            assert_is_sum(after[stored], before[stored] + delta[expert, rows])


@pytest.mark.parametrize("split", [False, True])
def test_experts_that_files_hold_fused_and_transposed(models, tmp_path, split):
    """gpt-oss: [E, K, N], and a square matrix of which the shape does not tell which way round it is."""
    base, module = models("gpt_oss"), "model.layers.0.mlp.experts"
    adapter = experts_adapter(tmp_path / "a", module, 4, 128, 128, "0.mlp.experts.down_proj")
    tensors, after = load(adapter), read_merged(base, adapter, split)
    a = tensors[f"{module}.lora_A.weight"].reshape(4, 4, 128)
    b = tensors[f"{module}.lora_B.weight"].reshape(128, 4, 4)
    wanted = tensors_of(base)[f"{module}.down_proj"] + 2 * torch.einsum("ore,eri->eio", b, a)
    if split:
        assert_is_sum(after[f"{module}.2.down_proj.weight"], wanted[2].t())
    else:
        assert_is_sum(after[f"{module}.down_proj"], wanted)


def test_square_experts_that_versions_of_peft_turn_differently_are_refused(models, tmp_path):
    adapter = experts_adapter(tmp_path / "a", "model.layers.0.mlp.experts", 4, 128, 128, "mlp.experts.gate_up_proj")
    assert "either way round" in refusal(models("qwen3_moe"), adapter)


EMBEDDING = "model.embed_tokens"


def embedding_matrices() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {f"{EMBEDDING}.lora_embedding_A": torch.randn(4, 384) * 0.1,
            f"{EMBEDDING}.lora_embedding_B": torch.randn(128, 4) * 0.1}  # fmt: skip


def test_an_embedding_gets_the_transpose_and_a_tied_head_keeps_the_bases(models, tmp_path):
    base, tensors = models("qwen2", tie_word_embeddings=True), embedding_matrices()
    adapter = write_adapter(tmp_path / "a", tensors)
    checkpoint, architecture = open_described(base, OpenOptions(adapter=str(adapter)))
    before = tensors_of(base)[f"{EMBEDDING}.weight"]
    a, b = (tensors[f"{EMBEDDING}.lora_embedding_{side}"].double() for side in "AB")
    assert_is_sum(checkpoint.read(f"{EMBEDDING}.weight"), before + 2 * (b @ a).t())
    assert torch.equal(checkpoint.read("lm_head.weight").double(), before)
    assert checkpoint.config()["tie_word_embeddings"] is False
    assert architecture.tied == {}
    assert any("the tie is undone" in note for note in checkpoint.notes)


def test_a_tie_that_training_kept_is_kept(models, tmp_path):
    base = models("qwen2", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "a", embedding_matrices(), ensure_weight_tying=True)
    checkpoint, architecture = open_described(base, OpenOptions(adapter=str(adapter)))
    assert architecture.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.tensors


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_head_stands_for_the_bases(models, tmp_path, tied):
    base, head = models("qwen2", tie_word_embeddings=tied), torch.randn(384, 128)
    tensors = matrices({Q: (128, 128)}) | {"lm_head.modules_to_save.default.weight": head}
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"])
    after = read_merged(base, adapter)
    assert torch.equal(after["lm_head.weight"], head)
    assert torch.equal(after["model.embed_tokens.weight"].double(), tensors_of(base)["model.embed_tokens.weight"])


def test_a_resized_vocabulary_is_in_the_config(models, tmp_path):
    base = models()
    tensors = {name: torch.randn(390, 128) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors |= matrices({"lm_head": (390, 128)})
    adapter = write_adapter(tmp_path / "a", tensors)
    checkpoint, _ = open_described(base, OpenOptions(adapter=str(adapter)))
    assert checkpoint.config()["vocab_size"] == 390
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), tensors["model.embed_tokens.weight"])
    assert_is_sum(checkpoint.read("lm_head.weight"), summed(tensors["lm_head.weight"], tensors, "lm_head"))
    tensors["lm_head.weight"] = torch.randn(389, 128)
    write_adapter(tmp_path / "b", {name: tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight")})
    assert "has 390 rows" in refusal(base, tmp_path / "b") or "has 389 rows" in refusal(base, tmp_path / "b")


def test_biases_are_replaced_or_shifted(models, tmp_path):
    base = models("qwen2")
    saved, shift = torch.randn(128), torch.randn(64)
    k = "model.layers.0.self_attn.k_proj"
    tensors = matrices({Q: (128, 128), k: (64, 128)})
    tensors |= {f"{Q}.base_layer.bias": saved, f"{k}.lora_B.bias": shift}
    after = read_merged(base, write_adapter(tmp_path / "a", tensors, bias="lora_only", lora_bias=True))
    assert torch.equal(after[f"{Q}.bias"], saved)
    torch.testing.assert_close(after[f"{k}.bias"], (tensors_of(base)[f"{k}.bias"] + 2 * shift.double()).float())


def test_tokenizer_and_template_of_the_adapter_go_first_and_the_adapter_is_not_copied(models, tmp_path):
    base = models()
    adapter = make_adapter(tmp_path / "a", base)
    (adapter / "chat_template.jinja").write_text("{{ messages }} mine")
    (adapter / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (adapter / "generation_config.json").write_text('{"top_k": 7}')
    checkpoint = open_checkpoint(base, OpenOptions(adapter=str(adapter)))
    folder = checkpoint.folder
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }} mine"
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "top_k" not in (folder / "generation_config.json").read_text()
    assert not (folder / "adapter_config.json").exists()
    assert any("chat_template.jinja, special_tokens_map.json" in note for note in checkpoint.notes)
    checkpoint.close()
    assert not folder.exists()


def test_base_and_adapter_in_one_folder(models, tmp_path):
    base = shutil.copytree(models(), tmp_path / "model")
    tensors, before = matrices({Q: (128, 128)}), tensors_of(base)[f"{Q}.weight"]
    write_adapter(base, tensors)
    plain = open_described(base, OpenOptions())[0]
    assert torch.equal(plain.read(f"{Q}.weight").double(), before)
    assert any(f"lies beside the model and is not in the result; to have it there, --adapter {base}" in note
               for note in plain.notes)  # fmt: skip
    merged = open_described(base, OpenOptions(adapter=str(base)))[0]
    assert_is_sum(merged.read(f"{Q}.weight"), summed(before, tensors, Q))
    assert not any("lies beside" in note or "left out" in note for note in merged.notes)


VARIANTS = {
    "peft_type": ("IA3", "an IA3 adapter of org/base; lowbit merges LoRA only"),
    "alora_invocation_tokens": ([1, 2], "invocation tokens"),
    "layer_replication": ([[0, 1]], "repeats layers"),
    "use_qalora": (True, "QA-LoRA"),
    "use_bdlora": ({"nblocks": 2}, "block-diagonal"),
    "trainable_token_indices": ([3], "single rows"),
    "init_lora_weights": ("pissa_niter_4", "a base that its start had changed"),
    "something_new": (True, "something_new in adapter_config.json, of which lowbit does not know the meaning"),
}


@pytest.mark.parametrize("key", VARIANTS)
def test_adapters_that_are_no_plain_sum_are_refused_by_name(models, tmp_path, key):
    value, words = VARIANTS[key]
    assert words in refusal(models(), write_adapter(tmp_path / "a", matrices({Q: (128, 128)}), **{key: value}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{Q}.lora_B.weight": None}, f"{Q} has no lora_B, only lora_A"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64)}, "do not fit model.layers.0.self_attn.q_proj.weight [128, 128]"),
        ({f"{Q}.lora_A.weight": torch.ones(3, 128)}, "A [3, 128] and B [128, 4]"),
        ({f"{Q}.lora_A.weight": torch.ones(0)}, "saved from a part of the GPUs"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(128)}, "has a lora_magnitude_vector, and use_dora is False"),
        ({f"{Q}.lora_A.weight": torch.full((4, 128), torch.inf)}, "holds NaN or inf"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}, "is I8, and floats are needed"),
        ({f"{Q}.lora_E": torch.ones(4)}, "lora_E is no tensor of LlamaForCausalLM"),
        ({f"{Q}.hada_w1_a": torch.ones(4)}, "hada_w1_a is no tensor of LlamaForCausalLM"),
        (matrices({"model.layers.7.self_attn.q_proj": (128, 128)}), "is no module of LlamaForCausalLM"),
        (matrices({"transformer.h.0.attn.c_attn": (128, 128)}), "transformer.h.0.attn.c_attn is no module"),
        ({f"{UP}.lora_A.other.weight": torch.ones(4, 128)}, "holds several adapters: None, other"),
        ({"model.norm.weight": torch.ones(64)}, "model.norm.weight has shape [64], the base [128]"),
        ({f"{Q}.lora_B.bias": torch.ones(128)}, "a bias that LlamaForCausalLM does not have"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused_by_name(models, tmp_path, change, words):
    tensors = matrices({Q: (128, 128)}) | change
    adapter = write_adapter(tmp_path / "a", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert words in refusal(models(), adapter)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, "has 4 rows, adapter_config.json gives model.layers.0.self_attn.q_proj rank 8"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"r": None}, "r is None; a number is needed"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": {"q(": 2}}, "no pattern that can be matched"),
        ({"alpha_pattern": [1]}, "a mapping is needed"),
        ({"lora_alpha": 0}, "lora_alpha is 0, so that the adapter does not change model.layers.0.self_attn.q_proj"),
        ({"use_rslora": "no"}, "use_rslora is 'no'; true or false is needed"),
        ({"use_dora": True}, "lacks its lora_magnitude_vector"),
    ],
)
def test_a_config_of_another_adapter_is_refused(models, tmp_path, config, words):
    assert words in refusal(models(), write_adapter(tmp_path / "a", matrices({Q: (128, 128)}), **config))


def test_what_is_no_adapter_and_what_is_no_base_is_refused(models, tmp_path):
    adapter = make_adapter(tmp_path / "a", models())
    assert "there is no adapter_config.json" in refusal(models(), models())
    assert "there is no such folder" in refusal(models(), tmp_path / "absent")
    with pytest.raises(UsageError, match="is a GGUF file, into which"):
        open_checkpoint("demo:smollm2", OpenOptions(adapter=str(adapter)))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "is a pickle" in refusal(models(), adapter)
    (adapter / "adapter_model.safetensors").symlink_to("blob")
    assert "adapter_model.safetensors: a link to blob, which is not there" in refusal(models(), adapter)


def test_an_adapter_in_eight_bits_is_its_values(models, tmp_path):
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in matrices({Q: (128, 128)}).items()}
    after = read_merged(models(), write_adapter(tmp_path / "a", tensors))
    as_floats = {name: tensor.float() for name, tensor in tensors.items()}
    assert_is_sum(after[f"{Q}.weight"], summed(tensors_of(models())[f"{Q}.weight"], as_floats, Q))


def test_half_a_vocabulary_is_refused_and_blamed_on_the_adapter(models, tmp_path):
    tensors = matrices({Q: (128, 128)}) | {"lm_head.weight": torch.randn(390, 128)}
    assert "its tokens are 390, and model.embed_tokens.weight, which has 384 rows, is not in the adapter" in refusal(
        models(), write_adapter(tmp_path / "a", tensors)
    )


def test_a_pattern_of_an_adapter_is_matched_in_linear_time(models, tmp_path):
    adapter = write_adapter(tmp_path / "a", matrices({Q: (128, 128)}), alpha_pattern={"(([a-z0-9._])+)+X": 16})
    with bounded_time(5):  # Python's re needs hours
        after = read_merged(models(), adapter)
    assert_is_sum(after[f"{Q}.weight"], summed(tensors_of(models())[f"{Q}.weight"], tensors_of(adapter), PREFIX + Q))


def test_what_was_not_trained_is_said(models, tmp_path):
    tensors = matrices({Q: (128, 128), UP: (192, 128)})
    tensors[f"{UP}.lora_B.weight"].zero_()
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head", "score"])
    checkpoint, _ = open_described(models(), OpenOptions(adapter=str(adapter)))
    said = "; ".join(checkpoint.notes)
    assert f"1 of 2 matrices B of the adapter are zeros, the first of {UP}" in said
    assert "lm_head was trained (modules_to_save), and the file has no tensor of it" in said
    assert "score" not in said


def test_a_lone_adapter_is_refused_with_the_line_that_merges_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="this is a LoRA adapter of org/base, not a model") as caught:
        open_checkpoint(tmp_path)
    assert f"lowbit quantize org/base -o OUT --adapter {tmp_path}" in caught.value.hint
