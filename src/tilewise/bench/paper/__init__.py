"""The papers' own benchmarks, run here: `python -m tilewise.bench.paper`.

    flash_attention.py     FlashAttention's tables 9 to 21, and its figure 3          published.py   what the papers print
    flash_attention_2.py   FlashAttention-2's charts, with FlashAttention-3's         data/          the same as CSV
    flash_decoding.py      Flash-Decoding's table
    inputs.py   a setting, its tensors, and what is right      memory.py     peak memory, table 21
    methods.py  who takes part                                 tables.py, figure.py
    passes.py   forward, backward and both, in turns           run.py        all of it, as one command

On a GPU the sizes are the papers'. Elsewhere they are cut (`Cut`), which every table says.
"""
