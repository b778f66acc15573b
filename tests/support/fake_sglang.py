"""A small server with SGLang's native API, for speed and for faults that a real one does not have on demand.

It is kept honest by `server_contract.py`, which runs against it and against the real server. All fakes of a process
share one event loop on one thread.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from fake_faults import sent, spoil
from fake_memory import Crash, FakeMemory
from fake_models import DiceModel, FakeModel
from fake_weights import checksums, joined, received
from safetensors.torch import load_file


class _Loop:
    """The shared thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="fake-sglang", daemon=True).start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=30)


_shared: list[_Loop] = []


def _loop() -> _Loop:
    if not _shared:
        _shared.append(_Loop())
    return _shared[0]


class FakeServer:
    """One server. `faults` yields what each `/generate` request is to suffer: a name of FAULTS, `die`, or None."""

    def __init__(
        self,
        model: FakeModel,
        *,
        context: int = 64,
        vocab_size: int = 21,
        faults: Iterator[str | None] | None = None,
        key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        pace: Callable[[], float] | None = None,
        statistics: tuple[str, ...] = (),
        device: str = "cpu",
        saver: bool = False,
    ) -> None:
        """`pace` says how many seconds the next token takes; without it a response takes no time, and cannot meet an
        update."""
        self.model, self.context, self.vocab_size, self.key = model, context, vocab_size, key
        self.pace = pace
        self.statistics = statistics
        self.device, self.saver = device, saver
        self.memory = FakeMemory()
        self.called: list[str] = []
        """Control calls in order; a release or resume with what it is of."""
        self.faults: Iterator[str | None] = iter(()) if faults is None else faults
        self.label = "default"
        self.dead_for = 0
        """Connections that are still reset before the server is back, as if newly started."""
        self.sick = False
        """Fails its health check."""
        self.refusing: set[str] = set()
        """Paths that are answered with 400."""
        self.calls: Counter[str] = Counter()
        self.most_at_once = 0
        self.asked: Counter[str] = Counter()
        """How often each sample was asked for, by `<prompt>/<index>`."""
        self.labels: list[str] = []
        """Labels of all weights that were loaded, in order."""
        self._running = 0
        self._steps = 0
        """Tokens being computed."""
        self._aborts = 0
        """How often all requests were given up."""
        self._kept = False
        """Paused in place: requests hold on to what was computed for them."""
        self._updating = False
        self._groups: dict[str, Any] = {}
        self.held: dict[str, torch.Tensor] = {}
        self._threads = ThreadPoolExecutor(2)
        self._going = asyncio.Event()
        self._going.set()
        self.url = ""
        _loop().run(self._start(host, port))

    async def _start(self, host: str, port: int) -> None:
        application = web.Application(middlewares=[self._guard])
        posts: dict[str, Callable[[web.Request], Any]] = {
            "/generate": self._generate,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/abort_request": self._abort,
            "/update_weights_from_disk": self._from_disk,
            "/init_weights_update_group": self._join_group,
            "/destroy_weights_update_group": self._leave_group,
            "/begin_weight_update": self._begin,
            "/end_weight_update": self._end,
            "/update_weights_from_distributed": self._from_group,
            "/weights_checker": self._checker,
            "/update_weight_version": self._relabel,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._regain,
        }
        application.add_routes([web.post(path, handler) for path, handler in posts.items()])
        application.add_routes(
            [
                web.get("/health", self._health),
                web.get("/health_generate", self._health),
                web.get("/model_info", self._info),
                web.get("/server_info", self._server_info),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.01, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def stop(self) -> None:
        """Close the port and all connections."""
        _loop().run(self._runner.cleanup())

    def restart(self) -> None:
        """Be as a new process is: awake, with the weights that servers start with."""
        self.label = "default"
        self.memory.restart()
        self._going.set()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls[request.path] += 1
        if request.method == "POST" and request.path != "/generate":
            self.called.append(request.path)
        if self.dead_for:
            self.dead_for -= 1
            self.restart()
            return await self._reset(request)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path in self.refusing:
            return _refused("refused on request")
        try:
            return await handler(request)
        except Crash:
            self.dead_for = 3
            return await self._reset(request)

    @staticmethod
    async def _reset(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    # -- generation ---------------------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked["/".join(body.get("rid", "").split("/")[1:-1])] += 1
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        try:
            await self._going.wait()
            fault = next(self.faults, None)
            if fault == "die":
                self.dead_for = 3
            if fault in ("die", "reset"):
                return await self._reset(request)
            if fault == "hang":
                await asyncio.Event().wait()  # until the client goes away
            if fault in ("400", "500"):
                return web.json_response({"error": {"message": "as scheduled"}}, status=int(fault))
            ids, params = body["input_ids"], body["sampling_params"]
            if len(ids) >= self.context:
                return web.json_response({"error": {"message": "longer than the context"}}, status=400)
            answer = await self._respond(body)
            spoil(fault, answer, params, self.vocab_size)
            return await sent(request, fault, answer)
        finally:
            self._running -= 1

    async def _respond(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sample a response, at once or at the pace: between two tokens there may be a pause, other weights, an end."""
        await self._going.wait()
        ids, key = body["input_ids"], body.get("extra_key")
        cached = self.memory.hit(key, ids)
        answer = await self._sampled(body)
        answer["meta_info"]["cached_tokens"] = cached
        self.memory.keep(key, [*ids, *answer["output_ids"][:-1]])
        return answer

    async def _sampled(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, params, aborts = body["input_ids"], body["sampling_params"], self._aborts
        tokens: list[int] = []
        logps: list[float] = []
        labels: list[str] = []
        longest, stops = params["max_new_tokens"], params.get("stop_token_ids", ())
        while len(tokens) < longest and not (tokens and tokens[-1] in stops):
            await self._going.wait()
            if self._aborts != aborts:
                return self._answer(body, tokens, logps, labels, aborted=True)
            label = self.label
            step = params | {"max_new_tokens": longest if self.pace is None else 1}
            self._steps += 1
            try:
                more, their = await self._in_thread(self.model.generate, ids + tokens, step)
            finally:
                self._steps -= 1
            tokens += more
            logps += their
            labels += [label] * len(more)
            if self.pace is not None:
                await asyncio.sleep(self.pace())
        return self._answer(body, tokens, logps, labels)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        if isinstance(self.model, DiceModel):
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _answer(
        self, body: dict[str, Any], tokens: list[int], logps: list[float], labels: list[str], *, aborted: bool = False
    ) -> dict[str, Any]:
        stopped = bool(tokens) and tokens[-1] in body["sampling_params"].get("stop_token_ids", [])
        full = len(tokens) == body["sampling_params"]["max_new_tokens"]
        reason: dict[str, Any] = {"type": "length", "length": len(tokens)}
        if stopped and not full:
            reason = {"type": "stop", "matched": tokens[-1]}
        spans: list[dict[str, Any]] = []
        for at, label in enumerate(labels):
            if not spans or spans[-1]["version"] != label:
                spans.append({"version": label, "start": at})
            spans[-1]["end"] = at + 1
        return {
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "abort", "message": "Aborted"} if aborted else reason,
                **{name: [0.5] * len(tokens) for name in self.statistics},
                "id": body.get("rid"),
                "prompt_tokens": len(body["input_ids"]),
                "completion_tokens": len(tokens),
                "weight_version": labels[-1] if labels else self.label,
                "weight_versions": spans,
                "output_token_logprobs": [[lp, token, None] for lp, token in zip(logps, tokens, strict=True)],
            },
        }

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.sick else 200)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"device": self.device, "enable_memory_saver": self.saver})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _pause(self, request: web.Request) -> web.Response:
        mode = (await request.json()).get("mode", "abort")
        self._going.clear()
        while self._steps:  # a pause comes between two tokens
            await asyncio.sleep(0.001)
        self._kept = mode == "in_place"
        if mode == "abort":
            self._give_up()
        return _done()

    async def _continue(self, request: web.Request) -> web.Response:
        self._kept = False
        self._going.set()
        return _done()

    async def _abort(self, request: web.Request) -> web.Response:
        self._give_up()
        return _done()

    def _give_up(self) -> None:
        self._aborts += 1

    async def _flush(self, request: web.Request) -> web.Response:
        if self._running and (self._kept or self._going.is_set()):
            return web.Response(status=400, text="There are requests.")
        self.memory.flush()
        return web.Response(text="Cache flushed.")

    # -- memory -------------------------------------------------------------------------------------------------------

    async def _release(self, request: web.Request) -> web.Response:
        idle = not self._running or not (self._kept or self._going.is_set())
        self.memory.release(await self._tags(request), idle=idle)
        return web.json_response(None)

    async def _regain(self, request: web.Request) -> web.Response:
        self.memory.resume(await self._tags(request))
        return web.json_response(None)

    async def _tags(self, request: web.Request) -> set[str]:
        tags = set((await request.json())["tags"])
        self.called[-1] += " " + " ".join(sorted(tags))
        return tags

    async def _relabel(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("abort_all_requests", True):
            self._give_up()
        self.label = body["new_version"]
        return _done()

    # -- weights ------------------------------------------------------------------------------------------------------

    async def _from_disk(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.memory.load_weights()
        folder = Path(body["model_path"])
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for file in sorted(set(index["weight_map"].values())):
            self._take(load_file(folder / file))
        self.label = body["weight_version"]
        self.labels.append(self.label)
        if body.get("flush_cache", True) and self._running and (self._kept or self._going.is_set()):
            return _refused("Weights were updated, but the cache was not flushed.")
        if body.get("flush_cache", True):
            self.memory.flush()
        return _done()

    async def _checker(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True, "message": "", "ranks": [{"checksums": checksums(self.held)}]})

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        self.held |= tensors
        self.model.load(tensors)

    async def _begin(self, request: web.Request) -> web.Response:
        self._updating = True
        return _done()

    async def _end(self, request: web.Request) -> web.Response:
        if not self._updating:
            return _refused("no update has begun")
        self._updating = False
        return _done()

    async def _join_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["group_name"] in self._groups:
            return _refused("group exists")
        self._groups[body["group_name"]] = await self._threaded(joined, body)
        return _done()

    async def _leave_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        return _done() if self._groups.pop(body["group_name"], None) is not None else _refused("no such group")

    async def _threaded(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _from_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not self._updating:
            return _refused("must run between begin_weight_update and end_weight_update")
        self._take(await self._threaded(received, self._groups[body["group_name"]], body))
        if body.get("weight_version"):
            self.label = body["weight_version"]
            self.labels.append(self.label)
        return _done()


def _done() -> web.Response:
    return web.json_response({"success": True, "message": "ok"})


def _refused(why: str) -> web.Response:
    return web.json_response({"success": False, "message": why}, status=400)
