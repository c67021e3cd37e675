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
from lowbit.tasks.answering import answers, choice_tokens, likelihoods
from lowbit.tasks.items import packaged_items
from lowbit.tasks.kept import key_of
from lowbit.tasks.models import WholeModel
from lowbit.tasks.server import ServedModel, kept_answers
from task_servers import serving


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return lowbit.load(tiny_llama)


def served_answers(served, items):
    """(answers, how many of them were kept by a run that was stopped)."""
    served.check_tokens([item.prompt for item in items])
    with served.keeping_answers():
        return answers(served, items), served.earlier


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


ITEMS = [item for name in ("facts", "format") for item in packaged_items(0, (name,))[:4]]


@pytest.mark.parametrize("echo", [True, False])
def test_a_server_answers_as_the_model_behind_it_does(loaded, echo):
    model, tokenizer = loaded
    with serving(model, tokenizer, echo) as (url, asked):
        served = ServedModel(url, tokenizer)
        found, before = served_answers(served, ITEMS)
        assert not kept_answers(served).exists()
    assert (found, before) == (answers(WholeModel(model, tokenizer), ITEMS), 0)
    assert len(asked) == 4 * len(ITEMS) or not echo


def test_answers_of_another_file_at_the_same_address_are_not_taken_over(loaded):
    with serving(*loaded) as (url, _):
        places = {kept_answers(ServedModel(url, loaded[1], of)) for of in ("one", "two")}
    assert len(places) == 2


def test_a_run_goes_on_where_a_dying_server_stopped_it(loaded):
    model, tokenizer = loaded
    with serving(model, tokenizer, dies_after=4 * 3 + 2) as (url, _):
        served = ServedModel(url, tokenizer)
        with pytest.raises(EngineFailure, match="answers 500"):
            served_answers(served, ITEMS)
        path = kept_answers(served)
        assert len(path.read_text().splitlines()) == 4 * 3 + 2
        path.write_text(path.read_text() + '{"item": "cut')  # killed while it wrote
    with serving(model, tokenizer) as (url, asked):
        again = ServedModel(url, tokenizer)
        kept_answers(again).write_text(path.read_text())  # the same server has another port here
        assert served_answers(again, ITEMS) == (answers(WholeModel(model, tokenizer), ITEMS), 4 * 3 + 2)
        assert len(asked) == 4 * (len(ITEMS) - 3) - 2


@pytest.mark.parametrize("tokenize", [True, False])
def test_a_server_with_other_tokens_is_refused(loaded, tokenize):
    """By its tokens; without /tokenize, by their number."""
    model, tokenizer = loaded
    other = serving(model, tokenizer, tokenize=tokenize, shift=1)
    with other as (url, _), pytest.raises(UsageError, match="tokenizer makes"):
        served_answers(ServedModel(url, tokenizer), ITEMS)
    with serving(model, tokenizer, tokenize=tokenize) as (url, _):
        ServedModel(url, tokenizer).check_tokens([item.prompt for item in ITEMS])


@pytest.mark.parametrize(("how", "says"), [({"told": False}, "log-probabilities"), ({"bias": 1}, "although a bias")])
def test_a_server_that_cannot_score_is_refused(loaded, how, says):
    with serving(*loaded, echo=False, **how) as (url, _), pytest.raises(EngineFailure, match=says):
        served_answers(ServedModel(url, loaded[1]), ITEMS)


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
            answers(served, ITEMS[:1])


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
        served_answers(ServedModel(url, loaded[1]), ITEMS)


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
        path = kept_answers(served)
        path.parent.mkdir(parents=True)
        ids, start = choice_tokens(tokenizer, ITEMS[0].prompt, ITEMS[0].choices[0])
        lines = [json.dumps({"key": key_of("scored", repr(ids), str(start)), "value": value})
                 for value in ({"right": 1}, [5.0, True], ["-1", None], [-1.0])]  # fmt: skip
        lines += ["[" * 100_000, "\0"]
        path.write_text("\n".join(lines))
        assert served_answers(served, ITEMS) == (answers(WholeModel(model, tokenizer), ITEMS), 0)


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
    expected = likelihoods(WholeModel(*loaded), [item])[0]
    assert likelihoods(served, [item])[0] == pytest.approx(expected, abs=2e-3)
    ids = list(loaded[1](item.prompt)["input_ids"])
    with torch.inference_mode():
        first, last = loaded[0](torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist()
    assert [served.scored([([*ids, each], len(ids))])[0].greedy for each in (first, last)] == [True, False]
    assert answers(served, packaged_items(0, ("code",))[:1]) == [False]  # random weights write no function
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


def test_a_url_without_tasks_is_refused(tiny_llama):
    answer = CliRunner().invoke(app, ["evaluate", str(tiny_llama), "--url", "http://127.0.0.1:9"])
    assert isinstance(answer.exception, UsageError)


@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("tops", [True, False])
def test_whether_a_continuation_is_the_most_probable_one(loaded, echo, tops):
    """As the model itself says; None where the server tells no most probable tokens."""
    model, tokenizer = loaded
    ids = list(tokenizer("one two three")["input_ids"])
    with torch.inference_mode():
        order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
    rows = [([*ids, order[0]], len(ids)), ([*ids, order[1]], len(ids))]
    with serving(model, tokenizer, echo, tops=tops) as (url, _):
        found = ServedModel(url, tokenizer).scored(rows)
    assert [each.greedy for each in found] == ([True, False] if tops else [None, None])
    expected = WholeModel(model, tokenizer).scored(rows)
    assert [each.greedy for each in expected] == [True, False]
    assert [each.total for each in found] == pytest.approx([each.total for each in expected], abs=1e-4)


def test_a_token_inside_a_character_is_scored_where_the_server_tells_nothing_of_it(loaded, monkeypatch):
    """As llama.cpp's: it is found among the most probable ones behind another choice."""
    model, tokenizer = loaded
    ids = list(tokenizer("one")["input_ids"])
    part = tokenizer("北", add_special_tokens=False)["input_ids"][0]
    assert tokenizer.decode([part]).endswith("\ufffd")
    with torch.inference_mode():
        logp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    counts = []

    def told(self, prompt, tokens, logprobs=0, logit_bias=None, **more):
        chosen = int(next(iter(logit_bias or {"0": 0})))
        counts.append(logprobs)
        if chosen == part or more.get("echo"):
            return {"choices": [{"text": "\ufffd", "logprobs": None}]}
        tops = [{"id": each, "logprob": logp[each].item()} for each in logp.argsort(descending=True).tolist()]
        content = {"id": chosen, "logprob": logp[chosen].item(), "top_logprobs": tops[:logprobs]}
        return {"choices": [{"logprobs": {"content": [content]}}]}

    monkeypatch.setattr("lowbit.tasks.server._MOST_PROBABLE", 1)
    monkeypatch.setattr(ServedModel, "_complete", told)
    with serving(model, tokenizer) as (url, _):
        found = ServedModel(url, tokenizer).scored([([*ids, part], len(ids))])[0]
    assert found == (pytest.approx(logp[part].item()), int(logp.argmax()) == part)
    assert counts[-1] in (1, 1 << 20)
