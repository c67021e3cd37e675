"""Caches that lose more than the weights do: who is named, which layers to leave out, which type to take instead."""

import shlex

import pytest
from faults import diagnosed

from cache_figures import make_cache
from lowbit.diagnosis.caches import cache_suggestions, costly_caches, instead, layers_to_skip
from lowbit.diagnosis.evidence import Evidence
from lowbit.reporting import add_to_report


def evidence(*rows, total=0.02):
    report = {"kv_cache": [row.model_dump(mode="json") for row in rows]}
    return Evidence(facts={}, contributions={}, members={}, total=total, head=frozenset(), report=report)


def titles(*rows, total=0.02):
    return [each.title for each in costly_caches(evidence(*rows, total=total))]


def test_a_cache_that_costs_more_than_the_weights_is_named():
    [title] = titles(make_cache("fp8_e4m3", 0.005), make_cache("int4_per_token_head", 0.04))
    assert "int4_per_token_head" in title
    assert "0.04000" in title
    assert "the weights 0.02000" in title


def test_a_cache_within_two_errors_of_the_weights_is_not():
    assert titles(make_cache("q4_0", 0.021, kld_se=0.002)) == []
    assert len(titles(make_cache("q4_0", 0.021, kld_se=0.0001))) == 1


def test_the_longest_context_of_a_type_counts():
    rows = make_cache("q4_0", 0.09), make_cache("q4_0", 0.01, context=2048)
    assert titles(*rows) == []
    assert titles(make_cache("q4_0", 0.01), make_cache("q4_0", 0.09, context=2048))[0].count("at 2k tokens") == 1


def test_without_figures_or_a_finite_divergence_nothing_is_said():
    assert titles() == []
    assert titles(make_cache("q4_0", 0.09), total=None) == []
    assert list(costly_caches(Evidence(facts={}, contributions={}, members={}, total=0.1, head=frozenset()))) == []


def test_many_costly_types_are_three_warnings_and_a_note():
    found = list(costly_caches(evidence(*(make_cache(f"q{n}_0", 0.1 / n) for n in (4, 5, 8)), make_cache("q4_1", 0.4),
                                        make_cache("iq4_nl", 0.03), total=0.001)))  # fmt: skip
    assert [each.severity for each in found] == ["warning"] * 3 + ["note"]
    assert "q4_1" in found[0].title
    assert "2 more" in found[3].title


def test_the_fewest_layers_that_bring_the_rest_below_the_weights():
    alone = (0.001, 0.03, 0.001, 0.001, 0.001, 0.02, 0.001, 0.001)
    row = make_cache("nvfp4", 0.056, alone=alone)
    assert layers_to_skip(row, 0.03) == (1,)
    assert layers_to_skip(row, 0.02) == (1, 5)
    assert layers_to_skip(row, 0.001) == ()  # more than a quarter of the layers


def test_layers_of_engines_that_skip_none_are_not_named():
    assert layers_to_skip(make_cache("q4_0", 0.056, alone=(0.05, 0.001, 0.001, 0.001)), 0.03) == ()


def test_instead_is_the_smallest_type_of_the_same_engines_below_the_weights():
    row = make_cache("nvfp4", 0.06)
    others = (make_cache("fp8_e4m3", 0.004), make_cache("turboquant_4bit_nc", 0.01), make_cache("q4_0", 0.001),
              make_cache("int4_per_token_head", 0.04))  # fmt: skip
    assert instead(row, evidence(row, *others)).type == "turboquant_4bit_nc"
    assert instead(row, evidence(row, others[3])) is None  # not half
    assert instead(row, evidence(row, make_cache("fp8_e5m2", 0.025))).type == "fp8_e5m2"  # half, above the weights
    assert instead(row, evidence(row, make_cache("fp8_e4m3", 0.004, context=1024))) is None  # measured otherwise


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((make_cache("nvfp4", 0.056, alone=(0.05, 0.001, 0.001, 0.001)),),
         ["vllm", "serve", "out", "--kv-cache-dtype", "nvfp4", "--kv-cache-dtype-skip-layers", "0"]),
        ((make_cache("nvfp4", 0.056),),
         ["lowbit", "evaluate", "out", "--kv-cache", "nvfp4", "--context", "512", "--windows", "4", "--by-layer"]),
        ((make_cache("q4_0", 0.04), make_cache("q8_0/q4_0", 0.01)),
         ["llama-server", "-m", "out.gguf", "-ctk", "q8_0", "-ctv", "q4_0"]),
    ],
    ids=["skip", "by-layer", "instead"],
)  # fmt: skip
def test_the_command(rows, words):
    quantized = "out.gguf" if "out.gguf" in words else "out"
    assert shlex.split(next(cache_suggestions(evidence(*rows), quantized)).command) == words


def test_no_command_of_an_engine_that_does_not_read_the_files():
    rows = make_cache("q4_0", 0.04), make_cache("q8_0/q4_0", 0.01)
    assert list(cache_suggestions(evidence(*rows), "out")) == []
    [finding] = costly_caches(evidence(*rows))
    assert "q8_0/q4_0 costs 0.01000" in finding.detail


def test_a_context_that_fits_the_window_in_16_bits_says_nothing_of_a_type():
    row = make_cache("hqq_int2", 0.06)
    assert instead(row, evidence(row, make_cache("quanto_int4", 0.0, context=128))) is None
    assert instead(row, evidence(row, make_cache("quanto_int4", 0.01))).type == "quanto_int4"


def test_scales_that_the_files_lack_are_no_command():
    rows = make_cache("nvfp4", 0.05, alone=(0.02,)), make_cache("fp8_calibrated", 0.001, scales="calibrated")
    assert list(cache_suggestions(evidence(*rows), "out")) == []
    stored = make_cache("fp8_calibrated", 0.001, scales="stored")
    [made] = cache_suggestions(evidence(rows[0], stored), "out")
    assert made.command == "vllm serve out --kv-cache-dtype fp8"


def test_a_diagnosis_has_the_finding_and_the_command(w4a16, llama, text):
    add_to_report(w4a16, kv_cache=(make_cache("int4_per_token_head", 9.0), make_cache("fp8_e4m3", 0.0001)))
    found = diagnosed(w4a16, llama, text, budget=1)
    [finding] = [each for each in found.findings if each.kind == "kv-cache"]
    assert finding.severity == "warning"
    assert "fp8_e4m3 costs 0.00010" in finding.detail
    assert found.healthy
    assert any("--kv-cache-dtype fp8_e4m3" in each.command for each in found.suggestions)
