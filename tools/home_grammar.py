"""Grammar of the home assistant that ships with edgegt: utterance -> one compact JSON action.

It exists so that `edgegt run` has something real to personalise without any third-party text.  Two languages are
generated here, both from fixed seeds.  The GENERAL one (rooms, devices, numbers, times, questions) is what the shipped
base model is pretrained on.  The HOUSEHOLD one adds the words of one family (nicknames, private room names, routines,
habits), which the base has never seen and which fine-tuning has to teach it.  Pretraining also hears invented
households, whose words mean something else, so that the base is used to words being names; the shipped household is not
among them.

An action is one JSON object whose keys come in this order (each is left out where it does not apply):
  do     on off set up down open close lock unlock ask play pause timer alarm scene call find feed buy none
  what   device, music, scene or shopping id       who    person or animal id
  where  room id, "here" (no room was named), "all", or "unknown" (a room the assistant does not know)
  to     level (percent, or degrees)               by     size of a relative change
  light heat music blinds tv coffee fan lock       levels that belong to a scene
  at     "HH:MM"                                   in     minutes from now
Words the assistant does not know become "unknown"; talk that is no command becomes {"do":"none"}.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

SEP = " =>"
SEED = "edgegt-home-1"
TRAIN_HOUSEHOLD_ROWS = 720
TRAIN_ORDINARY_ROWS = 280
HELDOUT_ROWS = 240
PRIVATE_SHARE = 0.65

Value: TypeAlias = str | int
Action: TypeAlias = dict[str, Value]


@dataclass(frozen=True)
class Term:
    """What people say, the id it means, and (for a nickname) the room it stands in."""

    said: str
    means: str
    where: str = ""
    private: bool = False


@dataclass(frozen=True)
class Row:
    """One utterance: `core` is the wording without politeness, `text` what was said, `own` the private terms in it."""

    core: str
    text: str
    action: Action
    own: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    """Comma-separated words, some of which may be empty."""
    return tuple(text.split(","))


def _terms(table: dict[str, str]) -> tuple[Term, ...]:
    """{"id": "said one, said two"} -> terms."""
    return tuple(Term(said.strip(), means) for means, group in table.items() for said in group.split(","))


# ---------------------------------------------------------------------------------------------------------------------
# General words
# ---------------------------------------------------------------------------------------------------------------------

ROOMS = _terms({
    "kitchen": "kitchen,kitchenette",
    "living": "living room,lounge,sitting room,family room",
    "bedroom": "bedroom,main bedroom,master bedroom",
    "kids": "kids room,children's room,playroom,nursery",
    "bath": "bathroom,shower room,washroom",
    "toilet": "toilet,loo,restroom",
    "hall": "hall,hallway,corridor,entrance",
    "office": "office,study,work room",
    "dining": "dining room,dining area",
    "guest": "guest room,spare room,guest bedroom",
    "garage": "garage,carport",
    "garden": "garden,yard,backyard",
    "cellar": "cellar,basement",
    "attic": "attic,loft",
    "laundry": "laundry room,laundry,utility room",
    "balcony": "balcony",
    "terrace": "terrace,patio,deck",
    "porch": "porch,veranda",
    "stairs": "stairs,staircase",
    "pantry": "pantry,larder,storeroom",
    "workshop": "workshop,hobby room",
    "gym": "gym,fitness room",
    "library": "library",
    "shed": "shed,garden shed",
})
ON_ROOMS = {"balcony", "terrace", "porch", "stairs"}
EVERYWHERE = ("everywhere", "in the whole house", "in all rooms", "all over the house")

LIGHTS = _terms({"light": "light,lights,lighting,main light,ceiling light", "lamp": "lamp,floor lamp,table lamp"})
BLINDS = _terms({"blinds": "blinds,shades,shutters", "curtain": "curtains,drapes"})
SOUNDS = _terms({"speaker": "speaker,stereo,sound system,speakers", "tv": "tv,television,telly", "radio": "radio"})
HEATS = _terms({"heat": "heating,heater,radiator,thermostat", "ac": "air conditioner,ac,air conditioning"})
FANS = _terms({"fan": "fan,ceiling fan,ventilator"})
MACHINES = _terms({
    "plug": "plug,socket,outlet", "oven": "oven,stove,cooker", "kettle": "kettle", "dishwasher": "dishwasher",
    "coffee": "coffee machine,coffee maker,espresso machine", "washer": "washing machine,washer",
    "dryer": "tumble dryer,dryer", "boiler": "boiler,water heater", "vacuum": "vacuum,robot vacuum,vacuum cleaner",
    "humidifier": "humidifier", "sprinkler": "sprinkler,sprinklers,irrigation", "camera": "camera,security camera",
    "fireplace": "fireplace", "fountain": "fountain", "purifier": "air purifier,purifier", "projector": "projector",
    "printer": "printer", "router": "router,wifi", "siren": "burglar alarm,alarm system", "pump": "pump,water pump",
})
OPENERS = BLINDS + _terms({"window": "window,windows,skylight", "door": "door,doors", "gate": "gate"})
LOCKERS = _terms({"door": "door,doors", "gate": "gate", "window": "window,windows", "safe": "safe,strongbox"})
SWITCHED = LIGHTS + SOUNDS + HEATS + FANS + MACHINES
SENSED = _terms({
    "heat": "temperature", "humidity": "humidity,air humidity", "light": "brightness,light level",
    "speaker": "volume,sound level", "air": "air quality", "power": "power use,energy use",
})
MUSIC = _terms({
    "jazz": "jazz,some jazz,jazz music", "rock": "rock,rock music", "classical": "classical music,something classical",
    "pop": "pop,pop songs", "blues": "blues,the blues", "folk": "folk music,folk songs", "news": "the news,news",
    "podcast": "a podcast,my podcast", "lullaby": "lullabies,a lullaby", "rain": "rain sounds,the sound of rain",
    "opera": "opera,an opera", "techno": "techno", "country": "country music", "audiobook": "my audiobook",
})
SCENES = _terms({
    "night": "night,sleep", "morning": "morning,wake up", "away": "away,leaving", "home": "welcome,coming home",
    "party": "party", "dinner": "dinner,supper", "reading": "reading", "study": "homework,study",
    "relax": "relax,chill", "clean": "cleaning", "workout": "workout,exercise", "romance": "romantic,date night",
})
PEOPLE = _terms({
    "mum": "mum,mom,my mother", "dad": "dad,my father", "grandma": "grandma,granny", "grandpa": "grandpa,granddad",
    "doctor": "the doctor", "school": "the school", "neighbour": "the neighbour,next door", "office": "work",
    "aunt": "my aunt,auntie", "uncle": "my uncle", "sister": "my sister", "brother": "my brother",
})
ANIMALS = _terms({"cat": "cat,kitty", "dog": "dog,puppy", "fish": "fish,goldfish", "rabbit": "rabbit",
                  "birds": "birds", "hamster": "hamster"})
GOODS = _terms({name: name for name in _words(
    "milk,bread,butter,eggs,cheese,apples,bananas,rice,pasta,coffee,tea,sugar,flour,salt,soap,onions,potatoes,"
    "tomatoes,yoghurt,honey,batteries,candles,napkins,oats")})
NAMES = _words("tom,eva,leo,ida,max,zoe,sam,lily,noah,emma,finn,ruth,hugo,nora,carl,anna")
SHOWS = _words("cinema,storm,circus,forest,camp,race,dance,picnic,museum,voyage,concert,snow,desert,spring,magic")
SCENE_KEYS = ("light", "heat", "music", "blinds", "tv", "coffee", "fan", "lock")
FIELDS = ("light", "heat", "music", "blinds")

# Words that the assistant has heard but that name nothing it knows; they stand beside the invented ones.
ODD_WORDS = _words(
    "harbour,cabin,tower,castle,lagoon,cockpit,bunker,stable,chapel,igloo,wigwam,palace,temple,grotto,tunnel,"
    "island,meadow,canyon,orchard,market,station,arena,studio,vault,barn,hangar,cottage,alcove,gallery,hatch,"
    "badger,otter,falcon,turtle,pickle,noodle,muffin,pepper,ginger,thunder,pirate,wizard,giant,goblin,"
    "knight,baron,major,admiral,doc,queen,prince,auntie jo,uncle bob,tango,disco,comet,planet,star")
NICK_FRONTS = ("old", "big", "little", "sir", "lady", "uncle", "mister", "lazy", "the mighty", "the", "grumpy", "")
ONSETS = _words("b,bl,br,c,ch,d,dr,f,fl,g,gr,h,j,k,l,m,n,p,pl,qu,r,s,sh,sl,sn,st,t,th,tr,v,w,wh,y,z")
VOWELS = _words("a,e,i,o,u,ee,oo,ou,ai,ar,er,or,ur,ow")
CODAS = _words(",,,b,ck,d,g,l,ll,m,n,nd,ng,nk,p,r,s,st,t,x,le,y,bble,ggle,dge,sh")

UNITS = _words(
    "zero,one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,thirteen,fourteen,fifteen,sixteen,"
    "seventeen,eighteen,nineteen")
TENS = _words(",,twenty,thirty,forty,fifty,sixty,seventy,eighty,ninety")


def number_words(number: int) -> str:
    """40 -> "forty", 21 -> "twenty one"."""
    if number < 20:
        return UNITS[number]
    if number >= 100:
        rest = number % 100
        head = f"{UNITS[number // 100]} hundred" if number != 100 else "a hundred"
        return head if rest == 0 else f"{head} {number_words(rest)}"
    return TENS[number // 10] + (f" {UNITS[number % 10]}" if number % 10 else "")


def invented_word(rng: random.Random) -> str:
    """A pronounceable word that means nothing."""
    parts = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(parts) + rng.choice(CODAS)


def odd_word(rng: random.Random) -> str:
    """A word that the assistant cannot resolve."""
    return rng.choice(ODD_WORDS) if rng.random() < 0.35 else invented_word(rng)


# ---------------------------------------------------------------------------------------------------------------------
# The household's own words
# ---------------------------------------------------------------------------------------------------------------------

def _own(table: dict[str, str], where: str = "") -> tuple[Term, ...]:
    return tuple(Term(term.said, term.means, where, True) for term in _terms(table))


OWN_ROOMS = _own({
    "kids": "burrow", "office": "bridge", "kitchen": "galley", "bath": "swamp", "bedroom": "nest", "cellar": "crypt",
    "garden": "paddock", "treehouse": "fort",
})
OWN_MACHINES = (
    _own({"boiler": "old bessie"}, "cellar") + _own({"vacuum": "dusty bill"}, "hall")
    + _own({"oven": "the dragon"}, "kitchen")
)
OWN_LIGHTS = _own({"lamp": "the moonling"}, "kids")
OWN_SOUNDS = _own({"tv": "big louie"}, "living") + _own({"speaker": "the bard"}, "kitchen")
OWN_MUSIC = _own({"shanty": "captain's tunes", "classical": "brain food"})
OWN_PEOPLE = _own({"ben": "bean", "mia": "mouse", "grandpa": "the colonel"})
OWN_ANIMALS = _own({"dog": "waffles", "hens": "the ladies"})
OWN_GOODS = _own({"oats": "rocket fuel", "milk": "moo juice"})
OWN_LEVELS: dict[str, dict[str, int]] = {
    "light": {"not too bright": 35, "my usual": 55, "cave dark": 5},
    "heat": {"toasty": 23, "penguin cool": 16},
    "sound": {"whisper loud": 8},
}
OWN_TIMES = {"at tea o'clock": "16:00", "at sparrow time": "05:45", "at lantern hour": "20:45"}


@dataclass(frozen=True)
class Routine:
    """One of the family's routines: what it is called and everything it does."""

    names: tuple[str, ...]
    what: str
    where: str
    fields: tuple[tuple[str, int], ...]


