/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Declarations that the data path's files share. Python sees those of netapi.h.
 *
 * Rules: what the guest wrote is copied before it is believed; of a frame's headers the copy is
 * sent. Numbers of RNDIS and NVSP are little-endian, those of frames big-endian, those of a
 * virtio-net header little-endian (Virtual I/O Device 1.2, section 5.1.6).
 *
 * Locks, in this order: config (read by whoever moves frames, written by whoever changes buffers,
 * channels or settings), a port's two directions, pool (free sections) or a recording. None is held
 * while anybody waits.
 */
#ifndef VVB_NET_H
#define VVB_NET_H

#include <pthread.h>
#include <sys/uio.h>

#include "ringbuf.h"

#include "netapi.h"

#define ETHERTYPE_VLAN 0x8100u
#define ETHERTYPE_IPV4 0x0800u
#define ETHERTYPE_IPV6 0x86ddu
#define PROTOCOL_TCP 6u
#define PROTOCOL_UDP 17u
#define TCP_CHECKSUM 16u /* bytes into the header */
#define UDP_CHECKSUM 6u

/* The longest frame, and the part of a received one that is looked at; in bytes. */
#define LONGEST_FRAME (VVB_NET_LONGEST_IP + VVB_NET_ETHERNET + VVB_NET_VLAN)
#define HEAD_SIZE 96u

/* Per-packet information. The top bit of a kind says that it is RNDIS's own, not NDIS's. */
enum { PPI_CHECKSUM = 0, PPI_LARGE_SEND = 2, PPI_VLAN = 6, PPI_HASH = 8 };
#define PPI_PACKET_ID (1u << 31 | 1u)
#define PPI_HEADER_SIZE 12u
#define PPI_MAX_SIZE 1024u /* of a chain; Linux sends at most 64, Windows a few hundred */
#define PPI_TCP_VALID (1u << 3)
#define PPI_UDP_VALID (1u << 4)

enum { VNET_NEEDS_CHECKSUM = 1, VNET_CHECKSUM_VALID = 2 };
enum { VNET_GSO_NONE = 0, VNET_GSO_TCPV4 = 1, VNET_GSO_TCPV6 = 4 };

struct vnet {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t header_length;
    uint16_t segment_size;
    uint16_t start;
    uint16_t offset;
};
_Static_assert(sizeof(struct vnet) == VVB_NET_VNET, "as on the wire");

/* Pieces of memory that a frame may be in, with two more for what a port adds. */
#define NET_PIECES 256u

/* A buffer of the guest's. As many as skips[i] bytes lie before segs[i]. */
struct buffer {
    struct vvb_seg *segs;
    uint64_t *skips;
    uint32_t count;
    uint32_t section; /* bytes */
    uint32_t sections;
};

enum { SECTION_FREE, SECTION_FIRST, SECTION_NEXT, SECTION_OUTSIDE };

/* Sections of the receive buffer: free ones are a stack, those of a packet a chain. */
struct pool {
    pthread_mutex_t lock;
    uint32_t *next;
    uint32_t *serial; /* of a chain, at its first section */
    uint8_t *state;
    uint8_t *channel;
    uint32_t count;
    uint32_t ours; /* without the first ones, which are somebody else's */
    uint32_t top;
    uint32_t free;
    uint32_t awaited; /* a queue waits until so many are free; 0: none does */
    uint64_t returns; /* how often the guest has given sections back */
    uint32_t last_serial; /* goes on when the buffer changes: no id comes again soon */
    uint64_t lease;       /* see vvb_net_lend_receive(); 0: there is no buffer */
};
#define POOL_END 0xffffffffu

struct channel {
    struct vvb_ring *ring; /* NULL: closed */
    int call_fd;
    uint64_t told, told_signals, bad_returns; /* news: see vvb_net_take_news() */
    uint32_t late; /* packets that the guest had when the use of their buffer ended */
    struct vvb_net_counts counts;
};

/* The state of a queue of the link, for the thread that receives from it. */
struct queue {
    struct vvb_net_counts counts;
    uint64_t starved_since; /* nanoseconds; 0: the guest has sections to spare */
    uint64_t starved_at;    /* pool->returns at that time */
    uint16_t packet_id;     /* of coalesced frames */
};

struct vvb_net {
    pthread_rwlock_t lock;
    struct vvb_net_config config;
    struct buffer send, receive;
    uint64_t send_lease;
    uint32_t set_id;
    int wake_fd; /* see vvb_net_wake_when_free() */
    int free_fd; /* an eventfd: what a queue has awaited of the pool has come */
    struct pool pool;
    uint32_t port_count;
    struct vvb_net_port *ports[VVB_NET_CHANNELS];
    struct channel channels[VVB_NET_CHANNELS];
    struct queue queues[VVB_NET_CHANNELS];
};

