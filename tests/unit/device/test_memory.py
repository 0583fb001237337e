# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device host does with guest memory: GPADLs, removal, translated code."""

import os
import time

import pytest

from tests.support.devices import TestDevice
from tests.support.ram import BASE, BASE_PFN, Ram
from tests.support.raw_channel import raw_channel, repeat
from tests.support.waiting import eventually, in_thread
from vhostvmbus.channel import Channel, ChannelState, Packet
from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.device import DeviceHost
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange

# -- GPADLs --------------------------------------------------------------------------------------


def test_gpadl_ids_and_bounds() -> None:
    with raw_channel(TestDevice()) as guest:
        host = guest.host
        page = [GpaRange.of_pages([BASE_PFN + 200])]
        with pytest.raises(errors.GpadlExists):
            host.gpadl_create(0, guest.opening.gpadl_id, page)
        with pytest.raises(errors.GpadlUnknown):
            host.gpadl_teardown(0, 2)
        with pytest.raises(errors.ChannelUnknown):
            host.gpadl_create(1, 2, page)
        with pytest.raises(errors.GpadlInvalid):
            host.gpadl_create(0, 2, [GpaRange.of_pages([5])])
        with pytest.raises(errors.GpadlInvalid):
            host.gpadl_create(0, 2, [])
        many = GpaRange.of_pages([BASE_PFN + i % 512 for i in range(100_000)])
        host.gpadl_create(0, 3, [many])
        with pytest.raises(errors.GpadlLimit):
            repeat(lambda i: host.gpadl_create(0, 4 + i, [many]), 16)
        host.gpadls.clear(Deadline(1))
        with pytest.raises(errors.GpadlLimit):
            repeat(lambda i: host.gpadl_create(0, i, page), 2000)


def test_mapping_a_gpadl() -> None:
    with raw_channel(TestDevice()) as guest:
        pages = [BASE_PFN + 300, BASE_PFN + 302]
        guest.host.gpadl_create(0, 7, [GpaRange.of_pages(pages)])
        mapping = guest.channel.map_gpadl(7)
        mapping.write(b"from the host", 4090)
        assert guest.ram.read([BASE_PFN + 300], 4090, 6) == b"from t"
        assert guest.ram.read([BASE_PFN + 302], 0, 7) == b"he host"
        with pytest.raises(errors.UsageError):
            guest.channel.map_gpadl(7)
        guest.channel.unmap_gpadl(7)
        with pytest.raises(errors.UsageError):
            guest.channel.unmap_gpadl(7)
        mapping = guest.channel.map_gpadl(7)
        guest.host.gpadl_teardown(0, 7)
        assert mapping.closed
        with pytest.raises(errors.GpadlUnknown):
            guest.channel.map_gpadl(7)


def test_tearing_down_the_rings_gpadl_closes_the_channel() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        guest.host.gpadl_teardown(0, guest.opening.gpadl_id)
        assert guest.host.channels == {}
        assert device.events[-1] == "closed"


# -- GPADLs mapped read-only ---------------------------------------------------------------------


def test_a_gpadl_mapped_read_only() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.ram.write([BASE_PFN + 300], b"look at me")
        guest.host.gpadl_create(0, 7, [GpaRange.of_pages([BASE_PFN + 300])])
        mapping = guest.channel.map_gpadl(7, read_only=True)
        assert mapping.read(0, 10) == b"look at me"
        assert bytes(mapping.views(5, 2)[0]) == b"at"
        assert mapping.views()[0].readonly
        for write in (
            lambda: mapping.write(b"x"),
            lambda: mapping.fill(),
            lambda: mapping.preadv(0, 0),
            lambda: mapping.views(writable=True),
        ):
            with pytest.raises(errors.ExternalDataReadOnly):
                write()
        assert not mapping.written
        assert guest.ram.read([BASE_PFN + 300], 0, 10) == b"look at me"
        with pytest.raises(errors.UsageError):
            guest.channel.map_gpadl(7)  # one mapping at a time, of whatever kind
        guest.channel.unmap_gpadl(7)
        guest.channel.map_gpadl(7).write(b"changed")
        assert guest.ram.read([BASE_PFN + 300], 0, 7) == b"changed"


