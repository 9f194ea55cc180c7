"""Voila's settings for the dashboards; `lm.ui.server.voila_command` points to this folder."""

import logging
import os
import resource
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jupyter_core.paths import jupyter_path
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.http1connection import HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream
from tornado.web import HTTPError
from tornado.websocket import WebSocketClosedError

if TYPE_CHECKING:
    from traitlets.config import Config

    def get_config() -> Config:
        """The settings under way; traitlets provides it where it runs this file."""


# Jupyter looks here first: our page template, and a python3 kernel without a history file (many
# kernels at once would print 'database is locked' into the pages).
here = str(Path(__file__).resolve().parent / "jupyter")
os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [here, os.environ.get("JUPYTER_PATH")]))

c = get_config()
c.VoilaConfiguration.template = "learning_machine"
c.VoilaConfiguration.theme = "light"
c.VoilaConfiguration.allow_template_override = "NO"
c.VoilaConfiguration.allow_theme_override = "NO"
c.VoilaConfiguration.classic_tree = True
c.VoilaConfiguration.show_tracebacks = False
c.Voila.open_browser = False


def is_news(
    record: logging.LogRecord,  # Of asyncio
) -> bool:
    """Whether to log it: a kernel that writes to a closed page is no news."""
    return not isinstance((record.exc_info or (None, None))[1], WebSocketClosedError)


logging.getLogger("asyncio").addFilter(is_news)

# Only what the panels draw with: others cost seconds, and some fail outside JupyterLab.
c.VoilaConfiguration.extension_allowlist = [
    "@voila-dashboards/widgets-manager8",
    "@jupyter-widgets/jupyterlab-manager",
    "jupyterlab-plotly",
]

# The library that draws charts is most of what a page loads: it loads while the kernel still works.
folders = (Path(path) / "jupyterlab-plotly" / "static" for path in jupyter_path("labextensions"))
files = [file for folder in folders for file in folder.glob("*.js")]
largest = sorted(files, key=lambda file: file.stat().st_size)[-1:]
early = [f"labextensions/jupyterlab-plotly/static/{file.name}" for file in largest]
c.VoilaConfiguration.resources = {"early": early}

# A closing tab asks Voila to end its kernel, but without the token against cross-site requests. The
# check would refuse the request, and kernels would pile up. Without the check, another page in the same
# browser could post to this server too. All it could do is end a kernel whose random id it knows:
# no other route here takes a POST, the kernels' web sockets check the origin, and the server answers on
# localhost only unless a token is set.
#
# Without a token, the server answers only requests to this machine's own name. A foreign name that
# points here (DNS rebinding) gets no answer. Names under which a proxy shows the pages are declared
# (`lm dashboards --allow-host`); then no other name is answered, with a token either.
token = os.environ.get("LM_DASHBOARD_TOKEN", "")
names = [name.strip() for name in os.environ.get("LM_ALLOW_HOSTS", "").split(",") if name.strip()]
c.Voila.token = token
c.Voila.tornado_settings = {
    "disable_check_xsrf": True,
    "allow_remote_access": bool(token) and not names,
    "local_hostnames": ["localhost", *names],
    # The page rejects a file that is too large with a message; a longer message cuts the connection.
    "websocket_max_message_size": 64 * 2**20,
}


class HeadersSeen(HTTPMessageDelegate):
    """A request as Voila handles it; reports that its headers have arrived."""

    def __init__(self, inner: HTTPMessageDelegate, report: Callable[[], object]) -> None:
        """Nothing has arrived."""
        self.inner, self.report = inner, report

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        """Report, and pass on."""
        self.report()
        return self.inner.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Pass on."""
        return self.inner.data_received(chunk)

    def finish(self) -> None:
        """Pass on."""
        self.inner.finish()

    def on_connection_close(self) -> None:
        """Pass on."""
        self.inner.on_connection_close()


class LimitedServer(HTTPServer):
    """At most so many requests and idle connections: the one that waits longest makes room.

    An open web socket, which needs the token, does not count."""

    most = 300
    waiting: dict[object, None]  # Connections in the order in which they began to wait

    def initialize(self, *args: Any, **named: Any) -> None:
        """As tornado's server. No connection waits."""
        super().initialize(*args, **named)
        self.waiting = {}

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        """Take a connection; where there are too many, close the one that waits longest."""
        if len(self._connections) >= self.most:
            longest = next(iter(self.waiting), None)
            if longest is None:
                return stream.close()
            del self.waiting[longest]
            cast(HTTP1ServerConnection, longest).stream.close()
        super().handle_stream(stream, address)

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        """Wait for the headers of the next request."""
        self.waiting.pop(server_conn, None)
        self.waiting[server_conn] = None
        inner = super().start_request(server_conn, request_conn)
        return HeadersSeen(inner, lambda: self.waiting.pop(server_conn, None))

    def on_close(self, server_conn: object) -> None:
        """Forget the connection."""
        self.waiting.pop(server_conn, None)
        super().on_close(server_conn)


# In seconds and bytes. No route here takes long bodies.
limits = {"idle_connection_timeout": 60.0, "body_timeout": 30.0}
limits |= {"max_header_size": 32 * 1024, "max_body_size": 2**20}
HTTPServer.configure(LimitedServer, **limits)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
files_open = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
if soft != resource.RLIM_INFINITY and soft < files_open:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_open, hard))


class PageKernels(AsyncMappingKernelManager):
    """A kernel ends 20 seconds after its page is closed, busy or not.

    Jupyter's own rule waits until a kernel is idle, and a page's kernel never is: it follows the service.
    It would also end a preheated kernel in the moment when a person opens its page."""

    most = int(os.environ.get("LM_PAGES", "") or 30)  # Of about 300 MB each

    async def start_kernel(self, *args: Any, **named: Any) -> str:  # type: ignore[override]  # Async
        """Start a kernel for one more page. Raises `HTTPError` where too many are open."""
        if len(self.list_kernel_ids()) >= self.most:
            why = f"{self.most} pages are open or preheated: close some, or set LM_PAGES"
            raise HTTPError(503, why, reason="Too many pages are open")
        return await super().start_kernel(*args, **named)

    left: dict[str, tuple[float, float]] = {}  # By kernel: without a page since, and for how long

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """End a kernel without a page; Voila excludes those that wait for one."""
        if self._kernel_connections.get(kernel_id, 0):
            self.left[kernel_id] = (0.0, 20.0)
            return
        since, patience = self.left.get(kernel_id, (0.0, 120.0))  # A page may take long to load
        since = since or time.monotonic()
        self.left[kernel_id] = (since, patience)
        if time.monotonic() - since >= patience:
            del self.left[kernel_id]
            await self.shutdown_kernel(kernel_id)


# One kernel of each page is preheated: it has imported everything and waits (`lm.ui.sign_in.open_page`).
c.VoilaConfiguration.multi_kernel_manager_class = PageKernels
c.VoilaConfiguration.preheat_kernel = os.environ.get("LM_AHEAD", "1") != "0"
c.VoilaConfiguration.default_pool_size = 1
c.VoilaKernelManager.fill_delay = 4.0  # The next one starts when this page is there
c.MappingKernelManager.cull_idle_timeout = 20
c.MappingKernelManager.cull_interval = 5
