/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the bare-metal guest does to QEMU's VMBus, one scenario per run, named by the last word of
 * the command line. Each reports what it sees; the test knows what is right.
 */
#include <stddef.h>

#include "requests.h"

/* GPADL headers that lie about themselves. Each is refused, or answered with a failure. */
static void scenario_headers(void)
{
	static const struct {
		const char *name;
		uint32_t buflen, ranges, bytes, offset;
		unsigned pages;
	} lies[] = {
		{ "no_list", 0, 1, 0xfffff000, 0, 1 },
		{ "short_list", 7, 1, 0xfffff000, 0, 1 },
		{ "empty_list", 8, 1, 0, 0, 1 },
		{ "no_range", 16, 0, 4096, 0, 1 },
		{ "two_ranges", 24, 2, 4096, 0, 1 },
		{ "most_ranges", 0xffff, 0xffff, 0xfffff000, 0, 1 },
		{ "offset", 16, 1, 4096, 1, 1 },
		{ "more_bytes", 16, 1, 8192, 0, 1 },
		{ "fewer_bytes", 24, 1, 4096, 0, 2 },
	};

	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	for (unsigned i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
		header(i + 1, lies[i].buflen, lies[i].ranges, lies[i].bytes, lies[i].offset,
		       lies[i].pages);
		report(lies[i].name, take());
		report("failed", answer[4] != 0);
	}
	report("too_short_for_a_range", (prepare(GPADL_HEADER, 20), post(), take_within(SHORT)));
	/* the same ids are free */
	report("good", create(1, 4));
	alive();
}

/* More pages than announced, bodies without a header, a list in many parts. */
static void scenario_bodies(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 2));
	body(1, 3);
	report("after_end", take_within(SHORT));
	body(7, 3);
	report("without_header", take_within(SHORT));

	header(2, 8 + 8 * 5, 1, 5 * 4096, 0, 2);
	report("incomplete", take_within(SHORT));
	body(2, 26);
	report("completed_by_too_many", take());
	report("status", answer[4]);
	body(2, 26);
	report("after_completion", take_within(SHORT));

	/* all that 16 bits can announce: 8190 pages */
	header(3, 8 + 8 * 8190, 1, 8190 * 4096, 0, 2);
	for (unsigned left = 8188; left; left -= left < 26 ? left : 26)
		body(3, left < 26 ? left : 26);
	report("longest", take());
	body(3, 1);

	/* queued together: torn down before it is complete, and continued */
	header(4, 8 + 8 * 5, 1, 5 * 4096, 0, 2);
	prepare(GPADL_TEARDOWN, 16);
	input.payload[3] = 4;
	post();
	body(4, 3);
	report("incomplete_torn_down", take());
	report("continued", take_within(SHORT));
	alive();
}

static void scenario_flood(void)
{
	unsigned created = 0, id = 1;

	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	for (; id <= 3000; id++)
		if (!create(id, 1))
			created++;
	report("created", created);
	report("one_gone", teardown(1));
	report("one_more", create(9000, 1));
	report("no_more", create(9001, 1) != 0);
	alive();
	report("again", create(1, 1));
}

static void scenario_teardown(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("unknown", teardown_unknown(5));
	report("good", create(5, 8));
	report("same_id", (header(5, 16, 1, 4096, 0, 1), take_within(SHORT)));
	report("open", open_channel(5, 0, 4));
	/* closes the channel, so that all is as before */
	report("in_use", teardown(5));
	report("twice", teardown_unknown(5));
	report("gone", open_channel(5, 0, 4));
	report("close_after", close_channel());
	report("same_id_again", create(5, 8));
	report("open_again", open_channel(5, 0, 4));
	report("close", close_channel());
	report("close_twice", close_channel());
	report("end", teardown(5));
	alive();
}

static void scenario_open(void)
{
	start_bus();
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 8));
	report("no_such_gpadl", open_channel(2, 0, 4));
	report("no_such_vp", open_channel(1, 1000, 4));
	report("vp_minus_1", open_channel(1, NO_VP, 4));
	report("offset_0", open_channel(1, 0, 0));
	report("offset_1", open_channel(1, 0, 1));
	report("offset_7", open_channel(1, 0, 7));
	report("offset_8", open_channel(1, 0, 8));
	report("offset_minus_1", open_channel(1, 0, 0xffffffff));
	report("offset_minus_2", open_channel(1, 0, 0xfffffffe));
	report("close_closed", close_channel());
	/* opened, opened again, closed while the answer is under way, opened */
	post_open(1, 0, 4);
	post_open(1, 0, 4);
	prepare(CLOSE_CHANNEL, 12);
	input.payload[2] = relid;
	post();
	post_open(1, 0, 4);
	report("open", take());
	report("status", answer[4]);
	report("open_after_close", take());
	report("status", answer[4]);
	relid = 77;
	report("no_such_channel", open_channel(1, 0, 4));
	report("close_no_such_channel", close_channel());
	hypercall(CALL_SIGNAL_EVENT | CALL_FAST, connection);
	alive();
	/* the contact has closed it */
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));
	contact_as(VERSION_4_0, 0, 0);
	report("contact_while_open", take());
	alive();
}

