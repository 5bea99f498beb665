"""Benchmarks: `python -m bench.run`. Each case knows its bytes and flops; each contender is checked before it is timed."""
