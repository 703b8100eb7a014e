"""vincache: an async microservice that decodes VINs with NHTSA's vPIC, once, and remembers the answer.

The journey of a VIN:
  1. `Middleware` finds the route and checks the key, the client's limit and the size of the body.
  2. It answers a GET of a cached VIN in capitals at once, by `Cache.hit`: most journeys end here, also for a row that
     has just expired.
  3. Else `normalize_vin` makes a `Vin` of the text that was sent, or a 422, and `Lookups.lookup` looks in the cache.
  4. `_join` shares the question's ticket if there is one, else `Scheduler` has a new ticket wait for a place.
  5. `_call_vpic` asks vPIC for all tickets of a call; `Vpic.decode` has the retries, the rate and the breaker.
  6. If vPIC can't be used, or the caller's patience is over, `_answer_without_vpic` serves the expired row, else an
     offline decoding, else the failure. An offline row is confirmed later: vPIC's answer replaces it.
  7. `Cache.store` stores a new answer, and then the caller gets its `Answer`.
A batch is many such journeys, answered in order; `Fleet` reads them from an uploaded file, and `as_csv` writes their
answers beside the file's own columns. An export is one snapshot of the whole table, made by a process of its own.

The rooms, in their order; each uses only those above it:
  Settings    the variables VINCACHE_*                   Offline     decoding with the data inside ultravin
  Models      what comes in and what goes out            Lookups     tickets, the scheduler, batches
  Errors      failures, and the one renderer             Fleet       files of VINs, and answers as CSV
  Telemetry   the log and the metrics that are ours      Export      the table as Parquet; pandas is used only here
  Shared      an outage, work with or without its caller Access      the key and the clients' limits
  Rates       clients and calls, counted                 Lifespan    what is opened and closed
  Statements  all SQL but transactions and pragmas       Middleware  what happens before FastAPI
  Stores      what executes it: a file or a cluster      Routes      handlers and the OpenAPI schema
  Cache       statements as verbs, merged hits
  vPIC        translation, breaker, calls; aiohttp's only user but for the cluster

Glossary:
  VIN         vehicle identification number, 17 letters and digits
  question    what is asked and cached: a VIN, and the model year where it is given
  vPIC        NHTSA's public decoder
  call        one HTTP request to vPIC, for one question or for up to 50
  decodable   vPIC knows a make for the VIN, without its error 7; an undecodable VIN is an answer too, and is cached
  record      a row of the table `vehicles`: what was decoded, from which source, when, and until when it is fresh
  ticket      a question that waits for vPIC or is being asked, shared by all callers that ask it at that moment
  place       one of the few calls to vPIC that may be made at once
  stale       a row past its `expires_at`, served in its grace, or because vPIC can't be used
  store       what executes SQL: one SQLite file, or an rqlite cluster that many nodes of the service share
  snapshot    an export that is built: a Parquet file of all rows at one moment
  line        of a file, of the log, or of the answer of a batch (there JSON text, or the values of a CSV row)
"""

import asyncio
import base64
import codecs
import csv
import errno
import gc
import hmac
import inspect
import io
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import threading
import time
import weakref
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from copy import deepcopy
from datetime import UTC, datetime
from difflib import get_close_matches
from email.utils import formatdate, parsedate_to_datetime
from encodings.aliases import aliases
from enum import Enum
from functools import cache, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, Protocol, TypeVar, cast, get_args
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import aiosqlite
import limits.errors
import pydantic_core
import stamina
from dotenv import dotenv_values
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.telemetry._api import _route_selected
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter
from limits.storage import storage_from_string
from opentelemetry import metrics
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    OnErrorOmit,
    PlainValidator,
    SecretStr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic import Tag as UnionTag
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict
from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if sys.platform != "win32":
    import fcntl

# ======================================================================================================================
# Settings: the only room that reads the variables VINCACHE_*. Every setting has its unit and its reason.
# ======================================================================================================================


class StartupError(Exception):
    """One sentence that tells the operator why the service does not start."""


def suggest_name(name: str, known: Iterable[str]) -> str:
    """The end of an error, like ` (did you mean TTL?)`: the known name that is much like this one. Empty if none is."""
    plain = {re.sub("[^a-z]", "", word.lower()): word for word in known}
    # Of a name that a client sent, the beginning suffices: it may have megabytes.
    similar = get_close_matches(re.sub("[^a-z]", "", name[:40].lower()), plain, 1, 0.75)
    return f" (did you mean {plain[similar[0]]}?)" if similar else ""


def check_url(url: str) -> str:
    """The URL without a trailing slash. Raises ValueError unless a path and a query can be added, or it is empty."""
    with suppress(ValueError):  # of urllib, whose sentence may have a part of a password in it
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if not url or (is_http and not re.search(r"[\s?#]", url)):
            return url.rstrip("/")
    raise ValueError(
        "not an http or https URL, or with blanks, a query, a fragment or a bad port (empty means: offline only)"
    )


def check_origins(origins: str) -> str:
    """The origins as given. Raises ValueError unless each is one as a browser sends it, or `*` for all."""
    if origins and not all(
        re.fullmatch(r"\*|https?://[a-z0-9.:\[\]-]+", origin.strip()) for origin in origins.split(",")
    ):
        raise ValueError("not origins in small letters, like https://fleet.example.com,https://example.com")
    return origins


def check_limit(limit: str) -> str:
    """The rate limit as given. Raises ValueError unless it is empty, or one limit like `10/minute`."""
    if limit and (len(parsed := limits.parse_many(limit)) != 1 or parsed[0].amount < 1):
        raise ValueError("not one limit like 10/minute (empty means: none)")
    return limit


def find_cluster(database: str) -> tuple[list[str], str, str] | None:
    """Of a URL like `rqlite://user:password@db1:4001,db2:4001` the nodes' URLs, the user and the password, both empty
    if none are given. None for a path. Else raises ValueError."""
    scheme, is_url, rest = database.partition("://")
    if not is_url:
        return None
    credentials, _, hosts = rest.rpartition("@")
    user, password = map(unquote, credentials.partition(":")[::2])
    nodes = [re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+)(?::([0-9]+))?", host, re.ASCII) for host in hosts.split(",")]
    if (
        scheme not in ("rqlite", "rqlites")
        or not all(node and 0 < int(node[1] or 4001) < 2**16 for node in nodes)
        or re.search(r"\s", credentials)  # `mask` would not hide them in the log
        or ":" in user  # Basic authorization can't send it
    ):
        raise ValueError("neither a path nor like rqlite://user:password@db1:4001,db2:4001")
    http = "https" if scheme == "rqlites" else "http"
    return [f"{http}://{node[0]}{'' if node[1] else ':4001'}" for node in nodes if node], user, password


def check_database(database: str) -> str:
    """The path, or the URL of a cluster, as given. Raises ValueError for any other URL."""
    find_cluster(database)
    return database


def check_moment(moment: datetime) -> datetime:
    """The moment; in UTC if it names no zone. Raises ValueError if it is still to come."""
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if moment > datetime.now(UTC):
        raise ValueError("still to come: an answer could never be new enough")
    return moment


Seconds = Annotated[float, Field(gt=0, le=1e9)]
SecondsOrZero = Annotated[float, Field(ge=0, le=1e9)]
Count = Annotated[int, Field(gt=0, le=10**6)]
Moment = Annotated[datetime, AfterValidator(check_moment)]
Limit = Annotated[str, AfterValidator(check_limit)]


def mask(text: str) -> str:
    """The text without the credentials in its URLs: the user and the password, and the values of the query."""
    # With a limit and without a second ? in a name, because the search of a long text would else take seconds.
    return re.sub(r"([?&][^=&?\s]*=)[^&\s]*", r"\1***", re.sub(r"://\S{0,1000}@", "://***@", text))


ENV_FILE, ENV_ENCODING = ".env", "utf-8-sig"  # some editors begin the file with a byte order mark


class Settings(BaseSettings):
    """The environment variables `VINCACHE_*`, or the same lines in `.env`; durations are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="VINCACHE_", env_file=ENV_FILE, env_file_encoding=ENV_ENCODING, extra="ignore", frozen=True
    )

    database: Annotated[str, PlainValidator(check_database)] = (  # plain: a path need not be text
        "vincache.db"  # the cache: an SQLite file, which is made if it is missing; or `rqlite://...`, a cluster
    )
    ttl: Seconds = 30 * 86400  # a decoded VIN stays fresh for this long: vPIC's data change with its releases
    invalid_ttl: Seconds = 86400  # an undecodable one: its manufacturer may register tomorrow
    grace: SecondsOrZero = 7 * 86400  # a row that expired no longer ago is served at once, then vPIC is asked again
    fresh_since: Moment | None = None  # what vPIC said before counts as just expired: its data changed, or were wrong
    keep_expired: Seconds = 30 * 86400  # an expired row is kept for this long, for outages of vPIC; then it is deleted
    attributes: bool = True  # store all that vPIC says, for details=true: some 1.3 kB a VIN
    busy_timeout: Seconds = 2  # a write waits this long for a locked file; then the answer is sent but not stored

    vpic_url: Annotated[str, AfterValidator(check_url)] = "https://vpic.nhtsa.dot.gov/api"  # empty: decode all offline
    vpic_timeout: Seconds = 8  # the deadline of one lookup, retries and waiting included
    # How long a caller waits for vPIC before it is answered without it. Unset: a lookup until its deadline, a batch
    # until vPIC has failed for long.
    patience: SecondsOrZero | None = None
    # The deadline of one call for 50 VINs, of which vPIC decodes some 20 a second. It is also how long vPIC has to fail
    # before the lines of a batch are answered without it.
    vpic_batch_timeout: Seconds = 30
    vpic_concurrency: Count = 8  # calls to vPIC at once
    vpic_rate: Count = 1000  # calls to vPIC in any minute: NHTSA asks for no more
    nodes: Count = 1  # processes that share this rate, workers and machines multiplied, where no storage counts it
    breaker_failures: Count = 5  # after so many failed calls in a row, for different VINs, vPIC is not called
    breaker_seconds: Seconds = 30  # for this long; then one call tests whether vPIC works again
    stale_ttl: Seconds = 60  # after vPIC failed for an expired row, the row is served for this long without a new call
    offline: bool = True  # decode with the vPIC data in the package ultravin when there is no other answer
    offline_ttl: Seconds = 3600  # a VIN that vPIC did not answer is not asked again for this long

    batch_limit: Annotated[int, Field(gt=0, le=100_000)] = 10_000  # VINs in one batch of JSON
    upload_bytes: Annotated[int, Field(gt=0)] = 2**30  # of one file of VINs, which is stored beside the database
    export_limit: Limit = "10/minute"  # exports built per client; empty: no limit
    lookup_limit: Limit = ""  # lookups per client, a batch counts its VINs; empty: no limit
    rate_storage: Annotated[str, Field(pattern=r"^\S*$")] = (
        "async+memory://"  # where clients and calls to vPIC are counted; processes share `async+redis://...`
    )
    # The keys for /remove, /export and /metrics, comma-separated; empty: no key is needed.
    api_key: SecretStr = SecretStr("")
    private: bool = False  # lookups need a key too
    max_age: Annotated[int, Field(ge=0, le=10**9)] = 0  # seconds for which HTTP caches may answer without asking us
    cors_origins: Annotated[str, AfterValidator(check_origins)] = ""  # pages of these origins may read our answers
    log: Literal["text", "json"] = "text"  # the form of a line of the log
    log_vins: bool = True  # false: our lines of the log have 1XP..........5307 for a VIN
    metrics: bool = False  # serve /metrics for Prometheus; it needs a key if one is set

    @property
    def upload_folder(self) -> Path:
        """The folder for uploads and exports: the database's, because in a container no other may be writable."""
        is_file = find_cluster(self.database) is None
        return Path(self.database).absolute().parent if is_file else Path(tempfile.gettempdir())

    @property
    def api_keys(self) -> list[str]:
        return [key.strip() for key in self.api_key.get_secret_value().split(",") if key.strip()]

    @model_validator(mode="after")
    def check_together(self) -> "Settings":
        if not self.vpic_url and not self.offline:
            raise ValueError(
                "VINCACHE_VPIC_URL is empty and VINCACHE_OFFLINE is false: there is nothing to decode with"
            )
        if self.api_key.get_secret_value() and not self.api_keys:
            raise ValueError("VINCACHE_API_KEY is set but has no key in it: nothing would be protected")
        if self.patience is not None and self.patience > self.vpic_timeout:
            raise ValueError("VINCACHE_PATIENCE is longer than VINCACHE_VPIC_TIMEOUT, the deadline of a lookup")
        if self.private and not self.api_keys:
            raise ValueError("VINCACHE_PRIVATE is true but VINCACHE_API_KEY is empty: every lookup would be refused")
        return self

    def __str__(self) -> str:
        """The effective settings in one line, without keys and without the credentials in URLs."""
        values = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in self
        }
        return " ".join(f"{name}={mask(str(value))}" for name, value in values.items())


# Kubernetes sets these variables in every container for each service, so also for a service whose name begins with
# vincache, like vincache-redis. For a name that merely ends in _PORT the value has to be an address, else it is a typo.
KUBERNETES = re.compile(
    r"VINCACHE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)="
    r"|VINCACHE_(\w+_)?PORT=(tcp|udp|sctp)://"
)


def find_unknown_settings() -> list[str]:
    """An error for each VINCACHE_ variable that is no setting: with a typo in API_KEY all routes would be open."""
    known = [name.upper() for name in Settings.model_fields]
    given = {**dotenv_values(ENV_FILE, encoding=ENV_ENCODING), **os.environ}
    names = {name.upper() for name, value in given.items() if not KUBERNETES.match(f"{name.upper()}={value}")}
    unknown = sorted(name[9:] for name in names if name.startswith("VINCACHE_") and name[9:] not in known)
    return [f"VINCACHE_{name} is no setting{suggest_name(name, known)}" for name in unknown]


def read_settings() -> Settings:
    """The settings. Raises StartupError with a sentence that names each bad one."""
    try:
        errors = find_unknown_settings()
        settings = Settings()
    except UnicodeDecodeError:
        errors = [f"{ENV_FILE} is not UTF-8"]
    except ValidationError as error:
        errors += [
            "".join(f"VINCACHE_{name}: ".upper() for name in fault["loc"]) + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors()
        ]
    if errors:
        raise StartupError("bad settings: " + "; ".join(errors))
    return settings


# ======================================================================================================================
# Models: what comes in and what goes out, each declared once. A `Vin` is normalized; the VIN of a `BatchRow` is as it
# was sent.
# ======================================================================================================================

# The characters that spreadsheets, telematics and copying leave around a value: all of Unicode's controls (Cc), formats
# (Cf), which are invisible, and blanks (Zs). They are listed here, because a search for them would slow the start. The
# first two ranges are the controls, which can't be in a path.
EDGE_RANGES = (
    "0-1f 7f-9f 20 a0 ad 600-605 61c 6dd 70f 890-891 8e2 1680 180e 2000-200f 202a-202f 205f-2064 2066-206f 3000 feff"
    " fff9-fffb 110bd 110cd 13430-1343f 1bca0-1bca3 1d173-1d17a e0001 e0020-e007f"
)
EDGE_ENDS = [(first, last or first) for first, _, last in (numbers.partition("-") for numbers in EDGE_RANGES.split())]
EDGES = "".join(chr(code) for first, last in EDGE_ENDS for code in range(int(first, 16), int(last, 16) + 1))

# Quotes around a value, and the forms in which spreadsheets keep a number as text: ="..." and '...
WRAPPED = re.compile(r"=?\"(.+)\"|'(.+?)'?", re.DOTALL)

UTC_TIME = "%Y-%m-%dT%H:%M:%SZ"


@lru_cache
def utc(seconds: float) -> str:
    """Unix seconds as a time in UTC, like 2026-11-21T20:54:00Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime(UTC_TIME)


def unwrap(given: str) -> str:
    """The value without the edge characters and the quotes around it, and without a spreadsheet's text form."""
    value = given.strip(EDGES)
    if wrapped := WRAPPED.fullmatch(value):
        value = (wrapped[1] or wrapped[2]).strip(EDGES)
    return value


def normalize_vin(given: str) -> str:
    """The VIN in capitals, without what is around it. Raises unless it is 17 ASCII letters and digits: the error names
    the first other character, because it may be invisible, else the length. No character is corrected."""
    vin = unwrap(given)
    if wrong := re.search("[^0-9A-Za-z]", vin):
        raise PydanticCustomError("vin", f"character {wrong.start() + 1:,} is U+{ord(wrong[0]):04X}, not A-Z or 0-9")
    if len(vin) != 17:
        hint = ": the I in front may be a barcode label's, not the VIN's" if len(vin) == 18 and vin[0] in "Ii" else ""
        raise PydanticCustomError("vin", f"{len(vin):,} characters, not 17{hint}")
    return vin.upper()


is_normal = re.compile("[0-9A-Z]{17}").fullmatch  # a VIN as `normalize_vin` returns it


def last_model_year() -> int:
    return datetime.now(UTC).year + 2  # model years run ahead of the calendar


# A model year that is not given, as spreadsheets, databases and pandas write it.
NO_YEAR = r"-|-?0+(\.0+)?|#?[Nn]/?[Aa]|<NA>|[Nn][Aa][Nn]|[Nn][Uu][Ll][Ll]|[Nn][Oo][Nn][Ee]"
YEAR = re.compile(rf"({NO_YEAR})?|(?P<year>[0-9]{{4}})(\.0+)?")


def normalize_model_year(given: object) -> str:
    """The year as four digits, or "" if none is given. JSON may have a number; a list, CSV and a query have only text.
    Raises unless the year is from 1980 to `last_model_year`."""
    last = last_model_year()
    text = unwrap(str(given)) if isinstance(given, str | int | float | None) and not isinstance(given, bool) else "?"
    found = YEAR.fullmatch(text)
    year = found and found["year"]
    if not found or (year and not 1980 <= int(year) <= last):
        raise PydanticCustomError("model_year", f"A model year is a number from 1980 to {last}")
    return year or ""


EXAMPLE = "1XPWD40X1ED215307"
EXAMPLE_ITEMS = [EXAMPLE, {"vin": "4ENGAAA85R1000007", "model_year": "1994"}]  # of a batch


def wrapped_pattern(value: str, ends: Sequence[tuple[str, str]] = EDGE_ENDS) -> str:
    """The pattern, for the schema, of a value with any characters of these ranges around it. Those beyond U+FFFF are
    left out, because some languages have no patterns for them."""
    edge = "".join(f"\\u{first:0>4}-\\u{last:0>4}" for first, last in ends if len(last) <= 4)
    return f"^[{edge}]*({value})[{edge}]*$"


VIN_PATTERN = "[0-9A-Za-z]{17}"

Vin = Annotated[
    str,
    AfterValidator(normalize_vin),
    WithJsonSchema(
        {
            "type": "string",
            "description": "17 ASCII letters and digits, in capitals or not. Blanks, invisible characters and quotes"
            " around it, as spreadsheets leave them, are removed",
            # In `anyOf`, because /docs ignores that. Else /docs would not send a wrong VIN, and nobody would see in the
            # answer what is wrong with it.
            "anyOf": [{"type": "string", "pattern": wrapped_pattern(VIN_PATTERN)}],
            "example": EXAMPLE,  # /docs fills its field from this, and not from `examples`
        }
    ),
]


def describe_model_year(*types: dict[str, Any]) -> WithJsonSchema:
    """The schema of a model year of one of these types. It does not list the years, because a generated client would
    have a constant for each of them."""
    return WithJsonSchema(
        {
            "anyOf": [*types, {"type": "null"}],
            "description": "Where it is known: the VIN of most trucks, trailers and motorcycles means two years."
            " null, 0, - and NA mean that it is not known",
            "examples": ["1994"],
        }
    )


LAST_YEAR = last_model_year()  # of the schema; `normalize_model_year` takes a later one after New Year
LAST_DECADE, LAST_DIGIT = divmod(LAST_YEAR - 2000, 10)
YEARS = rf"19[89][0-9]|20[0-{LAST_DECADE - 1}][0-9]|20{LAST_DECADE}[0-{LAST_DIGIT}]"
ModelYear = Annotated[
    str,
    BeforeValidator(normalize_model_year),
    describe_model_year(
        {"type": "string", "pattern": wrapped_pattern(rf"({NO_YEAR}|({YEARS})(\.0+)?)?")},
        {"type": "integer", "minimum": 1980, "maximum": LAST_YEAR},
        {"type": "integer", "minimum": 0, "maximum": 0},
    ),
]

CLEAN = "0 - VIN decoded clean. Check Digit (9th position) is correct"
DOUBT = (
    "The Model Year decoded for this VIN may be incorrect. If you know the Model year, please enter it and decode again"
)

# A VIN; if a model year is given, a comma and the year follow, which is vPIC's own form. Each question has an answer of
# its own, because vPIC may decode another vehicle if the year is given.
Question = str


def make_question(vin: str, model_year: str = "") -> Question:
    return f"{vin},{model_year}" if model_year else vin


def vin_of(question: Question) -> str:
    return question[:17]


def model_year_of(question: Question) -> str:
    return question[18:]


def list_some(names: Sequence[str], describe: Callable[[str], str] = str) -> str:
    """The first three of these names, and the number of the others."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(describe, names[:3])) + more


def refuse_unknown(given: Collection[str], known: Collection[str], noun: str) -> None:
    """Raises one error for all unknown names. They are not ignored, because a caller would believe in their effect."""
    if unknown := [name for name in given if name not in known]:
        names = list_some(unknown, lambda name: ascii(name[:40]) + suggest_name(name, known))
        raise PydanticCustomError("unknown", "Unknown {noun}: {names}", {"noun": noun, "names": names})


def describe_body(schema: dict[str, Any]) -> None:
    """Say that other keys are refused. Leave out defaults: openapi-typescript would require a key that has one."""
    schema["additionalProperties"] = False
    for key in schema["properties"].values():
        key.pop("default", None)


class Body(BaseModel):
    """A JSON body; keys that it does not know are refused."""

    model_config = ConfigDict(json_schema_extra=describe_body)

    @model_validator(mode="before")
    @classmethod
    def refuse_unknown_keys(cls, given: object) -> object:
        if isinstance(given, dict):
            refuse_unknown(given, cls.model_fields, "key")
        return given


class LookupBody(Body):
    vin: Vin
    model_year: ModelYear = ""
    details: StrictBool = Field(False, description="With all that vPIC says, as `attributes`")


class RemoveBody(Body):
    vin: Vin


class BatchItem(Body):
    """A row of a batch of JSON. The VIN and the year are checked later, because a bad one must fail only its line."""

    vin: str
    model_year: Annotated[
        str | StrictInt | StrictFloat | None, describe_model_year({"type": "string"}, {"type": "number"})
    ] = ""


# Without the discriminator, pydantic would report of a wrong object that it is not a string.
Item = Annotated[
    Annotated[str, UnionTag("vin")] | Annotated[BatchItem, UnionTag("item")],
    Discriminator(lambda item: "vin" if isinstance(item, str) else "item"),
]


def check_items(given: object) -> object:
    """Raises one short error for all elements of a wrong type: pydantic would report only the first one, in 2 kB."""
    if isinstance(given, list):
        bad = [str(index) for index, item in enumerate(given) if not isinstance(item, str | dict)]
        if bad:
            message = "Neither a string nor an object with a vin: element {numbers}"
            raise PydanticCustomError("batch_item", message, {"numbers": list_some(bad)})
    return given


class BatchRow(NamedTuple):
    """A row of a batch, as the client sent it."""

    vin: str
    model_year: object = ""
    text: str = ""  # of the whole row in a CSV file, without the line end


class BatchBody(Body):
    """The body of a batch: VINs as strings, or as objects where a model year is known."""

    vins: Annotated[list[Item], FailFast(), BeforeValidator(check_items)] = Field(examples=[EXAMPLE_ITEMS])
    details: StrictBool = Field(False, description="With all that vPIC says, as `attributes` of each line")

    def rows(self) -> Iterator[BatchRow]:
        for item in self.vins:
            yield BatchRow(item) if isinstance(item, str) else BatchRow(item.vin, item.model_year)


class Vehicle(BaseModel):
    """A decoded VIN. A field is empty where vPIC has no data; `error_*` has its warnings, like a wrong check digit."""

    vin: str = Field(examples=[EXAMPLE])
    make: str = Field(examples=["PETERBILT"])
    model: str = Field(examples=["388"])
    model_year: str = Field(examples=["2014"])
    body_class: str = Field(examples=["Truck-Tractor"])
    cached_result: bool
    error_code: str = Field(examples=["0"], description="vPIC's codes, comma-separated")
    error_text: str = Field(examples=[CLEAN])
    additional_error_text: str = Field(examples=[DOUBT], description="vPIC's doubts, mostly about the model year")
    suggested_vin: str = Field(examples=[""])
    possible_values: str = Field(examples=[""], description="The characters that a wrong position may have")
    model_year_asked: str = Field(examples=[""], description="The model year that was asked for; empty: none")
    source: str = Field(examples=["vpic"], description="vpic, or offline: decoded without it")
    fetched_at: str = Field(examples=["2026-11-21T20:54:00Z"])
    attributes: dict[str, str] | None = Field(
        None, examples=[{"GVWR": "Class 8: 33,001 lb and above (14,969 kg and above)"}], description="With details=true"
    )


class BatchLine(Vehicle):
    """A line of a batch. Every line has all fields; a field is empty if nothing is known of it."""

    status: int = Field(examples=[200], description="The status that /lookup would answer with")
    detail: str = Field(examples=[""], description="The sentence of an error")


class Undecodable(Vehicle):
    """A VIN that vPIC can't decode: its error 7, or no make. It has the fields of a decoded one, some of them empty."""

    detail: str = "This VIN cannot be decoded; error_text says why."


class Removed(BaseModel):
    """`cache_delete_success` is false if the cache held no row for the VIN."""

    vin: str = Field(examples=[EXAMPLE])
    cache_delete_success: bool


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`cache` is ok or the reason why it can't be used; `vpic` is ok, offline, or `open since <time>`; `unconfirmed`
    is the number of rows that were decoded offline and not by vPIC yet, counted every minute; `offline_data` is the
    month of that data."""

    status: Literal["ok", "unavailable"]
    cache: str = Field(examples=["ok"])
    vpic: str = Field(examples=["ok"])
    unconfirmed: int = Field(examples=[0])
    offline_data: str = Field(examples=["2026-10"])


class Problem(BaseModel):
    """Every error but 422."""

    detail: str


class VinProblem(Problem):
    """vPIC can't be used, and there is neither an expired row nor an offline decoding in its place."""

    vin: str = Field(examples=[EXAMPLE])


# The fields that vPIC decodes from one VIN, by our names; a field is empty if vPIC has no data for it. `attributes` is
# a JSON object with all its other fields, by vPIC's names.
Decoding = dict[str, str]


def is_decodable(decoding: Decoding) -> bool:
    return decoding["make"] != "" and "7" not in decoding["error_code"].split(",")


FIELDS = [name for name in Vehicle.model_fields if name != "attributes"]
DECODED_FIELDS = ["make", "model", "model_year", "body_class"]  # empty where a VIN is undecodable, whatever vPIC says
UNDECODABLE = cast(str, Undecodable.model_fields["detail"].default)


class LineForm(NamedTuple):
    """The form of the lines of a batch."""

    is_csv: bool  # a line is a list of values, else JSON text
    details: bool  # a line has the attributes

    @property
    def names(self) -> list[str]:
        """The keys or columns, the same in every line, because readers take them from the first one."""
        return ["status", *FIELDS, "detail", *(["attributes"] if self.details else [])]


