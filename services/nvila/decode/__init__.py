"""The decode service: a prompt with visual tokens goes in, a stream of text comes out.

`client.py` and `wire.py` are the light end, for the gateway. The rest runs in the service: `app.py` (Ray Serve) calls
`service.py`, which has `prompt.py` make embeddings, an engine generate ids, and `text.py` make text of them.
"""
