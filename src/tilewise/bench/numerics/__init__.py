"""Where error comes from: every backend and every peer against fp64, on inputs that are hard in different ways.

    python -m tilewise.bench.numerics [--quick] [--out FILE]

    inputs.py    what is computed, and the kinds of inputs     errors.py   truth in fp64, and distances from it
    methods.py   who takes part                                table.py
    study.py     all of it, as `bench.suite` takes it          causes.py   what one rounding costs
"""
from tilewise.bench.numerics.study import lines as lines
from tilewise.bench.numerics.study import trials as trials
