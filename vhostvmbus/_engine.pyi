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

@type_check_only
class c_char(bytes): ...

@type_check_only
class c_int(Number): ...

@type_check_only
class c_int32_t(Number): ...

@type_check_only
class c_int64_t(Number): ...

@type_check_only
class c_uint8_t(Number): ...

@type_check_only
class c_uint16_t(Number): ...

@type_check_only
class c_uint32_t(Number): ...

@type_check_only
class c_uint64_t(Number): ...

@type_check_only
class vvb_region: ...

@type_check_only
class vvb_memory: ...

@type_check_only
class vvb_codemap: ...

@type_check_only
class vvb_plan: ...

@type_check_only
class vvb_todo: ...

@type_check_only
class vvb_ring: ...

@type_check_only
class vvb_net_port: ...

@type_check_only
class vvb_net_recording: ...

@type_check_only
class vvb_net: ...

@type_check_only
class vvb_fault:
    value: int
    error: int
    field: int
    offset: int
    reserved: int

@type_check_only
class vvb_fault_p(vvb_fault, Pointer[vvb_fault]): ...

@type_check_only
class vvb_seg:
    gpa: int
    len: int
    host: Pointer[c_char]
    region: Pointer[vvb_region]

@type_check_only
class vvb_seg_p(vvb_seg, Pointer[vvb_seg]): ...

@type_check_only
class vvb_segs:
    v: vvb_seg_p
    count: int
    cap: int
    total: int

@type_check_only
class vvb_segs_p(vvb_segs, Pointer[vvb_segs]): ...

@type_check_only
class vvb_code_region:
    gpa: int
    size: int
    first_bit: int

@type_check_only
class vvb_code_region_p(vvb_code_region, Pointer[vvb_code_region]): ...

@type_check_only
class vvb_span:
    gpa: int
    len: int

@type_check_only
class vvb_span_p(vvb_span, Pointer[vvb_span]): ...

@type_check_only
class vvb_number:
    offset: int
    width: int
    big_endian: int
    shift: int
    reserved: Array[c_uint8_t]

@type_check_only
class vvb_number_p(vvb_number, Pointer[vvb_number]): ...

@type_check_only
class vvb_rule:
    file_size: int
    max_length: int
    fd: int
    payload_length: int
    operation: int
    nowait: int
    position: vvb_number
    length: vvb_number
    room: vvb_number
    done: vvb_number
    mask: Array[c_uint8_t]
    value: Array[c_uint8_t]
    keep: Array[c_uint8_t]
    set: Array[c_uint8_t]

@type_check_only
class vvb_rule_p(vvb_rule, Pointer[vvb_rule]): ...

@type_check_only
class vvb_outgoing:
    transaction_id: int
    header_len: int
    payload_len: int
    type: int
    flags: int
    slot: int

@type_check_only
class vvb_outgoing_p(vvb_outgoing, Pointer[vvb_outgoing]): ...

@type_check_only
class vvb_packet:
    transaction_id: int
    external_length: int
    fault_value: int
    written: int
    ring_offset: int
    data_offset: int
    length: int
    payload_offset: int
    first_seg: int
    seg_count: int
    error: int
    fault_field: int
    fault_offset: int
    type: int
    flags: int
    slot: int
    replayed: int

@type_check_only
class vvb_packet_p(vvb_packet, Pointer[vvb_packet]): ...

@type_check_only
class vvb_batch:
    packets: vvb_packet_p
    data: Pointer[c_uint8_t]
    segs: vvb_segs
    fault: vvb_fault
    count: int
    packets_cap: int
    data_len: int
    data_cap: int
    signal: int
    bytes: int
    no_slot: int
    replayed: int
    stopped: int
    todo: Pointer[vvb_todo]
    todo_bytes: int
    todo_count: int
    done_count: int
    answer_count: int
    done_payload: int
    done_external: int
    outgoing: vvb_outgoing_p
    answers: Pointer[c_uint8_t]
    answers_len: int
    span_count: int
    spans_cap: int
    spans: vvb_span_p
    whole: vvb_rule_p

