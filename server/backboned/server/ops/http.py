"""The HTTP port: metrics for Prometheus, and health for whoever starts and stops the daemon."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from backboned.server.listening import listen
from backboned.server.troubles import Troubles

NotReadyReason = Callable[[], str | None]
"""Why the daemon isn't ready to serve, in a line, or None when it is. Called in the event loop: it must not block."""

MOST_MESSAGES = 20
"""Of a kind of trouble, that `/health` shows."""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Backboned</title>
<style>body { font: 1rem/1.6 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }</style>
<h1>Backboned</h1>
<p>One frozen backbone, a thousand fine-tuned heads. Models are trained and called over gRPC; this port tells how it
goes.</p>
<ul>
<li><a href="/metrics">/metrics</a> what Prometheus scrapes</li>
<li><a href="/healthz">/healthz</a> 200 while the process is alive</li>
<li><a href="/readyz">/readyz</a> 200 when it can answer calls, 503 with the reason when it can't</li>
<li><a href="/health">/health</a> what is wrong now, and mends by itself, as JSON</li>
</ul>
"""


def application(registry: CollectorRegistry, not_ready_reason: NotReadyReason, troubles: Troubles) -> Starlette:
    """The pages of the HTTP port: `/`, `/metrics`, `/healthz`, `/readyz` and `/health`."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(await run_in_threadpool(encode, registry), media_type=content_type)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(_: Request) -> Response:
        reason = not_ready_reason()
        lines = [reason or "ready", *(f"trouble with {trouble.text}" for trouble in troubles.now())]
        text = "".join(f"{' '.join(line.split())}\n" for line in lines)
        return PlainTextResponse(text, status_code=200 if reason is None else 503)

    async def health(_: Request) -> Response:
        reason, now = not_ready_reason(), troubles.now()
        found = [
            {
                "kind": trouble.kind.value,
                "messages": list(trouble.messages[:MOST_MESSAGES]),
                "count": len(trouble.messages),
                "since": datetime.fromtimestamp(trouble.since, UTC).isoformat(timespec="seconds"),
            }
            for trouble in now
        ]
        return JSONResponse({"ready": reason is None, "reason": reason or "", "troubles": found})

    async def index(_: Request) -> Response:
        return HTMLResponse(_PAGE)

    pages = {"/": index, "/metrics": metrics, "/healthz": healthz, "/readyz": readyz, "/health": health}
    return Starlette(routes=[Route(path, page) for path, page in pages.items()])


class HttpServer:
    """Serves an application in the running event loop. It touches no signal handlers and logs no requests.

    Started and stopped once, from the loop that it runs in.
    """

    def __init__(self, app: Starlette) -> None:
        config = uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen on `host` and `port` (0: a free one); returns the address that it got. Raises `OSError`."""
        listener = listen(host, port, "HTTP")
        address: tuple[str, int] = listener.getsockname()[:2]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        return address

    async def stop(self) -> None:
        """Close the port; a request that is under way has a second to end."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._serving = None


class _Server(uvicorn.Server):
    """A server inside a process that has its own handling of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon."""
        yield
