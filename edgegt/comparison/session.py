"""A comparison from its first job to its table: what costs how much, which learning rates, and then every contender.

Each job runs in a process of its own, so that its peak memory is its own, and leaves a file when it ends; one that is
there is not done again. This process stays light: it knows no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgegt.comparison.contenders import CONTENDERS, FULL, Contender
from edgegt.comparison.jobs import MEASURE, TIMED, TIMED_ROUGHLY, TRAIN, TUNE, Full, Job, Pace, seconds_of, steps_of
from edgegt.comparison.rates import best_factor, write_rates
from edgegt.comparison.request import Request, middle
from edgegt.comparison.table import table_of, write_table
from edgegt.disk import remove_halves, write_json
from edgegt.errors import EdgegtError, InputError, Interrupted
from edgegt.folder import RunFolder, new_folder
from edgegt.log import Log
from edgegt.process import terminated_is_interrupted
from edgegt.units import format_bytes, format_duration
from edgegt.version import __version__

ABOUT, RESULTS, TABLE, CHART, RATES, JOBS = (
    "compare.json", "results.json", "table.md", "compare.png", "rates.toml", "jobs",
)  # fmt: skip
LISA_ROUNDS = 10
# Steps of full fine-tuning whose FLOPs are listed, as a multiple of those it makes at the least rho.
LISTED = 1.3
_TERMINATED = (130, 143, -2, -15)


@dataclass
class Outcome:
    """What a comparison found: results in the order of the contenders, and of those that failed why."""

    folder: Path
    results: list[dict[str, Any]]
    problems: dict[str, str]


def compare(request: Request, log: Log, output: str | None = None, command: str = "") -> Outcome:
    """Compare as asked, in a new folder. Raises: InputError for what cannot be compared; Interrupted when stopped."""
    model = Path(request.run["model"] or "home").name
    folder = new_folder(output, model, "compare")
    folder.lock()
    folder.write(ABOUT, {"version": __version__, "command": command, "request": request.to_json()})
    log.say(f"comparison: {folder.path}")
    return _go(_Session(folder, request, log))


def resume(path: Path, log: Log) -> Outcome:
    """Go on with a comparison that was broken off: jobs that are done are not done again. Raises: as `compare`."""
    folder = RunFolder(path)
    if not (path / ABOUT).is_file():
        raise InputError(f"'{path}' is no comparison (it has no {ABOUT}): give the folder that `edgegt compare` named")
    about = folder.read(ABOUT)
    if not isinstance(about.get("request"), dict):
        raise InputError(f"'{path / ABOUT}' is damaged (no request): compare anew")
    if about.get("version") != __version__:
        log.fallback(f"the comparison was begun by edgegt {about.get('version')}, this is {__version__}")
    request = Request.from_json(about["request"], path / ABOUT)
    folder.lock()
    remove_halves(path / JOBS)
    return _go(_Session(folder, request, log))


def _go(session: _Session) -> Outcome:
    path = session.folder.path
    try:
        with terminated_is_interrupted():
            return session.go()
    except (KeyboardInterrupt, Interrupted) as error:
        code = error.exit_code if isinstance(error, Interrupted) else 130
        raise Interrupted(f"stopped; what is done is kept, `edgegt compare --resume {path}` goes on", code) from error
    except InputError:
        if not any((path / JOBS).glob("*.json")):
            session.folder.remove()  # not even the first job could be done
        raise
    finally:
        session.folder.release()


@dataclass
class _Session:
    folder: RunFolder
    request: Request
    log: Log
    problems: dict[str, str] = field(default_factory=dict)
    data: Mapping[str, str] | None = None

    def go(self) -> Outcome:
        """All jobs, then the table and the chart."""
        contenders = [CONTENDERS[name] for name in self.request.strategies]
        first = self._full(0)
        # A machine that is slower at another moment is slower for all: seconds are compared as seed 0 timed them.
        full = {0: first} | {
            seed: replace(self._full(seed), seconds_per_flop=first.seconds_per_flop)
            for seed in range(1, 1 if self.request.equal == "steps" else self.request.seeds)
        }
        paces = {(one.name, rho): self._pace(one, rho, first) for one, rho in self._each(contenders)}
        running = {key: pace for key, pace in paces.items() if pace is not None}
        self._estimate(running, full)
        factors = self._rates([one for one in contenders if any(key[0] == one.name for key in running)], running, first)
        results = []
        total = self.request.seeds * len(running)
        for seed in range(self.request.seeds):
            for name, rho in running:
                if name not in factors:
                    continue
                one, here = CONTENDERS[name], full.get(seed, first)
                steps = steps_of(self.request.equal, first.steps, here, running[name, rho])
                job = self._job(TRAIN, one, seed, rho, steps, factors[name] * first.default_lr, first)
                found = self._done(job)
                if found:
                    spends = found["flops_of_full"] if self.request.equal == "steps" else here.at(first.steps)
                    results.append(found | {"budget_flops": spends})
                self.log.say(f"{len(results)}/{total} {_line(found) if found else job.name + ': failed'}")
        return self._written(results, first)

    def _each(self, contenders: list[Contender]) -> Iterator[tuple[Contender, float | None]]:
        for one in contenders:
            yield from ((one, rho) for rho in (self.request.rhos if one.budgeted else (None,)))

    def _full(self, seed: int) -> Full:
        """What full fine-tuning costs. Raises: EdgegtError when even that cannot be prepared."""
        timed, listed = self._timed() if seed == 0 else 1, LISTED / min(self.request.rhos)
        options = self._options(FULL, seed)
        job = Job(MEASURE, FULL.name, seed, options, None, self.request.rows, listed=listed, timed=timed)
        found = self._done(job, must=True)
        assert found is not None
        if "problem" in found and self.request.equal == "seconds":
            raise InputError(f"--equal seconds takes those of full fine-tuning, which does not run: {found['problem']}")
        return Full(
            found["steps"], found["per_epoch"], tuple(found["flops"]), found["default_lr"],
            found.get("seconds_per_flop"),
        )  # fmt: skip

    def _timed(self) -> int:
        return TIMED if self.request.equal == "seconds" else TIMED_ROUGHLY

    def _pace(self, one: Contender, rho: float | None, full: Full) -> Pace | None:
        """What a contender costs, None when it cannot run."""
        if one == FULL:
            return Pace(1.0, seconds_per_flop=full.seconds_per_flop)
        if self.request.equal == "steps":
            return Pace(rho or 1.0)
        steps = round(full.steps / (rho or 1.0))
        job = self._job(MEASURE, one, 0, rho, steps, None, full)
        found = self._done(job)
        return Pace(**{key: found[key] for key in Pace.__dataclass_fields__}) if found else None

    def _rates(
        self, contenders: list[Contender], paces: Mapping[tuple[str, float | None], Pace], full: Full
    ) -> dict[str, float]:  # fmt: skip
        """The factor of each contender's learning rate: given, or found on validation rows at the middle rho."""
        if self.request.rates:
            return self.request.rates
        factors: dict[str, float] = {}
        fewer = self.request.tune_steps or max(1, full.steps // 2)
        for one in contenders:
            rhos = [rho for name, rho in paces if name == one.name and rho is not None]
            rho = middle(rhos) if rhos else None
            steps = steps_of(self.request.equal, fewer, full, paces[one.name, rho].of_share(fewer / full.steps))

            def loss_of(
                factor: float, one: Contender = one, rho: float | None = rho, steps: int = steps
            ) -> float:  # fmt: skip
                found = self._done(self._job(TUNE, one, 0, rho, steps, factor * full.default_lr, full))
                loss = float(found["loss"]) if found else float("inf")
                self.log.say(f"rates: {one.name}, {factor:g} times the default: validation loss {loss:.4f}")
                return loss

            try:
                factors[one.name] = best_factor(loss_of, self.request.grid)
            except InputError as error:
                self.problems[f"rates-{one.name}"] = str(error)
                self.log.fallback(f"{one.name} is left out: {error}")
        about = f"Found on validation rows with {fewer} steps of full fine-tuning."
        write_rates(self.folder.path / RATES, factors, about)
        return factors

    def _options(self, one: Contender, seed: int, **more: Any) -> dict[str, Any]:
        """The options of a run of this contender. What trains every layer keeps no hidden states."""
        kept = {} if one.budgeted and not one.peer else {"cache": "off"}
        return {
            **self.request.run, **kept, "strategy": one.strategy, "seed": seed, "examples": False,
            "early_stopping": False, "checkpoint_every": "1000000000", **more,
        }  # fmt: skip

    def _job(
        self, kind: str, one: Contender, seed: int, rho: float | None, steps: int, lr: float | None, full: Full
    ) -> Job:  # fmt: skip
        more: dict[str, Any] = {"steps": steps, "epochs": None, "rho": rho, "lr": lr}
        if one.name == "lisa":
            more["round_epochs"] = max(1, steps // LISA_ROUNDS) / full.per_epoch
        asked = self.request if kind == TRAIN else None
        return Job(
            kind, one.name, seed, self._options(one, seed, **more), rho, self.request.rows,
            asked.metrics if asked else (), asked.answers if asked else None, timed=self._timed(),
        )  # fmt: skip

    def _done(self, job: Job, must: bool = False) -> dict[str, Any] | None:
        """The result of a job, done now unless it was before; None when it failed, which is said and recorded.

        must: Raises: EdgegtError when it fails.
        """
        place = self.folder.path / JOBS
        place.mkdir(mode=0o700, exist_ok=True)
        path = place / f"{job.name}.json"
        found = _kept(path, job)
        if found is None:
            code, said = _run_apart(job, place)
            found = _kept(path, job)
            if code in _TERMINATED:
                raise Interrupted("stopped", 130 if code in (130, -2) else 143)
            if code != 0 or found is None:
                if must:
                    raise InputError(said) if code == 2 else EdgegtError(said)
                if job.kind != TUNE:  # a rate that is too high is an answer, and no failure
                    self.problems[job.name] = said
                self.log.fallback(f"{job.name}: {said}")
                return None
        for note in found["notes"] if job.kind == TRAIN else ():
            self.log.fallback(f"{job.contender}: {note}")
        if self.data is not None and found["data"] != self.data:
            raise InputError(f"the data of '{self.folder.path}' changed since it was begun: compare anew")
        self.data = found["data"]
        return found

    def _estimate(self, paces: Mapping[tuple[str, float | None], Pace], full: Mapping[int, Full]) -> None:
        """Say how long training will take, where it was measured."""
        first, seeds = full[0], self.request.seeds
        if self.request.equal == "steps" or first.seconds_per_flop is None:
            return
        once = sum(
            seconds_of(steps_of(self.request.equal, first.steps, first, pace), first, pace) for pace in paces.values()
        )
        self.log.say(
            f"training alone should take {format_duration(once * seeds)}: {len(paces)} contenders, {seeds} seed(s)"
        )

    def _written(self, results: list[dict[str, Any]], full: Full) -> Outcome:
        from edgegt.comparison.chart import write_chart

        path = self.folder.path
        order = list(self.request.strategies)
        results.sort(key=lambda one: (order.index(one["strategy"]), one["rho"] or 0.0, one["seed"]))
        write_json(path / RESULTS, results)
        if not results:
            raise EdgegtError(f"nothing could be compared: {'; '.join(self.problems.values())}")
        write_table(path / TABLE, table_of(results))
        write_chart(results, path / CHART)
        self.folder.write(ABOUT, {
            **self.folder.read(ABOUT), "finished": not self.problems, "problems": self.problems,
            "full_steps": full.steps, "full_flops": full.at(full.steps),
        })  # fmt: skip
        return Outcome(path, results, self.problems)


def _kept(path: Path, job: Job) -> dict[str, Any] | None:
    """The result of this very job, if it is there."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        found = dict(tree["result"]) if tree["job"] == job.to_json() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _run_apart(job: Job, place: Path) -> tuple[int, str]:
    """Do a job in a process of its own. Returns its exit code, and the last line that it said."""
    package = Path(__file__).resolve().parents[1]
    words = [sys.executable, "-m", f"{package.name}.comparison", str(place.resolve())]
    process = subprocess.Popen(
        words, cwd=package.parent, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(json.dumps(job.to_json()))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
    return process.returncode, lines[-1].removeprefix("edgegt: ")


def _line(found: Mapping[str, Any]) -> str:
    rho = "" if found["rho"] is None else f" rho {found['rho']:g}"
    return (
        f"{found['strategy']}{rho}, seed {found['seed']}: loss {found['loss']:.4f} after {found['steps']} steps, "
        f"{format_duration(found['seconds'])}, {format_bytes(found['peak_bytes'])}"
    )
