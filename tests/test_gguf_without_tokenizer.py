"""GGUF files without a tokenizer, on request: what is in them, what reads them, and who says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.architecture.loading import load_model
from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.formats.gguf.raw import RawGGUF, open_raw_gguf
from models import SHORT_TEXT, SIZES, make_model


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A tiny Llama without a tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("bare") / "model", dtype=torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="module")
def file(bare) -> Path:
    return lowbit.quantize(bare, bare.parent / "ids.gguf", scheme="F32", no_tokenizer=True).path


def test_it_is_written_as_llama_cpps_converter_does(file):
    metadata = open_raw_gguf(file).metadata
    assert {key: value for key, value in metadata.items() if key.startswith("tokenizer.")} == {
        "tokenizer.ggml.model": "none"
    }
    assert metadata["llama.vocab_size"] == SIZES["vocab_size"]


def test_without_the_request_it_is_refused_and_named(bare, tmp_path):
    with pytest.raises(CheckpointError, match="there is no tokenizer") as refused:
        lowbit.quantize(bare, tmp_path / "x.gguf", scheme="Q8_0")
    assert "--no-tokenizer" in (refused.value.hint or "")


def test_a_tokenizer_that_llama_cpp_does_not_have_is_left_out(tmp_path):
    from tokenizers import Tokenizer, models

    model = make_model(tmp_path / "model")
    Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(model / "tokenizer.json"))
    with pytest.raises(LowbitError, match="WordPiece") as refused:
        lowbit.quantize(model, tmp_path / "x.gguf", scheme="Q8_0")
    assert "--no-tokenizer" in (refused.value.hint or "")
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="Q8_0", no_tokenizer=True)
    assert any("no tokenizer is written" in note for note in done.report.source.notes)


@pytest.mark.parametrize("named", ["none", "no_vocab"])
def test_verify_knows_it(file, tmp_path, named):
    path = tmp_path / "x.gguf"
    path.write_bytes(_renamed(file, named))
    checks = {check.rule: check for check in lowbit.verify(path).checks}
    assert checks["gguf-tokenizer"].passed
    failed = [check for check in checks.values() if not check.passed]
    assert [(check.rule, check.limit, check.outcome) for check in failed] == [("gguf-text", True, "refuses")]


def _renamed(file: Path, named: str) -> bytes:
    """The bytes of a file with another tokenizer.ggml.model; data begin at a multiple of 32, which padding keeps."""
    from gguf import GGUFWriter

    if named == "none":
        return file.read_bytes()
    raw, other = open_raw_gguf(file), file.parent / "renamed.gguf"
    writer = GGUFWriter(other, "llama")
    writer.add_tokenizer_model(named)
    for key, value in raw.metadata.items():
        if isinstance(value, int) and not isinstance(value, bool):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for tensor in raw.tensors:
        writer.add_tensor(tensor.name, raw.decode(tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return other.read_bytes()


def test_verify_compares_the_stated_size(file, tmp_path):
    damaged = bytearray(file.read_bytes())
    at = damaged.index(b"llama.vocab_size") + len(b"llama.vocab_size") + 4
    damaged[at : at + 4] = (999).to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(damaged)
    failed = {check.rule: check.detail for check in lowbit.verify(tmp_path / "x.gguf").checks if not check.passed}
    assert "384 rows, the stated vocab_size is 999" in failed["gguf-tokenizer"]


@pytest.mark.parametrize(
    "call",
    [
        lambda file, out: lowbit.imatrix(file, out / "x.imatrix", calib=SHORT_TEXT),
        lambda file, out: lowbit.evaluate(file, text=SHORT_TEXT),
        lambda file, out: lowbit.generate(file, "hello"),
        lambda file, out: lowbit.bench(file),
        lambda file, out: lowbit.quantize(file, out / "y.gguf", scheme="Q8_0", method="gptq", calib=SHORT_TEXT),
        lambda file, out: lowbit.finetune(file, out / "tuned", data=SHORT_TEXT),
        lambda file, out: lowbit.diagnose(file, reference=file),
    ],
    ids=["imatrix", "evaluate", "generate", "bench", "gptq", "finetune", "diagnose"],
)
def test_what_reads_text_says_what_is_missing(file, tmp_path, call):
    with pytest.raises(LowbitError, match=r"there is no tokenizer in .*ids\.gguf") as refused:
        call(file, tmp_path)
    assert refused.value.hint


def test_it_is_quantized_and_becomes_a_folder(bare, file, tmp_path):
    copied = lowbit.quantize(file, tmp_path / "q8.gguf", scheme="Q8_0")
    assert open_raw_gguf(copied.path).metadata["tokenizer.ggml.model"] == "none"
    assert copied.report.serve == ()
    ids = torch.randint(0, SIZES["vocab_size"], (8, 64)).tolist()
    calibrated = lowbit.quantize(
        file, tmp_path / "q4.gguf", scheme="Q4_0", method="gptq", calib=ids, allow_fallback=True
    )
    assert open_raw_gguf(calibrated.path).metadata["tokenizer.ggml.model"] == "none"
    folder = lowbit.convert(file, tmp_path / "back", format="float").path
    source, back = open_checkpoint(str(bare)), open_checkpoint(str(folder))
    assert all(torch.equal(source.read(name), back.read(name)) for name in source.tensors)
    again = lowbit.quantize(folder, tmp_path / "again.gguf", scheme="F32", no_tokenizer=True).path
    assert RawGGUF(again).metadata["llama.vocab_size"] == SIZES["vocab_size"]


@pytest.mark.parametrize("other", [{"pre_tokenizer": "llama-bpe"}, {"modelfile": True}])
def test_nothing_else_may_ask_for_a_tokenizer(bare, tmp_path, other):
    with pytest.raises(UsageError, match="--no-tokenizer writes none"):
        lowbit.quantize(bare, tmp_path / "x.gguf", scheme="F32", no_tokenizer=True, **other)


def test_a_model_in_memory_needs_none(bare, tmp_path):
    model = load_model(open_checkpoint(str(bare)))
    with pytest.raises(UsageError, match="none was given") as refused:
        lowbit.quantize(model, tmp_path / "x.gguf", scheme="F32")
    assert "no_tokenizer=True" in (refused.value.hint or "")
    done = lowbit.quantize(model, tmp_path / "x.gguf", scheme="F32", no_tokenizer=True)
    assert open_raw_gguf(done.path).metadata["tokenizer.ggml.model"] == "none"


@pytest.mark.interop
def test_llama_cpp_runs_it_on_token_ids(bare, file):
    pytest.importorskip("xllamacpp")
    from llama_cpp import last_logits

    ids = [0, 50, 60, 70, 200, 300]
    with torch.no_grad():
        wanted = load_model(open_checkpoint(str(bare)))(torch.tensor([ids])).logits[0, -1]
    found = last_logits(file, ids, SIZES["vocab_size"])
    assert (found.log_softmax(-1) - wanted.log_softmax(-1)).abs().max() < 0.01  # its cache has 16 bits
