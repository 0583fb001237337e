/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine under sanitizers, without Python: both roles on the same pages, at every wrap offset;
 * two threads that keep the rings full; a peer that changes packets while they are read; plans; maps of
 * translated code that change while writes are reported; a guest that keeps the engine busy while it
 * is to stop; memory that is truncated under us. Prints "ok" at the end; aborts otherwise.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ringbuf.h"

#define REQUIRE(condition)                                                              \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);             \
            abort();                                                                    \
        }                                                                               \
    } while (0)

#define PAGES 64u
#define BASE_PFN 0x100u

static struct vvb_memory *memory;
static struct vvb_region *region;
static int memory_fd;
static const struct vvb_limits limits = {
    .max_payload = 1 << 19, .max_ranges = 1 << 16, .max_external = 1 << 30};

static void set_up(void)
{
    int err = 0;

    memory_fd = memfd_create("check", MFD_CLOEXEC);
    REQUIRE(memory_fd >= 0 && !ftruncate(memory_fd, PAGES * 4096));
    memory = vvb_memory_new();
    region = vvb_region_new(BASE_PFN * 4096, PAGES * 4096, memory_fd, 0, &err);
    REQUIRE(memory && region && !vvb_memory_set(memory, &region, 1));
}

static void tear_down(void)
{
    REQUIRE(!vvb_memory_set(memory, NULL, 0));
    REQUIRE(!vvb_region_wait_unused(region, 0));
    vvb_memory_free(memory);
    vvb_region_free(region);
    close(memory_fd);
}

static struct vvb_ring *attach(int role, int initialize, uint32_t each)
{
    uint64_t pfns[PAGES];
    struct vvb_fault fault;
    struct vvb_ring *ring;
    int err;

    for (uint32_t i = 0; i < 2 * each; i++) {
        pfns[i] = BASE_PFN + (i % 2 ? 2 * each - i : i); /* forwards and backwards, mixed */
    }
    ring = vvb_ring_attach(memory, pfns, 2 * each, each, role, initialize, &fault, &err);
    REQUIRE(ring);
    return ring;
}

static void every_wrap_offset(void)
{
    for (uint32_t start = 0; start < 4096; start += 8) {
        struct vvb_ring *guest = attach(VVB_ROLE_GUEST, 1, 2);
        uint32_t *out = (uint32_t *)vvb_ring_pages(guest, 1);
        struct vvb_ring *host;
        struct vvb_batch *batch;
        struct vvb_fault fault;
        char payload[200];
        int signal = 0;

        out[0] = out[1] = start;
        vvb_ring_free(guest);
        guest = attach(VVB_ROLE_GUEST, 0, 2);
        host = attach(VVB_ROLE_HOST, 0, 2);
        batch = vvb_batch_new(host, 64);
        for (size_t i = 0; i < sizeof(payload); i++) {
            payload[i] = (char)(start / 8 + i);
        }
        REQUIRE(!vvb_ring_send(guest, 6, 1, start, NULL, 0, payload, sizeof(payload), 1, &signal,
                               &fault));
        REQUIRE(signal == 1);
        REQUIRE(!vvb_ring_receive(host, batch, 64, memory, &limits, NULL));
        REQUIRE(batch->count == 1 && batch->packets[0].transaction_id == start);
        REQUIRE(batch->packets[0].length == 16 + sizeof(payload));
        REQUIRE(!memcmp(batch->data + 16, payload, sizeof(payload)));
        vvb_batch_free(batch);
        vvb_ring_free(host);
        vvb_ring_free(guest);
    }
}

struct end {
    struct vvb_ring *ring;
    int wake, peer;
    uint32_t packets;
};

