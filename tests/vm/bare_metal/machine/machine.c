/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The bare-metal guest's machine; see guest.h. */
#include "guest.h"

#define DEBUG_EXIT 0xf4
#define APIC_SPURIOUS ((volatile uint32_t *)0xfee000f0)
#define APIC_EOI ((volatile uint32_t *)0xfee000b0)
#define APIC_ICR_LOW ((volatile uint32_t *)0xfee00300)
#define APIC_ICR_HIGH ((volatile uint32_t *)0xfee00310)
#define ICR_INIT 0x4500u
#define ICR_STARTUP 0x4600u
#define TRAMPOLINE 0x8000u

extern const uint8_t stubs[256][16];
extern uint32_t stack_pointer;
extern const uint8_t trampoline[], trampoline_end[];
void guest_interrupt(struct frame *frame);
void second_main(void);

volatile unsigned interrupts[256];
volatile uint32_t fault_resume;
volatile int fault_vector = -1;
volatile bool eoi_in_handler = true;
uint8_t hypercall_page[4096] __attribute__((aligned(4096)));

/* where the stack was before a hypercall */
uint32_t stack_pointer;

static uint64_t idt[256] __attribute__((aligned(8)));

void print(const char *text)
{
	for (; *text; text++) {
		while (!(in8(COM1 + 5) & 0x20))
			;
		out8(COM1, (uint8_t)*text);
	}
}

void report(const char *name, uint64_t value)
{
	char digits[17];
	int i = 16;

	digits[i] = '\0';
	do {
		digits[--i] = "0123456789abcdef"[value & 15];
		value >>= 4;
	} while (value);
	print(name);
	print("=");
	print(digits + i);
	print("\n");
}

void finish(void)
{
	print("END\n");
	for (;;)
		out32(DEBUG_EXIT, 0);
}

void guest_interrupt(struct frame *frame)
{
	if (frame->vector < 32) {
		if (!fault_resume) {
			report("unexpected_exception", frame->vector);
			report("at", frame->eip);
			finish();
		}
		fault_vector = (int)frame->vector;
		frame->eip = fault_resume;
		return;
	}
	interrupts[frame->vector]++;
	if (eoi_in_handler && frame->vector != 0xff)
		*APIC_EOI = 0;
}

int read_msr(uint32_t msr, uint64_t *value)
{
	uint32_t low = 0, high = 0;

	fault_vector = -1;
	__asm__ volatile("movl $1f, fault_resume\n\trdmsr\n1:\tmovl $0, fault_resume"
			 : "+a"(low), "+d"(high) : "c"(msr) : "memory");
	*value = (uint64_t)high << 32 | low;
	return fault_vector;
}

int write_msr(uint32_t msr, uint64_t value)
{
	fault_vector = -1;
	__asm__ volatile("movl $1f, fault_resume\n\twrmsr\n1:\tmovl $0, fault_resume"
			 : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
			 : "memory");
	return fault_vector;
}

uint64_t get_msr(uint32_t msr)
{
	uint64_t value;

	if (read_msr(msr, &value) >= 0) {
		report("cannot_read_msr", msr);
		finish();
	}
	return value;
}

void set_msr(uint32_t msr, uint64_t value)
{
	if (write_msr(msr, value) >= 0) {
		report("cannot_write_msr", msr);
		finish();
	}
}

void cpuid(uint32_t leaf, uint32_t regs[4])
{
	__asm__ volatile("cpuid" : "=a"(regs[0]), "=b"(regs[1]), "=c"(regs[2]), "=d"(regs[3])
			 : "a"(leaf), "c"(0));
}

/* TLFS 3.8: the 32-bit calling convention; the output parameter is EDI:ESI. */
#define HYPERCALL(name, instruction) \
uint64_t name(uint64_t input, uint64_t parameter) \
{ \
	uint32_t low = (uint32_t)input, high = (uint32_t)(input >> 32); \
	uint32_t b = (uint32_t)(parameter >> 32), c = (uint32_t)parameter; \
	\
	fault_vector = -1; \
	/* an exception in the page leaves the return address on the stack */ \
	__asm__ volatile("movl %%esp, stack_pointer\n\tmovl $1f, fault_resume\n\t" instruction \
			 "\n1:\tmovl $0, fault_resume\n\tmovl stack_pointer, %%esp" \
			 : "+a"(low), "+d"(high), "+b"(b), "+c"(c) \
			 : "D"(0), "S"(0) : "memory", "cc"); \
	if (fault_vector >= 0) \
		return 0x1000000u + (unsigned)fault_vector; \
	return (uint64_t)high << 32 | low; \
}

HYPERCALL(hypercall, "call hypercall_page")
HYPERCALL(vmcall, "vmcall")
HYPERCALL(vmmcall, "vmmcall")

uint64_t now(void)
{
	return get_msr(MSR_TIME_REF_COUNT);
}

void idle(uint64_t ticks)
{
	uint64_t end = now() + ticks;

	__asm__ volatile("sti");
	while (now() < end)
		;
	__asm__ volatile("cli");
}

void setup_interrupts(void)
{
	struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) idtr = { sizeof(idt) - 1, (uint32_t)idt };

	for (unsigned i = 0; i < 256; i++) {
		uint32_t handler = (uint32_t)stubs[i];

		/* present 32-bit interrupt gate in segment 0x08 */
		idt[i] = (uint64_t)(handler >> 16) << 48 | 0x8e00ull << 32 | 0x08u << 16 |
			 (handler & 0xffff);
	}
	__asm__ volatile("lidt %0" : : "m"(idtr));
	/* nothing from the PICs */
	out8(0x21, 0xff);
	out8(0xa1, 0xff);
	*APIC_SPURIOUS = 0x1ff;
}

void enable_hypercalls(void)
{
	set_msr(MSR_GUEST_OS_ID, 0x8100000000000001ull);
	set_msr(MSR_HYPERCALL, (uint32_t)hypercall_page | 1);
}

void enable_synic(void)
{
	set_msr(MSR_SIMP, SIMP_GPA | 1);
	set_msr(MSR_SIEFP, SIEFP_GPA | 1);
	set_msr(MSR_SCONTROL, 1);
}

static void (*second_run)(void);

void second_main(void)
{
	second_run();
}

void start_second(void (*run)(void))
{
	volatile uint8_t *copy = (void *)TRAMPOLINE;

	for (const uint8_t *c = trampoline; c < trampoline_end; c++)
		copy[c - trampoline] = *c;
	second_run = run;
	*APIC_ICR_HIGH = 1u << 24;
	*APIC_ICR_LOW = ICR_INIT;
	idle(10 * MILLISECOND);
	*APIC_ICR_HIGH = 1u << 24;
	*APIC_ICR_LOW = ICR_STARTUP | TRAMPOLINE >> 12;
}

static bool same(const char *a, const char *b)
{
	for (; *a && *a == *b; a++, b++)
		;
	return *a == *b;
}

/* @info: multiboot information; the command line is "kernel scenario". */
void guest_main(const uint32_t *info);
void guest_main(const uint32_t *info)
{
	const char *word = (const char *)info[4];

	for (const char *c = word; *c; c++)
		if (*c == ' ' && c[1])
			word = c + 1;
	for (const struct scenario *scenario = scenarios; scenario->name; scenario++) {
		if (same(word, scenario->name)) {
			scenario->run();
			finish();
		}
	}
	print("no such scenario\n");
	finish();
}
