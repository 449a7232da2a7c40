"""MLflow's view of a study: one parent run, one child run a trial. The only file that imports MLflow.

    tracker = Tracker.open(None, "studies", experiment="sieve", study_name="demo", tags={}, params=config)
    tracker.sync(records)       # finds or makes the runs, adds what a killed driver did not get to write
    tracker.started(outcome); tracker.rung(digest, rung); tracker.finished(outcome)
    tracker.close(summary); tracker.browse       # the link to the Pareto scatter, which `saved_view.py` describes

MLflow is a view, outcomes.jsonl is the truth, and no study waits for its view: what fails, at the start too, is warned
about once and tried again from time to time, and every `sync` (at the start and at the end of a run) makes the view
whole from the records, whatever has become of it: a server that was away or came back empty, a database that was
deleted, is half made, or is an old copy. Only a URI that MLflow can never use is an error.
Runs are found again by tags (`study_id` of the parent, `digest` of a child), never by memory, so nothing appears twice.
One process writes a study; several studies may write to one database or server at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# MLflow would try seven times with 120 s each while the study waits.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

import mlflow
import sqlalchemy
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from allocators.core.errors import StudyError
from allocators.core.types import FINISHED, ModuleRanks, Outcome, Rung, Score
from search import front as pareto
from search import interrupts
from search.records import Records, flattened
from search.records.redact import redacted
from search.records.saved_view import FITS, LOG_SIZE, link, saved_view, tag_of
from search.text import human, settings_of
from trainers import storage

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_BATCH_METRICS, _BATCH_PARAMS, _PARAM_LENGTH = 1000, 100, 6000  # MLflow's limits
_PAGE = 1000
_MADE_WITH = ("alembic_version", "experiments", "workspaces")  # have one row from the beginning
_LOCK_SECONDS = 60  # that making a database may take another process
_RETRY_SECONDS = 60.0  # after a failure, doubled by every further one
_ADDRESS = "http://127.0.0.1:5000"  # where `mlflow ui` serves unless it is asked to serve elsewhere
_DIGEST_LENGTH, _NAME_LENGTH = 36, 500  # MLflow's limits for data sets
_NOTE_LENGTH = 5_000  # of a tag
_SHOWN_SETTINGS = ("rank", "lora_alpha", "learning_rate")  # of a recipe, in the table of the saved view


class Summary(Protocol):
    """What `report.write` returns: numbers of the whole study and the files that show it."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers of the study, for the parent run."""

    @property
    def description(self) -> str:
        """The study in Markdown, for the parent run."""

    @property
    def files(self) -> Iterable[Path]:
        """Files that are logged with the parent run."""