Line = str | Sequence[Any]


def make_line(form: LineForm, status: int, fields: dict[str, Any], detail: str, attributes: str = "{}") -> Line:
    """A line of a batch. Fields that are not given are empty; `attributes` is JSON text."""
    line = dict.fromkeys(form.names, "") | {"cached_result": False} | fields | {"status": status, "detail": detail}
    if form.details:
        line["attributes"] = attributes if form.is_csv else json.loads(attributes)
    if not form.is_csv:
        return to_json(line)
    line["cached_result"] = str(line["cached_result"]).lower()
    return [*line.values()]


def to_json(value: object) -> str:
    try:
        return pydantic_core.to_json(value).decode()  # takes a third of the time of json.dumps
    except pydantic_core.PydanticSerializationError:  # a text from a client has half of a surrogate pair
        return json.dumps(value, separators=(",", ":"))


class Answer(NamedTuple):
    """The answer of a lookup; times are unix seconds."""

    status: int  # of the response: 200 or 404
    body: str  # JSON text
    outcome: str  # a key of X_CACHE
    fetched_at: int  # when vPIC or the offline data gave the answer
    fresh_until: int  # until then only a removal can change the answer; 0: it may change at any time


class Record(NamedTuple):
    """A row of `vehicles`: its columns in their order; and its attributes, None if they are not stored."""

    vin: str
    model_year_asked: str
    make: str
    model: str
    model_year: str
    body_class: str
    error_code: str
    error_text: str
    additional_error_text: str
    suggested_vin: str
    possible_values: str
    source: str
    decoded: int
    fetched_at: int
    expires_at: int
    attributes: str | None

    @property
    def status(self) -> int:
        return 200 if self.decoded else 404

    def is_usable(self, now: float, details: bool) -> bool:
        """Whether the row is an answer: it is fresh or an offline one, and has the attributes if they are wanted."""
        in_time = self.source == "offline" or self.expires_at > now
        return in_time and (self.attributes is not None or not details)

    def fields(self, outcome: str) -> dict[str, Any]:
        """The fields of an answer. FIELDS_SQL makes the same of a row in SQL."""
        fields = {name: getattr(self, name, None) for name in FIELDS}
        if not self.decoded:
            fields |= dict.fromkeys(DECODED_FIELDS, "")
        return fields | {"cached_result": outcome in ("hit", "stale"), "fetched_at": utc(self.fetched_at)}

    def answer(self, outcome: str, details: bool) -> Answer:
        """The answer of a lookup with this record."""
        body = self.fields(outcome)
        if not self.decoded:
            body["detail"] = UNDECODABLE
        if details:
            body["attributes"] = json.loads(self.attributes or "{}")
        fresh_until = self.expires_at if self.source == "vpic" and outcome != "stale" else 0
        return Answer(self.status, to_json(body), outcome, self.fetched_at, fresh_until)

    def line(self, outcome: str, form: LineForm) -> Line:
        """The line of a batch with this record."""
        detail = "" if self.decoded else UNDECODABLE
        return make_line(form, self.status, self.fields(outcome), detail, self.attributes or "{}")


COLUMNS = Record._fields[:-1]


# ======================================================================================================================
# Errors: each is an HTTPException with a status and one sentence for the caller. It has a class of its own only if the
# service catches it. `render_error` renders them all.
# ======================================================================================================================


def retry_after_header(seconds: float) -> dict[str, str]:
    """The header Retry-After: at least 1, because a client would ask again at once after 0."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


class Failure(NamedTuple):
    """A reason why vPIC gives no answer."""

    status: int  # of the response, if the VIN is not answered without vPIC
    detail: str  # for the caller
    try_again: bool = False  # the same call may succeed in a moment
    blames_vin: bool = False  # a VIN of the call may be the cause
    blames_vpic: bool = True  # vPIC may be the cause: the breaker counts the failure


UNREACHABLE = Failure(502, "vPIC cannot be reached; ask again later.", try_again=True)
INTERRUPTED = Failure(502, "vPIC cannot be reached; ask again later.", try_again=True, blames_vin=True)
UNUSABLE = Failure(502, "vPIC's answer makes no sense; ask again later.", blames_vin=True)
NOT_DESCRIBED = Failure(502, "vPIC's answer does not describe this VIN; ask again later.", blames_vpic=False)
TOO_LATE = Failure(504, "vPIC did not answer in time; ask again later.", blames_vin=True)
TOO_LITTLE_TIME = TOO_LATE._replace(blames_vpic=False)  # a working vPIC could not have answered either
LEFT_ALONE = Failure(503, "vPIC fails and is left alone for now; ask again later.")
CROWDED = Failure(503, "Too many VINs are waiting for vPIC; ask again later.", blames_vpic=False)
SWITCHED_OFF = Failure(503, "vPIC is switched off, and this VIN cannot be decoded offline.")
SERVICE_FAULT = Failure(503, "The service failed to ask vPIC; its log has the cause.")


class VpicUnavailable(HTTPException):
    """vPIC gave no usable answer. `cause` is for the log, `retry_after` (seconds) and the VIN are for the caller."""

    def __init__(self, failure: Failure, cause: str = "", *, retry_after: float | None = None, vin: str = "") -> None:
        self.failure, self.cause, self.retry_after, self.vin = failure, cause, retry_after, vin
        super().__init__(
            failure.status, failure.detail, None if retry_after is None else retry_after_header(retry_after)
        )

    def about(self, vin: str) -> "VpicUnavailable":
        """A copy for one caller and its VIN, because a shared exception would collect the tracebacks of all callers."""
        wait = self.retry_after
        if wait is None and self.failure.status == 503 and self.cause:
            wait = 60  # a 503 with a cause is vPIC's own refusal, and vPIC counts calls by the minute
        return VpicUnavailable(self.failure, retry_after=wait, vin=vin)


def invalid(kind: str, loc: tuple[str | int, ...], msg: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": loc, "msg": msg}])


SEND_JSON = "Send JSON with Content-Type: application/json"
NOT_STORED = {"Cache-Control": "no-store"}  # because an HTTP cache may store some errors, like a 404


async def render_error(request: Request, error: Exception) -> JSONResponse:
    """The response for an error: of this service, of FastAPI's validation, of Starlette's routing, or for a bug."""
    if isinstance(error, RequestValidationError):
        if isinstance(error.body, bytes):  # FastAPI has not parsed it, because its type is not JSON
            error = invalid("content_type", ("body",), SEND_JSON)
        # Without `input` and `ctx`, because a lone surrogate or a NaN in what was sent would make this a 500.
        faults = [{key: fault[key] for key in ("type", "loc", "msg")} for fault in error.errors()]
        return JSONResponse({"detail": faults}, 422, NOT_STORED)
    if isinstance(error, HTTPException):
        body = {"detail": error.detail} | ({"vin": error.vin} if isinstance(error, VpicUnavailable) else {})
        return JSONResponse(body, error.status_code, NOT_STORED | dict(error.headers or {}))
    return JSONResponse({"detail": "The service failed to answer this; its log has the cause."}, 500, NOT_STORED)


# ======================================================================================================================
# Telemetry: the log, and the metrics of lookups, of the store and of vPIC. FastAPI makes the spans and HTTP metrics.
# ======================================================================================================================

log = logging.getLogger("vincache")
VERSION = "1.0.0"  # of this service; the metrics and each export have it

# Without the OpenTelemetry SDK these do nothing.
meter = metrics.get_meter("vincache")
lookups_counter = meter.create_counter("vincache.lookups", description="VINs looked up, by outcome")
# From the time of a hit in a file to that of the longest call. OpenTelemetry's own boundaries are for milliseconds.
BOUNDARIES_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
create_histogram = partial(meter.create_histogram, unit="s", explicit_bucket_boundaries_advisory=BOUNDARIES_S)
vpic_duration = create_histogram("vincache.vpic.duration", description="Duration of calls to vPIC, by outcome")
store_duration = create_histogram("vincache.store.duration", description="Duration of statements, by store and outcome")
export_duration = create_histogram("vincache.export.duration", description="Duration of building exports, by outcome")
waiting_gauge = meter.create_gauge("vincache.lookups.waiting", description="Lookups that wait for a call to vPIC")
calls_gauge = meter.create_gauge("vincache.vpic.calls", description="Calls to vPIC under way")
# These three are counted by the process that sweeps, when it does.
rows_gauge = meter.create_gauge("vincache.rows", description="Rows in the cache")
expired_gauge = meter.create_gauge("vincache.rows.expired", description="Rows in the cache that have expired")
size_gauge = meter.create_gauge("vincache.size", unit="By", description="Size of the database")
unconfirmed_gauge = meter.create_gauge("vincache.unconfirmed", description="Rows decoded offline, not by vPIC yet")
build_gauge = meter.create_gauge("vincache.build_info", description="1, with the versions that run")
breaker_gauge = meter.create_gauge("vincache.vpic.breaker", description="0: vPIC is asked; 1: it is left alone")

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LIKE_A_VIN = re.compile(r"(?<![0-9A-Za-z])([0-9A-Za-z]{3})[0-9A-Za-z]{10}([0-9A-Za-z]{4})(?![0-9A-Za-z])")


class TextLine(logging.Formatter):
    """Plain text. An event is one line, because control characters are escaped, also in a traceback. Times are UTC."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return CONTROL.sub(lambda control: ascii(control[0])[1:-1], super().format(record).rstrip())


class JsonLine(JsonFormatter):
    """A JSON object. An event is one line. README's log.json uses this class too, for uvicorn's parent process."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            datefmt=UTC_TIME,
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            # uvicorn's color_message repeats the message with terminal colours in it.
            reserved_attrs=[*vars(logging.makeLogRecord({})), "color_message", "message", "asctime"],
        )


def open_log(form: Literal["text", "json"], log_vins: bool) -> None:
    """Give uvicorn's log and ours the same form. Our lines have no credentials, and no VINs unless `log_vins`."""
    text = TextLine("%(asctime)s %(levelname)s %(name)s: %(message)s", UTC_TIME)
    formatter = JsonLine() if form == "json" else text
    ours = logging.StreamHandler()
    ours.setFormatter(formatter)
    logging.basicConfig(handlers=[ours])  # does nothing if the root logger has a handler
    for name in ("uvicorn", "uvicorn.access"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter)

    def mask_text(given: str) -> str:
        return mask(given) if log_vins else LIKE_A_VIN.sub(r"\1..........\2", mask(given))

    def mask_record(record: logging.LogRecord) -> bool:
        record.msg, record.args = mask_text(record.getMessage()), None
        if record.exc_info:
            record.exc_text, record.exc_info = mask_text(text.formatException(record.exc_info)), None
        return True

    log.filters[:] = [mask_record]
    log.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").filters[:] = [explain_cancellation]
    logging.getLogger("uvicorn.access").filters[:] = [is_no_health_check]


