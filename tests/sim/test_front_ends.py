"""``--api-server-count 2``: two front ends, one engine, one port, one log, one account."""

import contextlib
import json
import math
import re
import signal
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from ochat_serve import keys
from tests.certificates import Authority
from tests.live import RawClient, eventually
from tests.process import ROOT, ServerProcess, alive, server_process

CHAT = "/v1/chat/completions"
CONNECTIONS = 40
LIMIT = 10
ASK = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
LONG = [{"role": "user", "content": "a long question " * 100}]
KEYS = ("sk-one", "sk-two")
ADMIN = "sk-admin"


@contextlib.contextmanager
def two_front_ends(
    model: Path,
    tmp_path: Path,
    *flags: str,
    trusted: ssl.SSLContext | None = None,
    secrets: Sequence[str] = KEYS,
    loading: Callable[[ServerProcess], None] = lambda server: None,
    **environ: str,
) -> Iterator[ServerProcess]:
    """``loading`` is called while it does."""
    with server_process(
        "--model", str(model), *flags,
        "--api-server-count", "2",
        "--distributed-executor-backend", "sim_executor.SimExecutor",
        "--log-file", str(tmp_path / "requests.log"),
        output=tmp_path / "output.txt", trusted=trusted,
        PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
        OCHAT_ADMIN_KEYS=ADMIN if secrets else "",
        **{"SIM_STEP_MS": "5", "OCHAT_API_KEYS": ",".join(secrets), **environ},
    ) as server:  # fmt: skip
        loading(server)
        server.wait_until_ready(*secrets[:1])
        assert eventually(lambda: server.output.count("ready in") == 2, within_s=60)
        yield server


