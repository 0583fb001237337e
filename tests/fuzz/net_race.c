/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The network card's data path with all the threads that use it, for a second or two under a
 * sanitizer: a guest on each of two channels, a thread that receives for each, one for each queue of
 * the link, the link's other end, and one that changes everything meanwhile: settings, buffers,
 * channels, wishes to be woken. At the end all sections are back. Prints "ok".
 */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "netapi.h"

#define REQUIRE(condition)                                                              \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);             \
            abort();                                                                    \
        }                                                                               \
    } while (0)

enum { CHANNELS = 2, EACH = 8, BASE_PFN = 0x100, SEND = 16, RECEIVE = 20, PAGES = 40 };
enum { SECTION = 1728, SECTIONS = (PAGES - RECEIVE) * 4096 / SECTION, FIRST = 4 };

static struct vvb_memory *memory;
static struct vvb_net *net;
static const struct vvb_limits limits = {256, 64, 1 << 17};
static struct vvb_net_port *ports[CHANNELS];
static struct vvb_net_recording *recording;
static int links[CHANNELS], ends[CHANNELS], wake_fds[CHANNELS], stop;
static struct vvb_segs send_segs, receive_segs;
static uint64_t lease;

struct end {
    struct vvb_ring *host, *guest;
    struct vvb_plan *plan;
    int kick_fd, stop_fd, wake_fd, call_fd;
    uint32_t index;
    uint64_t answers, frames, left;
};

static bool stopped(void)
{
    return __atomic_load_n(&stop, __ATOMIC_RELAXED);
}

static void settings(uint32_t variant)
{
    struct vvb_net_config config = {.active = variant % 5 != 0,
                                    .receiving = variant % 7 != 0,
                                    .max_frame = 1514,
                                    .message_size = variant & 8 ? 28 : 40,
                                    .tell_checksums = variant & 1,
                                    .tagging = variant >> 1 & 1,
                                    .coalesced = variant >> 2 & 1,
                                    .packet_filter = 0x20,
                                    .hash_types = 0x1700,
                                    .table_size = variant % 3};

    config.table[1] = 1;
    memset(config.key, 0x5b, sizeof(config.key));
    vvb_net_configure(net, &config);
}

static void use_ports(void)
{
    for (uint32_t i = 0; i < CHANNELS; i++) {
        REQUIRE(!vvb_net_set_queue(net, i, ports[i]));
    }
    REQUIRE(!vvb_net_use_queues(net, CHANNELS));
}

static void lend(void)
{
    lease++;
    REQUIRE(!vvb_net_lend_send(net, send_segs.v, send_segs.count, 6144, lease));
    REQUIRE(!vvb_net_lend_receive(net, receive_segs.v, receive_segs.count, SECTION, 1, FIRST,
                                  lease));
}

/* The guest's driver: frames out, sections back, and now and then nonsense. */
static void *guest_main(void *opaque)
{
    struct end *end = opaque;
    struct vvb_batch *batch = vvb_batch_new(end->guest, 32);
    uint8_t payload[40] = {107, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 104};
    static const uint8_t returned[40] = {108, 0, 0, 0, 1};
    struct vvb_fault fault;
    uint64_t serial = 0;

    while (!stopped()) {
        int signal = 0;

        if (serial % 64 < 16) {
            vvb_ring_send(end->guest, 6, 1, serial, NULL, 0, (char *)payload, 40, 1, &signal,
                          &fault);
            vvb_ring_send(end->guest, 11, 0, 1ull << 63 | serial << 24 | serial % SECTIONS, NULL, 0,
                          (const char *)returned, 40, 1, &signal, &fault);
        }
        serial++;
        REQUIRE(!vvb_ring_receive(end->guest, batch, 32, memory, &limits, NULL));
        for (uint32_t i = 0; i < batch->count; i++) {
            const struct vvb_packet *packet = &batch->packets[i];

            REQUIRE(!packet->error);
            end->answers += packet->type == 11;
            if (packet->type == 7) {
                end->frames++;
                while (vvb_ring_send(end->guest, 11, 0, packet->transaction_id, NULL, 0,
                                     (const char *)returned, 40, 1, &signal, &fault) &&
                       !stopped()) {
                    vvb_signal(end->kick_fd);
                    usleep(100);
                }
            }
        }
        if (signal || batch->signal) {
            vvb_signal(end->kick_fd);
        }
        if (!batch->count) {
            usleep(50);
        }
    }
    vvb_batch_free(batch);
    return NULL;
}

