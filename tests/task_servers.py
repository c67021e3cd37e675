"""A server that speaks OpenAI's completions, as vLLM or as llama.cpp, with a real model behind it."""

from __future__ import annotations

import json
from contextlib import contextmanager

import torch

from local_servers import JsonHandler, listening


@contextmanager
def serving(model, tokenizer, echo=True, tokenize=True, shift=0, dies_after=None, told=True, bias=0, tops=True, port=0):
    """An OpenAI-like server. echo: as vLLM; else one token at a time, as llama.cpp. shift, bias: of its ids. tops: it
    tells the most probable tokens."""
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
                if tops:
                    choice["logprobs"]["top_logprobs"] = [None, *({"x": each.max().item()} for each in logp[:-1]), {}]
            elif told and body.get("logit_bias"):
                token = int(next(iter(body["logit_bias"]))) + bias
                choice["logprobs"] = {"content": [{"id": token, "logprob": logp[-1, token].item()}]}
                if tops:
                    choice["logprobs"]["content"][0]["top_logprobs"] = [{"id": int(logp[-1].argmax())}]
            return self.send_json({"choices": [choice], "usage": usage})

    with listening(Handler, port) as address:
        yield address, asked
