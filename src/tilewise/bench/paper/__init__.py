"""The papers' own benchmarks, run here: `python -m tilewise.bench.paper`.

    flash_attention.py     FlashAttention's tables 9 to 21, and its figure 3          published.py   what the papers print
    flash_attention_2.py   FlashAttention-2's charts, with FlashAttention-3's         data/          the same as CSV
    flash_decoding.py      Flash-Decoding's table                                     cut.py         what a machine does of it
    inputs.py   a setting of FlashAttention's, its tensors, and what is right         memory.py      peak memory, table 21
    methods.py  who takes part                                                        tables.py, figure.py
    passes.py   forward, backward and both, in turns           protocols.py   all of it, as `bench.suite` takes it

On a GPU the sizes are the papers'. Elsewhere they are cut, which every table says.
"""
from tilewise.bench.paper.protocols import lines as lines
from tilewise.bench.paper.protocols import trials as trials
