"""llama.cpp loads every file type that we write, and computes from it what we compute from the decoded weights.

It rounds activations to 8 bits in front of quantized matrices, so log-probabilities agree to hundredths, not to bits.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import lowbit
from gguf_models import ONE_OF_EACH, make_case
from llama_cpp import top_logprobs
from lowbit.architecture.loading import load_model, load_tokenizer
from lowbit.checkpoint import open_checkpoint
from lowbit.formats.gguf.mix_table import FILE_TYPES
from lowbit.formats.gguf.raw import open_raw_gguf
from lowbit.formats.gguf.weight_scales import applies_scale
from models import SHORT_TEXT, make_model

pytestmark = pytest.mark.interop

pytest.importorskip("xllamacpp")

DEMO = "demo:smollm2"
TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
FLOATS = ("F32", "F16", "BF16")
BLOCKS, TOKENS = 4, 2048  # of the demo model's thirty and 49152


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    """Some blocks and tokens of the demo model: its rows, which do not divide by 256, and a tenth of its bytes."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    checkpoint = open_checkpoint(DEMO)
    model = load_model(checkpoint, torch.bfloat16)
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.resize_token_embeddings(TOKENS)
    model.save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = {token: index for token, index in tokenizer["model"]["vocab"].items() if index < TOKENS}
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in tokenizer["model"]["merges"]]
    tokenizer["model"] |= {
        "vocab": vocabulary,
        "merges": [pair for pair in merges if all(token in vocabulary for token in (*pair, "".join(pair)))],
    }
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def imatrix(part, tmp_path_factory) -> str:
    """Of a few windows: enough for the types that need one."""
    path = tmp_path_factory.mktemp("imatrix") / "demo.imatrix"
    lowbit.imatrix(part, path, calib=SHORT_TEXT, samples=4, seqlen=128)
    return str(path)


@pytest.mark.sampled(6, keep=("Q4_K_M",))
@pytest.mark.demo_model
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_part_of_the_demo_model_in_every_file_type(file_type, part, imatrix, tmp_path):
    weighed = {} if file_type in FLOATS else {"imatrix": imatrix}
    path = lowbit.quantize(part, tmp_path / "x.gguf", scheme=file_type, format="gguf", **weighed).path
    theirs, ours = both(path, load_tokenizer(open_checkpoint(part))(TEXT).input_ids)
    assert expected_difference(theirs, ours) < (0.002 if file_type == "F32" else 0.25), (theirs, ours)


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_whole_demo_model(tmp_path):
    path = lowbit.quantize(DEMO, tmp_path / "x.gguf", scheme="Q4_K_M", format="gguf").path
    theirs, ours = both(path, load_tokenizer(open_checkpoint(DEMO))(TEXT).input_ids)
    assert expected_difference(theirs, ours) < 0.25, (theirs, ours)


@pytest.fixture(scope="module")
def whole_rows(tmp_path_factory) -> tuple[Path, Path]:
    """(a tiny Llama whose rows divide by 256, so that no type falls back to another, its imatrix)."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model(folder / "model", hidden_size=256, intermediate_size=512, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=64)  # fmt: skip
    text = folder / "text.txt"
    text.write_text("abc def ghi " * 300)
    lowbit.imatrix(model, folder / "tiny.imatrix", calib=text, samples=4, seqlen=64)
    return model, folder / "tiny.imatrix"


@pytest.mark.sampled(6)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_model_without_fallbacks_in_every_file_type(file_type, whole_rows, tmp_path):
    model, matrix = whole_rows
    weighed = {} if file_type in FLOATS else {"imatrix": str(matrix)}
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme=file_type, format="gguf", **weighed)
    assert not [entry for entry in done.report.tensors if any("do not divide" in note for note in entry.notes)]
    theirs, ours = both(done.path)
    assert expected_difference(theirs, ours) < (1e-5 if file_type == "F32" else 0.05), (theirs, ours)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_every_architecture_quantized(case, tmp_path):
    path = lowbit.quantize(make_case(tmp_path / "hf", case), tmp_path / "x.gguf", scheme="Q8_0").path
    theirs, ours = both(path)
    assert expected_difference(theirs, ours) < 0.05, (theirs, ours)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_every_architecture_in_nvfp4(case, tmp_path):
    """llama.cpp multiplies by every scale that lies beside a matrix: 2⁻⁹ or so of these, which would show if it did
    not. Where it does not, there is none."""
    path = lowbit.quantize(make_case(tmp_path / "hf", case), tmp_path / "x.gguf", scheme="NVFP4").path
    raw = open_raw_gguf(path)
    names, arch = {tensor.name for tensor in raw.tensors}, raw.metadata["general.architecture"]
    applied = {tensor.name for tensor in raw.tensors if tensor.type_name == "NVFP4"}
    assert raw.weight_scales.keys() == {name for name in applied if applies_scale(arch, name, names)} == applied
    assert all(raw.decode(scale).max() < 0.01 for scale in raw.weight_scales.values())
    theirs, ours = both(path)
    assert expected_difference(theirs, ours) < 0.05, (theirs, ours)


def expected_difference(theirs: dict[int, float], ours: dict[int, float]) -> float:
    """Σ p |log p − log q| over the tokens, p ours: rounded activations show most on improbable tokens."""
    return sum(math.exp(ours[token]) * abs(ours[token] - theirs[token]) for token in theirs)


def both(path: Path, ids: list[int] | None = None) -> tuple[dict[int, float], dict[int, float]]:
    """Log-probabilities of llama.cpp's ten most probable tokens, by llama.cpp and by transformers (decoded weights).

    ids  the prompt; None: a random one that an ASCII letter follows, because llama.cpp holds back half a character
    """
    model = load_model(open_checkpoint(path), torch.float32)
    prompts = [ids] if ids else [torch.randint(3, 250, (40,), generator=random(seed)).tolist() for seed in range(100)]
    best, widest = None, -1.0
    for prompt in prompts:
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
        gap = expected.topk(2).values.diff().abs().item()
        if ids or (3 <= int(expected.argmax()) < 97 and gap > widest):
            best, widest = (prompt, expected), gap
            if ids or gap > 0.1:
                break
    assert best is not None, "no prompt is followed by a letter"
    prompt, expected = best
    found = top_logprobs(path, prompt)
    assert len(found) == 10
    return found, {token: expected[token].item() for token in found}


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
