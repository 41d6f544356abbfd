"""Evaluation. Samples with known answers and something that answers go in, scores per task with confidence intervals
come out: as records on disk (`run.py`), tables (`report.py`), and comparisons of two runs (`compare.py`).
"""
