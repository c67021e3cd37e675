"""The types of a GGUF's tensors: equal to what llama-quantize chose, and what goes wrong said clearly."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import pytest

from lowbit.errors import CheckpointError, UsageError
from lowbit.formats.gguf import mix
from lowbit.formats.gguf import mix_table as gguf_mix_table
from lowbit.formats.gguf.mix import (
    Asked,
    MixFacts,
    TensorShape,
    TypeChoice,
    assign_types,
    choose_types,
    fallback_summary,
    find_file_type,
    importance_needed,
)
from lowbit.formats.gguf.mix_table import (
    FALLBACKS,
    FILE_TYPES,
    MODELS_70B,
    NEVER_QUANTIZED,
    NEVER_QUANTIZED_IN,
    NEVER_QUANTIZED_NAMES,
    RULES,
)
from lowbit.formats.gguf.type_rules import TypeRules, read_type_rules
from lowbit.numerics.ggml.types import TYPES
from lowbit.schemes import is_gguf_name

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "data" / "gguf_mix" / "llama_quantize.json").read_text(encoding="utf-8")
)


def expanded(row: str) -> list[str]:
    """Types over the layers, from "Q6_K*2 Q4_K"."""
    runs = [part.partition("*") for part in row.split()]
    return [kind for kind, _, count in runs for _ in range(int(count or 1))]


@cache
def shapes_of(title: str) -> tuple[TensorShape, ...]:
    """All tensors of a recorded model, in the order of the file; all were F32."""
    return tuple(
        TensorShape(name.format(layer), tuple(shape), "F32")
        for name, shape, first, end in GOLDEN["models"][title]["tensors"]
        for layer in range(first, end)
    )


def recorded(title: str, variant: str, file_type: str) -> tuple[dict[str, str], bool]:
    """What llama-quantize gave every tensor, and whether it said that it needs an importance matrix."""
    model = GOLDEN["models"][title]
    entry = model["types"][variant][file_type]
    if isinstance(entry, str):
        entry = model["types"][entry][file_type]
    *rows, needs = entry
    types = [kind for row in rows for kind in expanded(GOLDEN["rows"][row])]
    return dict(zip((shape.name for shape in shapes_of(title)), types, strict=True)), bool(needs)


def options_of(variant: str) -> dict[str, Any]:
    """The options that llama-quantize was given, as ours."""
    given: dict[str, Any] = {"overrides": []}
    words = iter(GOLDEN["variants"][variant])
    for word in words:
        if word == "--pure":
            given["pure"] = True
        elif word == "--imatrix":
            given["has_imatrix"] = bool(next(words))
        elif word == "--tensor-type":
            given["overrides"].append(tuple(next(words).rsplit("=", 1)))
        elif word == "--output-tensor-type":
            given["output_type"] = next(words)
        else:
            assert word == "--token-embedding-type"
            given["token_embedding_type"] = next(words)
    return given


CASES = [(title, variant) for title, model in GOLDEN["models"].items() for variant in model["types"]]


# Asked anew for every file type and variant, the same answers took most of the time.
WHY_NEVER_QUANTIZED = cache(mix.why_never_quantized)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("title", "variant"), CASES)
def test_types_equal_those_of_llama_quantize(title, variant, monkeypatch):
    monkeypatch.setattr(mix, "why_never_quantized", WHY_NEVER_QUANTIZED)
    facts = MixFacts(**GOLDEN["models"][title]["facts"])
    shapes = shapes_of(title)
    given = options_of(variant)
    asking = {key: given.pop(key) for key in list(given) if key not in ("pure", "has_imatrix")}
    how = {"pure": False, "has_imatrix": False, **given}
    tied = "output.weight" not in {shape.name for shape in shapes}
    for name in GOLDEN["file_types"]:
        file_type = find_file_type(name)
        if file_type.is_float and (variant == "overrides" or (tied and variant == "output")):
            continue  # llama-quantize ignores the options here; the next test says what we do
        choices = assign_types(file_type, shapes, facts, asked=Asked.parse(shapes, facts, **asking), **how)
        types, needs = recorded(title, variant, name)
        assert {tensor: choice.type_name for tensor, choice in choices.items()} == types, name
        assert list(choices) == [shape.name for shape in shapes]
        if not how["has_imatrix"]:
            assert bool(importance_needed(name, choices)) == needs, name


def differs(file_type: str) -> bool:
    """Whether the types of some recorded model are not those that the tables give now."""
    for title, variant in CASES:
        if variant in ("plain", "imatrix"):
            facts = MixFacts(**GOLDEN["models"][title]["facts"])
            choices = assign_types(
                find_file_type(file_type), shapes_of(title), facts,
                pure=False, has_imatrix=variant == "imatrix", asked=Asked({}),
            )  # fmt: skip
            types, _ = recorded(title, variant, file_type)
            if {tensor: choice.type_name for tensor, choice in choices.items()} != types:
                return True
    return False


NEWER = {"Q1_0", "Q2_0"}  # than the recording; what they do is in `test_one_and_two_bits_as_llama_quant_cpp_has_them`


def test_every_file_type_of_llama_quantize_is_recorded():
    assert set(GOLDEN["file_types"]) == {kind.name for kind in FILE_TYPES.values() if not kind.ours} - NEWER


def test_one_and_two_bits_as_llama_quant_cpp_has_them():
    """llama_tensor_get_type_impl: the output is Q6_K, the embeddings of Q2_0 are Q4_K, and nothing else is special."""
    layer = [TensorShape(f"blk.0.{name}.weight", (512, 256)) for name in ("attn_v", "attn_output", "ffn_down")]
    tensors = [TensorShape("token_embd.weight", (64, 256)), TensorShape("output.weight", (64, 256)), *layer]
    for base, embedding in (("Q1_0", "Q1_0"), ("Q2_0", "Q4_K")):
        choices = choose_types(base, tensors, MixFacts("llama", 1, heads=8, kv_heads=2))
        assert [choice.type_name for choice in choices.values()] == [embedding, "Q6_K", base, base, base]
    ragged = choose_types("Q2_0", [TensorShape("blk.0.ffn_up.weight", (8, 96))], MixFacts("llama", 1))
    assert ragged["blk.0.ffn_up.weight"].type_name == "Q4_0"


RECORDED = [rule for rule in RULES if not NEWER & {*rule.file_types}]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: " ".join((*rule.kinds, rule.type_name, *rule.when)))
def test_every_rule_is_told_by_the_recorded_models(rule, monkeypatch):
    """Without the rule, or with one file type less in it, some recorded type would be another."""
    without = tuple(other for other in RULES if other is not rule)
    monkeypatch.setattr(gguf_mix_table, "RULES", without)
    if rule.file_types:
        assert all(differs(name) for name in rule.file_types)
    else:
        assert any(differs(name) for name in ("Q4_0", "Q4_K_M", "IQ2_XXS", "Q8_0"))


NAMES = [
    *(("", part) for _, parts in NEVER_QUANTIZED for part in parts),
    *(("", name) for name in NEVER_QUANTIZED_NAMES),
    *((arch, part) for arch, parts in NEVER_QUANTIZED_IN.items() for part in parts),
]


def is_meant(name: str, part: str) -> bool:
    return name == part if part in NEVER_QUANTIZED_NAMES else part in name


def test_every_name_that_is_never_quantized_is_told_by_the_recorded_models():
    """Some recorded matrix keeps its type, and has only this part of a name to keep it for."""
    told = set()
    for title, model in GOLDEN["models"].items():
        types, _ = recorded(title, "plain", "Q4_0")
        for shape in shapes_of(title):
            if shape.dims > 1:
                for arch in ("", model["facts"]["arch"]):
                    meant = [part for where, part in NAMES if where in ("", arch) and is_meant(shape.name, part)]
                    if len(meant) == 1:
                        assert types[shape.name] == "F32", (title, shape.name)
                        told |= {(arch, meant[0])}
    assert not [name for name in NAMES if name not in told]


@pytest.mark.parametrize("arch", MODELS_70B)
def test_every_70b_is_recorded(arch):
    layers, shared = MODELS_70B[arch]
    assert any(
        model["facts"]["arch"] == arch
        and model["facts"]["layers"] == layers
        and (not shared or model["facts"]["heads"] != model["facts"]["kv_heads"])
        for model in GOLDEN["models"].values()
    )


def test_numbers_are_those_of_the_gguf_package():
    for kind in FILE_TYPES.values():
        prefix = "ALL" if kind.name == "F32" else "MOSTLY"
        if kind.name != "Q2_0":  # which is newer than the package: 41 in llama.h
            assert kind.number == gguf.LlamaFileType[f"{prefix}_{kind.like or kind.name}"], kind.name
        assert kind.base in TYPES


def test_fallbacks_are_types_with_smaller_blocks():
    for wanted, fallback in FALLBACKS.items():
        assert TYPES[fallback].weights == 32 < TYPES[wanted].weights
    assert {kind.name for kind in TYPES.values() if kind.weights > 32} == set(FALLBACKS)


LLAMA_8B = MixFacts("llama", 32, 0, 32, 8)
GPT_OSS_20B = MixFacts("gpt-oss", 24, 32, 64, 8)


def llama_8b() -> list[TensorShape]:
    """Llama 3.1 8B."""
    layer = {
        "attn_norm": (4096,), "attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096),
        "attn_output": (4096, 4096), "ffn_norm": (4096,), "ffn_gate": (14336, 4096), "ffn_up": (14336, 4096),
        "ffn_down": (4096, 14336),
    }  # fmt: skip
    ends = {"token_embd": (128256, 4096), "output_norm": (4096,), "output": (128256, 4096)}
    return [TensorShape(f"{name}.weight", shape) for name, shape in ends.items()] + [
        TensorShape(f"blk.{number}.{name}.weight", shape) for number in range(32) for name, shape in layer.items()
    ]


def gpt_oss_20b() -> list[TensorShape]:
    """gpt-oss-20b without its biases."""
    layer = {
        "attn_q": (4096, 2880), "attn_k": (512, 2880), "attn_v": (512, 2880), "attn_output": (2880, 4096),
        "ffn_gate_inp": (32, 2880), "ffn_gate_exps": (32, 2880, 2880), "ffn_up_exps": (32, 2880, 2880),
        "ffn_down_exps": (32, 2880, 2880),
    }  # fmt: skip
    return [TensorShape("token_embd.weight", (201088, 2880)), TensorShape("output.weight", (201088, 2880))] + [
        TensorShape(f"blk.{number}.{name}.weight", shape) for number in range(24) for name, shape in layer.items()
    ]


def bits_per_weight(file_type: str, tensors: list[TensorShape], facts: MixFacts) -> float:
    choices = choose_types(file_type, tensors, facts, has_imatrix=FILE_TYPES[file_type].needs_imatrix)
    bits = sum(t.weights * TYPES[choices[t.name].type_name].bits_per_weight for t in tensors)
    return bits / sum(t.weights for t in tensors)


@pytest.mark.parametrize("name", FILE_TYPES)
def test_bits_per_weight_are_those_of_the_reference_model(name):
    of = (gpt_oss_20b(), GPT_OSS_20B) if name == "MXFP4_MOE" else (llama_8b(), LLAMA_8B)
    assert FILE_TYPES[name].bits_per_weight == pytest.approx(bits_per_weight(name, *of), abs=0.006)


# tools/quantize/README.md of llama.cpp, Llama 3.1 8B: what its own files measure, the header and all.
MEASURED = {
    "IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "IQ4_XS": 4.4597, "IQ4_NL": 4.6818,
    "Q2_K_S": 2.9697, "Q2_K": 3.1593, "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672,
    "Q4_K_M": 4.8944, "Q5_K_S": 5.5704, "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005,
}  # fmt: skip


@pytest.mark.parametrize(("name", "measured"), MEASURED.items())
def test_bits_per_weight_are_those_that_llama_cpp_publishes(name, measured):
    assert bits_per_weight(name, llama_8b(), LLAMA_8B) == pytest.approx(measured, abs=0.003)


def small(columns: int = 256, layers: int = 8, *, tied: bool = False) -> list[TensorShape]:
    """A llama whose rows are all of `columns`."""
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    tensors = [TensorShape("token_embd.weight", (64, columns)), TensorShape("output_norm.weight", (columns,))]
    if not tied:
        tensors.append(TensorShape("output.weight", (64, columns)))
    return tensors + [
        TensorShape(f"blk.{layer}.{name}.weight", (32, columns)) for layer in range(layers) for name in names
    ]


FACTS = MixFacts("llama", 8, 0, 8, 8)


def test_a_file_type_is_found_in_any_case_and_by_its_alias():
    assert find_file_type("q4_k") is FILE_TYPES["Q4_K_M"]
    assert find_file_type("iq4_xs") is FILE_TYPES["IQ4_XS"]
    with pytest.raises(UsageError, match="'Q4_KM'") as caught:
        find_file_type("Q4_KM")
    assert "Q4_K_M" in caught.value.hint


def test_reasons_say_what_decided():
    choices = choose_types("Q4_K_M", small(), FACTS)
    assert choices["blk.0.attn_q.weight"] == TypeChoice("Q4_K")
    assert choices["output_norm.weight"] == TypeChoice("F32", "vectors are never quantized")
    assert choices["output.weight"] == TypeChoice("Q6_K", "file type Q4_K_M makes the output Q6_K")
    reason = choices["blk.0.ffn_down.weight"].reason
    assert reason is not None
    assert reason.startswith("file type Q4_K_M makes ffn_down Q6_K where it lies in the first or last eighth of the")
    tied = choose_types("Q4_K_M", small(tied=True), FACTS)
    assert tied["token_embd.weight"].reason == "file type Q4_K_M makes embeddings and output in one Q6_K"


def test_fallbacks_are_reported_per_tensor_and_in_total():
    tensors = small(576)
    choices = choose_types("Q4_K_M", tensors, FACTS)
    assert choices["blk.1.attn_q.weight"] == TypeChoice(
        "Q5_0", "rows of 576 do not divide by 256, so Q4_K became Q5_0", "Q4_K"
    )
    assert choices["output.weight"].type_name == "Q8_0"
    assert choices["output.weight"].fallback_from == "Q6_K"
    summary = fallback_summary(choices, tensors)
    assert summary == (
        "58 of 59 tensors, 100 % of weights: rows of 576 do not divide by 256, so Q4_K became Q5_0 and Q6_K became Q8_0"
    )
    assert fallback_summary(choose_types("Q4_K_M", small(), FACTS), small()) == ""
    assert fallback_summary(choose_types("Q8_0", tensors, FACTS), tensors) == ""


def test_rows_that_not_even_32_divides_become_f16():
    tensors = [*small(48), TensorShape("blk.0.extra.weight", (512, 256))]
    choices = choose_types("Q4_K_M", tensors, FACTS)
    assert choices["blk.3.attn_q.weight"].type_name == "F16"
    assert choices["blk.3.attn_q.weight"].fallback_from == "Q4_K"
    assert "rows of 48 divide by neither 256 nor 32, so Q4_K became F16" in fallback_summary(choices, tensors)
    assert "rows of 48 do not divide by 32, so" in fallback_summary(choose_types("Q4_0", tensors, FACTS), tensors)


@pytest.mark.parametrize("name", [name for name, kind in FILE_TYPES.items() if kind.needs_imatrix])
def test_types_that_need_an_importance_matrix_are_refused_without(name):
    with pytest.raises(UsageError, match=f"{name} needs an importance matrix: blk.") as caught:
        choose_types(name, small(), FACTS)
    assert "lowbit imatrix MODEL -o FILE" in caught.value.hint
    choices = choose_types(name, small(), FACTS, has_imatrix=True)
    needing = importance_needed(name, choices)
    assert needing
    with pytest.raises(UsageError, match=f"has no entry for {needing[-1]}, which"):
        choose_types(name, small(), FACTS, has_imatrix=True, missing_importance={needing[-1]})
    choose_types(name, small(), FACTS, has_imatrix=True, missing_importance={"output.weight", "token_embd.weight"})


@pytest.mark.parametrize("name", [name for name, kind in FILE_TYPES.items() if not kind.needs_imatrix])
def test_types_that_need_none_are_made_without(name):
    assert choose_types(name, small(), FACTS)


def test_an_importance_matrix_is_not_asked_for_where_everything_falls_back():
    choices = choose_types("IQ2_XXS", small(96), FACTS)
    assert choices["blk.7.ffn_up.weight"] == TypeChoice(
        "IQ4_NL", "rows of 96 do not divide by 256, so IQ2_XXS became IQ4_NL", "IQ2_XXS"
    )


def test_the_first_override_that_is_found_decides():
    overrides = [("attn_[kv]", "q8_0"), (r"blk\.0\.", "F16")]
    choices = choose_types("Q4_K_M", small(), FACTS, overrides=overrides, token_embedding_type="Q5_1")
    assert choices["blk.0.attn_v.weight"] == TypeChoice("Q8_0", "matches --override attn_[kv]=q8_0")
    assert choices["blk.0.attn_q.weight"].type_name == "F16"
    assert choices["blk.1.attn_q.weight"] == TypeChoice("Q4_K")
    assert choices["token_embd.weight"] == TypeChoice("Q5_1", "the token embedding type that was asked for")


@pytest.mark.parametrize("name", [name for name, kind in FILE_TYPES.items() if kind.like])
@pytest.mark.parametrize("title", GOLDEN["models"])
def test_wide_ends_are_a_file_type_of_llama_quantize_with_q8_0_embeddings_and_output(name, title):
    """The right side is held against llama-quantize above."""
    like, facts, shapes = FILE_TYPES[name].like, MixFacts(**GOLDEN["models"][title]["facts"]), shapes_of(title)
    ends = {"output_type": "Q8_0", "token_embedding_type": "Q8_0"}
    if not any(shape.name == "token_embd.weight" and not shape.columns % 32 for shape in shapes):
        pytest.skip("no embedding of whole blocks")
    theirs = choose_types(like, shapes, facts, **ends)
    ours = choose_types(name, shapes, facts)
    assert {tensor: choice.type_name for tensor, choice in ours.items()} == {
        tensor: choice.type_name for tensor, choice in theirs.items()
    }
    assert is_gguf_name(name)


def rules_of(tmp_path: Path, text: str) -> TypeRules:
    path = tmp_path / "rules.txt"
    path.write_text(text)
    return read_type_rules(str(path))


def test_rules_of_a_file_in_either_spelling(tmp_path):
    ours = rules_of(tmp_path, "# mine\n\nattn_v = q6_k\nblk\\.[01]\\.ffn_down=Q8_0\r\n  attn_k  =IQ4_NL  \n")
    theirs = rules_of(tmp_path, "attn_v=q6_K blk\\.[01]\\.ffn_down=q8_0\nattn_k=iq4_nl")
    assert ours == theirs
    assert ours.rules == (("attn_v", "Q6_K"), (r"blk\.[01]\.ffn_down", "Q8_0"), ("attn_k", "IQ4_NL"))
    assert rules_of(tmp_path, "a(?=b)=F16").rules == (("a(?=b)", "F16"),)


def test_rules_of_a_file_come_after_overrides_and_idle_ones_are_noted(tmp_path):
    rules, notes = rules_of(tmp_path, "attn_[kv] = Q8_0\nffn_.*_exps = Q2_K\n_norm = Q8_0\nattn_v = F16"), []
    choices = choose_types("Q4_K_M", small(), FACTS, overrides=[(r"blk\.0\.attn_v", "Q5_1")], rules=rules, notes=notes)
    assert choices["blk.0.attn_v.weight"].type_name == "Q5_1"
    assert choices["blk.1.attn_v.weight"] == TypeChoice("Q8_0", f"matches attn_[kv]=Q8_0 of {rules.path}")
    assert choices["blk.0.attn_q.weight"] == TypeChoice("Q4_K")
    assert notes == [f"2 of 4 rules of {rules.path} match no tensor that is quantized: ffn_.*_exps, _norm"]
    as_overrides = choose_types(
        "Q4_K_M", small(), FACTS, overrides=[(r"blk\.0\.attn_v", "Q5_1"), ("attn_[kv]", "Q8_0"), ("attn_v", "F16")]
    )
    assert {t: c.type_name for t, c in as_overrides.items()} == {t: c.type_name for t, c in choices.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_v Q6_K", "line 1: 'attn_v Q6_K' is no rule"), ("=Q8_0", "line 1: '=Q8_0' is no rule"),
        ("attn_q = Q8_0\n\nattn_[ = Q8_0", r"line 3: 'attn_\[' is not a regular expression"), ("attn_v=", "is no rule"),
        ("\nattn_v = Q6_KM", "line 2: .*no ggml type 'Q6_KM'"),
        ("# nothing", "no rule in it"), ("x" * (1 << 21), "at most 1048576 bytes"), ("\x00\x01", "is no rule"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_rules_is_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        rules_of(tmp_path, text)


def test_a_file_of_rules_that_cannot_apply_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no rule of .* matches a tensor that is quantized"):
        choose_types("Q4_K_M", small(), FACTS, rules=rules_of(tmp_path, "_exps = Q8_0"))
    with pytest.raises(UsageError, match="there is no such file"):
        read_type_rules(str(tmp_path / "absent"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        read_type_rules(str(tmp_path / "binary"))


@pytest.mark.parametrize(("name", "hint"), [("iq4_ks", "only ik_llama.cpp has it"), ("Q4_0_4_4", "no longer reads it")])
def test_types_that_others_have_are_said_to_be_theirs(tmp_path, name, hint):
    asked = {"output_type": name}, {"token_embedding_type": name}, {"overrides": [("attn_v", name)]}
    for call in (
        lambda: find_file_type(name),
        lambda: rules_of(tmp_path, f"attn_v = {name}"),
        *(partial(choose_types, "Q4_K_M", small(), FACTS, **each) for each in asked),
    ):
        with pytest.raises(UsageError, match=name) as caught:
            call()
        assert hint in caught.value.hint


def test_overrides_hold_in_files_of_floats_and_with_pure():
    choices = choose_types("BF16", small(), FACTS, overrides=[("ffn", "Q8_0")])
    assert choices["blk.0.ffn_up.weight"].type_name == "Q8_0"
    assert choices["blk.0.attn_q.weight"] == TypeChoice("BF16")
    tied = choose_types("Q4_K_M", small(tied=True), FACTS, pure=True, output_type="Q6_K")
    assert tied["token_embd.weight"].type_name == "Q6_K"
    assert tied["blk.0.ffn_down.weight"] == TypeChoice("Q4_K")


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"overrides": [("attn_x", "Q8_0")]}, "matches no tensor", "blk."),
        ({"overrides": [("_norm", "Q8_0")]}, "never quantized, such as output_norm.weight", "leave it out"),
        ({"overrides": [("attn_[", "Q8_0")]}, "not a regular expression", "--help"),
        ({"overrides": [("attn_q", "Q8_1")]}, "no ggml type 'Q8_1'", "Q8_0"),
        ({"overrides": [("attn_q", "Q4_K")]}, "attn_q.weight cannot be Q4_K .*rows of 576", "Q5_0"),
        ({"output_type": "Q6_K"}, "output.weight cannot be Q6_K .*rows of 576 do not divide by 256", "Q8_0"),
        ({"token_embedding_type": "Q6K"}, "no ggml type 'Q6K'", "Q6_K"),
    ],
)
def test_what_cannot_be_asked_for(given, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        choose_types("Q4_K_M", small(576), FACTS, **given)
    assert hint in caught.value.hint


def test_an_end_of_the_model_that_is_not_there_cannot_have_a_type():
    layers = [tensor for tensor in small() if tensor.name.startswith("blk.")]
    with pytest.raises(UsageError, match="there is no output matrix"):
        choose_types("Q4_K_M", layers, FACTS, output_type="Q8_0")
    with pytest.raises(UsageError, match=r"there is no token_embd\.weight"):
        choose_types("Q4_K_M", layers, FACTS, token_embedding_type="Q8_0")


def test_an_expert_tensor_outside_the_layers_is_an_error():
    experts = MixFacts("llama", 8, 4, 8, 8)
    tensors = [*small(), TensorShape("blk.8.ffn_down_exps.weight", (4, 32, 256))]
    with pytest.raises(CheckpointError, match=r"blk\.8\.ffn_down_exps\.weight belongs to no layer"):
        choose_types("Q4_K_M", tensors, experts)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_norm.weight", (256,), "F32"),
        ("blk.0.attn_q_norm.weight", (8, 32), "F32"),
        ("blk.0.ffn_gate_inp.weight", (8, 256), "F32"),
        ("blk.0.ffn_gate_exps.bias", (8, 256), "F32"),
        ("position_embd.weight", (128, 256), "F32"),
        ("blk.0.ssm_a", (256, 16), "F32"),
        ("per_layer_model_proj.weight", (512, 256), "BF16"),
        ("blk.0.laurel_l.weight", (32, 256), "BF16"),
        ("blk.0.time_mix_first.weight", (32, 256), "F32"),
        ("blk.0.time_mix_g1.weight", (32, 256), "BF16"),
    ],
)
def test_what_is_never_quantized_is_written_as_the_converter_writes_it(name, shape, expected):
    facts = MixFacts("llama", 8, 0, 8, 8, float_type="BF16")
    found = choose_types("Q4_K_M", [*small(), TensorShape(name, shape)], facts)[name]
    assert found.type_name == expected
    assert found.reason
    kept = choose_types("Q4_K_M", [*small(), TensorShape(name, shape, "F16")], facts)[name]
    assert kept.type_name == "F16"
    plain = choose_types("F16", [*small(), TensorShape(name, shape)], facts)[name]
    assert plain.type_name == ("F32" if expected == "F32" else "F16")
