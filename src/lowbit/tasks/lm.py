"""An lm-eval model over an `Answerer`: a model that is run block by block, or a server.

Contexts, continuations and chat templates become tokens by lm-eval's own `HFLM`, so they are those of its `hf` model;
only the questions themselves go elsewhere. A model that is whole in memory is given to `HFLM` as it is.

Refused: tasks that sample their answers, since here the most probable token is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowbit.errors import UsageError
from lowbit.tasks.answering import Answerer, Progress, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def language_model(answerer: Answerer, model: PreTrainedModel, progress: Progress) -> Any:
    """An `LM` of lm-eval. model: of the config's class, its parameters without values; progress: questions that are
    done; `unknown_greedy` of what is returned: whether a continuation came without whether it is the most probable."""
    from lm_eval.models import huggingface, utils  # type: ignore[import-not-found]

    own: Any = huggingface.HFLM  # lm-eval's decorator hides its type

    class AnswererLM(own):
        unknown_greedy = False

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:  # fmt: skip
            rows = []
            for _, context, continuation in requests:
                ids = (context + continuation)[-(self.max_length + 1) :]
                rows.append((ids, len(ids) - len(continuation)))
            found: list[Score] = answerer.scored(rows, progress)
            self.unknown_greedy |= any(each.greedy is None for each in found)
            return [(each.total, bool(each.greedy)) for each in found]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found: dict[int, str] = {}
            groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
            for place, request in enumerate(requests):
                how: Any = utils.normalize_gen_kwargs(request.args[1], self.max_gen_toks)
                if how.get("do_sample") or how.get("temperature"):
                    raise UsageError(f"{request.task_name} samples its answers; here the most probable are written",
                                     "leave it out, or run a model that fits in memory")  # fmt: skip
                eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
                stops = utils.handle_stop_sequences(how["until"], eos=eos)
                groups.setdefault((tuple(stops), how["max_gen_toks"]), []).append(place)
            for (stops, tokens), places in groups.items():
                prompts = [self.tok_encode(requests[place].args[0], left_truncate_len=self.max_length - tokens)
                           for place in places]  # fmt: skip
                texts = answerer.written(prompts, stops, tokens, lambda done: progress(len(found) + done))
                for place, text in zip(places, texts, strict=True):
                    found[place] = utils.postprocess_generated_text(text, list(stops), self.think_end_token)
            return [found[place] for place in range(len(requests))]

    return AnswererLM(pretrained=model, tokenizer=answerer.tokenizer)
