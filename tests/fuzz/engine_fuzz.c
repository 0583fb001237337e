/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzz target for the ring engine: the input is what a hostile peer leaves in a ring.
 *
 * Input: write_index u32, read_index u32, control u32, then the ring's data from its start.
 * control: bit 0 role, bit 1 feature bits, bit 2 with a plan, bit 3 with a record of packets in
 * flight, bits 4-15 pending_send_sz / 8, bits 16-31 the sending ring's read_index. The record holds
 * the same bytes as the ring.
 *
 * With libFuzzer it is a coverage-guided fuzzer; with -DREPLAY its main() runs the files that are
 * named on the command line (docs/engine.md has both commands).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"

#define BASE_PFN 0x10u
#define PAGES 48u
#define HOLE_PFN (BASE_PFN + PAGES) /* a region's end; the second region starts 16 pages on */
#define RX_PAGES 4u
#define TX_PAGES 2u

#define FILE_SIZE 16384u
#define SLOTS 4u
#define RECORD_SIZE 12288u

static struct vvb_memory *memory;
static struct vvb_plan *plan;
static int disk, record;

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "engine_fuzz: %s\n", what);
        abort();
    }
}

static void set_up(void)
{
    struct vvb_region *regions[2];
    int fd = memfd_create("fuzz", MFD_CLOEXEC), err = 0;

    require(fd >= 0 && !ftruncate(fd, 64 * 4096), "memfd");
    memory = vvb_memory_new();
    regions[0] = vvb_region_new(BASE_PFN * 4096, PAGES * 4096, fd, 0, &err);
    regions[1] = vvb_region_new((HOLE_PFN + 16) * 4096, 16 * 4096, fd, PAGES * 4096, &err);
    require(memory && regions[0] && regions[1], "regions");
    require(!vvb_memory_set(memory, regions, 2), "snapshot");
    close(fd);
}

/* Payload: operation u32, then position u64 BE and length u16 BE in blocks, room u32, 14 more. */
static void set_up_plan(void)
{
    struct vvb_rule rules[2] = {0};
    int err = 0;

    record = memfd_create("record", MFD_CLOEXEC);
    require(record >= 0 && !ftruncate(record, RECORD_SIZE), "record");
    disk = memfd_create("disk", MFD_CLOEXEC);
    require(disk >= 0 && !ftruncate(disk, FILE_SIZE - 512), "disk"); /* its last block is missing */
    for (uint32_t i = 0; i < 2; i++) {
        rules[i] = (struct vvb_rule){.file_size = i ? FILE_SIZE - 512 : FILE_SIZE,
                                     .max_length = 8192,
                                     .fd = disk,
                                     .payload_length = 32,
                                     .operation = i,
                                     .nowait = !i,
                                     .position = {4, 8, 1, 9, {0}},
                                     .length = {12, 2, 1, 9, {0}},
                                     .room = {14, 4, 0, 0, {0}},
                                     .done = {24, 4, 0, 0, {0}}};
        memset(rules[i].mask, 0xff, 4);
        rules[i].value[0] = (uint8_t)(1 + i);
        memset(rules[i].keep, 0xff, 24);
        rules[i].set[31] = 0x77;
    }
    plan = vvb_plan_new(rules, 2, &err);
    require(plan, "plan");
    rules[1].payload_length = 31;
    require(!vvb_plan_new(rules, 2, &err) && err, "a bad plan");
}

/* What another back end left, perhaps. */
static void attach_record(struct vvb_ring *ring, const uint8_t *input, size_t size)
{
    int ret;

    if (size > RECORD_SIZE) {
        size = RECORD_SIZE;
    }
    require(!vvb_inflight_clear(record, 0, RECORD_SIZE), "clear");
    require(pwrite(record, input, size, 0) == (ssize_t)size, "record");
    ret = vvb_ring_record(ring, record, 0, RECORD_SIZE, SLOTS, 1);
    require(!ret || ret == -EBADMSG || ret == -ESTALE, "record is refused for its contents only");
    require(vvb_ring_to_replay(ring) <= SLOTS, "more than there are slots");
    if (ret) {
        require(!vvb_inflight_clear(record, 0, RECORD_SIZE), "clear");
        require(!vvb_ring_record(ring, record, 0, RECORD_SIZE, SLOTS, 0), "an empty record");
    }
}

/* What a plan did is what it may do. */
static void check_done(const struct vvb_batch *batch)
{
    uint64_t answers = 0;
    struct stat status;

    require(!fstat(disk, &status) && status.st_size == FILE_SIZE - 512, "the file has grown");
    for (uint32_t i = 0; i < batch->done_count; i++) {
        const uint8_t *answer = batch->answers + answers;

        answers += batch->outgoing[i].payload_len;
        require(batch->outgoing[i].payload_len == 32 && batch->outgoing[i].type == 11, "answer");
        require((answer[0] == 1 || answer[0] == 2) && answer[31] == 0x77, "answer's bytes");
    }
    require(answers == batch->answers_len && batch->done_payload == answers, "answers");
    for (uint32_t i = 0; i < batch->span_count; i++) {
        uint64_t first = batch->spans[i].gpa >> 12;
        uint64_t last = (batch->spans[i].gpa + batch->spans[i].len - 1) >> 12;

        require(batch->spans[i].len, "an empty span");
        require((first >= BASE_PFN && last < HOLE_PFN) ||
                    (first >= HOLE_PFN + 16 && last < HOLE_PFN + 32),
                "a span outside guest memory");
    }
}

