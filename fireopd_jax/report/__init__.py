"""What a run tells people at its end: a table, a curve, a card."""

from fireopd_jax.report.summary import print_curve as print_curve
from fireopd_jax.report.summary import print_results as print_results
from fireopd_jax.report.summary import write_card as write_card
