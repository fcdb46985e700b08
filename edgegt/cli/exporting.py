"""`edgegt export` and `edgegt patch`: what was trained, for other programs, and patches compared and averaged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgegt.cli.parser import Parser, print_json
from edgegt.errors import InputError
from edgegt.log import Log

_DTYPES = ("float32", "bfloat16", "float16")


def add_export(commands: Any, name: str) -> None:
    about = "write a trained model for transformers, or its patch as a file"
    parser = commands.add_parser(name, help=about, prog="edgegt export")
    parser.add_argument("run", nargs="?", help="run folder")
    parser.add_argument(
        "--to", choices=("hf", "onnx", "patch"), required=True,
        help="a model folder for transformers, one with ONNX files, or the trained tensors",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="PATH", help="the folder, or the file, to write")
    parser.add_argument("--model", help="the base: of --patch, or of a run whose base was moved")
    parser.add_argument("--patch", help="patch.safetensors, instead of a run folder")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of all float tensors (default: as in the base; of a patch as it is)"
    )
    parser.add_argument("--bits", type=int, choices=(8, 32), help="of the matrices in ONNX files (default: 8)")
    _add_force(parser)
    parser.set_defaults(handler=_export)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace what an earlier export left at --output")
    parser.add_argument("--quiet", action="store_true", help="say nothing on standard error but errors")


def _export(parsed: argparse.Namespace) -> int:
    from edgegt.export import export_model, export_patch

    log = Log(parsed.quiet)
    if parsed.to == "onnx":
        from edgegt.onnx.write import export_onnx

        if parsed.dtype is not None:
            raise InputError("--dtype goes with --to hf and --to patch: ONNX files have --bits 8 or 32")
        print(export_onnx(parsed.run, parsed.model, parsed.patch, parsed.output, parsed.bits or 8, parsed.force, log))
        return 0
    if parsed.bits is not None:
        raise InputError("--bits goes with --to onnx: --to hf and --to patch have --dtype")
    if parsed.to == "patch":
        if parsed.model is not None:
            raise InputError("--model goes with --to hf: a patch is written without its base")
        print(export_patch(parsed.run, parsed.patch, parsed.output, parsed.dtype, parsed.force, log))
        return 0
    print(export_model(parsed.run, parsed.model, parsed.patch, parsed.output, parsed.dtype, parsed.force, log))
    return 0


def add_patch(commands: Any, name: str) -> None:
    about = "compare patches of one base, average them, or put one into its base"
    parser = commands.add_parser(name, help=about, prog="edgegt patch")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser, required=True)

    diff = actions.add_parser("diff", help="which tensors differ, and by how much", prog="edgegt patch diff")
    diff.add_argument("patches", nargs=2, metavar="PATCH", help="patch file or run folder")
    diff.add_argument("--model", help="their base, to compare with where only one has a tensor")
    diff.add_argument("--json", action="store_true", help="print only JSON on standard output")
    diff.set_defaults(handler=_diff)

    merge = actions.add_parser("merge", help="the average of patches of one base", prog="edgegt patch merge")
    merge.add_argument("patches", nargs="+", metavar="PATCH", help="patch file or run folder, two or more")
    merge.add_argument("--output", required=True, metavar="FILE", help="the patch to write")
    merge.add_argument("--weights", metavar="W,W,...", help="share of each patch, such as 0.7,0.3 (default: equal)")
    merge.add_argument("--model", help="their base, which counts where only some have a tensor")
    _add_force(merge)
    merge.set_defaults(handler=_merge)

    apply = actions.add_parser("apply", help="the base with a patch, as a model folder", prog="edgegt patch apply")
    apply.add_argument("patch", metavar="PATCH", help="patch file")
    apply.add_argument("--model", required=True, help="its base")
    apply.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    apply.add_argument("--dtype", choices=_DTYPES, help="of all float tensors (default: as in the base)")
    _add_force(apply)
    apply.set_defaults(handler=_export, run=None, to="hf", bits=None)


def _diff(parsed: argparse.Namespace) -> int:
    from edgegt.export import patch_at
    from edgegt.merge import compare

    first, second = (patch_at(place) for place in parsed.patches)
    found = compare(first, second, _base(parsed.model))
    if parsed.json:
        print_json(found)
        return 0
    where = {"both": "both", "first": "only the first", "second": "only the second"}
    same = [entry for entry in found["tensors"] if entry["same"]]
    shown = [entry for entry in found["tensors"] if not entry["same"]]
    width = max((len(entry["name"]) for entry in shown), default=6)
    if shown:
        print(f"{'tensor':<{width}}  {'in':<15}  {'difference':>10}  {'relative':>9}")
    for entry in shown:
        norms = "  ".join(
            f"{'unknown':>{size}}" if value is None else f"{value:>{size}.4g}"
            for value, size in ((entry["difference"], 10), (entry["relative"], 9))
        )
        rows = f"  {entry['rows']} rows{'' if parsed.model else ' in both'}" if "rows" in entry else ""
        print(f"{entry['name']:<{width}}  {where[entry['in']]:<15}  {norms}{rows}")
    print(f"{len(shown)} of {len(found['tensors'])} tensors differ, {len(same)} are the same")
    if parsed.model is None and any(entry["difference"] is None or "rows" in entry for entry in shown):
        print("what only one patch has is compared with the base when that is given: --model")
    return 0


def _merge(parsed: argparse.Namespace) -> int:
    from edgegt.export import new_file, patch_at
    from edgegt.merge import merge, parse_weights

    if len(parsed.patches) < 2:
        raise InputError("`edgegt patch merge` takes two patches or more, and got 1: name the others too")
    log, path = Log(parsed.quiet), new_file(parsed.output, parsed.force)
    shares = parse_weights(parsed.weights, len(parsed.patches))
    patches = [patch_at(place) for place in parsed.patches]
    if len({patch.about.get("separator", "") for patch in patches}) > 1:
        log.say("note: the patches were trained with different separators after a prompt: the first one's is kept")
    names = merge(patches, shares, _base(parsed.model), path)
    log.say(f"{len(names)} tensors, the shares {', '.join(f'{share:.3g}' for share in shares)}")
    print(path)
    return 0


def _base(model: str | None) -> Any:
    if model is None:
        return None
    from edgegt.pretrained import open_pretrained

    return open_pretrained(str(Path(model)) if Path(model).is_dir() else model)