@type_check_only
class vvb_batch_p(vvb_batch, Pointer[vvb_batch]): ...

@type_check_only
class vvb_limits:
    max_payload: int
    max_ranges: int
    max_external: int

@type_check_only
class vvb_limits_p(vvb_limits, Pointer[vvb_limits]): ...

@type_check_only
class vvb_sent:
    fault: vvb_fault
    count: int
    signal: int

@type_check_only
class vvb_sent_p(vvb_sent, Pointer[vvb_sent]): ...

@type_check_only
class vvb_ring_state:
    rx_size: int
    tx_size: int
    rx_avail: int
    tx_free: int
    peer_signals_space: int
    tx_pending: int
    signals_sent: int
    signals_suppressed: int
    space_signals: int

@type_check_only
class vvb_ring_state_p(vvb_ring_state, Pointer[vvb_ring_state]): ...

@type_check_only
class vvb_serving:
    kick_fd: int
    stop_fd: int
    wake_fd: int
    call_fd: int
    gather_us: int

@type_check_only
class vvb_serving_p(vvb_serving, Pointer[vvb_serving]): ...

@type_check_only
class vvb_served:
    packets: int
    payload: int
    external: int
    wanted: int
    answers: int
    batches: int
    wakeups: int
    rests: int
    signals: int
    max_batch: int
    answered: int
    fired: int
    error: int

@type_check_only
class vvb_served_p(vvb_served, Pointer[vvb_served]): ...

@type_check_only
class vvb_net_port_state:
    refused: int
    too_long: int
    missing: int
    broken: int
    bad_length: int

@type_check_only
class vvb_net_port_state_p(vvb_net_port_state, Pointer[vvb_net_port_state]): ...

@type_check_only
class vvb_net_recording_state:
    lost: int
    error: int
    cut_error: int

@type_check_only
class vvb_net_recording_state_p(vvb_net_recording_state, Pointer[vvb_net_recording_state]): ...

@type_check_only
class vvb_net_config:
    active: int
    receiving: int
    max_frame: int
    send_offloads: int
    tell_checksums: int
    tagging: int
    coalesced: int
    message_size: int
    singly: int
    patience_ms: int
    held: int
    packet_filter: int
    multicast_count: int
    hash_types: int
    table_size: int
    table: Array[c_uint32_t]
    addresses: Array[c_uint8_t]
    multicast: Array[c_uint8_t]
    key: Array[c_uint8_t]

@type_check_only
class vvb_net_config_p(vvb_net_config, Pointer[vvb_net_config]): ...

@type_check_only
class vvb_net_counts:
    directed_frames: int
    directed_bytes: int
    multicast_frames: int
    multicast_bytes: int
    broadcast_frames: int
    broadcast_bytes: int
    large: int
    refused: int
    filtered: int
    errors: int

@type_check_only
class vvb_net_counts_p(vvb_net_counts, Pointer[vvb_net_counts]): ...

@type_check_only
class vvb_net_news:
    told: int
    signals: int
    bad_returns: int

@type_check_only
class vvb_net_news_p(vvb_net_news, Pointer[vvb_net_news]): ...

@type_check_only
class vvb_net_fault:
    value: int
    error: int
    offset: int
    field: Pointer[c_char]
    detail: Pointer[c_char]

@type_check_only
class vvb_net_fault_p(vvb_net_fault, Pointer[vvb_net_fault]): ...

@type_check_only
class vvb_net_part:
    channel: int
    section: int
    byte_count: int
    byte_offset: int

@type_check_only
class vvb_net_part_p(vvb_net_part, Pointer[vvb_net_part]): ...

@type_check_only
class vvb_net_taken:
    woken: int
    left: int
    lease: int
    parts: Array[vvb_net_part]

@type_check_only
class vvb_net_taken_p(vvb_net_taken, Pointer[vvb_net_taken]): ...

