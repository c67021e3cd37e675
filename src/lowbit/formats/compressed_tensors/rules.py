"""Rules on compressed-tensors' quantization_config, before any tensor is looked at."""

from __future__ import annotations

from lowbit.checkpoint.compressed_tensors_config import Group
from lowbit.errors import CheckpointError
from lowbit.verification.result import Finding, Rule
from lowbit.verification.subject import Subject

_ZERO_POINTS = ("weight_zero_point", "input_zero_point")


def check_format(subject: Subject) -> Finding:
    """Every group states a storage format, globally or for itself, and it can hold the group's numbers."""
    problems = []
    for group in subject.parsed.groups:
        if group.format is None:
            problems.append(f"config_groups.{group.name} has no format, and neither has quantization_config")
        elif not _holds(group):
            weight = group.scheme.weight
            problems.append(f"config_groups.{group.name}: {group.format} does not hold {weight.number} codes of "
                            f"{weight.bits} bits with {weight.scale_format} scales")  # fmt: skip
    return Finding(problems, ", ".join(sorted({str(group.format) for group in subject.parsed.groups})))


def _holds(group: Group) -> bool:
    weight = group.scheme.weight
    kind = (weight.number, weight.scale_format)
    return {
        "pack-quantized": weight.number == "int",
        "int-quantized": weight.number == "int",
        "float-quantized": kind == ("e4m3", "model"),
        "naive-quantized": kind == ("e4m3", "model") or weight.number == "int",
        "nvfp4-pack-quantized": kind == ("e2m1", "e4m3"),
        "mxfp4-pack-quantized": kind == ("e2m1", "e8m0"),
        "mxfp8-quantized": kind == ("e4m3", "e8m0"),
    }[str(group.format)]


def check_sparsity(subject: Subject) -> Finding:
    """No sparsity_config: loaders dropped the support and refuse it."""
    stated = subject.quantization.get("sparsity_config")
    return Finding([f"quantization_config.sparsity_config is {stated!r}; it must be empty"] if stated else [], "none")


def check_activation_order(subject: Subject) -> Finding:
    """Columns are stored in their own order: `actorder` group (dynamic) and weight_g_idx were removed from loaders."""
    problems = [f"config_groups.{group.name}.weights.actorder is {group.actorder!r}; loaders take null or 'weight'"
                for group in subject.parsed.groups if group.actorder in ("group", "dynamic")]  # fmt: skip
    problems += [f"{name}: loaders no longer permute columns"
                 for name in subject.stored.tensors if name.endswith(".weight_g_idx")]  # fmt: skip
    return Finding(problems, "columns are in their own order")


def check_activations(subject: Subject) -> Finding:
    """Over packed codes no kernel has 8-bit integer activations; FP8 ones over 4 bits run, and narrower integers are
    simulated."""
    problems = []
    for group in subject.parsed.groups:
        activation = group.scheme.activation
        if group.format != "pack-quantized" or activation is None:
            continue
        simulated = activation.number == "int" and activation.bits < 8
        if not simulated and not (activation.number == "e4m3" and group.scheme.weight.bits == 4):
            problems.append(f"config_groups.{group.name}: {group.format} has no kernel for {activation.bits}-bit "
                            f"{activation.number} input_activations; 8-bit integers take int-quantized")  # fmt: skip
    quantized = sum(group.scheme.activation is not None for group in subject.parsed.groups)
    return Finding(problems, f"{quantized} of {len(subject.parsed.groups)} groups quantize activations")


def check_zero_points(subject: Subject) -> Finding:
    """Symmetric groups ship no zero points; those of the others are packed cleanly."""
    problems = []
    for name in subject.checkpoint.tensors:
        linear, _, leaf = name.rpartition(".")
        if leaf in _ZERO_POINTS and name not in subject.expected:
            group = subject.groups.get(linear)
            stated = f"{linear} is not quantized" if group is None else f"{group.name} is symmetric"
            problems.append(f"{name}: zero points, but {stated}")
    problems += subject.survey.zero_points
    asymmetric = sum(not group.scheme.weight.symmetric for group in subject.groups.values())
    return Finding(problems, f"{asymmetric} of {len(subject.groups)} quantized linears have them, as configured")


def check_transforms(subject: Subject) -> Finding:
    """Rotations of inputs fit the columns of their linears, and no matrix of theirs is for a linear without one."""
    transforms, problems, rotated = subject.transforms, [], 0
    for linear in subject.stored_linears:
        try:
            columns = subject.architecture.linears[linear].shape[1]
            rotated += transforms.rotation(linear, columns, subject.stored) is not None
        except CheckpointError as error:
            problems.append(str(error))
    owners = {name.removesuffix(f".{ending}") for name in subject.stored.tensors for ending in transforms.stored
              if name.endswith(f".{ending}") and "_input." in ending}  # fmt: skip
    problems += [f"{owner} has the matrix of a transform that is not applied to it" for owner in sorted(owners)
                 if transforms.of(owner) is None]  # fmt: skip
    return Finding(problems, f"the inputs of {rotated} linears are rotated as the model runs" if rotated else "none")


def check_no_transforms(subject: Subject) -> Finding:
    """No input is rotated: the engine does not read transform_config, and multiplies rotated weights by inputs that are
    not."""
    rotated = [name for name in subject.stored_linears if subject.transforms.of(name) is not None]
    problems = []
    if rotated:
        problems = [f"the inputs of {len(rotated)} linears ({rotated[0]} …) are to be rotated as the model runs, and "
                    f"{subject.engine} does not read transform_config"]  # fmt: skip
    return Finding(problems, "none")


NO_TRANSFORMS = Rule(
    "no-transforms", "limits", ("compressed-tensors",), "no rotation is left to the engine", check_no_transforms,
    "quantizers/quantizer_compressed_tensors.py (transformers 5.23); compressed_tensors.py (SGLang); suffix_map of "
    "turbomind/weight_format.py (LMDeploy); layers/compressed_tensors (TGI)", limit=True, then="misreads",
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    Rule("format", "parse", ("compressed-tensors",), "every group states a storage format that holds its numbers",
         check_format, "_get_scheme_from_parts of compressed_tensors.py (vLLM)", gate=True),
    Rule("sparsity", "format", ("compressed-tensors",), "sparsity_config is empty", check_sparsity,
         "from_config of compressed_tensors.py (vLLM): support was removed"),
    Rule("transforms", "format", ("compressed-tensors",), "online rotations fit their linears", check_transforms,
         "transform/utils/matrix.py, transform/factory/hadamard.py (compressed-tensors)", gate=True),
    Rule("activation-order", "format", ("compressed-tensors",), "columns are not permuted", check_activation_order,
         "schemes/compressed_tensors_wNa16.py (vLLM): actorder group was removed"),
    Rule("zero-points", "values", ("compressed-tensors",), "symmetric groups ship none; others are packed cleanly",
         check_zero_points, "schemes/compressed_tensors_wNa16.py (vLLM)"),
)  # fmt: skip
