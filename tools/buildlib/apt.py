# SPDX-License-Identifier: GPL-2.0-or-later
"""A private apt: packages of any Debian suite, without touching the user's system.

Lists, caches and state live in the project's cache folder. The mirror and its keyring come
from the machine's own apt configuration (one-line ``.list`` and deb822 ``.sources`` files), and
apt still reads the machine's ``apt.conf`` for proxies and certificates. No mirror is named
here. Works without root. apt verifies signatures and hashes.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .cache import cache_root
from .progress import BuildError, Step

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
RELEASES = ("stable", "testing", "unstable", "sid", "bookworm", "trixie", "forky")
SECURITY = "-security"
"""The end of the names of suites that are in the security archive, and of its own."""

FORWARDED = re.compile(r'^Acquire::(http|https|Check-Valid-Until|Check-Date|Retries)\b[^"]*"[^"]+"')
"""The settings of the machine's apt that a bootstrap of a root file system needs too."""


@dataclass(frozen=True)
class Source:
    """One archive as the machine's apt knows it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str
    trusted: bool


def _apt_config(*names: str) -> dict[str, str]:
    words = ["apt-config", "shell"]
    for index, name in enumerate(names):
        words += [f"V{index}", name]
    try:
        text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise BuildError("apt is not installed; this needs a Debian-like system") from error
    values = dict(re.findall(r"^V(\d+)='(.*)'$", text, re.MULTILINE))
    return {name: values.get(str(index), "") for index, name in enumerate(names)}


def _one_line_sources(text: str) -> Iterator[Source]:
    for raw in text.splitlines():
        line = raw.split("#", 1)[0].strip()
        found = re.match(r"deb(?:-src)?\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s*(.*)$", line)
        if not found:
            continue
        options = dict(option.split("=", 1) for option in (found[1] or "").split() if "=" in option)
        yield Source(
            uri=found[2],
            suites=(found[3],),
            components=tuple(found[4].split()),
            signed_by=options.get("signed-by", ""),
            trusted=options.get("trusted", "") in ("yes", "true", "1"),
        )


def _deb822_sources(text: str) -> Iterator[Source]:
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        for uri in fields.get("uris", "").split():
            yield Source(
                uri=uri,
                suites=tuple(fields.get("suites", "").split()),
                components=tuple(fields.get("components", "").split()),
                signed_by=fields.get("signed-by", ""),
                trusted=fields.get("trusted", "").lower() in ("yes", "true", "1"),
            )


def parse_sources(path: Path) -> list[Source]:
    """Returns the archives named in one sources file, in either of apt's two forms."""
    text = path.read_text(errors="replace")
    return list(_deb822_sources(text) if path.suffix == ".sources" else _one_line_sources(text))


def machine_sources() -> list[Source]:
    """Returns every archive that the machine's apt is set up with."""
    places = _apt_config("Dir::Etc::sourcelist/f", "Dir::Etc::sourceparts/d")
    files = [Path(places["Dir::Etc::sourcelist/f"])]
    parts = Path(places["Dir::Etc::sourceparts/d"])
    if parts.is_dir():
        files += sorted(p for p in parts.iterdir() if p.suffix in (".list", ".sources"))
    return [source for path in files if path.is_file() for source in parse_sources(path)]


def find_mirror(sources: list[Source]) -> Source:
    """Returns the machine's mirror of Debian's main archive. Raises BuildError if it has none."""
    if mirror := os.environ.get("DEBIAN_MIRROR"):
        return Source(mirror, (), ("main",), str(DEBIAN_KEYRING), False)
    for source in sources:
        if source.uri.startswith("cdrom:") or "main" not in source.components:
            continue
        if any(suite in RELEASES for suite in source.suites):
            return source
    raise BuildError(
        "no mirror of Debian in this machine's apt configuration; name one in DEBIAN_MIRROR"
    )


def find_security_mirror(sources: list[Source]) -> Source:
    """Returns the machine's mirror of Debian's security archive.

    If it has none, or if ``DEBIAN_MIRROR`` is set, that is beside the main archive's, where Debian
    has it: ``/debian-security`` beside ``/debian``. Raises BuildError if there is neither.
    """
    if not os.environ.get("DEBIAN_MIRROR"):
        for source in sources:
            names = [name for name in source.suites if name.endswith(SECURITY)]
            if "main" in source.components and any(
                name.removesuffix(SECURITY) in RELEASES for name in names
            ):
                return source
    mirror = find_mirror(sources)
    return replace(mirror, uri=mirror.uri.rstrip("/") + SECURITY)


