# SPDX-License-Identifier: GPL-2.0-or-later
"""What a served device writes while a guest uses it, seen by whoever started it."""

from pathlib import Path

from tests.support.paths import PROGRAMS
from tests.support.waiting import eventually, nothing_left_behind
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.device_output import DeviceOutput, Lines

TALKATIVE = f"{PROGRAMS / 'talkative.py'}:Talkative"


def test_all_that_a_device_writes_is_shown_when_it_is_written(tmp_path: Path) -> None:
    """Prints, records of its log, tracebacks; a flood that its guest provokes stops nothing."""
    lines: list[str] = []

    def shown(text: str) -> bool:
        return any(text in line for line in lines)

    with nothing_left_behind():
        output = DeviceOutput(
            "Talkative",
            tmp_path / "log",
            lambda title, line: lines.append(line),
            Lines(period=3600),
        )
        back_end = BackEndProcess("device0", [TALKATIVE], tmp_path, output=output)
        try:
            with SoftwareGuest.connect(back_end.socket) as guest, guest.open_channel() as channel:
                eventually(lambda: lines == ["the file is read", "channel 0 is open"])
                assert channel.send(b"print").rstrip(b"\0") == b"written"
                eventually(lambda: lines[2:] == ["printed in two words"])
                channel.send(b"log")
                eventually(lambda: shown("WARNING talkative: logged"))
                channel.send(b"flood")
                eventually(lambda: shown("line 100"))
                assert channel.send(b"print").rstrip(b"\0") == b"written"
                channel.submit(b"raise")
                eventually(lambda: "ValueError: raised" in output.last_words())
            assert back_end.problem is None
        finally:
            back_end.stop()
            output.close()
    assert lines[-1].endswith("more lines within 3600 s are not shown)")
    text = (tmp_path / "log").read_text()
    assert text.startswith("the file is read\nchannel 0 is open\nprinted in two words\n")
    assert "\nline 99999\nprinted in two words\n" in text
    assert "Traceback" in text
