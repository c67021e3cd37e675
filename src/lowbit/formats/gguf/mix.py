"""Which ggml type every tensor of a GGUF gets: the interpreter of the tables in `gguf_mix_table.py`.

For each tensor, in this order:

    1. not a matrix, or named in NEVER_QUANTIZED      it keeps its type
    2. a type of the user's                           embeddings, output, then the first `--override` that matches,
                                                      then the first rule of `--tensor-type-file`
    3. the first of RULES that applies                unless `pure`, or the file type is a float
    4. the base type of the file type
    5. rows that do not divide by the block           FALLBACKS, then F16; an error for a type of the user's

Rules depend on the position of a tensor among those of its kind. As in llama.cpp, tensors are counted by layer, then by
name, without those whose type the user chose. In models with experts the layer in the name counts instead, except for
file types of two bits and fewer.

The result equals llama-quantize's, with two exceptions: overrides and output types also hold where it ignores them
(overrides, and the output type of tied embeddings, for F32, F16 and BF16; the latter also with `pure`), and a type of
the user's that does not fit is an error, where it takes a fallback or aborts.

Refused (UsageError): unknown file types and types; a regex that matches nothing, or only tensors that are never
quantized; a type of the user's whose block does not divide the row; types that need an importance matrix, without one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lowbit.errors import CheckpointError, UsageError, did_you_mean
from lowbit.formats.gguf.mix_table import (
    ALIASES,
    CONDITIONS,
    COUNTED,
    EMBEDDING,
    FALLBACKS,
    FILE_TYPES,
    FLOAT32_PARTS,
    IMAGE_MODELS,
    KINDS,
    LAST_FALLBACK,
    LAYER_EMBEDDING,
    MODELS_70B,
    NEVER_QUANTIZED,
    NEVER_QUANTIZED_IN,
    NEVER_QUANTIZED_NAMES,
    OUTPUT,
    FileType,
    MixRule,
    needs_importance,
)
from lowbit.formats.gguf.stored_types import asked_type, foreign_hint
from lowbit.formats.gguf.type_rules import TypeRules
from lowbit.numerics.ggml.types import TYPES
from lowbit.patterns import PatternError, compiled
from lowbit.schemes import SCHEMES

IMATRIX_HINT = "make one with `lowbit imatrix MODEL -o FILE` and pass it with --imatrix FILE"
_VALUE_SHARING = 4  # query heads per value head, from which values get more bits


@dataclass(frozen=True)
class TensorShape:
    """One tensor of the output, under its GGUF name.

    shape        in torch's order, [N, K]; stacked experts [E, N, K]
    source_type  ggml type in a GGUF source, kept if the tensor is never quantized; None: float32 or
                 MixFacts.float_type, as llama.cpp's converter chooses
    made_of      names of its source tensors, which patterns may match too
    """

    name: str
    shape: tuple[int, ...]
    source_type: str | None = None
    made_of: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def dims(self) -> int:
        """As ggml counts dimensions: leading ones do not count, so [1, K] is a vector."""
        leading = next((index for index, size in enumerate(self.shape) if size > 1), len(self.shape))
        return len(self.shape) - leading

    @property
    def layer(self) -> int | None:
        found = re.match(r"blk\.(\d{1,9})\.", self.name)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class MixFacts:
    """The numbers of a model that rules depend on.

    arch        general.architecture
    layers      .block_count
    experts     .expert_count, 0 in dense models
    heads       .attention.head_count, of the first layer where layers differ
    kv_heads    .attention.head_count_kv, likewise
    float_type  16-bit type of unquantized tensors that need not be float32: BF16 for a bfloat16 model
    """

    arch: str
    layers: int
    experts: int = 0
    heads: int = 0
    kv_heads: int = 0
    float_type: str = "F16"

    @property
    def gqa(self) -> int:
        """Query heads per value head; 0 without attention."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        layers, shared = MODELS_70B.get(self.arch, (0, False))
        mixtral = self.arch.startswith("llama") and self.experts == 8
        return self.layers == layers and not mixtral and (not shared or self.heads != self.kv_heads)


@dataclass(frozen=True)
class TypeChoice:
    """The type of one tensor.

    reason         why it differs from the base type of the file type; None if it does not
    fallback_from  the type that the block size ruled out
    asked          True if the user named it
    """

    type_name: str
    reason: str | None = None
    fallback_from: str | None = None
    asked: bool = field(default=False, compare=False)


