/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The network card's data path for Python: frames between a descriptor that takes a virtio-net
 * header and a frame at a time (a TAP's), and a guest's RNDIS packets. Read by the C compiler and
 * by cffi, like the ring engine's api.h; no preprocessor lines, therefore.
 *
 * Every function may be called without the GIL, from any thread, unless it says otherwise.
 */

enum {
    VVB_NET_CHANNELS = 64,
    VVB_NET_MULTICAST = 32,
    VVB_NET_TABLE = 128,
    VVB_NET_KEY = 40,
    VVB_NET_FRAMES = 32, /* taken in one call, at most */
    VVB_NET_PARTS = 64   /* sections that they are in */
};

/* What the guest may leave to the host in frames that it sends. */
enum {
    VVB_NET_IP_CHECKSUM = 1,
    VVB_NET_TCP4 = 2,
    VVB_NET_UDP4 = 4,
    VVB_NET_TCP6 = 8,
    VVB_NET_UDP6 = 16,
    VVB_NET_LARGE4 = 32,
    VVB_NET_LARGE6 = 64
};

/* What was negotiated and set. Numbers and addresses as docs/devices/net.md has them. */
struct vvb_net_config {
    uint32_t active;         /* the guest may send RNDIS data */
    uint32_t max_frame;      /* bytes of a frame that is no large send, without a tag */
    uint32_t send_offloads;
    uint32_t tell_checksums; /* of received frames, where they are known to be right */
    uint32_t tagging;        /* a received frame's 802.1Q tag goes beside it */
    uint32_t coalesced;      /* a received frame may take several sections */
    uint32_t packet_filter;
    uint32_t multicast_count;
    uint32_t hash_types;
    uint32_t table_size; /* 0: no receive-side scaling */
    uint32_t table[128];
    uint8_t addresses[12];
    uint8_t multicast[192];
    uint8_t key[40];
};

/* Of one channel (sent) or one queue (received); each is written by one thread. */
struct vvb_net_counts {
    uint64_t directed_frames, directed_bytes;
    uint64_t multicast_frames, multicast_bytes;
    uint64_t broadcast_frames, broadcast_bytes;
    uint64_t large;    /* large sends; received frames that took several sections */
    uint64_t refused;  /* by the host side; received: there was no channel to tell of it */
    uint64_t filtered; /* received, not wanted */
    uint64_t errors;   /* received, made no sense or did not fit */
};

struct vvb_net;

struct vvb_net *vvb_net_new(void);
void vvb_net_free(struct vvb_net *net);
void vvb_net_configure(struct vvb_net *net, const struct vvb_net_config *config);
/* The queues' descriptors; a channel sends to the one of its number modulo count. */
void vvb_net_ports(struct vvb_net *net, const int *fds, uint32_t count);

/*
 * Lends a buffer: segs is an array of struct vvb_seg, whose uses the caller holds until it has taken
 * the buffer back (segs NULL; with a lease: that buffer only, which another may have replaced).
 * Returns when nobody is inside the buffer before. Of the receive
 * buffer the sections from first on are the data path's; lease is the caller's number for this
 * lending, never 0 and never used again: whoever has a section of an earlier one has nothing.
 * EINVAL, ENOMEM or 0.
 */
int vvb_net_lend_send(struct vvb_net *net, const void *segs, uint32_t count, uint32_t section,
                      uint64_t lease);
int vvb_net_lend_receive(struct vvb_net *net, const void *segs, uint32_t count, uint32_t section,
                         uint32_t set_id, uint32_t first, uint64_t lease);
/* Free sections of the data path's. */
uint32_t vvb_net_free_sections(struct vvb_net *net);
/*
 * Writes that eventfd once when a chain of sections comes back; -1: not any more. The eventfd before
 * is not touched once this has returned.
 */
void vvb_net_wake_when_free(struct vvb_net *net, int wake_fd);
/* A free section for the caller, or -1; and one that it had (or was left with) is free again. */
int64_t vvb_net_section(struct vvb_net *net, uint64_t lease);
void vvb_net_give(struct vvb_net *net, uint64_t lease, uint32_t section);

/* An open channel. The ring must stay attached until vvb_net_disconnect() has returned. */
int vvb_net_connect(struct vvb_net *net, uint32_t channel, struct vvb_ring *ring, int call_fd);
/* Whatever the guest had of that channel is free again. */
void vvb_net_disconnect(struct vvb_net *net, uint32_t channel);
/* What the channel sent, or the queue received; valid as long as net is. */
const struct vvb_net_counts *vvb_net_sent(struct vvb_net *net, uint32_t channel);
const struct vvb_net_counts *vvb_net_received(struct vvb_net *net, uint32_t queue);

/* What happened on a channel since the last call; takes it away. */
struct vvb_net_news {
    uint64_t told;        /* packets put into the ring */
    uint64_t signals;     /* of the guest, for that */
    uint64_t bad_returns; /* completions that gave sections back and were no receive completions */
};
void vvb_net_take_news(struct vvb_net *net, uint32_t channel, struct vvb_net_news *news);

/*
 * For vvb_ring_receive() on that channel: RNDIS data is sent to the link, and receive completions
 * give their sections back. Whatever is not as it should be goes up as an ordinary packet.
 */
struct vvb_plan *vvb_net_plan(struct vvb_net *net, uint32_t channel);

/* A receive section with a frame, or with a part of one, that the guest has to be told of. */
struct vvb_net_part {
    uint32_t channel;
    uint32_t section;
    uint32_t byte_count;
    uint32_t byte_offset;
};
enum {
    VVB_NET_MORE = 0,       /* (not returned) */
    VVB_NET_EMPTY = 1,      /* (not returned) */
    VVB_NET_WOKEN = 2,      /* wake_fd is readable */
    VVB_NET_NO_SECTION = 3, /* the guest has them all */
    VVB_NET_NO_BUFFER = 4,  /* none was lent, or the queue is none */
    VVB_NET_BROKEN = 5      /* the descriptor cannot be waited for: gone, or another one by now */
};
struct vvb_net_taken {
    uint32_t state;
    uint32_t left; /* parts[] that the caller has to tell of, a channel's in a row */
    uint64_t lease; /* that they are of */
    struct vvb_net_part parts[64];
};
/*
 * Takes frames from a queue of the link, and tells the guest, until something is left to the caller:
 * what was written where code may be, or what a ring has no room for; or until state is above
 * VVB_NET_EMPTY. One thread for each queue. Sections that are left are the caller's until
 * vvb_net_give().
 */
void vvb_net_serve(struct vvb_net *net, uint32_t queue, int wake_fd, struct vvb_net_taken *taken);
