"""The ops on CUDA, one file per op: the equation, the kernels, their block table, the launcher.

Nothing is tuned at run time: the kernels write in place, and tuning would run them many times over
the live state. `python -m ttt.ops.triton.aot` compiles every kernel without a GPU.
"""
