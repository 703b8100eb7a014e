"""vincache: an async microservice that decodes VINs with NHTSA's vPIC, once, and remembers the answer.

The journey of a VIN:
  1. `Door` lets the request in: the key, then the client's rate limit, then the size of the body.
  2. `HitFirst` answers a cached VIN at once: one statement, one thread hop. Most journeys end here.
  3. `normalize_vin` makes a `Vin` of what was sent, or a 422; `Lookups.lookup` takes it from there.
  4. `Lookups._land` joins the flight of this VIN that is under way, or lets `_take_off` start one.
  5. `Vpic.decode` asks vPIC inside one deadline: its turn, retries, breaker; `parse` trusts nothing it reads.
  6. If vPIC can't be used, `Lookups._fall_back` serves the expired row, else `decode_offline`'s word, else the failure.
  7. `Cache.store` keeps what is new, and the caller gets its `Answer`.
A batch is many journeys in flights of 50; an export is one look at the whole table, written by a process of its own.

Glossary:
  VIN         vehicle identification number, 17 letters and digits
  vPIC        NHTSA's public decoder; "asking vPIC" is one HTTP call to it, for one VIN or for 50
  decodable   vPIC knows a make for the VIN; an undecodable VIN is an answer too, and is cached
  record      a row of the table `vehicles`: what was decoded, by whom, when, and until when it is fresh
  flight      the one fetching of a VIN that all who ask for it at that moment share
  stale       a row past its `expires_at`, served because vPIC can't be used
"""

import asyncio
import gc
import hmac
import importlib.util
import inspect
import json
import logging
import math
import mmap
import os
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast
from urllib.parse import urlsplit

import aiohttp
import aiosqlite
import limits
import stamina
from circuitbreaker import CircuitBreaker
from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import APIKeyHeader
from limits.aio.storage import MemoryStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter
from limits.storage import storage_from_string
from opentelemetry import metrics
from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ======================================================================================================================
# Settings: the only room that reads the environment. Every knob is one line, with its unit and its reason.
# ======================================================================================================================


class StartupError(Exception):
    """One sentence that tells the operator why the service does not start."""


def check_url(url: str) -> str:
    """The URL without a trailing slash. Raises ValueError unless it is empty or an http(s) URL with a host."""
    parts = urlsplit(url)
    _ = parts.port  # raises, too
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("not an http or https URL (empty means: offline only)")
    return url.rstrip("/")


def check_limit(limit: str) -> str:
    """The rate limit as given. Raises ValueError unless it is empty or like `10/minute`."""
    if limit:
        limits.parse(limit)
    return limit


def plain_number(seconds: float) -> float:
    """For the log: 30, not 30.0."""
    return int(seconds) if seconds.is_integer() else seconds


Seconds = Annotated[float, Field(gt=0, le=1e9), AfterValidator(plain_number)]
Count = Annotated[int, Field(gt=0, le=10**6)]
Url = Annotated[str, AfterValidator(check_url)]
Limit = Annotated[str, AfterValidator(check_limit)]


def mask(text: str) -> str:
    """The text without the credentials in its URLs."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


class Settings(BaseSettings):
    """The environment variables `VINCACHE_*`, or the same lines in `.env`; durations are seconds."""

    model_config = SettingsConfigDict(env_prefix="VINCACHE_", env_file=".env", extra="ignore", frozen=True)

    database: Path = Path("vincache.db")  # the cache: an SQLite file, made if it is missing
    ttl: Seconds = 30 * 86400  # a decoded VIN is fresh this long: vPIC's data drift with its releases
    invalid_ttl: Seconds = 86400  # an undecodable one: a manufacturer may register tomorrow
    keep_expired: Seconds = 30 * 86400  # an expired row stays this long, for outages; then it is deleted
    busy_timeout: Seconds = 2  # a store waits this long for a locked file, then the answer goes out uncached

    vpic_url: Url = "https://vpic.nhtsa.dot.gov/api"  # empty: no call is made, all is decoded offline
    vpic_timeout: Seconds = 8  # the deadline of one lookup, retries and waiting included
    vpic_batch_timeout: Seconds = 30  # the deadline of one call for 50 VINs, of which vPIC decodes some 20 a second
    vpic_concurrency: Count = 8  # calls under way at once
    vpic_rate: Count = 1000  # calls in any minute: NHTSA asks for no more
    breaker_failures: Count = 5  # failed calls in a row, after which vPIC is left alone
    breaker_seconds: Seconds = 30  # for this long; then one call probes it
    stale_ttl: Seconds = 60  # an expired row that had to serve is not asked anew for this long
    offline: bool = True  # decode with the vPIC data in the package ultravin when there is nothing else
    offline_ttl: Seconds = 3600  # how long such an answer stands before vPIC is asked again

    batch_limit: Annotated[int, Field(gt=0, le=100_000)] = 10_000  # VINs in one batch
    export_limit: Limit = "10/minute"  # exports per client; empty: no limit
    lookup_limit: Limit = ""  # lookups per client, a batch counts its VINs; empty: no limit
    rate_storage: str = "async+memory://"  # where clients are counted; `async+redis://...` is shared by processes
    api_key: SecretStr = SecretStr("")  # keys for /remove and /export, comma-separated; empty: open to all
    private: bool = False  # the lookups want the key too
    log: Literal["text", "json"] = "text"  # one line an event either way

    @property
    def api_keys(self) -> list[str]:
        return [key.strip() for key in self.api_key.get_secret_value().split(",") if key.strip()]

    @model_validator(mode="after")
    def check_together(self) -> "Settings":
        if not self.vpic_url and not self.offline:
            raise ValueError("VINCACHE_VPIC_URL is empty and VINCACHE_OFFLINE is false: nothing is left to decode with")
        if self.private and not self.api_keys:
            raise ValueError("VINCACHE_PRIVATE is true but VINCACHE_API_KEY is empty: nobody could come in")
        return self

    def __str__(self) -> str:
        """The effective settings in one line, without keys and without the credentials in URLs."""
        return " ".join(f"{name}={mask(str(value))}" for name, value in self)


def read_settings() -> Settings:
    """The settings. Raises StartupError with a sentence that names each bad one."""
    try:
        return Settings()
    except ValidationError as error:
        faults = [
            "".join(f"VINCACHE_{name}: ".upper() for name in fault["loc"]) + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        ]
        raise StartupError("bad settings: " + "; ".join(faults)) from None


# ======================================================================================================================
# Words: what comes in and what goes out, each declared once. A raw VIN is used nowhere but here; a `Vin` is normal.
# ======================================================================================================================

ASCII_SPACE = " \t\n\v\f\r"

UTC_TIME = "%Y-%m-%dT%H:%M:%SZ"


def utc(seconds: float) -> str:
    """Unix seconds as a time in UTC, like 2026-11-21T20:54:00Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime(UTC_TIME)


def normalize_vin(given: str) -> str:
    """`given` without ASCII white space around it, in capitals. Raises unless 17 ASCII letters and digits are left."""
    vin = given.strip(ASCII_SPACE)
    if len(vin) != 17 or not (vin.isascii() and vin.isalnum()):
        raise PydanticCustomError("vin", "A VIN is 17 letters and digits, A to Z and 0 to 9")
    return vin.upper()


Vin = Annotated[
    str,
    AfterValidator(normalize_vin),
    WithJsonSchema(
        {
            "type": "string",
            "description": "17 ASCII letters and digits; case is folded, ASCII white space around it is dropped",
            "pattern": r"^[ \t\n\v\f\r]*[0-9A-Za-z]{17}[ \t\n\v\f\r]*$",
            "examples": ["1XPWD40X1ED215307"],
        }
    ),
]

CLEAN = "0 - VIN decoded clean. Check Digit (9th position) is correct"
UNREGISTERED = "7 - Manufacturer is not registered with NHTSA for sale or importation in the U.S."


class VinBody(BaseModel):
    """The body of a POST; other keys are ignored."""

    vin: Vin


class BatchBody(BaseModel):
    """The body of a batch; a bad VIN in it spoils only its own line."""

    vins: list[str] = Field(examples=[["1XPWD40X1ED215307", "1XKWDB0X57J211825"]])


