"""The one thread that owns the asyncio loop and every HTTP connection; it never touches torch.distributed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import aiohttp

from .faults import Abandoned

T = TypeVar("T")
POLL_S = 0.2
"""How often a waiting main thread looks whether it should stop."""


class HttpLoop:
    """A daemon thread with an event loop and one HTTP session. Started on first use."""

    def __init__(self, key: str | None = None) -> None:
        """`key`: API key that goes with every request."""
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.session: aiohttp.ClientSession

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` on the loop."""
        if self._loop is None:
            self._start()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], interrupted: Callable[[], bool] = lambda: False) -> T:
        """Wait for `work`. When `interrupted` says so it is cancelled and Abandoned raised."""
        future = self.submit(work)
        while True:
            try:
                return future.result(timeout=POLL_S)
            except FutureTimeout:
                if future.done():  # the work itself timed out
                    raise
                if interrupted():
                    future.cancel()
                    raise Abandoned from None

    def _start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(ready,), name="rollout-http", daemon=True)
        self._thread.start()
        ready.wait()

    def _main(self, ready: threading.Event) -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._loop = loop
        loop.run_until_complete(self._open())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(self._shut())
        loop.close()

    async def _open(self) -> None:
        # Limits are kept by the scheduler, server by server. SGLang closes connections that were idle for 5 s
        # (SGLANG_TIMEOUT_KEEP_ALIVE); a request that crosses that closing is lost, so this side closes first.
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=2)
        self.session = aiohttp.ClientSession(connector=connector, headers=self._headers)

    async def _shut(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()

    def close(self) -> None:
        """Cancel what runs, close the connections, end the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None
