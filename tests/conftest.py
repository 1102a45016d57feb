"""Strict by default: eight virtual CPU devices, no silent broadcasting, one temporary cache.

The settings stand in the environment: before JAX is imported, and for the processes that tests
start. `make test-gpu` sets FIREOPD_TEST_GPU, and arrays then lie on a GPU.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from importlib.metadata import version

import pytest

assert "jax" not in sys.modules, "JAX was imported before its settings"

FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # Compiling takes most of the time of these tests; XLA's own passes stay as they are, only
    # LLVM's are left out: two and a half times as fast.
    "--xla_backend_optimization_level": "0",
}
if version("jaxlib").startswith("0.10."):
    # The emitters of before, gone since: twice as fast to compile.
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
    # With it, the virtual devices of one program may enter independent collectives in different
    # orders, and wait for each other for ever.
    FLAGS["--xla_cpu_enable_concurrency_optimized_scheduler"] = "false"

ON_GPU = os.environ.get("FIREOPD_TEST_GPU") == "1"
os.environ["JAX_PLATFORMS"] = "cuda,cpu" if ON_GPU else "cpu"
given = os.environ.get("XLA_FLAGS", "")
added = [f"{flag}={value}" for flag, value in FLAGS.items() if flag not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_THREEFRY_PARTITIONABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# One folder for the whole session: workers inherit it, so that one process's compilations serve
# the others.
if "PYTEST_XDIST_WORKER" not in os.environ:
    folder = tempfile.mkdtemp(prefix="fireopd-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["FIREOPD_CACHE_DIR"] = folder
    os.environ["HF_HOME"] = os.path.join(folder, "huggingface")


def pytest_collection_finish() -> None:
    """Collect garbage rarely, and never look again at what was imported: a minute of each run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not ON_GPU and item.get_closest_marker("gpu"):
        pytest.skip("runs in make test-gpu")
