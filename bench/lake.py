"""Pictures a second on Ray Data with one actor and with two, and the memory of all its processes meanwhile."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from bench import machine
from torchserve_explain.paths import ROOT

EVERY = 2.0  # seconds between two looks at the memory


def explained(data: Path, actors: int, more: Sequence[str]) -> dict[str, object]:
    """Explain a folder with so many actors into a new place; return its rate between its first and last file, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        given = ["explain", "imagenet", "--data", str(data), "--out", str(out), "--engine", "ray", "--actors", str(actors)]
        began = time.time()
        process = subprocess.Popen([sys.executable, "-m", "torchserve_explain", *given, *more])
        memory = list(_memory(process))
        if process.wait():
            raise SystemExit(process.returncode)
        from pyarrow import parquet

        files = sorted((path.stat().st_mtime, parquet.read_metadata(path).num_rows) for path in out.glob("maps/*.parquet"))
        seconds, rows = files[-1][0] - files[0][0], sum(count for _, count in files[1:])
        figures = {"maps": rows + files[0][1], "seconds": files[-1][0] - began, "to_the_first_file": files[0][0] - began}
        return figures | {"rate": rows / seconds if rows else None, "memory_mb": memory}


def _memory(process: "subprocess.Popen[bytes]") -> Iterator[list[float]]:
    """Yield seconds and megabytes of a process and all that it has started, shared pages divided among those who share."""
    began, own = time.time(), psutil.Process(process.pid)
    while process.poll() is None:
        held = 0.0
        for one in (own, *own.children(recursive=True)):
            try:
                held += one.memory_full_info().pss / 1e6
            except psutil.Error:  # it has ended
                continue
        yield [round(time.time() - began, 1), round(held)]
        time.sleep(EVERY)


def main() -> None:
    """Measure, print, and add it to lake.json."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("data", type=Path, help="a folder of pictures")
    command.add_argument("--actors", type=int, nargs="*", default=[1, 2])
    options, more = command.parse_known_args()
    out = ROOT / "run" / "bench" / "lake.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {"runs": []}
    results["machine"] = machine.describe(1)
    for actors in options.actors:
        figures = explained(options.data, actors, more)
        results["runs"].append({"actors": actors, "options": more, **figures})
        print(actors, {name: value for name, value in figures.items() if name != "memory_mb"}, flush=True)
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
