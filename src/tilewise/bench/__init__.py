"""Benchmarks: correctness first, then time, beside everything else that this machine has; `tilewise bench`.

    record.py     the file they write                       suite.py      case after case, written and continued
    contest.py    one case and its contenders               table.py      results as text and Markdown
    timing.py     calls in turns; memory                    gate.py, tolerance.py    who may be timed
    peers.py      other implementations                     shapes.py, cases.py      what is timed, what is tested

    attention.py  decode.py  sparse.py  masks.py  memory.py  cpu.py  serving.py      the benchmarks: each has `trials`

    work.py       attention under functions of indices      caches.py     what decodes with which cache
    packed.py     sequences of unequal length               chunks.py     prompts in chunks, drafted tokens
    first_calls.py  tiles.py  table_gradients.py            of masks and score functions
    compiling.py  the CPU backend's compiler                workers.py    processes of their own

    smoke.py, tuning.py, hopper/    for scripts/gpu: does it work, which configuration is fastest
"""
