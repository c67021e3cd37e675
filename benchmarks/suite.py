"""CPU time of the test suite, by module and by test: what `make test` costs whatever else the machine does.

    .venv/bin/python benchmarks/suite.py                       # the default suite, two workers
    .venv/bin/python benchmarks/suite.py --json build/suite.json -- -n 0 tests/kernels

What follows `--` goes to pytest. The time of a test is that of its process and of every process it started, set-up and
tear-down included; a fixture counts for the first test that asks for it. Collection is what each worker spends before
its first test: imports, and making the list of tests. A test waits where its time by the clock exceeds its CPU time:
for a timer, a disk or a server, or for others on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEFAULT = ["-n", "2", "--dist", "loadscope"]
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """User and system time of this process and all below it, running or ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system + sum(map(_used, _below(os.getpid())))


def _below(process: int) -> list[int]:
    """Processes that run below `process`, by Linux's /proc."""
    found = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            for child in _read(f"/proc/{process}/task/{thread}/children").split():
                found += [int(child), *_below(int(child))]
    except OSError:  # it has ended, or this is no Linux
        pass
    return found


def _used(process: int) -> float:
    """Time of a process and of those children whose end it has seen (proc(5): fields 14 to 17 of stat)."""
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def _read(path: str) -> str:
    """Without pathlib, whose os.stat a test may have replaced; nothing where the process has ended."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


class Meter:
    """Puts the CPU time since the last report on each report; the main process adds them up."""

    def __init__(self) -> None:
        self.last = 0.0
        self.collecting: list[float] = []
        self.tests: dict[str, float] = defaultdict(float)
        self.clock: dict[str, float] = defaultdict(float)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.last = cpu_seconds()
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["collecting"] = self.last
        elif session.items:
            self.collecting.append(self.last)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self):
        outcome = yield
        now = cpu_seconds()
        outcome.get_result().cpu_seconds, self.last = now - self.last, now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] += report.cpu_seconds
        self.clock[report.nodeid] += report.duration

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        self.collecting.append(node.workeroutput["collecting"])

    def table(self, rows: int) -> str:
        modules: dict[str, list[float]] = defaultdict(list)
        for test, seconds in self.tests.items():
            modules[test.partition("::")[0]].append(seconds)
        total = sum(self.tests.values()) + sum(self.collecting)
        slowest = sorted(self.tests.items(), key=lambda item: -item[1])[:rows]
        lines = ["", "CPU seconds  tests  module"]
        lines += [
            f"{sum(times):11.1f}  {len(times):5}  {module}"
            for module, times in sorted(modules.items(), key=lambda item: -sum(item[1]))[:rows]
        ]
        lines += ["", "CPU seconds  test", *(f"{seconds:11.2f}  {test}" for test, seconds in slowest)]
        waits = sorted(((self.clock[test] - seconds, test) for test, seconds in self.tests.items()), reverse=True)
        lines += ["", "waits, s     test", *(f"{seconds:11.2f}  {test}" for seconds, test in waits[:rows])]
        workers = ", ".join(f"{seconds:.0f}" for seconds in self.collecting)
        lines += ["", f"{len(self.tests)} tests in {len(modules)} modules; collection by worker: {workers} s"]
        return "\n".join([*lines, f"{total / 60:.1f} CPU minutes in all"])


METER = Meter()


def pytest_configure(config: pytest.Config) -> None:
    """Workers load this file as a plugin of the same name."""
    config.pluginmanager.register(METER, "cpu meter")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write seconds by test here")
    parser.add_argument("--rows", type=int, default=30, help="how many modules and tests to list")
    parser.add_argument("pytest", nargs="*", help=f"arguments of pytest instead of {' '.join(DEFAULT)}")
    given = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(Path(__file__).parent))
    code = pytest.main(["-p", "suite", *(given.pytest or DEFAULT)])
    from suite import METER as meter

    print(meter.table(given.rows))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(vars(meter), indent=0))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