static void *produce(void *opaque)
{
    struct end *end = opaque;

    for (uint32_t i = 0; i < end->packets;) {
        char payload[512];
        uint32_t len = i * 37 % sizeof(payload);
        struct vvb_fault fault;
        int signal = 0, ret;

        memset(payload, (int)i, sizeof(payload));
        ret = vvb_ring_send(end->ring, 6, 0, i, NULL, 0, payload, len, 1, &signal, &fault);
        if (signal) {
            vvb_signal(end->peer);
        }
        if (ret == VVB_E_FULL) {
            /* A lost wake-up shows as this time-out. */
            REQUIRE(vvb_wait(&end->wake, 1, 20000) == 1);
            continue;
        }
        REQUIRE(!ret);
        i++;
    }
    return NULL;
}

static void *consume(void *opaque)
{
    struct end *end = opaque;
    struct vvb_batch *batch = vvb_batch_new(end->ring, 7);
    uint32_t got = 0;

    vvb_ring_mask(end->ring);
    while (got < end->packets) {
        REQUIRE(!vvb_ring_receive(end->ring, batch, 7, memory, &limits, NULL));
        if (batch->signal) {
            vvb_signal(end->peer);
        }
        for (uint32_t i = 0; i < batch->count; i++, got++) {
            const struct vvb_packet *packet = &batch->packets[i];
            uint32_t len = (got * 37 % 512 + 7) & ~7u;

            REQUIRE(packet->transaction_id == got);
            REQUIRE(packet->length == 16 + len);
            for (uint32_t j = 0; j < got * 37 % 512; j++) {
                REQUIRE(batch->data[packet->data_offset + 16 + j] == (uint8_t)got);
            }
        }
        if (!batch->count) {
            if (!vvb_ring_unmask(end->ring)) {
                REQUIRE(vvb_wait(&end->wake, 1, 20000) == 1);
            }
            vvb_ring_mask(end->ring);
        }
    }
    vvb_batch_free(batch);
    return NULL;
}

static void two_threads(uint32_t packets)
{
    struct end guest = {.packets = packets}, host = {.packets = packets};
    pthread_t threads[2];

    guest.ring = attach(VVB_ROLE_GUEST, 1, 2);
    host.ring = attach(VVB_ROLE_HOST, 0, 2);
    guest.wake = host.peer = eventfd(0, EFD_NONBLOCK);
    host.wake = guest.peer = eventfd(0, EFD_NONBLOCK);
    pthread_create(&threads[0], NULL, produce, &guest);
    pthread_create(&threads[1], NULL, consume, &host);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    vvb_ring_free(guest.ring);
    vvb_ring_free(host.ring);
    close(guest.wake);
    close(host.wake);
}

/* 16 bytes: operation u32, position u16 BE, length u16 BE (blocks), done u64. */
static struct vvb_plan *make_plan(int fd, uint64_t file_size)
{
    struct vvb_rule rules[2] = {0};
    struct vvb_plan *plan;
    int err;

    for (uint32_t i = 0; i < 2; i++) {
        rules[i] = (struct vvb_rule){.file_size = file_size,
                                     .max_length = 65536,
                                     .fd = fd,
                                     .payload_length = 16,
                                     .operation = i,
                                     .position = {4, 2, 1, 9, {0}},
                                     .length = {6, 2, 1, 9, {0}},
                                     .done = {8, 8, 0, 0, {0}}};
        memset(rules[i].mask, 0xff, 4);
        rules[i].value[0] = (uint8_t)i;
        memset(rules[i].keep, 0xff, 8);
    }
    plan = vvb_plan_new(rules, 2, &err);
    REQUIRE(plan);
    return plan;
}

static void send_transfer(struct vvb_ring *ring, int write, uint8_t block, uint8_t blocks,
                          uint32_t bytes, uint64_t pfn)
{
    uint32_t header[4 + 2 * 16] = {0, 1, bytes, 0};
    uint8_t payload[16] = {(uint8_t)write, 0, 0, 0, 0, block, 0, blocks};
    uint32_t pages = (bytes + 4095) / 4096;
    struct vvb_fault fault;
    int signal = 0;

    for (uint32_t i = 0; i < pages; i++) {
        uint64_t each = pfn + pages - 1 - i; /* backwards: as many segments as pages */

        memcpy(&header[4 + 2 * i], &each, 8);
    }
    REQUIRE(!vvb_ring_send(ring, 9, 1, block, (char *)header, 16 + 8 * pages, (char *)payload,
                           sizeof(payload), 1, &signal, &fault));
}

