"""What `/set` changes: the knobs of the sampler, which are traced, so that nothing recompiles."""

import dataclasses
from collections.abc import Callable, Mapping

from fireopd_jax.config import UserError, nearest
from fireopd_jax.rollout.requests import Knobs

Check = tuple[type[int] | type[float], Callable[[float], bool], str]
CHECKS: Mapping[str, Check] = {
    "temperature": (float, lambda x: 0 <= x < float("inf"), "a number of at least 0; 0 is greedy"),
    "top_p": (float, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "top_k": (int, lambda x: 0 <= x < 2**31, "an integer of at least 0; 0 is off"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "max_tokens": (int, lambda x: 1 <= x < 2**31, "an integer of at least 1"),
    "seed": (int, lambda x: True, "an integer"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the answers."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 512
    seed: int = 0

    def knobs(self) -> Knobs:
        """Return the settings as the engine has them."""
        names = ("temperature", "top_p", "top_k", "min_p", "max_tokens")
        return Knobs(**{name: getattr(self, name) for name in names})

    def changed(self, words: str) -> "Settings":
        """Return the settings after `temperature=0.2 seed=3`; raise UserError if one is wrong."""
        found = {}
        for word in words.replace(",", " ").split():
            name, equals, value = word.partition("=")
            name = name.strip("-").replace("-", "_")
            if name not in CHECKS:
                raise UserError(
                    f"/set {word}: no setting {name!r}{nearest(name, CHECKS)}; expected one of "
                    f"{', '.join(CHECKS)}"
                )
            kind, valid, expected = CHECKS[name]
            try:
                number = kind(value)
            except ValueError:
                number = None
            if not equals or number is None or not valid(number):
                raise UserError(f"/set {word}: expected {name}= and {expected}")
            found[name] = number
        return dataclasses.replace(self, **found)

    def __str__(self) -> str:
        return " ".join(f"{name}={getattr(self, name):g}" for name in CHECKS if name != "seed") + (
            f" seed={self.seed}"
        )
