"""What GPU backends share: the arithmetic of one tile as Triton device functions, entry points generated for a program, and
the order of work."""
