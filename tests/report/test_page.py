"""The page: one file that needs nothing else, whatever a run holds and whatever it lacks."""

import json
import re
import shutil

import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.report.page import BUDGET, MARK, write_report
from tests.report.made import HOSTILE, evaluate, make_run


def read(file):
    """Return the data within a page, and the rest of the page."""
    text = file.read_text("utf-8")
    before, _, rest = text.partition('<script type="application/json" id="data">')
    data, _, after = rest.partition("</script>")
    return json.loads(data), before + after


def only(run):
    data, _ = read(write_report([str(run)]))
    (found,) = data["runs"]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made", words=4)


def test_the_page_is_in_the_run_and_has_every_part(run):
    file = write_report([str(run)])
    assert file == run / "report.html" and file.read_text().startswith(MARK)
    found = only(run)
    assert found["name"] == "made" and found["notes"] == []
    assert found["facts"]["command"] == "fireopd train configs/smoke.yaml run.steps=6"
    assert (found["facts"]["state"], found["facts"]["steps"]) == ("complete", 6)
    assert found["facts"]["tokens"] == 600 and found["facts"]["train_seconds"] == 3.0
    assert found["curves"]["points"]["loss"]["student"]["y"][:2] == [1.0, 0.5]
    assert found["curves"]["alarms"][0]["text"] == "the gradient is 0"
    assert found["lanes"]["memory"]["rollout"] == 2**30
    assert set(found["filter"]["rows"]["step"]) == {3, 6}
    assert found["responses"] and found["agreement"] and found["answers"]["problems"]


def test_the_page_asks_the_network_for_nothing(run):
    _, page = read(write_report([str(run)]))
    assert "default-src 'none'" in page
    links = re.findall(r"""(?:https?:)?//[\w.]+\.\w+|(?:src|href)=["'][^"'#]+""", page)
    assert set(links) == {'href="data:,', "http://www.w3.org"}  # the latter names the language SVG


def test_texts_cannot_leave_the_data(tmp_path):
    run = make_run(tmp_path / "x", prompt=HOSTILE)
    evaluate(run, "student_after", 0.5, text=HOSTILE)
    file = write_report([str(run)])
    data, page = read(file)
    assert "onerror" not in page
    (found,) = data["runs"]
    shown = [response["prompt"] for response in found["responses"]]
    assert all("</script><img src=x onerror=alert(1)>" in text for text in shown)
    answers = found["answers"]["problems"][0]["answers"]["student after"]
    assert answers[0].startswith("</script><img")


def test_a_hostile_name_is_text(tmp_path):
    run = make_run(tmp_path / "<script>alert(1)<x>{{data}}")
    data, page = read(write_report([str(run)]))
    assert "<script>alert" not in page and data["runs"][0]["name"] == run.name


def test_any_length_stays_small(tmp_path):
    run = make_run(tmp_path / "long", steps=40, every=5, rows=12, tokens=2000, words=8)
    size = write_report([str(run)]).stat().st_size
    assert BUDGET / 2 < size < 5_000_000


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps_are_a_page(steps, tmp_path):
    found = only(make_run(tmp_path / "few", steps=steps, every=1))
    assert found["facts"]["steps"] == steps
    if steps == 0:
        assert found["facts"]["state"] == "stopped"
        assert any("no trajectories were saved" in note for note in found["notes"])
        assert found["curves"]["points"] == {} and found["lanes"]["lanes"] == []


DAMAGE = {
    "config.yaml": "config.yaml is damaged",
    "env.json": "env.json is damaged",
    "summary.json": "summary.json is damaged",
    "metrics.jsonl": "metrics.jsonl has a damaged line",
    "completions/step_000003.parquet": "step_000003.parquet is damaged",
    "eval/student_before.jsonl": "eval/student_before.jsonl is damaged",
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("how", ["cut", "binary", "empty"])
def test_a_file_that_was_cut_off_is_named(name, how, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / name
    whole = file.read_bytes()
    half = len(whole) // 2
    damaged = {"cut": whole[: half + 1], "binary": b"\xff\xfe{[" + whole[:half], "empty": b""}
    file.write_bytes(damaged[how])
    if name == "config.yaml" and how == "cut":
        file.write_text("run: [")
    notes = only(copy)["notes"]
    if name == "metrics.jsonl" and how == "empty":
        assert notes == []  # of a run that has begun
    else:
        assert any(DAMAGE[name] in note for note in notes), notes


@pytest.mark.parametrize(
    "gone", ["env.json", "metrics.jsonl", "completions", "eval", "summary.json", "memory.json"]
)
def test_what_is_not_there_is_left_out(gone, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = only(copy)
    assert found["facts"]["state"] == ("stopped" if gone == "summary.json" else "complete")
    if gone == "summary.json":  # the evaluations that were made are shown
        assert [row["model"] for row in found["results"][0]["rows"]][:2] == [
            "student before", "student after",
        ]  # fmt: skip


def test_trajectories_of_an_older_version_are_shown(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "old")
    older = "row prompt response answer correct finished teacher writer kept tokens weight"
    older = [*older.split(), "student_logprob", "teacher_score", "teacher_logprob"]
    for file in (copy / "completions").glob("*.parquet"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file, columns=older), file)
    found = only(copy)
    assert any("older version" in note for note in found["notes"])
    response = found["responses"][0]
    assert response["text"] is None and response["response"] and response["se"] is None
    assert all(score is not None for score in found["filter"]["rows"]["score"])


def test_another_path_is_one_line(run, tmp_path):
    near = run.parent / "mad"
    for path, message in {
        near: "no such folder.*did you mean 'made'",
        tmp_path: "no run is there",
        run / "config.yaml": f"in one: fireopd report {run}",
        tmp_path / "own.yaml": "a configuration; fireopd train",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            write_report([str(path)])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="at most 8"):
        write_report([str(run)] * 9)


def test_only_a_page_is_written_over(run, tmp_path):
    precious = tmp_path / "thesis.html"
    precious.write_text("<!doctype html> my thesis")
    with pytest.raises(UserError, match="a file that is no report"):
        write_report([str(run)], precious)
    with pytest.raises(UserError, match="a folder"):
        write_report([str(run)], tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        write_report([str(run)], tmp_path / "none" / "x.html")
    again = tmp_path / "report.html"
    assert write_report([str(run)], again) == write_report([str(run)], again)


def test_two_runs_share_a_page_and_its_problems(run, tmp_path):
    other = make_run(tmp_path / "other", seed=5)
    evaluate(other, "student_after", 0.25, problems=6)
    evaluate(other, "student_before", 0.25, problems=6)
    evaluate(other, "teacher_default", 0.25, problems=6)
    for step in (0, 6):
        evaluate(other, f"student_step_{step:06d}", 0.25, problems=6, figures=False)
    file = write_report([str(run), str(other)])
    assert file.name == "report-with-other.html"
    data, _ = read(file)
    keys = [[each["key"] for each in found["answers"]["problems"]] for found in data["runs"]]
    assert sorted(keys[0]) == sorted(keys[1]) and len(keys[0]) == 6
