"""Perplexity and KLD block by block: the figures of the whole models, and less memory."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, save_model
from transformers import LlamaConfig

from lowbit import measure
from lowbit.architecture.loading import Loader
from lowbit.calibrate import blocks
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.errors import UsageError
from lowbit.evaluation import memory
from lowbit.evaluation.perplexity import evaluate
from models import make_model

SETTINGS = {"windows": 3, "window_tokens": 32}
FIGURES = ("ppl", "ppl_se", "ppl_reference", "ppl_ratio", "kld_mean", "kld_se", "kld_max", "same_top1", "delta_p_rms")
# Heads behind norms, soft-capping and scales; tied and untied; experts; a decoder inside a wrapper, a projection behind
# it, an image encoder beside it.
ARCHITECTURES = ("llama", "phi4", "gemma2", "granite", "cohere2", "qwen3_moe", "gpt_oss", "deepseek_v3", "gpt2", "opt",
                 "bloom", "qwen2_5_vl")  # fmt: skip


@pytest.fixture
def weights_alone(monkeypatch):
    """max_memory bounds weights and hidden states, whatever the process of the tests holds."""
    monkeypatch.setattr(memory, "WORKING_BYTES", 0)
    monkeypatch.setattr(memory, "resident_memory", lambda: 0)


def perturbed(folder, target):
    """A copy with every matrix of the blocks a little off."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and (".layers." in name or ".h." in name):
            tensors[name] = tensor + (0.01 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def bytes_of(folder) -> memory.Weights:
    loader = Loader(SafetensorsCheckpoint(folder))
    return memory.weigh(loader.model, torch.float32)


def assert_same_figures(whole, blockwise, tolerance=1e-5):
    assert [row.activations for row in whole] == [row.activations for row in blockwise]
    for one, two in zip(whole, blockwise, strict=True):
        assert not any("block by block" in note for note in one.notes)
        assert any("run block by block" in note for note in two.notes)
        for name in FIGURES:
            assert getattr(two, name) == pytest.approx(getattr(one, name), rel=tolerance, abs=1e-7), name


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_figures_are_those_of_the_whole_models(architecture, tmp_path, text_file):
    reference = make_model(tmp_path / "reference", architecture, dtype=torch.float32)
    judged = perturbed(reference, tmp_path / "judged")
    whole = evaluate(judged, reference, text_file, **SETTINGS)
    allowed = 2 * bytes_of(reference).whole - 1
    blockwise = evaluate(judged, reference, text_file, max_memory=allowed, **SETTINGS)
    assert whole[0].kld_mean > 1e-5
    assert_same_figures(whole, blockwise)


@pytest.mark.usefixtures("weights_alone")
def test_soft_capped_logits_and_hidden_states_in_a_file(tmp_path, text_file, monkeypatch):
    reference = tmp_path / "reference"
    save_model(reference, "gemma3")
    judged = perturbed(reference, tmp_path / "judged")
    spilled = []
    mapped = blocks._mapped
    monkeypatch.setattr(blocks, "_mapped", lambda *shape: spilled.append(shape) or mapped(*shape))
    weights = bytes_of(reference)
    least = max(weights.largest_part, 2 * weights.head)
    whole = evaluate(judged, reference, text_file, **SETTINGS)
    assert_same_figures(whole, evaluate(judged, reference, text_file, max_memory=least, **SETTINGS))
    assert len(spilled) == 2


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_simulated_activations_and_a_quantized_head(tmp_path, text_file, dtype):
    """Windows that go through a block together may be summed in another order than one by one; then a code of an
    activation can fall to the other side, which moves single tokens but no mean by much."""
    reference = tmp_path / "reference"
    save_model(reference, "qwen3")
    judged = shutil.copytree(reference, tmp_path / "judged")
    save_w8a8(judged)
    whole = evaluate(judged, reference, text_file, dtype=dtype, **SETTINGS)
    allowed = 2 * bytes_of(reference).whole * dtype.itemsize // 4 - 1
    blockwise = evaluate(judged, reference, text_file, dtype=dtype, max_memory=allowed, **SETTINGS)
    assert [row.activations for row in whole] == ["none", "simulated"]
    assert whole[0].kld_mean != whole[1].kld_mean
    exact = dtype == torch.float32
    for one, two in zip(whole, blockwise, strict=True):
        assert two.kld_mean == pytest.approx(one.kld_mean, rel=1e-4 if exact else 0.05)
        assert two.ppl == pytest.approx(one.ppl, rel=1e-5 if exact else 0.01)


def save_w8a8(folder):
    """Rewrite a folder as compressed-tensors int-quantized, head included."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name or name == "lm_head.weight"]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**int8, "strategy": "channel", "dynamic": False},
        "input_activations": {**int8, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": [], "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("weights_alone")
def test_without_a_reference(tmp_path, text_file):
    save_model(tmp_path / "model", "mistral")
    [whole] = evaluate(tmp_path / "model", None, text_file, **SETTINGS)
    allowed = bytes_of(tmp_path / "model").whole - 1
    [blockwise] = evaluate(tmp_path / "model", None, text_file, max_memory=allowed, **SETTINGS)
    assert (blockwise.ppl, blockwise.ppl_se) == pytest.approx((whole.ppl, whole.ppl_se), rel=1e-6)
    assert blockwise.kld_mean is None


@pytest.mark.usefixtures("weights_alone")
def test_progress_counts_a_window_once_per_block_and_model_and_once_for_comparing(tmp_path, text_file):
    save_model(tmp_path / "model", "llama")
    seen = []
    allowed = 2 * bytes_of(tmp_path / "model").whole - 1
    evaluate(tmp_path / "model", tmp_path / "model", text_file, max_memory=allowed, **SETTINGS,
             progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert {total for _, total in seen} == {3 * (2 * 2 + 1)}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (15, 15)


@pytest.mark.usefixtures("weights_alone")
def test_less_than_a_block_is_refused_with_what_is_needed(tmp_path, text_file):
    save_model(tmp_path / "model", "llama")
    told = r"(?m)block by block, needs .* \(the program .*largest part.*\); --max-memory allows 10 kB$"
    with pytest.raises(UsageError, match=told) as error:
        evaluate(tmp_path / "model", None, text_file, max_memory=10_000, **SETTINGS)
    assert "allow" in error.value.hint


@pytest.mark.usefixtures("weights_alone")
def test_a_model_type_without_a_row_is_held_whole_or_refused(tmp_path, text_file, monkeypatch):
    save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    loaders = [Loader(SafetensorsCheckpoint(tmp_path / "model"))]
    assert memory.choose_way(loaders, 1, None).block_by_block
    monkeypatch.setattr(loaders[0], "architecture", None)
    way = memory.choose_way(loaders, 1, None)
    assert not way.block_by_block
    assert "'llama' is not known to lowbit and cannot be run block by block" in way.notes[0]
    with pytest.raises(UsageError, match="not known to lowbit"):
        memory.choose_way(loaders, 1, 1000)


@pytest.mark.usefixtures("weights_alone")
def test_the_automatic_limit_goes_on_with_a_note(tmp_path, text_file, monkeypatch):
    save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    [row] = evaluate(tmp_path / "model", None, text_file, **SETTINGS)
    assert any("run block by block" in note for note in row.notes)
    assert any("may run out of memory" in note for note in row.notes)


def test_weights_are_counted_by_what_must_be_there_at_once(tmp_path):
    save_model(tmp_path / "tied", "llama")
    save_model(tmp_path / "untied", "qwen3")
    embedding, norm = 300 * 64, 64
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * norm
    qk_norms = 2 * 16
    assert bytes_of(tmp_path / "tied") == memory.Weights(
        4 * (2 * block + embedding + norm), 4 * max(block, embedding + norm), 4 * embedding
    )
    assert bytes_of(tmp_path / "untied") == memory.Weights(
        4 * (2 * (block + qk_norms) + 2 * embedding + norm), 4 * max(block + qk_norms, embedding + norm), 4 * embedding
    )


def test_the_tightest_control_group_counts(tmp_path):
    inner = tmp_path / "slice" / "unit"
    inner.mkdir(parents=True)
    groups = tmp_path / "cgroup"
    groups.write_text("0::/slice/unit\n")
    assert measure._left_in_control_groups(groups, tmp_path) is None
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("300\n")
    assert measure._left_in_control_groups(groups, tmp_path) is None
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("700\n")
    (inner.parent / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert measure._left_in_control_groups(groups, tmp_path) == 500
    (inner / "memory.max").write_text("350\n")
    assert measure._left_in_control_groups(groups, tmp_path) == 50


def test_control_groups_of_version_1(tmp_path):
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    groups = tmp_path / "cgroup"
    groups.write_text("5:cpu,cpuacct:/other\n4:memory:/job\n")
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory.usage_in_bytes").write_text("400\n")
    assert measure._left_in_control_groups(groups, tmp_path) is None
    (group / "memory.limit_in_bytes").write_text("1000\n")
    assert measure._left_in_control_groups(groups, tmp_path) == 600


def test_available_memory_of_meminfo(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       24000 kB\nMemAvailable:   12000 kB\n")
    assert measure._meminfo_available(path) == 12000 * 1024
    assert measure._meminfo_available(tmp_path / "gone") is None


# Block by block first, so that nothing which the other run leaves behind counts.
SCRIPT = """
import sys
import torch
from lowbit.evaluation import evaluate
from lowbit.evaluation.memory import WORKING_BYTES
from lowbit.measure import resident_memory, return_freed_memory

small, deep, text, *limits = sys.argv[1:]
torch.set_num_threads(1)
return_freed_memory()
evaluate(small, None, text, windows=1, window_tokens=8)  # what every run imports is no weight
before = resident_memory()
for limit in limits:
    allowed = resident_memory() + WORKING_BYTES + int(limit)
    [row] = evaluate(deep, deep, text, windows=2, window_tokens=64, max_memory=allowed)
    print(row.peak_memory_bytes - before, row.ppl, any("block by block" in note for note in row.notes))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is reset and read on Linux alone")
def test_memory_stays_under_that_of_the_whole_models(tmp_path, text_file, monkeypatch):
    """12 blocks of 1.3 million weights, twice, are 128 MB; one block, the embedding and the heads are 6 MB."""
    sizes = {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 12, "num_attention_heads": 4,
             "num_key_value_heads": 4, "head_dim": 80, "vocab_size": 300, "max_position_embeddings": 256}  # fmt: skip
    monkeypatch.setitem(CONFIGS, "deep", LlamaConfig(**sizes, tie_word_embeddings=True))
    save_model(tmp_path / "small", "llama")
    save_model(tmp_path / "deep", "deep")
    both = 2 * bytes_of(tmp_path / "deep").whole
    folders = [tmp_path / "small", tmp_path / "deep", text_file]
    command = [sys.executable, "-c", SCRIPT, *folders, both // 2, both + 50_000_000]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    blockwise, whole = (line.split() for line in done.stdout.splitlines())
    assert (blockwise[2], whole[2]) == ("True", "False")
    assert float(blockwise[1]) == pytest.approx(float(whole[1]), rel=1e-6)
    assert int(whole[0]) > both
    assert int(blockwise[0]) < both // 2
