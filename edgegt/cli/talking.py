"""`edgegt generate` and `edgegt chat`: answers to one prompt, or in a conversation, as they come."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt.cli.parser import print_json
from edgegt.errors import EdgegtError, InputError, nearest

if TYPE_CHECKING:
    from edgegt.conversation import Conversation
    from edgegt.talk import Wanted

_HELP = {
    "/reset": "forgets what was said; the system text stays",
    "/system TEXT": "sets the system text, or takes it away if there is no TEXT",
    "/save FILE": "adds what was said to a JSONL file that `edgegt run --data` reads",
    "/help": "shows this",
    '"""': "begins a text of several lines, and ends it",
    "/quit": "ends; so does Ctrl-D. Ctrl-C stops an answer",
}
_PROMPT, _MORE, _QUOTES = ">>> ", "... ", '"""'


def _add_answers(parser: argparse.ArgumentParser, tokens: str, greedy: str) -> None:
    parser.add_argument("--model", help="model directory or hub id, instead of a run folder")
    parser.add_argument("--patch", help="patch.safetensors to put into --model")
    parser.add_argument("--onnx", metavar="DIR", help="what `edgegt export --to onnx` wrote, instead of both")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"new tokens of an answer at most (default: {tokens})")
    parser.add_argument(
        "--temperature", type=float, metavar="X",
        help=f"0 takes the likeliest token each time, 1 draws as the model says (default: {greedy}; 1 with --top-k, "
        "--top-p or --min-p)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw among the likeliest that hold this probability")
    parser.add_argument("--min-p", type=float, metavar="X", help="draw among those with this share of the likeliest's")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: what was read is less likely")
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same again (default: another each time)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends an answer; may be repeated"
    )


def _wanted(parsed: argparse.Namespace) -> Wanted:
    from edgegt.talk import Wanted

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Wanted(parsed.tokens, {name: getattr(parsed, name) for name in names}, tuple(parsed.stop))


def add_generate(commands: Any, name: str) -> None:
    about = "answer a prompt with a run or a model with a patch"
    parser = commands.add_parser(
        name, help=about, prog="edgegt generate",
        description="Answers a prompt, and shows the answer as it comes. It takes the likeliest token each time unless "
        "a flag says otherwise, whatever the model's generation_config.json says of drawing.",
    )  # fmt: skip
    parser.add_argument(
        "words", nargs="*", metavar="[RUN] PROMPT", help="run folder (unless --model or --onnx) and the prompt"
    )
    _add_answers(parser, "64", "0")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output, at the end")
    parser.set_defaults(handler=_generate)


