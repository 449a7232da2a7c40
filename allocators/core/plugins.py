"""A file is a plug-in: finding, loading and calling allocators and spaces by name. Nothing is registered.

    names("allocators")                            # ['all', 'alphalora', …]: the files of the folder, none is imported
    sieve = load("allocators", "sieve")            # "unknown allocator 'seive': …; did you mean 'sieve'?"
    call(sieve, signal, shape, {"fraction": 0.25}) # an Allocation; a misspelt knob is a StudyError with a suggestion
    add("~/mine/by_magnitude.py")                  # the user's own file, folder or module, on explicit request only

An allocator is a module with

    NEEDS        "routing" | "spectrum" | "sensitivity" | "representation" | None     the signal it reads
    BASE         "moe" | "dense" | "any"                           the models it answers for
    FIXED_COST   bool    True when the number of trainable parameters does not depend on the signal's values
    GIVES        "experts" | "ranks"     what its allocations are about: "ranks" for `ModuleRanks`; may be left out
    allocate(signal, shape, *, knobs…) -> Allocation               a pure function

and a space is a module with `suggest(trial, shape)`. Where a point does not say otherwise, the knob `seed` of an
allocator is the study's seed, and its knob `rank` the rank of the recipe.

A plug-in is somebody's code: whatever it raises or returns becomes one line with its file and line. A space that fails
is a StudyError, since no point comes without it; an allocator that fails is a RuleError of the point that asked it. One
that takes long is let be: a ToolkitWarning says which line it is in.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
import threading
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from allocators.core import words
from allocators.core.errors import (
    InfeasibleError,
    RuleError,
    StudyError,
    ToolkitError,
    ToolkitWarning,
    one_line,
    shown,
    text_of,
    unknown,
)
from allocators.core.types import Allocation, ExpertCounts, ExpertSelection, ModelShape, ModuleRanks, Signal

NEEDS = ("routing", "spectrum", "sensitivity", "representation", None)
BASES = ("moe", "dense", "any")
GIVES = ("experts", "ranks")
PATIENCE = 20.0  # seconds after which a plug-in's code is said to take long; it may do so for ever
_COMMANDS = ("show",)  # files of a plug-in folder that are commands, not plug-ins
_ENTRY = {"allocators": "allocate", "spaces": "suggest"}
_PLACE = Path(__file__).resolve().parents[2]  # where the folders of plug-ins are: a name may be another distribution's
_imported: dict[tuple[str, str], ModuleType] = {}
_added: dict[str, dict[str, ModuleType]] = {folder: {} for folder in _ENTRY}


def names(folder_package: str) -> list[str]:
    """Names of the plug-ins of a folder, sorted, added ones included; imports none of them.

    A trailing underscore keeps a file from shadowing Python's own names and is no part of the plug-in's name:
    `random_.py` is `random`.
    """
    return sorted({*_files(folder_package), *_added.get(folder_package, {})})


def load(folder_package: str, name: str, what: str = "allocator") -> ModuleType:
    """The plug-in's module. Raises StudyError with what is possible, and what was probably meant."""
    added = _added.get(folder_package, {})
    if name in added:
        return added[name]
    if (folder_package, name) not in _imported:  # a search asks for the same few thousands of times
        files = _files(folder_package)
        if name not in files:
            raise unknown(what, name, names(folder_package))
        _imported[folder_package, name] = importlib.import_module(f"{_package(folder_package)}.{files[name]}")
    return _imported[folder_package, name]


