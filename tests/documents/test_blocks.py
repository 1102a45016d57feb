"""What README and docs show is understood: commands, keys, make targets, extras, Python."""

import json
import re
import subprocess
import tomllib

import pytest
import typer
import yaml
from documents.blocks import ROOT, Block, blocks, commands

from fireopd_jax.cli import app
from fireopd_jax.recipe.keys import check_layers
from fireopd_jax.recipe.layers import read_file
from fireopd_jax.recipe.schema import load_sections

COMMAND = typer.main.get_command(app)
CONFIGURED = ("train", "sft", "resume", "plan")


def test_every_block_says_its_language():
    """One without a language is output, or a drawing."""
    found = [block.language for block in blocks()]
    assert set(found) <= {"bash", "python", "yaml", "json", "toml", "", "text"}
    assert found.count("bash") >= 20 and found.count("python") >= 8 and found.count("yaml") >= 6


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands_exist_with_their_options_and_keys(block: Block):
    for arguments in commands(block, "fireopd"):
        arguments = [each.replace("$s", "0") for each in arguments]
        if arguments[0].startswith("-"):
            continue
        context = COMMAND.make_context("fireopd", list(arguments))
        name, command, rest = COMMAND.resolve_command(context, arguments)  # pyright: ignore
        parsed = command.make_context(name, list(rest), parent=context)
        if name in CONFIGURED:
            settings = [s for s in parsed.params["settings"] or () if s != "CONFIG.yaml"]
            load_sections([s for s in settings if not s.endswith("mine.yaml")])


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_targets_and_extras_exist(block: Block):
    for arguments in commands(block, "make"):
        targets = [each for each in arguments if "=" not in each]
        subprocess.run(["make", "-n", "-C", ROOT, *targets], check=True, capture_output=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:fireopd-jax|\.)\[([a-z,]+)\]", block.text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_configurations_have_keys_of_ours(block: Block, tmp_path):
    file = tmp_path / "block.yaml"
    file.write_text(block.text)
    check_layers([read_file(file)])


@pytest.mark.parametrize("block", blocks("python", "json", "toml"), ids=str)
def test_other_blocks_are_of_their_language(block: Block):
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "toml":
        tomllib.loads(block.text)
    else:
        for line in block.text.splitlines():
            json.loads(line) if line.startswith("{") else yaml.safe_load(block.text)
