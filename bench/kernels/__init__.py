"""Benchmarks: `python -m bench.kernels.run`. Cases know their bytes and flops; contenders are checked, then timed.

==============  ==================================================================================
`registry`      `Case` and `Contender`: what a bench is made of
`suites`        the cases, one file a suite
`contenders`    what ttt is compared with: the same formulas in plain torch, and torch.compile
`state`         layers to rotate among, and how importance and trace are stored
`timing`        samples, quartiles, the machine's ceilings
`measure`       checks and times one case; makes the rows of the JSON
`run`           the command; `plot` draws, `check` compares with committed results
==============  ==================================================================================

`pytest bench --benchmark-only` runs the same cases under pytest-benchmark.
"""
