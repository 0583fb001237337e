/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * For net_fuzz.c: the host's side of net_rig.h, which says what is checked; what is lent and opened;
 * the beginning and the end.
 */
#ifndef NET_RIG_HOST_H
#define NET_RIG_HOST_H

#include "net_rig.h"

/* ---- the host ---- */

static void completed(uint32_t index, uint64_t id, bool left)
{
    for (uint32_t i = 0; i < held_count; i++) {
        if (held[i].id == id && held[i].channel == index) {
            require(!left, "a completion that was known was left");
            require(held_sum(&held[i]) == held[i].sum, "the guest's section was written");
            held[i] = held[--held_count];
            return;
        }
    }
    if (id >> 63 && channels[index].late) {
        require(!left, "a late completion was left");
        channels[index].late--;
        return;
    }
    require(left, "a completion that was guessed was taken");
}

/* What came out of the ring is what went in; what was left can be told from what was done. */
static void account(uint32_t index, uint64_t done)
{
    struct channel_rig *c = &channels[index];
    struct vvb_batch *batch = c->batch;
    uint32_t left = 0;
    uint64_t total = done + batch->count;

    require(total <= c->count, "more packets than there were");
    for (uint64_t i = 0; i < total; i++) {
        const struct sent *sent = &c->sent[c->first];
        const struct vvb_packet *packet = &batch->packets[left];
        bool is_left = left < batch->count && packet->ring_offset == sent->ring_offset &&
                       packet->transaction_id == sent->id && packet->type == sent->type;

        left += is_left;
        if (sent->type == 11) {
            completed(index, sent->id, is_left);
        } else {
            require(sent->wanted || is_left, "done, and nobody wanted it");
            c->answers += sent->wanted;
        }
        c->first = (c->first + 1) % MAX_SENT;
        c->count--;
    }
    require(left == batch->count, "packets that nobody sent");
}

/* Returns the bytes that packets have in the data that goes with them. */
static uint64_t bytes_of(const struct vvb_outgoing *packets, uint32_t count)
{
    uint64_t bytes = 0;

    for (uint32_t i = 0; i < count; i++) {
        bytes += packets[i].header_len + packets[i].payload_len;
    }
    return bytes;
}

static void host_sends(uint32_t index, const struct vvb_outgoing *next, uint32_t count,
                       const uint8_t *data)
{
    struct vvb_sent sent;

    while (count) {
        vvb_ring_send_many(channels[index].host, next, count, data, bytes_of(next, count), &sent);
        data += bytes_of(next, sent.count);
        next += sent.count;
        count -= sent.count;
        guest_receives(index);
    }
}

/* Does what was left, as the card does: from a copy of everything, which is just as long. */
static void send_left(uint32_t index, const struct vvb_packet *packet)
{
    uint32_t length = (uint32_t)packet->external_length;
    struct vvb_net_fault fault;
    char *copy;

    if (packet->error || !packet->seg_count || !length) {
        return;
    }
    copy = malloc(length);
    require(copy, "memory");
    if (!vvb_ext_read(channels[index].batch->segs.v + packet->first_seg, packet->seg_count, 0, copy,
                      length)) {
        vvb_net_send(net, index, copy, length, &fault);
        require(fault.error <= VVB_NET_E_FRAME, "a fault");
        require(!fault.error || (fault.field && fault.detail), "a fault without a reason");
    }
    free(copy);
}

/* Answers what was left; always the same, so that it can be counted. */
static void answer_left(uint32_t index)
{
    static const uint8_t invalid[40] = {108, 0, 0, 0, 5};
    const struct vvb_batch *batch = channels[index].batch;

    for (uint32_t i = 0; i < batch->count; i++) {
        const struct vvb_packet *packet = &batch->packets[i];
        struct vvb_outgoing out = {.transaction_id = packet->transaction_id,
                                   .payload_len = sizeof(invalid),
                                   .type = 11};

        if (packet->type != 11) {
            send_left(index, packet);
        }
        if (packet->type != 11 && packet->flags & 1) {
            host_sends(index, &out, 1, invalid);
        }
        if (packet->seg_count) {
            vvb_segs_put(batch->segs.v + packet->first_seg, packet->seg_count);
        }
    }
}

/* Whole frames in a stream; the rests of those that it had no room for are sent meanwhile. */
static uint64_t stream_frames(uint32_t index)
{
    static uint8_t in[1 << 16];
    uint64_t seen = 0;
    uint32_t left = 0, known = 0, length = 0;
    ssize_t got;

    do {
        got = recv(stream_ends[index], in, sizeof(in), 0);
        for (ssize_t i = 0; i < got; i++) {
            if (left) {
                left--;
                continue;
            }
            length = length << 8 | in[i];
            if (++known == 4) {
                require(length >= 14 && length <= 65535 + 18, "a length in the stream");
                left = length;
                known = length = 0;
                seen++;
            }
        }
    } while (got > 0 || !vvb_net_port_flush(streams[index]));
    require(!left && !known, "a frame without its end");
    return seen;
}

