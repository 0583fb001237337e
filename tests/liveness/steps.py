# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of what a front end, a guest and a device do; the same ones for the same seed.

A sequence is plain data. Each step can be carried out whatever came before it, so any of them may
be left out when a sequence that found something is made shorter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from tests.liveness import scsi
from tests.liveness.descriptors import KINDS
from tests.liveness.unruly import DEVICES, Unruly

CHANNELS = 4
"""The channels that are opened one by one; further ones only come in a crowd."""
SLOTS = 3
"""The regions of guest memory that there may be."""


@dataclass(frozen=True)
class Step:
    """One thing to do, with its arguments."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value!r}" for key, value in self.args.items())])


@dataclass
class Sequence:
    """Steps, and what the back end is made with; ``seed`` is where they came from."""

    seed: int
    config: dict[str, Any]
    steps: list[Step]

    def dump(self) -> str:
        """Returns the sequence as text that :func:`load` reads."""
        steps = [[step.name, step.args] for step in self.steps]
        lines = ",\n ".join(json.dumps(step) for step in steps)
        return (
            f'{{"seed": {self.seed}, "config": {json.dumps(self.config)}, "steps": [\n {lines}]}}\n'
        )

    def with_steps(self, steps: Items[Step]) -> Sequence:
        """Returns the same with other steps."""
        return Sequence(self.seed, self.config, list(steps))


def load(text: str) -> Sequence:
    """Returns the sequence that :meth:`Sequence.dump` wrote."""
    found = json.loads(text)
    return Sequence(found["seed"], found["config"], [Step(*step) for step in found["steps"]])


UNRULY = tuple(DEVICES)
DISKS = ("disk", "planned disk")
"""The devices that a back end may have."""


def make_sequence(seed: int, patience: float, devices: Items[str] = UNRULY) -> Sequence:
    """Returns the sequence of ``seed``, for a back end whose patience is shortened so."""
    chance = random.Random(seed)
    return _Maker(chance, chance.choice(devices)).make(seed, patience)


def make_broken_session(seed: int, device: str) -> list[Step]:
    """Returns a session of a front end that breaks the protocol, or leaves in the middle of it."""
    chance = random.Random(seed)
    return _Maker(chance, device).make_broken_session()


class _Maker:
    """Thinks of steps, with a rough idea of what is open when each is carried out."""

    def __init__(self, chance: random.Random, device: str) -> None:
        self.chance = chance
        self.device = device
        self.open: set[int] = set()
        self.connected = False
        self.disk = device in DISKS

    def make(self, seed: int, patience: float) -> Sequence:
        chance = self.chance
        config = {
            "device": self.device,
            "unplug": chance.choice([[], ["nap"], ["slow"], ["raise"], ["exit"], ["block"]]),
            "patience": patience,
        }
        steps = [self.connect()]
        for _ in range(chance.randint(8, 28)):
            steps.append(self.step())
        return Sequence(seed, config, steps)

    def make_broken_session(self) -> list[Step]:
        makers = [
            self.open_channel,
            self.open_channel,
            self.gpadl,
            self.memory,
            self.code_map,
            self.inflight,
            self.teardown,
            self.modify,
            self.scribble,
            self.unplug,
            self.stop,
        ]
        steps = [self.connect()]
        while self.connected and self.chance.random() < 0.8:
            step = self.chance.choice(makers)()
            step.args.pop("programs", None)
            steps.append(step)
        if self.connected and self.chance.random() < 0.2:
            steps.append(self.truncate())
        if self.connected:
            rude = Step("disconnect", {"how": self.chance.choice(["abrupt", "amid", "half"])})
            steps.append(self.chance.choice([self.broken(), rude]))
        return steps

    def step(self) -> Step:
        if not self.connected:
            makers = {self.connect: 12, self.go: 1, self.kill: 1}
        elif self.disk:
            makers = {
                self.command: 40,
                self.open_channel: 20 if 0 not in self.open else 4,
                self.close: 8,
                self.reset: 4,
                self.disconnect: 6,
                self.memory: 2,
                self.teardown: 2,
                self.unplug: 1,
                self.stop: 4,
                self.drain: 6,
                self.go: 8,
                self.probe: 6,
                self.truncate: 1,
                self.kill: 1,
                self.statistics: 2,
            }
        else:
            makers = {
                self.packet: 60,
                self.open_channel: 12 if len(self.open) < CHANNELS else 2,
                self.close: 6,
                self.reset: 3,
                self.disconnect: 4,
                self.memory: 6,
                self.teardown: 3,
                self.gpadl: 5,
                self.code_map: 3,
                self.inflight: 2,
                self.modify: 2,
                self.unplug: 2,
                self.stop: 4,
                self.drain: 6,
                self.answer: 4,
                self.go: 5,
                self.probe: 6,
                self.crowd: 1,
                self.scribble: 3,
                self.jam: 2,
                self.truncate: 1,
                self.broken: 2,
                self.kill: 1,
                self.statistics: 2,
            }
        (make,) = self.chance.choices(list(makers), list(makers.values()))
        return make()

    # ---- the connection ----

    def connect(self) -> Step:
        chance = self.chance
        self.connected = True
        back = "good"
        if chance.random() < 0.25:
            back = chance.choice(["mute", "refuses", "leaves", *self._odd(1)])
            self.connected = back in ("mute", "refuses", "leaves")
        return Step(
            "connect",
            {
                "back": back,
                "code_map": chance.choice(["", "", "none", "all"]),
                "inflight": chance.random() < 0.7,
                "table": chance.random() < 0.3,
                "resume": chance.random() < 0.8,
            },
        )

    def disconnect(self) -> Step:
        self.connected = False
        how = self.chance.choice(["polite", "polite", "polite", "abrupt", "amid", "half", "reset"])
        return Step("disconnect", {"how": how})

    def kill(self) -> Step:
        self.connected = False
        return Step("kill")

    def broken(self) -> Step:
        self.connected = False
        kinds = ["version", "unknown", "oversize", "size", "flags", "fds", "order", "no-reply"]
        kind = self.chance.choice(kinds)
        return Step("broken", {"kind": kind, "odd": self._odd(self.chance.randint(0, 3))})

    # ---- memory ----

    def memory(self) -> Step:
        do = self.chance.choice(["add", "remove", "remove", "table"])
        args: dict[str, Any] = {"do": do, "slot": self.chance.randrange(SLOTS)}
        if do == "table":
            args["slots"] = sorted(self.chance.sample(range(SLOTS), self.chance.randint(0, SLOTS)))
        if self.chance.random() < 0.2:
            args["odd"] = self._odd(1)[0]
        return Step("memory", args)

    def truncate(self) -> Step:
        return Step("truncate", {"slot": self.chance.choice([0, 1, 2, 2, 2, 2])})

    def code_map(self) -> Step:
        args: dict[str, Any] = {"bits": self.chance.choice(["none", "all"])}
        if self.chance.random() < 0.4:
            args["odd"] = self._odd(1)[0]
        return Step("code_map", args)

    def inflight(self) -> Step:
        kind = self.chance.choice(["get", "set", "garbage"])
        args: dict[str, Any] = {"kind": kind}
        if kind == "set":
            args["odd"] = self._odd(1)[0]
        return Step("inflight", args)

    # ---- GPADLs ----

    def gpadl(self) -> Step:
        args: dict[str, Any] = {"channel": self._channel(), "pages": self.chance.randint(1, 8)}
        if self.chance.random() < 0.3:
            args["odd"] = self._odd(1)[0]
        if self.chance.random() < 0.2:
            args["lie"] = self.chance.choice(["more", "fewer", "outside"])
        return Step("gpadl", args)

    def teardown(self) -> Step:
        what = self.chance.choice(["ring", "mapped", "mapped", "unknown"])
        return Step("teardown", {"channel": self._channel(), "what": what})

    # ---- channels ----

    def open_channel(self) -> Step:
        chance = self.chance
        closed = [index for index in range(CHANNELS) if index not in self.open]
        index = chance.choice(closed) if closed and chance.random() < 0.9 else self._channel()
        if self.disk:  # the others are the first one's subchannels
            index = min(closed, default=0)
        self.open.add(index)
        args: dict[str, Any] = {
            "channel": index,
            "ring": chance.choice([[3, 3], [3, 3], [5, 3], [2, 2], [3, 9]]),
            "programs": "" if self.disk else self._programs(),
        }
        if chance.random() < 0.15:
            args["odd"] = [chance.choice(["eventfd", *self._odd(2)]), *self._odd(1)]
        elif chance.random() < 0.2:
            args["odd"] = chance.choices(
                ["eventfd", "eventfd-blocking", "eventfd-full", "eventfd-blocking-full"], k=2
            )
        if not all(kind.startswith("eventfd") for kind in args.get("odd", ())):
            self.connected = False  # the back end ends the connection
        return Step("open", args)

    def close(self) -> Step:
        index = self._channel()
        self.open.discard(index)
        return Step("close", {"channel": index})

    def reset(self) -> Step:
        self.open.clear()
        return Step("reset")

    def modify(self) -> Step:
        return Step("modify", {"channel": self._channel(), "vp": self.chance.randrange(4)})

    def unplug(self) -> Step:
        return Step("unplug")

    def stop(self) -> Step:
        return Step("stop")

    def crowd(self) -> Step:
        """Many channels at once, each with the same trouble."""
        words = self.chance.choice(
            ["block complete", "slow complete", "spawn block write complete", "lend", "raise"]
        )
        programs = self.chance.choice(
            ["", "", "suspended:slow", "closed:slow", "suspended:raise", "post_started:block"]
        )
        end = self.chance.choice(["reset", "disconnect", "none"])
        return Step(
            "crowd",
            {"count": Unruly.max_channels, "words": words, "programs": programs, "end": end},
        )

    def scribble(self) -> Step:
        where = self.chance.choice(["out", "in", "data", "write_index", "read_index"])
        return Step(
            "scribble",
            {"channel": self._channel(), "where": where, "noise": self.chance.getrandbits(32)},
        )

    def jam(self) -> Step:
        how = self.chance.choice(["call", "kick"])
        return Step("jam", {"channel": self._channel(), "how": how})

    # ---- packets ----

    def packet(self) -> Step:
        chance = self.chance
        args: dict[str, Any] = {
            "channel": self._channel(),
            "words": self._words(),
            "count": chance.choice([1, 1, 1, 2, 5, 20]),
            "pages": chance.choice([0, 0, 1, 2, 4]),
        }
        if chance.random() < 0.08:
            args["wrong"] = chance.choice(["outside", "long"])
        return Step("packet", args)

    def command(self) -> Step:
        """A SCSI command, at a place whose accesses are quick, slow, or wait."""
        chance = self.chance
        blocks = chance.choice([8, 16, 64])
        quarter = chance.choice([0, 1, 2, 3, 3])
        lba = (quarter * scsi.BLOCKS // 4) + 8 * chance.randrange(scsi.BLOCKS // 32 - 8)
        if chance.random() < 0.2:  # begins quickly, and ends in the next quarter
            lba = max(0, (quarter * scsi.BLOCKS // 4) - blocks // 2)
        args: dict[str, Any] = {
            "channel": self._channel() if self.open else 0,
            "kind": chance.choice(scsi.KINDS),
            "lba": lba,
            "blocks": blocks,
            "count": chance.choice([1, 1, 3, 10]),
        }
        return Step("command", args)

    def drain(self) -> Step:
        return Step("drain", {"channel": self._channel()})

    def answer(self) -> Step:
        return Step("answer", {"channel": self._channel()})

    def go(self) -> Step:
        return Step("go")

    def probe(self) -> Step:
        return Step("probe")

    def statistics(self) -> Step:
        return Step("statistics")

    # ---- words ----

    def _channel(self) -> int:
        if self.open and self.chance.random() < 0.85:
            return self.chance.choice(sorted(self.open))
        return self.chance.randrange(CHANNELS + 1)

    def _odd(self, count: int) -> list[str]:
        return self.chance.choices(sorted(KINDS), k=count)

    def _words(self) -> str:
        chance, kind = self.chance, self.chance.random()
        if kind < 0.4:
            first = chance.choice(["", "", "nap", "spawn nap", "defer", "spawn", "note", "stats"])
            then = chance.choice(
                ["", "", "write", "read", "load", "store", "fill", "look", "look scrawl", "send",
                 "ask", "map smear", "map", "unmap", "smear"]
            )  # fmt: skip
            return f"{first} {then} complete"
        if kind < 0.75:
            first = chance.choice(["spawn", "spawn", "defer", "", "look spawn", "map spawn"])
            wait = chance.choice(["block", "block", "block", "slow", "stubborn"])
            then = chance.choice(
                ["write", "scrawl", "look scrawl", "load", "store", "fill", "send", "smear",
                 "map smear", "note", "ask", "raise", "ring", "offer", "pause", "request"]
            )  # fmt: skip
            return f"{first} {wait} {then} complete"
        return chance.choice(
            ["raise", "exit", "oserror", "guilty", "fail", "twice", "large", "huge", "hold", "hold",
             "flood complete", "askraise complete", "askblock complete", "askexit complete",
             "lend hold", "lend complete", "lendblock hold", "spawn lendblock complete",
             "lendraise complete", "lendraise hold",
             "ring complete", "ringblock complete", "ringraise complete", "quota complete",
             "offer complete", "rescind complete", "spawn again", "spawn pause complete",
             "spawn request complete", "spawn patient complete", "request"]
        )  # fmt: skip

    def _programs(self) -> str:
        chance = self.chance
        parts = []
        for callback in CALLBACKS:
            if chance.random() < 0.1:
                words = chance.choice(
                    ["nap", "slow", "block", "raise", "exit", "oserror", "guilty", "send", "ask",
                     "askraise", "askblock", "flood", "offer", "rescind", "ring", "ringblock",
                     "ringraise", "stats", "request", "spawn patient", "map", "refuse"]
                )  # fmt: skip
                parts.append(f"{callback}:{words}")
        return "|".join(parts)


CALLBACKS = (
    "opened",
    "resumed",
    "started",
    "post_started",
    "packet_rejected",
    "processing_complete",
    "suspended",
    "closed",
)
"""The callbacks whose programs an opening carries."""
