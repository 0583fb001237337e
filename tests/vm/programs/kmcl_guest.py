# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs in the guest: what user space can do with VMBus channels, against ``kmcl_devices.py``.

    python3 kmcl_guest.py [CASE...]
    python3 kmcl_guest.py killed|without|unplugged FOLDER
    python3 kmcl_guest.py rates

Each function named ``case_...`` is a case. Prints one JSON object for each: its name, its seconds,
and, if it failed, why. The second form is told by files in FOLDER how things are at the host.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable

import kmcl_data
import kmcl_life
import kmcl_traffic
from kmcl_support import obedient, text
from vmbus_user import PAGE, Memory

NOTHING = text("nothing")

CASES = {
    name.removeprefix("case_"): function
    for module in (kmcl_data, kmcl_traffic, kmcl_life)
    for name, function in vars(module).items()
    if name.startswith("case_")
}


def run(name: str, function: Callable[[], object]) -> None:
    start = time.monotonic()
    problem = None
    try:
        function()
    except BaseException:
        problem = traceback.format_exc()
    seconds = round(time.monotonic() - start, 2)
    print(json.dumps({"case": name, "seconds": seconds, "problem": problem}), flush=True)


def rates(seconds: float = 1.5) -> None:
    """Round trips with external PFNs, one at a time, into a device that does nothing else."""
    with obedient() as channel:
        for pages in (0, 1, 16, 256):
            memory = Memory(max(pages, 1) * PAGE)
            ranges = [memory.range()] if pages else []
            count, start = 0, time.monotonic()
            while (elapsed := time.monotonic() - start) < seconds:
                channel.request(NOTHING, ranges)
                count += 1
            print(json.dumps({"pages": pages, "per_second": round(count / elapsed)}))


def main(words: list[str]) -> None:
    if words[:1] == ["killed"]:
        run("killed", lambda: kmcl_life.beside_a_back_end_that_is_killed(words[1]))
    elif words[:1] == ["without"]:
        run("without", lambda: kmcl_life.without_a_back_end(words[1]))
    elif words[:1] == ["unplugged"]:
        run("unplugged", lambda: kmcl_life.beside_a_device_that_is_unplugged(words[1]))
    elif words == ["rates"]:
        rates()
    else:
        for name in words or CASES:
            run(name, CASES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
