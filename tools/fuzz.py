"""Feeds the readers of edgegt what they were never meant to read, and says what they did.

    python tools/fuzz.py --executions 1000000 [--jobs 1] [--target NAME] [--seed N] [--json FILE]

A target is one row of fuzz_targets.TARGETS: seeds, and what is called. An execution passes when the reader returns,
or refuses with an EdgegtError of one printable line. Anything else fails: another error, more than 5 s, more memory
than LIMIT_BYTES on top of what the process has, or a process that dies. The input is saved, once per place in the code,
and `--target NAME --replay FILE` shows its traceback.

Every target has a process of its own, so that memory can be told apart. Where atheris is installed it guides the search
by coverage, with the mutator below for half of the inputs; without it the mutator keeps inputs that gave a new answer.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzz_targets import TARGETS, Target

LIMIT_S = 5.0
LIMIT_BYTES = 2 << 30
LONGEST = 1 << 16
# Coverage counts loops, so that a guided search drifts to long inputs: these stay short, and some are made longer.
GUIDED_LONGEST = 2048
LONGER_EVERY = 200
GROWTH_ALLOWED_MIB = 256.0
RAM = Path("/dev/shm")
_PAGE = resource.getpagesize()
# Pieces with a meaning in one of the formats, and numbers at the edges.
TOKENS = (
    b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\r\n", b"\n\n", b"\0", b"[", b"]", b"{", b"}", b"[[", b"]]", b":",
    b"=", b".", b"\\", b"\\u0000", b"\\ud800", b"\\udc80", b'""', b'"\n"', b"\xff", b"\xff\xfe", b"\xef\xbb\xbf",
    b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc3", b"null", b"true", b"NaN", b"Infinity", b"-", b"1e999", b"nan", b"inf",
    b"0x" + b"f" * 300, b"9" * 4400, b"10000000000000000000000", b"9223372036854775807", b"-1", b"0", b"1.5",
    b"2024-01-01", b"07:32:00", b"#", b"<|endoftext|>", b"text", b"prompt", b"completion", b"GiB", b"8 GiB", b"h",
    b"Wh", b"../../x", b"/etc/x", b"\x1b[2J", b"\x7f", b"\xd9\xa3", b"F32", b"I64", b"F8_E4M3", b"|rows",
    b"__metadata__",
)  # fmt: skip


class Hang(BaseException):
    """The time limit, raised within the reader; no reader may catch it."""


@dataclass
class Tally:
    """What came of the executions of one target. failures: name of the saved input by what went wrong."""

    target: str
    engine: str = ""
    executions: int = 0
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0
    growth_mib: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.failed and self.growth_mib <= GROWTH_ALLOWED_MIB


class Mutator:
    """Inputs made of earlier ones: bits flipped, tokens put in, pieces cut, doubled, moved and repeated often."""

    def __init__(self, seeds: Sequence[bytes], seed: int) -> None:
        self.pool = list(seeds)
        self.fixed = len(self.pool)
        self.draw = random.Random(seed)

    def next(self) -> bytes:
        """The next input, of a seed every second time: what is kept is mostly broken somewhere."""
        most = self.fixed if self.draw.random() < 0.5 else len(self.pool)
        return self.mutate(self.pool[self.draw.randrange(most)])

    def mutate(self, data: bytes) -> bytes:
        """The input with one to four changes."""
        for _ in range(self.draw.choice((1, 1, 1, 2, 2, 3, 4))):
            data = self._changed(data)
        return data[:LONGEST]

    def keep(self, data: bytes) -> None:
        """An input that gave a new answer becomes one to start from; of many the oldest found ones go."""
        if len(data) > 8192:
            return
        if len(self.pool) >= self.fixed + 512:
            del self.pool[self.fixed + self.draw.randrange(256)]
        self.pool.append(data)

    def longer(self, data: bytes) -> bytes:
        """The input with a piece of it, or a token, hundreds or thousands of times: what takes time with the square."""
        start = self.draw.randint(0, len(data))
        many = self.draw.choice((data[start : start + 8] or b"[", self.draw.choice(TOKENS)))
        times = self.draw.choice((200, 2000, LONGEST // len(many)))
        return (data[:start] + many * times + data[start:])[:LONGEST]

    def _changed(self, data: bytes) -> bytes:
        draw = self.draw
        start, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
        piece = data[start:end]
        way = draw.randrange(200)
        if way < 40 and data:
            at = min(start, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        if way < 90:
            return data[:start] + draw.choice(TOKENS) + data[start:]
        if way < 120:
            return data[:start] + draw.choice(TOKENS) + data[min(len(data), start + draw.randint(1, 8)) :]
        if way < 140:
            return data[:start] + data[min(end, start + 32) :]
        if way < 155:
            return data[:start]
        if way < 170:
            return data[:end] + piece[:256] + data[end:]
        if way < 190:
            other = draw.choice(self.pool)
            cut = draw.randint(0, len(other))
            return data[:start] + other[cut : cut + 256] + data[end:]
        if way < 199 or not data:
            return data[:start] + bytes([draw.randrange(256)]) + data[start:]
        return self.longer(data)


class Executor:
    """Runs one target, input by input, and keeps the tally."""

    def __init__(self, target: Target, folder: Path, failures: Path) -> None:
        self.call = target.prepare(folder)
        self.tally = Tally(target.name)
        self.failures = failures
        self.answers: set[str] = set()
        self.began = 0.0
        self.warm_mib = 0.0

    def begin(self) -> None:
        """Set the limits of this process, which has no other task."""
        limit = _pages(0) * _PAGE + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        self.watch()

    def watch(self) -> None:
        """Set the time limit alone. Called last, since engines set signals of their own."""
        signal.signal(signal.SIGALRM, _raise_hang)
        self.began = time.monotonic()

    def execute(self, data: bytes) -> bool:
        """One execution; returns whether its answer was new."""
        tally = self.tally
        tally.executions += 1
        answer = ""
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            self.call(data)
            tally.accepted += 1
            answer = f"accepted {len(data).bit_length()}"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            fault = _fault(error)
            if fault is None:
                tally.refused += 1
                answer = re.sub(r"'[^']*'|[0-9]+|near .*", "", str(error))[:200]
            else:
                self._failed(data, fault)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        new = answer not in self.answers and len(self.answers) < 100_000
        if new:
            self.answers.add(answer)
        return new

    def end_of(self, executions: int) -> bool:
        """Whether that many executions are done; measures memory after the first tenth, and at the end."""
        done = self.tally.executions
        if not self.warm_mib and done >= executions / 10:
            self.warm_mib = _resident_mib()
        if done < executions:
            return False
        self.tally.seconds = time.monotonic() - self.began
        self.tally.growth_mib = max(0.0, _resident_mib() - self.warm_mib)
        return True

    def _failed(self, data: bytes, fault: str) -> None:
        self.tally.failed += 1
        if fault not in self.tally.failures:
            self.failures.mkdir(parents=True, exist_ok=True)
            path = self.failures / f"{self.tally.target}-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            self.tally.failures[fault] = str(path)


def _raise_hang(signal_number: int, frame: Any) -> None:
    raise Hang(f"longer than {LIMIT_S:g} s")


def _fault(error: BaseException) -> str | None:
    """What is wrong with the way in which a reader ended; None for a refusal of one printable line."""
    from edgegt.errors import EdgegtError

    if not isinstance(error, EdgegtError):
        places = list(traceback.extract_tb(error.__traceback__))
        places = [place for place in places if place.filename != __file__] or places
        own = [place for place in places if "/edgegt/" in place.filename] or places
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"
    text = str(error)
    if text and text.isprintable() and len(text) < 2000:
        return None
    return f"a message of {len(text)} characters that is not one printable line: {text[:40]!r}"


def _pages(column: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[column])


def _resident_mib() -> float:
    return _pages(1) * _PAGE / 2**20


def run_target(name: str, executions: int, seed: int, failures: Path, result: Path, guided: bool) -> None:
    """All executions of one target in this process; the tally goes to `result`, because atheris ends the process."""
    folder = Path(tempfile.mkdtemp(prefix="edgegt-fuzz-", dir=RAM if RAM.is_dir() else None))
    try:
        if guided:
            _guided(name, executions, seed, folder, failures, result)
        else:
            _unguided(name, executions, seed, folder, failures, result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unguided(name: str, executions: int, seed: int, folder: Path, failures: Path, result: Path) -> None:
    executor = Executor(TARGETS[name], folder, failures)
    executor.tally.engine = "mutator"
    executor.begin()
    for data in inputs(TARGETS[name].seeds(), seed, executor.execute):
        del data
        if executor.end_of(executions):
            break
    result.write_text(json.dumps(asdict(executor.tally)))


def inputs(seeds: Sequence[bytes], seed: int, execute: Callable[[bytes], bool]) -> Iterator[bytes]:
    """The seeds, then mutations without end, each after its execution; inputs with a new answer are kept."""
    mutator = Mutator(seeds, seed)
    for data in seeds:
        execute(data)
        yield data
    while True:
        data = mutator.next()
        if execute(data):
            mutator.keep(data)
        yield data


def _guided(name: str, executions: int, seed: int, folder: Path, failures: Path, result: Path) -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["edgegt", "tomllib", "tomli", "json"], enable_loader_override=False):
        executor = Executor(TARGETS[name], folder, failures)
    executor.tally.engine = "atheris"
    seeds = TARGETS[name].seeds()
    mutator = Mutator(seeds, seed)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(seeds):
        (corpus / f"{number:04}").write_bytes(data)

    def one(data: bytes) -> None:
        if not executor.began:
            executor.begin()
        if executor.tally.executions % LONGER_EVERY == LONGER_EVERY - 1:
            data = mutator.longer(data)
        executor.execute(data)
        if executor.end_of(executions):
            result.write_text(json.dumps(asdict(executor.tally)))
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)

    def mutated(data: bytes, most: int, draw: int) -> bytes:
        if draw & 1:
            return bytes(atheris.Mutate(data, most))
        return mutator.next()[:most] if draw & 2 else mutator.mutate(data)[:most]

    flags = ["-timeout=0", "-rss_limit_mb=0", f"-max_len={GUIDED_LONGEST}", f"-seed={seed + 1}", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


def run_all(names: Sequence[str], executions: int, jobs: int, seed: int, failures: Path, guided: bool) -> list[Tally]:
    """Every target in a process of its own, `jobs` at a time; a process that dies is a failure of its target."""
    shares = {name: TARGETS[name].share for name in names}
    each = {name: max(1, round(executions * share / sum(shares.values()))) for name, share in shares.items()}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as pool:

        def one(name: str) -> Tally:
            result = Path(place) / name
            process = spawn.Process(target=run_target, args=(name, each[name], seed, failures, result, guided))
            process.start()
            process.join()
            if result.is_file():
                return Tally(**json.loads(result.read_text()))
            return Tally(name, failed=1, failures={f"the process ended with {process.exitcode}": ""})

        return list(pool.map(one, names))


def table(tallies: Sequence[Tally]) -> str:
    """What came of it, a line per target and one for all."""
    lines = [
        f"{'target':<12}{'executions':>11}{'accepted':>10}{'refused':>10}{'failures':>9}{'per s':>8}{'growth':>11}"
    ]
    total = Tally("all", "", growth_mib=max((one.growth_mib for one in tallies), default=0.0))
    for one in tallies:
        for name in ("executions", "accepted", "refused", "failed", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
    for one in (*tallies, total):
        rate = one.executions / one.seconds if one.seconds else 0.0
        lines.append(
            f"{one.target:<12}{one.executions:>11,}{one.accepted:>10,}{one.refused:>10,}{one.failed:>9,}{rate:>8,.0f}"
            f"{one.growth_mib:>7.1f} MiB"
        )
    found = [f"{one.target}: {fault}: {path}" for one in tallies for fault, path in one.failures.items()]
    return "\n".join([*lines, *found])


def main(words: Sequence[str] | None = None) -> int:
    """Fuzz, print the table; returns 1 when anything failed."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of edgegt.")
    parser.add_argument("--executions", type=int, default=100_000, help="of all targets together (default: 100000)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--target", choices=sorted(TARGETS), help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder for inputs that failed")
    parser.add_argument("--unguided", action="store_true", help="use the own mutator even where atheris is installed")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="execute this one input of --target, unguarded")
    given = parser.parse_args(words)
    if given.replay:
        if not given.target:
            parser.error("--replay needs --target")
        with tempfile.TemporaryDirectory() as folder:
            print(TARGETS[given.target].prepare(Path(folder))(given.replay.read_bytes()))
        return 0
    names = [given.target] if given.target else list(TARGETS)
    guided = not given.unguided and importlib.util.find_spec("atheris") is not None
    tallies = run_all(names, given.executions, given.jobs, given.seed, given.failures, guided)
    print(table(tallies))
    if given.json:
        given.json.write_text(json.dumps({"targets": [asdict(one) for one in tallies]}, indent=1) + "\n")
    return 0 if all(one.ok for one in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
