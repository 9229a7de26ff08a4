"""Bytes that are no HTTP, nearly HTTP, or HTTP of an odd kind: the same ones each time."""

import random
from collections.abc import Callable

from tests.sim.abuse.guarded import CHAT, secret

_CHAT = b'{"messages": [{"role": "user", "content": "x"}], "stop": ["sea"], "max_tokens": 2'
BODY = _CHAT + b"}"
STREAM = _CHAT + b', "stream": true}'
_KEY = b"Authorization: Bearer " + secret("anna").encode()
_JSON = b"Content-Type: application/json"

_METHODS = (
    b"", b"post", b"Post", b"HEAD", b"OPTIONS", b"PUT", b"PATCH", b"DELETE", b"TRACE", b"CONNECT",
    b"PRI", b"M-SEARCH", b"GE T", b"G\0ET", b"\xffGET", b"X" * 300, b"X" * 40_000, b"GET\t",
    b" GET",
)  # fmt: skip
_TARGETS = (
    b"", b"*", b"/", b"//", b"///v1/models", b"/v1/chat/completions/", b"/v1//chat/completions",
    b"/v1/chat/completions?x=%zz", b"/v1/chat/completions#x", b"/v1/chat/completions%00",
    b"/%76%31/models", b"/v1/models/%2e%2e/x", b"/v1/models/..", b"/v1/models/%ff%fe",
    b"/v1/models/\xff", b"/v1/models/%ed%a0%80", b"/v1/models/" + b"x" * 8_000,
    b"/" + b"%2f" * 3_000, b"/\\", b"/ x", b"http://localhost/v1/models", b"http://[::1/v1/models",
    b"//evil/v1/models", b"localhost:1", b"/v1/usage?start=9999-99-99",
    b"/v1/usage?start=0000-00-00&end=9999-12-31", b"/v1/usage?key=*",
    b"/v1/usage?start=2026-11-25&start=2026-11-26", b"/v1/usage?start=%d9%a1%d9%a2",
    b"/v1/usage?end=", b"/v1/usage?key=%00", b"/v1/usage?key=%27%20OR%201=1",
    b"/v1/usage?format=xml", b"/v1/usage?&&=&", b"/v1/usage?start=" + b"9" * 5_000, b"/metrics",
    b"/docs", b"/openapi.json", b"/readyz?x", b"/livez/",
)  # fmt: skip
_VERSIONS = (
    b"", b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.10", b"HTTP/11", b"http/1.1",
    b"HTTP/1.1 x", b"HTTP/1.1\0", b"HTTP/9", b"ICY/1.1", b"HTTP/1.1" * 4_000,
)  # fmt: skip
_HEADERS = (
    b":", b": x", b"x", b"x :y", b" x: y", b"x:\ty\x0b", b"x: \0", b"x: \r", b"x: \x7f",
    b"x: \xff\xfe", b"x\xff: y", b"x" * 20_000 + b": y", b"x: " + b"y" * 20_000,
    b"\r\n".join([b"x: y"] * 200), b"x: y\r\n folded: z", b"x: y\n", b"Host:", b"Host: evil",
    b"Host: [::", b"Host: localhost:99999", b"Host: a b", b"Host: localhost\r\nHost: localhost",
    b"Host: \xff", b"Host: " + b"l" * 9_000, b"Authorization:", b"Authorization: Bearer",
    b"Authorization: Bearer  ", b"Authorization: Basic eDp5", b"Authorization: Bearer \xff\xfe",
    b"Authorization: Bearer " + b"k" * 9_000, b"Authorization: \0", b"Content-Type:",
    b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16",
    b"Content-Type: \xff", b"Content-Type: application/json\r\nContent-Type: text/plain",
    b"Content-Encoding: gzip", b"Expect: 100-continue", b"Expect: x",
    b"Connection: upgrade\r\nUpgrade: h2c",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13",
    b"Connection: keep-alive, close, x", b"Connection: \xff", b"Keep-Alive: timeout=99999",
    b"TE: trailers", b"X-Request-Id: " + b"r" * 9_000, b"X-Request-Id: \xff", b"X-Request-Id: a\tb",
    b"x-ochat-timeout-s:", b"x-ochat-timeout-s: nan", b"x-ochat-timeout-s: -1",
    b"x-ochat-timeout-s: inf", b"x-ochat-timeout-s: 1e400", b"x-ochat-timeout-s: \xd9\xa1",
    b"x-ochat-timeout-s: 0x10", b"x-ochat-timeout-s: " + b"9" * 9_000, b"x-ochat-timeout-s: 1_0",
    b"X-Forwarded-For:", b"X-Forwarded-For: 300.1.1.1", b"X-Forwarded-For: ::1%eth0, ::",
    b"X-Forwarded-For: " + b"1.1.1.1, " * 1_000, b"X-Forwarded-For: \xff",
    b"X-Forwarded-For: [::1]:80", b"X-Forwarded-Proto: \xff", b"X-Forwarded-Proto: gopher",
    b"Forwarded: for=\"_x\"", b"Origin: null", b"Origin: \xff",
    b"Access-Control-Request-Method: \0", b"Range: bytes=0-", b"Accept: \xff",
    b"Accept-Encoding: \xff", b"Cookie: " + b"c" * 9_000, b"If-None-Match: *",
)  # fmt: skip
_LENGTHS = (
    b"-1", b"+5", b"0", b"1", b"1e3", b"0x10", b"5, 5", b"5, 6", b" ", b"", b"5;", b"\xb2", b"1_0",
    b"9" * 30, b"9" * 9_000, b"99", b"5\r\nContent-Length: 6", b"5\r\nContent-Length: 5",
    b"5\r\nTransfer-Encoding: chunked",
)  # fmt: skip
_CODINGS = (
    b"chunked", b"Chunked", b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"identity",
    b"", b"\xff", b"chunked\r\nContent-Length: 5", b"chunked\r\nTransfer-Encoding: chunked",
    b"x" * 9_000, b"chunked;q=1",
)  # fmt: skip
_SIZES = (
    b"", b"0", b"-1", b"g", b"0x5", b"5 5", b"+5", b"ffffffffffffffff", b"f" * 30, b"f" * 9_000,
    b"00000005", b"5;x=y", b'5;x="' + b"y" * 9_000 + b'"', b"5;\xff", b"5\n", b"\r\n5", b"\xff",
    b"1" * 20, b"5.0", b"5 ",
)  # fmt: skip
_TRAILERS = (
    b"",
    b"x: y\r\n",
    b"Content-Length: 5\r\n",
    b"x\r\n",
    b": \r\n",
    b"x: " + b"y" * 20_000 + b"\r\n",
)
_PIECES = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b"\xff\xfe", b" ", b":", b"\t", b"HTTP/1.1",
    b"GET / HTTP/1.1\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n",
    b"0\r\n\r\n", b"%00", b"\xed\xa0\x80", b"\x16\x03\x01\x02\x00\x01",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x80" * 64, b"A" * 20_000,
)  # fmt: skip


