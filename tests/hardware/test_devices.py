"""The table of devices, how names are found, and this machine measured."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.hardware import DEVICES, Device, find_device, this_processor
from lowbit.hardware.table import ALIASES, PEAK_DTYPES


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
    ],
)
def test_devices_are_found_in_any_spelling(typed, row):
    assert find_device(typed).name == row


@pytest.mark.parametrize(("typed", "near"), [("h10", "h100"), ("rtx 4099", "rtx-4090"), ("m3 maxi", "m3-max")])
def test_an_unknown_device_names_its_neighbours(typed, near):
    with pytest.raises(UsageError, match="no device") as caught:
        find_device(typed)
    assert near in caught.value.hint


def test_aliases_are_of_rows():
    assert set(ALIASES.values()) <= set(DEVICES)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_rows_are_plausible(device: Device):
    """What a slip of a factor of two, or of GB and TB, would break."""
    assert device.source.startswith("https://")
    assert 8e9 < device.memory_bytes < 600e9
    assert 50e9 < device.bandwidth < 10e12
    assert set(device.peak) <= set(PEAK_DTYPES)
    sixteen = device.sixteen_bit_peak
    assert device.peak["bf16"] == device.peak["fp16"] == sixteen
    if device.has("fp8"):
        assert device.peak["fp8"] == pytest.approx(2 * sixteen, rel=0.03)
    if device.has("fp4"):
        assert device.peak["fp4"] >= 2 * device.peak["fp8"] * 0.97
    if device.has("int8"):
        assert device.peak["int8"] >= 1.97 * sixteen
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
