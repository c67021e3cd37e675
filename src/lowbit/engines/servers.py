"""Rules that vLLM and SGLang share: SGLang's loaders descend from vLLM's, and both run Marlin kernels.

They build one matrix of q, k and v, and one of gate and up. In compressed-tensors folders they match config.json's
patterns against the fused name too, and choose one scheme for the whole matrix (`find_matched_target` and
`should_ignore_layer` of vLLM's compressed_tensors/utils.py, 0.32):

    ignored   a pattern matches the fused name, or every member; some members only is an error
    target    the first that matches the fused name; else, where every member has one, that of the first member;
              else the first whose text occurs in the engine's class name ("Linear" in "QKVParallelLinear")

Earlier releases match the class before the members of fused layers; a checkpoint must mean the same to both.
"""

from __future__ import annotations

from lowbit.architecture import Linear
from lowbit.checkpoint.compressed_tensors_config import CompressedTensorsConfig, Group, matches
from lowbit.formats.awq import rules as awq
from lowbit.formats.compressed_tensors import rules as compressed_tensors
from lowbit.formats.gptq import rules as gptq
from lowbit.schemes import Scheme
from lowbit.tensors import Granularity
from lowbit.verification.layers import described, storage
from lowbit.verification.left_out import LEFT_OUT, PREDICTION, EngineUnit
from lowbit.verification.result import PLAIN, QUANTIZED, Finding, Rule
from lowbit.verification.subject import Subject

INT4 = ("W4A16", "W4A16_ASYM")
FP8_SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK")
MARLIN_BATCH = 16  # "near-ideal ~4x speedups up to batchsizes of 16-32 tokens": github.com/IST-DASLab/marlin
MARLIN_BITS, MARLIN_GROUP_SIZES = (4, 8), (-1, 32, 64, 128)
_CLASSES = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear", "lm_head": "ParallelLMHead"}
_TENSOR_PARALLEL = (1, 2, 4, 8)
# Linears that engines split by rows, fused or not.
_SPLIT_BY_ROWS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "q_b_proj", "kv_b_proj",
)  # fmt: skip


def _layers(subject: Subject) -> list[EngineUnit]:
    """Fused sets, single linears, and embeddings, which have no members."""
    architecture = subject.architecture
    layers = [EngineUnit(name, members) for name, members in architecture.fused_sets.items()]
    layers += [EngineUnit(name, (name,)) for name, linear in architecture.linears.items() if linear.fused is None]
    layers += [EngineUnit(name.removesuffix(".weight"), ()) for name, role in architecture.roles.items()
               if role == "embedding"]  # fmt: skip
    return layers


def _is_ignored(layer: EngineUnit, config: CompressedTensorsConfig) -> bool | None:
    """True if the engine leaves a layer unquantized; None where it refuses the checkpoint."""
    if _matches_any(config.ignore, layer.name):
        return True
    ignored = [_matches_any(config.ignore, member) for member in layer.members]
    if any(ignored) and not all(ignored):
        return None
    return bool(ignored) and all(ignored)


def _group_of(layer: EngineUnit, config: CompressedTensorsConfig, class_first: bool) -> Group | None:
    """The group whose scheme the engine gives to a layer that is not ignored."""
    last = layer.name.rsplit(".", 1)[-1]
    class_name = _CLASSES.get(last, "RowParallelLinear") if layer.members else "VocabParallelEmbedding"
    by_name = _first_match(layer.name, config.targets)
    by_members = [_first_match(member, config.targets) for member in layer.members]
    by_member = by_members[0] if by_members and all(by_members) else None
    by_class = None
    for target, group in config.targets.items():
        if matches(target, class_name) if target.startswith("re:") else target.lower() in class_name.lower():
            by_class = group
            break
    return by_name or ((by_class or by_member) if class_first else (by_member or by_class))


def _first_match(name: str, targets: dict[str, Group]) -> Group | None:
    return next((targets[target] for target in targets if matches(target, name)), None)


