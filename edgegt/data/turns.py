"""Lists of turns as people write them, [{role, content}] and [{from, value}], read into roles and texts."""

from __future__ import annotations

from collections.abc import Mapping

from edgegt.data.fields import ABSENT, lookup
from edgegt.data.formats import Fault, Fields, listed
from edgegt.data.rows import Turn
from edgegt.errors import nearest
from edgegt.units import format_text

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "model": "assistant", "gpt": "assistant", "tool": "tool",
}  # fmt: skip
_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "text")
# What a turn may have beside its text and would lose: calls of tools, reasoning, and not being learned.
_LOST = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_SWITCHES = ("weight", "train")
_WANTED = 'turns such as {"role": "user", "content": "..."}'


def read_turns(record: Fields, field: str) -> tuple[Turn, ...] | Fault:
    """The turns in a field of a record; a `system` text beside messages or conversations becomes the first of them."""
    value, short = lookup(record, field), format_text(field, 20)
    if not isinstance(value, list):
        reason = f"field '{short}' is {'not there' if value is ABSENT else 'no list of turns'}"
        return Fault(reason, f": {reason}: write a list of {_WANTED}")
    turns: list[Turn] = []
    if field in ("messages", "conversations") and record.get("system"):
        beside = _content(record["system"])
        if beside is None:
            reason = "field 'system' is not text"
            return Fault(reason, f": {reason}: write it as a text")
        turns += [Turn("system", beside)] if beside.strip() else []
    for place, one in enumerate(value, start=1):
        turn = _turn(one, place)
        if isinstance(turn, Fault):
            return turn
        if turn is not None:
            turns.append(turn)
    return tuple(turns)


def _turn(value: object, place: int) -> Turn | Fault | None:
    """One turn; None for a system turn without text, which says nothing."""
    if not isinstance(value, Mapping):
        reason = f"turn {place} is not an object"
        return Fault(reason, f": {reason}: write {_WANTED}")
    role_key = next((key for key in _ROLE_KEYS if key in value), None)
    text_key = next((key for key in _TEXT_KEYS if key in value), None)
    if role_key is None or text_key is None:
        reason = f"turn {place} has no {'role' if role_key is None else 'content'}"
        return Fault(reason, f": {reason}, it has {listed(map(str, value))}: write {_WANTED}")
    role = value[role_key]
    known = ROLES.get(role.strip().casefold()) if isinstance(role, str) else None
    if known is None:
        shown = format_text(role, 20)
        near = format_text(nearest(role, ROLES) if isinstance(role, str) and len(role) < 40 else "")
        reason = f"turn {place} has the unknown role '{shown}'"
        return Fault(reason, f": {reason}{near}: use one of {', '.join(ROLES)}")
    lost = [key for key in _LOST if value.get(key)] + [key for key in _SWITCHES if value.get(key) in (0, "0")]
    if lost:
        reason = f"turn {place} ({known}) has '{lost[0]}', which is not heeded"
        return Fault(reason, f": {reason}: delete it or the row")
    text = _content(value[text_key])
    if text is None:
        reason = f"turn {place} ({known}) is not text"
        return Fault(reason, f": {reason}: only text is learned; write it as a text")
    if text.strip():
        return Turn(known, text)
    reason = f"turn {place} ({known}) is empty"
    return None if known == "system" else Fault(reason, f": {reason}: fill it in or delete the row")


def _content(value: object) -> str | None:
    """The text of a turn, or of its parts [{"type": "text", "text": ...}]; None for anything else, such as images."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
    return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
