"""The tables of docs/advise.md and docs/hardware.md, made from the code: `python tests/advice/advice_tables.py` prints
them."""

from __future__ import annotations

from lowbit.advice.quality import ANCHORS, OURS, PUBLISHED, SUMS, expected
from lowbit.advice.score import GOALS, WORKLOADS
from lowbit.engines import Engine, all_engines
from lowbit.engines.engine import Support
from lowbit.hardware import DEVICES, Device

_LATEST = (90, 0)


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def device_row(device: Device) -> str:
    capability = "–" if device.compute_capability is None else ".".join(map(str, device.compute_capability))
    peaks = [f"{device.peak[each] / 1e12:g}" if device.has(each) else "–" for each in ("bf16", "fp8", "int8", "fp4")]
    if not device.has("bf16") and device.has("fp16"):
        peaks[0] = f"{device.peak['fp16'] / 1e12:g} (FP16)"
    memory, bandwidth = f"{device.memory_bytes / 2**30:g}", f"{device.bandwidth / 1e9:g}"
    return _cells(f"`{device.name}`", device.label, memory, bandwidth, *peaks, capability)


def quality_row(scheme: str) -> str:
    figure = PUBLISHED[scheme]
    return _cells(f"`{scheme}`", f"{figure.loss:.2f} %", figure.metric, figure.value, figure.model, figure.method,
                  figure.source)  # fmt: skip


def anchor_row(scheme: str) -> str:
    found = expected(scheme)
    assert found is not None
    basis = f"`{ANCHORS[scheme]}`" if scheme in ANCHORS else " and ".join(f"`{part}`" for part in SUMS[scheme])
    how = f"{OURS[scheme].kld / OURS[ANCHORS[scheme]].kld:.2f}" if scheme in ANCHORS else "added"
    return _cells(f"`{scheme}`", basis, how, f"{found.loss:.2f} %")


def our_row(scheme: str) -> str:
    row = OURS[scheme]
    return _cells(f"`{scheme}`", row.method, f"{row.kld:.4f} ± {row.kld_se:.4f}", f"{row.ppl_ratio:.4f}")


def goal_row(name: str) -> str:
    goal = GOALS[name]
    return _cells(f"`{name}`", "memory" if goal.by_memory else "speed", f"{goal.tolerance:g} %", goal.summary)


def workload_row(name: str) -> str:
    load = WORKLOADS[name]
    shares = ("memory", "–") if load.by_memory else (f"{load.decode:g}", f"{load.prefill:g}")
    return _cells(f"`{name}`", *shares, load.summary)


def engine_row(engine: Engine, row: Support) -> str:
    where = ", ".join(row.kinds)
    if "cuda" in row.kinds and (row.least != (0, 0) or row.most < _LATEST):
        most = f" to {row.most[0]}.{row.most[1]}" if row.most < _LATEST else " and later"
        where += f", {row.least[0]}.{row.least[1]}{most}"
    batch = "–" if row.small_batch is None else str(row.small_batch)
    schemes = ", ".join(f"`{scheme}`" for scheme in row.schemes)
    remark = "fallback" if row.fallback else ("" if row.format else "not written by lowbit")
    return _cells(engine.name, schemes, where, row.compute, batch, remark)


def _table(head: str, rule: str, rows: list[str]) -> str:
    return "\n".join([head, rule, *rows])


TABLES = {
    "QUALITY_TABLE": lambda: _table(
        "| scheme | loss | metric | value | model | method | source |", "|---|---:|---|---|---|---|---|",
        [quality_row(scheme) for scheme in PUBLISHED],
    ),
    "ANCHOR_TABLE": lambda: _table(
        "| scheme | scaled from | our KLD ÷ its | loss |", "|---|---|---:|---:|",
        [anchor_row(scheme) for scheme in (*ANCHORS, *SUMS)],
    ),
    "OURS_TABLE": lambda: _table(
        "| scheme | method | mean KLD | PPL ratio |", "|---|---|---:|---:|", [our_row(scheme) for scheme in OURS]
    ),
    "SCORE_TABLES": lambda: "\n\n".join((
        _table("| goal | gain | tolerance | |", "|---|---|---:|---|", [goal_row(name) for name in GOALS]),
        _table("| workload | decode | prefill | |", "|---|---:|---:|---|", [workload_row(name) for name in WORKLOADS]),
    )),
    "ENGINE_TABLE": lambda: _table(
        "| engine | schemes | devices, compute capability | computes in | batch | |", "|---|---|---|---|---:|---|",
        [engine_row(engine, row) for engine in all_engines() for row in engine.support],
    ),
    "DEVICE_TABLE": lambda: _table(
        "| name | device | memory, GiB | bandwidth, GB/s | 16 bits | FP8 | INT8 | FP4 | compute capability |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|", [device_row(device) for device in DEVICES.values()],
    ),
}  # fmt: skip

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
