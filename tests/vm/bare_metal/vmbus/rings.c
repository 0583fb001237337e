/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the bare-metal guest sends through a ring, and the answers that it waits for. Layouts are
 * those of Linux' include/linux/hyperv.h.
 */
#include "requests.h"

#define RING_PAGES 4u /* each way, the header's included */
#define RING_BYTES ((RING_PAGES - 1) * 4096u)
#define IN_BAND 6u
#define COMPLETION_WANTED 1u
#define PACKET_WORDS 22u /* descriptor, 64 bytes that the SCSI controller expects, trailer */
#define BEGIN_INITIALIZATION 7u
#define ROUNDS 50000u
#define LOOKS 1024u  /* between two at the clock */
#define DELAYS 8192u /* turns of a loop, before a packet: to meet the host at whatever it does */

struct ring {
	volatile uint32_t write_index, read_index, interrupt_mask, reserved[1021];
	volatile uint32_t data[RING_BYTES / 4];
};

static struct ring *const out = (void *)RING_GPA;
static struct ring *const in = (void *)(RING_GPA + RING_PAGES * 4096u);

/* Signals only a host that does not look at the ring by itself, as every driver does. */
static void send(const uint32_t packet[PACKET_WORDS])
{
	uint32_t old = out->write_index, at = old;

	for (unsigned i = 0; i < PACKET_WORDS; i++) {
		out->data[at / 4] = packet[i];
		at = (at + 4) % RING_BYTES;
	}
	__asm__ volatile("" ::: "memory");
	out->write_index = at;
	__asm__ volatile("lock; addl $0, (%%esp)" ::: "memory", "cc");
	if (!out->interrupt_mask && out->read_index == old)
		hypercall(CALL_SIGNAL_EVENT | CALL_FAST, connection);
}

static bool answered(void)
{
	uint64_t end = now() + PATIENCE;

	for (unsigned look = 1; in->read_index == in->write_index; look++)
		if (!(look % LOOKS) && now() >= end)
			return false;
	in->read_index = in->write_index;
	return true;
}

/* The only processor asks, looks at the ring until the answer is there, and asks again. */
void scenario_one_at_a_time(void)
{
	uint32_t packet[PACKET_WORDS] = { IN_BAND | 2u << 16,
					  (PACKET_WORDS / 2 - 1) | COMPLETION_WANTED << 16 };
	unsigned round = 0;

	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 2 * RING_PAGES));
	report("open", open_channel(1, 0, RING_PAGES));
	in->interrupt_mask = 1;
	packet[4] = BEGIN_INITIALIZATION;
	do {
		for (volatile unsigned turn = round * 37 % DELAYS; turn; turn--)
			;
		packet[2] = round;
		packet[PACKET_WORDS - 1] = out->write_index;
		send(packet);
	} while (answered() && ++round < ROUNDS);
	report("answered", round);
}
