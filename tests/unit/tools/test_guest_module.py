# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's half: its Python binding says the same as its C header, and how it is built."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from buildlib.guestmodule import header_packages
from buildlib.progress import BuildError

from tests.support.paths import TREE

MODULES = TREE / "guest-images" / "modules"
HEADER = MODULES / "vmbus_user" / "vmbus_user.h"
STRUCTURES = {
    "info": "Info", "open": "_Open", "range": "Range", "send": "_Send", "wait": "_Wait",
    "receive": "_Receive", "complete": "_Complete", "gpadl": "_Gpadl",
}  # fmt: skip


@pytest.fixture(scope="module")
def binding() -> ModuleType:
    path = MODULES / "tools" / "vmbus_user.py"
    spec = importlib.util.spec_from_file_location("vmbus_user", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_binding_agrees_with_the_header(binding: ModuleType, tmp_path: Path) -> None:
    """Each field's place and size, each request's number, as the compiler sees them."""
    expected = {}
    lines = []
    for name, python in STRUCTURES.items():
        structure = getattr(binding, python)
        for field, _ in structure._fields_:
            descriptor = getattr(structure, field)
            expected[f"{name}.{field}"] = [descriptor.offset, descriptor.size]
            kind = f"struct vmbus_user_{name}"
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", offsetof({kind}, {field}), '
                f"sizeof((({kind} *)0)->{field}));"
            )
    requests = re.findall(r"define VMBUS_USER_(IOC_\w+)", HEADER.read_text())
    assert len(requests) == 9
    for name in requests:
        expected[name] = [getattr(binding, name)]
        lines.append(f'printf("{name} %lu\\n", (unsigned long)VMBUS_USER_{name});')
    for name in ("WAIT_FOR_COMPLETION", "HOST_WRITES", "TO_COMPLETE", "CLOSED", "OPEN", "GONE"):
        expected[name] = [getattr(binding, name)]
        lines.append(f'printf("{name} %lu\\n", (unsigned long)VMBUS_USER_{name});')
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "vmbus_user.h"\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    program = tmp_path / "layout"
    words = ["cc", "-Wall", "-Werror", f"-I{HEADER.parent}", "-o", program, source]
    subprocess.run(words, check=True)
    text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found = {name: [int(n) for n in rest] for name, *rest in map(str.split, text.splitlines())}
    assert found == expected


@pytest.mark.parametrize(
    ("depends", "names"),
    [
        (
            "linux-headers-6.1.0-50-common (= 6.1.176-1), linux-kbuild-6.1 (>= 6.1.176-1), "
            "linux-compiler-gcc-12-x86",
            ["linux-headers-6.1.0-50-common", "linux-kbuild-6.1"],
        ),
        (
            "linux-base (>= 4.12~), linux-headers-6.12.95+deb12-common (= 6.12.95-1~bpo12+1), "
            "linux-image-6.12.95+deb12-amd64 (= 6.12.95-1~bpo12+1) | "
            "linux-image-6.12.95+deb12-amd64-unsigned, linux-kbuild-6.12.95+deb12, gcc-12",
            ["linux-headers-6.12.95+deb12-common", "linux-kbuild-6.12.95+deb12"],
        ),
    ],
)
def test_the_packages_that_a_build_takes(depends: str, names: list[str]) -> None:
    class Apt:
        def field(self, package: str, field: str) -> str:
            assert (package, field) == ("linux-headers-x", "Depends")
            return depends

    assert header_packages(Apt(), "x") == ["linux-headers-x", *names]  # type: ignore[arg-type]


def test_packages_other_than_expected_are_named() -> None:
    class Apt:
        def field(self, package: str, field: str) -> str:
            return "something-else (>= 1)"

    with pytest.raises(BuildError, match="something-else"):
        header_packages(Apt(), "x")  # type: ignore[arg-type]
