import pytest
import torch
from tiny_models import byte_tokenizer, save_model
from transformers import AutoModelForCausalLM

from embedding_models import make_embedding_model
from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.generation import generate, prompt_ids

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(path, "llama", chat_template=TEMPLATE)
    return path


def test_greedy_text_is_that_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = byte_tokenizer()
    ids = tokenizer("hello", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    assert generate(folder, "hello", 12, chat="raw") == tokenizer.decode(expected, skip_special_tokens=True)


def test_chat_models_get_their_template():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    assert tokenizer.decode(prompt_ids(tokenizer, "hi", "auto")[0]) == "[user]hi[a]"
    assert tokenizer.decode(prompt_ids(tokenizer, "hi", "raw")[0]) == "hi"
    assert byte_tokenizer().decode(prompt_ids(byte_tokenizer(), "hi", "auto")[0]) == "hi"


def test_sampling_repeats_with_its_seed_and_leaves_torch_alone(folder):
    state = torch.get_rng_state()
    first = generate(folder, "hello", 16, temperature=1.5, seed=3)
    assert generate(folder, "hello", 16, temperature=1.5, seed=3) == first
    assert generate(folder, "hello", 16, temperature=1.5, seed=4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_streamed_pieces_make_up_the_answer(folder):
    pieces: list[str] = []
    answer = generate(folder, "hello", 24, temperature=0.8, on_text=pieces.append)
    assert "".join(pieces) == answer


@pytest.mark.parametrize(("max_tokens", "temperature"), [(0, 0.0), (5, -1.0)])
def test_senseless_settings_are_refused(folder, max_tokens, temperature):
    with pytest.raises(UsageError):
        generate(folder, "hello", max_tokens, temperature)


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a Qwen3Model, which writes no text"):
        generate(make_embedding_model(tmp_path / "embedding", "qwen3"), "hello", 2)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="no tokens"):
        prompt_ids(byte_tokenizer(), "", "raw")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for message in messages %}{{ message", "TemplateSyntaxError"),
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{{ messages[7].content.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_blamed_on_the_model(template, what):
    with pytest.raises(CheckpointError, match=what) as caught:
        prompt_ids(byte_tokenizer(chat_template=template), "hello", "auto")
    assert "--raw" in caught.value.hint
    assert prompt_ids(byte_tokenizer(chat_template=template), "hello", "raw").shape[0] == 1


def test_a_prompt_that_the_context_cannot_hold_is_refused_and_an_answer_ends_with_it(folder, caplog):
    longest = AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings
    with pytest.raises(UsageError, match=f"the prompt has {longest + 5} tokens; the model holds {longest}"):
        generate(folder, "a" * (longest + 5), 1, chat="raw")
    found = generate(folder, "a" * (longest - 3), 64, chat="raw")
    assert len(byte_tokenizer()(found)["input_ids"]) <= 3 * 4
    assert "stops after 3 tokens, where the model's context ends" in caplog.text
