"""`--modelfile`: what Ollama's parser reads of it, and what it never overwrites."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowbit
from lowbit.errors import OutputError, UsageError
from lowbit.formats.gguf.chat_format import written
from lowbit.formats.gguf.modelfile import make_modelfile
from models import make_model
from ollama import parse_modelfile

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VALUES = {
    "general.architecture": "llama", "llama.context_length": 2048, "general.license": "mit",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "<|eot|>"], "tokenizer.ggml.token_type": [3, 3, 1, 3],
    "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": CHATML,
    "general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 20, "general.sampling.xtc_threshold": 0.5,
}  # fmt: skip


def commands(values: dict, **more) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for command, value in parse_modelfile(make_modelfile(values, "a model", **more).text(["x.gguf"])):
        found.setdefault(command, []).append(value)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("modelfile") / "tiny", "llama")
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "LICENSE.txt").write_text('Licensed "as is".\n\n\tBe """kind""" to all\r\n')
    generation = {"eos_token_id": [1, 0], "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def make(model: Path, output: Path, **more) -> Path:
    return lowbit.quantize(str(model), output, scheme="Q8_0", pre_tokenizer="gpt-2", modelfile=True, **more).path


def test_everything_that_a_folder_says_of_itself(model, tmp_path):
    done = make(model, tmp_path / "it's a.gguf")
    found = dict(parse_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8")))
    assert found["FROM"] == f"./{done.name}"
    assert found["SYSTEM"] == "Be brief."
    assert found["TEMPLATE"].startswith("{{ if .System }}<|im_start|>system\n")
    assert found["LICENSE"] == 'Licensed "as is".\n\n\tBe """kind""" to all'
    assert (found["temperature"], found["top_p"], found["repeat_penalty"]) == ("0.7", "0.9", "1.1")
    assert found["num_ctx"] == "256"
    stops = [value for name, value in parse_modelfile((tmp_path / "Modelfile").read_text()) if name == "stop"]
    assert stops == ["</s>", "<s>"]
    report = json.loads((tmp_path / "it's a.lowbit-report.json").read_text())
    assert [file["name"] for file in report["output"]["beside"]] == ["Modelfile"]
    assert lowbit.verify(done).ok


@pytest.mark.demo_model
def test_the_modelfile_of_the_document_is_the_demo_model_s(tmp_path):
    lowbit.quantize("demo:smollm2", tmp_path / "smollm2-Q4_K_L.gguf", scheme="Q4_K_L", modelfile=True)
    text = (Path(__file__).parents[2] / "docs" / "ollama.md").read_text(encoding="utf-8")
    assert (tmp_path / "Modelfile").read_text(encoding="utf-8") in text


def test_a_gguf_source_gives_the_same_but_for_the_license_file(model, tmp_path):
    folder = {name: tmp_path / name for name in ("one", "two")}
    for each in folder.values():
        each.mkdir()
    first = make(model, folder["one"] / "x.gguf")
    lowbit.quantize(str(first), folder["two"] / "x.gguf", scheme="Q4_0", modelfile=True)
    one, two = (parse_modelfile((each / "Modelfile").read_text()) for each in folder.values())
    dropped = {("LICENSE", 'Licensed "as is".\n\n\tBe """kind""" to all'), ("stop", "<s>")}
    assert [pair for pair in one if pair not in dropped] == two


def test_a_split_model_has_a_line_for_each_part(tmp_path):
    make(make_model(tmp_path / "wide", "llama", vocab_size=9000), tmp_path / "x.gguf", shard_size=1_000_000)
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    named = [value for name, value in parse_modelfile((tmp_path / "Modelfile").read_text()) if name == "FROM"]
    assert len(parts) > 1
    assert named == [f"./{part}" for part in parts]


def test_convert_writes_one_too(model, tmp_path):
    lowbit.convert(model, tmp_path / "x.gguf", format="gguf", scheme="F16", modelfile=True, pre_tokenizer="gpt-2")
    assert (tmp_path / "Modelfile").is_file()


def test_a_modelfile_that_is_there_is_kept(model, tmp_path):
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(OutputError, match="Modelfile exists already") as caught:
        make(model, tmp_path / "x.gguf")
    assert caught.value.hint == "choose another folder with -o, or remove it first"
    with pytest.raises(OutputError, match="Modelfile exists already, and lowbit did not write it"):
        make(model, tmp_path / "x.gguf", overwrite=True)
    (tmp_path / "Modelfile").unlink()
    make(model, tmp_path / "x.gguf")
    make(model, tmp_path / "x.gguf", overwrite=True)
    with pytest.raises(OutputError, match="Modelfile exists already"):
        make(model, tmp_path / "y.gguf")
    lowbit.quantize(str(model), tmp_path / "y.gguf", scheme="Q8_0", pre_tokenizer="gpt-2")
    before = (tmp_path / "Modelfile").read_bytes()
    with pytest.raises(OutputError, match=r"Modelfile is not a file that y\.lowbit-report\.json describes"):
        make(model, tmp_path / "y.gguf", overwrite=True)
    assert (tmp_path / "Modelfile").read_bytes() == before


def test_a_name_that_from_cannot_say_is_refused_before_work(model, tmp_path):
    with pytest.raises(UsageError, match="a Modelfile cannot name this file"):
        make(model, tmp_path / "a\nb.gguf")
    assert not list(tmp_path.iterdir())


def test_parameters_of_a_file():
    found = commands(VALUES, ends=[3, 2, 99])
    assert found["stop"] == ["</s>", "<|eot|>"]
    assert (found["temperature"], found["top_k"], found["num_ctx"]) == (["0.6"], ["20"], ["2048"])
    assert found["LICENSE"] == ["mit"]
    assert "xtc_threshold" not in found
    assert commands(VALUES | {"llama.context_length": 131072})["num_ctx"] == ["8192"]
    assert commands({"general.architecture": "llama"}) == {"FROM": ["./x.gguf"]}


@pytest.mark.parametrize(
    "damaged",
    [
        {"tokenizer.ggml.token_type": [3]}, {"tokenizer.ggml.token_type": ["x"] * 4}, {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.eos_token_id": "x"}, {"tokenizer.ggml.eos_token_id": -1}, {"tokenizer.chat_template": [1]},
        {"general.sampling.temp": float("nan")}, {"general.sampling.top_k": True}, {"llama.context_length": "x"},
        {"general.license": ["a"]}, {"general.license": "a\nPARAMETER num_gpu 0"}, {"general.architecture": None},
        {"tokenizer.ggml.tokens": ["<s>", 'x"""\nSYSTEM y', "a", "b"]},
    ],
)  # fmt: skip
def test_a_damaged_file_has_a_modelfile_without_what_is_damaged(damaged):
    found = commands(VALUES | damaged)
    assert found["FROM"] == ["./x.gguf"]
    assert not found.keys() & {"num_gpu"}
    assert found.get("temperature", ["0.6"]) == ["0.6"]
    assert found.get("SYSTEM", ["Be brief."]) == ["Be brief."]