def find_file_type(name: str) -> FileType:
    """The file type called `name`, case-insensitively, Q4_K for Q4_K_M; UsageError names the nearest ones."""
    upper = name.upper()
    file_type = FILE_TYPES.get(ALIASES.get(upper, upper))
    if file_type is not None:
        return file_type
    hint = did_you_mean(upper, FILE_TYPES, f"choose one of {', '.join(FILE_TYPES)}", 3, 0.5)
    if upper in SCHEMES:
        hint = "it is a scheme of folders; for GGUF give --scheme Q4_K_M, Q8_0 or another of its types"
    raise UsageError(f"there is no GGUF file type {name!r}", foreign_hint(name) or hint)


def choose_types(
    file_type: str,
    tensors: Sequence[TensorShape],
    facts: MixFacts,
    *,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
    ignored: Sequence[str] = (),
    output_type: str | None = None,
    token_embedding_type: str | None = None,
    has_imatrix: bool = False,
    missing_importance: Container[str] = (),
    rules: TypeRules | None = None,
    notes: list[str] | None = None,
) -> dict[str, TypeChoice]:
    """The type of every tensor, by name, in the order of `tensors`.

    pure                the base type for everything that is quantized
    overrides           (regex, ggml type); the first regex that matches the name decides
    ignored             regexes of tensors that keep the source's type, or 16 bits; they take precedence over all else
    output_type         of output.weight, or of tied token_embd.weight
    missing_importance  names of tensors without an entry in the importance matrix
    rules               overrides from a file, after the others; those that match nothing are noted
    notes               the list that notes go to

    Raises UsageError as in the module docstring.
    """
    choices = assign_types(
        find_file_type(file_type), tensors, facts, pure=pure, has_imatrix=has_imatrix,
        asked=Asked.parse(tensors, facts, overrides, output_type, token_embedding_type, ignored, rules, notes),
    )  # fmt: skip
    _check_importance(find_file_type(file_type), choices, has_imatrix, missing_importance)
    return choices


def importance_needed(file_type: str, choices: Mapping[str, TypeChoice]) -> list[str]:
    """Names of the tensors that need an importance matrix; embeddings and output never do."""
    exempt = (OUTPUT, EMBEDDING, LAYER_EMBEDDING)
    name = find_file_type(file_type).name
    return [t for t, choice in choices.items() if needs_importance(name, choice.type_name) and t not in exempt]


def fallback_summary(choices: Mapping[str, TypeChoice], tensors: Sequence[TensorShape]) -> str:
    """All fallbacks in one sentence, such as "90 of 211 tensors, 41 % of weights: rows of 576 do not divide by 256, so
    Q4_K became Q5_0"; empty if there is none."""
    fallen = [tensor for tensor in tensors if choices[tensor.name].fallback_from]
    if not fallen:
        return ""
    causes: dict[str, list[str]] = {}
    for tensor in fallen:
        choice = choices[tensor.name]
        became = f"{choice.fallback_from} became {choice.type_name}"
        block = TYPES[choice.fallback_from or choice.type_name].weights
        last = choice.type_name == LAST_FALLBACK and block > 32
        misfit = f"divide by neither {block} nor 32" if last else f"do not divide by {block}"
        effects = causes.setdefault(f"rows of {tensor.columns} {misfit}", [])
        if became not in effects:
            effects.append(became)
    share = sum(t.weights for t in fallen) / max(1, sum(t.weights for t in tensors))
    details = "; ".join(f"{cause}, so {' and '.join(effects)}" for cause, effects in causes.items())
    return f"{len(fallen)} of {len(tensors)} tensors, {share:.0%} of weights: {details}".replace("%", " %", 1)