ROUTINES = (
    Routine(("movie time", "popcorn time"), "movie", "living", (("light", 10), ("blinds", 0), ("tv", 1))),
    Routine(("hedgehog mode",), "hedgehog", "bedroom", (("light", 5), ("heat", 19), ("music", 0))),
    Routine(("launch sequence",), "launch", "kitchen", (("light", 80), ("heat", 21), ("coffee", 1))),
    Routine(("ghost ship",), "ghost", "all", (("light", 0), ("heat", 15), ("lock", 1))),
    Routine(("the big banquet",), "feast", "dining", (("light", 60), ("music", 30))),
)


@dataclass(frozen=True)
class Family:
    """The private words of one household."""

    rooms: tuple[Term, ...]
    machines: tuple[Term, ...]
    lights: tuple[Term, ...]
    sounds: tuple[Term, ...]
    music: tuple[Term, ...]
    people: tuple[Term, ...]
    animals: tuple[Term, ...]
    goods: tuple[Term, ...]
    levels: dict[str, dict[str, int]]
    times: dict[str, str]
    routines: tuple[Routine, ...]

    def slot(self, name: str) -> tuple[Term, ...]:
        """The nicknames that can stand where a device of this kind is expected."""
        return {"": (), "light": self.lights, "sound": self.sounds, "oven": self.ovens(),
                "dimmed": self.lights + self.sounds, "any": self.machines + self.lights + self.sounds}[name]

    def ovens(self) -> tuple[Term, ...]:
        return tuple(term for term in self.machines if term.means == "oven")