/* Every length and place, some of it beyond the end: done, or left alone with all its uses. */
static void plans(void)
{
    struct vvb_ring *guest = attach(VVB_ROLE_GUEST, 1, 4), *host = attach(VVB_ROLE_HOST, 0, 4);
    struct vvb_batch *batch = vvb_batch_new(host, 64), *answers = vvb_batch_new(guest, 64);
    int disk = memfd_create("disk", MFD_CLOEXEC);
    struct vvb_plan *plan = make_plan(disk, 64 * 512);
    char *pages = region->host + 32 * 4096;

    for (uint32_t i = 0; i < 64; i++) {
        char block[512];

        memset(block, (int)i + 1, sizeof(block));
        REQUIRE(pwrite(disk, block, 512, i * 512) == 512);
    }
    for (uint32_t block = 0; block < 70; block++) {
        for (uint32_t blocks = 0; blocks < 40; blocks += 3) {
            bool fits = blocks && block + blocks <= 64 && blocks * 512 <= 4 * 4096;
            struct vvb_sent sent;

            memset(pages, 0, 4 * 4096);
            send_transfer(guest, 0, (uint8_t)block, (uint8_t)blocks, 4 * 4096, BASE_PFN + 32);
            REQUIRE(!vvb_ring_receive(host, batch, 64, memory, &limits, plan));
            REQUIRE(batch->done_count == fits && batch->count == !fits);
            if (!fits) {
                vvb_segs_put(batch->segs.v, batch->segs.count);
                continue;
            }
            for (uint32_t i = 0; i < blocks; i++) {
                uint32_t page = 3 - i / 8;

                REQUIRE(pages[page * 4096 + i % 8 * 512] == (char)(block + i + 1));
            }
            REQUIRE(batch->span_count == (blocks + 7) / 8);
            REQUIRE(!vvb_ring_send_many(host, batch->outgoing, batch->done_count, batch->answers,
                                        batch->answers_len, &sent));
            REQUIRE(sent.count == 1);
            REQUIRE(!vvb_ring_receive(guest, answers, 64, memory, &limits, NULL));
            REQUIRE(answers->count == 1 && answers->packets[0].transaction_id == block);
            REQUIRE(!memcmp(answers->data + 24, &(uint64_t){blocks * 512}, 8));
        }
    }
    REQUIRE(!vvb_region_wait_unused(region, 0));
    vvb_plan_free(plan);
    vvb_batch_free(answers);
    vvb_batch_free(batch);
    vvb_ring_free(host);
    vvb_ring_free(guest);
    close(disk);
}

/* Scribbles over descriptors and ranges while the other side reads them. */
static int scribbling;

static void *scribble(void *opaque)
{
    uint16_t *words = opaque;
    uint32_t seed = 1;

    while (__atomic_load_n(&scribbling, __ATOMIC_RELAXED)) {
        seed = seed * 1664525 + 1013904223;
        __atomic_store_n(&words[(seed >> 8) % 64], (uint16_t)(seed >> 16 & 0x1f),
                         __ATOMIC_RELAXED);
    }
    return NULL;
}

