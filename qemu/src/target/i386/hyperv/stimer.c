/*
 * Hyper-V emulation in QEMU: synthetic timers (TLFS 12.3)
 *
 * A timer that expires raises an interrupt vector (direct mode) or puts a
 * message into the message page of its vCPU.  Only the thread of that vCPU may
 * do the latter; if the slot is occupied, it is tried again on EOM.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "internal.h"
#include "hw/core/cpu.h"
#include "hw/i386/apic.h"

#define STIMER_ENABLE       (1ull << 0)
#define STIMER_PERIODIC     (1ull << 1)
#define STIMER_LAZY         (1ull << 2)
#define STIMER_AUTO_ENABLE  (1ull << 3)
#define STIMER_DIRECT       (1ull << 12)
#define STIMER_VECTOR(cfg)  extract64(cfg, 4, 8)
#define STIMER_SINT(cfg)    extract64(cfg, 16, 4)
#define STIMER_VALID        (STIMER_ENABLE | STIMER_PERIODIC | STIMER_LAZY | \
                             STIMER_AUTO_ENABLE | 0xff0 | STIMER_DIRECT | \
                             0xf0000)

/* The main loop shall have time for other things. */
#define STIMER_MIN_PERIOD   (50 * SCALE_US / HYPERV_TICK_NS)

/* TLFS 12.3.3: payload of a timer expiration message */
typedef struct HypervTimerMessage {
    uint32_t index;
    uint32_t reserved;
    uint64_t expiration_time;
    uint64_t delivery_time;
} HypervTimerMessage;

static uint64_t *stimer_config(HypervStimer *t)
{
    return &t->cpu->env.msr_hv_stimer_config[t->index];
}

static uint64_t *stimer_count(HypervStimer *t)
{
    return &t->cpu->env.msr_hv_stimer_count[t->index];
}

/* Forget what the timer was about to do; its MSRs stay. */
static void stimer_stop(HypervStimer *t)
{
    timer_del(t->timer);
    t->due = false;
}

static void stimer_run_until(HypervStimer *t, uint64_t expiry)
{
    t->expiry = expiry;
    timer_mod_ns(t->timer,
                 MIN(expiry, INT64_MAX / HYPERV_TICK_NS) * HYPERV_TICK_NS);
}

/* Start counting if the MSRs say so. */
static void stimer_start(HypervStimer *t)
{
    uint64_t config = *stimer_config(t), count = *stimer_count(t);

    if (!(config & STIMER_ENABLE) || !count) {
        return;
    }
    if (config & STIMER_PERIODIC) {
        uint64_t now = hyperv_time(), period = MAX(count, STIMER_MIN_PERIOD);

        stimer_run_until(t, period > UINT64_MAX - now ? UINT64_MAX
                                                      : now + period);
    } else {
        /* one-shot: an absolute time, which may be past */
        stimer_run_until(t, count);
    }
}

/* The guest has been told.  Periods that it missed meanwhile are dropped. */
static void stimer_done(HypervStimer *t)
{
    uint64_t config = *stimer_config(t);

    t->due = false;
    if (config & STIMER_PERIODIC) {
        uint64_t period = MAX(*stimer_count(t), STIMER_MIN_PERIOD);
        uint64_t late = hyperv_time() - t->expiry;

        stimer_run_until(t, t->expiry + (late / period + 1) * period);
    } else {
        *stimer_config(t) = config & ~STIMER_ENABLE;
    }
}

/* Runs in the thread of the vCPU with the BQL held. */
static void stimer_put_message(CPUState *cs, run_on_cpu_data data)
{
    HypervStimer *t = data.host_ptr;
    uint32_t sint = STIMER_SINT(*stimer_config(t));
    HypervTimerMessage payload = {
        .index = t->index,
        .expiration_time = t->expiry,
        .delivery_time = hyperv_time(),
    };
    struct hyperv_message msg = {
        .header.message_type = HV_MESSAGE_TIMER_EXPIRED,
        .header.payload_size = sizeof(payload),
    };

    if (!t->due) {
        /* the guest stopped or reprogrammed it */
        return;
    }

    memcpy(msg.payload, &payload, sizeof(payload));
    switch (hyperv_synic_put_msg(cs, sint, &msg)) {
    case 0:
        hyperv_emu_synic_backend.raise_sint(cs, sint);
        break;
    case -EAGAIN:
        /* stays due */
        return;
    default:
        /* no message page, nobody to tell */
        break;
    }
    stimer_done(t);
}

