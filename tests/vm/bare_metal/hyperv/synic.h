/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the scenarios do with the slots of the message page, and what they report. */
#ifndef SYNIC_H
#define SYNIC_H

#include "bus.h"

#define PATIENCE (10000u * MILLISECOND)

/* Interrupts, hypercalls, SynIC. */
void enable_all(void);

/* Wait until there is a message in the slot. */
bool message_in(unsigned sint, uint64_t ticks);
/* Wait until the message in the slot says that another one waits. */
bool pending_in(unsigned sint, uint64_t ticks);
/* Free the slot as TLFS 11.10 wants it. */
void release(unsigned sint);

/* The vector of the exception that an access raised, or 0x100. */
void report_fault(const char *name, int vector);

void scenario_timers(void);

#endif
