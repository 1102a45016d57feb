"""The host stages of a method.

rollout -> grade -> rewrite -> audit -> find leaks -> ask served teachers -> rollout
"""

from collections.abc import Sequence
from typing import Any

from fireopd_jax.method.config import MethodConfig
from fireopd_jax.session.auditing import Auditor
from fireopd_jax.session.host import FindLeaks, Grade, HostStage
from fireopd_jax.session.rewriting import Rewriter
from fireopd_jax.session.served import Listener
from fireopd_jax.session.session import Session

HOST_STAGES: Sequence[Any] = (Grade, Rewriter, Auditor, FindLeaks, Listener)
"""All host stages, in the order in which they run."""


def host_stages(session: Session, method: MethodConfig) -> list[HostStage]:
    """Return the host stages that set the rollout fields which the method asks for."""
    asked = method.asked_of_rollout
    if session.setup.served and method.teacher.resident and method.score.scores_teacher:
        asked |= Listener.gives
    return [stage(session, method) for stage in HOST_STAGES if stage.gives & asked]