OWN_FAMILY = Family(OWN_ROOMS, OWN_MACHINES, OWN_LIGHTS, OWN_SOUNDS, OWN_MUSIC, OWN_PEOPLE, OWN_ANIMALS, OWN_GOODS,
                    OWN_LEVELS, OWN_TIMES, ROUTINES)
NOBODY = Family((), (), (), (), (), (), (), (), {}, {}, ())
ROUTINE_FORMS = ("{n}", "it's {n}", "{n} now", "start {n}", "let's do {n}", "go for {n}", "activate {n}",
                 "time for {n}", "we are ready for {n}", "run {n}", "do the {n} thing", "i feel like {n}")


# Words kept for this family, a few of them in reserve; the base model must never have read one of them.
OWN_WORDS = set(_words(
    "burrow,galley,swamp,nest,crypt,crow's,roost,paddock,snug,fort,bridge,bessie,grumbles,dusty,bill,dragon,percolina,blub,"
    "wheezer,moonling,chandy,louie,bard,captain's,brain,nan,nan's,bun,bean,bean's,mouse,colonel,skipper,"
    "professor,paws,waffles,ladies,rocket,moo,juice,bait,grape,medicine,usual,cave,blaze,glow,toasty,penguin,jumper,"
    "whisper,foxhole,sparrow,lantern,naps,movie,popcorn,hedgehog,curl,launch,liftoff,submarine,splash,ghost,"
    "abandon,banquet,feast"))


