/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzz target for the network card's data path: the input is a script of what a hostile guest and
 * a hostile link do, between real rings and a socket as link. Steps, one byte each with what they
 * read behind it, are in run(); net_rig.h has the guest and what is checked after each of them.
 *
 * With libFuzzer it is a coverage-guided fuzzer; with -DREPLAY its main() runs the files that are
 * named on the command line (docs/engine.md has both commands).
 */
#include "net_rig_host.h"

static const uint8_t *at, *end;

static uint32_t number(uint32_t bytes)
{
    uint32_t value = 0;

    for (uint32_t i = 0; i < bytes && at < end; i++) {
        value |= (uint32_t)*at++ << (8 * i);
    }
    return value;
}

static uint32_t text(uint8_t *to, uint32_t len)
{
    if (len > (size_t)(end - at)) {
        len = (uint32_t)(end - at);
    }
    memcpy(to, at, len);
    at += len;
    return len;
}

/*
 * flags: active, checksums told, tags beside, coalesced, not receiving (64), the oldest version (128);
 * then numbers.
 */
static void settings(void)
{
    static const uint8_t addresses[12] = {2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2};
    struct vvb_net_config config = {.max_frame = 1514};
    uint32_t flags = number(1);

    config.active = flags & 1;
    config.receiving = !(flags & 64);
    config.message_size = flags & 128 ? VVB_NET_NVSP_OLD_SIZE : VVB_NET_NVSP_SIZE;
    config.singly = flags >> 7;
    config.tell_checksums = flags >> 1 & 1;
    config.tagging = flags >> 2 & 1;
    config.coalesced = flags >> 3 & 1;
    config.max_frame = flags & 16 ? 9014 : 1514;
    config.send_offloads = number(1);
    config.packet_filter = number(1);
    config.multicast_count = number(1);
    config.hash_types = number(2);
    config.table_size = number(1);
    for (uint32_t i = 0; i < VVB_NET_TABLE; i++) {
        config.table[i] = flags & 32 ? i * 5 % 67 : i % CHANNELS;
    }
    memcpy(config.addresses, addresses, sizeof(addresses));
    config.multicast[0] = 1;
    for (uint32_t i = 0; i < sizeof(config.key); i++) {
        config.key[i] = (uint8_t)(i * 29 + 7);
    }
    vvb_net_configure(net, &config);
}

/* channel, flags, then kind, channel type, section, size and what else is in the payload */
static void data_packet(bool pages)
{
    uint32_t channel = number(1) % CHANNELS, how = number(1), extra, header_len = 0;
    uint8_t payload[272] = {0};
    uint64_t header[128];

    put32(payload, how & 1 ? number(4) : 107);
    put32(payload + 4, how & 2 ? number(4) : 0);
    put32(payload + 8, how & 4 ? number(1) : 0xffffffffu);
    put32(payload + 12, number(2));
    extra = how & 8 ? number(1) : 24;
    if (pages) {
        uint32_t ranges = 1 + number(1) % 4, slot = 1;

        header[0] = (uint64_t)ranges << 32;
        for (uint32_t i = 0; i < ranges; i++) {
            uint32_t page = number(1), offset = number(2) % 4096, count = number(3) & 0x1ffff;
            uint32_t pfns = (offset + count + 4095) / 4096;

            header[slot++] = (uint64_t)offset << 32 | count;
            for (uint32_t n = 0; n < pfns && slot < 128; n++) {
                header[slot++] = BASE_PFN + DATA_PAGE + (page + n) % (how & 16 ? 99 : DATA_PAGES);
            }
        }
        header_len = slot * 8;
    }
    guest_sends(channel, pages ? 9 : 6, how & 32 ? 0 : 1, ++serial, header, header_len, payload,
                how & 64 ? extra % 16 : 16 + extra);
}

/* A completion: of a packet that the guest has, of nearly that one, or of any. */
static void completion(void)
{
    uint32_t how = number(1), channel = number(1) % CHANNELS, which = number(1);
    uint8_t payload[40] = {108};
    uint64_t id = 0;

    if (how & 1 && held_count) {
        id = held[which % held_count].id;
        channel = how & 2 ? channel : held[which % held_count].channel;
        id ^= how & 4 ? 1ull << (number(1) % 64) : 0;
    } else {
        id = (uint64_t)number(4) << 32 | number(4);
    }
    payload[0] = how & 8 ? 107 : 108;
    guest_sends(channel, 11, 0, id, NULL, 0, payload, how & 16 ? 4 : how & 32 ? 0 : 40);
}

/* queue, virtio-net header, length, and the frame's first bytes */
static void frame(void)
{
    static uint8_t data[10 + 66000];
    uint32_t queue = number(1), length, start = (number(1) & 15) * 16;

    memset(data, (int)start, sizeof(data));
    text(data, 10);
    length = number(3) % 66000;
    text(data + 10, number(1));
    link_sends(queue % CHANNELS, data, queue & 0x80 ? length % 12 : 10 + length);
}

static void write_memory(void)
{
    uint32_t offset = number(3) % ((SEND_PAGES + DATA_PAGES) * 4096u - 256u);

    text(world + SEND_PAGE * 4096u + offset, number(1));
}

static void channel_changes(void)
{
    uint32_t channel = number(1);

    if (channel & 0x80) {
        vvb_ring_hold(channels[channel % CHANNELS].host, channel >> 6 & 1);
    } else {
        reconnect(channel % CHANNELS, !(channel & 0x40));
    }
}

static void sections(void)
{
    uint32_t how = number(1);

    if (how & 1) {
        take_section(how & 2);
    } else {
        give_section(number(1), how & 2);
    }
}

static void run(void)
{
    while (at < end) {
        switch (number(1) % 14) {
        case 0:
            settings();
            break;
        case 1:
            data_packet(false);
            break;
        case 2:
            data_packet(true);
            break;
        case 3:
            completion();
            break;
        case 4:
            frame();
            break;
        case 5:
            write_memory();
            break;
        case 6:
            serve_queue(number(1));
            break;
        case 7:
            host_receives(number(1));
            break;
        case 8:
            guest_receives(number(1) % CHANNELS);
            break;
        case 9:
            lend_receive(number(1));
            break;
        case 10:
            lend_send(number(1));
            break;
        case 11:
            channel_changes();
            break;
        case 12:
            sections();
            break;
        case 13:
            ports_and_map(number(1));
            break;
        }
        check_untouched();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    at = input;
    end = input + size;
    rig_begin();
    run();
    rig_end();
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