def test_a_read_only_mapping_is_not_looked_up_in_the_code_map() -> None:
    """Reading the GPADL of a page that holds translated code asks nobody to discard it."""
    code_fd = os.memfd_create("code", os.MFD_CLOEXEC)
    os.ftruncate(code_fd, 4096)
    calls: list[object] = []
    with raw_channel(TestDevice()) as guest:
        guest.host.invalidate = calls.append
        guest.host.set_code_map(code_fd, 4096, [(BASE, guest.ram.regions[0].size, (1 << 64) - 1)])
        guest.host.gpadl_create(0, 7, [GpaRange.of_pages([BASE_PFN + 300])])
        mapping = guest.channel.map_gpadl(7, read_only=True)
        mapping.read()
        mapping.views()
        guest.send()
        guest.expect()
        assert calls == []
        guest.channel.unmap_gpadl(7)
        guest.channel.map_gpadl(7).views(writable=True)
        guest.send()
        guest.expect()
        assert calls == [[(BASE + 300 * 4096, 4096)]]
    os.close(code_fd)


def test_tearing_down_a_mapped_gpadl_waits_for_who_is_inside() -> None:
    """VmbChannelDeleteGpadl blocks while the server has it mapped and uses it."""
    with raw_channel(TestDevice()) as guest:
        guest.host.gpadl_create(0, 7, [GpaRange.of_pages([BASE_PFN + 300])])
        mapping = guest.channel.map_gpadl(7)
        mapping._enter()  # as a long file transfer is
        thread, outcome = in_thread(lambda: guest.host.gpadl_teardown(0, 7))
        time.sleep(0.05)
        assert thread.is_alive()
        mapping._leave()
        thread.join(10)
        assert outcome == [None]
        with pytest.raises(errors.ExternalDataClosed):
            mapping.read()


# -- memory that goes away -----------------------------------------------------------------------


def test_removing_the_rings_memory_closes_the_channel() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        guest.host.remove_region(BASE, guest.ram.regions[0].size)
        assert device.events[-1] == "closed"
        assert guest.host.memory.regions == ()