static void *receive_main(void *opaque)
{
    struct end *end = opaque;
    struct vvb_batch *batch = vvb_batch_new(end->host, 32);
    struct vvb_serving serving = {.kick_fd = end->kick_fd, .stop_fd = end->stop_fd,
                                  .wake_fd = end->wake_fd, .call_fd = end->call_fd,
                                  .gather_us = 20};
    struct vvb_served served;
    struct vvb_sent sent;

    vvb_ring_mask(end->host);
    while (!stopped()) {
        REQUIRE(!vvb_ring_serve(end->host, batch, 32, memory, &limits, end->plan, &serving,
                                &served));
        end->left += batch->count;
        vvb_ring_send_many(end->host, batch->outgoing + served.answered,
                           batch->answer_count - served.answered,
                           batch->answers + 40 * served.answered,
                           batch->answers_len - 40 * served.answered, &sent);
    }
    vvb_batch_free(batch);
    return NULL;
}

static void *queue_main(void *opaque)
{
    uint32_t queue = (uint32_t)(uintptr_t)opaque;
    static struct vvb_net_taken taken[CHANNELS];
    uint64_t value;

    while (!stopped()) {
        vvb_net_serve(net, queue, wake_fds[queue], &taken[queue]);
        for (uint32_t i = 0; i < taken[queue].left; i++) {
            vvb_net_give(net, taken[queue].lease, taken[queue].parts[i].section);
        }
        if (taken[queue].woken) {
            REQUIRE(read(wake_fds[queue], &value, sizeof(value)) == sizeof(value));
        }
    }
    return NULL;
}

/* The first queue has datagrams; the other one a stream, which it is connected anew to at times. */
static void *world_main(void *opaque)
{
    static uint8_t frame[10 + 600], in[1 << 16];
    struct vvb_net_port_state state;
    int pair[2];

    (void)opaque;
    for (uint32_t i = 0; !stopped(); i++) {
        uint32_t stream = i % CHANNELS;

        frame[0] = i % 3 == 2 ? 2 : 0;
        frame[8] = 600 >> 8; /* a length, behind four bytes that are sent to nobody */
        frame[9] = 600 & 0xff;
        frame[10] = (uint8_t)(i & 1);
        frame[22] = 8;
        frame[24] = 0x45;
        frame[39] = (uint8_t)i; /* of an address: for both channels */
        if (!stream) {
            frame[8] = frame[9] = 0;
        } else if (i % 256 == 255) {
            close(ends[1]);
            close(links[1]);
            REQUIRE(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair));
            links[1] = pair[0];
            ends[1] = pair[1];
            REQUIRE(!vvb_net_port_put(ports[1], i % 1024 == 255 ? -1 : links[1]));
            vvb_signal(wake_fds[1]);
        }
        if (send(ends[stream], frame + 6 * stream, sizeof(frame) - 6 * stream, 0) < 0) {
            usleep(100);
        }
        while (recv(ends[stream], in, sizeof(in), 0) > 0) {
        }
        vvb_net_port_flush(ports[1]);
        vvb_net_port_get_state(ports[1], &state);
    }
    return NULL;
}

static void *change_main(void *opaque)
{
    struct end *channels = opaque;
    struct vvb_net_news news;

    for (uint32_t i = 0; !stopped(); i++) {
        uint64_t old = lease;
        int64_t section;

        settings(i);
        vvb_net_wake_when_free(net, i % 2 ? wake_fds[0] : -1);
        section = vvb_net_section(net, old);
        REQUIRE(vvb_net_free_sections(net) <= SECTIONS - FIRST);
        switch (i % 8) {
        case 3:
            vvb_net_lend_send(net, NULL, 0, 0, old);
            vvb_net_lend_receive(net, NULL, 0, 0, 0, 0, i % 16 < 8 ? 0 : old);
            break;
        case 4:
            lend();
            break;
        case 6:
            vvb_net_disconnect(net, i / 8 % CHANNELS);
            break;
        case 7:
            vvb_net_connect(net, i / 8 % CHANNELS, channels[i / 8 % CHANNELS].host,
                            channels[i / 8 % CHANNELS].call_fd);
            break;
        }
        if (section >= 0) { /* of the buffer then, which may be gone */
            vvb_net_give(net, old, (uint32_t)section);
        }
        vvb_net_take_news(net, i % CHANNELS, &news);
        use_ports();
        usleep(200);
    }
    return NULL;
}

