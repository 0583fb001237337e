/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * REP MOVS and REP STOS as a user program sees them: bytes, registers, and where a fault stops
 * them, compared with a loop that moves an element at a time (Intel SDM 2, "REP").
 *
 * string_ops TRIES: prints "wrong=N tries=N"; exit status 0 if none is wrong.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096ul
#define ARENA (96 * PAGE)
#define LONGEST (80 * PAGE)

struct regs {
    uint64_t count, to, from, value;
    int down, faulted;
};

static sigjmp_buf after_fault;
static volatile uint64_t fault_count, fault_to, fault_from;

static void on_fault(int number, siginfo_t *info, void *context)
{
    const greg_t *gregs = ((ucontext_t *)context)->uc_mcontext.gregs;

    (void)number;
    (void)info;
    fault_count = (uint64_t)gregs[REG_RCX];
    fault_to = (uint64_t)gregs[REG_RDI];
    fault_from = (uint64_t)gregs[REG_RSI];
    siglongjmp(after_fault, 1);
}

#define RUN(instruction)                                                                          \
    do {                                                                                          \
        uint64_t count = regs->count, to = regs->to, from = regs->from;                           \
                                                                                                  \
        if (regs->down) {                                                                         \
            __asm__ volatile("std; " instruction "; cld"                                          \
                             : "+c"(count), "+D"(to), "+S"(from)                                  \
                             : "a"(regs->value)                                                   \
                             : "memory");                                                         \
        } else {                                                                                  \
            __asm__ volatile(instruction                                                          \
                             : "+c"(count), "+D"(to), "+S"(from)                                  \
                             : "a"(regs->value)                                                   \
                             : "memory");                                                         \
        }                                                                                         \
        regs->count = count;                                                                      \
        regs->to = to;                                                                            \
        regs->from = from;                                                                        \
    } while (0)

static void execute(struct regs *regs, int stos, int shift)
{
    if (sigsetjmp(after_fault, 1)) {
        __asm__ volatile("cld");
        regs->faulted = 1;
        regs->count = fault_count;
        regs->to = fault_to;
        regs->from = fault_from;
        return;
    }
    switch (stos << 4 | shift) {
    case 0x00: RUN("rep movsb"); break;
    case 0x01: RUN("rep movsw"); break;
    case 0x02: RUN("rep movsl"); break;
    case 0x03: RUN("rep movsq"); break;
    case 0x10: RUN("rep stosb"); break;
    case 0x11: RUN("rep stosw"); break;
    case 0x12: RUN("rep stosl"); break;
    case 0x13: RUN("rep stosq"); break;
    }
}

static uint8_t *arena, *model, *hole; /* of both, one page at `hole` cannot be touched */

static int touchable(uint64_t address, int size)
{
    return address + (uint64_t)size <= (uint64_t)hole || address >= (uint64_t)hole + PAGE;
}

/* The same in the model, an element at a time. */
static void expect(struct regs *regs, int stos, int shift)
{
    int size = 1 << shift;
    int64_t step = regs->down ? -size : size;
    int64_t bias = model - arena;

    while (regs->count) {
        uint8_t element[8];

        if (!touchable(regs->to, size) || (!stos && !touchable(regs->from, size))) {
            regs->faulted = 1;
            return;
        }
        if (stos) {
            memcpy(element, &regs->value, (size_t)size);
        } else {
            memcpy(element, (uint8_t *)regs->from + bias, (size_t)size);
            regs->from += (uint64_t)step;
        }
        memcpy((uint8_t *)regs->to + bias, element, (size_t)size);
        regs->to += (uint64_t)step;
        regs->count--;
    }
}

static uint64_t draw(uint64_t below)
{
    static uint64_t state = 0x9e3779b97f4a7c15;

    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

static int differs(void)
{
    size_t before = (size_t)(hole - arena), behind = before + PAGE;

    return memcmp(arena, model, before) ||
           memcmp(arena + behind, model + behind, ARENA - behind);
}

static int one(void)
{
    int stos = (int)draw(2), shift = (int)draw(4), size = 1 << shift;
    uint64_t most = draw(8) ? 3 * PAGE : LONGEST, at, other;
    struct regs real = {.down = !draw(6)}, wanted;

    real.count = draw(most / (uint64_t)size) + draw(3);
    at = PAGE * draw(14) + draw(3) * draw(PAGE);
    other = draw(3) ? PAGE * draw(14) + draw(PAGE) : at + draw(160) - draw(80);
    if (real.down) {
        at = ARENA - 16 - at;
        other = ARENA - 16 - (other < ARENA ? other : 0);
    }
    real.to = (uint64_t)arena + at;
    real.from = (uint64_t)arena + (other < ARENA ? other : at);
    real.value = draw(4) ? draw(~0ull) : draw(2) * 0x4242424242424242;
    wanted = real;
    expect(&wanted, stos, shift);
    execute(&real, stos, shift);
    if (memcmp(&real, &wanted, sizeof(real)) || differs()) {
        printf("rep %s%c%s: left %#lx, expected %#lx\n", stos ? "stos" : "movs", "bwlq"[shift],
               real.down ? " down" : "", (unsigned long)real.count, (unsigned long)wanted.count);
        return 1;
    }
    return 0;
}

/* Code that the instruction itself has just written is what runs. */
static int new_code(uint8_t *page, uint8_t value)
{
    static uint8_t source[PAGE];
    uint64_t count = PAGE, to = (uint64_t)page, from = (uint64_t)source;
    int (*function)(void) = (int (*)(void))(uintptr_t)page;

    memset(source, 0xcc, sizeof(source));
    memcpy(source, (uint8_t[]){0xb8, value, 0, 0, 0, 0xc3}, 6); /* mov $value, %eax; ret */
    __asm__ volatile("rep movsb" : "+c"(count), "+D"(to), "+S"(from) : : "memory");
    return function() != value;
}

int main(int argc, char **argv)
{
    unsigned long tries = argc > 1 ? strtoul(argv[1], NULL, 0) : 10000, wrong = 0;
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    /* Room on both sides, so that what goes too far is a fault of its own. */
    uint8_t *room = mmap(NULL, 4 * ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *code = mmap(NULL, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    model = malloc(ARENA);
    if (room == MAP_FAILED || code == MAP_FAILED || !model) {
        perror("string_ops");
        return 2;
    }
    arena = room + ARENA;
    hole = arena + 90 * PAGE;
    if (mprotect(arena, ARENA, PROT_READ | PROT_WRITE) || mprotect(hole, PAGE, PROT_NONE)) {
        perror("string_ops");
        return 2;
    }
    for (size_t i = 0; i < ARENA; i++) {
        model[i] = (uint8_t)draw(256);
    }
    memcpy(arena, model, (size_t)(hole - arena));
    memcpy(hole + PAGE, model + (hole + PAGE - arena), (size_t)(arena + ARENA - hole - PAGE));
    sigaction(SIGSEGV, &action, NULL);
    for (unsigned long i = 0; i < tries; i++) {
        wrong += (unsigned long)one();
        wrong += (unsigned long)new_code(code, (uint8_t)(i & 127));
        if (i % 64 == 0) { /* pages that are new to the machine */
            madvise(arena, (size_t)(hole - arena), MADV_DONTNEED);
            memset(model, 0, (size_t)(hole - arena));
        }
    }
    printf("wrong=%lu tries=%lu\n", wrong, tries);
    return wrong != 0;
}
