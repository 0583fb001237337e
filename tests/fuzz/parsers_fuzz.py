# SPDX-License-Identifier: GPL-2.0-or-later
"""Coverage-guided fuzzing of the parsers with atheris: docs/fuzzing.md.

``python -m tests.fuzz.parsers_fuzz TARGET [libFuzzer's words ...]``; without a folder among them
the corpus grows in ``build/fuzz/TARGET``. ``--seeds FOLDER`` writes the seed inputs instead.
"""

import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(words: list[str]) -> None:
    """Fuzz one target until libFuzzer has enough."""
    import atheris

    with atheris.instrument_imports(include=["vhostvmbus"]):
        from tests.fuzz import parsers
    name, *rest = words
    if name == "--seeds":
        for target, found in parsers.seeds().items():
            folder = Path(rest[0], target)
            folder.mkdir(parents=True, exist_ok=True)
            for seed, data in found.items():
                (folder / seed).write_bytes(data)
        return
    target = parsers.TARGETS[name]
    if all(word.startswith("-") for word in rest):
        growing = HERE.parents[1] / "build" / "fuzz" / name
        growing.mkdir(parents=True, exist_ok=True)
        rest += [str(growing), str(HERE / "corpus" / "parsers" / name)]
    # A merge runs its program again through a shell, by the first word.
    again = shlex.join([sys.executable, "-m", "tests.fuzz.parsers_fuzz", name])
    atheris.Setup([again, *rest], target)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