static void scenario_unload(void)
{
	start_bus();
	prepare(UNLOAD, 8);
	post();
	report("before_contact", take_within(SHORT));
	prepare(REQUEST_OFFERS, 8);
	post();
	report("offers_before_contact", take_within(SHORT));
	contact_as(VERSION_4_0, NO_VP, 0);
	report("contact_of_nobody", take_within(SHORT));
	prepare(UNLOAD, 8);
	post();
	report("unload_of_nobody", take_within(SHORT));
	contact_and_offers(VERSION_4_0, 0);
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));
	/* with a message behind it that nobody may process as if the bus were there */
	prepare(UNLOAD, 8);
	post();
	report("unload", take());
	prepare(UNLOAD, 8);
	post();
	report("unload_again", take_within(SHORT));
	prepare(RELID_RELEASED, 12);
	post();
	report("released", take_within(SHORT));
	alive();
}

/* The protocol before events had their own flags: a page with a bit per channel. */
static void scenario_interrupt_page(void)
{
	static const uint64_t pages[] = { 0x00c00000, 0x00c00801, NOWHERE, 0xfee00000, 0xb8000,
					  ~0xfffull, ~0ull };

	start_bus();
	for (unsigned i = 0; i < sizeof(pages) / sizeof(pages[0]); i++) {
		contact_and_offers(VERSION_1_1, pages[i]);
		report("good", create(1, 8));
		report("open", open_channel(1, 0, 4));
		*(volatile uint32_t *)(0x00c00800) = 0xffffffff;
		hypercall(CALL_SIGNAL_EVENT | CALL_FAST, SIGNAL_CONNECTION);
		report("nothing", take_within(SHORT));
	}
	alive();
}

/* The page for messages goes away and comes back, with messages in the queue. */
static void scenario_undeliverable(void)
{
	start_bus();
	contact_as(VERSION_4_0, 0, 0);
	report("contact", take());
	set_msr(MSR_SIMP, 0);
	for (unsigned i = 0; i < 8; i++) {
		prepare(REQUEST_OFFERS, 8);
		post();
	}
	idle(SHORT);
	set_msr(MSR_SIMP, SIMP_GPA | 1);
	contact_as(VERSION_4_0, 0, 0);
	while (take() != VERSION_RESPONSE)
		;
	while (take_within(SHORT) != NO_MESSAGE)
		;
	alive();
}

/* The host wants to unplug the device. */
static void rescinded(void)
{
	report("rescind", take());
	report("is_it", answer[0] == RESCIND_OFFER && answer[2] == relid);
}

/* Devices that come and go. */
static void offers(uint32_t version, uint64_t interrupt_page)
{
	start_bus();
	/* a guest that knows nothing of it yet */
	host(HOST_UNPLUGS_AND_PLUGS);
	contact_and_offers(version, interrupt_page);
	report("good", create(1, 8));
	report("open", open_channel(1, 0, 4));

	/* a guest that goes on as if nothing had happened */
	host(HOST_UNPLUGS);
	rescinded();
	report("gpadl_refused", create(2, 4) != 0);
	report("same_id_refused", (header(1, 16, 1, 4096, 0, 1), take_within(SHORT)));
	report("open_again", (post_open(1, 0, 4), take_within(SHORT)));
	report("close", close_channel());
	report("teardown", teardown(1));
	report("teardown_again", teardown_unknown(1));
	prepare(REQUEST_OFFERS, 8);
	post();
	report("no_offer", take());
	release(relid + 1);
	release(0);
	release(0xffffffff);
	prepare(RELID_RELEASED, 8);
	post();
	report("not_released", take_within(SHORT));
	host(HOST_SEES_DEVICE);
	release(relid);
	release(relid);
	host(HOST_PLUGS);
	new_device();

	/* a guest that released what it has open: it is not asked again */
	release(relid);
	report("released", take_within(SHORT));
	host(HOST_UNPLUGS_AND_PLUGS);
	new_device();

	/* a guest that leaves the bus, and does not release anything */
	host(HOST_UNPLUGS);
	rescinded();
	contact_and_offers(version, interrupt_page);
	host(HOST_PLUGS);
	new_device();
	host(HOST_UNPLUGS);
	rescinded();
	prepare(UNLOAD, 8);
	post();
	report("unload", take());
	host(HOST_SEES_NO_DEVICE);
	contact_and_offers(version, interrupt_page);
}

static void scenario_offers(void)
{
	offers(VERSION_4_0, 0);
}

static void scenario_offers_1_1(void)
{
	offers(VERSION_1_1, SIMP_GPA + 0x1000);
}

const struct scenario scenarios[] = {
	{ "headers", scenario_headers },
	{ "bodies", scenario_bodies },
	{ "flood", scenario_flood },
	{ "teardown", scenario_teardown },
	{ "open", scenario_open },
	{ "unload", scenario_unload },
	{ "interrupt-page", scenario_interrupt_page },
	{ "undeliverable", scenario_undeliverable },
	{ "offers", scenario_offers },
	{ "offers-1.1", scenario_offers_1_1 },
	{ "versions", scenario_versions },
	{ "old-signal", scenario_old_signal },
	{ "stalled", scenario_stalled },
	{ "life", scenario_life },
	{ "reoffer", scenario_reoffer },
	{ "plugged", scenario_plugged },
	{ "acpi", scenario_acpi },
	{ "eject", scenario_eject },
	{ "eject-bus", scenario_eject_bus },
	{ "signal-close", scenario_signal_close },
	{ "one-at-a-time", scenario_one_at_a_time },
	{ NULL, NULL },
};
