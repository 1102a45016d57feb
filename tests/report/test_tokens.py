"""The numbers of the heat maps are those of the files, and sums are those of plain loops."""

import numpy as np
import pyarrow.parquet
import pytest

from fireopd_jax.report.reading import RunFiles
from fireopd_jax.report.tokens import MOST_TOKENS, NUMBERS, agreement, responses
from tests.report.made import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return RunFiles(make_run(tmp_path_factory.mktemp("runs") / "made", words=4))


def lines(run, step):
    file = run.path / "completions" / f"step_{step:06d}.parquet"
    return {line["row"]: line for line in pyarrow.parquet.read_table(file).to_pylist()}


def test_each_number_is_that_of_the_file(run):
    shown = responses(run, run.completions(), 10**6)
    assert {each["step"] for each in shown} == {3, 6}
    assert {each["kept"] for each in shown} == {True, False}
    for each in shown:
        line = lines(run, each["step"])[each["row"]]
        assert each["id"] == line["tokens"] and each["text"] == line["token_text"]
        for short, name in NUMBERS.items():
            np.testing.assert_allclose(each[short], line[name], rtol=1e-4, atol=1e-12)
        assert each["filter_threshold"] == pytest.approx(line["filter_threshold"], rel=1e-5)
        for t, words in enumerate(each["top"]["at"]):
            texts = [each["top"]["texts"][i] for i in words[0::2]]
            assert texts == line["teacher_top_text"][t]
            np.testing.assert_allclose(words[1::2], line["teacher_top_logprob"][t], rtol=1e-3)


def test_the_formula_gives_the_weight(run):
    for each in responses(run, run.completions(), 10**6):
        sure = 1 - np.asarray(each["te"]) / each["teacher_entropy_top"]
        unsure = np.asarray(each["se"]) / each["student_entropy_top"]
        np.testing.assert_allclose((1 + sure) * (1 + unsure) / each["raw"], each["w"], rtol=1e-3)


def test_a_budget_leaves_responses_of_the_first_and_the_last_step(run):
    some = responses(run, run.completions(), 12_000)
    assert 0 < len(some) < len(responses(run, run.completions(), 10**6))
    assert some[-1]["step"] == 6
    assert responses(run, run.completions(), 10) == []


def test_long_responses_are_cut(tmp_path):
    made = make_run(tmp_path / "x", steps=1, every=1, rows=3, tokens=MOST_TOKENS + 7)
    run = RunFiles(made)
    longest = max(responses(run, run.completions(), 10**7), key=lambda each: each["length"])
    assert longest["length"] == MOST_TOKENS + 7
    assert len(longest["id"]) == len(longest["text"]) == len(longest["w"]) == MOST_TOKENS


def test_agreement_is_that_of_a_plain_loop(run):
    (found, _) = agreement(run, run.completions())
    cells = np.zeros((4, 3))
    for line in lines(run, 3).values():
        numbers = zip(line["student_logprob"], line["teacher_logprob"], line["weight"],
                      line["coefficient"], strict=True)  # fmt: skip
        for student, teacher, weight, coefficient in numbers:
            a = teacher - student
            cell = (0 if line["correct"] else 2) + (0 if a >= 0 else 1)
            cells[cell] += [1, a, abs(a) * weight * coefficient]
    assert found["step"] == 3 and cells[:2].sum() > 0
    np.testing.assert_allclose(found["cells"], cells, rtol=1e-4)


def test_without_a_teacher_nothing_agrees(run, tmp_path):
    line = pyarrow.parquet.read_table(run.completions()[0]).drop_columns(["teacher_logprob"])
    file = tmp_path / "step_000001.parquet"
    pyarrow.parquet.write_table(line, file)
    assert agreement(run, [file]) == []
