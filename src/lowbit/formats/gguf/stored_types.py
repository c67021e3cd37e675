"""The types that a GGUF file may name: ggml's number → name, block and bytes; and the names of types of forks.

What llama.cpp reads has a size, so that its place in the file can be checked. Types of ik_llama.cpp and those that
llama.cpp has removed have a name only: they are called by it in messages, and are not read.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES

from lowbit.errors import UsageError
from lowbit.numerics.ggml import TYPES
from lowbit.numerics.ggml.types import GgmlType, find_type


@dataclass(frozen=True)
class StoredType:
    """A row of K numbers is K / `weights` blocks of `size` bytes."""

    name: str
    number: int
    weights: int
    size: int


# Also what the gguf package has and lowbit does not decode (integers, doubles, types of activations), and the reverse.
STORED_TYPES: dict[int, StoredType] = {
    kind.number: kind
    for kind in (
        *(StoredType(kind.name, int(kind), *sizes) for kind, sizes in GGML_QUANT_SIZES.items()),
        *(StoredType(kind.name, kind.number, kind.weights, kind.size) for kind in TYPES.values()),
    )
}

# ggml.h of ik_llama.cpp: number → name.
IK_LLAMA_TYPES = {
    36: "I2_S", 97: "Q8_0_X4", 98: "Q8_1_X4", 99: "Q8_2_X4", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 136: "Q8_K64",
    137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K", 144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS",
    147: "Q8_K16", 148: "Q8_K32", 149: "Q8_KR8", 150: "Q8_K128", 151: "Q8_KV", 152: "IQ5_KS", 153: "IQ2_KT",
    154: "IQ3_KT", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT", 202: "Q4_0_R8", 206: "Q5_0_R4",
    208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4",
    217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4",
    223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16", 233: "Q6_0_R4", 335: "IQ2_BN_R4", 337: "IQ2_K_R4",
    338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4", 398: "Q8_KV_R8",
    399: "Q8_K_R8",
}  # fmt: skip
# What ggml.h says was removed.
REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


def type_name(number: int) -> str:
    """ "Q4_1"; of a fork or a removed type its name there; "type 99" where the number is not known."""
    if number in STORED_TYPES:
        return STORED_TYPES[number].name
    return IK_LLAMA_TYPES.get(number) or REMOVED_TYPES.get(number) or f"type {number}"


def foreign_hint(name: str) -> str:
    """What to do about a type that was asked for, where only a fork has it or llama.cpp had it once; else ""."""
    if name.upper() in IK_LLAMA_TYPES.values():
        return "only ik_llama.cpp has it; lowbit writes the types of llama.cpp, such as IQ4_XS and Q4_K"
    return "llama.cpp no longer reads it; take Q4_0 or IQ4_NL" if name.upper() in REMOVED_TYPES.values() else ""


def asked_type(name: str) -> GgmlType:
    """The ggml type that was asked for, case-insensitively; UsageError."""
    try:
        return find_type(name)
    except UsageError as error:
        raise UsageError(str(error), foreign_hint(name) or error.hint) from error


def why_unreadable(number: int) -> tuple[str, str]:
    """(what a type is that has no size here, hint), for messages."""
    name = type_name(number)
    if number in IK_LLAMA_TYPES:
        return (f"is stored as {name} (number {number}), a type of ik_llama.cpp that llama.cpp does not have",
                "get the model in a type of llama.cpp, or run this file with ik_llama.cpp")  # fmt: skip
    if number in REMOVED_TYPES:
        return (f"is stored as {name} (number {number}), which llama.cpp no longer reads",
                "get the model in another type: a newer file of it has Q4_0 or IQ4_NL")  # fmt: skip
    return f"has ggml type {number}, which is not known", "update lowbit, or get the model in another type"
