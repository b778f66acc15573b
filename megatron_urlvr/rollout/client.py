"""The HTTP API of one SGLang server (native `/generate` and control calls, 0.5.23), every failure a Fault by kind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from .faults import Fault

DETAIL = 200
"""Characters of a server's error message that are kept."""


class ServerClient:
    """Calls to one server. Lives on the event loop's thread."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        """`session` carries the API key, where there is one, in its headers."""
        self.session, self.url = session, url.rstrip("/")

    async def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float, method: str = "POST"
    ) -> Any:
        """The parsed answer of one call. Raises Fault: connection, timeout, http_4xx, http_5xx, truncated."""
        status, raw = await self._exchange(path, body, timeout, method)
        if status >= 400:
            message = raw[:DETAIL].decode("utf-8", "replace")
            raise Fault("http_5xx" if status >= 500 else "http_4xx", f"{self.url}{path} said {status}: {message}")
        if not raw.strip():
            return None
        try:
            return json.loads(raw)
        except ValueError as error:
            raise Fault("truncated", f"{self.url}{path} sent {len(raw)} bytes that are not JSON: {error}") from error

    async def _exchange(
        self, path: str, body: Mapping[str, Any] | None, timeout: float, method: str
    ) -> tuple[int, bytes]:
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self.session.request(method, self.url + path, json=body, timeout=limit) as response:
                return response.status, await response.read()
        except TimeoutError as error:
            raise Fault("timeout", f"{self.url}{path} did not answer within {timeout:g} s") from error
        except aiohttp.ClientPayloadError as error:
            raise Fault("truncated", f"{self.url}{path} broke off its answer") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Fault("connection", f"{self.url}{path}: {type(error).__name__} {error}") from error

    # -- what servers know --------------------------------------------------------------------------------------------

    async def label(self, timeout: float) -> str:
        """Label of the weights that the server holds."""
        answer = await self.call("/model_info", timeout=timeout, method="GET")
        label = answer.get("weight_version") if isinstance(answer, Mapping) else None
        if not isinstance(label, str):
            raise Fault("schema", f"{self.url}/model_info names no weight_version")
        return label

    async def check_health(self, timeout: float) -> None:
        """Raises Fault when the server cannot generate a token in time."""
        status, raw = await self._exchange("/health", None, timeout, "GET")
        if status != 200:
            raise Fault("http_5xx", f"{self.url}/health said {status}: {raw[:DETAIL].decode('utf-8', 'replace')}")

    # -- control ------------------------------------------------------------------------------------------------------

    async def command(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> None:
        """A control call. An answer that says `success: false` is a Fault too."""
        answer = await self.call(path, body or {}, timeout=timeout)
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise Fault("http_4xx", f"{self.url}{path}: {str(answer.get('message'))[:DETAIL]}")

    async def relabel(self, label: str, timeout: float) -> None:
        """Give the weights that the server holds another label; requests under way go on."""
        body = {"new_version": label, "abort_all_requests": False}
        await self.command("/update_weight_version", body, timeout=timeout)

    async def flush_cache(self, timeout: float) -> None:
        """Forget cached prefixes; the server refuses while requests still leave it, so it is asked until `timeout`."""
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            # Answered in plain text, unlike every other call.
            status, raw = await self._exchange("/flush_cache", {}, timeout, "POST")
            if status == 200:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise Fault("http_4xx", f"{self.url}/flush_cache said {status}: {raw[:DETAIL]!r}")
            await asyncio.sleep(0.05)
