/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the bare-metal guest does to the synthetic timers. */
#include "synic.h"

#define TIMER_SINT 3u
#define TIMER_VECTOR 0x50u
#define DIRECT_VECTOR 0x60u

void scenario_timers(void)
{
	volatile struct message *slot = &slots[TIMER_SINT];
	uint64_t when;
	unsigned before;

	enable_all();
	set_msr(MSR_SINT0 + TIMER_SINT, TIMER_VECTOR);

	/* one-shot, started by its count, and restarted before it ends */
	set_msr(MSR_STIMER0_CONFIG, TIMER_SINT << 16 | 8);
	set_msr(MSR_STIMER0_COUNT, ~0ull);
	report("enabled", get_msr(MSR_STIMER0_CONFIG) & 1);
	when = now() + 5 * MILLISECOND;
	set_msr(MSR_STIMER0_COUNT, when);
	message_in(TIMER_SINT, PATIENCE);
	idle(MILLISECOND);
	report("type", slot->type);
	report("size", slot->size);
	report("index", (uint32_t)slot->payload[0]);
	report("expired_on_time", slot->payload[1] == when);
	report("delivered_after", slot->payload[2] >= when);
	report("enabled_after", get_msr(MSR_STIMER0_CONFIG) & 1);
	report("interrupts", interrupts[TIMER_VECTOR]);

	/* its slot is occupied */
	set_msr(MSR_STIMER0_COUNT, now() + MILLISECOND);
	report("pending", pending_in(TIMER_SINT, PATIENCE));
	report("enabled_pending", get_msr(MSR_STIMER0_CONFIG) & 1);
	idle(MILLISECOND);
	report("interrupts_pending", interrupts[TIMER_VECTOR]);
	release(TIMER_SINT);
	idle(MILLISECOND);
	report("interrupts_released", interrupts[TIMER_VECTOR]);

	/* stopped while it waits */
	set_msr(MSR_STIMER0_COUNT, now() + MILLISECOND);
	report("pending_again", pending_in(TIMER_SINT, PATIENCE));
	set_msr(MSR_STIMER0_COUNT, 0);
	release(TIMER_SINT);
	idle(MILLISECOND);
	report("type_stopped", slot->type);
	report("enabled_stopped", get_msr(MSR_STIMER0_CONFIG) & 1);

	/* a time that is past */
	set_msr(MSR_STIMER0_COUNT, 1);
	report("past", message_in(TIMER_SINT, PATIENCE));
	release(TIMER_SINT);
	set_msr(MSR_STIMER0_CONFIG, 0);

	/* periodic, timer 3 */
	set_msr(MSR_STIMER0_COUNT + 6, MILLISECOND);
	set_msr(MSR_STIMER0_CONFIG + 6, TIMER_SINT << 16 | 3);
	before = interrupts[TIMER_VECTOR];
	for (unsigned i = 0; i < 5; i++) {
		report("period", message_in(TIMER_SINT, PATIENCE));
		report("period_index", (uint32_t)slot->payload[0]);
		idle(MILLISECOND / 10);
		release(TIMER_SINT);
	}
	set_msr(MSR_STIMER0_CONFIG + 6, 0);
	release(TIMER_SINT);
	idle(MILLISECOND);
	report("periods", interrupts[TIMER_VECTOR] - before >= 5);
	before = interrupts[TIMER_VECTOR];
	idle(5 * MILLISECOND);
	report("periods_after", interrupts[TIMER_VECTOR] - before);

	/* direct, as short a period as can be written: QEMU makes 50 us of it */
	set_msr(MSR_STIMER0_COUNT, 1);
	when = now();
	set_msr(MSR_STIMER0_CONFIG, 1u << 12 | DIRECT_VECTOR << 4 | 3);
	while (interrupts[DIRECT_VECTOR] < 20 && now() < when + PATIENCE)
		idle(MILLISECOND);
	set_msr(MSR_STIMER0_CONFIG, 0);
	idle(MILLISECOND);
	report("direct", interrupts[DIRECT_VECTOR] >= 20);
	report("direct_paced", interrupts[DIRECT_VECTOR] <= (uint32_t)(now() - when) / 500);

	report_fault("direct_vector_15", write_msr(MSR_STIMER0_CONFIG, 1u << 12 | 15u << 4 | 1));
	report_fault("reserved_bits", write_msr(MSR_STIMER0_CONFIG, 1ull << 40));
	set_msr(MSR_STIMER0_CONFIG, 1);
	report("enabled_without_sint", get_msr(MSR_STIMER0_CONFIG) & 1);
	set_msr(MSR_STIMER0_CONFIG, 8);
	set_msr(MSR_STIMER0_COUNT, 1);
	report("auto_enabled_without_sint", get_msr(MSR_STIMER0_CONFIG) & 1);
	idle(MILLISECOND);
	report("slot_0", slots[0].type);

	/* the farthest time there is, and one that overflows nanoseconds */
	set_msr(MSR_STIMER0_CONFIG, TIMER_SINT << 16 | 8);
	set_msr(MSR_STIMER0_COUNT, ~0ull);
	set_msr(MSR_STIMER0_COUNT, 1ull << 62);
	idle(MILLISECOND);
	report("type_far", slot->type);
	set_msr(MSR_STIMER0_CONFIG, TIMER_SINT << 16 | 3);
	set_msr(MSR_STIMER0_COUNT, ~0ull);
	set_msr(MSR_STIMER0_CONFIG, TIMER_SINT << 16 | 3);
	idle(MILLISECOND);
	report("type_far_period", slot->type);
}