# ---------------------------------------------------------------------------------------------------------------------
# Speaker: chooses words; a household's speaker prefers its own
# ---------------------------------------------------------------------------------------------------------------------

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


def _with_moment(speaker: Speaker, said: str, moment: str) -> str:
    if not moment:
        return said
    return f"{moment} {said}" if speaker.chance(0.25) else f"{said} {moment}"


# ---------------------------------------------------------------------------------------------------------------------
# Intents: each returns a wording and its action
# ---------------------------------------------------------------------------------------------------------------------

Intent = Callable[[Speaker], tuple[str, Action]]

VERBS = {
    "on": ("turn on {t}", "turn {t} on", "switch on {t}", "switch {t} on", "{t} on", "power up {t}", "get {t} going",
           "start {t}", "i need {t} on", "activate {t}", "put {t} on", "{t} should be on", "enable {t}"),
    "off": ("turn off {t}", "turn {t} off", "switch off {t}", "switch {t} off", "{t} off", "power down {t}",
            "shut down {t}", "stop {t}", "i want {t} off", "kill {t}", "{t} should be off", "disable {t}",
            "no need for {t} any more"),
    "open": ("open {t}", "open up {t}", "{t} open", "i want {t} open", "get {t} open", "{t} should be open"),
    "close": ("close {t}", "shut {t}", "{t} closed", "i want {t} shut", "make sure {t} is closed", "{t} shut"),
    "lock": ("lock {t}", "lock up {t}", "make sure {t} is locked", "secure {t}", "bolt {t}"),
    "unlock": ("unlock {t}", "release {t}", "let me through {t}", "unbolt {t}", "take the lock off {t}"),
}


def _verb_intent(do: str, general: Sequence[Term], slot: str = "") -> Intent:
    def build(speaker: Speaker) -> tuple[str, Action]:
        said, target = speaker.target(general, speaker.family.slot(slot))
        moment, when = speaker.moment(0.25)
        text = speaker.one(VERBS[do]).format(t=said)
        return _with_moment(speaker, text, moment), {"do": do, **target, **when}
    return build


SET_FORMS = ("set {t} to {v}", "put {t} at {v}", "{t} to {v}", "{t} at {v}", "i want {t} at {v}", "make {t} {v}",
             "change {t} to {v}", "bring {t} to {v}", "adjust {t} to {v}", "{t} {v}")
SET_KINDS: tuple[tuple[str, tuple[Term, ...], str], ...] = (
    ("light", LIGHTS + _terms({"light": "brightness"}), "light"),
    ("light", LIGHTS, "light"),
    ("heat", HEATS + _terms({"heat": "temperature"}), ""),
    ("sound", SOUNDS + _terms({"speaker": "volume"}), "sound"),
    ("blinds", BLINDS, ""),
    ("fan", FANS, ""),
    ("oven", _terms({"oven": "oven,stove,cooker"}), "oven"),
)


def set_level(speaker: Speaker) -> tuple[str, Action]:
    kind, general, slot = speaker.rng.choice(SET_KINDS)
    said, target = speaker.target(general, speaker.family.slot(slot))
    level, value = speaker.level(kind)
    moment, when = speaker.moment(0.15)
    forms = SET_FORMS + (("dim {t} to {v}", "{v} for {t}") if kind == "light" else ("{v} for {t}",))
    text = speaker.one(forms).format(t=said, v=level)
    return _with_moment(speaker, text, moment), {"do": "set", **target, "to": value, **when}


RELATIVE = (
    ("light", "up", ("brighter", "lighter")), ("light", "down", ("dimmer", "darker", "less bright")),
    ("heat", "up", ("warmer", "hotter", "less cold")), ("heat", "down", ("cooler", "colder", "less warm")),
    ("speaker", "up", ("louder", "more noisy")), ("speaker", "down", ("quieter", "softer", "less loud")),
)
RELATIVE_FORMS = ("make it {m}{w} {p}", "{m}{w} {p}", "it should be {m}{w} {p}", "i want it {m}{w} {p}",
                  "{p} make it {m}{w}", "can we have it {m}{w} {p}")


def relative(speaker: Speaker) -> tuple[str, Action]:
    what, do, words = speaker.rng.choice(RELATIVE)
    place, where = speaker.place()
    text = speaker.one(RELATIVE_FORMS).format(m=speaker.one(("", "", "a bit ", "much ")), w=speaker.one(words), p=place)
    return " ".join(text.split()), {"do": do, "what": what, "where": where}


