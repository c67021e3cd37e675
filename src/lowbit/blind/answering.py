"""Answers of one model to prompts: of files, loaded and run here, or of a server.

Greedy unless a temperature is given: always the most probable token, without the penalties of generation_config.json
(a server may add its own). Prompts go through the chat template, as they are where there is none. All answers are
trimmed in the same way, so that nothing but their words tells the models apart: white space at both ends, carriage
returns, and what is thought between <think> and </think>.

Each answer is kept as it comes (`tasks.kept`), so that a run goes on behind the last one after a server died; they go
when the run is whole. Refused: a prompt that the model's context cannot hold (UsageError), likelihoods that are NaN
(NonFiniteError), a server that cannot be asked (EngineFailure).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.blind.prompts import BlindPrompt
from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.base import OpenOptions
from lowbit.errors import EngineFailure
from lowbit.evaluation.activations import simulation_of
from lowbit.evaluation.footprint import fingerprint, state_of_files
from lowbit.evaluation.generation import finite_scores, prompt_ids, refuse_without_text, room_behind
from lowbit.tasks.endpoint import Endpoint, EndpointRefusal, is_url
from lowbit.tasks.kept import kept, kept_file, key_of
from lowbit.text.packing import encodable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", flags=re.S)
_NO_CHAT = (400, 404, 405, 422, 501)  # what servers answer that have no chat, or a model without a template


@dataclass(frozen=True)
class Reply:
    """What a model said.

    text     trimmed
    cut      it was stopped at the limit of tokens
    thought  text between <think> and </think> was taken out
    """

    text: str
    cut: bool = False
    thought: bool = False


@dataclass(frozen=True)
class Generation:
    """How answers are made: the same for both models.

    temperature  0: always the most probable token
    seed         of the sampling; prompt i has seed + i
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    options: OpenOptions = field(default_factory=OpenOptions)


@dataclass(frozen=True)
class Answers:
    """identity tells models apart; kept is the file of the answers, which had `known` of them before."""

    identity: str
    answers: list[Reply]
    notes: list[str]
    kept: Path
    known: int = 0


Done = Callable[[int], None]


def answer_all(model: str, prompts: Sequence[BlindPrompt], how: Generation, done: Done = lambda count: None) -> Answers:
    """The model's answer to each prompt. done  called with the number of prompts that are answered"""
    return _of_server(model, prompts, how, done) if is_url(model) else _of_files(model, prompts, how, done)


def trimmed(text: str, cut: bool) -> Reply:
    """As it is shown."""
    text = encodable(text.replace("\r\n", "\n"))
    spoken = _THOUGHTS.sub("", text)
    return Reply(spoken.strip(), cut, thought=spoken != text)


def _asked(
    identity: str, prompts: Sequence[BlindPrompt], how: Generation, done: Done, ask: Callable[[int, str], Reply]
) -> tuple[list[Reply], int, Path]:
    """Each prompt answered by `ask`, or by what an unfinished run has kept."""
    conditions = f"{identity} {how.max_tokens} {how.temperature} {how.seed if how.temperature else 0}"
    found, before = [], 0
    path = kept_file("blind", f"answers-{key_of(conditions)}")
    with kept(path) as (known, add):
        for place, prompt in enumerate(prompts):
            key = key_of(prompt.text, str(place) if how.temperature else "")
            answer = _kept_answer(known.get(key))
            before += answer is not None
            if answer is None:
                answer = ask(place, prompt.text)
                add(key, asdict(answer))
            found.append(answer)
            done(place + 1)
    return found, before, path


def _kept_answer(value: Any) -> Reply | None:
    try:
        return Reply(**value) if isinstance(value["text"], str) else None
    except (TypeError, LookupError):
        return None


