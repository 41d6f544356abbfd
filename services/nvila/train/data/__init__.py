"""Data for training and evaluation. A task, a split, a seed and an index go in and a rendered sample comes out
(`tasks/`, `generate.py`); or files go in, tar shards or a conversation JSON (`shards.py`, `listing.py`), and what comes
out is one shuffled, resumable stream of samples (`mixture.py`, `stream.py`).
"""
