"""One page that shows why: a run's results, curves, filter and tokens in a self-contained HTML.

run folder -> reading -> results, curves, filtering, tokens, answers -> page -> report.html
"""