def explain_cancellation(record: logging.LogRecord) -> bool:
    """A filter. For a request that uvicorn cancels when it stops, the log has a sentence in place of the traceback."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        record.msg, record.args, record.exc_info = "request cut off: --timeout-graceful-shutdown is over", None, None
    return True


HEALTH_CHECK = re.compile(r'"(GET|HEAD) [^ ?]*/(healthz|readyz|metrics)(\?\S*)? HTTP/\S+" 200$')


def is_no_health_check(record: logging.LogRecord) -> bool:
    """A filter: health checks and scrapes that are answered with 200 have no line. They are thousands a day."""
    return HEALTH_CHECK.search(record.getMessage()) is None


@asynccontextmanager
async def open_metrics() -> AsyncIterator[None]:
    """Collect all metrics in Prometheus' registry. Raises StartupError if OpenTelemetry's exporter is not installed."""
    try:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
    except ImportError:
        why = "VINCACHE_METRICS is true but opentelemetry-exporter-prometheus is not installed"
        raise StartupError(f"bad settings: {why}") from None
    if not isinstance(metrics.get_meter_provider(), MeterProvider):  # if FastAPI sends OTLP, it has set one
        metrics.set_meter_provider(MeterProvider())
    provider = cast(MeterProvider, metrics.get_meter_provider())
    reader = PrometheusMetricReader()
    provider.add_metric_reader(reader)
    try:
        yield
    finally:
        provider.remove_metric_reader(reader)


# ======================================================================================================================
# Shared mechanisms: a list in parts, a thing that fails for a while, and work that outlives its caller or ends with it.
# ======================================================================================================================

Result = TypeVar("Result")


def in_parts(items: Sequence[Result], most: int) -> Iterator[Sequence[Result]]:
    """The items, in lists of at most so many."""
    return (items[start : start + most] for start in range(0, len(items), most))


class Outage:
    """The state of a thing that many callers use and that may fail for a while. The log says once that it fails, and
    once that it works again."""

    def __init__(self, begins: str, ends: str) -> None:
        self._begins = begins  # a line for the log, with %s for the reason
        self._ends = ends  # a line for the log
        self.reason = ""  # why the thing fails; empty: it works

    def begin(self, reason: str) -> None:
        """The thing failed."""
        if not self.reason:
            log.warning(self._begins, reason)
        self.reason = reason

    def end(self) -> None:
        """The thing worked."""
        if self.reason:
            log.info(self._ends)
            self.reason = ""


class Tasks:
    """Work that goes on when its caller leaves. A caller waits for it by `asyncio.shield`, because the work would else
    be cancelled with the caller."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()  # those that are not done

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Begin the work. If it fails and nobody ever waits for it, asyncio logs the error."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self, cancel: bool = False) -> None:
        """Wait until all work is done, or cancel it."""
        for task in self._tasks if cancel else ():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def log_error(task: asyncio.Task[None]) -> None:
    """Log the error of a task for which nobody waits. It is called when the task ends."""
    if not task.cancelled() and (error := task.exception()):
        log.error("work in the background failed", exc_info=error)


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` beside the body, and cancel it at the end."""
    task = asyncio.create_task(work)
    task.add_done_callback(log_error)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work. If the client hangs up first, the work ends, and a 499 is raised."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(499, "The client hung up")
        return working.result()
    finally:
        # This ends a lookup. A thread goes on, but asyncio does not log its error, for which nobody waits any longer.
        working.cancel()
        leaving.cancel()


# ======================================================================================================================
# Rates: the limits of clients and of calls to vPIC. They are counted in this process, or in a storage that several
# processes share. If that storage fails, requests are answered all the same.
#
# Each method that takes from a limit returns 0 and counts if there is room. Else it returns the seconds until there may
# be room, and does not count.
# ======================================================================================================================

STORAGE_TIMEOUT_S = 1  # a storage that does not answer within this time fails
STORAGE_REST_S = 5  # after a failure, the storage is not used for this time


class FixedWindow:
    """What each client has used of a limit. It is deleted as a whole when the window ends.

    The memory storage of `limits` is not used, because it goes through all clients at each request, and because its
    windows change with the clock of the machine."""

    def __init__(self) -> None:
        self._ends = 0.0  # when the next window begins (monotonic)
        self._used: dict[str, int] = {}  # by client

    def take(self, limit: RateLimitItem, client: str, cost: int, counts: bool) -> float:
        """If not `counts`, only look."""
        now = time.monotonic()
        if now >= self._ends:
            self._ends, self._used = now + limit.get_expiry(), {}
        used = self._used.get(client, 0) + cost
        if used > limit.amount:
            return self._ends - now
        if counts:
            self._used[client] = used
        return 0


class MovingWindow:
    """The times of the last calls. In any minute, whenever it begins, there are no more calls than the limit."""

    def __init__(self, limit: RateLimitItem) -> None:
        self._seconds = limit.get_expiry()
        self._times = deque([-math.inf] * limit.amount, limit.amount)  # of the last calls (monotonic)

    def take(self) -> float:
        now = time.monotonic()
        wait = self._times[0] + self._seconds - now
        if wait <= 0:
            self._times.append(now)
        return max(0, wait)


class Rates:
    """All limits of the service. Raises StartupError for a storage that can never work."""

    def __init__(self, url: str, vpic_rate: int, nodes: int) -> None:
        self._vpic_limit = RateLimitItemPerMinute(vpic_rate)  # of all processes that share the storage
        # Without a storage, each of the `nodes` processes has an equal part of the rate.
        self._vpic_window = MovingWindow(RateLimitItemPerMinute(max(1, vpic_rate // nodes)))
        self._windows: defaultdict[str, FixedWindow] = defaultdict(FixedWindow)  # of the clients, by the route's tag
        self._outage = Outage(
            "VINCACHE_RATE_STORAGE fails (%s): clients are not counted, vPIC's calls by each for itself",
            "VINCACHE_RATE_STORAGE answers again",
        )
        self._try_at = 0.0  # while the storage fails: when it is tried next (monotonic)
        self._storage: Storage | None = None  # None: this process counts for itself
        if url != "async+memory://":
            try:
                # The library redis, because `limits` would else want coredis, which needs old versions of others.
                storage = storage_from_string(url, wrap_exceptions=True, implementation="redispy")
            except (limits.errors.ConfigurationError, ValueError, TypeError) as error:
                raise StartupError(f"bad settings: VINCACHE_RATE_STORAGE: {mask(str(error))}") from None
            if not isinstance(storage, Storage):
                raise StartupError("bad settings: VINCACHE_RATE_STORAGE: needs to begin with async+")
            self._storage = storage

    async def check_storage(self) -> None:
        """Use the storage once. Raises StartupError if its URL has an option that redis does not know."""
        await self._shared(lambda storage: storage.get("vincache"))

    async def client(self, limit: RateLimitItem, tag: str, client: str, cost: int, counts: bool = True) -> float:
        """Take from a client's limit; if not `counts`, only look. While the storage fails there is always room."""
        if self._storage is None:
            return self._windows[tag].take(limit, client, cost, counts)

        async def take(storage: Storage) -> float:
            window = FixedWindowRateLimiter(storage)
            # Look first, because `hit` counts a request even if it refuses it. It may still refuse this one, because
            # others may have taken the room meanwhile.
            room = await window.test(limit, tag, client, cost=cost)
            if room and (not counts or await window.hit(limit, tag, client, cost=cost)):
                return 0
            return max(0.01, (await window.get_window_stats(limit, tag, client)).reset_time - time.time())

        return await self._shared(take) or 0

    async def vpic(self) -> float:
        """Take one call to vPIC. While the storage fails, this process counts for itself."""

        async def take(storage: Storage) -> float:
            calls, limit = MovingWindowRateLimiter(storage), self._vpic_limit
            if await calls.hit(limit, "vpic"):
                return 0
            wait = (await calls.get_window_stats(limit, "vpic")).reset_time - time.time()
            if wait > limit.get_expiry():  # a machine's clock was set back; the calls before that would count on
                await storage.clear(limit.key_for("vpic"))
            return min(max(0.01, wait), 1)  # look after a second, because other processes may free room

        wait = await self._shared(take)
        return self._vpic_window.take() if wait is None else wait

    async def _shared(self, work: Callable[[Storage], Awaitable[Result]]) -> Result | None:
        """The result of the work with the storage; None if there is none, or while it fails. Raises StartupError if the
        URL has an option that redis does not know."""
        if self._storage is None or (self._outage.reason and time.monotonic() < self._try_at):
            return None
        self._try_at = time.monotonic() + STORAGE_REST_S  # while it fails, one caller tries it at a time
        try:
            async with asyncio.timeout(STORAGE_TIMEOUT_S):
                result = await work(self._storage)
        except TypeError as error:  # `check_storage` is the first to raise it
            raise StartupError(f"bad settings: VINCACHE_RATE_STORAGE: {mask(str(error))}") from None
        except Exception as error:  # noqa: BLE001 - redis may raise anything, and requests are answered all the same
            self._outage.begin(str(error) or "no answer")
            self._try_at = time.monotonic() + STORAGE_REST_S
            return None
        self._outage.end()
        return result


# ======================================================================================================================
# Statements: all SQL but the transactions and pragmas of Stores. It is the same for a file and for a cluster.
# ======================================================================================================================

SCHEMA_VERSION = 2  # as in schema.sql
APPLICATION_ID = 0x56494E43

SCHEMA = Path(__file__).with_name("schema.sql").read_text("utf-8")
PRAGMAS, BEGIN, TABLES = SCHEMA.partition("BEGIN IMMEDIATE;")
TABLES, COMMIT, _ = TABLES.partition("COMMIT;")

# Whose database it is, the version of its schema, and how many objects it has.
DATABASE_STATE = """
SELECT (SELECT application_id FROM pragma_application_id),
       (SELECT user_version FROM pragma_user_version),
       (SELECT count(*) FROM sqlite_master)
"""

# By the schema version of a database: the statements before those of schema.sql, and the statements after them. All
# are one transaction. So if the process is killed meanwhile, the database stays as it was.
MIGRATE = {
    0: ("DROP TABLE IF EXISTS vehicles", ""),
    1: (
        "ALTER TABLE vehicles RENAME TO vehicles_1",
        """
        INSERT INTO vehicles
        SELECT vin, '', make, model, model_year, body_class, error_code, error_text, '', suggested_vin, '', source,
               decoded, fetched_at, expires_at
        FROM vehicles_1;
        DROP TABLE vehicles_1;
        """,
    ),
}

# Fails the transaction if another node has upgraded the database since its version was read.
GUARD = """
CREATE TABLE guard (found INTEGER, expected INTEGER, CHECK (found = expected));
INSERT INTO guard SELECT user_version, %d FROM pragma_user_version;
DROP TABLE guard;
"""

# The fields of an answer in SQL. `Record.fields` makes the same of a record.
FIELDS_SQL = (
    {name: name for name in FIELDS}
    | {name: f"iif(decoded, {name}, '')" for name in DECODED_FIELDS}
    | {"cached_result": "json('true')", "fetched_at": f"strftime('{UTC_TIME}', fetched_at, 'unixepoch')"}
)
STATUS = "iif(decoded, 200, 404)"
# When a row expires: now, if vPIC's answer is older than `:fresh_since`. But a row that expires within `:stale_ttl`
# keeps its time, because it may have been claimed, and then vPIC must not be asked for it again before. The 1 is there
# because `Cache._claim` rounds up.
EXPIRES_AT = """iif(fetched_at < :fresh_since AND source = 'vpic' AND expires_at > :now + :stale_ttl + 1,
  CAST(:now AS INTEGER), expires_at)"""
# A row from vPIC is also served during the grace. An offline row is served until vPIC's answer replaces it.
OUTCOME = f"iif({EXPIRES_AT} > :now OR source = 'offline', 'hit', 'stale')"
SERVED = f"{EXPIRES_AT} > :now - :grace OR source = 'offline'"


def json_object(fields: dict[str, str]) -> str:
    pairs = ", ".join(f"'{name}', {value}" for name, value in fields.items())
    return f"json_object({pairs})"


def find_cached(columns: str, details: bool) -> str:
    """The statement that selects these columns of the rows of `:questions` that may be served. But for CSV, the fields
    are JSON text already, because SQLite writes it faster than Python would."""
    # CROSS JOIN, because SQLite then looks up each question and does not read the whole table.
    return f"""
    SELECT asked.value, {columns}
    FROM json_each(:questions) AS asked
    CROSS JOIN vehicles ON vin = substr(asked.value, 1, 17) AND model_year_asked = substr(asked.value, 19)
    {"CROSS JOIN attributes USING (vin, model_year_asked)" if details else ""}
    WHERE {SERVED}
    """  # noqa: S608 - our own column names


@cache
def answers_sql(details: bool) -> str:
    more = {"attributes": "json(attributes)"} if details else {}
    body, error = json_object(FIELDS_SQL | more), json_object(FIELDS_SQL | {"detail": f"'{UNDECODABLE}'"} | more)
    fresh_until = f"iif(source = 'vpic', {EXPIRES_AT}, 0)"  # 0: vPIC's answer may replace an offline row at any time
    columns = f"{STATUS}, CASE WHEN decoded THEN {body} ELSE {error} END, {OUTCOME}, fetched_at, {fresh_until}"
    return find_cached(columns, details)


@cache
def lines_sql(form: LineForm) -> str:
    values = {"status": STATUS} | FIELDS_SQL | {"detail": f"iif(decoded, '', '{UNDECODABLE}')"}
    if form.is_csv:
        values |= {"cached_result": "'true'", "attributes": "attributes"}
        return find_cached(f"{OUTCOME}, {', '.join(values[name] for name in form.names)}", form.details)
    values |= {"attributes": "json(attributes)"}
    return find_cached(f"{OUTCOME}, {json_object({name: values[name] for name in form.names})}", form.details)


RECORDS = f"""
SELECT asked.value, removed_at, {", ".join(f"vehicles.{column}" for column in COLUMNS[:-1])}, {EXPIRES_AT}, attributes
FROM json_each(:questions) AS asked
LEFT JOIN removals ON removals.vin = substr(asked.value, 1, 17)
LEFT JOIN vehicles
  ON vehicles.vin = substr(asked.value, 1, 17) AND vehicles.model_year_asked = substr(asked.value, 19)
LEFT JOIN attributes
  ON attributes.vin = vehicles.vin AND attributes.model_year_asked = vehicles.model_year_asked
"""  # noqa: S608 - our own column names

SNAPSHOT = f"SELECT {', '.join(COLUMNS)} FROM vehicles"  # noqa: S608 - as above
# Empty texts in place of NULL, because the export's driver takes the type of a column from its first rows.
SNAPSHOT_WITH_DETAILS = f"""
SELECT {", ".join(COLUMNS)}, coalesce(attributes, '') AS attributes FROM records
"""  # noqa: S608 - as above

ROWS_MOST = 100  # in a statement that has parameters for each row: more rows would make it no faster


@cache
def store_sql(count: int) -> str:
    """The statement that stores so many records. The parameters of each are its values, and the `removed_at` of its VIN
    as it was before vPIC was asked: if the VIN was removed since then, the record is not stored. A record that was
    decoded offline never replaces one from vPIC."""
    columns = ", ".join(Record._fields)
    row = f"({', '.join('?' for _ in (*Record._fields, 'removal'))})"
    return f"""
    WITH new ({columns}, removal) AS (VALUES {", ".join([row] * count)})
    INSERT INTO records ({columns}) SELECT {columns} FROM new
    WHERE (SELECT removed_at FROM removals WHERE removals.vin = new.vin) IS removal
      AND (source = 'vpic' OR NOT EXISTS (
        SELECT 1 FROM vehicles
        WHERE vehicles.vin = new.vin AND vehicles.model_year_asked = new.model_year_asked
          AND vehicles.source = 'vpic'))
    """  # noqa: S608 - our own column names


# A row that was decoded offline is unconfirmed: from its `expires_at` on, vPIC is asked for it. A row that was served
# in its grace is refreshed. Before a process asks vPIC for such rows, it claims them: one statement selects them and
# sets a later `expires_at`. So no other process asks for them too, and if vPIC fails, it is not asked again at once.
UNCONFIRMED = "SELECT count(*) FROM vehicles WHERE source = 'offline'"
UNCONFIRMED_DUE = "SELECT 1 FROM vehicles WHERE source = 'offline' AND expires_at <= ? LIMIT 1"


def claim_sql(rows: str) -> str:
    """The statement that claims these rows until `:until`, and returns their questions."""
    # REPLACE, because rqlite returns no rows of an UPDATE that has a subquery. The attributes stay, because a REPLACE
    # does not fire the trigger of a DELETE.
    return f"""
    REPLACE INTO vehicles ({", ".join(COLUMNS)})
    SELECT {", ".join(":until" if column == "expires_at" else column for column in COLUMNS)} FROM {rows}
    RETURNING vin, model_year_asked
    """  # noqa: S608 - our own column names


CLAIM_UNCONFIRMED = claim_sql(
    "vehicles WHERE source = 'offline' AND expires_at <= :now ORDER BY expires_at LIMIT :most"
)


def claim_expired_sql(count: int) -> str:
    """The statement that claims, of the rows of the questions `:q0`, `:q1` and so on, those that have expired."""
    names = [f":q{index}" for index in range(count)]
    vins = ", ".join(f"substr({name}, 1, 17)" for name in names)
    # Without json_each, because rqlite would return no rows. The first condition finds the rows by the primary key.
    return claim_sql(f"""vehicles
    WHERE vin IN ({vins}) AND rtrim(vin || ',' || model_year_asked, ',') IN ({", ".join(names)})
      AND source = 'vpic' AND {EXPIRES_AT} <= :now""")


# `removed_at` grows with each removal of a VIN, whatever the clocks of several machines say, and also if the statement
# is carried out twice. So after a removal, a call to vPIC that began before it finds another value than it read.
REMOVAL = """
INSERT INTO removals (vin, removed_at) VALUES (?, ?)
ON CONFLICT (vin) DO UPDATE SET removed_at = max(removed_at + 1, excluded.removed_at)
"""
REMOVE = "DELETE FROM vehicles WHERE vin = ? RETURNING vin"
REMOVED_AT = "SELECT removed_at FROM removals WHERE vin = ?"
FORGET_REMOVALS = "DELETE FROM removals WHERE removed_at < ?"
REMOVALS_KEPT_S = 3600  # longer than a call to vPIC takes, because a call that began before a removal must find it

CLOCK = "SELECT unixepoch()"
CLOCK_TOLERANCE_S = 60  # a larger difference between this machine's clock and the store's is a warning

# Takes the lease of the sweep, if no other process has it; then it returns a row. The parameters are the end of the new
# lease, and the next second. A lease that ends later than the new one was taken with a wrong clock, so it is replaced.
LEASE_SWEEP = """
INSERT INTO leases (work, leased_until) VALUES ('sweep', ?)
ON CONFLICT (work) DO UPDATE SET leased_until = excluded.leased_until
WHERE leased_until NOT BETWEEN ? AND excluded.leased_until
RETURNING work
"""
EXTEND_SWEEP = "UPDATE leases SET leased_until = ? WHERE work = 'sweep'"

# Of the next VINs after `:last`, with 1,000 rows or some more: the last VIN, the number of rows, and how many of them
# expired before each of two times. All rows of a VIN are counted together, because the next count begins after it.
COUNT_ROWS = """
SELECT max(vin), count(*), count(*) FILTER (WHERE expires_at < :now), count(*) FILTER (WHERE expires_at < :cutoff)
FROM vehicles
WHERE vin > :last AND vin <= (SELECT max(vin) FROM (SELECT vin FROM vehicles WHERE vin > :last ORDER BY vin LIMIT 1000))
"""
SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
DELETE_EXPIRED = "DELETE FROM vehicles WHERE vin > ? AND vin <= ? AND expires_at < ?"

# Writes more than a page, so that it fails if the file is locked or read-only, or the disk is full.
PROBE = "INSERT OR REPLACE INTO attributes (vin, model_year_asked, attributes) VALUES ('', '', hex(zeroblob(4096)))"

# ======================================================================================================================
# Stores: they carry statements out. `FileStore` has one SQLite file, one connection for reads and one for writes, so
# that no hit waits for a write. `ClusterStore` has an rqlite cluster. If a store fails, the service goes on without the
# cache.
# ======================================================================================================================

Rows = list[tuple[Any, ...]]
Parameters = Sequence[Any] | dict[str, Any]  # by position or by name
Statement = tuple[str, Parameters]  # SQL, and its parameters


class StoreFault(Exception):
    """A statement failed, though a cluster may have carried it out. The text is the reason, without a path and a host,
    because /readyz shows it to anybody."""


class Store(Protocol):
    """Carries statements out. Use it as `async with`, which raises StartupError for a database that never serves."""

    name: str
    _writes: Tasks  # they go on when their callers leave
    _resources: AsyncExitStack  # what is closed with the store

    def __init__(self) -> None:
        self._writes, self._resources = Tasks(), AsyncExitStack()

    async def __aexit__(self, *_: object) -> None:
        await self._writes.finish()
        await self._resources.aclose()

    async def read(self, statement: str, parameters: Parameters) -> Rows:
        """The rows, with all writes before. Raises StoreFault."""

    async def write(self, *statements: Statement, settle: bool = False) -> Rows:
        """Carry the statements out as one transaction, which goes on when the caller leaves. Returns the rows of the
        last one. With `settle`, it returns when no read can miss what was written, also after an election.

        Raises StoreFault. Then a file has not changed. A cluster may have carried the statements out, or have returned
        their rows to nobody."""
        return await asyncio.shield(self._writes.start(self._write(statements, settle)))

    async def _write(self, statements: Sequence[Statement], settle: bool) -> Rows:
        """As `write`, but it is cancelled with its caller."""

    def open_copy(self) -> AbstractAsyncContextManager[str]:
        """The URI of a database with all writes before, for another process and its SQLite. Raises StoreFault, and
        OSError if our disk can't keep a copy. If the body raises a StoreFault because SQLite finds damage, a file is
        replaced; of a cluster only the copy is damaged."""


def upgrade(name: str, application: int, version: int, objects: int) -> str:
    """The statements that bring a database to this schema, given what DATABASE_STATE selected from it.

    Raises StartupError if the database has a newer schema or is another program's."""
    if application != APPLICATION_ID and (application or version or objects):
        raise StartupError(f"VINCACHE_DATABASE: {name} is a database, but not one of vincache's")
    if version > SCHEMA_VERSION:
        raise StartupError(f"VINCACHE_DATABASE: {name} was made by a newer vincache (schema {version})")
    if application != APPLICATION_ID or version == SCHEMA_VERSION:
        return TABLES
    before, after = MIGRATE[version]
    return f"{before};{TABLES}{after}"


def log_upgrade(name: str, application: int, version: int) -> None:
    """After an upgrade."""
    if application == APPLICATION_ID and version != SCHEMA_VERSION:
        done = "migrated" if version else "rebuilt"
        log.warning("cache %s: %s had schema %d, not %d", done, name, version, SCHEMA_VERSION)


def reason(error: Exception) -> str:
    """The sentence of SQLite or of the system, without the path."""
    if isinstance(error, OSError):
        return error.strerror or "input/output error"
    return "another file is in its place" if isinstance(error, StartupError) else str(error)


def has_code(error: Exception, *codes: int) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes


def is_damage(error: Exception) -> bool:
    return has_code(error, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_locked(error: Exception) -> bool:
    return isinstance(error, BlockingIOError) or has_code(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL)


LOCK_TRY_S = 0.2  # for which SQLite waits for a lock at the opening: not longer, because its thread can't be cancelled
LOCK_PAUSE_S = 0.05  # from one try to the next
START_TIMEOUT_S = 30  # for which a start waits for a file that another program has locked
MIGRATION_TIMEOUT_S = 600  # for which a start waits for another process of the service, which may migrate a large file


def is_stopping() -> bool:
    """Whether uvicorn has got a signal to end. It sets the flag at once, but reads it only after the start."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False) is True


async def keep_trying(attempt: Callable[[], Awaitable[Result]], seconds: float) -> Result:
    """Make the attempt, and repeat it for so many seconds while another program holds a lock, but not once uvicorn
    is to end. Raises what the last attempt raises."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        try:
            return await attempt()
        except (sqlite3.Error, OSError) as error:
            if not is_locked(error) or loop.time() > deadline or is_stopping():
                raise
        await asyncio.sleep(LOCK_PAUSE_S)


@asynccontextmanager
async def only_process(folder: Path, seconds: float) -> AsyncIterator[None]:
    """Hold the lock under which processes of the service open or replace a file in this folder. Raises BlockingIOError
    if another process holds it for longer than `seconds`."""
    if sys.platform == "win32":  # where nobody can move or delete an open file
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)

    async def lock() -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(errno.EAGAIN, "another process is opening it") from None

    try:
        await keep_trying(lock, seconds)
        yield
    finally:
        os.close(descriptor)


EMPTIED = "its file was emptied"

# The files of a database. Only SQLite opens them, because it loses its locks when its process closes such a file.
PARTS = ("", "-wal", "-shm")
Identity = tuple[int, int] | None


def identity(path: str) -> Identity:
    """The device and inode of the file at the path, or None."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


class OpenFile(NamedTuple):
    """A database that is open."""

    path: Path  # with symbolic links followed, because their target is what may be replaced
    parts: dict[str, Identity]  # the three files that the connections have open
    reader: aiosqlite.Connection
    writer: aiosqlite.Connection
    connections: AsyncExitStack

    def fault(self) -> str:
        """Why this database must not be used any more; empty if it may."""
        try:
            status = os.stat(self.path)
        except OSError:
            return "its file was moved or deleted"
        if (status.st_dev, status.st_ino) != self.parts[""]:
            return "another file was put in its place"
        return "" if status.st_size else EMPTIED

    def own_parts(self, *parts: str) -> list[str]:
        """Those of the parts that are still at their path."""
        return [part for part in parts if self.parts[part] and identity(f"{self.path}{part}") == self.parts[part]]


def prepare_file(path: Path) -> None:
    """Create the database at the path, or bring it to this schema. Raises as `upgrade` does, and sqlite3.Error."""
    size = path.stat().st_size if path.exists() else None
    if not size:
        for part in PARTS[1:]:  # they belong to a file that is gone, but SQLite would write them into the new one
            Path(f"{path}{part}").unlink(missing_ok=True)
    sqlite3.connect(path).close()  # creates the file
    if size is None:
        share_with_group(path)
    # Read-only, because SQLite would else write the -wal of another program's file into it when it closes the file.
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=LOCK_TRY_S)) as file:
        application, version, objects = file.execute(DATABASE_STATE).fetchone()
    tables = upgrade(str(path), application, version, objects)
    with closing(sqlite3.connect(path, timeout=LOCK_TRY_S, isolation_level=None)) as file:
        file.executescript(f"{PRAGMAS}{BEGIN}{tables}{COMMIT}")
    log_upgrade(str(path), application, version)


def share_with_group(path: Path) -> None:
    """If the folder's group may write the folder, let it write the new file too, because a later container may run as
    another user of that group. SQLite gives the -wal and the -shm the same mode."""
    file, folder = path.stat(), path.parent.stat()
    if folder.st_mode & stat.S_IWGRP and folder.st_gid == file.st_gid:
        path.chmod(file.st_mode | stat.S_IRGRP | stat.S_IWGRP)


def owners(path: Path) -> str:
    """For the end of an error: the owner and the mode of the file and of its folder, if they exist."""
    text = ""
    for what, place in (("the file", path), ("its folder", path.parent)):
        with suppress(OSError):
            status = place.stat()
            text += f"; {what} belongs to {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}"
    return text


def move_aside(path: Path, parts: Iterable[str], cause: str) -> None:
    """Rename a damaged database."""
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    for part in parts:
        os.rename(f"{path}{part}", f"{aside}{part}")
    log.warning("cache damaged (%s): moved to %s, a fresh one takes its place at %s", cause, aside, path)


async def transact(connection: aiosqlite.Connection, statements: Sequence[Statement]) -> Rows:
    """Carry the statements out as one transaction. Returns the rows of the last one. Raises sqlite3.Error."""
    if len(statements) == 1:  # a single statement is a transaction
        return cast(Rows, await connection.execute_fetchall(*statements[0]))
    rows: Rows = []
    await connection.execute_fetchall("BEGIN IMMEDIATE")
    try:
        for statement in statements:
            rows = cast(Rows, await connection.execute_fetchall(*statement))
        await connection.execute_fetchall("COMMIT")
    finally:
        if connection.in_transaction:
            await connection.execute_fetchall("ROLLBACK")
    return rows


class FileStore(Store):
    """One SQLite file. Raises StartupError if it can't be opened and written, or is another program's.

    | what happens to the open file          | who notices it         | what the store does                            |
    |----------------------------------------|------------------------|------------------------------------------------|
    | it was moved, deleted or replaced      | each write and export, | closes it, with its last rows in it and without|
    |                                        | and `_watch`           | -wal and -shm; then opens or creates the file  |
    |                                        |                        | at the path                                    |
    | it was emptied                         | the same               | the same as for damage                         |
    | SQLite finds damage in it              | each statement and     | moves it aside with -wal and -shm, unless      |
    |                                        | export                 | another worker has done so; then opens or      |
    |                                        |                        | creates the file at the path                   |
    | the file at the path can't be opened   | each of these          | stays closed: reads fail; each write and       |
    |                                        |                        | `_watch` try to open it                        |

    The store does this under a lock of the folder, because another worker could replace the file at the same moment."""

    name = "file"

    def __init__(self, path: Path, busy_timeout: float) -> None:
        super().__init__()
        self._path = path.absolute()
        self._busy_timeout = busy_timeout  # seconds for which a write waits for a lock
        self._file: OpenFile | None = None  # None: closed
        self._replacing = asyncio.Lock()  # held by the task that closes the file and opens another one
        self._writing = asyncio.Lock()  # held by the transaction that is carried out

    async def __aenter__(self) -> "FileStore":
        try:
            async with only_process(self._path.resolve().parent, MIGRATION_TIMEOUT_S):
                self._file = await self._open(max(START_TIMEOUT_S, self._busy_timeout))
            log.info("cache opened: %s, SQLite %s", self._path, sqlite3.sqlite_version)
        except (sqlite3.Error, OSError) as error:
            if not (is_locked(error) and is_stopping()):
                us = f"uid {os.geteuid()}" if hasattr(os, "geteuid") else "us"
                why = f"{self._path} cannot be opened and written by {us}: {error}{owners(self._path)}"
                raise StartupError(f"VINCACHE_DATABASE: {why}") from None
            # Go on with the start, because uvicorn ends after it.
            log.info("stopped while it waited for %s: %s", self._path, error)
        await self._resources.enter_async_context(background(self._watch()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        if self._file is not None:
            await self._file.connections.aclose()

    async def _open(self, seconds: float) -> OpenFile:
        """Open or create the file at the path. A damaged one is moved aside first."""
        path = self._path.resolve()
        try:
            return await keep_trying(lambda: self._try_to_open(path), seconds)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            move_aside(path, [part for part in PARTS if identity(f"{path}{part}")], str(error))
        return await keep_trying(lambda: self._try_to_open(path), seconds)

    async def _try_to_open(self, path: Path) -> OpenFile:
        await asyncio.to_thread(prepare_file, path)
        async with AsyncExitStack() as connections:
            reader, writer = [
                # The timeout is set before any statement, because the change to WAL needs a lock. Without an isolation
                # level a single statement is a transaction, so a cancelled caller leaves none open.
                await connections.enter_async_context(aiosqlite.connect(path, timeout=LOCK_TRY_S, isolation_level=None))
                for _ in range(2)
            ]
            for connection in (reader, writer):
                await connection.executescript(SCHEMA)  # for its pragmas, which are of one connection
            await reader.execute_fetchall(f"PRAGMA busy_timeout = {math.ceil(self._busy_timeout * 1000)}")
            parts = {part: identity(f"{path}{part}") for part in PARTS}
            return OpenFile(path, parts, reader, writer, connections.pop_all())

    async def _current(self) -> OpenFile:
        """The file at the path, because rows that are written to a moved one would be lost. Raises StoreFault."""
        file = self._file
        cause = file.fault() if file else "it was closed"
        if file and not cause:
            return file
        return await self._replace(file, cause, damaged=cause == EMPTIED)

    async def _replace(self, file: OpenFile | None, cause: str, *, damaged: bool) -> OpenFile:
        """Close `file` and open the file at the path, unless another task has done that. Raises StoreFault."""
        async with self._replacing:
            if self._file is not None and self._file is not file:
                return self._file
            self._file = None
            moved = False
            try:
                async with only_process(self._path.resolve().parent, self._busy_timeout):
                    if file is not None:
                        moved = await self._retire(file, cause, damaged)
                    self._file = await self._open(self._busy_timeout)
            except (sqlite3.Error, OSError, StartupError) as error:
                raise StoreFault(reason(error)) from error
            finally:
                if file is not None:  # also if the folder could not be locked
                    await file.connections.aclose()
            if not moved:
                log.warning("cache opened anew (%s): %s", cause, self._path)
            return self._file

    @staticmethod
    async def _retire(file: OpenFile, cause: str, damaged: bool) -> bool:
        """Close the file. If it is damaged and still at its path, move it aside and return True."""
        moved = damaged and bool(file.own_parts(""))
        if moved:
            move_aside(file.path, file.own_parts(*PARTS), cause)
        elif not damaged:
            with suppress(sqlite3.Error):  # if the file was moved, this writes its last rows into it
                await file.writer.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            # SQLite finds these two by name, and would write them into the file that is now at the path.
            for part in file.own_parts("-wal", "-shm"):
                os.unlink(f"{file.path}{part}")
        await file.connections.aclose()
        return moved

    async def _watch(self) -> None:
        """Each second, see whether the file is still at its path, because a read does not notice that."""
        while True:
            await asyncio.sleep(1)
            with suppress(StoreFault):  # the next write raises it again
                await self._current()

    async def read(self, statement: str, parameters: Parameters) -> Rows:
        while True:
            async with self._replacing:  # another task may be opening a file: wait for it
                file = self._file
            if file is None:
                raise StoreFault("it is not open")
            try:
                return cast(Rows, await file.reader.execute_fetchall(statement, parameters))
            except (sqlite3.Error, ValueError) as error:  # ValueError: another task has closed the connection
                if is_damage(error):
                    await self._replace_damaged(file, str(error))
                if file is self._file:
                    raise StoreFault(reason(error)) from error

    async def _write(self, statements: Sequence[Statement], _: bool) -> Rows:
        """It waits for other transactions and for locks up to `busy_timeout`; to open another file takes time besides.
        What was written is settled."""
        deadline = asyncio.get_running_loop().time() + self._busy_timeout
        async with self._writing:
            while True:  # again if the file was replaced meanwhile, by this task or another one
                file = await self._current()
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0:
                    raise StoreFault("locked for too long")
                try:
                    # No other timeout than SQLite's, because after that one it is certain that nothing was written.
                    await file.writer.execute_fetchall(f"PRAGMA busy_timeout = {math.ceil(left * 1000)}")
                    return await transact(file.writer, statements)
                except (sqlite3.Error, ValueError) as error:  # ValueError: another task has closed the connection
                    if is_damage(error):
                        await self._replace(file, str(error), damaged=True)
                    if file is self._file:
                        raise StoreFault(reason(error)) from error

    @asynccontextmanager
    async def open_copy(self) -> AsyncIterator[str]:
        file = await self._current()
        try:
            yield f"{file.path.as_uri()}?mode=ro"
        except StoreFault as fault:
            if "malformed" in str(fault) or "not a database" in str(fault):
                await self._replace_damaged(file, str(fault))
            raise

    async def _replace_damaged(self, file: OpenFile, cause: str) -> None:
        with suppress(StoreFault):  # the next write tries again
            await self._replace(file, cause, damaged=True)


CLUSTER_TIMEOUT_S = 4  # a statement fails after this time: an election is over by then
CLUSTER_ATTEMPT_S = 0.5  # a node has this part of it: it may hang, or forward to a leader that hangs
CLUSTER_ROUND_S = 0.05  # to ask all nodes in turn takes at least this time
CLUSTER_NODES_S = 30  # after this time, the list of the nodes is read again
CLUSTER_MIGRATION_S = 30  # a statement that migrates the database writes all rows anew
BACKUP_TIMEOUT_S = 30  # a backup is tried for this time, because a node makes one at a time

# Before rqlite 8.30.5 a snapshot that fails may cost rows, before 8.31.2 a snapshot holds the WAL in memory, and before
# 8.32.4 linearizable reads are wrong after an election, or unknown.
CLUSTER_VERSION = "8.32.4"


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version like v8.32.4, to be compared; they are fewer where a build does not say all."""
    return tuple(map(int, re.findall("[0-9]+", version)[:3]))


# By path the right that it needs, and what follows if our user lacks it.
CLUSTER_RIGHTS = {
    "db/backup": ("backup", "/export is 503"),
    "nodes": ("status", "only the nodes in VINCACHE_DATABASE are known"),
}


# By a node's id and Raft address, which no other cluster has: its URL, as the cluster knows it, and its version. The
# URL is empty where it is not known, the version before rqlite 8.36.3.
Members = dict[tuple[str, str], tuple[str, str]]


class NoAnswer(Exception):
    """A node did not say that it has carried out a statement. It may have done so."""


class NotReached(NoAnswer):
    """The node did not get the statement."""


class Refused(StoreFault):
    """The cluster refuses our user, which waiting does not mend."""


class ClusterStore(Store):
    """An rqlite cluster (https://rqlite.io/docs/api/). Raises StartupError if the cluster refuses our user or holds a
    database that is not ours.

    The nodes in the URL find the cluster; which others it has is read from it now and then, so nodes may come and go.
    Every node forwards a statement to the leader. A statement stays with the node that answered last; if that does not
    answer, it goes round. So a statement may be carried out twice, or long after it was given up. That is safe for all
    our statements; but one with RETURNING may then return no rows although it had an effect, and counts as failed.

    Reads are `weak`: the leader answers them by itself. A leader that was just elected has what was written before in
    its log, but may not have carried it out yet. An election takes some time, in which attempts fail, and `_watch`
    makes one each second. So after a failed attempt reads are `strong`, until an answer has shown that the leader has
    caught up: a strong read is an entry of the log, like a write, and its answer comes after all entries before it were
    carried out. Where all nodes know `linearizable`, that does the same without an entry. A removal is settled by a
    strong read behind it: a node without that entry is not elected, and a node that has it carries out the removal.

    | state  | what happens                                                | then                                   |
    |--------|-------------------------------------------------------------|----------------------------------------|
    | open   | a node does not answer within CLUSTER_ATTEMPT_S             | the next node is asked                 |
    |        | no node has answered within CLUSTER_TIMEOUT_S               | closed                                 |
    |        | a table is missing, because somebody emptied the database   | closed                                 |
    | closed | a statement comes                                           | it fails at once                       |
    |        | a second has passed                                         | `_open` looks, makes tables: open      |
    """

    name = "rqlite"

    def __init__(self, nodes: list[str], user: str, password: str) -> None:
        super().__init__()
        self._named = nodes  # the nodes in the URL; they stay, because the cluster may know them by other names
        self._found: dict[tuple[str, str], str] = {}  # the other nodes, by id and Raft address
        self._nodes = deque(nodes)  # all of them; the one that answered last is the first
        self._find_at = 0.0  # when it is read again which nodes there are (loop time)
        self._version = ""  # the oldest version of rqlite that a node has
        self._caught_up = "strong"  # the level of a read that waits until the leader has caught up
        self._lacking = set[str]()  # the rights that our user lacks and that are in the log
        self._hosts = ", ".join(node.partition("://")[2] for node in nodes)
        self._auth = aiohttp.BasicAuth(user, password, "utf-8") if user else None
        self._fault = "it is not open"  # why it is closed; empty: it is open
        self._failures = 0  # how many attempts have failed so far
        # `_failures` at the beginning of the last attempt that has shown that the leader has caught up; -1: none has.
        self._failures_settled = -1

    async def __aenter__(self) -> "ClusterStore":
        async with AsyncExitStack() as resources:
            # A session of its own, because vPIC's goes through a proxy. Each attempt has a deadline of its own.
            self._session = await resources.enter_async_context(
                aiohttp.ClientSession(
                    auth=self._auth,
                    headers={"Content-Type": "application/json"},
                    connector=aiohttp.TCPConnector(limit=64),
                    timeout=aiohttp.ClientTimeout(total=None),
                    cookie_jar=aiohttp.DummyCookieJar(),
                )
            )
            try:
                await self._open(CLUSTER_TIMEOUT_S)
            except Refused as fault:
                raise StartupError(f"VINCACHE_DATABASE: {self._hosts}: {fault}") from None
            except StoreFault as fault:
                self._fault = str(fault)  # the first statement logs it, `_watch` tries again
            await resources.enter_async_context(background(self._watch()))
            self._resources = resources.pop_all()
        return self

    async def _open(self, seconds: float) -> None:
        """Make the cluster's database ours, if it is empty or an older one. Raises StoreFault, and StartupError."""
        for last in (False, True):
            [[state]], _ = await self._ask("query?level=weak", [(DATABASE_STATE, ())], seconds)
            application, version, objects = state
            script = GUARD % version + upgrade(self._hosts, application, version, objects)
            if application == APPLICATION_ID and version < SCHEMA_VERSION:
                seconds = CLUSTER_MIGRATION_S
            try:
                # rqlite takes a script as one statement. The script must not have random() or the time of day in it,
                # because rqlite would rewrite it, and it rewrites only single statements.
                await self._ask("execute?transaction", [(script, ())], seconds)
                log_upgrade(self._hosts, application, version)
                break
            except StoreFault as fault:
                if last or "CHECK" not in str(fault):  # GUARD's: another node has upgraded the database meanwhile
                    raise
        self._fault = ""
        await self._find_nodes()
        await self._check_rights()
        log.info("cache opened: rqlite %s, %s", self._version or "of an unknown version", self._hosts)

    async def _watch(self) -> None:
        """Each second, open the cluster if it is closed, else read, so that no election passes unnoticed."""
        while True:
            await asyncio.sleep(1)
            try:
                if self._fault:
                    await self._open(CLUSTER_ATTEMPT_S)
                else:
                    await self.read(CLOCK, ())
                if asyncio.get_running_loop().time() > self._find_at:
                    await self._find_nodes()
            except StoreFault as fault:
                self._fault = str(fault)
            except StartupError:
                self._fault = "another database is in its place"

    async def _find_nodes(self) -> None:
        """Learn which nodes the cluster has now, and their versions."""
        self._find_at = asyncio.get_running_loop().time() + CLUSTER_NODES_S
        for node in [*self._nodes]:
            version, members = await self._list_members(node)
            if version:
                break
        else:
            return
        version = min([version, *[version for _, version in members.values() if version]], key=release)
        if version != self._version and release(version) < release(CLUSTER_VERSION):
            log.warning("rqlite %s is older than %s: a snapshot that fails may cost rows", version, CLUSTER_VERSION)
        self._version = version
        if not members:  # our user has no right to see them
            return
        all_know = all(release(version) >= release(CLUSTER_VERSION) for _, version in members.values())
        self._caught_up = "linearizable" if all_know else "strong"
        scheme = self._named[0].partition("//")[0]  # no statement, and no password, goes out without TLS
        found = {}
        for member, (url, _) in members.items():
            known = self._found.get(member, "")
            if url.startswith(scheme) and url not in [known, *self._named]:
                _, theirs = await self._list_members(url)
                if theirs.keys() == members.keys():  # else another cluster has this address here
                    known = url
            if known:
                found[member] = known
        if found != self._found:
            log.info(
                "cache: nodes of rqlite that VINCACHE_DATABASE does not name: %s", ", ".join(found.values()) or "none"
            )
        self._found = found
        nodes = [node for node in self._nodes if node in self._named or node in found.values()]
        self._nodes = deque(dict.fromkeys([*nodes, *found.values()]))

    async def _list_members(self, node: str) -> tuple[str, Members]:
        """The version of a node, and which nodes its cluster has; nothing if it does not answer."""
        url = f"{node}/nodes?ver=2&timeout={CLUSTER_ATTEMPT_S / 2}s"
        try:
            async with asyncio.timeout(CLUSTER_ATTEMPT_S), self._session.get(url, allow_redirects=False) as response:
                version = response.headers.get("X-Rqlite-Version", "").removeprefix("v")
                nodes = json.loads(await response.read())["nodes"] if response.status == 200 else ()
                return version, {
                    (node["id"], node["addr"]): (node.get("api_addr", ""), node.get("version", "")) for node in nodes
                }
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError, AttributeError):
            return "", {}

    async def _check_rights(self) -> None:
        """Let the log tell now what would else show with the first export, or when a node is lost."""
        for path, (right, consequence) in CLUSTER_RIGHTS.items():
            status = 0
            with suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(CLUSTER_ATTEMPT_S):
                    # HEAD does nothing there: with the right it is 405.
                    async with self._session.head(f"{self._nodes[0]}/{path}", allow_redirects=False) as response:
                        status = response.status
            if status == 401 and right not in self._lacking:
                self._lacking.add(right)
                log.warning("the user of the cluster lacks the right %s: %s", right, consequence)

    async def read(self, statement: str, parameters: Parameters) -> Rows:
        [rows], _ = await self._ask_if_open("query?level=weak", [(statement, parameters)])
        return rows

    async def _write(self, statements: Sequence[Statement], settle: bool) -> Rows:
        [*_, rows], again = await self._ask_if_open("execute?transaction", statements)
        if settle:
            await self._ask_if_open("query?level=strong", [(CLOCK, ())])
        if again and not rows and "RETURNING" in statements[-1][0]:
            raise StoreFault("it may have been done before")
        return rows

    async def _ask_if_open(self, path: str, statements: Sequence[Statement]) -> tuple[list[Rows], bool]:
        if self._fault:
            raise StoreFault(self._fault)
        return await self._ask(path, statements, CLUSTER_TIMEOUT_S)

    async def _ask(self, path: str, statements: Sequence[Statement], seconds: float) -> tuple[list[Rows], bool]:
        """The rows of each statement, and whether they may have been carried out before. Raises StoreFault."""
        # rqlite takes parameters by name as one object, and those by position one by one.
        given = [[sql, values] if isinstance(values, dict) else [sql, *values] for sql, values in statements]
        loop, body = asyncio.get_running_loop(), json.dumps(given).encode()
        attempt = seconds if seconds > CLUSTER_TIMEOUT_S else CLUSTER_ATTEMPT_S
        deadline, again, reasons = loop.time() + seconds, False, dict[str, None]()
        while True:
            node, failures = self._nodes[0], self._failures
            sent = path.replace("weak", self._caught_up) if failures > self._failures_settled else path
            try:
                async with asyncio.timeout(min(attempt, deadline - loop.time())):
                    results = await self._attempt(f"{node}/db/{sent}&timeout={attempt}s", body)
                if "weak" not in sent:
                    self._failures_settled = max(self._failures_settled, failures)
                break
            except (NoAnswer, TimeoutError) as fault:
                self._failures += 1
                again |= not isinstance(fault, NotReached)
                reasons[str(fault) or "no answer in time"] = None
            if not await self._turn_to_next(node, deadline):
                self._fault = ", ".join(reasons)
                raise StoreFault(self._fault)
        for result in results:
            if why := result.get("error"):  # SQLite's
                if "no such table" in why:
                    self._fault = why
                raise StoreFault(why)
        return [[*map(tuple, result.get("values", ()))] for result in results], again

    async def _turn_to_next(self, node: str, deadline: float) -> bool:
        """Turn to the next node, unless another statement has done so. Returns whether there is time to ask it."""
        if self._nodes[0] == node:
            self._nodes.rotate(-1)
        await asyncio.sleep(CLUSTER_ROUND_S / len(self._nodes))
        return asyncio.get_running_loop().time() + CLUSTER_ROUND_S < deadline

    async def _attempt(self, url: str, body: bytes) -> list[dict[str, Any]]:
        """What a node says of each statement. Raises NoAnswer, and Refused."""
        try:
            # No redirects, because a redirected POST would become a GET.
            async with self._session.post(url, data=body, allow_redirects=False) as response:
                if response.status == 401:
                    raise Refused("user or password refused, or without the right to query and execute")
                if response.status != 200:
                    raise NoAnswer("no leader" if response.status == 503 else f"status {response.status}")
                answer = json.loads(await response.read())
        except aiohttp.ClientConnectorError as error:
            why = "not trusted" if isinstance(error, aiohttp.ClientSSLError) else "not reached"
            raise NotReached(why) from None
        except aiohttp.ClientError:
            raise NoAnswer("broken off") from None
        except (ValueError, RecursionError):
            raise NoAnswer("no JSON") from None
        # An error is the cluster's own. Anything else is no answer of rqlite.
        results = answer.get("results") if isinstance(answer, dict) and "error" not in answer else None
        if not results or not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise NoAnswer("not agreed")
        return results

    @asynccontextmanager
    async def open_copy(self) -> AsyncIterator[str]:
        """The URI of the leader's backup, in a temporary folder. Raises StoreFault, and OSError of our own disk."""
        # This read passes by a node that hangs, and after it the leader has carried out all that was written before.
        await self._ask_if_open("query?level=strong", [(DATABASE_STATE, ())])
        with tempfile.TemporaryDirectory(prefix="vincache-", ignore_cleanup_errors=True) as folder:
            backup = Path(folder, "backup.db")
            await self._back_up(backup)
            yield f"{backup.as_uri()}?immutable=1"  # without it SQLite looks for the WAL that the file names

    async def _back_up(self, path: Path) -> None:
        deadline = asyncio.get_running_loop().time() + BACKUP_TIMEOUT_S
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CLUSTER_ATTEMPT_S, sock_read=BACKUP_TIMEOUT_S)
        while True:
            node = self._nodes[0]
            try:
                async with self._session.get(f"{node}/db/backup", timeout=timeout, allow_redirects=False) as response:
                    if response.status == 200:
                        with path.open("wb") as file:
                            async for piece in response.content.iter_any():
                                file.write(piece)
                        return
                    if response.status == 401:
                        raise Refused("user or password refused, or without the right to backup")
                    why = f"no backup, status {response.status}"  # 500: it makes one for another client
            except (aiohttp.ClientError, TimeoutError) as error:
                why = "not reached" if isinstance(error, aiohttp.ClientConnectorError) else "broken off"
            if not await self._turn_to_next(node, deadline):
                raise StoreFault(why)


def open_store(settings: Settings) -> FileStore | ClusterStore:
    cluster = find_cluster(settings.database)
    return ClusterStore(*cluster) if cluster else FileStore(Path(settings.database), settings.busy_timeout)


# ======================================================================================================================
# Cache: one method for each use of the statements. A read that fails returns no rows. A write that fails raises
# StoreFault inside this room; only a removal tells the caller, by a 503.
# ======================================================================================================================

CANNOT_WRITE = "The cache cannot be written at the moment; ask again later."
READ_TIMEOUT_S = 5  # a read that takes longer fails; it is longer than CLUSTER_TIMEOUT_S
WRITE_TIMEOUT_S = 60  # a write that takes longer counts as failed, because the disk hangs; it may still be carried out
# If so many hits wait, the next statement begins at once, because turns of the event loop are long then, and the
# statement is large enough. If fewer wait, it waits two turns for more of them.
MERGE_ENOUGH = 16
COUNT_S = 60  # from one count of the unconfirmed rows to the next


class Cache:
    """The rows in the store."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._read_outage, self._write_outage = [
            Outage(f"cache cannot be {done} (%s): answers go on without it", f"cache can be {done} again")
            for done in ("read", "written")
        ]
        self._clock_difference = Outage(
            "this machine's clock differs from the cache's by %s s: rows expire too soon or late",
            "this machine's clock agrees with the cache's again",
        )
        self.unconfirmed = 0  # the number of unconfirmed rows when they were last counted
        self._waiting: list[tuple[Question, asyncio.Future[Answer | None]]] = []  # the hits of the next statement
        self._answering: asyncio.Task[None] | None = None  # the task of the statement that is under way
        self._checking = asyncio.Lock()  # held while the store is checked
        self._checked_at = -math.inf  # when the last check ended (monotonic)

    async def _read(self, statement: str, parameters: Parameters) -> Rows:
        try:
            return await self._wait_for(self._store.read(statement, parameters), READ_TIMEOUT_S, self._read_outage)
        except StoreFault:
            return []

    async def _write(self, *statements: Statement, settle: bool = False) -> Rows:
        rows = self._store.write(*statements, settle=settle)
        return await self._wait_for(rows, WRITE_TIMEOUT_S, self._write_outage)

    async def _wait_for(self, rows: Awaitable[Rows], seconds: float, outage: Outage) -> Rows:
        """The rows. The duration goes to the metrics, an outage to the log. Raises StoreFault, also after `seconds`."""
        started, outcome = time.perf_counter(), "failed"
        try:
            async with asyncio.timeout(seconds):
                found = await rows
            outcome = "ok"
        except (StoreFault, TimeoutError) as fault:
            outage.begin(str(fault) or "no answer in time")
            raise StoreFault from fault
        finally:
            store_duration.record(time.perf_counter() - started, {"store": self._store.name, "outcome": outcome})
        outage.end()
        return found

    def hit(self, question: Question) -> asyncio.Future[Answer | None]:
        """The cached answer, or None. Hits that come while a statement is under way share the next one."""
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._answering is None:
            self._answering = asyncio.create_task(self._answer_hits())
        return answer

    async def _answer_hits(self, turns: int = 0) -> None:
        """Answer the waiting hits with one statement, after so many turns of the event loop."""
        for _ in range(turns):
            if len(self._waiting) < MERGE_ENOUGH:
                await asyncio.sleep(0)
        waiting, self._waiting = self._waiting, []
        found: dict[Question, Answer] = {}
        try:
            found = await self.answers([question for question, _ in waiting])
        finally:  # also after an error, because the callers would else wait for ever
            for question, answer in waiting:
                if not answer.done():  # it is done if its caller has left
                    answer.set_result(found.get(question))
            # The next statement lets the loop run for two turns: the requests that were just answered send their
            # responses, and new ones come and share the statement. That makes 20 % more hits a second.
            self._answering = asyncio.create_task(self._answer_hits(turns=2)) if self._waiting else None

    async def answers(self, questions: Sequence[Question], details: bool = False) -> dict[Question, Answer]:
        """The cached answers. With `details`, only those whose row has attributes."""
        rows = await self._read(answers_sql(details), self._parameters(questions))
        return {row[0]: Answer._make(row[1:]) for row in rows}

    async def lines(self, questions: Sequence[Question], form: LineForm) -> dict[Question, tuple[str, Line]]:
        """The cached lines of a batch, each with its outcome (hit or stale)."""
        rows = await self._read(lines_sql(form), self._parameters(questions))
        if form.is_csv:
            return {row[0]: (row[1], row[2:]) for row in rows}
        return {row[0]: row[1:] for row in rows}

    def _parameters(self, questions: Sequence[Question]) -> dict[str, Any]:
        """The questions, and the parameters of EXPIRES_AT and SERVED."""
        since = self._settings.fresh_since
        return {
            "questions": to_json(questions),
            "now": time.time(),
            "fresh_since": int(since.timestamp()) if since else 0,  # as `fetched_at`
            "stale_ttl": self._settings.stale_ttl,
            "grace": self._settings.grace,
        }

    async def records(
        self, questions: Sequence[Question], seconds: float | None = None
    ) -> tuple[dict[Question, Record], dict[Question, int | None]]:
        """The rows of these questions, fresh or not; and for each question the last removal of its VIN, or None. Both
        are empty if the store fails, or does not answer within so many seconds."""
        rows: Rows = []
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                rows = await self._read(RECORDS, self._parameters(questions))
        return {row[0]: Record._make(row[2:]) for row in rows if row[2]}, {row[0]: row[1] for row in rows}

    async def store(self, records: Iterable[tuple[Record, int | None]]) -> None:
        """Store the records, each with the removal of its VIN that was read before vPIC was asked; their attributes
        only if the settings say so. If the store fails, they are not cached. Waits for locks up to `busy_timeout`, or
        for a cluster up to CLUSTER_TIMEOUT_S."""
        keep = self._settings.attributes
        rows = [(*record[:-1], record.attributes if keep else None, removal) for record, removal in records]
        if rows:
            with suppress(StoreFault):  # `_wait_for` has logged it
                await self._write(*((store_sql(len(part)), [*chain(*part)]) for part in in_parts(rows, ROWS_MOST)))

    async def count_unconfirmed(self) -> None:
        """Without end, count the unconfirmed rows every minute."""
        while True:
            if counted := await self._read(UNCONFIRMED, ()):
                self.unconfirmed = counted[0][0]
                unconfirmed_gauge.set(self.unconfirmed)
            await asyncio.sleep(COUNT_S)

    async def claim_unconfirmed(self, most: int) -> list[Question]:
        """The questions of up to `most` unconfirmed rows, the oldest first. No process claims them again for
        `offline_ttl`."""
        now = time.time()
        if not await self._read(UNCONFIRMED_DUE, (now,)):  # so that an idle service writes nothing
            return []
        return await self._claim(CLAIM_UNCONFIRMED, {"now": now, "most": most}, now + self._settings.offline_ttl)

    async def claim_expired(self, questions: Sequence[Question]) -> list[Question]:
        """Of these questions those whose row from vPIC has expired. The row counts as fresh for `stale_ttl`, so that no
        process claims it again in that time."""
        claimed: list[Question] = []
        for some in in_parts(questions, ROWS_MOST):
            parameters = self._parameters(some) | {f"q{index}": question for index, question in enumerate(some)}
            until = parameters["now"] + self._settings.stale_ttl
            claimed += await self._claim(claim_expired_sql(len(some)), parameters, until)
        return claimed

    async def _claim(self, statement: str, parameters: dict[str, Any], until: float) -> list[Question]:
        with suppress(StoreFault):
            rows = await self._write((statement, parameters | {"until": math.ceil(until)}))
            return [make_question(vin, model_year) for vin, model_year in rows]
        return []

    async def remove(self, vin: str) -> bool:
        """Remove the rows of a VIN, and prevent calls under way from storing one. Returns whether there was a row.

        Raises a 503. A file has then not changed; in a cluster the rows may have been removed."""
        # One transaction, because a lookup that reads between the two statements would find the new removal and the old
        # row, and take the row for one that was stored after the removal.
        now = await self._clock() or int(time.time())
        try:
            return bool(await self._write((REMOVAL, (vin, now * 10**9)), (REMOVE, (vin,)), settle=True))
        except StoreFault as fault:
            raise HTTPException(503, CANNOT_WRITE, retry_after_header(5)) from fault

    async def removal(self, question: Question) -> int | None:
        """The last removal of the question's VIN, or None."""
        rows = await self._read(REMOVED_AT, (vin_of(question),))
        return rows[0][0] if rows else None

    async def sweep(self) -> None:
        """Without end, delete the rows that expired more than `keep_expired` seconds ago, 1,000 rows at a time. The
        process that has the lease does so for all that share the cache."""
        period = math.ceil(min(3600, self._settings.keep_expired / 10))
        while True:
            with suppress(StoreFault):
                clock = await self._clock()
                if clock and await self._write((LEASE_SWEEP, (clock + period, clock + 1))):
                    await self._sweep_once(clock, period)
            await asyncio.sleep(period)

    async def _sweep_once(self, clock: int, period: int) -> None:
        now = min(clock, time.time())  # the earlier one, because either clock may be wrong
        cutoff = now - self._settings.keep_expired
        began = extended = time.monotonic()
        rows = expired = 0
        parameters = {"now": now, "cutoff": cutoff, "last": ""}
        while (counted := await self._read(COUNT_ROWS, parameters)) and counted[0][0] is not None:
            [(upto, more_rows, more_expired, deletable)] = counted
            if deletable:
                await self._write((DELETE_EXPIRED, (parameters["last"], upto, cutoff)))
            rows += more_rows - deletable
            expired += more_expired - deletable
            parameters["last"] = upto
            await asyncio.sleep(0.05)  # so that lookups can use the store
            if time.monotonic() - extended > period / 2:  # a large table takes longer than the lease
                extended = time.monotonic()
                await self._write((EXTEND_SWEEP, (math.ceil(clock + extended - began + period),)))
        await self._write((FORGET_REMOVALS, (int(now - REMOVALS_KEPT_S) * 10**9,)))
        if counted:  # no read has failed
            rows_gauge.set(rows)
            expired_gauge.set(expired)
        for [size] in await self._read(SIZE, ()):
            size_gauge.set(size)

    async def _clock(self) -> int | None:
        """The store's clock (unix seconds), or None if it can't be read. Deletions use it, because one of many machines
        may have a clock that is wrong by days. If this machine's clock differs much, the log says so."""
        rows = await self._read(CLOCK, ())
        if not rows:
            return None
        clock: int = rows[0][0]
        ahead = time.time() - clock
        if abs(ahead) > CLOCK_TOLERANCE_S:
            self._clock_difference.begin(f"{int(ahead):+d}")
        else:
            self._clock_difference.end()
        return clock

    async def check(self) -> str:
        """`ok` if the store can be read and written, else the reason why not.

        It is checked once a second at most."""
        async with self._checking:
            if time.monotonic() > self._checked_at + 1:
                with suppress(StoreFault):  # write first: a write notices if the file was moved or deleted
                    await self._write((PROBE, ()))
                await self._read(REMOVED_AT, ("",))
                self._checked_at = time.monotonic()
        outages = {"read": self._read_outage.reason, "written": self._write_outage.reason}
        return "; ".join(f"cannot be {done}: {reason}" for done, reason in outages.items() if reason) or "ok"


# ======================================================================================================================
# vPIC: the only room that calls it. First the translation of its answers, without I/O; then the breaker; then the call,
# with its retries, its deadline and its rate. For vPIC's form see https://vpic.nhtsa.dot.gov/api/.
# ======================================================================================================================

# By the name of a column, the key in vPIC's answer. A result needs all of these. It may have OPTIONAL_KEYS; all other
# keys become attributes.
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
OPTIONAL_KEYS = {"additional_error_text": "AdditionalErrorText", "possible_values": "PossibleValues"}

VPIC_VINS = 50  # in one call, at most
ANSWER_BYTES = 2**21  # unpacked, at most; the answer for 50 VINs has some 250 kB


# A text that SQLite can store, without the blanks around it that some answers have. SQLite ends a text at a NUL, and
# takes no lone surrogate, which pydantic refuses by itself.
StorableText = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00]*$")]
STORABLE_TEXTS = TypeAdapter(dict[OnErrorOmit[StorableText], OnErrorOmit[StorableText]])


def translate(flat: object) -> Decoding:
    """One result of vPIC as columns of a row. Raises ValueError if a value of VPIC_KEYS is missing or can't be stored.
    Other values that can't be stored are left out."""
    if not isinstance(flat, dict):
        raise ValueError("a result is not an object")
    texts = STORABLE_TEXTS.validate_python(flat)
    if missing := [key for key in VPIC_KEYS.values() if key not in texts]:
        raise ValueError(f"{missing[0]} is missing or is no text that can be stored")
    decoding = {name: texts.pop(key, "") for name, key in (VPIC_KEYS | OPTIONAL_KEYS).items()}
    return decoding | {"attributes": to_json({key: text for key, text in sorted(texts.items()) if text})}


def refuse_constant(name: str) -> None:
    """For json.loads, which would take NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")


def parse(body: bytes, vins: Collection[str]) -> dict[str, Decoding]:
    """The results for `vins` in vPIC's answer. It need not have all. Raises ValueError if it has none, and
    RecursionError if its JSON is nested too deep."""
    if re.match(rb"\s*<(!doctype )?html", body, re.IGNORECASE):
        raise ValueError("an HTML page")
    answer = json.loads(body.decode("utf-8-sig"), parse_constant=refuse_constant)
    results = answer.get("Results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise ValueError("no list of results")
    found: dict[str, Decoding] = {}
    fault = ValueError(f"none of {len(results)} results is about the VIN asked")
    for flat in results[:VPIC_VINS]:  # it has no more than were asked, unless it makes no sense
        try:
            decoding = translate(flat)
            if decoding["vin"] in vins:
                found[decoding["vin"]] = decoding
        except ValueError as error:
            fault = error
    if not found:
        raise fault
    return found


def retry_after_seconds(header: str) -> float | None:
    """Seconds to wait by a Retry-After header (seconds or HTTP date), or None if it can't be read, or is empty."""
    with suppress(ValueError, OverflowError):  # OverflowError: the date has an impossible time zone
        if header.strip().isdigit():
            return int(header)  # not a float, because one of 400 digits would be infinite
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    return None


class Breaker:
    """Prevents calls to vPIC while vPIC fails.

    | state   | what happens                                              | next state                       |
    |---------|-----------------------------------------------------------|----------------------------------|
    | closed  | `failures` calls fail in a row, counted as below          | open                             |
    | open    | `seconds` are over, a call for one VIN is made: the probe | probing                          |
    | probing | vPIC answers the probe                                    | closed                           |
    |         | the probe fails                                           | open, for `seconds` from now     |
    |         | the probe ends, and vPIC is not to blame                  | open, the next call may probe    |
    | open or | a call from before the opening is answered                | closed                           |
    | probing | a call from before the opening fails                      | the same, for `seconds` from now |

    One VIN may be why vPIC fails, so calls that fail for the same set of VINs count as one. If a call for {A, B} failed
    and then a call for {A} fails, only {A} counts, because A alone explains both. If no VIN can be the reason of a
    failure, the call always counts. (Tested by `test_a_vin_on_which_vpic_chokes_fails_alone` and
    `test_an_outage_hardly_reaches_vpic`.)"""

    def __init__(self, failures: int, seconds: float) -> None:
        self._failures = failures  # so many open the breaker
        self._seconds = seconds  # for which it stays open
        self._failed: list[frozenset[object]] = []  # the sets of VINs that count, since the last answer
        self._first_failed_at = 0.0  # the first failure since the last answer (monotonic)
        self._last_failed_at = 0.0  # the last failure (monotonic); an open breaker is open for `seconds` after it
        self.open_since = 0.0  # unix seconds; 0: closed
        self._probing = False  # the probe is under way
        breaker_gauge.set(0)

    @property
    def closed(self) -> bool:
        return not self.open_since

    def has_failed_for(self, seconds: float) -> bool:
        """Whether the breaker is open and the time from the first to the last failure is at least `seconds`. Not during
        a probe, because vPIC may answer it."""
        return not self.closed and not self._probing and self._last_failed_at - self._first_failed_at >= seconds

    def refusal(self) -> VpicUnavailable | None:
        """Why no call may be made now, or None if one may."""
        wait = self._last_failed_at + self._seconds - time.monotonic()
        if self.closed or (wait <= 0 and not self._probing):
            return None
        return VpicUnavailable(LEFT_ALONE, retry_after=max(1, wait))

    @contextmanager
    def watch_call(self, questions: Sequence[Question]) -> Iterator[None]:
        """Count the outcome of a call that is made in the body. Raises VpicUnavailable if no call may be made."""
        if refusal := self.refusal():
            raise refusal
        if not self.closed and len(questions) > 1:  # the breaker opened while the call waited; a probe has one VIN
            raise VpicUnavailable(LEFT_ALONE, retry_after=1)
        is_probe = self._probing = not self.closed
        try:
            yield
        except VpicUnavailable as error:
            if error.failure.blames_vpic:
                self._count_failure(frozenset(map(vin_of, questions) if error.failure.blames_vin else [object()]))
            raise
        else:
            self._close()
        finally:
            if is_probe:
                self._probing = False

    def _count_failure(self, failed: frozenset[object]) -> None:
        """Count a failed call for these VINs. If enough calls have failed, open the breaker."""
        self._last_failed_at = time.monotonic()
        if not self.closed:
            return
        if not self._failed:
            self._first_failed_at = self._last_failed_at
        self._failed = [other for other in self._failed if not other > failed]  # `failed` explains its supersets
        if not any(other <= failed for other in self._failed):
            self._failed.append(failed)
        if len(self._failed) >= self._failures:
            self.open_since = time.time()
            breaker_gauge.set(1)
            log.warning("breaker open: vPIC is left alone for %g s at a time", self._seconds)

    def _close(self) -> None:
        self._failed.clear()
        if not self.closed:
            self.open_since = 0.0
            breaker_gauge.set(0)
            log.info("breaker closed: vPIC answers again")


class Vpic:
    """Calls vPIC over a shared session. `decode` is the way in; each method below it adds one concern."""

    def __init__(self, session: aiohttp.ClientSession, rates: Rates, settings: Settings) -> None:
        self._session = session
        self._rates = rates
        self._settings = settings
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)

    @property
    def is_off(self) -> bool:
        """Whether the settings say that vPIC is never asked."""
        return not self._settings.vpic_url

    @property
    def state(self) -> str:
        """`ok`, `offline`, or since when the breaker is open."""
        if self.is_off:
            return "offline"
        return "ok" if self.breaker.closed else f"open since {utc(self.breaker.open_since)}"

    def refusal(self) -> VpicUnavailable | None:
        """Why no call may be made now, or None if one may."""
        if self.is_off:
            return VpicUnavailable(SWITCHED_OFF)
        return self.breaker.refusal()

    def is_given_up(self) -> bool:
        """Whether batches too are answered without vPIC."""
        return self.is_off or self.breaker.has_failed_for(self._settings.vpic_batch_timeout)

    async def decode(self, questions: Sequence[Question], seconds: float, patient: bool) -> dict[Question, Decoding]:
        """Ask vPIC up to 50 questions about different VINs. The result need not have all of them.

        Raises VpicUnavailable within so many seconds, after all retries. The wait of a `patient` caller for our own
        rate, before the first try, is not part of them and has no limit."""
        if patient:
            await self._keep_to_rate(math.inf)
        deadline = asyncio.get_running_loop().time() + seconds
        async for attempt in stamina.retry_context(
            on=lambda error: self._wait_before_retry(error, deadline),
            attempts=3,
            timeout=None,
            wait_initial=0.2,
            wait_jitter=0.3,
            wait_max=1,
        ):
            with attempt:
                if not patient or attempt.num > 1:
                    await self._keep_to_rate(deadline)
                with self.breaker.watch_call(questions):
                    return await self._logged_call(questions, deadline)
        raise AssertionError  # the loop returns or raises

    @staticmethod
    def _wait_before_retry(error: Exception, deadline: float) -> bool | float:
        """Whether to repeat a failed call: False; True, after stamina's own wait; or the seconds to wait before it."""
        if not isinstance(error, VpicUnavailable) or not error.failure.try_again:
            return False
        left = deadline - asyncio.get_running_loop().time()
        if error.retry_after is None:
            return left > 1  # stamina's longest wait
        return error.retry_after < left and max(0.05, error.retry_after)

    async def _keep_to_rate(self, deadline: float) -> None:
        """Take a call from the rate, and wait for it. Raises VpicUnavailable if the wait would end after `deadline`, or
        if the breaker is open."""
        while True:
            if refusal := self.breaker.refusal():
                raise refusal
            wait = await self._rates.vpic()
            if not wait:
                return
            if asyncio.get_running_loop().time() + wait > deadline:
                raise VpicUnavailable(CROWDED, retry_after=wait)
            await asyncio.sleep(wait)

    async def _logged_call(self, questions: Sequence[Question], deadline: float) -> dict[Question, Decoding]:
        """One call, with its duration in the metrics, and its failure in the log."""
        started, outcome = time.perf_counter(), "failed"
        try:
            decoded = await self._call(questions, deadline)
            outcome = "ok"
            return decoded
        except VpicUnavailable as error:
            outcome = {503: "refused", 504: "timeout"}.get(error.status_code, "failed")
            others = f" and {len(questions) - 1} more" if len(questions) > 1 else ""
            took = time.perf_counter() - started
            log.warning("vPIC call failed: %s%s: %s after %.2f s", vin_of(questions[0]), others, error.cause, took)
            raise
        finally:
            vpic_duration.record(time.perf_counter() - started, {"outcome": outcome})

    async def _call(self, questions: Sequence[Question], deadline: float) -> dict[Question, Decoding]:
        """One HTTP call, with its answer parsed. Raises VpicUnavailable, whatever goes wrong."""
        asked = {vin_of(question): question for question in questions}
        # If a call has less than half of `vpic_timeout`, its timeout is not vPIC's fault.
        fair = deadline - asyncio.get_running_loop().time() >= self._settings.vpic_timeout / 2
        try:
            async with asyncio.timeout_at(deadline), self._request(questions) as response:
                if response.status != 200:
                    raise self._status_error(response.status, response.headers.get("Retry-After", ""))
                body = bytearray()
                # In pieces, because a small packed answer may unpack to more than the memory holds.
                async for chunk in response.content.iter_chunked(2**16):
                    body += chunk
                    if len(body) > ANSWER_BYTES:
                        raise ValueError(f"more than {ANSWER_BYTES} bytes")
                return {asked[vin]: decoded for vin, decoded in parse(bytes(body), asked).items()}
        except TimeoutError:
            raise VpicUnavailable(TOO_LATE if fair else TOO_LITTLE_TIME, "no answer") from None
        except aiohttp.ClientError as error:
            reached = not isinstance(error.__cause__, aiohttp.ClientConnectorError)  # `send_once` wraps the error
            raise VpicUnavailable(INTERRUPTED if reached else UNREACHABLE, str(error) or type(error).__name__) from None
        except (ValueError, RecursionError) as error:
            raise VpicUnavailable(UNUSABLE, f"unusable answer: {error}") from None

    def _request(self, questions: Sequence[Question]) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        # Redirects are failures, because they lead away from the URL that the operator has set.
        if len(questions) == 1:
            url = f"{self._settings.vpic_url}/vehicles/DecodeVinValues/{vin_of(questions[0])}"
            query = {"format": "json"}
            if model_year := model_year_of(questions[0]):
                query["modelyear"] = model_year
            return self._session.get(url, params=query, allow_redirects=False)
        url = f"{self._settings.vpic_url}/vehicles/DecodeVINValuesBatch/"
        # The format is in the form, because vPIC answers in XML if it is only in the URL.
        return self._session.post(url, data={"format": "json", "data": ";".join(questions)}, allow_redirects=False)

    @staticmethod
    def _status_error(status: int, retry_after: str) -> VpicUnavailable:
        wait = retry_after_seconds(retry_after) if status in (429, 503) else None
        refuses_all = status in (403, 429, 503)  # vPIC refuses, whichever VIN is asked
        failure = Failure(
            503 if refuses_all else 502,
            f"vPIC refuses to answer (status {status}); ask again later.",
            try_again=status >= 500 or wait is not None,
            blames_vin=not refuses_all,
        )
        cause = f"status {status}" + (f", Retry-After {retry_after}" if wait is not None else "")
        return VpicUnavailable(failure, cause, retry_after=wait)


async def send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keep aiohttp from repeating a GET when a connection breaks, because neither rate nor breaker would count that."""
    try:
        return await send(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(f"{type(error).__name__}: {error}") from error


@asynccontextmanager
async def open_vpic(settings: Settings, rates: Rates) -> AsyncIterator[Vpic]:
    """vPIC with its session."""
    if not settings.vpic_url:
        log.warning("VINCACHE_VPIC_URL is empty: VINs are decoded offline")
    url = urlsplit(settings.vpic_url)
    stamina.instrumentation.set_on_retry_hooks([])  # because `_logged_call` logs each failed call
    async with aiohttp.ClientSession(
        headers={"User-Agent": "vincache/1.0"},
        timeout=aiohttp.ClientTimeout(total=None),  # each call has its own deadline
        connector=aiohttp.TCPConnector(limit=settings.vpic_concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),  # nothing is carried from one call to the next
        # The proxy of the environment, but not by trust_env, because that also sends passwords from ~/.netrc.
        proxy=None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme),
        middlewares=[send_once],
    ) as session:
        yield Vpic(session, rates, settings)


# ======================================================================================================================
# Offline: decoding with vPIC's data of some months ago, which the package ultravin contains.
# ======================================================================================================================

# VINs that are decoded at a time: ultravin makes 1,000 objects for each of them while it holds Python's lock, for which
# a hit may have to wait.
OFFLINE_MOST = 5
OFFLINE_DAYS = 183  # if the data is older, the log warns

# By the key of a value in vPIC's answer, the key of the value's id, as vPIC spells it.
VPIC_IDS = {"Make": "MakeID", "Model": "ModelID", "Manufacturer": "ManufacturerId"}


def let_hits_go_first() -> None:
    """Lower the priority of this thread, and of those that ultravin starts in it."""
    if sys.platform == "linux":  # on other systems the priority is the whole process's
        os.nice(5)


# One thread, because several would take Python's lock in turns, and a hit would have to wait for all of them.
offline_thread = ThreadPoolExecutor(1, "offline", let_hits_go_first)


@cache
def offline_month() -> str:
    """The month of the offline data, like 2026-10; empty if ultravin is not installed."""
    try:
        import ultravin  # 6 MB; its data, 30 MB, are loaded when the first VIN is decoded
    except ImportError:
        return ""
    return str(ultravin.provenance()["data_month"]).replace("_", "-")


async def note_versions() -> None:
    """Log how old the offline data is, and give the metrics the versions that run. This runs beside the start, because
    the import takes 30 ms."""
    month = await asyncio.to_thread(offline_month)
    build_gauge.set(1, {"version": VERSION, "sqlite": sqlite3.sqlite_version, "offline_data": month})
    if month:
        age = datetime.now(UTC) - datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
        level = logging.WARNING if age.days > OFFLINE_DAYS else logging.INFO
        log.log(level, "offline data: of %s, %d days old", month, age.days)


def decode_offline(questions: Sequence[Question]) -> dict[Question, Decoding]:
    """Decode without vPIC, in some 0.1 ms a VIN. The result is empty if ultravin is not installed. If ultravin fails,
    the result lacks the OFFLINE_MOST VINs that were decoded together."""
    found: dict[Question, Decoding] = {}
    for some in in_parts(questions, OFFLINE_MOST):
        try:
            found |= decode_together(some)
        except ImportError:
            break
        except BaseException as error:  # noqa: BLE001 - a panic of ultravin's Rust code is no Exception
            log.warning("offline decoding failed: %r", error)
    return found


def decode_together(questions: Sequence[Question]) -> dict[Question, Decoding]:
    """Decode these in one call of ultravin. Raises whatever ultravin raises, and ImportError if it is not installed."""
    import ultravin

    found: dict[Question, Decoding] = {}
    vins = [vin_of(question) for question in questions]
    years = [int(year) if (year := model_year_of(question)) else None for question in questions]
    for question, decoded in zip(questions, ultravin.decode_batch(vins, years=years, full=True), strict=True):
        # As `translate` does it, without its checks: half of the time of a cold file would go into them.
        elements = {element["code"]: element for element in decoded["elements"] if element["value"]}
        values = {code: element["value"] for code, element in elements.items()}
        values |= {name: elements[code]["attribute_id"] for code, name in VPIC_IDS.items() if code in elements}
        decoding = {name: values.pop(key, "") for name, key in (VPIC_KEYS | OPTIONAL_KEYS).items()}
        found[question] = decoding | {"vin": vin_of(question), "attributes": to_json(values)}
    return found


# ======================================================================================================================
# Lookups: from a question to its answer. `Scheduler` decides, without I/O, which tickets go into the next call to vPIC.
# `Lookups` reads the cache, makes the calls, and answers without vPIC if vPIC can't be used or the time is over. Each
# lookup ends with an answer or with one clear error.
# ======================================================================================================================


class Found(NamedTuple):
    """A record that answers a question, and the outcome of the lookup: hit, vpic, stale or offline."""

    record: Record
    outcome: str


# What a waiter gets: an answer, or the error.
Reply = Found | VpicUnavailable


TicketState = Enum("TicketState", "WAITING CALLED DONE")


class Ticket:
    """A question for vPIC. All lookups and lines that ask it at the same time share the ticket, each by a `Waiter`.

    | state   | where the ticket is    | what happens                                           | next state           |
    |---------|------------------------|--------------------------------------------------------|----------------------|
    | WAITING | in the queues of its   | `Scheduler.take_calls` takes it into a call            | CALLED               |
    |         | waiters                | its last waiter leaves                                 | DONE                 |
    |         |                        | the service ends                                       | DONE, with an error  |
    | CALLED  | in the task of one     | the cache has a fresh row from vPIC by now             | DONE                 |
    |         | call                   | vPIC answers, and the store has stored that, or failed | DONE                 |
    |         |                        | it is only a refresh, and another process claimed it   | DONE                 |
    |         |                        | the call fails; waiters that wait for another call get | DONE                 |
    |         |                        | a newer ticket, the others an answer without vPIC      |                      |
    |         |                        | the task is cancelled, or fails because of a bug       | DONE, with an error  |
    | DONE    | nowhere                |                                                        |                      |
    """

    def __init__(self, question: Question, details: bool) -> None:
        self.question = question
        self.details = details  # a waiter wants the attributes, so a row without them does not answer it
        self.state = TicketState.WAITING
        self.waiters: dict[Waiter, None] = {}  # in the order in which they joined
        self.removal: int | None = None  # the last removal of the VIN, as it was read just before the call
        # Set when `removal` is read, or the call is over; not without a call, because `removal` then says nothing.
        self.removal_read = asyncio.Event()
        self.found: Found | None = None  # vPIC's answer, while it is being stored
        # What a ticket takes over from the one before, of which the call failed:
        self.needs_own_call = False  # a call with other VINs failed, and this VIN may be the reason
        self.failures = 0  # failed calls for which no other VIN can be the reason
        self.is_claimed = False  # its row was claimed for it, and therefore counts as fresh although it is not

    def is_only_in(self, queue: "Queue") -> bool:
        """Whether the ticket has waiters of this queue alone."""
        return bool(self.waiters) and all(waiter.queue is queue for waiter in self.waiters)


class Queue:
    """Tickets that wait for a call to vPIC, in order."""

    def __init__(self) -> None:
        self._tickets: OrderedDict[Ticket, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    def add(self, ticket: Ticket, first: bool = False) -> None:
        self._tickets.setdefault(ticket)
        if first:
            self._tickets.move_to_end(ticket, last=False)

    def discard(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket, None)


class Waiter:
    """A lookup or a line of a batch that waits for a ticket. A refresh and a confirmation have a waiter too, because a
    ticket without waiters would leave its queue. Nobody reads their reply."""

    def __init__(self, ticket: Ticket, queue: Queue) -> None:
        self.ticket = ticket
        self.queue = queue  # in which the ticket waits for this waiter
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def resolve(self, reply: Reply) -> None:
        """Give the waiter its reply, unless it has one."""
        if not self.reply.done():
            self.reply.set_result(reply)


class Call(NamedTuple):
    """Tickets that go to vPIC together."""

    tickets: list[Ticket]
    background: bool  # they were taken from the queue of a batch, of refreshes or of confirmations


class Scheduler:
    """Decides which tickets go into the next calls to vPIC.

    Lookups come first. If a place is free, a lookup has a call to itself at once. If none is, the lookups that wait
    share the next calls. A call takes min(50, ceil(waiting / free places), 2 * ceil(waiting / all places)) of them:
    with the second number the free places empty the queue, and the third one keeps a single free place from taking
    nearly all.

    Then comes the background, which may have half of the places. Batches and refreshes take turns: in each round each
    batch has one call, and then the refreshes have one. Confirmations are called when nothing else waits."""

    def __init__(self, places: int) -> None:
        self.places = places  # calls that may be under way at once
        self.free_places = places  # places without a call
        self.free_for_background = max(1, places // 2)  # calls that the background may add to those under way
        self.lookups = Queue()
        self.refreshes = Queue()  # for rows that were served in their grace
        self.confirmations = Queue()  # for rows that were decoded offline
        self.batches: list[Queue] = []  # one for each batch under way; the one that was called last is the last
        self._round: list[Queue] = []  # the queues that have not had their turn in this round

    @property
    def is_idle(self) -> bool:
        """Whether a call of the background could be made, but nothing waits."""
        queues = (self.lookups, self.refreshes, self.confirmations, *self.batches)
        return self.free_places > 0 and self.free_for_background > 0 and not any(queues)

    def join(self, waiter: Waiter, first: bool = False) -> None:
        waiter.ticket.waiters[waiter] = None
        if waiter.ticket.state is TicketState.WAITING:
            waiter.queue.add(waiter.ticket, first)

    def leave(self, waiter: Waiter) -> None:
        """Remove the waiter from its ticket, and the ticket from the queue unless another waiter has it there."""
        waiter.ticket.waiters.pop(waiter, None)
        if not any(other.queue is waiter.queue for other in waiter.ticket.waiters):
            waiter.queue.discard(waiter.ticket)

    def take_calls(self, most: int) -> Iterator[Call]:
        """The next calls, each with up to `most` tickets. A call has a place until `free` is called."""
        waiting = len(self.lookups)
        size = min(most, math.ceil(waiting / max(1, self.free_places)), 2 * math.ceil(waiting / self.places))
        while self.free_places and self.lookups:
            yield self._take(self.lookups, size, background=False)
        while self.free_places and self.free_for_background and (queue := self._next_turn()):
            yield self._take(queue, most, background=True)

    def free(self, call: Call) -> None:
        self.free_places += 1
        self.free_for_background += call.background

    def _next_turn(self) -> Queue | None:
        """The queue of the background whose turn it is; None if all are empty."""
        self._round = [queue for queue in self._round if queue] or [
            queue for queue in (*self.batches, self.refreshes) if queue
        ]
        if not self._round:
            return self.confirmations or None
        queue = self._round.pop(0)
        if queue in self.batches:
            self.batches.remove(queue)
            self.batches.append(queue)
        return queue

    def _take(self, queue: Queue, size: int, background: bool) -> Call:
        taken: dict[str, Ticket] = {}  # by VIN, because vPIC's answer has the VIN, but not the year that was asked
        for ticket in queue:
            if ticket.needs_own_call and taken:
                continue
            taken.setdefault(vin_of(ticket.question), ticket)
            if ticket.needs_own_call or len(taken) == size:
                break
        for ticket in taken.values():
            ticket.state = TicketState.CALLED
            for waiter in ticket.waiters:
                waiter.queue.discard(ticket)
        self.free_places -= 1
        self.free_for_background -= background
        return Call([*taken.values()], background)


class Batch:
    """A batch while it is being answered."""

    def __init__(self, form: LineForm, patience: float | None) -> None:
        self.form = form
        self.patience = patience  # seconds after which a line is answered without vPIC; None: see `Vpic.is_given_up`
        self.queue = Queue()  # tickets of the lines that are not cached
        self.lines: deque[Line | Waiter] = deque()  # in the order of the rows: a line, or the waiter that it needs
        self.waiters: set[Waiter] = set()  # all waiters, also those that are not in `lines` yet
        self.outcomes: Counter[str] = Counter()  # of the lines that were not cached

    @property
    def has_next_line(self) -> bool:
        return bool(self.lines) and (not isinstance(self.lines[0], Waiter) or self.lines[0].reply.done())


WINDOW = 100  # lines of a batch that are made in one step, for which a hit may have to wait
AHEAD = 500  # lines of a batch that are looked up before the first of them is answered
# Tickets in a queue of the background, and waiters of a ticket whose callers were answered without vPIC; further rows
# stay stale or unconfirmed for now.
BACKGROUND_MOST = 10_000
WITHOUT_VPIC_S = 0.5  # the last part of a lookup's time, in which it is answered without vPIC
LOST_S = 60  # from one check to the next whether a line of a batch waits in vain because of a bug
CONFIRM_S = 60  # from one look for unconfirmed rows to the next, if there were none


class Lookups:
    """Makes all lookups. Use it as `async with`."""

    def __init__(self, cache: Cache, vpic: Vpic, settings: Settings) -> None:
        self._cache = cache
        self.vpic = vpic
        self._settings = settings
        self._scheduler = Scheduler(settings.vpic_concurrency)
        # A lookup stops to wait for vPIC so many seconds before its deadline. A call ends twice as many seconds before,
        # so that there is time for an answer when it fails.
        self._reserve_s = min(WITHOUT_VPIC_S, settings.vpic_timeout / 16)
        self._tickets: dict[Question, Ticket] = {}  # the tickets that new waiters may join
        self._tasks = Tasks()  # calls, answers without vPIC, and claims of unconfirmed rows
        self._impatient: list[Waiter] = []  # their patience is over; `_schedule` empties the list
        self._overdue: list[Waiter] = []  # lookups whose time is nearly over; `_schedule` empties the list
        self._scheduled: asyncio.Handle | None = None  # the next `_schedule`
        self._schedule_at = math.inf  # when it runs (loop time)
        self._claim_at = 0.0  # when unconfirmed rows are claimed next, if nothing else waits (loop time)
        self._claiming = False  # a claim is under way
        self._closed = False  # no task begins any more

    async def __aenter__(self) -> "Lookups":
        self._wake()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        if self._scheduled:
            self._scheduled.cancel()
        await self._tasks.finish(cancel=True)
        for ticket in [*self._tickets.values()]:  # also one whose call was cancelled before it began
            self._end(ticket, service_error())

    async def hit(self, question: Question, details: bool = False) -> Answer | None:
        """The cached answer. If its row is stale, vPIC is asked in the background."""
        if details:
            cached = (await self._cache.answers([question], details)).get(question)
        else:
            cached = await self._cache.hit(question)
        if cached is not None:
            if cached.outcome == "stale":
                self._ask_in_background([question], self._scheduler.refreshes)
            lookups_counter.add(1, {"outcome": cached.outcome})
        return cached

    async def lookup(self, question: Question, details: bool = False, patience: float | None = None) -> Answer:
        """The answer to one question, within `vpic_timeout`, or WITHOUT_VPIC_S later if the store is slow. After
        `patience` (seconds) it may be one without vPIC. Raises VpicUnavailable if there is no answer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        give_up_at = began + self._settings.vpic_timeout - self._reserve_s
        try:
            async with asyncio.timeout_at(give_up_at):
                if cached := await self.hit(question, details):
                    return cached
                waiter = await self._join(question, details, self._scheduler.lookups)
        except TimeoutError:  # the store does not answer
            waiter = Waiter(Ticket(question, details), self._scheduler.lookups)
        try:
            if patience is not None and began + patience < give_up_at:
                await self._wait(waiter, began + patience)
                self._end_patience([waiter])
            await self._wait(waiter, give_up_at)
            self._give_up(waiter)
            await self._wait(waiter, loop.time() + WITHOUT_VPIC_S)
        finally:
            self._release(waiter)
        reply = waiter.reply.result() if waiter.reply.done() else overdue_error(waiter.ticket)
        lookups_counter.add(1, {"outcome": outcome_name(reply)})
        if isinstance(reply, VpicUnavailable):
            raise reply.about(vin_of(question))
        return reply.record.answer(reply.outcome, details)

    # -- Waiting -------------------------------------------------------------------------------------------------------

    @staticmethod
    async def _wait(waiter: Waiter, moment: float) -> None:
        """Wait for the reply, until `moment` (loop time) at the latest."""
        if not waiter.reply.done():
            await asyncio.wait([waiter.reply], timeout=max(0, moment - asyncio.get_running_loop().time()))

    async def _join(self, question: Question, details: bool, queue: Queue) -> Waiter:
        """A new waiter of the question's ticket. If there is none, or the VIN was removed since its call began, make a
        new ticket."""
        while (ticket := self._tickets.get(question)) and ticket.state is TicketState.CALLED:
            await ticket.removal_read.wait()
            removal = await self._cache.removal(question)
            if self._tickets.get(question) is ticket:  # else its call has ended during these two awaits
                if ticket.removal == removal:
                    break
                del self._tickets[question]  # its waiters, who came before the removal, get its reply all the same
        if ticket is None:
            ticket = self._tickets[question] = Ticket(question, details)
        ticket.details |= details
        waiter = Waiter(ticket, queue)
        self._scheduler.join(waiter)
        if self._closed:
            waiter.resolve(service_error())
        self._wake()
        return waiter

    def _leave(self, waiter: Waiter) -> None:
        """Remove a waiter. If its ticket waits and has no other waiter, vPIC is not asked."""
        self._scheduler.leave(waiter)
        ticket = waiter.ticket
        if ticket.state is TicketState.WAITING and not ticket.waiters:
            self._end(ticket)

    def _release(self, waiter: Waiter) -> None:
        """Remove the waiter of a caller that is gone. But if the caller was answered without vPIC, its waiter stays
        unless there are too many, because vPIC's answer has to replace that answer in the cache."""
        reply = waiter.reply.result() if waiter.reply.done() and not waiter.reply.cancelled() else None
        answered_early = isinstance(reply, Found) and waiter in waiter.ticket.waiters
        if not answered_early or max(len(waiter.queue), len(waiter.ticket.waiters)) > BACKGROUND_MOST:
            self._leave(waiter)

    def _end(self, ticket: Ticket, reply: Reply | None = None) -> None:
        """End a ticket. Its waiters get this reply, if there is one."""
        if ticket.state is TicketState.CALLED:
            ticket.removal_read.set()
        ticket.state = TicketState.DONE
        if self._tickets.get(ticket.question) is ticket:
            del self._tickets[ticket.question]
        if reply is not None:
            for waiter in ticket.waiters:
                waiter.resolve(reply)
        ticket.waiters.clear()

    def _end_patience(self, waiters: Iterable[Waiter]) -> None:
        """Answer these without vPIC if there is such an answer. Else they go on waiting."""
        # A waiter that has left its ticket has no caller any more.
        self._impatient += [waiter for waiter in waiters if not waiter.reply.done() and waiter in waiter.ticket.waiters]
        self._wake()

    def _give_up(self, waiter: Waiter) -> None:
        """Answer a lookup whose time is over: with vPIC's answer if that is just being stored, else without vPIC."""
        if waiter.ticket.found:
            waiter.resolve(waiter.ticket.found)
        elif not waiter.reply.done():
            self._overdue.append(waiter)
            self._wake()

    def _ask_in_background(self, questions: Iterable[Question], queue: Queue) -> None:
        """Ask vPIC only to store its answers."""
        for question in questions:
            if question not in self._tickets and len(queue) < BACKGROUND_MOST and not self._closed:
                ticket = self._tickets[question] = Ticket(question, details=False)
                self._scheduler.join(Waiter(ticket, queue))
                self._wake()

    # -- Calling vPIC --------------------------------------------------------------------------------------------------

    def _wake(self, seconds: float = 0) -> None:
        """Run `_schedule` after so many seconds, or sooner. With 0 it runs in the next turn of the loop, once for all
        that happens in this one."""
        loop = asyncio.get_running_loop()
        if loop.time() + seconds < self._schedule_at and not self._closed:
            if self._scheduled:
                self._scheduled.cancel()
            self._schedule_at = loop.time() + seconds
            self._scheduled = loop.call_at(self._schedule_at, self._schedule)

    def _schedule(self) -> None:
        """Start all calls to vPIC and answers without vPIC that can begin now."""
        self._scheduled, self._schedule_at = None, math.inf
        impatient, self._impatient = [waiter for waiter in self._impatient if not waiter.reply.done()], []
        overdue, self._overdue = self._overdue, []
        if impatient:
            self._start(self._answer_without_vpic(impatient, None, is_final=False))
        if overdue:
            self._start(self._answer_without_vpic(overdue, None))
        if refusal := self.vpic.refusal():
            self._refuse(refusal)
        else:
            self._start_calls()
        waiting_gauge.set(len(self._scheduler.lookups))
        calls_gauge.set(self._scheduler.places - self._scheduler.free_places)

    def _start_calls(self) -> None:
        # A call that probes vPIC has one ticket, because the others would wait for vPIC in vain if it still fails.
        for call in self._scheduler.take_calls(VPIC_VINS if self.vpic.breaker.closed else 1):
            self._start(self._call_vpic(call))
        if self._scheduler.is_idle and not self._claiming:
            now = asyncio.get_running_loop().time()
            if now >= self._claim_at:
                self._claiming, self._claim_at = True, now + CONFIRM_S
                self._start(self._claim_unconfirmed())
            self._wake(self._claim_at - now)

    def _refuse(self, refusal: VpicUnavailable) -> None:
        """While vPIC is not called, answer lookups without it, and batches too if vPIC is given up. Refreshes leave
        their queue, and their rows are claimed, so that they are not tried again at once."""
        scheduler = self._scheduler
        queues = [scheduler.lookups, scheduler.refreshes, *(scheduler.batches if self.vpic.is_given_up() else [])]
        refused = [waiter for queue in queues for ticket in queue for waiter in ticket.waiters if waiter.queue is queue]
        for waiter in refused:
            self._leave(waiter)
        if refused := [waiter for waiter in refused if not waiter.reply.done()]:
            self._start(self._answer_without_vpic(refused, refusal))
        if not self.vpic.is_off:
            self._wake(refusal.retry_after or 1)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work in a task, which goes on when a waiter leaves."""
        self._tasks.start(work).add_done_callback(log_error)

    async def _call_vpic(self, call: Call) -> None:
        """Make a call. Afterwards none of its tickets is left in it, whatever happens."""
        try:
            await self._ask_and_store(call)
        finally:
            for ticket in call.tickets:
                if ticket.state is TicketState.CALLED:
                    self._end(ticket, ticket.found or service_error())

    async def _ask_and_store(self, call: Call) -> None:
        error = VpicUnavailable(NOT_DESCRIBED)  # for the VINs that vPIC's answer lacks
        decoded: dict[Question, Decoding] = {}
        tickets = call.tickets
        try:
            # A call that begins with its lookup ends before the lookup gives up.
            seconds = self._settings.vpic_timeout - 2 * self._reserve_s
            if len(tickets) > 1 and call.background:
                seconds = self._settings.vpic_batch_timeout
            deadline = asyncio.get_running_loop().time() + seconds
            await self._skip_cached(tickets, seconds)
            await self._skip_claimed(tickets)
            tickets = [ticket for ticket in tickets if ticket.state is TicketState.CALLED]
            if not call.background:  # else nobody gives up, and vPIC has the whole time, however long the cache took
                seconds = deadline - asyncio.get_running_loop().time()
            if tickets:
                questions = [ticket.question for ticket in tickets]
                decoded = await self.vpic.decode(questions, seconds, patient=call.background)
        except VpicUnavailable as raised:
            error = raised
        finally:  # before the answers are stored, because others may call vPIC meanwhile
            self._scheduler.free(call)
            self._wake()
        await self._store_and_answer([ticket for ticket in tickets if ticket.question in decoded], decoded)
        unanswered = [ticket for ticket in tickets if ticket.question not in decoded]
        if waiters := self._requeue(call, unanswered, error, shared=len(tickets) > 1):
            await self._answer_without_vpic(waiters, error)

    async def _skip_cached(self, tickets: list[Ticket], seconds: float) -> None:
        """End the tickets for which the cache has a fresh row from vPIC by now. It is read for so many seconds at
        most."""
        records, removals = await self._cache.records([ticket.question for ticket in tickets], seconds)
        now = time.time()
        for ticket in tickets:
            ticket.removal = removals.get(ticket.question)
            ticket.removal_read.set()
            record = records.get(ticket.question)
            if record and record.source == "vpic" and record.is_usable(now, ticket.details) and not ticket.is_claimed:
                self._end(ticket, Found(record, "hit"))

    async def _skip_claimed(self, tickets: list[Ticket]) -> None:
        """End the refreshes that another process has claimed."""
        queue = self._scheduler.refreshes
        refreshes = {
            ticket.question: ticket for ticket in tickets if ticket.is_only_in(queue) and not ticket.is_claimed
        }
        for question in await self._cache.claim_expired([*refreshes]):
            refreshes.pop(question).is_claimed = True
        for ticket in refreshes.values():
            if ticket.is_only_in(queue):  # else a lookup has joined it
                self._end(ticket)

    async def _store_and_answer(self, tickets: list[Ticket], decoded: dict[Question, Decoding]) -> None:
        """Store vPIC's answers, then end their tickets."""
        records = []
        for ticket in tickets:
            record = self._make_record(ticket.question, decoded[ticket.question], "vpic")
            ticket.found = Found(record, "vpic")
            records.append((record, ticket.removal))
        await self._cache.store(records)
        for ticket in tickets:
            self._end(ticket, ticket.found)

    def _requeue(self, call: Call, tickets: list[Ticket], error: VpicUnavailable, shared: bool) -> list[Waiter]:
        """After a failed call, let these tickets wait again if another call may succeed. Returns the waiters that are
        to be answered without vPIC."""
        is_crowded = error.failure is CROWDED
        refused: list[Waiter] = []
        for ticket in reversed(tickets):  # because each that is put back first goes before the others
            if error.failure.blames_vin and shared and ticket.waiters:
                ticket.needs_own_call = True
                self._put_back(ticket, first=True)
                continue
            is_open = not self.vpic.breaker.closed
            if is_open:
                batches_wait = not self.vpic.is_given_up()
            elif is_crowded and not call.background:  # a batch's own call would have waited for the rate
                batches_wait = True
            else:
                ticket.failures += 1
                batches_wait = ticket.failures == 1 and (error.failure.blames_vpic or is_crowded)  # a second call
            waiting_on = [self._scheduler.confirmations] if is_open else []
            if batches_wait:
                waiting_on += self._scheduler.batches
            for waiter in [*ticket.waiters]:
                if waiter.queue not in waiting_on:
                    self._leave(waiter)
                    refused.append(waiter)
            if ticket.waiters:
                self._put_back(ticket, first=is_open)
            else:
                self._end(ticket)
        self._wake()
        confirmations = self._scheduler.confirmations  # nobody needs a reply for these: their rows are in the cache
        return [waiter for waiter in refused if waiter.queue is not confirmations and not waiter.reply.done()]

    def _put_back(self, ticket: Ticket, first: bool) -> None:
        """Let the waiters of a called ticket wait again, at the front or at the end of their queues. They move to the
        newer ticket of the question if there is one, else to a new one."""
        newer = self._tickets.get(ticket.question, ticket)
        if newer is ticket:
            newer = self._tickets[ticket.question] = Ticket(ticket.question, ticket.details)
            newer.needs_own_call, newer.failures = ticket.needs_own_call, ticket.failures
            newer.is_claimed = ticket.is_claimed
        newer.details |= ticket.details
        for waiter in ticket.waiters:
            waiter.ticket = newer
            self._scheduler.join(waiter, first)
        self._end(ticket)

    def _make_record(
        self, question: Question, decoding: Decoding, source: Literal["vpic", "offline"], life: float = 0
    ) -> Record:
        """The row for a decoded VIN. If it was decoded offline, vPIC is asked after `life` seconds."""
        now = time.time()
        if source == "vpic":
            life = self._settings.ttl if is_decodable(decoding) else self._settings.invalid_ttl
            # Up to a tenth less, depending on the VIN, because rows that are stored together would expire together.
            life *= 1 - zlib.crc32(question.encode()) / 2**32 / 10
        return Record(
            **decoding,
            model_year_asked=model_year_of(question),
            source=source,
            decoded=int(is_decodable(decoding)),
            fetched_at=int(now),
            expires_at=math.ceil(now + life) if life else int(now),
        )

    async def _claim_unconfirmed(self) -> None:
        """Claim unconfirmed rows and ask vPIC for them; for one row if the call is the breaker's probe."""
        most = VPIC_VINS if self.vpic.breaker.closed else 1
        try:
            if questions := await self._cache.claim_unconfirmed(most):
                self._claim_at = 0  # because there may be more
                self._ask_in_background(questions, self._scheduler.confirmations)
        finally:
            self._claiming = False
            self._wake()

    # -- Answers without vPIC ------------------------------------------------------------------------------------------

    async def _answer_without_vpic(
        self, waiters: list[Waiter], error: VpicUnavailable | None, is_final: bool = True
    ) -> None:
        """Answer with the row, which may be expired, else offline, else with the error. If `error` is None, it is
        that of an overdue lookup. If not `is_final`, waiters without an answer go on waiting."""
        try:
            # If vPIC was asked for a VIN and did not answer, it is not asked again too soon.
            life = self._settings.offline_ttl if error and error.failure.blames_vin else 0
            # An overdue lookup has WITHOUT_VPIC_S left: 0.4 of it to read the cache, and 0.4 to store.
            seconds = WITHOUT_VPIC_S * 0.4 if is_final and error is None else None
            detailed = {waiter.ticket.question: waiter.ticket.details for waiter in waiters}
            records, removals = await self._cache.records([*detailed], seconds)
            # If the VIN was removed since its call began, the answer is not stored, as vPIC's would not be.
            removals |= {w.ticket.question: w.ticket.removal for w in waiters if w.ticket.removal_read.is_set()}
            found = await self._find_without_vpic(detailed, records, life)
            with suppress(TimeoutError):  # the statement goes on
                async with asyncio.timeout(seconds):
                    await self._store_without_vpic(found, removals)
            for waiter in waiters:
                if answer := found.get(waiter.ticket.question):
                    waiter.resolve(answer)
                elif is_final:
                    waiter.resolve(error or overdue_error(waiter.ticket))
        finally:
            for waiter in waiters if is_final else ():
                waiter.resolve(error or service_error())

    async def _find_without_vpic(
        self, detailed: dict[Question, bool], records: dict[Question, Record], life: float
    ) -> dict[Question, Found]:
        """The answers without vPIC. `detailed` has the questions, and of each whether the attributes are wanted."""
        now, found = time.time(), dict[Question, Found]()
        for question, record in records.items():
            found[question] = Found(record, "hit" if record.is_usable(now, detailed[question]) else "stale")
        if self._settings.offline and (unknown := [question for question in detailed if question not in found]):
            loop = asyncio.get_running_loop()
            for question, decoding in (await loop.run_in_executor(offline_thread, decode_offline, unknown)).items():
                # While vPIC is configured, "undecodable" is no answer, because vPIC may know the VIN.
                if is_decodable(decoding) or self.vpic.is_off:
                    found[question] = Found(self._make_record(question, decoding, "offline", life), "offline")
        return found

    async def _store_without_vpic(self, found: dict[Question, Found], removals: dict[Question, int | None]) -> None:
        """Store the rows that were decoded offline. Claim the stale rows for which no ticket waits, so that vPIC is not
        asked for them again at once. If a ticket waits, its call would take a claimed row for fresh, and not ask."""
        offline = [(new.record, removals.get(q)) for q, new in found.items() if new.outcome == "offline"]
        if offline:
            await self._cache.store(offline)
            self._claim_at = 0  # because these rows are unconfirmed
            self._wake()
        stale = [q for q, old in found.items() if old.outcome == "stale" and q not in self._tickets]
        if stale:
            await self._cache.claim_expired(stale)

    # -- Batches -------------------------------------------------------------------------------------------------------

    async def batch(
        self, windows: AsyncIterator[list[BatchRow]], form: LineForm, patience: float | None = None
    ) -> AsyncIterator[list[Line]]:
        """The lines for the rows, in their order. Each is yielded as soon as it and those before it are known.

        If a line has waited for vPIC for `patience` (seconds), it is answered without vPIC if there is such an answer.
        Without a patience, lines wait until `Vpic.is_given_up`."""
        batch = Batch(form, patience)
        self._scheduler.batches.append(batch.queue)
        try:
            async for rows in windows:
                lines = await self._look_up_rows(rows, batch)
                if not batch.lines and not batch.waiters:  # for speed
                    yield cast(list[Line], lines)
                    continue
                batch.lines += lines
                while batch.has_next_line or len(batch.lines) > AHEAD:
                    yield await self._next_lines(batch)
            while batch.lines:
                yield await self._next_lines(batch)
        finally:
            self._scheduler.batches.remove(batch.queue)
            for waiter in batch.waiters:
                self._leave(waiter)
            without_vpic = [name for name in ("failed", "offline", "stale") if batch.outcomes[name]]
            if without_vpic and not self.vpic.is_off:
                counted = ", ".join(f"{batch.outcomes[name]:,} {name}" for name in without_vpic)
                level = logging.WARNING if batch.patience is None else logging.INFO
                log.log(level, "batch answered in part without vPIC: %s", counted)

    async def _next_lines(self, batch: Batch) -> list[Line]:
        """Up to WINDOW lines. Wait for the first one if it is not known."""
        lines: list[Line] = []
        if isinstance(batch.lines[0], Waiter):
            await self._wait_for_line(batch.lines[0])
        while batch.has_next_line and len(lines) < WINDOW:
            line = batch.lines.popleft()
            if isinstance(line, Waiter):
                self._release(line)
                if line not in line.ticket.waiters:  # else it leaves with the batch
                    batch.waiters.discard(line)
                reply = line.reply.result()
                batch.outcomes[outcome_name(reply)] += 1
                lookups_counter.add(1, {"outcome": outcome_name(reply)})
                line = line_of(line.ticket.question, reply, batch.form)
            lines.append(line)
        return lines

    async def _wait_for_line(self, waiter: Waiter) -> None:
        """Wait for the reply. If a bug has lost the ticket, end after LOST_S, because the batch would else hang."""
        while not waiter.reply.done():
            await asyncio.wait([waiter.reply], timeout=LOST_S)
            if not waiter.reply.done() and self._is_lost(waiter):
                log.error("a line of a batch waits for a ticket that is lost: %s", waiter.ticket.question)
                waiter.resolve(service_error())

    def _is_lost(self, waiter: Waiter) -> bool:
        ticket = waiter.ticket
        if waiter in ticket.waiters and ticket.state is TicketState.WAITING:
            return ticket not in waiter.queue or not (self._tasks or self._scheduled)
        return not self._tasks  # one of them calls vPIC for the ticket, or answers the waiter without vPIC

    async def _look_up_rows(self, rows: Sequence[BatchRow], batch: Batch) -> list[Line | Waiter]:
        """For each row its line if it is cached or the VIN is bad, else a waiter."""
        asked: list[Question] = []
        lines: list[Line | Waiter] = [""] * len(rows)
        for vin, model_year, _ in rows:
            if not model_year and is_normal(vin):  # for speed, because most rows are like this
                asked.append(vin)
                continue
            try:
                asked.append(make_question(normalize_vin(vin), normalize_model_year(model_year)))
            except PydanticCustomError as error:
                # Each row before this one has a question in `asked`, so this row has the index len(asked).
                lines[len(asked)] = make_line(batch.form, 422, {"vin": vin}, error.message())
                asked.append("")
        cached = await self._cache.lines(asked, batch.form)
        outcomes: list[str] = []
        waiters: list[Waiter] = []
        for index, question in enumerate(asked):
            if found := cached.get(question):
                outcome, lines[index] = found
                outcomes.append(outcome)
                if outcome == "stale":
                    self._ask_in_background([question], self._scheduler.refreshes)
            elif question:
                waiter = lines[index] = await self._join(question, batch.form.details, batch.queue)
                waiters.append(waiter)
                batch.waiters.add(waiter)
        if waiters and batch.patience is not None:
            asyncio.get_running_loop().call_later(batch.patience, self._end_patience, waiters)
        for outcome, times in Counter(outcomes).items():
            lookups_counter.add(times, {"outcome": outcome})
        return lines


def overdue_error(ticket: Ticket) -> VpicUnavailable:
    """The error of a lookup whose time is over."""
    if ticket.state is TicketState.WAITING:
        return VpicUnavailable(CROWDED, retry_after=1)
    return VpicUnavailable(TOO_LATE)


def service_error() -> VpicUnavailable:
    """The error of a lookup that has no answer because of a bug, or because the service ends."""
    return VpicUnavailable(SERVICE_FAULT, retry_after=1)


def outcome_name(reply: Reply) -> str:
    """The outcome in the metrics."""
    if isinstance(reply, VpicUnavailable):
        return "failed"
    return reply.outcome if reply.record.decoded or reply.outcome != "vpic" else "undecodable"


def line_of(question: Question, reply: Reply, form: LineForm) -> Line:
    if isinstance(reply, VpicUnavailable):
        return make_line(form, reply.status_code, {"vin": vin_of(question)}, reply.detail)
    return reply.record.line(reply.outcome, form)


# ======================================================================================================================
# Fleet: a file of VINs as people keep it, a list or a spreadsheet's CSV, and its answer, as JSON Lines or as CSV. An
# upload is received whole and read through once before it is answered, because clients write all before they read, and
# because a fault in a file is then a 422. `LayoutFinder` alone decides by the first lines whether a file is a list or
# CSV. Uploads are read by threads of their own, which hold up no lookup.
# ======================================================================================================================

TEXT, CSV, JSONL = "text/plain", "text/csv", "application/jsonl"
JSON = "application/json"

LIST_CHARACTERS = 1000  # the longest line of a list; if a line is longer, the file has lost its line ends
ROW_CHARACTERS = 2**15  # the longest row of CSV; some 600 rows of a batch are in memory at once
PROGRESS_S = 60  # the log says so often how many lines of a batch were answered

STEP_CHARACTERS = 2**16  # a thread reads so many, in some 1.2 ms, and then pauses
LINE_COST = 31  # characters that are added for each line, because an empty line takes time too
PAUSE_S = 1e-5  # not 0, because the thread would then go on before another thread wakes up

ONE_VIN_A_LINE = "send one VIN a line; with curl use --data-binary, because -d removes the line ends"
SEND_NO_FORM = "Send the file itself, not in a form: with curl --data-binary @fleet.csv, not -F"

FIRST_LINES = 20  # the names of the columns are looked for in so many lines of a file,
FIRST_CHARACTERS = 2**15  # and in fewer lines if these have more characters than this

SEPARATOR_LINE = re.compile(r"sep=(\t|[^\w\s\"])[\r\n]*")  # Excel's own, before the names
# Neither a word nor only digits. Each repetition has a limit, because a search of a long word would else take seconds.
VIN_LIKE = re.compile(r"(?=(?:[A-Za-z]{0,14}\d){3})(?=\d{0,16}[A-Za-z])[0-9A-Za-z]{17}")
HAS_VIN = re.compile(rf"(?<![^\W_]){VIN_LIKE.pattern}(?![^\W_])")  # it is no part of a longer word

# The encoding of a file by its first bytes. UTF-32 stands before UTF-16, because its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# The encoding of a file without a mark, by those of four bytes that are often NUL (0), because most of a file is ASCII.
WIDE_ENCODINGS = {"-0-0": "utf-16-le", "0-0-": "utf-16-be", "-000": "utf-32-le", "000-": "utf-32-be"}
DETECTION_BYTES = 4096  # the encoding is detected from so many bytes at the beginning of a file

CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([^\s;\"']+)", re.I)
# Encodings of Python that are no charset of a text; and UTF-7, because its decoder takes seconds for one long run.
NO_CHARSET = re.compile("mbcs|rot_13|tactis|utf_7|.*_codec")

# The beginning of JSON, or of a form: many clients send an object as a form if no other type is set. No file of VINs
# begins so.
UNTYPED_JSON = re.compile(r"\{|\[(?!\w)|vins?=", re.I)  # but [VIN] is a column's name from SQL Server
PACKED = (b"\x1f\x8b", b"PK\3\4", b"\xd0\xcf\x11\xe0")  # gzip; zip, which a workbook is too; an older workbook

FORMULA = re.compile("\0[=+@\t\r-]")  # after a NUL, the first character of a value that a spreadsheet would run


def is_json(content_type: str) -> bool:
    """Whether FastAPI parses a body of this type as JSON."""
    return re.fullmatch(r"application/([^/;\s]+\+)?json", media_type(content_type)) is not None


def named_encoding(content_type: str) -> str:
    """The encoding that a content type names. Empty if it names none, or ASCII, because many files of other encodings
    are sent as ASCII. Raises a 415 if it is not known."""
    if not (named := CHARSET.search(content_type)):
        return ""
    name = re.sub("[^a-z0-9]+", "_", named[1].lower())
    name = aliases.get(name, name)
    if name == "ascii":
        return ""
    # `aliases` and not codecs.lookup alone, because Python keeps every unknown name that was looked up in memory.
    if name not in aliases.values() or NO_CHARSET.fullmatch(name):
        raise HTTPException(415, f"The charset {named[1][:40]!a} is not known; send UTF-8.")
    encoding = codecs.lookup(name).name
    return "cp1252" if encoding == "iso8859-1" else encoding  # as browsers do, because Latin-1 has no € but cp1252 has


def media_type(header: str) -> str:
    return header.partition(";")[0].strip().lower()


upload_threads = ThreadPoolExecutor(32, "upload")
upload_lock = threading.Lock()  # held by the one upload thread that reads, so that a lookup waits for one step at most


async def in_upload_thread(work: Callable[..., Result], *given: Any) -> Result:
    return await asyncio.get_running_loop().run_in_executor(upload_threads, work, *given)


def list_row(line: str) -> BatchRow:
    """The row of a line of a list. A line with quotes is read as CSV. Commas at the end are ignored."""
    line = line.rstrip("\r\n")
    if '"' in line:
        vin, *others = next(csv.reader([line]))
        model_year = ",".join(others)
    else:
        vin, _, model_year = line.partition(",")
    return BatchRow(vin, model_year.rstrip(", "))


def is_vin(text: str) -> bool:
    with suppress(PydanticCustomError):
        return normalize_vin(text) != ""
    return False


def is_list_line(line: str) -> bool:
    """Whether the line has a VIN, and at most a model year behind it: no CSV with other columns has such lines."""
    row = list_row(line)
    with suppress(PydanticCustomError):
        normalize_model_year(row.model_year)
        return is_vin(row.vin)
    return False


def letters(name: str) -> str:
    """The letters and digits of a column's name, in small letters."""
    return re.sub(r"[\W_]", "", name.lower())


VIN_NAME = re.compile("(vin|vehicleidentification)(number|num|no|nr)")
# The word VIN, also as a part of vehicleVin and VINCode, but not of Vinyl.
VIN_WORD = re.compile(r"(?:(?<![A-Za-z])|(?<=[a-z])(?=V))(?:VIN[Ss]?|[Vv]ins?)(?:(?![A-Za-z])|(?=[A-Z][a-z]))")

# Tests of a column's name, the strictest first. The rank of a name is the index of the first test that it passes.
Ranks = Sequence[Callable[[str], object]]
VIN_RANKS: Ranks = (
    lambda name: letters(name) == "vin",
    lambda name: VIN_NAME.fullmatch(letters(name)),
    lambda name: VIN_WORD.search(name) or "vehicleidentification" in letters(name),
)
# Where the number of the column is given, any text in it with letters and without digits may be its name.
NAME_RANKS: Ranks = (*VIN_RANKS, lambda name: letters(name) and not re.search(r"\d", name))
YEAR_RANKS: Ranks = (lambda name: letters(name) == "modelyear", lambda name: letters(name) == "year")


def best_columns(names: Sequence[str], ranks: Ranks) -> tuple[int, list[int]]:
    """The lowest rank of these names, and the indexes of the columns that have it."""
    for rank, is_named in enumerate(ranks):
        if columns := [index for index, name in enumerate(names) if is_named(name)]:
            return rank, columns
    return len(ranks), []


def count_names(values: Sequence[str]) -> int:
    """How many of the values are not blank: a title has fewer than a row of names."""
    return sum(1 for value in values if value.strip(EDGES))


def quoted(names: Iterable[str]) -> str:
    return ", ".join(ascii(name[:40]) for name in names)


class Layout(NamedTuple):
    """How a CSV file is laid out."""

    separator: str
    above: str  # the text above the names
    names: str  # the text of the names; if the file has no names, the numbers of the columns from 1
    first: int  # the number of lines before the first row of values
    columns: int  # the number of columns
    vin: int  # the index of the column of the VINs
    model_year: int | None  # the index of the column of the model years, if there is one


class LayoutFinder:
    """Finds the layout of a file from its first lines. Only this class decides whether a file is a list or CSV."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._separators = ",;\t"  # those that the file may have
        # The lines above the first lines: Excel's line, and blank lines, of which there may be millions.
        self._skipped = 0  # the number of these lines
        self._above = ""  # the text of the first of them
        self.lines: list[str] = []  # the first lines, from the first one that is neither blank nor Excel's
        for line in lines:
            if not self.lines and (found := SEPARATOR_LINE.fullmatch(line)):
                self._separators = found[1]
            elif self.lines or line.strip(EDGES):
                self.lines.append(line)
                if len(self.lines) == FIRST_LINES or sum(map(len, self.lines)) > FIRST_CHARACTERS:
                    break
                continue
            self._skipped += 1
            self._above += line if self._skipped <= FIRST_LINES else ""
        # The index of the first line that has a VIN, or the number of lines.
        self._vin_line = next((i for i, line in enumerate(self.lines) if HAS_VIN.search(line)), len(self.lines))

    def find_layout(self, column: str) -> Layout | None:
        """The layout of a CSV file, or None for a list. `column` is the name of the column of the VINs, or its number
        from 1, or empty. Raises a 422 if the file is neither a list nor CSV whose VINs are found."""
        if re.fullmatch("[1-9][0-9]{0,4}", column):
            return self._layout_by_number(int(column) - 1)
        first = self.lines[0]
        # One long line that has a VIN, is no line of a list, and has no line end: curl -d has removed the line ends.
        has_no_end = len(self.lines) == 1 and first[-1] not in "\r\n"
        if has_no_end and len(first) > 30 and VIN_LIKE.search(first) and not is_list_line(first):
            raise invalid_line(self._skipped + 1, ONE_VIN_A_LINE)
        if names := self._find_names(column):
            return self._layout(*names)
        # The file is a list if the first line with a VIN is a line of a list.
        line_with_vin = next((line for line in self.lines if HAS_VIN.search(line) or is_list_line(line)), "")
        if column or not is_list_line(line_with_vin):
            raise self._not_found(column)
        return None

    def _row(self, line: int, separator: str) -> tuple[list[str], int]:
        """The values of the row that begins in this line, and the index of the line after it."""
        reader = csv.reader(self.lines[line:], delimiter=separator, strict=True)
        try:
            return next(reader, []), line + reader.line_num
        except csv.Error:
            return [], line + 1

    def _find_names(self, column: str) -> tuple[int, str, list[int]] | None:
        """The line of the best row of names, its separator, and the columns that may have the VINs. The row is above
        the first VIN, or it has the name `column`."""
        ranks: Ranks = VIN_RANKS
        if column:
            ranks = (
                lambda name: name.strip(EDGES) == column.strip(EDGES),
                lambda name: letters(name) == (letters(column) or None),  # None: a column without letters has no equal
            )
        found = []
        for line in range(len(self.lines) if column else self._vin_line):
            for separator in self._separators:
                values, after = self._row(line, separator)
                rank, vins = best_columns(values, ranks)
                if vins and (rank < len(ranks) - 1 or column or self._has_vin_below(after, separator, vins)):
                    found.append((rank, -count_names(values), (line, separator, vins)))
        # The best row has the lowest rank, then the most names.
        return min(found, key=lambda names: names[:2])[2] if found else None

    def _has_vin_below(self, after: int, separator: str, vins: list[int]) -> bool:
        """Whether one of the columns has the first VIN, or all lines below are blank. Without one of these the row may
        be a title or a note that has the word VIN in it."""
        values = self._row(self._vin_line, separator)[0]
        is_last = not "".join(self.lines[after:]).strip(EDGES)
        return is_last or any(is_vin(values[index]) for index in vins if index < len(values))

    def _layout_by_number(self, vin: int) -> Layout:
        """The layout, if the column of the VINs has this index. The names are in the best row, by the order of
        `_find_names`, that has a name in this column and is above the column's first VIN. If the column has no VIN,
        only the first line can have the names. If no row has a name, the file has no names."""

        def read(separator: str) -> tuple[bool, int, str, list[list[str]]]:
            """Whether the column has a VIN, the number of columns, the separator, and the rows, one for each line."""
            rows = [self._row(index, separator)[0] for index in range(len(self.lines))]
            return any(is_vin(row[vin]) for row in rows if vin < len(row)), max(map(len, rows)), separator, rows

        has_vin, width, separator, rows = max(map(read, self._separators), key=lambda found: found[:2])
        if vin >= width:
            raise invalid("columns", ("query", "vin_column"), f"The first lines have {width} columns at most")
        cells = [row[vin] if vin < len(row) else "" for row in rows]
        found = []
        for line in range([*map(is_vin, cells)].index(True) if has_vin else 1):
            rank, is_name = best_columns([cells[line]], NAME_RANKS)
            if is_name:
                found.append((rank, -count_names(rows[line]), line))
        if found:
            return self._layout(min(found)[2], separator, [vin])
        numbers = separator.join(map(str, range(1, width + 1)))
        return Layout(separator, self._above, numbers, self._skipped, width, vin, None)

    def _layout(self, line: int, separator: str, vins: list[int]) -> Layout:
        """The layout with the names in this line. Raises a 422 if two columns are equally good, or a name has a NUL."""
        values, after = self._row(line, separator)
        number = self._skipped + line + 1
        if any("\0" in name for name in values):
            raise invalid_line(number, "a NUL in the name of a column; is the file in UTF-16?")
        _, years = best_columns(values, YEAR_RANKS)
        choices = " or ".join(f"vin_column={index + 1}" for index in vins[:10])
        for found, what in ((vins, f"VINs; say which: {choices}"), (years, "model years; rename one")):
            if len(found) > 1:
                columns = quoted(values[index] for index in found[:10])
                raise invalid_line(number, f"each of the columns {columns} may have the {what}")
        return Layout(
            separator,
            self._above + "".join(self.lines[:line]),
            "".join(self.lines[line:after]).rstrip("\r\n"),
            self._skipped + after,
            len(values),
            vins[0],
            years[0] if years else None,
        )

    def _not_found(self, column: str) -> RequestValidationError:
        """The 422 for a file whose VINs are not found. It names no value that may be a VIN."""
        if column:
            fault = "No column has the name that vin_column gives"
        elif self._vin_line == 0:
            fault = "The file has no line of names, and is no list of one VIN a line"
        else:
            fault = "No column is named vin, and no line is a VIN alone"
        names = max((self._row(0, separator)[0] for separator in self._separators), key=len)
        if len(names) > 1 and not re.search(r"\d", self.lines[0]):
            fault += f"; the first line names {quoted(names[:10])}"
        hint = "give the column of the VINs as vin_column=, by its name or by its number from 1"
        return invalid("columns", ("query", "vin_column") if column else ("body",), f"{fault}; {hint}")


def invalid_line(number: int, fault: str) -> RequestValidationError:
    return invalid("line", ("body", number), f"Line {number:,}: {fault}")


class Fleet:
    """An open file of VINs that was read through once. Raises a 422, which names the line, if it can't be read.

    If the file is closed while a thread reads it, the thread ends with a ValueError."""

    def __init__(self, file: BinaryIO, encoding: str, mime_type: str, vin_column: str = "") -> None:
        self.encoding = encoding
        # A byte that can't be decoded becomes a lone surrogate, and `_lines` then names the line that has it.
        errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
        self._text = io.TextIOWrapper(file, encoding, errors, newline="")
        if mime_type != CSV:  # it may be JSON without its type, which would be read as a list without line ends
            self._text.seek(0)
            with suppress(UnicodeError):  # `_lines` reports it
                if UNTYPED_JSON.match(self._text.read(100).lstrip(EDGES)):
                    raise invalid("content_type", ("body",), SEND_JSON)
        self._left = STEP_CHARACTERS  # the characters until the next pause
        with upload_lock:
            finder = LayoutFinder(self._lines(ROW_CHARACTERS))
            self.layout = finder.find_layout(vin_column) if finder.lines else None  # None: a list, one VIN a line
            self.answer_type = CSV if self.layout or mime_type == CSV else JSONL
            self.count = sum(1 for _ in self.rows())

    def next_rows(self, rows: Iterator[BatchRow]) -> list[BatchRow]:
        """The next WINDOW rows of `rows()`, fewer at the end. Call it in an upload thread."""
        with upload_lock:
            self._left = STEP_CHARACTERS  # because the thread has just paused
            return [*islice(rows, WINDOW)]

    def rows(self) -> Iterator[BatchRow]:
        """The rows, from the first one."""
        layout = self.layout
        if layout is None:
            for line in self._lines(LIST_CHARACTERS):
                if is_normal(vin := line.rstrip("\r\n")):  # for speed, because most lines are like this
                    yield BatchRow(vin)
                elif line.strip(EDGES):
                    yield list_row(line)
            return
        for text, values in self._csv_rows(layout):
            if len(values) != layout.columns:
                text = self._fit(text, values, layout)
            model_year = "" if layout.model_year is None else values[layout.model_year]
            yield BatchRow(values[layout.vin], model_year, text)

    def _fit(self, text: str, values: list[str], layout: Layout) -> str:
        """The text of a row with one value for each column: missing values are empty, in `values` too, and blank ones
        beyond the columns are cut off. Raises a 422 if a value beyond the columns is not blank."""
        missing = layout.columns - len(values)
        self._left -= max(0, missing)  # because the values that are added take time, too
        if any(value.strip(EDGES) for value in values[layout.columns :]):
            raise invalid_line(self._number, f"{len(values)} columns, but only {layout.columns} have names")
        values += [""] * missing
        return text + layout.separator * missing if missing > 0 else text.rsplit(layout.separator, -missing)[0]

    def _csv_rows(self, layout: Layout) -> Iterator[tuple[str, list[str]]]:
        """The rows of a CSV file: the text without the line end, and the values."""
        parts: list[str] = []  # the lines of this row; it has several if a value in quotes has line breaks

        def lines() -> Iterator[str]:
            size, most = 0, ROW_CHARACTERS
            for line in islice(self._lines(most), layout.first, None):
                size = size + len(line) if parts else len(line)
                parts.append(line)
                if size > most:
                    raise csv.Error(f"a row of more than {most:,} characters begins here; is a quote not closed?")
                yield line

        try:
            for values in csv.reader(lines(), delimiter=layout.separator, strict=True):
                if values:
                    yield "".join(parts).rstrip("\r\n"), values
                parts.clear()
        except csv.Error as error:
            self._number -= len(parts) - 1
            cause = str(error).replace("unexpected end of data", "a quote that opens here is not closed")
            raise invalid_line(self._number, cause) from None

    def _lines(self, most: int) -> Iterator[str]:
        """The lines with their line ends. Raises a 422 if one has more than `most` characters, or can't be decoded. The
        thread pauses after STEP_CHARACTERS, so that the event loop and the other upload threads go on."""
        self._text.seek(0)
        self._number = 0  # the number of the line that was read last
        while True:
            try:
                line = self._text.readline(most + 1)
                if not line.isascii():
                    line.encode()
            except UnicodeError:
                self._number += 1
                tried = "UTF-8, UTF-16 or Windows-1252" if self.encoding == "cp1252" else self.encoding.upper()
                raise invalid_line(self._number, f"not text in {tried}") from None
            if not line:
                return
            self._number += 1
            if len(line) > most:
                raise invalid_line(self._number, f"more than {most:,} characters: {ONE_VIN_A_LINE}")
            self._left -= len(line) + LINE_COST
            if self._left <= 0:
                self._left = STEP_CHARACTERS
                time.sleep(PAUSE_S)  # with the lock, so that the event loop goes on and no other upload thread
                upload_lock.release()
                time.sleep(PAUSE_S)  # else this thread would take the lock again before another one wakes up
                upload_lock.acquire()
            yield line


VinColumn = Annotated[
    str, Query(description="The column of a CSV file that has the VINs: its name, or its number from 1")
]


async def receive_file(request: Request, vin_column: VinColumn = "") -> AsyncIterator[Fleet]:
    """Receive a file, read it through, and yield it for as long as its answer takes. It has no name in its folder, so
    nothing is left of it, whatever happens.

    Raises a 503 if it can't be kept, a 415 if it is compressed, a 422, and a 499 if the client hangs up."""
    content_type = request.headers.get("content-type", "")
    mime_type = media_type(content_type)
    if mime_type.startswith("multipart/"):
        raise invalid("content_type", ("body",), SEND_NO_FORM)
    charset, folder = named_encoding(content_type), request.state.settings.upload_folder
    file: BinaryIO | None = None
    try:
        try:
            file = cast(BinaryIO, await in_upload_thread(partial(tempfile.TemporaryFile, dir=folder)))
            encoding = await receive_pieces(request.stream(), file, charset)
        except OSError as error:
            log.warning("upload failed: %s", error)
            cause = f"The file cannot be kept ({reason(error)}); send it again later."
            raise HTTPException(503, cause, retry_after_header(60)) from None
        yield await while_connected(request, in_upload_thread(Fleet, file, encoding, mime_type, vin_column))
    except ClientDisconnect:
        raise HTTPException(499, "The client hung up") from None
    finally:
        if file is not None:
            with suppress(OSError):  # if the disk is full, the last bytes can't be written
                file.close()


async def receive_pieces(pieces: AsyncIterator[bytes], file: BinaryIO, charset: str) -> str:
    """Write the file, and return its encoding: by its byte order mark, else the charset of its type, else by its bytes.

    Raises a 415 if it is compressed, and OSError."""
    utf_8, encoding = codecs.getincrementaldecoder("utf-8")(), charset or "utf-8"
    async for piece in pieces:  # the last one is empty
        await in_upload_thread(file.write, piece)
        if encoding == "utf-8" and not charset:
            try:
                utf_8.decode(piece, final=not piece)
            except UnicodeDecodeError:
                encoding = "cp1252"
    await in_upload_thread(file.seek, 0)
    beginning = file.read(DETECTION_BYTES)
    if beginning.startswith(PACKED):
        raise HTTPException(415, "The file is a workbook or compressed; send a sheet as CSV, other files unpacked.")
    for mark, by_mark in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return by_mark
    if charset not in ("", "utf-16", "utf-32"):
        return charset
    often = len(beginning) / 16  # a quarter of the bytes at one of four places
    nuls = "".join("0" if beginning[place::4].count(0) > often else "-" for place in range(4))
    return WIDE_ENCODINGS.get(nuls, encoding)


async def read_windows(
    rows: Iterator[BatchRow], fleet: Fleet | None, sent: "deque[BatchRow] | None"
) -> AsyncIterator[list[BatchRow]]:
    """The rows of a file or of JSON, WINDOW at a time. They are added to `sent` too, for the answer in CSV."""
    while window := await in_upload_thread(fleet.next_rows, rows) if fleet else [*islice(rows, WINDOW)]:
        if sent is not None:
            sent.extend(window)
        yield window


async def log_progress(lines: AsyncIterator[list[Line]], count: int, client: str) -> AsyncIterator[list[Line]]:
    """The same lines. The log says every PROGRESS_S how many of them were answered."""
    answered, next_at = 0, time.monotonic() + PROGRESS_S
    async for some in lines:
        yield some
        answered += len(some)
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + PROGRESS_S
            log.info("batch of %s: %d of %d lines answered", client, answered, count)


async def as_jsonl(lines: AsyncIterator[list[Line]]) -> AsyncIterator[str]:
    async for some in lines:
        yield "\n".join(cast(list[str], some)) + "\n"


async def as_json(lines: AsyncIterator[list[Line]]) -> AsyncIterator[str]:
    """A JSON array of the lines."""
    before = "["
    async for some in lines:
        yield before + ",\n".join(cast(list[str], some))
        before = ",\n"
    yield "]\n" if before != "[" else "[]\n"


async def as_csv(
    lines: AsyncIterator[list[Line]], sent: "deque[BatchRow]", fleet: Fleet | None, form: LineForm
) -> AsyncIterator[bytes]:
    """The rows as they were sent, each with its line behind it. The names of our columns begin with `decoded_`."""
    layout = fleet and fleet.layout
    separator = layout.separator if layout else ","
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator)
    if fleet and fleet.encoding != "utf-8":  # a byte order mark: Excel reads a file without one as Windows-1252
        out.write("\ufeff")
    if layout:
        out.write(re.sub(r"\r\n?|\n", "\r\n", layout.above))  # with the line ends of the answer
    out.write((layout.names if layout else "vin,model_year") + separator)
    writer.writerow(f"decoded_{name}" for name in form.names)
    yield out.getvalue().encode()
    async for some in lines:
        out.seek(0)
        out.truncate()
        for line in cast(list[list[Any]], some):
            row = sent.popleft()
            if layout:
                out.write(row.text + separator)
            if FORMULA.search("\0".join(["", *line[1:]])):  # one search is faster than one for each value
                line = [f"'{value}" if FORMULA.match(f"\0{value}") else value for value in line]
            writer.writerow(line if layout else [row.vin, row.model_year, *line])
        yield out.getvalue().encode(errors="replace")  # a VIN sent in JSON may have a lone surrogate


# ======================================================================================================================
# Export: the whole table as one Parquet file. A process of its own writes it, because it would hold Python's lock while
# lookups wait, and because its SQLite driver brings a second SQLite, which must not share a process with ours. The file
# lies where uploads do. All exports together leave half of the disk's room to the database.
# ======================================================================================================================

EXPORT_TIMEOUT_S = 30  # for a batch of rows, which takes some tenths of a second: a process silent for longer hangs
SNAPSHOT_FRESH_S = 60  # the greatest age of a snapshot with which a client begins to read by pieces
SNAPSHOT_KEPT_S = 300  # from the last request for a snapshot to its end; but it is kept until it is built
SNAPSHOTS_KEPT = 8  # if there are more, the one whose last request is the oldest ends

# A range from behind the first byte: the client has read the beginning before. Without an end it is of a download that
# was broken off and is resumed (curl, wget); tools that read by pieces name the end.
GOES_ON = re.compile(r"bytes *= *0*[1-9]", re.IGNORECASE)
RESUMES = re.compile(r"bytes *= *0*[1-9]\d*-$", re.IGNORECASE)


def write_export(
    database: str, query: str, path: str, room: int, compression: Any, batch_rows: int, footer: dict[Any, Any]
) -> None:
    """Write the rows to a Parquet file, and print an empty line for each batch of them."""
    import adbc_driver_sqlite.dbapi
    import pandas as pd
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    time_type = pa.timestamp("s", "UTC")
    special: dict[str, pa.DataType] = {"decoded": pa.bool_(), "fetched_at": time_type, "expires_at": time_type}
    with (
        open(path, "r+b", 2**18) as file,  # not "w", because ext4 writes a truncated file to the disk when it is closed
        adbc_driver_sqlite.dbapi.connect(database) as connection,
        connection.cursor() as cursor,
    ):
        cursor.adbc_statement.set_options(**{"adbc.sqlite.query.batch_rows": batch_rows})
        cursor.execute(query)  # one statement, so one consistent snapshot
        rows = cursor.fetch_record_batch()
        # The driver guesses a column's type from its values, and an empty table has none.
        schema = pa.schema([(name, special.get(name, pa.string())) for name in rows.schema.names], footer)
        types = {field.name: pd.ArrowDtype(field.type) for field in schema}
        # The rows come in the order of their VINs, of which most occur once. Statistics serve a search by VIN or by
        # time. A dictionary serves a column whose values come again.
        repeating: Any = [name for name in schema.names if name not in ("vin", "attributes")]
        searched = ["vin", "fetched_at", "expires_at"]
        with ParquetWriter(
            file, schema, compression=compression, use_dictionary=repeating, write_statistics=searched
        ) as parquet:
            for batch in rows:
                frame = batch.to_pandas(types_mapper=pd.ArrowDtype).astype(types)
                if "attributes" in frame:
                    frame["attributes"] = frame["attributes"].mask(frame["attributes"] == "")
                parquet.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False))
                if file.tell() > room:  # so the file may have one batch too many for a moment
                    raise OSError(errno.ENOSPC, "exports may take half of the free disk, and no more")
                print(flush=True)


def serve_exports() -> None:
    """The exporting process. Each line of stdin is an order: the arguments of `write_export` as JSON. Its answer is a
    line: [0, ""], [0, what SQLite says] or the number and the sentence of a file's error.

    It ends when the server has ended, because it can't read or print then."""
    import adbc_driver_manager

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this process
    if hasattr(os, "nice"):
        os.nice(5)  # lookups come first, but an export under load still ends
    for order in sys.stdin:
        fault: tuple[int, str] = 0, ""
        try:
            write_export(**json.loads(order))
        except adbc_driver_manager.Error as error:
            fault = 0, str(error)[:1000]
        except OSError as error:
            fault = error.errno or errno.EIO, error.strerror or str(error)
        print(json.dumps(fault), flush=True)


# The process runs in a fresh interpreter, because to load the service too would take 35 MB and half a second. The
# source is read at the start, because the file may be replaced while the service runs.
EXPORT_PROGRAM = f"""
import errno, json, os, signal, sys
from typing import Any
{inspect.getsource(write_export)}{inspect.getsource(serve_exports)}
serve_exports()
"""


class ExportKind(NamedTuple):
    """What a client may choose of an export."""

    compression: str
    details: bool


class Snapshot:
    """An export: it is queued, then written once, then read by many clients."""

    def __init__(self, kind: ExportKind) -> None:
        self.kind = kind
        self.etag = f'"{secrets.token_hex(16)}"'
        self.ready: asyncio.Task[None]  # it ends when the file is written, or raises a 503
        self.clients: set[str] = set()  # they go on in this snapshot
        self.readers = 0  # responses that are being sent
        self.used = 0.0  # when a request came for it, it was built, or the last response was sent (monotonic)
        self.began = math.inf  # when the writing began, by the monotonic clock
        self.taken = 0.0  # the same in unix seconds; all that was stored before is in the file
        self.path = ""  # it leads to the file for as long as this object is alive
        self._resources = ExitStack()
        self.close = weakref.finalize(self, self._resources.close)

    def open(self, folder: Path) -> None:
        """Make the file, without a name where the system has another way to open it again."""
        self.began, self.taken = time.monotonic(), time.time()
        file, self.path = tempfile.mkstemp(".parquet", "vincache-", folder)
        if os.path.exists("/proc/self/fd"):
            os.unlink(self.path)
            # By the number of this process, because the exporting process opens the file too.
            self.path = f"{os.path.realpath('/proc/self/fd')}/{file}"
        else:
            self._resources.callback(os.unlink, self.path)
        self._resources.callback(os.close, file)  # the last callback runs first: close, then unlink


class Exporter:
    """Builds snapshots, one at a time, and keeps them for clients that read them by pieces. Use it as `async with`.

    A client goes on in the snapshot that it was given, whatever is stored and built meanwhile:

    | request                              | snapshot                                                         |
    |--------------------------------------|------------------------------------------------------------------|
    | plain GET                            | a new one                                                        |
    | If-Range or If-Match with an ETag    | the kept one with this ETag                                      |
    | range that goes on                   | the kept one that the client was given last                      |
    | HEAD, other range, If-None-Match     | the same, if it is fresh                                         |
    | one of the last three, but that      | the kept one that any client used last (a fresh one, unless the  |
    | snapshot is not kept                 | range goes on); else a new one                                   |
    | the same, and the range resumes      | a new one, sent whole, because the client has a part of another  |

    Most tools name no ETag. Therefore clients are known by address and User-Agent. A proxy may show one address for
    many clients, or several for one: then the snapshot of another client lets the tools read on."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder  # for the files
        # The exporting process waits for an order, or carries one out. The first export starts it.
        self._process: asyncio.subprocess.Process | None = None
        self._writing = asyncio.Lock()  # held while the process carries out an order
        self._tasks = Tasks()
        # Snapshots of which the writing has not begun: all requests for a new one of the kind share it.
        self._queued: dict[ExportKind, Snapshot] = {}
        # Snapshots that other requests may find, written or not. The last one was used last.
        self._kept: list[Snapshot] = []
        # All snapshots that have a file: also some that are no longer kept, but sent to a client.
        self._files = weakref.WeakSet[Snapshot]()

    async def __aenter__(self) -> "Exporter":
        self._tasks.start(self._give_back()).add_done_callback(log_error)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._kept.clear()
        await self._tasks.finish(cancel=True)
        await self._stop_process()

    async def _give_back(self) -> None:
        """Once a second, let go of the snapshots that were not used for a while."""
        while True:
            await asyncio.sleep(1)
            end = time.monotonic() - SNAPSHOT_KEPT_S
            self._kept = [kept for kept in self._kept if kept.readers or not kept.ready.done() or kept.used > end]

    def find(self, kind: ExportKind, client: str, headers: Headers) -> Snapshot | None:
        """The snapshot for a request that is no plain GET; None for a new one. Raises a 412 if If-Match names none."""
        kept = [snapshot for snapshot in reversed(self._kept) if snapshot.kind == kind]
        named = [tag.strip() for name in ("if-match", "if-range") for tag in headers.get(name, "").split(",")]
        candidates = [snapshot for snapshot in kept if snapshot.etag in named]
        if not candidates and headers.get("if-match", "*") != "*":
            raise HTTPException(412, "The export that If-Match names is no longer kept; download it anew.")
        asked_range = headers.get("range", "")
        goes_on = GOES_ON.match(asked_range)
        oldest = -math.inf if goes_on else time.monotonic() - SNAPSHOT_FRESH_S
        usable = [snapshot for snapshot in kept if snapshot.began > oldest]
        candidates += [snapshot for snapshot in usable if client in snapshot.clients]
        if not RESUMES.match(asked_range):
            candidates += usable
        if not candidates:
            return None
        self._keep(candidates[0], None if goes_on else client)
        return candidates[0]

    def queue(self, kind: ExportKind, client: str) -> Snapshot:
        """A snapshot that is at least as new as this call. The one that is written just now may lack what was stored
        since. All calls meanwhile share the next one: however many clients wait, two of a kind are built."""
        if kind not in self._queued:
            snapshot = self._queued[kind] = Snapshot(kind)
            snapshot.ready = self._tasks.start(self._build(snapshot))
        self._keep(self._queued[kind], client)
        return self._queued[kind]

    def _keep(self, snapshot: Snapshot, client: str | None) -> None:
        """Keep the snapshot for a while. If a client begins with it, that client goes on in no other one of the kind.
        A snapshot in which no client goes on is not kept."""
        if client is not None:
            for other in self._kept:
                if other.kind == snapshot.kind:
                    other.clients.discard(client)
            snapshot.clients.add(client)
        snapshot.used = time.monotonic()
        others = [other for other in self._kept if other.clients and other is not snapshot]
        self._kept = [*others, snapshot][-SNAPSHOTS_KEPT:]

    async def _build(self, snapshot: Snapshot) -> None:
        async with self._writing:
            del self._queued[snapshot.kind]
            started, outcome = time.perf_counter(), "failed"
            try:
                await self._write(snapshot)
                snapshot.used = time.monotonic()  # because its clients begin to read it now
                outcome = "ok"
            except (OSError, EOFError, NotImplementedError, ValueError, StoreFault) as error:
                log.warning("export failed: %s", str(error) or type(error).__name__)
                self._kept = [other for other in self._kept if other is not snapshot]
                snapshot.close()  # now: the frames of the error refer to the object, and gc runs rarely
                if not isinstance(error, StoreFault):
                    await self._stop_process()  # the next export starts another one
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    sentence = f"The export cannot be kept ({reason(error)}); ask again later."
                    raise HTTPException(503, sentence, retry_after_header(60)) from None
                if isinstance(error, Refused):
                    sentence = "The user of the cluster lacks the right to back up: there is no export."
                    raise HTTPException(503, sentence) from None
                raise HTTPException(503, "The export could not be built; ask again.", retry_after_header(5)) from None
            finally:
                export_duration.record(time.perf_counter() - started, {"outcome": outcome})

    async def _write(self, snapshot: Snapshot) -> None:
        """Make the file, and have the exporting process write it. Raises as `_carry_out` and `Store.open_copy` do."""
        taken_up = sum(os.stat(other.path).st_size for other in self._files if other.close.alive)
        snapshot.open(self._folder)
        self._files.add(snapshot)
        details = snapshot.kind.details
        async with self._store.open_copy() as database:
            order = {
                "database": database,
                "query": SNAPSHOT_WITH_DETAILS if details else SNAPSHOT,
                "path": snapshot.path,
                # All exports may take half of the room that is free without them: (free + taken_up) / 2 - taken_up.
                "room": (shutil.disk_usage(self._folder).free - taken_up) // 2,
                "compression": snapshot.kind.compression,
                # More rows take more memory, fewer take more time; with details, a row is six times as large.
                "batch_rows": 8192 if details else 65536,
                "footer": {
                    "vincache.version": VERSION,
                    "vincache.schema": str(SCHEMA_VERSION),
                    "vincache.snapshot": utc(snapshot.taken),
                },
            }
            await self._carry_out(order)

    async def _carry_out(self, order: dict[str, Any]) -> None:
        """Start the exporting process if none runs, and have it write the file. Raises StoreFault if the database can't
        be read, OSError if the file can't be written, and OSError (TimeoutError is one), EOFError, NotImplementedError
        or ValueError without an answer."""
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", EXPORT_PROGRAM, stdin=pipe, stdout=pipe, stderr=pipe
            )
        cast(asyncio.StreamWriter, self._process.stdin).write(f"{json.dumps(order)}\n".encode())
        line = b"\n"
        while line == b"\n":  # a batch was written
            async with asyncio.timeout(EXPORT_TIMEOUT_S):
                line = await cast(asyncio.StreamReader, self._process.stdout).readuntil()
        code, sentence = json.loads(line)
        if code:
            raise OSError(code, sentence)
        if sentence:
            raise StoreFault(sentence)

    async def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            with suppress(TimeoutError):  # the process hangs in the kernel, on a dead disk
                _, traceback = await asyncio.wait_for(process.communicate(), 5)
                if traceback:  # of a process that died; it becomes one line of our log
                    log.warning("exporting process: %s", traceback.decode(errors="replace").rstrip())


# ======================================================================================================================
# Access: who may ask what, how often, and how much at once. It is checked before FastAPI reads the request: first the
# key (401), then the client's limit (429), then the body's size and form (413, 415). FastAPI's checks (422) follow.
# ======================================================================================================================

Tag = Literal["lookup", "cache", "export", "metrics", "health", "docs"]  # what a route is about
OPEN_TAGS: set[Tag] = {"health", "docs"}  # routes with any other tag need the key, if one is set

BODY_BYTES = 2**22  # of a POST, or more if the limit of a batch needs it
BATCH_ITEM_BYTES = 84  # room for a VIN with its model year and white space in a batch of JSON

KEY_HEADER = "X-API-Key"
NO_KEY = f"This needs a valid key: in {KEY_HEADER}, as a Bearer token, or as the password of Basic authorization."
KEY_SCHEMES = {
    "APIKeyHeader": {"type": "apiKey", "in": "header", "name": KEY_HEADER, "description": "A key of the operator's"},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "The same key"},
    "Basic": {"type": "http", "scheme": "basic", "description": "The same key as the password, with any user"},
}


class Access:
    """Checks the key and the limits of a request, by the tag of its route."""

    def __init__(self, settings: Settings, rates: Rates) -> None:
        self._rates = rates
        self.keys = [key.encode() for key in settings.api_keys]
        self.open_tags = OPEN_TAGS | (set() if settings.private else {"lookup"})  # those that need no key
        if not self.keys:
            self.open_tags = {*get_args(Tag)}
            log.warning("VINCACHE_API_KEY is empty: whoever reaches this service may remove VINs and export the cache")
        given: dict[Tag, str] = {"lookup": settings.lookup_limit, "export": settings.export_limit}
        self.limits = {tag: limits.parse(limit) for tag, limit in given.items() if limit}  # of a client
        self.unchecked_tags = self.open_tags - self.limits.keys()  # those for which there is nothing to check

    async def check(self, scope: Scope, tag: Tag) -> None:
        """Raises a 401 without a valid key where one is needed, then a 429 beyond the client's limit."""
        # All keys are compared, each in constant time, so the time taken says nothing.
        if tag not in self.open_tags and not any(
            [hmac.compare_digest(given, key) for given in find_keys(scope) for key in self.keys]
        ):
            raise HTTPException(401, NO_KEY, {"WWW-Authenticate": choose_challenge(scope)})
        if tag != "export":
            await self.count(scope, tag, 1)
        elif is_whole_download(scope):
            await self.count(scope, tag, 1, counts=False)  # the route counts it when it builds the file

    async def count(self, scope: Scope, tag: Tag, cost: int, counts: bool = True) -> None:
        """Raises a 429 if the client has less than this cost left; then nothing is counted."""
        if cost > 0 and (limit := self.limits.get(tag)) is not None:
            client, _ = scope["client"] or ("unknown", 0)
            if wait := await self._rates.client(limit, tag, client_network(client), cost, counts):
                raise HTTPException(429, f"The limit is {limit}; ask again later.", retry_after_header(wait))


def find_keys(scope: Scope) -> Iterator[bytes]:
    """All keys that the request has. One valid key suffices, because a proxy in front may add an Authorization."""
    for name, value in scope["headers"]:
        scheme, _, credentials = value.partition(b" ")
        if name == KEY_HEADER.lower().encode():
            yield value
        elif name == b"authorization" and scheme.lower() == b"bearer":
            yield credentials.strip()
        elif name == b"authorization" and scheme.lower() == b"basic":
            with suppress(ValueError):  # it is not base64
                yield base64.b64decode(credentials).partition(b":")[2]


def choose_challenge(scope: Scope) -> str:
    """What a 401 asks for. Basic, because some clients send a password only then; but Bearer to the script of a page,
    like /docs, because a browser would open a dialog for Basic. A script's request has one of these headers."""
    headers = Headers(scope=scope)
    return "Bearer" if "origin" in headers or "referer" in headers else 'Basic realm="vincache", charset="UTF-8"'


def is_whole_download(scope: Scope) -> bool:
    """Whether the request is for a new export. HEAD, ranges and conditional requests read a kept one, if any."""
    headers = Headers(scope=scope)
    return scope["method"] == "GET" and not any(name in headers for name in ("range", "if-none-match", "if-match"))


def client_network(client: str) -> str:
    """What a limit counts as one client: an IPv4 address, also in the form of IPv6, or the /64 of an IPv6 address,
    because a user has a /64."""
    with suppress(ValueError):
        address = ipaddress.ip_address(client)
        if isinstance(address, ipaddress.IPv6Address):
            return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return client[:64]  # a proxy may have sent a long text


def limit_body(scope: Scope, receive: Receive, most: int) -> Receive:
    """`receive` for a body of at most `most` bytes.

    Raises a 413: at once if the header says so, else when more bytes have come. Raises a 415 if the body is compressed.
    """
    headers = Headers(scope=scope)
    too_large = HTTPException(413, f"A body has {most:,} bytes at most; send less at a time.")
    if int(headers.get("content-length", 0)) > most:
        raise too_large
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "The body is compressed; send it as it is.")
    size = 0

    async def receive_limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise too_large
        return message

    return receive_limited


# ======================================================================================================================
# Lifespan: everything that has a lifetime is opened here, by `async with`, so that it is closed whatever happens.
# ======================================================================================================================


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Yield what the routes find in `request.state`. Raises StartupError; its sentence is the last line of the log."""
    try:
        settings = read_settings()
        if not settings.vpic_url and not offline_month():
            raise StartupError("bad settings: VINCACHE_VPIC_URL is empty and the package ultravin is not installed")
        open_log(settings.log, settings.log_vins)
        log.info("settings: %s", settings)
        rates = Rates(settings.rate_storage, settings.vpic_rate, settings.nodes)
        await rates.check_storage()
        async with (
            open_metrics() if settings.metrics else nullcontext(),
            open_store(settings) as store,
            open_vpic(settings, rates) as vpic,
            Lookups(cache := Cache(store, settings), vpic, settings) as lookups,
            Exporter(store, settings.upload_folder) as exporter,
            background(cache.sweep()),
            background(cache.count_unconfirmed()),
            background(note_versions()),
        ):
            access = Access(settings, rates)
            # The garbage collector never looks through the objects of the start again, and seldom through new ones.
            gc.freeze()
            gc.set_threshold(100_000, 50, 50)
            yield {"settings": settings, "cache": cache, "lookups": lookups, "exporter": exporter, "access": access}
    except StartupError:
        sys.tracebacklimit = 0  # Starlette logs a traceback: without its frames only our sentence is left
        raise


# ======================================================================================================================
# Middleware: what happens before FastAPI. One ASGI middleware, inside FastAPI's telemetry, is the only reader of the
# path: it finds the route once. By that route it checks the access, and it answers what no route has to: a cached VIN,
# OPTIONS, a method that the path does not have, a path with a slash at its end. All else goes to the route.
# ======================================================================================================================

PREFIX = "/api/v1"

# A lookup as programs send it: a VIN in capitals and no other parameter. Only such a one is answered without FastAPI,
# whose parsing takes longer than the hit itself.
CANONICAL = re.compile(r"/lookup(?:\?vin=([0-9A-Z]{17})|/([0-9A-Z]{17})\?)")


class TaggedRoute(APIRoute):
    """A route with one tag. `Middleware` finds the route of a request, and FastAPI's router calls that one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What the route is about. Raises ValueError, which stops the start, unless there is exactly one tag.
        [self.tag] = cast(list[Tag], self.tags)
        self.allowed = {*(self.methods or ())}  # its methods
        if "GET" in self.allowed:
            self.allowed.add("HEAD")
        self.takes_files = "POST" in self.allowed and self.body_field is None  # the body of any other POST is JSON
        # The names of its query parameters, and of those of what it depends on.
        dependants = [self.dependant, *self.dependant.dependencies]
        self._parameters = [field.alias for dependant in dependants for field in dependant.query_params]

    def serves(self, scope: Scope) -> bool:
        """Whether this route, of all with the same path, is for the request."""
        takes_body = not self.takes_files or not is_json(Headers(scope=scope).get("content-type", ""))
        return scope["method"] in self.allowed and takes_body

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return Match.FULL if scope.get("route") is self else Match.NONE, {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the names of the query's parameters, then call the handler. Raises a 422 for a parameter that it does
        not have, and for one that is given more than once, because FastAPI would take the last one, but an HTTP cache
        in front may look at the first."""
        # The parameters of health, docs and metrics are not checked, because load balancers add some to /healthz,
        # bookmarks to /docs, and Prometheus to /metrics, and none of them changes what is meant.
        given = QueryParams("" if self.tag in OPEN_TAGS | {"metrics"} else scope["query_string"])
        try:
            refuse_unknown(given.keys(), self._parameters, "parameter")
        except PydanticCustomError as error:
            raise invalid(error.type, ("query",), error.message()) from None
        for name in given:
            if len(given.getlist(name)) > 1:
                raise invalid("repeated", ("query", name), f"Give {name} only once")
        await self.app(scope, receive, send)


class Middleware:
    """Checks the access to a request and finds its route. A route that is no `TaggedRoute` can't be reached."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self._app = app  # FastAPI's router
        by_path: dict[str, list[TaggedRoute]] = {}
        for route in routes:
            if isinstance(route, TaggedRoute):
                by_path.setdefault(route.path, []).append(route)
        self._literal = {path: here for path, here in by_path.items() if not here[0].param_convertors}
        self._patterns = [(here[0].path_regex, here) for here in by_path.values() if here[0].param_convertors]

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        handle: ASGIApp = self._handle
        if origins := scope["state"]["settings"].cors_origins:  # not known before the lifespan has read the settings
            handle = CORSMiddleware(handle, re.split(r"\s*,\s*", origins.strip()), **CORS)
        return handle(scope, receive, send)

    def _find(self, path: str) -> tuple[list[TaggedRoute], dict[str, str]]:
        """The routes at a path, and its parameters; none if there is a control character in the path. A literal path
        like /lookup/batch goes before a pattern like /lookup/{vin}."""
        if here := self._literal.get(path):
            return here, {}
        for pattern, here in self._patterns:
            if (found := pattern.match(path)) and not CONTROL.search(path):
                return here, found.groupdict()
        return [], {}

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope["root_path"])
        if path == PREFIX or path.startswith(f"{PREFIX}/"):
            path = path.removeprefix(PREFIX)
            scope["root_path"] += PREFIX  # so that the servers in /openapi.json have the prefix
        method, answer = scope["method"], self._app
        try:
            here, parameters = self._find(path.removesuffix("/") or "/")
            if not here:
                raise HTTPException(404)
            route = choose_route(here, scope)
            scope["route"], scope["path_params"] = route, parameters
            # Name the route to FastAPI's telemetry, which has no public function for it. FastAPI's router would, but
            # hits and errors do not reach it.
            _route_selected(scope=scope, path=route.path_format)
            access: Access = scope["state"]["access"]
            # OPTIONS says no more than /docs, and browsers send it without a key.
            if route.tag not in access.unchecked_tags and method != "OPTIONS":
                await access.check(scope, route.tag)
            if route.tag == "lookup" and method in ("GET", "HEAD"):
                canonical = CANONICAL.fullmatch(f"{path}?{scope['query_string'].decode('latin-1')}")
                if canonical and (hit := await scope["state"]["lookups"].hit(canonical[1] or canonical[2])):
                    status, headers, body = render_answer(hit, scope)  # without a Response, which is slower
                    await send({"type": "http.response.start", "status": status, "headers": headers})
                    await send({"type": "http.response.body", "body": body})
                    return
            answer = answer_without_route(scope, path, here) or self._app
            # No route has cookies, but FastAPI parses them, for which older Pythons take seconds if they are odd.
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"cookie"]
            if method == "POST":
                settings: Settings = scope["state"]["settings"]
                most = max(BODY_BYTES, BATCH_ITEM_BYTES * settings.batch_limit)
                receive = limit_body(scope, receive, settings.upload_bytes if route.takes_files else most)
        except HTTPException as error:
            answer = await render_error(Request(scope), error)
        await answer(scope, receive, send)


def choose_route(here: list[TaggedRoute], scope: Scope) -> TaggedRoute:
    """The route that serves the request. If none does, `answer_without_route` answers, and the first one lends its
    tag."""
    for route in here:  # a loop, because a generator would cost a hit 1.5 us
        if route.serves(scope):
            return route
    return here[0]


CORS: dict[str, Any] = {
    "allow_methods": ["GET", "HEAD", "POST", "DELETE"],
    "allow_headers": [KEY_HEADER, "Authorization", "If-Match", "If-None-Match", "If-Range", "Prefer", "Range"],
    "expose_headers": [
        "Age, Content-Disposition, Content-Range, ETag, Preference-Applied, Retry-After, X-Cache, X-Total-Count"
    ],
}


def answer_without_route(scope: Scope, path: str, here: list[TaggedRoute]) -> Response | None:
    """The answer to OPTIONS, and the redirect of a path with a slash too few or too many; None for all other requests.

    Raises a 405 for a method that no route at this path has."""
    if not path:
        return RedirectResponse(f"{PREFIX.rpartition('/')[2]}/")
    if path.endswith("/") and path != "/":
        # A relative address, because only a proxy in front knows the address from outside.
        query = scope["query_string"].decode("latin-1")
        return RedirectResponse(f"../{quote(path.split('/')[-2], safe='')}" + (f"?{query}" if query else ""))
    methods = {"OPTIONS"}.union(*(route.allowed for route in here))
    allow = {"Allow": ", ".join(sorted(methods))}
    if scope["method"] == "OPTIONS":
        return Response(status_code=204, headers=allow)
    if scope["method"] not in methods:
        raise HTTPException(405, headers=allow)
    return None


X_CACHE = {"hit": b"HIT", "stale": b"STALE", "vpic": b"MISS", "offline": b"OFFLINE"}


def render_answer(answer: Answer, scope: Scope) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """An answer in HTTP: its status, headers and body, or a 304 if the client has it already.

    An HTTP cache in front has to ask us whether an answer still stands. With MAX_AGE it may answer by itself for so
    long. What may change at any time must not be kept."""
    status, text, outcome, fetched_at, fresh_until = answer
    body, now = text.encode(), int(time.time())
    settings: Settings = scope["state"]["settings"]
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-cache", X_CACHE[outcome]),
    ]
    # With MAX_AGE there is no Age: most caches subtract it from max-age, nginx does not, so no max-age suits both.
    if not settings.max_age:
        headers.append((b"age", b"%d" % max(0, now - fetched_at)))
    if fresh_until <= now:
        headers.append((b"cache-control", b"no-store"))
        return status, headers, body
    control = b"max-age=%d" % min(settings.max_age, fresh_until - now) if settings.max_age else b"no-cache"
    if settings.private:  # a shared cache, or a browser without the key, must not show it
        control = b"private, " + control
        headers.append((b"vary", f"{KEY_HEADER}, Authorization".encode()))
    headers.append((b"cache-control", control))
    if status == 200 and scope["method"] != "POST":
        # Two bodies with one checksum get different tags unless they were fetched in the same second.
        etag = b'"%x-%x"' % (fetched_at, zlib.crc32(body))
        headers.append((b"etag", etag))
        for name, value in scope["headers"]:
            if name == b"if-none-match" and (etag in value or value == b"*"):
                return 304, headers[2:], b""  # without the type and the length of the body
    return status, headers, body


# ======================================================================================================================
# Routes: what each address does, and what the schema says of it. `openapi` adds what depends on the settings.
# ======================================================================================================================

PARQUET = "application/vnd.apache.parquet"

app = FastAPI(
    title="vincache",
    version=VERSION,
    summary="Decodes VINs with NHTSA's vPIC, once, and remembers the answer.",
    lifespan=lifespan,
    exception_handlers={HTTPException: render_error, RequestValidationError: render_error, Exception: render_error},
    openapi_url=None,  # because /openapi.json and /docs have their own routes below
    generate_unique_id_function=lambda route: route.name,  # the operation's id, of which clients make a function's name
    redirect_slashes=False,  # `answer_without_route` redirects, to relative addresses
)
app.router.route_class = TaggedRoute
app.add_middleware(Middleware, routes=app.routes)  # FastAPI makes it at the start, when it has all routes

Responses = dict[int | str, dict[str, Any]]


def error_response(description: str, detail: str, **fields: str) -> dict[str, Any]:
    """An error in the schema, with its `detail` and the fields beside it as an example."""
    schema = {"$ref": f"#/components/schemas/{(VinProblem if fields else Problem).__name__}"}
    content = {"application/json": {"schema": schema, "example": {"detail": detail, **fields}}}
    return {"description": description, "content": content}


# The errors from which each route takes its own. FastAPI adds 422, and `openapi` 401 and 429.
ERRORS: Responses = {
    400: error_response("The body can't be read", "There was an error parsing the body"),
    404: error_response("A path with a control character in it", "Not Found"),
    413: error_response("The body is too large", f"A body has {BODY_BYTES:,} bytes at most; send less at a time."),
    415: error_response(
        "The body is compressed, or its charset is not known", "The body is compressed; send it as it is."
    ),
    503: error_response("Not possible now; Retry-After says when", CANNOT_WRITE),
}
LOOKUP_ERRORS: Responses = {
    404: {"model": Undecodable, "description": "vPIC can't decode this VIN; that is cached too"},
    502: error_response("vPIC can't be reached, or its answer makes no sense", UNREACHABLE.detail, vin=EXAMPLE),
    503: error_response("vPIC refuses, or is not asked; Retry-After says when", LEFT_ALONE.detail, vin=EXAMPLE),
    504: error_response("vPIC did not answer in time", TOO_LATE.detail, vin=EXAMPLE),
}
LOOKUP_BY_PATH_ERRORS = LOOKUP_ERRORS | {
    404: {"model": Undecodable | Problem, "description": "Undecodable, or the path has a control character in it"}
}
UNCHANGED: Responses = {304: {"description": "The client has this answer already: If-None-Match names it"}}


def errors(*statuses: int) -> Responses:
    return {status: ERRORS[status] for status in statuses}


BINARY = {"schema": {"type": "string", "format": "binary"}}


def text_body(example: str) -> dict[str, Any]:
    """A body of text in the schema."""
    return {"schema": {"type": "string"}, "example": example}


BATCH_BODIES = {
    JSON: {"example": {"vins": EXAMPLE_ITEMS}},
    "application/octet-stream": BINARY,  # /docs has a file chooser for this type only
    TEXT: text_body(f"{EXAMPLE}\n4ENGAAA85R1000007,1994\n"),
    CSV: text_body(f"unit,vin,model year\r\n7,{EXAMPLE},\r\n8,4ENGAAA85R1000007,1994\r\n"),
}
# JSON is the first, because /docs and generated clients ask for the first.
LINES_SENT: Responses = {
    200: {
        "model": list[BatchLine],
        "content": {
            JSON: {},
            CSV: text_body("vin,decoded_status,decoded_vin,decoded_make\r\n"),
            JSONL: text_body(f'{{"status": 200, "vin": "{EXAMPLE}", "make": ...}}'),
        },
        "description": "One line per VIN, in the order given: `status`, what /lookup answers, and an error's `detail`."
        " A CSV file is answered in CSV, all else in JSON Lines, unless `Accept` names one of these types."
        " X-Total-Count is the number of lines",
    }
}
FILE_SENT: Responses = {
    200: {"content": {PARQUET: BINARY}, "description": "The file"},
    206: {"content": {PARQUET: BINARY}, "description": "A part of it, as Range asks"},
    400: {"description": "The Range header is malformed"},
    412: {"description": "The snapshot is not the one that If-Match names"},
    416: {"description": "The file does not have this range"},
}


def read_patience(request: Request) -> tuple[float | None, dict[str, str]]:
    """How many seconds this caller waits for vPIC: by `Prefer: wait=N` (RFC 7240), else by the settings. And the header
    that says that the preference was applied."""
    settings: Settings = request.state.settings
    preferences = ",".join(request.headers.getlist("prefer"))
    # In a header like `respond-async, wait=10`; the value may be quoted. The first one counts.
    if wait := re.search(r"(?:^|,)\s*wait\s*=\s*\"?([0-9]+)\"?\s*(?=[,;]|$)", preferences, re.ASCII | re.IGNORECASE):
        seconds = min(int(wait[1][:9]), settings.vpic_timeout)  # int() refuses a text of thousands of digits
        return seconds, {"Preference-Applied": f"wait={seconds:g}"}
    return settings.patience, {}


class SnapshotResponse(FileResponse):
    """The response with a snapshot, or with the part of it that the request asks for."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        super().__init__(
            snapshot.path,
            headers={
                "ETag": snapshot.etag,
                "Last-Modified": formatdate(snapshot.taken, usegmt=True),
                "Cache-Control": "private, no-cache",  # because a plain GET must get a new snapshot
            },
            media_type=PARQUET,
            filename=f"vincache-{datetime.fromtimestamp(snapshot.taken, UTC):%Y%m%dT%H%M%SZ}.parquet",
            stat_result=os.stat(snapshot.path),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._snapshot.readers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._snapshot.readers -= 1
            self._snapshot.used = time.monotonic()
            del self._snapshot  # because after a disconnect a reference cycle would keep it, and gc runs rarely


Compression = Annotated[
    Literal["zstd", "snappy", "none"], Query(description="snappy is larger, but all readers know it")
]
Details = Annotated[bool, Query(description="With all that vPIC says, as `attributes`")]

LOOKUP_ROUTE: dict[str, Any] = {"tags": ["lookup"], "summary": "Decode a VIN", "response_model": Vehicle}
LOOKUP_EXAMPLE = {"requestBody": {"content": {JSON: {"example": {"vin": EXAMPLE}}}}}  # /docs fills its field with it


@app.get("/lookup/{vin}", operation_id="lookup_by_path", responses=LOOKUP_BY_PATH_ERRORS | UNCHANGED, **LOOKUP_ROUTE)
@app.get("/lookup", responses=LOOKUP_ERRORS | UNCHANGED, **LOOKUP_ROUTE)
async def lookup(vin: Vin, request: Request, model_year: ModelYear = "", details: Details = False) -> Response:
    """Decode a VIN: from the cache, else from vPIC, whose answer is then cached."""
    patience, applied = read_patience(request)
    looking = request.state.lookups.lookup(make_question(vin, model_year), details, patience)
    status, headers, body = render_answer(await while_connected(request, looking), request.scope)
    response = Response(body, status)
    response.raw_headers = headers
    response.headers.update(applied)
    return response


@app.post("/lookup", responses=LOOKUP_ERRORS | errors(400, 413, 415), openapi_extra=LOOKUP_EXAMPLE, **LOOKUP_ROUTE)
async def lookup_post(body: LookupBody, request: Request) -> Response:
    """Decode a VIN: from the cache, else from vPIC, whose answer is then cached."""
    return await lookup(body.vin, request, body.model_year, body.details)


def accepted_type(accept: str, answer_type: str) -> str:
    """The type that Accept names with the highest q; of equals the first. `answer_type`, if it names none."""
    best = 0.0
    for named in accept.split(","):
        quality = re.search(r";\s*q=(0?\.[0-9]+|[01])(?:\.0*)?\s*$", named, re.I)  # like q=.2, q=0, q=1 or q=1.000
        weight = float(quality[1]) if quality else 1.0
        if weight > best and media_type(named) in (JSON, JSONL, CSV):
            answer_type, best = media_type(named), weight
    return answer_type


# A route of its own, because FastAPI would read the whole body into memory for `lookup_batch`. It is before that route,
# because the first one that serves the request takes it.
@app.post("/lookup/batch", tags=["lookup"], include_in_schema=False)
async def lookup_file(
    fleet: Annotated[Fleet, Depends(receive_file)], request: Request, details: Details = False
) -> StreamingResponse:
    """Decode a file of VINs: a list, or CSV, whose columns come back with ours behind them."""
    return await answer_batch(request, fleet.rows(), fleet.count, details, fleet.answer_type, fleet)


async def answer_batch(
    request: Request, rows: Iterator[BatchRow], count: int, details: bool, answer_type: str, fleet: Fleet | None = None
) -> StreamingResponse:
    """The response with a line for each of `count` rows, of this type unless `Accept` names another one."""
    access: Access = request.state.access
    if (limit := access.limits.get("lookup")) and count > limit.amount:  # a 429 would ask to wait, which would not help
        raise invalid("too_long", ("body", "vins"), f"The limit is {limit}: {count} at once never fit; send fewer")
    await access.count(request.scope, "lookup", count - 1)  # the middleware has counted one
    answer_type = accepted_type(",".join(request.headers.getlist("accept")), answer_type)
    sent = deque[BatchRow]() if answer_type == CSV else None
    client = request.client.host if request.client else "unknown"
    form = LineForm(answer_type == CSV, details)
    patience, applied = read_patience(request)
    lines = request.state.lookups.batch(read_windows(rows, fleet, sent), form, patience)
    lines = log_progress(lines, count, client)
    answer = {JSON: as_json, JSONL: as_jsonl}[answer_type](lines) if sent is None else as_csv(lines, sent, fleet, form)
    return StreamingResponse(answer, headers={"X-Total-Count": str(count)} | applied, media_type=answer_type)


@app.post(
    "/lookup/batch",
    tags=["lookup"],
    summary="Decode many VINs",
    response_class=StreamingResponse,
    responses=LINES_SENT | errors(400, 413, 415, 503),
    openapi_extra={"requestBody": {"content": BATCH_BODIES, "required": False}},  # not required: a file may be empty
)
async def lookup_batch(
    body: BatchBody, request: Request, details: Details = False, vin_column: VinColumn = ""
) -> StreamingResponse:
    """Decode many VINs. Each line is sent as soon as it is known. A bad VIN is an error in its own line only."""
    if vin_column:
        raise invalid("vin_column", ("query", "vin_column"), "JSON has no columns; vin_column is for a file")
    limit = request.state.settings.batch_limit
    if len(body.vins) > limit:
        raise invalid("too_long", ("body", "vins"), f"At most {limit} VINs at a time")
    return await answer_batch(request, body.rows(), len(body.vins), body.details or details, JSONL)


REMOVE_ROUTE: dict[str, Any] = {"tags": ["cache"], "summary": "Forget a VIN"}


@app.delete("/remove/{vin}", operation_id="remove_by_path", responses=errors(404, 503), **REMOVE_ROUTE)
@app.delete("/remove", responses=errors(503), **REMOVE_ROUTE)
async def remove(vin: Vin, request: Request) -> Removed:
    """Forget a VIN: the next lookup asks vPIC again."""
    return Removed(vin=vin, cache_delete_success=await request.state.cache.remove(vin))


@app.post("/remove", responses=errors(400, 413, 415, 503), **REMOVE_ROUTE)
async def remove_post(body: RemoveBody, request: Request) -> Removed:
    """Forget a VIN: the next lookup asks vPIC again."""
    return await remove(body.vin, request)


@app.get(
    "/export",
    tags=["export"],
    summary="Download the cache",
    response_class=FileResponse,
    responses=FILE_SENT | UNCHANGED | errors(503),
)
@app.get("/export.parquet", tags=["export"], include_in_schema=False)
async def export(request: Request, compression: Compression = "zstd", details: Details = False) -> Response:
    """Download the whole cache as one Parquet file: every row, expired and undecodable ones too.

    A plain GET builds a new snapshot. HEAD, Range and If-None-Match use one of the last minute. A client that has got a
    part of a snapshot gets the other parts of the same one. Also as /export.parquet."""
    exporter: Exporter = request.state.exporter
    kind = ExportKind(compression, details)
    address = client_network(request.client.host if request.client else "unknown")
    client = f"{address} {request.headers.get('user-agent', '')[:64]}"
    plain = is_whole_download(request.scope)
    snapshot = None if plain else exporter.find(kind, client, request.headers)
    if snapshot is None:
        await request.state.access.count(request.scope, "export", 1)
        snapshot = exporter.queue(kind, client)
        if RESUMES.match(request.headers.get("range", "")):  # the client has a part of another snapshot: send all
            request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    await asyncio.shield(snapshot.ready)
    response = SnapshotResponse(snapshot)
    if not plain and StaticFiles().is_not_modified(response.headers, request.headers):
        return NotModifiedResponse(response.headers)
    return response


@app.get("/healthz", tags=["health"], summary="Check that the process lives")
async def healthz() -> Health:
    """Always 200 while the process lives."""
    return Health()


@app.get(
    "/readyz",
    tags=["health"],
    summary="Check that the cache works",
    responses={503: {"model": Readiness, "description": "The cache can't be used; Retry-After says when to ask again"}},
)
async def readyz(request: Request, response: Response) -> Readiness:
    """Whether the cache can be read and written. The state of vPIC makes no difference: lookups go on without it."""
    cache = await request.state.cache.check()
    if cache != "ok":
        response.status_code = 503
        response.headers["Retry-After"] = "1"  # the cache is checked once a second at most
    return Readiness(
        status="ok" if cache == "ok" else "unavailable",
        cache=cache,
        vpic=request.state.lookups.vpic.state,
        unconfirmed=request.state.cache.unconfirmed,
        offline_data=await asyncio.to_thread(offline_month),
    )


@app.get("/metrics", tags=["metrics"], include_in_schema=False)
async def get_metrics(request: Request) -> Response:
    """All metrics, for Prometheus; 404 unless VINCACHE_METRICS is true."""
    if not request.state.settings.metrics:
        raise HTTPException(404)
    from prometheus_client import REGISTRY, exposition

    encode, content_type = exposition.choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(REGISTRY), headers={"Content-Type": content_type})


@app.get("/", tags=["docs"], include_in_schema=False)
async def index() -> RedirectResponse:
    return RedirectResponse("docs")  # relative, so that it is right under the prefix and behind a proxy


@app.get("/openapi.json", tags=["docs"], include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """The schema with these settings: the routes that need the key, and the limits."""
    access: Access = request.state.access
    schema = deepcopy(app.openapi())
    for operation in [operation for operations in schema["paths"].values() for operation in operations.values()]:
        tag, responses = operation["tags"][0], operation["responses"]
        for parameter in operation.get("parameters", ()):
            # /docs shows a description only if it stands here, not in the schema of the parameter.
            parameter.setdefault("description", parameter["schema"].get("description", ""))
            if parameter["in"] == "path":  # a path with a control character is a 404
                pattern = wrapped_pattern(VIN_PATTERN, EDGE_ENDS[2:])
                parameter["schema"]["anyOf"] = [{"type": "string", "pattern": pattern}]
        if tag not in access.open_tags:
            operation["security"] = [{name: []} for name in KEY_SCHEMES]
            responses["401"] = error_response("No key, or a wrong one", NO_KEY)
        if limit := access.limits.get(tag):
            sentence = f"The limit is {limit}; ask again later."
            responses["429"] = error_response(f"More than {limit}; Retry-After says when to ask again", sentence)
        operation["responses"] = dict(sorted(responses.items()))
    components = schema["components"]
    components["schemas"] |= {model.__name__: model.model_json_schema() for model in (Problem, VinProblem)}
    components["schemas"]["BatchBody"]["properties"]["vins"]["maxItems"] = request.state.settings.batch_limit
    if access.keys:
        components["securitySchemes"] = KEY_SCHEMES
    if root_path := request.scope["root_path"]:
        schema["servers"] = [{"url": root_path}]
    return JSONResponse(schema)


@app.get("/docs", tags=["docs"], include_in_schema=False)
async def docs() -> HTMLResponse:
    """The schema as a page, for people. All addresses in it are relative, and none is of another host."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        swagger_ui_parameters={
            "defaultModelsExpandDepth": 0,
            "persistAuthorization": True,
            "showCommonExtensions": False,  # it would show the pattern of a VIN, which is as long as a line
            "tryItOutEnabled": True,
        },
    )
    # Where application/json is one of the forms of an answer, Swagger UI shows it as chosen but sends */*.
    json_for_any = "if (request.headers.accept === '*/*') request.headers.accept = 'application/json'"
    option = f"requestInterceptor: (request) => {{ {json_for_any}; return request }},"
    return HTMLResponse(bytes(page.body).replace(b"SwaggerUIBundle({", b"SwaggerUIBundle({" + option.encode()))


PAGES = StaticFiles(packages=[("fastapi_swagger", "resources")])


@app.get("/docs/{file}", tags=["docs"], include_in_schema=False)
async def docs_file(file: str, request: Request) -> Response:
    return await PAGES.get_response(file, request.scope)


# At the import, so that uvicorn's first lines of the log have our form too. A bad setting is reported by the lifespan.
try:
    first = read_settings()
    open_log(first.log, first.log_vins)
except StartupError:
    open_log("text", log_vins=True)
