"""The README's example of FiRe-OPD in one's own loop, run as it stands there."""

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "fire_weights" in block]
    return block


def test_example_runs_and_learns_towards_the_teacher():
    scope: dict = {}
    exec(example(), scope)
    kl = np.asarray(scope["history"])
    assert np.isfinite(kl).all()
    assert kl[-5:].mean() < 0.5 * kl[:5].mean()


def test_example_is_short():
    lines = [line for line in example().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 32