class PrivateApt:
    """An apt for the given ``suites`` of Debian; ``sources`` adds their source packages."""

    def __init__(self, name: str, suites: tuple[str, ...], *, sources: bool = False) -> None:
        self.folder = cache_root() / "apt" / name
        self.suites = suites
        for part in ("lists/partial", "cache/archives/partial", "state"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        kinds = ("deb", "deb-src") if sources else ("deb",)
        self.source_lines = [
            f"{kind} {archive} {suite} main"
            for suite, archive in zip(suites, self._archives(), strict=True)
            for kind in kinds
        ]
        (self.folder / "sources.list").write_text("\n".join(self.source_lines) + "\n")
        config = self.folder / "apt.conf"
        hooks = ("Update::Pre-Invoke", "Update::Post-Invoke", "Update::Post-Invoke-Success")
        config.write_text(
            "".join(f"#clear APT::{hook};\n" for hook in hooks)
            + "".join(f"#clear DPkg::{hook};\n" for hook in ("Pre-Invoke", "Post-Invoke"))
            + f'Dir::State "{self.folder}/state";\n'
            f'Dir::State::lists "{self.folder}/lists";\n'
            f'Dir::State::status "{self.folder}/status";\n'
            f'Dir::Cache "{self.folder}/cache";\n'
            f'Dir::Cache::archives "{self.folder}/cache/archives";\n'
            f'Dir::Etc::sourcelist "{self.folder}/sources.list";\n'
            'Dir::Etc::sourceparts "/nonexistent";\n'
            'Dir::Etc::preferences "/nonexistent";\n'
            'Dir::Etc::preferencesparts "/nonexistent";\n'
            'APT::Architecture "amd64";\n'
            'APT::Sandbox::User "root";\n'
            'APT::Install-Recommends "false";\n'
            'Acquire::Languages "none";\n'
            'Acquire::Retries "3";\n'
            'quiet "1";\n'
        )
        self._config = config

    def _archives(self) -> Iterator[str]:
        """Yields the options and the address of each suite's archive."""
        known = machine_sources()
        for suite in self.suites:
            find = find_security_mirror if suite.endswith(SECURITY) else find_mirror
            mirror = find(known)
            yield f"{self._options(mirror)}{mirror.uri}"

    def _options(self, mirror: Source) -> str:
        options = []
        signed_by = mirror.signed_by
        if "BEGIN PGP" in signed_by:
            key = self.folder / "mirror.asc"
            lines = ("" if line == "." else line for line in signed_by.strip().splitlines())
            key.write_text("\n".join(lines) + "\n")
            signed_by = str(key)
        if not signed_by and DEBIAN_KEYRING.exists():
            signed_by = str(DEBIAN_KEYRING)
        if signed_by:
            options.append(f"signed-by={','.join(signed_by.split())}")
        if mirror.trusted:
            options.append("trusted=yes")
        return f"[{' '.join(options)}] " if options else ""

    def _words(self, program: str, *words: str) -> list[str]:
        return [program, "-c", str(self._config), *words]

    def update(self, step: Step) -> None:
        """Fetches the lists of packages."""
        step.run(self._words("apt-get", "update", "--error-on=any"))

    def _records(self, *words: str) -> str:
        """Returns what apt-cache knows, a stanza for each version; empty if it knows nothing."""
        command = self._words("apt-cache", *words)
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def field(self, package: str, field: str) -> str:
        """Returns a field of the newest version of ``package``, for example ``Depends``."""
        text = self._records("show", "--no-all-versions", package)
        found = re.search(rf"^{field}: (.*)$", text, re.MULTILINE)
        if not found:
            raise BuildError(f"no package {package} in {' '.join(self.suites)}")
        return found[1]

    def download(self, step: Step, package: str, folder: Path) -> Path:
        """Downloads the newest binary ``package`` into ``folder``. Returns its path."""
        before = set(folder.glob("*.deb"))
        step.run(self._words("apt-get", "download", package), cwd=folder)
        (path,) = set(folder.glob("*.deb")) - before
        return path

    def source_version(self, package: str) -> str:
        """Returns the newest version of the source package ``package``."""
        text = self._records("showsrc", "--only-source", package)
        versions = re.findall(r"^Version: (.*)$", text, re.MULTILINE)
        if not versions:
            raise BuildError(f"no source package {package} in {' '.join(self.suites)}")
        newest = versions[0]
        for version in versions[1:]:
            newer = subprocess.run(
                ["dpkg", "--compare-versions", version, "gt", newest], check=False
            )
            if newer.returncode == 0:
                newest = version
        return str(newest)

    def download_source(self, step: Step, package: str, version: str, folder: Path) -> Path:
        """Downloads a source package into ``folder``. Returns the path of its ``.dsc``."""
        words = ("source", "--download-only", "--only-source", f"{package}={version}")
        step.run(self._words("apt-get", *words), cwd=folder)
        (path,) = folder.glob("*.dsc")
        return path


def forwarded_settings() -> list[str]:
    """Returns the machine's proxy, certificate and clock settings, one ``Name "value";`` each."""
    text = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    return [line for line in text.stdout.splitlines() if FORWARDED.match(line)]
