"""``GET /v1/usage``: what is asked, who may ask, and how it is answered."""

import csv
import io
from collections.abc import AsyncIterator
from datetime import date, timedelta
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from ochat_serve.app import create_app
from ochat_serve.caller import Caller
from ochat_serve.errors import ApiError
from ochat_serve.middleware.boundary import Boundary
from ochat_serve.routes import usage
from ochat_serve.routes.replies import on_api_error
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from ochat_serve.usage.counters import ANONYMOUS, COUNTERS
from ochat_serve.usage.database import sqlite_database
from ochat_serve.usage.ledger import UsageLedger
from tests.usage.accounts import NOON, request

TODAY = date(2023, 11, 14)
KEPT_DAYS = (0, 1, 29, 30, 399, 400)
ANN, ADMIN, NOBODY = Caller("ann"), Caller("root", role="admin"), Caller(None, role="admin")


def ago(days: int) -> str:
    return str(TODAY - timedelta(days))


class Route:
    """The route over a ledger; ``get`` asks as somebody."""

    def __init__(self, ledger: UsageLedger) -> None:
        boundary = Middleware(Boundary, writers=[], clock=lambda: 0.0, now=lambda: NOON)
        self._app = FastAPI(middleware=[boundary])
        self._app.include_router(usage.router(ledger, lambda: NOON))
        self._app.add_exception_handler(ApiError, on_api_error)

    async def get(self, caller: Caller, **query: str) -> httpx.Response:
        async def identified(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {"caller": caller}
            await self._app(scope, receive, send)

        transport = httpx.ASGITransport(identified)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/usage", params=query)


@pytest.fixture
async def route(tmp_path: Path) -> AsyncIterator[Route]:
    """Three accounts on each of some days, and another of ann's of today."""
    ledger = UsageLedger(sqlite_database(str(tmp_path / "usage")), anonymous=True)
    for days in KEPT_DAYS:
        for key in ("ann", "bob", None):
            ledger.add(request(key, time=NOON - 86_400 * days))
    ledger.add(request("ann", outcome="abandoned"))
    yield Route(ledger)
    ledger.close()


async def test_ones_own_of_thirty_days(route: Route):
    answer = await route.get(ANN)
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    counts = {"requests": 1, "prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 2,
              "errors": 0, "aborted": 0}  # fmt: skip
    double = {name: 2 * count for name, count in counts.items()} | {"aborted": 1}
    assert body == {
        "object": "list",
        "start": ago(29),
        "end": ago(0),
        "data": [
            {"object": "usage", "key": "ann", "day": ago(29), **counts},
            {"object": "usage", "key": "ann", "day": ago(1), **counts},
            {"object": "usage", "key": "ann", "day": ago(0), **double},
        ],
        "total": {name: 4 * count for name, count in counts.items()} | {"aborted": 1},
    }


@pytest.mark.parametrize(
    ("query", "days"),
    [
        ({"start": ago(30)}, [30, 29, 1, 0]),
        ({"start": ago(1), "end": ago(1)}, [1]),
        ({"end": ago(1)}, [30, 29, 1]),
        ({"start": ago(399)}, [399, 30, 29, 1, 0]),
        ({"start": ago(400), "end": ago(399)}, [400, 399]),
        ({"start": ago(20), "end": ago(10)}, []),
        ({"end": "0001-01-02"}, []),
        ({"start": "2030-01-01", "end": "2030-01-02"}, []),
    ],
)
async def test_days(route: Route, query: dict[str, str], days: list[int]):
    answer = await route.get(ANN, **query)
    assert answer.status_code == 200
    assert [row["day"] for row in answer.json()["data"]] == [ago(number) for number in days]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"start": "yesterday"}, "start"),
        ({"start": ""}, "start"),
        ({"end": "2023-02-29"}, "end"),
        ({"end": "20231114"}, "end"),
        ({"end": "2023-W46-2"}, "end"),
        ({"end": "2023-11-14T00:00:00"}, "end"),
        ({"end": "٢٠٢٣-١١-١٤"}, "end"),
        ({"end": "0000-01-01"}, "end"),
        ({"start": ago(0), "end": ago(1)}, "start"),
        ({"start": "2023-11-15"}, "start"),
        ({"start": ago(400)}, "start"),
        ({"start": "0001-01-01", "end": "9999-12-31"}, "start"),
        ({"format": "xml"}, "format"),
        ({"days": "7"}, "days"),
        ({"x" * 100: ""}, "x" * 64),
    ],
    ids=str,
)
async def test_bad_questions(route: Route, query: dict[str, str], param: str):
    for caller in (ANN, ADMIN):
        answer = await route.get(caller, **query)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("key", ["bob", "*", "", "root", ANONYMOUS, "Ann", "an", "../x"])
