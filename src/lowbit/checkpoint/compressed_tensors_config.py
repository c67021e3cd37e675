"""config.json's `quantization_config` as compressed-tensors means it, read strictly.

    config_groups: name → {targets, weights, input_activations, output_activations, format}      ignore: [target, …]

A target is an exact module name, a class name, or `re:` and a regex for `re.match` (anchored at the start only).
A linear belongs to no group if anything in `ignore` matches it; else to the group of the most specific target: an
exact name, then a regex, then its class.

Refused, as the library refuses it (its models are `extra="forbid"`): an unknown key in a group or in quantization
arguments, and arguments that contradict each other. Refused because lowbit cannot read it: quantized outputs, and
number formats beyond those of `WeightSpec` and `ActivationSpec`. What only engines refuse (`actorder`, a missing
format) is kept for verification.
Spec: `QuantizationConfig`, `QuantizationScheme`, `QuantizationArgs` and `utils/match.py` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.errors import CheckpointError
from lowbit.patterns import PatternError, compiled
from lowbit.schemes import ActivationSpec, ScaleFormat, Scheme, WeightSpec, scheme_of_specs
from lowbit.tensors import Granularity

_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGS_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One entry of config_groups that quantizes weights.

    format    how the weights are stored: the group's own, else the global one; None where neither is given
    actorder  GPTQ's column order, as written: "weight" and "static" leave no trace in the files
    """

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    format: str | None
    actorder: str | None = None


@dataclass(frozen=True)
class CompressedTensorsConfig:
    """The parsed quantization_config; `groups` in the order of the file."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    format: str | None
    kv_cache: dict[str, Any] | None

    def group_of(self, linear: str, class_name: str = "Linear") -> Group | None:
        """The group that a module belongs to by compressed-tensors' rules."""
        if any(matches(target, linear) or target == class_name for target in self.ignore):
            return None
        by_target = self.targets
        for target in sorted(by_target, key=lambda target: ("re:" in target, target)):
            if matches(target, linear):
                return by_target[target]
        return by_target.get(class_name)

    def scheme_of(self, linear: str, class_name: str = "Linear") -> Scheme | None:
        """How a module's weight is quantized; None where it is not."""
        group = self.group_of(linear, class_name)
        return None if group is None else group.scheme

    @property
    def targets(self) -> dict[str, Group]:
        """Target → group. A target that two groups name belongs to the later one."""
        return {target: group for group in self.groups for target in group.targets}


def matches(target: str, name: str) -> bool:
    """True where a target names a module, exactly or by regex; class names are the caller's."""
    if target.startswith("re:"):
        return compiled(target.removeprefix("re:")).match(name)
    return target == name


def is_fp8_cache(scheme: dict[str, Any]) -> bool:
    """True for a kv_cache_scheme that engines know: FP8, symmetric, static, one scale per tensor or head."""
    return (
        str(scheme.get("type", "int")).lower() == "float"
        and scheme.get("num_bits", 8) == 8
        and scheme.get("symmetric", True) is True
        and not scheme.get("dynamic", False)
        and scheme.get("strategy") in ("tensor", "attn_head")
    )


