"""Columns as public data sets and other trainers have them, read unchanged and said in one line."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.data import sources
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_data, read_rows


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def write(folder, *records, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


PUBLIC = {
    "gsm8k": (
        {"question": "Ann has 2?", "answer": "She has <<1+1=2>>2\n#### 2"},
        ("Ann has 2?", "She has <<1+1=2>>2\n#### 2", None),
    ),
    "math": (
        {"problem": "p", "level": "Level 5", "type": "Algebra", "solution": r"so \boxed{2}"},
        ("p", r"so \boxed{2}", None),
    ),
    "math-500": (
        {"problem": "p", "solution": "s", "answer": "2", "subject": "x", "unique_id": "t/1"},
        ("p", "2", "s"),
    ),
    "aime": ({"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204}, ("p", "204", "s")),
    "amc": ({"id": 0, "problem": "p", "answer": 142.0, "url": "u"}, ("p", "142", None)),
    "minerva": ({"question": "p", "answer": r"\frac{1}{2}"}, ("p", r"\frac{1}{2}", None)),
    "olympiad": (
        {"id": 1, "question": "p", "solution": ["s"], "final_answer": ["2", "3"], "unit": None},
        ("p", "2, 3", "s"),
    ),
    "deepmath": ({"question": "p", "final_answer": "2", "difficulty": 4}, ("p", "2", None)),
    "dapo": (
        {"prompt": turns("p"), "reward_model": {"ground_truth": "2", "style": "rule"}},
        ("p", "2", None),
    ),
    "trl prompt": ({"prompt": "p"}, ("p", None, None)),
    "trl standard": ({"prompt": "p", "completion": "c"}, ("p", None, "c")),
    "trl conversational": (
        {"prompt": turns("p"), "completion": turns("p", "c")[1:]},
        ("p", None, "c"),
    ),
    "trl messages": ({"messages": turns("p", "c")}, ("p", None, "c")),
    "swift": ({"query": "p", "response": "c", "solution": "2"}, ("p", "2", "c")),
    "swift messages": ({"messages": turns("p", "c"), "solution": "2"}, ("p", "2", "c")),
    "swift grpo": ({"messages": turns("p"), "solution": "2"}, ("p", "2", None)),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}]},
        ("p", None, "c"),
    ),
    "alpaca": ({"instruction": "p", "input": "", "output": "c"}, ("p", None, "c")),
    "openr1": (
        {"problem": "p", "solution": "s", "answer": "2", "messages": turns("p", "c")},
        ("p", "2", "c"),
    ),
    "json text": ({"prompt": json.dumps(turns("p")), "answer": "2"}, ("p", "2", None)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_sets_and_trainers_are_read_unchanged(tmp_path, name):
    record, (prompt, answer, reference) = PUBLIC[name]
    (row,) = read_rows(DataConfig(path=write(tmp_path, record)))
    assert row.prompt == ({"role": "user", "content": prompt},)
    assert (row.answer, row.reference, row.privileged) == (answer, reference, reference)
    assert row.begun == ""


def test_verl_parquet_and_paths_into_its_objects(tmp_path):
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": turns(f"{i}+{i}?"),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i, "answer": f"it is {2 * i}"},
        }
        for i in range(3)
    ]
    path = str(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = read_data(DataConfig(path=path))
    assert [row.answer for row in data.rows] == ["0", "2", "4"]
    (note,) = data.notes()
    assert note == (
        f"{path}: 3 rows, verl's columns: prompt=prompt, answer=reward_model.ground_truth; not "
        "used: data_source, ability, extra_info"
    )
    keys = {"answer_column": "extra_info.answer", "teacher_column": "data_source"}
    row = read_rows(DataConfig(path=path, **keys))[1]
    assert (row.answer, row.teacher) == ("it is 2", "openai/gsm8k")
    with pytest.raises(UserError, match=r"_model\.truth'.*mean 'reward_model\.ground_truth'"):
        read_rows(DataConfig(path=path, answer_column="reward_model.truth"))
    with pytest.raises(UserError, match=r"found an object with .*reward_model\.ground_truth; name"):
        read_rows(DataConfig(path=path, answer_column="reward_model"))


def test_a_column_whose_name_has_a_dot_comes_first(tmp_path):
    path = write(tmp_path, {"prompt": "p", "a.b": "literal", "a": {"b": "inner", "c": "2"}})
    assert read_rows(DataConfig(path=path, answer_column="a.b"))[0].answer == "literal"
    assert read_rows(DataConfig(path=path, answer_column="a.c"))[0].answer == "2"


def test_of_several_columns_the_first_in_order_counts_and_the_others_are_named(tmp_path):
    path = write(tmp_path, {"problem": "q", "prompt": "p", "answer": "1", "solution": "s"})
    data = read_data(DataConfig(path=path))
    assert data.rows[0].prompt[0]["content"] == "p"
    assert next(data.notes()).endswith(
        "prompt columns: prompt=prompt, answer=answer, reference=solution; not used: problem"
    )
    row = read_rows(DataConfig(path=path, prompt_column="problem", answer_column="solution"))[0]
    assert (row.prompt[0]["content"], row.answer) == ("q", "s")
    row = read_rows(DataConfig(path=path, reference_column="", answer_column=""))[0]
    assert (row.answer, row.reference) == (None, None)  # "" is no column


def test_columns_are_recognised_in_all_of_the_first_rows(tmp_path):
    path = write(tmp_path, {"prompt": "a"}, {"prompt": "b", "answer": "2"}, {"prompt": "c"})
    data = read_data(DataConfig(path=path))
    assert [row.answer for row in data.rows] == [None, "2", None]
    assert any("2 rows have no answer; they are trained on, not held" in n for n in data.notes())


def test_mixed_prompt_columns_are_named_with_file_row_and_columns(tmp_path):
    path = write(tmp_path, {"problem": "a", "answer": "1"}, {"prompt": "b", "answer": "2"})
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no column 'prompt' .*'problem', 'answer'"):
        read_rows(DataConfig(path=path))
    path = write(tmp_path, {"text": "a", "label": 1})
    with pytest.raises(UserError, match=r":1: no column is a prompt .*prompt_column; .*'text'"):
        read_rows(DataConfig(path=path))


def test_files_of_different_forms_are_concatenated_and_each_is_described(tmp_path):
    a = write(tmp_path, {"prompt": "a", "answer": "1"}, name="a.jsonl")
    b = write(tmp_path, {"question": "b", "answer": "2"}, name="b.jsonl")
    c = write(tmp_path, {"prompt": "c", "answer": "3"}, name="c.jsonl")
    data = read_data(DataConfig(path=(a, b, c)))
    assert [row.prompt[0]["content"] for row in data.rows] == ["a", "b", "c"]
    first, second = data.notes()
    assert first == f"{a} and 1 more: 2 rows, prompt columns: prompt=prompt, answer=answer"
    assert "question and answer columns: prompt=question" in second


def test_a_system_column_and_an_input_belong_to_the_forms_that_have_them(tmp_path):
    path = write(tmp_path, {"query": "q", "response": "r", "system": "s"})
    (row,) = read_rows(DataConfig(path=path))
    assert [turn["role"] for turn in row.prompt] == ["system", "user"]
    path = write(tmp_path, {"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert read_rows(DataConfig(path=path))[0].prompt[0]["content"] == "Add.\n1, 2"
    path = write(tmp_path, {"prompt": "q", "system": "s"})
    data = read_data(DataConfig(path=path))
    assert len(data.rows[0].prompt) == 1 and next(data.notes()).endswith("not used: system")


def test_blank_answers_are_none(tmp_path):
    path = write(tmp_path, {"prompt": "a", "answer": " "}, {"prompt": "b", "answer": "0"})
    assert [row.answer for row in read_rows(DataConfig(path=path))] == [None, "0"]


def test_repeated_prompts_are_counted_and_two_answers_are_named(tmp_path):
    rows = [("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("b", None)]
    path = write(tmp_path, *({"prompt": p, "answer": a} for p, a in rows))
    data = read_data(DataConfig(path=path))
    assert (len(data.rows), data.num_repeated, data.num_dropped) == (5, 3, 0)
    notes = list(data.notes())
    assert "3 rows repeat the prompt of an earlier row: kept (data.duplicates=drop" in notes[-2]
    assert notes[-1] == f"one prompt has two answers: {path}:1 ('1') and {path}:4 ('3')"
    data = read_data(DataConfig(path=path, duplicates="drop"))
    assert [row.origin for row in data.rows] == [f"{path}:1", f"{path}:2"]
    assert data.num_dropped == 3


def test_other_tools_or_calls_make_another_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": name}} for name in "ab"]
    call = {"role": "assistant", "tool_calls": [tools[0]]}
    answer = {"role": "tool", "content": "1"}
    path = write(
        tmp_path,
        {"prompt": "p", "answer": "1"},
        {"prompt": "p", "answer": "2", "tools": tools[:1]},
        {"prompt": "p", "answer": "3", "tools": tools},
        {"prompt": [*turns("p"), call, answer], "answer": "4"},
        {"prompt": [*turns("p"), {**call, "tool_calls": [tools[1]]}, answer], "answer": "5"},
    )
    assert read_data(DataConfig(path=path)).num_repeated == 0


def test_tests_of_programs_may_be_objects(tmp_path):
    tests = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
    file = write(tmp_path, {"prompt": "add", "reward_model": {"ground_truth": tests}})
    (row,) = read_rows(DataConfig(path=file, grader="code"))
    assert row.answer is not None and json.loads(row.answer) == tests
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .* found an object"):
        read_rows(DataConfig(path=file))


def test_of_several_solutions_the_first_is_the_reference(tmp_path):
    file = write(tmp_path, {"question": "1+1?", "final_answer": ["2"], "solution": ["a, b", "c"]})
    data = read_data(DataConfig(path=file))
    assert (data.rows[0].answer, data.rows[0].reference) == ("2", "a, b")
    assert any("1 conversations: the first of several references" in n for n in data.notes())


@pytest.mark.parametrize("name", ["answer", "tools", "Solution"])
def test_a_column_that_first_comes_late_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "SAMPLE", 2)
    rows = [{"prompt": f"{i}?", "level": 1} for i in range(3)]
    file = write(tmp_path, *rows, {"prompt": "p", name: "4", "note": "n"})
    with pytest.raises(UserError, match=rf":4: column '{name}' is in none of the first rows"):
        read_rows(DataConfig(path=file))
    assert (
        len(read_rows(DataConfig(path=write(tmp_path, *rows, {"prompt": "p", "note": "n"})))) == 4
    )
