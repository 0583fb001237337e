/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Killing a host amid its work, over and over: every packet is completed exactly once in the end.
 *
 * The guest is this process; hosts are its children. In the first part a child ends itself at each
 * step of the record (vvb_step()), the next one is left alone; in the second the children are
 * killed at any moment, while one of their threads receives and another completes. Arguments: how
 * many are killed in the second part (300), and a seed (1). Prints "ok" at the end; aborts
 * otherwise. Built with -DVVB_STEPS.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"

void vvb_step(void);

#define REQUIRE(condition)                                                              \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);             \
            abort();                                                                    \
        }                                                                               \
    } while (0)

#define PAGES 64u
#define BASE_PFN 0x100u
#define EACH 2u /* pages of a ring, its header's included: 4096 bytes of data */
#define SLOTS 24u
#define SLOT_BYTES 128u
#define LONG_PAYLOAD 200u /* does not fit into a slot */
#define KINDS 4u

static struct vvb_memory *memory;
static struct vvb_region *region;
static int memory_fd, record_fd, disk;
static uint64_t record_bytes;
static const struct vvb_limits limits = {
    .max_payload = 1 << 19, .max_ranges = 1 << 16, .max_external = 1 << 30};
static uint32_t steps_left = UINT32_MAX;
static uint32_t random_state;

void vvb_step(void)
{
    if (steps_left != UINT32_MAX && !steps_left--) {
        kill(getpid(), SIGKILL);
        for (;;) {
            pause();
        }
    }
}

static uint32_t any(uint32_t below)
{
    random_state = random_state * 1664525 + 1013904223;
    return (random_state >> 8) % below;
}

static void set_up(void)
{
    int err = 0;

    memory_fd = memfd_create("ram", MFD_CLOEXEC);
    record_fd = memfd_create("record", MFD_CLOEXEC);
    disk = memfd_create("disk", MFD_CLOEXEC);
    record_bytes = vvb_inflight_size(SLOTS, SLOT_BYTES);
    REQUIRE(!ftruncate(memory_fd, PAGES * 4096) && !ftruncate(record_fd, (off_t)record_bytes));
    REQUIRE(!ftruncate(disk, 4096));
    memory = vvb_memory_new();
    region = vvb_region_new(BASE_PFN * 4096, PAGES * 4096, memory_fd, 0, &err);
    REQUIRE(memory && region && !vvb_memory_set(memory, &region, 1));
}

static struct vvb_ring *attach(int role, int initialize)
{
    uint64_t pfns[2 * EACH];
    struct vvb_fault fault;
    struct vvb_ring *ring;
    int err;

    for (uint32_t i = 0; i < 2 * EACH; i++) {
        pfns[i] = BASE_PFN + i;
    }
    ring = vvb_ring_attach(memory, pfns, 2 * EACH, EACH, role, initialize, &fault, &err);
    REQUIRE(ring);
    return ring;
}

/* ---- the guest ---- */

/* What a packet is follows from its id: inband, without completion, a transfer, too long. */
static bool wants_completion(uint64_t id)
{
    return id % KINDS != 1;
}

/* False if there is no space. */
static bool send_packet(struct vvb_ring *ring, uint64_t id)
{
    uint64_t ranges[3] = {1ull << 32, 512, BASE_PFN + 32};
    uint64_t payload[LONG_PAYLOAD / 8] = {id % KINDS == 2 ? 1 : 2, id};
    struct vvb_fault fault;
    int signal = 0, ret;

    if (id % KINDS == 2) {
        ret = vvb_ring_send(ring, 9, 1, id, (char *)ranges, sizeof(ranges), (char *)payload, 16, 1,
                            &signal, &fault);
    } else {
        ret = vvb_ring_send(ring, 6, wants_completion(id), id, NULL, 0, (char *)payload,
                            id % KINDS == 3 ? LONG_PAYLOAD : 16, 1, &signal, &fault);
    }
    REQUIRE(!ret || ret == VVB_E_FULL);
    return !ret;
}

struct guest {
    struct vvb_ring *ring;
    struct vvb_batch *batch;
    uint64_t first, next; /* ids */
    uint64_t completed;
    uint8_t seen[1 << 20]; /* by id: no more are sent */
};

static void guest_init(struct guest *guest, uint64_t first)
{
    guest->ring = attach(VVB_ROLE_GUEST, 1);
    guest->batch = vvb_batch_new(guest->ring, 64);
    guest->first = guest->next = first;
    guest->completed = 0;
    memset(guest->seen, 0, sizeof(guest->seen));
    REQUIRE(!vvb_inflight_clear(record_fd, 0, record_bytes));
}

