"""This code against the reference's recorded numbers: `python -m nvila.golden FOLDER`.

A folder holds JSON and safetensors files in the format that its own README describes, and tiny checkpoints. Every file,
every case and every tensor of it is compared, or reported as missed; `compare` says how, `folder` finds what there is,
and the other modules each repeat the recordings of one subject.
"""