def _notes(model: str, answers: Sequence[Reply], chat: bool) -> list[str]:
    counts = {
        "were stopped at --max-tokens": sum(answer.cut for answer in answers),
        "had thoughts (<think> … </think>), which are not shown": sum(answer.thought for answer in answers),
        "are empty": sum(not answer.text for answer in answers),
    }
    plain = [] if chat else [f"{model} has no chat template: it continues the plain prompts"]
    return [*plain, *(f"{model}: {count} of {len(answers)} answers {what}" for what, count in counts.items() if count)]


def _of_files(model: str, prompts: Sequence[BlindPrompt], how: Generation, done: Done) -> Answers:
    from lowbit.architecture.loading import load_model, load_tokenizer

    checkpoint = open_checkpoint(model, how.options)
    try:
        identity = f"{fingerprint(checkpoint)} {how.dtype} {how.device}"
        files = state_of_files(checkpoint)
        network = load_model(checkpoint, how.dtype, how.device, how.options)
        tokenizer = load_tokenizer(checkpoint, how.options)
        simulated = simulation_of(checkpoint)
    finally:
        checkpoint.close()
    refuse_without_text(network, model)
    with simulated(network):
        answers, before, path = _asked(
            f"{identity} {files}", prompts, how, done,
            lambda place, text: _written(network, tokenizer, place, text, how),
        )  # fmt: skip
    return Answers(identity, answers, _notes(model, answers, bool(tokenizer.chat_template)), path, before)


@torch.inference_mode()
def _written(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: int, prompt: str, how: Generation
) -> Reply:
    from transformers import GenerationConfig

    ids = prompt_ids(tokenizer, prompt, "auto").to(network.device)
    room = room_behind(network, ids, how.max_tokens, f"prompt {place + 1}")
    own = network.generation_config
    stated = None if own is None else own.eos_token_id
    ends = tokenizer.eos_token_id if stated is None or stated == [] else stated
    sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}
    config = GenerationConfig(**({"do_sample": False} | sampling), repetition_penalty=1.0, max_new_tokens=room,
                              eos_token_id=ends, pad_token_id=ends[0] if isinstance(ends, list) else ends)  # fmt: skip
    devices = [network.device.index or 0] if network.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(how.seed + place)
        output: Any = network.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config,
            logits_processor=finite_scores(f"prompt {place + 1}"),
        )  # fmt: skip
    made = output[0, ids.shape[1] :].tolist()
    stops = set(ends if isinstance(ends, list) else [ends])
    return trimmed(str(tokenizer.decode(made, skip_special_tokens=True)), len(made) >= room and made[-1] not in stops)


def _of_server(model: str, prompts: Sequence[BlindPrompt], how: Generation, done: Done) -> Answers:
    server = Endpoint(model)
    identity = f"{server.url} {server.name}"
    chat = _has_chat(server)
    answers, before, path = _asked(
        f"{identity} {chat}", prompts, how, done, lambda place, text: _told(server, chat, place, text, how)
    )
    return Answers(identity, answers, _notes(model, answers, chat), path, before)


def _has_chat(server: Endpoint) -> bool:
    """Whether it takes messages: a model without a chat template is refused by its server."""
    try:
        server.choice("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})
    except EndpointRefusal as refusal:
        if refusal.status not in _NO_CHAT:
            raise
        return False
    return True


def _told(server: Endpoint, chat: bool, place: int, prompt: str, how: Generation) -> Reply:
    body: dict[str, Any] = {"max_tokens": how.max_tokens, "temperature": how.temperature, "seed": how.seed + place}
    if chat:
        choice = server.choice("/v1/chat/completions", body | {"messages": [{"role": "user", "content": prompt}]})
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
    else:
        choice = server.choice("/v1/completions", body | {"prompt": prompt})
        text = choice.get("text")
    if text is not None and not isinstance(text, str):
        raise EngineFailure(f"{server.url} answers a {type(text).__name__} where the words are due",
                            "is it OpenAI's protocol?")  # fmt: skip
    return trimmed(text or "", choice.get("finish_reason") == "length")
