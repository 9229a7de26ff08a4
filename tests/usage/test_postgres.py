"""The ledger on a real PostgreSQL."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from ochat_serve.errors import StartupError
from ochat_serve.settings import Settings
from ochat_serve.usage.counters import Row
from ochat_serve.usage.database import CREATE, DatabaseError, postgres_database
from ochat_serve.usage.ledger import UsageLedger
from ochat_serve.usage_db import open_ledger
from tests.live import eventually
from tests.postgres import PASSWORD, QUOTED, PostgresServer, postgres_server
from tests.process import ROOT
from tests.usage.accounts import DAY, EVER, NEXT_DAY, NOON, of, request
from tests.usage.test_processes import run


@pytest.fixture(scope="module")
def running() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def postgres(running: PostgresServer) -> PostgresServer:
    """Without the table."""
    running.execute("DROP TABLE IF EXISTS ochat_usage")
    return running


def ledger_at(server: PostgresServer, flush_interval_s: float = 0.001) -> UsageLedger:
    return UsageLedger(
        postgres_database(server.url), anonymous=False, flush_interval_s=flush_interval_s
    )


def stored(server: PostgresServer) -> list[tuple[object, ...]]:
    return server.execute("SELECT key, day, requests FROM ochat_usage ORDER BY day, key")


def test_it_counts_and_reads(postgres: PostgresServer):
    for _ in range(2):
        ledger = ledger_at(postgres)
        for key in "ba":
            ledger.add(request(key))
            ledger.add(request(key, time=NOON + 86_400, outcome="failed"))
        ledger.close()
    ledger = ledger_at(postgres)
    assert ledger.read(*EVER) == [
        Row("a", DAY, of(2)),
        Row("b", DAY, of(2)),
        Row("a", NEXT_DAY, of(2, errors=2)),
        Row("b", NEXT_DAY, of(2, errors=2)),
    ]
    assert ledger.read(DAY, DAY, "b") == [Row("b", DAY, of(2))]
    assert ledger.total("a", *EVER) == of(4, errors=2)
    ledger.close()


def test_all_or_nothing(postgres: PostgresServer):
    database = postgres_database(postgres.url)
    with pytest.raises(DatabaseError, match="not-null"):
        database.add([Row("a", DAY, of(1)), Row(None, DAY, of(1))])
    assert stored(postgres) == []
    database.close()


def test_many_make_the_table_at_once(postgres: PostgresServer):
    databases = [postgres_database(postgres.url) for _ in range(12)]
    with ThreadPoolExecutor(len(databases)) as threads:
        for _ in range(3):
            postgres.execute("DROP TABLE IF EXISTS ochat_usage")
            list(threads.map(lambda database: database.check(), databases))
            for database in databases:
                database.close()


def test_processes_add_up(postgres: PostgresServer):
    """They lock the same rows."""
    processes = [run("adder", postgres.url, 100, 0.001) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert stored(postgres) == [("a", DAY, 300), ("b", DAY, 300)]


def test_a_server_that_goes_and_comes_back(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
):
    ledger = ledger_at(postgres)
    ledger.add(request())
    assert ledger.read(*EVER)
    postgres.stop()
    try:
        for _ in range(3):
            ledger.add(request())
        assert eventually(lambda: caplog.records)
        with pytest.raises(DatabaseError):
            ledger.read(*EVER)
    finally:
        postgres.start()
    assert eventually(lambda: len(caplog.records) == 2, within_s=30)
    ledger.close()
    assert stored(postgres) == [("a", DAY, 4)]
    assert not [record for record in caplog.records if PASSWORD in record.getMessage()]


def test_a_locked_table_is_not_waited_for_for_ever(postgres: PostgresServer):
    """Reading, writing and starting end in an error; then it goes on."""
    database = postgres_database(postgres.url, statement_timeout_s=0.1)
    database.check()
    row = Row("a", DAY, of(1))
    with psycopg.connect(postgres.url) as other:
        other.execute("LOCK TABLE ochat_usage IN ACCESS EXCLUSIVE MODE")
        for act in (
            lambda: database.read(*EVER, None),
            lambda: database.add([row]),
            database.check,
        ):
            with pytest.raises(DatabaseError, match="statement timeout"):
                act()
        other.rollback()
    database.add([row])
    assert database.read(*EVER, None) == [row]
    database.close()


def test_a_user_who_may_only_use_the_table(postgres: PostgresServer):
    """Whoever runs the database may want to make it."""
    postgres.execute(CREATE)
    postgres.execute("DROP ROLE IF EXISTS clerk")
    postgres.execute("CREATE ROLE clerk LOGIN PASSWORD 'c'")
    postgres.execute("GRANT SELECT, INSERT, UPDATE ON ochat_usage TO clerk")
    url = f"postgresql://clerk:c@127.0.0.1:{postgres.port}/postgres"
    ledger = open_ledger(Settings(usage_db=url))
    assert ledger is not None
    ledger.add(request())
    ledger.close()
    assert stored(postgres) == [("a", DAY, 1)]
    postgres.execute("REVOKE UPDATE ON ochat_usage FROM clerk")
    with pytest.raises(StartupError, match="permission denied"):
        open_ledger(Settings(usage_db=url))
    postgres.execute("DROP TABLE ochat_usage")
    postgres.execute("DROP ROLE clerk")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("@127.0.0.1", "x@127.0.0.1"), "password authentication failed"),
        (("/postgres", "/nowhere"), '"nowhere" does not exist'),
        (("127.0.0.1:", "127.0.0.1:9"), "port"),
        (("127.0.0.1", "no.such.host.invalid"), "no.such.host.invalid"),
        (("/postgres", "/postgres?what=1"), "not an address that libpq understands"),
        (("%20", " "), "not an address that libpq understands"),
        (("%20", "%00"), "not an address that libpq understands"),
        (("/postgres", "/postgres?sslmode=maybe"), "sslmode"),
    ],
)
def test_an_address_that_does_not_work(
    postgres: PostgresServer, change: tuple[str, str], said: str
):
    """One sentence that says why, and no password in it or in what caused it."""
    settings = Settings(usage_db=postgres.url.replace(*change, 1))
    with pytest.raises(StartupError, match=said) as stopped:
        open_ledger(settings)
    text = str(stopped.value)
    assert "\n" not in text
    assert text.startswith("--usage-db cannot be used: ")
    error: BaseException | None = stopped.value
    while error is not None:
        told = f"{error} {error!r}"
        assert not [word for word in (PASSWORD, QUOTED, "p@ss", "p%40ss", "w?rd") if word in told]
        error = error.__cause__ or error.__context__


def test_without_its_package_the_start_says_so():
    """In a process of its own, in which it cannot be imported."""
    assert importlib.util.find_spec("psycopg")
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from ochat_serve.openai_api_server import main\n"
        "sys.exit(main(['--usage-db', 'postgresql://h/d', '--port', '0']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.endswith("needs the package psycopg: pip install 'psycopg[binary]'.\n")
    assert "Traceback" not in done.stderr


def test_it_is_not_imported_before_it_is_needed():
    program = "import ochat_serve.server, sys; sys.exit('psycopg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
