"""Studies in a browser while they run, side by side, and orders to their drivers. Standard library alone.

    serving = Serving([Path("studies/a"), Path("studies/b")], token="…")
    server = listen(serving, host="127.0.0.1", port=0); server.serve_forever()

GET  /TOKEN/              the studies side by side; of one study its page
GET  /TOKEN/N/            the page of study N
GET  /TOKEN/N/state       {"stamp": …}: another one than the page's where there is something new
POST /TOKEN/N/order       an order as JSON (`search/records/orders.py`); answers {"answer": …}

Nobody else may read or order: it listens on loopback unless asked otherwise, every address begins with a token of this
process, requests under another host name are refused (a foreign page whose name was pointed at this machine), and an
order has to come from a page of this server, as JSON. Nothing but the pages is handed out, and a study folder is only
read, but for orders.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import logging
import re
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from allocators.core.errors import StudyError, one_line
from search.records import LINES
from search.records.files import LOCK, inside
from search.records.following import Following
from search.records.orders import LARGEST, Order, give
from search.records.redact import redacted
from search.report import Report
from search.report.page import FOLDER as PAGE
from search.report.page import Live, filled
from search.serve.beside import beside

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RefusedError(Exception):
    """A request that is not answered, and how it is told so."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class Serving:
    """The studies that are served.

    token        what every address begins with
    hosts        names, besides those of loopback, that requests may be under
    everywhere   requests may be under every number (IP address) as well: it listens on all that this machine has
    """

    folders: Sequence[Path]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    hosts: tuple[str, ...] = ()
    everywhere: bool = False

    def __post_init__(self) -> None:
        self._made: dict[int, tuple[str, str]] = {}  # study -> the stamp and the page of it
        self._following = [Following(folder, torn=True, say=log.warning) for folder in self.folders]
        self._lock = threading.Lock()

    def stamp(self, number: int) -> str:
        """Changes with the study's records, and where its driver comes or goes. Raises StudyError without a study."""
        folder = self.folders[number]
        try:
            lines = inside(folder, LINES).stat()
        except OSError as error:
            raise StudyError(f"{folder} cannot be read ({error.strerror})") from None
        return f"{lines.st_size}-{lines.st_mtime_ns}-{int(is_running(folder))}"

    def page(self, number: int) -> str:
        """The page of a study; made again where its records have changed. Raises StudyError without a study."""
        with self._lock:
            stamp = self.stamp(number)
            if self._made.get(number, ("", ""))[0] != stamp:
                live = Live(runs=is_running(self.folders[number]), served=True)
                several = "true" if len(self.folders) > 1 else "false"
                script = (HERE / "serve.js").read_text(encoding="utf-8").replace("STAMP", stamp)
                page = Report(self._following[number].read()).served_page(
                    live, script=script.replace("SEVERAL", several)
                )
                self._made[number] = stamp, page
            return self._made[number][1]

    def overview(self) -> str:
        """All studies side by side."""
        script = "".join(path.read_text(encoding="utf-8") for path in (PAGE / "draw.js", HERE / "overview.js"))
        with self._lock:
            return filled("Studies side by side", beside(self._following), script)

    def order(self, number: int, body: bytes) -> str:
        """Hands an order on to the study's driver. Raises StudyError where there is none, ValueError for no order."""
        try:
            order = Order.from_json(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(one_line(str(error))[:200]) from None
        if not is_running(self.folders[number]):
            raise StudyError("no driver is at work on this study: run its command again, then ask")
        give(self.folders[number], order)
        return "asked; the driver answers at its next look, when a training reports or begins"


def is_running(folder: Path) -> bool:
    """Whether a driver holds the study's lock. A driver with `lock=false` cannot be seen."""
    try:
        with inside(folder, LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, StudyError):
        return False
    return False


class Handler(BaseHTTPRequestHandler):
    """One request. `serving` is set by `listen`."""

    serving: Serving
    timeout = 20
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Pages and stamps."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Orders."""
        self._answer(self._post)

    def _answer(self, make: Callable[[list[str]], tuple[str, str]]) -> None:
        try:
            self._check_host()
            kind, text = make(self._place())
            self._send(HTTPStatus.OK, kind, text)
        except RefusedError as error:
            self.close_connection = True  # its body was not read
            self._send(error.status, "text/plain", str(error))
        except StudyError as error:
            self._send(HTTPStatus.CONFLICT, "text/plain", str(redacted(str(error))))

    def _check_host(self) -> None:
        """Refuses other names than those that this server has: a foreign page may have pointed its own name here."""
        named = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        known = named in (*(host.strip("[]") for host in LOOPBACK), *self.serving.hosts)
        if not known and not (self.serving.everywhere and is_address(named)):
            raise RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "this server has another name")

    def _place(self) -> list[str]:
        """The parts of the address after the token."""
        token, *parts = urlsplit(self.path).path.strip("/").split("/")
        if not compare_digest(token.encode(), self.serving.token.encode()):
            raise RefusedError(HTTPStatus.NOT_FOUND, "open the address that search.serve has printed")
        return parts

    def _number(self, parts: list[str]) -> int:
        if parts and re.fullmatch("[0-9]{1,6}", parts[0]) and int(parts[0]) < len(self.serving.folders):
            return int(parts[0])
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such study")

    def _get(self, parts: list[str]) -> tuple[str, str]:
        if not parts and len(self.serving.folders) > 1:
            return "text/html", self.serving.overview()
        match parts or ["0"]:
            case [_]:
                return "text/html", self.serving.page(self._number(parts or ["0"]))
            case [_, "state"]:
                return "application/json", json.dumps({"stamp": self.serving.stamp(self._number(parts))})
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such page")

    def _post(self, parts: list[str]) -> tuple[str, str]:
        if parts[1:] != ["order"]:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such page")
        number = self._number(parts)
        origin = self.headers.get("Origin")
        if origin != f"http://{self.headers.get('Host')}" or self.headers.get("Sec-Fetch-Site", "same-origin") != (
            "same-origin"
        ):
            raise RefusedError(HTTPStatus.FORBIDDEN, "orders come from a page of this server")
        if self.headers.get("Content-Type") != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an order is JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length[:9]) <= LARGEST):
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an order has at most {LARGEST} bytes")
        try:
            answer = self.serving.order(number, self.rfile.read(int(length)))
        except ValueError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from None
        return "application/json", json.dumps({"answer": answer})

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the addresses hold the token."""

    def version_string(self) -> str:
        """What answers, without versions."""
        return "search.serve"


class Server(ThreadingHTTPServer):
    """Answers requests side by side; a reader that goes away is no error."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is printed: whoever asked sees the broken answer."""


class _Server6(Server):
    address_family = socket.AF_INET6


def listen(serving: Serving, *, host: str, port: int) -> Server:
    """A server, which does not answer before `serve_forever`. Raises StudyError for a port or a host that it cannot."""
    kind = _Server6 if ":" in host else Server
    try:
        return kind((host, port), type("Handler", (Handler,), {"serving": serving}))
    except OSError as error:
        raise StudyError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another port=, or a host= of this machine"
        ) from None


def is_address(host: str) -> bool:
    """Whether it is the number of a machine, and no name, which somebody else could point at this one."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