static void guest_end(struct guest *guest)
{
    vvb_batch_free(guest->batch);
    vvb_ring_free(guest->ring);
}

static uint32_t guest_take(struct guest *guest)
{
    REQUIRE(!vvb_ring_receive(guest->ring, guest->batch, 64, memory, &limits, NULL));
    for (uint32_t i = 0; i < guest->batch->count; i++) {
        const struct vvb_packet *packet = &guest->batch->packets[i];
        uint64_t id = packet->transaction_id;

        if (packet->type != 11) {
            continue; /* of the host's own */
        }
        REQUIRE(id >= guest->first && id < guest->next && wants_completion(id));
        REQUIRE(!guest->seen[id % sizeof(guest->seen)]++); /* not twice */
        guest->completed++;
    }
    return guest->batch->count;
}

static uint64_t wanted(const struct guest *guest)
{
    uint64_t count = 0;

    for (uint64_t id = guest->first; id < guest->next; id++) {
        count += wants_completion(id);
    }
    return count;
}

/* ---- the host ---- */

static struct vvb_plan *make_plan(void)
{
    struct vvb_rule rule = {.file_size = 4096,
                            .max_length = 4096,
                            .fd = disk,
                            .payload_length = 16,
                            .operation = VVB_PLAN_READ,
                            .position = {1, 1, 0, 0, {0}},
                            .length = {0, 1, 0, 9, {0}},
                            .done = {0, 0, 0, 0, {0}}};
    struct vvb_plan *plan;
    int err;

    memset(rule.mask, 0xff, 8);
    rule.value[0] = 1;
    plan = vvb_plan_new(&rule, 1, &err);
    REQUIRE(plan);
    return plan;
}

struct host {
    struct vvb_ring *ring;
    struct vvb_batch *batch;
    struct vvb_plan *plan;
    pthread_mutex_t lock;
    struct vvb_outgoing held[SLOTS];
    uint32_t held_count;
    uint64_t last; /* id */
};

static void host_init(struct host *host)
{
    memset(host, 0, sizeof(*host));
    host->ring = attach(VVB_ROLE_HOST, 0);
    REQUIRE(!vvb_ring_record(host->ring, record_fd, 0, record_bytes, SLOTS, 1));
    host->batch = vvb_batch_new(host->ring, 64);
    host->plan = make_plan();
    pthread_mutex_init(&host->lock, NULL);
}

static void host_end(struct host *host)
{
    vvb_plan_free(host->plan);
    vvb_batch_free(host->batch);
    vvb_ring_free(host->ring);
    pthread_mutex_destroy(&host->lock);
}

/* All of them, however full the ring is: the guest takes what is in it. */
static void send_all(struct host *host, struct vvb_outgoing *packets, uint32_t count,
                     const char *data, uint64_t each)
{
    for (uint32_t first = 0; first < count;) {
        struct vvb_sent sent;
        int ret = vvb_ring_send_many(host->ring, packets + first, count - first,
                                     data + first * each, (count - first) * each, &sent);

        REQUIRE(!ret || ret == VVB_E_FULL);
        first += sent.count;
        if (ret) {
            sched_yield();
        }
    }
}

static uint32_t host_take(struct host *host, uint32_t max, bool planned)
{
    struct vvb_batch *batch = host->batch;

    REQUIRE(!vvb_ring_receive(host->ring, batch, max, memory, &limits,
                              planned ? host->plan : NULL));
    if (batch->done_count) {
        send_all(host, batch->outgoing, batch->done_count, (const char *)batch->answers, 16);
    }
    pthread_mutex_lock(&host->lock);
    for (uint32_t i = 0; i < batch->count; i++) {
        const struct vvb_packet *packet = &batch->packets[i];
        uint64_t id = packet->transaction_id, word = 0;

        if (packet->seg_count) {
            vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
        }
        REQUIRE(planned || id > host->last); /* what is given again comes first, and in order */
        host->last = id;
        REQUIRE(packet->slot || !wants_completion(id));
        REQUIRE(!packet->error || (packet->error == VVB_E_TOO_LARGE && packet->replayed));
        REQUIRE(!packet->replayed || !packet->error == (id % KINDS != 3));
        if (!packet->error) {
            memcpy(&word, batch->data + packet->data_offset + packet->payload_offset + 8, 8);
            REQUIRE(word == id);
        }
        if (wants_completion(id)) {
            REQUIRE(host->held_count < SLOTS);
            host->held[host->held_count++] = (struct vvb_outgoing){
                .transaction_id = id, .payload_len = 8, .type = 11, .slot = packet->slot};
        }
    }
    pthread_mutex_unlock(&host->lock);
    return batch->count + batch->done_count;
}

