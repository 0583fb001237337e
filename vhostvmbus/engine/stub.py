# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes ``vhostvmbus/_engine.pyi``, by which mypy knows what is in the C module.

It reads the headers that the build gives to cffi (``build.interfaces()``), so that a function, a
constant or a field is declared once, in C. ``make stub`` runs it after a change of a header; with
``--check`` nothing is written, and the exit status says whether the file is what it should be.

A header that a device adds declares what the engine's own do: enums without a type of their own,
structs, and functions, made of numbers, structs, pointers to them and arrays as fields. For
anything else :exc:`Unsupported` names the line, and this is the place to add it.
"""

import sys
from keyword import iskeyword
from pathlib import Path
from typing import Final, NamedTuple

from pycparser import CParser, c_ast, preprocess_file

from vhostvmbus.engine.build import PACKAGE, interfaces
from vhostvmbus.engine.stub_head import HEAD

STUB: Final = PACKAGE / "_engine.pyi"
LINE_LENGTH: Final = 100

TYPEDEFS: Final = (
    "int8_t",
    "int16_t",
    "int32_t",
    "int64_t",
    "uint8_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
    "size_t",
)
"""The types of ``<stdint.h>``, declared to the parser by hand, since the headers include
nothing."""
BYTES: Final = ("char", "int8_t", "uint8_t")
"""cffi passes a bytes object where C wants a pointer to one of these."""
INTEGERS: Final = ("int", "unsigned int", *TYPEDEFS)


class Unsupported(Exception):
    """A declaration that the stub has no type for."""


class CType(NamedTuple):
    """A type in C, as far as the headers need it: ``const name **[]``."""

    name: str
    """``"int"``, ``"void"``, ``"struct vvb_ring"``."""
    const: bool = False
    pointers: int = 0
    array: bool = False


class Variable(NamedTuple):
    """A field or a parameter."""

    name: str
    type: CType


class Function(NamedTuple):
    """A function of the interface."""

    name: str
    result: CType
    parameters: list[Variable]


class Interface:
    """The declarations of some headers, in their order."""

    def __init__(self, headers: list[Path]) -> None:
        self.constants: list[str] = []
        self.structs: dict[str, list[Variable]] = {}
        """The structs whose fields are declared."""
        self.opaque: list[str] = []
        """The structs of which there are pointers only."""
        self.functions: list[Function] = []
        text = "".join(f"typedef int {name};\n" for name in TYPEDEFS)
        # The preprocessor takes the comments out, and says in the text which line is whose.
        text += "".join(preprocess_file(str(path), "cc", ["-E"]) for path in headers)
        for node in CParser().parse(text).ext:
            if not isinstance(node, c_ast.Typedef):
                self._declaration(node)
        self.opaque = [name for name in dict.fromkeys(self.opaque) if name not in self.structs]

    def _declaration(self, node: c_ast.Node) -> None:
        declared = getattr(node, "type", None)
        if isinstance(declared, c_ast.Enum) and declared.values:
            self.constants += [entry.name for entry in declared.values.enumerators]
        elif isinstance(declared, c_ast.Struct) and declared.decls is None:
            self.opaque.append(declared.name)
        elif isinstance(declared, c_ast.Struct) and declared.name:
            self.structs[declared.name] = [_variable(field) for field in declared.decls]
        elif isinstance(declared, c_ast.FuncDecl):
            parameters = [_variable(each) for each in declared.args or ()]
            if [each.type for each in parameters] == [CType("void")]:
                parameters = []
            self.functions.append(Function(node.name, _type_of(declared), parameters))
        else:
            raise Unsupported(f"{node.coord}: neither an enum, a struct with a name nor a function")

    @property
    def types(self) -> list[CType]:
        """Returns every type that a field, a parameter or a result has."""
        variables = [field for fields in self.structs.values() for field in fields]
        variables += [each for function in self.functions for each in function.parameters]
        return [each.type for each in variables] + [each.result for each in self.functions]


def _variable(node: c_ast.Node) -> Variable:
    """Returns a field or a parameter, which has to have a name."""
    if isinstance(node, c_ast.EllipsisParam):
        raise Unsupported(f"{node.coord}: a function with any number of parameters")
    found = Variable(str(node.name), _type_of(node))
    if node.name is None and found.type != CType("void"):
        raise Unsupported(f"{node.coord}: a field or a parameter without a name")
    return found


def _type_of(declared: c_ast.Node) -> CType:
    """Returns the type of a field, of a parameter, or of what a function returns."""
    node, array, pointers = declared.type, False, 0
    if isinstance(node, c_ast.ArrayDecl):
        node, array = node.type, True
    while isinstance(node, c_ast.PtrDecl):
        node, pointers = node.type, pointers + 1
    if not isinstance(node, c_ast.TypeDecl) or getattr(declared, "bitsize", None):
        raise Unsupported(f"{declared.coord}: a type that the stub cannot describe")
    if isinstance(node.type, c_ast.Struct) and node.type.decls is None:
        name = f"struct {node.type.name}"
    elif isinstance(node.type, c_ast.IdentifierType):
        name = " ".join(node.type.names)
    else:
        raise Unsupported(f"{declared.coord}: a type that the stub cannot describe")
    if not name.startswith("struct ") and name not in ("void", "char", *INTEGERS):
        raise Unsupported(f"{declared.coord}: {name} is not among the types that the stub knows")
    return CType(name, "const" in node.quals, pointers, array)


class Writer:
    """The stub of an interface, part by part."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface

    def text(self) -> str:
        """Returns the stub, formatted as ruff does it."""
        parts = [HEAD, *self._primitives(), *self._structs(), self._allocator(), self._ffi()]
        return "\n".join([*parts, self._lib(), "ffi: Final[FFI]\nlib: Final[Lib]\n"])

    # -- types ---------------------------------------------------------------------------------

    def _item(self, c: CType) -> str:
        """Returns the class for what an address is of: the thing itself, by its C type."""
        if c.pointers:
            pointer = self._pointer(c)
            if pointer.endswith("_p"):
                # This class is also the struct's: mypy would take its address for one of a struct.
                raise Unsupported(f"an address of a pointer to {c.name}, which has fields")
            return pointer
        if c.name == "void":
            return "object"
        if c.name.startswith("struct "):
            return c.name.removeprefix("struct ")
        return "c_" + c.name.replace(" ", "_")

    def _pointer(self, c: CType) -> str:
        """Returns the class of a pointer: one with the fields, if it is to a struct with fields."""
        target = self._item(c._replace(pointers=c.pointers - 1))
        if c.pointers == 1 and target in self._interface.structs:
            return f"{target}_p"
        return f"Pointer[{target}]"

    def _value(self, c: CType) -> str:
        """Returns what reading such a field, or calling such a function, gives."""
        if c.array:
            return f"Array[{self._item(c)}]"
        if c.pointers:
            return self._pointer(c)
        if c.name.startswith("struct "):
            return self._item(c)
        return {"void": "None", "char": "bytes"}.get(c.name, "int")

    def _parameter(self, parameter: Variable) -> str:
        """Returns a parameter with the types of what may be passed.

        Where C does not write (``const``), cffi takes Python's own objects for an address, too.
        """
        name, c = parameter
        name += "_" if iskeyword(name) else ""
        if c.array:
            raise Unsupported(f"{name}, an array as a parameter: declare the pointer that it is")
        if not c.pointers:
            return f"{name}: {self._value(c)}"
        accepted = [f"Address[{self._item(c._replace(pointers=c.pointers - 1))}]"]
        if c.const and c.pointers == 1:
            if c.name in ("void", *BYTES):
                accepted.append("bytes")
            if c.name in INTEGERS:
                accepted.append("Numbers")
        return f"{name}: {' | '.join(accepted)}"

    # -- classes -------------------------------------------------------------------------------

    def _used(self) -> list[str]:
        """Returns the names of the numbers that the headers use, and ``char``, which cffi does."""
        names = {"char", *(c.name for c in self._interface.types)}
        return [name for name in ("char", *INTEGERS) if name in names]

    def _primitives(self) -> list[str]:
        base = {"char": "bytes"}
        names = self._used()
        return [_class(f"{self._item(CType(n))}({base.get(n, 'Number')})") for n in names]

    def _structs(self) -> list[str]:
        parts = [_class(name) for name in self._interface.opaque]
        for name, fields in self._interface.structs.items():
            body = [f"{field.name}: {self._value(field.type)}" for field in fields]
            parts += [_class(name, body), _class(f"{name}_p({name}, Pointer[{name}])")]
        return parts

    def _allocator(self) -> str:
        """Returns the class of ``ffi.new``: a call for each type that can be made."""
        made = {"char[]": ("init: int | bytes", "Array[c_char]")}
        for name in self._used():
            if name in INTEGERS:
                item = self._item(CType(name))
                made[f"{name} *"] = ("init: int = 0", f"Pointer[{item}]")
                made[f"{name}[]"] = ("init: int | Numbers", f"Array[{item}]")
        for name in self._interface.structs:
            made[f"struct {name} *"] = ("", f"{name}_p")
            made[f"struct {name}[]"] = ("init: int", f"Array[{name}]")
        # Tables of pointers, for the functions that take one.
        for c in self._interface.types:
            if c.pointers == 2:
                item = self._item(c._replace(pointers=1))
                made[f"{c.name} *[]"] = (f"init: int | list[{item}]", f"Array[{item}]")
        body = []
        for cdecl, (init, result) in made.items():
            parameters = [f'cdecl: Literal["{cdecl}"]', *([init] if init else []), "/"]
            body += ["@overload", *_def("__call__", parameters, result)]
        return _class("Allocator", body)

    def _ffi(self) -> str:
        make = ["*", "should_clear_after_alloc: bool = True"]
        body = ["new: Final[Allocator]", *_def("new_allocator", make, "Allocator")]
        for buffer, says in ("ReadableBuffer", "False] = False"), ("WriteableBuffer", "True]"):
            parameters = [f"buffer: {buffer}", "/", f"require_writable: Literal[{says}"]
            body += ["@overload", *_def("from_buffer", parameters, "Array[c_char]")]
        structs = self._interface.structs
        for name in structs:
            parameters = [f'cdecl: Literal["struct {name}[]"]', "buffer: ReadableBuffer", "/"]
            body += ["@overload", *_def("from_buffer", parameters, f"Array[{name}]")]
        body += ["def sizeof(", "    self,", "    cdecl: Literal["]
        body += [f'        "struct {name}",' for name in structs]
        body += ["    ],", "    /,", ") -> int: ..."]
        return _class("FFI(FFIBase)", body)

    def _lib(self) -> str:
        body = [f"{name}: Final[int]" for name in self._interface.constants]
        for function in self._interface.functions:
            parameters = [self._parameter(each) for each in function.parameters]
            slash = ["/"] if parameters else []
            body += _def(function.name, [*parameters, *slash], self._value(function.result))
        return _class("Lib", body)