static inline uint16_t be16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static inline void put_be16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static inline uint32_t le32(const uint8_t *at)
{
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static inline void put_le32(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
    at[2] = (uint8_t)(value >> 16);
    at[3] = (uint8_t)(value >> 24);
}

static inline uint32_t fold(uint64_t sum)
{
    while (sum >> 16) {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return (uint32_t)sum;
}

/* headers.c */

/* RFC 1071: adds bytes to a sum that is not folded yet; odd: they begin in the middle of a word. */
uint64_t net_sum(uint64_t sum, const uint8_t *data, uint64_t len, bool odd);
/*
 * Finds the Ethertype, behind one tag, and the network header. Returns false if head is too short.
 */
bool net_layer(const uint8_t *head, uint32_t len, uint32_t *ethertype, uint32_t *network);
/* Returns the IPv4 header's length in bytes; 0 if it is none. */
uint32_t net_ipv4_length(const uint8_t *head, uint32_t len, uint32_t network);
/* Returns the protocol, TCP or UDP, right behind an IP header that is no fragment's, else 0. */
uint32_t net_transport(const uint8_t *head, uint32_t len);
/* Computes the Toeplitz hash. Returns false if nothing of the frame is hashed. */
bool net_hash(const struct vvb_net_config *config, const uint8_t *head, uint32_t len,
              uint32_t *hash);
void net_count(struct vvb_net_counts *counts, const uint8_t *destination, uint64_t bytes);

/* sections.c */

/* Lists the pieces of the buffer from offset on: len bytes of them or fewer than max pieces. */
uint32_t net_pieces(const struct buffer *buffer, uint64_t offset, uint64_t len, struct iovec *iov,
                    uint32_t max);
void net_write(const struct buffer *buffer, uint64_t offset, const uint8_t *data, uint64_t len);
/* Returns false if some of it is lost; zeros stand there then. */
bool net_read(const struct buffer *buffer, uint64_t offset, uint8_t *data, uint64_t len);
/* Takes a free section; POOL_END if there is none. */
uint32_t net_section_take(struct pool *pool);
void net_section_give(struct pool *pool, uint32_t section);
/* Gives one back that the guest had. Returns whether there are as many free as somebody awaits. */
bool net_section_return(struct pool *pool, uint32_t section);
/* Make a chain and return its transaction id; give back what was handed over with it. */
uint64_t net_chain(struct pool *pool, const uint32_t *sections, uint32_t count, uint32_t channel);
/* Sets *enough if somebody has awaited it. */
bool net_chain_end(struct pool *pool, uint64_t id, uint32_t channel, bool *enough);
/*
 * Awaits that as many sections are free. Returns how often the guest has given some back, or 0 in
 * *count if there is nothing to wait for.
 */
uint64_t net_section_await(struct pool *pool, uint32_t *count);
void net_chains_end(struct pool *pool, uint32_t channel);
/*
 * Undoes a chain of which the guest was not told: the sections are outside again. Returns false if
 * it gave them back unasked.
 */
bool net_chain_undo(struct pool *pool, uint64_t id);
/* Lists the same pieces as net_pieces(), by their guest-physical addresses. */
uint32_t net_spans(const struct buffer *buffer, uint64_t offset, uint64_t len,
                   struct vvb_span *spans, uint32_t max);

/*
 * transmit.c: sends all frames of an RNDIS packet, or none, if it is not as it should be; under the
 * lock, for reading
 */
bool net_transmit(struct vvb_net *net, uint32_t channel, const struct vvb_batch *batch,
                  const struct vvb_packet *packet);

/* messages.c */

/* The packet's bytes: copied ones up to there, the rest in segs from skip on. */
struct bytes {
    uint8_t *copy;
    uint32_t copied;
    uint64_t length;
    const struct vvb_seg *segs;
    uint32_t seg_count;
    uint64_t section; /* bytes that are not in segs */
};
/* The place of a frame in the packet's bytes, and the work to be done on it. */
struct frame {
    struct vnet vnet;
    uint32_t start;
    uint32_t length;
    bool tagged;
    uint16_t tag;
};
/*
 * Understands the message at that place, and puts into its headers, in the copy, what the guest
 * left to be done there. Returns its length, or 0: then fault says what is wrong, or nothing, if
 * that cannot be seen in what was copied.
 */
uint32_t net_message(const struct vvb_net_config *config, struct bytes *bytes, uint32_t at,
                     struct frame *frame, struct vvb_net_fault *fault);
bool net_wrong(struct vvb_net_fault *fault, uint32_t error, const char *field, uint64_t value,
               uint32_t offset, const char *detail);

/* receive.c */

/* Takes some frames from a queue of the link. Returns what to do next. */
enum net_next {
    NET_MORE,       /* there may be more */
    NET_EMPTY,      /* no frame waits */
    NET_NO_SECTION, /* the guest has them all */
    NET_HELD,       /* the machine stands still */
};
enum net_next net_take_some(struct vvb_net *net, uint32_t queue, struct vvb_net_taken *taken);
/* Returns how many sections one frame may take. */
uint32_t net_frame_parts(const struct vvb_net *net);
/* Takes some frames, drops them and counts them in *counter. */
enum net_next net_drop_some(struct vvb_net_port *port, uint64_t *counter);

/* tell.c: hands parts over to the guest; those that it cannot hand over become taken->parts */
void net_tell(struct vvb_net *net, uint32_t queue, struct vvb_net_part *parts, uint32_t count,
              struct vvb_net_taken *taken);

/* ports.c: iov[0], and for reading iov[count], are the port's to use */

/* Returns the frame's bytes, which may be more than there is room for; -1: no frame waits. */
ssize_t net_port_read(struct vvb_net_port *port, struct vnet *vnet, struct iovec *iov,
                      uint32_t count);
/* Returns false if the frame is refused, whole. */
bool net_port_write(struct vvb_net_port *port, const struct vnet *vnet, struct iovec *iov,
                    uint32_t count, uint32_t length);

/* recording.c */
uint64_t net_now(int clock); /* nanoseconds */
void net_record(struct vvb_net_recording *recording, uint32_t direction, const struct iovec *iov,
                uint32_t count, uint32_t length, uint64_t when);

#endif
