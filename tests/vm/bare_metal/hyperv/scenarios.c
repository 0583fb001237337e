/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the bare-metal guest does to QEMU's Hyper-V emulation, one scenario per run, named by the
 * last word of the command line. Each reports what it sees; the test knows what is right.
 */
#include <stddef.h>

#include "synic.h"

static uint64_t post(void)
{
	return hypercall(CALL_POST_MESSAGE, (uint32_t)&input);
}

static uint64_t contact(uint32_t vp)
{
	prepare(INITIATE_CONTACT, 40);
	input.payload[2] = VERSION_4_0;
	input.payload[3] = vp;
	return post();
}

static uint64_t request_offers(void)
{
	prepare(REQUEST_OFFERS, 8);
	return post();
}

/* The VMBus message in the slot, without taking it; NO_MESSAGE if none comes. */
static uint32_t peek(uint64_t ticks)
{
	if (!message_in(VMBUS_SINT, ticks))
		return NO_MESSAGE;
	return (uint32_t)slots[VMBUS_SINT].payload[0];
}

static uint32_t take(void)
{
	uint32_t type = peek(PATIENCE);

	if (type != NO_MESSAGE)
		release(VMBUS_SINT);
	return type;
}

static void scenario_cpuid(void)
{
	static const char *const names[6] = { "vendor", "interface", "version", "features",
					      "hints", "limits" };
	uint32_t regs[4];

	cpuid(1, regs);
	report("hypervisor", regs[2] >> 31);
	for (unsigned i = 0; i < 6; i++) {
		cpuid(0x40000000u + i, regs);
		report(names[i], (uint64_t)regs[1] << 32 | regs[0]);
		report(names[i], (uint64_t)regs[3] << 32 | regs[2]);
	}
}

static void scenario_hypercalls(void)
{
	setup_interrupts();
	report("vmcall_before_id", vmcall(CALL_POST_MESSAGE, 0));
	set_msr(MSR_HYPERCALL, (uint32_t)hypercall_page | 1);
	report("page_before_id", get_msr(MSR_HYPERCALL) & 1);
	enable_hypercalls();
	report("page_after_id", get_msr(MSR_HYPERCALL) & 1);
	report("vmcall", vmcall(0x7777, 0));
	report("vmmcall", vmmcall(0x7777, 0));
	report("unknown_code", hypercall(0x7777, 0));
	report("long_spin_wait", hypercall(8, 100));

	prepare(REQUEST_OFFERS, 8);
	report("post_fast", hypercall(CALL_POST_MESSAGE | CALL_FAST, 0));
	report("post_misaligned", hypercall(CALL_POST_MESSAGE, (uint32_t)&input + 2));
	report("post_nowhere", hypercall(CALL_POST_MESSAGE, NOWHERE));
	report("post_far_away", hypercall(CALL_POST_MESSAGE, 0xfffffffffffffff8ull));
	report("post_reserved", hypercall(CALL_POST_MESSAGE | 1u << 28, (uint32_t)&input));
	report("post_reps", hypercall(CALL_POST_MESSAGE | 1ull << 32, (uint32_t)&input));
	report("post_header", hypercall(CALL_POST_MESSAGE | 1u << 17, (uint32_t)&input));
	input.size = 241;
	report("post_too_long", post());
	input.size = 0xffffffff;
	report("post_huge", post());
	input.size = 4;
	report("post_too_short", post());
	prepare(REQUEST_OFFERS, 8);
	input.type = 2;
	report("post_wrong_type", post());
	prepare(0x1000, 8);
	report("post_unknown_vmbus_message", post());
	prepare(REQUEST_OFFERS, 8);
	input.connection = 0x123456;
	report("post_no_connection", post());
	input.connection = 0xff000000 | VMBUS_CONNECTION;
	report("post_connection_high_bits", post());

	report("signal_no_connection", hypercall(CALL_SIGNAL_EVENT | CALL_FAST, 0x123456));
	report("signal_reserved", hypercall(CALL_SIGNAL_EVENT | CALL_FAST, 0x1000001));
	report("signal_flag_1", hypercall(CALL_SIGNAL_EVENT | CALL_FAST, 1ull << 32 | 0x10001));
	report("signal_flag_limit",
	       hypercall(CALL_SIGNAL_EVENT | CALL_FAST, 0x800ull << 32 | 0x10001));
	report("signal_flag_max",
	       hypercall(CALL_SIGNAL_EVENT | CALL_FAST, 0xffffull << 32 | 0x10001));
	report("signal_misaligned", hypercall(CALL_SIGNAL_EVENT, (uint32_t)&input + 1));
	*(uint64_t *)&input = 0x123456;
	report("signal_slow_no_connection", hypercall(CALL_SIGNAL_EVENT, (uint32_t)&input));
	report("signal_nowhere", hypercall(CALL_SIGNAL_EVENT, NOWHERE));

	set_msr(MSR_GUEST_OS_ID, 0);
	report("page_without_id", get_msr(MSR_HYPERCALL) & 1);
	report("call_without_id", hypercall(0x7777, 0));
}

