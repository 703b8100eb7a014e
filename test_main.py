"""The tests of vincache, in main.py's order.

Real: the SQLite files, HTTP on both sides, the exporting process, and, where a test is about processes, uvicorn with real
signals. Played: vPIC alone, by `PlayedVpic`, a server on loopback that answers with real data (the package ultravin) in
vPIC's own form, and misbehaves on demand. No test reaches any address but loopback.
"""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import ultravin
import uvicorn
from aiohttp import web

import main

# ======================================================================================================================
# The played vPIC, and the service around which it is played.
# ======================================================================================================================

HERE = Path(__file__).parent
TRUCK, OTHER_TRUCK, UNKNOWN = "1XPWD40X1ED215307", "1XKWDB0X57J211825", "AAAAAAAAAAAAAAAAA"

# The keys of a flat result that ultravin's data do not name.
OTHER_KEYS = (
    "AdaptiveHeadlights CashForClunkers DriverAssist MakeID ManufacturerId ModelID NCSABodyType NCSAMake"
    " NCSAMapExcApprovedBy NCSAMapExcApprovedOn NCSAMappingException NCSAModel NCSANote VIN"
)
FLAT_KEYS = sorted(
    {element["code"] for element in ultravin.ELEMENTS.values()} - {"PlantAddress"} | {*OTHER_KEYS.split()}
)


def flat(vin: str, **changed: Any) -> dict[str, Any]:
    """The flat result that vPIC gives for `vin`: its 154 keys, all strings; with `changed` in it."""
    known = {element["code"]: element["value"] for element in ultravin.decode(vin, full=True)["elements"]}
    return {key: known.get(key, "") for key in FLAT_KEYS} | {"VIN": vin} | changed


def envelope(*results: Any) -> dict[str, Any]:
    """vPIC's answer around its results."""
    return {
        "Count": len(results),
        "Message": "Results returned successfully.",
        "SearchCriteria": "",
        "Results": [*results],
    }


Fault = Callable[[web.Request, list[str]], Awaitable[web.StreamResponse]]


class PlayedVpic:
    """vPIC on loopback. `calls` has the VINs of each call it got; `fault`, when set, answers in its place."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.requests: list[web.Request] = []
        self.fault: Fault | None = None
        self.delay = 0.0
        self.under_way = self.most_under_way = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            vins = [request.match_info["vin"]]
            assert request.query["format"] == "json"
        else:
            form = await request.post()
            vins = str(form["data"]).split(";")
            assert form["format"] == "json"
            assert len(vins) <= 50
        self.calls.append(vins)
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.delay)
            if self.fault is not None:
                return await self.fault(request, vins)
            return web.json_response(envelope(*map(flat, vins)))
        finally:
            self.under_way -= 1

    def fails(self, status: int = 500, body: bytes | str = "<html>down</html>", **headers: str) -> None:
        """From now on, every call gets this response."""

        async def fault(_: web.Request, __: list[str]) -> web.StreamResponse:
            payload = body.encode() if isinstance(body, str) else body
            return web.Response(
                status=status, body=payload, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )

        self.fault = fault

    def hangs(self) -> None:
        """From now on, no call gets an answer."""

        async def fault(_: web.Request, __: list[str]) -> web.StreamResponse:
            await asyncio.sleep(3600)
            raise AssertionError

        self.fault = fault

    def recovers(self) -> None:
        self.fault = None


@asynccontextmanager
async def playing() -> AsyncIterator[tuple[PlayedVpic, str]]:
    """A played vPIC and its base URL."""
    played = PlayedVpic()
    app = web.Application()
    app.router.add_get("/api/vehicles/DecodeVinValues/{vin}", played.answer)
    app.router.add_post("/api/vehicles/DecodeVINValuesBatch/", played.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield played, f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/api"
    finally:
        await runner.cleanup()


@contextmanager
def environment(**settings: Any) -> Iterator[dict[str, str]]:
    """The process's environment with these VINCACHE_* in it, and no others."""
    before = {name: value for name, value in os.environ.items() if name.startswith("VINCACHE_")}
    for name in before:
        del os.environ[name]
    given = {f"VINCACHE_{name.upper()}": str(value) for name, value in settings.items()}
    os.environ.update(given)
    try:
        yield dict(os.environ)
    finally:
        for name in given:
            del os.environ[name]
        os.environ.update(before)


