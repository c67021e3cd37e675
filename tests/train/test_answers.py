"""A loss on answers only: which tokens of chat rows, batches and windows count."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lowbit
from lowbit.errors import CheckpointError, UsageError
from lowbit.text import GivenText, calibration_windows
from lowbit.text.answers import AnswerMarker
from lowbit.train import Course
from lowbit.train.loop import Lesson, batch_loss, held_out_loss

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
NO_PROMPT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }};{% endfor %}"
# Writes an answer's reasoning only while it is the last turn.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}(thought){% endif %}"
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So."},
]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.chat_template = template
    return fast


def marked(template: str | None, talk=TALK, marking="auto") -> tuple[str, AnswerMarker]:
    """What counts of a conversation, other characters as ~; and its marker."""
    marker = AnswerMarker(tokenizer(template), 10_000, marking)
    text, ids, counts = marker.marked(talk)
    shown = text if template and isinstance(talk, list) else text.rstrip("\n") + "\n\n"
    assert len(ids) == len(counts) == len(shown)
    return "".join(char if counted else "~" for char, counted in zip(shown, counts, strict=True)), marker


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Because.</s>", "So.</s>"]),
        (TAGGED, ["Because.</s>", "So.</s>"]),
        (NO_PROMPT, ["Because.;", "So.;"]),
        (None, ["Because.\n\n", "So.\n\n"]),
        (FORGETFUL, ["(thought)So.</s>"]),
    ],
)
def test_what_an_assistant_writes_counts_and_nothing_else(template, answers):
    shown, marker = marked(template)
    assert [part for part in shown.split("~") if part] == answers
    assert marker.split == 1
    assert marker.lost == 2 - len(answers)
    assert any("1 answer counts for nothing" in note for note in marker.notes()) == (marker.lost == 1)


@pytest.mark.parametrize(("marking", "counts"), [("auto", True), ("answers", False)])
def test_a_conversation_that_cannot_be_split_is_said(marking, counts):
    """A template that writes the turns backwards: no answer is at the end of what was there before."""
    shown, marker = marked("{% for m in messages[::-1] %}{{ m['content'] }}|{% endfor %}", TALK, marking)
    assert marker.whole == 1
    assert ("~" not in shown) is counts
    assert any("could not be located" in note for note in marker.notes())


def test_a_plain_document_counts_unless_answers_are_asked_for():
    assert marked(CHATML, "plain", "auto")[0] == "plain\n\n"
    assert marked(CHATML, "plain", "answers")[0] == "~" * 7


def test_windows_of_a_file_say_what_counts(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"messages": TALK}) for _ in range(8)))
    cut = calibration_windows(path, tokenizer(CHATML), 4, 40, marking="auto")
    assert cut.counted is not None
    assert cut.counted.shape == cut.ids.shape
    said = tokenizer(CHATML).decode(cut.ids.flatten()[cut.counted.flatten()]).replace(" ", "")
    assert said.startswith("Because.</s>So.</s>Because.")
    assert calibration_windows(path, tokenizer(CHATML), 4, 40).counted is None
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "words " * 40}))
    assert calibration_windows(plain, tokenizer(CHATML), 2, 40, marking="auto").counted is None
    with pytest.raises(UsageError, match="no answers in it that can be told"):
        calibration_windows(plain, tokenizer(CHATML), 2, 40, marking="answers")


def test_labels_of_batches_say_what_counts_and_padding_is_left_out():
    batch = {
        "input_ids": torch.arange(1, 17).reshape(2, 8),
        "attention_mask": torch.tensor([[1] * 8, [1] * 6 + [0] * 2]),
        "labels": torch.tensor([[-100] * 4 + [5, 6, 7, 8], [-100] * 3 + [12, 13, 14] + [-100] * 2]),
    }
    cut = GivenText([batch]).windows(None, 2, 7, marking="auto")
    assert cut.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    assert cut.counted is not None
    assert cut.ids[cut.counted].tolist() == [5, 6, 7, 8, 12, 13, 14]
    assert GivenText([batch]).windows(None, 2, 7).counted is None
    with pytest.raises(UsageError, match="without labels"):
        GivenText([torch.ones(2, 8, dtype=torch.long)]).windows(None, 2, 8, marking="answers")


class Fixed(torch.nn.Module):
    """A model whose logits do not depend on the input."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids, use_cache):
        return type("Output", (), {"logits": self.logits[: len(ids)]})


def test_the_loss_is_the_mean_over_counted_tokens():
    model, ids = Fixed(), torch.arange(24).reshape(4, 6) % 9
    counted = torch.zeros(4, 6, dtype=torch.bool)
    counted[0, 3] = counted[2, 1] = counted[2, 0] = True  # the first token of a window is never predicted
    wanted = [-torch.log_softmax(model.logits[row, at - 1], 0)[ids[row, at]] for row, at in ((0, 3), (2, 1))]
    loss = batch_loss(model, Lesson(ids, counted), None)
    torch.testing.assert_close(loss, torch.stack(wanted).mean())
    loss.backward()
    touched = model.logits.grad.abs().sum(dim=2) > 0
    assert touched.nonzero().tolist() == [[0, 2], [2, 0]]
    # held-out windows in two batches, one of which has a single counted token
    lesson = Lesson(ids[:3], counted[:3]).with_counted_tokens()
    assert len(lesson) == 2
    one = [batch_loss(model, lesson[index : index + 1], None).item() for index in range(2)]
    assert held_out_loss(model, lesson, 1, None) == pytest.approx(sum(one) / 2)


def test_conversations_mixed_with_running_text(tiny_llama, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}, of course"}]}
            for n in range(40)]  # fmt: skip
    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(json.dumps(row) for row in rows))
    data = f"{chat}:1,packaged/code:3"
    done = lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W4A16", data=data,
                           course=Course(steps=1, windows=8, window_tokens=32))  # fmt: skip
    text = done.report.settings.calibration
    assert any("2 of " in note and "6 of packaged/code" in note for note in text.notes)
    (note,) = (note for note in done.report.source.notes if note.startswith("trained 1 steps"))
    assert 0.75 < float(note.split("(")[1].split("%")[0]) / 100 < 1  # all of the code, and the answers


def test_a_training_on_answers_says_so(tiny_llama, tmp_path):
    rows = [{"prompt": f"What is {number} and one", "completion": f"It is {number + 1}."} for number in range(60)]
    course = Course(steps=2, windows=8, window_tokens=48)
    done = lowbit.finetune(tiny_llama, tmp_path / "out", scheme="W8A16", group_size=32, data=rows, course=course)
    (note,) = (note for note in done.report.source.notes if note.startswith("trained 2 steps on answers ("))
    assert 10 < int(note.split("(")[1].split(" ")[0].rstrip("%")) < 60
    whole = lowbit.finetune(tiny_llama, tmp_path / "all", scheme="W8A16", group_size=32, data=rows,
                            course=Course(steps=2, windows=8, window_tokens=48, loss_on="all"))  # fmt: skip
    assert any(note.startswith("trained 2 steps, held-out") for note in whole.report.source.notes)


def test_windows_without_an_answer_are_passed_over(tiny_llama, tmp_path):
    long = [{"prompt": "why " * 60, "completion": "So."}] * 3
    with pytest.raises(CheckpointError, match=r"windows passed over: no answer lies in them"):
        lowbit.finetune(tiny_llama, tmp_path / "out", data=long, course=Course(windows=12, window_tokens=8))
