# SPDX-License-Identifier: GPL-2.0-or-later
"""The stub of the C module, against the headers, against the module, and what mypy makes of it."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests.support.paths import TREE
from vhostvmbus.engine import ffi, lib
from vhostvmbus.engine.stub import STUB, Interface, Unsupported, Writer, main, stub

TREE_OF_STUB = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE_OF_STUB.body if isinstance(node, ast.ClassDef)}


# -- the headers ----------------------------------------------------------------------------------


def test_the_stub_is_what_the_headers_say() -> None:
    assert STUB.read_text() == stub(), "run make stub"
    assert main(["--check"]) == 0


def test_an_old_stub_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "_engine.pyi"
    old.write_text(STUB.read_text().replace("VVB_OK", "VVB_FINE"))
    monkeypatch.setattr("vhostvmbus.engine.stub.STUB", old)
    assert main(["--check"]) == 1
    assert "make stub" in capsys.readouterr().err
    assert main([]) == 0
    assert old.read_text() == STUB.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "union u { int a; };",
        "struct { int a; };",
        "struct s { int a : 3; };",
        "struct s { int a[2][2]; };",
        "struct s { struct t { int a; } b; };",
        "float f(void);",
        "void f(int);",
        "void f(int a, ...);",
        "void f(int a[2]);",
        "void f(void (*g)(int a));",
        "struct s { int a; }; void f(struct s **s);",
        "extern int a;",
    ],
)
def test_what_the_stub_cannot_say_is_refused(text: str, tmp_path: Path) -> None:
    header = tmp_path / "api.h"
    header.write_text(text)
    with pytest.raises(Unsupported):
        Writer(Interface([header])).text()


# -- the module -----------------------------------------------------------------------------------


def declared(name: str) -> dict[str, str]:
    """Returns the fields of a class of the stub, and their types."""
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in CLASSES[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def methods(*names: str) -> dict[str, ast.FunctionDef]:
    """Returns the methods of classes of the stub."""
    bodies = chain.from_iterable(CLASSES[name].body for name in names)
    return {node.name: node for node in bodies if isinstance(node, ast.FunctionDef)}


def test_stub_and_module_have_the_same_names() -> None:
    functions = methods("Lib")
    assert {*declared("Lib"), *functions} == {name for name in dir(lib) if name != "__dict__"}
    for name in dir(lib):
        assert callable(getattr(lib, name)) == (name in functions), name


def test_no_name_of_ffi_is_made_up() -> None:
    for name in (*declared("FFIBase"), *declared("FFI"), *methods("FFIBase", "FFI")):
        assert hasattr(ffi, name), name


def test_nothing_is_any() -> None:
    used = {node.id for node in ast.walk(TREE_OF_STUB) if isinstance(node, ast.Name)}
    assert "Array" in used
    assert "Any" not in used


def of_ffi(ctype: ffi.CType) -> str:
    """Returns the stub's class for what is behind an address, going by cffi's own description."""
    kind, cname = ctype.kind, ctype.cname
    if kind == "struct":
        return cname.removeprefix("struct ")
    if kind == "pointer":
        return f"Pointer[{of_ffi(ctype.item)}]"
    return {"void": "object"}.get(cname, f"c_{cname}")


def value_of(ctype: ffi.CType) -> Iterator[str]:
    """Yields the classes of the stub that a value of a type may have, going by cffi, too."""
    if ctype.kind == "array":
        yield f"Array[{of_ffi(ctype.item)}]"
    elif ctype.kind == "pointer":
        yield f"Pointer[{of_ffi(ctype.item)}]"
        yield f"{of_ffi(ctype.item)}_p"
    elif ctype.kind == "struct":
        yield of_ffi(ctype)
    else:
        yield {"void": "None", "char": "bytes"}.get(ctype.cname, "int")


def test_functions_are_as_the_module_has_them() -> None:
    for name, node in methods("Lib").items():
        ctype = ffi.typeof(getattr(lib, name))
        parameters = [each.annotation for each in node.args.posonlyargs[1:]]
        assert len(parameters) == len(ctype.args), name
        for annotation, argument in zip(parameters, ctype.args, strict=True):
            expected = {"int"}
            if argument.kind == "pointer":
                expected = {f"Address[{of_ffi(argument.item)}]"}
            assert ast.unparse(annotation).split(" | ")[0] in expected, name
        assert ast.unparse(node.returns) in value_of(ctype.result), name


def has_fields(struct: str) -> bool:
    """Tells whether cffi knows what is in a struct."""
    try:
        return bool(ffi.sizeof(f"struct {struct}"))
    except ffi.error:
        return False


def test_structs_are_as_the_module_has_them() -> None:
    structs = [name for name in CLASSES if f"{name}_p" in CLASSES]
    assert sorted(structs) == sorted(filter(has_fields, ffi.list_types()[1]))
    for name in structs:
        fields = dict(ffi.typeof(f"struct {name}").fields)
        found = declared(name)
        assert list(found) == list(fields), name
        for field, annotation in found.items():
            assert annotation in value_of(fields[field].type), (name, field)


# -- mypy -----------------------------------------------------------------------------------------

PRELUDE = """\
from vhostvmbus._engine import Array, Pointer, ffi, lib, vvb_memory, vvb_rule
memory = ffi.gc(lib.vvb_memory_new(), lib.vvb_memory_free)
error = ffi.new("int *")
fault = ffi.new("struct vvb_fault *")
region = lib.vvb_region_new(0, 0, -1, 0, error)
rules = ffi.new("struct vvb_rule[]", 2)
segs = ffi.new("struct vvb_segs *")
sent = ffi.new("struct vvb_sent *")
seg = ffi.new("struct vvb_seg *")
"""

RIGHT = [
    "number: int = lib.VVB_E_FULL",
    "number = fault.value + fault[0].value + sent.fault.error + error[0]",
    "handle: Pointer[vvb_memory] = memory",
    "lib.vvb_memory_set(memory, ffi.new('struct vvb_region *[]', []), 0)",
    "lib.vvb_region_free(ffi.new('struct vvb_region *[]', [region])[0])",
    "lib.vvb_segs_free(segs)",
    "lib.vvb_segs_put(b'', 0)",
    "lib.vvb_wait([], 0, 0)",
    "lib.vvb_translate(memory, b'', 0, 0, 0, 0, segs, fault)",
    "rules[0].position.offset = 3",
    "rules[0].mask[0:2] = [1, 2]",
    "part: Array[vvb_rule] = rules[0:1]",
    "fields = [rule.position.offset for rule in rules]",
    "lib.vvb_plan_new(rules, 1, error) == ffi.NULL",
    "seg.region = ffi.NULL",
    "text: bytes = bytes(ffi.buffer(fault, 8))",
    "number = int(ffi.cast('uintptr_t', memory)) + ffi.sizeof('struct vvb_seg')",
    "ffi.memmove(rules[0].mask, b'abc', 3)",
    "number = ffi.from_buffer('struct vvb_seg[]', b'')[0:0][0:0].__len__()",
]
WRONG = {
    "lib.vvb_memory_free(region)": "arg-type",
    "lib.vvb_region_free(memory)": "arg-type",
    "lib.vvb_segs_free(fault)": "arg-type",
    "lib.vvb_ring_publish(memory, error)": "arg-type",
    "lib.vvb_region_new(0, 0, -1, 0, ffi.new('uint32_t *'))": "arg-type",
    "lib.vvb_translate(memory, b'', 0, 0, 0, 0, segs, sent.fault)": "arg-type",
    "lib.vvb_memory_set(memory, region, 0)": "arg-type",
    "lib.vvb_memory_set(memory, ffi.new('struct vvb_region *[]', [memory]), 0)": "call-overload",
    "lib.vvb_memory_free(None)": "arg-type",
    "lib.vvb_signal('1')": "arg-type",
    "lib.vvb_signal()": "call-arg",
    "lib.vvb_signal(-1, 0)": "call-arg",
    "lib.vvb_signal(fd=-1)": "call-arg",
    "lib.vvb_sginal(-1)": "attr-defined",
    "lib.VVB_OK = 1": "misc",
    "fault.felid = 1": "attr-defined",
    "fault.error = 'no'": "assignment",
    "error[0] = 'no'": "call-overload",
    "memory.users": "attr-defined",
    "rules.fd": "attr-defined",
    "seg.region = memory": "assignment",
    "ffi.new('struct vvb_falut *')": "call-overload",
    "ffi.new('struct vvb_ring *')": "call-overload",
    "ffi.sizeof('struct vvb_ring')": "arg-type",
}
"""Each of them fails when it is run, too."""
DANGEROUS = {
    "ffi.gc(memory, lib.vvb_region_free)": "arg-type",
    # C writes to what cffi made for the call alone, or to a bytes object.
    "lib.vvb_region_new(0, 0, -1, 0, [0])": "arg-type",
    "lib.vvb_ext_read(b'', 0, 0, b'x', 1)": "arg-type",
}
"""cffi lets these pass."""


def test_mypy_refuses_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    lines = [*PRELUDE.splitlines(), *RIGHT, *WRONG, *DANGEROUS]
    program = tmp_path / "uses.py"
    program.write_text("\n".join(lines) + "\n")
    options = ["--strict", "--config-file=", f"--cache-dir={tmp_path}", "--follow-imports=silent"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, program],
        env=os.environ | {"MYPYPATH": str(TREE)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (1, ""), result
    errors = re.findall(r"^.*uses\.py:(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE)
    assert f"Found {len(errors)} errors in 1 file" in result.stdout
    assert [(lines[int(number) - 1], code) for number, code in errors] == [
        *WRONG.items(),
        *DANGEROUS.items(),
    ]


@pytest.mark.parametrize("statement", RIGHT)
def test_what_is_right_works(statement: str) -> None:
    run(statement, run(PRELUDE))


@pytest.mark.parametrize("statement", WRONG)
def test_what_is_wrong_fails(statement: str) -> None:
    names = run(PRELUDE)
    with pytest.raises((TypeError, AttributeError, ffi.error)):
        run(statement, names)


def run(statements: str, names: dict[str, object] | None = None) -> dict[str, object]:
    """Runs statements as Python does, without the classes that are for mypy alone.

    Returns the names that there are afterwards.
    """
    names = {"ffi": ffi, "lib": lib} if names is None else names
    lines = [line for line in statements.splitlines() if not line.startswith("from ")]
    exec("from __future__ import annotations\n" + "\n".join(lines), names)
    return names
