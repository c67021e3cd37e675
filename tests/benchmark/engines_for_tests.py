"""Stand-ins for what this machine lacks: a package that looks like vLLM, a llama-bench, a server."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path

from local_servers import JsonHandler, listening

# 1 ms a pass of a prompt, 5 ms a token, by a clock that nothing else moves: what bench must find again.
VLLM = """
import time
clock = [time.perf_counter()]
time.perf_counter = lambda: clock[-1]
__version__ = "0.32.0"
LOG = []
class SamplingParams:
    def __init__(self, temperature, max_tokens, min_tokens, ignore_eos):
        assert temperature == 0.0 and ignore_eos and max_tokens == min_tokens
        self.max_tokens = max_tokens
class _Output:
    def __init__(self, count): self.token_ids = [0] * count
class _Answer:
    def __init__(self, count): self.outputs = [_Output(count)]
class LLM:
    def __init__(self, model, max_model_len, max_num_seqs, enable_prefix_caching, seed, trust_remote_code):
        assert enable_prefix_caching is False
        MODE
        self.seen, self.longest, self.most = set(), max_model_len, max_num_seqs
    def generate(self, prompts, how, use_tqdm):
        print("vLLM talks on stdout")
        assert len(prompts) <= self.most
        for prompt in prompts:
            ids = tuple(prompt["prompt_token_ids"])
            assert ids not in self.seen, "a prompt was sent twice"
            assert len(ids) + how.max_tokens <= self.longest
            self.seen.add(ids)
        clock.append(clock[-1] + 0.001 + 0.005 * how.max_tokens)
        return [_Answer(how.max_tokens - SHORT) for _ in prompts]
"""


def fake_vllm(folder: Path, mode: str = "pass", short: int = 0) -> Path:
    """A folder for sys.path. mode: a statement of the constructor; short: tokens that it makes too few."""
    (folder / "vllm.py").write_text(VLLM.replace("MODE", mode).replace("SHORT", str(short)))
    return folder


def fake_llama_bench(folder: Path, text: str | None = None, code: int = 0) -> Path:
    """An executable `llama-bench` in a folder for PATH."""
    rows = [
        {"n_prompt": 512, "n_gen": 0, "samples_ts": [90.0, 100.0, 110.0], "cpu_info": "a processor", "gpu_info": ""},
        {"n_prompt": 0, "n_gen": 8, "samples_ts": [9.0, 10.0, 11.0], "build_commit": "abc"},
    ]
    program = folder / "llama-bench"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(rows) if text is None else text}\nEND\nexit {code}\n")
    program.chmod(0o755)
    return folder


@contextmanager
def server(short: int = 0, status: int = 200):
    """The address of an OpenAI-like server on this machine; it makes `short` tokens too few."""

    class Handler(JsonHandler):
        def do_GET(self):
            self.send_json({"data": [{"id": "served"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "served"
            assert asked["ignore_eos"]
            time.sleep(0.05 * asked["max_tokens"])  # far above what a busy machine adds to a request
            self.send_json({"usage": {"completion_tokens": asked["max_tokens"] - short}}, status)

    with listening(Handler) as address:
        yield address
