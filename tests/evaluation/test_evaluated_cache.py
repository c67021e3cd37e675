"""`lowbit evaluate --kv-cache`: figures, tables, refusals; and against real llama.cpp with its cache types."""

import json

import pytest
import torch
import typer
from tiny_models import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import lowbit
from lowbit.architecture.loading import load_model
from lowbit.checkpoint.safetensors import SafetensorsCheckpoint
from lowbit.cli.evaluate import evaluate as command
from lowbit.cli.options import with_groups
from lowbit.errors import ShapeError, UsageError
from lowbit.evaluation.cache_result import cache_sentence, cache_table, context_label, layer_lines
from lowbit.evaluation.kv_cache import evaluate_kv_cache, parse_contexts
from lowbit.evaluation.metrics import token_kld
from lowbit.kv import CACHE_TYPES
from lowbit.kv.simulated import simulated_cache
from lowbit.report import schema
from lowbit.reporting import add_caches
from lowbit.text import cut_windows, read_text

app = typer.Typer()
app.command()(with_groups(command))
app.command("other")(lambda: None)
VOCABULARY = 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Head size 64: llama.cpp rotates."""
    path = tmp_path_factory.mktemp("kv") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False,
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.25)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@torch.inference_mode()
def test_figures_equal_a_direct_computation(folder, text_file):
    [row] = evaluate_kv_cache(folder, "int8_per_token_head", contexts=(64,), text=text_file, windows=3)
    ids = cut_windows(read_text(text_file), byte_tokenizer(), 3, 64).ids
    model = load_model(SafetensorsCheckpoint(folder))
    p = model(ids).logits.log_softmax(-1)[:, :-1].flatten(0, 1)
    with simulated_cache(model, CACHE_TYPES["int8_per_token_head"]):
        q = model(ids).logits.log_softmax(-1)[:, :-1].flatten(0, 1)
    assert row.kld_mean == pytest.approx(float(token_kld(p, q).mean()), rel=1e-3)
    assert row.kld_mean > 1e-6
    assert (row.scored_tokens, row.layers, row.bits_per_value, row.bytes_per_token) == (189, (0, 1), 8.5, 272)


def test_contexts_types_and_layers_in_one_call(folder, text_file):
    rows = evaluate_kv_cache(folder, "q4_0,fp8_calibrated,kvquant3", contexts=(128, 32), text=text_file, windows=8,
                             by_layer=True)  # fmt: skip
    assert [(row.type, row.context, row.windows) for row in rows] == [
        (name, *size) for size in ((32, 8), (128, 2)) for name in ("q4_0", "fp8_calibrated", "kvquant3")
    ]
    assert [row.scales for row in rows[:3]] == ["none", "calibrated", "calibrated"]
    for row in rows:
        assert [each.layer for each in row.by_layer] == [0, 1]
        assert max(each.kld_mean for each in row.by_layer) < 2 * row.kld_mean
    assert len(layer_lines(rows)) == 6
    assert cache_table(rows).row_count == 3


def test_block_by_block_has_the_same_figures(folder, text_file):
    from lowbit.evaluation import memory

    settings = {"contexts": (48,), "text": text_file, "windows": 3}
    types = "q8_0,fp8_per_head,kivi2,kvquant4"
    whole = evaluate_kv_cache(folder, types, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda *_: 0)
        blockwise = evaluate_kv_cache(folder, types, **settings)
    assert any("block by block" in note for note in blockwise[0].notes)
    for one, other in zip(whole, blockwise, strict=True):
        assert other.kld_mean == pytest.approx(one.kld_mean, rel=1e-3, abs=1e-6)


def test_stored_scales_are_used_and_weights_may_be_quantized(folder, text_file, tmp_path):
    out = tmp_path / "out"
    lowbit.quantize(folder, out, scheme="W8A16", group_size=32, kv_cache="fp8", samples=4, seqlen=32)
    [row] = evaluate_kv_cache(out, "fp8_calibrated", contexts=(64,), text=text_file, windows=2)
    assert (row.scales, row.scheme) == ("stored", "W8A16")
    [twice] = evaluate_kv_cache(folder, "fp8_calibrated", contexts=(64,), text=text_file, windows=2)
    assert twice.scales == "calibrated"


def run(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *(str(each) for each in arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_command_prints_a_table_and_puts_it_into_the_report(folder, text_file, tmp_path):
    out = tmp_path / "out"
    lowbit.quantize(folder, out, scheme="W8A16", group_size=32)
    asked = (out, "--text", text_file, "--kv-cache", "k=q8_0,v=q4_0,int4_per_token_head", "--context", "32,64",
             "--windows", 2)  # fmt: skip
    shown = run(*asked).stdout
    assert "q8_0/q4_0" in shown
    assert "least KLD at 64: up to 8.5 bits" in shown
    rows = json.loads(run(*asked, "--json").stdout)
    assert [row["context"] for row in rows] == [32, 32, 64, 64]
    assert [row.type for row in schema.load(out).kv_cache] == ["q8_0/q4_0", "int4_per_token_head"] * 2
    assert "int4_per_token_head" in (out / "report.html").read_text()


def test_later_figures_join_earlier_ones_and_replace_those_of_their_type_and_length(folder, text_file, tmp_path):
    out = tmp_path / "out"
    lowbit.quantize(folder, out, scheme="W8A16", group_size=32)
    rows = evaluate_kv_cache(out, "q8_0,q4_0", contexts=(32,), text=text_file, windows=1)
    add_caches(out, rows)
    later = rows[0].model_copy(update={"kld_mean": 9.0}), rows[0].model_copy(update={"context": 64})
    add_caches(out, later)
    found = {(row.type, row.context): row.kld_mean for row in schema.load(out).kv_cache}
    assert list(found) == [("q4_0", 32), ("q8_0", 32), ("q8_0", 64)]
    assert found["q8_0", 32] == 9.0
    other = rows[0].model_copy(update={"context": 128, "text": rows[0].text.model_copy(update={"name": "other.txt"})})
    add_caches(out, [other])
    assert "<td>other.txt</td>" in (out / "report.html").read_text()
    assert add_caches(folder, rows) is None, "it has no report"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--context", "1k"), "--context is read with --kv-cache alone"),
        (("--by-layer",), "--by-layer is read with --kv-cache alone"),
        (("--kv-cache", "q8_0", "--reference", "x"), "compares the model with itself"),
        (("--kv-cache", "q8_0", "--samples", "2"), "no model answer"),
        (("--kv-cache", "q8_0", "--activations", "simulated"), "both sides"),
        (("--kv-cache", "q8_0", "--context", "1k", "--window-tokens", "64"), "say the same"),
        (("--kv-cache", "q8_0", "--context", "2M"), "is no number of tokens"),
        (("--kv-cache", "q8_0", "--context", "1k"), "a context of 1024 tokens; the model was trained for 256"),
        (("--kv-cache", "q8_1"), "there is no cache type 'q8_1'"),
        (
            ("--kv-cache", "turboquant_4bit_nc", "--context", "64"),
            "keeps 2 layers at each end in 16 bits, which are all",
        ),
    ],
)
def test_what_makes_no_sense_is_named(folder, text_file, arguments, said):
    with pytest.raises(UsageError, match=said):
        run(folder, "--text", text_file, *arguments)


def test_heads_and_gguf_files_that_a_type_does_not_fit(tmp_path, text_file):
    save_model(tmp_path / "model", "llama")  # heads of 16 values
    with pytest.raises(ShapeError, match="blocks of 32, which do not divide heads of 16 values"):
        evaluate_kv_cache(tmp_path / "model", "q8_0", contexts=(64,), text=text_file)
    lowbit.quantize(tmp_path / "model", tmp_path / "m.gguf", scheme="F16")
    with pytest.raises(UsageError, match=r"m.gguf is a GGUF file, for llama.cpp; cache type fp8_e5m2 is one of vllm"):
        evaluate_kv_cache(tmp_path / "m.gguf", "fp8_e5m2", contexts=(64,), text=text_file)
    [row] = evaluate_kv_cache(tmp_path / "m.gguf", "kvquant4", contexts=(64,), text=text_file, windows=1)
    assert row.kld_mean > 0


def test_the_name_of_an_engine_stands_for_the_types_that_the_model_takes(folder, text_file):
    """A type that does not fit is an error where it is named, and a note where only its engine is."""
    rows = evaluate_kv_cache(folder, "vllm", contexts=(32,), text=text_file, windows=1)
    assert {"fp8_e4m3", "nvfp4", "int4_per_token_head"} <= {row.type for row in rows}
    assert not any(row.type.startswith("turboquant") for row in rows)
    assert any("left out: cache type turboquant_4bit_nc keeps 2 layers at each end" in note for note in rows[0].notes)
    with pytest.raises(UsageError, match="turboquant_4bit_nc keeps 2 layers"):
        evaluate_kv_cache(folder, "vllm,turboquant_4bit_nc", contexts=(32,), text=text_file, windows=1)


def test_a_context_that_the_window_holds_is_said_and_not_ranked(folder, text_file):
    rows = evaluate_kv_cache(folder, "kivi2,q4_0", contexts=(64,), text=text_file, windows=1)
    assert any("at 64 tokens kivi2 rounds nothing" in note for note in rows[0].notes)
    assert cache_sentence(rows).endswith("q4_0")
    [longer] = evaluate_kv_cache(folder, "kivi2", contexts=(160,), text=text_file, windows=1)
    assert longer.rounds
    assert not any("rounds nothing" in note for note in longer.notes)


def test_contexts_are_parsed():
    assert parse_contexts("512,2k, 8K") == (512, 2048, 8192)
    assert [context_label(each) for each in (512, 2048)] == ["512", "2k"]


@pytest.mark.parametrize("cache", ["q8_0/q8_0", "q5_1/q5_1", "q5_0/q5_0", "q4_1/q4_1", "q4_0/q4_0", "iq4_nl/iq4_nl",
                                   "q8_0/q4_0", "f16/q4_0"])  # fmt: skip
@torch.inference_mode()
def test_the_simulated_divergence_is_that_of_real_llama_cpp(folder, tmp_path_factory, real, cache):
    """Real llama.cpp with this cache against itself with one in F16: the mean KLD agrees within 2 %, and the simulated
    distributions are its own but for a thousandth of that."""
    import llama_cpp

    path, texts, base, simulated = real
    found = llama_cpp.next_token_logprobs(path, texts, 32, VOCABULARY, tuple(cache.split("/")))
    ours, plain = simulated(cache), simulated(None)
    truth, estimate = (float(token_kld(p, q).mean()) for p, q in ((base, found), (plain, ours)))
    assert estimate == pytest.approx(truth, rel=0.02)
    assert float(token_kld(found, ours).mean()) < 0.002 * truth


@pytest.fixture(scope="module")
def real(folder, tmp_path_factory):
    """(GGUF file, texts, llama.cpp's log-probabilities with a cache in F16, ours with a type)."""
    pytest.importorskip("xllamacpp")
    import llama_cpp

    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    lowbit.quantize(folder, path, scheme="F32")
    texts = torch.randint(97, 123, (2, 72), generator=torch.Generator().manual_seed(1)).tolist()
    model = load_model(SafetensorsCheckpoint(folder))

    def simulated(cache):
        from lowbit.evaluation.kv_cache import _key_order
        from lowbit.evaluation.opening import Opened
        from lowbit.kv import find_cache_type

        def logits():
            return model(torch.tensor(texts)).logits.log_softmax(-1)[:, 31:-1].flatten(0, 1)

        if cache is None:
            return logits()
        from lowbit.architecture.loading import Loader

        opened = Opened(SafetensorsCheckpoint(folder), Loader(SafetensorsCheckpoint(folder)), byte_tokenizer())
        with simulated_cache(model, find_cache_type(cache), key_order=_key_order(opened)):
            return logits()

    return path, texts, llama_cpp.next_token_logprobs(path, texts, 32, VOCABULARY, ("F16", "F16")), simulated