/* Everything a device could do with a packet that was let through. */
static void use_packet(const struct vvb_batch *batch, const struct vvb_packet *packet)
{
    const struct vvb_seg *segs = packet->seg_count ? batch->segs.v + packet->first_seg : NULL;
    uint64_t total = 0;
    static char private_copy[1 << 20];

    require(packet->payload_offset <= packet->length, "payload outside the packet");
    require(packet->data_offset + packet->length <= batch->data_len, "packet outside the batch");
    require(!packet->error || !packet->seg_count, "external data of a bad packet");
    for (uint32_t i = 0; i < packet->seg_count; i++) {
        uint64_t first = segs[i].gpa >> 12, last = (segs[i].gpa + segs[i].len - 1) >> 12;

        require(segs[i].len, "an empty segment");
        require((first >= BASE_PFN && last < HOLE_PFN) ||
                    (first >= HOLE_PFN + 16 && last < HOLE_PFN + 32),
                "a segment outside guest memory");
        total += segs[i].len;
    }
    require(total == packet->external_length, "length of external data");
    if (packet->seg_count) {
        uint64_t part = total < sizeof(private_copy) ? total : sizeof(private_copy);

        require(!vvb_ext_read(segs, packet->seg_count, total - part, private_copy, part), "read");
        vvb_segs_put(segs, packet->seg_count);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    static uint64_t pfns[RX_PAGES + TX_PAGES];
    struct vvb_limits limits = {.max_payload = 8192, .max_ranges = 64, .max_external = 1 << 20};
    uint32_t control, *header, data_size = (RX_PAGES - 1) * 4096;
    struct vvb_fault fault;
    struct vvb_batch *batch;
    struct vvb_ring *ring;
    int err, role, result;

    if (size < 12) {
        return 0;
    }
    if (!memory) {
        set_up();
        set_up_plan();
    }
    memcpy(&control, input + 8, 4);
    role = control & 1 ? VVB_ROLE_GUEST : VVB_ROLE_HOST;
    for (uint32_t i = 0; i < RX_PAGES + TX_PAGES; i++) {
        pfns[i] = BASE_PFN + (i * 7) % (RX_PAGES + TX_PAGES); /* scattered */
    }
    ring = vvb_ring_attach(memory, pfns, RX_PAGES + TX_PAGES,
                           role == VVB_ROLE_HOST ? RX_PAGES : TX_PAGES, role, 1, &fault, &err);
    require(ring, "attach");
    header = (uint32_t *)vvb_ring_pages(ring, 0);
    memcpy(&header[0], input, 4);
    memcpy(&header[1], input + 4, 4);
    header[3] = (control >> 4 & 0xfff) * 8;
    header[16] = control >> 1 & 1;
    ((uint32_t *)vvb_ring_pages(ring, 1))[1] = control >> 16;
    size -= 12;
    memcpy((char *)header + 4096, input + 12, size < data_size ? size : data_size);
    vvb_ring_free(ring);

    /* Attached once more without clearing: the read index comes from the header, as on RESUME. */
    ring = vvb_ring_attach(memory, pfns, RX_PAGES + TX_PAGES,
                           role == VVB_ROLE_HOST ? RX_PAGES : TX_PAGES, role, 0, &fault, &err);
    if (!ring) {
        require(fault.error == VVB_E_INDEX, "attach fails for its indices only");
        return 0;
    }
    if (control & 8 && role == VVB_ROLE_HOST) {
        attach_record(ring, input + 12, size);
    }
    batch = vvb_batch_new(ring, 16);
    require(batch, "batch");
    do {
        struct vvb_sent sent;
        int signal = 0;

        result = vvb_ring_receive(ring, batch, 16, memory, &limits, control & 4 ? plan : NULL);
        require(batch->bytes <= data_size, "more taken than the ring holds");
        require(batch->count + batch->done_count <= 16, "more taken than asked for");
        check_done(batch);
        vvb_ring_send_many(ring, batch->outgoing, batch->done_count, batch->answers,
                           batch->answers_len, &sent);
        require(sent.count <= batch->done_count, "more sent than there are");
        for (uint32_t i = 0; i < batch->count; i++) {
            const struct vvb_packet *packet = &batch->packets[i];
            const char *data = (const char *)batch->data + packet->data_offset;

            use_packet(batch, packet);
            require(packet->slot <= SLOTS, "a slot that there is not");
            if (packet->slot) {
                struct vvb_outgoing answer = {.transaction_id = packet->transaction_id,
                                              .payload_len = packet->length & 0xff,
                                              .type = 11,
                                              .slot = packet->slot};

                vvb_ring_send_many(ring, &answer, 1, data, answer.payload_len, &sent);
                continue;
            }
            vvb_ring_send(ring, 11, 0, packet->transaction_id, NULL, 0, data,
                          packet->length & 0xff, i & 1, &signal, &fault);
        }
        vvb_ring_publish(ring, &signal);
        if (vvb_ring_unmask(ring) > 0) {
            vvb_ring_mask(ring);
        }
    } while (!result && (batch->count || batch->done_count));
    vvb_batch_free(batch);
    vvb_ring_free(ring);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv)
{
    static uint8_t input[1 << 16];

    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        size_t size;

        require(file, argv[i]);
        size = fread(input, 1, sizeof(input), file);
        fclose(file);
        LLVMFuzzerTestOneInput(input, size);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
#endif
