"""Options that several commands share, declared once: `allow_pickle: AllowPickle = False`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin and .pt files, which can run code.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the model.")
]
FORMATS_HELP = (
    "compressed-tensors, gptq, gptq_v2, awq, bitsandbytes, modelopt, mxfp4 (gpt-oss), float, gguf. [default: gguf for "
    "NAME.gguf, bitsandbytes for NF4, FP4 and INT8, else compressed-tensors]"
)
Revision = Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]


class DtypeOption(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