@type_check_only
class Allocator:
    @overload
    def __call__(self, cdecl: Literal["char[]"], init: int | bytes, /) -> Array[c_char]: ...
    @overload
    def __call__(self, cdecl: Literal["int *"], init: int = 0, /) -> Pointer[c_int]: ...
    @overload
    def __call__(self, cdecl: Literal["int[]"], init: int | Numbers, /) -> Array[c_int]: ...
    @overload
    def __call__(self, cdecl: Literal["int32_t *"], init: int = 0, /) -> Pointer[c_int32_t]: ...
    @overload
    def __call__(self, cdecl: Literal["int32_t[]"], init: int | Numbers, /) -> Array[c_int32_t]: ...
    @overload
    def __call__(self, cdecl: Literal["int64_t *"], init: int = 0, /) -> Pointer[c_int64_t]: ...
    @overload
    def __call__(self, cdecl: Literal["int64_t[]"], init: int | Numbers, /) -> Array[c_int64_t]: ...
    @overload
    def __call__(self, cdecl: Literal["uint8_t *"], init: int = 0, /) -> Pointer[c_uint8_t]: ...
    @overload
    def __call__(self, cdecl: Literal["uint8_t[]"], init: int | Numbers, /) -> Array[c_uint8_t]: ...
    @overload
    def __call__(self, cdecl: Literal["uint16_t *"], init: int = 0, /) -> Pointer[c_uint16_t]: ...
    @overload
    def __call__(
        self, cdecl: Literal["uint16_t[]"], init: int | Numbers, /
    ) -> Array[c_uint16_t]: ...
    @overload
    def __call__(self, cdecl: Literal["uint32_t *"], init: int = 0, /) -> Pointer[c_uint32_t]: ...
    @overload
    def __call__(
        self, cdecl: Literal["uint32_t[]"], init: int | Numbers, /
    ) -> Array[c_uint32_t]: ...
    @overload
    def __call__(self, cdecl: Literal["uint64_t *"], init: int = 0, /) -> Pointer[c_uint64_t]: ...
    @overload
    def __call__(
        self, cdecl: Literal["uint64_t[]"], init: int | Numbers, /
    ) -> Array[c_uint64_t]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_fault *"], /) -> vvb_fault_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_fault[]"], init: int, /) -> Array[vvb_fault]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_seg *"], /) -> vvb_seg_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_seg[]"], init: int, /) -> Array[vvb_seg]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_segs *"], /) -> vvb_segs_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_segs[]"], init: int, /) -> Array[vvb_segs]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_code_region *"], /) -> vvb_code_region_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_code_region[]"], init: int, /
    ) -> Array[vvb_code_region]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_span *"], /) -> vvb_span_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_span[]"], init: int, /) -> Array[vvb_span]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_number *"], /) -> vvb_number_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_number[]"], init: int, /
    ) -> Array[vvb_number]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_rule *"], /) -> vvb_rule_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_rule[]"], init: int, /) -> Array[vvb_rule]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_outgoing *"], /) -> vvb_outgoing_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_outgoing[]"], init: int, /
    ) -> Array[vvb_outgoing]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_packet *"], /) -> vvb_packet_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_packet[]"], init: int, /
    ) -> Array[vvb_packet]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_batch *"], /) -> vvb_batch_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_batch[]"], init: int, /) -> Array[vvb_batch]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_limits *"], /) -> vvb_limits_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_limits[]"], init: int, /
    ) -> Array[vvb_limits]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_sent *"], /) -> vvb_sent_p: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_sent[]"], init: int, /) -> Array[vvb_sent]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_ring_state *"], /) -> vvb_ring_state_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_ring_state[]"], init: int, /
    ) -> Array[vvb_ring_state]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_serving *"], /) -> vvb_serving_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_serving[]"], init: int, /
    ) -> Array[vvb_serving]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_served *"], /) -> vvb_served_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_served[]"], init: int, /
    ) -> Array[vvb_served]: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_port_state *"], /
    ) -> vvb_net_port_state_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_port_state[]"], init: int, /
    ) -> Array[vvb_net_port_state]: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_recording_state *"], /
    ) -> vvb_net_recording_state_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_recording_state[]"], init: int, /
    ) -> Array[vvb_net_recording_state]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_net_config *"], /) -> vvb_net_config_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_config[]"], init: int, /
    ) -> Array[vvb_net_config]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_net_counts *"], /) -> vvb_net_counts_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_counts[]"], init: int, /
    ) -> Array[vvb_net_counts]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_net_news *"], /) -> vvb_net_news_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_news[]"], init: int, /
    ) -> Array[vvb_net_news]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_net_fault *"], /) -> vvb_net_fault_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_fault[]"], init: int, /
    ) -> Array[vvb_net_fault]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_net_part *"], /) -> vvb_net_part_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_part[]"], init: int, /
    ) -> Array[vvb_net_part]: ...
    @overload
    def __call__(self, cdecl: Literal["struct vvb_net_taken *"], /) -> vvb_net_taken_p: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_net_taken[]"], init: int, /
    ) -> Array[vvb_net_taken]: ...
    @overload
    def __call__(
        self, cdecl: Literal["struct vvb_region *[]"], init: int | list[Pointer[vvb_region]], /
    ) -> Array[Pointer[vvb_region]]: ...

