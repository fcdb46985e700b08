"""Heat makes a run rest and never stop, a battery makes it wait, and both are said and recorded; time is made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edgegt.pacing import COOLER, LONGEST_REST_S, NEXT_REST_S, STOP_POLL_S, Pacer
from edgegt.sensors import Reading

COOL = Reading(temperature_c=50.0)
MAINS = Reading(on_battery=False, battery_percent=80.0)


class World:
    """A clock that only sleep moves, and sensors that say what `feel` makes of the time."""

    def __init__(self, feel: Callable[[float], Reading], stop_at: float = math.inf, **settings: Any) -> None:
        self.now, self.reads, self.saves, self.feel = 0.0, 0, 0, feel
        self.longest_sleep = 0.0
        self.said: list[str] = []
        self.events: list[dict[str, Any]] = []
        settings = {"ceiling_c": 80.0, "min_battery": None, "only_on_mains": False, **settings}
        self.pacer = Pacer(
            self, say=self.said.append, record=self.events.append, stopped=lambda: self.now >= stop_at,
            clock=lambda: self.now, sleep=self.sleep, **settings,
        )  # fmt: skip

    def read(self) -> Reading:
        self.reads += 1
        return self.feel(self.now)

    def power_mode(self) -> str | None:
        return None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.longest_sleep = max(self.longest_sleep, seconds)

    def save(self) -> None:
        self.saves += 1

    def step(self, seconds: float = 1.0) -> Reading | None:
        """Train for a while, then what comes between two steps."""
        self.now += seconds
        return self.pacer.between_steps(seconds, self.save)


def heat(of: Callable[[float], float | None]) -> Callable[[float], Reading]:
    return lambda now: Reading(temperature_c=of(now))


def test_a_cool_machine_is_read_once_a_second_and_never_waits() -> None:
    world = World(lambda now: COOL)
    readings = [world.step(0.1) for _ in range(100)]
    assert 9 <= world.reads <= 10
    assert [reading for reading in readings if reading] == [COOL] * world.reads
    assert (world.pacer.paused_s, world.events, world.said) == (0.0, [], [])


def test_heat_rests_until_five_degrees_below_the_ceiling_and_goes_on() -> None:
    world = World(heat(lambda now: 82.0 - 0.5 * max(0.0, now - 1)))  # at the ceiling after 1 s, cooling from there
    reading = world.step()
    assert reading is not None and reading.temperature_c == 82.0, "what made it rest, not what came of it"
    rested = (82 - 80 + COOLER) / 0.5
    assert world.pacer.paused_s == pytest.approx(rested, abs=1.3)
    assert world.now == pytest.approx(1 + world.pacer.paused_s)
    (event,) = world.events
    assert (event["kind"], event["temperature_c"]) == ("heat", 82.0)
    assert event["paused_s"] == pytest.approx(world.pacer.paused_s, abs=0.06)
    assert world.said == ["82 °C, the ceiling is 80 °C: resting until 75 °C"]
    paused = world.pacer.paused_s
    world.step()
    assert (world.pacer.paused_s, len(world.events)) == (paused, 1)


def test_just_below_the_ceiling_is_not_heat_and_the_ceiling_itself_is() -> None:
    below, at = World(heat(lambda now: 79.9)), World(heat(lambda now: 80.0 if now < 2 else 60.0))
    below.step()
    at.step()
    assert below.pacer.paused_s == 0.0 < at.pacer.paused_s
    unlimited = World(heat(lambda now: 120.0), ceiling_c=None)
    unlimited.step()
    assert unlimited.pacer.paused_s == 0.0


def test_every_rest_is_recorded_but_few_are_said() -> None:
    world = World(heat(lambda now: 85.0 if now % 4 < 2 else 60.0))
    while world.now < 1000:
        world.step()
    assert len(world.events) > 100
    assert sum(event["paused_s"] for event in world.events) == pytest.approx(world.pacer.paused_s, rel=0.05)
    assert len(world.said) == 2, "one each 10 minutes"


def test_heat_that_stays_slows_the_run_to_half_and_never_hangs_it() -> None:
    world = World(heat(lambda now: 90.0))
    world.step()
    assert LONGEST_REST_S + 1 <= world.pacer.paused_s <= LONGEST_REST_S + 1.3, "a rest, and half speed from here"
    start, paused, steps = world.now, world.pacer.paused_s, 0
    while world.now < start + 4 * 3600:
        world.step()
        steps += 1
    assert steps == pytest.approx(4 * 3600 / 2, rel=0.01)
    assert world.pacer.paused_s - paused == pytest.approx(steps, rel=0.01)
    assert world.said[-1] == "90 °C although it rested 5 min 00 s: half speed whenever at 80 °C or above"
    assert len(world.said) == 2
    assert world.events[0]["text"] == "90 °C, ceiling 80 °C: rested, still 90 °C: half speed"
    slow = [event for event in world.events if event["text"] == "half speed for heat"]
    assert len(slow) == pytest.approx(4 * 60, abs=5), "one a minute"
    assert sum(event["paused_s"] for event in slow) == pytest.approx(steps, rel=0.02)


def test_half_speed_ends_below_the_ceiling_and_then_heat_rests_again_after_half_an_hour() -> None:
    world = World(heat(lambda now: 79.0 if 400 < now < 500 else 90.0))
    while world.now < 400:
        world.step()
    world.step()
    paused = world.pacer.paused_s
    world.step()
    world.step()
    assert world.pacer.paused_s == paused, "full speed"
    assert sum(event["paused_s"] for event in world.events) == pytest.approx(paused, abs=0.2), "nothing unrecorded"
    while world.now < 520:
        world.step()
    assert world.pacer.paused_s - paused < 15, "half speed, not another rest of 5 minutes"
    cool = World(heat(lambda now: 79.0 if 400 < now < 400 + NEXT_REST_S else 90.0))
    while cool.now < 390 + NEXT_REST_S:
        cool.step()
    before = cool.pacer.paused_s
    while cool.now < 410 + NEXT_REST_S:
        cool.step()
    assert cool.pacer.paused_s - before >= LONGEST_REST_S


@pytest.mark.parametrize("absurd", [None, math.nan, math.inf, -273.0, 1000.0])
def test_absurd_temperatures_are_ignored(absurd: float | None) -> None:
    world = World(heat(lambda now: absurd))
    for _ in range(5):
        world.step()
    assert (world.pacer.paused_s, world.events) == (0.0, [])
    lost = World(heat(lambda now: 81.0 if now < 2 else absurd))
    lost.step()
    assert lost.pacer.paused_s == pytest.approx(LONGEST_REST_S, abs=0.3), "a rest, and full speed after it"
    lost.step()
    assert lost.pacer.paused_s == pytest.approx(LONGEST_REST_S, abs=0.3)


@pytest.mark.parametrize("percent", [None, math.nan, -1.0, 255.0])
def test_absurd_battery_levels_are_no_low_battery(percent: float | None) -> None:
    world = World(lambda now: Reading(on_battery=True, battery_percent=percent), min_battery=20)
    world.step()
    assert (world.saves, world.pacer.paused_s) == (0, 0.0)


def test_a_low_battery_saves_once_and_waits_for_mains() -> None:
    flat = Reading(on_battery=True, battery_percent=18.0)
    world = World(lambda now: flat if now < 701 else MAINS, min_battery=20)
    world.step()
    assert world.saves == 1 and world.now == pytest.approx(701, abs=2.3)
    assert world.said == [
        "on battery at 18 %: waiting for mains, the run is saved; Ctrl-C stops it",
        "on mains after 11 min 41 s: going on",
    ]
    (event,) = world.events
    assert (event["kind"], event["text"]) == ("battery", "on battery at 18 %: waited for mains")
    assert event["paused_s"] == pytest.approx(world.pacer.paused_s, abs=0.06)
    assert world.reads == pytest.approx(700 / 2, rel=0.12), "every 2 s"
    world.step()
    assert world.saves == 1


def test_a_battery_that_is_put_in_ends_the_wait_two_percent_above_the_limit() -> None:
    levels = [18.0, 21.0, 22.0, 22.5]
    world = World(
        lambda now: Reading(on_battery=True, battery_percent=levels[min(int(now // 10), 3)]), min_battery=20
    )  # fmt: skip
    world.step()
    assert world.now == pytest.approx(30, abs=2.3)
    assert world.said[-1].startswith("battery at 22 % after ")


@pytest.mark.parametrize(("min_battery", "only_on_mains", "waits"), [
    (None, True, True), (20.0, False, False), (None, False, False), (20.0, True, True), (60.0, False, True),
])  # fmt: skip
def test_what_is_allowed_on_battery(min_battery: float | None, only_on_mains: bool, waits: bool) -> None:
    half = Reading(on_battery=True, battery_percent=50.0)
    world = World(lambda now: half if now < 20 else MAINS, min_battery=min_battery, only_on_mains=only_on_mains)
    world.step()
    assert (world.saves == 1) == (world.now > 15) == waits
    assert [event["kind"] for event in world.events] == ["mains" if only_on_mains else "battery"] * waits
    full_speed = World(lambda now: replace(MAINS, battery_percent=3.0), min_battery=min_battery, only_on_mains=True)
    full_speed.step()
    assert full_speed.pacer.paused_s == 0.0, "on mains nothing waits, however low the battery"


def test_a_battery_that_vanishes_does_not_hang_the_run_and_one_failed_read_does_not_end_the_wait() -> None:
    on_battery = Reading(on_battery=True)
    world = World(lambda now: Reading() if 9 < now < 12 or now > 60 else on_battery, only_on_mains=True)
    world.step()
    assert world.now == pytest.approx(69, abs=3)
    assert world.said[0] == "on battery: waiting for mains, the run is saved; Ctrl-C stops it"
    assert "no battery is known any more" in world.said[-1]


@pytest.mark.parametrize("feel", [
    heat(lambda now: 90.0), lambda now: Reading(on_battery=True, battery_percent=5.0),
])  # fmt: skip
def test_a_signal_ends_any_wait_within_a_fifth_of_a_second(feel: Callable[[float], Reading]) -> None:
    world = World(feel, stop_at=10.05, min_battery=20)
    world.step()
    assert 10.05 <= world.now <= 10.05 + STOP_POLL_S + 1e-6
    assert world.longest_sleep <= STOP_POLL_S
    (event,) = world.events
    assert event["paused_s"] == pytest.approx(world.now - 1, abs=0.06)
    assert not any("going on" in line for line in world.said)
    paused = world.pacer.paused_s
    world.step()
    assert world.pacer.paused_s == paused, "no wait begins after a signal"


def test_a_signal_ends_half_speed_too() -> None:
    world = World(heat(lambda now: 90.0), stop_at=400)
    world.step()
    world.step(60)
    assert world.now == pytest.approx(400, abs=STOP_POLL_S + 1e-6)


@pytest.mark.parametrize(("settings", "notes"), [
    ({"min_battery": 20.0}, 1), ({"only_on_mains": True}, 1), ({}, 0),
])  # fmt: skip
def test_where_no_battery_is_known_this_is_said_once_if_one_was_asked_about(settings: Any, notes: int) -> None:
    world = World(lambda now: COOL, **settings)
    for _ in range(5):
        world.step()
    assert world.said == ["note: no battery is known on this machine: the run does not wait for mains"] * notes
    assert (world.saves, world.pacer.paused_s) == (0, 0.0)


def test_throttling_is_recorded_once_a_minute_with_every_event_counted() -> None:
    world = World(lambda now: Reading(throttled=1000 + 3 * int(now)))
    while world.now < 300:
        world.step()
    counts = [int(event["text"].split()[-2]) for event in world.events]
    assert {event["kind"] for event in world.events} == {"throttle"}
    assert 5 <= len(counts) <= 6
    assert sum(counts) == pytest.approx(3 * 300, abs=200)
    assert all("paused_s" not in event for event in world.events)
    quiet = World(lambda now: Reading(throttled=1000 if now < 5 else 4))
    while quiet.now < 100:
        quiet.step()
    assert quiet.events == [], "many before the run are none in it"
