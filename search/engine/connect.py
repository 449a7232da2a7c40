"""A local Ray, or a cluster that is joined: how it starts, and that it is still there. Edge file: Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from allocators.core.errors import StudyError
from search import interrupts
from search.engine import joining, surroundings

NAMESPACE = "lora-expert-search"  # of the job queue's actor
_UNDERTAKER = """
import os, re, signal, sys, time
sys.stdin.read()
ours = re.compile("/session_[0-9_-]+_" + sys.argv[1] + "/")
for _ in range(50):
    left = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            files = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
            if any(map(ours.search, files)) and int(pid) != int(sys.argv[1]):
                left += 1
                os.kill(int(pid), signal.SIGKILL)
        except OSError:
            pass
    if not left:
        break
    time.sleep(0.1)
"""
_undertaker: subprocess.Popen[bytes] | None = None
GOES_ON = "what was finished is kept, and the same command goes on"


def connect(address: str, *, num_cpus: int = 0, logs: Path | None = None) -> str:
    """Starts a local Ray or joins a cluster, unless this process did so before; says which cluster, in one line.

    logs   a folder for what workers of a cluster print; those of a local Ray have their logs on this machine

    Raises StudyError when the address does not answer, or no Ray can be started here.
    """
    if ray.is_initialized():
        return ""
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": True}
    how, where = "", address
    if address == "local":
        surroundings.check()
        options |= {"include_dashboard": False, "num_cpus": num_cpus or None, "_plasma_directory": surroundings.store()}
    else:
        where, how = joining.resolve(address)
        options["log_to_driver"] = logs is not None
        if not where.startswith("ray://"):
            if not surroundings.answers(where):
                raise joining.why_not(where, ConnectionError("nothing listens there"))
            joining.check_token(where)
    logging.getLogger("ray").setLevel(logging.ERROR)  # before: it warns that the handler of SIGTERM stays ours
    try:
        if address == "local":
            _bury_with_us()
        _beside(lambda: ray.init(address=where, logging_level=logging.ERROR, **options))
        interrupts.install()
    except Exception as error:  # a node that takes too long to start raises no narrower class
        if address != "local":
            raise joining.why_not(where, error) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StudyError(f"Ray cannot be started here ({reason}): is the machine out of memory or busy?") from None
    if not how:
        return ""
    if logs is not None:
        joining.keep_prints(logs)
    return joining.describe(how)


def disconnect() -> None:
    """Ends the local Ray, or leaves the cluster."""
    global _undertaker
    ray.shutdown()
    joining.drop_prints()
    if _undertaker is not None and _undertaker.stdin is not None:
        _undertaker.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a Ray that this process starts next is none of its own
            _undertaker.wait(10.0)
    _undertaker = None


def _bury_with_us() -> None:
    """Starts a process that ends all of a local Ray's when this one is gone, however it ended (Linux).

    Some of them would look after a dead one for half a minute. They are known by their log files, which lie in a folder
    that has the number of this process in its name.
    """
    global _undertaker
    if Path("/proc/self/fd").exists():
        _undertaker = subprocess.Popen(  # noqa: S603  # our own text
            [sys.executable, "-I", "-S", "-c", _UNDERTAKER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for us
        )


def _beside(work: Callable[[], Any]) -> None:
    """Does it in a thread that then lives as long as this process, while the main thread can be interrupted.

    Linux ends the processes of a local Ray together with the thread that started them.
    """
    done, errors = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)
        done.set()
        threading.Event().wait()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(0.2):
        pass
    if errors:
        raise errors[0]


def watch_ray(closing: threading.Event) -> None:
    """Ends the study where a process of the local Ray dies that all others need.

    Ray's code in this process ends it a few seconds later.
    """
    names = {"raylet": "raylet (this node)", "gcs_server": "GCS (the cluster's memory)"}
    needed = {child: names[name] for child in psutil.Process().children() if (name := _name(child)) in names}
    while not closing.wait(0.5):
        for process, name in needed.items():
            if not _is_alive(process) and not closing.wait(0.2):
                logs = _logs()
                interrupts.fail(StudyError(f"Ray died: its {name} ended; its logs are in {logs}; {GOES_ON}"))
                return


def _logs() -> str:
    node = ray._private.worker._global_node
    return str(node.get_logs_dir_path()) if node is not None else "its temporary folder"


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