def add(path_or_module: str) -> list[str]:
    """Adds the user's plug-ins: a Python file, a folder of such files, or the name of an importable module.

    This runs the user's code, so it happens only where the user asked for it. A file that defines `allocate` becomes
    an allocator, one that defines `suggest` a space, named by its stem. Returns the names added.

    Raises StudyError where nothing is found, a file fails to import or is no plug-in, or a name is taken.
    """
    path = words.path(path_or_module, "plugins")
    if path.is_dir():
        files = sorted(f for f in path.glob("*.py") if not f.name.startswith("_"))
        if not files:
            raise StudyError(f"plugins='{path_or_module}': the folder holds no Python file")
        modules = [_import_file(file) for file in files]
    elif path.is_file():
        modules = [_import_file(path)]
    elif path.suffix == ".py" or "/" in path_or_module:
        raise StudyError(f"plugins='{path_or_module}': no such file or folder")
    else:
        modules = [_import_module(path_or_module)]
    return [name for module in modules for name in _adopt(module)]


def knobs_of(module: ModuleType) -> dict[str, Any]:
    """An allocator's knobs and their defaults (`inspect.Parameter.empty` where a knob must be given)."""
    parameters = inspect.signature(module.allocate).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def gives(module: ModuleType) -> str:
    """What its allocations are about: experts, or ranks."""
    given: str = getattr(module, "GIVES", "experts")
    return given


def fits(module: ModuleType, shape: ModelShape) -> bool:
    """Whether the allocator answers for this kind of model."""
    return module.BASE in ("any", "moe" if shape.is_moe else "dense")


def fitting(shape: ModelShape) -> list[str]:
    """Names of the allocators that fit a model."""
    return [name for name in names("allocators") if fits(load("allocators", name), shape)]


def check(module: ModuleType, shape: ModelShape, knobs: Mapping[str, Any]) -> None:
    """Raises StudyError when the model is of the wrong kind, or a knob is unknown or missing; ignores the values."""
    name = plugin_name(module)
    if not fits(module, shape):
        want, have = ("an MoE", "has no routed experts") if module.BASE == "moe" else ("a dense", "is an MoE model")
        raise StudyError(
            f"{name} answers for {want} model, and {shape.name} {have}: choose from {', '.join(fitting(shape))}"
        )
    possible = knobs_of(module)
    for knob in knobs:
        if not possible:
            raise StudyError(f"{name} takes no knobs, got '{knob}'")
        if knob not in possible:
            raise unknown(f"knob of {name}", knob, possible)
    missing = [k for k, default in possible.items() if default is inspect.Parameter.empty and k not in knobs]
    if missing:
        raise StudyError(f"{name} needs a value for {', '.join(missing)}")


def check_values(module: ModuleType, knobs: Mapping[str, Any]) -> None:
    """Raises StudyError for a value that an allocator's annotations rule out: no number, or none of the words."""
    hints, name = _hints(module), plugin_name(module)
    for knob, value in knobs.items():
        hint = hints.get(knob)
        if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
            raise unknown(f"{knob} of {name}", str(value), typing.get_args(hint))
        wanted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        numbers = {int, float}.intersection(wanted)
        if not numbers or {*wanted} - numbers - {types.NoneType} or type(value) in wanted:
            continue
        if float not in numbers or type(value) is not int:
            whole = "" if float in numbers else "whole "
            text = ", a text" if isinstance(value, str) and not isinstance(words.read_value(value), str) else ""
            raise StudyError(f"{knob} of {name} must be a {whole}number, got '{shown(str(value))}'{text}")


@cache
def _hints(module: ModuleType) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(module.allocate)
    except Exception:  # a user's annotations may be there for type checkers only, or be no types at all
        return {}


