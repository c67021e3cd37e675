"""The rule that an output's config.json states the computation of its source.

Weights can all be right and the model wrong: another rope_theta, another number of heads or experts per token, another
activation. Every key is compared, at every depth, but those of `_WITHOUT_EFFECT`, which no forward pass reads. Files
that differ are compared as transformers reads them: a default may be left out, rope_theta stand for rope_parameters.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.base import as_transformers_has_it, transformers_config
from lowbit.verification.result import Finding

if TYPE_CHECKING:
    from lowbit.verification.subject import Subject

# What lowbit writes itself, what describes the file or its makers, and what only training or generation reads.
_WITHOUT_EFFECT = re.compile(
    r"quantization_config|compression_config|(torch_)?dtype|architectures|auto_map|transformers_version|_?name_or_path"
    r"|_commit_hash|_from_model_config|unsloth_.*|model_name|finetuning_task|task_specific_params|problem_type"
    r"|(bos|eos|pad|sep|cls|mask|decoder_start)_token_id|forced_.*|id2label|label2id|keys_to_ignore_at_inference"
    r"|initializer_.*|init_.*|.*_initializer_range|.*dropout.*|.*_pdrop|drop_path_rate|gradient_checkpointing"
    r"|router_(aux_loss_coef|z_loss_coef|jitter_noise)|aux_loss_alpha|seq_aux|pretraining_tp|chunk_size_feed_forward"
    r"|use_cache|return_dict|output_(attentions|hidden_states|router_logits)"
    r"|_?(attn|experts)_implementation(_internal|_autoset)?"
)
_ABSENT = "absent"
_LONGEST = 80


def check_same_computation(subject: Subject) -> Finding:
    """Every key of config.json that changes what is computed has the source's value."""
    assert subject.source is not None
    ours, theirs = subject.config, subject.source.config()
    found = _differences(ours, theirs)
    if found:
        found = _differences(*_as_transformers_reads(ours, theirs))
    if found.get("tie_word_embeddings") == (False, True) and _has_own_head(subject):
        found = {key: values for key, values in found.items() if key.rpartition(".")[2] != "tie_word_embeddings"}
    problems = [f"config.json: {key} is {_shown(mine)}, the source's is {_shown(other)}"
                for key, (mine, other) in found.items()]  # fmt: skip
    return Finding(problems, "config.json states the same computation as the source's")


def _has_own_head(subject: Subject) -> bool:
    """True where the output layer is a tensor of its own, which a tied config.json would take from the embedding."""
    return not subject.architecture.tied


def _as_transformers_reads(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same with transformers' defaults and spellings; as they are where it has no class for one of them."""
    try:
        read = [transformers_config(as_transformers_has_it(config)).to_dict() for config in (ours, theirs)]
    except Exception:  # its classes and their validators raise anything
        return ours, theirs
    return read[0], read[1]


def _differences(ours: dict[str, Any], theirs: dict[str, Any], above: str = "") -> dict[str, tuple[Any, Any]]:
    """Path of a key → (our value, the other's), of each that computes; an empty or null value is as an absent one."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*theirs, *ours)):
        if _WITHOUT_EFFECT.fullmatch(key):
            continue
        mine, other = (None if values.get(key) in ({}, []) else values.get(key) for values in (ours, theirs))
        if isinstance(mine, dict) and isinstance(other, dict):
            found |= _differences(mine, other, f"{above}{key}.")
        elif mine != other:
            found[f"{above}{key}"] = (mine, other)
    return found


def _shown(value: Any) -> str:
    text = _ABSENT if value is None else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
