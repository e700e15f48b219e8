"""A real uvicorn on a loopback port, in a thread of the test process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from vlm.runtime.embedder import Embedder
from vlm.serving import ServerSettings, create_app
from vlm.serving.server import bind, config_of


@contextlib.contextmanager
def running(embedder: Embedder, *, api_keys: tuple[str, ...] = (), ready: bool = True, **settings) -> Iterator[str]:
    """The address of a server with these settings; it is stopped, and must stop, at the end."""
    listener = bind("127.0.0.1", 0)
    chosen = ServerSettings(**{"drain_seconds": 10} | settings)
    server = uvicorn.Server(config_of(create_app(embedder, chosen, api_keys=api_keys), chosen, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        for _ in range(400):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health/{'ready' if ready else 'live'}", timeout=5).status_code == 200:
                    break
            time.sleep(0.025)
        else:
            raise AssertionError("the server did not become ready")
        yield address
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        listener.close()
