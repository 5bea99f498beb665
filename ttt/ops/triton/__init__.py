"""The ops on CUDA in Triton; each file holds the equation of an op, its kernels, their block sizes and the launcher.

Nothing is tuned at run time, because tuning would run kernels many times, and they write their state in place.
`python -m ttt.ops.triton.aot` compiles every kernel without a GPU.
"""
