"""From options to a run known to be possible: data, costs, kernels and both budgets, before anything is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgegt.architecture import decoder_start, outputs_of, positions_of
from edgegt.budget import (
    Need,
    Probes,
    check_memory,
    check_time,
    flops_budget,
    plan_probes,
    rows_that_fit,
    within_memory,
)
from edgegt.cache import cache_dir
from edgegt.checkpoint import Checkpoints
from edgegt.classifier import as_classifier, check_writes, classifier_positions, fresh_line, fresh_numel, reading_of
from edgegt.cost import CostTable
from edgegt.data import Reading
from edgegt.device import Resolved
from edgegt.disk import DiskError
from edgegt.errors import InputError
from edgegt.host import Host, usable_cores
from edgegt.job import (
    Corpus,
    Schedule,
    data_digests,
    head_forms,
    make_schedule,
    memory_budget,
    model_name,
    read_corpus,
    resolve,
    rows_to_keep,
    storage_budget,
    within_positions,
)
from edgegt.log import Log
from edgegt.options import RunOptions, flag
from edgegt.planner import FORMATS
from edgegt.process import trim
from edgegt.rates import Rates
from edgegt.source import Source, load_tokenizer, open_source, read_config
from edgegt.version import __version__
from edgegt.watch import MemoryWatch

if TYPE_CHECKING:
    import torch

    from edgegt.quant import Choice


# Options, tokenizer, what a decoder begins with, how rows are read for classification -> the rows.
Reader = Callable[[RunOptions, Any, int | None, Reading | None], Corpus]


@dataclass(frozen=True)
class Decisions:
    """What depends on a clock or on free memory, or must not change: decided once, before the first step.

    data: SHA-256 of each data file. cache_bytes: that hidden states may take on the disk. streams: see `Need`.
    """

    version: str
    backend: str
    threads: int
    eight_bit: bool
    rates: dict[str, float]
    floor_bytes: int
    prepared_bytes: int
    memory_bytes: int
    rho: float
    seconds: float | None
    data: dict[str, str]
    cache_bytes: int = 0
    streams: bool = False

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Decisions:
        """The decisions that `asdict` gave, after JSON too. Raises: InputError for those of another version."""
        try:
            return cls(**tree)
        except (TypeError, KeyError) as error:
            raise InputError(
                f"the run was begun by another version of edgegt ({error}): go on with that one, or begin a new run"
            ) from error


@dataclass(frozen=True)
class Setup:
    """What a run works with. lr: peak learning rate. seconds: of the whole run, from `started` (perf_counter) on."""

    options: RunOptions
    resolved: Resolved
    host: Host
    source: Source
    config: Any
    tokenizer: Any
    corpus: Corpus
    schedule: Schedule
    need: Need
    probes: Probes
    rho: float
    flops: int
    full_flops: int
    memory_bytes: int
    lr: float
    kernels: Choice
    device: torch.device
    watch: MemoryWatch
    rates: Rates
    started: float
    seconds: float | None
    decisions: Decisions

    @property
    def seconds_left(self) -> float | None:
        """What is left of the time budget, None without one."""
        return None if self.seconds is None else self.seconds - (time.perf_counter() - self.started)

    def deadline(self, after_s: float) -> float | None:
        """When training must end, by time.perf_counter, so that `after_s` seconds are left; None without a budget."""
        return None if self.seconds is None else self.started + self.seconds - after_s

    @property
    def pad_id(self) -> int:
        return pad_of(self.tokenizer)

    def evaluation_rows(self, held_bytes: int) -> int:
        """Rows of an evaluation batch beside `held_bytes`: no more than of a training batch, which sets the peak."""
        most = min(32, self.options.batch_size)
        return rows_that_fit(lambda rows: self.need.evaluation_bytes(rows, held_bytes), most, self.memory_bytes)

    def answer_rows(self, held_bytes: int) -> int:
        """Prompts answered together; only their last position reaches the head."""
        most = min(32, 4 * self.options.batch_size)
        return rows_that_fit(lambda rows: self.need.answer_bytes(rows, held_bytes), most, self.memory_bytes)


def pad_of(tokenizer: Any) -> int:
    """The id that rows are padded with; what a tokenizer without padding and end-of-text pads with does not matter."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def prepare(
    options: RunOptions, log: Log, decided: Decisions | None = None, spent_s: float = 0.0, read: Reader = read_corpus
) -> Setup:  # fmt: skip
    """Read, tokenise, trace and check. Raises: InputError or BudgetError for whatever would stop the run later.

    decided: of a run that is resumed, which has taken `spent_s` seconds so far. read: gives the rows of both sides.
    """
    started, name = time.perf_counter(), model_name(options)
    digests = data_digests(options)
    if decided is not None:
        _check_unchanged(decided, digests, log)
    resolved, host = resolve(options)
    if resolved.notice:
        log.say(f"device: {resolved.notice}")
    config = read_config(name)
    source = open_source(name)
    given, reading, positions = options.max_length, None, positions_of(config)
    if options.classifies:
        reading, positions = reading_of(config), classifier_positions(config)
    else:
        check_writes(config)
    tokenizer = load_tokenizer(source.directory, not options.classifies)
    options = within_positions(options, positions)
    corpus = read(options, tokenizer, None if reading else decoder_start(config), reading)
    if options.max_length < given and corpus.reports[0].cut:
        log.fallback(f"the model knows {options.max_length} positions: rows are cut to that, not to {given}")
    log.say(f"data: {corpus.name} ({corpus.format}, {corpus.layout}), to train on {corpus.reports[0].line()}")
    for line in (*corpus.bad_lines(), *corpus.notes):
        log.fallback(line)
    if corpus.labels:
        config = as_classifier(config, corpus.labels, options.seed, source.files)
        if fresh := fresh_line(config, fresh_numel(config)):
            log.fallback(fresh)
    log.say(f"held out: {corpus.reports[1].rows} rows, {len(corpus.held_out)} of them evaluated")

    device, watch = start_torch(options, resolved, log, decided.threads if decided else None)
    schedule = make_schedule(options, corpus.train)
    kernels = choose_kernels(device, log, decided.backend if decided else None)
    if decided is not None and kernels.backend.name != decided.backend:
        _check_states(decided, kernels.backend.name)
    table = _trace(config, source, kernels.backend.kernels is not None)
    _use_everything_once(kernels, device)
    if decided is None:
        eight_bit = eight_bit_states(kernels, device, log)
        rates = machine_rates(kernels, device, config, table, schedule, eight_bit)
    else:
        eight_bit, rates = decided.eight_bit, Rates(**decided.rates)
    trim()
    vocabulary = outputs_of(config)
    cache_bytes, fewer = (decided.cache_bytes, None) if decided else storage_budget(options, resolved, table)
    keepable = partial(
        rows_to_keep, options, corpus.train, schedule, table.width, cache_bytes, resolved.profile.storage_bytes_per_s
    )
    need = Need(
        table, decided.floor_bytes if decided else watch.now(), vocabulary, corpus.longest_held_out,
        formats=tuple(formats for formats in FORMATS if eight_bit or formats.states == "float32"),
        head_rows=(None,) if corpus.labels else head_forms(len(corpus.used_tokens), vocabulary), rates=rates,
        copy_bytes=table.largest_weight if device.type == "cuda" else 0,
        prepared_bytes=decided.prepared_bytes if decided else watch.peak(),
        rows=keepable() if options.cache != "off" else None, spare=keepable,
    )  # fmt: skip
    if fewer and (options.cache == "on" or (need.rows is not None and need.rows.nbytes > cache_bytes)):
        log.fallback(fewer)
    memory_bytes, less = (decided.memory_bytes, None) if decided else memory_budget(options, resolved, host)
    if less:
        log.fallback(less)
    watch.hold(memory_bytes)
    need = replace(need, streams=decided.streams) if decided else within_memory(options, need, schedule, memory_bytes)
    if need.streams and device.type == "cuda":
        log.fallback("the int8 base is streamed to a GPU, which has not been measured yet: its peak may be another")
    rho = 1.0 if options.strategy == "full" else options.rho or resolved.profile.rho
    seconds = options.seconds_of(resolved.profile)
    if decided is not None:
        rho, seconds = decided.rho, decided.seconds
    if options.strategy == "full":
        probes, flops = Probes(0, 0), table.full_work().total(schedule.shapes)
    else:
        probing = options.measures_importance
        probes = plan_probes(options, schedule, rho, need, memory_bytes) if probing else Probes(0, 0)
        flops = flops_budget(rho, options, need, schedule, probes)
        check_memory(memory_bytes, options, need, schedule)
    decisions = decided or Decisions(
        __version__, kernels.backend.name, torch_threads(), eight_bit, asdict(rates),
        need.floor_bytes, need.prepared_bytes, memory_bytes, rho, seconds, digests, cache_bytes, need.streams,
    )  # fmt: skip
    setup = Setup(
        options=options, resolved=resolved, host=host, source=source, config=config, tokenizer=tokenizer,
        corpus=corpus, schedule=schedule, need=need, probes=probes, rho=rho, flops=flops,
        full_flops=table.full_work().total(schedule.shapes), memory_bytes=memory_bytes,
        lr=options.lr or default_lr(config, options.strategy), kernels=kernels, device=device, watch=watch, rates=rates,
        started=started - spent_s, seconds=seconds, decisions=decisions,
    )  # fmt: skip
    if options.strategy != "full" and decided is None:
        check_time(setup.seconds, time.perf_counter() - started, options, need, schedule, probes)
    return setup


