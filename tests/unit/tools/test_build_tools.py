# SPDX-License-Identifier: GPL-2.0-or-later
"""What the build scripts share: the machine's apt read in both of its forms, keys, steps."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from buildlib.apt import PrivateApt, find_mirror, find_security_mirror, parse_sources
from buildlib.cache import content_key, work_folder
from buildlib.progress import BuildError, Step

from tests.support.paths import TREE

ONE_LINE = """\
# deb http://commented.invalid/debian bookworm main
deb-src http://mirror.invalid/debian bookworm main # why not
deb [arch=amd64 signed-by=/keys/a.gpg] http://mirror.invalid/debian bookworm main contrib
deb cdrom:[Debian]/ bookworm main
"""
STANZAS = """\
Types: deb
# a remark
URIs: http://one.invalid/debian
 http://two.invalid/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
Enabled: no
URIs: http://three.invalid/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://four.invalid/tools
Suites: nodistro
Components: main
Trusted: yes
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vhostvmbus"


def test_one_line_sources(tmp_path: Path) -> None:
    path = tmp_path / "x.list"
    path.write_text(ONE_LINE)
    sources = parse_sources(path)
    assert [source.uri for source in sources][:2] == ["http://mirror.invalid/debian"] * 2
    assert sources[1].signed_by == "/keys/a.gpg"
    assert sources[1].components == ("main", "contrib")
    assert find_mirror(sources[1:]).uri == "http://mirror.invalid/debian"


def test_stanzas(tmp_path: Path) -> None:
    path = tmp_path / "x.sources"
    path.write_text(STANZAS)
    sources = parse_sources(path)
    assert [source.uri.split(".")[0] for source in sources] == [
        "http://one",
        "http://two",
        "http://four",
    ]
    assert sources[0].suites == ("bookworm", "bookworm-updates")
    assert "BEGIN PGP" in sources[0].signed_by
    assert sources[2].trusted
    assert find_mirror(sources) == sources[0]
    with pytest.raises(BuildError, match="no mirror of Debian"):
        find_mirror(sources[2:])


def test_a_named_mirror_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBIAN_MIRROR", "http://named.invalid/debian")
    assert find_mirror([]).uri == "http://named.invalid/debian"


SECURITY_STANZA = """

Types: deb
URIs: http://security.invalid/debian-security
Suites: bookworm-security
Components: main
"""


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        (STANZAS + SECURITY_STANZA, "http://security.invalid/debian-security"),
        (STANZAS, "http://one.invalid/debian-security"),
        (
            STANZAS.replace("invalid/debian", "invalid/debian/"),
            "http://one.invalid/debian-security",
        ),
        (
            STANZAS + SECURITY_STANZA.replace("bookworm", "other"),
            "http://one.invalid/debian-security",
        ),
    ],
    ids=["its own", "beside the main one", "with a slash", "not Debian's"],
)
def test_the_mirror_of_the_security_archive(tmp_path: Path, text: str, uri: str) -> None:
    path = tmp_path / "x.sources"
    path.write_text(text)
    assert find_security_mirror(parse_sources(path)).uri == uri


def test_each_suite_has_its_archive(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBIAN_MIRROR", "http://named.invalid/debian/")
    lines = PrivateApt("try", ("bookworm-backports", "bookworm-security")).source_lines
    assert [line.split()[-3:] for line in lines] == [
        ["http://named.invalid/debian/", "bookworm-backports", "main"],
        ["http://named.invalid/debian-security", "bookworm-security", "main"],
    ]
    assert (cache / "apt" / "try" / "sources.list").read_text() == "\n".join(lines) + "\n"


def test_a_key_follows_the_content_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text("same")
    one, two = tmp_path / "one", tmp_path / "two"
    assert content_key([one]) == content_key([two])
    assert content_key(["ab", "c"]) != content_key(["a", "bc"])
    before = content_key([one])
    (one / "deep" / "file").write_text("other")
    assert content_key([one]) != before
    (two / "deep" / "file").rename(two / "deep" / "name")
    assert content_key([two]) != before


def test_half_made_results_go(tmp_path: Path) -> None:
    left = tmp_path / ".work-old"
    left.mkdir()

    def fail() -> None:
        with work_folder(tmp_path) as work:
            assert not left.exists()
            (work / "sub").mkdir(mode=0o500)
            raise BuildError("half-way")

    with pytest.raises(BuildError, match="half-way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_step_names_its_log(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BuildError, match="status 3"), Step("try", "trying", 1) as step:
        step.run(["sh", "-c", "echo because; exit 3"])
    said = capfd.readouterr().err
    assert "trying: FAILED" in said
    assert "| because" in said
    assert str(cache / "logs" / "try.log") in said


def test_a_missing_program_is_named(cache: Path) -> None:
    with pytest.raises(BuildError, match="no-such-program"), Step("try", "trying", 1) as step:
        step.run(["no-such-program"])


def runs(pid: int) -> bool:
    """Whether a process is there and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_an_interrupted_step_leaves_no_process(cache: Path) -> None:
    """The children of its commands go too."""
    script = (
        f"import sys; sys.path.insert(0, {str(TREE / 'tools')!r})\n"
        "from buildlib.progress import Step, main_guard\n"
        "def main():\n"
        "    with Step('try', 'trying', 1) as step:\n"
        "        step.run(['sh', '-c', 'sleep 987654 & echo $! ; wait'])\n"
        "main_guard(main)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    log = cache / "logs" / "try.log"
    while not (log.exists() and len(log.read_text().splitlines()) == 2):
        assert child.poll() is None
    sleeper = int(log.read_text().split()[-1])
    child.terminate()
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130
    assert b"Traceback" not in said
    deadline = time.monotonic() + 10  # killed, but the kernel may be busy elsewhere
    while runs(sleeper) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(sleeper)


def test_no_registry_is_named_in_the_project() -> None:
    """Mirrors come from the machine's own configuration."""
    done = subprocess.run(
        ["git", "grep", "-lE", r"deb\.debian\.org|snapshot\.debian|files\.pythonhosted|pypi\.org",
         "--", ".", ":!tests/unit/tools/test_build_tools.py"],
        cwd=TREE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == ""
