"""Benchmarks: parity first, then time and memory against the baselines. `pyfused bench` or `pytest bench` runs them."""
