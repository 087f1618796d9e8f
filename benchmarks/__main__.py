"""`make bench`: every benchmark there is, or those of one broker: `make bench ARGS=rabbitmq`."""

import sys

from benchmarks import memory_ratios, rabbitmq_ratios, redis_ratios, sqs_ratios

ALL = {
    "memory": memory_ratios.main,
    "redis": redis_ratios.main,
    "rabbitmq": rabbitmq_ratios.main,
    "sqs": sqs_ratios.main,
}

named = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in ALL else None
chosen = [ALL[named]] if named else list(ALL.values())
arguments = sys.argv[2:] if named else sys.argv[1:]
sys.exit(max([measure(arguments) for measure in chosen]))