def test_removing_memory_takes_it_from_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    packets: list[Packet] = []
    device = TestDevice(lambda _, packet: packets.append(packet))  # type: ignore[arg-type]
    hot = Ram(16, base=BASE + (64 << 20))
    with raw_channel(device) as guest:
        guest.host.add_region(hot.base, hot.size, hot.fd)
        guest.send_direct(b"", [GpaRange.of_pages([hot.base // 4096])], transaction_id=1)
        guest.send_direct(b"", [GpaRange.of_pages([BASE_PFN + 99])], transaction_id=2)
        eventually(lambda: len(packets) == 2)
        monkeypatch.setattr("vhostvmbus.device.host.PATIENCE", 0.1)
        guest.host.remove_region(hot.base, hot.size)
        assert guest.expect()[0].transaction_id == 1  # it was ended for the device
        packets[0].complete()  # and the device's own completion is nothing
        packets[1].complete()
        assert guest.expect()[0].transaction_id == 2
        assert guest.channel.state is ChannelState.RUNNING
        with pytest.raises(errors.RegionUnknown):
            guest.host.remove_region(hot.base, hot.size)
    hot.close()


def test_a_packet_that_goes_with_its_memory_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the quota, also if the guest wants no completion for it."""
    packets: list[Packet] = []
    device = TestDevice(lambda _, packet: packets.append(packet))  # type: ignore[arg-type]
    device.transaction_quota = 1
    hot = Ram(16, base=BASE + (64 << 20))
    with raw_channel(device) as guest:
        guest.host.add_region(hot.base, hot.size, hot.fd)
        ranges = [GpaRange.of_pages([hot.base // 4096])]
        guest.ring.send_gpa_direct(b"", ranges, transaction_id=1, flags=0).check()
        guest.wake()
        guest.send(b"later", transaction_id=2)
        eventually(lambda: guest.channel.stats.quota_reached > 0)
        assert [packet.transaction_id for packet in packets] == [1]
        monkeypatch.setattr("vhostvmbus.device.host.PATIENCE", 0.1)
        guest.host.remove_region(hot.base, hot.size)
        eventually(lambda: len(packets) == 2)
        packets[1].complete()
        assert guest.expect()[0].transaction_id == 2
    hot.close()


def test_truncated_memory_ends_the_channel_not_the_process() -> None:
    with raw_channel(TestDevice()) as guest:
        os.ftruncate(guest.ram.regions[0].fd, 0)
        guest.wake()
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert isinstance(guest.channel.error, errors.RingMemoryLost)


# -- translated code -----------------------------------------------------------------------------


def test_code_is_discarded_before_the_completion_is_seen() -> None:
    def write(_: Channel, packet: Packet) -> None:
        assert packet.external_data is not None
        packet.external_data.fill(0x90, 0, 8192)
        packet.complete()

    code_fd = os.memfd_create("codemap")
    os.ftruncate(code_fd, 4096)
    calls: list[list[tuple[int, int]]] = []
    device = TestDevice(write)  # type: ignore[arg-type]
    with raw_channel(device) as guest:

        def invalidate(ranges: list[tuple[int, int]]) -> None:
            time.sleep(0.05)
            guest.poll()
            assert not guest.received, "the completion was published first"
            calls.append(ranges)

        guest.host.invalidate = invalidate
        guest.host.set_code_map(code_fd, 4096, [(BASE, guest.ram.regions[0].size, 0)])
        pages = [BASE_PFN + 100, BASE_PFN + 102, BASE_PFN + 103]
        guest.send_direct(b"", [GpaRange.of_pages(pages)], transaction_id=1)
        guest.expect()
        assert calls == []  # no bit is set
        os.pwrite(code_fd, bytes([1 << 102 % 8 | 1 << 103 % 8]), 102 // 8)
        guest.send_direct(b"", [GpaRange.of_pages(pages)], transaction_id=2)
        eventually(lambda: calls)
        guest.expect()
        # page 103 is code as well, but was not written
        assert calls == [[(BASE + 102 * 4096, 4096)]]
        assert guest.channel.stats.code_invalidations == 1
    os.close(code_fd)


def test_every_range_goes_to_the_server_at_once() -> None:
    """How many go into one message is the back channel's business."""
    host = DeviceHost(TestDevice())
    calls: list[int] = []
    host.invalidate = lambda ranges: calls.append(len(ranges))
    code_fd = os.memfd_create("codemap")
    os.write(code_fd, b"\x55" * 128)
    host.set_code_map(code_fd, 128, [(0, 1024 * 4096, 0)])
    assert host.memory.written.report([(0, 1024 * 4096)]) == 512
    assert calls == [512]
    os.close(code_fd)


def test_nothing_is_published_if_the_front_end_cannot_be_told() -> None:
    code_fd = os.memfd_create("codemap")
    os.ftruncate(code_fd, 4096)

    def write(_: Channel, packet: Packet) -> None:
        assert packet.external_data is not None
        packet.external_data.fill(1)
        packet.complete()

    def broken(_: object) -> None:
        raise ConnectionError("the front end has gone")

    with raw_channel(TestDevice(write)) as guest:  # type: ignore[arg-type]
        guest.host.set_code_map(code_fd, 4096, [(BASE, guest.ram.regions[0].size, (1 << 64) - 1)])
        guest.host.invalidate = broken
        guest.send_direct(b"", [GpaRange.of_pages([BASE_PFN + 100])])
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert isinstance(guest.channel.error, errors.CodeInvalidationFailed)
        guest.expect_nothing()
    os.close(code_fd)


def test_writes_through_a_mapped_gpadl_are_looked_up_too() -> None:
    code_fd = os.memfd_create("codemap")
    os.ftruncate(code_fd, 4096)
    calls: list[list[tuple[int, int]]] = []
    with raw_channel(TestDevice()) as guest:
        guest.host.invalidate = calls.append
        guest.host.set_code_map(code_fd, 4096, [(BASE, guest.ram.regions[0].size, (1 << 64) - 1)])
        guest.host.gpadl_create(0, 7, [GpaRange.of_pages([BASE_PFN + 300])])
        guest.channel.map_gpadl(7).write(b"code")
        guest.channel.send(b"look there")
        assert calls == [[(BASE + 300 * 4096, 4096)]]
        guest.channel.send(b"again")
        assert len(calls) == 1
    os.close(code_fd)
