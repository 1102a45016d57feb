"""The host stages of a method.

rollout -> grade -> rewrite -> find leaks -> rollout
"""

from collections.abc import Sequence

from fireopd_jax.method.config import MethodConfig
from fireopd_jax.session.auditing import Auditor
from fireopd_jax.session.host import FindLeaks, Grade, HostStage
from fireopd_jax.session.rewriting import Rewriter
from fireopd_jax.session.session import Session

HOST_STAGES: Sequence[type[Grade] | type[Rewriter] | type[Auditor] | type[FindLeaks]] = (
    Grade,
    Rewriter,
    Auditor,
    FindLeaks,
)
"""All host stages, in the order in which they run."""


def host_stages(session: Session, method: MethodConfig) -> list[HostStage]:
    """Return the host stages that set the rollout fields which the method asks for."""
    asked = method.asked_of_rollout
    return [stage(session, method) for stage in HOST_STAGES if stage.gives & asked]