/* Frames at the link's other end are what the channel counted. */
static void check_frames(uint32_t index)
{
    struct channel_rig *c = &channels[index];
    const struct vvb_net_counts *counts = vvb_net_sent(net, index);
    uint64_t frames = counts->directed_frames + counts->multicast_frames +
                      counts->broadcast_frames;
    static uint8_t frame[1 << 17];
    uint64_t seen = 0;

    for (uint32_t i = 0; i < CHANNELS; i++) {
        seen += stream_frames(i);
        ssize_t got;

        while ((got = recv(ends[i], frame, sizeof(frame), 0)) > 0) {
            uint32_t start = frame[6] | frame[7] << 8, offset = frame[8] | frame[9] << 8;

            require(got >= 24 && got <= 10 + 65535 + 18, "a frame's length");
            require(frame[0] <= 1 && (frame[0] || (!start && !offset && !frame[1])), "its header");
            require(!frame[0] || (uint32_t)got >= 10 + start + offset + 2, "its checksum's place");
            require(frame[1] <= 1 || frame[1] == 4, "its kind");
            seen++;
        }
    }
    require(frames - c->frames == seen, "frames were counted that are not there");
    c->frames = frames;
}

static void host_receives(uint32_t how)
{
    uint32_t index = how % CHANNELS;
    struct channel_rig *c = &channels[index];
    struct vvb_serving serving = {.kick_fd = kick_fd, .stop_fd = stop_fd, .wake_fd = kick_fd,
                                  .call_fd = call_fd};
    struct vvb_served served;

    if (how & 8) {
        vvb_ring_hold(c->host, 0);
    }
    guest_receives(0); /* what the guest has been told of, it can complete */
    guest_receives(1);
    do {
        const struct vvb_outgoing *answers;
        uint32_t answered = 0;
        uint64_t done;

        if (how & 2) {
            vvb_signal(stop_fd);
            require(!vvb_ring_serve(c->host, c->batch, 16, memory, &limits, c->plan, &serving,
                                    &served) && !served.error, "serve");
            answered = served.answered;
            done = served.packets;
        } else {
            require(!vvb_ring_receive(c->host, c->batch, 16, memory, &limits, c->plan), "receive");
            done = c->batch->done_count;
        }
        require(answered <= c->batch->answer_count, "more answers than there are");
        account(index, done);
        answers = c->batch->outgoing;
        require(c->batch->answers_len == bytes_of(answers, c->batch->answer_count), "answers");
        host_sends(index, answers + answered, c->batch->answer_count - answered,
                   c->batch->answers + bytes_of(answers, answered));
        answer_left(index);
        check_frames(index);
    } while (c->count);
    guest_receives(index);
    require(c->answered == c->answers, "a packet without an answer, or with two");
}

static void serve_queue(uint32_t how)
{
    static struct vvb_net_taken taken;

    if (mine_count > MAX_SECTIONS - 128) {
        return;
    }
    vvb_net_serve(net, how & 3, idle_fd, &taken);
    require(taken.woken <= 1, "woken");
    require(taken.left <= VVB_NET_PARTS && (!taken.left || taken.lease == lease), "parts");
    for (uint32_t i = 0; i < taken.left; i++) {
        require(taken.parts[i].section >= FIRST && taken.parts[i].section < section_count, "part");
        require(taken.parts[i].byte_offset == taken.parts[i].section * section_size &&
                    taken.parts[i].byte_count <= section_size - VVB_NET_SECTION_TAIL,
                "part's place");
        mine[mine_count++] = taken.parts[i].section;
    }
    if (how & 4) {
        all_receive();
    }
}

static void connect_stream(uint32_t queue)
{
    int pair[2];

    if (stream_links[queue]) {
        close(stream_links[queue]);
        close(stream_ends[queue]);
    }
    require(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), "link");
    stream_links[queue] = pair[0];
    stream_ends[queue] = pair[1];
    require(!vvb_net_port_put(streams[queue], pair[0]), "put");
}

/* Into a stream go the frame's length, as it is or as the header has it, and its bytes. */
static void stream_sends(uint32_t queue, const uint8_t *data, uint32_t len)
{
    uint8_t prefix[4] = {0, (uint8_t)((len - 10) >> 16), (uint8_t)((len - 10) >> 8),
                         (uint8_t)(len - 10)};
    struct vvb_net_port_state state;

    vvb_net_port_get_state(streams[queue], &state);
    if (state.broken || len < 10) {
        vvb_net_port_put(streams[queue], -1);
        connect_stream(queue);
        return;
    }
    if (send(stream_ends[queue], data[0] & 4 ? data + 2 : prefix, 4, 0) == 4) {
        send(stream_ends[queue], data + 10, data[0] & 8 ? (len - 10) / 2 : len - 10, 0);
    }
}

