"""Only the names that this server goes by: a web page whose name was turned to a loopback address must not reach it."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from vlm.serving.errors import error_response


class KnownHosts:
    """Refuses requests whose `Host` is neither an address, `localhost`, nor one of `names`, with 421. Source of the attack: DNS
    rebinding. A request without `Host` comes from no browser."""

    def __init__(self, app: ASGIApp, names: tuple[str, ...]) -> None:
        self.app = app
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")
            if host is not None and not self._known(host):
                said = "this server does not go by the name in Host; start it with --allow-host NAME"
                await error_response(421, said, code="unknown_host", headers={"Connection": "close"})(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _known(self, host: str) -> bool:
        name = host.strip().lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") <= 1:
            name = name.partition(":")[0]
        name = name.rstrip(".")
        return name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    """An address in the URL was typed by somebody: no name was turned to it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