static void stimer_expired(void *opaque)
{
    HypervStimer *t = opaque;
    uint64_t config = *stimer_config(t);

    if (!(config & STIMER_ENABLE)) {
        return;
    }

    t->due = true;
    if (config & STIMER_DIRECT) {
        apic_deliver_fixed(t->cpu->apic_state, STIMER_VECTOR(config));
        stimer_done(t);
    } else {
        async_run_on_cpu(CPU(t->cpu), stimer_put_message,
                         RUN_ON_CPU_HOST_PTR(t));
    }
}

void hyperv_stimer_eom(X86CPU *cpu)
{
    unsigned i;

    for (i = 0; i < HV_STIMER_COUNT; i++) {
        HypervStimer *t = &cpu->hyperv_emu->stimer[i];

        if (t->due) {
            stimer_put_message(CPU(cpu), RUN_ON_CPU_HOST_PTR(t));
        }
    }
}

static bool stimer_set_config(HypervStimer *t, uint64_t val)
{
    if (val & ~STIMER_VALID) {
        return false;
    }
    if (val & STIMER_DIRECT) {
        if (!hyperv_feat_enabled(t->cpu, HYPERV_FEAT_STIMER_DIRECT) ||
            STIMER_VECTOR(val) < HYPERV_FIRST_VECTOR) {
            return false;
        }
    } else if (!STIMER_SINT(val)) {
        /* SINT 0 is not for timers: such a timer cannot be enabled */
        val &= ~STIMER_ENABLE;
    }

    stimer_stop(t);
    *stimer_config(t) = val;
    stimer_start(t);
    return true;
}

static void stimer_set_count(HypervStimer *t, uint64_t val)
{
    uint64_t config = *stimer_config(t);

    stimer_stop(t);
    *stimer_count(t) = val;
    if (!val) {
        config &= ~STIMER_ENABLE;
    } else if ((config & STIMER_AUTO_ENABLE) &&
               ((config & STIMER_DIRECT) || STIMER_SINT(config))) {
        config |= STIMER_ENABLE;
    }
    *stimer_config(t) = config;
    stimer_start(t);
}

/* The MSRs of a timer are two, configuration and count. */
static HypervStimer *stimer_by_msr(X86CPU *cpu, uint32_t msr)
{
    return &cpu->hyperv_emu->stimer[(msr - HV_X64_MSR_STIMER0_CONFIG) / 2];
}

static bool stimer_msr_is_count(uint32_t msr)
{
    return (msr - HV_X64_MSR_STIMER0_CONFIG) % 2;
}

bool hyperv_stimer_rdmsr(X86CPU *cpu, uint32_t msr, uint64_t *val)
{
    HypervStimer *t = stimer_by_msr(cpu, msr);

    *val = stimer_msr_is_count(msr) ? *stimer_count(t) : *stimer_config(t);
    return true;
}

bool hyperv_stimer_wrmsr(X86CPU *cpu, uint32_t msr, uint64_t val)
{
    HypervStimer *t = stimer_by_msr(cpu, msr);

    if (stimer_msr_is_count(msr)) {
        stimer_set_count(t, val);
        return true;
    }
    return stimer_set_config(t, val);
}

void hyperv_stimer_init(X86CPU *cpu)
{
    unsigned i;

    for (i = 0; i < HV_STIMER_COUNT; i++) {
        HypervStimer *t = &cpu->hyperv_emu->stimer[i];

        t->cpu = cpu;
        t->index = i;
        t->timer = timer_new_ns(QEMU_CLOCK_VIRTUAL, stimer_expired, t);
    }
}

void hyperv_stimer_fini(X86CPU *cpu)
{
    unsigned i;

    for (i = 0; i < HV_STIMER_COUNT; i++) {
        timer_free(cpu->hyperv_emu->stimer[i].timer);
    }
}

void hyperv_stimer_reset(X86CPU *cpu)
{
    unsigned i;

    for (i = 0; i < HV_STIMER_COUNT; i++) {
        stimer_stop(&cpu->hyperv_emu->stimer[i]);
    }
}

/* A periodic timer starts its period anew. */
void hyperv_stimer_restore(X86CPU *cpu)
{
    unsigned i;

    for (i = 0; i < HV_STIMER_COUNT; i++) {
        stimer_stop(&cpu->hyperv_emu->stimer[i]);
        stimer_start(&cpu->hyperv_emu->stimer[i]);
    }
}
