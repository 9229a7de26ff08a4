"""What stops a start: one sentence, exit code 1, before any weight is read."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from ochat_serve import keys
from ochat_serve.server import open_log
from ochat_serve.settings import Settings
from tests.certificates import Authority, Pair
from tests.live import eventually
from tests.model_folders import llama3
from tests.process import ROOT, ServerProcess, alive, free_port, server_process

QUICK_S = 60


def start(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ochat_serve.openai_api_server", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environ},
        timeout=QUICK_S,
        check=False,
    )


def the_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The last line said, and nothing like a traceback before it."""
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ochat_serve: ")
    return last.removeprefix("ochat_serve: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "/no/such/folder"], "There is no model folder /no/such/folder."),
        (["--model", "nobody/nothing"], "The model nobody/nothing was not found"),
        (["--model", "demo", "--model-type", "gpt"], "--model-type gpt is unknown."),
        (["--port", "notaport"], "--port notaport: must be a valid integer"),
        (["--port", "99999"], "--port 99999: must be less than or equal to 65535."),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines"),
        (
            ["--host", "no.such.host.invalid", "--insecure-no-auth"],
            "--host no.such.host.invalid is",
        ),
        (["--log-file", "/no/such/folder/x.log"], "--log-file /no/such/folder/x.log cannot be"),
        (
            ["--ssl-certfile", "/no/such.pem"],
            "--ssl-certfile and --ssl-keyfile are needed together",
        ),
        (["--ssl-keyfile", "/no/such.pem"], "--ssl-certfile and --ssl-keyfile are needed together"),
        (
            ["--ssl-certfile", "/no/such.pem", "--ssl-keyfile", "/no/such.key"],
            "--ssl-certfile /no/such.pem cannot be read",
        ),
        (
            ["--usage-db", "/no/such/folder/x"],
            "--usage-db /no/such/folder/x cannot be used: No such",
        ),
        (
            ["--usage-db", "/no/such/folder/x", "--api-server-count", "2"],
            "--usage-db /no/such/folder/x cannot be used: No such",
        ),
        (
            ["--redis-url", "redis://:pw@127.0.0.1:1"],
            "--redis-url redis://127.0.0.1:1 cannot be used: Error 111 connecting",
        ),
        (["--log-redact", "("], "--log-redact '(': is not a regular expression"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read"),
        (["--key-file", "/no/such.json"], "The key file /no/such.json cannot be read: No such"),
        (
            ["--model", "demo", "--structured-outputs-config", '{"backend":"guidance"}'],
            "--structured-outputs-config: the backend guidance is not supported;",
        ),
    ],
)
def test_wrong_settings(arguments: list[str], said: str) -> None:
    port = [] if "--port" in arguments else ["--port", str(free_port())]
    assert the_sentence(start(*arguments, *port)).startswith(said)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = the_sentence(start("--model", "demo", "--port", str(port)))
    assert said.startswith(f"Port {port} of localhost is in use.")


def test_limits_that_front_ends_could_not_keep_together(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    assert keys.main(["--key-file", path, "add", "alice", "--parallel-requests", "2"]) == 0
    flags = ["--key-file", path, "--port", str(free_port()), "--api-server-count", "2"]
    assert the_sentence(start(*flags)) == (
        "The key alice has limits, which 2 front ends can keep together in Redis only: give "
        "--redis-url, or --api-server-count 1."
    )


@pytest.mark.parametrize("front_ends", ["1", "2"])
def test_a_log_of_another_server(tmp_path: Path, front_ends: str) -> None:
    path = str(tmp_path / "requests.log")
    others = open_log(Settings(log_file=path))
    said = the_sentence(
        start("--log-file", path, "--port", str(free_port()), "--api-server-count", front_ends)
    )
    assert others is not None
    others.close()
    assert said == (
        f"--log-file {path} is written by another server. Each needs a file of its own."
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tensor-parallel-size", "64"], "--tensor-parallel-size 64 x --pipeline-parallel-size"),
        (["--no-such-flag", "1"], "Unrecognized arguments: --no-such-flag 1"),
        (["--max-model-len", "many"], "Argument --max-model-len"),
        (["--load-format", "dummy", "--model-type", "gemma"], "The template gemma ends"),
        (["--load-format", "dummy", "--model-type", "hf"], "This model's tokenizer has no chat"),
        ([], "The folder "),
    ],
)
def test_what_only_vllm_or_the_tokenizer_can_tell(
    llama3_folder: Path, arguments: list[str], said: str
) -> None:
    done = start("--model", str(llama3_folder), *arguments, "--port", str(free_port()))
    assert the_sentence(done).startswith(said)
    assert "Loading weights" not in done.stderr


def test_a_model_that_vllm_cannot_load_is_one_sentence_too(tmp_path: Path) -> None:
    folder = llama3(tmp_path / "model", chat_template="{{ messages[0]['content'] }}")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with server_process("--model", str(folder), output=tmp_path / "output.txt") as server:
        server.wait_until_answering()
        assert server.process.wait(120) == 1
    last = server.output.strip().splitlines()[-1]
    assert last.startswith(f"ochat_serve: vLLM cannot serve {folder}: ")


