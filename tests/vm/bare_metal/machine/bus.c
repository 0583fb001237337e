/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The bare-metal guest's end of VMBus; see bus.h. */
#include "bus.h"

struct post_input input __attribute__((aligned(4096)));

void prepare(uint32_t message_type, uint32_t size)
{
	input.connection = VMBUS_CONNECTION;
	input.reserved = 0;
	input.type = 1;
	input.size = size;
	for (unsigned i = 0; i < 60; i++)
		input.payload[i] = 0;
	input.payload[0] = message_type;
}
