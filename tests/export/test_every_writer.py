"""Every writer of a folder format answers the whole protocol, with the arguments that callers give."""

from __future__ import annotations

import inspect

import pytest

from lowbit.export import Exporter, find_exporter
from lowbit.registry import folder_formats

ASKED = sorted(name for name in vars(Exporter) if not name.startswith("_") and callable(getattr(Exporter, name)))


@pytest.mark.parametrize("name", folder_formats())
def test_a_writer_answers_all_that_plans_and_slabs_ask(name):
    exporter = find_exporter(name)
    missing = [each for each in ASKED if not callable(getattr(exporter, each, None))]
    assert not missing, f"{name} does not answer {', '.join(missing)}"


@pytest.mark.parametrize("name", folder_formats())
def test_a_writer_takes_the_arguments_of_the_protocol(name):
    exporter = find_exporter(name)
    for each in ASKED:
        asked = list(inspect.signature(getattr(Exporter, each)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(exporter, each)).parameters) == asked, f"{name}: {each}"
