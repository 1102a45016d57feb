"""A cache folder that takes no files is a warning: programs are compiled without it."""

import os

import jax
import pytest

from fireopd_jax.runtime import compilation
from fireopd_jax.runtime.compilation import cache_folder, compile_cache


@pytest.fixture(autouse=True)
def given_back():
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_enable_compilation_cache", before[0])
    jax.config.update("jax_compilation_cache_dir", before[1])
    compilation.reset_cache()


def a_file(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")


def below_a_file(folder):
    folder.parent.write_text("a file")


@pytest.mark.parametrize("spoil", [a_file, below_a_file])
def test_without_a_folder_for_it_there_is_no_cache(tmp_path, monkeypatch, caplog, spoil):
    monkeypatch.setenv("FIREOPD_CACHE_DIR", str(tmp_path / "a" / "cache"))
    spoil(tmp_path / "a" / "cache")
    assert compile_cache() is None and not jax.config.jax_enable_compilation_cache
    assert "compiled without a cache; FIREOPD_CACHE_DIR" in caplog.text


def test_a_disk_that_is_read_only_or_full_is_no_cache(tmp_path, monkeypatch, caplog):
    def full(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(compilation.tempfile, "NamedTemporaryFile", full)
    assert compile_cache(folder=tmp_path) is None
    assert f"{tmp_path}: cannot be written (Read-only file system)" in caplog.text


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch):
    for name in ("FIREOPD_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda path: no_home())
    assert cache_folder().name == "fireopd_jax" and str(os.getuid()) in str(cache_folder())


def no_home():
    raise RuntimeError("Could not determine home directory.")
