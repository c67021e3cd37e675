"""Experts that transformers computes in one fused operation, run expert by expert, so that each one's inputs are seen.

transformers keeps the experts of a block in three-dimensional parameters and gives the class that holds them a uniform
description (integrations/moe.py, `use_experts_implementation`), which is what is followed here:

    x = tokens routed to expert e
    h = gate(x · W_gate_up[e] + b)        `_apply_gate`, or `act_fn` where there is no gate
    y = h · W_down[e] + b                 then `post_expert_norm` where there is one
    out[token] += routing weight · y

Weights are [E, out, in], or [E, in, out] where the class says `is_transposed`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

# Called with (expert, which input, x [tokens routed to it, K]).
Look = Callable[[int, Literal["input", "hidden"], Tensor], None]


def is_described(experts: Any) -> bool:
    """True for a module of experts that says how it computes."""
    return all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj"))


def run_experts(
    experts: Any,
    look: Look,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    all_tokens: bool = False,
) -> Tensor:
    """What `experts` computes for tokens [tokens, H], experts and routing weights [tokens, k] → [tokens, H].

    all_tokens  `look` is shown every token by every expert; what comes out stays the same
    """
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    tokens = order // top_k_index.shape[1]
    weights = top_k_weights.reshape(-1)[order, None]
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    first_bias = _bias(experts, "gate_up_proj" if experts.has_gate else "up_proj")
    down_bias = _bias(experts, "down_proj")
    out = torch.zeros_like(hidden_states)
    stop = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=first.shape[0]).tolist()):
        start, stop = stop, stop + count
        if all_tokens:
            every = _linear(experts, hidden_states, first[expert], first_bias, expert)
            look(expert, "input", hidden_states)
            look(expert, "hidden", experts._apply_gate(every) if experts.has_gate else experts.act_fn(every))
        if not count:
            continue
        rows = tokens[start:stop]
        x = hidden_states[rows]
        if not all_tokens:
            look(expert, "input", x)
        inner = _linear(experts, x, first[expert], first_bias, expert)
        h = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        if not all_tokens:
            look(expert, "hidden", h)
        y = _linear(experts, h, experts.down_proj[expert], down_bias, expert)
        if experts.has_post_expert_norm:
            y = experts.post_expert_norm(y)
        out.index_add_(0, rows, (y * weights[start:stop]).to(out.dtype))
    return out


def _linear(experts: Any, x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    y = x @ (weight if experts.is_transposed else weight.t())
    return y if bias is None else y + bias[expert]


def _bias(experts: Any, parameter: str) -> Tensor | None:
    return getattr(experts, f"{parameter}_bias") if experts.has_bias else None
