"""Caddy and nginx as processes of their own, with the project's configurations of them."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.certificates import Authority, Pair
from tests.live import eventually
from tests.process import ROOT, free_port

CONFIGS = ROOT / "configs"
# Where Debian puts what only root is thought to need.
PATH = f"{os.environ['PATH']}:/usr/sbin"
START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 10


@dataclass(frozen=True)
class Place:
    """Where a gateway stands: its ports, its certificate, the server's port, its own folder."""

    https: int
    http: int
    pair: Pair
    upstream: int
    folder: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.https}"

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


def caddy(place: Place) -> subprocess.Popen[bytes]:
    environ = {
        "OCHAT_UPSTREAM": f"127.0.0.1:{place.upstream}",
        "OCHAT_HTTPS_PORT": str(place.https),
        "OCHAT_HTTP_PORT": str(place.http),
        "OCHAT_CADDY_ADMIN": "off",
        # And no other machine is to see it.
        "OCHAT_TLS": f"tls {place.pair.certfile} {place.pair.keyfile}\nbind 127.0.0.1",
        "HOME": str(place.folder),
        "XDG_DATA_HOME": str(place.folder),
        "XDG_CONFIG_HOME": str(place.folder),
    }
    command = ["caddy", "run", "--config", str(CONFIGS / "Caddyfile"), "--adapter", "caddyfile"]
    return _started(command, place.folder, environ)


# The least that a system's own nginx.conf has.
MAIN = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr info;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


def nginx(place: Place) -> subprocess.Popen[bytes]:
    live = "/etc/letsencrypt/live/chat.example.com"
    changes = {
        "server_name chat.example.com;": "server_name localhost;",
        "listen 80;": f"listen 127.0.0.1:{place.http};",
        "listen 443 ssl http2;": f"listen 127.0.0.1:{place.https} ssl http2;",
        "listen [::]:80;": "",
        "listen [::]:443 ssl http2;": "",
        f"{live}/fullchain.pem": str(place.pair.certfile),
        f"{live}/privkey.pem": str(place.pair.keyfile),
        "server 127.0.0.1:18888;": f"server 127.0.0.1:{place.upstream};",
    }
    site = (CONFIGS / "nginx.conf").read_text()
    for theirs, ours in changes.items():
        assert theirs in site, theirs
        site = site.replace(theirs, ours)
    (place.folder / "site.conf").write_text(site)
    main = place.folder / "main.conf"
    main.write_text(MAIN.format(folder=place.folder))
    return _started(["nginx", "-e", "stderr", "-c", str(main)], place.folder, {})


PROGRAMS = {"caddy": caddy, "nginx": nginx}


def _started(command: list[str], folder: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    program = shutil.which(command[0], path=PATH)
    assert program is not None, f"{command[0]} is not installed; scripts/test says how"
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [program, *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environ},
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:  # a failing test can leave it waiting for its streams
        process.kill()
        process.wait()


@contextlib.contextmanager
def gateway(name: str, authority: Authority, upstream: int, folder: Path) -> Iterator[Place]:
    """A running gateway in front of a port of this machine."""
    folder.mkdir()
    place = Place(free_port(), free_port(), authority.issue("gateway"), upstream, folder)
    process = PROGRAMS[name](place)

    def answers() -> bool:
        assert process.poll() is None, place.output
        with contextlib.suppress(ConnectionRefusedError):
            return authority.shown_by(place.https) == place.pair.der
        return False

    try:
        assert eventually(answers, START_TIMEOUT_S)
        yield place
    finally:
        _stop(process)
