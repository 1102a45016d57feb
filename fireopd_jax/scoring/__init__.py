"""From rollouts to scores: whose log-probabilities, in which context."""

from fireopd_jax.scoring.sampled_token import SampledToken as SampledToken