@dataclass(frozen=True)
class Asked:
    """The user's types, checked: name of the tensor → (type, why)."""

    types: Mapping[str, tuple[str, str]]

    @staticmethod
    def parse(
        tensors: Sequence[TensorShape],
        facts: MixFacts,
        overrides: Sequence[tuple[str, str]] = (),
        output_type: str | None = None,
        token_embedding_type: str | None = None,
        ignored: Sequence[str] = (),
        rules: TypeRules | None = None,
        notes: list[str] | None = None,
    ) -> Asked:
        """UsageError for unknown types, regexes that are invalid or match nothing, and rows of no whole blocks."""
        types: dict[str, tuple[str, str]] = {}
        free = {tensor.name: tensor for tensor in tensors if why_never_quantized(tensor, facts.arch) is None}
        named: set[str] = set()
        for regex, type_name in overrides:
            kind = asked_type(type_name).name
            found = _search(regex, free, tensors, "--override")
            for name in found:
                types.setdefault(name, (kind, f"matches --override {regex}={type_name}"))
            named.update(found)
        if rules is not None:
            named.update(_apply_rules(rules, free, types, [] if notes is None else notes))
        tied = OUTPUT not in free
        embeddings = [name for name in (EMBEDDING, LAYER_EMBEDDING) if name in free]
        if output_type is not None:
            kind = asked_type(output_type).name
            if not tied:
                types[OUTPUT] = (kind, "the output type that was asked for")
            for name in embeddings if tied else ():
                types.setdefault(name, (kind, "the output type that was asked for; embeddings and output are one"))
            if tied and not embeddings:
                raise UsageError("an output type was asked for, and there is no output matrix", "leave it out")
        if token_embedding_type is not None:
            kind = asked_type(token_embedding_type).name
            if not embeddings:
                raise UsageError("an embedding type was asked for, and there is no token_embd.weight", "leave it out")
            for name in embeddings:
                if name == EMBEDDING or name not in named:
                    types[name] = (kind, "the token embedding type that was asked for")
        for regex in reversed(ignored):
            for name in _search(regex, free, tensors, "--ignore"):
                types[name] = (free[name].source_type or facts.float_type, f"matches --ignore {regex}")
        for name, (kind, why) in types.items():
            _check_fits(free[name], kind, why)
        return Asked(types)


def _apply_rules(
    rules: TypeRules, free: Mapping[str, TensorShape], types: dict[str, tuple[str, str]], notes: list[str]
) -> list[str]:
    """Enter the types that rules of a file give to tensors without one; the names that some rule matches.

    A file may be meant for many models: rules that match nothing are noted, and refused if none matches.
    """
    named, idle = [], []
    for regex, kind in rules.rules:
        found = _matching(regex, free.values(), rules.path)
        for name in found:
            types.setdefault(name, (kind, f"matches {regex}={kind} of {rules.path}"))
        named += found
        idle += [] if found else [regex]
    if not named:
        raise UsageError(f"no rule of {rules.path} matches a tensor that is quantized",
                         f"names are those of GGUF, such as {', '.join(list(free)[:4])}")  # fmt: skip
    if idle:
        shown = ", ".join(idle[:4]) + (" …" if len(idle) > 4 else "")
        notes.append(
            f"{len(idle)} of {len(rules.rules)} rules of {rules.path} match no tensor that is quantized: {shown}"
        )
    return named


def _matching(regex: str, tensors: Iterable[TensorShape], option: str) -> list[str]:
    """Names of the tensors that match, by themselves or by their sources."""
    try:
        pattern = compiled(regex)
    except PatternError as error:
        raise UsageError(f"{option} {regex!r} is not a regular expression: {error}") from error
    return [
        tensor.name
        for tensor in tensors
        if any(pattern.search(name) or pattern.search(name.removesuffix(".weight"))
               for name in (tensor.name, *tensor.made_of))
    ]  # fmt: skip


def _search(regex: str, free: Mapping[str, TensorShape], tensors: Sequence[TensorShape], option: str) -> list[str]:
    """Names in `free` that match; UsageError if there is none."""
    found = _matching(regex, free.values(), option)
    if found:
        return found
    kept = _matching(regex, tensors, option)
    if kept:
        raise UsageError(
            f"{option} {regex!r} matches only tensors that are never quantized, such as {kept[0]}", "leave it out"
        )
    examples = list(free)[:4]
    raise UsageError(
        f"{option} {regex!r} matches no tensor",
        f"names are those of GGUF, such as {', '.join(examples)}" if examples else "",
    )


def _check_fits(tensor: TensorShape, type_name: str, why: str) -> None:
    block = TYPES[type_name].weights
    if tensor.columns % block:
        fitting = [kind.name for kind in TYPES.values() if tensor.columns % kind.weights == 0]
        raise UsageError(
            f"{tensor.name} cannot be {type_name} ({why}): its rows of {tensor.columns} do not divide by {block}",
            f"choose one of {', '.join(fitting)}",
        )


