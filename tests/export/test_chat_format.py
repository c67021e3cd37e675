"""Ollama's TEMPLATE renders conversations as the Jinja template does, or there is none."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lowbit.formats.gguf.chat_format import ChatFormat, find_chat_format, written
from ollama import render_go

BOS, EOS = "<s>", "</s>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe {brief}.<|im_end|>\n{% endif %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% set rule = '' %}{% if messages[0].role == 'system' %}{% set rule = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "Cutting Knowledge Date: December 2023\n\n{{ rule }}<|eot_id|>" + LLAMA3.removeprefix("{{ bos_token }}")
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% set rule = '' %}{% if messages[0].role == 'system' %}{% set rule = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (rule if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}"
    "<｜end▁of▁sentence｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML, "chatml with a default": DEFAULT + CHATML, "llama 3": LLAMA3, "llama 3.1": LLAMA31,
    "gemma": GEMMA, "gemma 3": GEMMA3, "mistral": MISTRAL, "llama 2": LLAMA2, "zephyr": ZEPHYR, "deepseek": DEEPSEEK,
}  # fmt: skip
_SAID = ("Hello {you}", "Hi.", "So?\n\nWhy", "Ah", "e")
TALK = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(_SAID)]
RULE = {"role": "system", "content": "Rhyme."}


def found_in(template: str, adds_bos: bool = True) -> tuple[ChatFormat | None, str]:
    return find_chat_format(template, BOS, EOS, adds_bos, "a model")


def jinja(template: str, messages: list[dict[str, str]]) -> str:
    """Without BOS, which Ollama adds."""
    rendered = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token=BOS, eos_token=EOS
    )[0][0]
    return rendered.removeprefix(BOS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_go_says_what_jinja_says(name):
    template = TEMPLATES[name]
    found, why = found_in(template)
    assert found is not None, why
    for count in (1, 3, 5):
        expected = jinja(template, TALK[:count])
        assert render_go(found.go_template, TALK[:count], found.default_system or "") == expected
        if name not in ("gemma", "mistral"):  # which refuse system messages
            expected = jinja(template, [RULE, *TALK[:count]])
            assert render_go(found.go_template, [RULE, *TALK[:count]], found.default_system or "") == expected


def test_the_system_message_that_a_template_says_by_itself():
    found, _ = found_in(DEFAULT + CHATML)
    assert found is not None
    assert found.default_system == "Be {brief}."
    assert [found_in(TEMPLATES[name])[0].default_system for name in ("chatml", "llama 3.1")] == [None, ""]


def test_an_answer_that_is_to_be_continued_is_not_ended():
    found, _ = found_in(CHATML)
    assert found is not None
    assert render_go(found.go_template, TALK[:2]).endswith("<|im_start|>assistant\nHi.")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no') }}", "cannot be rendered"),
        ("{{ oops", "cannot be rendered"),
        ("{{ messages | length }}" + CHATML, "does more"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does more"),
        (CHATML.replace("m['content']", "m['content'] if not loop.last else m['content'] + '!'"), "does more"),
        (CHATML.replace("<|im_end|>", "{{ '{{' }}"), "does more"),
        (CHATML.replace("<|im_end|>", "\u200b"), "does more"),
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "takes more than"),
    ],
)
def test_a_template_that_does_more_has_none(template, why):
    found, said = found_in(template)
    assert found is None
    assert why in said


def test_bos_is_a_piece_where_ollama_adds_none():
    """SmolLM2's BOS is the token that begins every turn."""
    found, _ = find_chat_format(CHATML, "<|im_start|>", "<|im_end|>", False, "a model")
    assert found is not None
    assert found.user == "<|im_start|>user\n"
    assert found_in(LLAMA3, adds_bos=False)[0] is None


def test_what_ollama_would_drop_or_end_is_not_written():
    assert written('a\n\tb "quoted" """x')
    assert not written('a"""\nb')
    assert not written('a"""  \nb')
    assert not any(written(text) for text in ("a\x00", "\u200b", "\r", "\ud800"))
