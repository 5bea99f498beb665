"""Benchmarks: `python -m bench.run`. Cases know their bytes and flops; contenders are checked, then timed."""
