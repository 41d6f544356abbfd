"""The token cache: a chunk's content and settings become a key, visual tokens become a verified record, Redis keeps it.

In: chunks' digests and `VisualTokens`. Out: the same tokens later, to any replica, or a miss. Nothing here can make a
request fail: a lost, late, corrupt or foreign record is a miss, and Redis may vanish at any moment.
"""
