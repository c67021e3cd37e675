"""gpt-oss folders: single experts out of fused tensors made here by hand, and a test for each bad file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import Checkpoint
from lowbit.errors import CheckpointError
from lowbit.schemes import SCHEMES

EXPERTS, SIZE, HIDDEN = 3, 96, 64  # I and H
P = "model.layers.0.mlp.experts"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def fused(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """blocks, scales, and the weights they stand for, [experts, rows, columns]."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (EXPERTS, rows, columns), generator=random, dtype=torch.uint8)
    scales = torch.randint(110, 130, (EXPERTS, rows, columns // 32), generator=random, dtype=torch.uint8)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(EXPERTS, rows, columns // 32, 16)
    return blocks, scales, E2M1[codes.long()] * torch.exp2(scales.float() - 127).repeat_interleave(32, 2)


class Files:
    def __init__(self, folder: Path):
        self.folder = folder
        self.config: dict = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.mlp.router", "lm_head"],
        }
        self.tensors = {"lm_head.weight": torch.ones(4, HIDDEN, dtype=torch.bfloat16)}
        self.weights = {}
        for seed, (name, rows, columns) in enumerate((("gate_up_proj", 2 * SIZE, HIDDEN), ("down_proj", HIDDEN, SIZE))):
            blocks, scales, self.weights[name] = fused(rows, columns, seed)
            self.tensors |= {f"{P}.{name}_blocks": blocks, f"{P}.{name}_scales": scales}
            self.tensors[f"{P}.{name}_bias"] = torch.zeros(EXPERTS, rows, dtype=torch.bfloat16)

    def write(self) -> Path:
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()}, self.folder / "model.safetensors"
        )
        (self.folder / "config.json").write_text(json.dumps({"quantization_config": self.config}))
        return self.folder

    def open(self) -> Checkpoint:
        checkpoint = open_checkpoint(self.write())
        assert checkpoint.schemes
        return checkpoint


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def refusal(files: Files) -> str:
    with pytest.raises(CheckpointError) as caught:
        files.open()
    assert caught.value.hint
    return str(caught.value)


def test_every_expert_has_its_own_matrices(files):
    checkpoint = files.open()
    expected = {
        f"{P}.{expert}.{leaf}.weight" for expert in range(EXPERTS) for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    assert set(checkpoint.schemes) == expected
    assert set(checkpoint.schemes.values()) == {SCHEMES["MXFP4A16"]}
    assert checkpoint.tensors[f"{P}.1.gate_proj.weight"].shape == (SIZE, HIDDEN)
    assert checkpoint.tensors[f"{P}.1.down_proj.weight"].shape == (HIDDEN, SIZE)


def test_gate_and_up_are_alternating_rows(files):
    checkpoint = files.open()
    for expert in range(EXPERTS):
        gate, up = (checkpoint.read(f"{P}.{expert}.{leaf}.weight") for leaf in ("gate_proj", "up_proj"))
        assert torch.equal(gate, files.weights["gate_up_proj"][expert, 0::2])
        assert torch.equal(up, files.weights["gate_up_proj"][expert, 1::2])
        down = checkpoint.read(f"{P}.{expert}.down_proj.weight")
        assert torch.equal(down, files.weights["down_proj"][expert])


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 50), (95, 96), (7, 7)])
def test_slabs_are_rows_of_the_whole(files, start, stop):
    checkpoint = files.open()
    whole = files.weights["gate_up_proj"][2, 1::2]
    assert torch.equal(checkpoint.read(f"{P}.2.up_proj.weight", start, stop), whole[start:stop])
    codes = checkpoint.read_quantized(f"{P}.2.up_proj.weight", start, stop)
    assert torch.equal(codes.decode(), whole[start:stop])


def test_golden_bytes(files):
    """0x71: 0.5 then 6; exponent 128: times 2."""
    files.tensors[f"{P}.down_proj_blocks"][0, 0, 0, 0] = 0x71
    files.tensors[f"{P}.down_proj_scales"][0, 0, 0] = 128
    assert files.open().read(f"{P}.0.down_proj.weight", 0, 1)[0, :2].tolist() == [1.0, 12.0]