def _generate(parsed: argparse.Namespace) -> int:
    apart = parsed.model or parsed.onnx
    if len(parsed.words) != (1 if apart else 2):
        shape = f"PROMPT with --{'model' if parsed.model else 'onnx'}" if apart else "RUN PROMPT"
        remedy = "leave out the run folder" if apart else "name the run folder"
        raise InputError(
            f"`edgegt generate` takes {shape}, and got {len(parsed.words)} word(s): {remedy}, and quote the prompt"
        )
    from edgegt.subject import load_subject
    from edgegt.talk import INTERRUPTED, generate, label_of, nowhere

    wanted, prompt = _wanted(parsed), parsed.words[-1]
    subject = load_subject(None if apart else parsed.words[0], parsed.model, parsed.patch, parsed.onnx)
    if subject.labels:
        wanted.check_unused()
        label = label_of(subject, prompt)
        print_json({"label": label}) if parsed.json else print(label)
        return 0
    answer = generate(subject, prompt, wanted, nowhere if parsed.json else _show)
    print_json(dataclasses.asdict(answer)) if parsed.json else print()
    return 130 if answer.stopped == INTERRUPTED else 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def add_chat(commands: Any, name: str) -> None:
    parser = commands.add_parser(
        name, help="a conversation with a run or a model with a patch", prog="edgegt chat",
        description="A conversation in the terminal. What is typed or piped in is answered line by line; lines that "
        "begin with / are commands, and /help lists them.",
    )  # fmt: skip
    parser.add_argument("run", nargs="?", help="run folder")
    _add_answers(
        parser, "512, or 64 for a run on prompts", "as generation_config.json of a model for conversations says, else 0"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system text, said before the conversation")
    parser.set_defaults(handler=_chat)


def _chat(parsed: argparse.Namespace) -> int:
    from edgegt.conversation import Conversation
    from edgegt.log import Log
    from edgegt.subject import load_subject

    wanted, log = _wanted(parsed), Log()
    if sys.stdin.isatty():
        log.say("loading the model")
    if parsed.run is not None and parsed.onnx is not None:
        raise InputError("--onnx is a model by itself: leave out the run folder")
    subject = load_subject(parsed.run, parsed.model, parsed.patch, parsed.onnx)
    conversation = Conversation(subject, wanted, parsed.system or "", log)
    if sys.stdin.isatty():
        log.say("Ask something. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        return _converse(conversation, _typed(), True)
    return _converse(conversation, _piped(), False)


def _converse(conversation: Conversation, lines: Iterator[str], terminal: bool) -> int:
    """Answer every line; of lines that were piped in, a refused one is an empty answer, and exit code 2 in the end."""
    refused = 0
    for line in lines:
        command = re.match(r"/(\w+)(?:\s+(.*))?$", line.strip(), re.S)
        try:
            if command is not None:
                if not _command(conversation, command[1], (command[2] or "").strip()):
                    return refused
            elif line.strip() and not _answer(conversation, line.strip(), terminal):
                return 130
        except KeyboardInterrupt:  # before the answer began, or twice
            if not terminal:
                raise
            print()
        except EdgegtError as error:
            print(f"edgegt: {error}", file=sys.stderr)
            refused = 0 if terminal else error.exit_code
            if command is None and not terminal:
                print(flush=True)
    return refused


def _answer(conversation: Conversation, line: str, terminal: bool) -> bool:
    """Show one answer; False where Ctrl-C ends the program, because nobody types."""
    from edgegt.talk import INTERRUPTED, LENGTH

    answer = conversation.ask(line, _show)
    print(flush=True)
    if not answer.text:
        conversation.log.say("note: no answer came; the question is not kept")
    elif answer.stopped == LENGTH:
        conversation.log.say(f"note: the answer was ended after {answer.tokens} tokens; --tokens allows more")
    if terminal:
        print()
    return terminal or answer.stopped != INTERRUPTED


def _command(conversation: Conversation, word: str, rest: str) -> bool:
    """Do what a line beginning with / says; False where it ends the program. Raises: InputError for an unknown one."""
    say = conversation.log.say
    if word == "quit":
        return False
    if word == "help":
        for usage, meaning in _HELP.items():
            say(f"{usage:<14} {meaning}")
    elif word == "reset":
        conversation.reset()
        say("forgotten")
    elif word == "system":
        conversation.set_system(rest)
        say("the system text is set" if rest else "there is no system text")
    elif word == "save":
        if not rest:
            raise InputError("/save needs a file: name one, such as /save talk.jsonl")
        count = conversation.save(Path(rest).expanduser())
        say(f"{count} row{'s' if count > 1 else ''} added to {rest}")
    else:
        known = [usage.split()[0] for usage in _HELP if usage[0] == "/"]
        raise InputError(f"unknown command '/{word}'{nearest('/' + word, known)}; commands: {', '.join(known)}")
    return True


def _typed() -> Iterator[str]:
    """Lines from a terminal, with its history where Python has readline; Ctrl-D ends them."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield _one_turn()
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit ends.", file=sys.stderr)
        except EOFError:
            print()
            return


def _one_turn() -> str:
    """A line, or the lines between two times three quotation marks."""
    text = input(_PROMPT)
    if not text.startswith(_QUOTES):
        return text
    text = text.removeprefix(_QUOTES)
    while not text.rstrip().endswith(_QUOTES):
        text += "\n" + input(_MORE)
    return text.rstrip().removesuffix(_QUOTES)


def _piped() -> Iterator[str]:
    """Lines from standard input. Raises: InputError when they are not text."""
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no text in {error.encoding}: convert it") from error