RELATIVE_DEVICES = LIGHTS + HEATS + SOUNDS + FANS
RELATIVE_VERBS = {"up": ("turn up {t}", "raise {t}", "increase {t}", "turn {t} up", "more power on {t}"),
                  "down": ("turn down {t}", "lower {t}", "reduce {t}", "turn {t} down", "ease {t}")}


def relative_by(speaker: Speaker) -> tuple[str, Action]:
    do = speaker.one(("up", "down"))
    said, target = speaker.target(RELATIVE_DEVICES, speaker.family.slot("dimmed"))
    text = speaker.one(RELATIVE_VERBS[do]).format(t=said)
    if speaker.chance(0.5):
        return text, {"do": do, **target}
    amount, value = speaker.number(5, 50, 5) if speaker.chance(0.6) else speaker.number(1, 9, 1)
    return f"{text} by {amount}{speaker.one((' percent', ''))}", {"do": do, **target, "by": value}


ASK_STATE = ("is {t} on", "is {t} still running", "did i leave {t} on", "what is {t} doing", "what about {t}",
             "tell me about {t}", "check {t}", "is {t} off", "how is {t} set", "status of {t}")
ASK_SENSOR = ("what is the {s} {p}", "tell me the {s} {p}", "how high is the {s} {p}", "the {s} {p}",
              "read the {s} {p}")
ASK_FEEL = {"heat": ("how warm is it {p}", "how cold is it {p}", "is it warm {p}"),
            "light": ("how bright is it {p}", "is it dark {p}"),
            "speaker": ("how loud is it {p}", "is it noisy {p}")}


def ask(speaker: Speaker) -> tuple[str, Action]:
    draw = speaker.rng.random()
    if draw < 0.5:
        said, target = speaker.target(SWITCHED + OPENERS, speaker.family.slot("any"))
        return speaker.one(ASK_STATE).format(t=said), {"do": "ask", **target}
    place, where = speaker.place()
    if draw < 0.75:
        sensor = speaker.term(SENSED)
        text = speaker.one(ASK_SENSOR).format(s=sensor.said, p=place)
        return " ".join(text.split()), {"do": "ask", "what": sensor.means, "where": where}
    what = speaker.one(sorted(ASK_FEEL))
    return " ".join(speaker.one(ASK_FEEL[what]).format(p=place).split()), {"do": "ask", "what": what, "where": where}


PLAY_FORMS = ("play {m} {p}", "put on {m} {p}", "i want to hear {m} {p}", "{m} {p}", "let me hear {m} {p}",
              "{p} play {m}", "give me {m} {p}", "start playing {m} {p}")


def play(speaker: Speaker) -> tuple[str, Action]:
    music = speaker.term(MUSIC, speaker.family.music)
    place, where = speaker.place()
    text = " ".join(speaker.one(PLAY_FORMS).format(m=music.said, p=place).split())
    action: Action = {"do": "play", "what": music.means, "where": where}
    if speaker.chance(0.25):
        level, value = speaker.level("sound")
        return f"{text} at {level}", {**action, "to": value}
    return text, action


def pause(speaker: Speaker) -> tuple[str, Action]:
    place, where = speaker.place()
    form = speaker.one(("pause the music {p}", "stop the music {p}", "no more music {p}", "hold the music {p}"))
    return " ".join(form.format(p=place).split()), {"do": "pause", "where": where}


def timer(speaker: Speaker) -> tuple[str, Action]:
    said, minutes = speaker.delay()
    form = speaker.one(("set a timer for {d}", "timer for {d}", "count down {d}", "start a timer of {d}",
                        "tell me when {d} are over", "remind me after {d}", "{d} on the clock"))
    return form.format(d=said), {"do": "timer", "in": minutes}


def alarm(speaker: Speaker) -> tuple[str, Action]:
    said, at = speaker.clock()
    form = speaker.one(("wake me {c}", "set an alarm {c}", "alarm {c}", "wake us up {c}", "get me out of bed {c}",
                        "{c} i want to wake up"))
    return form.format(c=said), {"do": "alarm", "at": at}


SCENE_FORMS = ("start the {s} scene", "{s} mode", "activate {s} mode", "{s} scene", "switch to {s} mode",
               "let's have the {s} scene", "go into {s} mode", "set the {s} mood", "i am in a {s} mood")


def scene(speaker: Speaker) -> tuple[str, Action]:
    name = speaker.term(SCENES)
    text = speaker.one(SCENE_FORMS).format(s=name.said)
    place, where = speaker.place() if speaker.chance(0.6) else ("", "all")
    where = "all" if not place else where
    action: Action = {"do": "scene", "what": name.means, "where": where}
    fields, values = scene_fields(speaker)
    moment, when = speaker.moment(0.2)
    text = " ".join(f"{text} {place} {fields}".split())
    return _with_moment(speaker, text, moment), {**action, **values, **when}