class Vehicle(BaseModel):
    """A decoded VIN. Empty where vPIC has no data; `error_*` has its warnings, a wrong check digit included."""

    vin: str = Field(examples=["1XPWD40X1ED215307"])
    make: str = Field(examples=["PETERBILT"])
    model: str = Field(examples=["388"])
    model_year: str = Field(examples=["2014"])
    body_class: str = Field(examples=["Truck-Tractor"])
    cached_result: bool
    error_code: str = Field(examples=["0"], description="vPIC's codes, comma-separated")
    error_text: str = Field(examples=[CLEAN])
    suggested_vin: str = Field(examples=[""])
    source: str = Field(examples=["vpic"], description="vpic, or offline: decoded without it")
    fetched_at: str = Field(examples=["2026-11-21T20:54:00Z"])


class Undecodable(BaseModel):
    """A VIN that vPIC can't decode: its error 7, or no make."""

    detail: str = "This VIN cannot be decoded; error_text says why."
    vin: str = Field(examples=["AAAAAAAAAAAAAAAAA"])
    error_code: str = Field(examples=["1,7,400"])
    error_text: str = Field(examples=[UNREGISTERED])
    suggested_vin: str = Field(examples=["AAAAAAAA!AAAA!!!!"])
    cached_result: bool
    source: str = Field(examples=["vpic"])
    fetched_at: str = Field(examples=["2026-11-21T20:54:00Z"])


class Removed(BaseModel):
    """`cache_delete_success` is false if the cache held no row for the VIN."""

    vin: str = Field(examples=["1XPWD40X1ED215307"])
    cache_delete_success: bool


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`cache` is ok or the reason why it can't be used; `vpic` is ok, offline, or `open since <time>`."""

    status: Literal["ok", "unavailable"]
    cache: str = Field(examples=["ok"])
    vpic: str = Field(examples=["ok"])


class Problem(BaseModel):
    """Every error but 422."""

    detail: str


class VinProblem(Problem):
    """vPIC can't be used, nor anything in its place."""

    vin: str = Field(examples=["1XPWD40X1ED215307"])


class Fault(BaseModel):
    type: str = Field(examples=["vin"])
    loc: list[str | int] = Field(examples=[["query", "vin"]])
    msg: str = Field(examples=["A VIN is 17 letters and digits, A to Z and 0 to 9"])


class Invalid(BaseModel):
    """What is wrong with the request; what was sent is not echoed."""

    detail: list[Fault]


class Decoded(NamedTuple):
    """One VIN as vPIC describes it, in our words; empty where it has no data."""

    vin: str
    make: str
    model: str
    model_year: str
    body_class: str
    error_code: str
    error_text: str
    suggested_vin: str

    @property
    def decodable(self) -> bool:
        return self.make != "" and "7" not in self.error_code.split(",")


class Answer(NamedTuple):
    """What a lookup says: an HTTP status (200 or 404), the body as JSON text, and how it came about."""

    status: int
    body: str
    outcome: str


class Record(NamedTuple):
    """A row of `vehicles`: its columns in their order."""

    vin: str
    make: str
    model: str
    model_year: str
    body_class: str
    error_code: str
    error_text: str
    suggested_vin: str
    source: str
    decoded: int
    fetched_at: int
    expires_at: int

    def answer(self, outcome: str) -> Answer:
        """The answer with this record; `schema.sql` has its like for hits."""
        words = {**self._asdict(), "cached_result": outcome in ("hit", "stale"), "fetched_at": utc(self.fetched_at)}
        if self.decoded:
            return Answer(200, Vehicle.model_validate(words).model_dump_json(), outcome)
        outcome = outcome if words["cached_result"] else "undecodable"
        return Answer(404, Undecodable.model_validate(words).model_dump_json(), outcome)


# ======================================================================================================================
# Errors: they know their status and say one sentence to the caller; the cause is for the log. One function renders all.
# ======================================================================================================================


class VincacheError(HTTPException):
    """An error of ours, born anywhere, rendered below.

    `retry_after` (seconds) becomes the header Retry-After; `fields` stand beside `detail` in the body."""

    status = 500

    def __init__(self, detail: str, *, retry_after: float | None = None, **fields: str) -> None:
        # At least 1: a client that takes 0 at its word would ask again at once.
        headers = None if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        super().__init__(self.status, detail, headers)
        self.retry_after = retry_after
        self.fields = fields


class TooManyRequests(VincacheError):
    status = 429


class BodyTooLarge(VincacheError):
    status = 413


class CacheUnavailable(VincacheError):
    status = 503


class ExportFailed(VincacheError):
    status = 503


class VpicUnavailable(VincacheError):
    """vPIC gave no usable answer. Not asked, or refused: 503; too late: 504; anything else: 502.

    `cause` is for the log; `again` says whether the same call may fare better in a moment."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        cause: str = "",
        again: bool = False,
        retry_after: float | None = None,
        **fields: str,
    ) -> None:
        self.status, self.cause, self.again = status, cause, again
        super().__init__(detail, retry_after=retry_after, **fields)

    def about(self, vin: str) -> "VpicUnavailable":
        """The same, for one caller and its VIN: a shared exception would gather the tracebacks of all."""
        return VpicUnavailable(self.status, self.detail, retry_after=self.retry_after, vin=vin)


async def render_error(request: Request, error: Exception) -> JSONResponse:
    """The response for an error: of ours, of FastAPI's validation, of Starlette's routing, or of nobody's making."""
    if isinstance(error, RequestValidationError):
        if isinstance(error.body, bytes):
            faults = [Fault(type="content_type", loc=["body"], msg="Send JSON with Content-Type: application/json")]
        else:
            # Not `input` and `ctx`, which FastAPI echoes: a lone surrogate or a NaN in them would end in a 500.
            faults = [Fault(type=fault["type"], loc=list(fault["loc"]), msg=fault["msg"]) for fault in error.errors()]
        return JSONResponse(Invalid(detail=faults).model_dump(), 422)
    if isinstance(error, HTTPException):
        return JSONResponse({"detail": error.detail, **getattr(error, "fields", {})}, error.status_code, error.headers)
    return JSONResponse({"detail": "The service failed to answer this; its log has the cause."}, 500)


# ======================================================================================================================
# Telemetry: the log, and the few counts that nobody else can make. Requests, spans and HTTP metrics are FastAPI's own.
# ======================================================================================================================

log = logging.getLogger("vincache")

# Without the OpenTelemetry SDK these are empty shells.
meter = metrics.get_meter("vincache")
lookups_counter = meter.create_counter("vincache.lookups", description="VINs looked up, by outcome")
vpic_duration = meter.create_histogram("vincache.vpic.duration", "s", "Duration of calls to vPIC, by outcome")
breaker_gauge = meter.create_gauge("vincache.vpic.breaker", description="0: vPIC is asked; 1: it is left alone")


def open_log(form: Literal["text", "json"]) -> None:
    """Give our lines and uvicorn's one form: plain text or JSON, with UTC times."""
    formatter: logging.Formatter
    if form == "json":
        formatter = JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            datefmt=UTC_TIME,
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            # Of uvicorn's: the message once more, with terminal colours in it.
            reserved_attrs=[*vars(logging.makeLogRecord({})), "color_message", "message", "asctime"],
        )
    else:
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", UTC_TIME)
    formatter.converter = time.gmtime
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
        root.handlers[0].setFormatter(formatter)
    for name in ("uvicorn", "uvicorn.access"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter)
    log.setLevel(logging.INFO)


# ======================================================================================================================
# Cache: all the SQL there is, on one SQLite file. One connection reads, another writes, so that a blocked write holds
# up no hit. A fault of the file costs warmth, never an answer: reads then find nothing, stores are skipped, and a
# damaged file is moved aside for a fresh one.
# ======================================================================================================================

SCHEMA_VERSION = 1  # as in schema.sql
APPLICATION_ID = 0x56494E43

OWNER = """
SELECT (SELECT application_id FROM pragma_application_id),
       (SELECT user_version FROM pragma_user_version),
       (SELECT count(*) FROM sqlite_master)
"""

REBUILD = "BEGIN IMMEDIATE; DROP TABLE IF EXISTS vehicles; COMMIT"

HIT = "SELECT status, body FROM answers WHERE vin = ? AND expires_at > ?"

# CROSS JOIN makes SQLite go through the VINs asked and look each up, never the other way round.
LINES = """
SELECT vin, CASE status WHEN 200 THEN body ELSE json_insert(body, '$.status', status) END
FROM json_each(?) AS asked CROSS JOIN answers ON vin = asked.value
WHERE expires_at > ?
"""

RECORDS = """
SELECT vin, make, model, model_year, body_class, error_code, error_text, suggested_vin, source,
       decoded, fetched_at, expires_at
FROM json_each(?) AS asked CROSS JOIN vehicles ON vin = asked.value
"""