def call(
    module: ModuleType,
    signal: Signal | None,
    shape: ModelShape,
    knobs: Mapping[str, Any],
    *,
    among: ModelShape | None = None,
) -> Allocation:
    """`module.allocate(signal, shape, **knobs)` behind a door that checks everything but the knobs' values.

    among   the part of the shape that the rule is shown, where it is not the whole

    Raises StudyError as `check` does and when the signal is missing; InfeasibleError (from the allocator) when the
    knobs' values ask for what does not exist, RuleError when its code fails or returns something else.
    """
    check(module, shape, knobs)
    name = plugin_name(module)
    if module.NEEDS is not None and signal is None:
        raise StudyError(f"{name} needs the {module.NEEDS} signal of {shape.name}, and none was measured")
    with failing(module, f"allocator {name}", RuleError):
        allocation = module.allocate(signal, shape if among is None else among, **knobs)
        wanted = ExpertSelection if shape.is_moe else ExpertCounts
        # of these types themselves: a class of the user's could count as it likes
        if isinstance(allocation, wanted | ModuleRanks) and type(allocation) in (wanted, ModuleRanks):
            allocation.check(shape)
            return allocation
    raise RuleError(
        f"allocator {name} returned {returned(allocation)} and not {wanted.__name__}, which "
        f"{'MoE' if shape.is_moe else 'dense'} models need ({place_of(module, module.allocate)})"
    )


@contextmanager
def failing(module: ModuleType, what: str, raised: Callable[[str], ToolkitError]) -> Iterator[None]:
    """Whatever a plug-in's code raises in the block is `raised` with one line: what, why, file and line.

    What this project's own plug-ins raise on purpose passes as it is; of an added one an InfeasibleError stays one.
    """
    try:
        with watched(module.__file__, what):
            yield
    except ToolkitError as error:
        if not _is_added(module) or str(error).startswith(what):  # said already, by a block within this one
            raise
        kind = InfeasibleError if isinstance(error, InfeasibleError) and raised is RuleError else raised
        raise kind(f"{what}: {error} ({_place_in(module, error)})") from error
    except KeyboardInterrupt:  # a signal: no fault of the code
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {_text_of(error)}"
        raise raised(f"{what} failed: {reason} ({_place_in(module, error)})") from error


@contextmanager
def watched(file: str | None, what: str, *, ends: bool = False) -> Iterator[None]:
    """A ToolkitWarning once the block has taken `PATIENCE`, with the plug-in's line that it is in by then.

    ends   the block is ended instead, once it has computed for so long: for what takes no time where it is right

    Raises TimeoutError where it was ended.
    """
    thread = threading.get_ident()
    around = _busy.get(thread)
    _busy[thread] = busy = _Busy(time.monotonic(), file, what, _Clock.of(thread) if ends else None)
    _start_watching()
    if busy.clock is not None:
        busy.rings = _ring()
    try:
        with _undone():
            yield
    except _TooLongError:
        busy.came = True
        raise TimeoutError(f"it has run for {PATIENCE:g} s and was ended") from None
    finally:
        try:
            _leave(thread, around)
            busy.await_end()
        except _TooLongError:  # it came too late
            _leave(thread, around)


def _ring() -> bool:
    """Whether a signal is on its way to this thread, the main one, for when its time may be up.

    A regular expression that looks for ever lets no other thread run, and hears signals alone.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        return False
    if signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL:
        signal.signal(signal.SIGVTALRM, _on_alarm)
    if not _is_ours():  # somebody's profiler
        return False
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE, min(1.0, PATIENCE))
    return True


def _is_ours() -> bool:
    return hasattr(signal, "setitimer") and signal.getsignal(signal.SIGVTALRM) is _on_alarm


def _on_alarm(*_: object) -> None:
    """Ends what the main thread is in, where its time is up."""
    busy = _busy.get(threading.main_thread().ident or 0)
    if busy is not None and busy.clock is not None and busy.is_long and not busy.sent:
        busy.sent = True
        raise _TooLongError


def _leave(thread: int, around: _Busy | None) -> None:
    with _ending:
        if around is None:
            _busy.pop(thread, None)
        else:
            _busy[thread] = around
    if around is None and thread == threading.main_thread().ident and _is_ours():
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)  # Python's last steps hear no signal: it would end the process


class _TooLongError(BaseException):
    """Raised in a thread by the one that watches it; no `except Exception` of somebody's code takes it."""