class Service:
    """A running vincache: `get`, `post`, `delete` give status, headers and the body, parsed if it is JSON."""

    def __init__(self, client: aiohttp.ClientSession, database: Path, vpic: PlayedVpic, port: int) -> None:
        self.client, self.database, self.vpic, self.port = client, database, vpic, port

    async def ask(self, method: str, path: str, **kwargs: Any) -> tuple[int, Any, Any]:
        async with self.client.request(method, path, **kwargs) as response:
            body = await response.read()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(body) if is_json and body else body, response.headers

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        return (await self.ask("GET", path, **kwargs))[:2]

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        return (await self.ask("POST", path, json=body, **kwargs))[:2]

    async def delete(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        return (await self.ask("DELETE", path, **kwargs))[:2]

    async def lookup(self, vin: str) -> tuple[int, Any]:
        return await self.get("/lookup", params={"vin": vin})

    def rows(self) -> list[sqlite3.Row]:
        """The table as it stands in the file."""
        with sqlite3.connect(self.database) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute("SELECT * FROM vehicles ORDER BY vin").fetchall()
        database.close()
        return rows

    def change(self, statement: str, *parameters: Any) -> None:
        """Change the file from outside."""
        with sqlite3.connect(self.database) as database:
            database.execute(statement, parameters)
        database.close()

    def expire(self, vin: str = "%") -> None:
        """Let rows have expired a minute ago."""
        self.change("UPDATE vehicles SET expires_at = ? WHERE vin LIKE ?", int(time.time()) - 60, vin)


@asynccontextmanager
async def serving(database: Path, vpic: PlayedVpic, vpic_url: str, **settings: Any) -> AsyncIterator[Service]:
    """The service, run by uvicorn in this process, on a real socket."""
    with (
        environment(**{"database": database, "vpic_url": vpic_url} | settings),
        socket.create_server(("127.0.0.1", 0)) as sock,
    ):
        config = uvicorn.Config(main.app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started:
            assert not task.done(), "the service did not start"
            await asyncio.sleep(0.005)
        port = sock.getsockname()[1]
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as client:
                yield Service(client, database, vpic, port)
        finally:
            server.should_exit = True
            await task


Start = Callable[..., Any]


@pytest.fixture
async def vpic() -> AsyncIterator[PlayedVpic]:
    """The played vPIC of this test."""
    async with playing() as (played, url):
        played.url = url
        yield played


@pytest.fixture
def start(tmp_path: Path, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`async with start(**settings) as service`: the service on this test's file and vPIC, with these settings."""
    monkeypatch.chdir(tmp_path)

    def start(**settings: Any) -> Any:
        return serving(**{"database": tmp_path / "cache.db", "vpic": vpic, "vpic_url": vpic.url} | settings)

    return start


@pytest.fixture
async def service(start: Start) -> AsyncIterator[Service]:
    """The service as it comes; only offline decoding is off, so that vPIC's faults show."""
    async with start(offline=False) as service:
        yield service


class Process:
    """`uvicorn main:app` as a process of its own; its log is in the file `log`."""

    def __init__(
        self, log: Path, port: int, database: Path, *options: str, vpic_url: str = "", **settings: Any
    ) -> None:
        self.log, self.port, self.url = log, port, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "uvicorn", "main:app", "--app-dir", str(HERE), "--port", str(port), *options]
        with environment(database=database, vpic_url=vpic_url, **settings) as environ, log.open("ab") as out:
            self.popen = subprocess.Popen(command, cwd=log.parent, env=environ, stdout=out, stderr=out)

    @property
    def pid(self) -> int:
        return self.popen.pid

    async def started(self) -> "Process":
        """Wait for the first answer."""
        async with aiohttp.ClientSession() as client:
            for _ in range(1000):
                assert self.popen.poll() is None, self.log.read_text()
                try:
                    async with client.get(f"{self.url}/healthz"):
                        return self
                except aiohttp.ClientError:
                    await asyncio.sleep(0.03)
        raise AssertionError(self.log.read_text())

    async def ended(self, seconds: float = 20) -> int:
        """Wait for the end, and return the exit code."""
        return await asyncio.wait_for(asyncio.to_thread(self.popen.wait), seconds)

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)


@pytest.fixture
def launch(tmp_path: Path, vpic: PlayedVpic) -> Iterator[Callable[..., Process]]:
    """`launch(*uvicorn_options, **settings)`: the service as a process, ended with the test."""
    launched: list[Process] = []

    def launch(*options: str, **settings: Any) -> Process:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        given = {"database": tmp_path / "cache.db", "vpic_url": vpic.url} | settings
        process = Process(tmp_path / f"log{len(launched)}.txt", port, *[given.pop("database")], *options, **given)
        launched.append(process)
        return process

    yield launch
    for process in launched:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


# ======================================================================================================================
# The README as a test.
# ======================================================================================================================


async def test_life_of_a_vin(start: Start, vpic: PlayedVpic) -> None:
    """A VIN is asked once, answered from the cache ever after, restarts included, and asked again when removed."""
    truck = {
        "vin": TRUCK,
        "make": "PETERBILT",
        "model": "388",
        "model_year": "2014",
        "body_class": "Truck-Tractor",
        "error_code": "0",
        "error_text": "0 - VIN decoded clean. Check Digit (9th position) is correct",
        "suggested_vin": "",
        "source": "vpic",
    }
    async with start() as service:
        status, first = await service.lookup(TRUCK)
        assert (status, first) == (200, truck | {"cached_result": False, "fetched_at": first["fetched_at"]})
        assert await service.lookup(TRUCK) == (200, first | {"cached_result": True})
    async with start() as service:
        assert await service.lookup(TRUCK) == (200, first | {"cached_result": True})
        assert vpic.calls == [[TRUCK]]
        assert await service.delete(f"/remove?vin={TRUCK}") == (200, {"vin": TRUCK, "cache_delete_success": True})
        assert await service.delete(f"/remove?vin={TRUCK}") == (200, {"vin": TRUCK, "cache_delete_success": False})
        assert (await service.lookup(TRUCK))[1]["cached_result"] is False
        assert vpic.calls == [[TRUCK], [TRUCK]]