@pytest.fixture
def two(llama3_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with two_front_ends(llama3_folder, tmp_path) as server:
        yield server


@pytest.fixture
def limited_two(
    llama3_folder: Path, tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[ServerProcess, str]]:
    """With the key of somebody who may ask ``LIMIT`` times, and is no one of ``KEYS``."""
    file = str(tmp_path / "keys.json")
    words = ["add", "alice", "--requests-per-minute", str(LIMIT)]
    assert keys.main(["--key-file", file, *words]) == 0
    key = capsys.readouterr().out.strip()
    flags = ["--key-file", file]
    with two_front_ends(llama3_folder, tmp_path, *flags, OCHAT_REDIS_URL=redis_url) as server:
        yield server, key


@pytest.fixture
def open_two(llama3_folder: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """Without keys."""
    with two_front_ends(llama3_folder, tmp_path, secrets=()) as server:
        yield server


def begun_streams(server: ServerProcess, count: int) -> list[RawClient]:
    """As many as land on both front ends, which the kernel decides."""
    clients = [RawClient(server.port) for _ in range(count)]
    for client in clients:
        client.post(CHAT, json.dumps({**ASK, "max_tokens": 8_000, "stream": True}).encode())
    for client in clients:
        client.read_until(b'"content":"The"')
    return clients


def front_ends(server: ServerProcess) -> list[psutil.Process]:
    return [child for child in server.children() if "ApiServer" in child.name()]


def finished(server: ServerProcess) -> float:
    """Requests that vLLM has counted, over all front ends."""
    headers = {"authorization": f"Bearer {ADMIN}"}
    text = httpx.get(server.url + "/metrics", headers=headers).text
    counts = re.findall(r'vllm:request_success_total\{.*"length".*\} (\S+)', text)
    assert len(counts) == 1, "every series stands there once"
    return float(counts[0])


def ask(client: RawClient, key: str = KEYS[0], **fields: object) -> None:
    client.received.clear()
    headers = ("Content-Type: application/json", f"Authorization: Bearer {key}")
    client.post(CHAT, json.dumps({**ASK, **fields}).encode(), *headers)


def cached_tokens(client: RawClient) -> int:
    found = re.search(rb'"cached_tokens":(\d+)', client.read_until(b"}}}"))
    assert found, client.received
    return int(found[1])


def test_two_front_ends_are_one_server(two: ServerProcess, tmp_path: Path) -> None:
    clients = [RawClient(two.port) for _ in range(CONNECTIONS)]
    for client in clients:
        ask(client)
    for client in clients:
        assert b"200 OK" in client.read_until(b'"completion_tokens":4')
    # The kernel deals connections out by chance: all 40 to one process is as good as impossible.
    held = [len(process.net_connections("tcp")) for process in front_ends(two)]
    assert len(held) == 2
    assert all(count > 1 for count in held), held  # the listening socket is one
    # What a key has asked of one front end comes from the cache of either; not for another key.
    cached = []
    for client in clients:
        ask(client, messages=LONG)
        cached.append(cached_tokens(client) > 0)
    assert cached == [False] + [True] * (CONNECTIONS - 1)
    ask(clients[0], KEYS[1], messages=LONG)
    assert cached_tokens(clients[0]) == 0
    for client in clients:
        client.hang_up()
    answered = 2 * CONNECTIONS + 1
    assert finished(two) == answered
    log = tmp_path / "requests.log"
    assert eventually(lambda: log.read_text().count("\n") == answered)

    # A signal lets the stream finish; then nothing is left, and every request stands in the log.
    children = two.children()
    with RawClient(two.port) as client:
        ask(client, max_tokens=300, stream=True)
        client.read_until(b'"content":"The"')
        two.process.terminate()
        assert b'"finish_reason":"length"' in client.read_until(b"data: [DONE]")
    assert two.process.wait(60) == 0
    assert eventually(lambda: not any(map(alive, children)), within_s=10)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["finished"] * (answered + 1)
    assert lines[-1]["completion_tokens"] == 300


def answers_while_loading(server: ServerProcess) -> None:
    server.wait_until_answering()
    assert "loading the weights" not in server.output, "there is no front end yet"
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    refused = httpx.post(server.url + CHAT, json=ASK, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert refused.headers["retry-after"] == "5"
    assert httpx.post(server.url + CHAT, json=ASK).status_code == 401
    seen = set()
    with httpx.Client(base_url=server.url, headers=headers) as client:
        while server.output.count("ready in") < 2:
            assert server.process.poll() is None, server.output[-4_000:]
            live, ready = (client.get(path).status_code for path in ("/livez", "/readyz"))
            seen.add((live, ready))
    assert (200, 503) in seen
    assert seen <= {(200, 503), (200, 200)}


def test_the_port_answers_from_the_first_second_and_a_killed_parent_leaves_nothing(
    llama3_folder: Path, tmp_path: Path
) -> None:
    """The parent hands the port over to the front ends without refusing a connection."""
    with two_front_ends(llama3_folder, tmp_path, loading=answers_while_loading) as two:
        lines = (tmp_path / "requests.log").read_text().splitlines()
        codes = [json.loads(line)["error"] for line in lines]
        assert codes == ["loading", "invalid_api_key"]
        children = two.children()
        two.process.kill()
        try:
            assert eventually(lambda: not any(map(alive, children)), within_s=30)
        finally:
            for child in filter(alive, children):
                child.kill()


def test_a_limit_is_that_of_all_front_ends_together(
    limited_two: tuple[ServerProcess, str],
) -> None:
    two, key = limited_two
    clients = [RawClient(two.port) for _ in range(CONNECTIONS)]
    began = time.monotonic()
    for client in clients:
        ask(client, key)
    answers = [client.read_until(b"\r\n\r\n").split(b" ", 2)[1] for client in clients]
    renewed = math.ceil((time.monotonic() - began) * LIMIT / 60)
    for client in clients:
        client.hang_up()
    assert LIMIT <= answers.count(b"200") <= LIMIT + renewed
    assert set(answers) == {b"200", b"429"}


def test_a_front_end_that_dies_ends_the_server(two: ServerProcess) -> None:
    """Half a server would answer half of the connections."""
    children = two.children()
    front_ends(two)[0].kill()
    assert two.process.wait(60) == 1
    assert re.search(r"ochat_serve: Process ApiServer_\d .* died .*The server ends", two.output)
    assert eventually(lambda: not any(map(alive, children)), within_s=10)


def test_each_front_end_asks_before_it_is_ready(llama3_folder: Path, tmp_path: Path) -> None:
    """One that does not would serve the nonsense that another has seen."""
    with server_process(
        "--model", str(llama3_folder),
        "--api-server-count", "2",
        "--distributed-executor-backend", "sim_executor.SimExecutor",
        "--self-check", "on",
        output=tmp_path / "output.txt",
        PYTHONPATH=str(ROOT / "scripts" / "benchmark" / "sim"),
    ) as server:  # fmt: skip
        assert eventually(lambda: front_ends(server), within_s=60)
        children = server.children()
        assert server.process.wait(120) == 1
        assert eventually(lambda: not any(map(alive, children)), within_s=10)
    asked = r"ochat_serve: front end \d: The self-check failed: .* says 'The sea was calm .*\n"
    assert re.search(asked, server.output)
    assert "ready in" not in server.output


def test_each_front_end_takes_a_new_certificate(llama3_folder: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, new = authority.issue("server"), authority.issue("new")
    with two_front_ends(llama3_folder, tmp_path, *pair.flags, trusted=authority.context) as server:
        assert f"will listen on https://localhost:{server.port};" in server.output
        pair.replace_with(new)
        assert eventually(lambda: server.output.count("the new certificate") == 2, within_s=30)
        # As above: not all of them to one process.
        shown = {authority.shown_by(server.port) for _ in range(CONNECTIONS)}
        assert shown == {new.der}
        assert server.stop() == 0


def test_a_hangup_is_passed_on_and_ends_nothing(llama3_folder: Path, tmp_path: Path) -> None:
    """Not even while it loads, where a process that does not know what to do with one would end."""

    def hang_up(server: ServerProcess) -> None:
        assert eventually(lambda: "will listen" in server.output, within_s=60)
        while "ready in" not in server.output:
            assert server.process.poll() is None, server.output[-4_000:]
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.1)

    with two_front_ends(llama3_folder, tmp_path, secrets=(), loading=hang_up) as two:
        said = two.output.count("SIGHUP")
        two.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: two.output.count("SIGHUP") == said + 2)
        assert two.stop() == 0


def test_a_second_signal_ends_all_of_them_now(open_two: ServerProcess) -> None:
    two = open_two
    children = two.children()
    streams = begun_streams(two, 12)
    two.process.terminate()
    assert eventually(lambda: httpx.get(two.url + "/readyz").json()["status"] == "draining")
    two.process.terminate()
    for stream in streams:
        assert b'"code":"shutting_down"' in stream.read_until(b"data: [DONE]")
        stream.hang_up()
    assert two.process.wait(20) == 128 + signal.SIGTERM
    assert eventually(lambda: not any(map(alive, children)), within_s=10)


def test_when_the_engine_dies_streams_end_with_an_error_and_so_does_the_server(
    llama3_folder: Path, tmp_path: Path
) -> None:
    """It dies by itself, of a bug: no front end is its parent, and none is told."""
    with two_front_ends(
        llama3_folder, tmp_path, secrets=(), SIM_STEP_MS="20", SIM_CRASH_AFTER="250"
    ) as two:
        children = two.children()
        streams = begun_streams(two, 12)
        body = RawClient(two.port)
        body.post(CHAT, json.dumps({**ASK, "max_tokens": 8_000}).encode())
        for stream in streams:
            assert b'"code":"engine_dead"' in stream.read_until(b"data: [DONE]")
            stream.hang_up()
        assert body.read_until(b"}}").startswith(b"HTTP/1.1 503 ")
        body.hang_up()
        assert two.process.wait(10) == 1
        assert re.search(r"ochat_serve: Engine core process EngineCore\S* died .*", two.output)
        assert eventually(lambda: not any(map(alive, children)), within_s=10)
    text = (tmp_path / "requests.log").read_text()
    assert [json.loads(line)["error"] for line in text.splitlines()] == ["engine_dead"] * 13
