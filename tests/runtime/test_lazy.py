"""A package that is imported when it is used."""

import importlib
import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from fireopd_jax.runtime.lazy import load_when_used

PACKAGE = """\
import time
from . import inner
time.sleep(0.1)  # another thread asks meanwhile
early = "absent" in globals()
value = 3

def __getattr__(name):
    if name == "computed":
        return 4
    raise AttributeError(name)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return the name of a package that is not imported yet, made lazy."""
    name = "lazy_for_a_test"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(PACKAGE)
    (tmp_path / name / "inner.py").write_text("value = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_when_used(name)
    yield name
    for each in (name, f"{name}.inner"):
        sys.modules.pop(each, None)


def loaded(name):
    return "value" in vars(sys.modules[name])


def test_import_loads_nothing(package):
    module = importlib.import_module(package)
    assert module.__name__ == package
    assert find_spec(package) is not None
    inspect.getmodule(inspect.currentframe())  # looks at the file of every module
    assert not loaded(package)


def test_an_attribute_loads_it(package):
    assert importlib.import_module(package).value == 3
    assert loaded(package)
    assert importlib.import_module(package).computed == 4
    with pytest.raises(AttributeError, match="missing"):
        _ = importlib.import_module(package).missing
    importlib.reload(sys.modules[package])


def test_a_submodule_loads_it(package):
    assert importlib.import_module(f"{package}.inner").value == 5
    assert loaded(package)


def test_threads_see_all_of_it(package):
    module = importlib.import_module(package)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: module.value, range(4))) == [3] * 4


def test_an_error_of_the_package_comes_at_its_use(package, tmp_path):
    (tmp_path / package / "__init__.py").write_text("raise OSError('a library is missing')\n")
    module = importlib.import_module(package)
    with pytest.raises(OSError, match="a library is missing"):
        _ = module.value
    assert package not in sys.modules


def test_no_effect_on_what_is_missing_imported_or_a_file(tmp_path, monkeypatch):
    load_when_used("no_such_package_for_a_test")
    assert "no_such_package_for_a_test" not in sys.modules
    load_when_used("pytest")
    assert sys.modules["pytest"] is pytest
    (tmp_path / "a_file_for_a_test.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_when_used("a_file_for_a_test")
    assert "a_file_for_a_test" not in sys.modules


def test_a_command_does_not_load_pytorch(tmp_path):
    """A PyTorch that cannot be loaded costs a command nothing."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise OSError('loaded')\n")
    about = tmp_path / "torch-9.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.0.0\n")
    here = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-m", "fireopd_jax", "train", "smoke", "--dry-run"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{here}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    code = "import transformers.configuration_utils"
    bare = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "OSError: loaded" in bare.stderr  # transformers does load it
