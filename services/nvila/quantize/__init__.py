"""Checkpoints to smaller ones: the tower in 8 bits, the language model in 4, each with a report of what that changed.

In go a checkpoint and data to calibrate with; out comes a checkpoint in the same layout, which everything that loads
checkpoints serves: `model/int8_tower.py` computes the tower, vLLM's own kernels the language model.
"""
