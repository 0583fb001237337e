# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own Hyper-V emulation (TCG), driven by a bare-metal guest that plays by no rules.

Each scenario is one run of QEMU. The guest prints what it sees, and this file has what the
Hyper-V Top-Level Functional Specification wants to be seen. QEMU must live to the
end of the run, whatever the guest did.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bare_metal import (
    DEBUG_EXIT,
    Report,
    build_guest,
    qemu_command,
    report_of,
    run_qemu,
)

SCENARIOS = Path(__file__).parent
HV = (
    "hv-relaxed,hv-vpindex,hv-synic,hv-time,hv-reset,hv-runtime,hv-vapic,hv-crash,hv-stimer,"
    "hv-stimer-direct"
)
VMBUS = ("-device", "vmbus-bridge", "-device", "hv-balloon")

GP = 0xD
UD = 0x6
NO_FAULT = 0x100
NO_MESSAGE = 0xFFFFFFFF
VERSION_RESPONSE = 15
OFFER_CHANNEL = 1
ALL_OFFERS_DELIVERED = 4

SUCCESS = 0
INVALID_HYPERCALL_CODE = 2
INVALID_HYPERCALL_INPUT = 3
INVALID_ALIGNMENT = 4
INSUFFICIENT_MEMORY = 11
INVALID_PORT_ID = 17
INVALID_CONNECTION_ID = 18
FAULTED_UD = 0x1000000 + UD

