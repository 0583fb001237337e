# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that an administrator can set on a card with ethtool, under traffic both ways."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.net_rig import HOST4, HOST6, QUEUES, Rig
from tests.support.network import wait_for

FEATURES = (
    "rx",
    "tx-checksum-ipv4",
    "tx-checksum-ipv6",
    "tx-scatter-gather",
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "generic-segmentation-offload",
    "generic-receive-offload",
    "large-receive-offload",
    "receive-hashing",
)


@pytest.fixture(autouse=True)
def nothing_wrong(rig: Rig) -> Iterator[None]:
    with rig.nothing_wrong():
        yield


def table(rig: Rig) -> list[int]:
    """The guest's indirection table."""
    entries = re.findall(r"^\s+\d+:((?:\s+\d+)+)$", rig.guest("ethtool -x eth0"), re.M)
    return [int(word) for line in entries for word in line.split()]


def received(rig: Rig, what: str) -> list[int]:
    """Of each queue of the guest, `what`: "packets" or "bytes"."""
    text = rig.guest("ethtool -S eth0")
    found = re.findall(rf"rx_queue_(\d+)_{what}: (\d+)", text)
    return [int(count) for _, count in sorted(found, key=lambda pair: int(pair[0]))]


def test_features_on_and_off(rig: Rig) -> None:
    """Each off and on again, from both states of all the others."""
    before = rig.guest("ethtool -k eth0")
    switch = "".join(
        f"ethtool -K eth0 {feature} off; ethtool -k eth0 | grep -q '^[[:space:]]*{name}: off' "
        f"&& flows 65536 && ethtool -K eth0 {feature} on && flows 65536 || exit 1;"
        for feature in FEATURES
        for name in ["rx-checksumming" if feature == "rx" else feature]
    )
    with rig.traffic():
        rig.guest(switch, 240)
        for state in ("off", "on"):
            rig.guest("".join(f"ethtool -K eth0 {name} {state};" for name in FEATURES))
            rig.guest("flows 524288")
    assert rig.guest("ethtool -k eth0") == before


def test_channels(rig: Rig) -> None:
    with rig.traffic("-b 5M --parallel 4"):
        for count in (1, 2, 3, QUEUES, 1, QUEUES):
            rig.guest(f"ethtool -L eth0 combined {count}; flows 262144")
            wait_for(lambda count=count: rig.card()["channels"] == count, "channels")
            assert set(table(rig)) == set(range(count))
    assert rig.card()["large_sends"] > 0


def test_where_received_packets_go(rig: Rig) -> None:
    with rig.traffic("-b 5M --parallel 4"):
        for words, queues in (
            ("equal 2", {0, 1}),
            ("weight 0 0 1 0", {2}),
            ("weight 1 0 0 3", {0, 3}),
            (f"equal {QUEUES}", set(range(QUEUES))),
        ):
            rig.guest(f"ethtool -X eth0 {words}")
            assert set(table(rig)) == queues
            rig.guest("flows 524288")  # what was under way
            before = received(rig, "bytes")
            rig.guest("flows 262144")
            now = received(rig, "bytes")
            grew = {queue for queue in range(QUEUES) if now[queue] - before[queue] > 20000}
            assert grew
            assert grew <= queues
            if len(queues) == 1:
                assert grew == queues


def test_buffers(rig: Rig) -> None:
    """As few sections as Linux takes, as many as a known suite for guests of Hyper-V wants, and as
    many as Linux takes; then as it was."""

    def sizes() -> list[tuple[str, int]]:
        found = re.findall(r"^(RX|TX):\s+(\d+)$", rig.guest("ethtool -g eth0"), re.M)
        return [(name, int(count)) for name, count in found]

    (_, most_rx), (_, most_tx), (_, rx), (_, tx) = sizes()
    with rig.traffic():
        for words in ("rx 1 tx 1", "rx 2427 tx 50", f"rx {most_rx} tx {most_tx}"):
            rig.guest(f"ethtool -G eth0 {words}; flows 65536", 240)
            print(words, sizes())
    rig.guest(f"ethtool -G eth0 rx {rx} tx {tx}")
    assert sizes() == [("RX", most_rx), ("TX", most_tx), ("RX", rx), ("TX", tx)]
    rig.ping(1472)


def datagrams(rig: Rig, words: str) -> tuple[int, int]:
    """How many iperf3 sent, and how many of them, it says, were lost on their way."""
    with rig.iperf_server():
        text = rig.guest(f"iperf3 --client {HOST4} --json --udp -l 1400 {words}", 60)
    end = json.loads(text)["end"]["sum"]
    return end["packets"], end["lost_packets"]


def test_datagrams_that_do_not_arrive(rig: Rig) -> None:
    """More than the guest can take: each is in somebody's counter."""

    def counters() -> dict[str, int]:
        tap = json.loads(rig.host("ip", "-j", "-s", "link", "show", rig.tap))[0]["stats64"]
        return {
            "dropped before the card": tap["tx"]["dropped"],
            "dropped by the card": rig.card()["receive_no_buffer"],
            "received": sum(received(rig, "packets")),
            "dropped behind the card": rig.counter("Udp.RcvbufErrors"),
        }

    before = counters()
    sent, lost = datagrams(rig, "--reverse --bitrate 0 --time 2")
    after = counters()
    grew = {name: after[name] - before[name] for name in before}
    print(sent, lost, grew)
    assert lost > 0
    behind = grew.pop("dropped behind the card")
    assert abs(sum(grew.values()) - sent) < sent // 50
    # iperf3 does not know of what was lost at the end.
    assert lost <= sent - grew["received"] + behind + sent // 50


def test_datagrams_that_do_not_leave(rig: Rig) -> None:
    """The host's interface is down, and the guest does not know it yet."""
    for _ in range(5):  # Linux may see it at once, too
        sent, lost, refused = while_the_link_flaps(rig)
        print(sent, lost, refused)
        assert lost >= refused - 20
        if refused > 20:
            break
    assert refused > 20
    rig.ping()


def while_the_link_flaps(rig: Rig) -> tuple[int, int, int]:
    """Datagrams sent, and lost, and frames that the card could not send."""
    changes = "cat /sys/class/net/eth0/carrier_changes"
    target = int(rig.guest(changes)) + 2
    flap(rig, 0)
    # From here on Linux does not look at the carrier for two seconds.
    rig.guest(f"for i in $(seq 100); do [ $({changes}) -ge {target} ] && exit; sleep 0.1; done")
    before = rig.card()

    def later() -> None:
        wait_for(lambda: rig.card()["sent"]["frames"] > before["sent"]["frames"] + 100, "traffic")
        flap(rig, 0.8)

    thread = threading.Thread(target=later)
    thread.start()
    sent, lost = datagrams(rig, "--bitrate 5M --time 3")
    thread.join()
    after = rig.card()
    return sent, lost, after["send_refused"] - before["send_refused"]


def flap(rig: Rig, seconds: float) -> None:
    """The host takes its interface down and up, and gives it the address back that it lost."""
    rig.host("ip", "link", "set", rig.tap, "down")
    time.sleep(seconds)
    rig.host("ip", "link", "set", rig.tap, "up")
    rig.host("ip", "addr", "replace", f"{HOST6}/64", "dev", rig.tap, "nodad")