static void set_up(struct end *channels)
{
    int fd = memfd_create("race", MFD_CLOEXEC), err = 0;
    struct vvb_region *region;
    uint8_t message[104] = {1, 0, 0, 0, 104, 0, 0, 0, 36, 0, 0, 0, 60};

    REQUIRE(fd >= 0 && !ftruncate(fd, PAGES * 4096));
    REQUIRE(pwrite(fd, message, sizeof(message), SEND * 4096) == sizeof(message));
    recording = vvb_net_recording_new(memfd_create("recording", MFD_CLOEXEC), 0, 1000000,
                                  eventfd(0, EFD_NONBLOCK));
    REQUIRE(recording);
    memory = vvb_memory_new();
    region = vvb_region_new(BASE_PFN * 4096, PAGES * 4096, fd, 0, &err);
    net = vvb_net_new();
    REQUIRE(memory && net && region && !vvb_memory_set(memory, &region, 1));
    REQUIRE(!vvb_translate_span(memory, (BASE_PFN + SEND) * 4096, 4 * 4096, &send_segs));
    REQUIRE(!vvb_translate_span(memory, (BASE_PFN + RECEIVE) * 4096, (PAGES - RECEIVE) * 4096,
                                &receive_segs));
    for (uint32_t i = 0; i < CHANNELS; i++) {
        struct vvb_fault fault;
        uint64_t pfns[EACH];
        int pair[2];

        for (uint32_t n = 0; n < EACH; n++) {
            pfns[n] = BASE_PFN + i * EACH + n;
        }
        channels[i] = (struct end){.index = i};
        channels[i].guest = vvb_ring_attach(memory, pfns, EACH, 4, VVB_ROLE_GUEST, 1, &fault, &err);
        channels[i].host = vvb_ring_attach(memory, pfns, EACH, 4, VVB_ROLE_HOST, 0, &fault, &err);
        channels[i].plan = vvb_net_plan(net, i);
        channels[i].kick_fd = eventfd(0, EFD_NONBLOCK);
        channels[i].stop_fd = eventfd(0, EFD_NONBLOCK);
        channels[i].wake_fd = eventfd(0, EFD_NONBLOCK);
        channels[i].call_fd = eventfd(0, EFD_NONBLOCK);
        wake_fds[i] = eventfd(0, 0);
        REQUIRE(channels[i].guest && channels[i].host && channels[i].plan);
        REQUIRE(!socketpair(AF_UNIX, (i ? SOCK_STREAM : SOCK_SEQPACKET) | SOCK_NONBLOCK, 0, pair));
        links[i] = pair[0];
        ends[i] = pair[1];
        ports[i] = vvb_net_port_new(i ? VVB_NET_PORT_STREAM : VVB_NET_PORT_DATAGRAM, -1);
        REQUIRE(ports[i] && !vvb_net_port_put(ports[i], links[i]));
        vvb_net_port_record(ports[i], recording);
        REQUIRE(!vvb_net_connect(net, i, channels[i].host, channels[i].call_fd));
    }
    use_ports();
    settings(1);
    lend();
}

int main(int argc, char **argv)
{
    static struct end channels[CHANNELS];
    pthread_t threads[2 + 3 * CHANNELS];
    uint32_t count = 0;

    set_up(channels);
    for (uint32_t i = 0; i < CHANNELS; i++) {
        REQUIRE(!pthread_create(&threads[count++], NULL, guest_main, &channels[i]));
        REQUIRE(!pthread_create(&threads[count++], NULL, receive_main, &channels[i]));
        REQUIRE(!pthread_create(&threads[count++], NULL, queue_main, (void *)(uintptr_t)i));
    }
    REQUIRE(!pthread_create(&threads[count++], NULL, world_main, NULL));
    REQUIRE(!pthread_create(&threads[count++], NULL, change_main, channels));
    usleep((useconds_t)(argc > 1 ? atoi(argv[1]) : 1000) * 1000);
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < CHANNELS; i++) {
        vvb_signal(channels[i].stop_fd);
        vvb_signal(wake_fds[i]);
    }
    while (count) {
        REQUIRE(!pthread_join(threads[--count], NULL));
    }
    for (uint32_t i = 0; i < CHANNELS; i++) {
        vvb_net_disconnect(net, i);
        REQUIRE(channels[i].answers);
        REQUIRE(channels[i].frames);
        REQUIRE(channels[i].left);
    }
    lend(); /* a lease with nothing out */
    REQUIRE(vvb_net_free_sections(net) == SECTIONS - FIRST);
    printf("ok\n");
    return 0;
}