Run = Callable[[str], Report]


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare-metal guest, a multiboot kernel."""
    return build_guest(SCENARIOS, tmp_path_factory.mktemp("hyperv"))


def run_guest(qemu: Path, guest: Path, scenario: str, cpu: str, *words: str) -> Report:
    """What the guest reports in *scenario*. QEMU and guest must both come to a regular end."""
    words = ("-cpu", cpu, "-kernel", str(guest), "-append", scenario, *words, *DEBUG_EXIT)
    return report_of(qemu_command(qemu, *words))


@pytest.fixture
def run(qemu: Path, guest: Path) -> Run:
    """Runs a scenario with all enlightenments and a VMBus."""
    return lambda scenario: run_guest(qemu, guest, scenario, f"qemu64,{HV}", *VMBUS)


def text_value(text: str) -> int:
    """The register pair that spells *text*."""
    return int.from_bytes(text.encode(), "little")


@pytest.mark.parametrize(
    ("properties", "low", "hints"),
    [
        # bits of CPUID 0x40000003.EAX: 5 hypercall, 6 VP index, 2 SynIC
        ("hv-vpindex,hv-synic", 0x64, 0x00),
        # and 0 runtime, 1 time, 3 timers, 4 APIC, 7 reset, 9 reference TSC; hints: APIC, relaxed
        (HV, 0x2FF, 0x28),
        # hv-avic: auto-EOI is deprecated (9), and the APIC MSRs are no longer recommended (3)
        (f"{HV},hv-avic", 0x2FF, 0x220),
    ],
)
def test_cpuid(qemu: Path, guest: Path, properties: str, low: int, hints: int) -> None:
    seen = run_guest(qemu, guest, "cpuid", f"qemu64,{properties}")
    assert seen[:5] == [
        ("hypervisor", 1),
        ("vendor", text_value("Micr") << 32 | 0x40000005),
        ("vendor", text_value("osoft Hv")),
        ("interface", text_value("Hv#1")),
        ("interface", 0),
    ]
    # EBX of the features: post messages, signal events
    assert ("features", 0x30 << 32 | low) in seen
    # no limit for spin locks
    assert ("hints", 0xFFFFFFFF << 32 | hints) in seen


def test_hypercalls(run: Run) -> None:
    assert run("hypercalls") == [
        ("vmcall_before_id", FAULTED_UD),
        ("page_before_id", 0),
        ("page_after_id", 1),
        ("vmcall", INVALID_HYPERCALL_CODE),
        ("vmmcall", INVALID_HYPERCALL_CODE),
        ("unknown_code", INVALID_HYPERCALL_CODE),
        ("long_spin_wait", SUCCESS),
        ("post_fast", INVALID_HYPERCALL_CODE),
        ("post_misaligned", INVALID_ALIGNMENT),
        ("post_nowhere", INSUFFICIENT_MEMORY),
        ("post_far_away", INSUFFICIENT_MEMORY),
        ("post_reserved", INVALID_HYPERCALL_INPUT),
        ("post_reps", INVALID_HYPERCALL_INPUT),
        ("post_header", INVALID_HYPERCALL_INPUT),
        ("post_too_long", INVALID_HYPERCALL_INPUT),
        ("post_huge", INVALID_HYPERCALL_INPUT),
        ("post_too_short", INVALID_HYPERCALL_INPUT),
        ("post_wrong_type", INVALID_HYPERCALL_INPUT),
        ("post_unknown_vmbus_message", INVALID_HYPERCALL_INPUT),
        ("post_no_connection", INVALID_CONNECTION_ID),
        ("post_connection_high_bits", SUCCESS),
        ("signal_no_connection", INVALID_CONNECTION_ID),
        ("signal_reserved", INVALID_HYPERCALL_INPUT),
        ("signal_flag_1", INVALID_PORT_ID),
        ("signal_flag_limit", INVALID_PORT_ID),
        ("signal_flag_max", INVALID_PORT_ID),
        ("signal_misaligned", INVALID_ALIGNMENT),
        ("signal_slow_no_connection", INVALID_CONNECTION_ID),
        ("signal_nowhere", INVALID_CONNECTION_ID),
        ("page_without_id", 0),
        ("call_without_id", FAULTED_UD),
    ]


def test_msrs(run: Run) -> None:
    assert run("msrs") == [
        ("read_frequency", GP),
        ("read_unknown", GP),
        ("write_unknown", GP),
        ("write_vp_index", GP),
        ("write_time", GP),
        ("write_version", GP),
        ("read_eoi", GP),
        ("assist_page", NO_FAULT),
        ("assist_nowhere", GP),
        ("hypercall_nowhere_without_id", NO_FAULT),
        ("hypercall_nowhere", GP),
        ("simp_far_away", GP),
        ("siefp_far_away", GP),
        ("sint_vector_15", GP),
        ("sint_vector_16", NO_FAULT),
        ("sint_masked_0", NO_FAULT),
        ("vp_index", 0),
        ("sversion", 1),
        ("sint2_at_reset", 1 << 16),
        ("crash_control", 1 << 63),
        ("tpr", 0x20),
        ("apic_tpr", 0x20),
        ("self_ipi", 1),
        ("tsc_sequence", 0),
        ("time_runs", 1),
        ("runtime_runs", 1),
    ]


def test_msrs_of_absent_features(qemu: Path, guest: Path) -> None:
    """Without hv-time there is no reference time: the scenario ends at its first use of it."""
    seen = run_guest(qemu, guest, "contact", "qemu64,hv-vpindex,hv-synic", *VMBUS)
    assert seen == [("bad_vp", SUCCESS), ("cannot_read_msr", 0x40000020)]


def test_without_properties(qemu: Path, guest: Path) -> None:
    """TCG as it always was: its own signature, unknown MSRs ignored, no hypercalls."""
    assert run_guest(qemu, guest, "absent", "qemu64") == [
        ("leaf", text_value("TCGT") << 32 | 0x40000001),
        ("leaf", text_value("CGTCGTCG")),
        ("write_id", NO_FAULT),
        ("read_id", NO_FAULT),
        ("id", 0),
        ("read_frequency", NO_FAULT),
        ("frequency", 0),
        ("vmcall", FAULTED_UD),
        ("vmmcall", FAULTED_UD),
    ]


def test_contact_with_missing_vp(run: Run) -> None:
    """A target VP that does not exist gets no answer and does no harm."""
    assert run("contact") == [
        ("bad_vp", SUCCESS),
        ("bad_vp_answer", NO_MESSAGE),
        ("negative_vp", SUCCESS),
        ("negative_vp_answer", NO_MESSAGE),
        ("good_vp", SUCCESS),
        ("good_vp_answer", VERSION_RESPONSE),
    ]


def test_eom(run: Run) -> None:
    """A message waits for its slot, through EOMs that are lies, and comes once it is free."""
    assert run("eom") == [
        ("answer", VERSION_RESPONSE),
        ("pending", 1),
        ("still", VERSION_RESPONSE),
        ("still_pending", 1),
        ("offer", OFFER_CHANNEL),
        ("end_of_offers", ALL_OFFERS_DELIVERED),
        ("nothing_more", NO_MESSAGE),
    ]


def test_message_page_off_while_message_waits(run: Run) -> None:
    """Nobody will free the slot; the bus must not wait for it forever."""
    assert run("page-off") == [
        ("answer", VERSION_RESPONSE),
        ("pending", 1),
        ("contact_again", SUCCESS),
        ("answer_again", VERSION_RESPONSE),
    ]


@pytest.mark.parametrize("scenario", ["reset-msr", "reset-line"])
def test_reset_while_message_waits(run: Run, scenario: str) -> None:
    """Three resets, with a message that waits for EOM and a request that waits for the message.

    All state is as after power on, and the requests of before are forgotten.
    """
    boot = [
        ("os_id_at_boot", 0),
        ("scontrol_at_boot", 0),
        ("simp_at_boot", 0),
        ("sint_at_boot", 1 << 16),
        ("slot_at_boot", 0),
        ("answer", VERSION_RESPONSE),
        ("pending", 1),
    ]
    expected: Report = []
    for number in range(4):
        expected += [("boot", number), *boot]
    assert run(scenario) == [*expected, ("offer", OFFER_CHANNEL)]


def test_interrupts(run: Run) -> None:
    """Masked SINTs, auto-EOI, explicit EOI, SynIC off: messages always come, interrupts as set."""
    auto = [(name, value) for n in (1, 2, 3) for name, value in (("auto", n), ("auto_isr", 0))]
    assert run("auto-eoi") == [
        ("masked_answer", VERSION_RESPONSE),
        ("masked_interrupts", 0),
        *auto,
        # the second one comes after the EOI of the first
        ("manual", 4),
        ("manual_isr", 1),
        ("manual", 4),
        ("manual_isr", 1),
        ("after_eoi", 5),
        ("disabled_answer", VERSION_RESPONSE),
        ("disabled_interrupts", 5),
    ]


def test_timers(run: Run) -> None:
    assert run("timers") == [
        ("enabled", 1),
        ("type", 0x80000010),
        ("size", 24),
        ("index", 0),
        ("expired_on_time", 1),
        ("delivered_after", 1),
        ("enabled_after", 0),
        ("interrupts", 1),
        ("pending", 1),
        ("enabled_pending", 1),
        ("interrupts_pending", 1),
        ("interrupts_released", 2),
        ("pending_again", 1),
        ("type_stopped", 0),
        ("enabled_stopped", 0),
        ("past", 1),
        *[("period", 1), ("period_index", 3)] * 5,
        ("periods", 1),
        ("periods_after", 0),
        ("direct", 1),
        ("direct_paced", 1),
        ("direct_vector_15", GP),
        ("reserved_bits", GP),
        ("enabled_without_sint", 0),
        ("auto_enabled_without_sint", 0),
        ("slot_0", 0),
        ("type_far", 0),
        ("type_far_period", 0),
    ]


def test_a_page_turned_on_amid_accesses_of_another_processor(qemu: Path, guest: Path) -> None:
    """The memory map changes under a processor, which goes on to reach the device that it meant."""
    seen = run_guest(qemu, guest, "map", f"qemu64,{HV}", *VMBUS, "-smp", "2")
    assert seen == [("wrong_reads", 0)]


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        *[
            (f"hv-{name}", f"hv-{name} needs KVM")
            for name in (
                *("frequencies", "reenlightenment", "tlbflush", "tlbflush-ext", "tlbflush-direct"),
                *("ipi", "xmm-input", "evmcs", "emsr-bitmap", "syndbg", "passthrough"),
            )
        ],
        ("-apic,hv-vapic", "hv-vapic and hv-synic require an APIC"),
        ("hv-synic", "hv-synic requires hv-vpindex"),
        ("hv-vpindex,hv-synic,hv-stimer", "hv-stimer requires hv-time"),
        ("hv-time,hv-stimer", "hv-stimer requires hv-synic"),
        ("hv-stimer-direct", "hv-stimer-direct requires hv-stimer"),
    ],
)
def test_refused_properties(qemu: Path, properties: str, message: str) -> None:
    done = run_qemu(qemu_command(qemu, "-cpu", f"qemu64,{properties}"))
    assert done.returncode == 1
    assert message in done.stderr