def why_never_quantized(tensor: TensorShape, arch: str) -> str | None:
    """Why a tensor keeps its type under every file type; None if it is quantized."""
    name = tensor.name
    if tensor.source_type in ("I8", "I16", "I32", "I64"):
        return "integers are never quantized"
    if tensor.dims > (2 if arch in IMAGE_MODELS else 4):
        return "kernels of convolutions are never quantized"
    if tensor.dims < 2:
        return "vectors are never quantized"
    if not name.endswith("weight"):
        return "only weights are quantized"
    for what, parts in NEVER_QUANTIZED:
        if any(part in name for part in parts):
            return f"{what} are never quantized"
    if name in NEVER_QUANTIZED_NAMES:
        return f"{NEVER_QUANTIZED_NAMES[name]} are never quantized"
    if any(part in name for part in (*NEVER_QUANTIZED_IN.get(arch, ()), *IMAGE_MODELS.get(arch, ()))):
        return f"never quantized in {arch}"
    return None


def _kept_type(tensor: TensorShape, facts: MixFacts, file_type: FileType) -> str:
    """The type of a tensor that is never quantized."""
    if tensor.source_type is not None:
        return tensor.source_type
    name = tensor.name
    small = tensor.dims < 2 or name.endswith("_norm.weight") or not name.endswith(".weight")
    if small or any(part in name for part in FLOAT32_PARTS):
        return "F32"
    return file_type.base if file_type.is_float else facts.float_type


