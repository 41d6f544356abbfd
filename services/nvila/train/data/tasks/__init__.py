"""One module per kind of picture or clip. Each makes a sample from a `Draw`, which is all the chance there is in it;
the answer is drawn first, evenly, and the picture is built to fit it, so that guessing without looking does not pay.
"""
