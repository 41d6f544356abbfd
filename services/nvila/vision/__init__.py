"""The vision stage: frames of one chunk go in, compressed and projected visual tokens come out, published in the cache.

`client.py` and `contract.py` are the light end that the gateway imports; `backend.py` and `engine.py` run in Triton;
`triton.py` finds and starts the server.
"""
