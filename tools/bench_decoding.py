"""How fast answers come, and how large the files are: PyTorch in int8, and ONNX files in 8 bits and float32.

    python tools/bench_decoding.py --shape smollm2-135m --tokenizer-from MODEL

Random weights of a well-known shape, with a trained head over them. Each form answers in a process of its own, in turn,
several times; the table quotes medians, and ratios of neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import shapes

FORMS = ("int8", "onnx8", "onnx32")
LABELS = {"int8": "PyTorch, int8 base", "onnx8": "ONNX, 8 bits", "onnx32": "ONNX, float32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="smollm2-135m", choices=shapes.SHAPES)
    parser.add_argument("--tokenizer-from", type=Path, help="model folder to copy a tokenizer from")
    parser.add_argument("--prompt", type=int, default=64, help="tokens read")
    parser.add_argument("--tokens", type=int, default=64, help="tokens made")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("FORM", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], Path(given.one[1]), given.prompt, given.tokens, given.threads)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-decoding-") as place:
        folder = Path(place)
        sizes = write_files(folder, given.shape, given.tokenizer_from)
        found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(given.times):
            for form in FORMS:
                found[form].append(one(form, folder, given))
    print(table(found, sizes))


def write_files(folder: Path, shape: str, tokenizer_from: Path | None) -> dict[str, int]:
    """The base, a patch with its head, and both exports; bytes of the files that hold weights."""
    from edgegt.onnx.write import export_onnx
    from edgegt.patch import save_patch
    from edgegt.pretrained import open_pretrained

    base = str(shapes.write_random_model(shape, folder / "base", tokenizer_from))
    known = open_pretrained(base)
    head = known.value(known.head).float().contiguous()
    save_patch(folder / "patch.safetensors", {known.head: head}, known.fingerprint, shape, "0")
    sizes = {}
    for bits in (8, 32):
        out = export_onnx(None, base, str(folder / "patch.safetensors"), str(folder / f"onnx{bits}"), bits=bits)
        sizes[f"onnx{bits}"] = sum(path.stat().st_size for path in out.glob("model.onnx*"))
    return sizes


def one(form: str, folder: Path, given: Any) -> dict[str, float]:
    """One answer of one form, in a process of its own."""
    sizes = ["--prompt", str(given.prompt), "--tokens", str(given.tokens), "--threads", str(given.threads)]
    command = [sys.executable, __file__, "--one", form, str(folder), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(form: str, folder: Path, prompt: int, tokens: int, threads: int) -> dict[str, float]:
    """Seconds to the first token, tokens/s after it, and the process's peak in MiB; after a short answer to warm up."""
    from time import perf_counter

    import torch

    from edgegt.decoding import Engine, decode
    from edgegt.onnx.engine import OnnxEngine
    from edgegt.onnx.runtime import OnnxModel
    from edgegt.process import share_the_machine
    from edgegt.sampling import Sampling
    from edgegt.subject import load_subject
    from edgegt.talk import engine_of

    share_the_machine()
    torch.set_num_threads(threads)
    engine: Engine
    if form == "int8":
        engine = engine_of(load_subject(None, str(folder / "base"), str(folder / "patch.safetensors")))
    else:
        engine = OnnxEngine(OnnxModel(folder / form, threads), (), None, None)
    ids = torch.randint(3, 1000, (2, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    list(decode(engine, ids[0], 8, Sampling()))
    times = [perf_counter()]
    for _ in decode(engine, ids[1], tokens, Sampling()):
        times.append(perf_counter())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    return {"first_s": times[1] - times[0], "tokens_per_s": (len(times) - 2) / (times[-1] - times[1]), "peak_mib": peak}


def table(found: dict[str, list[dict[str, float]]], sizes: dict[str, int]) -> str:
    """Markdown."""
    lines = [
        "| form | weights, MB | first token, s | tokens/s | peak, MiB | tokens/s over PyTorch's |",
        "| --- |" + " ---: |" * 5,
    ]
    for form, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        pairs = zip(runs, found["int8"], strict=True)
        ratios = sorted(run["tokens_per_s"] / other["tokens_per_s"] for run, other in pairs)
        size = f"{sizes[form] / 1e6:.0f}" if form in sizes else ""
        lines.append(
            f"| {LABELS[form]} | {size} | {middle['first_s']:.2f} | {middle['tokens_per_s']:.1f} | "
            f"{middle['peak_mib']:.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