@dataclass(frozen=True)
class _Situation:
    """One tensor and its position among those of its kind; CONDITIONS test it.

    counted  number of tensors of its kind before it
    values   number of attention value tensors in the model
    """

    tensor: TensorShape
    kind: str
    file_type: FileType
    facts: MixFacts
    has_imatrix: bool
    counted: int
    values: int

    @property
    def place(self) -> tuple[int, int]:
        """(index, count) that "first", "middle" and "last" refer to."""
        if self.kind == "attn_v":
            return self.counted, self.values
        if self.facts.experts <= 1 or self.file_type.name in COUNTED:
            return self.counted, self.facts.layers
        layer = self.tensor.layer
        if layer is None or layer >= self.facts.layers:
            raise CheckpointError(
                f"tensor {self.tensor.name} belongs to no layer of a model of {self.facts.layers} layers",
                "its block_count, or the tensor's name, is wrong",
            )
        return layer, self.facts.layers

    @property
    def is_in_the_middle(self) -> bool:
        index, number = self.place
        return number // 8 <= index < 7 * number // 8

    @property
    def gets_more_bits(self) -> bool:
        index, number = self.place
        return not self.is_in_the_middle or (index - number // 8) % 3 == 2

    @property
    def is_stacked(self) -> bool:
        """Ring-linear attention of BailingMoE 3 has matrices [heads, N, K] too, which are no experts."""
        stacked = len(self.tensor.shape) > 2 and self.tensor.shape[-3] > 1
        return stacked and (self.facts.arch != "bailingmoe3" or self.kind.startswith("ffn_"))


_HOLDS: dict[str, Callable[[_Situation], bool]] = {
    "imatrix": lambda s: s.has_imatrix,
    "no imatrix": lambda s: not s.has_imatrix,
    "first two": lambda s: s.place[0] < 2,
    "first four": lambda s: s.place[0] < 4,
    "first sixteenth": lambda s: s.place[0] < s.place[1] // 16,
    "first eighth": lambda s: s.place[0] < s.place[1] // 8,
    "middle": lambda s: s.is_in_the_middle,
    "more bits": lambda s: s.gets_more_bits,
    "stacked experts": lambda s: s.is_stacked,
    "ragged": lambda s: s.tensor.columns % TYPES[s.file_type.base].weights != 0,
    "shared values": lambda s: s.facts.gqa >= _VALUE_SHARING,
    "70B": lambda s: s.facts.is_70b,
    "8 experts": lambda s: s.facts.experts == 8,
    "not 8 experts": lambda s: s.facts.experts != 8,
    "4 experts": lambda s: s.facts.experts >= 4,
    "falcon": lambda s: s.facts.arch == "falcon",
    "not falcon": lambda s: s.facts.arch != "falcon",
    "glm5-next queries": lambda s: (
        s.facts.arch == "glm5-next" and any(part in s.tensor.name for part in ("attn_q_a", "attn_q_b", "nextn.eh_proj"))
    ),
}
assert set(_HOLDS) == set(CONDITIONS)


def kind_of(name: str, *, tied: bool) -> str:
    """The kind of a tensor in the rules; tied embeddings are "output"."""
    if name == OUTPUT:
        return "output"
    if name in (EMBEDDING, LAYER_EMBEDDING):
        return "output" if tied else "token_embd"
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def assign_types(
    file_type: FileType,
    tensors: Sequence[TensorShape],
    facts: MixFacts,
    *,
    pure: bool,
    has_imatrix: bool,
    asked: Asked,
) -> dict[str, TypeChoice]:
    """`choose_types` with checked arguments, and without the check for importance."""
    tied = OUTPUT not in {tensor.name for tensor in tensors}
    kinds = {tensor.name: kind_of(tensor.name, tied=tied) for tensor in tensors}
    values = sum(kind == "attn_v" for kind in kinds.values())
    rules = () if pure else file_type.rules
    counted: Counter[str] = Counter()
    choices: dict[str, TypeChoice] = {}
    for tensor in sorted(tensors, key=lambda t: (-1 if t.layer is None else t.layer, t.name)):
        why = why_never_quantized(tensor, facts.arch)
        if why is not None:
            choices[tensor.name] = TypeChoice(_kept_type(tensor, facts, file_type), why)
        elif tensor.name in asked.types:
            choices[tensor.name] = TypeChoice(*asked.types[tensor.name], asked=True)
        else:
            kind = kinds[tensor.name]
            situation = _Situation(tensor, kind, file_type, facts, has_imatrix, counted[kind], values)
            choices[tensor.name] = _by_rule(rules, situation)
            counted[kind] += 1
    return {tensor.name: choices[tensor.name] for tensor in tensors}


def _by_rule(rules: Sequence[MixRule], situation: _Situation) -> TypeChoice:
    """The type of the first rule that applies, or the base type; or the fallback that its rows allow."""
    file_type = situation.file_type
    applying = (
        rule
        for rule in rules
        if (not rule.kinds or situation.kind in rule.kinds) and all(_HOLDS[name](situation) for name in rule.when)
    )
    rule = next(applying, None)
    target = wanted = rule.type_name if rule else file_type.base
    if rule and "ragged" in rule.when:  # itself a fallback: from what the next rule would have given
        rule = next(applying, None)
        wanted = rule.type_name if rule else file_type.base
    reason = _reason(rule, situation) if rule and wanted != file_type.base else None
    fitting, columns = target, situation.tensor.columns
    if columns % TYPES[target].weights:
        fitting = FALLBACKS.get(target, target)
        fitting = LAST_FALLBACK if columns % TYPES[fitting].weights else fitting
    if fitting == wanted:
        return TypeChoice(wanted, reason)
    block = TYPES[wanted].weights
    why = f"rows of {columns} do not divide by {block}, so {wanted} became {fitting}"
    return TypeChoice(fitting, f"{reason}; {why}" if reason else why, wanted)


def _reason(rule: MixRule, situation: _Situation) -> str:
    """The rule in words, without its negative conditions."""
    kind = "embeddings and output in one" if situation.tensor.name != OUTPUT and situation.kind == "output" else None
    what = kind or {"token_embd": "the embeddings", "output": "the output"}.get(situation.kind, situation.kind)
    conditions = " and ".join(CONDITIONS[name] for name in rule.when if not name.startswith("not "))
    said = f"file type {situation.file_type.name} makes {what} {rule.type_name}"
    return f"{said} where {conditions}" if conditions else said


def _check_importance(
    file_type: FileType, choices: Mapping[str, TypeChoice], has_imatrix: bool, missing: Container[str]
) -> None:
    needing = importance_needed(file_type.name, choices)
    bare = needing if not has_imatrix else [name for name in needing if name in missing]
    if not bare:
        return
    type_name = choices[bare[0]].type_name
    others = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
    if not has_imatrix:
        raise UsageError(
            f"{file_type.name} needs an importance matrix: {bare[0]}{others} would be {type_name}, useless without one",
            IMATRIX_HINT,
        )
    raise UsageError(
        f"the importance matrix has no entry for {bare[0]}{others}, which {file_type.name} makes {type_name}",
        f"{IMATRIX_HINT}, of more text if experts are missing; or give these tensors a wider type: "
        f"--override '{re.escape(bare[0])}=Q4_K'",
    )
