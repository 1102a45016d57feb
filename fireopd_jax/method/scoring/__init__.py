"""From rollouts to scores: whose log-probabilities, in which context."""

from fireopd_jax.method.scoring.stages import SampledToken as SampledToken
from fireopd_jax.method.scoring.stages import ScoreConfig as ScoreConfig
from fireopd_jax.method.scoring.stages import TopK as TopK
from fireopd_jax.method.scoring.stages import WholeVocabulary as WholeVocabulary
