"""``python -m pyfused.bench.gpu``."""

import sys

from pyfused.bench.gpu.run import main

sys.exit(main())