@dataclass(frozen=True)
class _Clock:
    """What a thread computes from now on: of a busy machine, seconds in which it had no core do not count."""

    thread: int
    number: int | None
    began: float

    @classmethod
    def of(cls, thread: int) -> _Clock:
        """Where the system has no such clock, all seconds count."""
        number = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None
        return cls(thread, number, time.monotonic() if number is None else time.clock_gettime(number))

    @property
    def is_up(self) -> bool:
        return (time.monotonic() if self.number is None else time.clock_gettime(self.number)) - self.began > PATIENCE

    def end(self) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(_TooLongError))


@dataclass(eq=False)
class _Busy:
    """A thread is in somebody's code since then.

    clock   of code that is ended
    rings   a signal ends it
    sent    its end is on its way; `came`: it was there
    """

    since: float
    file: str | None
    what: str
    clock: _Clock | None
    rings: bool = False
    sent: bool = False
    came: bool = False

    @property
    def is_long(self) -> bool:
        return time.monotonic() - self.since > PATIENCE if self.clock is None else self.clock.is_up

    def say(self, thread: int) -> None:
        """That it takes long, and where it is; or its end."""
        if self.clock is not None:
            self.sent = True
            self.clock.end()
            return
        frame, place = sys._current_frames().get(thread), self.file or ""
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        place += f", line {frame.f_lineno}" if frame is not None else ""
        place = f" ({place})" if place else ""
        warnings.warn(f"{self.what} has run for {PATIENCE:.0f} s and goes on{place}", ToolkitWarning, stacklevel=1)

    def await_end(self) -> None:
        """Lets an end come that is on its way. To take it back would leave Python 3.11 looking for it for ever."""
        for _ in range(10**6 if self.sent and not self.came else 0):
            pass


_busy: dict[int, _Busy] = {}  # by thread; a sampler calls rules thousands of times, so that a call starts nothing
_ending = threading.Lock()  # held while a block is ended, or leaves by itself


@cache
def _start_watching() -> None:
    """Starts the one thread that looks at all others, the first time."""
    threading.Thread(target=_watch, name="plug-ins", daemon=True).start()


def _watch() -> None:
    said: set[_Busy] = set()
    while True:
        time.sleep(min(1.0, PATIENCE))
        for thread, busy in list(_busy.items()):
            with _ending:
                if busy not in said and not busy.rings and _busy.get(thread) is busy and busy.is_long:
                    busy.say(thread)
                    said = {busy, *said.intersection(_busy.values())}


