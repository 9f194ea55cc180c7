"""Voila's settings for our dashboards; `lm.ui.widgets.voila_command` points to this folder."""

import logging
import os
import resource
import time
from pathlib import Path

from jupyter_core.paths import jupyter_path
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate
from tornado.web import HTTPError
from tornado.websocket import WebSocketClosedError

# Jupyter looks here first: our page template, and a python3 kernel without a history file (many
# kernels at once would print 'database is locked' into the pages).
here = str(Path(__file__).resolve().parent / "jupyter")
os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [here, os.environ.get("JUPYTER_PATH")]))

c = get_config()  # noqa: F821
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
    """Not what a kernel still says to a page that was closed."""
    return not isinstance((record.exc_info or (None, None))[1], WebSocketClosedError)


logging.getLogger("asyncio").addFilter(is_news)

# Only what the panels draw with: others cost seconds, and some fail outside JupyterLab.
c.VoilaConfiguration.extension_allowlist = [
    "@voila-dashboards/widgets-manager8",
    "@jupyter-widgets/jupyterlab-manager",
    "jupyterlab-plotly",
]

# The library that draws charts is most of what a page loads: it comes while the kernel still works.
found = (Path(path) / "jupyterlab-plotly" / "static" for path in jupyter_path("labextensions"))
files = [file for folder in found for file in folder.glob("*.js")]
largest = sorted(files, key=lambda file: file.stat().st_size)[-1:]
early = [f"labextensions/jupyterlab-plotly/static/{file.name}" for file in largest]
c.VoilaConfiguration.resources = {"early": early}

# A closing tab tells Voila to end its kernel, but without the token against cross-site requests, so
# that the check would refuse it and kernels would pile up. Without the check another page in the same
# browser could post to this server too; all it could do is end a kernel whose random id it knows.
# Nothing else here listens to a POST, the kernels' web sockets keep their check of origin, and the
# server answers on localhost only unless a token is set.
#
# Without a token only requests for this machine by its own name are answered, so that a foreign name
# that somebody points here (DNS rebinding) finds nothing. Names under which a proxy shows the pages are
# declared (`lm dashboards --allow-host`); then no other name is answered, with a token either.
token = os.environ.get("LM_DASHBOARD_TOKEN", "")
names = [name.strip() for name in os.environ.get("LM_ALLOW_HOSTS", "").split(",") if name.strip()]
c.Voila.token = token
c.Voila.tornado_settings = {
    "disable_check_xsrf": True,
    "allow_remote_access": bool(token) and not names,
    "local_hostnames": ["localhost", *names],
    # A file that is too large shall be refused with a sentence: longer messages cut the connection.
    "websocket_max_message_size": 64 * 2**20,
}



class Begun(HTTPMessageDelegate):
    """A request as Voila handles it, which says when its headers are there."""

    def __init__(self, inner, begun):
        self.inner, self.begun = inner, begun
        self.data_received, self.finish = inner.data_received, inner.finish
        self.on_connection_close = inner.on_connection_close

    def headers_received(self, start_line, headers):
        self.begun()
        return self.inner.headers_received(start_line, headers)


class Connections(HTTPServer):
    """At most so many requests and idle connections: the one that waits longest makes room.

    Web sockets are no longer counted once they are open, which takes the token."""

    most = 300

    def initialize(self, *given, **named):
        super().initialize(*given, **named)
        self.waiting = {}  # In the order in which they began to wait

    def handle_stream(self, stream, address):
        if len(self._connections) >= self.most:
            longest = next(iter(self.waiting), None)
            if longest is None:
                return stream.close()
            del self.waiting[longest]
            longest.stream.close()
        super().handle_stream(stream, address)

    def start_request(self, server_conn, request_conn):
        self.waiting.pop(server_conn, None)
        self.waiting[server_conn] = True
        inner = super().start_request(server_conn, request_conn)
        return Begun(inner, lambda: self.waiting.pop(server_conn, None))

    def on_close(self, server_conn):
        self.waiting.pop(server_conn, None)
        super().on_close(server_conn)


# Seconds, and bytes: a head, the wait between two requests, a body; nothing here takes long bodies.
limits = {"idle_connection_timeout": 60.0, "body_timeout": 30.0}
limits |= {"max_header_size": 32 * 1024, "max_body_size": 2**20}
HTTPServer.configure(Connections, **limits)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Kernels(AsyncMappingKernelManager):
    """A kernel ends 20 seconds after its page has gone, whatever it is doing.

    Jupyter's own rule waits for a kernel that is idle, and ours never are: they follow the service. It
    would also end a kernel that was started ahead in the moment when somebody opens its page."""

    most = int(os.environ.get("LM_PAGES", "") or 30)  # Of about 300 MB each

    async def start_kernel(self, **named):
        """One more page, where there is room."""
        if len(self.list_kernel_ids()) >= self.most:
            why = f"{self.most} pages are open or wait to be: close some, or set LM_PAGES"
            raise HTTPError(503, why, reason="Too many pages are open")
        return await super().start_kernel(**named)

    left: dict[str, tuple[float, float]] = {}  # Kernel -> since when without a page, and its patience

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """Look at one kernel; Voila itself keeps those that still wait for a page."""
        if self._kernel_connections.get(kernel_id, 0):
            self.left[kernel_id] = (0.0, 20.0)
            return
        since, patience = self.left.get(kernel_id, (0.0, 120.0))  # A page may take long to load
        since = since or time.monotonic()
        self.left[kernel_id] = (since, patience)
        if time.monotonic() - since >= patience:
            del self.left[kernel_id]
            await self.shutdown_kernel(kernel_id)


# A kernel of each page is started ahead, with everything imported, and waits: see `lm.ui.widgets.opened`.
c.VoilaConfiguration.multi_kernel_manager_class = Kernels
c.VoilaConfiguration.preheat_kernel = os.environ.get("LM_AHEAD", "1") != "0"
c.VoilaConfiguration.default_pool_size = 1
c.VoilaKernelManager.fill_delay = 4.0  # The next one starts when this page is there
c.MappingKernelManager.cull_idle_timeout = 20
c.MappingKernelManager.cull_interval = 5