class Tracker:
    """One study's runs in MLflow. Make it with `open`; call `sync` before anything is started."""

    def __init__(
        self,
        uri: str,
        folder: Path,
        *,
        experiment: str,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
    ) -> None:
        self.uri, self._own = uri, uri == _own_uri(folder)
        self._folder = folder
        self._experiment_name = experiment
        self._name = name
        self._tags = {key: str(value) for key, value in tags.items()}
        self._params = params
        self._client: MlflowClient
        self._experiment: Experiment
        self._records: Records | None = None
        self._failures, self._failed_at, self._warned = 0, 0.0, ""
        self._down = False
        self._parent = ""
        self._study_id = ""
        self._place = ""
        self._children: dict[str, _Child] = {}
        self._columns: dict[str, None] = {}  # of the saved view, as far as the view that is written has them
        self._data: set[str] = set()  # digests of the data sets that were logged
        self._marked: dict[str, tuple[bool, bool]] = {}  # digest -> tags `front` and `knee`, of those that have one

    @classmethod
    def open(
        cls,
        uri: str | None,
        folder: str | Path,
        *,
        experiment: str,
        study_name: str,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
    ) -> Tracker:
        """A tracker, which connects when it is synced.

        uri      MLflow tracking URI; None: `mlflow.db` in `folder`
        folder   where a database keeps its artifacts (a server has its own place for them)
        params   of the parent run, nested is fine; passwords are taken out

        Raises StudyError where MLflow can never use the URI.
        """
        folder = Path(folder).absolute()
        uri = uri or _own_uri(folder)
        # MLflow announces every table that it makes, and prints whole stacks before it raises what we report in a line.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        tracker = cls(uri, folder, experiment=experiment, name=study_name, tags=tags, params=redacted(params))
        if not _is_database(uri) and not uri.startswith(("http://", "https://")):
            try:
                tracker._connect()
            except Exception as error:
                raise StudyError(
                    f"MLflow at {redacted(uri)} does not work ({_reason(error)}): correct it "
                    f"(sqlite:///FILE.db, http://HOST:PORT), or leave tracking_uri out to use a file in the storage "
                    "folder"
                ) from None
        return tracker

    def _connect(self) -> None:
        """Makes the database and the experiment where they are missing. Raises whatever MLflow raises, at once."""
        if _is_database(self.uri):
            _make_database(self.uri, own=self._own)
        self._client = MlflowClient(tracking_uri=self.uri)
        known = _experiment(self._client, self._experiment_name, self.uri, self._folder)
        if known.lifecycle_stage != "active":
            raise StudyError(
                f"experiment '{self._experiment_name}' was deleted: restore it with "
                f"'mlflow experiments restore --experiment-id {known.experiment_id}', or use another tracking_uri"
            )
        self._experiment = known

    @property
    def browse(self) -> str:
        """What to open to see the front in MLflow; for a database first what to type, which serves it."""
        where = str(redacted(self.uri))
        has_view = bool(self._study_id and self._parent and not self._down and FITS.match(mlflow.__version__))
        place = link(self._experiment.experiment_id, self._study_id) if has_view else ""
        if not _is_database(self.uri):
            return f"{where.rstrip('/')}/{place}" if place and where.startswith("http") else where
        command = f"mlflow ui --backend-store-uri {shlex.quote(where)}"
        return f"{command}   and open   {_ADDRESS}/{place}" if place else command

    def sync(self, records: Records) -> None:
        """Makes the runs say what the records say: looks them up by their tags and adds what is missing."""
        self._records = records
        self._down = False
        self._safely(self._sync, records)

    def started(self, outcome: Outcome) -> None:
        """Opens the trial's MLflow run, or goes on with the one that it has."""
        assert self._parent or self._down, "sync first: it finds or makes the parent run"
        self._safely(self._start, outcome)

    def rung(self, digest: str, rung: Rung) -> None:
        """Logs an evaluation, once however often it comes."""
        self._safely(self._log_rungs, digest, [rung])

    def finished(self, outcome: Outcome) -> None:
        """Logs the outcome and ends the trial's MLflow run."""
        self._safely(self._finish_one, outcome)

    def tested(self, outcome: Outcome) -> None:
        """Logs the score on the test split with a trial that has ended."""
        self._safely(self._log_test, outcome)

    def close(self, summary: Summary | None = None, *, status: RunStatus = "FINISHED") -> None:
        """Ends the parent run, with the study's numbers and files; what is still running is marked KILLED."""
        if self._down and self._records is not None:
            self.sync(self._records)
        if self._parent:
            self._safely(self._close, summary, status)

    def _safely(self, act: Callable[..., None], *arguments: Any) -> None:
        if self._down:
            waited = time.monotonic() - self._failed_at
            if self._records is None or waited < _RETRY_SECONDS * 2 ** min(self._failures - 1, 6):
                return
            act, arguments, self._down = self._sync, (self._records,), False  # the records have this event already
        try:
            with interrupts.deferred():
                act(*arguments)
        except Exception as error:  # whatever MLflow or its storage raises: a view must not end the study
            self._down, self._failed_at, self._failures = True, time.monotonic(), self._failures + 1
            if (reason := _reason(error)) != self._warned:
                self._warned = reason
                log.warning(
                    "MLflow at %s fails (%s): the study goes on without it, and the missing runs are added later, by "
                    "the next run of the same command at the latest",
                    redacted(self.uri),
                    reason,
                )

    def _sync(self, records: Records) -> None:
        self._connect()
        for known in (self._children, self._columns, self._data, self._marked):
            known.clear()  # what MLflow had is not what it has now
        self._study_id = records.header["id"]
        self._place = records.place
        self._parent = self._find_parent()
        for outcome in records.outcomes.values():
            child = self._children.get(outcome.digest)
            if outcome.status in FINISHED and (child is None or child.ended != outcome.status):
                self._finish(outcome)
            elif outcome.test is not None:
                self._log_test(outcome)
        self._log_data(records.finished.values())
        self._mark()
        self._show(f"knobs.{knob}" for outcome in records.outcomes.values() for knob in outcome.trial.knobs)
        self._failures, self._warned = 0, ""

    def _find_parent(self) -> str:
        """Looks up the parent run and its children by their tags; makes a parent where there is none."""
        mine = f"tags.study_id = '{self._study_id}'"
        parent: MlflowRun | None = None
        for run in self._search(mine):
            if digest := run.data.tags.get("digest"):
                if digest not in self._children:
                    self._children[digest] = _Child.of(run, self._client)
                    self._marked[digest] = ("front" in run.data.tags, "knee" in run.data.tags)
            else:
                parent = run
        if parent is None:
            tags = self._tags | {"study_id": self._study_id}
            parent = self._client.create_run(self._experiment.experiment_id, tags=tags, run_name=self._name)
        else:
            self._client.update_run(parent.info.run_id, status="RUNNING")
        # A key of the command line that may change between reruns (trials=…) keeps its first value.
        self._log_params(parent.info.run_id, flattened(self._params), parent.data.params)
        run_id: str = parent.info.run_id
        return run_id

    def _search(self, condition: str) -> Iterator[MlflowRun]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment.experiment_id],
                condition,
                max_results=_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            if not (token := page.token):
                return

    def _start(self, outcome: Outcome) -> None:
        trial = outcome.trial
        child = self._children.get(outcome.digest)
        if child is None:
            tags = {MLFLOW_PARENT_RUN_ID: self._parent, "study_id": self._study_id, "digest": outcome.digest}
            tags["point"] = trial.point  # the seeds of one point share it
            tags |= {"cut_from": trial.parent} if trial.parent else {}
            name = f"{trial.allocator or 'trial'} {human(outcome.trainable_params)} {outcome.digest[:6]}"
            run = self._client.create_run(self._experiment.experiment_id, tags=tags | self._tags, run_name=name)
            child = self._children[outcome.digest] = _Child(run.info.run_id)
        else:
            self._client.update_run(child.run_id, status="RUNNING")
        params = {"allocator": trial.allocator, "model": trial.model, "task": trial.task, "seed": trial.seed}
        params |= flattened({"knobs": trial.knobs, "recipe": settings_of(trial.recipe)})
        params |= {"trainable_params": outcome.trainable_params, "experts": trial.allocation.total_experts}
        if isinstance(trial.allocation, ModuleRanks):
            params["total_rank"] = trial.allocation.total_rank
        self._log_params(child.run_id, params, child.params)
        child.params |= dict.fromkeys(params, "")
        self._show([f"knobs.{knob}" for knob in trial.knobs])
        self._client.log_dict(child.run_id, trial.allocation.to_json(), "allocation.json")
        child.begun, child.ended = True, None

    def _log_params(self, run_id: str, params: Mapping[str, Any], known: Mapping[str, str]) -> None:
        new = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params.items() if key not in known]
        for start in range(0, len(new), _BATCH_PARAMS):
            self._client.log_batch(run_id, params=new[start : start + _BATCH_PARAMS])

    def _log_rungs(self, digest: str, rungs: Iterable[Rung]) -> None:
        """Numbers of evaluations, by step; what the run has already is not logged again."""
        assert self._records is not None
        outcome = self._records.outcomes[digest]
        if digest not in self._children:  # it was made before MLflow lost it
            self._start(outcome)
        child, now = self._children[digest], int(time.time() * 1000)
        every = {rung.step: rung for rung in (*outcome.rungs, *rungs)}  # those that MLflow missed too
        metrics = [
            Metric(name, float(rung[name]), now, int(rung["step"]))
            for rung in map(_flat, every.values())
            for name in rung
            if name != "step" and (name, int(rung["step"])) not in child.metrics
        ]
        for start in range(0, len(metrics), _BATCH_METRICS):
            self._client.log_batch(child.run_id, metrics=metrics[start : start + _BATCH_METRICS])
        child.metrics |= {(metric.key, metric.step) for metric in metrics}

    def _finish(self, outcome: Outcome) -> None:
        child = self._children.get(outcome.digest)
        if child is None or not child.begun or child.ended:
            self._start(outcome)
            child = self._children[outcome.digest]
        self._log_rungs(outcome.digest, outcome.rungs)
        step = outcome.rungs[-1].step if outcome.rungs else 0
        final = {
            "accuracy": outcome.accuracy,
            "tokens": outcome.tokens,
            "trainable_params": outcome.trainable_params,
            LOG_SIZE: math.log10(max(outcome.trainable_params, 1)),
            "seconds": outcome.seconds,
            "peak_memory_bytes": outcome.peak_memory_bytes,
        }
        if (lost := outcome.forgetting) is not None:
            final |= {"forgetting": lost.rise, "general_loss": lost.after, "general_loss_before": lost.before}
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for name, value in final.items()
            if value is not None and (name, step) not in child.metrics
        ]
        adapter = redacted(storage.join(self._place, outcome.adapter)) if outcome.adapter else ""
        tags = {"status": outcome.status, "message": redacted(outcome.message)[:1000], "adapter": adapter}
        tags |= {f"version.{name}": version for name, version in outcome.versions.items()}
        self._client.log_batch(
            child.run_id, metrics=metrics, tags=[RunTag(key, value) for key, value in tags.items() if value]
        )
        self._log_test(outcome)
        # last: a run that is over and tagged with its status is whole
        good = outcome.status in ("complete", "stopped")
        self._client.set_terminated(child.run_id, "FINISHED" if good else "FAILED")
        child.ended = outcome.status

    def _finish_one(self, outcome: Outcome) -> None:
        """Of a training that ends now: what it changes in the study's view, too."""
        self._finish(outcome)
        self._log_data([outcome])
        self._mark()

    def _log_data(self, outcomes: Iterable[Outcome]) -> None:
        """The data that the trainings trained on and were tested on, as inputs of the parent run; each once."""
        inputs = []
        for outcome in outcomes:
            for name, context in (("data", "training"), ("test_data", "evaluation")):
                digest = outcome.versions.get(name, "")
                if digest and digest not in self._data:
                    self._data.add(digest)
                    source = json.dumps({"task": redacted(outcome.trial.task)})
                    label = f"{Path(outcome.trial.task).name}, {context}"[:_NAME_LENGTH]
                    data = Dataset(label, digest[:_DIGEST_LENGTH], "code", source)
                    inputs.append(DatasetInput(data, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
        if inputs:
            self._client.log_inputs(self._parent, datasets=inputs)

    def _mark(self) -> None:
        """Tags `front` and `knee` at the runs of the front as it is now; what was beaten loses them."""
        assert self._records is not None
        front, knee = self._records.points.front, pareto.bend(self._records.points.rising)
        marks = {run.digest: (True, member is knee) for member in front for run in member.complete}
        for digest in [*marks, *(self._marked.keys() - marks.keys())]:
            before, now = self._marked.get(digest, (False, False)), marks.get(digest, (False, False))
            if digest in self._children:
                for name, had, has in zip(("front", "knee"), before, now, strict=True):
                    self._set_mark(self._children[digest].run_id, name, had, has)
        self._marked = marks

    def _set_mark(self, run_id: str, name: str, had: bool, has: bool) -> None:
        if has and not had:
            self._client.set_tag(run_id, name, "true")
        elif had and not has:
            self._client.delete_tag(run_id, name)

    def _show(self, params: Iterable[str]) -> None:
        """Writes the saved view, where it lacks one of these parameters; a view that MLflow refuses is not needed."""
        wanted = dict.fromkeys(f"params.`{name}`" for name in params if "`" not in name)
        if not FITS.match(mlflow.__version__) or (self._columns and wanted.keys() <= self._columns.keys()):
            return
        recipe = [f"params.`recipe.{name}`" for name in _SHOWN_SETTINGS]
        self._columns |= dict.fromkeys(recipe) | wanted
        created = self._client.get_run(self._parent).info.start_time
        with contextlib.suppress(Exception):
            view = saved_view(parent=self._parent, name=self._name, created=created, columns=self._columns)
            self._client.set_experiment_tag(self._experiment.experiment_id, tag_of(self._study_id), view)

    def _log_test(self, outcome: Outcome) -> None:
        """Once however often it comes."""
        child = self._children[outcome.digest]
        if outcome.test is None or ("test_accuracy", 0) in child.metrics:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(f"test_{name}", float(value), now, 0) for name, value in _flat(outcome.test).items()]
        self._client.log_batch(child.run_id, metrics=metrics)
        child.metrics |= {(metric.key, metric.step) for metric in metrics}

    def _close(self, summary: Summary | None, status: RunStatus) -> None:
        for child in self._children.values():
            if child.ended is None:
                self._client.set_terminated(child.run_id, "KILLED")
        if summary is not None:
            now = int(time.time() * 1000)
            metrics = [Metric(name, float(value), now, 0) for name, value in summary.metrics.items()]
            self._client.log_batch(self._parent, metrics=metrics)
            self._client.set_tag(self._parent, MLFLOW_RUN_NOTE, str(redacted(summary.description))[:_NOTE_LENGTH])
            for file in summary.files:
                self._client.log_artifact(self._parent, str(file), "report")
        self._client.set_terminated(self._parent, status)


def _flat(rung: Rung | Score) -> dict[str, Any]:
    """Numbers of an evaluation by metric name: `accuracy`, of several tasks also `accuracy.arc_easy`."""
    names = ("step", "accuracy", "loss", "eval_loss", "tokens", "stderr")
    numbers = {name: getattr(rung, name, None) for name in names}
    for label, of_task in rung.by_task.items():
        name = re.sub(r"[^\w./ :-]", "-", label)  # what MLflow takes
        numbers |= {f"accuracy.{name}": of_task["accuracy"], f"stderr.{name}": of_task["stderr"]}
    return {name: number for name, number in numbers.items() if number is not None}


class _Child:
    """What the MLflow run of one trial holds already: names of parameters, (name, step) of metrics, how it ended.

    begun   this process has written all that a run begins with; one that was cut off may lack any of it
    """

    def __init__(self, run_id: str, *, params: Mapping[str, str] | None = None, ended: str | None = None) -> None:
        self.run_id = run_id
        self.params = dict(params or {})
        self.metrics: set[tuple[str, int]] = set()
        self.begun = False
        self.ended = ended

    @classmethod
    def of(cls, run: MlflowRun, client: MlflowClient) -> _Child:
        over = run.info.status in ("FINISHED", "FAILED")
        child = cls(run.info.run_id, params=run.data.params, ended=run.data.tags.get("status") if over else None)
        child.metrics |= {(name, 0) for name in run.data.metrics if name.startswith("test_")}
        if child.ended is None:  # cut off: only then is it worth asking for the history
            for name in run.data.metrics:
                child.metrics |= {(name, m.step) for m in client.get_metric_history(run.info.run_id, name)}
        return child


def _own_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def _is_database(uri: str) -> bool:
    """Whether runs lie in a database and not behind a server; the driver may be named: `postgresql+psycopg2://`."""
    return uri.partition(":")[0].partition("+")[0] in DATABASES


def _experiment(client: MlflowClient, name: str, uri: str, folder: Path) -> Experiment:
    if (known := client.get_experiment_by_name(name)) is not None:
        return known
    artifacts = (folder / "mlflow-artifacts" / name).as_uri() if _is_database(uri) else None
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    except Exception:
        if (known := client.get_experiment_by_name(name)) is not None:  # another study has made it just now
            return known
        raise


def _make_database(uri: str, *, own: bool) -> None:
    """Makes the file of a SQLite database where it is missing or half made: beside, whole, then moved into place.

    MLflow's own way leaves a file that never works again where it is cut off, and two processes hinder each other. A
    file with content is left as it is. Any other database is asked once.

    own   it is the storage folder's: where it is no database any more, it is set aside

    Raises what the database raises: MLflow would try for two minutes to open what cannot be opened.
    """
    url = sqlalchemy.make_url(uri)
    if url.get_backend_name() != "sqlite":
        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
        return
    # A connection that is kept open goes on writing to a file that was deleted or replaced.
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        return
    file = Path(url.database).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock"), timeout=_LOCK_SECONDS):
        if own:
            _set_damage_aside(file)
        if rows := _rows(file):
            try:
                MlflowClient(tracking_uri=uri)
            except Exception:
                if not _is_half_made(rows):
                    raise
            else:
                return
        for cut_off in file.parent.glob(f".{file.name}.new-*"):
            cut_off.unlink()
        beside = file.with_name(f".{file.name}.new-{os.getpid()}")
        try:
            MlflowClient(tracking_uri=url.set(database=str(beside)).render_as_string(hide_password=False))
            os.replace(beside, file)
        finally:
            for left in (beside, Path(f"{beside}-journal")):
                left.unlink(missing_ok=True)


def _rows(file: Path) -> dict[str, int]:
    """The number of rows, 2 at most, of every table of a SQLite database; none of a file that does not exist."""
    if not file.exists():
        return {}
    with closing(sqlite3.connect(file)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        few = 'SELECT COUNT(*) FROM (SELECT 1 FROM "{}" LIMIT 2)'
        return {name: database.execute(few.format(name.replace('"', '""'))).fetchone()[0] for name in tables}


def _is_half_made(rows: Mapping[str, int]) -> bool:
    """Whether a database holds nothing but what MLflow writes when it makes one."""
    return "experiments" in rows and not any(number > (name in _MADE_WITH) for name, number in rows.items())


def _set_damage_aside(file: Path) -> None:
    """Moves a file that is no database; a folder, or a file that may not be read, stays where it is."""
    try:
        _rows(file)
    except sqlite3.OperationalError:
        return
    except sqlite3.DatabaseError as error:
        aside = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(file, aside)
        log.warning("MLflow's database %s was damaged (%s): it is now %s, and a new one is made", file, error, aside)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: MLflow's own messages carry whole stacks of them, and the URI's password."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    lines = str(redacted(str(error))).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
