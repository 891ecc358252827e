"""Benchmarks: parity first, then time and memory against the baselines. `pyfused bench` or `pytest bench` runs them."""

from pathlib import Path

# Of the checkout; of an installed package the folder of pyfused.
ROOT = Path(__file__).resolve().parent.parent
