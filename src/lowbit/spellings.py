"""Options by the names that other commands, other tools or a slip of the finger give them.

`meant_option` is asked wherever an option is not known: on the command line, among keyword arguments and in recipes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lowbit.errors import meaning

# Names of one thing: options here, and those of llama.cpp, llm-compressor, GPTQModel, AutoRound, transformers and vLLM.
_GROUPS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "dtype compute compute_dtype torch_dtype precision",
        "calib text data dataset calib_data calib_text calibration_data corpus prompts",
        "samples windows num_samples n_samples nsamples num_calibration_samples chunks",
        "seqlen window_tokens context max_seq_length max_seq_len sequence_length ctx_size n_ctx max_model_len",
        "tokens max_tokens max_new_tokens n_predict",
        "scheme type quant qtype quantization bits wbits w_bit outtype ftype",
        "group_size q_group_size groupsize block_size",
        "ignore exclude skip exclude_weights modules_to_not_convert",
        "override overrides tensor_type dynamic",
        "method algorithm algo",
        "output out outfile output_dir save_dir out_path",
        "reference base base_model original ref teacher",
        "engine backend runtime",
        "max_memory memory ram memory_limit",
        "hardware gpu device",
        "batch batch_size np parallel",
        "threads nthreads n_threads jobs workers num_workers",
        "damping percdamp damp_percent dampening_frac",
        "imatrix importance importance_matrix",
        "kv_cache kv_cache_scheme kv_cache_dtype cache_type cache_type_k",
        "shard_size max_shard_size split_max_size",
        "steps max_steps iterations iters",
        "learning_rate lr",
        "lora rank lora_rank",
        "adapter lora_path peft",
        "seed task_seed random_seed random_state",
        "overwrite force",
        "tasks task",
    )
)


def meant_option(name: str, known: Iterable[str], otherwise: str = "", count: int = 1) -> str:
    """A hint with the known names that mean the same as an unknown one, else at most `count` that are spelled nearly
    like it; `otherwise` where there are none.

    name, known  of keyword arguments or of the command line ("--group-size")
    """
    spelled = {_plain(each): each for each in known}
    same = {each for group in _GROUPS if _plain(name) in group for each in group}
    meant = [option for each, option in spelled.items() if each in same]
    near = meant or [spelled[each] for each in difflib.get_close_matches(_plain(name), spelled, n=count)]
    return meaning(near, otherwise)


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
