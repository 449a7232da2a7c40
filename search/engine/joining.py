"""Which cluster is joined, and whose; why it cannot be; that it still answers. Edge file: Ray."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from allocators.core.errors import StudyError
from search import interrupts
from search.engine import surroundings

_PRINTS = "lora-expert-search"
SILENT = 45.0  # seconds without an answer of the head; after a minute Ray's code ends this process without a word
_TOKENS = re.compile(r"InvalidAuthToken|AuthenticationError|[Uu]nauthenticated|auth(entication)? ?token", re.ASCII)


@dataclass(frozen=True)
class Cluster:
    """A cluster that `ray start` began, of which a node runs on this machine."""

    address: str
    user: str


def resolve(address: str) -> tuple[str, str]:
    """The address of the cluster that is meant, and how it was found.

    `auto` is what RAY_ADDRESS names, else the one cluster of which this user has started a node here. A local Ray of
    another program is no cluster: its processes belong to that program.

    Raises StudyError where there is none, more than one, or only another user's.
    """
    if address != "auto":
        return address, "as asked"
    if named := os.environ.get("RAY_ADDRESS"):
        return named, "which RAY_ADDRESS names"
    clusters = [*dict.fromkeys(_on_this_machine())]
    own = [cluster for cluster in clusters if cluster.user == getpass.getuser()]
    if len(own) == 1:
        return own[0].address, "of which you started a node here"
    if own:
        several = " or ".join(f"ray_address={cluster.address}" for cluster in own)
        raise StudyError(f"ray_address=auto is not clear: {len(own)} clusters have a node here; say {several}")
    if clusters:
        others = ", ".join(f"{cluster.address} of {cluster.user}" for cluster in clusters)
        raise StudyError(
            f"ray_address=auto finds only clusters of other users here ({others}): name the address to join one, or "
            "use ray_address=local"
        )
    raise StudyError(
        "ray_address=auto finds no cluster on this machine: start one with 'ray start --head', join one with "
        "'ray start --address=HOST:6379', name its address, or use ray_address=local"
    )


def _on_this_machine() -> Iterator[Cluster]:
    for process in psutil.process_iter(["name", "cmdline", "username"]):
        if process.info["name"] != "raylet":
            continue
        options = dict(re.findall(r"^--([a-z_-]+)=(.*)$", "\n".join(process.info["cmdline"] or []), re.MULTILINE))
        if "gcs-address" in options and not _is_of_a_program(options.get("session-name", "")):
            yield Cluster(options["gcs-address"], process.info["username"] or "somebody")


def _is_of_a_program(session: str) -> bool:
    """Whether the program that began this session runs on, and is not `ray start`, which ends or waits (--block)."""
    with contextlib.suppress(psutil.Error, ValueError):
        return "start" not in psutil.Process(int(session.rpartition("_")[2])).cmdline()
    return False


def check_token(address: str) -> None:
    """Raises StudyError where the cluster asks for a token that this machine lacks: `ray.init` would try for long, and
    then say only that it could not connect.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address)
    except AuthenticationError as error:
        raise why_not(address, error) from None
    except Exception:  # noqa: S110  # whatever else it is, `ray.init` meets it too
        pass


def why_not(address: str, error: Exception) -> StudyError:
    """Why a cluster could not be joined, in one line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _TOKENS.search(str(error)) or _TOKENS.search(type(error).__name__):
        return StudyError(
            f"the cluster at {address} refuses this machine's token ({reason}): Ray writes one into the home folder "
            "(~/.ray/auth_token) when a local Ray starts, and 'ray start' then asks everybody for it; copy that file "
            "to all machines and set RAY_AUTH_MODE=token there, or set RAY_AUTH_MODE=disabled on all of them and start "
            "the cluster anew"
        )
    return StudyError(
        f"ray_address={address} does not answer ({reason}): start a cluster with 'ray start --head', or use "
        "ray_address=local"
    )


def describe(how: str) -> str:
    """The cluster that this process has joined, in one line."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total: Mapping[str, float] = ray.cluster_resources()
    count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    return (
        f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}, {how}: {count}, "
        f"{total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU"
    )


def keep_prints(folder: Path) -> None:
    """Writes what workers print on any node into this folder, a file a process, instead of the driver's terminal."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as streams

    def write(data: Mapping[str, Any]) -> None:
        process = re.sub(r"[^A-Za-z0-9.:]", "_", f"{data.get('ip')}-{data.get('pid')}")
        end = "err" if data.get("is_err") else "out"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{process}.{end}").open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in data.get("lines", ()))

    streams.remove_handler("ray_print_logs")
    streams.add_handler(_PRINTS, write)


def drop_prints() -> None:
    """Ends `keep_prints`."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as streams

    streams.remove_handler(_PRINTS)


def watch_head(closing: threading.Event, *, goes_on: str) -> None:
    """Ends the study where the head of the cluster, or the raylet of this node, does not answer any more.

    goes_on   what becomes of the study, for the message
    """
    head, last = ray.get_runtime_context().gcs_address, time.monotonic()
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    while not closing.wait(1.0):
        if surroundings.answers(head):
            last = time.monotonic()
        if not surroundings.answers(raylet) and not surroundings.answers(raylet) and not closing.wait(0.2):
            interrupts.fail(StudyError(f"this node left the cluster: its raylet ended; {goes_on}"))
            return
        if time.monotonic() - last > SILENT and not closing.is_set():
            interrupts.fail(
                StudyError(f"the head of the cluster, {head}, is lost ({SILENT:.0f} s without an answer): {goes_on}")
            )
            return
