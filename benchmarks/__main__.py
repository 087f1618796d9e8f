"""`make bench`: every benchmark there is."""

import sys

from benchmarks import redis_ratios

sys.exit(redis_ratios.main())
