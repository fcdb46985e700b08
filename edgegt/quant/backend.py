"""What an int8 backend offers, the float reference it is held against, and how a machine's backend is chosen.

A backend is accepted only after its kernels have run on this machine and agreed with the reference: packages import on
machines where their kernels fail. Those that agree are timed, and the fastest is kept in `<cache_dir>/backend.json`,
keyed by processor, versions and threads. Where no int8 kernel works, or none is faster than float32, the reference is
chosen and the user is told: weights stay int8 and are multiplied in float32, chunk by chunk.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgegt.attention import disagreement
from edgegt.native import Kernels, compiler_words
from edgegt.quant.weight import LOW_STEPS, Int8Weight, absmax, refresh_planes, row_chunks

TOKEN_ELEMENTS = 2**20
DW_TOKENS = 1024
EVEN_ELEMENTS = 2**17
# 2^32 divided by the golden ratio and by the plastic number, as signed: multiples of them fill the 32 bits evenly.
GOLDEN, PLASTIC = 2654435769 - 2**32, 3242174889 - 2**32
SMALLEST_TOKEN_SCALE = 2.0**-100
AGREEMENT = 1e-3
ROUNDING = 0.02
CHECK_SHAPES = ((1, 5, 7), (33, 67, 129), (64, 256, 192))
TIMED_SHAPE = (512, 512, 1024)
TIMED_S = 0.25
TIMED_TURNS = 12
FASTER = 1.05
REFERENCE_FASTER = 1.5
FILE_NAME = "backend.json"
FILE_FORMAT = 3


class Backend(Protocol):
    """int8 products with float scales: x ~ scale[:, None] * q. kernels: the compiled ones, None without them."""

    name: str
    kernels: Kernels | None

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [n]) of x [n, k], or of x * columns with columns [k]; scale = absmax / 127.

        evenly: a value between two steps goes up as often as its share says, not always to the nearer one, so that of
        very many small values beside a large one (a softmax) the sum is kept.
        """
        ...

    def product(
        self, q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """y = x W^T, float32 [n, out], from q [n, k], weight_q [out, k], weight_scale [out]; low: a second plane."""
        ...

    def product_back(self, q: Tensor, scale: Tensor, weight_q: Tensor) -> Tensor:
        """dx = dy W, float32 [n, k], from q [n, out] and weight_q [out, k]; dy already holds the row scales."""
        ...

    def weight_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """dw = dy^T x, float32 [out, k], of dy [n, out] and the quantised x (q [n, k], scale [n]); added to `out`."""
        ...

    def refresh(self, weight: Int8Weight, master: Tensor) -> None:
        """As weight.refresh_planes."""
        ...


@dataclass(frozen=True)
class BackendCheck:
    """One backend on this machine. error: why it is not ok; gflops: quantising, y, dx and dw together."""

    name: str
    ok: bool
    error: str = ""
    relative_error: float | None = None
    gflops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend in use; lines: what the user must know (a backend left out and why); note: the measured speeds."""

    backend: Backend
    lines: tuple[str, ...] = ()
    note: str = ""


def quantize_tokens(x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
    """Per-row absmax quantisation in torch, at most 4 MiB of float32 at a time. NaN and infinity end in the scale."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    for rows in row_chunks(x, elements=EVEN_ELEMENTS if evenly else TOKEN_ELEMENTS):
        part = x[rows].to(torch.float32)
        if columns is not None:
            part = part * columns
        size = absmax(part).div_(127).clamp_min_(SMALLEST_TOKEN_SCALE)
        scale[rows] = size
        inverse = size.reciprocal_().unsqueeze(1)
        part = part * inverse if columns is None else part.mul_(inverse)
        q[rows] = part.add_(_turns(rows, x)).floor_().clamp_(-127, 127) if evenly else part.round_()
    return q, scale


def _turns(rows: slice, x: Tensor) -> Tensor:
    """Where a value between two steps starts, in [0, 1), for these rows of x: even along each row and each column."""
    row = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)[rows].mul_(GOLDEN)
    column = torch.arange(x.shape[1], device=x.device, dtype=torch.int32).mul_(PLASTIC)
    turns = (row.unsqueeze(1) + column).bitwise_right_shift_(8).bitwise_and_(2**24 - 1)
    return turns.to(torch.float32).mul_(2.0**-24)


