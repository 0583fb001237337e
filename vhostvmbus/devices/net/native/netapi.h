/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The network card's data path for Python: frames between a link's descriptors and a guest's RNDIS
 * packets. Read by the C compiler and by cffi, like the ring engine's api.h; no preprocessor lines,
 * therefore.
 *
 * Every function may be called without the GIL, from any thread, unless it says otherwise.
 */

/* ---- numbers, which stand here and nowhere else ---- */

enum {
    VVB_NET_CHANNELS = 64, /* of a card; Linux has room for as many */
    VVB_NET_MULTICAST = 32,
    VVB_NET_TABLE = 128,
    VVB_NET_KEY = 40,
    VVB_NET_FRAMES = 32, /* taken in one call, at most */
    VVB_NET_PARTS = 64   /* sections that they are in */
};

/* Frames, in bytes. */
enum {
    VVB_NET_ADDRESS = 6,
    VVB_NET_ETHERNET = 14,
    VVB_NET_VLAN = 4,
    VVB_NET_LONGEST_IP = 65535,
    VVB_NET_VNET = 10 /* struct virtio_net_hdr, without num_buffers */
};

/* NVSP messages, as far as frames need them: types, what is in them. */
enum {
    VVB_NET_NVSP_RNDIS_PACKET = 107,
    VVB_NET_NVSP_RNDIS_PACKET_COMPLETE = 108,
    VVB_NET_NVSP_SIZE = 40,     /* bytes of every message of the host, from version 6.1 on */
    VVB_NET_NVSP_OLD_SIZE = 28, /* in versions up to 6 */
    VVB_NET_NVSP_DATA = 0,  /* the channel of an RNDIS packet */
    VVB_NET_NVSP_SUCCESS = 1,
    VVB_NET_NVSP_NO_SECTION = 0xffffffff
};

/*
 * RNDIS packet messages. A frame begins behind the header and four elements of per-packet
 * information (16 bytes each), at a multiple of 16.
 */
enum {
    VVB_NET_RNDIS_PACKET = 1,
    VVB_NET_RNDIS_HEADER_SIZE = 8,  /* bytes: type and length; offsets count from behind it */
    VVB_NET_RNDIS_PACKET_SIZE = 44, /* bytes: up to the per-packet information */
    VVB_NET_RNDIS_MESSAGES = 64,    /* in one packet of the guest, at most */
    VVB_NET_FRAME_OFFSET = 112, /* bytes, in a receive section */
    VVB_NET_SECTION_TAIL = 36,  /* bytes at its end, where Windows' driver has something else */
    VVB_NET_SEND_SECTION = 6144 /* bytes; what Linux reckons with */
};

