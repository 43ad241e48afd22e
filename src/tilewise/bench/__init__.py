"""Cases, tolerance and timing, shared by tests and benchmarks."""