@contextmanager
def _undone() -> Iterator[None]:
    """Takes back what a plug-in's code does to its process: to its folder, its streams and its filters of warnings."""
    try:
        folder = os.getcwd()
    except OSError:  # somebody has removed it
        folder = ""
    filters: Any = warnings.filters  # catch_warnings would make a warning that is said once be said at every call
    before, streams = list(filters), (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = sys.stdout or streams[0], sys.stderr or streams[1]
        if filters != before:
            filters[:] = before
        if folder:
            os.chdir(folder)


def returned(value: object) -> str:
    """A value that a plug-in should not have returned, for a message: nothing of it is asked but its class."""
    if isinstance(value, types.CoroutineType):
        value.close()  # else Python says later, in several lines, that nobody awaited it
    return "None" if value is None else f"a value of type {type(value).__name__}"


def place_of(module: ModuleType, function: Any) -> str:
    """File and line of a plug-in's function."""
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
    return f"{_file_of(module)}{f', line {line}' if line else ''}"


def _place_in(module: ModuleType, error: BaseException) -> str:
    """File and last line of the plug-in that led to an error; the file alone where none of its lines was reached."""
    last, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == module.__file__:
            last = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return f"{_file_of(module)}{last}"


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _text_of(error: BaseException) -> str:
    """An error's own text, on one line and not longer than a few."""
    text = one_line(text_of(error))
    return text if len(text) <= 300 else f"{text[:297]}..."


def _is_added(module: ModuleType) -> bool:
    return any(module is other for modules in _added.values() for other in modules.values())


def plugin_name(module: ModuleType) -> str:
    """`random` for the module `allocators.random_`."""
    return module.__name__.rsplit(".", 1)[-1].removesuffix("_")


@cache
def _files(folder_package: str) -> dict[str, str]:
    """Plug-in name -> file stem."""
    files = sorted((_PLACE / folder_package).glob("*.py"))
    stems = [file.stem for file in files if not file.name.startswith("_") and file.stem not in _COMMANDS]
    if _package(folder_package) != folder_package:  # an installer may have put another distribution's files beside ours
        defined = re.compile(rf"^def {_ENTRY[folder_package]}\(", re.MULTILINE)
        stems = [s for s in stems if defined.search((_PLACE / folder_package / f"{s}.py").read_text("utf-8"))]
    return {s.removesuffix("_"): s for s in stems}


@cache
def _package(folder_package: str) -> str:
    """The name that a folder of plug-ins imports by: its own, or one of ours where another distribution has that name.

    Hugging Face's `spaces` is one: installed beside an editable checkout it comes first, and in one site-packages its
    `__init__.py` replaces ours.
    """
    place = _PLACE / folder_package
    try:
        spec = importlib.util.find_spec(folder_package)
    except ValueError:  # a module that somebody made by hand
        spec = None
    door = Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None
    if door == place / "__init__.py" and _ENTRY[folder_package] in door.read_text("utf-8"):
        return folder_package
    package = ModuleType(f"lora_expert_{folder_package}")
    package.__path__ = [str(place)]
    sys.modules[package.__name__] = package
    return package.__name__


def _import_file(path: Path) -> ModuleType:
    name = f"user_plugins.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise StudyError(f"plug-in {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    try:
        with watched(module.__file__, f"importing plug-in {path}"):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's file raises, it is the user's line to read
        sys.modules.pop(name, None)
        place = "" if isinstance(error, SyntaxError) else f" ({_place_in(module, error)})"
        raise StudyError(f"plug-in {path} does not import: {type(error).__name__}: {_text_of(error)}{place}") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as above
        raise StudyError(
            f"plugins='{shown(name)}' does not import: {type(error).__name__}: {_text_of(error)}"
        ) from error


def _adopt(module: ModuleType) -> list[str]:
    where = _file_of(module)
    folders = [folder for folder, entry in _ENTRY.items() if hasattr(module, entry)]
    if not folders:
        raise StudyError(f"plug-in {where} defines neither allocate(signal, shape, …) nor suggest(trial, shape)")
    name = plugin_name(module)
    for folder in folders:
        taken = _added[folder].get(name)
        if name in _files(folder) or (taken is not None and taken.__file__ != where):
            raise StudyError(f"plug-in {where}: the name '{name}' is taken in {folder}: rename the file")
        if folder == "allocators":
            check_allocator(module)
    for folder in folders:
        _added[folder][name] = module
    return [name]


def check_allocator(module: ModuleType) -> None:
    """Raises StudyError where a module does not keep the contract of the top of this file."""
    possible: dict[str, tuple[Any, ...]] = {"NEEDS": NEEDS, "BASE": BASES, "FIXED_COST": (True, False)}
    if hasattr(module, "GIVES"):
        possible["GIVES"] = GIVES
    for attribute, values in possible.items():
        value = getattr(module, attribute, "missing")
        if not isinstance(value, str | bool | None) or value not in values:
            raise StudyError(f"allocator {module.__file__} must set {attribute} to one of {values}")
    if not inspect.isfunction(module.allocate):
        raise StudyError(f"allocator {module.__file__} must define allocate as a function")
    parameters = list(inspect.signature(module.allocate).parameters.values())
    kinds = [p.kind for p in parameters]
    if [p.name for p in parameters[:2]] != ["signal", "shape"] or any(k is not k.KEYWORD_ONLY for k in kinds[2:]):
        raise StudyError(f"allocator {module.__file__} must define allocate(signal, shape, *, knobs…)")
