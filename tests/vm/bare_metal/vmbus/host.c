/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the bare-metal guest sees of the bus: versions, signals, a host that is slow or changes. */
#include "requests.h"

#define INTERRUPT_PAGE 0x00c00000u
#define PACKET_IN_BAND 6u
#define COMPLETION_REQUESTED 1u
#define SCSI_BEGIN_INITIALIZATION 7u

static volatile uint32_t *const event_flags = (void *)(SIEFP_GPA + 256 * VMBUS_SINT);

/* Versions of the protocol that there are, and numbers that are none. */
void scenario_versions(void)
{
	static const uint32_t versions[] = { 0x0000d, 0x10001, 0x20004, 0x30000, 0x40000 };
	static const uint32_t others[] = { 0, 1, 0x0000e, 0x10000, 0x10002, 0x20003, 0x30001,
					   0x3ffff, 0x40001, 0x50003, 0xffffffff };

	start_bus();
	for (unsigned i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
		contact_as(versions[i], 0, INTERRUPT_PAGE);
		report("contact", take());
		report("supported", answer[2] & 0xff);
	}
	for (unsigned i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		contact_as(others[i], 0, INTERRUPT_PAGE);
		report("contact", take());
		report("supported", answer[2] & 0xff);
	}
	alive();
}

/* One packet for the SCSI controller, behind @sent others of the same size. */
static void send_packet(unsigned sent)
{
	volatile uint32_t *control = (void *)RING_GPA;
	volatile uint32_t *packet = (void *)(RING_GPA + 4096 + sent * 88);

	packet[0] = PACKET_IN_BAND | 2u << 16; /* the descriptor is 2 times 8 bytes long */
	packet[1] = 10u | COMPLETION_REQUESTED << 16;
	packet[2] = sent + 1;
	packet[4] = SCSI_BEGIN_INITIALIZATION;
	packet[5] = 1;
	__sync_synchronize();
	control[0] = (sent + 1) * 88;
}

static bool set_within(volatile uint32_t *word, uint32_t bits)
{
	uint64_t end = now() + PATIENCE;

	while (!(*word & bits))
		if (now() >= end)
			return false;
	return true;
}

/*
 * Before VMBus 2.4 the host sets a bit for the channel in a page, and event flag 0 of the SINT
 * for all channels.
 */
void scenario_old_signal(void)
{
	volatile uint32_t *incoming = (void *)(RING_GPA + 4 * 4096);
	volatile uint32_t *received = (void *)INTERRUPT_PAGE;
	volatile uint32_t *sent = (void *)(INTERRUPT_PAGE + 2048);
	unsigned before;

	start_bus();
	contact_and_offers(VERSION_1_1, INTERRUPT_PAGE);
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));
	for (unsigned i = 0; i < 2; i++) {
		idle(MILLISECOND);
		/* all completions are taken, or the host would see no need to signal */
		incoming[1] = incoming[0];
		before = interrupts[VMBUS_VECTOR];
		event_flags[0] = 0;
		received[0] = 0;
		send_packet(i);
		__sync_fetch_and_or(&sent[0], 1u << relid);
		hypercall(CALL_SIGNAL_EVENT | CALL_FAST, SIGNAL_CONNECTION);
		report("page_bit", set_within(&received[0], 1u << relid));
		report("flag_0", set_within(&event_flags[0], 1));
		idle(10 * MILLISECOND);
		report("interrupted", interrupts[VMBUS_VECTOR] != before);
	}
	alive();
}

/* The back end does not answer, and a message is posted meanwhile: the host looks for this word. */
void scenario_stalled(void)
{
	volatile uint32_t *posted = (void *)INTERRUPT_PAGE;

	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	idle(MILLISECOND); /* an interrupt that waits would have QEMU take a lock all the time */
	host(HOST_STOPS_BACK_END);
	header(1, 8 + 8 * 8, 1, 8 * 4096, 0, 8);
	idle(SHORT);
	prepare(GPADL_TEARDOWN, 16);
	input.payload[2] = relid;
	input.payload[3] = 1;
	*posted = 1;
	post();
	*posted = 2;
	report("created", take());
	report("status", answer[4]);
	report("torn_down", take());
	alive();
}

/* All that a back end is asked for in a channel's life; it may stop to answer anywhere. */
void scenario_life(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));
	host(HOST_LOOKS);
	report("close", close_channel());
	report("teardown", teardown(1));
	alive();
}

/* Several channels are rescinded and offered anew; the guest releases the subchannels first. */
void scenario_reoffer(void)
{
	uint32_t ids[3];

	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	host(HOST_OFFERS_ANEW);
	for (unsigned i = 0; i < 3; i++) {
		report("rescind", take());
		ids[i] = answer[2];
	}
	release(ids[0]);
	release(ids[1]);
	report("before_primary", take_within(SHORT));
	release(ids[2]);
	for (unsigned i = 0; i < 3; i++) {
		report("offer", take());
		report("index", answer[45] & 0xffff); /* sub_channel_index */
	}
	report("nothing_more", take_within(SHORT));
	alive();
}

/* The device comes after the guest has asked for offers. */
void scenario_plugged(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	host(HOST_PLUGS);
	new_device();
	alive();
}

static const uint8_t *find(const uint8_t *from, const uint8_t *end, const char *text, unsigned size)
{
	for (; from + size <= end; from++) {
		unsigned i = 0;

		while (i < size && from[i] == (uint8_t)text[i])
			i++;
		if (i == size)
			return from;
	}
	return end;
}

/*
 * The bus in ACPI's DSDT, and a floppy controller; the layouts are those of the ACPI specification
 * 6.5, 5.2 and 6.4.3.5.
 */
void scenario_acpi(void)
{
	const uint8_t *root = find((void *)0xe0000, (void *)0x100000, "RSD PTR ", 8);
	const uint32_t *rsdt = *(const uint32_t **)(root + 16);
	const uint8_t *dsdt = 0, *end, *parent, *bus, *window;
	uint64_t base = 0, last = 0, size = 0;

	for (unsigned i = 9; i < rsdt[1] / 4; i++)
		if (*(const uint32_t *)rsdt[i] == 0x50434146) /* "FACP" */
			dsdt = ((const uint8_t *const *)rsdt[i])[10];
	end = dsdt + ((const uint32_t *)dsdt)[1];
	parent = find(dsdt, end, "VMOD", 4);
	bus = find(dsdt, end, "VMBS", 4);
	report("parent", parent < bus);
	report("bus", bus < end);
	/* a QWord address space descriptor for memory */
	window = find(parent, bus, "\x8a\x2b\x00\x00", 4);
	if (window < bus) {
		base = *(const uint64_t *)(window + 14);
		last = *(const uint64_t *)(window + 22);
		size = *(const uint64_t *)(window + 38);
	}
	report("above_4_GiB", base >> 32 != 0);
	report("megabytes", size >> 20);
	report("whole", last - base + 1 == size);
	report("floppy", find(dsdt, end, "\x41\xd0\x07\x00", 4) < end); /* PNP0700 */
}