SNAPSHOT = """
SELECT vin, make, model, model_year, body_class, error_code, error_text, suggested_vin, source,
       decoded, fetched_at, expires_at
FROM vehicles
"""

# One statement for any number of records is one transaction. What was decoded offline never replaces vPIC's word.
STORE = """
INSERT OR REPLACE INTO vehicles (
    vin, make, model, model_year, body_class, error_code, error_text, suggested_vin, source,
    decoded, fetched_at, expires_at
)
SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6, value ->> 7,
       value ->> 8, value ->> 9, value ->> 10, value ->> 11
FROM json_each(?)
WHERE value ->> 8 = 'vpic' OR NOT EXISTS (SELECT 1 FROM vehicles WHERE vin = value ->> 0 AND source = 'vpic')
"""

EXTEND = "UPDATE vehicles SET expires_at = max(expires_at, ?) WHERE vin IN (SELECT value FROM json_each(?))"

REMOVE = "DELETE FROM vehicles WHERE vin = ? RETURNING vin"

# The next 1,000 rows after a VIN: the last of them, and how many have been expired for too long.
BITE = """
SELECT max(vin), count(*) FILTER (WHERE expires_at < ?)
FROM (SELECT vin, expires_at FROM vehicles WHERE vin > ? ORDER BY vin LIMIT 1000)
"""

SWEEP = "DELETE FROM vehicles WHERE vin > ? AND vin <= ? AND expires_at < ?"

# More than a page, really written: it finds a locked file, a read-only one and a full disk.
PROBE = """
BEGIN IMMEDIATE;
INSERT INTO vehicles VALUES ('', hex(zeroblob(4096)), '', '', '', '', '', '', '', 0, 0, 0);
DELETE FROM vehicles WHERE vin = '';
COMMIT
"""


def reason(error: Exception) -> str:
    """What the operator may read at /readyz: what SQLite or the system says, without the path."""
    if isinstance(error, TimeoutError):
        return "locked for too long"
    if isinstance(error, OSError):
        return error.strerror or "input/output error"
    return "another file is in its place" if isinstance(error, StartupError) else str(error)