def _class(head: str, body: list[str] | None = None) -> str:
    """Returns the text of a class that only mypy knows."""
    lines = "".join(f"    {line}\n" for line in body or ())
    return f"@type_check_only\nclass {head}:" + (f"\n{lines}" if lines else " ...\n")


def _def(name: str, parameters: list[str], result: str) -> list[str]:
    """Returns the lines of a method: one, or three, or one for each parameter, as ruff does it."""
    listed = ", ".join(["self", *parameters])
    line = f"def {name}({listed}) -> {result}: ..."
    if len(line) + 4 <= LINE_LENGTH:
        return [line]
    inner = [f"    {listed}"]
    if len(listed) + 8 > LINE_LENGTH:
        inner = [f"    {each}," for each in ["self", *parameters]]
    return [f"def {name}(", *inner, f") -> {result}: ..."]


def stub() -> str:
    """Returns what ``_engine.pyi`` should be."""
    return Writer(Interface(interfaces())).text()


def main(arguments: list[str]) -> int:
    """Writes the stub; with ``--check`` says whether it is up to date."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m vhostvmbus.engine.stub [--check]", file=sys.stderr)
        return 2
    text = stub()
    if not arguments:
        STUB.write_text(text)
    elif STUB.read_text() != text:
        print(f"{STUB.name} is not what the headers say: run make stub", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
