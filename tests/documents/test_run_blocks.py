"""Every block of bash and Python in README and docs runs, at tiny size, on a chat model.

The blocks of one file run in order in one folder, as a reader would run them.
"""

import shutil
import subprocess
import sys
from itertools import groupby

import pytest
from documents.blocks import Block, blocks
from documents.world import build, end_servers, environment

pytestmark = pytest.mark.slow

LONG = {
    "fireopd verify": "tests/verify",
    "fireopd bench toy": "tests/bench",
    "fireopd bench": "tests/bench",
    "fireopd plan": "tests/training/test_forecast.py",
    "launch/two_processes.sh": "tests/training/test_processes.py",
}
"""Lines that take minutes at any size, and the tests that run them."""
FILES = {file: list(own) for file, own in groupby(blocks("bash", "python"), lambda b: b.file)}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("documents") / "world")


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_blocks_of_a_file_run_in_order(file, world, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(world, folder, symlinks=True)
    try:
        for block in FILES[file]:
            run(block, folder)
    finally:
        end_servers(folder)


def run(block: Block, folder) -> None:
    command = [sys.executable, "-c", block.text]
    if block.language == "bash":
        command = ["bash", "-e", "-o", "pipefail", "-c", without_long_lines(block.text)]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False,
        stdin=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def without_long_lines(text: str) -> str:
    lines = text.replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if not line.startswith(tuple(LONG)))
