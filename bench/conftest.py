"""Makes the fixtures known to `pytest bench` and `pytest --pyargs pyfused.bench`."""

from pyfused.bench.plugin import *  # noqa: F403
