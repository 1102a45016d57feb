"""Instructions of a compiled TPU kernel, counted: a cost model for machines without a TPU.

libtpu writes the final bundles (one very long instruction word a cycle, waiting not counted) to a
folder. Its flags are internal and may vanish; who asks must be ready for None.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import aot_tpu

MXU_FLOPS = {"v5e": 2 * 4 * 128 * 128, "v6e": 2 * 2 * 256 * 256}
"""Of one cycle."""

BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s*([A-Z]*)\s*:\s*([> ]*)\{")


def regions(generation, kernel, **options):
    """Compile a head kernel in a process of its own; return [(tag, loop depth, bundles)].

    A new region begins where a loop does (tag LB), where branches meet (tag PF) or part.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        code = f"from tests import aot_tpu; aot_tpu.compile_head({generation!r}, **{options!r})"
        subprocess.run(
            [sys.executable, "-c", f"from fireopd_jax.ops.blocks import Blocks; {code}"],
            env={**os.environ, **aot_tpu.ENVIRONMENT, "LIBTPU_INIT_ARGS": flags},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            check=True,
        )
        files = [
            file
            for file in Path(folder).glob(f"*{kernel}*final_bundles.txt")
            if "schedule-analysis" not in file.name
        ]
        if not files:
            return None
        return _parse(max(files, key=lambda file: file.stat().st_size).read_text())


def _parse(text):
    found = []
    for line in text.splitlines():
        if not (match := BUNDLE.match(line)):
            continue
        tag, depth = match[1], match[2].count(">")
        if not found or tag in ("LB", "PF") or depth != found[-1][1]:
            found.append([tag, depth, 0])
        found[-1][2] += 1
    # What is left are the slots behind a branch, which show no depth.
    return [tuple(region) for region in found if region[2] > 8]


def inner_loops(found):
    """Return (bundles, bundles of the straight pieces between it and the loop before) of each."""
    loops, straight = [], []
    for tag, depth, bundles in found:
        if tag == "LB":
            loops += [(bundles, straight)] if depth == 2 else []
            straight = []
        else:
            straight = [*straight, bundles]
    return loops
