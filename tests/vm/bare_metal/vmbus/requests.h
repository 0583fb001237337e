/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the bare-metal guest asks of the bus, rightly or wrongly, and what it is answered.
 * Layouts are those of Linux' include/linux/hyperv.h.
 */
#ifndef REQUESTS_H
#define REQUESTS_H

#include "bus.h"

#define RING_GPA 0x00b00000u
#define PATIENCE (15000 * MILLISECOND)
#define SHORT (50 * MILLISECOND)
#define NO_VP 0xffffffffu
#define SIGNAL_CONNECTION 2u

/* What the guest asks the host for */
#define HOST_UNPLUGS 1u
#define HOST_SEES_DEVICE 2u
#define HOST_PLUGS 3u
#define HOST_UNPLUGS_AND_PLUGS 4u
#define HOST_SEES_NO_DEVICE 5u
#define HOST_PLUGS_PROCESSOR 6u
#define HOST_STOPS_BACK_END 7u
#define HOST_OFFERS_ANEW 8u
#define HOST_LOOKS 9u

extern uint32_t answer[60];        /* the last message taken, header included */
extern uint32_t relid, connection; /* of the last offer; the requests are about it */

/* Interrupts, hypercalls, SynIC. */
void start_bus(void);

/* Post what is in input. */
uint64_t post(void);
/* The next message's type, its contents in answer[]; NO_MESSAGE if none comes. */
uint32_t take_within(uint64_t ticks);
uint32_t take(void);

void contact_as(uint32_t version, uint32_t vp, uint64_t interrupt_page);
/* The proof that the bus still works: a contact, and all offers. */
void contact_and_offers(uint32_t version, uint64_t interrupt_page);
void alive(void);

/* A GPADL header with @pages pages in it, and a body with more. */
void header(uint32_t id, uint32_t buflen, uint32_t ranges, uint32_t bytes, uint32_t offset,
	    unsigned pages);
void body(uint32_t id, unsigned pages);
/* A GPADL of up to 26 pages; the status of its creation. */
uint32_t create(uint32_t id, unsigned pages);
uint32_t teardown(uint32_t id);
/* Of a GPADL that there is not: nothing comes. */
uint32_t teardown_unknown(uint32_t id);

void post_open(uint32_t gpadl, uint32_t vp, uint32_t ring_offset);
/* The result of opening: 0 open, 1 refused, NO_MESSAGE. */
uint32_t open_channel(uint32_t gpadl, uint32_t vp, uint32_t ring_offset);
uint32_t close_channel(void);

/* RELID_RELEASED */
void release(uint32_t id);
/* Have the host do something; it says when it has, by a byte on the serial line. */
void host(unsigned what);
/* The host has plugged a device in: its offer, and its channel open. */
void new_device(void);

/* in processors.c */
void scenario_eject(void);
void scenario_eject_bus(void);
void scenario_signal_close(void);
/* in rings.c */
void scenario_one_at_a_time(void);
/* in host.c */
void scenario_versions(void);
void scenario_old_signal(void);
void scenario_stalled(void);
void scenario_life(void);
void scenario_reoffer(void);
void scenario_plugged(void);
void scenario_acpi(void);

#endif