static void scenario_msrs(void)
{
	uint64_t value, earlier;

	setup_interrupts();
	report_fault("read_frequency", read_msr(MSR_TSC_FREQUENCY, &value));
	report_fault("read_unknown", read_msr(0x400001ff, &value));
	report_fault("write_unknown", write_msr(0x400001ff, 0));
	report_fault("write_vp_index", write_msr(MSR_VP_INDEX, 0));
	report_fault("write_time", write_msr(MSR_TIME_REF_COUNT, 0));
	report_fault("write_version", write_msr(MSR_SVERSION, 1));
	report_fault("read_eoi", read_msr(MSR_EOI, &value));
	report_fault("assist_page", write_msr(MSR_VP_ASSIST_PAGE, 0));
	report_fault("assist_nowhere", write_msr(MSR_VP_ASSIST_PAGE, NOWHERE | 1));
	report_fault("hypercall_nowhere_without_id", write_msr(MSR_HYPERCALL, NOWHERE | 1));
	set_msr(MSR_GUEST_OS_ID, 1);
	report_fault("hypercall_nowhere", write_msr(MSR_HYPERCALL, NOWHERE | 1));
	report_fault("simp_far_away", write_msr(MSR_SIMP, 0xfffffffffffff001ull));
	report_fault("siefp_far_away", write_msr(MSR_SIEFP, 0xfffffffffffff001ull));
	report_fault("sint_vector_15", write_msr(MSR_SINT0, 15));
	report_fault("sint_vector_16", write_msr(MSR_SINT0, 16));
	report_fault("sint_masked_0", write_msr(MSR_SINT0, SINT_MASKED));

	report("vp_index", get_msr(MSR_VP_INDEX));
	report("sversion", get_msr(MSR_SVERSION));
	report("sint2_at_reset", get_msr(MSR_SINT0 + 2));
	report("crash_control", get_msr(MSR_CRASH_CTL));

	set_msr(MSR_TPR, 0x20);
	report("tpr", get_msr(MSR_TPR));
	report("apic_tpr", *(volatile uint32_t *)0xfee00080);
	set_msr(MSR_TPR, 0);

	/* a fixed interrupt to itself: shorthand 1 in the low half */
	set_msr(MSR_ICR, 0x40000ull | VMBUS_VECTOR);
	idle(MILLISECOND);
	report("self_ipi", interrupts[VMBUS_VECTOR]);

	*(uint32_t *)&input = 0xaaaaaaaa;
	set_msr(MSR_REFERENCE_TSC, (uint32_t)&input | 1);
	report("tsc_sequence", *(volatile uint32_t *)&input);
	earlier = now();
	idle(MILLISECOND);
	report("time_runs", now() - earlier >= MILLISECOND);
	report("runtime_runs", get_msr(MSR_VP_RUNTIME) > 0);
}

