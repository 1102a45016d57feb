"""Which files a frozen model was read from, and what is refused when they change."""

import dataclasses
import hashlib
import json

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.models.hf_export import export_model
from fireopd_jax.recipe.models import TeacherConfig
from fireopd_jax.session.identity import check_sources, identity, recorded_sources
from fireopd_jax.session.specs import make_spec, slug
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer
from tests.cases import random_params, tiny_model


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(vocab_size=264)
    tokenizer = load_tokenizer(BUILTIN)
    export_model(
        tmp_path / "m", random_params(model), model.config, tokenizer, stop=(257,), card="x"
    )
    return tmp_path / "m"


def spec_of(folder, name="teacher math"):
    return make_spec(name, TeacherConfig(path=str(folder)))


def test_every_file_has_its_hash(folder):
    found = identity(spec_of(folder))
    weights = (folder / "model.safetensors").read_bytes()
    assert found["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert {"config.json", "tokenizer.json"} <= set(found["sha256"])
    assert found["path"] == str(folder) and found["revision"] is None


def test_a_link_into_the_hubs_cache_has_the_name_of_its_blob(folder, tmp_path):
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        large = file.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256(file.read_bytes()).hexdigest() if large else file.name)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    # The blob is not read: another content under its name changes nothing.
    expected = identity(spec_of(folder))["sha256"]
    spec = spec_of(snapshot)
    weights = (snapshot / "model.safetensors").resolve()
    weights.write_bytes(b"")
    found = identity(spec)
    assert found["sha256"] == expected and found["revision"] == "c0ffee"


def test_the_same_files_are_accepted_and_others_refused(folder, tmp_path):
    record = tmp_path / "models" / "sources.json"
    check_sources(record, [spec_of(folder)])
    before = record.read_text()
    (folder / "README.md").write_text("another card")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    for name in (".cache/huggingface/x.json", "pytorch_model.bin", "model.gguf"):
        (folder / name).write_text("not loaded")
    check_sources(record, [spec_of(folder)])
    assert record.read_text() == before and list(json.loads(before)) == ["teacher math"]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(
        UserError, match=r"^teacher math: model\.safetensors of .* changed since the run"
    ):
        check_sources(record, [spec_of(folder)])


def test_a_file_more_or_less_is_another_model(folder, tmp_path):
    record = tmp_path / "sources.json"
    check_sources(record, [spec_of(folder)])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        check_sources(record, [spec_of(folder)])


def test_a_model_that_was_not_there_is_refused(folder, tmp_path):
    record = tmp_path / "sources.json"
    check_sources(record, [spec_of(folder)])
    with pytest.raises(UserError, match=r"^base: the model of"):
        check_sources(record, [spec_of(folder), dataclasses.replace(spec_of(folder), name="base")])


@pytest.mark.parametrize("record", [[1], {"base": 5}, {"base": {"folder": "x"}}])
def test_a_damaged_record_is_named(tmp_path, record):
    (tmp_path / "sources.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"sources\.json: damaged .*; delete it"):
        recorded_sources(tmp_path / "sources.json")


def test_folder_names_are_one_to_one():
    names = ["a b", "a_b", "a.b", "a/b", "a%2Fb", "a%b", "..", "../a", "é", "A", "a", "a  b", " a"]
    folders = [slug(f"teacher {name}") for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in each and each.startswith("teacher_") for each in folders)
    assert slug("teacher default") == "teacher_default" and slug("student") == "student"
