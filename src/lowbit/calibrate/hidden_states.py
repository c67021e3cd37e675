"""What flows between two decoder blocks, for every window of a text: [windows, tokens, width].

It lies in memory up to a bound and in a mapped temporary file above that. The file is made in the system's folder for
such (TMPDIR names another) and has no name, so that nothing is left of it however the run ends.
"""

from __future__ import annotations

import math
import tempfile

import torch
from torch import Tensor

from lowbit.errors import OutputError


class HiddenStates:
    """values  [windows, tokens, width], to be read and written in place; spilled tells where it lies"""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, max_memory: int):
        nbytes = math.prod(shape) * dtype.itemsize
        self.spilled = nbytes > max_memory
        self.values: Tensor = _mapped(shape, dtype, nbytes) if self.spilled else torch.empty(shape, dtype=dtype)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> Tensor:
    try:
        with tempfile.NamedTemporaryFile(prefix="lowbit-hidden-") as file:
            file.truncate(nbytes)
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"{nbytes / 1e9:.1f} GB of hidden states cannot be put into {tempfile.gettempdir()}: {error}",
            "name a larger disk with TMPDIR, allow more memory, or take fewer samples",
        ) from error
