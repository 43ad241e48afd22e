"""The `hopper` backend on a Hopper GPU.

    correctness.py   is it right, each time it runs      tuning.py   which variant of a kernel is fastest
    decoding.py      the same of decoding                cached.py   its cases
"""
