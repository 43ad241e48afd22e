"""The `cpu` backend, as `tilewise bench --cpu` measures it, beside what a user of a CPU would take instead.

    race.py      who may be timed, and times in turns          butterfly.py   sparse blocks
    figures.py   what is promised, and whether it is kept      compiling.py   the time to build kernels and to load them
    dense.py     passes over sequences of one length           others.py      other ways to attend
    packed.py    sequences of unequal length                   table.py, plot.py
    decode.py    one query and a long cache                    run.py         all of it, as one command
"""
