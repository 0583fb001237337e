/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * For net_fuzz.c: one network card's data path with two channels, its guest and its link, all in
 * one thread, and a model of who has which receive section. The link has datagrams or streams.
 *
 * Checked: guest memory outside of receive sections, and the first ones, stay as they were, and so
 * does a section from the moment that the guest is told of it; a section is handed over once; free,
 * held and taken ones are all there are; a packet of the guest is answered or left, a completion
 * taken exactly if the guest had that packet; frames that are counted are at the other end.
 */
#ifndef NET_RIG_H
#define NET_RIG_H

#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine.h"
#include "netapi.h"

enum {
    BASE_PFN = 0x10,
    CHANNELS = 2,
    OUT_PAGES = 3,
    IN_PAGES = 2,
    RING_PAGES = CHANNELS * (OUT_PAGES + IN_PAGES),
    SEND_PAGE = RING_PAGES,
    SEND_PAGES = 5,
    DATA_PAGE = SEND_PAGE + SEND_PAGES,
    DATA_PAGES = 20,
    RECEIVE_PAGE = DATA_PAGE + DATA_PAGES,
    RECEIVE_PAGES = 48, /* every second one is a guard */
    PAGES = RECEIVE_PAGE + RECEIVE_PAGES,
    FIRST = 3, /* sections that are not the data path's */
    MAX_SECTIONS = 512,
    MAX_SENT = 4096,
    PATTERN = 0xa5
};

struct sent { /* by the guest, and not yet received */
    uint64_t id;
    uint32_t ring_offset;
    uint16_t type;
    bool wanted;
};
struct held { /* a packet to the guest that it has not completed */
    uint64_t id, sum;
    uint32_t channel, count;
    uint32_t sections[64];
};
struct channel_rig {
    struct vvb_ring *host, *guest;
    struct vvb_batch *batch, *guest_batch;
    struct vvb_plan *plan;
    struct sent sent[MAX_SENT];
    uint32_t first, count;
    uint64_t answers, answered; /* wanted, and seen by the guest */
    uint64_t frames;            /* counted when last looked at */
    uint32_t late;              /* packets that it had when their buffer was taken back */
};

static struct vvb_memory *memory;
static struct vvb_region *region;
static uint8_t *world;
static struct vvb_codemap *map;
static struct vvb_net *net;
static struct channel_rig channels[CHANNELS];
static struct vvb_net_port *datagrams[CHANNELS], *streams[CHANNELS];
static int links[CHANNELS], ends[CHANNELS], stream_links[CHANNELS], stream_ends[CHANNELS];
static int idle_fd, call_fd, kick_fd, stop_fd;
static bool streaming;
static uint32_t port_count;
static struct held held[MAX_SECTIONS];
static uint32_t held_count, mine[MAX_SECTIONS], mine_count, stale[MAX_SECTIONS], stale_count;
static uint64_t serial, lease, stale_lease;
static uint32_t section_size, section_count;
static struct vvb_segs send_segs, receive_segs;
static const struct vvb_limits limits = {
    .max_payload = 256, .max_ranges = 64, .max_external = (1 << 17) + 4096};

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "net_fuzz: %s\n", what);
        abort();
    }
}

static void put32(uint8_t *to, uint32_t value)
{
    memcpy(to, &value, 4);
}

static uint32_t get32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, 4);
    return value;
}

/* ---- the receive buffer, as the guest sees it: whole pages and halves, with guards between ---- */

static void buffer_read(uint64_t offset, uint8_t *to, uint64_t len)
{
    require(!vvb_ext_read(receive_segs.v, receive_segs.count, offset, (char *)to, len), "read");
}

static uint64_t section_sum(uint32_t section)
{
    static uint8_t copy[16384 + 8];
    uint64_t sum = 1469598103934665603ull, word;

    buffer_read((uint64_t)section * section_size, copy, section_size);
    for (uint32_t i = 0; i < section_size; i += 8) {
        memcpy(&word, copy + i, 8);
        sum = (sum ^ word) * 1099511628211ull;
    }
    return sum;
}

static uint64_t held_sum(const struct held *packet)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < packet->count; i++) {
        sum = sum * 31 + section_sum(packet->sections[i]);
    }
    return sum;
}

static void check_untouched(void)
{
    static uint8_t pattern[FIRST * 16384], first[FIRST * 16384];

    memset(pattern, PATTERN, sizeof(pattern));
    for (uint32_t page = RECEIVE_PAGE; page < PAGES; page += 2) {
        require(!memcmp(world + page * 4096u, pattern, 4096), "a guard was written");
    }
    buffer_read(0, first, FIRST * section_size);
    require(!memcmp(first, pattern, FIRST * section_size), "somebody else's section was written");
}

