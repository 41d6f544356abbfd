"""The NVILA arithmetic: pixels in, visual tokens out, and the layout in which they join the text.

`config`, `tiles`, `cost` and `published` are pure Python and `preprocess` needs only NumPy and Pillow, so light
services import them; the rest needs torch. Code here is for one device and one sample; serving and training wrap it.
Every rule is that of the reference implementation, whose numbers the tests compare (`nvila.golden`).
"""
