"""Does a real vLLM load each architecture that lowbit quantizes, and compute with the weights we mean?

usage: vllm_architectures.py --vllm PYTHON [--format compressed-tensors] [--scheme W4A16] [ARCHITECTURE ...]

For each architecture of tests/models.py: a tiny random model is quantized, and two engines give the log-probability of
every token of one sequence: transformers with lowbit's decoded weights in bfloat16, and vLLM on the CPU
(vllm_perplexity.py beside this file says how to make its environment). Random weights make every token about equally
likely, so perplexities would agree whatever vLLM loaded; what counts is the correlation of the log-probabilities, 1 for
the same weights and about 0 for others. `--scheme 16bit` compares the engines on the model itself, which says how far
they are apart without us. DeepSeek's tiny heads need VLLM_MLA_DISABLE=1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 200
VOCABULARY = 250


def ids() -> list[int]:
    """Tokens in a fixed scrambled order."""
    return [3 + (97 * index * index + 31 * index) % VOCABULARY for index in range(TOKENS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--vllm", help="the python of an environment with vLLM")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.architectures, args.worker)
        return
    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
    with tempfile.TemporaryDirectory() as scratch:
        compare(args, Path(scratch))


def compare(args: argparse.Namespace, scratch: Path) -> None:
    import torch

    import lowbit
    from models import ARCHITECTURES, make_model

    ours = {}
    for name in args.architectures or ARCHITECTURES:
        folder = scratch / name
        try:
            settings = {} if args.group_size is None else {"group_size": args.group_size}
            model = make_model(scratch / f"{name}-16bit", name)
            if args.scheme == "16bit":
                model.rename(folder)
            else:
                lowbit.quantize(model, folder, scheme=args.scheme, format=args.format, **settings)
            ours[name] = our_logprobs(folder)
        except lowbit.errors.LowbitError as error:
            print(f"{name:20s} not written: {error}", flush=True)
    output = scratch / "vllm.json"
    command = [args.vllm, __file__, *(str(scratch / name) for name in ours), "--worker", str(output)]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    theirs = json.loads(output.read_text())
    for name, own in ours.items():
        found = theirs[str(scratch / name)]
        if isinstance(found, str):
            print(f"{name:20s} refused: {found}")
            continue
        pair = torch.stack([torch.tensor(own), torch.tensor(found)])
        correlation, difference = torch.corrcoef(pair)[0, 1].item(), (pair[0] - pair[1]).abs().mean().item()
        print(f"{name:20s} correlation {correlation:.4f}   mean difference {difference:.4f} nats")


def our_logprobs(folder: Path) -> list[float]:
    import torch

    import lowbit

    model, _ = lowbit.load(folder, dtype=torch.bfloat16)
    tokens = torch.tensor([ids()])
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits.float()
    scored = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
    return scored[:, 0].tolist()


def worker(folders: list[str], output: Path) -> None:
    """Runs inside vLLM's environment: folder → log-probabilities, or why it was refused; kept after each model."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm_perplexity import offer_emulation  # sets the environment before vLLM is imported

    offer_emulation()
    found: dict[str, object] = dict.fromkeys(folders, "vLLM's process ended")
    for folder in folders:
        try:
            found[folder] = their_logprobs(folder)
        except Exception as error:  # whatever vLLM raises is what it says of the folder
            found[folder] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        output.write_text(json.dumps(found))
        cleanup_dist_env_and_memory()
    os._exit(0)


def their_logprobs(folder: str) -> list[float]:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=2,
              enable_prefix_caching=False)  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (said,) = llm.generate([TokensPrompt(prompt_token_ids=ids())], sampling, use_tqdm=False)
    scored = zip(said.prompt_token_ids[1:], said.prompt_logprobs[1:], strict=True)
    return [logprobs[token].logprob for token, logprobs in scored]


if __name__ == "__main__":
    main()
