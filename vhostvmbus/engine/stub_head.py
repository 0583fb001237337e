# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the C module's stub that no header decides: cffi's own types. See ``stub.py``."""

from typing import Final

HEAD: Final = '''\
# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the C module. ``make stub`` writes this file from the headers: do not edit it.

The class ``vvb_x`` is C's ``struct vvb_x``; a pointer to it is ``vvb_x_p`` if the struct has fields
(which the pointer has too, as cffi does it), else ``Pointer[vvb_x]``. The classes are for mypy
alone: import them under ``TYPE_CHECKING``. This file is long because the C module is one for all.
"""

from collections.abc import Callable, Iterator
from typing import Final, Generic, Literal, Never, TypeAlias, TypeVar, overload, type_check_only

from _typeshed import ReadableBuffer, WriteableBuffer

T_co = TypeVar("T_co", covariant=True)
PointerT = TypeVar("PointerT", bound=Pointer[object])

# What a function takes where C says ``T *``: a pointer, or an array, which becomes one.
@type_check_only
class Address(Generic[T_co]):
    @overload
    def __getitem__(self, index: int, /) -> T_co: ...
    @overload
    def __getitem__(self, index: slice[int, int, None], /) -> Array[T_co]: ...
    @overload
    def __setitem__(self: Address[Number], index: int, value: int, /) -> None: ...
    @overload
    def __setitem__(
        self: Address[Number], index: slice[int, int, None], value: list[int], /
    ) -> None: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __bool__(self) -> bool: ...
    def __hash__(self) -> int: ...

@type_check_only
class Pointer(Address[T_co]): ...

@type_check_only
class Array(Address[T_co]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T_co]: ...

# A number in memory of C. Its type says how it lies there: an ``int *`` is no ``uint32_t *``.
@type_check_only
class Number(int): ...

# cffi makes an array of them for the time of a call.
Numbers: TypeAlias = list[int] | tuple[int, ...]

# What ``ffi.cast()`` makes of a pointer: no int, but int() takes it.
@type_check_only
class Scalar:
    def __int__(self) -> int: ...

@type_check_only
class Buffer:
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@type_check_only
class FFIBase:
    NULL: Final[Pointer[Never]]
    def gc(
        self, cdata: PointerT, destructor: Callable[[PointerT], object], size: int = 0
    ) -> PointerT: ...
    def release(self, cdata: Address[object], /) -> None: ...
    def cast(self, cdecl: Literal["uintptr_t"], source: Address[object], /) -> Scalar: ...
    def buffer(self, cdata: Address[object], size: int = -1) -> Buffer: ...
    def string(self, cdata: Pointer[c_char]) -> bytes: ...
    def memmove(
        self,
        dest: Address[object] | WriteableBuffer,
        src: Address[object] | ReadableBuffer,
        n: int,
    ) -> None: ...
'''
