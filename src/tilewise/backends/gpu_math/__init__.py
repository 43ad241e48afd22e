"""The arithmetic of one tile, as Triton device functions: shared by every GPU backend, written once."""