def is_damage(error: BaseException) -> bool:
    """Whether SQLite says that the file is no database, or a broken one."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Cache:
    """The SQLite file, opened; use as `async with`.

    Readers get what can be read. Writers raise CacheUnavailable if nothing was written within `busy_timeout` seconds,
    the wait for the writes before it included."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        self.path = path.absolute()
        self._busy_timeout = busy_timeout
        self._connections = AsyncExitStack()
        self._inode: tuple[int, int] | None = None
        self._turn = asyncio.Lock()
        self._replacing = asyncio.Lock()
        self._faults: dict[str, str] = {}

    async def __aenter__(self) -> "Cache":
        """Raises StartupError if the file can't be opened and written, or isn't ours."""
        try:
            await self._open()
        except (sqlite3.Error, OSError) as error:
            raise StartupError(f"VINCACHE_DATABASE: {self.path} cannot be opened and written: {error}") from None
        log.info("cache opened: %s, SQLite %s", self.path, sqlite3.sqlite_version)
        return self

    async def __aexit__(self, *_: object) -> None:
        async with self._turn:
            await self._connections.aclose()

    async def _open(self) -> None:
        """Open the file; a damaged one is moved aside for a fresh one."""
        schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
        for fresh in (False, True):
            inode = None
            try:
                # First without aiosqlite, whose thread outlives a failure and would have the log's last word.
                await asyncio.to_thread(lambda: sqlite3.connect(self.path).close())
                inode = self._inode_at_path()
                older = await asyncio.to_thread(self._check_ownership)
                async with AsyncExitStack() as connections:
                    writer = await self._connect(connections)
                    if older:
                        await writer.executescript(REBUILD)
                    await writer.executescript(schema)
                    reader = await self._connect(connections)
                    await reader.executescript(schema)
                    self._writer, self._reader, self._inode = writer, reader, inode
                    self._connections = connections.pop_all()
                return
            except sqlite3.Error as error:
                if fresh or not is_damage(error):
                    raise
                self._move_aside(inode, str(error))

    async def _connect(self, connections: AsyncExitStack) -> aiosqlite.Connection:
        # The timeout stands before any statement: several workers open the file in the same moment, and each waits for
        # its turn. No isolation level: a statement is its own transaction, and a cancelled one leaves none open.
        connection = aiosqlite.connect(self.path, timeout=self._busy_timeout, isolation_level=None)
        return await connections.enter_async_context(connection)

    def _check_ownership(self) -> bool:
        """Whether the file is an older cache of ours. Raises StartupError if it is a newer one, or not ours."""
        # Read-only, so that not even its -wal is written into another's file, as it is when a last connection closes.
        with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True, timeout=self._busy_timeout)) as file:
            application, version, objects = file.execute(OWNER).fetchone()
        if application != APPLICATION_ID:
            if application or version or objects:
                raise StartupError(f"VINCACHE_DATABASE: {self.path} is an SQLite file, but not one of vincache's")
            return False
        if version > SCHEMA_VERSION:
            raise StartupError(f"VINCACHE_DATABASE: {self.path} was made by a newer vincache (schema {version})")
        if version < SCHEMA_VERSION:
            log.warning("cache rebuilt: %s has schema %d, not %d", self.path, version, SCHEMA_VERSION)
        return version < SCHEMA_VERSION

    def _inode_at_path(self) -> tuple[int, int] | None:
        with suppress(OSError):
            status = self.path.stat()
            return status.st_dev, status.st_ino
        return None

    def _move_aside(self, inode: tuple[int, int] | None, cause: str) -> bool:
        """Move the damaged file; unless the path no longer leads to it, for then another worker has moved it."""
        if inode is None or inode != self._inode_at_path():
            return False
        aside = self.path.with_name(f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
        for suffix in ("-wal", "-shm", ""):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        log.warning("cache damaged (%s): moved to %s, a fresh one takes its place at %s", cause, aside, self.path)
        return True

    async def _replace(self, cause: str, broken: aiosqlite.Connection | None = None) -> None:
        """Open what is at the path now, after moving the file aside if it is `broken`; unless that was done since."""
        async with self._replacing:
            if broken is not None and broken not in (self._reader, self._writer):
                return
            # Closed before the move: SQLite finds its -wal by name, and that name will be the fresh file's.
            await self._connections.aclose()
            inode, self._inode = self._inode, None  # until it is open again, every write tries to
            moved = broken is not None and self._move_aside(inode, cause)
            await self._open()
            if not moved:
                log.warning("cache opened anew (%s): %s", cause, self.path)

    def _fault(self, kind: Literal["read", "written"], why: str) -> None:
        if kind not in self._faults:
            log.warning("cache cannot be %s (%s): answers go on without it", kind, why)
        self._faults[kind] = why

    def _no_fault(self, kind: Literal["read", "written"]) -> None:
        if self._faults.pop(kind, None):
            log.info("cache can be %s again", kind)

    async def _read(self, statement: str, parameters: Sequence[Any]) -> Sequence[tuple[Any, ...]]:
        """The rows; none if the file can't be read."""
        reader = self._reader
        try:
            rows = await reader.execute_fetchall(statement, parameters)
        except (sqlite3.Error, ValueError) as error:  # ValueError: the connection is closed
            if is_damage(error):
                await self.doubt(str(error), reader)
            elif reader is self._reader and not self._replacing.locked():  # else a replacement closed it, and tells so
                self._fault("read", reason(error))
            return []
        if self._faults:
            self._no_fault("read")
        return rows

    async def _write(self, statement: str, parameters: Sequence[Any] | None) -> Sequence[tuple[Any, ...]]:
        """The rows that one statement (without parameters: one script) returns. Raises CacheUnavailable."""
        try:
            async with asyncio.timeout(self._busy_timeout):
                await self._turn.acquire()
                # A task of its own: a caller that leaves neither breaks the write off nor frees the turn too early.
                writing = asyncio.create_task(self._write_in_turn(statement, parameters))
                writing.add_done_callback(lambda task: task.cancelled() or task.exception())
                rows = await asyncio.shield(writing)
        except (sqlite3.Error, ValueError, OSError, StartupError) as error:  # OSError: TimeoutError, and a failed move
            self._fault("written", reason(error))
            raise CacheUnavailable("The cache cannot be written at the moment; ask again later.") from error
        self._no_fault("written")
        return rows

    async def _write_in_turn(self, statement: str, parameters: Sequence[Any] | None) -> Sequence[tuple[Any, ...]]:
        try:
            if self._inode is None or self._inode != self._inode_at_path():  # deleted, or moved: never write to a ghost
                await self._replace("its file was moved or deleted")
            for last in (False, True):
                writer = self._writer
                try:
                    if parameters is not None:
                        return await writer.execute_fetchall(statement, parameters)
                    await writer.executescript(statement)
                    return []
                except sqlite3.Error as error:
                    if parameters is None:
                        await writer.rollback()
                    if last or not is_damage(error):
                        raise
                    await self._replace(str(error), writer)
            raise AssertionError
        finally:
            self._turn.release()

    async def hit(self, vin: str) -> Answer | None:
        """The answer from a fresh row, or None."""
        for status, body in await self._read(HIT, (vin, time.time())):
            return Answer(status, body, "hit")
        return None

    async def lines(self, vins: Sequence[str]) -> dict[str, str]:
        """The batch lines of those VINs that have a fresh row."""
        return dict(await self._read(LINES, (json.dumps(vins), time.time())))

    async def records(self, vins: Sequence[str]) -> dict[str, Record]:
        """The rows of those VINs that have one, fresh or not."""
        return {row[0]: Record._make(row) for row in await self._read(RECORDS, (json.dumps(vins),))}

    async def store(self, records: Collection[Record]) -> None:
        """Insert or replace the rows; if that fails, they are not cached. Returns within `busy_timeout`."""
        with suppress(CacheUnavailable):  # logged where it was raised
            await self._write(STORE, (json.dumps(list(records)),))

    async def extend(self, vins: Sequence[str], expires_at: int) -> None:
        """Let the rows of these VINs count as fresh until `expires_at` (unix seconds)."""
        with suppress(CacheUnavailable):
            await self._write(EXTEND, (expires_at, json.dumps(vins)))

    async def remove(self, vin: str) -> bool:
        """Whether a row was there, fresh or not; it is no more. Raises CacheUnavailable."""
        return bool(await self._write(REMOVE, (vin,)))

    async def sweep(self, keep_expired: float) -> None:
        """Now and then, for ever, delete the rows expired for longer than `keep_expired` seconds, in small bites."""
        while True:
            last, cutoff = "", time.time() - keep_expired
            with suppress(CacheUnavailable):
                while (bite := await self._read(BITE, (cutoff, last))) and bite[0][0] is not None:
                    [(upto, expired)] = bite
                    if expired:
                        await self._write(SWEEP, (last, upto, cutoff))
                    last = upto
                    await asyncio.sleep(0.05)  # the next bite can wait; a lookup can't
            await asyncio.sleep(min(3600, max(1, keep_expired / 10)))

    async def check(self) -> str:
        """`ok` if the file can be read and written just now, else the reason why not."""
        with suppress(CacheUnavailable):  # first: a write opens anew what was moved or deleted
            await self._write(PROBE, None)
        await self._read(HIT, ("", 0))
        return "; ".join(f"cannot be {kind}: {why}" for kind, why in self._faults.items()) or "ok"

    async def doubt(self, cause: str, reader: aiosqlite.Connection | None = None) -> None:
        """Replace the file: `reader`, or somebody outside, found it damaged."""
        try:
            await self._replace(cause, reader or self._reader)
        except (sqlite3.Error, OSError, StartupError) as error:  # the next store tries again
            self._fault("read", reason(error))


# ======================================================================================================================
# vPIC: the only room that talks to it. First the translation, which trusts nothing and does no I/O; then the call, with
# its deadline, its retries, its breaker and its manners. Facts: https://vpic.nhtsa.dot.gov/api/ and recorded answers.
# ======================================================================================================================

# Our word for vPIC's. Nothing else of its 154 keys is kept.
VPIC_KEYS = {
    "vin": "VIN",
    "make": "Make",
    "model": "Model",
    "model_year": "ModelYear",
    "body_class": "BodyClass",
    "error_code": "ErrorCode",
    "error_text": "ErrorText",
    "suggested_vin": "SuggestedVIN",
}

VPIC_VINS = 50  # in one call, at most
ANSWER_BYTES = 2**21  # unpacked; 50 VINs take some 250 kB


def translate(flat: object) -> Decoded:
    """One flat result of vPIC in our words. Raises ValueError if one of the eight keys is missing or no proper text."""
    if not isinstance(flat, dict):
        raise ValueError("a result is not an object")
    words = {}
    for word, key in VPIC_KEYS.items():
        value = flat.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{key} is missing or not a string")
        value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
        if "\0" in value:  # it ends a text in SQLite
            raise ValueError(f"{key} contains NUL")
        words[word] = value.strip()  # older answers have trailing blanks
    return Decoded(**words)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse(body: bytes, vins: Collection[str]) -> dict[str, Decoded]:
    """What an answer of vPIC says of `vins`, those it fails to describe left out. Raises ValueError if that is all."""
    try:
        answer = json.loads(body.decode("utf-8-sig"), parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None
    results = answer.get("Results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise ValueError("no list of results")
    found: dict[str, Decoded] = {}
    fault: ValueError | None = None
    for flat in results:
        try:
            decoded = translate(flat)
        except ValueError as error:
            fault = error
            continue
        if decoded.vin in vins:
            found[decoded.vin] = decoded
    if not found:
        raise fault or ValueError(f"none of {len(results)} results is about the VIN asked")
    return found


def retry_after_seconds(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (seconds or HTTP date), or None if there is none that can be read."""
    if header is None:
        return None
    with suppress(ValueError, OverflowError):  # OverflowError: a date whose zone is out of this world
        if header.strip().isdigit():
            return int(header)  # a float of 400 digits would be infinite, which no header can say
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return None


class Vpic:
    """vPIC, over a shared session: `decode` is the call, the methods below it each add one concern."""

    def __init__(self, session: aiohttp.ClientSession, settings: Settings) -> None:
        self._session = session
        self._url = settings.vpic_url
        self._places = asyncio.Semaphore(settings.vpic_concurrency)
        self._rate = limits.RateLimitItemPerMinute(settings.vpic_rate)
        self._calls = MovingWindowRateLimiter(MemoryStorage())
        self._breaker = CircuitBreaker(
            settings.breaker_failures, settings.breaker_seconds, expected_exception=VpicUnavailable
        )
        self._breaker_seconds = settings.breaker_seconds
        self._open_since: float | None = None
        self._probing = False
        breaker_gauge.set(0)

    @property
    def state(self) -> str:
        """`ok`, or since when vPIC is left alone."""
        return "ok" if self._open_since is None else f"open since {utc(self._open_since)}"

    async def decode(self, vins: Sequence[str], deadline: float) -> dict[str, Decoded]:
        """Ask vPIC for up to 50 VINs; those it does not describe are left out.

        Raises VpicUnavailable, at `deadline` (loop time) at the latest, waiting and retries included."""
        async for attempt in stamina.retry_context(
            on=lambda error: self._wait_before_retry(error, deadline),
            attempts=3,
            timeout=None,
            wait_initial=0.2,
            wait_jitter=0.3,
            wait_max=1,
        ):
            with attempt:
                return await self._call_in_turn(vins, deadline)
        raise AssertionError  # the loop returns or raises

    def _wait_before_retry(self, error: Exception, deadline: float) -> bool | float:
        """Whether a failed call is worth another (True: after a jittered backoff), or the seconds to wait before it."""
        if not isinstance(error, VpicUnavailable) or not error.again:
            return False
        left = deadline - asyncio.get_running_loop().time()
        if error.retry_after is None:
            return left > 1  # the longest backoff
        return error.retry_after < left and max(0.05, error.retry_after)

    async def _call_in_turn(self, vins: Sequence[str], deadline: float) -> dict[str, Decoded]:
        self._check_breaker()
        try:
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        except TimeoutError:
            raise VpicUnavailable(503, "Too many VINs are waiting for vPIC; ask again later.") from None
        try:
            await self._keep_to_rate(deadline)
            self._check_breaker()  # once more: it may have opened while this call waited
            return await self._call_guarded(vins, deadline)
        finally:
            self._places.release()

    async def _keep_to_rate(self, deadline: float) -> None:
        while not await self._calls.hit(self._rate):
            free_at, _ = await self._calls.get_window_stats(self._rate)
            wait = max(0.01, free_at - time.time())
            if asyncio.get_running_loop().time() + wait > deadline:
                raise VpicUnavailable(503, "Too many VINs are waiting for vPIC; ask again later.", retry_after=wait)
            await asyncio.sleep(wait)

    def _check_breaker(self) -> None:
        """Raises VpicUnavailable while vPIC is left alone; after that, lets one call through to probe it."""
        if self._breaker.opened or (not self._breaker.closed and self._probing):
            wait = max(1, self._breaker.open_remaining)
            raise VpicUnavailable(503, "vPIC fails and is left alone for now; ask again later.", retry_after=wait)

    async def _call_guarded(self, vins: Sequence[str], deadline: float) -> dict[str, Decoded]:
        """One call that the breaker, the log and the telemetry know of."""
        started, outcome = time.perf_counter(), "ok"
        self._probing = probe = not self._breaker.closed
        try:
            with self._breaker:
                return await self._call(vins, deadline)
        except VpicUnavailable as error:
            outcome = {503: "refused", 504: "timeout"}.get(error.status, "failed")
            others = f" and {len(vins) - 1} more" if len(vins) > 1 else ""
            took = time.perf_counter() - started
            cause = " ".join(error.cause.split())  # aiohttp's have line breaks in them
            log.warning("vPIC call failed: %s%s: %s after %.2f s", vins[0], others, cause, took)
            raise
        finally:
            vpic_duration.record(time.perf_counter() - started, {"outcome": outcome})
            if probe:
                self._probing = False
            self._note_breaker()

    def _note_breaker(self) -> None:
        if self._breaker.closed and self._open_since is not None:
            self._open_since = None
            breaker_gauge.set(0)
            log.info("breaker closed: vPIC answers again")
        elif not self._breaker.closed and self._open_since is None:
            self._open_since = time.time()
            breaker_gauge.set(1)
            log.warning("breaker open: vPIC is left alone for %g s at a time", self._breaker_seconds)

    async def _call(self, vins: Sequence[str], deadline: float) -> dict[str, Decoded]:
        """One HTTP call, its answer parsed. Whatever goes wrong comes out as VpicUnavailable."""
        try:
            async with asyncio.timeout_at(deadline), self._request(vins) as response:
                if response.status != 200:
                    raise self._refusal(response.status, response.headers.get("Retry-After"))
                return parse(await self._body(response), vins)
        except TimeoutError:
            raise VpicUnavailable(504, "vPIC did not answer in time; ask again later.", cause="no answer") from None
        except aiohttp.ClientError as error:
            cause = f"{type(error).__name__}: {error}"
            raise VpicUnavailable(502, "vPIC cannot be reached; ask again later.", cause=cause, again=True) from None
        except ValueError as error:
            detail = "vPIC's answer makes no sense; ask again later."
            raise VpicUnavailable(502, detail, cause=f"unusable answer: {error}") from None

    def _request(self, vins: Sequence[str]) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        # A redirect would leave the address that the operator chose; it is a failure like any other status.
        if len(vins) == 1:
            url = f"{self._url}/vehicles/DecodeVinValues/{vins[0]}"
            return self._session.get(url, params={"format": "json"}, allow_redirects=False)
        # With the format in the URL only, vPIC answers in XML.
        form = {"format": "json", "data": ";".join(vins)}
        return self._session.post(f"{self._url}/vehicles/DecodeVINValuesBatch/", data=form, allow_redirects=False)

    @staticmethod
    def _refusal(status: int, retry_after: str | None) -> VpicUnavailable:
        wait = retry_after_seconds(retry_after) if status in (429, 503) else None
        return VpicUnavailable(
            503 if status in (403, 429, 503) else 502,
            f"vPIC refuses to answer (status {status}); ask again later.",
            cause=f"status {status}" + (f", Retry-After {retry_after}" if wait is not None else ""),
            again=status >= 500 or wait is not None,
            retry_after=wait,
        )

    @staticmethod
    async def _body(response: aiohttp.ClientResponse) -> bytes:
        """The body, unpacked piece by piece. Raises ValueError once it is larger than any honest answer."""
        body = bytearray()
        async for chunk in response.content.iter_chunked(2**16):
            body += chunk
            if len(body) > ANSWER_BYTES:
                raise ValueError(f"more than {ANSWER_BYTES} bytes")
        return bytes(body)


async def send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """After a torn connection aiohttp would send a GET again by itself, past our attempts, rate and breaker."""
    try:
        return await send(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from None


@asynccontextmanager
async def open_vpic(settings: Settings) -> AsyncIterator[Vpic | None]:
    """vPIC with its session, or None where the settings say offline only."""
    if not settings.vpic_url:
        log.warning("VINCACHE_VPIC_URL is empty: VINs are decoded offline")
        yield None
        return
    stamina.instrumentation.set_on_retry_hooks([])  # a failed call has its line already
    async with aiohttp.ClientSession(
        headers={"User-Agent": "vincache/1.0"},
        timeout=aiohttp.ClientTimeout(total=None),  # each call has its own deadline
        connector=aiohttp.TCPConnector(limit=settings.vpic_concurrency),
        trust_env=True,  # egress proxies are common
        middlewares=[send_once],
    ) as session:
        yield Vpic(session, settings)


# ======================================================================================================================
# Offline: vPIC's data of some months ago, inside the package ultravin. Less than vPIC's word, more than an error.
# ======================================================================================================================


def offline_installed() -> bool:
    return importlib.util.find_spec("ultravin") is not None


def decode_offline(vins: Sequence[str]) -> dict[str, Decoded]:
    """Decode without vPIC, some 0.1 ms a VIN; nothing where ultravin is not installed."""
    try:
        import ultravin  # 30 MB that a service with a healthy vPIC never needs
    except ImportError:
        return {}
    found = {}
    for vin in vins:
        elements = {element["code"]: element["value"] for element in ultravin.decode(vin, full=True)["elements"]}
        found[vin] = translate({key: elements.get(key, "") for key in VPIC_KEYS.values()} | {"VIN": vin})
    return found


# ======================================================================================================================
# Lookup: the walk of a VIN through the rooms above. Whatever vPIC does, it ends in an answer, or in one clear error.
# ======================================================================================================================

Landing = Answer | VpicUnavailable

CHUNK = 100  # lines of a batch at once: a single hit waits no longer than these take


class Flight(NamedTuple):
    """A fetching under way: what it will say of each of its VINs, and when it gives up on vPIC (loop time)."""

    task: asyncio.Task[dict[str, Landing]]
    deadline: float


class Lookups:
    """Every lookup goes through here; use as `async with`, which ends the flights under way at exit."""

    def __init__(self, cache: Cache, vpic: Vpic | None, settings: Settings) -> None:
        self._cache = cache
        self._vpic = vpic
        self._settings = settings
        self._flights: dict[str, Flight] = {}
        self._batch_places = asyncio.Semaphore(self._half)

    @property
    def _half(self) -> int:
        # What batches leave free of vPIC's places is for single lookups.
        return max(1, self._settings.vpic_concurrency // 2)

    async def __aenter__(self) -> "Lookups":
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = {flight.task for flight in self._flights.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def hit(self, vin: str) -> Answer | None:
        """The cached answer, if it is fresh."""
        if answer := await self._cache.hit(vin):
            lookups_counter.add(1, {"outcome": "hit"})
        return answer

    async def lookup(self, vin: str) -> Answer:
        """The answer for one VIN, within `vpic_timeout`. Raises VpicUnavailable if there is none to be had."""
        if answer := await self.hit(vin):
            return answer
        landing = await self._land(vin)
        self._count(landing)
        if isinstance(landing, VpicUnavailable):
            raise landing.about(vin)
        return landing

    async def _land(self, vin: str) -> Landing:
        deadline = asyncio.get_running_loop().time() + self._settings.vpic_timeout
        flight = self._flights.get(vin) or self._take_off([vin], deadline)
        try:
            # Only a batch's flight may take longer than this lookup has; any other ends in time by itself.
            async with asyncio.timeout_at(deadline if flight.deadline > deadline else None):
                return (await asyncio.shield(flight.task))[vin]
        except TimeoutError:
            late = VpicUnavailable(504, "vPIC did not answer in time; ask again later.")
            return (await self._fall_back([vin], await self._cache.records([vin]), late))[vin]

    def _take_off(self, vins: Sequence[str], deadline: float) -> Flight:
        """Start the one flight of these VINs. Nobody who leaves can cancel it."""
        task = asyncio.create_task(self._fly(vins, deadline))
        flight = Flight(task, deadline)
        self._flights |= dict.fromkeys(vins, flight)

        def landed(task: asyncio.Task[dict[str, Landing]]) -> None:
            for vin in vins:
                del self._flights[vin]
            if not task.cancelled() and (bug := task.exception()):
                log.error("lookup failed: %s", vins[0], exc_info=bug)

        task.add_done_callback(landed)
        return flight

    async def _fly(self, vins: Sequence[str], deadline: float) -> dict[str, Landing]:
        """Fetch the VINs: from vPIC, else as `_fall_back` can. What is new is stored."""
        # Once more the cache: the flight before this one may have landed since the caller looked.
        records = await self._cache.records(vins)
        fresh = {vin: record for vin, record in records.items() if record.expires_at > time.time()}
        landings: dict[str, Landing] = {vin: record.answer("hit") for vin, record in fresh.items()}
        if wanted := [vin for vin in vins if vin not in landings]:
            failure = VpicUnavailable(502, "vPIC's answer does not describe this VIN; ask again later.")
            decoded: dict[str, Decoded] = {}
            try:
                decoded = await self._ask(wanted, deadline)
            except VpicUnavailable as error:
                failure = error
            landings |= await self._keep(decoded, "vpic")
            if missing := [vin for vin in wanted if vin not in landings]:
                landings |= await self._fall_back(missing, records, failure)
        return landings

    async def _ask(self, vins: Sequence[str], deadline: float) -> dict[str, Decoded]:
        if self._vpic is None:
            raise VpicUnavailable(503, "vPIC is switched off, and the offline data does not serve.")
        return await self._vpic.decode(vins, deadline)

    async def _keep(self, decoded: dict[str, Decoded], source: Literal["vpic", "offline"]) -> dict[str, Landing]:
        """Store what was decoded, and make answers of it."""
        now = time.time()
        records = {}
        for vin, words in decoded.items():
            life = self._settings.ttl if words.decodable else self._settings.invalid_ttl
            life = life if source == "vpic" else self._settings.offline_ttl
            records[vin] = Record(*words, source, words.decodable, int(now), math.ceil(now + life))
        if records:
            await self._cache.store(records.values())
        return {vin: record.answer(source) for vin, record in records.items()}

    async def _fall_back(
        self, vins: Sequence[str], records: dict[str, Record], failure: VpicUnavailable
    ) -> dict[str, Landing]:
        """Answer without vPIC: with the expired row, else offline, else with the failure."""
        # Where there is no vPIC to wait for, an expired offline row is decoded anew: the package may be newer.
        stale = {
            vin: record
            for vin, record in records.items()
            if vin in vins and (self._vpic is not None or record.source == "vpic")
        }
        if stale:
            await self._cache.extend(list(stale), math.ceil(time.time() + self._settings.stale_ttl))
        landings: dict[str, Landing] = {vin: record.answer("stale") for vin, record in stale.items()}
        rest = [vin for vin in vins if vin not in stale]
        if rest and self._settings.offline:
            landings |= await self._keep(await asyncio.to_thread(decode_offline, rest), "offline")
        return dict.fromkeys(rest, failure) | landings

    @staticmethod
    def _count(landing: Landing) -> None:
        outcome = "failed" if isinstance(landing, VpicUnavailable) else landing.outcome
        lookups_counter.add(1, {"outcome": outcome})

    async def batch(self, given: Sequence[str]) -> AsyncIterator[str]:
        """The lines for `given`, in its order, some at a time, as soon as each can be told."""
        lines: dict[str, str] = {}  # by VIN as given
        missing: dict[str, str] = {}  # normal VIN, by VIN as given
        told = 0
        for start in range(0, len(given), CHUNK):
            some = given[start : start + CHUNK]
            await self._tell_cached(some, lines, missing)
            if not missing:
                yield join(map(lines.__getitem__, some))
                told = start + len(some)
        groups = self._group(list(dict.fromkeys(missing.values())))
        try:
            ready: list[str] = []
            for raw in given[told:]:
                if raw not in lines:
                    if ready:
                        yield join(ready)
                        ready = []
                    vin = missing[raw]
                    # Shielded: a leaving caller would cancel this group first, and so let the next one take off.
                    lines[raw] = tell(vin, (await asyncio.shield(groups[vin]))[vin])
                ready.append(lines[raw])
                if len(ready) == CHUNK:
                    yield join(ready)
                    ready = []
            if ready:
                yield join(ready)
        finally:
            for group in groups.values():  # the caller may have left; a flight under way lands and is cached
                group.cancel()

    async def _tell_cached(self, some: Sequence[str], lines: dict[str, str], missing: dict[str, str]) -> None:
        """Add to `lines` what needs no vPIC, and to `missing` the rest."""
        new = [raw for raw in some if raw not in lines and raw not in missing]
        fresh = await self._cache.lines(new)  # as given, for what is cached is normal: most need no more than this
        lines |= fresh
        odd = {}
        for raw in new:
            if raw not in lines:
                try:
                    odd[raw] = normalize_vin(raw)
                except PydanticCustomError as error:
                    lines[raw] = compact({"vin": raw, "status": 422, "detail": error.message()})
        cached = await self._cache.lines(list(odd.values())) if odd else {}
        for raw, vin in odd.items():
            if vin in cached:
                lines[raw] = cached[vin]
            else:
                missing[raw] = vin
        lookups_counter.add(len(fresh) + len(cached), {"outcome": "hit"})

    def _group(self, vins: Sequence[str]) -> dict[str, asyncio.Task[dict[str, Landing]]]:
        """A task for every 50 VINs, by VIN; they take off in turn."""
        # This batch queues up with no more than it may have under way, so that the next batch is not kept waiting.
        places = asyncio.Semaphore(self._half)
        groups = {}
        for start in range(0, len(vins), VPIC_VINS):
            some = vins[start : start + VPIC_VINS]
            groups |= dict.fromkeys(some, asyncio.create_task(self._land_group(some, places)))
        return groups

    async def _land_group(self, vins: Sequence[str], places: asyncio.Semaphore) -> dict[str, Landing]:
        async with places, self._batch_places:
            own = [vin for vin in vins if vin not in self._flights]
            if own:
                self._take_off(own, asyncio.get_running_loop().time() + self._settings.vpic_batch_timeout)
            flights = {vin: self._flights[vin] for vin in vins}
            landings = {vin: (await asyncio.shield(flight.task))[vin] for vin, flight in flights.items()}
        for landing in landings.values():
            self._count(landing)
        return landings


def compact(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"))


def join(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def tell(vin: str, landing: Landing) -> str:
    """The batch line of a landing: the 200 body of a lookup, or its error with the status beside it."""
    if isinstance(landing, VpicUnavailable):
        return compact({"vin": vin, "status": landing.status_code, "detail": landing.detail})
    if landing.status == 200:
        return landing.body
    return f'{landing.body[:-1]},"status":{landing.status}}}'


# ======================================================================================================================
# Export: the whole table as one Parquet file. It is built by a process of its own, so that no lookup waits for it: it
# would hold Python's lock, and its SQLite driver brings a second SQLite, which must not share a process with ours.
# ======================================================================================================================

EXPORT_SILENCE = 30  # seconds; pieces come some tenths of a second apart: a process silent for so long hangs


def serve_exports() -> None:
    """The exporting process: for each order on stdin, a line of JSON, a Parquet file on stdout.

    The file comes in frames, each 4 bytes of length and so many bytes; after an empty one, the last frame says what
    went wrong, and is empty too if nothing did. It runs alone in a fresh interpreter, from this function's source as
    it was when the service started: to load the service too would take 35 MB and half a second."""
    import io
    import json
    import os
    import signal
    import sys

    import adbc_driver_manager
    import adbc_driver_sqlite.dbapi
    import pandas as pd
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; this process ends when the server does
    if hasattr(os, "nice"):
        os.nice(5)  # lookups come first, but an export under load still ends

    special = {"decoded": pa.bool_(), "fetched_at": pa.timestamp("s", "UTC"), "expires_at": pa.timestamp("s", "UTC")}

    def send(frame: bytes) -> None:
        sys.stdout.buffer.write(len(frame).to_bytes(4, "big") + frame)
        sys.stdout.buffer.flush()

    class Frames(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, piece: Any) -> int:
            send(bytes(piece))
            return len(bytes(piece))

    def write(database: str, query: str) -> None:
        with (
            adbc_driver_sqlite.dbapi.connect(database) as connection,
            connection.cursor() as cursor,
            io.BufferedWriter(Frames(), 2**18) as out,
        ):
            # Rows in one batch: more take more memory, fewer more time.
            cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": 65536})
            cursor.execute(query)  # one statement, so one consistent snapshot
            rows = cursor.fetch_record_batch()
            # The driver guesses a column's type from what is in it; an empty table says nothing.
            schema = pa.schema([(name, special.get(name, pa.string())) for name in rows.schema.names])
            types = {field.name: pd.ArrowDtype(field.type) for field in schema}
            # The rows come in the order of their VINs, all different: statistics serve a search for those, a dictionary
            # serves any other column.
            with ParquetWriter(
                out, schema, compression="zstd", use_dictionary=schema.names[1:], write_statistics=["vin"]
            ) as parquet:
                for batch in rows:
                    frame = batch.to_pandas(types_mapper=pd.ArrowDtype).astype(types)
                    parquet.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))

    for order in sys.stdin:
        try:
            write(**json.loads(order))
            fault = ""
        except adbc_driver_manager.Error as error:
            fault = str(error)[:1000]
        except OSError:
            os._exit(1)  # the server has gone
        send(b"")
        send(fault.encode())


EXPORT_PROGRAM = f"{inspect.getsource(serve_exports)}\nserve_exports()"  # now: the file may be replaced while we run


class Exporter:
    """Builds exports, one at a time; use as `async with`. The first one starts the process, which is kept."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._process: asyncio.subprocess.Process | None = None
        self._building = asyncio.Lock()
        self._builds: set[asyncio.Task[mmap.mmap]] = set()
        self._queued: asyncio.Task[mmap.mmap] | None = None

    async def __aenter__(self) -> "Exporter":
        return self

    async def __aexit__(self, *_: object) -> None:
        for build in self._builds:  # else the next would start the process anew
            build.cancel()
        await asyncio.gather(*self._builds, return_exceptions=True)
        await self._stop()

    async def parquet(self) -> mmap.mmap:
        """The table as a Parquet file in memory, at least as new as this call. Raises ExportFailed.

        Who comes while one is built shares the next: however many wait, only two are there at a time."""
        if self._queued is None:
            self._queued = asyncio.create_task(self._build_in_turn())
            self._builds.add(self._queued)
            self._queued.add_done_callback(self._builds.discard)
            self._queued.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._queued)

    async def _build_in_turn(self) -> mmap.mmap:
        async with self._building:
            self._queued = None  # whoever comes from here on may have stored what this snapshot will lack
            try:
                return await self._build()
            except (OSError, EOFError, NotImplementedError, sqlite3.DatabaseError) as error:
                log.warning("export failed: %s", str(error) or type(error).__name__)
                if not isinstance(error, sqlite3.DatabaseError):  # of the process nothing more can be expected
                    await self._stop()
                elif "malformed" in str(error) or "not a database" in str(error):
                    await self._cache.doubt(str(error))
                raise ExportFailed("The export could not be built; ask again.") from None

    async def _build(self) -> mmap.mmap:
        """The file, as the exporting process writes it.

        Raises sqlite3.DatabaseError with what that process says of the database, and OSError (TimeoutError is one),
        EOFError or NotImplementedError if it says nothing at all."""
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                EXPORT_PROGRAM,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=2**19,
            )
        orders = cast(asyncio.StreamWriter, self._process.stdin)
        frames = cast(asyncio.StreamReader, self._process.stdout)
        order = {"database": f"{self._cache.path.as_uri()}?mode=ro", "query": SNAPSHOT}
        orders.write(f"{json.dumps(order)}\n".encode())
        file = open_memory()
        try:
            while piece := await self._receive(frames):
                os.write(file, piece)
            if fault := await self._receive(frames):
                raise sqlite3.DatabaseError(fault.decode())
            return mmap.mmap(file, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(file)

    @staticmethod
    async def _receive(frames: asyncio.StreamReader) -> bytes:
        async with asyncio.timeout(EXPORT_SILENCE):
            size = int.from_bytes(await frames.readexactly(4), "big")
            return await frames.readexactly(size)

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError, TimeoutError):  # TimeoutError: it hangs in the kernel, on a dead disk
                process.kill()
                await asyncio.wait_for(process.wait(), 5)


def open_memory() -> int:
    """A file descriptor on memory; where the system has no such thing, on a temporary file that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("export")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


async def pieces(parquet: mmap.mmap) -> AsyncIterator[bytes]:
    """The file in pieces: a slow reader holds one of them, not a copy of all."""
    for start in range(0, len(parquet), 2**18):
        yield parquet[start : start + 2**18]


# ======================================================================================================================
# Doors: who may come in, how often, and with how much. They stand before FastAPI takes the request apart: 401, then
# 429, then 413, then 422.
# ======================================================================================================================

Tag = Literal["lookup", "remove", "export"]  # what a request is about: the first part of its path

STORAGE_TIMEOUT = 1.0  # seconds; a storage that hangs is down, too

BODY_BYTES = 2**22  # of a POST: 100,000 VINs, white space and all

API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False, description="Needed where the operator has set a key")


class Doors:
    """The key and the limits, by what a request is about."""

    def __init__(self, settings: Settings) -> None:
        self._keys = [key.encode() for key in settings.api_keys]
        self._locked: set[Tag] = set()
        if self._keys:
            self._locked = {"remove", "export", "lookup"} if settings.private else {"remove", "export"}
        else:
            log.warning("VINCACHE_API_KEY is empty: whoever reaches this service may remove VINs and export the cache")
        given: dict[Tag, str] = {"lookup": settings.lookup_limit, "export": settings.export_limit}
        self._limits = {tag: limits.parse(limit) for tag, limit in given.items() if limit}
        try:
            # Of the clients that limits knows, redis needs nothing else; coredis holds back the versions of others.
            storage = storage_from_string(settings.rate_storage, wrap_exceptions=True, implementation="redispy")
        except (limits.errors.ConfigurationError, ValueError) as error:
            raise StartupError(f"bad settings: VINCACHE_RATE_STORAGE: {mask(str(error))}") from None
        if not isinstance(storage, Storage):
            raise StartupError("bad settings: VINCACHE_RATE_STORAGE: needs to begin with async+")
        self._counts = FixedWindowRateLimiter(storage)
        self._counting = True

    async def enter(self, scope: Scope, tag: Tag) -> None:
        """Raises a 401 without a key where one is wanted, then TooManyRequests if the client has had its share."""
        if tag in self._locked:
            given = Headers(scope=scope).get(API_KEY.model.name, "").encode("latin-1")
            # All are compared, as bytes and in constant time: the time taken tells nothing.
            if not any([hmac.compare_digest(given, key) for key in self._keys]):
                raise API_KEY.make_not_authenticated_error()
        await self.count(scope, tag)

    async def count(self, scope: Scope, tag: Tag, cost: int = 1) -> None:
        """Raises TooManyRequests if that is more than the client has left of its share; then it does not count.

        The client is known by the address that uvicorn reports."""
        if (limit := self._limits.get(tag)) is None or cost == 0:
            return
        if cost >= limit.amount > 1:
            raise TooManyRequests(f"The limit is {limit}: so many at once are more than it ever allows; send fewer.")
        client, _ = scope["client"] or ("unknown", 0)
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT):
                # First a look: what is refused must not count. Then the count decides: others may have come between.
                allowed = await self._counts.test(limit, tag, client, cost=cost)
                if allowed:
                    allowed = await self._counts.hit(limit, tag, client, cost=cost)
                reset_time = 0 if allowed else (await self._counts.get_window_stats(limit, tag, client)).reset_time
        except (limits.errors.StorageError, TimeoutError) as error:
            if self._counting:
                log.warning("VINCACHE_RATE_STORAGE fails (%s): clients are not counted", str(error) or "no answer")
            self._counting = False
            return
        self._counting = True
        if not allowed:
            raise TooManyRequests(f"The limit is {limit}; ask again later.", retry_after=reset_time - time.time())


def bounded(scope: Scope, receive: Receive) -> Receive:
    """The receiving of a body of bounded size. Raises BodyTooLarge, at once if a larger one is announced."""
    too_large = BodyTooLarge("The body is too large; send less at a time.")
    if int(Headers(scope=scope).get("content-length", 0)) > BODY_BYTES:
        raise too_large
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY_BYTES:
            raise too_large
        return message

    return receive_bounded


# ======================================================================================================================
# Lifespan: everything with a lifetime is opened here, by `async with`, so that opening and closing are one line.
# ======================================================================================================================


class State(TypedDict):
    """What the routes find in `request.state`."""

    settings: Settings
    cache: Cache
    vpic: Vpic | None
    lookups: Lookups
    exporter: Exporter
    doors: Doors


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` beside the body."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[State]:
    """Open the service. Raises StartupError, whose sentence is then the log's last word."""
    try:
        settings = read_settings()
        if not settings.vpic_url and not offline_installed():
            raise StartupError("bad settings: VINCACHE_VPIC_URL is empty and the package ultravin is not installed")
        open_log(settings.log)
        log.info("settings: %s", settings)
        doors = Doors(settings)
        async with (
            Cache(settings.database, settings.busy_timeout) as cache,
            open_vpic(settings) as vpic,
            Lookups(cache, vpic, settings) as lookups,
            Exporter(cache) as exporter,
            background(cache.sweep(settings.keep_expired)),
        ):
            # What is there now stays: the collector need not look through it again at every few requests.
            gc.freeze()
            gc.set_threshold(100_000, 50, 50)
            yield State(settings=settings, cache=cache, vpic=vpic, lookups=lookups, exporter=exporter, doors=doors)
    except StartupError:
        sys.tracebacklimit = 0  # Starlette prints a traceback: without its frames, a sentence is left
        raise


# ======================================================================================================================
# Front: what happens before FastAPI. It is one ASGI middleware, inside FastAPI's telemetry: the prefix is taken off the
# path, the doors are passed, a cached VIN is answered; everything else is for the routes.
# ======================================================================================================================

PREFIX = "/api/v1"

# A lookup as services send it, a normal VIN and nothing else: to let FastAPI take it apart takes longer than the hit.
CANONICAL = re.compile(r"/lookup(?:\?vin=([0-9A-Z]{17})|/([0-9A-Z]{17})\?)")

TAGS: dict[str, Tag] = {"lookup": "lookup", "remove": "remove", "export": "export"}


class Front:
    """The one way in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope["root_path"])
            if path == PREFIX or path.startswith(f"{PREFIX}/"):
                path = path.removeprefix(PREFIX)
                scope["root_path"] += PREFIX  # for the router: so much of the path has been dealt with
            try:
                if tag := TAGS.get(path[1:].partition("/")[0]):
                    await scope["state"]["doors"].enter(scope, tag)
                if scope["method"] == "POST":
                    receive = bounded(scope, receive)
                elif scope["method"] == "GET" and tag == "lookup":
                    canonical = CANONICAL.fullmatch(f"{path}?{scope['query_string'].decode('latin-1')}")
                    if canonical and (hit := await scope["state"]["lookups"].hit(canonical[1] or canonical[2])):
                        answer = respond(hit)
            except HTTPException as error:
                answer = await render_error(Request(scope), error)
        await answer(scope, receive, send)


def respond(answer: Answer) -> Response:
    return Response(answer.body, answer.status, media_type="application/json")


# ======================================================================================================================
# Routes: one sentence each.
# ======================================================================================================================

PARQUET = "application/vnd.apache.parquet"
JSONL = "application/jsonl"

app = FastAPI(
    title="vincache",
    version="1.0.0",
    summary="Decodes VINs with NHTSA's vPIC, once, and remembers the answer.",
    lifespan=lifespan,
    middleware=[Middleware(Front)],
    exception_handlers={HTTPException: render_error, RequestValidationError: render_error, Exception: render_error},
    redoc_url=None,
)

Told = dict[int | str, dict[str, Any]]

KEY: Told = {401: {"model": Problem, "description": "No key, or a wrong one"}}
LIMIT: Told = {429: {"model": Problem, "description": "Too many; Retry-After says when to ask again"}}
BODY: Told = {
    400: {"model": Problem, "description": "The body can't be read"},
    413: {"model": Problem, "description": "The body is too large"},
}
VIN: Told = {422: {"model": Invalid, "description": "Not a VIN, not exactly one, or not sent as JSON"}}
LOOKUP: Told = {
    **KEY,
    **VIN,
    **LIMIT,
    404: {"model": Undecodable, "description": "vPIC can't decode this VIN; that is cached too"},
    502: {"model": VinProblem, "description": "vPIC can't be reached, or its answer makes no sense"},
    503: {"model": VinProblem, "description": "vPIC refuses, or is not asked; Retry-After where it is known"},
    504: {"model": VinProblem, "description": "vPIC did not answer in time"},
}
UNAVAILABLE: Told = {503: {"model": Problem, "description": "It can't be done at the moment"}}
LINES_SENT: Told = {
    200: {
        "content": {JSONL: {"schema": {"type": "string"}, "example": '{"vin": "1XPWD40X1ED215307", "make": ...}'}},
        "description": "One line per VIN, in the order given: what /lookup answers, an error with its `status`",
    }
}
FILE_SENT: Told = {
    200: {"content": {PARQUET: {"schema": {"type": "string", "format": "binary"}}}, "description": "The file"}
}

by_key = Security(API_KEY)  # for /docs only: the door has checked it


async def single_vin(request: Request) -> None:
    """Raises a 422 if the query has `vin` more than once: the last would win, a cache before us may go by the first."""
    if len(request.query_params.getlist("vin")) > 1:
        raise RequestValidationError([{"type": "repeated", "loc": ("query", "vin"), "msg": "Give vin only once"}])


@app.get(
    "/lookup", tags=["lookup"], response_model=Vehicle, responses=LOOKUP, dependencies=[by_key, Depends(single_vin)]
)
@app.get("/lookup/{vin}", tags=["lookup"], response_model=Vehicle, responses=LOOKUP, dependencies=[by_key])
async def lookup(vin: Vin, request: Request) -> Response:
    """Decode a VIN: from the cache, else from vPIC, whose answer is then cached."""
    return respond(await request.state.lookups.lookup(vin))


@app.post("/lookup", tags=["lookup"], response_model=Vehicle, responses=LOOKUP | BODY, dependencies=[by_key])
async def lookup_posted(body: VinBody, request: Request) -> Response:
    """Decode a VIN: from the cache, else from vPIC, whose answer is then cached."""
    return respond(await request.state.lookups.lookup(body.vin))


@app.post(
    "/lookup/batch",
    tags=["lookup"],
    response_class=StreamingResponse,
    responses=LINES_SENT | KEY | VIN | LIMIT | BODY,
    dependencies=[by_key],
)
async def lookup_batch(body: BatchBody, request: Request) -> StreamingResponse:
    """Decode many VINs. Lines stream as soon as each can be told; a bad VIN spoils only its own."""
    limit = request.state.settings.batch_limit
    if len(body.vins) > limit:
        fault = {"type": "too_long", "loc": ("body", "vins"), "msg": f"At most {limit} VINs at a time"}
        raise RequestValidationError([fault])
    # The door has counted one.
    await request.state.doors.count(request.scope, "lookup", max(0, len(body.vins) - 1))
    return StreamingResponse(request.state.lookups.batch(body.vins), media_type=JSONL)


@app.delete("/remove", tags=["cache"], responses=KEY | VIN | UNAVAILABLE, dependencies=[by_key, Depends(single_vin)])
@app.delete("/remove/{vin}", tags=["cache"], responses=KEY | VIN | UNAVAILABLE, dependencies=[by_key])
async def remove(vin: Vin, request: Request) -> Removed:
    """Forget a VIN: the next lookup asks vPIC again."""
    return Removed(vin=vin, cache_delete_success=await request.state.cache.remove(vin))


@app.post("/remove", tags=["cache"], responses=KEY | VIN | UNAVAILABLE | BODY, dependencies=[by_key])
async def remove_posted(body: VinBody, request: Request) -> Removed:
    """Forget a VIN: the next lookup asks vPIC again."""
    return await remove(body.vin, request)


@app.get(
    "/export",
    tags=["export"],
    response_class=StreamingResponse,
    responses=FILE_SENT | KEY | LIMIT | UNAVAILABLE,
    dependencies=[by_key],
)
async def export(request: Request) -> StreamingResponse:
    """Download the whole cache as one Parquet file: every row, expired and undecodable ones too."""
    parquet = await request.state.exporter.parquet()
    name = f"vincache-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.parquet"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(len(parquet))}
    return StreamingResponse(pieces(parquet), headers=headers, media_type=PARQUET)


@app.get("/healthz")
@app.head("/healthz", include_in_schema=False)
async def healthz() -> Health:
    """A sign of life, no more."""
    return Health()


@app.get("/readyz", responses={503: {"model": Readiness, "description": "The cache can't be used"}})
@app.head("/readyz", include_in_schema=False)
async def readyz(request: Request, response: Response) -> Readiness:
    """Whether the cache can be read and written. vPIC's state is told, but lookups go on without it."""
    cache, vpic = await request.state.cache.check(), request.state.vpic
    response.status_code = 200 if cache == "ok" else 503
    return Readiness(
        status="ok" if cache == "ok" else "unavailable", cache=cache, vpic=vpic.state if vpic else "offline"
    )


@app.get("/", include_in_schema=False)
async def index() -> RedirectResponse:
    return RedirectResponse("docs")  # relative: under the prefix and behind a proxy, too
