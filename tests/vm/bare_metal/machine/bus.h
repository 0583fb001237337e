/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The bare-metal guest's end of VMBus: its message page, and what it posts.
 * Values are those of Linux' include/linux/hyperv.h.
 */
#ifndef BUS_H
#define BUS_H

#include "guest.h"

#define VMBUS_CONNECTION 1u
#define VMBUS_SINT 2u
#define VMBUS_VECTOR 0x40u

/* Message types */
#define OFFER_CHANNEL 1u
#define RESCIND_OFFER 2u
#define REQUEST_OFFERS 3u
#define ALL_OFFERS_DELIVERED 4u
#define OPEN_CHANNEL 5u
#define OPEN_RESULT 6u
#define CLOSE_CHANNEL 7u
#define GPADL_HEADER 8u
#define GPADL_BODY 9u
#define GPADL_CREATED 10u
#define GPADL_TEARDOWN 11u
#define GPADL_TORNDOWN 12u
#define RELID_RELEASED 13u
#define INITIATE_CONTACT 14u
#define VERSION_RESPONSE 15u
#define UNLOAD 16u
#define UNLOAD_RESPONSE 17u
#define NO_MESSAGE 0xffffffffu

#define VERSION_1_1 0x10001u
#define VERSION_4_0 0x40000u

/* One for each SINT */
static volatile struct message *const slots = (void *)SIMP_GPA;

/* What the next post carries. */
extern struct post_input input;

/* Make a VMBus message of it; everything behind its type is 0. */
void prepare(uint32_t message_type, uint32_t size);

#endif
