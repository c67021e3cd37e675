"""Stage 4: weights rewritten so that they round better, while the float output of the model stays the same.

A transform is a function, and a row in `TRANSFORMS`:

    apply(block: BlockTensors, facts: ModelFacts, fake_quantize: FakeQuantize, options) → list[TransformNote]

`facts` is made once per model (`lowbit.transform.facts.model_facts`); `options` is the dataclass of the transform's
module, None for its defaults. Transforms change `block.tensors` and `block.stats` together, so that what follows
(another transform, GPTQ) sees the statistics of the rewritten model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.transform.block import TransformNote

# name → "module:function"
TRANSFORMS = {
    "awq": "lowbit.transform.awq:apply",
    "smoothquant": "lowbit.transform.smoothquant:apply",
    "rotate": "lowbit.transform.rotate:apply_values",
    "hadamard": "lowbit.transform.rotate:apply_residual",
}


def find_transform(name: str) -> Callable[..., list[TransformNote]]:
    """The `apply` of a transform; KeyError for a name that is not in `TRANSFORMS`."""
    module, _, function = TRANSFORMS[name].partition(":")
    found: Any = getattr(importlib.import_module(module), function)
    return found
