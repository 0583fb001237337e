/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzz target for the ring engine: the input is what a hostile peer leaves in a ring.
 *
 * Input: write_index u32, read_index u32, control u32, then the ring's data from its start.
 * control: bit 0 role, bit 1 feature bits, bits 4-15 pending_send_sz / 8, bits 16-31 the sending
 * ring's read_index.
 *
 * With libFuzzer it is a coverage-guided fuzzer; with -DREPLAY its main() runs the files that are
 * named on the command line (docs/engine.md has both commands).
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine.h"

#define BASE_PFN 0x10u
#define PAGES 48u
#define HOLE_PFN (BASE_PFN + PAGES) /* a region's end; the second region starts 16 pages on */
#define RX_PAGES 4u
#define TX_PAGES 2u

static struct vvb_memory *memory;

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
    batch = vvb_batch_new(ring, 16);
    require(batch, "batch");
    do {
        int signal = 0;

        result = vvb_ring_receive(ring, batch, 16, memory, &limits, NULL);
        require(batch->bytes <= data_size, "more taken than the ring holds");
        for (uint32_t i = 0; i < batch->count; i++) {
            use_packet(batch, &batch->packets[i]);
            vvb_ring_send(ring, 11, 0, batch->packets[i].transaction_id, NULL, 0,
                          (const char *)batch->data + batch->packets[i].data_offset,
                          batch->packets[i].length & 0xff, i & 1, &signal, &fault);
        }
        vvb_ring_publish(ring, &signal);
        if (vvb_ring_unmask(ring) > 0) {
            vvb_ring_mask(ring);
        }
    } while (!result && batch->count);
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
