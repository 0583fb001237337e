# SPDX-License-Identifier: GPL-2.0-or-later
"""The parsers' fuzzing corpus, replayed; and that the targets would notice (docs/fuzzing.md)."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import parsers
from tests.support.paths import FUZZ
from tests.support.soak import examples
from tests.support.vnet import Offload
from vhostvmbus.devices.scsi import session, storvsp
from vhostvmbus.vhost_user import codec
from vhostvmbus.wire.gpa import GpaRange

CORPUS = FUZZ / "corpus" / "parsers"
SEEDS = parsers.seeds()


def test_every_target_has_a_corpus() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(parsers.TARGETS) == set(SEEDS)
    for target, found in SEEDS.items():
        for name, data in found.items():
            assert (CORPUS / target / name).read_bytes() == data


@pytest.mark.parametrize("target", parsers.TARGETS)
def test_replay(target: str) -> None:
    paths = sorted((CORPUS / target).iterdir())
    assert paths
    for path in paths:
        parsers.TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", parsers.TARGETS)
def test_any_bytes(target: str) -> None:
    @settings(max_examples=examples(150), deadline=None)
    @given(st.binary(max_size=400))
    def throw(data: bytes) -> None:
        parsers.TARGETS[target](data)

    throw()


@pytest.mark.parametrize("target", parsers.TARGETS)
def test_seeds_with_a_byte_changed(target: str) -> None:
    @settings(max_examples=examples(150), deadline=None)
    @given(st.sampled_from(sorted(SEEDS[target].values())), st.data())
    def throw(seed: bytes, data: st.DataObject) -> None:
        changed = bytearray(seed)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        parsers.TARGETS[target](bytes(changed))

    throw()


# ---- the targets can fail ---------------------------------------------------------------


def replay_all(target: str) -> None:
    for data in SEEDS[target].values():
        parsers.TARGETS[target](data)


def test_a_parser_that_raises_what_it_should_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise IndexError("an index nobody checked")

    monkeypatch.setattr(session.storvsp, "decode_srb", broken)
    with pytest.raises(IndexError):
        replay_all("storage_session")


def test_ranges_that_are_not_what_the_bytes_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers, "parse_ranges", lambda *_, **__: [GpaRange(4096, 0, [6])] * 1)
    with pytest.raises(AssertionError):
        replay_all("gpa_ranges")


def test_a_decoder_that_depends_on_how_the_stream_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = codec.Decoder.feed

    def forgetful(self: codec.Decoder, data: bytes, fds: object = ()) -> None:
        real(self, data[:-1] if len(data) == 5 else data, fds)  # type: ignore[arg-type]

    monkeypatch.setattr(codec.Decoder, "feed", forgetful)
    with pytest.raises(AssertionError):
        replay_all("frames")


def test_a_session_that_loses_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers.BackEndSession, "release_fds", lambda _: [])
    data = bytes([0, 1, 2, 0, 1])  # a byte of a header, with two descriptors
    with pytest.raises(AssertionError):
        parsers.TARGETS["back_end_session"](data)


def test_seeds_reach_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of the storage seeds are carried out, not only refused."""
    outcomes: list[int] = []
    real = storvsp.Srb.answer

    def noting(self: storvsp.Srb, **arguments: object) -> bytes:
        outcomes.append(int(arguments.get("scsi_status", 99)))  # type: ignore[call-overload]
        return real(self, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(storvsp.Srb, "answer", noting)
    replay_all("storage_session")
    assert outcomes.count(0) >= 12


def test_network_seeds_reach_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are sent with each offload, and tables set that have more channels than the first."""
    sent: list[tuple[bool, int]] = []
    channels: set[int] = set()
    real, configure = parsers._inside, parsers.DataPath.configure

    def noting(offload: Offload, length: int) -> None:
        sent.append((offload.needs_checksum, offload.gso))
        real(offload, length)

    def configuring(self: parsers.DataPath, adapter: parsers.Adapter, **settings: bool) -> None:
        channels.update(adapter.scaling.current.table if adapter.scaling.current.enabled else ())
        configure(self, adapter, **settings)

    monkeypatch.setattr(parsers, "_inside", noting)
    monkeypatch.setattr(parsers.DataPath, "configure", configuring)
    replay_all("network_session")
    assert {(False, 0), (True, 0), (True, 1), (True, 4)} <= set(sent)
    assert len(channels) > 1


def test_a_card_that_believes_an_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum begins where it may not: the target notices what the link would be asked."""
    real = Offload.unpack

    def believing(header: bytes) -> Offload:
        found = real(header)
        return replace(found, start=0xFFFF) if found.needs_checksum else found

    monkeypatch.setattr(Offload, "unpack", believing)
    with pytest.raises(AssertionError):
        replay_all("network_session")


def test_a_mistake_that_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise struct.error("read beyond the end")

    monkeypatch.setattr(parsers.DataPath, "send", broken)
    with pytest.raises(struct.error):
        replay_all("network_session")
