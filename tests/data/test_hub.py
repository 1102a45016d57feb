"""Data sets that `datasets` reads: folders, saved ones, names on the hub; nothing is downloaded."""

import json
import subprocess
import sys
import time

import datasets
import pytest
from huggingface_hub import HfApi, constants, errors

from fireopd_jax.config import UserError
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_rows

ROWS = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(path, **keys):
    return read_rows(DataConfig(path=str(path), **keys))


def questions(rows):
    return [row.prompt[0]["content"] for row in rows]


def folder(home, **splits):
    home.mkdir()
    for name, rows in splits.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def test_what_save_to_disk_wrote(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one")
    rows = read(tmp_path / "one")
    assert questions(rows) == [row["question"] for row in ROWS]
    assert rows[4].origin == f"{tmp_path}/one:5" and rows[4].answer == "#### 8"
    # Rows that were chosen or shuffled are read in that order.
    saved.select([3, 1]).save_to_disk(tmp_path / "chosen")
    assert questions(read(tmp_path / "chosen")) == ["3+3?", "1+1?"]
    with pytest.raises(UserError, match=r"data\.split='test': .* is a single data set"):
        read(tmp_path / "one", split="test")


def test_saved_splits_are_chosen_by_name(tmp_path):
    parts = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:2]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert len(read(tmp_path / "both")) == 5
    rows = read(tmp_path / "both", split="test")
    assert [row.origin for row in rows] == [f"{tmp_path}/both[test]:{i}" for i in (1, 2)]
    with pytest.raises(
        UserError, match=r"has no 'tst' \(did you mean 'test'\?\); it has train, te"
    ):
        read(tmp_path / "both", split="tst")


def test_a_folder_of_files_has_splits_by_their_names(tmp_path):
    home = folder(tmp_path / "set", train=ROWS, test=ROWS[:2])
    assert len(read(home)) == 5
    assert questions(read(home, split="test")) == ["0+0?", "1+1?"]
    assert questions(read(home, split="train[3:]")) == ["3+3?", "4+4?"]
    assert len(read(home, split="train+test")) == 7
    with pytest.raises(UserError, match=r"has no 'dev'.*it has train, test"):
        read(home, split="dev")
    with pytest.raises(UserError, match="is a folder of this machine"):
        read(home, revision="main")
    held = folder(tmp_path / "held", test=ROWS[:1], validation=ROWS[1:])
    with pytest.raises(UserError, match=r"has the splits validation, test; name one"):
        read(held)


def test_a_subset_is_asked_for_by_name(tmp_path):
    home = tmp_path / "set"
    home.mkdir()
    (home / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: a.jsonl\n"
        "- config_name: socratic\n  data_files: b.jsonl\n---\n"
    )
    (home / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (home / "b.jsonl").write_text(json.dumps(ROWS[1]))
    assert questions(read(home, subset="socratic")) == ["1+1?"]
    with pytest.raises(UserError, match=r"data\.subset: .* has the subsets main, socratic; name"):
        read(home)
    with pytest.raises(UserError, match=r"data\.subset: .* has the subsets main, socratic; name"):
        read(home, subset="man")


def test_a_name_on_the_hub_is_loaded_with_split_and_revision(tmp_path, monkeypatch):
    home = folder(tmp_path / "set", train=ROWS, test=ROWS[:2])
    load, asked = datasets.load_dataset, []

    def of_hub(path, subset, *, split, revision):
        asked.append((path, subset, split, revision))
        return load(str(home), split=split)

    monkeypatch.setattr(datasets, "load_dataset", of_hub)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "test"])
    rows = read("openai/gsm8k", subset="main", split="test", revision="abc")
    assert asked == [("openai/gsm8k", "main", "test", "abc")]
    assert [row.origin for row in rows] == ["openai/gsm8k[test]:1", "openai/gsm8k[test]:2"]
    assert [row.answer for row in rows] == ["#### 0", "#### 2"]


def test_offline_the_remedy_is_named_at_once(monkeypatch):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"'openai/gsm8k' is no file .*give a file") as one:
        read("openai/gsm8k", subset="main")
    # Not in the cache and without a network: no retries.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def refuse(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(UserError, match=r"not known\); set HF_HUB_OFFLINE=1 to use the ca") as two:
        read("openai/gsm8k")
    assert time.monotonic() - start < 20
    assert not any("\n" in str(each.value) for each in (one, two))


def test_an_unknown_name_is_no_traceback(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    class Response:
        headers, request, status_code = {}, None, 404

    def unknown(*_, **__):
        raise errors.RepositoryNotFoundError("404\nRepository Not Found", response=Response())

    monkeypatch.setattr(HfApi, "dataset_info", unknown)
    with pytest.raises(UserError, match=r"the hub does not offer it \(misspelt, gated .*404 Rep"):
        read("opnai/gsm8k")


def test_a_misspelt_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    with pytest.raises(
        UserError, match=r"no file 'data/tran\.jsonl' \(did you mean 'train\.jsonl'"
    ):
        read("data/tran.jsonl")
    with pytest.raises(UserError, match=r"no file 'other/train\.jsonl'"):
        read("other/train.jsonl")
    with pytest.raises(UserError, match=r"'data/train' .*unknown kind|no file 'data/train'"):
        read("data/train")


def test_datasets_is_imported_only_where_it_reads():
    code = (
        "import sys; from fireopd_jax.data.sources import read_rows, DataConfig;"
        "read_rows(DataConfig()); print('datasets' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