/* A machine without hv-* properties. */
static void scenario_absent(void)
{
	uint32_t regs[4];
	uint64_t value = 1;

	setup_interrupts();
	cpuid(0x40000000u, regs);
	report("leaf", (uint64_t)regs[1] << 32 | regs[0]);
	report("leaf", (uint64_t)regs[3] << 32 | regs[2]);
	report_fault("write_id", write_msr(MSR_GUEST_OS_ID, 1));
	report_fault("read_id", read_msr(MSR_GUEST_OS_ID, &value));
	report("id", value);
	report_fault("read_frequency", read_msr(MSR_TSC_FREQUENCY, &value));
	report("frequency", value);
	report("vmcall", vmcall(0x7777, 0));
	report("vmmcall", vmmcall(0x7777, 0));
}

static void scenario_contact(void)
{
	enable_all();
	report("bad_vp", contact(0x1234));
	report("bad_vp_answer", peek(50 * MILLISECOND));
	report("negative_vp", contact(0xffffffff));
	report("negative_vp_answer", peek(50 * MILLISECOND));
	report("good_vp", contact(0));
	report("good_vp_answer", take());
}

static void scenario_eom(void)
{
	enable_all();
	set_msr(MSR_EOM, 0); /* nothing waits */
	contact(0);
	report("answer", peek(PATIENCE));
	/* the offer cannot get into the slot */
	request_offers();
	report("pending", pending_in(VMBUS_SINT, PATIENCE));
	set_msr(MSR_EOM, 0); /* a lie: the slot is not free */
	set_msr(MSR_EOM, 0);
	report("still", peek(PATIENCE));
	report("still_pending", pending_in(VMBUS_SINT, PATIENCE));
	release(VMBUS_SINT);
	report("offer", take());
	report("end_of_offers", take());
	report("nothing_more", peek(20 * MILLISECOND));
}

/* The page goes away while a message waits for its slot. */
static void scenario_page_off(void)
{
	uint32_t answer;

	enable_all();
	contact(0);
	report("answer", peek(PATIENCE));
	request_offers();
	report("pending", pending_in(VMBUS_SINT, PATIENCE));
	set_msr(MSR_SIMP, 0);
	idle(50 * MILLISECOND);
	set_msr(MSR_SIMP, SIMP_GPA | 1);
	/* and no EOM: a new kernel knows nothing of what the old one left in the page */
	slots[VMBUS_SINT].type = 0;
	slots[VMBUS_SINT].flags = 0;
	report("contact_again", contact(0));
	/* on a slow machine the offer may have found the page on again */
	do
		answer = take();
	while (answer == OFFER_CHANNEL || answer == ALL_OFFERS_DELIVERED);
	report("answer_again", answer);
}

/* Reset while a message waits for EOM, and a request waits for that. The real-time clock's memory survives and counts boots. */
static void scenario_reset(bool by_msr)
{
	uint8_t boots;

	out8(0x70, 0x72);
	boots = in8(0x71);
	out8(0x70, 0x72);
	out8(0x71, (uint8_t)(boots + 1));
	report("boot", boots);

	setup_interrupts();
	report("os_id_at_boot", get_msr(MSR_GUEST_OS_ID));
	report("scontrol_at_boot", get_msr(MSR_SCONTROL));
	report("simp_at_boot", get_msr(MSR_SIMP));
	report("sint_at_boot", get_msr(MSR_SINT0 + VMBUS_SINT));
	enable_hypercalls();
	enable_synic();
	report("slot_at_boot", slots[VMBUS_SINT].type);
	set_msr(MSR_SINT0 + VMBUS_SINT, VMBUS_VECTOR | SINT_AUTO_EOI);
	contact(0);
	report("answer", peek(PATIENCE));
	request_offers();
	report("pending", pending_in(VMBUS_SINT, PATIENCE));
	request_offers(); /* stays in the bus's queue */
	if (boots < 3) {
		if (by_msr)
			set_msr(MSR_RESET, 1);
		else
			out8(0x64, 0xfe); /* the keyboard controller pulls the reset line */
		for (;;)
			;
	}
	release(VMBUS_SINT);
	report("offer", take());
}