def _check_unchanged(decided: Decisions, digests: dict[str, str], log: Log) -> None:
    """Raises: InputError when the run's data is not what it was; another version of edgegt is said."""
    for name, digest in decided.data.items():
        if digests.get(name) != digest:
            state = "is another file than it was" if name in digests else "is not there any more"
            raise InputError(
                f"{flag(name)} of this run {state}, and the run cannot go on as it began: put the file back, or begin "
                "a new run"
            )
    if decided.version != __version__:
        log.fallback(f"the run was begun by edgegt {decided.version}, this is {__version__}: bits may differ")


def _check_states(decided: Decisions, backend: str) -> None:
    """Raises: InputError when optimizer states may be in the codes of kernels that are gone."""
    if decided.eight_bit and "native" in (decided.backend, backend):
        raise InputError(
            f"the kernels '{decided.backend}' of this run do not work here any more, and its optimizer states are in "
            "their codes: see `edgegt doctor`, or begin a new run"
        )


def default_lr(config: Any, strategy: str = "greentrainer") -> float:
    """0.4 / hidden size: 1.6e-3 at 256, 1e-4 at 4096; half of it where every tensor is trained (docs/benchmarks.md)."""
    return (0.2 if strategy == "full" else 0.4) / float(config.get_text_config().hidden_size)