static void link_sends(uint32_t queue, const uint8_t *data, uint32_t len)
{
    if (streaming) {
        stream_sends(queue, data, len);
        return;
    }
    require(send(ends[queue], data, len, 0) >= 0 || errno == EAGAIN || errno == EMSGSIZE, "send");
}

/* ---- buffers, sections, channels ---- */

static void buffer_gone(void)
{
    for (uint32_t i = 0; i < held_count; i++) {
        channels[held[i].channel].late++;
    }
    memcpy(stale, mine, sizeof(stale));
    stale_count = mine_count;
    stale_lease = lease;
    held_count = mine_count = section_count = 0;
    lease = 0;
}

static void segments(struct vvb_segs *segs, uint32_t page, uint32_t pages, uint32_t how)
{
    vvb_segs_put(segs->v, segs->count);
    vvb_segs_free(segs);
    *segs = (struct vvb_segs){0};
    for (uint32_t i = 0; i < pages; i++) { /* every second page, some in pieces */
        uint64_t gpa = (BASE_PFN + page + 1 + 2 * i) * 4096ull;
        uint32_t piece = how & 1 && i % 3 == 0 ? 40 : how & 2 ? 1024 : 4096;

        for (uint32_t n = 0; n < 4096; n += piece) {
            uint32_t len = 4096 - n < piece ? 4096 - n : piece;

            require(!vvb_translate_span(memory, gpa + n, len, segs), "translate");
        }
    }
}

static void lend_receive(uint32_t how)
{
    static const uint32_t sizes[4] = {1728, 9152, 13312, 245};

    all_receive();
    vvb_net_lend_receive(net, NULL, 0, 0, 0, 0, how & 4 ? lease : 0);
    buffer_gone();
    if (how & 8) {
        return;
    }
    section_size = sizes[how & 3];
    segments(&receive_segs, RECEIVE_PAGE, RECEIVE_PAGES / 2, how >> 4);
    memset(world + RECEIVE_PAGE * 4096u, PATTERN, RECEIVE_PAGES * 4096u);
    section_count = (uint32_t)(RECEIVE_PAGES / 2 * 4096u / section_size);
    lease = ++serial;
    require(!vvb_net_lend_receive(net, receive_segs.v, receive_segs.count, section_size, 0x1234,
                                  FIRST, lease),
            "lend");
    vvb_net_lend_receive(net, NULL, 0, 0, 0, 0, stale_lease ? stale_lease : lease + 1);
    check_sections();
}

static void lend_send(uint32_t how)
{
    vvb_net_lend_send(net, NULL, 0, 0, 0);
    if (!(how & 8)) {
        vvb_segs_put(send_segs.v, send_segs.count);
        vvb_segs_free(&send_segs);
        send_segs = (struct vvb_segs){0};
        for (uint32_t i = 0; i < SEND_PAGES; i++) {
            uint64_t gpa = (BASE_PFN + SEND_PAGE + (i * 3) % SEND_PAGES) * 4096ull;

            require(!vvb_translate_span(memory, gpa, 4096, &send_segs), "translate");
        }
        require(!vvb_net_lend_send(net, send_segs.v, send_segs.count, how & 1 ? 6144 : 7000,
                                   ++serial),
                "lend");
    }
}

static void take_section(bool wrong)
{
    int64_t section = vvb_net_section(net, wrong ? stale_lease : lease);

    if (section >= 0) {
        require(lease && (!wrong || stale_lease == lease) && mine_count < MAX_SECTIONS, "lease");
        mine[mine_count++] = (uint32_t)section;
    }
}

static void give_section(uint32_t which, bool wrong)
{
    if (wrong && stale_count) {
        vvb_net_give(net, stale_lease, stale[which % stale_count]);
    } else if (mine_count) {
        vvb_net_give(net, lease, mine[which % mine_count]);
        mine[which % mine_count] = mine[mine_count - 1];
        mine_count--;
    }
}

static void ports_and_map(uint32_t how)
{
    port_count = how % (CHANNELS + 1);
    streaming = how & 8;
    for (uint32_t i = 0; i < CHANNELS; i++) {
        vvb_net_set_queue(net, i, streaming ? streams[i] : datagrams[i]);
    }
    require(!vvb_net_use_queues(net, port_count), "queues");
    vvb_memory_use_codemap(memory, how & 4 ? map : NULL);
}

