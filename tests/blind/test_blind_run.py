"""Answers of files and of servers, runs that go on where they were stopped, and what is said of the two models."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from chat_servers import chatting, prompt_of

import lowbit
from embedding_models import make_embedding_model
from local_servers import JsonHandler, listening
from lowbit.blind.answering import Generation, answer_all, trimmed
from lowbit.blind.prompts import BlindPrompt
from lowbit.blind.run import compare_blind
from lowbit.errors import CheckpointError, EngineFailure, NonFiniteError, UsageError
from models import make_model


def shout(body):
    return prompt_of(body).upper()


def whisper(body):
    return f"  {prompt_of(body)}…\r\n"


def test_a_model_in_files_answers_as_generate_does(tiny_llama):
    prompts = [BlindPrompt("The sky is"), BlindPrompt("Two and two")]
    found = answer_all(str(tiny_llama), prompts, Generation(max_tokens=8))
    assert [answer.text for answer in found.answers] == [
        lowbit.generate(tiny_llama, prompt.text, 8).strip() for prompt in prompts
    ]


def test_two_servers_are_asked_for_the_same_and_trimmed_alike(prompts):
    with chatting(shout) as (a, asked), chatting(whisper) as (b, _):
        found = compare_blind(a, b, prompts, max_tokens=9, seed=5)
    assert [(pair.a, pair.b, pair.kind) for pair in found.pairs] == [
        ("ONE", "one…", "facts"), ("TWO", "two…", "code"), ("THREE", "three…", "code"),
    ]  # fmt: skip
    assert [(body["max_tokens"], body["temperature"]) for body in asked[1:]] == [(9, 0.0)] * 3
    assert {"a", "b"} == {pair.left for pair in compare_blind_order(40, 5)}
    assert found.seed == 5


def compare_blind_order(count, seed):
    from lowbit.blind.answering import Answers, Reply
    from lowbit.blind.run import in_order

    answers = Answers("x", [Reply("yes")] * count, [], None)
    return in_order([BlindPrompt(str(i)) for i in range(count)], answers, answers, seed)


def test_the_order_follows_the_seed_alone():
    orders = ["".join(pair.left for pair in compare_blind_order(64, seed)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert 20 < orders[0].count("a") < 44


def test_the_order_is_drawn_anew_where_no_seed_is_given(prompts):
    with chatting(shout) as (a, _), chatting(whisper) as (b, _):
        seeds = {compare_blind(a, b, prompts).seed for _ in range(3)}
    assert len(seeds) == 3


def test_a_model_without_chat_template_continues_plain_prompts_and_that_is_said(tiny_llama, prompts, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    had = config.pop("chat_template", None) is not None or (base / "chat_template.jinja").exists()
    assert had
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with chatting(shout, chat=False) as (a, asked):
        found = compare_blind(a, str(base), prompts, max_tokens=3)
    assert [body["path"] for body in asked] == ["/v1/chat/completions"] + ["/v1/completions"] * 3
    assert [pair.a for pair in found.pairs] == ["ONE", "TWO", "THREE"]
    assert f"{a} has no chat template: it continues the plain prompts" in found.notes
    assert f"{base} has no chat template: it continues the plain prompts" in found.notes


def test_the_same_model_twice_is_allowed_and_said(prompts, tiny_llama):
    found = compare_blind(str(tiny_llama), str(tiny_llama), prompts, max_tokens=3)
    assert found.same == 3
    assert "both are the same model, given twice: what is preferred here is chance" in found.notes
    assert "all answers are the same, word for word: there is nothing to vote on" in found.notes
    assert not any("was stopped" in note for note in found.notes)


def test_the_same_model_twice_says_different_things_where_it_samples(prompts, tiny_llama):
    found = compare_blind(str(tiny_llama), str(tiny_llama), prompts, max_tokens=12, temperature=1.0, seed=3)
    assert found.same == 0
    again = compare_blind(str(tiny_llama), str(tiny_llama), prompts, max_tokens=12, temperature=1.0, seed=3)
    assert again.pairs == found.pairs


def test_models_of_different_tokenizers_are_compared(tmp_path, prompts, tiny_llama):
    other = make_model(tmp_path / "other", "qwen3", vocab_size=512)
    assert len(compare_blind(str(tiny_llama), str(other), prompts, max_tokens=3).pairs) == 3


def test_a_gguf_file_and_its_folder_are_compared(tmp_path, prompts, tiny_llama):
    file = lowbit.quantize(tiny_llama, tmp_path / "m.gguf", scheme="F32", format="gguf").path
    found = compare_blind(str(file), str(tiny_llama), prompts, max_tokens=4)
    assert found.same == 3  # the same weights


@pytest.mark.parametrize("changed", ["chat_template.jinja", "model.safetensors", "tokenizer_config.json"])
def test_a_file_that_was_written_anew_is_another_model(tiny_llama, tmp_path, changed):
    """Answers of a run that was stopped are not mixed with those of what lies there now, though the first rows of its
    tensors be the same."""
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    how = Generation(max_tokens=1)
    kept = answer_all(str(model), [BlindPrompt("a")], how).kept
    assert answer_all(str(model), [BlindPrompt("a")], how).kept == kept
    data = bytearray((model / changed).read_bytes())
    data[-3] ^= 1 if changed == "model.safetensors" else 0
    (model / changed).write_bytes(data)
    os.utime(model / changed, ns=(1, 1))
    assert answer_all(str(model), [BlindPrompt("a")], how).kept != kept


def test_sampling_follows_the_seed_and_leaves_that_of_torch_alone(tiny_llama):
    def say(seed):
        found = answer_all(str(tiny_llama), [BlindPrompt("a"), BlindPrompt("b")], Generation(12, 1.5, seed))
        found.kept.unlink()
        return [answer.text for answer in found.answers]

    state = torch.random.get_rng_state()
    first = say(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert say(1) == first != say(2)


def test_thoughts_are_not_shown_and_counted(prompts):
    assert trimmed("<think>hm\n</think>\n\nYes.", False).text == "Yes."
    assert trimmed("<think>never ends", True).text == ""
    with chatting(lambda body: f"<think>x</think>{prompt_of(body)}") as (a, _), chatting(whisper) as (b, _):
        found = compare_blind(a, b, prompts)
    assert f"{a}: 3 of 3 answers had thoughts (<think> … </think>), which are not shown" in found.notes


def test_answers_without_a_text_are_empty_and_counted(prompts):
    with chatting(lambda body: None) as (a, _), chatting(whisper) as (b, _):
        found = compare_blind(a, b, prompts)
    assert [pair.a for pair in found.pairs] == [""] * 3
    assert f"{a}: 3 of 3 answers are empty" in found.notes


def test_a_run_goes_on_where_a_dying_server_stopped_it(prompts, cache):
    broken = ["three"]

    def say(body):
        return ("gone", 500) if prompt_of(body) in broken else prompt_of(body)

    with chatting(shout) as (a, asked_a), chatting(say) as (b, asked_b):
        with pytest.raises(EngineFailure, match="answers 500"):
            compare_blind(a, b, prompts)
        for path in (cache / "blind").iterdir():
            path.write_text(path.read_text() + '{"key": "cut')  # killed while it wrote
        broken.clear()
        before = len(asked_a), len(asked_b)
        found = compare_blind(a, b, prompts)
        assert (len(asked_a) - before[0], len(asked_b) - before[1]) == (1, 2)  # whether it chats, and what is missing
    assert f"{b}: 2 answers are from a run that was stopped" in found.notes
    assert [pair.b for pair in found.pairs] == ["one", "two", "three"]
    assert not list((cache / "blind").iterdir())


def dies_at_three(body):
    return ("gone", 500) if prompt_of(body) == "three" else prompt_of(body)


def test_other_conditions_do_not_take_the_answers_of_a_stopped_run(prompts):
    with chatting(shout) as (a, asked), chatting(dies_at_three) as (b, _):
        for tokens in (7, 8):
            with pytest.raises(EngineFailure):
                compare_blind(a, b, prompts, max_tokens=tokens)
    assert [body["max_tokens"] for body in asked if body["max_tokens"] > 1] == [7] * 3 + [8] * 3


def test_a_model_of_a_server_with_several_is_named_behind_a_hash(prompts):
    with chatting(shout, ("x", "y")) as (url, asked):
        compare_blind(url, f"{url}/v1#y", prompts)
    assert [body["model"] for body in asked] == ["x"] * 4 + ["y"] * 4


def test_the_key_goes_to_the_server_and_nowhere_else(prompts, monkeypatch):
    monkeypatch.setenv("LOWBIT_API_KEY", " secret\n")
    with chatting(shout) as (a, asked), chatting(whisper) as (b, _):
        found = compare_blind(a, b, prompts)
    assert {body["key"] for body in asked} == {"Bearer secret"}
    assert "secret" not in json.dumps(found.to_dict())


def test_a_server_that_wants_a_key_says_how_to_give_it(prompts):
    with chatting(lambda body: ("who are you", 401)) as (a, _), pytest.raises(EngineFailure) as raised:
        compare_blind(a, a, prompts)
    assert "LOWBIT_API_KEY" in raised.value.hint


@pytest.mark.parametrize(
    ("code", "hint"), [(429, "too many requests"), (503, "its log says why"), (404, "with this model")]
)
def test_a_server_that_refuses_says_what_to_do(prompts, code, hint):
    with chatting(lambda body: ("no", code)) as (a, _), pytest.raises(EngineFailure, match=str(code)) as raised:
        compare_blind(f"{a}#tiny", f"{a}#tiny", prompts)
    assert hint in raised.value.hint


@pytest.mark.parametrize("words", [7, ["x"], {"text": "x"}])
def test_an_answer_that_is_no_text_is_refused(prompts, words):
    with chatting(lambda body: words) as (a, _), pytest.raises(EngineFailure, match="where the words are due"):
        compare_blind(a, a, prompts)


@pytest.mark.parametrize(
    "page", [b"<html>", b'{"choices": [{"message": {"content": "\xff"}}]}', b"[" * 100_000, b"NaN"]
)
def test_a_server_that_answers_no_json_is_refused(prompts, page):
    class Handler(JsonHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    with listening(Handler) as a, pytest.raises(EngineFailure, match="answers no JSON object") as raised:
        compare_blind(a, a, prompts)
    assert "OpenAI's protocol" in raised.value.hint


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://no such host", "http://127.0.0.1:notaport"])
def test_an_address_where_nobody_answers_is_refused(address, prompts):
    with pytest.raises(EngineFailure, match="cannot be asked"):
        compare_blind(address, address, prompts)


def test_llama_cpp_computes_every_prompt_alone_and_others_are_not_told_to(prompts):
    """Else an answer depends on what was asked before, and a run that goes on gives others."""
    for owner, told in (("llamacpp", False), ("vllm", None)):
        with chatting(lambda body: "yes", owner=owner) as (url, asked):
            compare_blind(url, url, prompts)
        assert {body.get("cache_prompt") for body in asked} == {told}


def test_a_server_that_is_down_is_noticed_before_the_other_model_is_loaded(prompts, monkeypatch):
    monkeypatch.setattr("lowbit.blind.run.answer_all", lambda *_: pytest.fail("asked already"))
    with pytest.raises(EngineFailure, match="cannot be asked"):
        compare_blind("demo:smollm2", "http://127.0.0.1:9#named", prompts)


def test_a_prompt_longer_than_the_server_holds_says_what_to_do(prompts):
    said = "request (3030 tokens) exceeds the available context size (1024 tokens), try increasing it"
    with chatting(lambda body: (said, 500)) as (url, _), pytest.raises(EngineFailure, match="exceeds") as caught:
        compare_blind(url, url, prompts)
    assert "shorten the prompt" in caught.value.hint


def test_a_prompt_longer_than_the_model_holds_is_refused(tiny_llama, tmp_path):
    (tmp_path / "p.txt").write_text("word " * 400)
    with pytest.raises(UsageError, match=r"prompt 1 has .* tokens; the model holds 256"):
        compare_blind(str(tiny_llama), str(tiny_llama), tmp_path / "p.txt")


def test_a_model_that_writes_no_text_is_refused(tmp_path, prompts):
    model = str(make_embedding_model(tmp_path / "embedding", "qwen3"))
    with pytest.raises(UsageError, match="is a Qwen3Model, which writes no text"):
        compare_blind(model, model, prompts)


def test_likelihoods_that_are_not_finite_are_refused(tmp_path, prompts):
    broken = make_model(tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="prompt 1"):
            compare_blind(str(broken), str(broken), prompts, temperature=temperature)
    with pytest.raises(NonFiniteError, match="at the prompt"):
        lowbit.generate(str(broken), "one two", max_tokens=2)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"max_tokens": 0}, "cannot be generated"),
        ({"temperature": -1.0}, "cannot be generated"),
        ({"temperature": float("nan")}, "cannot be generated"),
        ({"seed": 2**32}, "more than 32 bits"),
        ({"judge_model": "x"}, "names a model of --judge"),
        ({"judge": "localhost"}, "is no address of a server"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_llama, prompts, how, says):
    with pytest.raises(UsageError, match=says):
        compare_blind(str(tiny_llama), str(tiny_llama), prompts, **how)


def test_no_model_is_asked_if_the_prompts_are_bad(tmp_path):
    with chatting(shout) as (a, asked), pytest.raises(CheckpointError):
        compare_blind(a, a, tmp_path / "absent")
    assert not asked


def test_a_config_with_an_empty_list_of_end_tokens_has_those_of_the_tokenizer(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns("generation_config.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": []}))
    assert len(answer_all(str(folder), [BlindPrompt("one two")], Generation(max_tokens=2)).answers) == 1