/* Some of what is held, in any order; and sometimes a packet of the host's own. */
static uint32_t host_complete(struct host *host, uint32_t some)
{
    struct vvb_outgoing chosen[SLOTS];
    uint64_t payload[SLOTS] = {0};
    uint32_t count = 0;

    if (!any(4)) {
        struct vvb_outgoing own = {.transaction_id = ~0ull, .payload_len = 8, .type = 6};

        send_all(host, &own, 1, (const char *)payload, 8);
    }
    pthread_mutex_lock(&host->lock);
    while (host->held_count && count < some) {
        uint32_t which = any(host->held_count);

        chosen[count++] = host->held[which];
        host->held[which] = host->held[--host->held_count];
    }
    pthread_mutex_unlock(&host->lock);
    send_all(host, chosen, count, (const char *)payload, 8);
    return count;
}

/* ---- each step ---- */

/* Until all is done; alone on the rings. */
static void work_off(struct host *host, bool planned)
{
    while (host_take(host, 1 + any(5), planned) || host->held_count) {
        host_complete(host, any(4));
    }
}

static bool host_is_killed(uint32_t step, bool planned)
{
    pid_t pid = fork();
    struct host host;
    int status;

    REQUIRE(pid >= 0);
    if (!pid) {
        host_init(&host);
        steps_left = step;
        work_off(&host, planned);
        host_end(&host);
        _exit(0);
    }
    REQUIRE(waitpid(pid, &status, 0) == pid);
    REQUIRE(WIFEXITED(status) ? !WEXITSTATUS(status) : WTERMSIG(status) == SIGKILL);
    return WIFSIGNALED(status);
}

/* A host is killed at each step that there is, its successor somewhere, the third comes through. */
static void every_step(struct guest *guest, bool planned)
{
    bool killed = true;
    uint32_t step;

    for (step = 0; killed; step++) {
        random_state = step / 8;
        guest_init(guest, 1);
        while (guest->next <= 20) {
            REQUIRE(send_packet(guest->ring, guest->next));
            guest->next++;
        }
        killed = host_is_killed(step, planned);
        if (killed) {
            host_is_killed(step / 3, planned);
            REQUIRE(!host_is_killed(UINT32_MAX, planned));
        }
        while (guest_take(guest)) {
        }
        REQUIRE(guest->completed == wanted(guest)); /* none is lost */
        guest_end(guest);
    }
    REQUIRE(step > 150);
    fprintf(stderr, "%u steps\n", step);
}

/* ---- any moment ---- */

static void *completer(void *opaque)
{
    for (;;) {
        if (!host_complete(opaque, any(6))) {
            sched_yield();
        }
    }
    return NULL;
}

static void serve(uint32_t seed)
{
    struct host host;
    pthread_t thread;

    random_state = seed;
    host_init(&host);
    REQUIRE(!pthread_create(&thread, NULL, completer, &host));
    for (;;) {
        if (!host_take(&host, 1 + seed % 7, true)) {
            sched_yield();
        }
    }
}

static pid_t start_host(uint32_t seed)
{
    pid_t pid = fork();

    REQUIRE(pid >= 0);
    if (!pid) {
        serve(seed);
    }
    return pid;
}

static void kill_host(pid_t pid)
{
    REQUIRE(!kill(pid, SIGKILL) && waitpid(pid, NULL, 0) == pid);
}

static void any_moment(struct guest *guest, uint32_t rounds, uint32_t seed)
{
    pid_t pid;

    guest_init(guest, 1);
    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t moment;

        random_state = seed * 7919 + round;
        moment = any(400);
        pid = start_host(seed * 31 + round);
        for (uint32_t turn = 0; turn < moment; turn++) {
            if (guest->next - guest->first < sizeof(guest->seen) &&
                send_packet(guest->ring, guest->next)) {
                guest->next++;
            }
            guest_take(guest);
            usleep(5);
        }
        kill_host(pid);
    }
    pid = start_host(seed);
    for (uint32_t turn = 0; guest->completed < wanted(guest); turn++) {
        REQUIRE(turn < 1000000);
        guest_take(guest);
        usleep(100);
    }
    kill_host(pid);
    guest_take(guest);
    REQUIRE(guest->completed == wanted(guest));
    fprintf(stderr, "%u killed, %lu completions\n", rounds, (unsigned long)guest->completed);
    guest_end(guest);
}

int main(int argc, char **argv)
{
    static struct guest guest;

    set_up();
    every_step(&guest, false);
    every_step(&guest, true);
    any_moment(&guest, argc > 1 ? (uint32_t)atoi(argv[1]) : 300,
               argc > 2 ? (uint32_t)atoi(argv[2]) : 1);
    printf("ok\n");
    return 0;
}