def test_biases_and_the_rest_appear_as_they_are(files):
    checkpoint = files.open()
    assert checkpoint.tensors[f"{P}.gate_up_proj_bias"].shape == (EXPERTS, 2 * SIZE)
    assert checkpoint.tensors["lm_head.weight"].dtype == torch.bfloat16
    assert not checkpoint.says_quantized("lm_head")
    assert not any(name.endswith(("_blocks", "_scales")) for name in checkpoint.tensors)


def test_bytes_are_counted_once(files):
    """Experts share a stored tensor; together they take what it takes."""
    checkpoint = files.open()
    stored = sum(t.nbytes for name, t in files.tensors.items() if name.endswith(("_blocks", "_scales")))
    assert sum(checkpoint.tensors[name].nbytes for name in checkpoint.schemes) == stored


@pytest.mark.parametrize("leaf", ["blocks", "scales"])
def test_blocks_without_scales_and_the_reverse(files, leaf):
    del files.tensors[f"{P}.down_proj_{leaf}"]
    assert f"{P}.down_proj_{leaf} is absent" in refusal(files)


def test_scales_that_do_not_fit(files):
    files.tensors[f"{P}.down_proj_scales"] = files.tensors[f"{P}.down_proj_scales"][:, :, :2]
    assert f"{P}.down_proj_scales has shape [3, 64, 2]; [3, 64, 3] is needed" in refusal(files)


def test_blocks_of_another_dtype(files):
    files.tensors[f"{P}.down_proj_blocks"] = files.tensors[f"{P}.down_proj_blocks"].to(torch.int8)
    assert "down_proj_blocks is int8; uint8 is needed" in refusal(files)


@pytest.mark.parametrize("shape", [(3, 64, 48), (3, 64, 6, 8), (3, 64, 3, 2, 8)])
def test_blocks_of_another_shape(files, shape):
    files.tensors[f"{P}.down_proj_blocks"] = files.tensors[f"{P}.down_proj_blocks"].reshape(shape)
    assert f"has shape {list(shape)}" in refusal(files)


def test_a_billion_empty_experts(files):
    """A tensor without elements may claim any number of them."""
    for leaf, shape in (("blocks", (10**9, 64, 0, 16)), ("scales", (10**9, 64, 0))):
        files.tensors[f"{P}.down_proj_{leaf}"] = torch.zeros(shape, dtype=torch.uint8)
    assert "has shape [1000000000, 64, 0, 16]" in refusal(files)


def test_an_odd_number_of_gate_and_up_rows(files):
    for leaf in ("blocks", "scales"):
        files.tensors[f"{P}.gate_up_proj_{leaf}"] = files.tensors[f"{P}.gate_up_proj_{leaf}"][:, :-1]
    assert "rows even" in refusal(files)


def test_experts_of_which_some_are_in_16_bits(files):
    other = P.replace("layers.0", "layers.1")
    files.tensors[f"{other}.gate_up_proj"] = torch.ones(EXPERTS, HIDDEN, 2 * SIZE, dtype=torch.bfloat16)
    assert f"{other}.gate_up_proj is BF16" in refusal(files)


def test_openais_own_names(files):
    files.tensors["block.0.mlp.mlp1_weight.blocks"] = torch.zeros(3, 4, 1, 16, dtype=torch.uint8)
    message = refusal(files)
    assert "block.0.mlp.mlp1_weight" in message


@pytest.mark.interop
def test_transformers_decodes_the_same(files):
    """`convert_moe_packed_tensors` gives [E, columns, rows], which is how gpt-oss keeps experts."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    checkpoint = files.open()
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        blocks, scales = (files.tensors[f"{P}.{name}_{leaf}"] for leaf in ("blocks", "scales"))
        decoded = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
        for expert in range(EXPERTS):
            for index, leaf in enumerate(parts):
                ours = checkpoint.read(f"{P}.{expert}.{leaf}.weight")
                assert torch.equal(ours, decoded[expert, index :: len(parts)])


@pytest.mark.interop
def test_a_model_has_the_logits_that_transformers_gives_it(tmp_path):
    """A tiny gpt-oss with experts packed here, read by transformers and by lowbit, names and transposition included."""
    transformers = pytest.importorskip("transformers")
    from lowbit.architecture.loading import load_model

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, vocab_size=128, hidden_size=64,
        intermediate_size=96, head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    tensors = {}
    for name, values in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = values.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, rows, columns // 32), dtype=torch.uint8)
        else:
            tensors[name] = values.clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    ids = torch.arange(20)[None]
    theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(open_checkpoint(tmp_path), torch.float32)
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
