/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the bare-metal guest asks of the bus; see requests.h. */
#include "requests.h"

#define INSUFFICIENT_BUFFERS 19u

uint32_t answer[60];
uint32_t relid, connection;

uint64_t post(void)
{
	uint64_t status;

	/* the bus takes 16 messages at a time */
	do
		status = hypercall(CALL_POST_MESSAGE, (uint32_t)&input);
	while (status == INSUFFICIENT_BUFFERS);
	return status;
}

uint32_t take_within(uint64_t ticks)
{
	volatile struct message *slot = &slots[VMBUS_SINT];
	uint64_t end = now() + ticks;

	while (!slot->type)
		if (now() >= end)
			return NO_MESSAGE;
	for (unsigned i = 0; i < 60; i++)
		answer[i] = ((volatile uint32_t *)slot->payload)[i];
	slot->type = 0;
	__sync_synchronize();
	if (slot->flags & 1)
		set_msr(MSR_EOM, 0);
	return answer[0];
}

uint32_t take(void)
{
	return take_within(PATIENCE);
}

void contact_as(uint32_t version, uint32_t vp, uint64_t interrupt_page)
{
	prepare(INITIATE_CONTACT, 40);
	input.payload[2] = version;
	input.payload[3] = vp;
	input.payload[4] = (uint32_t)interrupt_page;
	input.payload[5] = (uint32_t)(interrupt_page >> 32);
	post();
}

void contact_and_offers(uint32_t version, uint64_t interrupt_page)
{
	unsigned offers = 0;
	uint32_t type;

	contact_as(version, 0, interrupt_page);
	report("contact", take());
	report("supported", answer[2] & 0xff);
	prepare(REQUEST_OFFERS, 8);
	post();
	while ((type = take()) == OFFER_CHANNEL) {
		offers++;
		relid = answer[46];
		connection = answer[48];
	}
	report("end_of_offers", type);
	report("offers", offers);
}

void alive(void)
{
	print("alive=1\n");
	contact_and_offers(VERSION_4_0, 0);
}

void start_bus(void)
{
	setup_interrupts();
	enable_hypercalls();
	enable_synic();
	set_msr(MSR_SINT0 + VMBUS_SINT, VMBUS_VECTOR);
}

void header(uint32_t id, uint32_t buflen, uint32_t ranges, uint32_t bytes, uint32_t offset,
	    unsigned pages)
{
	prepare(GPADL_HEADER, 28 + pages * 8);
	input.payload[2] = relid;
	input.payload[3] = id;
	input.payload[4] = buflen | ranges << 16;
	input.payload[5] = bytes;
	input.payload[6] = offset;
	for (unsigned i = 0; i < pages; i++)
		input.payload[7 + 2 * i] = (RING_GPA >> 12) + i;
	post();
}

void body(uint32_t id, unsigned pages)
{
	prepare(GPADL_BODY, 16 + pages * 8);
	input.payload[3] = id;
	for (unsigned i = 0; i < pages; i++)
		input.payload[4 + 2 * i] = (RING_GPA >> 12) + i;
	post();
}

uint32_t create(uint32_t id, unsigned pages)
{
	header(id, 8 + 8 * pages, 1, pages * 4096, 0, pages);
	if (take() != GPADL_CREATED || answer[3] != id)
		return NO_MESSAGE;
	return answer[4];
}

static void post_teardown(uint32_t id)
{
	prepare(GPADL_TEARDOWN, 16);
	input.payload[2] = relid;
	input.payload[3] = id;
	post();
}

uint32_t teardown(uint32_t id)
{
	post_teardown(id);
	return take();
}

uint32_t teardown_unknown(uint32_t id)
{
	post_teardown(id);
	return take_within(SHORT);
}

void post_open(uint32_t gpadl, uint32_t vp, uint32_t ring_offset)
{
	prepare(OPEN_CHANNEL, 148);
	input.payload[2] = relid;
	input.payload[3] = 0x1234;
	input.payload[4] = gpadl;
	input.payload[5] = vp;
	input.payload[6] = ring_offset;
	post();
}

uint32_t open_channel(uint32_t gpadl, uint32_t vp, uint32_t ring_offset)
{
	post_open(gpadl, vp, ring_offset);
	if (take() != OPEN_RESULT)
		return NO_MESSAGE;
	return answer[4] ? 1 : 0;
}

uint32_t close_channel(void)
{
	prepare(CLOSE_CHANNEL, 12);
	input.payload[2] = relid;
	post();
	return take_within(SHORT);
}

void release(uint32_t id)
{
	prepare(RELID_RELEASED, 12);
	input.payload[2] = id;
	post();
}

void host(unsigned what)
{
	report("host", what);
	while (!(in8(COM1 + 5) & 1))
		;
	in8(COM1);
}

void new_device(void)
{
	report("offer", take());
	relid = answer[46];
	connection = answer[48];
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));
}
