"""`lowbit allocate` end to end."""

from __future__ import annotations

import json

import pytest

from models import FITS_ALL, SHORT_TEXT, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("allocate") / "model", **FITS_ALL)


def test_the_command_says_what_it_chose_and_how_to_use_it(lowbit, model, tmp_path):
    outcome = lowbit("allocate", model, "-o", tmp_path / "x.types", "--calib", SHORT_TEXT, "--samples", 2,
                             "--seqlen", 32, "--types", "Q2_K,Q4_K,Q6_K")  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert "with Q4_K_M's own types" in outcome.stdout
    assert "--scheme Q4_K_M --tensor-type-file" in outcome.stderr
    again = lowbit("allocate", model, "-o", tmp_path / "x.types", "--calib", SHORT_TEXT, "--samples", 2,
                           "--seqlen", 32, "--types", "Q2_K,Q4_K,Q6_K", "--json", "--overwrite")  # fmt: skip
    document = json.loads(again.stdout)
    assert document["file_bytes"] <= document["budget"]
    assert document["predicted_nats"] <= document["predicted_nats_of_scheme"]


def test_the_command_needs_an_output(lowbit, model):
    outcome = lowbit("allocate", model)
    assert outcome.code == 2
    assert "no output file was given" in outcome.stderr