def parse_quantization_config(config: dict[str, Any]) -> CompressedTensorsConfig:
    """The parsed `quantization_config` of a config.json; CheckpointError for what the module docstring refuses."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        raise CheckpointError("config.json has no quantization_config", "this checkpoint is not a quantized one")
    if stated.get("quant_method") != "compressed-tensors":
        raise _bad("quant_method", stated.get("quant_method"), "'compressed-tensors'")
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _bad("config_groups", groups, "a mapping with at least one group")
    overall = _format("format", stated.get("format"), (*_FORMATS, "mixed-precision"))
    ignore = parse_targets("ignore", stated.get("ignore") or [])
    kv_cache = stated.get("kv_cache_scheme")
    if kv_cache is not None:
        _checked_args("kv_cache_scheme", kv_cache)
    parsed = [_group(f"config_groups.{name}", name, group, overall) for name, group in groups.items()]
    return CompressedTensorsConfig(tuple(filter(None, parsed)), ignore, overall, kv_cache)


def _group(where: str, name: str, group: Any, overall: str | None) -> Group | None:
    """One group; None if it quantizes no weights."""
    if not isinstance(group, dict):
        raise _bad(where, group, "a mapping; preset names are not supported")
    refuse_unknown(where, group, _GROUP_KEYS)
    targets = parse_targets(f"{where}.targets", group.get("targets"))
    own = _format(f"{where}.format", group.get("format"), _FORMATS)
    stored_as = own or (None if overall == "mixed-precision" else overall)
    if group.get("output_activations") is not None:
        raise _bad(f"{where}.output_activations", group["output_activations"], "null")
    activation = None
    if group.get("input_activations") is not None:
        activation = _activation_spec(f"{where}.input_activations", group["input_activations"], stored_as)
    if group.get("weights") is None:
        return None
    weight = _weight_spec(f"{where}.weights", group["weights"], stored_as)
    actorder = group["weights"].get("actorder") or None
    return Group(name, targets, scheme_of_specs(weight, activation), stored_as, actorder)


def _weight_spec(where: str, args: Any, stored_as: str | None) -> WeightSpec:
    args = _checked_args(where, args)
    strategy, group_size = args["strategy"], args["group_size"]
    if args["dynamic"]:
        raise _bad(f"{where}.dynamic", args["dynamic"], "false: weights are quantized once")
    if strategy in ("token", "attn_head"):
        raise _bad(f"{where}.strategy", strategy, "one for weights: tensor, channel, group, block or tensor_group")
    number = _number(where, args)
    if number != "int" and not args["symmetric"]:
        raise _bad(f"{where}.symmetric", False, "true for float codes")
    if strategy == "block":
        rows, columns = args["block_structure"]
        if rows != columns:
            raise _bad(f"{where}.block_structure", [rows, columns], "a square")
        group_size = rows
    granularity = Granularity.GROUP if strategy == "tensor_group" else Granularity(strategy)
    if granularity in (Granularity.TENSOR, Granularity.CHANNEL):
        group_size = None
    return WeightSpec(
        number, args["num_bits"], granularity, group_size, args["symmetric"], _scale_format(where, args, stored_as)
    )


def _activation_spec(where: str, args: Any, stored_as: str | None) -> ActivationSpec:
    args = _checked_args(where, args)
    strategy = args["strategy"]
    per = {"token": "token", "tensor": "tensor", "group": "group", "tensor_group": "group"}.get(strategy)
    if per is None:
        raise _bad(f"{where}.strategy", strategy, "one for activations: token, tensor, group or tensor_group")
    if args["actorder"]:
        raise _bad(f"{where}.actorder", args["actorder"], "null for activations")
    number = _number(where, args)
    return ActivationSpec(
        number, args["num_bits"], per, args["dynamic"], args["group_size"],  # type: ignore[arg-type]
        _scale_format(where, args, stored_as), args["symmetric"],
    )  # fmt: skip


def _checked_args(where: str, args: Any) -> dict[str, Any]:
    """Quantization arguments with their defaults and the strategy they imply; contradictions refused."""
    if not isinstance(args, dict):
        raise _bad(where, args, "a mapping")
    refuse_unknown(where, args, _ARGS_KEYS)
    checked = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "strategy": None,
               "block_structure": None, "dynamic": False, "actorder": None, "scale_dtype": None} | args  # fmt: skip
    if type(checked["num_bits"]) is not int:
        raise _bad(f"{where}.num_bits", checked["num_bits"], "an integer")
    if type(checked["symmetric"]) is not bool:
        raise _bad(f"{where}.symmetric", checked["symmetric"], "true or false")
    if checked["dynamic"] not in (True, False, "local"):
        raise _bad(f"{where}.dynamic", checked["dynamic"], "true, false or 'local'")
    if checked["actorder"] not in (None, False, "weight", "static", "group", "dynamic"):
        raise _bad(f"{where}.actorder", checked["actorder"], "null, 'weight' or 'static'")
    checked["strategy"] = _strategy(where, checked)
    _check_strategy(where, checked)
    return checked


def _strategy(where: str, args: dict[str, Any]) -> str:
    group_size, strategy = args["group_size"], args["strategy"]
    if group_size is not None and (type(group_size) is not int or group_size < -1):
        raise _bad(f"{where}.group_size", group_size, "a positive number of columns, or -1")
    if strategy is None:
        return "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy not in _STRATEGIES:
        raise _bad(f"{where}.strategy", strategy, f"one of {', '.join(_STRATEGIES)}")
    return strategy


def _check_strategy(where: str, args: dict[str, Any]) -> None:
    strategy, group_size, block, dynamic = (
        args[key] for key in ("strategy", "group_size", "block_structure", "dynamic")
    )
    grouped = strategy in ("group", "tensor_group")
    if grouped and (group_size is None or group_size <= 0):
        raise _bad(f"{where}.group_size", group_size, f"a positive number of columns with strategy {strategy}")
    if not grouped and group_size is not None and group_size > 0:
        raise _bad(f"{where}.group_size", group_size, f"null with strategy {strategy}")
    if (strategy == "block") != (block is not None):
        raise _bad(f"{where}.block_structure", block, "given with strategy block and with no other")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise _bad(f"{where}.block_structure", block, "[rows, columns]")
    if strategy == "token" and not dynamic:
        raise _bad(f"{where}.dynamic", dynamic, "true with strategy token")
    if dynamic and strategy not in ("token", "tensor", "group", "tensor_group"):
        raise _bad(f"{where}.strategy", strategy, "token, tensor, group or tensor_group where dynamic")
    if dynamic == "local" and strategy != "tensor_group":
        raise _bad(f"{where}.dynamic", dynamic, f"true or false with strategy {strategy}")


def _number(where: str, args: dict[str, Any]) -> Literal["int", "e4m3", "e2m1"]:
    kind, bits = str(args["type"]).lower(), args["num_bits"]
    if kind == "int" and 2 <= bits <= 8:
        return "int"
    if kind == "float" and bits in (4, 8):
        return "e2m1" if bits == 4 else "e4m3"
    raise _bad(where, f"type {kind} with {bits} bits", "int with 2 to 8 bits, or float with 4 or 8")


def _scale_format(where: str, args: dict[str, Any], stored_as: str | None) -> ScaleFormat:
    """Scale dtype as stated; configs of older releases leave it to the format."""
    stated = args["scale_dtype"]
    implied = "e8m0" if (stored_as or "").startswith("mx") else "model"
    if args["strategy"] == "tensor_group":
        implied = "e4m3"
    known: dict[Any, ScaleFormat] = {
        None: implied, "torch.uint8": "e8m0", "torch.float8_e4m3fn": "e4m3",
        "torch.bfloat16": "model", "torch.float16": "model", "torch.float32": "model",
    }  # type: ignore[dict-item]  # fmt: skip
    if stated not in known:
        raise _bad(f"{where}.scale_dtype", stated, f"one of {', '.join(str(dtype) for dtype in known)}")
    return known[stated]


def _format(where: str, value: Any, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise _bad(where, value, f"one of {', '.join(known)}")
    return value


def parse_targets(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise _bad(where, value, "a list of names, classes and re: patterns")
    for target in value:
        if target.startswith("re:"):
            try:
                compiled(target.removeprefix("re:"))
            except PatternError as error:
                raise _bad(where, target, f"a regular expression ({error})") from error
    return tuple(value)


def refuse_unknown(
    where: str, found: dict[str, Any], known: set[str], bad: Callable[[str, Any, str], CheckpointError] | None = None
) -> None:
    """The error `bad` makes, or that of this file, for a key of a mapping that is not among the known ones."""
    unknown = sorted(found.keys() - known)
    if unknown:
        needed = f"no such key; known are {', '.join(sorted(known))}"
        raise (bad or _bad)(f"{where}.{unknown[0]}", found[unknown[0]], needed)


def bad_value(where: str, found: Any, needed: str, hint: str) -> CheckpointError:
    """What is wrong with a value of quantization_config."""
    return CheckpointError(f"config.json: quantization_config.{where} is {found!r}; needed is {needed}", hint)


def _bad(where: str, found: Any, needed: str) -> CheckpointError:
    return bad_value(where, found, needed, "quantize the model again, or correct config.json")
