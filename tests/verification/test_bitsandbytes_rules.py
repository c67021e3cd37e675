"""bitsandbytes folders: good ones pass, and each rule fails on a folder that breaks it alone."""

import json

import pytest
import torch
from breaking import ATTENTION, assert_breaks, edit_config, edit_tensors, failures

OUT = f"{ATTENTION}.o_proj"
STATE = f"{OUT}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("engine", ["sglang", "transformers"])
@pytest.mark.parametrize(
    ("scheme", "settings"), [("NF4", {}), ("NF4", {"double_quant": True}), ("FP4", {}), ("INT8", {})]
)
def test_good_folders_pass(good, source, scheme, settings, engine):
    assert failures(good(scheme, **settings), source=source, nearest=True, engine=engine) == {}


def test_vllm_has_no_loader(good):
    from lowbit.verification import verify

    assert verify(good("NF4")).engine == "transformers"  # which loads it
    verification = verify(good("NF4"), engine="vllm")
    assert [check.rule for check in verification.failed] == ["engine-loader"]
    assert "vllm-bnb-plugin" in verification.failed[0].detail
    assert not verification.broken


def test_both_widths_at_once(broken):
    folder = broken("NF4")
    edit_config(folder, lambda q: q.update(load_in_8bit=True))
    failed = failures(folder, engine="transformers")
    assert "load_in" in failed.get("bitsandbytes-config", failed.get("quantization-config", ""))


def test_neither_width(broken):
    folder = broken("INT8")
    edit_config(
        folder, lambda q: q.update(load_in_4bit=False, load_in_8bit=False, _load_in_4bit=False, _load_in_8bit=False)
    )
    failed = failures(folder, engine="transformers")
    assert set(failed) & {"bitsandbytes-config", "quantization-config"}


def test_storage_that_sglang_refuses(broken):
    folder = broken("NF4")
    edit_config(folder, lambda q: q.update(bnb_4bit_quant_storage="bfloat16"))
    assert_breaks(folder, "bitsandbytes-config", "bnb_4bit_quant_storage", engine="sglang")
    assert failures(folder, engine="transformers") == {}


def edit_state(folder, **changes):
    def edit(tensors):
        state = json.loads(bytes(tensors[STATE].tolist()).decode()) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit_tensors(folder, edit)


def test_state_of_another_shape(broken):
    """The same number of bytes, turned round: only the architecture can tell."""
    folder = broken("NF4")
    edit_state(folder, shape=[256, 64])
    assert_breaks(folder, "bitsandbytes-states", STATE, "[256, 64]", engine="transformers")


def test_state_that_is_no_json_cannot_be_opened(broken):
    folder = broken("NF4")
    edit_tensors(folder, lambda tensors: tensors[STATE].fill_(32))
    assert_breaks(folder, "quantization-config", STATE, engine="transformers")


def test_double_quantization_that_config_json_denies(broken):
    folder = broken("NF4", double_quant=True)
    edit_config(folder, lambda q: q.update(bnb_4bit_use_double_quant=False))
    failed = failures(folder, engine="transformers")
    assert "double quantization is True" in failed["bitsandbytes-states"]


def test_skip_list_that_hits_a_quantized_linear(broken):
    folder = broken("NF4")
    edit_config(folder, lambda q: q["llm_int8_skip_modules"].append("o_proj"))
    assert_breaks(folder, "coverage", OUT, engine="transformers")


def test_tied_output_layer_that_is_not_skipped(good, broken):
    """transformers sees a linear there, though the files hold none."""
    folder = broken("NF4", model="tied")
    edit_config(folder, lambda q: q.update(llm_int8_skip_modules=["nothing"]))
    assert_breaks(folder, "left-out", "lm_head", engine="transformers")


def test_partly_quantized_model_that_nobody_announced(broken):
    folder = broken("NF4")

    def unquantize(tensors):
        for name in [name for name in tensors if name.startswith(f"{OUT}.")]:
            del tensors[name]
        tensors[f"{OUT}.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)

    edit_tensors(folder, unquantize)
    assert_breaks(folder, "coverage", OUT, engine="transformers")
    assert_breaks(folder, "left-out", OUT, engine="transformers")


@pytest.mark.parametrize("scheme", ["NF4", "FP4", "INT8"])
def test_one_tampered_code(broken, source, scheme):
    folder = broken(scheme)
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.weight"].view(torch.uint8).view(-1)[0].bitwise_xor_(0x21))
    assert_breaks(folder, "nearest-codes", f"{OUT}.weight[0, 0]", source=source, nearest=True, engine="transformers")


def test_nan_scale(broken):
    folder = broken("NF4")
    edit_tensors(folder, lambda tensors: tensors[f"{OUT}.weight.absmax"][3].fill_(float("nan")))
    assert_breaks(folder, "scales", f"{OUT}.weight.absmax", "group 1 of row 1", engine="transformers")
