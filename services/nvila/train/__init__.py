"""Training: what the model's own arithmetic leaves to whoever tunes it. Conversations in, labelled and packed batches
and a loss out; the model and its prompt layout come from `nvila.model`.
"""
