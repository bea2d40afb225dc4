"""``python -m benchmarks gpu``: the rows on one GPU, side by side with the peers that it has."""

import argparse
import datetime
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from benchmarks import report
from benchmarks.entry import OUT_OF_TIME
from benchmarks.peers import PEERS
from benchmarks.rows import ROWS, Row, chosen

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TARGETS = Path(__file__).parent / "targets.json"
# Longer than the slowest compile of a peer's kernel that was seen, so a hang.
STALL_SECONDS = 150


class Worker:
    """A process that measures, and its events with a time limit on their silence."""

    def __init__(self, job: dict, command: list[str]) -> None:
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- read when it ends
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
        )
        self.was_silent = False
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job))
        self.process.stdin.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process where the run was interrupted."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.log.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """Events until the process ends; one that is silent for too long is ended."""
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self.process.stdout is not None
            for line in self.process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=STALL_SECONDS)
            except queue.Empty:
                self.was_silent = True
                self.process.kill()
                self.process.wait()
                return
            if line is None:
                self.process.wait()
                return
            yield json.loads(line)

    def last_words(self) -> str:
        """Why it ended: the last line that it wrote to its error output, or its exit status."""
        if self.was_silent:
            return f"silent for {STALL_SECONDS} s"
        self.log.seek(0)
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line]
        return (lines or [f"ended with status {self.process.returncode}"])[-1][:160]


class Run:
    """The numbers so far; workers are started until every row has them."""

    def __init__(
        self,
        rows: list[Row],
        peers: tuple[str, ...],
        deadline: float,
        command: tuple[str, ...] = (sys.executable, "-m", "benchmarks.worker"),
    ) -> None:
        self.command = command
        self.rows = rows
        self.peers = peers
        self.deadline = deadline
        self.machine: dict[str, Any] = {}
        self.ceilings: dict[str, float] = {}
        self.found: dict[str, dict[str, dict]] = {str(row): {} for row in rows}
        self.finished: list[str] = []
        self.current: tuple[str, str] | None = None

    def take(self, event: dict[str, Any]) -> str | None:
        """Keep what an event says; the row that it finishes, if it does."""
        self.machine = event.get("machine", self.machine)
        self.ceilings = event.get("ceilings", self.ceilings)
        if "started" in event:
            self.current = event["row"], event["name"]
        if "result" in event:
            self.found[event["row"]][event["name"]] = event["result"]
            self.current = None
        if "finished" in event:
            self.finished.append(event["finished"])
        return event.get("finished")

    def measure(self) -> Iterator[str]:
        """Each row's name as soon as it is finished.

        Raises:
            SystemExit: there is no GPU to measure on, or the process ends before its first number.
        """
        while len(self.finished) < len(self.rows):
            left = [str(row) for row in self.rows if str(row) not in self.finished]
            job = {
                "rows": left,
                "peers": self.peers,
                "deadline": self.deadline,
                "done": {row: list(self.found[row]) for row in left},
                "first": not self.ceilings,
            }
            with Worker(job, list(self.command)) as worker:
                events = 0
                for event in worker.events():
                    events += 1
                    finished = self.take(event)
                    if finished is not None:
                        yield finished
                if worker.process.returncode == 0:
                    return
                last_words = worker.last_words()
            if not self.ceilings:
                raise SystemExit(f"benchmarks gpu: {last_words}")
            if self.current is not None:
                row, name = self.current
                self.found[row][name] = {"reason": last_words}
                self.current = None
            elif not events:
                # It ended without a word: the same row is not tried for ever.
                self.finished.append(left[0])
                yield left[0]

    def results(self) -> list[dict]:
        """What the JSON has of each row, in the order of the table."""
        order = [str(row) for row in ROWS if row in self.rows]
        return [report.row_result(r, self.found[r], self.ceilings, self.targets()) for r in order]

    def targets(self) -> dict[str, dict]:
        """Those that were set for this GPU."""
        known = json.loads(TARGETS.read_text())
        return known["rows"] if known["gpu"] in self.machine.get("gpu", "") else {}


def commit() -> str | None:
    """Of the checkout, with a ``+`` where it has other changes; None where there is no git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "gdn_ops", "lowering"])
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    names = ", ".join(dict.fromkeys(row.name for row in ROWS))
    parser.add_argument("--rows", help=f"names, with commas between them: {names}")
    parser.add_argument("--peers", default=",".join(PEERS), help="the same for the peers")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds, then it stops")
    parser.add_argument("--json", type=Path, help="default: GPU-DATE.json in benchmarks/results")
    parser.add_argument("--commit", help="where the checkout has no git")
    return parser.parse_args(argv)


def command(args: argparse.Namespace) -> str:
    """What measures the same again; without paths, which are those of a machine."""
    text = "python -m benchmarks gpu"
    text += f" --rows {args.rows}" if args.rows else ""
    text += f" --peers {args.peers}" if args.peers != ",".join(PEERS) else ""
    return f"{text} --time-limit {args.time_limit:g}"


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    started = time.time()
    try:
        rows = chosen(args.rows.split(",") if args.rows else None)
        peers = tuple(filter(None, args.peers.split(",")))
        if not set(peers) <= set(PEERS):
            raise ValueError(f"peers: must be among {', '.join(PEERS)}, got {args.peers}")
    except ValueError as error:
        raise SystemExit(f"benchmarks gpu: {error}") from None
    run = Run(rows, peers, started + args.time_limit)
    now = datetime.datetime.now(datetime.timezone.utc)
    about = {
        "date": now.isoformat(timespec="seconds"),
        "commit": args.commit or commit(),
        "command": command(args),
    }

    def save() -> Path:
        gpu = run.machine.get("gpu", "gpu").replace("NVIDIA ", "").split()[0].lower()
        path = args.json or RESULTS / f"{gpu}-{now.date()}.json"
        content = {"machine": run.machine, "ceilings": run.ceilings, **about}
        path.write_text(json.dumps(content | {"rows": run.results()}, indent=1) + "\n")
        return path

    with report.progress(len(rows)) as advance:
        for row in run.measure():
            result = report.row_result(row, run.found[row], run.ceilings, run.targets())
            print(report.line(result), flush=True)
            advance()
            save()
    path = save()
    report.show(run.machine, run.ceilings, run.results())
    late = sum(OUT_OF_TIME in json.dumps(result) for result in run.results())
    print(f"{time.time() - started:.0f} s; {late} rows lack numbers for the time limit; {path}")
