"""The vLLM plugin: every user of ``vllm serve`` has low-rank weights of their own, which learn while the model serves.

vLLM calls `register` in each of its processes (entry point ``vllm.general_plugins``). Without a variable
``TTT_VLLM_...`` in the environment it does nothing. See docs/vllm.md.

In the API server's process:

- `frontend`: where vLLM is entered. `supported`: what is refused.
- `identity`: who asks. `seats`: who has a slot. `turns`: a request of a user, and learning after it.
- `routes`: ``/v1/users``. `engine`: calls to the worker.

In the worker's:

- `worker`: where vLLM is entered. `users`: what the API server calls.
- `orphans`: its end, and the engine's, with the API server.
- `capture`, `top_blocks`, `blocks` and `lessons`: learning. `adapters`: vLLM's slots. `calibration`, `cpu_lora`.
"""

from __future__ import annotations

import multiprocessing

_registered = False


def register() -> None:
    """Install the plugin in this process, once, if the environment asks for it.

    Raises:
        ValueError: for a wrong option. RuntimeError: if this version of vLLM was not tested.
    """
    global _registered
    from ttt.serve.vllm.options import Options, enabled

    if _registered or not enabled():
        return
    options = Options.from_environment()
    from ttt.serve.vllm import supported

    supported.check_version()
    from ttt.serve.vllm import frontend, orphans, worker

    if multiprocessing.parent_process() is None:  # the engine's processes are children of the API server's
        frontend.install(options)
    else:
        orphans.end_with_parent()
    worker.install(options)
    _registered = True
