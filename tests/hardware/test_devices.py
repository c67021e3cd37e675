"""The table of devices, how names are found, and this machine measured."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.hardware import DEVICES, Device, find_device, this_processor
from lowbit.hardware.table import ALIASES, PCIE, PEAK_DTYPES, PRICES


@pytest.mark.parametrize(
    ("typed", "row"),
    [
        ("H100", "h100"),
        ("h100 sxm", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("A100", "a100-80gb"),
        ("a100-40gb", "a100-40gb"),
        ("NVIDIA A100 40 GB", "a100-40gb"),
        ("rtx 4090", "rtx-4090"),
        ("GeForce RTX 5090", "rtx-5090"),
        ("3090", "rtx-3090"),
        ("MI300X", "mi300x"),
        ("Apple M2 Max", "m2-max"),
        ("m4", "m4"),
        ("l40s", "l40s"),
        ("3060 Ti", "rtx-3060-ti"),
        ("4070", "rtx-4070"),
        ("RTX 4060 Ti", "rtx-4060-ti-16gb"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("RTX PRO 6000 Blackwell", "rtx-pro-6000"),
        ("RTX 6000 Ada", "rtx-6000-ada"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI355X", "mi355x"),
        ("Gaudi 3", "gaudi3"),
        ("Ascend 910B", "ascend-910b"),
        ("Jetson AGX Orin", "jetson-agx-orin"),
        ("DGX Spark", "dgx-spark"),
        ("M5 Max", "m5-max"),
    ],
)
def test_devices_are_found_in_any_spelling(typed, row):
    assert find_device(typed).name == row


@pytest.mark.parametrize(("typed", "near"), [("h10", "h100"), ("rtx 4099", "rtx-4090"), ("m3 maxi", "m3-max")])
def test_an_unknown_device_names_its_neighbours(typed, near):
    with pytest.raises(UsageError, match="no device") as caught:
        find_device(typed)
    assert near in caught.value.hint


def test_aliases_and_prices_are_of_rows():
    assert set(ALIASES.values()) <= set(DEVICES)
    assert set(PRICES) <= set(DEVICES)


def test_cards_that_are_asked_for_are_there():
    asked = """t4 v100 a10 a30 l20 l40 h20 a800 h800 b300 rtx-3060 rtx-3070 rtx-3080-10gb rtx-3090 rtx-4060 rtx-4070
               rtx-4080 rtx-4090 rtx-5060 rtx-5070 rtx-5080 rtx-5090 rtx-6000-ada rtx-pro-6000 rtx-a6000 mi250 mi300x
               mi325x mi350x mi355x gaudi3 ascend-910b jetson-agx-orin jetson-agx-thor dgx-spark m1 m5 m5-pro m5-max"""
    assert set(asked.split()) <= set(DEVICES)


@pytest.mark.parametrize("typed", ["2xA100-80GB", "2 x a100", "2×A100 80GB", "2*NVIDIA A100"])
def test_several_cards(typed):
    device = find_device(typed)
    assert (device.name, device.count) == ("a100-80gb", 2)
    assert device.label == "2 × NVIDIA A100 SXM 80 GB"
    assert device.memory_bytes == DEVICES["a100-80gb"].memory_bytes  # of one


def test_several_of_a_name_that_begins_with_a_number():
    assert (find_device("4x4090").name, find_device("4x4090").count) == ("rtx-4090", 4)


@pytest.mark.parametrize("typed", ["0xA100", "65xA100", "2xM2-Max", "2xH10", "2x"])
def test_several_of_what_there_are_not_several_of(typed):
    with pytest.raises(UsageError):
        find_device(typed)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_rows_are_plausible(device: Device):
    """What a slip of a factor of two, or of GB and TB, would break."""
    assert device.source.startswith("https://")
    assert 8e9 < device.memory_bytes < 600e9
    assert 50e9 < device.bandwidth < 10e12
    assert 30e9 < device.link < 1000e9
    assert device.direct == (device.link != PCIE)
    assert set(device.peak) <= set(PEAK_DTYPES)
    sixteen = device.sixteen_bit_peak
    before_ampere = device.compute_capability is not None and device.compute_capability < (8, 0)
    assert device.has("bf16") != before_ampere
    assert all(device.peak[dtype] == sixteen for dtype in ("bf16", "fp16") if device.has(dtype))
    if device.has("fp8"):  # Gaudi's matrix engines are as quick in 16 bits
        assert device.peak["fp8"] == pytest.approx((1 if device.kind == "hpu" else 2) * sixteen, rel=0.03)
    if device.has("fp4"):
        assert device.peak["fp4"] >= 2 * device.peak["fp8"] * 0.97
    if device.has("int8") and device.name != "b300":  # which gave its INT8 up for FP4
        assert device.peak["int8"] >= 0.98 * 2 * sixteen or device.name == "mi250"
    assert (device.compute_capability is not None) == (device.kind == "cuda")


def test_dtypes_follow_the_compute_capability():
    """FP8 since Ada, FP4 since Blackwell, no INT4 after Ada: what NVIDIA's tensor cores have."""
    for device in DEVICES.values():
        capability = device.compute_capability
        if capability is not None:
            assert device.has("fp8") == (capability >= (8, 9)), device.name
            assert device.has("fp4") == (capability >= (10, 0)), device.name
            assert not device.has("int4") or capability < (9, 0), device.name