static void check_sections(void)
{
    uint32_t out = mine_count;

    for (uint32_t i = 0; i < held_count; i++) {
        out += held[i].count;
    }
    if (lease) {
        require(vvb_net_free_sections(net) + out + FIRST == section_count, "sections are missing");
    } else {
        require(!vvb_net_free_sections(net), "sections of no buffer");
    }
}

static bool section_is_out(uint32_t section)
{
    for (uint32_t i = 0; i < mine_count; i++) {
        if (mine[i] == section) {
            return true;
        }
    }
    for (uint32_t i = 0; i < held_count; i++) {
        for (uint32_t n = 0; n < held[i].count; n++) {
            if (held[i].sections[n] == section) {
                return true;
            }
        }
    }
    return false;
}

/* ---- the guest ---- */

/* Whether a payload of that length, which is in multiples of 8, may be such a message. */
static bool whole(uint32_t length, uint32_t size)
{
    return length == (size + 7) / 8 * 8;
}

static void new_packet(uint32_t channel, const uint8_t *data, const struct vvb_packet *packet)
{
    struct held *new = &held[held_count];
    const uint8_t *payload = data + packet->payload_offset, *range = data + 24;

    new->id = packet->transaction_id;
    new->channel = channel;
    new->count = get32(data + 20);
    require(data[16] == 0x34 && data[17] == 0x12 && get32(payload) == 107, "transfer packet");
    require(new->count && new->count <= 64 && new->count * 8 + 24 <= packet->payload_offset,
            "ranges");
    require(!get32(payload + 4), "payload");
    require(whole(packet->length - packet->payload_offset, VVB_NET_NVSP_SIZE) ||
                whole(packet->length - packet->payload_offset, VVB_NET_NVSP_OLD_SIZE),
            "a message of no version's length");
    for (uint32_t i = 0; i < new->count; i++, range += 8) {
        uint32_t size = get32(range), offset = get32(range + 4), section = offset / section_size;
        uint8_t header[44];

        require(offset % section_size == 0 && section >= FIRST && section < section_count,
                "no section");
        require(!section_is_out(section), "a section twice");
        for (uint32_t n = 0; n < i; n++) {
            require(new->sections[n] != section, "a section twice in a packet");
        }
        new->sections[i] = section;
        buffer_read(offset, header, sizeof(header));
        require(size <= section_size - VVB_NET_SECTION_TAIL && get32(header) == 1 && get32(header + 4) == size &&
                    get32(header + 8) + get32(header + 12) + 8 == size && !get32(header + 16) &&
                    get32(header + 32) <= 64 && get32(header + 8) >= 36 + get32(header + 32),
                "RNDIS header");
    }
    new->sum = held_sum(new);
    held_count++;
}

static void guest_receives(uint32_t index)
{
    struct channel_rig *c = &channels[index];
    struct vvb_batch *batch = c->guest_batch;

    do {
        require(!vvb_ring_receive(c->guest, batch, 32, memory, &limits, NULL), "the guest's ring");
        for (uint32_t i = 0; i < batch->count; i++) {
            const struct vvb_packet *packet = &batch->packets[i];
            const uint8_t *data = batch->data + packet->data_offset;

            require(!packet->error, "a bad packet");
            if (packet->type == 7) {
                new_packet(index, data, packet);
            } else {
                require(packet->type == 11 && get32(data + packet->payload_offset) == 108,
                        "an answer");
                require(++c->answered <= c->answers, "an answer to nothing");
            }
        }
    } while (batch->count);
}

static void all_receive(void)
{
    for (uint32_t i = 0; i < CHANNELS; i++) {
        guest_receives(i);
    }
    check_sections();
}

static void host_receives(uint32_t how); /* net_rig_host.h */

static void guest_sends(uint32_t index, uint16_t type, uint16_t flags, uint64_t id,
                        const uint64_t *header, uint32_t header_len, const uint8_t *payload,
                        uint32_t payload_len)
{
    struct channel_rig *c = &channels[index];

    for (uint32_t attempt = 0; attempt < 2; attempt++) {
        uint32_t where = *(uint32_t *)vvb_ring_pages(c->guest, 1);
        struct vvb_fault fault;
        int signal = 0;

        if (!vvb_ring_send(c->guest, type, flags, id, (const char *)header, header_len,
                           (const char *)payload, payload_len, 1, &signal, &fault)) {
            require(c->count < MAX_SENT, "too many packets for a ring");
            c->sent[(c->first + c->count++) % MAX_SENT] =
                (struct sent){id, where, type, type != 11 && flags & 1};
            return;
        }
        host_receives(index);
    }
}

#endif