def scale_product(product: Tensor, scale: Tensor, weight_scale: Tensor | None = None) -> Tensor:
    """scale[:, None] * product * weight_scale as float32, in the memory of the int32 product."""
    # Not product.view(float32): what is a view may not be changed in place where autograd follows (Falcon does).
    result = torch.empty(0, dtype=torch.float32, device=product.device)
    result.set_(product.untyped_storage(), product.storage_offset(), product.shape, product.stride())
    result.copy_(product).mul_(scale.unsqueeze(1))
    return result if weight_scale is None else result.mul_(weight_scale)


def quantize_columns(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [n, k], float32 scale [k]) of x [n, k] * tokens[:, None], rounded evenly: the operand of a sum over n."""
    if x.shape[0] == 0:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), torch.zeros(x.shape[1], device=x.device)
    part = x.to(torch.float32) * tokens.unsqueeze(1)
    scale = absmax(part.t()).div_(127).clamp_min_(SMALLEST_TOKEN_SCALE)
    for rows in row_chunks(part, elements=EVEN_ELEMENTS):
        part[rows].mul_(scale.reciprocal()).add_(_turns(rows, x)).floor_()
    return part.clamp_(-127, 127).to(torch.int8), scale


def weight_gradient(dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """dw = dy^T x in float32 [out, in], from dy [n, out] and the quantised x; x is float only 1024 tokens at a time.

    out: float32 [out, in] to add dw to, in place.
    """
    dw = out
    for start in range(0, q.shape[0], DW_TOKENS):
        tokens = slice(start, start + DW_TOKENS)
        x = q[tokens].to(torch.float32).mul_(scale[tokens].unsqueeze(1))
        part = dy[tokens].to(torch.float32).t()
        dw = part @ x if dw is None else dw.addmm_(part, x)
    return torch.zeros(dy.shape[1], q.shape[1], device=q.device) if dw is None else dw


class ReferenceBackend:
    """The same operations with float32 products of the integers: slow where int8 kernels exist, right everywhere."""

    name = "reference"
    kernels: Kernels | None = None

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """As Backend."""
        return quantize_tokens(x, columns, evenly)

    def product(
        self, q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """As Backend."""
        x = q.to(torch.float32).mul_(scale.unsqueeze(1))
        y = torch.empty(q.shape[0], weight_q.shape[0], dtype=torch.float32, device=q.device)
        for rows in row_chunks(weight_q, elements=TOKEN_ELEMENTS):
            part = weight_q[rows].to(torch.float32)
            if low is not None:
                part.add_(low[rows].to(torch.float32), alpha=1 / LOW_STEPS)
            torch.mm(x, part.t(), out=y[:, rows])
        return y.mul_(weight_scale)

    def product_back(self, q: Tensor, scale: Tensor, weight_q: Tensor) -> Tensor:
        """As Backend."""
        dx = torch.zeros(q.shape[0], weight_q.shape[1], dtype=torch.float32, device=q.device)
        for rows in row_chunks(weight_q, elements=TOKEN_ELEMENTS):
            dx.addmm_(q[:, rows].to(torch.float32), weight_q[rows].to(torch.float32))
        return dx.mul_(scale.unsqueeze(1))

    def weight_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """As Backend, in float32."""
        return weight_gradient(dy, q, scale, out)

    def refresh(self, weight: Int8Weight, master: Tensor) -> None:
        """As Backend."""
        refresh_planes(weight, master)


def check(backends: Mapping[str, Callable[[], Backend]], device: torch.device) -> list[BackendCheck]:
    """Run, compare and time every backend on this device; a failure of any kind is a result, never an exception."""
    results: list[BackendCheck] = []
    sound: dict[str, Backend] = {}
    for name, make in backends.items():
        try:
            sound[name] = make()
            error = max(_disagreement(sound[name], device, shape) for shape in CHECK_SHAPES)
            kernels = sound[name].kernels
            if kernels is not None:
                error = max(error, disagreement(kernels))
            note = "" if error < AGREEMENT else f"its results are off by {error:.1e} (allowed {AGREEMENT:.0e})"
            results.append(BackendCheck(name, not note, note, error))
        except Exception as problem:  # whatever a native package raises makes it unavailable, with the reason
            results.append(BackendCheck(name, False, _reason(problem)))
    speeds = _gflops({item.name: sound[item.name] for item in results if item.ok}, device)
    note = f"y, dx and dw agree on {len(CHECK_SHAPES)} shapes"
    return [replace(item, gflops=speeds[item.name], note=note) if item.ok else item for item in results]


def choose(
    backends: Mapping[str, Callable[[], Backend]], device: torch.device, cache_dir: Path, wanted: str | None = None
) -> Choice:
    """The stored choice for this machine and these versions, or a new one, which is stored.

    wanted: the backend that was chosen before; it is taken, measured or not, if it loads.
    """
    known = {**backends, ReferenceBackend.name: ReferenceBackend}
    if wanted in known:
        with suppress(Exception):  # whatever a native package raises: another one is chosen
            return Choice(known[wanted](), (), "as chosen before")
    path, key = cache_dir / FILE_NAME, machine_key(device)
    stored, lines = _read(path)
    entry = stored.get(key)
    if isinstance(entry, dict) and entry.get("backend") in known:
        try:
            chosen = known[entry["backend"]]()
            return Choice(chosen, tuple(str(line) for line in entry["lines"]), str(entry["note"]))
        except Exception as error:  # a package broken since: measure again
            lines.append(f"int8 backend '{entry['backend']}' of {path} no longer loads ({_reason(error)}): chosen anew")
    choice = _choose_now(known, check(known, device))
    entry = {"backend": choice.backend.name, "lines": list(choice.lines), "note": choice.note}
    lines += _write(path, {**stored, key: entry})
    return Choice(choice.backend, (*lines, *choice.lines), choice.note)


def machine_key(device: torch.device) -> str:
    """What a choice depends on: device, its name, versions of torch and bitsandbytes, a compiler, threads."""
    try:
        bitsandbytes = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        bitsandbytes = "absent"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    compiler = (compiler_words() or ["no compiler"])[0]
    parts = (device.type, name, f"torch {torch.__version__}", f"bitsandbytes {bitsandbytes}", compiler)
    return " | ".join((*parts, f"{torch.get_num_threads()} threads"))


def fastest(checks: Sequence[BackendCheck]) -> BackendCheck:
    """The fastest that agrees; an earlier row keeps its place unless a later one is 5 % faster.

    The reference must be 1.5 times as fast: on a busy machine every backend waits for threads and all look alike.
    """
    best = next((item for item in checks if item.ok), checks[-1])
    for item in checks:
        needed = REFERENCE_FASTER if item.name == ReferenceBackend.name else FASTER
        if item.ok and (item.gflops or 0) > needed * (best.gflops or 0):
            best = item
    return best


def _choose_now(known: Mapping[str, Callable[[], Backend]], checks: list[BackendCheck]) -> Choice:
    best = fastest(checks)
    lines = [f"int8 backend '{item.name}' left out: {item.error}" for item in checks if not item.ok]
    if best.name == ReferenceBackend.name:
        lines.append("no int8 kernel beats float32 on this machine: weights stay int8, products run in float32")
    speeds = ", ".join(f"{item.name} {item.gflops:.0f} GFLOP/s" for item in checks if item.gflops)
    return Choice(known[best.name](), tuple(lines), speeds)


def _operands(device: torch.device, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, k], dy [n, out], int8 weight [out, k] and its scales: the same each time, torch's generator untouched."""
    tokens, inner, out = shape
    generator = torch.Generator().manual_seed(tokens + inner + out)
    x = torch.randn(tokens, inner, generator=generator)
    dy = torch.randn(tokens, out, generator=generator)
    weight = torch.randint(-127, 128, (out, inner), generator=generator, dtype=torch.int8)
    scale = torch.rand(out, generator=generator) + 0.5
    return x.to(device), dy.to(device), weight.to(device), scale.to(device)