def _matches_any(patterns: tuple[str, ...], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def check_fused_ignore(subject: Subject) -> Finding:
    """`ignore` covers all of a fused set or nothing of it."""
    problems = []
    for layer in _layers(subject):
        if _is_ignored(layer, subject.parsed) is None:
            hit = [member for member in layer.members if _matches_any(subject.parsed.ignore, member)]
            problems.append(f"`ignore` names {', '.join(hit)}, but not all of {layer.name}")
    return Finding(problems, f"whole sets only ({len(subject.architecture.fused_sets)} fused sets)")


def check_fused_patterns(subject: Subject) -> Finding:
    """A regex that matches a fused name matches every member: `re:.*v_proj$` also hits qkv_proj."""
    problems = []
    patterns = dict.fromkeys(subject.parsed.ignore, "ignore")
    patterns |= {pattern: f"config_groups.{group.name}.targets" for pattern, group in subject.parsed.targets.items()}
    for pattern, where in patterns.items():
        for fused, members in subject.architecture.fused_sets.items():
            missed = [member for member in members if not matches(pattern, member)]
            if matches(pattern, fused) and missed:
                better = pattern.replace(".*", r".*\.", 1)
                problems.append(f"{where}: {pattern} matches {fused} but not {missed[0]}; write it as {better}")
                break
    return Finding(problems, f"{len(patterns)} patterns mean the same under fused names")


def check_engine_groups(subject: Subject) -> Finding:
    """vLLM gives every layer the scheme that config.json gives its linears, whichever release looks it up."""
    problems = []
    layers = _layers(subject)
    for layer in layers:
        ignored = _is_ignored(layer, subject.parsed)
        if ignored is None:
            continue
        found = [None if ignored else _group_of(layer, subject.parsed, first) for first in (False, True)]
        stated = {member: subject.groups.get(member) for member in layer.members} or {layer.name: None}
        for member, group in stated.items():
            wrong = next((taken for taken in found if storage(taken) != storage(group)), group)
            if storage(wrong) != storage(group):
                problems.append(f"{layer.name}: vLLM would load it as {described(wrong)}, but {member} is "
                                f"{described(group)}")  # fmt: skip
                break
    return Finding(problems, f"{len(layers)} layers resolve as config.json means them")


def check_dtype(subject: Subject) -> Finding:
    """config.json's dtype is one that the kernels compute in."""
    stated = str(subject.stated_dtype or "bfloat16").removeprefix("torch.")
    refused = subject.loading.dtypes_refused.get(subject.format, ())
    floats = [name for name, group in subject.groups.items() if group.scheme.weight.number != "int"]
    where = floats[0] if floats else subject.format
    if subject.format != PLAIN and (stated in refused or (floats and stated == "float32")):
        needed = "bfloat16" if "float16" in refused else "bfloat16 or float16"
        return Finding([f"config.json says dtype {stated}, which the kernels refuse ({where}); {needed} is needed"], "")
    return Finding([], stated)


def check_kernels(subject: Subject) -> Finding:
    """A kernel exists for every linear's bits, symmetry and group size."""
    problems = []
    first = {scheme.weight: name for name, scheme in reversed(subject.schemes.items())}
    for weight, name in first.items():
        group = -1 if weight.group_size is None else weight.group_size
        if not weight.symmetric or weight.bits not in MARLIN_BITS:
            symmetry = "symmetric" if weight.symmetric else "asymmetric"
            problems.append(f"{name}: GPTQ of {weight.bits} bits, {symmetry}; {subject.engine} has kernels for "
                            f"symmetric codes of 4 and 8 bits only")  # fmt: skip
        elif group not in MARLIN_GROUP_SIZES:
            problems.append(f"{name}: group size {group}; kernels take {', '.join(map(str, MARLIN_GROUP_SIZES))}")
    return Finding(problems, f"there are kernels for all {len(subject.schemes)} quantized linears")


def check_tensor_parallel(subject: Subject) -> Finding:
    """Which tensor-parallel sizes split every layer at whole groups. Only size 1 is required."""
    fits, notes, required = [], [], []
    for size in _TENSOR_PARALLEL:
        problem = split_problem(subject, size)
        if problem is None:
            fits.append(str(size))
        else:
            notes.append(f"{size} does not: {problem}")
            if size == 1:
                required.append(problem)
    return Finding(required, "; ".join([f"tensor parallel sizes that fit: {', '.join(fits) or 'none'}", *notes]))


def split_problem(subject: Subject, size: int) -> str | None:
    """Why a tensor-parallel size does not split every layer at whole groups; None where it does."""
    return next(filter(None, (_split_problem(subject, linear, size) for linear in subject.decoder)), None)


def _split_problem(subject: Subject, linear: Linear, size: int) -> str | None:
    """Fused sets are split by rows (whole heads), the linears after them by columns (whole groups)."""
    rows, columns = linear.shape
    if linear.keep is not None or linear.name not in subject.stored_linears:
        return None
    scheme = subject.schemes.get(linear.name)
    by_rows = linear.fused is not None or linear.role in _SPLIT_BY_ROWS
    if by_rows:
        heads = _heads(subject, linear)
        if heads is not None and heads % size and not (linear.role != "q_proj" and size % heads == 0):
            return f"{linear.name}: {heads} heads over {size} ranks"
        rows = rows // min(size, heads) if heads is not None else rows / size
    else:
        columns = columns / size
    if rows != int(rows) or columns != int(columns):
        return f"{linear.name}: {list(linear.shape)} over {size} ranks"
    if scheme is None:
        return None
    return _part_problem(subject, linear.name, int(rows), int(columns), size, scheme, by_rows)


def _part_problem(
    subject: Subject, name: str, rows: int, columns: int, ranks: int, scheme: Scheme, by_rows: bool
) -> str | None:
    """Why a rank's part of a quantized linear is not whole groups, blocks or words; None where it is."""
    weight, group = scheme.weight, subject.groups.get(name)
    size = weight.group_size
    packed = group is not None and group.format == "pack-quantized"
    if weight.granularity is Granularity.GROUP and size and columns % size:
        return f"{name}: {columns} columns a rank, groups of {size}"
    split = rows if by_rows else columns
    if weight.granularity is Granularity.BLOCK and size and ranks > 1 and split % size:
        return f"{name}: {split} {'rows' if by_rows else 'columns'} a rank, blocks of {size}"
    if subject.format in ("gptq", "awq", "auto-round") and (rows if by_rows else columns) * weight.bits % 32:
        return f"{name}: {rows} × {columns} a rank, {weight.bits} bits each, do not fill 32-bit words"
    if packed and not by_rows and columns * weight.bits % 32:
        return f"{name}: {columns} columns a rank of {weight.bits} bits do not fill 32-bit words"
    if packed and not weight.symmetric and by_rows and rows * weight.bits % 32:
        return f"{name}: zero points of {rows} rows a rank, {weight.bits} bits each, do not fill 32-bit words"
    return None


def _heads(subject: Subject, linear: Linear) -> int | None:
    """Attention heads in the rows of q, k or v; None for other linears."""
    if linear.role not in ("q_proj", "k_proj", "v_proj"):
        return None
    text = subject.config.get("text_config")
    config = text if isinstance(text, dict) else subject.config
    queries = config.get("num_attention_heads")
    return queries if linear.role == "q_proj" else config.get("num_key_value_heads") or queries


def check_turned_weights(subject: Subject) -> Finding:
    """GPT-2: codes are not stored as `.weight`, which the engine transposes, since 16-bit files hold [in, out]."""
    turned = [
        linear.name
        for linear in subject.decoder
        if linear.transposed and linear.name in subject.schemes and f"{linear.name}.weight" in subject.stored.tensors
    ]
    problems = [f"{name}.weight holds codes [out, in], but {subject.engine} transposes every .weight of this model"
                for name in turned[:1]]  # fmt: skip
    return Finding(problems, "no weight is transposed")


SERVER_RULES: tuple[Rule, ...] = (
    *gptq.SERVER_RULES,
    *awq.SERVER_RULES,
    Rule("activations", "format", ("compressed-tensors",), "packed codes come without 8-bit integer activations",
         compressed_tensors.check_activations, "_get_scheme_from_parts of compressed_tensors.py (vLLM)"),
    Rule("fused-ignore", "layers", ("compressed-tensors",), "`ignore` covers whole fused sets", check_fused_ignore,
         "should_ignore_layer of compressed_tensors/utils.py (vLLM, SGLang)"),
    Rule("fused-patterns", "layers", ("compressed-tensors",), "regexes mean the same under fused names",
         check_fused_patterns, "find_matched_target of compressed_tensors/utils.py (vLLM, SGLang)"),
    Rule("engine-groups", "layers", ("compressed-tensors",), "the engine gives every layer the scheme meant for it",
         check_engine_groups, "find_matched_target of compressed_tensors/utils.py (vLLM, SGLang)", then="misreads"),
    LEFT_OUT,
    PREDICTION,
    Rule("engine-dtype", "limits", QUANTIZED, "kernels compute in the model's dtype", check_dtype,
         "get_supported_act_dtypes of each quantization config (vLLM, SGLang)", limit=True),
    Rule("gptq-kernels", "limits", ("gptq",), "kernels exist for bits, symmetry and group size", check_kernels,
         "TYPE_MAP of auto_gptq.py, MARLIN_SUPPORTED_GROUP_SIZES of utils/marlin_utils.py (vLLM); the same of gptq.py "
         "and marlin_utils.py (SGLang)", limit=True),
    Rule("turned-weights", "limits", QUANTIZED, "codes of GPT-2 are not stored as .weight, which engines transpose",
         check_turned_weights, "_transpose_conv1d of models/gpt2.py (vLLM), load_weights of models/gpt2.py "
         "(SGLang)", limit=True),
    Rule("tensor-parallel", "limits", QUANTIZED, "layers split at whole groups; sizes beyond 1 are informational",
         check_tensor_parallel, "model_executor/parameter.py: whole groups and words per rank (vLLM)",
         limit=True),
)  # fmt: skip
