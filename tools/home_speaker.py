"""Who speaks: chooses terms and phrases, numbers and times; a household's speaker prefers its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeAlias

from home_words import EVERYWHERE, NICK_FRONTS, NOBODY, ON_ROOMS, ROOMS, Family, Term, number_words, odd_word

Value: TypeAlias = str | int
Action: TypeAlias = dict[str, Value]


class Speaker:
    """Chooses terms and phrases and remembers which of them were the household's own."""

    def __init__(self, rng: random.Random, own_share: float = 0.0, odd_share: float = 0.0,
                 family: Family = NOBODY) -> None:
        self.rng = rng
        self.family = family
        self.own_share = own_share
        self.odd_share = odd_share
        self.own: list[str] = []

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def one(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def wants_own(self) -> bool:
        return self.own_share > 0 and self.chance(self.own_share)

    def used(self, term: Term) -> Term:
        self.own.append(term.said)
        return term

    def term(self, general: Sequence[Term], own: Sequence[Term] = ()) -> Term:
        """A term, sometimes the household's own, sometimes one that nobody knows."""
        if own and self.wants_own():
            return self.used(self.rng.choice(own))
        if self.odd_share and self.chance(self.odd_share):
            return Term(odd_word(self.rng), "unknown")
        meanings = sorted({term.means for term in general})
        chosen = self.rng.choice(meanings)
        return self.rng.choice([term for term in general if term.means == chosen])

    def target(self, general: Sequence[Term], own: Sequence[Term] = ()) -> tuple[str, Action]:
        """A device in a room: how it is said, and its "what" and "where"."""
        if own and self.own_share > 0 and self.chance(self.own_share * 0.6):
            nickname = self.used(self.rng.choice(own))
            return nickname.said, {"what": nickname.means, "where": nickname.where}
        if self.odd_share and self.chance(self.odd_share * 0.6):
            name = f"{self.one(NICK_FRONTS)} {odd_word(self.rng)}".strip()
            return name, {"what": "unknown", "where": "here"}
        device = self.term(general)
        return self._placed(device)

    def _placed(self, device: Term) -> tuple[str, Action]:
        draw = self.rng.random()
        if draw < 0.1 and not self.own_share:
            return f"the {device.said}", {"what": device.means, "where": "here"}
        if draw < 0.14 and not self.own_share:
            return f"the {device.said} {self.one(EVERYWHERE)}", {"what": device.means, "where": "all"}
        room = self.term(ROOMS, self.family.rooms)
        forms = (f"the {room.said} {device.said}", f"the {device.said} {in_room(room)}", f"{room.said} {device.said}")
        return self.rng.choices(forms, (45, 40, 15))[0], {"what": device.means, "where": room.means}

    def place(self) -> tuple[str, str]:
        """A place phrase that may be empty: ("in the kitchen", "kitchen")."""
        if self.chance(0.12) and not self.own_share:
            return "", "here"
        if self.chance(0.06) and not self.own_share:
            return self.one(EVERYWHERE), "all"
        room = self.term(ROOMS, self.family.rooms)
        return in_room(room), room.means

    def number(self, low: int, high: int, step: int) -> tuple[str, int]:
        """A number in digits or words."""
        value = self.rng.randrange(low, high + 1, step)
        return (number_words(value) if self.chance(0.3) else str(value)), value

    def level(self, kind: str) -> tuple[str, int]:
        """How bright, warm, loud or open."""
        own = self.family.levels.get(kind, {})
        if own and self.own_share > 0 and self.chance(self.own_share * 0.7):
            said = self.one(list(own))
            self.own.append(f"{said}/{kind}")
            return said, own[said]
        if kind in ("heat", "oven"):
            said, value = self.number(14, 28, 1) if kind == "heat" else self.number(120, 250, 10)
            return said + self.one((" degrees", " degrees", "")), value
        if self.chance(0.1):
            return self.rng.choice((("half", 50), ("a quarter", 25), ("three quarters", 75), ("the maximum", 100)))
        said, value = self.number(0, 100, 5) if self.chance(0.7) else self.number(1, 99, 1)
        return said + self.one((" percent", " percent", "")), value

    def clock(self) -> tuple[str, str]:
        """A time of day: ("at half past six in the evening", "18:30")."""
        if self.own_share > 0 and self.chance(self.own_share * 0.8):
            said = self.one(list(self.family.times))
            self.own.append(said)
            return said, self.family.times[said]
        if self.chance(0.06):
            return self.rng.choice((("at noon", "12:00"), ("at midnight", "00:00")))
        if self.chance(0.4):
            hour, minute = self.rng.randrange(24), self.rng.randrange(0, 60, 5)
            return f"at {hour}:{minute:02d}", f"{hour:02d}:{minute:02d}"
        return self._spoken_clock()

    def _spoken_clock(self) -> tuple[str, str]:
        hour, minute = self.rng.randrange(1, 12), self.rng.choice((0, 0, 15, 30, 45))
        afternoon = self.chance(0.5)
        shown = hour + 1 if minute == 45 else hour
        name = number_words(shown) if self.chance(0.5) else str(shown)
        front = {0: "", 15: "quarter past ", 30: "half past ", 45: "quarter to "}[minute]
        half = self.one(("pm", "in the afternoon", "in the evening") if afternoon else ("am", "in the morning"))
        return f"at {front}{name} {half}", f"{hour + 12 * afternoon:02d}:{minute:02d}"

    def delay(self) -> tuple[str, int]:
        """A length of time in minutes: ("ten minutes", 10)."""
        draw = self.rng.random()
        if draw < 0.1:
            return self.rng.choice((("half an hour", 30), ("an hour", 60), ("a quarter of an hour", 15)))
        if draw < 0.2:
            said, hours = self.number(2, 6, 1)
            return f"{said} hours", hours * 60
        said, minutes = self.number(2, 59, 1) if self.chance(0.5) else self.number(5, 90, 5)
        return f"{said} minutes", minutes

    def moment(self, probability: float) -> tuple[str, Action]:
        """Sometimes a time or a delay, to be put at either end of the sentence."""
        if not self.chance(probability):
            return "", {}
        if self.chance(0.65 if not self.own_share else 0.85):
            said, at = self.clock()
            return said, {"at": at}
        said, minutes = self.delay()
        return f"in {said}", {"in": minutes}


def in_room(room: Term) -> str:
    return f"{'on' if room.means in ON_ROOMS else 'in'} the {room.said}"


def with_moment(speaker: Speaker, said: str, moment: str) -> str:
    if not moment:
        return said
    return f"{moment} {said}" if speaker.chance(0.25) else f"{said} {moment}"
