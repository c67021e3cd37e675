"""Models with a planted fault, and what tests of the diagnosis share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.diagnosis import Diagnosis, diagnose

SENTENCES = (
    "A river carries stones down from the hills and grinds them small. ",
    "Take 200 g of flour, two eggs and a little milk; stir, and wait. ",
    "def area(width, height): return width * height  # in metres\n",
    "The committee met on Tuesday, without result, and adjourned. ",
)
RUSSIAN = "Река несёт камни с холмов и мелко их перетирает. Возьмите двести граммов муки и два яйца. "


def english(sentences: int) -> str:
    """About 60 bytes each, which are as many tokens of the tiny models."""
    return "".join(SENTENCES[(index * index + index // 3) % 4] for index in range(sentences))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the weights of a folder in place."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def multiply_scales(folder: Path, chosen: str, factor: float) -> None:
    """Multiply the scales of every tensor whose name holds `chosen`."""

    def edit(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if chosen in name and name.endswith("weight_scale")]
        assert names
        for name in names:
            tensors[name] = tensors[name] * factor

    edit_tensors(folder, edit)


def diagnosed(quantized: Path, reference: Path | None, text: Path, **settings) -> Diagnosis:
    """With few short windows."""
    given = {"windows": 4, "window_tokens": 64} | settings
    return diagnose(quantized, reference, text, **given)
