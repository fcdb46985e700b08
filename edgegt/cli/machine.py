"""`edgegt devices`, `doctor`, `calibrate` and `cache`: what there is to run on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgegt.cli.parser import print_json
from edgegt.errors import InputError
from edgegt.log import Log


def add_devices(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="list device profiles, or explain one", prog="edgegt devices")
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    parser.add_argument("name", nargs="?", help="profile to show")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_devices)


def _devices(parsed: argparse.Namespace) -> int:
    from edgegt import device
    from edgegt.host import read_host

    if parsed.action == "show":
        if not parsed.name:
            raise InputError("`edgegt devices show` needs a name: `edgegt devices` lists them")
        resolved = device.resolve_device(parsed.name, read_host())
        if parsed.json:
            print_json(resolved.profile.to_json())
        else:
            print(device.explain(resolved.profile))
    elif parsed.json:
        print_json(device.devices_json())
    else:
        print("\n".join(device.list_lines()))
    return 0


def add_doctor(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="what works on this machine", prog="edgegt doctor")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from edgegt.doctor import examine, findings_text

    findings = examine()
    if parsed.json:
        print_json(findings)
    else:
        print(findings_text(findings))
    return 0 if findings["ok"] else 1


def add_calibrate(commands: Any, name: str) -> None:
    about = "measure this machine and write its device profile"
    parser = commands.add_parser(name, help=about, prog="edgegt calibrate")
    parser.add_argument("--output", metavar="FILE.toml", default="calibrated.toml", help="default: calibrated.toml")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of about half a minute, less sure")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_calibrate)


def _calibrate(parsed: argparse.Namespace) -> int:
    from edgegt.calibrate import calibrate, findings_text

    Log(parsed.json).say("measuring this machine, a few seconds" if parsed.quick else "measuring, about half a minute")
    findings = calibrate(Path(parsed.output), parsed.force, parsed.quick)
    if parsed.json:
        print_json(findings)
    else:
        print(findings_text(findings))
    return 0


def add_cache(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="list or clear the int8 models kept on disk", prog="edgegt cache")
    parser.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    parser.set_defaults(handler=_cache)


def _cache(parsed: argparse.Namespace) -> int:
    from edgegt.cache import cache_dir
    from edgegt.store import clear_cache, list_cache
    from edgegt.units import format_bytes

    if parsed.action == "clear":
        print(f"{format_bytes(clear_cache(cache_dir()))} freed in {cache_dir()}")
        return 0
    bases = list_cache(cache_dir())
    for base in bases:
        print(f"{base.model:<32} {format_bytes(base.size_bytes):>12}  {base.fingerprint[:12]}  {base.directory}")
    if not bases:
        print(f"nothing is cached in {cache_dir()}")
    return 0