def request(
    method: bytes = b"POST",
    target: bytes = CHAT.encode(),
    version: bytes = b"HTTP/1.1",
    *headers: bytes,
    body: bytes = BODY,
) -> bytes:
    """A sound one, but for what is given."""
    line = b" ".join((method, target, version))
    usual = (b"Host: localhost", _KEY, b"Connection: close", _JSON)
    length = (b"Content-Length: %d" % len(body),) if body else ()
    return b"\r\n".join((line, *usual, *length, *headers, b"", b"")) + body


def _chunked(sizes: tuple[bytes, ...], body: bytes, trailer: bytes = b"") -> bytes:
    head = request(b"POST", CHAT.encode(), b"HTTP/1.1", b"Transfer-Encoding: chunked", body=b"")
    chunks = b"".join(size + b"\r\n" + body + b"\r\n" for size in sizes)
    return head + chunks + b"0\r\n" + trailer + b"\r\n"


def _sound(rng: random.Random) -> bytes:
    return rng.choice(
        (
            request(),
            request(body=STREAM),
            _chunked((b"%x" % len(BODY),), BODY),
            request(b"GET", b"/v1/models", body=b""),
            request(b"GET", b"/v1/usage?start=2026-01-01", body=b""),
            request(b"OPTIONS", b"/v1/models", body=b""),
        )
    )


def _line(rng: random.Random) -> bytes:
    """One or more odd parts in the request's line."""
    method = rng.choice(_METHODS) if rng.random() < 0.5 else rng.choice((b"GET", b"POST"))
    target = rng.choice(_TARGETS) if rng.random() < 0.5 else CHAT.encode()
    version = rng.choice(_VERSIONS) if rng.random() < 0.3 else b"HTTP/1.1"
    return request(method, target, version, body=rng.choice((b"", BODY)))


def _headers(rng: random.Random) -> bytes:
    chosen = rng.sample(_HEADERS, rng.choice((1, 1, 1, 2, 3)))
    return request(b"POST", CHAT.encode(), b"HTTP/1.1", *chosen)


def _framing(rng: random.Random) -> bytes:
    """The body's length is told twice, wrongly, or in a way that is none."""
    if rng.random() < 0.5:
        told = b"Content-Length: " + rng.choice(_LENGTHS)
    else:
        told = b"Transfer-Encoding: " + rng.choice(_CODINGS)
    return request(b"POST", CHAT.encode(), b"HTTP/1.1", told, body=b"") + BODY


def _chunks(rng: random.Random) -> bytes:
    sizes = tuple(rng.choice(_SIZES) for _ in range(rng.randint(1, 4)))
    return _chunked(sizes, rng.choice((b"12345", BODY, b"", b"\xff" * 5)), rng.choice(_TRAILERS))


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 400)) + rng.choice((b"", b"\r\n\r\n"))


def _pipelined(rng: random.Random) -> bytes:
    """What follows a request is no better."""
    first = request(b"GET", b"/v1/models", body=b"").replace(b"close", b"keep-alive")
    return first * rng.randint(1, 3) + rng.choice((_line, _headers, _noise, _mutated))(rng)


def _mutated(rng: random.Random) -> bytes:
    data = bytearray(_sound(rng))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(_MUTATIONS)(data, rng)
    return bytes(data)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _put(data: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.choice((*_PIECES, rng.randbytes(rng.randint(1, 8))))


def _cut(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    del data[start : start + rng.choice((1, 1, 2, 8, 64))]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    data[start:start] = data[start : start + rng.choice((1, 8, 64))] * rng.randint(1, 4)


def _end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randint(0, len(data)) :]


_MUTATIONS = (_flip, _flip, _put, _put, _cut, _repeat, _end)
_KINDS: tuple[tuple[int, Callable[[random.Random], bytes]], ...] = (
    (8, _mutated), (3, _headers), (2, _line), (2, _framing), (2, _chunks), (1, _pipelined),
    (1, _noise),
)  # fmt: skip


def http_inputs(count: int, seed: int) -> list[bytes]:
    """Bytes to be sent on a connection of their own; no two are the same, and none is nothing."""
    rng = random.Random(seed)
    weights, kinds = zip(*_KINDS, strict=True)
    inputs: dict[bytes, None] = {}
    while len(inputs) < count:
        inputs[rng.choices(kinds, weights)[0](rng) or b"\r\n"] = None
    return list(inputs)
