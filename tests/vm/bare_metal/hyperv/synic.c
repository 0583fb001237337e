/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The slots of the message page; see synic.h. */
#include "synic.h"

bool message_in(unsigned sint, uint64_t ticks)
{
	uint64_t end = now() + ticks;

	while (now() < end)
		if (slots[sint].type)
			return true;
	return false;
}

bool pending_in(unsigned sint, uint64_t ticks)
{
	uint64_t end = now() + ticks;

	while (now() < end)
		if (slots[sint].flags & 1)
			return true;
	return false;
}

void release(unsigned sint)
{
	slots[sint].type = 0;
	__sync_synchronize();
	if (slots[sint].flags & 1)
		set_msr(MSR_EOM, 0);
}

void enable_all(void)
{
	setup_interrupts();
	enable_hypercalls();
	enable_synic();
}

void report_fault(const char *name, int vector)
{
	report(name, vector < 0 ? 0x100 : (unsigned)vector);
}