def torch_threads() -> int:
    """CPU threads that torch uses now."""
    import torch

    return torch.get_num_threads()


def start_torch(
    options: RunOptions, resolved: Resolved, log: Log, threads: int | None = None
) -> tuple[torch.device, MemoryWatch]:
    """Threads and seeds set, and the device that this run computes on. threads: as decided before."""
    import torch

    torch.set_num_threads(threads or options.threads or usable_cores())
    torch.manual_seed(options.seed)
    gpu = resolved.profile.kind in ("jetson", "geforce") and torch.cuda.is_available()
    if torch.cuda.is_available() and not gpu:
        log.fallback(f"a CUDA GPU is here and '{resolved.profile.name}' has none: the run uses the CPU")
    if resolved.profile.kind == "geforce" and not gpu:
        log.fallback("no CUDA GPU here: the run uses the CPU, and its memory budget is the process's")
    watch = MemoryWatch(gpu=gpu, unified=resolved.profile.unified)
    return torch.device("cuda" if gpu else "cpu"), watch


def choose_kernels(device: torch.device, log: Log, decided: str | None = None) -> Choice:
    """The int8 backend whose kernels ran and agreed here; a backend left out is said. decided: the one of this run."""
    from edgegt.errors import EdgegtError
    from edgegt.native import reuse_memory
    from edgegt.quant import choose_backend

    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    choice = choose_backend(device, cache, decided)
    if decided not in (None, choice.backend.name):
        log.fallback(f"the kernels '{decided}' of this run do not work here any more: bits may differ")
    for line in choice.lines:
        log.fallback(line)
    if choice.backend.kernels is not None:
        try:
            reuse_memory(cache)
        except EdgegtError as error:
            log.fallback(f"memory is asked for anew in every layer, which takes longer: {error}")
    return choice