def test_dense_figures_of_the_data_sheets():
    """The figures one knows by heart; the others are held by the ratios above."""
    assert DEVICES["a100-80gb"].bandwidth == 2039e9
    assert DEVICES["a100-80gb"].peak["bf16"] == 312e12
    assert DEVICES["h100"].bandwidth == 3350e9
    assert DEVICES["h100"].peak["fp8"] == 1978.9e12
    assert DEVICES["h200"].bandwidth == 4800e9
    assert DEVICES["b200"].bandwidth == 8000e9
    assert DEVICES["mi300x"].bandwidth == 5300e9
    assert DEVICES["rtx-4090"].bandwidth == 1008e9


def test_geforce_cards_have_the_ai_tops_that_nvidia_prints():
    """Of INT8 in the 30 series, of INT8 with sparsity in the 40, of FP4 with sparsity in the 50, rounded."""
    printed = {"rtx-3060": 102, "rtx-3090-ti": 320, "rtx-4070": 466, "rtx-4080": 780, "rtx-4090": 1321,
               "rtx-5070": 988, "rtx-5070-ti": 1406, "rtx-5080": 1801, "rtx-5090": 3352}  # fmt: skip
    for name, tops in printed.items():
        peak = DEVICES[name].peak
        counted = 2 * peak["fp4"] if "fp4" in peak else peak["int8"] * (2 if "fp8" in peak else 1)
        assert counted / 1e12 == pytest.approx(tops, abs=1), name


def test_a_peak_cannot_be_changed():
    with pytest.raises(TypeError):
        DEVICES["h100"].peak["bf16"] = 1.0  # type: ignore[index]


def test_this_processor_is_measured_once():
    threads = torch.get_num_threads()
    device = find_device("cpu")
    assert torch.get_num_threads() == threads
    assert device is this_processor()
    assert device.kind == "cpu"
    assert device.name == "this"
    assert 1e9 < device.bandwidth < 5e12
    assert device.memory_bytes > 1e8
    assert device.peak["f32"] > 1e9
    assert all(value > device.peak["f32"] for dtype, value in device.peak.items() if dtype != "f32")
    assert "measured" in device.source


def test_without_a_card_this_is_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("this").kind == "cpu"


def test_a_card_of_the_table_is_recognised(monkeypatch):
    from types import SimpleNamespace

    from lowbit.hardware import measured

    card = SimpleNamespace(name="NVIDIA H100 PCIe", major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    measured._this_card.cache_clear()
    try:
        device = find_device("this")
    finally:
        measured._this_card.cache_clear()
    assert (device.name, device.label, device.memory_bytes) == ("this", card.name, card.total_memory)
    assert device.bandwidth == DEVICES["h100-pcie"].bandwidth
