"""What the student learns from: trajectories, or tokens of them."""

from fireopd_jax.method.filtering.guards import GapBound as GapBound
from fireopd_jax.method.filtering.guards import Prefix as Prefix
from fireopd_jax.method.filtering.guards import RepetitionGuard as RepetitionGuard
from fireopd_jax.method.filtering.guards import SpecialTokens as SpecialTokens
from fireopd_jax.method.filtering.several import AllOf as AllOf
from fireopd_jax.method.filtering.several import Filters as Filters
from fireopd_jax.method.filtering.several import window_of as window_of
from fireopd_jax.method.filtering.tokens import HardTokens as HardTokens
from fireopd_jax.method.filtering.tokens import Reopold as Reopold
from fireopd_jax.method.filtering.tokens import Tip as Tip
from fireopd_jax.method.filtering.trajectories import KeepAll as KeepAll
from fireopd_jax.method.filtering.trajectories import LengthDrop as LengthDrop
from fireopd_jax.method.filtering.trajectories import RandomDrop as RandomDrop
from fireopd_jax.method.filtering.trajectories import TeacherQuantile as TeacherQuantile