def eight_bit_states(kernels: Choice, device: torch.device, log: Log) -> bool:
    """Whether the 8-bit optimizer runs here; if not, float32 states are used and that is said."""
    from edgegt.optimizer import eight_bit_works

    reason = eight_bit_works(device, kernels.backend.kernels)
    if reason:
        log.fallback(f"the 8-bit AdamW does not run here ({reason}): optimizer states are float32")
    return reason is None


def machine_rates(
    kernels: Choice, device: torch.device, config: Any, table: CostTable, schedule: Schedule, eight_bit: bool
) -> Rates:
    """Rates of this machine, measured at the model's width and the batches' size."""
    from edgegt.architecture import text_config
    from edgegt.speed import of_machine

    width = table.width
    typical = sorted(schedule.shapes, key=lambda shape: shape.rows * shape.tokens)[len(schedule.shapes) // 2]
    heads = getattr(text_config(config), "num_attention_heads", None) or max(1, width // 64)
    return of_machine(
        kernels.backend, device, width, typical.rows * typical.tokens, eight_bit,
        head_size=max(8, width // heads), length=typical.tokens,
    )  # fmt: skip


def _use_everything_once(kernels: Choice, device: torch.device) -> None:
    """Load what libraries load on first use (a solve, a product and its gradient), so that the floor has it in it."""
    import numpy
    import torch
    from scipy.optimize import milp

    from edgegt.quant import InputCache, Int8Linear, quantize_rows
    from edgegt.solver import quiet_stdout

    for name in ("safetensors.torch", "torch.utils.checkpoint", "transformers.generation"):
        import_module(name)
    with quiet_stdout():
        milp(numpy.array([-1.0, -1.0]), bounds=(0, 1), integrality=numpy.array([1, 0]))
    weight = torch.eye(64, device=device)
    layer = Int8Linear(quantize_rows(weight), backend=kernels.backend, inputs=InputCache())
    layer.promote(weight.clone())
    x = torch.ones(2, 4, 64, 64, device=device, requires_grad=True)
    y = torch.nn.functional.scaled_dot_product_attention(x, x, layer(x), is_causal=True)
    torch.nn.functional.cross_entropy(y.reshape(-1, 64), torch.zeros(512, dtype=torch.long, device=device)).backward()
    _write_a_checkpoint_once(weight)


def _write_a_checkpoint_once(weight: torch.Tensor) -> None:
    """A thread, a checksum and a file, as a checkpoint needs them; a full disk is told where it matters."""
    with TemporaryDirectory() as folder, suppress(OSError, DiskError):
        checkpoints = Checkpoints(Path(folder))
        checkpoints.begin(0, {"resting": {}}, {"a": {"master": weight.repeat(8, 8)}})
        checkpoints.finish()


def _trace(config: Any, source: Source, causal: bool) -> CostTable:
    from edgegt.model import head_is_apart
    from edgegt.trace import trace

    table = trace(config, causal=causal)
    return table.with_head_apart() if head_is_apart(config, source) else table
