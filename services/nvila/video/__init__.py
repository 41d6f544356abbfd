"""From the bytes of one image or video file to chunks of RGB frames in shared memory.

In: a file's path, a sampling and limits. Out: what the file is (`MediaInfo`), which frames are taken (`FramePlan`), and
each run of them as a `Chunk`. Codecs run only in the processes of `worker.py`; `pool.py` is the door to them.
"""
