/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The bare-metal guest's machine: ports, MSRs with faults caught, hypercalls, interrupts, output.
 * Values come from the Hyper-V Top-Level Functional Specification 6.0b (TLFS).
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stdint.h>

#define MSR_GUEST_OS_ID 0x40000000u
#define MSR_HYPERCALL 0x40000001u
#define MSR_VP_INDEX 0x40000002u
#define MSR_RESET 0x40000003u
#define MSR_VP_RUNTIME 0x40000010u
#define MSR_TIME_REF_COUNT 0x40000020u
#define MSR_REFERENCE_TSC 0x40000021u
#define MSR_TSC_FREQUENCY 0x40000022u
#define MSR_EOI 0x40000070u
#define MSR_ICR 0x40000071u
#define MSR_TPR 0x40000072u
#define MSR_VP_ASSIST_PAGE 0x40000073u
#define MSR_SCONTROL 0x40000080u
#define MSR_SVERSION 0x40000081u
#define MSR_SIEFP 0x40000082u
#define MSR_SIMP 0x40000083u
#define MSR_EOM 0x40000084u
#define MSR_SINT0 0x40000090u
#define MSR_STIMER0_CONFIG 0x400000b0u
#define MSR_STIMER0_COUNT 0x400000b1u
#define MSR_CRASH_CTL 0x40000105u

#define SINT_MASKED (1u << 16)
#define SINT_AUTO_EOI (1u << 17)

#define COM1 0x3f8
#define SIMP_GPA 0x00a00000u /* of the message page */
#define SIEFP_GPA 0x00a01000u
#define NOWHERE 0x40000000u  /* no memory there: the machine has less than 1 GiB */
#define MILLISECOND 10000u   /* in ticks of partition time */

#define CALL_POST_MESSAGE 0x5cu
#define CALL_SIGNAL_EVENT 0x5du
#define CALL_FAST (1u << 16)

/* TLFS 11.9: a slot of the message page */
struct message {
	uint32_t type;
	uint8_t size;
	uint8_t flags; /* bit 0: another message waits, EOM wanted */
	uint16_t reserved;
	uint64_t sender;
	uint64_t payload[30];
};

/* TLFS 11.9: input of HvPostMessage */
struct post_input {
	uint32_t connection;
	uint32_t reserved;
	uint32_t type;
	uint32_t size;
	uint32_t payload[60];
};

/* What the interrupt stubs leave on the stack. */
struct frame {
	uint32_t edi, esi, ebp, esp, ebx, edx, ecx, eax;
	uint32_t vector, error;
	uint32_t eip, cs, eflags;
};

extern volatile unsigned interrupts[256]; /* how often each vector came */
extern volatile uint32_t fault_resume;    /* where to go on after an exception; 0: fatal */
extern volatile int fault_vector;         /* of the last exception caught, or -1 */
extern volatile bool eoi_in_handler;      /* interrupts are acknowledged through the APIC */
extern uint8_t hypercall_page[4096];

static inline void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline uint8_t in8(uint16_t port)
{
	uint8_t value;

	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static inline void out32(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

void print(const char *text);
/* A line "name=hexadecimal". */
void report(const char *name, uint64_t value);
/* End the run: QEMU exits with status 1 (isa-debug-exit, value 0). */
__attribute__((noreturn)) void finish(void);

/* MSR access; the vector of the exception that it raised, or -1. */
int read_msr(uint32_t msr, uint64_t *value);
int write_msr(uint32_t msr, uint64_t value);
/* MSR access that must succeed. */
uint64_t get_msr(uint32_t msr);
void set_msr(uint32_t msr, uint64_t value);

void cpuid(uint32_t leaf, uint32_t regs[4]);

/* Result value of a hypercall by the page; 0x1000000 + vector if it faulted. */
uint64_t hypercall(uint64_t input, uint64_t parameter);
/* The same by a bare instruction. */
uint64_t vmcall(uint64_t input, uint64_t parameter);
uint64_t vmmcall(uint64_t input, uint64_t parameter);

/* Partition time in units of 100 ns. */
uint64_t now(void);
/* Let interrupts in for @ticks of 100 ns. */
void idle(uint64_t ticks);

void setup_interrupts(void);
/* Identify the guest and enable the hypercall page. */
void enable_hypercalls(void);
/* Message and event page, SCONTROL. */
void enable_synic(void);

/*
 * Start the processor with APIC id 1, which calls @run and halts. It has a stack and segments, no
 * interrupts, and none of the functions above that catch faults: those are the first one's.
 */
void start_second(void (*run)(void));
static inline uint64_t second_get_msr(uint32_t msr)
{
	uint32_t low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return (uint64_t)high << 32 | low;
}
static inline void second_set_msr(uint32_t msr, uint64_t value)
{
	__asm__ volatile("wrmsr" : : "c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
			 : "memory");
}
static inline uint32_t second_hypercall(uint64_t input, uint64_t parameter)
{
	uint32_t low = (uint32_t)input, high = (uint32_t)(input >> 32);
	uint32_t b = (uint32_t)(parameter >> 32), c = (uint32_t)parameter;

	__asm__ volatile("call hypercall_page" : "+a"(low), "+d"(high), "+b"(b), "+c"(c)
			 : "D"(0), "S"(0) : "memory", "cc");
	return low;
}

/* One run: the one that the last word of the command line names. */
struct scenario {
	const char *name;
	void (*run)(void);
};
extern const struct scenario scenarios[]; /* the last one has no name */

#endif
