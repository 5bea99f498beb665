"""Shared by the tests of ops: Triton's interpreter, if it runs the kernels, does not repeat its work."""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.work_once()