/* NDIS: the packet filter's bits, and the kinds of hashes. */
enum {
    VVB_NET_NDIS_DIRECTED = 0x01,
    VVB_NET_NDIS_MULTICAST = 0x02,
    VVB_NET_NDIS_ALL_MULTICAST = 0x04,
    VVB_NET_NDIS_BROADCAST = 0x08,
    VVB_NET_NDIS_PROMISCUOUS = 0x20,
    VVB_NET_NDIS_HASH_IPV4 = 0x0100,
    VVB_NET_NDIS_HASH_TCP_IPV4 = 0x0200,
    VVB_NET_NDIS_HASH_IPV6 = 0x0400,
    VVB_NET_NDIS_HASH_TCP_IPV6 = 0x1000
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

/* ---- ports: a link's queues ---- */

/*
 * The ways of frames through a descriptor. A datagram has a virtio-net header in front, and a read
 * or write of its own. On a stream socket each frame stands behind its length, 32 bits, big-endian,
 * with nothing left undone.
 */
enum { VVB_NET_PORT_DATAGRAM = 0, VVB_NET_PORT_STREAM = 1 };
/* The state of a stream: frames can be made of what comes out of it, or why not. */
enum { VVB_NET_PORT_WHOLE = 0, VVB_NET_PORT_CLOSED = 1, VVB_NET_PORT_NONSENSE = 2 };

struct vvb_net_port;
struct vvb_net_recording;
struct vvb_net_port_state {
    uint64_t refused;  /* frames that could not be sent */
    uint64_t too_long; /* frames that there was too little room for */
    uint64_t missing;  /* frames of a stream of which only the length came */
    uint32_t broken;
    uint32_t bad_length; /* with NONSENSE: what a frame's length was said to be */
};

/*
 * Makes a port with nothing behind it: no frame comes, and none is taken. wake_fd (or -1) is
 * written when the rest of a frame has to wait for room in the stream: see vvb_net_port_flush().
 */
struct vvb_net_port *vvb_net_port_new(int framing, int wake_fd);
/* Frees the port, which nobody may use any more. */
void vvb_net_port_free(struct vvb_net_port *port);
/* Gives the descriptors up: no frame comes any more, and none is taken. */
void vvb_net_port_close(struct vvb_net_port *port);
/* Returns the descriptor's number: the same until it is closed. */
int vvb_net_port_fd(const struct vvb_net_port *port);
/*
 * Puts what fd means behind the port, -1: nothing; fd stays the caller's, and must not block. What
 * was begun on the one before is forgotten. Returns an errno or 0.
 */
int vvb_net_port_put(struct vvb_net_port *port, int fd);
/* Sends the rest of a frame, when the descriptor is writable. Returns 1 if nothing is left. */
int vvb_net_port_flush(struct vvb_net_port *port);
void vvb_net_port_get_state(struct vvb_net_port *port, struct vvb_net_port_state *state);
/*
 * Send or receive a frame without a card, with its virtio-net header. Return 1 if it was sent; the
 * length of what was received, or -1 if none waits. One that there is too little room for is
 * dropped.
 */
int vvb_net_port_send(struct vvb_net_port *port, const char *header, const char *data,
                      uint32_t length);
int64_t vvb_net_port_receive(struct vvb_net_port *port, char *header, char *data, uint32_t room);
/* Appends frames that pass to that recording from now on. */
void vvb_net_port_record(struct vvb_net_port *port, struct vvb_net_recording *recording);

/* Bits of a frame's direction in a recording, as the host sees it. */
enum { VVB_NET_RECORDING_INBOUND = 1, VVB_NET_RECORDING_OUTBOUND = 2 };
struct vvb_net_recording_state {
    uint64_t lost;     /* frames */
    int32_t error;     /* an errno: the file cannot be written just now; 0: all is well */
    int32_t cut_error; /* an errno: nor could it be cut behind its last whole block */
};
/*
 * Makes a recording in a file, which is the caller's, from byte end on. When it cannot be written
 * it is left alone for retry_ns; news_fd is written when that begins, and when it is over.
 */
struct vvb_net_recording *vvb_net_recording_new(int fd, uint64_t end, uint64_t retry_ns,
                                                int news_fd);
void vvb_net_recording_free(struct vvb_net_recording *recording);
/* Ends the recording: the file is not touched any more. */
void vvb_net_recording_end(struct vvb_net_recording *recording);
void vvb_net_recording_get_state(struct vvb_net_recording *recording,
                                 struct vvb_net_recording_state *state);

/* ---- a card ---- */

/* The settings in force. Numbers and addresses are as docs/devices/net.md has them. */
struct vvb_net_config {
    uint32_t active;         /* the guest may send RNDIS data */
    uint32_t receiving;      /* it gets frames; else they are dropped */
    uint32_t max_frame;      /* bytes of a frame that is no large send, without a tag */
    uint32_t send_offloads;
    uint32_t tell_checksums; /* of received frames, where they are known to be right */
    uint32_t tagging;        /* a received frame's 802.1Q tag goes beside it */
    uint32_t coalesced;      /* a received frame may take several sections */
    uint32_t message_size;   /* bytes of NVSP messages to the guest: 28, or 40 */
    uint32_t singly;         /* each frame goes in a packet of its own; see starve() in tell.c */
    uint32_t patience_ms;    /* that frames wait for a guest that gives no section back */
    uint32_t held;           /* the machine stands still: frames wait in the link, however long */
    uint32_t packet_filter;
    uint32_t multicast_count;
    uint32_t hash_types;
    uint32_t table_size; /* 0: no receive-side scaling */
    uint32_t table[128];
    uint8_t addresses[12];
    uint8_t multicast[192];
    uint8_t key[40];
};

/* The counters of one channel (sent) or one queue (received); each is written by one thread. */
struct vvb_net_counts {
    uint64_t directed_frames, directed_bytes;
    uint64_t multicast_frames, multicast_bytes;
    uint64_t broadcast_frames, broadcast_bytes;
    uint64_t large;    /* large sends; received frames that took several sections */
    uint64_t refused;  /* by the host side; received: dropped, because the guest has all sections */
    uint64_t filtered; /* received, not wanted */
    uint64_t errors;   /* received, made no sense or did not fit */
};

struct vvb_net;

struct vvb_net *vvb_net_new(void);
void vvb_net_free(struct vvb_net *net);
/* Gives the descriptor up that vvb_net_serve() needs, which must not be called any more. */
void vvb_net_close(struct vvb_net *net);
void vvb_net_configure(struct vvb_net *net, const struct vvb_net_config *config);
/*
 * Set a queue of the link, whose port lives as long as anybody moves frames; and how many of them
 * are used: a channel sends to the one of its number modulo count. Return EINVAL or 0.
 */
int vvb_net_set_queue(struct vvb_net *net, uint32_t queue, struct vvb_net_port *port);
int vvb_net_use_queues(struct vvb_net *net, uint32_t count);

/*
 * Lends a buffer: segs is an array of struct vvb_seg, whose uses the caller holds until it has
 * taken the buffer back (segs NULL; with a lease: that buffer only, which another may have
 * replaced). Returns when nobody is inside the buffer before, with EINVAL, ENOMEM or 0.
 *
 * Of the receive buffer the sections from first on are the data path's. lease is the caller's
 * number for this lending, never 0 and never used again, so that a section of an earlier one counts
 * for nothing.
 */
int vvb_net_lend_send(struct vvb_net *net, const void *segs, uint32_t count, uint32_t section,
                      uint64_t lease);
int vvb_net_lend_receive(struct vvb_net *net, const void *segs, uint32_t count, uint32_t section,
                         uint32_t set_id, uint32_t first, uint64_t lease);
/* Returns how many of the data path's sections are free. */
uint32_t vvb_net_free_sections(struct vvb_net *net);
/*
 * Has that eventfd written once when a chain of sections comes back; -1: none any more. The eventfd
 * before is not touched once this has returned.
 */
void vvb_net_wake_when_free(struct vvb_net *net, int wake_fd);
/* Take a free section for the caller, or -1; and free one that it had (or was left with). */
int64_t vvb_net_section(struct vvb_net *net, uint64_t lease);
void vvb_net_give(struct vvb_net *net, uint64_t lease, uint32_t section);

/* Connects an open channel. The ring must stay attached until vvb_net_disconnect() has returned. */
int vvb_net_connect(struct vvb_net *net, uint32_t channel, struct vvb_ring *ring, int call_fd);
/* Frees whatever sections the guest had of that channel. */
void vvb_net_disconnect(struct vvb_net *net, uint32_t channel);
/* The counters of a channel (sent) or a queue (received); valid as long as net is. */
const struct vvb_net_counts *vvb_net_sent(struct vvb_net *net, uint32_t channel);
const struct vvb_net_counts *vvb_net_received(struct vvb_net *net, uint32_t queue);

/* Returns what happened on a channel since the last call. */
struct vvb_net_news {
    uint64_t told;        /* packets put into the ring */
    uint64_t signals;     /* of the guest, for that */
    uint64_t bad_returns; /* completions that gave sections back and were no receive completions */
};
void vvb_net_take_news(struct vvb_net *net, uint32_t channel, struct vvb_net_news *news);

/*
 * The plan for vvb_ring_receive() on that channel: it sends RNDIS data to the link, and takes the
 * sections of receive completions back. Whatever is malformed goes up as an ordinary packet.
 */
struct vvb_plan *vvb_net_plan(struct vvb_net *net, uint32_t channel);

/* The mistake in an RNDIS packet of the guest: ../errors.py has the classes. */
enum {
    VVB_NET_OK = 0,
    VVB_NET_E_RNDIS = 1,
    VVB_NET_E_INFO = 2,
    VVB_NET_E_FRAME = 3
};
struct vvb_net_fault {
    uint64_t value;
    uint32_t error;
    uint32_t offset; /* bytes from the start of the structure that the field is in */
    const char *field;
    const char *detail; /* more for people; may be empty */
};
/*
 * Does the plan's work for a packet that went up: sends the frames in the messages in data, a
 * private copy, which is overwritten. Those in front of a malformed message are sent, those behind
 * it are not; fault says what is wrong with it.
 */
void vvb_net_send(struct vvb_net *net, uint32_t channel, void *data, uint32_t length,
                  struct vvb_net_fault *fault);

/* A receive section with a frame, or with a part of one, that the guest has to be told of. */
struct vvb_net_part {
    uint32_t channel;
    uint32_t section;
    uint32_t byte_count;
    uint32_t byte_offset;
};
struct vvb_net_taken {
    uint32_t woken; /* wake_fd is readable */
    uint32_t left;  /* parts[] that the caller has to tell of, a channel's in a row */
    uint64_t lease; /* of the buffer that the parts are in */
    struct vvb_net_part parts[64];
};
/*
 * Takes frames from a queue of the link, and sends the guest packets about them, until wake_fd is
 * readable or something is left to the caller: frames that were written where code may be, or that
 * a ring has no room for. One thread for each queue. Sections that are left are the caller's until
 * vvb_net_give().
 *
 * Frames that the guest cannot get, because it has lent no buffer or wants none, are dropped. When
 * it has all sections, they wait in the link; they are dropped once it has given none back for
 * patience_ms.
 */
void vvb_net_serve(struct vvb_net *net, uint32_t queue, int wake_fd, struct vvb_net_taken *taken);
