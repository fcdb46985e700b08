"""What can be wanted of the home assistant: each intent makes a wording and the action that it means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from home_speaker import Action, Speaker, with_moment
from home_words import (
    ANIMALS,
    BLINDS,
    FANS,
    FIELDS,
    GOODS,
    HEATS,
    LIGHTS,
    LOCKERS,
    MUSIC,
    OPENERS,
    PEOPLE,
    ROUTINE_FORMS,
    SCENES,
    SENSED,
    SOUNDS,
    SWITCHED,
    Term,
    odd_word,
    terms,
)

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
        return with_moment(speaker, text, moment), {"do": do, **target, **when}
    return build


SET_FORMS = ("set {t} to {v}", "put {t} at {v}", "{t} to {v}", "{t} at {v}", "i want {t} at {v}", "make {t} {v}",
             "change {t} to {v}", "bring {t} to {v}", "adjust {t} to {v}", "{t} {v}")
SET_KINDS: tuple[tuple[str, tuple[Term, ...], str], ...] = (
    ("light", LIGHTS + terms({"light": "brightness"}), "light"),
    ("light", LIGHTS, "light"),
    ("heat", HEATS + terms({"heat": "temperature"}), ""),
    ("sound", SOUNDS + terms({"speaker": "volume"}), "sound"),
    ("blinds", BLINDS, ""),
    ("fan", FANS, ""),
    ("oven", terms({"oven": "oven,stove,cooker"}), "oven"),
)


def set_level(speaker: Speaker) -> tuple[str, Action]:
    kind, general, slot = speaker.rng.choice(SET_KINDS)
    said, target = speaker.target(general, speaker.family.slot(slot))
    level, value = speaker.level(kind)
    moment, when = speaker.moment(0.15)
    forms = SET_FORMS + (("dim {t} to {v}", "{v} for {t}") if kind == "light" else ("{v} for {t}",))
    text = speaker.one(forms).format(t=said, v=level)
    return with_moment(speaker, text, moment), {"do": "set", **target, "to": value, **when}


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
    return with_moment(speaker, text, moment), {**action, **values, **when}


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
    return with_moment(speaker, speaker.one(forms[do]).format(n=person.said), moment), {
        "do": do, "who": person.means, **when}


def feed(speaker: Speaker) -> tuple[str, Action]:
    animal = speaker.term(ANIMALS, speaker.family.animals)
    name = animal.said if animal.private else f"the {animal.said}"
    form = speaker.one(("feed {n}", "give {n} some food", "food for {n}", "{n} is hungry", "dinner for {n}",
                        "fill the bowl for {n}"))
    moment, when = speaker.moment(0.35)
    return with_moment(speaker, form.format(n=name), moment), {"do": "feed", "who": animal.means, **when}


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
    return with_moment(speaker, text, moment), {"do": "scene", "what": chosen.what, "where": where, **fields, **when}


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
