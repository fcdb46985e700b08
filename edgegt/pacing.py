"""Whether to go on, slow down or wait between two training steps, by what the sensors say.

Heat at or above the ceiling: rest until 5 degrees below it, 5 minutes at most. Where that is not enough (a hot room, a
stuck sensor), go on at half speed, each step followed by a rest as long, until below the ceiling again; within the next
half hour heat only slows. So heat never stops a run: in the worst case it runs 30 of 35 minutes at half speed.

Battery, or no mains where only mains is allowed: save, and wait for as long as it takes, which is what the user asked
for. It also ends when no battery is known any more. A signal ends any wait within 0.2 s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from edgegt.sensors import HIGHEST_C, LOWEST_C, Reading, Sensors
from edgegt.units import format_duration

COOLER = 5.0  # degrees below the ceiling at which a rest ends
LONGEST_REST_S = 300.0
NEXT_REST_S = 1800.0  # after a rest that did not help, heat only slows for this long
READ_EVERY_S = 1.0
BATTERY_POLL_S = 2.0
STOP_POLL_S = 0.2
SAY_AGAIN_S = 600.0  # rests are recorded each, and said at most this often
EVENT_EVERY_S = 60.0  # of throttling and of half speed
RECOVERED = 2.0  # percent above the battery's limit at which a wait ends
UNKNOWN_POLLS = 5  # readings without a battery after which there is none

Event = dict[str, Any]


class Pacer:
    """Between steps: rests for heat, waits for mains. `paused_s`: seconds that all of it took so far.

    ceiling_c: None for no ceiling. min_battery: percent, None for no limit. say: one line to the user. record: one
    event, {"kind", "text"} and "paused_s", "temperature_c", "battery_percent" where known. stopped: a signal came.
    """

    def __init__(
        self,
        sensors: Sensors,
        ceiling_c: float | None,
        min_battery: float | None,
        only_on_mains: bool,
        say: Callable[[str], None],
        record: Callable[[Event], None],
        stopped: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.paused_s = 0.0
        self._sensors, self._ceiling_c = sensors, ceiling_c
        self._min_battery, self._only_on_mains = min_battery, only_on_mains
        self._say, self._record, self._stopped = say, record, stopped
        self._clock, self._sleep = clock, sleep
        self._read_at = -math.inf
        self._said_heat_at = self._rested_in_vain_at = self._throttle_event_at = -math.inf
        self._said_half_speed = False
        self._slow_since: float | None = None  # when half speed began, or was last recorded
        self._slow_s = 0.0
        self._throttled: int | None = None

    def between_steps(self, step_s: float, save: Callable[[], None]) -> Reading | None:
        """To be called after each step with the seconds it took; returns what the sensors said before any pause.

        None where they were read less than a second ago. save: called once before each wait for mains.
        """
        first = self._read_at == -math.inf
        reading = now = None
        if self._clock() - self._read_at >= READ_EVERY_S:
            reading = now = self._read()
            if first:
                self._note_missing_battery(now)
            self._note_throttling(now)
            if self._must_wait(now):
                now = self._wait_for_mains(now, save)
            self._mind_heat(now)
        if self._slow_since is not None:
            self._slow_s += self._wait(lambda: False, step_s, step_s)
            self._note_half_speed(now)
        return reading

    def _read(self) -> Reading:
        self._read_at = self._clock()
        return self._sensors.read()

    def _mind_heat(self, reading: Reading) -> None:
        """Rest, or begin or end half speed. An unknown temperature changes nothing."""
        ceiling, found = self._ceiling_c, temperature_c(reading)
        if ceiling is None or found is None or self._stopped():
            return
        if found < ceiling:
            self._end_half_speed(reading)
        elif self._slow_since is None:
            if self._clock() - self._rested_in_vain_at >= NEXT_REST_S:
                self._rest(found, ceiling)
            else:
                self._begin_half_speed(found, ceiling)

    def _rest(self, hot: float, ceiling: float) -> None:
        """Wait until it is cool; where it does not become so, go on at half speed."""
        enough = ceiling - COOLER
        if self._clock() - self._said_heat_at >= SAY_AGAIN_S:
            self._said_heat_at = self._clock()
            self._say(f"{hot:.0f} °C, the ceiling is {ceiling:g} °C: resting until {enough:g} °C")
        last = Reading()

        def cool() -> bool:
            nonlocal last
            last = self._read()
            found = temperature_c(last)
            return found is not None and found <= enough

        spent = self._wait(cool, READ_EVERY_S, LONGEST_REST_S)
        found = temperature_c(last)
        text = f"{hot:.0f} °C, ceiling {ceiling:g} °C: rested"
        if spent >= LONGEST_REST_S and (found is None or found > enough):
            self._rested_in_vain_at = self._clock()
            now = "temperature unknown" if found is None else f"still {found:.0f} °C"
            text = f"{text}, {now}"
            if found is not None and found >= ceiling:
                text = f"{text}: half speed"
                self._begin_half_speed(found, ceiling)
        self._event("heat", text, spent, hot, last)

    def _begin_half_speed(self, found: float, ceiling: float) -> None:
        self._slow_since = self._clock()
        if not self._said_half_speed:
            self._said_half_speed = True
            rest = format_duration(LONGEST_REST_S)
            self._say(f"{found:.0f} °C although it rested {rest}: half speed whenever at {ceiling:g} °C or above")

    def _end_half_speed(self, reading: Reading) -> None:
        if self._slow_since is not None:
            self._note_half_speed(reading, end=True)
            self._slow_since = None

    def _note_half_speed(self, reading: Reading | None, end: bool = False) -> None:
        """Half speed as an event, once a minute and at its end."""
        if self._slow_since is None or not (end or self._clock() - self._slow_since >= EVENT_EVERY_S):
            return
        if self._slow_s:
            self._event("heat", "half speed for heat", self._slow_s, None, reading)
        self._slow_since, self._slow_s = self._clock(), 0.0

    def _note_throttling(self, reading: Reading) -> None:
        """The processor slowed itself down since the last event of this kind."""
        count = reading.throttled
        if count is None:
            return
        if self._throttled is None or count < self._throttled:
            self._throttled = count
        elif count > self._throttled and self._clock() - self._throttle_event_at >= EVENT_EVERY_S:
            times = count - self._throttled
            text = f"the processor slowed itself down, {times} event{'' if times == 1 else 's'}"
            self._throttled, self._throttle_event_at = count, self._clock()
            self._event("throttle", text, None, None, reading)

    def _note_missing_battery(self, reading: Reading) -> None:
        if reading.on_battery is None and (self._only_on_mains or self._min_battery is not None):
            self._say("note: no battery is known on this machine: the run does not wait for mains")

    def _must_wait(self, reading: Reading) -> bool:
        """On battery, and that is not allowed, or not at this level."""
        level = battery_percent(reading)
        low = self._min_battery is not None and level is not None and level < self._min_battery
        return bool(reading.on_battery) and (self._only_on_mains or low) and not self._stopped()

    def _wait_for_mains(self, reading: Reading, save: Callable[[], None]) -> Reading:
        """Save, say so, and wait; returns the last reading."""
        save()
        level = battery_percent(reading)
        at = "on battery" + ("" if level is None else f" at {level:.0f} %")
        self._say(f"{at}: waiting for mains, the run is saved; Ctrl-C stops it")
        last, unknown = reading, 0

        def powered() -> bool:
            nonlocal last, unknown
            last = self._read()
            unknown = unknown + 1 if last.on_battery is None else 0
            return last.on_battery is False or unknown >= UNKNOWN_POLLS or self._charged(last)

        spent = self._wait(powered, BATTERY_POLL_S, math.inf)
        if not self._stopped():
            now = "on mains" if last.on_battery is False else "no battery is known any more"
            if last.on_battery:
                now = f"battery at {battery_percent(last):.0f} %"
            self._say(f"{now} after {format_duration(spent)}: going on")
        self._event("mains" if self._only_on_mains else "battery", f"{at}: waited for mains", spent, None, last)
        return last

    def _charged(self, reading: Reading) -> bool:
        """Above the limit again although on battery: another one was put in."""
        level = battery_percent(reading)
        if self._only_on_mains or self._min_battery is None or level is None:
            return False
        return level > min(self._min_battery + RECOVERED, 99.0)

    def _wait(self, done: Callable[[], bool], poll_s: float, longest_s: float) -> float:
        """Wait until `done`, asked every `poll_s`, or a signal, `longest_s` at most; returns and counts the seconds."""
        start = asked = now = self._clock()
        while not self._stopped() and now - start < longest_s:
            self._sleep(min(STOP_POLL_S, longest_s - (now - start)))
            now = self._clock()
            if now - asked >= poll_s:
                asked = now
                if done():
                    break
        spent = self._clock() - start
        self.paused_s += spent
        return spent

    def _event(self, kind: str, text: str, paused_s: float | None, hot: float | None, reading: Reading | None) -> None:
        """Record it with what is known. hot: the temperature that caused it, the reading's where it is None."""
        found = reading or Reading()
        values = {
            "paused_s": paused_s,
            "temperature_c": hot if hot is not None else temperature_c(found),
            "battery_percent": battery_percent(found),
        }
        known = {key: round(value, 1) for key, value in values.items() if value is not None}
        self._record({"kind": kind, "text": text, **known})


def temperature_c(reading: Reading) -> float | None:
    """The temperature, None where no working sensor would say it."""
    value = reading.temperature_c
    return value if value is not None and LOWEST_C <= value <= HIGHEST_C else None


def battery_percent(reading: Reading) -> float | None:
    """The battery's level, None where it is not from 0 to 100."""
    value = reading.battery_percent
    return value if value is not None and 0 <= value <= 100 else None