@type_check_only
class FFI(FFIBase):
    new: Final[Allocator]
    def new_allocator(self, *, should_clear_after_alloc: bool = True) -> Allocator: ...
    @overload
    def from_buffer(
        self, buffer: ReadableBuffer, /, require_writable: Literal[False] = False
    ) -> Array[c_char]: ...
    @overload
    def from_buffer(
        self, buffer: WriteableBuffer, /, require_writable: Literal[True]
    ) -> Array[c_char]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_fault[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_fault]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_seg[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_seg]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_segs[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_segs]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_code_region[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_code_region]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_span[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_span]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_number[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_number]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_rule[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_rule]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_outgoing[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_outgoing]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_packet[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_packet]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_batch[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_batch]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_limits[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_limits]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_sent[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_sent]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_ring_state[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_ring_state]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_serving[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_serving]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_served[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_served]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_port_state[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_port_state]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_recording_state[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_recording_state]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_config[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_config]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_counts[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_counts]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_news[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_news]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_fault[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_fault]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_part[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_part]: ...
    @overload
    def from_buffer(
        self, cdecl: Literal["struct vvb_net_taken[]"], buffer: ReadableBuffer, /
    ) -> Array[vvb_net_taken]: ...
    def sizeof(
        self,
        cdecl: Literal[
            "struct vvb_fault",
            "struct vvb_seg",
            "struct vvb_segs",
            "struct vvb_code_region",
            "struct vvb_span",
            "struct vvb_number",
            "struct vvb_rule",
            "struct vvb_outgoing",
            "struct vvb_packet",
            "struct vvb_batch",
            "struct vvb_limits",
            "struct vvb_sent",
            "struct vvb_ring_state",
            "struct vvb_serving",
            "struct vvb_served",
            "struct vvb_net_port_state",
            "struct vvb_net_recording_state",
            "struct vvb_net_config",
            "struct vvb_net_counts",
            "struct vvb_net_news",
            "struct vvb_net_fault",
            "struct vvb_net_part",
            "struct vvb_net_taken",
        ],
        /,
    ) -> int: ...

