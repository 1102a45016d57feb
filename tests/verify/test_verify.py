"""`fireopd verify`: what it compares and writes; a broken objective fails its rows."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fireopd_jax import cli
from fireopd_jax.method.losses import support
from fireopd_jax.method.losses.sampled_token import SampledReverseKL
from fireopd_jax.method.losses.support import EntropyAware, SupportDivergence, SupportPolicyGradient
from fireopd_jax.method.losses.vocabulary import MiniLLM, VocabularyDivergence
from fireopd_jax.verify import command, invariance, objectives, statistics, table
from fireopd_jax.verify.objectives import OBJECTIVES, Objective, describe
from tests.recipe.test_recipe import METHODS

HERE = Path(command.__file__).parent


def call(monkeypatch, *arguments):
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "verify", *arguments])
    try:
        cli.main()
    except SystemExit as done:
        return done.code or 0
    return 0


def only(monkeypatch, *chosen):
    """Restrict the command to these objectives."""
    parts = {"Objectives": lambda: objectives.rows(chosen)}
    monkeypatch.setattr(command, "PARTS", parts)


def test_a_few_objectives_pass_and_are_written(monkeypatch, tmp_path, capsys):
    only(
        monkeypatch,
        Objective(SampledReverseKL(gamma=0.5)),
        Objective(EntropyAware(tau=4.2), vanishes=False),
    )
    file = tmp_path / "rows.json"
    assert call(monkeypatch, "--json", str(file)) == 0
    written = json.loads(file.read_text())
    assert written["pass"] and written["devices"] == 8 and written["jax"] and written["device"]
    assert [row.keys() for row in written["rows"]] == [{"name", "error", "bound", "pass"}] * 5
    assert all(row["pass"] and row["error"] <= row["bound"] for row in written["rows"])
    printed = capsys.readouterr().out
    assert "5 of 5 passed, 8 x" in printed
    assert "sampled_reverse_kl gamma=0.5: zero at the teacher" in printed


def test_a_broken_objective_fails_its_rows_alone(monkeypatch, tmp_path, capsys):
    right = support.renormalised
    monkeypatch.setattr(support, "renormalised", lambda *inputs: -right(*inputs))
    only(monkeypatch, Objective(SupportDivergence()), Objective(SupportPolicyGradient()))
    file = tmp_path / "rows.json"
    assert call(monkeypatch, "--json", str(file)) == 1
    written = json.loads(file.read_text())
    failed = [row["name"] for row in written["rows"] if not row["pass"]]
    assert failed == ["support_divergence: value", "support_divergence: gradient"]
    assert not written["pass"]
    printed = capsys.readouterr()
    assert "4 of 6 passed" in printed.out and "failed: support_divergence: value" in printed.out
    assert printed.err == ""


def test_a_file_that_cannot_be_written_is_refused_before_the_work(monkeypatch, tmp_path, capsys):
    only(monkeypatch)
    assert call(monkeypatch, "--json", str(tmp_path / "nowhere" / "rows.json")) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no such folder" in printed.err


def test_every_loss_and_choice_is_verified():
    losses = [each.loss for each in OBJECTIVES]
    names = [each.name for each in OBJECTIVES]
    assert len(set(names)) == len(names)
    kinds = {loss.kind for loss in losses}
    assert len(kinds) == 10
    heads = {(x.head, x.divergence.kind) for x in losses if isinstance(x, SupportDivergence)}
    assert len(heads) == 10
    whole = {x.divergence.kind for x in losses if isinstance(x, VocabularyDivergence)}
    assert len(whole) == 6
    clipped = {x.divergence.kind for x in losses if getattr(x, "pointwise_clip", None)}
    assert len(clipped) == 5
    assert describe(MiniLLM(clip=0.1)) == "minillm clip=0.1"


def test_every_shipped_method_is_verified():
    assert invariance.shipped_methods() == METHODS


def test_statistics_of_a_batch_pass():
    rows = list(statistics.of_batches())
    assert len(rows) == 31 and all(row.passed for row in rows)


def test_anchors_and_weights_of_chunks_pass():
    rows = list(statistics.of_chunks())
    assert len(rows) == 6 and all(row.passed for row in rows)


def test_one_method_under_micro_batches_padding_and_devices():
    rows = list(invariance.rows(["gkd"]))
    found = ["loss", "padding, micro-batches", "padding, 8 devices", "packed"]
    found.append("packed, 8 devices")
    assert [row.name for row in rows] == [
        f"{name}: {what}" for name in ("gkd", "fire_opd of a decoder") for what in found
    ]
    assert all(row.passed for row in rows)


def test_errors_of_the_comparisons():
    assert table.relative("", [([1.0, 4.0], [1.0, 5.0]), ([0.0], [0.0])], 1.0).error == 0.2
    assert table.relative("", [([1e-3], [0.0])], 1.0).error == 1e-3
    assert table.absolute("", [([1.0, 4.0], [1.0, 5.0])], 1.0).error == 1.0
    assert table.differing("", [1, 2, 3], [1, 5, 4]).error == 2
    for bad in (np.nan, np.inf):
        for compare in (table.relative, table.absolute):
            row = compare("", [([bad, 1.0], [0.0, 1.0]), ([1.0], [1.0])], 1.0)
            assert not row.passed and row.as_json()["error"] is None
    assert not table.relative("", [([1.0], [[1.0]])], 1.0).passed


@pytest.mark.parametrize(
    "name", ["reference", "reference_batch", "reference_losses", "reference_stages"]
)
def test_the_reference_imports_only_numpy_and_itself(name):
    tree = ast.parse((HERE / f"{name}.py").read_text())
    allowed = ("numpy", "dataclasses", "fireopd_jax.verify.reference")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name in allowed for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            inside = node.module == "fireopd_jax.verify"
            names = {alias.name for alias in node.names}
            assert (inside and names == {"reference"}) or node.module.startswith(allowed)


@pytest.mark.slow
def test_the_whole_command_passes(monkeypatch, capsys):
    assert call(monkeypatch) == 0
    assert "failed" not in capsys.readouterr().out