def test_a_signal_while_loading_ends_it_and_its_children(tmp_path: Path) -> None:
    with server_process("--model", "demo", output=tmp_path / "output.txt") as server:
        server.wait_until_answering()
        assert eventually(server.children, within_s=60), "the engine process is being started"
        children = server.children()
        assert server.stop(signal.SIGTERM) == 0
        assert eventually(lambda: not any(map(alive, children)), within_s=20)


def planted(server: ServerProcess, key: str) -> list[str]:
    """Every answer to requests with that key, or one much like it, where no key belongs."""
    wrong = f"{key}-wrong"
    places: list[dict[str, object]] = [
        {"headers": {"authorization": f"Bearer {wrong}"}},
        {"headers": {"authorization": wrong}},
        {"headers": {"authorization": f"Basic {wrong}"}},
        {"headers": {b"authorization": b"Bearer " + key.encode() + b"\xff"}},
        {"params": {"api_key": key}},
        {"headers": {"x-api-key": key, "cookie": f"key={key}"}},
        {"headers": {"authorization": f"Bearer {key}"}, "json": {"messages": []}},
    ]
    answers = [httpx.post(server.url + "/v1/chat/completions", **place) for place in places]
    for path in ("/metrics", "/openapi.json", "/version", "/v1/models"):
        for used in (key, wrong, "sk-KEY-BOSS"):
            headers = {"authorization": f"Bearer {used}"}
            answers.append(httpx.get(server.url + path, headers=headers))
    assert {200, 400, 401, 403} <= {answer.status_code for answer in answers}
    return [f"{answer.headers} {answer.text}" for answer in answers]


def titles(server: ServerProcess) -> list[str]:
    """What others on this machine can see of the server's processes."""
    processes = [psutil.Process(server.process.pid), *server.children()]
    shown = [f"{process.name()} {process.cmdline()}" for process in processes]
    return shown + [str(child.environ()) for child in server.children()]


def test_a_wrong_key_is_told_before_the_port_is_bound(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = Pair(authority.issue("a").certfile, authority.issue("b").keyfile)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = the_sentence(start(*pair.flags, "--port", str(taken.getsockname()[1])))
    assert said.endswith("do not belong together.")


def test_https_from_the_first_second_and_renewed_without_a_restart(tmp_path: Path) -> None:
    """And no gateway is believed but those that the flag names."""
    authority = Authority(tmp_path)
    pair, new = authority.issue("server"), authority.issue("new")
    log = tmp_path / "requests.log"
    with server_process(
        "--model", "demo", *pair.flags, "--log-file", str(log), "--forwarded-allow-ips",
        output=tmp_path / "output.txt",
        trusted=authority.context,
        FORWARDED_ALLOW_IPS="*",
    ) as server:  # fmt: skip
        server.wait_until_answering()
        said = {"x-forwarded-for": "203.0.113.7"}
        httpx.get(server.url + "/v1/models", headers=said, verify=authority.context)
        assert f"listening on https://localhost:{server.port} " in server.output
        assert authority.shown_by(server.port) == pair.der
        pair.replace_with(new)
        # Beside the import of vLLM, which holds the interpreter for seconds.
        assert eventually(lambda: authority.shown_by(server.port) == new.der, within_s=60)
        assert eventually(lambda: "ochat_serve: the new certificate is in use\n" in server.output)
        assert server.stop() == 0
    assert [json.loads(line)["client"] for line in log.read_text().splitlines()] == ["127.0.0.1"]


def test_the_old_command_line_from_the_first_second_to_the_last(tmp_path: Path) -> None:
    """Every flag of the reference's README, on the demo model: early answers, keys (which are
    nowhere to be found), log, end."""
    log = tmp_path / "openchat.log"
    with server_process(
        "--model", "demo",
        "--engine-use-ray", "--worker-use-ray", "--tensor-parallel-size", "1",
        "--api-keys", "sk-KEY1", "sk-KEY2",
        "--disable-log-requests", "--disable-log-stats",
        "--log-file", str(log),
        "--max-model-len", "1024",
        output=tmp_path / "output.txt",
        VLLM_CPU_KVCACHE_SPACE="1",
        OCHAT_ADMIN_KEYS="sk-KEY-BOSS",
    ) as server:  # fmt: skip
        server.wait_until_answering()
        key = {"authorization": "Bearer sk-KEY2"}
        early = httpx.get(server.url + "/readyz", headers=key)
        assert (early.status_code, early.json()["status"]) == (503, "loading")
        ask = {"messages": [{"role": "user", "content": "What is the capital of France?"}],
               "temperature": 0}  # fmt: skip
        chat = server.url + "/v1/chat/completions"
        too_early = httpx.post(chat, json=ask, headers=key)
        assert (too_early.status_code, too_early.headers["retry-after"]) == (503, "5")

        server.wait_until_ready("sk-KEY1")
        assert httpx.post(chat, json=ask).status_code == 401
        answer = httpx.post(chat, json=ask, headers=key, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        seen = [*planted(server, "sk-KEY1"), *titles(server)]
        children = server.children()
        assert children
        assert server.stop() == 0
        assert eventually(lambda: not any(map(alive, children)), within_s=10)

    assert "the model says 'The capital of France is Paris.'" in server.output
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines] == [503, 401, 200, *[401] * 6, 400, 200, 401, 200]
    for text in (server.output, log.read_text(), *seen):
        assert "sk-KEY" not in text
    assert "Ray is not installed" in server.output
