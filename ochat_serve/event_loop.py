"""uvloop's event loop, with TLS that waits for nobody."""

from typing import Any

import uvloop

# uvicorn hands neither of them on.  Without them a client that says nothing would hold a
# connection for a minute, and one that does not say goodbye would hold up the server's end for
# half of one: clients with idle connections do not read.
TLS_TIMEOUTS_S = {"ssl_handshake_timeout": 10, "ssl_shutdown_timeout": 3}


class EventLoop(uvloop.Loop):
    """For ``uvicorn.Config(loop=...)``."""

    async def create_server(self, *args: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options |= TLS_TIMEOUTS_S
        return await super().create_server(*args, **options)
