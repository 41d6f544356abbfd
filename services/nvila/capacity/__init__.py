"""How much hardware a load needs, and what the autoscalers make of it: sizes and loads in, tables and pictures out.

Arithmetic and a simulation; nothing here talks to a GPU or a cluster, and nothing but Pillow is imported beside NumPy.
"""