def _disagreement(backend: Backend, device: torch.device, shape: tuple[int, int, int]) -> float:
    """The largest relative error of y and dx against float64 products of the dequantised operands.

    Raises: ArithmeticError when the quantised tokens are not the tokens.
    """
    x, dy, weight, weight_scale = _operands(device, shape)
    whole = weight.cpu().double()
    errors = []
    for tokens, columns in ((x, None), (dy, weight_scale)):
        q, scale = backend.quantize_tokens(tokens, columns)
        meant = (tokens if columns is None else tokens * columns).cpu().double()
        read = q.cpu().double() * scale.cpu().double().unsqueeze(1)
        if not _relative(read, meant) < ROUNDING:
            raise ArithmeticError(f"its quantised tokens are off by {_relative(read, meant):.1e} (allowed {ROUNDING})")
        if columns is None:
            dw = backend.weight_gradient(dy, q, scale).cpu().double()
            error = _relative(dw, dy.cpu().double().t() @ read)
            if not error < ROUNDING:
                raise ArithmeticError(f"its weight gradient is off by {error:.1e} (allowed {ROUNDING})")
        if columns is None:
            y = backend.product(q, scale, weight, weight_scale)
            errors.append(_relative(y.cpu().double(), read @ whole.t() * weight_scale.cpu().double()))
        else:
            dx = backend.product_back(q, scale, weight)
            errors.append(_relative(dx.cpu().double(), read @ whole))
    return max(errors)


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def _gflops(backends: Mapping[str, Backend], device: torch.device) -> dict[str, float]:
    """The best of a few runs of y, dx and dw with their quantisation, in 1e9 FLOP/s; about 0.3 s, by turns.

    A busy machine slows some runs down a lot: taking turns and the best run keeps it from deciding.
    """
    x, dy, weight, scale = _operands(device, TIMED_SHAPE)
    best = dict.fromkeys(backends, float("inf"))
    end = time.perf_counter() + TIMED_S
    for turn in range(TIMED_TURNS + 1):
        for name, backend in backends.items():
            start = time.perf_counter()
            q, tokens = backend.quantize_tokens(x)
            y = backend.product(q, tokens, weight, scale)
            dx = backend.product_back(*backend.quantize_tokens(dy, scale), weight)
            dw = backend.weight_gradient(dy, q, tokens)
            float(y[0, 0] + dx[0, 0] + dw[0, 0])  # waits for an asynchronous device
            if turn > 0:  # the first turn warms up
                best[name] = min(best[name], time.perf_counter() - start)
        if turn > 0 and time.perf_counter() > end:
            break
    flops = 6 * prod(TIMED_SHAPE)
    return {name: flops / seconds / 1e9 for name, seconds in best.items()}


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The stored choices, and a line when the file cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == FILE_FORMAT:
            return dict(content["choices"]), []
        return {}, []
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {}, [f"{path} cannot be read ({_reason(error)}): the int8 backend is chosen anew"]


def _write(path: Path, choices: dict[str, Any]) -> list[str]:
    """Replace the file at once; a line when it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"format": FILE_FORMAT, "choices": choices}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        return [f"{path} cannot be written ({_reason(error)}): the int8 backend will be chosen again next time"]
    return []


def _reason(error: Exception) -> str:
    """The first line of an exception, with its type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _cpu_name() -> str:
    """The processor's name, for the key only."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
