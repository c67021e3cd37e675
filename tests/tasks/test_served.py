"""Tasks over a server: a stand-in for vLLM and one for llama.cpp, with a real model behind both."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from local_servers import JsonHandler, listening
from lowbit.cli.main import app
from lowbit.errors import EngineFailure, UsageError
from lowbit.tasks import endpoint
from lowbit.tasks.answering import answers, likelihoods
from lowbit.tasks.items import packaged_items
from lowbit.tasks.kept import key_of
from lowbit.tasks.run import evaluate_tasks
from lowbit.tasks.server import ServedModel, kept_answers, served_answers


@contextmanager
def serving(model, tokenizer, echo=True, tokenize=True, shift=0, dies_after=None, told=True, bias=0):
    """An OpenAI-like server. echo: as vLLM; else one token at a time, as llama.cpp. shift, bias: of its ids."""
    asked = []

    class Handler(JsonHandler):
        def do_GET(self):
            self.send_json({"data": [{"id": "tiny"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                if not tokenize:
                    return self.send_json({}, 404)
                return self.send_json({"tokens": [each + shift for each in tokenizer(body["prompt"])["input_ids"]]})
            asked.append(body)
            if dies_after is not None and len(asked) > dies_after:
                return self.send_json({"error": "gone"}, 500)
            prompt = body["prompt"]
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            usage = {"prompt_tokens": len(ids) + shift}
            with torch.inference_mode():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            choice = {"text": " pass"}
            if echo and body.get("echo"):
                own = [None, *(logp[i - 1, ids[i]].item() for i in range(1, len(ids)))]
                choice["logprobs"] = {"token_logprobs": [*own, -1.0]}
            elif told and body.get("logit_bias"):
                token = int(next(iter(body["logit_bias"]))) + bias
                choice["logprobs"] = {"content": [{"id": token, "logprob": logp[-1, token].item()}]}
            return self.send_json({"choices": [choice], "usage": usage})

    with listening(Handler) as address:
        yield address, asked


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return lowbit.load(tiny_llama)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


ITEMS = [item for name in ("facts", "format") for item in packaged_items(0, (name,))[:4]]


@pytest.mark.parametrize("echo", [True, False])
def test_a_server_answers_as_the_model_behind_it_does(loaded, echo):
    model, tokenizer = loaded
    with serving(model, tokenizer, echo) as (url, asked):
        served = ServedModel(url, tokenizer)
        found, before = served_answers(served, ITEMS, 0)
        assert not kept_answers(served, 0).exists()
    assert (found, before) == (answers(model, tokenizer, ITEMS), 0)
    assert len(asked) == 4 * len(ITEMS) or not echo


def test_answers_of_another_file_at_the_same_address_are_not_taken_over(loaded):
    with serving(*loaded) as (url, _):
        places = {kept_answers(ServedModel(url, loaded[1], of), 0) for of in ("one", "two")}
    assert len(places) == 2


def test_a_run_goes_on_where_a_dying_server_stopped_it(loaded):
    model, tokenizer = loaded
    with serving(model, tokenizer, dies_after=4 * 3 + 2) as (url, _):
        served = ServedModel(url, tokenizer)
        with pytest.raises(EngineFailure, match="answers 500"):
            served_answers(served, ITEMS, 0)
        path = kept_answers(served, 0)
        assert len(path.read_text().splitlines()) == 3
        path.write_text(path.read_text() + '{"item": "cut')  # killed while it wrote
    with serving(model, tokenizer) as (url, asked):
        again = ServedModel(url, tokenizer)
        kept_answers(again, 0).write_text(path.read_text())  # the same server has another port here
        assert served_answers(again, ITEMS, 0) == (answers(model, tokenizer, ITEMS), 3)
        assert len(asked) == 4 * (len(ITEMS) - 3)


@pytest.mark.parametrize("tokenize", [True, False])
def test_a_server_with_other_tokens_is_refused(loaded, tokenize):
    """By its tokens; without /tokenize, by their number."""
    model, tokenizer = loaded
    other = serving(model, tokenizer, tokenize=tokenize, shift=1)
    with other as (url, _), pytest.raises(UsageError, match="tokenizer makes"):
        served_answers(ServedModel(url, tokenizer), ITEMS, 0)
    with serving(model, tokenizer, tokenize=tokenize) as (url, _):
        ServedModel(url, tokenizer).check_tokens([item.prompt for item in ITEMS])


@pytest.mark.parametrize(("how", "says"), [({"told": False}, "log-probabilities"), ({"bias": 1}, "although a bias")])
def test_a_server_that_cannot_score_is_refused(loaded, how, says):
    with serving(*loaded, echo=False, **how) as (url, _), pytest.raises(EngineFailure, match=says):
        served_answers(ServedModel(url, loaded[1]), ITEMS, 0)


def test_a_server_that_lists_one_model_and_answers_as_another_is_refused(loaded):
    with saying({"model": "small", "choices": [{"text": "A"}]}) as url:
        server = endpoint.Endpoint(url)
        with pytest.raises(EngineFailure, match="asked for 'tiny', and 'small' answers") as caught:
            server.choice("/v1/completions", {"prompt": "x"})
        assert f"{url}#small" in caught.value.hint
        assert endpoint.Endpoint(f"{url}#small").choice("/v1/completions", {"prompt": "x"}) == {"text": "A"}
        assert endpoint.Endpoint(f"{url}#/models/Small").choice("/v1/completions", {"prompt": "x"}) == {"text": "A"}


@contextmanager
def saying(answer):
    """A server that answers every question alike; bytes go out as they are."""

    class Handler(JsonHandler):
        def do_GET(self):
            self.send_json({"data": [{"id": "tiny"}]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/tokenize":
                self.send_json({}, 404)
            elif isinstance(answer, bytes):
                self.wfile.write(answer)
            else:
                self.send_json(answer)

    with listening(Handler) as address:
        yield address


@pytest.mark.parametrize("told", [float("nan"), -float("inf"), "-1.0", None, 5.0, True, [1.0]], ids=str)
@pytest.mark.parametrize("echo", [True, False])
def test_what_is_no_log_probability_makes_no_answer_right_or_wrong(loaded, echo, told):
    """NaN compares as wrong, and a positive one as right: an item would be counted by chance."""

    def lies(self, prompt, tokens, **more):
        content = [{"id": int(next(iter(more.get("logit_bias") or {"0": 0}))), "logprob": told}]
        logprobs = {"token_logprobs": [told] * 99} if echo else {"content": content}
        return {"choices": [{"logprobs": logprobs}]}

    with serving(*loaded) as (url, _):
        served = ServedModel(url, loaded[1])
        served._complete = lies.__get__(served)
        with pytest.raises(EngineFailure, match="where the log-probability of a token is due"):
            served.answer(ITEMS[0])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"choices": {"0": 1}}, "answers no choices"),
        ({"choices": [None]}, "answers no choices"),
        ({"choices": [{"text": "x"}], "usage": None}, "neither the tokens of a text nor their number"),
        (b"HTTP/1.1 500 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "answers 500"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{", "answers no JSON object"),
    ],
)
def test_a_server_that_speaks_another_protocol_is_refused(loaded, answer, says):
    with saying(answer) as url, pytest.raises((EngineFailure, UsageError), match=says):
        served_answers(ServedModel(url, loaded[1]), ITEMS, 0)


def test_an_answer_that_comes_drop_by_drop_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(endpoint, "_TIMEOUT", 0.5)

    class Handler(JsonHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(50):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

    began = time.monotonic()
    with listening(Handler) as url, pytest.raises(EngineFailure, match="is not whole after"):
        endpoint.Endpoint(url)
    assert time.monotonic() - began < 8


def test_kept_answers_that_are_damaged_are_asked_again(loaded):
    model, tokenizer = loaded
    with serving(model, tokenizer) as (url, _):
        served = ServedModel(url, tokenizer)
        path = kept_answers(served, 0)
        path.parent.mkdir(parents=True)
        lines = [json.dumps({"key": key_of(repr(ITEMS[0])), "value": {"right": 1}}), "[" * 100_000, "\0"]
        path.write_text("\n".join(lines))
        assert served_answers(served, ITEMS, 0) == (answers(model, tokenizer, ITEMS), 0)


def test_llama_cpps_own_server(tiny_llama, loaded, tmp_path):
    """The probabilities of choices, and code that it writes, against the model that its file was made of."""
    xllamacpp = pytest.importorskip("xllamacpp")
    file = lowbit.quantize(tiny_llama, tmp_path / "m.gguf", scheme="F32", format="gguf").path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(file), 256, 1, port
    params.warmup, params.verbosity = False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    running = xllamacpp.Server(params)
    served = ServedModel(f"http://127.0.0.1:{port}", loaded[1])
    served.check_tokens([item.prompt for item in ITEMS])
    item = ITEMS[0]
    expected = likelihoods(*loaded, [item])[0]
    found = [served._likelihood(item.prompt, choice) / len(choice.encode()) for choice in item.choices]
    assert found == pytest.approx(expected, abs=2e-3)
    assert served.answer(packaged_items(0, ("code",))[0]) is False  # random weights write no function
    assert running


def test_no_server(loaded):
    with pytest.raises(EngineFailure, match="cannot be asked"):
        ServedModel("http://127.0.0.1:9", loaded[1])


def test_the_command_pairs_a_server_with_the_reference_that_is_loaded(tiny_llama, loaded, tmp_path):
    made = lowbit.quantize(tiny_llama, tmp_path / "out", scheme="W8A16").path
    with serving(*loaded) as (url, _):
        words = ["evaluate", str(made), "--tasks", "facts", "--task-items", "3", "--url", url + "/v1", "--json"]
        found = json.loads(CliRunner().invoke(app, words).stdout)
    assert [(row["lost"], row["gained"]) for row in found["rows"]] == [(0, 0), (0, 0)]  # the source is behind it
    assert any(url in note for note in found["notes"])


def test_lm_evals_tasks_and_a_url_without_tasks_are_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr("lowbit.tasks.harness.check_tasks", lambda names, trusted: "lm-eval 0.4.13")
    with pytest.raises(UsageError, match="not run over a server"):
        evaluate_tasks(tiny_llama, tasks=["mmlu"], url="http://127.0.0.1:9")
    answer = CliRunner().invoke(app, ["evaluate", str(tiny_llama), "--url", "http://127.0.0.1:9"])
    assert isinstance(answer.exception, UsageError)
