"""Throughput and latency beside the raw clients."""
