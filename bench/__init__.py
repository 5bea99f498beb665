"""Benchmarks: `python -m bench.run`. Cases know their bytes and flops; contenders are checked, then timed.

==================  ==================================================================================
`bench.registry`    `Case` and `Contender`: what a bench is made of
`bench.suites`      the cases, one file a suite
`bench.contenders`  what ttt is compared with: the same formulas in plain torch, and torch.compile
`bench.state`       layers to rotate among, and how importance and trace are stored
`bench.timing`      samples, quartiles, the machine's ceilings
`bench.measure`     checks and times one case; makes the rows of the JSON
`bench.run`         the command; `bench.plot` draws, `bench.check` compares with committed results
==================  ==================================================================================

`pytest bench --benchmark-only` runs the same cases under pytest-benchmark.
"""
