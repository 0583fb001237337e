# SPDX-License-Identifier: GPL-2.0-or-later
"""Downloads that fail: those that the network failed are tried again, the others are not."""

import os
import socket
import socketserver
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from buildlib.apt import PrivateApt
from buildlib.progress import BuildError, Step

from tests.support.paths import TREE

NO_NAME = "Err:1 http://mirror.invalid bookworm InRelease\\n  Temporary failure resolving 'mirror'"
UNKNOWN = "E: Unable to locate package no-such-package"
UNSIGNED = "E: The repository 'http://mirror.invalid bookworm InRelease' is not signed."
MISSING = "E: Failed to fetch http://mirror.invalid/a.deb  404  Not Found [IP: 192.0.2.1 80]"
NO_PIP = (
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProtocolError('Connection "
    "aborted.', ConnectionResetError(104, 'Connection reset by peer'))': /simple/x/\\n"
    "ERROR: No matching distribution found for x"
)
PASSING_WORDS = pytest.mark.parametrize("words", [NO_NAME, NO_PIP], ids=["apt", "pip"])
FINAL_WORDS = pytest.mark.parametrize(
    "words", [UNKNOWN, UNSIGNED, MISSING], ids=["unknown", "unsigned", "missing"]
)


class Programs:
    """A folder of programs that fail a number of times, with given words, before they succeed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def add(self, name: str, failures: int, words: str = "", then: str = "") -> Path:
        """The script says each time that it ran, in a file beside it."""
        path = self.folder / name
        path.write_text(
            f'#!/bin/sh\necho "$LC_ALL $*" >>{path}.ran\ncat >>{path}.read\n'
            f"if [ $(wc -l <{path}.ran) -le {failures} ]; then\n"
            f'    printf "%b\\n" "{words}"; exit 100\nfi\n{then}\n'
        )
        path.chmod(0o755)
        return path

    def ran(self, name: str) -> list[str]:
        """The words of each time."""
        return (self.folder / f"{name}.ran").read_text().splitlines()


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path / "programs")


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RETRY_DELAYS", "0 0 0")


def test_the_texts_are_such_as_both_readers_understand() -> None:
    """``grep -F`` would take an empty line for a text that is everywhere."""
    lines = (TREE / "tools" / "buildlib" / "passing.txt").read_text().splitlines()
    assert lines
    assert all(line == line.strip().lower() != "" for line in lines)


@PASSING_WORDS
@pytest.mark.parametrize("name", ["apt-get", "mmdebstrap"])
def test_a_step_tries_again_what_the_network_failed(
    words: str, name: str, programs: Programs, capfd: pytest.CaptureFixture[str]
) -> None:
    program = programs.add(name, 2, words)
    with Step("try", "trying", 1) as step:
        step.run([program, "a", "b"], stdin=b"lines\n")
    assert programs.ran(name) == ["C.UTF-8 a b"] * 3
    assert Path(f"{program}.read").read_text() == "lines\n" * 3
    said = capfd.readouterr().err
    assert "trying: try 1 of 4 failed, the next in 0 s: " in said
    assert "trying: try 2 of 4 failed" in said
    assert "try 3" not in said


@FINAL_WORDS
def test_a_step_does_not_repeat_what_is_final(words: str, programs: Programs) -> None:
    program = programs.add("apt-get", 1, words)
    with pytest.raises(BuildError, match=r"status 100$"), Step("try", "t", 1) as step:
        step.run([program])
    assert len(programs.ran("apt-get")) == 1


def test_a_step_repeats_nothing_but_downloads(programs: Programs) -> None:
    """A compiler's report may well quote a line about the network."""
    program = programs.add("cc", 1, NO_NAME)
    with pytest.raises(BuildError, match=r"status 100$"), Step("try", "t", 1) as step:
        step.run([program])
    assert len(programs.ran("cc")) == 1


def test_a_reason_of_an_earlier_command_does_not_count(programs: Programs) -> None:
    first, second = programs.add("apt-get", 1, NO_NAME), programs.add("mmdebstrap", 9, UNKNOWN)
    with Step("try", "t", 1) as step:
        step.run([first])
        with pytest.raises(BuildError, match=r"status 100$"):
            step.run([second])
    assert len(programs.ran("mmdebstrap")) == 1


def test_a_step_says_in_the_end_what_was_tried(programs: Programs) -> None:
    program = programs.add("apt-get", 99, NO_NAME)
    with pytest.raises(BuildError) as caught, Step("try", "trying", 1) as step:
        step.run([program])
    assert len(programs.ran("apt-get")) == 4
    text = str(caught.value)
    assert "failed in 4 of 4 tries; the last time: Temporary failure resolving 'mirror'" in text
    assert "name resolution" in text
    assert "RETRY_DELAYS" in text


def test_no_delays_mean_one_try(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRY_DELAYS", "")
    program = programs.add("apt-get", 1, NO_NAME)
    with pytest.raises(BuildError, match="failed in 1 of 1 tries"), Step("try", "t", 1) as step:
        step.run([program])
    monkeypatch.setenv("RETRY_DELAYS", "soon")
    with pytest.raises(BuildError, match="RETRY_DELAYS='soon'"), Step("try", "t", 1) as step:
        step.run([program])


class Mirror(socketserver.ThreadingTCPServer):
    """A web server on loopback that has nothing (404), or resets every connection."""

    daemon_threads = True

    def __init__(self, resets: bool) -> None:
        self.resets = resets
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/debian"


class Answer(socketserver.BaseRequestHandler):
    """What comes back from a :class:`Mirror`."""

    server: Mirror

    def handle(self) -> None:
        self.request.recv(65536)
        if self.server.resets:
            at_once = struct.pack("ii", 1, 0)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.request.close()
        else:
            self.request.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def mirror(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Mirror]:
    """Reached without a proxy, and without further tries of apt's and pip's own."""
    config = tmp_path / "apt.conf"
    config.write_text('Acquire::http::Proxy::127.0.0.1 "DIRECT";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("RETRY_DELAYS", "0")
    with Mirror(request.param) as server:
        monkeypatch.setenv("DEBIAN_MIRROR", server.url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


MIRRORS = pytest.mark.parametrize(
    ("mirror", "end"),
    [(True, "failed in 2 of 2 tries"), (False, r"ended with status \d+$")],
    indirect=["mirror"],
    ids=["reset", "not found"],
)


@MIRRORS
@pytest.mark.usefixtures("mirror")
def test_what_the_real_apt_says_is_known(end: str) -> None:
    apt = PrivateApt("try", ("bookworm",))
    config = apt.folder / "apt.conf"
    config.write_text(config.read_text().replace('Retries "3"', 'Retries "0"'))
    with pytest.raises(BuildError, match=end), Step("try", "trying", 1) as step:
        apt.update(step)


@MIRRORS
def test_what_the_real_pip_says_is_known(end: str, mirror: Mirror, tmp_path: Path) -> None:
    words = ["download", "--no-deps", "--index-url", mirror.url, "-d", tmp_path, "no-such"]
    with pytest.raises(BuildError, match=end), Step("try", "trying", 1) as step:
        step.run([sys.executable, "-m", "pip", *words])


Setup = Callable[[], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def setup(tmp_path: Path, programs: Programs) -> Setup:
    """``tools/setup`` on a system without any package, with our apt-get and pip."""
    programs.add("dpkg-query", 0)
    programs.add("id", 0, then="echo 0")
    programs.add("pip", 0)
    programs.add("apt-get", 0)
    python = programs.folder / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'"-m venv "*) mkdir -p "$3/bin"; ln -sf {python} "$3/bin/python" ;;\n'
        f'"-m pip "*) exec {programs.folder}/pip "$@" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)

    def run() -> "subprocess.CompletedProcess[str]":
        env = dict(os.environ, PATH=f"{programs.folder}:{os.environ['PATH']}", PYTHON=str(python))
        env.pop("SKIP_APT", None)
        return subprocess.run(
            [TREE / "tools" / "setup", tmp_path / "venv"], env=env, capture_output=True, text=True
        )

    return run


@PASSING_WORDS
def test_the_setup_tries_again_what_the_network_failed(
    words: str, setup: Setup, programs: Programs, tmp_path: Path
) -> None:
    programs.add("apt-get", 2, words)
    programs.add("pip", 2, words)
    done = setup()
    assert done.returncode == 0, done.stderr
    update, *rest = programs.ran("apt-get")
    assert rest[:2] == [update] * 2
    assert update == "C.UTF-8 update --error-on=any"
    assert len(rest) == 3
    assert "install -y" in rest[2]
    assert len(programs.ran("pip")) == 3
    assert "setup: apt-get update: try 1 of 4 failed, the next in 0 s: " in done.stderr
    assert "setup: pip install: try 2 of 4 failed" in done.stderr
    assert (tmp_path / "venv" / "stamp").exists()


@FINAL_WORDS
def test_the_setup_does_not_repeat_what_is_final(
    words: str, setup: Setup, programs: Programs, tmp_path: Path
) -> None:
    programs.add("apt-get", 99, words)
    done = setup()
    assert done.returncode == 1
    assert len(programs.ran("apt-get")) == 2  # update, and install with the lists that are there
    assert "apt-get install failed" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_setup_says_in_the_end_what_was_tried(setup: Setup, programs: Programs) -> None:
    programs.add("pip", 99, NO_PIP)
    done = setup()
    assert done.returncode == 1
    assert len(programs.ran("pip")) == 4
    assert "pip install failed in 4 of 4 tries; the last time: WARNING: Retrying" in done.stderr
    assert "name resolution" in done.stderr
    assert "RETRY_DELAYS" in done.stderr
