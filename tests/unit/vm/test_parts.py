# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of a virtual machine that need none: archives, ports, command lines, keys, copies."""

import io
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.paths import TREE
from vhostvmbus.vm import accel, images
from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.errors import GuestFailure, SetupError
from vhostvmbus.vm.initramfs import closure, module_name
from vhostvmbus.vm.machine import MachinePlan
from vhostvmbus.vm.nested import Inner, megabytes, script
from vhostvmbus.vm.ports import Console, Control
from vhostvmbus.vm.process import RunFolder, left_over
from vhostvmbus.vm.qemu_args import PORTS, Hardware, command_line
from vhostvmbus.vm.terminal import Keyboard


def parse_cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each entry, by a reading of the format's definition."""
    found, at = {}, 0
    while True:
        header = data[at : at + 110]
        assert header[:6] == b"070701"
        numbers = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name[-1:] == b"\0"
        at += 110 + name_size + -(110 + name_size) % 4
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = (mode, data[at : at + size])
        at += size + -size % 4


def test_an_archive_has_what_was_put_in(tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").write_bytes(b"deep")
    (tmp_path / "tree" / "link").symlink_to("deep/file")
    archive = CpioArchive()
    archive.add_file("/a/b/c", b"hello", 0o755)
    archive.add_link("/a/l", "b/c")
    archive.add_tree("/t", tmp_path / "tree")
    archive.add_device("/dev/console", 0o600, 5, 1)
    data = archive.finish()
    assert len(data) % 4 == 0
    found = parse_cpio(data)
    assert found["a/b/c"] == (0o100755, b"hello")
    assert found["a/l"] == (0o120777, b"b/c")
    assert found["t/deep/file"][1] == b"deep"
    assert found["t/link"] == (0o120777, b"deep/file")
    assert found["dev/console"][0] == 0o020600
    names = list(found)
    for name in names:  # a folder comes before what is in it
        parent = name.rpartition("/")[0]
        assert not parent or names.index(parent) < names.index(name)


def test_an_archive_refuses_a_second_file_of_the_same_name() -> None:
    archive = CpioArchive()
    archive.add_file("/x", b"1")
    with pytest.raises(ValueError, match="x is in the archive already"):
        archive.add_file("x", b"2")


def test_the_closure_of_modules() -> None:
    text = "k/a.ko: k/b.ko.xz k/c-d.ko\nk/b.ko.xz: k/c-d.ko\nk/c-d.ko:\nk/e.ko:\n"
    assert closure(text, ["a"]) == ["k/a.ko", "k/b.ko.xz", "k/c-d.ko"]
    assert closure(text, ["c_d", "no-such", "e"]) == ["k/c-d.ko", "k/e.ko"]
    assert module_name("kernel/x/hid-hyperv.ko.zst") == "hid_hyperv"


@pytest.mark.parametrize(
    ("line", "panic"),
    [
        (b"[    1.5] Kernel panic - not syncing: VFS\r\n", "Kernel panic - not syncing: VFS"),
        (b"[    1.5][  T12] Kernel panic - not syncing: x\n", "Kernel panic - not syncing: x"),
        (b"\x1b[0m[   99.000001] Kernel panic - not syncing: y\n", "Kernel panic - not syncing: y"),
        (b"vhostvmbus: fatal: no root\r\n", "vhostvmbus: fatal: no root"),
        (b"# echo Kernel panic - not syncing: typed\r\n", None),
        (b"[    1.5] something else\n", None),
    ],
)
def test_a_panic_is_seen_however_it_is_cut(line: bytes, panic: str | None) -> None:
    for size in (1, 7, len(line)):
        console = Console()
        for at in range(0, len(line), size):
            console.feed(line[at : at + size])
        assert console.panic == panic


def test_the_console_keeps_its_last_lines_and_its_prompt() -> None:
    seen = bytearray()
    console = Console(sinks=[seen.extend])
    data = b"".join(b"line %d\r\n" % n for n in range(1000)) + b"root# "
    console.feed(data)
    assert seen == data
    assert console.last_lines(3) == ["line 998", "line 999", "root#"]
    assert console.pending == b"root# "


def test_replies_are_understood_and_noise_is_not() -> None:
    control = Control()
    for byte in b"ready\r\nexit 1 0\nexit x 1\nexit 2\ngarbage\nexit 3 130\r\nexit 4 -1\nready\n":
        control.feed(bytes((byte,)))
    assert control.ready == 2
    assert control.exits == {1: 0, 3: 130}
    assert Control.run_request(7, b"a\nb") == b"run 7 3\na\nb"


def hardware(**keywords: object) -> Hardware:
    fields: dict[str, object] = {
        "qemu": Path("/q"),
        "firmware": [Path("/f")],
        "accel": "tcg",
        "kernel": Path("/k"),
        "initramfs": Path("/i"),
        "append": "a b",
        "port_fds": {name: 10 + n for n, (name, _, _) in enumerate(PORTS)},
        "qmp_fd": 9,
    }
    return Hardware(**(fields | keywords))  # type: ignore[arg-type]


def test_the_command_line_has_shared_memory_and_the_bus() -> None:
    words = command_line(hardware(sockets=[Path("/a,b.sock")], memory="192M"))
    assert "memory-backend-memfd,id=ram,size=192M,share=on" in words
    assert "pc,memory-backend=ram" in words
    assert "vmbus-bridge" in words
    assert "socket,id=vmbus0,path=/a,,b.sock,reconnect-ms=250" in words
    assert "vhost-user-vmbus,chardev=vmbus0" in words
    assert words[words.index("-append") + 1] == "a b"
    (cpu,) = [word for word in words if "hv-vpindex" in word]
    assert cpu.startswith("qemu64,")


def test_kvm_hides_itself_behind_hyper_v() -> None:
    (cpu,) = [word for word in command_line(hardware(accel="kvm")) if "hv-synic" in word]
    assert cpu.startswith("host,kvm=off,")


def test_no_two_ports_share_an_interrupt_or_take_the_bridges() -> None:
    interrupts = [irq for _, _, irq in PORTS]
    assert len(set(interrupts)) == len(interrupts)
    assert 7 not in interrupts


def test_a_machine_without_the_bus_has_none() -> None:
    words = command_line(hardware(vmbus=False, virtio_disks=["/d,1"]))
    assert "vmbus-bridge" not in words
    assert "if=none,id=disk0,file=/d,,1,format=raw" in words


@pytest.mark.parametrize(
    ("pieces", "passed", "leave"),
    [
        ([b"abc\x03"], b"abc\x03", False),
        ([b"\x01x"], b"", True),
        ([b"a\x01", b"Xb"], b"a", True),
        ([b"\x01\x01b"], b"\x01b", False),
        ([b"\x01c", b"d"], b"d", False),
    ],
)
def test_the_way_out_among_the_keys(pieces: list[bytes], passed: bytes, leave: bool) -> None:
    keyboard = Keyboard()
    got, left = b"", False
    for piece in pieces:
        keys, out = keyboard.keys(piece)
        got, left = got + keys, left or out
    assert (got, left) == (passed, leave)


def test_a_copy_keeps_bytes_and_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with open(source, "wb") as file:
        file.truncate(64 << 20)
        for at in (0, 5 << 20, (64 << 20) - 5):
            file.seek(at)
            file.write(b"data!")
    images.copy_sparse(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert os.stat(target).st_blocks * 512 < 1 << 20
    with pytest.raises(FileExistsError):
        images.copy_sparse(source, target)


@pytest.fixture
def short_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of the test's own. Runs of caches with too long a path for sockets share a folder."""
    with tempfile.TemporaryDirectory(prefix="cache-") as folder:
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        yield


@pytest.mark.usefixtures("short_cache")
def test_folders_of_dead_runs_go_and_those_of_live_ones_stay() -> None:
    first = RunFolder()
    dead = first.path.parent / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "root.img").touch()
    assert left_over(first.path.parent) == [dead]
    second = RunFolder()
    assert not dead.exists()
    assert first.path.exists()
    first.close()
    second.close()
    second.close()
    assert [path.name for path in first.path.parent.iterdir()] == [".lock"]


def test_memory_sizes() -> None:
    assert [megabytes(text) for text in ("512", "192M", "2g", "1T")] == [512, 192, 2048, 1 << 20]
    with pytest.raises(SetupError, match="write it like"):
        megabytes("lots")


def test_the_inner_machine_gets_the_command_whatever_it_is() -> None:
    plan = MachinePlan(
        Path("/q"), Path("/k"), Path("/i"), root=Path("/r"), disks=["a.raw", "b.raw,ro"]
    )
    command = "echo \"$x\" 'it''s' $(date) \\n; false"
    text = script(plan, Inner(command, 60.0, [], TREE / "vhostvmbus"))
    last = text.splitlines()[-1].replace("python3 -m vhostvmbus vm", "printf '%s\\n'")
    words = subprocess.run(["sh", "-c", last], capture_output=True, text=True).stdout
    assert command in words
    assert "--root\n/dev/vda\n--disk\n/dev/vdb\n--disk\n/dev/vdc,ro" in words


def test_kvm_that_is_not_there_is_a_reason(tmp_path: Path) -> None:
    assert accel.kvm_problem(str(tmp_path / "kvm")) == f"there is no {tmp_path / 'kvm'}"
    (tmp_path / "kvm").touch()
    assert "KVM does not work" in (accel.kvm_problem(str(tmp_path / "kvm")) or "")
    assert accel.choose("tcg").name == "tcg"


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (lambda: images.qemu_binary("/no/qemu"), "no such program"),
        (lambda: images.find_kernel("7.0"), "neither one of 5.10, 6.1, 6.12"),
        (lambda: images.find_kernel("/etc/passwd", "/etc"), "no modules.dep"),
        (lambda: images.recipe("no/recipe"), "outside the project's tree"),
    ],
)
def test_what_is_missing_is_named(find: Callable[[], object], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        find()


def test_a_failure_shows_the_console() -> None:
    text = str(GuestFailure("it died", ["one", "two"]))
    assert text.splitlines()[0] == "it died"
    assert text.endswith("  | one\n  | two")
    assert io.StringIO(str(GuestFailure("x"))).read() == "x"
