"""What TorchServe's logs tell of a model that cannot be loaded; it would be tried again for minutes, its clients waiting."""

import re
from pathlib import Path

WORKERS, FRONTEND = "model_log.log", "ts_log.log"
WORKER_LINE = re.compile(r"W-\d+-(?P<name>.+)_[^_]*-stdout MODEL_LOG - (?P<text>.*)")
EXCEPTION = re.compile(r"[\w.]+(: |$)")  # its line begins at the margin, those of the traceback do not
DIED = re.compile(r"Load model failed: (?P<name>.+?), error: Worker died")
DEATHS = 3  # without a word, such as by the system for want of memory, until nothing else is expected


class Logs:
    """What is written to the logs in a folder from now on."""

    def __init__(self, folder: Path) -> None:
        self._sizes = {path: path.stat().st_size if path.exists() else 0 for path in (folder / WORKERS, folder / FRONTEND)}

    def load_failure(self) -> str | None:
        """Return which model a worker could not load, and why; None while none has failed."""
        return self._raised() or self._dead()

    def _raised(self) -> str | None:
        lines = [match for line in self._lines(WORKERS) if (match := WORKER_LINE.search(line))]
        died = next((index for index, line in enumerate(lines) if line["text"].startswith("Backend worker process died")), None)
        if died is None:
            return None
        name = lines[died]["name"]
        texts = (line["text"] for line in lines[died + 1 :] if line["name"] == name)
        # Where a handler cannot be imported, TorchServe goes on to look for one of its own.
        raised = next((text for text in texts if EXCEPTION.match(text) and "ts.torch_handler" not in text), None)
        return raised and f"{name} cannot be loaded: {raised.removeprefix('torchserve_explain.errors.')}"

    def _dead(self) -> str | None:
        names = [match["name"] for line in self._lines(FRONTEND) if (match := DIED.search(line))]
        often = next((name for name in names if names.count(name) >= DEATHS), None)
        return often and f"{often} cannot be loaded: its worker has died {DEATHS} times, perhaps for want of memory"

    def _lines(self, name: str) -> list[str]:
        path, size = next((path, size) for path, size in self._sizes.items() if path.name == name)
        if not path.exists():
            return []
        with path.open("rb") as stream:
            stream.seek(size)
            return stream.read().decode(errors="replace").splitlines()