async def test_others_are_none_of_a_users_business(route: Route, key: str):
    """The same answer for keys that are and that are not."""
    answer = await route.get(ANN, key=key)
    assert answer.status_code == 403
    assert answer.json()["error"] == {
        "message": "Only admins may see the usage of other keys.",
        "type": "invalid_request_error",
        "param": "key",
        "code": "insufficient_permissions",
    }


@pytest.mark.parametrize(
    ("caller", "query", "keys"),
    [
        (ANN, {"key": "ann"}, ["ann"]),
        (ADMIN, {}, []),
        (ADMIN, {"key": "bob"}, ["bob"]),
        (ADMIN, {"key": ANONYMOUS}, [ANONYMOUS]),
        (ADMIN, {"key": "*"}, [ANONYMOUS, "ann", "bob"]),
        (ADMIN, {"key": "never-heard-of"}, []),
        (NOBODY, {}, [ANONYMOUS]),
        (NOBODY, {"key": "*"}, [ANONYMOUS, "ann", "bob"]),
    ],
)
async def test_whose(route: Route, caller: Caller, query: dict[str, str], keys: list[str]):
    answer = await route.get(caller, start=ago(0), **query)
    assert [row["key"] for row in answer.json()["data"]] == keys


@pytest.mark.parametrize("key", ["", "a b", "=1+1", "_x", "a" * 65, "a\n"])
async def test_what_is_no_name(route: Route, key: str):
    answer = await route.get(ADMIN, key=key)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "key")


async def test_csv(route: Route):
    answer = await route.get(ADMIN, start=ago(1), key="*", format="csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == 'attachment; filename="usage.csv"'
    assert answer.text.splitlines()[:2] == [
        "key,day,requests,prompt_tokens,completion_tokens,cached_tokens,errors,aborted",
        f"{ANONYMOUS},{ago(1)},1,3,5,2,0,0",
    ]
    assert answer.text.count("\r\n") == len(answer.text.splitlines())
    # It says what JSON says.
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    json = (await route.get(ADMIN, start=ago(1), key="*", format="json")).json()["data"]
    assert [{"object": "usage", **row} for row in rows] == [
        {name: str(value) for name, value in row.items()} for row in json
    ]
    assert set(rows[0]) == {"key", "day", *COUNTERS}
    # A spreadsheet takes none of it for a formula.
    cells = [cell for line in answer.text.splitlines() for cell in line.split(",")]
    assert not [cell for cell in cells if not (cell[0].isalnum() or cell[0] == "_")]


async def test_a_database_in_trouble(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ledger = UsageLedger(sqlite_database(str(tmp_path / "none" / "usage")), anonymous=True)
    answer = await Route(ledger).get(ADMIN)
    ledger.close()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["code"] == "usage_unavailable"
    assert str(tmp_path) not in answer.text
    assert "No such file" in caplog.text


async def test_off_says_how_to_turn_it_on():
    transport = httpx.ASGITransport(create_app(Settings(), Serving()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/v1/usage", params={"start": "x"})
    assert answer.status_code == 404
    assert "--usage-db" in answer.json()["error"]["message"]
