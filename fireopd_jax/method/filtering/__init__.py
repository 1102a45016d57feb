"""Filters: which trajectories, or which of their tokens, are trained on."""

from fireopd_jax.method.filtering.all_of import AllOf as AllOf
from fireopd_jax.method.filtering.all_of import Filters as Filters
from fireopd_jax.method.filtering.guards import GapBound as GapBound
from fireopd_jax.method.filtering.guards import Prefix as Prefix
from fireopd_jax.method.filtering.guards import RepetitionGuard as RepetitionGuard
from fireopd_jax.method.filtering.guards import SpecialTokens as SpecialTokens
from fireopd_jax.method.filtering.tokens import HardTokens as HardTokens
from fireopd_jax.method.filtering.tokens import LeastLikely as LeastLikely
from fireopd_jax.method.filtering.tokens import Reopold as Reopold
from fireopd_jax.method.filtering.tokens import Tip as Tip
from fireopd_jax.method.filtering.trajectories import KeepAll as KeepAll
from fireopd_jax.method.filtering.trajectories import LengthDrop as LengthDrop
from fireopd_jax.method.filtering.trajectories import RandomDrop as RandomDrop
from fireopd_jax.method.filtering.trajectories import TeacherQuantile as TeacherQuantile