static void changing_packets(void)
{
    int disk = memfd_create("disk", MFD_CLOEXEC);
    struct vvb_plan *plan = make_plan(disk, 4096);
    pthread_t thread;
    uint32_t seen = 0;

    REQUIRE(!ftruncate(disk, 4096));

    scribbling = 1;
    for (int round = 0; round < 2000; round++) {
        struct vvb_ring *guest = attach(VVB_ROLE_GUEST, 1, 2);
        struct vvb_ring *host = attach(VVB_ROLE_HOST, 0, 2);
        struct vvb_batch *batch = vvb_batch_new(host, 64);
        uint32_t *out = (uint32_t *)vvb_ring_pages(guest, 1);
        int result;

        if (round == 0) {
            REQUIRE(!pthread_create(&thread, NULL, scribble, (char *)region->host + 3 * 4096));
        }
        out[0] = 1024;
        do {
            result = vvb_ring_receive(host, batch, 64, memory, &limits, round % 2 ? plan : NULL);
            for (uint32_t i = 0; i < batch->count; i++) {
                const struct vvb_packet *packet = &batch->packets[i];

                REQUIRE(packet->length <= 1024 && packet->payload_offset <= packet->length);
                if (packet->seg_count) {
                    vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
                }
                seen++;
            }
        } while (!result && (batch->count || batch->done_count));
        vvb_batch_free(batch);
        vvb_ring_free(host);
        vvb_ring_free(guest);
    }
    __atomic_store_n(&scribbling, 0, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    REQUIRE(seen);
    vvb_plan_free(plan);
    close(disk);
}

static void *report(void *opaque)
{
    struct vvb_span span = {.gpa = BASE_PFN * 4096, .len = 3 * 4096}, hits[4];
    uint64_t *found = opaque;

    while (__atomic_load_n(&scribbling, __ATOMIC_RELAXED)) {
        uint32_t count = vvb_memory_written(memory, &span, 1, hits, 4);

        REQUIRE(count <= 1 && (!count || hits[0].len == span.len));
        __atomic_add_fetch(found, count, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* A map that is no longer used may be freed at once, whoever is reporting. */
static void listeners_that_change(void)
{
    struct vvb_code_region code = {
        .gpa = BASE_PFN * 4096, .size = PAGES * 4096, .first_bit = UINT64_MAX};
    struct vvb_codemap *maps[2] = {NULL, NULL};
    uint64_t found = 0;
    pthread_t thread;
    int err = 0;

    __atomic_store_n(&scribbling, 1, __ATOMIC_RELAXED);
    REQUIRE(!pthread_create(&thread, NULL, report, &found));
    /* Until the other thread has had its turn, too. */
    for (int round = 0; round < 20000 || !__atomic_load_n(&found, __ATOMIC_RELAXED); round++) {
        maps[round % 2] = round % 3 ? vvb_codemap_new(-1, 0, &code, 1, &err) : NULL;
        vvb_memory_use_codemap(memory, maps[round % 2]);
        REQUIRE(vvb_memory_watched(memory) == (maps[round % 2] != NULL));
        vvb_codemap_free(maps[(round + 1) % 2]);
        maps[(round + 1) % 2] = NULL;
    }
    __atomic_store_n(&scribbling, 0, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    vvb_memory_use_codemap(memory, NULL);
    vvb_codemap_free(maps[0]);
    vvb_codemap_free(maps[1]);
}

/* ---- a guest that is quick: whenever the engine lets packets gather, some are there ---- */

static struct vvb_ring *quick;
static struct vvb_batch *quick_batch;
static uint32_t quick_packets; /* in each rest */
static uint32_t quick_rests;

static void put_quickly(uint32_t count)
{
    struct vvb_fault fault;
    char payload[8] = {0};
    int wanted = 0;

    for (uint32_t i = 0; i < count; i++) {
        REQUIRE(!vvb_ring_send(quick, PKT_DATA_INBAND, VVB_COMPLETION_REQUESTED, i, NULL, 0,
                               payload, 8, 1, &wanted, &fault));
    }
}

/* The engine's only use of it is its rest. */
int nanosleep(const struct timespec *time, struct timespec *left)
{
    (void)time;
    (void)left;
    if (quick && quick_rests++ < 1000) {
        vvb_ring_receive(quick, quick_batch, 64, memory, &limits, NULL);
        put_quickly(quick_packets);
    }
    return 0;
}

static bool fits_all(const struct vvb_plan *plan, const struct vvb_batch *batch,
                     struct vvb_todo *todo)
{
    (void)plan;
    (void)batch;
    todo->length = 0;
    return true;
}

static bool answer_all(const struct vvb_plan *plan, struct vvb_batch *batch,
                       const struct vvb_todo *todo)
{
    uint8_t *answer = vvb_plan_answer(batch, &batch->packets[todo->packet], 8);

    (void)plan;
    memset(answer, 0, 8);
    return true;
}

/* However its bursts fall, the engine sees soon that it is to stop. */
static void stop_amid_traffic(uint32_t first, uint32_t each)
{
    struct vvb_plan plan = {fits_all, answer_all};
    struct vvb_ring *host;
    struct vvb_batch *batch;
    struct vvb_served served;
    struct vvb_serving serving = {.kick_fd = eventfd(0, EFD_NONBLOCK),
                                  .stop_fd = eventfd(1, EFD_NONBLOCK),
                                  .wake_fd = eventfd(1, EFD_NONBLOCK),
                                  .call_fd = eventfd(0, EFD_NONBLOCK),
                                  .gather_us = 100};

    quick = attach(VVB_ROLE_GUEST, 1, 17);
    host = attach(VVB_ROLE_HOST, 0, 17);
    quick_batch = vvb_batch_new(quick, 64);
    batch = vvb_batch_new(host, 64);
    REQUIRE(quick_batch && batch);
    quick_packets = each;
    quick_rests = 0;
    vvb_ring_mask(host);
    put_quickly(first);
    REQUIRE(!vvb_ring_serve(host, batch, 64, memory, &limits, &plan, &serving, &served));
    REQUIRE(served.fired & 2);
    REQUIRE(quick_rests < 100);
    close(serving.kick_fd);
    close(serving.stop_fd);
    close(serving.wake_fd);
    close(serving.call_fd);
    vvb_batch_free(quick_batch);
    vvb_batch_free(batch);
    vvb_ring_free(host);
    vvb_ring_free(quick);
    quick = NULL;
}

static void truncated_memory(void)
{
    struct vvb_ring *guest = attach(VVB_ROLE_GUEST, 1, 2);
    struct vvb_ring *host = attach(VVB_ROLE_HOST, 0, 2);
    struct vvb_batch *batch = vvb_batch_new(host, 4);
    struct vvb_segs segs = {0};
    struct vvb_fault fault;
    char copy[8192];
    int signal = 0;

    REQUIRE(!vvb_translate_span(memory, BASE_PFN * 4096 + 100, 8000, &segs));
    REQUIRE(!ftruncate(memory_fd, 0));
    REQUIRE(vvb_ext_read(segs.v, segs.count, 0, copy, 8000) < 0);
    REQUIRE(vvb_region_lost(region));
    vvb_segs_put(segs.v, segs.count);
    vvb_segs_free(&segs);
    REQUIRE(vvb_ring_receive(host, batch, 4, memory, &limits, NULL) == VVB_E_LOST);
    REQUIRE(vvb_ring_send(guest, 6, 0, 1, NULL, 0, copy, 8, 1, &signal, &fault) == VVB_E_LOST);
    vvb_batch_free(batch);
    vvb_ring_free(host);
    vvb_ring_free(guest);
}

int main(int argc, char **argv)
{
    uint32_t packets = argc > 1 ? (uint32_t)atoi(argv[1]) : 20000;

    set_up();
    every_wrap_offset();
    two_threads(packets);
    plans();
    changing_packets();
    listeners_that_change();
    for (uint32_t first = 1; first < 40; first++) {
        stop_amid_traffic(first, 2);
    }
    truncated_memory();
    tear_down();
    printf("ok\n");
    return 0;
}