def scene_fields(speaker: Speaker) -> tuple[str, Action]:
    """Sometimes up to three levels, said in any order, written in the schema's order."""
    if speaker.chance(0.45):
        return "", {}
    names = speaker.rng.sample(FIELDS, speaker.rng.choice((1, 2, 2, 3)))
    numbers = {name: speaker.number(15, 26, 1) if name == "heat" else speaker.number(0, 100, 5) for name in names}
    text = "with " + " and ".join(f"{name} {numbers[name][0]}" for name in names)
    return text, {name: numbers[name][1] for name in FIELDS if name in numbers}


def call(speaker: Speaker) -> tuple[str, Action]:
    person = speaker.term(PEOPLE, speaker.family.people)
    do = speaker.one(("call", "find"))
    forms = {"call": ("call {n}", "ring {n}", "phone {n}", "i want to talk to {n}", "get {n} on the line", "dial {n}"),
             "find": ("where is {n}", "find {n}", "is {n} at home", "do you know where {n} is", "look for {n}")}
    moment, when = speaker.moment(0.35) if do == "call" else ("", {})
    return _with_moment(speaker, speaker.one(forms[do]).format(n=person.said), moment), {
        "do": do, "who": person.means, **when}


def feed(speaker: Speaker) -> tuple[str, Action]:
    animal = speaker.term(ANIMALS, speaker.family.animals)
    name = animal.said if animal.private else f"the {animal.said}"
    form = speaker.one(("feed {n}", "give {n} some food", "food for {n}", "{n} is hungry", "dinner for {n}",
                        "fill the bowl for {n}"))
    moment, when = speaker.moment(0.35)
    return _with_moment(speaker, form.format(n=name), moment), {"do": "feed", "who": animal.means, **when}


def buy(speaker: Speaker) -> tuple[str, Action]:
    item = speaker.term(GOODS, speaker.family.goods)
    form = speaker.one(("add {n} to the list", "we need {n}", "put {n} on the shopping list", "buy {n}", "order {n}",
                        "we are out of {n}", "get more {n}", "{n} is on my list"))
    if speaker.chance(0.35):
        said, amount = speaker.number(2, 12, 1)
        return form.format(n=f"{said} {item.said}"), {"do": "buy", "what": item.means, "to": amount}
    return form.format(n=item.said), {"do": "buy", "what": item.means}


CHATTER = ("i like {w}", "my {w} is nice", "what a day", "good morning", "good night", "hello there", "never mind",
           "forget it", "the {w} was here", "i saw a {w} today", "how are you", "that was {w}", "thank you {w}",
           "did you see the {w}", "a {w} is not a {w}", "nothing", "i am just talking to the {w}", "well done")


def chatter(speaker: Speaker) -> tuple[str, Action]:
    return speaker.one(CHATTER).format(w=odd_word(speaker.rng)), {"do": "none"}


def routine(speaker: Speaker) -> tuple[str, Action]:
    """A routine of the family, at times in another room, at another hour or with one level changed."""
    chosen = speaker.rng.choice(speaker.family.routines)
    name = speaker.one(chosen.names)
    speaker.own.append(name)
    text = speaker.one(ROUTINE_FORMS).format(n=name)
    where, fields = chosen.where, dict(chosen.fields)
    if speaker.chance(0.3):
        place, where = speaker.place()
        text = f"{text} {place}"
    if speaker.chance(0.25):
        said, value = speaker.number(0, 100, 5)
        fields["light"] = value
        text = f"{text} {speaker.one(('with', 'but with'))} light {said}"
    moment, when = speaker.moment(0.4)
    return _with_moment(speaker, text, moment), {"do": "scene", "what": chosen.what, "where": where, **fields, **when}


_SWITCHES: tuple[tuple[Intent, int], ...] = (
    (_verb_intent("on", SWITCHED, "any"), 16), (_verb_intent("off", SWITCHED, "any"), 16),
    (_verb_intent("open", OPENERS), 6), (_verb_intent("close", OPENERS), 6),
    (_verb_intent("lock", LOCKERS), 3), (_verb_intent("unlock", LOCKERS), 3),
)
GENERAL_INTENTS = (*_SWITCHES, (set_level, 20), (relative, 6), (relative_by, 7), (ask, 9), (play, 8), (pause, 2),
                   (timer, 4), (alarm, 4), (scene, 10), (call, 5), (feed, 3), (buy, 4), (chatter, 3))
DRILL_INTENTS = ((scene, 12), (set_level, 5), (timer, 2), (alarm, 2), (call, 1), (relative_by, 1), (chatter, 1))
OWN_INTENTS = (*_SWITCHES, (set_level, 28), (relative, 6), (relative_by, 5), (ask, 8), (play, 7), (alarm, 3),
               (call, 8), (feed, 6), (buy, 6), (routine, 18))


# ---------------------------------------------------------------------------------------------------------------------
# How it is said
# ---------------------------------------------------------------------------------------------------------------------

FRONTS = ("please", "hey house", "ok house", "hello house", "could you", "can you", "would you", "i would like you to",
          "now", "quick", "listen", "house", "kindly", "well")
