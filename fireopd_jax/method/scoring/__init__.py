"""Scoring of rollouts: log-probabilities of student and teachers, each in its own prompt."""

from fireopd_jax.method.scoring.base import ScoreConfig as ScoreConfig
from fireopd_jax.method.scoring.base import ScoreInputs as ScoreInputs
from fireopd_jax.method.scoring.stages import ChunkAgreement as ChunkAgreement
from fireopd_jax.method.scoring.stages import SampledToken as SampledToken
from fireopd_jax.method.scoring.stages import StudentOnly as StudentOnly
from fireopd_jax.method.scoring.stages import TopK as TopK
from fireopd_jax.method.scoring.stages import WholeVocabulary as WholeVocabulary
from fireopd_jax.method.scoring.teachers import Resident as Resident
