"""Makes the fixtures known to `pytest bench` and `pytest --pyargs pyfused.bench`."""

from pyfused.bench.run.plugin import *  # noqa: F403
