"""The structure of a third of all model types that transformers builds, and of a ninth by default; `make models` takes
all of them, and on through quantize, verify, transformers and GPTQ."""

from __future__ import annotations

import math

import pytest

from lowbit.architecture import discover
from lowbit.errors import ArchitectureError
from tiny_type_rows import NOT_MADE
from tiny_types import model_types, tiny_config

_BUILD = "cannot build a model"
# type → what the refusal says
REFUSED = dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), _BUILD)  # needs timm
REFUSED["inkling_mm_model"] = f"{_BUILD}|in a way that lowbit does not know"  # without scipy, and with it
# type → share of the weights of decoder blocks in linears, where parameters have a form of their own
OTHER_FORMS = {"dbrx": 0.19, "jetmoe": 0.04, "minimax": 0.7, "xlnet": 0.3}
THIRD = [name for number, name in enumerate(model_types()) if number % 3 == 0 and name not in NOT_MADE]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("part", range(8))
def test_linears_of_every_type_are_found_with_their_inputs(part):
    for model_type in THIRD[part::8]:
        config = tiny_config(model_type).to_dict()
        if model_type in REFUSED:
            with pytest.raises(ArchitectureError, match=REFUSED[model_type]):
                discover(config, model_type, split_experts=True)
            continue
        found = discover(config, model_type, split_experts=True)
        inside = [linear for linear in found.linears.values() if linear.block is not None]
        weights = sum(math.prod(linear.shape) for linear in inside)
        matrices = {name: math.prod(shape) for name, shape in found.parameters.items()
                    if found.block_of(name) is not None and len(shape) > 1}  # fmt: skip
        assert inside, model_type
        assert all(linear.reads is not None for linear in inside), model_type
        assert weights >= OTHER_FORMS.get(model_type, 0.8) * sum(matrices.values()), model_type
