"""The tests of vincache: first the life of a VIN, then batches, the file and the processes at their worst, vPIC at its
worst, doors and windows.

Real: the SQLite files, HTTP on both sides, the exporting process, and, where a test is about processes, uvicorn with
real signals. Played: vPIC alone, by `PlayedVpic`, a server on loopback that answers with real data (of the package
ultravin) in vPIC's own form, and misbehaves on demand. No test reaches any address but loopback.
"""

import asyncio
import base64
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ultravin
import uvicorn
import yarl
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

    def __init__(
        self, client: aiohttp.ClientSession, database: Path, vpic: PlayedVpic, port: int, state: dict[str, Any]
    ) -> None:
        self.client, self.database, self.vpic, self.port, self.state = client, database, vpic, port, state

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
    with environment(**{"database": database, "vpic_url": vpic_url} | settings):
        # uvicorn binds by itself: on a socket made by hand asyncio would leave Nagle on, 40 ms an answer.
        config = uvicorn.Config(main.app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            assert not task.done(), "the service did not start"
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as client:
                yield Service(client, database, vpic, port, server.lifespan.state)
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


def trucks(count: int, first: int = 900_000) -> list[str]:
    """Different VINs that vPIC decodes, with a warning for their check digit."""
    return [f"1XPWD40X1ED{number:06d}" for number in range(first, first + count)]


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something that is bound to happen."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - of another process, or of a file: there is no event to wait for
            await asyncio.sleep(0.01)


class Process:
    """`uvicorn main:app` as a process of its own; its log is in the file `log`."""

    def __init__(
        self,
        log: Path,
        port: int,
        database: Path,
        /,
        *options: str,
        vpic_url: str = "",
        through: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.log, self.port, self.url = log, port, f"http://127.0.0.1:{port}"
        command = [
            *through,
            sys.executable,
            "-m",
            "uvicorn",
            "main:app",
            "--app-dir",
            str(HERE),
            "--port",
            str(port),
            *options,
        ]
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


Launch = Callable[..., Process]


@pytest.fixture
def launch(tmp_path: Path, vpic: PlayedVpic) -> Iterator[Launch]:
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
FORMS: dict[str, Callable[[str, str], tuple[str, str, dict[str, Any]]]] = {
    "query": lambda prefix, vin: ("GET", f"{prefix}/lookup", {"params": {"vin": vin}}),
    "path": lambda prefix, vin: ("GET", f"{prefix}/lookup/{vin}", {}),
    "post": lambda prefix, vin: ("POST", f"{prefix}/lookup", {"json": {"vin": vin, "other": 1}}),
}


@pytest.mark.parametrize("prefix", ["", "/api/v1"])
@pytest.mark.parametrize("form", FORMS)
async def test_seven_examples_in_every_form(service: Service, form: str, prefix: str) -> None:
    """vPIC's answers come out as its table says, the second time from the cache, undecodable ones too."""
    for vin, expected in EXAMPLES.items():
        method, path, sent = FORMS[form](prefix, vin)
        status, first, headers = await service.ask(method, path, **sent)
        assert headers["Content-Type"] == "application/json"
        assert (first["vin"], first["cached_result"], first["source"]) == (vin, False, "vpic")
        if expected is None:
            assert (status, first["error_code"]) == (404, "1,7,400")
            assert set(first) == {*main.Undecodable.model_fields}
        else:
            words = ("make", "model", "model_year", "body_class", "error_code")
            assert (status, tuple(first[word] for word in words)) == (200, expected)
            assert set(first) == {*main.Vehicle.model_fields}
        # The hit is SQLite's JSON, the first answer pydantic's: they must not drift apart.
        again = await service.ask(method, path, **sent)
        assert (again[0], again[1]) == (status, first | {"cached_result": True})
        assert [*again[1]] == [*first]
    assert service.vpic.calls == [[vin] for vin in EXAMPLES]


async def test_undecodable_vin_is_asked_again_when_its_shorter_life_ends(start: Start, vpic: PlayedVpic) -> None:
    """An undecodable VIN expires after INVALID_TTL, a decoded one after TTL."""
    async with start(ttl=1000, invalid_ttl=100) as service:
        await service.lookup(TRUCK)
        await service.lookup(UNKNOWN)
        lives = {row["vin"]: (row["decoded"], row["expires_at"] - row["fetched_at"]) for row in service.rows()}
        assert lives == {TRUCK: (1, pytest.approx(1000, abs=1)), UNKNOWN: (0, pytest.approx(100, abs=1))}
        service.expire(UNKNOWN)
        assert (await service.lookup(UNKNOWN))[1]["cached_result"] is False
        assert vpic.calls == [[TRUCK], [UNKNOWN], [UNKNOWN]]


async def test_vin_without_make_is_undecodable_whatever_its_error_code(service: Service) -> None:
    """No Make is a 404, even beside the code for a clean decode; code 17 is not code 7."""

    async def fault(_: web.Request, vins: list[str]) -> web.StreamResponse:
        changed = {TRUCK: {"Make": ""}, OTHER_TRUCK: {"ErrorCode": "1,17"}}
        return web.json_response(envelope(*(flat(vin, **changed[vin]) for vin in vins)))

    service.vpic.fault = fault
    assert (await service.lookup(TRUCK))[0] == 404
    assert (await service.lookup(OTHER_TRUCK))[0] == 200


async def test_remove_takes_an_expired_row_for_a_row(service: Service) -> None:
    """/remove tells whether a row was there, in all three forms, expired or not."""
    for method, path, sent in (
        ("DELETE", f"/remove?vin={TRUCK}", {}),
        ("DELETE", f"/api/v1/remove/{TRUCK.lower()}", {}),
        ("POST", "/remove", {"json": {"vin": f" {TRUCK} "}}),
    ):
        await service.lookup(TRUCK)
        service.expire()
        for there in (True, False):
            status, body, _ = await service.ask(method, path, **sent)
            assert (status, body) == (200, {"vin": TRUCK, "cache_delete_success": there})
    assert service.rows() == []


# ======================================================================================================================
# Batches.
# ======================================================================================================================


async def batch(service: Service, vins: Any, path: str = "/lookup/batch") -> list[Any]:
    """The lines of a batch, parsed."""
    status, body, headers = await service.ask("POST", path, json={"vins": vins})
    assert (status, headers["Content-Type"]) == (200, "application/jsonl")
    return [json.loads(line) for line in body.splitlines()]


async def test_batch_answers_line_by_line_in_order(service: Service) -> None:
    """Hits, misses, undecodable and bad VINs come in the order given; duplicates get the same line, however written."""
    await service.lookup(OTHER_TRUCK)
    given = [TRUCK, "short", OTHER_TRUCK, UNKNOWN, TRUCK, f" {TRUCK.lower()}\n", "É" * 17, "short", trucks(1)[0]]
    for path, cached in (("/lookup/batch", False), ("/api/v1/lookup/batch", True)):
        lines = await batch(service, given, path)
        singles = {vin: (await service.lookup(vin))[1] for vin in (TRUCK, OTHER_TRUCK, UNKNOWN, trucks(1)[0])}
        refused = {"status": 422, "detail": "A VIN is 17 letters and digits, A to Z and 0 to 9"}
        fresh = {"cached_result": cached}
        assert lines == [
            singles[TRUCK] | fresh,
            {"vin": "short"} | refused,
            singles[OTHER_TRUCK],
            singles[UNKNOWN] | fresh | {"status": 404},
            singles[TRUCK] | fresh,
            singles[TRUCK] | fresh,
            {"vin": "É" * 17} | refused,
            {"vin": "short"} | refused,
            singles[trucks(1)[0]] | fresh,
        ]
    assert service.vpic.calls == [[OTHER_TRUCK], [TRUCK, UNKNOWN, trucks(1)[0]]]


async def test_thousand_cold_vins_reach_vpic_in_twenty_calls(service: Service) -> None:
    """Misses are asked 50 at a time, at most half of VPIC_CONCURRENCY at once, and are hits ever after."""
    service.vpic.delay = 0.05
    vins = trucks(1000)
    assert [line["vin"] for line in await batch(service, vins)] == vins
    assert [len(call) for call in service.vpic.calls] == [50] * 20
    assert service.vpic.most_under_way == 4
    assert all(line["cached_result"] for line in await batch(service, vins))
    assert len(service.vpic.calls) == 20


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

    async def fault(_: web.Request, asked: list[str]) -> web.StreamResponse:
        return web.Response(status=403) if vins[60] in asked else web.json_response(envelope(*map(flat, asked)))

    service.vpic.fault = fault
    lines = await batch(service, vins)
    assert [line["vin"] for line in lines] == vins
    assert [line.get("status", 200) for line in lines] == [200] * 50 + [503] * 50 + [200] * 50
    assert {row["vin"] for row in service.rows()} == {*vins[:50], *vins[100:]}


async def test_vin_missing_from_an_answer_fails_alone(service: Service) -> None:
    """Answers are matched by VIN: in any order, one missing, one broken, one of a VIN that was not asked."""

    async def fault(_: web.Request, vins: list[str]) -> web.StreamResponse:
        results = [flat(vin) for vin in reversed(vins) if vin != vins[1]]
        return web.json_response(envelope(*results[:-1], flat(vins[0], Make=None), None, flat(TRUCK)))

    service.vpic.fault = fault
    vins = trucks(5)
    lines = await batch(service, vins)
    assert [(line["vin"], line.get("status", 200)) for line in lines] == [
        *zip(vins, (502, 502, 200, 200, 200), strict=True)
    ]
    assert [row["vin"] for row in service.rows()] == vins[2:]


async def test_batch_falls_back_like_a_lookup(start: Start, vpic: PlayedVpic) -> None:
    """With vPIC down, expired rows are served stale and unknown VINs offline, line by line."""
    async with start(breaker_failures=1) as service:
        await service.lookup(TRUCK)
        service.expire()
        vpic.fails(403)
        lines = await batch(service, [TRUCK, OTHER_TRUCK, UNKNOWN])
        told = [(line.get("status", 200), line["source"], line["cached_result"]) for line in lines]
        assert told == [(200, "vpic", True), (200, "offline", False), (404, "offline", False)]
        assert len(vpic.calls) == 2


async def test_batch_and_lookup_of_one_vin_share_one_call(start: Start, vpic: PlayedVpic) -> None:
    """A lookup joins a batch's call under way, and a batch that of a lookup."""
    vpic.delay = 0.3
    async with start(offline=False) as service:
        batching = asyncio.create_task(batch(service, [TRUCK, OTHER_TRUCK]))
        await until(lambda: vpic.calls)
        assert (await service.lookup(TRUCK))[0] == 200
        assert len(await batching) == 2
        [vin] = trucks(1)
        looking = asyncio.create_task(service.lookup(vin))
        await until(lambda: len(vpic.calls) == 2)
        assert (await batch(service, [vin]))[0]["vin"] == vin
        assert (await looking)[0] == 200
        assert vpic.calls == [[TRUCK, OTHER_TRUCK], [vin]]


async def test_lookup_in_a_batchs_call_waits_no_longer_than_its_own_deadline(start: Start, vpic: PlayedVpic) -> None:
    """The batch's call may take VPIC_BATCH_TIMEOUT; a lookup that joined it falls back after VPIC_TIMEOUT."""
    vpic.delay = 3
    async with start(vpic_timeout=0.3, vpic_batch_timeout=20, offline=False) as service:
        batching = asyncio.create_task(batch(service, [TRUCK, OTHER_TRUCK]))
        await until(lambda: vpic.calls)
        assert (await service.lookup(TRUCK))[0] == 504
        assert not batching.done()
        assert [line["make"] for line in await batching] == ["PETERBILT", "KENWORTH"]


async def test_caller_that_hangs_up_stops_the_calls_not_yet_made(start: Start, vpic: PlayedVpic) -> None:
    """What was under way when the caller left is cached; the rest of its batch is never asked."""
    vpic.delay = 0.3
    async with start(vpic_concurrency=4) as service:
        leaving = asyncio.create_task(batch(service, trucks(500)))
        await until(lambda: len(vpic.calls) == 2)
        leaving.cancel()
        await until(lambda: len(service.rows()) == 100)
        await asyncio.sleep(0.5)
        assert len(vpic.calls) == 2


async def test_batch_leaves_room_for_lookups(start: Start, vpic: PlayedVpic) -> None:
    """While a cold batch has all the places it may have, a single lookup goes straight to vPIC."""
    vpic.delay = 0.5
    async with start(vpic_concurrency=4) as service:
        batching = asyncio.create_task(batch(service, trucks(400)))
        await until(lambda: len(vpic.calls) == 2)
        assert (await service.lookup(TRUCK))[0] == 200
        assert not batching.done()
        batching.cancel()


async def test_lines_stream_as_soon_as_each_can_be_told(start: Start, vpic: PlayedVpic) -> None:
    """The lines before a VIN that takes its time are there before it is."""
    async with start() as service:
        await service.lookup(TRUCK)
        vpic.hangs()
        async with service.client.post("/lookup/batch", json={"vins": [TRUCK, "bad", OTHER_TRUCK]}) as response:
            assert json.loads(await response.content.readline())["vin"] == TRUCK
            assert json.loads(await response.content.readline())["status"] == 422


# ======================================================================================================================
# The file and the processes at their worst.
# ======================================================================================================================

NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")

HOLD = """
import sqlite3, sys
other = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
other.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""

# Rows of `?2` random bytes each, which Parquet can't make small.
FILL = """
WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1)
INSERT INTO vehicles
SELECT printf('1XPWD40X1ED%06d', i), 'PETERBILT', '', '', '', '', hex(randomblob(?2)), '', 'vpic', 1, unixepoch(), ?3
FROM n
"""


def fill(database: Path, count: int, size: int = 100, expires_in: float = 1000) -> None:
    """Put rows into the file from outside, made if need be; `trucks(count, 0)` are theirs."""
    with sqlite3.connect(database, timeout=20) as connection:
        connection.executescript((HERE / "schema.sql").read_text(encoding="utf-8"))
        connection.execute(FILL, (count, size, int(time.time() + expires_in)))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


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


def cache_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [message for message in messages if message.startswith("cache ")]


async def were_cached(service: Service, given: list[str]) -> list[bool]:
    """Whether each VIN was cached; all are decoded."""
    return [line["cached_result"] for line in await batch(service, given)]


async def test_lookups_answer_uncached_while_another_process_holds_the_lock(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a lock, hits answer at once, ten misses share one BUSY_TIMEOUT, nothing is removed; then all is well."""
    async with start(offline=False, busy_timeout=1) as service:
        await service.lookup(TRUCK)
        with locked(service.database):
            async with asyncio.timeout(6):  # one after another, ten stores would take ten seconds
                misses = [asyncio.create_task(service.lookup(vin)) for vin in trucks(10)]
                await until(lambda: len(vpic.calls) == 11)
                assert [(await service.lookup(TRUCK))[1]["cached_result"] for _ in range(5)] == [True] * 5
                assert not any(miss.done() for miss in misses)
                assert {(status, body["cached_result"]) for status, body in await asyncio.gather(*misses)} == {
                    (200, False)
                }
            status, body = await service.delete(f"/remove/{TRUCK}")
            assert (status, list(body)) == (503, ["detail"])
            assert [row["vin"] for row in service.rows()] == [TRUCK]
            assert len(cache_warnings(caplog)) == 1
        await batch(service, trucks(10))  # misses, but for a store that was given up on and made it after all
        assert await were_cached(service, trucks(10)) == [True] * 10
        assert (await service.delete(f"/remove/{trucks(1)[0]}"))[1]["cache_delete_success"] is True
        assert len(cache_warnings(caplog)) == 1


Disk = Path


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A folder; where this process may mount one, on a disk of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def pragma(service: Service, fault: str, cure: str) -> AsyncIterator[None]:
    writer = service.state["cache"]._writer
    await writer.execute_fetchall(fault)
    yield
    await writer.execute_fetchall(cure)


@asynccontextmanager
async def read_only(service: Service) -> AsyncIterator[None]:
    async for _ in pragma(service, "PRAGMA query_only = ON", "PRAGMA query_only = OFF"):
        yield


@asynccontextmanager
async def full_file(service: Service) -> AsyncIterator[None]:
    async for _ in pragma(service, "PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000"):
        yield


@asynccontextmanager
async def full_disk(service: Service) -> AsyncIterator[None]:
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
    shutil.rmtree(service.database.parent)
    yield
    service.database.parent.mkdir()


WriteFault = Callable[[Service], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize(
    ("fault", "warm", "removes"),
    [
        pytest.param(read_only, True, 503, id="read-only"),
        pytest.param(full_file, True, 200, id="full file"),  # to delete a row takes no space in it
        pytest.param(full_disk, True, 503, id="full disk"),
        pytest.param(no_folder, False, 503, id="folder gone"),
    ],
)
async def test_lookups_answer_uncached_while_the_file_cannot_be_written(
    start: Start,
    vpic: PlayedVpic,
    disk: Disk,
    fault: WriteFault,
    warm: bool,
    removes: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A full disk or a lost right costs warmth only: one warning, no false removal, and caching resumes by itself."""
    database = disk / "folder" / "cache.db"
    database.parent.mkdir()
    async with start(offline=False, database=database) as service:
        await service.lookup(TRUCK)
        async with fault(service):
            for _ in range(3):
                assert await were_cached(service, trucks(50)) == [False] * 50
            assert (await service.lookup(TRUCK))[1]["cached_result"] is warm
            assert len(vpic.calls) == (4 if warm else 5)
            status, body = await service.get("/readyz")
            assert (status, body["status"]) == (503, "unavailable")
            assert "cannot be written" in body["cache"]
            assert len([message for message in cache_warnings(caplog) if "written" in message]) == 1
            assert len(cache_warnings(caplog)) <= 2  # a file that is gone can't be read either
            status, body = await service.delete(f"/remove/{TRUCK}")
            assert (status, body.get("cache_delete_success")) == (removes, True if removes == 200 else None)
        assert (await service.get("/readyz"))[0] == 200
        assert {row["vin"] for row in service.rows()} == ({TRUCK} if warm and removes == 503 else set())
        assert await were_cached(service, trucks(50)) == [False] * 50
        assert await were_cached(service, trucks(50)) == [True] * 50


def overwrite(data: bytes, at: int = 0) -> Callable[[Path], None]:
    def damage(database: Path) -> None:
        with database.open("r+b") as file:
            file.seek(at)
            file.write(data)

    return damage


def truncate(size: int) -> Callable[[Path], None]:
    return lambda database: os.truncate(database, size)


def put_in_place(data: bytes) -> Callable[[Path], None]:
    def damage(database: Path) -> None:
        other = database.with_name("other")
        other.write_bytes(data)
        other.rename(database)

    return damage


NOISE = b"noise" * 50_000

Damage = Callable[[Path], None]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(put_in_place(NOISE), id="not a database"),
        pytest.param(put_in_place(b"no database\n" * 100), id="a text"),
        pytest.param(overwrite(NOISE, 100), id="torn schema"),
        pytest.param(truncate(100), id="truncated to its header"),
        pytest.param(truncate(2**18), id="truncated in the middle"),
    ],
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
        [warning] = cache_warnings(caplog)
        assert str(aside) in warning
        assert f" {database}" in warning


async def test_an_empty_file_is_a_new_database(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of no bytes, as `touch` or `mktemp` makes it, becomes the cache without a warning."""
    (tmp_path / "cache.db").touch()
    async with start() as service:
        await service.lookup(TRUCK)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
    assert not cache_warnings(caplog)
    assert [path.name for path in tmp_path.glob("cache*")] == ["cache.db"]


@pytest.mark.parametrize(
    ("damage", "aside"),
    [
        pytest.param(overwrite(NOISE), 1, id="overwritten"),
        pytest.param(overwrite(NOISE, 2**18), 1, id="torn in the middle"),
        pytest.param(truncate(2**18), 1, id="truncated in the middle"),
        pytest.param(truncate(0), 1, id="truncated to nothing"),
        pytest.param(put_in_place(NOISE), 1, id="noise put in its place"),
        pytest.param(Path.unlink, 0, id="deleted"),
    ],
)
async def test_a_file_damaged_while_running_is_moved_aside(
    start: Start, vpic: PlayedVpic, tmp_path: Path, damage: Damage, aside: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Every lookup is answered, from vPIC where the file fails; a fresh cache takes its place, a warning names both."""
    database = tmp_path / "cache.db"
    fill(database, 10_000, 200)
    async with start(offline=False) as service:
        assert await were_cached(service, [TRUCK, *trucks(3, 0)]) == [False, True, True, True]
        damage(database)
        await were_cached(service, trucks(10_000, 0)[::7])
        await were_cached(service, [OTHER_TRUCK])  # something to store
        damaged = sorted(tmp_path.glob("cache.db.damaged-*Z"))
        assert len(damaged) == aside
        assert await were_cached(service, trucks(50)) == [False] * 50
        assert await were_cached(service, trucks(50)) == [True] * 50
        assert (await service.get("/readyz"))[0] == 200
        told = "\n".join(cache_warnings(caplog))
        assert all(str(path) in told and f" {database}" in told for path in damaged)
        assert {row["vin"] for row in service.rows()} >= {*trucks(50)}
    assert len(cache_warnings(caplog)) <= 2
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def prepare(database: Path, *statements: str) -> bytes:
    """An SQLite file made by these statements; its bytes."""
    with sqlite3.connect(database) as connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()
    return database.read_bytes()


async def test_an_older_schema_of_ours_is_rebuilt(
    start: Start, vpic: PlayedVpic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that an older version made starts anew under this version's schema."""
    prepare(
        tmp_path / "cache.db",
        f"PRAGMA application_id = {main.APPLICATION_ID}",
        "CREATE TABLE vehicles (vin TEXT PRIMARY KEY, make TEXT)",
        "INSERT INTO vehicles VALUES ('1XPWD40X1ED215307', 'OLD')",
    )
    async with start() as service:
        assert [(await service.lookup(TRUCK))[1]["cached_result"] for _ in range(2)] == [False, True]
        assert [row["make"] for row in service.rows()] == ["PETERBILT"]
    assert [message.split(":")[0] for message in cache_warnings(caplog)] == ["cache rebuilt"]


# Root may do everything; without these two rights it may do what the file's mode says, as anybody.
AS_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
NEEDS_SETPRIV = pytest.mark.skipif(bool(AS_ANYBODY and not shutil.which("setpriv")), reason="no setpriv for root")


def newer(folder: Path) -> Path:
    prepare(folder / "cache.db", f"PRAGMA application_id = {main.APPLICATION_ID}", "PRAGMA user_version = 99")
    return folder / "cache.db"


def foreign(folder: Path) -> Path:
    prepare(folder / "cache.db", "PRAGMA journal_mode = WAL", "CREATE TABLE vehicles (vin)")
    return folder / "cache.db"


def foreign_and_crashed(folder: Path) -> Path:
    """What its owner wrote last is still in the -wal."""
    with closing(sqlite3.connect(folder / "other.db", isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("CREATE TABLE notes (text)")
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"other.db{suffix}", folder / f"cache.db{suffix}")
    return folder / "cache.db"


def without_right_to_folder(folder: Path) -> Path:
    folder.chmod(0o555)
    return folder / "cache.db"


def without_right_to_file(folder: Path) -> Path:
    fill(folder / "cache.db", 1)
    (folder / "cache.db").chmod(0o444)
    return folder / "cache.db"


@pytest.mark.parametrize(
    ("prepared", "says"),
    [
        pytest.param(newer, "newer", id="newer schema"),
        pytest.param(foreign, "not one of vincache's", id="foreign SQLite file"),
        pytest.param(foreign_and_crashed, "not one of vincache's", id="foreign SQLite file with a -wal"),
        pytest.param(lambda folder: folder / "none" / "cache.db", "cannot be opened", id="no such folder"),
        pytest.param(lambda folder: folder, "cannot be opened", id="a folder"),
        pytest.param(lambda _: Path("/proc/cache.db"), "cannot be opened", id="no file can be there"),
        pytest.param(without_right_to_folder, "cannot be opened", id="no right to folder", marks=NEEDS_SETPRIV),
        pytest.param(without_right_to_file, "cannot be opened", id="no right to file", marks=NEEDS_SETPRIV),
    ],
)
async def test_a_file_that_cannot_be_the_cache_stops_the_start_untouched(
    launch: Launch, tmp_path: Path, prepared: Callable[[Path], Path], says: str
) -> None:
    """The process ends by itself, its log ends with one sentence that names the path, nothing was changed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    database = prepared(folder)
    before = database.read_bytes() if database.is_file() else b""
    process = launch(database=database, through=AS_ANYBODY)
    assert await process.ended(seconds=20) not in (0, None)
    folder.chmod(0o755)
    [sentence] = [line for line in process.log.read_text().splitlines()[-3:] if line and "exiting" not in line.lower()]
    assert f" {database} " in sentence
    assert says in sentence
    assert (database.read_bytes() if database.is_file() else b"") == before


async def ask(url: str, method: str = "GET") -> tuple[int, Any]:
    """One request on a connection of its own, so that any worker may get it."""
    async with aiohttp.ClientSession() as client, client.request(method, url) as response:
        return response.status, await response.json()


async def test_every_answer_before_a_kill_is_in_the_cache(launch: Launch, tmp_path: Path) -> None:
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
        with sqlite3.connect(tmp_path / "cache.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert answered <= {vin for (vin,) in connection.execute("SELECT vin FROM vehicles")}
        connection.close()


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


GRACE = ("--timeout-graceful-shutdown", "3")


@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["one process", "two workers"])
async def test_sigterm_lets_requests_in_flight_be_answered(
    launch: Launch, vpic: PlayedVpic, workers: tuple[str, ...]
) -> None:
    """Under load, those in flight get their answers, new ones are refused, and the process ends."""
    process = await launch(*GRACE, *workers).started()
    vpic.delay = 0.5
    asking = [asyncio.create_task(ask(f"{process.url}/lookup/{vin}")) for vin in trucks(8)]
    await until(lambda: len(vpic.calls) == 8)
    process.signal(signal.SIGTERM)
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * 8
    assert await process.ended() in (0, -signal.SIGTERM)
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(f"{process.url}/healthz")


@asynccontextmanager
async def slow_reader(port: int) -> AsyncIterator[asyncio.StreamReader]:
    """A client that asks for the export and reads no more than its first bytes."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    try:
        writer.write(b"GET /export HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readline(), 20)
        yield reader
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_sigterm_ends_the_process_despite_a_slow_reader(launch: Launch, tmp_path: Path) -> None:
    """Whoever reads an export too slowly is cut off when the grace period ends."""
    fill(tmp_path / "cache.db", 20_000, 500)
    process = await launch("--timeout-graceful-shutdown", "1").started()
    async with slow_reader(process.port):
        process.signal(signal.SIGTERM)
        assert await process.ended() in (0, -signal.SIGTERM)


async def test_four_workers_share_one_file(launch: Launch, tmp_path: Path) -> None:
    """They start at once, what one has cached all can answer, and 1,000 mixed lookups and removes lose nothing."""
    process = await launch("--workers", "4", vpic_url="", busy_timeout=20).started()
    await until(lambda: process.log.read_text().count("Application startup complete") == 4)
    assert process.log.read_text().count(f"SQLite {sqlite3.sqlite_version}") == 4
    places = asyncio.Semaphore(20)

    async def live(number: int, vin: str) -> None:
        async with places:
            assert (await ask(f"{process.url}/lookup/{vin}"))[0] == 200
            if number % 2:
                assert await ask(f"{process.url}/remove/{vin}", "DELETE") == (
                    200,
                    {"vin": vin, "cache_delete_success": True},
                )
            else:
                assert (await ask(f"{process.url}/lookup/{vin}"))[1]["cached_result"] is True

    every = trucks(500)
    await asyncio.gather(*(live(number, vin) for number, vin in enumerate(every)))
    assert [(await ask(f"{process.url}/lookup/{every[0]}"))[1]["cached_result"] for _ in range(20)] == [True] * 20
    log = process.log.read_text()
    assert "locked" not in log
    assert "Traceback" not in log
    with sqlite3.connect(tmp_path / "cache.db") as connection:
        assert [vin for (vin,) in connection.execute("SELECT vin FROM vehicles ORDER BY vin")] == every[::2]
    connection.close()
    process.signal(signal.SIGTERM)
    assert await process.ended() == 0


async def test_only_the_first_of_several_workers_moves_a_damaged_file(tmp_path: Path) -> None:
    """The others see that the path no longer leads to the file that failed them, and join the fresh one."""
    database = tmp_path / "cache.db"
    fill(database, 10_000, 200)
    async with main.Cache(database, 2) as first, main.Cache(database, 2) as second:
        overwrite(NOISE, 2**18)(database)
        for cache in (first, second):
            assert await cache.records(trucks(10_000, 0)) == {}
        [aside] = tmp_path.glob("cache.db.damaged-*Z")
        assert Path(f"{aside}-wal").exists()  # which the second still has open
        assert Path(f"{aside}-shm").exists()
        decoded = main.Decoded(TRUCK, "PETERBILT", "388", "2014", "Truck-Tractor", "0", "", "")
        for writer, reader, vin in ((first, second, TRUCK), (second, first, OTHER_TRUCK)):
            record = main.Record(*decoded._replace(vin=vin), "vpic", 1, 0, 0)
            await writer.store([record])
            assert await reader.records([vin]) == {vin: record}


async def test_workers_replace_a_damaged_file_once_for_all(launch: Launch, tmp_path: Path) -> None:
    """Several workers find the file damaged; every lookup is answered, and all go on with the same fresh file."""
    database = tmp_path / "cache.db"
    fill(database, 10_000, 200)
    process = await launch("--workers", "4", vpic_url="", busy_timeout=20).started()
    await until(lambda: process.log.read_text().count("Application startup complete") == 4)
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
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def exports_held() -> int:
    """How many exports lie in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[4] for line in lines if "memfd:export" in line})


@NEEDS_PROC
async def test_slow_readers_of_exports_delay_no_lookup_and_share_what_they_read(start: Start) -> None:
    """Twenty at once hold two exports in memory, lookups go on, and the clients that hang up free what they held."""
    async with start(export_limit="") as service:
        fill(service.database, 20_000, 500)
        readers = [slow_reader(service.port) for _ in range(20)]
        await asyncio.gather(*(reader.__aenter__() for reader in readers))
        assert 1 <= exports_held() <= 2
        async with asyncio.timeout(20):  # the readers would keep it for ever
            assert await were_cached(service, [*trucks(50), *trucks(50, 0)]) == [False] * 50 + [True] * 50
            assert (await service.delete(f"/remove/{trucks(1)[0]}"))[0] == 200
        assert 1 <= exports_held() <= 2
        await asyncio.gather(*(reader.__aexit__(None, None, None) for reader in readers))
        await until(lambda: exports_held() == 0)
        assert (await service.get("/export"))[0] == 200


COLUMNS = ["vin", "make", "model", "model_year", "body_class", "error_code", "error_text", "suggested_vin", "source"]
SCHEMA = [*((name, pa.string()) for name in COLUMNS), ("decoded", pa.bool_())]
SCHEMA += [("fetched_at", pa.timestamp("s", "UTC")), ("expires_at", pa.timestamp("s", "UTC"))]


async def read_export(service: Service) -> pd.DataFrame:
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


async def test_the_export_equals_the_table(start: Start) -> None:
    """Every row is in it, expired, undecodable and offline ones too; what is empty has the same columns and types."""
    async with start(vpic_url="") as service:
        assert (await read_export(service)).empty
        for vin in (TRUCK, OTHER_TRUCK, UNKNOWN):
            await service.lookup(vin)
        service.expire(OTHER_TRUCK)
        service.change("UPDATE vehicles SET make = '\U0001f69a \"É\n', source = 'vpic' WHERE vin = ?", TRUCK)
        fill(service.database, 100_000, 10)  # more than one batch
        rows = service.rows()
        table = pd.DataFrame(map(tuple, rows), columns=rows[0].keys())
        assert set(table["decoded"]) == {0, 1}
        for name in ("fetched_at", "expires_at"):
            table[name] = pd.to_datetime(table[name], unit="s", utc=True)
        table["decoded"] = table["decoded"].astype(bool)
        exported = (await read_export(service)).sort_values("vin", ignore_index=True)
        pd.testing.assert_frame_equal(exported, table, check_dtype=False, check_column_type=False)


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
    with suppress(OSError):
        return any("memfd:export" in os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


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
            await until(service.state["exporter"]._building.locked)
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
        await until(lambda: not Path(f"/proc/{pid}").exists())
        assert len(await read_export(service)) == 100_000  # nobody was waiting for the one that died
    assert exporting(here) == []


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


async def test_an_export_that_finds_damage_has_the_file_replaced(tmp_path: Path) -> None:
    """The export is refused with a sentence, the damaged file moved aside; the next export is of the fresh one."""
    fill(tmp_path / "cache.db", 10_000, 200)
    # Without the service, whose sweeping may find the damage first.
    async with main.Cache(tmp_path / "cache.db", 2) as cache, main.Exporter(cache) as exporter:
        overwrite(NOISE, 2**18)(tmp_path / "cache.db")
        with pytest.raises(main.ExportFailed, match="ask again"):
            await exporter.parquet()
        assert len(list(tmp_path.glob("cache.db.damaged-*Z"))) == 1
        assert pd.read_parquet(io.BytesIO(await exporter.parquet())).empty


async def test_rows_expired_for_long_are_deleted(start: Start) -> None:
    """KEEP_EXPIRED after their expiry rows go, in bites between which lookups are answered; all others stay."""
    async with start(keep_expired=10) as service:
        fill(service.database, 2500, 10, expires_in=-20)
        service.change("UPDATE vehicles SET expires_at = ? WHERE vin LIKE '%7'", int(time.time()) - 1)
        await service.lookup(TRUCK)
        async with asyncio.timeout(20):
            while len(service.rows()) > 251:
                assert (await service.lookup(TRUCK))[0] == 200
        assert {row["vin"] for row in service.rows()} == {TRUCK, *trucks(2500, 0)[7::10]}


async def test_readyz_tells_of_the_cache_and_of_vpic(start: Start, vpic: PlayedVpic) -> None:
    """GET and HEAD: 200 while the cache can be read and written, whatever vPIC does; else 503 with the reason."""
    ok = {"status": "ok", "cache": "ok", "vpic": "ok"}

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
        with locked(service.database):
            status, body = await readyz(service)
            assert (status, body["status"], body["vpic"]) == (503, "unavailable", "ok")
            assert "locked" in body["cache"]
        vpic.fails(403)
        await service.lookup(TRUCK)
        status, body = await readyz(service)
        assert (status, body["cache"]) == (200, "ok")
        assert re.fullmatch(r"open since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body["vpic"])
        assert [row["vin"] for row in service.rows()] == [TRUCK]


# ======================================================================================================================
# vPIC at its worst: the faults, then one test or table for each promise.
# ======================================================================================================================


def a_truck(number: int) -> str:
    """One of a million."""
    return trucks(1, number)[0]


def honest(vin: str, **changed: Any) -> bytes:
    return json.dumps(envelope(flat(vin, **changed))).encode()


def says(body: Callable[[str], bytes | str], status: int = 200, **headers: str) -> Fault:
    """A fault: this response, made from the VIN asked."""

    async def fault(_: web.Request, vins: list[str]) -> web.Response:
        made = body(vins[0])
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


async def answers(_: web.Request, vins: list[str]) -> web.Response:
    return web.json_response(envelope(*map(flat, vins)))


async def resets(request: web.Request, _: list[str]) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def hangs(_: web.Request, __: list[str]) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


async def drips(request: web.Request, vins: list[str]) -> web.StreamResponse:
    """An honest answer, a byte at a time: no byte is late, but all of them are."""
    response = web.StreamResponse()
    await response.prepare(request)
    for byte in honest(vins[0]):
        await response.write(bytes([byte]))
        await asyncio.sleep(0.05)
    return response


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
    assert request.transport is not None
    request.transport.write(b"220 mail ready\r\n\r\n")  # type: ignore[attr-defined]
    request.transport.close()
    return web.Response()


def in_turn(vpic: PlayedVpic, *faults: Fault) -> None:
    """The next calls get these, one each; the last one is for all that follow."""
    left = [*faults]

    async def fault(request: web.Request, vins: list[str]) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request, vins)

    vpic.fault = fault


def holds(vpic: PlayedVpic, then: Fault = answers) -> asyncio.Event:
    """Calls wait for the event."""
    go = asyncio.Event()

    async def fault(request: web.Request, vins: list[str]) -> web.StreamResponse:
        await go.wait()
        return await then(request, vins)

    vpic.fault = fault
    return go


def asking(service: Service, vins: Iterable[str]) -> list[asyncio.Task[tuple[int, Any, Any]]]:
    """Lookups at once: tasks for status, body and headers."""
    return [asyncio.create_task(service.ask("GET", f"/lookup?vin={vin}")) for vin in vins]


def words(service: Service) -> list[dict[str, Any]]:
    """The rows without their `expires_at`, which serving a stale row moves."""
    return [{key: value for key, value in dict(row).items() if key != "expires_at"} for row in service.rows()]


def read(path: Path) -> str:
    return path.read_text()


async def breaker(service: Service) -> str:
    return (await service.get("/readyz"))[1]["vpic"]


@asynccontextmanager
async def asked(process: Process, database: Path, vpic: PlayedVpic) -> AsyncIterator[Service]:
    """A launched service, to be asked like one of this process."""
    await process.started()
    async with aiohttp.ClientSession(process.url) as client:
        yield Service(client, database, vpic, process.port, {})


# -- One flight --------------------------------------------------------------------------------------------------------


async def test_500_concurrent_lookups_of_one_vin_ask_vpic_once(service: Service, vpic: PlayedVpic) -> None:
    """They share one call and its answer, and none of them calls it cached."""
    vpic.delay = 1.5  # all must have come by then
    got = await asyncio.gather(*asking(service, [TRUCK] * 500))
    assert {status for status, _, _ in got} == {200}
    assert {body["cached_result"] for _, body, _ in got} == {False}
    assert vpic.calls == [[TRUCK]]


@pytest.mark.parametrize("leaving", [[0], [0, 1, 2], [0, 1, 2, 3]], ids=["first", "most", "all"])
async def test_callers_leaving_cancel_nothing_for_the_others(
    service: Service, vpic: PlayedVpic, leaving: list[int]
) -> None:
    """Those who stay get the answer of the one call, and it is cached even if all have left."""
    go = holds(vpic)
    callers = asking(service, [TRUCK])
    await until(lambda: vpic.calls)
    callers += asking(service, [TRUCK] * 3)
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


async def test_a_batch_that_leaves_cancels_nothing_for_a_lookup(service: Service, vpic: PlayedVpic) -> None:
    """Whoever joined its flight gets the answer of the one call."""
    go = holds(vpic)
    batch = asyncio.create_task(service.post("/lookup/batch", {"vins": [TRUCK, OTHER_TRUCK]}))
    await until(lambda: vpic.calls)
    [caller] = asking(service, [TRUCK])
    await asyncio.sleep(0.1)
    batch.cancel()
    await asyncio.wait([batch])
    await asyncio.sleep(0.2)  # for the service to see it leave
    go.set()
    assert (await caller)[0] == 200
    assert vpic.calls == [[TRUCK, OTHER_TRUCK]]


async def test_failure_is_shared_and_the_next_lookup_asks_again(service: Service, vpic: PlayedVpic) -> None:
    """All who wait get the failure of the one call, nothing is cached, and a later lookup is none the worse for it."""
    go = holds(vpic, refuses(403))
    callers = asking(service, [TRUCK] * 50)
    await until(lambda: vpic.calls)
    await asyncio.sleep(0.3)
    go.set()
    got = await asyncio.gather(*callers)
    assert [(status, body["vin"]) for status, body, _ in got] == [(503, TRUCK)] * 50
    assert (vpic.calls, service.rows()) == ([[TRUCK]], [])
    vpic.recovers()
    assert (await service.lookup(TRUCK))[0] == 200
    assert vpic.calls == [[TRUCK]] * 2


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
        [slow] = asking(service, [TRUCK])
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
        in_turn(vpic, refuses(429, 1), hangs)
        began = time.monotonic()
        assert (await service.lookup(TRUCK))[0] == 504
        assert time.monotonic() - began < 2.7  # a deadline for each attempt would make it 3
        assert vpic.calls == [[TRUCK]] * 2


async def test_a_lookup_that_joins_a_batch_keeps_its_own_deadline(start: Start, vpic: PlayedVpic) -> None:
    """It does not wait as long as the batch may, which goes on without it."""
    async with start(vpic_timeout=0.5, vpic_batch_timeout=60, offline=False) as service:
        go = holds(vpic)
        batch = asyncio.create_task(service.post("/lookup/batch", {"vins": [TRUCK, OTHER_TRUCK]}))
        await until(lambda: vpic.calls)
        async with asyncio.timeout(20):
            assert (await service.lookup(TRUCK))[0] == 504
        go.set()
        lines = (await batch)[1].decode().splitlines()
        assert [json.loads(line)["source"] for line in lines] == ["vpic"] * 2
        assert vpic.calls == [[TRUCK, OTHER_TRUCK]]


# -- Retries that help -------------------------------------------------------------------------------------------------

RETRIES: dict[str, tuple[list[Fault], int, int, tuple[int, int] | None]] = {
    # name: what vPIC does in turn, the status, the calls, and what our Retry-After lies between
    "reset": ([resets], 502, 3, None),
    "reset-then-ok": ([resets, answers], 200, 2, None),
    "half-a-body-then-ok": ([gives_half, answers], 200, 2, None),
    "500": ([refuses(500)], 502, 3, None),
    "500-then-ok": ([refuses(500), answers], 200, 2, None),
    "503": ([refuses(503)], 503, 3, None),
    "503-too-long": ([refuses(503, 90)], 503, 1, (90, 90)),
    "503-date-too-far": ([refuses(503, 90, date=True)], 503, 1, (80, 90)),
    "503-zero": ([refuses(503, 0)], 503, 3, (1, 1)),
    "429": ([refuses(429)], 503, 1, None),
    "429-unreadable": ([refuses(429, "soon")], 503, 1, None),
    "429-too-long": ([refuses(429, 90)], 503, 1, (90, 90)),
    "429-date-too-far": ([refuses(429, 90, date=True)], 503, 1, (80, 90)),
    "429-waits-then-too-long": ([refuses(429, 1), refuses(429, 90)], 503, 2, (90, 90)),
    "429-endless": ([refuses(429, "9" * 400)], 503, 1, (10**399, 10**400)),
    "400": ([refuses(400)], 502, 1, None),
    "403": ([refuses(403)], 503, 1, None),
    "404": ([refuses(404)], 502, 1, None),
    "redirect": (
        [says(lambda vin: "", 302, Location=f"/api/vehicles/DecodeVinValues/{TRUCK}?format=json"), answers],
        502,
        1,
        None,
    ),
    "unusable": ([says(lambda vin: "<html>")], 502, 1, None),
}


@pytest.mark.parametrize(("faults", "status", "calls", "retry_after"), RETRIES.values(), ids=RETRIES)
async def test_retries_where_they_help_and_only_there(
    start: Start, vpic: PlayedVpic, faults: list[Fault], status: int, calls: int, retry_after: tuple[int, int] | None
) -> None:
    """What may pass in a moment is tried three times at most, and a Retry-After is kept to, or passed on."""
    async with start(offline=False, vpic_timeout=6) as service:
        in_turn(vpic, *faults)
        got, body, headers = await service.ask("GET", f"/lookup?vin={TRUCK}")
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
    in_turn(vpic, refuses(status, seconds, date), answers)
    began = time.monotonic()
    assert (await service.lookup(TRUCK))[0] == 200
    assert time.monotonic() - began > 0.9  # a date has whole seconds: two from now may be little more than one
    assert vpic.calls == [[TRUCK]] * 2


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
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/api"
    async with start(offline=False, vpic_url=url) as service:
        assert (await service.lookup(TRUCK))[0] == 502
        assert caplog.text.count(f"vPIC call failed: {TRUCK}: ") == 3
        assert service.rows() == []


# -- A breaker ---------------------------------------------------------------------------------------------------------


async def test_breaker_opens_after_failures_in_a_row_and_fails_over_at_once(start: Start, vpic: PlayedVpic) -> None:
    """An answer in between starts the count anew; once open, no call leaves, and hits and stale rows are served."""
    async with start(offline=False, breaker_failures=3, breaker_seconds=30) as service:
        await service.lookup(TRUCK)
        service.expire()
        in_turn(vpic, refuses(403), refuses(403), answers, refuses(403))
        numbers = iter(range(100))
        for _ in range(5):
            await service.lookup(a_truck(next(numbers)))
            assert await breaker(service) == "ok"
        await service.lookup(a_truck(next(numbers)))
        assert re.fullmatch(r"open since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", await breaker(service))

        vpic.calls.clear()
        vpic.fault = hangs
        for _ in range(20):
            status, body, headers = await service.ask("GET", f"/lookup?vin={a_truck(next(numbers))}")
            assert (status, list(body)) == (503, ["detail", "vin"])
            assert 1 <= int(headers["Retry-After"]) <= 30
        assert (await service.lookup(TRUCK))[1]["cached_result"] is True
        assert vpic.calls == []
        assert {row["vin"] for row in service.rows()} == {TRUCK, a_truck(2)}


async def test_breaker_probes_with_one_call_and_closes(start: Start, vpic: PlayedVpic) -> None:
    """A probe that fails keeps it open; while one is under way all others fail over; one that succeeds closes it."""
    async with start(offline=False, breaker_failures=2, breaker_seconds=0.5, vpic_concurrency=4) as service:
        vpic.fault = refuses(403)
        for number in range(2):
            await service.lookup(a_truck(number))
        for calls, probe in ((3, refuses(403)), (4, answers)):
            await asyncio.sleep(0.6)
            go = holds(vpic, probe)
            callers = asking(service, map(a_truck, range(10, 30)))
            await until(lambda callers=callers: sum(map(asyncio.Task.done, callers)) == 19)
            assert (await breaker(service)).startswith("open since")
            go.set()
            statuses = sorted([(await caller)[0] for caller in callers])
            assert statuses == [200 if calls == 4 else 503] + [503] * 19
            assert len(vpic.calls) == calls
        assert await breaker(service) == "ok"

        vpic.recovers()
        vpic.delay, vpic.most_under_way = 0.05, 0
        assert {(await caller)[0] for caller in asking(service, map(a_truck, range(40, 80)))} == {200}
        assert vpic.most_under_way == 4


@pytest.mark.parametrize("fault", [refuses(500), hangs], ids=["500", "hang"])
async def test_an_outage_hardly_reaches_vpic(start: Start, vpic: PlayedVpic, fault: Fault) -> None:
    """Of the lookups of an outage, all different, at most 5 % reach vPIC; all get an answer, and it ends by itself."""
    # The issue's minute at 100 lookups a second, in two seconds: the durations are a thirtieth, the pace is the same.
    async with start(offline=False, vpic_timeout=0.27, breaker_seconds=1, vpic_concurrency=2) as service:
        vpic.fault = fault
        callers = []
        for number in range(200):
            callers += asking(service, [a_truck(number)])
            await asyncio.sleep(0.01)
        assert {status for status, _, _ in await asyncio.gather(*callers)} <= {502, 503, 504}
        assert 5 <= len(vpic.calls) <= 10

        vpic.recovers()
        for number in range(200, 400):
            if (await service.lookup(a_truck(number)))[0] == 200:
                break
            await asyncio.sleep(0.05)
        assert (await service.lookup(TRUCK))[0] == 200


# -- Manners -----------------------------------------------------------------------------------------------------------


async def test_no_more_calls_at_once_than_the_settings_say(start: Start, vpic: PlayedVpic) -> None:
    """The others wait for their turn, and get it."""
    async with start(vpic_concurrency=3, offline=False) as service:
        vpic.delay = 0.05
        assert {(await caller)[0] for caller in asking(service, map(a_truck, range(20)))} == {200}
        assert (vpic.most_under_way, len(vpic.calls)) == (3, 20)


async def test_no_more_calls_a_minute_than_the_settings_say(start: Start, vpic: PlayedVpic) -> None:
    """Whoever could not have its turn before its deadline is told at once when to ask again."""
    # 8 seconds refill nothing: a minute is any minute, not a rate of 3 seconds a call.
    async with start(vpic_rate=20, vpic_timeout=8, offline=False) as service:
        got = [await caller for caller in asking(service, map(a_truck, range(25)))]
        assert sorted(status for status, _, _ in got) == [200] * 20 + [503] * 5
        assert all(50 <= int(headers["Retry-After"]) <= 60 for status, _, headers in got if status == 503)
        assert (len(vpic.calls), len(service.rows())) == (20, 20)
        assert await breaker(service) == "ok"  # no call failed


async def test_retries_count_as_calls(start: Start, vpic: PlayedVpic) -> None:
    """An attempt that the rate does not allow is not made."""
    async with start(vpic_rate=2, offline=False) as service:
        vpic.fault = refuses(500)
        assert (await service.lookup(TRUCK))[0] == 503
        assert vpic.calls == [[TRUCK]] * 2


async def test_no_turn_before_the_deadline_is_503(start: Start, vpic: PlayedVpic) -> None:
    """A lookup for which every place at vPIC stays taken is told that it was not asked, and asks again with success."""
    async with start(vpic_concurrency=1, vpic_timeout=0.5, vpic_batch_timeout=60, offline=False) as service:
        go = holds(vpic)
        batch = asyncio.create_task(service.post("/lookup/batch", {"vins": [OTHER_TRUCK, UNKNOWN]}))
        await until(lambda: vpic.calls)
        status, body = await service.lookup(TRUCK)
        assert (status, body["vin"]) == (503, TRUCK)
        assert vpic.calls == [[OTHER_TRUCK, UNKNOWN]]
        go.set()
        await batch
        assert (await service.lookup(TRUCK))[0] == 200


# -- Stale beats nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [False, True], ids=["", "though-offline-could"])
@pytest.mark.parametrize(("vin", "status"), [(TRUCK, 200), (UNKNOWN, 404)], ids=["decoded", "undecodable"])
async def test_expired_row_serves_while_vpic_cannot(
    start: Start, vpic: PlayedVpic, vin: str, status: int, offline: bool
) -> None:
    """It is told as it is; vPIC is not asked for that VIN for STALE_TTL; then it is, and its word replaces the row."""
    async with start(stale_ttl=60, offline=offline) as service:
        _, first = await service.lookup(vin)
        service.change("UPDATE vehicles SET fetched_at = fetched_at - 3000000, make = make || '?'")
        service.expire()
        old = words(service)
        vpic.fault = refuses(403)
        got, stale = await service.lookup(vin)
        assert (got, stale["cached_result"], stale["source"]) == (status, True, "vpic")
        assert stale["fetched_at"] < first["fetched_at"]
        assert stale.get("make") == (first["make"] + "?" if status == 200 else None)
        vpic.recovers()
        assert await service.lookup(vin) == (status, stale)
        assert vpic.calls == [[vin]] * 2
        assert words(service) == old
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


async def test_expired_row_is_asked_anew(service: Service, vpic: PlayedVpic) -> None:
    """With a healthy vPIC, its word of today replaces the row."""
    await service.lookup(TRUCK)
    service.expire()
    vpic.fault = says(lambda vin: honest(vin, Model="389"))
    status, body = await service.lookup(TRUCK)
    assert (status, body["model"], body["cached_result"]) == (200, "389", False)
    assert [row["model"] for row in service.rows()] == ["389"]


# -- Offline beats an error --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vin", "status"), [(TRUCK, 200), (UNKNOWN, 404)], ids=["decoded", "undecodable"])
async def test_offline_answers_stand_for_their_own_short_life(
    start: Start, vpic: PlayedVpic, vin: str, status: int
) -> None:
    """With no vPIC and no row, the VIN is decoded offline and stored; when that ends, vPIC's word replaces it."""
    async with start(offline_ttl=1800) as service:
        vpic.fault = refuses(403)
        got, first = await service.lookup(vin)
        assert (got, first["source"], first["cached_result"]) == (status, "offline", False)
        vpic.recovers()
        assert await service.lookup(vin) == (status, first | {"cached_result": True})
        assert vpic.calls == [[vin]]
        [row] = service.rows()
        assert (row["source"], row["decoded"]) == ("offline", status == 200)
        assert 1800 <= row["expires_at"] - row["fetched_at"] <= 1801

        service.expire()
        got, second = await service.lookup(vin)
        assert got == status
        assert second == first | {"source": "vpic", "fetched_at": second["fetched_at"]}
        assert vpic.calls == [[vin]] * 2
        assert [row["source"] for row in service.rows()] == ["vpic"]


async def test_offline_never_replaces_a_row_of_vpics(start: Start, vpic: PlayedVpic) -> None:
    """What another worker got of vPIC meanwhile stays."""
    async with start() as service:
        go = holds(vpic, refuses(403))
        [caller] = asking(service, [TRUCK])
        await until(lambda: vpic.calls)
        service.change(
            "INSERT INTO vehicles VALUES (?, 'PETERBILT', '388', '2014', 'Theirs', '0', '', '', 'vpic', 1, 1, 2)", TRUCK
        )
        there = words(service)
        go.set()
        assert (await caller)[1]["source"] == "offline"
        assert words(service) == there


async def test_offline_off_leaves_the_clear_error(service: Service, vpic: PlayedVpic) -> None:
    """The caller gets vPIC's failure with its Retry-After, and nothing is stored."""
    vpic.fault = refuses(429, 90)
    status, body, headers = await service.ask("GET", f"/lookup?vin={TRUCK}")
    assert (status, body["vin"], headers["Retry-After"]) == (503, TRUCK, "90")
    assert service.rows() == []


async def test_empty_url_means_offline_only(start: Start, vpic: PlayedVpic) -> None:
    """No call is made; VINs are decoded, an expired row of vPIC's serves on, an expired offline one is decoded anew."""
    async with start() as service:
        await service.lookup(OTHER_TRUCK)
        service.expire()
    vpic.calls.clear()
    async with start(vpic_url="") as service:
        for cached in (False, True):
            status, body = await service.lookup(TRUCK)
            assert (status, body["source"], body["cached_result"]) == (200, "offline", cached)
        service.expire(TRUCK)
        assert (await service.lookup(TRUCK))[1]["cached_result"] is False
        assert (await service.lookup(UNKNOWN))[0] == 404
        assert (await service.lookup(OTHER_TRUCK))[1]["source"] == "vpic"
        assert await breaker(service) == "offline"
    assert vpic.calls == []


@pytest.fixture
def without_ultravin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes launched by this test don't find the package ultravin."""
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text("import sys\nsys.modules['ultravin'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hiding"))


@pytest.mark.usefixtures("without_ultravin")
async def test_without_the_package_the_clear_error_is_left(
    tmp_path: Path, vpic: PlayedVpic, launch: Callable[..., Process]
) -> None:
    """Where ultravin is not installed, a failure of vPIC is told, and nothing is stored."""
    process = launch(vpic_timeout=1)
    async with asked(process, tmp_path / "cache.db", vpic) as service:
        for fault, told in (
            (says(lambda vin: "<html>"), (502, None)),
            (refuses(429, 90), (503, "90")),
            (hangs, (504, None)),
        ):
            vpic.fault = fault
            status, body, headers = await service.ask("GET", f"/lookup?vin={TRUCK}")
            assert ((status, headers.get("Retry-After")), body["vin"]) == (told, TRUCK)
        assert (vpic.calls, service.rows()) == ([[TRUCK]] * 3, [])
        assert "Traceback" not in read(process.log)


async def start_refused(process: Process) -> str:
    """The log of a process that ended without serving; its last word must tell the reason."""
    assert await process.ended() != 0
    log = read(process.log)
    assert " File " not in log
    return log


async def test_nothing_to_decode_with_stops_the_start(launch: Callable[..., Process]) -> None:
    """An empty URL with OFFLINE=false is refused, in a sentence that names both."""
    log = await start_refused(launch(vpic_url="", offline=False))
    assert "VINCACHE_VPIC_URL is empty and VINCACHE_OFFLINE is false" in log


@pytest.mark.usefixtures("without_ultravin")
async def test_empty_url_without_the_package_stops_the_start(launch: Callable[..., Process]) -> None:
    """An empty URL where ultravin is not installed is refused, in a sentence that names it."""
    assert "the package ultravin is not installed" in await start_refused(launch(vpic_url=""))


async def test_offline_data_is_loaded_when_first_needed(
    tmp_path: Path, vpic: PlayedVpic, launch: Callable[..., Process]
) -> None:
    """A service with a healthy vPIC never loads it."""
    process = launch()
    maps = Path(f"/proc/{process.pid}/maps")
    async with asked(process, tmp_path / "cache.db", vpic) as service:
        assert (await service.lookup(TRUCK))[0] == 200
        assert "ultravin" not in read(maps)
        vpic.fault = refuses(403)
        assert (await service.lookup(OTHER_TRUCK))[1]["source"] == "offline"
        assert "ultravin" in read(maps)


# -- Nothing wrong is cached -------------------------------------------------------------------------------------------


def without(key: str) -> Callable[[str], bytes]:
    def body(vin: str) -> bytes:
        result = flat(vin)
        del result[key]
        return json.dumps(envelope(result)).encode()

    return body


XML = '<Response xmlns="http://schemas.datacontract.org/2004/07/VPICAPI"><Count>1</Count></Response>'

WRONG: dict[str, Fault] = {
    "html": says(lambda vin: "<!DOCTYPE html><html>Scheduled maintenance</html>", Content_Type="text/html"),
    "xml": says(lambda vin: XML, Content_Type="application/xml"),
    "empty": says(lambda vin: ""),
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
    "deep": says(lambda vin: "[" * 100_000),
    "null": says(lambda vin: "null"),
    "string": says(lambda vin: '"Results"'),
    "list": says(lambda vin: b"[" + honest(vin) + b"]"),
    "no-results": says(lambda vin: '{"Count": 1}'),
    "results-null": says(lambda vin: '{"Results": null}'),
    "results-object": says(lambda vin: json.dumps({"Results": flat(vin)})),
    "results-empty": says(lambda vin: json.dumps(envelope())),
    "result-null": says(lambda vin: json.dumps(envelope(None))),
    "another-vin": says(lambda vin: honest(OTHER_TRUCK)),
    "another-vin-undecodable": says(lambda vin: honest(UNKNOWN)),
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
        before = words(service)
        vpic.fault = wrong
        assert await service.lookup(TRUCK) == (200, old | {"cached_result": True})
        assert await breaker(service) == "ok"
        status, body = await service.lookup(a_truck(1))
        assert (status, body["vin"]) == (502, a_truck(1))
        assert (await breaker(service)).startswith("open since")
        assert vpic.calls == [[TRUCK], [TRUCK], [a_truck(1)]]
        assert words(service) == before


async def test_after_a_wrong_answer_the_offline_data_serves(start: Start, vpic: PlayedVpic) -> None:
    """What is stored then is theirs, not vPIC's."""
    async with start() as service:
        vpic.fault = WRONG["another-vin"]
        assert (await service.lookup(TRUCK))[1]["source"] == "offline"
        assert vpic.calls == [[TRUCK]]
        assert [(row["vin"], row["source"]) for row in service.rows()] == [(TRUCK, "offline")]


@cache
def bomb() -> bytes:
    """290 kB of gzip that unpack to 300 MB."""
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(10**6)
    return b"".join([packer.compress(zeros) for _ in range(300)]) + packer.flush()


async def test_a_gzip_bomb_is_refused_before_it_takes_memory(
    tmp_path: Path, vpic: PlayedVpic, launch: Callable[..., Process]
) -> None:
    """It counts as a failed call, and the process never holds more than a little of it."""

    def peak() -> int:
        """The most memory the process ever had, in MB."""
        found = re.search(r"VmHWM:\s+(\d+) kB", read(Path(f"/proc/{process.pid}/status")))
        assert found is not None
        return int(found[1]) // 1024

    assert len(bomb()) < 300_000
    process = launch(offline=False)
    async with asked(process, tmp_path / "cache.db", vpic) as service:
        assert (await service.lookup(OTHER_TRUCK))[0] == 200
        vpic.calls.clear()
        before = peak()
        for status, told in ((200, 502), (404, 502), (429, 503)):
            vpic.fault = says(lambda vin: bomb(), status, Content_Encoding="gzip")
            assert (await service.lookup(TRUCK))[0] == told
            assert peak() - before < 40
        assert vpic.calls == [[TRUCK]] * 3
        assert [row["vin"] for row in service.rows()] == [OTHER_TRUCK]
        assert read(process.log).count("vPIC call failed") == 3


# -- The log -----------------------------------------------------------------------------------------------------------


async def test_log_has_a_line_per_failed_call_and_per_turn_of_the_breaker(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """VIN, what happened, how long; when the breaker opens, and when it closes; and no traceback."""
    async with start(breaker_failures=3, breaker_seconds=0.8, vpic_timeout=1.2) as service:
        in_turn(vpic, refuses(500), refuses(429, 90), hangs)
        for number in range(4):  # the last two find the breaker open: no call, no line
            await service.lookup(a_truck(number))
        vpic.recovers()
        await asyncio.sleep(1)
        await service.lookup(a_truck(4))
        await service.lookup(a_truck(5))
    lines = [record.getMessage() for record in caplog.records if "vPIC" in record.getMessage()]
    took = r" after \d+\.\d\d s"
    expected = [
        rf"vPIC call failed: {a_truck(0)}: status 500{took}",
        rf"vPIC call failed: {a_truck(0)}: status 429, Retry-After 90{took}",
        rf"vPIC call failed: {a_truck(1)}: no answer{took}",
        r"breaker open: vPIC is left alone for .*",
        r"breaker closed: vPIC answers again",
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "fault",
    [resets, talks_no_http, gives_half, says(honest, Content_Encoding="gzip"), says(lambda vin: "\n<html>\n")],
    ids=["reset", "no-http", "half-a-body", "no-gzip", "html"],
)
async def test_a_failed_call_is_one_line_whatever_vpic_said(
    start: Start, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    """Line breaks in what vPIC sent don't break the line."""
    async with start(vpic_timeout=1) as service:
        vpic.fault = fault
        assert (await service.lookup(TRUCK))[0] == 200
    [line] = [line for record in caplog.records if "vPIC" in (line := record.getMessage())]
    assert re.fullmatch(rf"vPIC call failed: {TRUCK}: .+ after \d+\.\d\d s", line)


# -- The translation ---------------------------------------------------------------------------------------------------


def test_translation_strips_and_renames() -> None:
    """Trailing blanks of older answers go; a byte order mark in front does no harm."""
    body = b"\xef\xbb\xbf" + honest(TRUCK, Make="PETERBILT ", Model=" 388\t", Other=None)
    assert main.parse(body, [TRUCK]) == {
        TRUCK: main.Decoded(TRUCK, "PETERBILT", "388", "2014", "Truck-Tractor", "0", main.CLEAN, "")
    }


@pytest.mark.parametrize("value", [None, 7, True, ["388"], {"": "388"}, "3\0", "\ud800"], ids=repr)
@pytest.mark.parametrize("key", main.VPIC_KEYS.values())
def test_translation_takes_nothing_but_text(key: str, value: object) -> None:
    """For each of the eight keys; the error names it, or the encoding."""
    with pytest.raises(ValueError, match=f"{key}|surrogates"):
        main.parse(honest(TRUCK, **{key: value}), [TRUCK])


def test_translation_of_many_leaves_out_what_is_wrong() -> None:
    """One bad result spoils only its own VIN; the order is not relied on, and what was not asked for is ignored."""
    results = [flat(OTHER_TRUCK), flat(a_truck(1)), None, flat(a_truck(2), Make=None), flat(TRUCK)]
    found = main.parse(json.dumps(envelope(*results)).encode(), [TRUCK, OTHER_TRUCK, a_truck(2)])
    assert {vin: decoded.make for vin, decoded in found.items()} == {TRUCK: "PETERBILT", OTHER_TRUCK: "KENWORTH"}


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
    assert main.translate(flat(TRUCK, Make=make, ErrorCode=codes)).decodable is decodable


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
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
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: int | None) -> None:
    """What can be read is never negative; what can't be read is as good as none."""
    assert main.retry_after_seconds(header) == seconds


def test_retry_after_may_be_a_date_to_come() -> None:
    """The seconds until then."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert main.retry_after_seconds(date) == pytest.approx(99, abs=5)


# ======================================================================================================================
# Doors and windows: what may come in, and what is told of it.
# ======================================================================================================================

# The forms in which a VIN comes in: method, route, and where the VIN stands.
WAYS_IN = [
    ("GET", "/lookup", "query"),
    ("GET", "/lookup", "path"),
    ("POST", "/lookup", "body"),
    ("DELETE", "/remove", "query"),
    ("DELETE", "/remove", "path"),
    ("POST", "/remove", "body"),
]
LOOKUPS = [form for form in WAYS_IN if form[1] == "/lookup"]
PREFIXES = ["", "/api/v1"]
POSTS = ["/lookup", "/remove", "/lookup/batch"]


async def send(service: Service, form: tuple[str, str, str], vin: str, prefix: str = "", **kwargs: Any) -> Any:
    """Status, body and headers of a request that brings `vin` in this form."""
    method, route, place = form
    encoded = quote(vin, safe="")
    path = {"query": f"?vin={encoded}", "path": f"/{encoded}", "body": ""}[place]
    if place == "body":
        kwargs["json"] = {"vin": vin}
    return await service.ask(method, yarl.URL(f"{prefix}{route}{path}", encoded=True), **kwargs)


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


def free_port() -> int:
    """A port of loopback on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def logged(caplog: pytest.LogCaptureFixture, level: int, words: str = "") -> list[str]:
    """The messages of at least this level that contain `words`."""
    return [
        record.getMessage() for record in caplog.records if record.levelno >= level and words in record.getMessage()
    ]


# ======================================================================================================================
# What counts as a VIN.
# ======================================================================================================================

BAD_VINS = {
    "16 characters": TRUCK[:16],
    "18 characters": TRUCK + "0",
    "accented letters": "É" * 17,
    "16 with a sharp s that grows in capitals": TRUCK[:15] + "ß",
    "17 with a sharp s": TRUCK[:16] + "ß",
    "a ligature that grows in capitals": TRUCK[:15] + "ﬁ",
    "white space inside": TRUCK[:8] + " " + TRUCK[9:],
    "a line break inside": TRUCK[:8] + "\n" + TRUCK[9:],
    "Arabic digits": "\u0661" * 17,
    "full-width digits": "\uff11" * 17,
    "superscript digits": "²" * 17,
    "punctuation": TRUCK[:16] + "-",
    "NUL inside": TRUCK[:16] + "\0",
    "NUL behind": TRUCK + "\0",
    "a no-break space behind": TRUCK + "\u00a0",
    "a line separator behind": TRUCK + "\u2028",
    "an information separator behind": TRUCK + "\x1c",
    "a list of two": f"{TRUCK},{OTHER_TRUCK}",
    "SQL": "' OR 1=1; --12345",
    "100 kB": "A" * 40_000,
    "blank": " ",
}


@pytest.mark.parametrize("vin", BAD_VINS.values(), ids=BAD_VINS)
async def test_what_is_no_vin_is_422_in_one_shape(service: Service, vpic: PlayedVpic, vin: str) -> None:
    """All forms under both prefixes refuse it in the same words; it is not echoed, not asked for and not stored."""
    for form in WAYS_IN:
        for prefix in PREFIXES:
            status, body, _ = await send(service, form, vin, prefix)
            fault = {"type": "vin", "loc": [form[2], "vin"], "msg": "A VIN is 17 letters and digits, A to Z and 0 to 9"}
            assert (status, body) == (422, {"detail": [fault]}), (form, prefix)
    assert (vpic.calls, service.rows()) == ([], [])


@pytest.mark.parametrize(
    "written",
    [TRUCK.lower(), f" {TRUCK}", f"{TRUCK}\r\n", f"\t\v\f{TRUCK.lower()} \n"],
    ids=["lower case", "blank before", "CR LF behind", "all kinds"],
)
async def test_ways_to_write_one_vin_share_one_row(service: Service, vpic: PlayedVpic, written: str) -> None:
    """Case and ASCII white space around a VIN make no difference, in any form."""
    for form in LOOKUPS:
        for prefix in PREFIXES:
            status, body, _ = await send(service, form, written, prefix)
            assert (status, body["vin"]) == (200, TRUCK)
    assert vpic.calls == [[TRUCK]]
    assert [row["vin"] for row in service.rows()] == [TRUCK]
    for form in WAYS_IN[3:]:
        await service.lookup(TRUCK)
        status, body, _ = await send(service, form, written)
        assert (status, body) == (200, {"vin": TRUCK, "cache_delete_success": True})


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("", "missing"),
        ("?VIN=" + TRUCK, "missing"),
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


async def test_other_keys_of_a_body_are_ignored(service: Service) -> None:
    """A POST may carry more than the VIN."""
    assert (await service.post("/lookup", {"vin": TRUCK, "make": "FORD", "x": [None]}))[1]["make"] == "PETERBILT"


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_get_does_not_remove(service: Service, prefix: str) -> None:
    """A link prefetcher can't empty the cache: GET is 405, in the shape of our errors."""
    await service.lookup(TRUCK)
    for path in (f"/remove?vin={TRUCK}", f"/remove/{TRUCK}"):
        assert await service.get(prefix + path) == (405, {"detail": "Method Not Allowed"})
    assert len(service.rows()) == 1


async def test_small_routes(service: Service) -> None:
    """`/` and `/api/v1/` lead to the documentation, /healthz answers HEAD too, other paths are 404."""
    for path, docs in (("/", "/docs"), ("/api/v1/", "/docs")):
        status, _, headers = await service.ask("GET", path, allow_redirects=False)
        assert (status, headers["Location"]) == (307, docs)
        status, page = await service.get(path)
        assert (status, b"swagger-ui" in page) == (200, True)
    for prefix in PREFIXES:
        assert await service.get(f"{prefix}/healthz") == (200, {"status": "ok"})
        assert (await service.ask("HEAD", f"{prefix}/healthz"))[:2] == (200, b"")
        assert (await service.ask("HEAD", f"{prefix}/readyz"))[:2] == (200, b"")
        assert await service.get(f"{prefix}/nowhere") == (404, {"detail": "Not Found"})


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


# ======================================================================================================================
# Settings.
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
        ("vpic_concurrency", "1.5"),
        ("vpic_rate", "0"),
        ("breaker_failures", "none"),
        ("batch_limit", "100001"),
        ("offline", "perhaps"),
        ("export_limit", "ten a minute"),
        ("lookup_limit", "10/fortnight"),
        ("private", "true"),
        ("private", "2"),
        ("log", "xml"),
    ],
)
def test_bad_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A bad value gives one line that names its variable."""
    monkeypatch.chdir(tmp_path)
    with environment(**{name: value}), pytest.raises(main.StartupError) as stopped:
        main.read_settings()
    assert re.fullmatch(rf"bad settings: .*VINCACHE_{name.upper()}\b.+", str(stopped.value))


async def test_all_bad_settings_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has made two mistakes needs one start to see them."""
    monkeypatch.chdir(tmp_path)
    with environment(ttl="x", log="y"), pytest.raises(main.StartupError, match=r"VINCACHE_TTL: .*; VINCACHE_LOG: .*"):
        main.read_settings()


BAD_STARTS = {
    "bad number": ({"ttl": "x"}, "VINCACHE_TTL"),
    "private without a key": ({"private": "true", "api_key": " , "}, "VINCACHE_API_KEY is empty"),
    "unknown storage": ({"rate_storage": "async+abacus://u:SECRET@host"}, "VINCACHE_RATE_STORAGE"),
    "blocking storage": ({"rate_storage": "memory://"}, "VINCACHE_RATE_STORAGE"),
    "storage's bad URL": ({"rate_storage": "async+redis://:SECRET@host:99999"}, "VINCACHE_RATE_STORAGE"),
    "database in no directory": ({"database": "nowhere/cache.db"}, "VINCACHE_DATABASE"),
}


async def test_bad_setting_stops_the_process(launch: Launch) -> None:
    """The process ends non-zero; the log says why in a sentence, without a stack of frames, without a password."""
    processes = {name: launch(**settings) for name, (settings, _) in BAD_STARTS.items()}
    for name, process in processes.items():
        assert await process.ended(60) != 0, name
        log = process.log.read_text()
        assert BAD_STARTS[name][1] in log, name
        assert "SECRET" not in log, name
        assert 'File "' not in log, (name, log)


async def test_settings_come_from_a_file_too(start: Start, tmp_path: Path) -> None:
    """`.env` is read, and the environment wins over it."""
    (tmp_path / ".env").write_text("VINCACHE_LOOKUP_LIMIT=1/minute\nVINCACHE_OFFLINE=false\nUNRELATED=1\n")
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
        vpic.fails(500)
        await service.lookup(OTHER_TRUCK)
    [line] = logged(caplog, logging.INFO, "settings: ")
    for name in main.Settings.model_fields:
        assert f"{name}=" in line
    assert f"vpic_url={vpic.url.replace('://', '://***@')}" in line
    assert base64.b64decode(vpic.requests[0].headers["Authorization"].split()[1]) == b"user:pass@w@rd"
    for secret in ("pass", "rd@", "sesame", "crown", "jewel"):
        assert secret not in caplog.text


# ======================================================================================================================
# A key.
# ======================================================================================================================

GUARDED = [*WAYS_IN[3:], ("GET", "/export", "query")]
WRONG_KEYS = ["", "wrong", "old,new", "ol", "oldnew", "ÖLD", "old\u00a0", "OLD"]


@pytest.mark.parametrize("form", GUARDED, ids=" ".join)
async def test_remove_and_export_want_a_key(start: Start, form: tuple[str, str, str]) -> None:
    """Each of the keys opens; none, a wrong one or a part of one is 401. Lookups stay open."""
    async with start(api_key=" old ,, new,", export_limit="") as service:
        await service.lookup(TRUCK)
        for prefix in PREFIXES:
            for headers in [{}, *({"X-API-Key": key} for key in WRONG_KEYS), {"Authorization": "old"}]:
                status, body, got = await send(service, form, TRUCK, prefix, headers=headers)
                assert (status, body, got["WWW-Authenticate"]) == (401, {"detail": "Not authenticated"}, "APIKey")
        assert len(service.rows()) == 1
        for key in ("old", "new"):
            for prefix in PREFIXES:
                assert (await send(service, form, TRUCK, prefix, headers={"X-API-Key": key}))[0] == 200


async def test_key_of_any_bytes(start: Start) -> None:
    """A key outside ASCII works as UTF-8; other bytes are 401, not a failure."""
    async with start(api_key="schlüssel") as service:
        request = b"DELETE /remove/" + TRUCK.encode() + b" HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n\r\n"
        assert (await shout(service.port, request % "schlüssel".encode()))[0] == 200
        for key in ("schlüssel".encode("latin-1"), b"\xff\xfe\x80", b"schl\xc3"):
            status, head, body = await shout(service.port, request % key)
            assert (status, b"www-authenticate: APIKey" in head, json.loads(body)) == (
                401,
                True,
                {"detail": "Not authenticated"},
            )


async def test_private_service_wants_the_key_for_lookups_too(start: Start, vpic: PlayedVpic) -> None:
    """With PRIVATE, every way to look up is 401 without the key; health and documentation stay open."""
    async with start(api_key="k", private=True, offline=False) as service:
        key = {"headers": {"X-API-Key": "k"}}
        for prefix in PREFIXES:
            for form in LOOKUPS:
                assert (await send(service, form, TRUCK, prefix))[0] == 401
            assert (await service.post(f"{prefix}/lookup/batch", {"vins": [TRUCK]}))[0] == 401
        assert vpic.calls == []
        for prefix in PREFIXES:
            for form in LOOKUPS:
                assert (await send(service, form, TRUCK, prefix, **key))[0] == 200
                assert (await send(service, form, TRUCK, prefix))[0] == 401  # cached now, and still not for all
            assert (await service.post(f"{prefix}/lookup/batch", {"vins": [TRUCK]}, **key))[0] == 200
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await service.get(path))[0] == 200


@pytest.mark.parametrize("key", ["", " , "], ids=["empty", "commas"])
async def test_service_without_a_key_is_open_and_says_so_once(
    start: Start, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    """Without a key all is open, whatever is sent; one warning tells the operator."""
    async with start(api_key=key) as service:
        for form in GUARDED:
            assert (await send(service, form, TRUCK))[0] == 200
            assert (await send(service, form, TRUCK, headers={"X-API-Key": "any"}))[0] == 200
    assert len(logged(caplog, logging.WARNING)) == 1
    assert len(logged(caplog, logging.WARNING, "VINCACHE_API_KEY is empty")) == 1


BROKEN_REQUESTS = {  # what is 422 once it has passed the doors
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
        for _ in range(2):  # a batch without VINs that can be counted has cost nothing
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
        for form in WAYS_IN[3:]:
            assert (await send(service, form, "x"))[0] == 401
            assert (await send(service, form, "x", headers={"X-API-Key": "k"}))[0] == 422


async def test_schema_tells_where_a_key_may_be_wanted(service: Service) -> None:
    """The schema has the header, so that /docs has its Authorize button; only health is without."""
    schema = (await service.get("/openapi.json"))[1]
    [(name, scheme)] = schema["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["in"], scheme["name"]) == ("apiKey", "header", "X-API-Key")
    for path, item in schema["paths"].items():
        for operation in item.values():
            wanted = None if path in ("/healthz", "/readyz") else [{name: []}]
            assert operation.get("security") == wanted, path
            assert ("401" in operation["responses"]) == (wanted is not None)


# ======================================================================================================================
# Limits.
# ======================================================================================================================


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
                assert (await send(service, form, TRUCK, prefix))[0] == 200
        for form in LOOKUPS:
            for prefix in PREFIXES:
                status, body, headers = await send(service, form, OTHER_TRUCK, prefix)
                assert (status, body) == (429, {"detail": "The limit is 6 per 1 minute; ask again later."})
                assert 1 <= int(headers["Retry-After"]) <= 60
        assert (await send(service, WAYS_IN[3], TRUCK))[0] == 200  # other things are not lookups
        assert (await service.get("/export"))[0] == 200
        assert (await service.get("/healthz"))[0] == 200
    assert vpic.calls == [[TRUCK]]


async def test_default_limit_of_exports(start: Start) -> None:
    """Ten exports a minute, then 429 with Retry-After."""
    async with start() as service:
        answers = [await service.ask("GET", "/export") for _ in range(11)]
    assert [status for status, _, _ in answers] == [200] * 10 + [429]
    assert 1 <= int(answers[-1][2]["Retry-After"]) <= 60


async def test_batch_counts_its_vins_and_refused_ones_do_not_count(start: Start, vpic: PlayedVpic) -> None:
    """A batch costs as many as it has; one that does not fit is refused whole, and leaves the share as it was."""
    vins = [f"{TRUCK[:14]}{number:03}" for number in range(6)]
    async with start(lookup_limit="5/minute") as service:

        async def batch(count: int) -> Any:
            return await service.ask("POST", "/lookup/batch", json={"vins": vins[:count]})

        status, body, headers = await batch(6)
        assert (status, "Retry-After" in headers) == (429, False)
        assert body == {"detail": "The limit is 5 per 1 minute: 6 at once are more than it ever allows; send fewer."}
        assert vpic.calls == []
        assert (await batch(3))[0] == 200
        for _ in range(3):
            status, _, headers = await batch(3)
            assert (status, 1 <= int(headers["Retry-After"]) <= 60) == (429, True)
        assert (await batch(0))[0] == 200
        assert (await batch(1))[0] == 200
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
            (await shout(process.port, f"GET /lookup/{TRUCK} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode()))[0]
            for header in ["", *(f"X-Forwarded-For: 198.51.100.{number}\r\n" for number in (1, 2, 2))]
        ]
    assert statuses == {trusting: [200, 200, 200, 429], wary: [200, 429, 429, 429]}


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
        answers = await asyncio.wait_for(asyncio.gather(*asked), 30)
        assert [status for status, _ in answers] == [200] * 7
    assert len(logged(caplog, logging.WARNING, "VINCACHE_RATE_STORAGE fails")) == 1
    assert logged(caplog, logging.ERROR) == []


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
        request = f"GET /lookup/{TRUCK} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        asked = [shout(process.port, request) for _ in range(8) for process in processes]
        return Counter(status for status, _, _ in await asyncio.gather(*asked))

    assert await statuses() == {200: 5, 429: 11}
    redis.kill()
    redis.wait()
    assert await statuses() == {200: 16}
    for process in processes:
        assert process.log.read_text().count("VINCACHE_RATE_STORAGE fails") == 1


# ======================================================================================================================
# Bodies.
# ======================================================================================================================

JSON = "application/json"
NOT_JSON = "Send JSON with Content-Type: application/json"

BAD_BODIES: dict[str, tuple[str | None, bytes, int]] = {
    "no content type": (None, b'{"vin": "%b"}' % TRUCK.encode(), 422),
    "wrong content type": ("text/plain", b'{"vin": "%b"}' % TRUCK.encode(), 422),
    "form": ("application/x-www-form-urlencoded", b"vin=%b" % TRUCK.encode(), 422),
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
            assert content_type == JSON or detail == [{"type": "content_type", "loc": ["body"], "msg": NOT_JSON}]
        assert len(body) < 500
    assert (vpic.calls, service.rows(), logged(caplog, logging.ERROR)) == ([], [], [])


@pytest.mark.parametrize("route", POSTS)
async def test_large_body_is_413_before_it_is_read(service: Service, route: str) -> None:
    """A body that says it is too large is refused without a byte of it, one that does not say as soon as it is."""
    head = f"POST /api/v1{route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    piece = b"%x\r\n%b\r\n" % (2**16, b" " * 2**16)
    answers = [
        await shout(service.port, head + b"Content-Length: 99999999999\r\n\r\n"),
        await shout(service.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 65),
    ]
    for status, got, body in answers:
        assert (status, b"content-type: application/json" in got) == (413, True)
        assert json.loads(body) == {"detail": "The body is too large; send less at a time."}


async def test_large_body_is_401_for_who_has_no_key(start: Start) -> None:
    """Whoever may not come in is told so, in our shape, whatever the size of what they bring."""
    async with start(api_key="k") as service:
        head = b"POST /remove HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        status, _, body = await shout(service.port, head)
    assert (status, json.loads(body)) == (401, {"detail": "Not authenticated"})


async def test_largest_batch_is_not_too_large(start: Start) -> None:
    """The largest batch that can be allowed passes the limit of the body."""
    async with start(batch_limit=100_000) as service:
        sent = io.BytesIO(json.dumps({"vins": [" " * 10 + "A" * 16] * 100_000}).encode())
        status, body, _ = await service.ask("POST", "/lookup/batch", data=sent, headers={"Content-Type": JSON})
    assert (status, body.count(b'"status":422')) == (200, 100_000)


async def test_hostile_vins_of_a_batch_spoil_only_their_lines(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Inside a batch, what is no VIN is a 422 in its own line, and nothing in the log."""
    sent = json.dumps({"vins": ["\ud800", "\0", TRUCK + "\0", "", "[1]", '"', TRUCK, "A" * 10**5, "\u2028\r\n"]})
    status, body, _ = await service.ask("POST", "/lookup/batch", data=sent, headers={"Content-Type": JSON})
    assert status == 200
    assert [json.loads(line).get("status", 200) for line in body.splitlines()] == [422] * 6 + [200] + [422] * 2
    assert logged(caplog, logging.ERROR) == []


async def test_endless_bodies_hold_neither_memory_nor_others(launch: Launch) -> None:
    """Clients that never stop sending get their 413, silent ones get nothing, and others are answered meanwhile."""
    process = launch(vpic_url="")
    await process.started()
    head = b"POST /lookup HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    megabyte = b"100000\r\n" + b" " * 2**20 + b"\r\n"

    def memory() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1])

    async def request() -> tuple[int, bytes, bytes]:
        return await shout(process.port, f"GET /lookup/{TRUCK} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    await request()
    before = memory()
    silent = [await asyncio.open_connection("127.0.0.1", process.port) for _ in range(50)]
    for _, writer in silent:
        writer.write(head + b"1\r\n{\r\n")
    endless = await asyncio.gather(*(shout(process.port, head, *[megabyte] * 100) for _ in range(4)))
    assert [status for status, _, _ in endless] == [413] * 4
    assert (await request())[0] == 200
    assert memory() - before < 100_000  # of 400 MB sent
    for _, writer in silent:
        writer.transport.abort()


# ======================================================================================================================
# What errors tell.
# ======================================================================================================================

TELLTALE = re.compile(
    r"Traceback|File \"|\.py|\.db|line \d|Error\b|sqlite|SELECT|DELETE|INSERT|vehicles|127\.0\.0\.1|aiohttp|/tmp", re.I
)


async def test_unexpected_bug_is_500_in_our_shape(
    service: Service, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody thought of tells the caller nothing but where to look, and the log everything."""
    await service.lookup(TRUCK)
    vpic.fails(403)
    for form in LOOKUPS:
        service.change("UPDATE vehicles SET fetched_at = ?, expires_at = 0", 2**60)  # a time that no calendar has
        status, body, _ = await send(service, form, TRUCK, headers={"Connection": "close"})
        assert (status, body) == (500, {"detail": "The service failed to answer this; its log has the cause."})
    assert any(record.exc_info for record in caplog.records)
    assert (await service.lookup(OTHER_TRUCK))[0] == 503


async def test_errors_tell_an_attacker_nothing(
    service: Service, vpic: PlayedVpic, caplog: pytest.LogCaptureFixture
) -> None:
    """No error's body has a traceback, SQL, a path or an address in it; the log has the cause."""
    vpic.fails(500, "<html>File '/srv/vpic.py', line 1: SELECT</html>")
    answers = [await service.lookup(TRUCK)]
    vpic.fails(200, b'{"Results": "SELECT"}')
    answers.append(await service.lookup(TRUCK))
    service.change("DROP TABLE vehicles")
    answers += [await service.delete(f"/remove/{TRUCK}"), await service.get("/export"), await service.get("/nowhere")]
    answers.append(await service.get("/%00/../../etc/passwd"))
    assert [status for status, _ in answers] == [502, 502, 503, 503, 404, 404]
    for _, body in answers:
        assert not TELLTALE.search(json.dumps(body))
    for cause in ("status 500", "no list of results", "no such table"):
        assert logged(caplog, logging.WARNING, cause)


# ======================================================================================================================
# Telemetry.
# ======================================================================================================================

METERED = """
import asyncio, json, sys, tempfile
from pathlib import Path

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from test_main import OTHER_TRUCK, TRUCK, UNKNOWN, playing, serving

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
    database = Path(tempfile.mkdtemp()) / "cache.db"
    async with playing() as (vpic, url):
        async with serving(database, vpic, url, breaker_failures=1, offline=False) as service:
            await service.lookup(TRUCK)
            await service.lookup(TRUCK)
            await service.lookup(UNKNOWN)
            tell()
            service.expire(TRUCK)
            vpic.fails(403)
            await service.lookup(TRUCK)
            await service.lookup(OTHER_TRUCK)
            tell()
        async with serving(
            database, vpic, url, vpic_timeout=0.3, breaker_failures=1, breaker_seconds=0.2
        ) as service:
            vpic.hangs()
            await service.lookup(OTHER_TRUCK)
            vpic.recovers()
            await asyncio.sleep(0.3)
            await service.post("/lookup/batch", {"vins": [TRUCK, UNKNOWN, "1XP5DB9X7YN526158", "x"]})
            tell()

asyncio.run(go())
"""


def test_lookups_calls_and_breaker_are_counted() -> None:
    """Lookups by outcome, the duration of calls by outcome and the breaker's state reach OpenTelemetry's reader."""
    pytest.importorskip("opentelemetry.sdk")
    # A process of its own: the provider of a process can be set only once.
    ran = subprocess.run([sys.executable, "-c", METERED], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    healthy, failing, offline = (json.loads(line) for line in ran.stdout.splitlines())
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
        "vincache.vpic.duration s ok": 3,
        "vincache.vpic.duration s timeout": 1,
        "vincache.vpic.breaker ": 0,
    }


async def test_traces_and_metrics_leave_by_otlp(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTAPI_OTEL_AUTO_CONFIGURE and an endpoint are all it takes; lookups, spans and HTTP metrics arrive."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    received: dict[str, bytes] = {}

    async def receive(request: web.Request) -> web.Response:
        received[request.path] = received.get(request.path, b"") + await request.read()
        return web.Response()

    collector = web.Application()
    collector.router.add_post("/v1/{signal}", receive)
    runner = web.AppRunner(collector)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{runner.addresses[0][1]}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    try:
        process = await launch().started()
        await shout(process.port, f"GET /lookup/{TRUCK} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        process.signal(signal.SIGTERM)  # what is left goes out at the end
        await process.ended()
    finally:
        await runner.cleanup()
    assert b"/lookup/{vin}" in received["/v1/traces"]
    for name in (b"vincache.lookups", b"vincache.vpic.duration", b"vincache.vpic.breaker", b"http.server.request.dur"):
        assert name in received["/v1/metrics"]


# ======================================================================================================================
# Logs.
# ======================================================================================================================


@pytest.mark.parametrize("form", ["text", "json"])
async def test_log_is_one_line_an_event(launch: Launch, vpic: PlayedVpic, tmp_path: Path, form: str) -> None:
    """From the lifespan on every line, uvicorn's own and exceptions included, has one form; no key is in any."""
    process = await launch(log=form, api_key="crown", offline=False, breaker_failures=100).started()
    service = Service(None, tmp_path / "cache.db", vpic, process.port, {})  # type: ignore[arg-type]

    async def ask(request: str, key: str = "crown") -> int:
        return (await shout(process.port, f"{request} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\r\n".encode()))[0]

    assert await ask(f"GET /lookup/{TRUCK}") == 200
    vpic.fails(403)
    assert await ask(f"GET /lookup/{OTHER_TRUCK}%0d%0aFAKE") == 422
    assert await ask(f"GET /lookup/{OTHER_TRUCK}") == 503
    assert await ask(f"DELETE /remove/{OTHER_TRUCK}", "jewel") == 401
    service.change("UPDATE vehicles SET fetched_at = ?, expires_at = 0", 2**60)
    assert await ask(f"GET /lookup/{TRUCK}") == 500
    process.signal(signal.SIGTERM)
    await process.ended()
    text = process.log.read_text()
    assert "crown" not in text
    assert "jewel" not in text
    lines = text[re.search("^20" if form == "text" else "^{", text, re.M).start() :].splitlines()
    if form == "json":
        events = [json.loads(line) for line in lines]
        assert all({"time", "level", "logger", "message"} <= set(event) for event in events)
        assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", event["time"]) for event in events)
        assert any("Traceback" in event.get("exc_info", "") for event in events)
        seen = {event["logger"] for event in events}
    else:
        traceback = re.compile(r"Traceback|\s|\w+(\.\w+)*(Error|Exception)|$|During|The above")
        event = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) ([\w.]+): .")
        assert [line for line in lines if not event.match(line) and not traceback.match(line)] == []
        seen = {match[2] for match in map(event.match, lines) if match}
    assert seen >= {"vincache", "uvicorn.access", "uvicorn.error"}
    assert not any(line.startswith("FAKE") for line in lines)


# ======================================================================================================================
# A fuzzer.
# ======================================================================================================================

# Checks that can't apply.
FUZZER = """
# Starlette's Allow has the methods of the first route of a path only.
checks.allow_header_conformance.enabled = false

[[operations]]
# GET /lookup/batch is GET /lookup/{vin} with a bad VIN: 422, not 405.
include-path = "/lookup/batch"
checks.unsupported_method.enabled = false
"""


@pytest.mark.parametrize("vpic_is", ["up", "down"])
async def test_fuzzer_finds_nothing(launch: Launch, vpic: PlayedVpic, tmp_path: Path, vpic_is: str) -> None:
    """schemathesis finds no 5xx (but those that tell of vPIC's failure), and no answer that the schema lacks."""
    pytest.importorskip("schemathesis")
    settings = {"private": "true", "api_key": "k", "export_limit": "", "vpic_rate": 10**6, "offline": "false"}
    process = await launch("--no-access-log", **settings).started()
    excluded = []
    if vpic_is == "down":
        vpic.fails(403)
        excluded = ["--exclude-checks", "not_a_server_error"]
    (tmp_path / "schemathesis.toml").write_text(FUZZER)
    command = ["-m", "schemathesis.cli", "run", f"{process.url}/openapi.json", "--header", "X-API-Key: k", *excluded]
    # Deterministic: the same cases each time, and no database of examples.
    command += ["--generation-deterministic", "--max-examples", "10", "--continue-on-failure", "--no-color"]
    fuzzer = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        report = (await asyncio.wait_for(fuzzer.communicate(), 120))[0].decode()
    finally:
        if fuzzer.returncode is None:
            fuzzer.kill()
    assert fuzzer.returncode == 0, report
    assert int(re.search(r"(\d+) generated", report)[1]) > 200, report
    assert (len(vpic.calls) > 3, " ERROR " in process.log.read_text()) == (True, False)