BACKS = ("please", "thanks", "thank you", "now", "right away", "if you can", "will you", "ok", "as soon as you can",
         "for me", "would you", "for us")
REASONS = ("because i am tired", "it is getting late", "we have visitors", "i am freezing", "before i forget",
           "the children are asleep", "i cannot see a thing", "as always", "it was a long day", "we are leaving soon",
           "my hands are full", "i am in bed already")
FILLERS = ("um", "er", "you know", "like", "just", "well", "maybe", "uh")


def decorate(speaker: Speaker, core: str) -> str:
    """Politeness, names, fillers, reasons, case and punctuation; none of them changes the action."""
    text = core
    if speaker.chance(0.07):
        words = text.split(" ")
        words.insert(speaker.rng.randrange(len(words)), speaker.one(FILLERS))
        text = " ".join(words)
    if speaker.chance(0.28):
        text = f"{speaker.one(FRONTS)}{speaker.one((' ', ' ', ', '))}{text}"
    elif speaker.chance(0.06):
        text = f"{speaker.one(('hey', 'ok', 'hello'))} {invented_word(speaker.rng)}, {text}"
    if speaker.chance(0.25):
        text = f"{text}{speaker.one((' ', ' ', ', '))}{speaker.one(BACKS)}"
    elif speaker.chance(0.08):
        text = f"{text}, {speaker.one(REASONS)}"
    if speaker.chance(0.1):
        text = text[0].upper() + text[1:]
    return text + speaker.rng.choices(("", ".", "!"), (88, 8, 4))[0]


def utterance(speaker: Speaker, intents: Sequence[tuple[Intent, int]]) -> Row:
    speaker.own = []
    build = speaker.rng.choices([intent for intent, _ in intents], [weight for _, weight in intents])[0]
    core, action = build(speaker)
    return Row(core, decorate(speaker, core), action, tuple(speaker.own))


def key(text: str) -> str:
    """Two utterances with the same key count as the same."""
    return " ".join(text.lower().split())


def digest(text: str) -> str:
    return hashlib.sha256(key(text).encode()).hexdigest()[:16]


def completion(action: Action) -> str:
    return " " + json.dumps(action, separators=(",", ":"))


def record(row: Row) -> dict[str, str]:
    return {"prompt": row.text + SEP, "completion": completion(row.action)}


def _distinct(rows: Iterator[Row], count: int, taken: set[str]) -> list[Row]:
    """The first `count` rows whose wording is not taken; their wordings become taken."""
    found: list[Row] = []
    for row in rows:
        marks = {digest(row.core), digest(row.text)}
        if marks & taken:
            continue
        taken |= marks
        found.append(row)
        if len(found) == count:
            break
    return found


def _stream(name: str, intents: Sequence[tuple[Intent, int]], family: Family = NOBODY,
            odd: float = 0.0) -> Iterator[Row]:
    own = 0.0 if family is NOBODY else PRIVATE_SHARE
    speaker = Speaker(random.Random(f"{SEED}/{name}"), own, odd, family)
    while True:
        yield utterance(speaker, intents)


def household_stream(candidates: int = 5) -> Iterator[Row]:
    """Utterances with at least one of the household's own words, so chosen that no such word stays rare."""
    counts: Counter[str] = Counter()
    source = (row for row in _stream("household", OWN_INTENTS, OWN_FAMILY) if row.own)
    while True:
        drawn = list(itertools.islice(source, candidates))
        row = min(drawn, key=lambda each: min(counts[term] for term in each.own))
        counts.update(row.own)
        yield row


def general_heldout() -> list[Row]:
    return _distinct(_stream("general-heldout", GENERAL_INTENTS), HELDOUT_ROWS, set())


