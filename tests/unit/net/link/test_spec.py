# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user may write for a link, and what is said to what cannot be understood."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.devices.net.link.opening import open_link
from vhostvmbus.devices.net.link.spec import Forward, LinkSpec, SpecError, parse


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("user", LinkSpec("user")),
        ("none", LinkSpec("none")),
        ("tap", LinkSpec("tap")),
        ("tap:tap0", LinkSpec("tap", "tap0")),
        ("tap:tap0,queues=2,mtu=9000", LinkSpec("tap", "tap0", queues=2, mtu=9000)),
        ("bridge:br0", LinkSpec("tap", bridge="br0")),
        ("tap,bridge=br0,mtu=1400", LinkSpec("tap", bridge="br0", mtu=1400)),
        (
            "tap,ip=10.0.0.1/24,ip=fd00::1/64",
            LinkSpec("tap", addresses=("10.0.0.1/24", "fd00::1/64")),
        ),
        (
            "netns:blue,ip=10.0.0.1/24,queues=4",
            LinkSpec("netns", "blue", addresses=("10.0.0.1/24",), queues=4),
        ),
        (
            "user,hostfwd=tcp:2222:22,hostfwd=udp:192.0.2.1:53:5353,hostfwd=tcp:[::1]:80:80",
            LinkSpec(
                "user",
                forwards=(
                    Forward("tcp", "127.0.0.1", 2222, 22),
                    Forward("udp", "192.0.2.1", 53, 5353),
                    Forward("tcp", "::1", 80, 80),
                ),
            ),
        ),
        (
            "none,mac=52:54:00:AB:cd:ef,pcap=/tmp/a b=c.pcap",
            LinkSpec("none", mac=bytes.fromhex("525400abcdef"), pcap="/tmp/a b=c.pcap"),
        ),
    ],
)
def test_good(text: str, meaning: LinkSpec) -> None:
    assert parse(text) == meaning


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there are user, tap"),
        ("slirp", "network slirp: there are user, tap, tap:NAME"),
        ("user:x", "network user:x"),
        ("bridge", "which one"),
        ("netns", "which one"),
        ("tap:", "not a name"),
        ("tap:a/b", "not a name"),
        ("tap:a%d", "not a name"),
        ("tap:0123456789abcdef", "not a name"),
        ("tap:..", "not a name"),
        ("netns:..", "not a name"),
        ("netns:a/b", "not a name that a namespace"),
        ("tap,bridge=a b", "not a name"),
        ("user,", "no option (empty)"),
        ("user,queues=2", "user has no option queues; it has hostfwd, mac, mtu, pcap"),
        ("tap:tap0,ip=10.0.0.1/24", "no option ip"),
        ("none,mtu=1500", "no option mtu"),
        ("tap,mtu", "mtu needs a value"),
        ("tap,mtu=", "mtu needs a value"),
        ("tap,mtu=9000,mtu=1500", "twice"),
        ("tap,mtu=575", "576 to 65520"),
        ("tap,mtu=65521", "576 to 65520"),
        ("tap,mtu=-1", "576 to 65520"),
        ("tap,mtu=" + "9" * 5000, "576 to 65520"),
        ("tap,mtu=\u0661\u0662\u0660\u0660", "576 to 65520"),
        ("tap,queues=0", "1 to 64"),
        ("tap,ip=10.0.0.1", "10.0.0.1/24 or"),
        ("tap,ip=10.0.0.256/24", "10.0.0.1/24 or"),
        ("tap,ip=10.0.0.1/33", "10.0.0.1/24 or"),
        ("tap,bridge=br0,ip=10.0.0.1/24", "belongs to the bridge"),
        ("user,mac=52:54:00:12:34", "like 52:54"),
        ("user,mac=53:54:00:12:34:56", "one station"),
        ("user,mac=00:00:00:00:00:00", "one station"),
        ("user,hostfwd=2222:22", "like tcp:2222:22"),
        ("user,hostfwd=tcp:2222", "like tcp:2222:22"),
        ("user,hostfwd=sctp:2222:22", "like tcp:2222:22"),
        ("user,hostfwd=tcp:0:22", "host port 0"),
        ("user,hostfwd=tcp:22:65536", "guest port 65536"),
        ("user,hostfwd=tcp:1.2.3:22:22", "no address"),
    ],
)
def test_bad(text: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert words in str(caught.value)


WORDS = [
    *("user", "tap", "tap:", "netns:", "bridge:", "none", "ip", "mtu", "mac", "hostfwd", "pcap"),
    *(",", "=", ":", "/", "[", "]", "a", "1", "tcp:", "fe80::1%eth0/64", "bridge", "queues"),
]


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(WORDS),
        max_size=12,
    ).map("".join)
)
def test_anything_is_understood_or_refused(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert parse(text).kind in ("user", "tap", "netns", "none")


def test_a_link_to_nowhere() -> None:
    link = open_link("none,mac=52:54:00:12:34:56")
    assert link.mac == bytes.fromhex("525400123456")
    link.start(lambda: None)
    assert not link.carrier()
    assert link.port(0).receive() is None
    assert not link.port(0).send(bytes(60))
    link.close()
    link.close()