def test_what_is_left_out_is_noted():
    made = make_modelfile(VALUES | {"tokenizer.chat_template": "{{ messages | length }}"}, "a model", ends=[2])
    assert "TEMPLATE" not in made.body
    assert "the Modelfile has no TEMPLATE" in made.notes[0]
    assert "does not have 'a' as a stop" in made.notes[1]
    with_tools = make_modelfile(VALUES | {"tokenizer.chat_template": "{% if tools %}x{% endif %}" + CHATML}, "a model")
    assert with_tools.notes == ("TEMPLATE of the Modelfile has no tool calls, which the chat template has",)
    quotes = CHATML.replace("Be brief.", 'a"""\nb')
    assert any("no SYSTEM" in note for note in make_modelfile(VALUES | {"tokenizer.chat_template": quotes}, "m").notes)


@given(text=st.text(alphabet=st.sampled_from(list(' "\n\tab{}#')), min_size=1, max_size=40))
def test_whatever_is_written_is_read_back(text):
    from lowbit.formats.gguf.modelfile import _quoted

    if written(text):
        assert parse_modelfile(f"FROM x\nSYSTEM {_quoted(text)}\nPARAMETER num_ctx 1\n") == [
            ("FROM", "x"), ("SYSTEM", text), ("num_ctx", "1")
        ]  # fmt: skip
