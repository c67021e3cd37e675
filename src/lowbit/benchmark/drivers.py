"""How each engine is started and asked, in the process of `child.py`.

A driver takes prompts as token ids and returns when every sequence has exactly `tokens` new tokens, whatever they are
(end-of-text is ignored). No prompt is sent twice, and caches of prompts are off, so a prompt is always computed.

Nothing heavy is imported here before a driver is made: the memory of the process is the engine's.
"""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

_SLACK = 16  # tokens of a context beyond prompt and answer
_TIMEOUT = 3600


@dataclass(frozen=True)
class BenchJob:
    """What is asked of the process.

    driver    a key of `DRIVERS`
    path      of the model; url of a server instead, and the name under which it serves the model
    loads     (context, batch), in this order
    tokens    generated after each prompt
    low, high token ids are drawn from low ≤ id < high
    threads   of a processor; None: the engine's own choice
    """

    driver: str
    path: str
    loads: tuple[tuple[int, int], ...]
    tokens: int
    repeats: int
    warmups: int
    seed: int
    low: int
    high: int
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    url: str | None = None
    trust_remote_code: bool = False

    @property
    def largest(self) -> tuple[int, int]:
        """Tokens of the longest sequence, and the largest batch."""
        return max(context for context, _ in self.loads) + self.tokens + _SLACK, max(batch for _, batch in self.loads)


class EngineError(Exception):
    """The engine refused or failed; the message is its own."""


class Driver(Protocol):
    """through, device: as in `Bench`."""

    through: str
    device: str

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> None: ...

    def device_bytes(self) -> int:
        """Peak bytes on a card; 0 where there is none."""
        ...


def _processor() -> str:
    return platform.processor() or platform.machine()


class XllamaCpp:
    """llama.cpp's server inside the process, by the wheel xllamacpp; sequences run in its slots."""

    def __init__(self, job: BenchJob):
        xllamacpp: Any = importlib.import_module("xllamacpp")
        length, batch = job.largest
        params: Any = xllamacpp.CommonParams()
        params.model.path = job.path
        params.n_parallel = batch
        params.n_ctx = batch * -(-length // 256) * 256
        params.warmup, params.verbosity = False, 0
        if job.threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        self.through, self.device = f"xllamacpp {metadata.version('xllamacpp')}", _processor()
        self._server: Any = xllamacpp.Server(params)
        self._threads = ThreadPoolExecutor(batch)

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> None:
        def ask(prompt: list[int]) -> None:
            answer = self._server.handle_completions(
                {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            )
            _check_count(answer, tokens)

        list(self._threads.map(ask, prompts))

    def device_bytes(self) -> int:
        return 0


class LlamaCppPython:
    """llama.cpp by llama-cpp-python, one sequence at a time."""

    def __init__(self, job: BenchJob):
        llama_cpp: Any = importlib.import_module("llama_cpp")
        if job.largest[1] > 1:
            raise EngineError("llama-cpp-python runs one sequence at a time; give --batch 1, or install xllamacpp")
        self.through, self.device = f"llama-cpp-python {metadata.version('llama-cpp-python')}", _processor()
        self._model: Any = llama_cpp.Llama(job.path, n_ctx=job.largest[0], n_threads=job.threads, verbose=False,
                                           n_gpu_layers=-1)  # fmt: skip

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> None:
        for prompt in prompts:
            self._model.reset()
            self._model.eval(prompt)
            for _ in range(tokens - 1):
                self._model.eval([self._model.sample(temp=0.0)])
            self._model.sample(temp=0.0)

    def device_bytes(self) -> int:
        return 0


class Transformers:
    """transformers' own loading of the files, on a processor or a card."""

    def __init__(self, job: BenchJob):
        import torch
        import transformers

        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self._torch: Any = torch
        self._card = job.device if job.device.startswith("cuda") else None
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            job.path, dtype=job.dtype, device_map=job.device, trust_remote_code=job.trust_remote_code
        ).eval()
        self.through = f"transformers {transformers.__version__}"
        self.device = torch.cuda.get_device_name() if self._card else _processor()

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> None:
        torch = self._torch
        ids = torch.tensor(list(prompts), device=self._model.device)
        with torch.inference_mode():
            made = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        if made.shape[1] != ids.shape[1] + tokens:
            raise EngineError(f"transformers made {made.shape[1] - ids.shape[1]} tokens instead of {tokens}")

    def device_bytes(self) -> int:
        return self._torch.cuda.max_memory_allocated() if self._card else 0


class Vllm:
    """vLLM's offline engine, with its prefix cache off."""

    def __init__(self, job: BenchJob):
        vllm: Any = importlib.import_module("vllm")
        length, batch = job.largest
        self._vllm: Any = vllm
        self._model: Any = vllm.LLM(
            model=job.path, max_model_len=length, max_num_seqs=batch, enable_prefix_caching=False, seed=0,
            trust_remote_code=job.trust_remote_code,
        )  # fmt: skip
        self.through, self.device = f"vllm {vllm.__version__}", _card_name()

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> None:
        how = self._vllm.SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        for answer in self._model.generate(asked, how, use_tqdm=False):
            made = len(answer.outputs[0].token_ids)
            if made != tokens:
                raise EngineError(f"vLLM made {made} tokens instead of {tokens}")

    def device_bytes(self) -> int:
        """What is in use on the card: vLLM's workers are processes of their own."""
        torch: Any = sys.modules.get("torch")  # vLLM has imported it
        if torch is None or not torch.cuda.is_available():
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free


def _card_name() -> str:
    torch: Any = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else _processor()


class Server:
    """A running server with OpenAI's completions: vLLM, llama.cpp, SGLang."""

    def __init__(self, job: BenchJob):
        assert job.url is not None
        self._url = job.url.rstrip("/").removesuffix("/v1")
        listed = _http(f"{self._url}/v1/models").get("data")
        names = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        names = [name for name in names if isinstance(name, str)]
        if not names:
            raise EngineError(f"{self._url}/v1/models lists no model: {str(listed)[:200]}")
        self._model = names[0]
        first = f" ({names[0]}, the first of {len(names)} models that it lists)" if len(names) > 1 else ""
        self.through, self.device = self._url + first, f"server {self._url}"
        self._threads = ThreadPoolExecutor(job.largest[1])

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> None:
        def ask(prompt: list[int]) -> None:
            body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens,
                    "temperature": 0, "ignore_eos": True, "cache_prompt": False}  # fmt: skip
            _check_count(_http(f"{self._url}/v1/completions", body), tokens)

        list(self._threads.map(ask, prompts))

    def device_bytes(self) -> int:
        return 0