def _split(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """(`count` rows, the others), dealt out so that every private term lies on both sides in proportion."""
    uses = Counter(term for row in rows for term in row.own)
    dealt = sorted(rows, key=lambda row: min((uses[term], term) for term in row.own))
    chosen = {(index * len(rows) + len(rows) // 2) // count for index in range(count)}
    return ([row for index, row in enumerate(dealt) if index in chosen],
            [row for index, row in enumerate(dealt) if index not in chosen])


def household() -> tuple[list[Row], list[Row]]:
    """(train, held-out).  Held-out wordings are absent from train even when politeness is stripped off."""
    taken = {mark for row in general_heldout() for mark in (digest(row.core), digest(row.text))}
    rows = _distinct(household_stream(), HELDOUT_ROWS + TRAIN_HOUSEHOLD_ROWS, taken)
    heldout, train = _split(rows, HELDOUT_ROWS)
    order = random.Random(f"{SEED}/order")
    order.shuffle(heldout)
    train += _distinct(_stream("ordinary", GENERAL_INTENTS), TRAIN_ORDINARY_ROWS, taken)
    order.shuffle(train)
    return train, heldout


def words_of(text: str) -> set[str]:
    """The words of an utterance without punctuation."""
    return set(re.findall(r"[a-z']+", text.lower()))


def _fresh_words(rng: random.Random) -> Iterator[str]:
    """Invented words, each only once."""
    seen: set[str] = set()
    while True:
        word = invented_word(rng)
        if len(word) > 3 and word not in seen:
            seen.add(word)
            yield word


def _nicknames(rng: random.Random, words: Iterator[str], devices: Sequence[Term], count: int) -> tuple[Term, ...]:
    fronts = ("old ", "big ", "little ", "the ", "the ", "")
    return tuple(Term(rng.choice(fronts) + next(words), rng.choice(devices).means, rng.choice(ROOMS).means)
                 for _ in range(count))


def _renamed(rng: random.Random, words: Iterator[str], known: Sequence[Term], count: int,
             forms: Sequence[str] = ("{}",)) -> tuple[Term, ...]:
    return tuple(Term(rng.choice(forms).format(next(words)), rng.choice(known).means) for _ in range(count))


def invented_family(rng: random.Random, words: Iterator[str]) -> Family:
    """Some other household.  Its invented words teach the base that words can be learnt, not what ours mean."""
    def levels(count: int, low: int, high: int, step: int) -> dict[str, int]:
        forms = ("{}", "like {}", "very {}", "not too {}", "{} bright", "my {}", "{} warm", "{} level")
        return {rng.choice(forms).format(next(words)): rng.randrange(low, high + 1, step) for _ in range(count)}

    def fields() -> tuple[tuple[str, int], ...]:
        chosen = rng.sample(SCENE_KEYS, rng.choice((2, 3)))
        values = {"light": 5 * rng.randrange(21), "heat": rng.randrange(15, 26), "music": 5 * rng.randrange(21),
                  "blinds": 5 * rng.randrange(21)}
        return tuple((name, values.get(name, 1)) for name in SCENE_KEYS if name in chosen)

    clocks = ("at {} o'clock", "at {} hour", "after the {}", "when {} sleeps", "at {} time")
    calls = ("{} time", "{} mode", "{} drill", "the {} show", "{}", "the big {}")
    return Family(
        _renamed(rng, words, ROOMS, 8), _nicknames(rng, words, MACHINES, 5), _nicknames(rng, words, LIGHTS, 2),
        _nicknames(rng, words, SOUNDS, 2), _renamed(rng, words, MUSIC, 3, ("{}", "{} tunes", "the {} songs")),
        tuple(Term(next(words), rng.choice(NAMES)) for _ in range(3)), _renamed(rng, words, ANIMALS, 2),
        _renamed(rng, words, GOODS, 2, ("{}", "{} juice", "{} stuff")),
        {"light": levels(4, 0, 100, 5), "heat": levels(3, 15, 26, 1), "sound": levels(2, 0, 100, 5)},
        {rng.choice(clocks).format(next(words)): f"{rng.randrange(24):02d}:{15 * rng.randrange(4):02d}"
         for _ in range(3)},
        tuple(Routine((rng.choice(calls).format(next(words)),), rng.choice(SHOWS), rng.choice(ROOMS).means, fields())
              for _ in range(4)),
    )


def pretraining_stream(seed: int = 0, odd_share: float = 0.06, family_share: float = 0.5, drill_share: float = 0.0,
                       families: int = 12) -> Iterator[Row]:
    """Endless general rows, some with unknown words, some spoken in invented households, some drilling numbers.

    Left out are the wordings of general.heldout and, in case one is invented by chance, the household's own words.
    """
    barred = {mark for row in general_heldout() for mark in (digest(row.core), digest(row.text))}
    rng = random.Random(f"{SEED}/families")
    words = _fresh_words(rng)
    others = [_stream(f"pretraining/{seed}/{index}", OWN_INTENTS, invented_family(rng, words), 0.01)
              for index in range(families)]
    plain = _stream(f"pretraining/{seed}", GENERAL_INTENTS, odd=odd_share)
    drill = _stream(f"pretraining/{seed}/drill", DRILL_INTENTS, odd=odd_share)
    mixer = random.Random(f"{SEED}/mixer/{seed}")
    while True:
        draw = mixer.random()
        common = drill if draw < family_share + drill_share else plain
        row = next(mixer.choice(others) if draw < family_share else common)
        if words_of(row.text) & OWN_WORDS or digest(row.core) in barred or digest(row.text) in barred:
            continue
        yield row


def as_jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(record(row)) + "\n" for row in rows)


def files() -> dict[str, str]:
    """The shipped data files by name."""
    train, heldout = household()
    return {"household.train.jsonl": as_jsonl(train), "household.heldout.jsonl": as_jsonl(heldout),
            "general.heldout.jsonl": as_jsonl(general_heldout())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the home assistant's data files.")
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (out / name).write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10))} rows")


if __name__ == "__main__":
    main()
