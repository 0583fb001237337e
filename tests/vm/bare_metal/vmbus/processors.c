/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the bare-metal guest does to the bus with a second processor. */
#include "requests.h"

/*
 * QEMU's registers for plugging processors (docs/specs/acpi_cpu_hotplug of QEMU), which the
 * guest's ACPI code uses; nobody asks the host.
 */
#define CPU_SELECTOR 0xaf00
#define CPU_CONTROL 0xaf04
#define CPU_EJECT 8u

#define SECOND_SIMP_GPA 0x00a02000u
#define SECOND_PATIENCE (30000ull * MILLISECOND)

static volatile uint32_t told, done;
static volatile uint64_t sint_at_start;

static void eject_second(void)
{
	out8(CPU_SELECTOR, 0); /* the first write leaves the legacy interface */
	out32(CPU_SELECTOR, 1);
	out8(CPU_CONTROL, CPU_EJECT);
}

static bool wait_for(volatile uint32_t *what)
{
	uint64_t end = now() + SECOND_PATIENCE;

	while (!*what)
		if (now() >= end)
			return false;
	return true;
}

static void look_at_sint(void)
{
	sint_at_start = second_get_msr(MSR_SINT0 + VMBUS_SINT);
	done = 1;
}

/* A channel's interrupts go to a processor that is ejected, plugged in, and used again. */
void scenario_eject(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 8));
	report("open", open_channel(1, 1, 4));
	eject_second();
	hypercall(CALL_SIGNAL_EVENT | CALL_FAST, connection);
	report("open_nowhere", (close_channel(), open_channel(1, 1, 4)));
	report("open_here", open_channel(1, 0, 4));
	report("close", close_channel());
	host(HOST_PLUGS_PROCESSOR);
	start_second(look_at_sint);
	report("started", wait_for(&done));
	report("sint_at_start", sint_at_start);
	report("open_there", open_channel(1, 1, 4));
	eject_second();
	alive();
}

static void enable_messages(void)
{
	second_set_msr(MSR_SIMP, SECOND_SIMP_GPA | 1);
	second_set_msr(MSR_SCONTROL, 1);
	done = 1;
}

/* The bus's messages go to a processor that is ejected while one waits for its slot. */
void scenario_eject_bus(void)
{
	volatile struct message *slot = (struct message *)SECOND_SIMP_GPA + VMBUS_SINT;
	uint64_t end;

	start_bus();
	start_second(enable_messages);
	report("started", wait_for(&done));
	contact_as(VERSION_4_0, 1, 0);
	for (end = now() + SECOND_PATIENCE; !slot->type && now() < end;)
		;
	report("contact", (uint32_t)slot->payload[0]);
	prepare(REQUEST_OFFERS, 8);
	post();
	for (end = now() + SECOND_PATIENCE; !(slot->flags & 1) && now() < end;)
		;
	report("pending", slot->flags & 1);
	eject_second();
	alive();
}

static void signal_once(void)
{
	told = 1;
	second_hypercall(CALL_SIGNAL_EVENT | CALL_FAST, connection);
	done = 1;
}

/* One processor signals a channel, which the other one closes meanwhile. */
void scenario_signal_close(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));
	start_second(signal_once);
	report("told", wait_for(&told));
	idle(10 * MILLISECOND);
	report("close", close_channel());
	report("done", wait_for(&done));
	report("open_again", open_channel(1, 0, 4));
	alive();
}
