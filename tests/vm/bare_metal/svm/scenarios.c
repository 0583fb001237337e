/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A hypervisor in the bare-metal guest: its own guest is a few instructions. Layout and bits of the
 * control block are those of AMD's Architecture Programmer's Manual, volume 2, appendix B.
 */
#include "guest.h"

#define MSR_EFER 0xc0000080u
#define MSR_HSAVE 0xc0010117u
#define EFER_SVME (1u << 12)

#define APIC(offset) ((volatile uint32_t *)(0xfee00000 + (offset)))
#define APIC_TIMER APIC(0x320)
#define APIC_INITIAL APIC(0x380)
#define APIC_CURRENT APIC(0x390)
#define APIC_DIVIDE APIC(0x3e0)
#define TIMER_VECTOR 0x50u

#define INTERCEPT_INTR 0u /* bits of the vector at 0x00c */
#define INTERCEPT_VMRUN 32u
#define INTERCEPT_VMMCALL 33u
#define EXIT_INTR 0x60u
#define EXIT_VMMCALL 0x81u
#define V_IRQ (1u << 8)
#define V_PRIORITY (15u << 16)
#define V_INTR_MASKING (1u << 24)

#define ROUNDS 100000u
#define PATIENCE 1000000u /* runs of the inner guest, after the timer's end */

static uint8_t vmcb[4096] __attribute__((aligned(4096)));
static uint8_t hsave[4096] __attribute__((aligned(4096)));
static uint8_t stack[1024] __attribute__((aligned(16)));

static void put16(unsigned offset, uint16_t value)
{
	*(volatile uint16_t *)(vmcb + offset) = value;
}

static void put32(unsigned offset, uint32_t value)
{
	*(volatile uint32_t *)(vmcb + offset) = value;
}

static uint32_t exit_code(void)
{
	return *(volatile uint32_t *)(vmcb + 0x70);
}

static void segment(unsigned offset, uint16_t selector, uint16_t attributes)
{
	put16(offset, selector);
	put16(offset + 2, attributes);
	put32(offset + 4, 0xffffffffu);
}

/* An inner guest in flat protected mode, interrupts off, with a virtual interrupt that waits. */
static void prepare_inner(void)
{
	uint32_t cr0;

	set_msr(MSR_EFER, get_msr(MSR_EFER) | EFER_SVME);
	set_msr(MSR_HSAVE, (uint32_t)hsave);
	__asm__ volatile("movl %%cr0, %0" : "=r"(cr0));
	put32(0x00c, 1u << INTERCEPT_INTR);
	put32(0x010, 1u << (INTERCEPT_VMRUN - 32) | 1u << (INTERCEPT_VMMCALL - 32));
	put32(0x058, 1); /* ASID */
	put32(0x060, V_IRQ | V_PRIORITY | V_INTR_MASKING);
	put32(0x064, 0x60); /* its vector */
	segment(0x400, 0x10, 0xc93);
	segment(0x410, 0x08, 0xc9b);
	segment(0x420, 0x10, 0xc93);
	segment(0x430, 0x10, 0xc93);
	put32(0x4d0, EFER_SVME);
	put32(0x558, cr0);
	put32(0x560, 0x400);
	put32(0x568, 0xffff0ff0u);
}

/* Runs the inner guest at @code until it exits. */
static void run_inner(void (*code)(void))
{
	put32(0x570, 2); /* flags */
	put32(0x578, (uint32_t)code);
	put32(0x5d8, (uint32_t)(stack + sizeof(stack)));
	__asm__ volatile("pushal\n\tclgi\n\tsti\n\tvmrun\n\tcli\n\tstgi\n\tpopal"
			 : : "a"(vmcb) : "memory", "cc");
}

void inner_exit(void);
void inner_priority(void);
__asm__(".text\n"
	"inner_exit:\n\tvmmcall\n"
	/* CR8 = 0, as 32-bit code writes it: LOCK MOV CR0, EAX */
	"inner_priority:\n\txorl %eax, %eax\n\t.byte 0xf0, 0x0f, 0x22, 0xc0\n\tvmmcall\n");

/*
 * The timer's interrupts while the inner guest, with a virtual interrupt pending, is entered and
 * left all the time: each has to come, at once or when it exits.
 */
static void scenario_timer(void)
{
	unsigned lost = 0, runs = 0, strange = 0;

	setup_interrupts();
	prepare_inner();
	*APIC_DIVIDE = 0xb; /* by 1 */
	*APIC_TIMER = TIMER_VECTOR;
	for (unsigned i = 0; i < ROUNDS; i++) {
		unsigned before = interrupts[TIMER_VECTOR], late = 0;

		*APIC_INITIAL = 5000 + i % 8192;
		while (interrupts[TIMER_VECTOR] == before && late < PATIENCE) {
			run_inner(inner_exit);
			runs++;
			strange += exit_code() != EXIT_VMMCALL && exit_code() != EXIT_INTR;
			late += !*APIC_CURRENT;
			__asm__ volatile("sti\n\tnop\n\tcli");
		}
		lost += interrupts[TIMER_VECTOR] == before;
	}
	report("lost", lost);
	report("strange", strange);
	report("enough", runs > ROUNDS);
}

static void scenario_priority(void)
{
	setup_interrupts();
	prepare_inner();
	run_inner(inner_priority);
	report("exit", exit_code());
}

const struct scenario scenarios[] = {
	{ "timer", scenario_timer },
	{ "priority", scenario_priority },
	{ 0 },
};
