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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from home_intents import DRILL_INTENTS, GENERAL_INTENTS, OWN_INTENTS, Intent
from home_speaker import Action, Speaker
from home_words import (
    ANIMALS,
    GOODS,
    LIGHTS,
    MACHINES,
    MUSIC,
    NAMES,
    NOBODY,
    OWN_FAMILY,
    OWN_WORDS,
    ROOMS,
    SCENE_KEYS,
    SHOWS,
    SOUNDS,
    Family,
    Routine,
    Term,
    invented_word,
)

SEP = " =>"
SEED = "edgegt-home-1"
TRAIN_HOUSEHOLD_ROWS = 720
TRAIN_ORDINARY_ROWS = 280
HELDOUT_ROWS = 240
PRIVATE_SHARE = 0.65




@dataclass(frozen=True)
class Row:
    """One utterance: `core` is the wording without politeness, `text` what was said, `own` the private terms in it."""

    core: str
    text: str
    action: Action
    own: tuple[str, ...]


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