static void scenario_reset_msr(void)
{
	scenario_reset(true);
}

static void scenario_reset_line(void)
{
	scenario_reset(false);
}

static uint32_t in_service(unsigned vector)
{
	return *(volatile uint32_t *)(0xfee00100 + vector / 32 * 16) >> vector % 32 & 1;
}

static void scenario_auto_eoi(void)
{
	eoi_in_handler = false;
	enable_all();
	set_msr(MSR_SINT0 + VMBUS_SINT, VMBUS_VECTOR | SINT_MASKED);
	contact(0);
	report("masked_answer", peek(PATIENCE));
	idle(MILLISECOND);
	report("masked_interrupts", interrupts[VMBUS_VECTOR]);
	release(VMBUS_SINT);

	set_msr(MSR_SINT0 + VMBUS_SINT, VMBUS_VECTOR | SINT_AUTO_EOI);
	for (unsigned i = 1; i <= 3; i++) {
		contact(0);
		peek(PATIENCE);
		idle(MILLISECOND);
		report("auto", interrupts[VMBUS_VECTOR]);
		report("auto_isr", in_service(VMBUS_VECTOR));
		release(VMBUS_SINT);
	}

	set_msr(MSR_SINT0 + VMBUS_SINT, VMBUS_VECTOR);
	for (unsigned i = 1; i <= 2; i++) {
		contact(0);
		peek(PATIENCE);
		idle(MILLISECOND);
		report("manual", interrupts[VMBUS_VECTOR]);
		report("manual_isr", in_service(VMBUS_VECTOR));
		release(VMBUS_SINT);
	}
	set_msr(MSR_EOI, 0);
	idle(MILLISECOND);
	report("after_eoi", interrupts[VMBUS_VECTOR]);

	set_msr(MSR_EOI, 0);
	set_msr(MSR_SCONTROL, 0);
	contact(0);
	report("disabled_answer", peek(PATIENCE));
	idle(MILLISECOND);
	report("disabled_interrupts", interrupts[VMBUS_VECTOR]);
}

/* The capabilities of the HPET, high half: how long a tick is, which never changes. */
#define HPET_PERIOD ((volatile uint32_t *)0xfed00004)
#define MAP_CHANGES 12000u

static volatile uint32_t reads, wrong_reads;
static volatile bool map_is_done, second_is_done;

/* One block of code reads several times, so that the map changes between two of them. */
static void read_hpet(void)
{
	uint32_t period = *HPET_PERIOD;

	while (!map_is_done) {
		uint32_t a = *HPET_PERIOD, b = *HPET_PERIOD, c = *HPET_PERIOD, d = *HPET_PERIOD;

		wrong_reads += (a != period) + (b != period) + (c != period) + (d != period);
		reads++;
	}
	second_is_done = true;
}

/* One processor turns its message page on and off, while the other one reads a device. */
static void scenario_map(void)
{
	enable_all();
	start_second(read_hpet);
	while (!reads)
		;
	for (unsigned i = 0; i < MAP_CHANGES; i++)
		set_msr(MSR_SIMP, SIMP_GPA | (i & 1));
	map_is_done = true;
	while (!second_is_done)
		;
	report("wrong_reads", wrong_reads);
}

const struct scenario scenarios[] = {
	{ "cpuid", scenario_cpuid },
	{ "hypercalls", scenario_hypercalls },
	{ "msrs", scenario_msrs },
	{ "absent", scenario_absent },
	{ "contact", scenario_contact },
	{ "eom", scenario_eom },
	{ "page-off", scenario_page_off },
	{ "reset-msr", scenario_reset_msr },
	{ "reset-line", scenario_reset_line },
	{ "auto-eoi", scenario_auto_eoi },
	{ "timers", scenario_timers },
	{ "map", scenario_map },
	{ NULL, NULL },
};
