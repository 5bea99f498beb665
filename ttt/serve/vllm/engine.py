"""Calls from the API server to the users in vLLM's worker (`ttt.serve.vllm.users`)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ttt.serve import errors


class Engine:
    """Calls operations of the worker, which take one or more steps there; vLLM serves others in between.

    Args:
        client: vLLM's engine client.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self._slices = asyncio.Lock()  # one slice of learning at a time: between two steps of vLLM there is but one

    async def call(self, operation: str, *arguments: Any) -> Any:
        """What the operation of the worker returns. If the caller is cancelled, so is the operation.

        Raises:
            ttt.serve.errors.RequestError: as the operation did.
        """
        turn: Any = self._slices if operation == "learn" else contextlib.nullcontext()
        async with turn:
            state, value, rest = await self._whole(self._rpc("begin", operation, *arguments))
        while state == "later":
            ticket = value
            asked = False
            try:
                await asyncio.sleep(rest)
                async with turn:
                    asked = True
                    state, value, rest = await self._whole(self._rpc("proceed", ticket))
            except asyncio.CancelledError:
                if not asked:
                    await asyncio.shield(self._rpc("cancel", ticket))
                raise
        if state == "error":
            raise getattr(errors, value)(**rest)
        return value

    async def _whole(self, calling: Any) -> Any:
        """Wait for a call to the worker; if the caller is cancelled meanwhile, end what the call has begun."""
        task = asyncio.ensure_future(calling)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            state, ticket, _ = await task
            if state == "later":
                await self._rpc("cancel", ticket)
            raise

    async def _rpc(self, method: str, *arguments: Any) -> Any:
        (answer,) = await self.client.collective_rpc(f"ttt_{method}", args=arguments)
        return answer
