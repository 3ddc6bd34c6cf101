"""The host: one thread owns the engine and steps it; servers hand requests over from any thread or event loop."""

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

import torch

from torchserve_explain.archive import Archive
from torchserve_explain.attribution.computation import Piece
from torchserve_explain.attribution.engine import Engine
from torchserve_explain.attribution.memory import keep_freed_memory
from torchserve_explain.attribution.tasks import Task
from torchserve_explain.errors import ExplainError, RequestError, ServerError
from torchserve_explain.serving.answers import Answer
from torchserve_explain.serving.service import RawRequest, Service, error_answer

log = logging.getLogger(__name__)
SWITCHING = 0.0005  # seconds for which a thread keeps the interpreter while another wants it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Host:
    """Answers requests for one service on a thread of its own; only that thread calls the engine."""

    def __init__(self, service: Service, version: str = "1.0") -> None:
        self.version = version
        self.engine = Engine(service.classifier, service.limits.pack, self._do_commands)
        self._service = service
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: dict[Future[Answer], Task[Answer]] = {}
        self._open, self._lock = True, Lock()
        sys.setswitchinterval(SWITCHING)
        self._thread = Thread(target=self._run, name="explain", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, path: Path, name: str, device: str = "cpu") -> "Host":
        """Load an archive and warm it up, ready to be asked as `name`; raises ArchiveError."""
        torch.backends.cudnn.allow_tf32 = False  # a gradient loses too much in ten bits
        keep_freed_memory()
        archive = Archive.load(path, device)
        # The places of a continuous batch are TorchServe's; here any number of requests may be in flight.
        settings = archive.settings.model_copy(update={"continuousBatching": False})
        model = {"name": name, "version": archive.version}
        host = cls(Service(archive.classifier, archive.labels, settings, model, archive.digest), archive.version)
        host.warm_up()
        log.info("%s %s on %s: %d classes", name, archive.version, device, archive.classifier.classes)
        return host

    @property
    def explains(self) -> bool:
        """Whether an explanation is in flight, as far as requests have been read."""
        return self._service.explaining > 0

    def warm_up(self) -> None:
        """Explain a blank image, so that the first client does not pay for what the thread's first passes prepare."""
        warm: Future[None] = Future()

        def run() -> None:
            try:
                self._service.warm_up(self.engine)
                warm.set_result(None)
            except Exception as error:
                warm.set_exception(error)

        self._command(run)
        warm.result()

    def submit(self, raw: RawRequest) -> "Future[Answer]":
        """Take a request in; where what is returned is cancelled, the engine drops it. Raises RequestError once closed."""
        waiting: Future[Answer] = Future()
        waiting.add_done_callback(self._forget)
        self._command(lambda: self._take(raw, waiting))
        return waiting

    async def answer(self, raw: RawRequest) -> Answer:
        """Return the answer to one request; where the awaiting task is cancelled, the engine drops it."""
        return await asyncio.wrap_future(self.submit(raw))

    def close(self) -> None:
        """Answer what is in flight with 503, and end the threads."""
        with suppress(RequestError):  # it is closed already
            self._command(self._stop)
        self._thread.join()

    def _command(self, command: Callable[[], None]) -> None:
        """Have the thread do something between two steps, or between the layers of a pass."""
        with self._lock:
            if not self._open:
                raise _closing()
            self._commands.put(command)
        self.engine.wake()

    def _forget(self, waiting: "Future[Answer]") -> None:
        """Drop a request whose answer nobody awaits any more."""
        if waiting.cancelled():
            with suppress(RequestError):  # it is closing, and drops all
                self._command(lambda: self._drop(waiting))

    # What follows runs on the thread.

    def _run(self) -> None:
        while self._open:
            try:
                if self._waiting:
                    self.engine.step()
                else:
                    self._commands.get()()
            except Exception as error:
                self._fail_all(error)
        self.engine.close()

    def _do_commands(self) -> None:
        """Do what has been asked for meanwhile."""
        while not self._commands.empty():
            self._commands.get()()

    def _take(self, raw: RawRequest, waiting: "Future[Answer]") -> None:
        if waiting.cancelled():
            return
        try:
            work = Piece(self._service.answer(raw))
            self._waiting[waiting] = self.engine.add(work, self._service.deadline(raw), lambda: self._tell(waiting))
        except Exception as error:  # before anybody knows the request, so nobody else would answer it
            _hand_over(waiting, error_answer(error))

    def _tell(self, waiting: "Future[Answer]") -> None:
        outcome = self._waiting.pop(waiting).outcome
        if outcome is not None:
            _hand_over(waiting, error_answer(outcome) if isinstance(outcome, ExplainError) else outcome.value)

    def _drop(self, waiting: "Future[Answer]") -> None:
        task = self._waiting.pop(waiting, None)
        if task is not None:
            log.info("nobody waits for a request any more; it is dropped")
            self.engine.drop(task)

    def _fail_all(self, error: Exception) -> None:
        """Answer all that is in flight with an error, and begin anew."""
        while self._waiting:
            waiting, task = self._waiting.popitem()
            self.engine.drop(task)
            _hand_over(waiting, error_answer(error))

    def _stop(self) -> None:
        with self._lock:  # no command comes after this
            self._open = False
        while not self._commands.empty():  # requests that came at the last moment are answered, too
            self._commands.get()()
        self._fail_all(_closing())


def named_archives(specifications: Sequence[str]) -> dict[str, Path]:
    """Read archives, each PATH or NAME=PATH; raises ServerError where one does not exist or two have one name."""
    archives: dict[str, Path] = {}
    for one in specifications:
        name, equals, path = one.partition("=")
        archive = Path(path if equals else name)
        name = name if equals else archive.stem
        if not archive.exists():
            raise ServerError(f"{archive} does not exist; allowed: a .mar, or the folder of an unpacked one")
        if name in archives:
            raise ServerError(f"two archives are called {name}; allowed: NAME=PATH with names of their own")
        archives[name] = archive.resolve()
    return archives


def _hand_over(waiting: "Future[Answer]", answer: Answer) -> None:
    """Hand an answer over, unless its request has been cancelled."""
    if waiting.set_running_or_notify_cancel():
        waiting.set_result(answer)


def _closing() -> RequestError:
    return RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping; try again")
