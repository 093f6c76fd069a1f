"""What `scripts/bench_overhead.py` is made of."""
