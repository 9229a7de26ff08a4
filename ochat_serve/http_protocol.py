"""uvicorn's HTTP parser, with OpenAI's body where bytes are no HTTP.

h11 rather than httptools: with httptools a body is lost after ``Upgrade: h2c`` (curl --http2,
Java's client), a pipelined request keeps an abandoned one running, headers have no bound, and
bad bytes are answered inside a running stream.  Per event sent, the two cost the same.
"""

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ochat_serve.errors import InvalidRequest


class HttpProtocol(H11Protocol):
    """For ``uvicorn.Config(http=...)``."""

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(InvalidRequest(f"This is not HTTP as expected: {msg}").body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
