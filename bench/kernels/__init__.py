"""Benchmarks of speed: ``python -m bench.kernels.run``. Every contender is checked before it is timed.

===============  ==========================================================================================
`case`           `Case`: one measurement, which knows its bytes, flops and contenders
`contender`      `Contender`: one way of doing a case's work, with a check of its result
`suites`         the cases, one file for each suite
`plain_torch`    what ttt is compared with: the same formulas in plain torch, and ``torch.compile`` of them
`models`         the language models of the suites that read or write text
`state`          random layers, how importance and trace are stored, and the comparison with a reference
`timing`         samples and quartiles
`ceilings`       the machine's rates of copying, reading and multiplying
`measure`        checks and times one case, and makes the rows of the JSON
`run`            the command that measures; `merge` joins its files
`plot`           draws the results; `check` compares new results with committed ones; `targets` lists which
                 targets the results reach
`predict`        a command of its own: how long the GPU kernels should take, before any is measured
`gpu_tables`     tables of docs/gpu.md
`store`          a command of its own: what a user costs in `ttt.Store`
===============  ==========================================================================================

``pytest bench --benchmark-only`` runs the same cases under pytest-benchmark.
"""