static void attach(uint32_t index)
{
    struct channel_rig *c = &channels[index];
    uint64_t pfns[OUT_PAGES + IN_PAGES];
    struct vvb_fault fault;
    int err;

    for (uint32_t i = 0; i < OUT_PAGES + IN_PAGES; i++) {
        pfns[i] = BASE_PFN + index * (OUT_PAGES + IN_PAGES) + i;
    }
    c->guest = vvb_ring_attach(memory, pfns, OUT_PAGES + IN_PAGES, OUT_PAGES, VVB_ROLE_GUEST, 1,
                               &fault, &err);
    c->host = vvb_ring_attach(memory, pfns, OUT_PAGES + IN_PAGES, OUT_PAGES, VVB_ROLE_HOST, 0,
                              &fault, &err);
    require(c->host && c->guest, "attach");
    c->batch = vvb_batch_new(c->host, 16);
    c->guest_batch = vvb_batch_new(c->guest, 32);
    c->plan = vvb_net_plan(net, index);
    require(c->batch && c->guest_batch && c->plan, "channel");
    c->first = c->count = 0;
    c->answers = c->answered = c->frames = 0;
    c->late = 0;
    require(!vvb_net_connect(net, index, c->host, call_fd), "connect");
}

static void detach(uint32_t index)
{
    struct channel_rig *c = &channels[index];

    vvb_net_disconnect(net, index);
    vvb_plan_free(c->plan);
    vvb_batch_free(c->batch);
    vvb_batch_free(c->guest_batch);
    vvb_ring_free(c->host);
    vvb_ring_free(c->guest);
    for (uint32_t i = 0; i < held_count;) {
        if (held[i].channel == index) {
            held[i] = held[--held_count];
        } else {
            i++;
        }
    }
}

static void reconnect(uint32_t index, bool now)
{
    all_receive();
    vvb_net_disconnect(net, index);
    channels[index].late = 0;
    if (now) {
        detach(index);
        attach(index);
    } else { /* closed for frames; its ring still has packets */
        for (uint32_t i = 0; i < held_count;) {
            if (held[i].channel == index) {
                held[i] = held[--held_count];
            } else {
                i++;
            }
        }
    }
    check_sections();
}

/* ---- all of it ---- */

static void rig_make(void)
{
    struct vvb_code_region code = {.gpa = BASE_PFN * 4096ull, .size = PAGES * 4096ull};
    int fd = memfd_create("net", MFD_CLOEXEC), bits = memfd_create("map", MFD_CLOEXEC), err = 0;
    uint64_t set = 1ull << 38; /* a page of the receive buffer */

    require(fd >= 0 && !ftruncate(fd, PAGES * 4096), "memfd");
    require(bits >= 0 && !ftruncate(bits, 4096), "memfd");
    require(pwrite(bits, &set, 8, 0) == 8, "bits");
    memory = vvb_memory_new();
    region = vvb_region_new(BASE_PFN * 4096ull, PAGES * 4096, fd, 0, &err);
    require(memory && region && !vvb_memory_set(memory, &region, 1), "memory");
    world = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    map = vvb_codemap_new(bits, 4096, &code, 1, &err);
    require(world != MAP_FAILED && map, "map");
    idle_fd = eventfd(1, EFD_NONBLOCK);
    call_fd = eventfd(0, EFD_NONBLOCK);
    kick_fd = eventfd(0, EFD_NONBLOCK);
    stop_fd = eventfd(0, EFD_NONBLOCK);
    for (uint32_t i = 0; i < CHANNELS; i++) {
        int pair[2];

        require(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair), "link");
        links[i] = pair[0];
        ends[i] = pair[1];
        datagrams[i] = vvb_net_port_new(VVB_NET_PORT_DATAGRAM, -1);
        streams[i] = vvb_net_port_new(VVB_NET_PORT_STREAM, call_fd);
        require(datagrams[i] && !vvb_net_port_put(datagrams[i], links[i]) && streams[i], "port");
    }
}

static void rig_begin(void)
{
    static uint8_t frame[1 << 17];

    if (!memory) {
        rig_make();
    }
    for (uint32_t i = 0; i < CHANNELS; i++) {
        while (recv(links[i], frame, sizeof(frame), 0) > 0) {
        }
        connect_stream(i);
    }
    memset(world, 0, PAGES * 4096);
    serial = stale_lease = lease = stale_count = 0;
    held_count = mine_count = section_count = 0;
    net = vvb_net_new();
    require(net, "net");
    for (uint32_t i = 0; i < CHANNELS; i++) {
        attach(i);
    }
    lend_receive(0);
    lend_send(1);
    ports_and_map(CHANNELS);
}

static void rig_end(void)
{
    for (uint32_t i = 0; i < CHANNELS; i++) {
        host_receives(i);
    }
    all_receive();
    check_untouched();
    for (uint32_t i = 0; i < CHANNELS; i++) {
        detach(i);
    }
    check_sections();
    while (mine_count) {
        give_section(0, false);
    }
    check_sections();
    vvb_net_free(net);
}

#endif
