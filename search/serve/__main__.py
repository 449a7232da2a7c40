"""The command: shows studies in a browser while they run, and hands orders on to their drivers.

    python -m search.serve studies/sieve-tiny-moe-default
    python -m search.serve studies/one studies/other port=8765

It listens on loopback: from another machine, forward the port (ssh -L 8765:127.0.0.1:8765 HOST).
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allocators.core import words
from allocators.core.errors import StudyError, ToolkitError
from search.records.header import read_header
from search.records.redact import redacted
from search.serve import Serving, listen
from trainers import command

EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 (only where it is asked for)


@dataclass(frozen=True)
class Request:
    """Where it listens."""

    port: int = words.key(8765, "port of the pages (0: any that is free)", least=0, most=65535)
    host: str = words.key(
        "127.0.0.1",
        "address to listen on; another than loopback lets everybody who can reach it and knows the printed token read "
        "and order, unencrypted",
    )


def parse(given: Sequence[str]) -> tuple[list[Path], Request]:
    """The folders and where to listen. Raises StudyError for words that are neither."""
    bare, pairs = words.split(given)
    if not bare:
        raise StudyError("give the folder of a study: python -m search.serve STUDY")
    return [Path(word) for word in bare], words.build(Request, pairs)


def _serving(folders: Sequence[Path], host: str) -> tuple[Serving, str]:
    """What is served, and the name that the printed address has: of all addresses of a machine the machine's own."""
    named = host.lower()
    if named in ("127.0.0.1", "localhost"):
        return Serving(folders), "127.0.0.1"
    if named in EVERYWHERE:
        own = socket.gethostname().lower()
        return Serving(folders, hosts=(own,), everywhere=True), own
    return Serving(folders, hosts=(named,)), f"[{named}]" if ":" in named else named


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 ended by Ctrl-C, 2 there is no study in a folder, or the port is taken."""
    given = list(sys.argv[1:] if argv is None else argv)
    if words.asks_for_help(given):
        print("usage: python -m search.serve STUDY... [key=value ...]", "", *words.help_of(Request), sep="\n")
        return 0
    try:
        folders, request = parse(given)
        for folder in folders:
            read_header(folder)
        serving, name = _serving(folders, request.host)
        server = listen(serving, host=request.host, port=request.port)
    except ToolkitError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 2
    print(f"Open http://{name}:{server.server_address[1]}/{serving.token}/   (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