def _http(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise EngineError(f"{url} answers {error.code}: {error.read(300).decode(errors='replace')}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{url} cannot be asked: {getattr(error, 'reason', error)}") from None
    if not isinstance(found, dict):
        raise EngineError(f"{url} answers no JSON object")
    return found


def _check_count(answer: dict[str, Any], tokens: int) -> None:
    """EngineError for an error, and for an answer of another length: its time would be that of another run."""
    if "error" in answer or not isinstance(answer.get("usage"), dict):
        error = answer.get("error")
        raise EngineError(str(error.get("message") if isinstance(error, dict) else error or "an answer without usage"))
    made = answer["usage"].get("completion_tokens")
    if made != tokens:
        raise EngineError(f"{made} tokens were made instead of {tokens}; does the server know ignore_eos?")


class LlamaBench:
    """The program llama-bench, which measures by itself: one sequence, its own repeats and warm-up."""

    def __init__(self, job: BenchJob):
        self._job = job
        self.through, self.device = "llama-bench", _processor()

    def measure(self, context: int) -> dict[str, list[float]]:
        """{"prefill": tokens/s of each run, "decode": the same}."""
        job = self._job
        words = ["llama-bench", "-m", job.path, "-p", str(context), "-n", str(job.tokens), "-r", str(job.repeats),
                 "-o", "json"]  # fmt: skip
        words += [] if job.threads is None else ["-t", str(job.threads)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"llama-bench failed: {done.stderr.strip()[-300:]}")
        try:
            rows = json.loads(done.stdout)
            found = {"prefill" if row["n_prompt"] else "decode": [float(ts) for ts in row["samples_ts"]]
                     for row in rows}  # fmt: skip
            self.device = rows[0].get("gpu_info") or rows[0].get("cpu_info") or self.device
            self.through = f"llama-bench, build {rows[0].get('build_commit', 'unknown')}"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EngineError(f"llama-bench printed something else than rows of JSON: {error!r}") from None
        if found.keys() != {"prefill", "decode"}:
            raise EngineError(f"llama-bench measured {', '.join(found) or 'nothing'}")
        return found


DRIVERS: dict[str, type] = {
    "xllamacpp": XllamaCpp, "llama-cpp-python": LlamaCppPython, "llama-bench": LlamaBench,
    "transformers": Transformers, "vllm": Vllm, "server": Server,
}  # fmt: skip