@type_check_only
class Lib:
    VVB_OK: Final[int]
    VVB_E_INDEX: Final[int]
    VVB_E_LOST: Final[int]
    VVB_E_DESC_TRUNCATED: Final[int]
    VVB_E_LENGTH: Final[int]
    VVB_E_OFFSET: Final[int]
    VVB_E_TYPE: Final[int]
    VVB_E_TOO_LARGE: Final[int]
    VVB_E_RANGE_COUNT: Final[int]
    VVB_E_RANGE_TRUNCATED: Final[int]
    VVB_E_RANGE_EMPTY: Final[int]
    VVB_E_RANGE_TOO_LONG: Final[int]
    VVB_E_PFN: Final[int]
    VVB_E_REPLAYED: Final[int]
    VVB_E_FULL: Final[int]
    VVB_E_TOO_BIG: Final[int]
    VVB_E_NOMEM: Final[int]
    VVB_F_NONE: Final[int]
    VVB_F_WRITE_INDEX: Final[int]
    VVB_F_READ_INDEX: Final[int]
    VVB_F_AVAILABLE: Final[int]
    VVB_F_LEN8: Final[int]
    VVB_F_OFFSET8: Final[int]
    VVB_F_TYPE: Final[int]
    VVB_F_PAYLOAD_LENGTH: Final[int]
    VVB_F_RANGE_COUNT: Final[int]
    VVB_F_BYTE_COUNT: Final[int]
    VVB_F_PFN_COUNT: Final[int]
    VVB_F_PFN: Final[int]
    VVB_F_MEMORY: Final[int]
    VVB_F_REPLAYS: Final[int]
    VVB_ROLE_HOST: Final[int]
    VVB_ROLE_GUEST: Final[int]
    VVB_PLAN_BYTES: Final[int]
    VVB_PLAN_READ: Final[int]
    VVB_PLAN_WRITE: Final[int]
    VVB_COMPLETION_REQUESTED: Final[int]
    VVB_NOTE_BYTES: Final[int]
    VVB_NET_CHANNELS: Final[int]
    VVB_NET_MULTICAST: Final[int]
    VVB_NET_TABLE: Final[int]
    VVB_NET_KEY: Final[int]
    VVB_NET_FRAMES: Final[int]
    VVB_NET_PARTS: Final[int]
    VVB_NET_ADDRESS: Final[int]
    VVB_NET_ETHERNET: Final[int]
    VVB_NET_VLAN: Final[int]
    VVB_NET_LONGEST_IP: Final[int]
    VVB_NET_VNET: Final[int]
    VVB_NET_NVSP_RNDIS_PACKET: Final[int]
    VVB_NET_NVSP_RNDIS_PACKET_COMPLETE: Final[int]
    VVB_NET_NVSP_SIZE: Final[int]
    VVB_NET_NVSP_OLD_SIZE: Final[int]
    VVB_NET_NVSP_DATA: Final[int]
    VVB_NET_NVSP_SUCCESS: Final[int]
    VVB_NET_NVSP_NO_SECTION: Final[int]
    VVB_NET_RNDIS_PACKET: Final[int]
    VVB_NET_RNDIS_HEADER_SIZE: Final[int]
    VVB_NET_RNDIS_PACKET_SIZE: Final[int]
    VVB_NET_RNDIS_MESSAGES: Final[int]
    VVB_NET_FRAME_OFFSET: Final[int]
    VVB_NET_SECTION_TAIL: Final[int]
    VVB_NET_SEND_SECTION: Final[int]
    VVB_NET_NDIS_DIRECTED: Final[int]
    VVB_NET_NDIS_MULTICAST: Final[int]
    VVB_NET_NDIS_ALL_MULTICAST: Final[int]
    VVB_NET_NDIS_BROADCAST: Final[int]
    VVB_NET_NDIS_PROMISCUOUS: Final[int]
    VVB_NET_NDIS_HASH_IPV4: Final[int]
    VVB_NET_NDIS_HASH_TCP_IPV4: Final[int]
    VVB_NET_NDIS_HASH_IPV6: Final[int]
    VVB_NET_NDIS_HASH_TCP_IPV6: Final[int]
    VVB_NET_IP_CHECKSUM: Final[int]
    VVB_NET_TCP4: Final[int]
    VVB_NET_UDP4: Final[int]
    VVB_NET_TCP6: Final[int]
    VVB_NET_UDP6: Final[int]
    VVB_NET_LARGE4: Final[int]
    VVB_NET_LARGE6: Final[int]
    VVB_NET_PORT_DATAGRAM: Final[int]
    VVB_NET_PORT_STREAM: Final[int]
    VVB_NET_PORT_WHOLE: Final[int]
    VVB_NET_PORT_CLOSED: Final[int]
    VVB_NET_PORT_NONSENSE: Final[int]
    VVB_NET_RECORDING_INBOUND: Final[int]
    VVB_NET_RECORDING_OUTBOUND: Final[int]
    VVB_NET_OK: Final[int]
    VVB_NET_E_RNDIS: Final[int]
    VVB_NET_E_INFO: Final[int]
    VVB_NET_E_FRAME: Final[int]
    def vvb_file_page_size(self, fd: int, /) -> int: ...
    def vvb_region_new(
        self, gpa: int, size: int, fd: int, offset: int, err: Address[c_int], /
    ) -> Pointer[vvb_region]: ...
    def vvb_region_free(self, region: Address[vvb_region], /) -> None: ...
    def vvb_region_detach(self, region: Address[vvb_region], /) -> int: ...
    def vvb_region_forsake(self, region: Address[vvb_region], /) -> int: ...
    def vvb_region_fd(self, region: Address[vvb_region], /) -> int: ...
    def vvb_region_host(self, region: Address[vvb_region], /) -> Pointer[c_char]: ...
    def vvb_region_lost(self, region: Address[vvb_region], /) -> int: ...
    def vvb_region_users(self, region: Address[vvb_region], /) -> int: ...
    def vvb_region_wait_unused(self, region: Address[vvb_region], timeout_ms: int, /) -> int: ...
    def vvb_memory_new(self) -> Pointer[vvb_memory]: ...
    def vvb_memory_free(self, memory: Address[vvb_memory], /) -> None: ...
    def vvb_memory_set(
        self, memory: Address[vvb_memory], regions: Address[Pointer[vvb_region]], count: int, /
    ) -> int: ...
    def vvb_translate(
        self,
        memory: Address[vvb_memory],
        data: Address[c_char] | bytes,
        len: int,
        count: int,
        max_bytes: int,
        max_ranges: int,
        out: Address[vvb_segs],
        fault: Address[vvb_fault],
        /,
    ) -> int: ...
    def vvb_translate_span(
        self, memory: Address[vvb_memory], gpa: int, len: int, out: Address[vvb_segs], /
    ) -> int: ...
    def vvb_segs_put(self, segs: Address[object] | bytes, count: int, /) -> None: ...
    def vvb_segs_free(self, segs: Address[vvb_segs], /) -> None: ...
    def vvb_ext_read(
        self,
        segs: Address[object] | bytes,
        count: int,
        offset: int,
        dst: Address[c_char],
        len: int,
        /,
    ) -> int: ...
    def vvb_ext_write(
        self,
        segs: Address[object] | bytes,
        count: int,
        offset: int,
        src: Address[c_char] | bytes,
        len: int,
        /,
    ) -> int: ...
    def vvb_ext_fill(
        self, segs: Address[object] | bytes, count: int, offset: int, byte: int, len: int, /
    ) -> int: ...
    def vvb_ext_lost(self, segs: Address[object] | bytes, count: int, /) -> int: ...
    def vvb_ext_preadv(
        self,
        segs: Address[object] | bytes,
        count: int,
        offset: int,
        len: int,
        fd: int,
        file_offset: int,
        /,
    ) -> int: ...
    def vvb_ext_pwritev(
        self,
        segs: Address[object] | bytes,
        count: int,
        offset: int,
        len: int,
        fd: int,
        file_offset: int,
        /,
    ) -> int: ...
    def vvb_codemap_new(
        self,
        fd: int,
        map_bytes: int,
        regions: Address[vvb_code_region],
        count: int,
        err: Address[c_int],
        /,
    ) -> Pointer[vvb_codemap]: ...
    def vvb_codemap_free(self, map: Address[vvb_codemap], /) -> None: ...
    def vvb_memory_use_codemap(
        self, memory: Address[vvb_memory], map: Address[vvb_codemap], /
    ) -> None: ...
    def vvb_memory_watched(self, memory: Address[vvb_memory], /) -> int: ...
    def vvb_memory_written(
        self,
        memory: Address[vvb_memory],
        spans: Address[vvb_span],
        count: int,
        out: Address[vvb_span],
        cap: int,
        /,
    ) -> int: ...
    def vvb_plan_new(
        self, rules: Address[vvb_rule], count: int, err: Address[c_int], /
    ) -> Pointer[vvb_plan]: ...
    def vvb_plan_free(self, plan: Address[vvb_plan], /) -> None: ...
    def vvb_ring_attach(
        self,
        memory: Address[vvb_memory],
        pfns: Address[c_uint64_t] | Numbers,
        count: int,
        ring_offset: int,
        role: int,
        initialize: int,
        fault: Address[vvb_fault],
        err: Address[c_int],
        /,
    ) -> Pointer[vvb_ring]: ...
    def vvb_ring_free(self, ring: Address[vvb_ring], /) -> None: ...
    def vvb_ring_forsake(self, ring: Address[vvb_ring], /) -> int: ...
    def vvb_batch_new(self, ring: Address[vvb_ring], max_packets: int, /) -> vvb_batch_p: ...
    def vvb_batch_free(self, batch: Address[vvb_batch], /) -> None: ...
    def vvb_batch_stop(self, batch: Address[vvb_batch], /) -> None: ...
    def vvb_ring_receive(
        self,
        ring: Address[vvb_ring],
        batch: Address[vvb_batch],
        max: int,
        memory: Address[vvb_memory],
        limits: Address[vvb_limits],
        plan: Address[vvb_plan],
        /,
    ) -> int: ...
    def vvb_ring_mask(self, ring: Address[vvb_ring], /) -> None: ...
    def vvb_ring_unmask(self, ring: Address[vvb_ring], /) -> int: ...
    def vvb_ring_send(
        self,
        ring: Address[vvb_ring],
        type: int,
        flags: int,
        transaction_id: int,
        header: Address[c_char] | bytes,
        header_len: int,
        payload: Address[c_char] | bytes,
        payload_len: int,
        publish: int,
        signal: Address[c_int],
        fault: Address[vvb_fault],
        /,
    ) -> int: ...
    def vvb_ring_publish(self, ring: Address[vvb_ring], signal: Address[c_int], /) -> None: ...
    def vvb_ring_send_many(
        self,
        ring: Address[vvb_ring],
        packets: Address[object] | bytes,
        count: int,
        data: Address[object] | bytes,
        data_len: int,
        sent: Address[vvb_sent],
        /,
    ) -> int: ...
    def vvb_ring_hold(self, ring: Address[vvb_ring], held: int, /) -> None: ...
    def vvb_inflight_size(self, slots: int, slot_bytes: int, /) -> int: ...
    def vvb_inflight_clear(self, fd: int, offset: int, size: int, /) -> int: ...
    def vvb_ring_record(
        self, ring: Address[vvb_ring], fd: int, offset: int, size: int, slots: int, resume: int, /
    ) -> int: ...
    def vvb_ring_to_replay(self, ring: Address[vvb_ring], /) -> int: ...
    def vvb_ring_keep_note(
        self, ring: Address[vvb_ring], data: Address[c_char] | bytes, length: int, /
    ) -> None: ...
    def vvb_ring_get_note(self, ring: Address[vvb_ring], data: Address[c_char], /) -> int: ...
    def vvb_ring_has_slot(self, ring: Address[vvb_ring], /) -> int: ...
    def vvb_ring_get_state(
        self, ring: Address[vvb_ring], state: Address[vvb_ring_state], /
    ) -> None: ...
    def vvb_ring_lost(self, ring: Address[vvb_ring], /) -> int: ...
    def vvb_ring_pages(self, ring: Address[vvb_ring], dir: int, /) -> Pointer[c_char]: ...
    def vvb_ring_serve(
        self,
        ring: Address[vvb_ring],
        batch: Address[vvb_batch],
        max: int,
        memory: Address[vvb_memory],
        limits: Address[vvb_limits],
        plan: Address[vvb_plan],
        serving: Address[vvb_serving],
        served: Address[vvb_served],
        /,
    ) -> int: ...
    def vvb_wait(self, fds: Address[c_int] | Numbers, count: int, timeout_ms: int, /) -> int: ...
    def vvb_signal(self, fd: int, /) -> int: ...
    def vvb_net_port_new(self, framing: int, wake_fd: int, /) -> Pointer[vvb_net_port]: ...
    def vvb_net_port_free(self, port: Address[vvb_net_port], /) -> None: ...
    def vvb_net_port_close(self, port: Address[vvb_net_port], /) -> None: ...
    def vvb_net_port_fd(self, port: Address[vvb_net_port], /) -> int: ...
    def vvb_net_port_put(self, port: Address[vvb_net_port], fd: int, /) -> int: ...
    def vvb_net_port_flush(self, port: Address[vvb_net_port], /) -> int: ...
    def vvb_net_port_get_state(
        self, port: Address[vvb_net_port], state: Address[vvb_net_port_state], /
    ) -> None: ...
    def vvb_net_port_send(
        self,
        port: Address[vvb_net_port],
        header: Address[c_char] | bytes,
        data: Address[c_char] | bytes,
        length: int,
        /,
    ) -> int: ...
    def vvb_net_port_receive(
        self,
        port: Address[vvb_net_port],
        header: Address[c_char],
        data: Address[c_char],
        room: int,
        /,
    ) -> int: ...
    def vvb_net_port_record(
        self, port: Address[vvb_net_port], recording: Address[vvb_net_recording], /
    ) -> None: ...
    def vvb_net_recording_new(
        self, fd: int, end: int, retry_ns: int, news_fd: int, /
    ) -> Pointer[vvb_net_recording]: ...
    def vvb_net_recording_free(self, recording: Address[vvb_net_recording], /) -> None: ...
    def vvb_net_recording_end(self, recording: Address[vvb_net_recording], /) -> None: ...
    def vvb_net_recording_get_state(
        self, recording: Address[vvb_net_recording], state: Address[vvb_net_recording_state], /
    ) -> None: ...
    def vvb_net_new(self) -> Pointer[vvb_net]: ...
    def vvb_net_free(self, net: Address[vvb_net], /) -> None: ...
    def vvb_net_close(self, net: Address[vvb_net], /) -> None: ...
    def vvb_net_configure(
        self, net: Address[vvb_net], config: Address[vvb_net_config], /
    ) -> None: ...
    def vvb_net_set_queue(
        self, net: Address[vvb_net], queue: int, port: Address[vvb_net_port], /
    ) -> int: ...
    def vvb_net_use_queues(self, net: Address[vvb_net], count: int, /) -> int: ...
    def vvb_net_lend_send(
        self,
        net: Address[vvb_net],
        segs: Address[object] | bytes,
        count: int,
        section: int,
        lease: int,
        /,
    ) -> int: ...
    def vvb_net_lend_receive(
        self,
        net: Address[vvb_net],
        segs: Address[object] | bytes,
        count: int,
        section: int,
        set_id: int,
        first: int,
        lease: int,
        /,
    ) -> int: ...
    def vvb_net_free_sections(self, net: Address[vvb_net], /) -> int: ...
    def vvb_net_wake_when_free(self, net: Address[vvb_net], wake_fd: int, /) -> None: ...
    def vvb_net_section(self, net: Address[vvb_net], lease: int, /) -> int: ...
    def vvb_net_give(self, net: Address[vvb_net], lease: int, section: int, /) -> None: ...
    def vvb_net_connect(
        self, net: Address[vvb_net], channel: int, ring: Address[vvb_ring], call_fd: int, /
    ) -> int: ...
    def vvb_net_disconnect(self, net: Address[vvb_net], channel: int, /) -> None: ...
    def vvb_net_sent(self, net: Address[vvb_net], channel: int, /) -> vvb_net_counts_p: ...
    def vvb_net_received(self, net: Address[vvb_net], queue: int, /) -> vvb_net_counts_p: ...
    def vvb_net_take_news(
        self, net: Address[vvb_net], channel: int, news: Address[vvb_net_news], /
    ) -> None: ...
    def vvb_net_plan(self, net: Address[vvb_net], channel: int, /) -> Pointer[vvb_plan]: ...
    def vvb_net_send(
        self,
        net: Address[vvb_net],
        channel: int,
        data: Address[object],
        length: int,
        fault: Address[vvb_net_fault],
        /,
    ) -> None: ...
    def vvb_net_serve(
        self, net: Address[vvb_net], queue: int, wake_fd: int, taken: Address[vvb_net_taken], /
    ) -> None: ...

ffi: Final[FFI]
lib: Final[Lib]
