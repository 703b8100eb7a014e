"""The tests of vincache, in main.py's order.

Real: the SQLite files, HTTP on both sides, the exporting process, and, where a test is about processes, uvicorn with
real signals. Played: vPIC alone, by `PlayedVpic`, a server on loopback that answers with real data (of the package
ultravin) in vPIC's own form, and misbehaves on demand. No test reaches any address but loopback.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
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


async def until(condition: Callable[[], Any]) -> None:
    """Wait until it holds, 20 seconds at most."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


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


def many(count: int, first: int = 0) -> list[str]:
    """Different VINs that all decode, with a warning for their check digit."""
    return [f"1XPWD40X1ED{number:06d}" for number in range(first, first + count)]


async def batch(service: Service, vins: Any, path: str = "/lookup/batch") -> list[Any]:
    """The lines of a batch, parsed."""
    status, body, headers = await service.ask("POST", path, json={"vins": vins})
    assert (status, headers["Content-Type"]) == (200, "application/jsonl")
    return [json.loads(line) for line in body.splitlines()]


async def test_batch_answers_line_by_line_in_order(service: Service) -> None:
    """Hits, misses, undecodable and bad VINs come in the order given; duplicates get the same line, however written."""
    await service.lookup(OTHER_TRUCK)
    given = [TRUCK, "short", OTHER_TRUCK, UNKNOWN, TRUCK, f" {TRUCK.lower()}\n", "É" * 17, "short", many(1)[0]]
    for path, cached in (("/lookup/batch", False), ("/api/v1/lookup/batch", True)):
        lines = await batch(service, given, path)
        singles = {vin: (await service.lookup(vin))[1] for vin in (TRUCK, OTHER_TRUCK, UNKNOWN, many(1)[0])}
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
            singles[many(1)[0]] | fresh,
        ]
    assert service.vpic.calls == [[OTHER_TRUCK], [TRUCK, UNKNOWN, many(1)[0]]]


async def test_thousand_cold_vins_reach_vpic_in_twenty_calls(service: Service) -> None:
    """Misses are asked 50 at a time, at most half of VPIC_CONCURRENCY at once, and are hits ever after."""
    service.vpic.delay = 0.05
    vins = many(1000)
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
        ({"vins": many(11)}, 422),
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
    vins = many(150)

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
    vins = many(5)
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
        [vin] = many(1)
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
        leaving = asyncio.create_task(batch(service, many(500)))
        await until(lambda: len(vpic.calls) == 2)
        leaving.cancel()
        await until(lambda: len(service.rows()) == 100)
        await asyncio.sleep(0.5)
        assert len(vpic.calls) == 2


async def test_batch_leaves_room_for_lookups(start: Start, vpic: PlayedVpic) -> None:
    """While a cold batch has all the places it may have, a single lookup goes straight to vPIC."""
    vpic.delay = 0.5
    async with start(vpic_concurrency=4) as service:
        batching = asyncio.create_task(batch(service, many(400)))
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
