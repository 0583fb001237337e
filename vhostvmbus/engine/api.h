/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The engine's whole interface: plain declarations, read both by the C compiler (through engine.h)
 * and by cffi (build.py), so that there is one text of it; therefore it has no preprocessor lines.
 * The stub that mypy reads is made of it, too (stub.py): run "make stub" after a change.
 *
 * Prefixes: vvb_ is this engine's (and vvb_net_ and the like a device's in the same module), vuv_
 * that of QEMU's vhost-user-vmbus, vu_ that of the guests' kernel module vmbus_user.
 *
 * Every function may be called without the GIL. "Guest memory" always means a shared mapping that
 * somebody else writes at any time.
 */

enum {
    VVB_OK = 0,
    /* The ring cannot be followed any more. */
    VVB_E_INDEX = 1,
    VVB_E_LOST = 2,
    VVB_E_DESC_TRUNCATED = 3,
    VVB_E_LENGTH = 4,
    VVB_E_OFFSET = 5,
    /* One packet is wrong. */
    VVB_E_TYPE = 16,
    VVB_E_TOO_LARGE = 17,
    VVB_E_RANGE_COUNT = 18,
    VVB_E_RANGE_TRUNCATED = 19,
    VVB_E_RANGE_EMPTY = 20,
    VVB_E_RANGE_TOO_LONG = 21,
    VVB_E_PFN = 22,
    VVB_E_REPLAYED = 23,
    /* Outcomes of a send. */
    VVB_E_FULL = 32,
    VVB_E_TOO_BIG = 33,
    VVB_E_NOMEM = 34
};

/* The field of the wire format that a fault is about. */
enum {
    VVB_F_NONE = 0,
    VVB_F_WRITE_INDEX = 1,
    VVB_F_READ_INDEX = 2,
    VVB_F_AVAILABLE = 3,
    VVB_F_LEN8 = 4,
    VVB_F_OFFSET8 = 5,
    VVB_F_TYPE = 6,
    VVB_F_PAYLOAD_LENGTH = 7,
    VVB_F_RANGE_COUNT = 8,
    VVB_F_BYTE_COUNT = 9,
    VVB_F_PFN_COUNT = 10,
    VVB_F_PFN = 11,
    VVB_F_MEMORY = 12,
    VVB_F_REPLAYS = 13
};

enum { VVB_ROLE_HOST = 0, VVB_ROLE_GUEST = 1 };

struct vvb_fault {
    uint64_t value;
    uint32_t error;
    uint32_t field;
    uint32_t offset; /* bytes from the start of the ring's data (of the range list elsewhere) */
    uint32_t reserved;
};

/* ---- guest memory ---- */

struct vvb_region;
struct vvb_memory;

/* A piece of external data: contiguous in guest-physical and in host addresses. */
struct vvb_seg {
    uint64_t gpa;
    uint64_t len;
    char *host;
    struct vvb_region *region;
};

struct vvb_segs {
    struct vvb_seg *v;
    uint32_t count;
    uint32_t cap;
    uint64_t total; /* bytes */
};

/* The size of the pages that a file is mapped in: more than 4096 for one of hugetlbfs. */
uint64_t vvb_file_page_size(int fd);
struct vvb_region *vvb_region_new(uint64_t gpa, uint64_t size, int fd, uint64_t offset, int *err);
void vvb_region_free(struct vvb_region *region);
/* Replaces the file's pages by private zero pages; stale views stay harmless. */
int vvb_region_detach(struct vvb_region *region);
/*
 * Takes guest memory from those who use it and do not end: a private copy is in its place from now
 * on, which they see as it was and change in vain. Returns 0 or -errno.
 */
int vvb_region_forsake(struct vvb_region *region);
/* Returns the region's own descriptor of the file. */
int vvb_region_fd(struct vvb_region *region);
char *vvb_region_host(struct vvb_region *region);
int vvb_region_lost(struct vvb_region *region);
uint64_t vvb_region_users(struct vvb_region *region);
/* Waits until nobody uses it. Returns 0, or -ETIMEDOUT. */
int vvb_region_wait_unused(struct vvb_region *region, int timeout_ms);

struct vvb_memory *vvb_memory_new(void);
void vvb_memory_free(struct vvb_memory *memory);
/* Installs a new set of regions, sorted by address; returns when the old set is in no use. */
int vvb_memory_set(struct vvb_memory *memory, struct vvb_region **regions, uint32_t count);

/*
 * Parses and translates count GPA ranges from private memory. On success each segment holds a
 * use of its region, given back by vvb_segs_put().
 */
int vvb_translate(struct vvb_memory *memory, const char *data, uint64_t len, uint32_t count,
                  uint64_t max_bytes, uint32_t max_ranges, struct vvb_segs *out,
                  struct vvb_fault *fault);
/* Translates one stretch of addresses likewise. */
int vvb_translate_span(struct vvb_memory *memory, uint64_t gpa, uint64_t len, struct vvb_segs *out);
void vvb_segs_put(const void *segs, uint32_t count);
void vvb_segs_free(struct vvb_segs *segs);

/*
 * ---- external data; offsets and lengths are checked by the caller; 0 or -errno ----
 *
 * segs is an array of struct vvb_seg; it is void so that Python can pass the bytes that it keeps.
 */

int vvb_ext_read(const void *segs, uint32_t count, uint64_t offset, char *dst,
                 uint64_t len);
int vvb_ext_write(const void *segs, uint32_t count, uint64_t offset, const char *src,
                  uint64_t len);
int vvb_ext_fill(const void *segs, uint32_t count, uint64_t offset, int byte,
                 uint64_t len);
int vvb_ext_lost(const void *segs, uint32_t count);
/* Return the bytes transferred (fewer only at the end of the file), or -errno if none were. */
int64_t vvb_ext_preadv(const void *segs, uint32_t count, uint64_t offset, uint64_t len,
                       int fd, int64_t file_offset);
int64_t vvb_ext_pwritev(const void *segs, uint32_t count, uint64_t offset, uint64_t len,
                        int fd, int64_t file_offset);

/* ---- translated code (docs/vhost-user-vmbus.md) ---- */

struct vvb_code_region {
    uint64_t gpa;
    uint64_t size;
    uint64_t first_bit;
};
struct vvb_span {
    uint64_t gpa;
    uint64_t len;
};
struct vvb_codemap;

struct vvb_codemap *vvb_codemap_new(int fd, uint64_t map_bytes,
                                    const struct vvb_code_region *regions, uint32_t count,
                                    int *err);
void vvb_codemap_free(struct vvb_codemap *map);

/* ---- reports of what was written (written.c) ---- */

/* Has reports looked up in that map from now on; NULL: in none. The one before is not used then. */
void vvb_memory_use_codemap(struct vvb_memory *memory, const struct vvb_codemap *map);
/* Tells whether anybody has to know what is written. */
int vvb_memory_watched(const struct vvb_memory *memory);
/*
 * Reports what was written, after the last write and before the guest is told of it. Returns how
 * many stretches have to be discarded by the front end first: whole pages, coalesced, in out, which
 * has room for cap.
 */
uint32_t vvb_memory_written(struct vvb_memory *memory, const struct vvb_span *spans,
                            uint32_t count, struct vvb_span *out, uint32_t cap);

/* ---- plans: common packets, done without the device's code (plan.c) ---- */

enum { VVB_PLAN_BYTES = 64, VVB_PLAN_READ = 0, VVB_PLAN_WRITE = 1, VVB_COMPLETION_REQUESTED = 1 };

/*
 * An unsigned number in a payload: width bytes (1, 2, 4, 8; 0: there is none) at offset, then
 * shifted left. A value that does not fit into 64 bits then fits no rule.
 */
struct vvb_number {
    uint16_t offset;
    uint8_t width;
    uint8_t big_endian;
    uint8_t shift;
    uint8_t reserved[3];
};

/*
 * A rule fits a packet with external data that requests a completion, whose payload has exactly
 * payload_length bytes, of which (payload & mask) == value; with 0 < length <= max_length, length
 * not more than the external data nor than room, and position + length <= file_size.
 *
 * Then length bytes are transferred between the start of the external data and fd at position,
 * unless they would be written to a file that is shorter than file_size, which is looked at once in
 * a batch: writing there would make it grow again. The completion is (payload & keep) | set, with
 * length at done.
 */
struct vvb_rule {
    uint64_t file_size;
    uint64_t max_length;
    int fd;
    uint32_t payload_length;
    uint32_t operation; /* READ: file to guest */
    uint32_t nowait;    /* READ: only what the host has in memory */
    struct vvb_number position;
    struct vvb_number length;
    struct vvb_number room;
    struct vvb_number done;
    uint8_t mask[64];
    uint8_t value[64];
    uint8_t keep[64];
    uint8_t set[64];
};
struct vvb_plan;
struct vvb_todo;

/* Copies the rules; the first that fits a packet counts. EINVAL if one makes no sense. */
struct vvb_plan *vvb_plan_new(const struct vvb_rule *rules, uint32_t count, int *err);
void vvb_plan_free(struct vvb_plan *plan);

/* ---- rings ---- */

struct vvb_outgoing {
    uint64_t transaction_id;
    uint32_t header_len;
    uint32_t payload_len;
    uint16_t type;
    uint16_t flags;
    uint32_t slot; /* the in-flight slot of the packet that this completes; 0: none */
};

struct vvb_packet {
    uint64_t transaction_id;
    uint64_t external_length;
    uint64_t fault_value;
    uint64_t written; /* a plan that failed wrote to these first bytes of the external data */
    uint32_t ring_offset;
    uint32_t data_offset; /* of the whole packet in the batch's data */
    uint32_t length;      /* whole packet, trailer not counted */
    uint32_t payload_offset; /* from the packet's start */
    uint32_t first_seg;
    uint32_t seg_count;
    uint32_t error;
    uint32_t fault_field;
    uint32_t fault_offset;
    uint16_t type;
    uint16_t flags;
    uint32_t slot;     /* its in-flight slot until it is completed; 0: none */
    uint32_t replayed; /* it was taken from the ring by the back end before */
};

struct vvb_batch {
    struct vvb_packet *packets;
    uint8_t *data;
    struct vvb_segs segs;
    struct vvb_fault fault;
    uint32_t count;
    uint32_t packets_cap;
    uint32_t data_len;
    uint32_t data_cap;
    uint32_t signal; /* the peer waits for space and now has it */
    uint32_t bytes;  /* taken from the ring, trailers counted */
    uint32_t no_slot;  /* stopped because all slots of the in-flight region are taken */
    uint32_t replayed; /* packets that were in it already; bytes does not count them */
    uint32_t stopped;  /* set by vvb_batch_stop() */
    /* The plan, and the work that it did: its packets are not among the above. */
    struct vvb_todo *todo;
    uint64_t todo_bytes;
    uint32_t todo_count;
    uint32_t done_count;   /* packets */
    uint32_t answer_count; /* completions of them, which are still to be sent */
    uint64_t done_payload;  /* bytes */
    uint64_t done_external; /* bytes */
    struct vvb_outgoing *outgoing; /* their completions, for vvb_ring_send_many() */
    uint8_t *answers;
    uint32_t answers_len;
    uint32_t span_count;
    uint32_t spans_cap;
    struct vvb_span *spans; /* guest memory that was written */
    const struct vvb_rule *whole; /* its file was found to be as long as it says */
};

struct vvb_limits {
    uint32_t max_payload;
    uint32_t max_ranges;
    uint64_t max_external;
};

struct vvb_ring;

struct vvb_ring *vvb_ring_attach(struct vvb_memory *memory, const uint64_t *pfns, uint32_t count,
                                 uint32_t ring_offset, int role, int initialize,
                                 struct vvb_fault *fault, int *err);
void vvb_ring_free(struct vvb_ring *ring);
/*
 * Takes guest memory from a ring that somebody may be using: private zeros are in its place from now
 * on, in that of its record too. Returns 0 or -errno.
 */
int vvb_ring_forsake(struct vvb_ring *ring);

struct vvb_batch *vvb_batch_new(struct vvb_ring *ring, uint32_t max_packets);
void vvb_batch_free(struct vvb_batch *batch);
/* Has a plan begin nothing more: packets that fit are handed up. For any thread, and for good. */
void vvb_batch_stop(struct vvb_batch *batch);

/*
 * Takes up to max packets out of the ring. The result, and batch->fault, say why it stopped early.
 *
 * With a plan (or NULL), packets that fit it are done here and now, and leave their completions in
 * the batch. Nothing is done before a packet that came earlier and fits no rule: those that fit are
 * left in the ring then, for the next call.
 */
int vvb_ring_receive(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                     struct vvb_memory *memory, const struct vvb_limits *limits,
                     const struct vvb_plan *plan);
void vvb_ring_mask(struct vvb_ring *ring);
/* Returns the bytes to read after unmasking, or -VVB_E_INDEX or -VVB_E_LOST: receive says more. */
int64_t vvb_ring_unmask(struct vvb_ring *ring);

/*
 * Puts one packet into the ring: descriptor, header (8-byte granular), payload, trailer. With
 * publish == 0 the peer does not see it before vvb_ring_publish(). *signal is set to 1 if the
 * peer has to be signalled, else left alone.
 */
int vvb_ring_send(struct vvb_ring *ring, uint16_t type, uint16_t flags, uint64_t transaction_id,
                  const char *header, uint32_t header_len, const char *payload,
                  uint32_t payload_len, int publish, int *signal, struct vvb_fault *fault);
void vvb_ring_publish(struct vvb_ring *ring, int *signal);

struct vvb_sent {
    struct vvb_fault fault;
    uint32_t count; /* packets that went into the ring */
    int signal;     /* 1: the peer has to be signalled */
};
/*
 * Sends as many of the packets (an array of struct vvb_outgoing) as fit, in order, published
 * together; data holds their headers and payloads one after another. Returns VVB_E_FULL, or what is
 * wrong with the packet after sent->count; 0 if nothing is.
 */
int vvb_ring_send_many(struct vvb_ring *ring, const void *packets, uint32_t count,
                       const void *data, uint64_t data_len, struct vvb_sent *sent);

/*
 * While a caller keeps packets that did not fit, in order, nothing but vvb_ring_send_many() and
 * vvb_ring_send() may put others before them.
 */
void vvb_ring_hold(struct vvb_ring *ring, int held);

/* ---- the in-flight region (inflight.c, inflightopen.c, docs/vhost-user-vmbus.md) ---- */

/*
 * Returns the bytes of one channel's part: whole pages, room for slots packets of slot_bytes each.
 */
uint64_t vvb_inflight_size(uint32_t slots, uint32_t slot_bytes);
/* Empties a part and gives its pages back. Returns 0 or -errno. */
int vvb_inflight_clear(int fd, uint64_t offset, uint64_t size);

/*
 * Records packets that request a completion in the part, which is size bytes of fd at offset, from
 * when they leave the ring until their completion is in the other one. It is called once, before
 * anything is received or sent. With resume the rings go on from where the part says, and
 * vvb_ring_receive() first replays the packets in it, in their order; else it has to be empty.
 *
 * Returns 0, or -errno, and then nothing is recorded: EINVAL if no part has this size, EBADMSG if
 * this is no part, ESTALE if it is not this ring's.
 */
int vvb_ring_record(struct vvb_ring *ring, int fd, uint64_t offset, uint64_t size, uint32_t slots,
                    int resume);
/* Returns how many packets are still to be replayed. */
uint32_t vvb_ring_to_replay(struct vvb_ring *ring);
/*
 * Keep and read the note: a few bytes of the device's own that the next back end finds when it
 * resumes. If the process is killed meanwhile, either all of it is found or nothing. Reading
 * returns the length of what is there, up to VVB_NOTE_BYTES; 0 without a record.
 */
enum { VVB_NOTE_BYTES = 256 };
void vvb_ring_keep_note(struct vvb_ring *ring, const char *data, uint32_t length);
uint32_t vvb_ring_get_note(struct vvb_ring *ring, char *data);
/* Tells whether there is a slot for one packet more; on the thread that receives. */
int vvb_ring_has_slot(struct vvb_ring *ring);

struct vvb_ring_state {
    uint32_t rx_size;
    uint32_t tx_size;
    uint32_t rx_avail;
    uint32_t tx_free;
    uint32_t peer_signals_space; /* the peer announced pending_send_sz */
    uint32_t tx_pending;
    uint64_t signals_sent;
    uint64_t signals_suppressed;
    uint64_t space_signals;
};
void vvb_ring_get_state(struct vvb_ring *ring, struct vvb_ring_state *state);
int vvb_ring_lost(struct vvb_ring *ring);
/* For tests and diagnosis: the mapped header page (dir 0 = receive, 1 = send), then data twice. */
char *vvb_ring_pages(struct vvb_ring *ring, int dir);

struct vvb_serving {
    int kick_fd;
    int stop_fd;
    int wake_fd;
    int call_fd;
    uint32_t gather_us; /* microseconds; 0: what comes is done at once, always */
};
struct vvb_served {
    uint64_t packets; /* done by the plan, the last batch's among them; their bytes: */
    uint64_t payload;
    uint64_t external;
    uint64_t wanted;  /* answers to them */
    uint64_t answers; /* put into the ring */
    uint64_t batches;
    uint64_t wakeups;
    uint64_t rests;
    uint64_t signals;
    uint32_t max_batch;
    uint32_t answered; /* of the last batch's answers: the others are the caller's to send */
    uint32_t fired;    /* bit 1: stop_fd, bit 2: wake_fd; they were emptied */
    int32_t error;     /* an errno: the eventfds cannot be waited for */
};
/*
 * vvb_ring_receive(), again and again, with what a plan does answered and waiting in between, until
 * there is something for the caller: packets, answers that the ring has no room for or that have
 * to wait for translated code, replayed packets, no free slot, an error, or stop_fd or wake_fd. The
 * ring is masked then, and the batch is as after vvb_ring_receive().
 *
 * With gather_us, an empty ring is left masked for about so long before it is looked at again, if
 * experience says that several packets will be there by then.
 */
int vvb_ring_serve(struct vvb_ring *ring, struct vvb_batch *batch, uint32_t max,
                   struct vvb_memory *memory, const struct vvb_limits *limits,
                   const struct vvb_plan *plan, const struct vvb_serving *serving,
                   struct vvb_served *served);

/* ---- waiting ---- */

/*
 * Waits for any of the eventfds, and empties those that fired. Returns their bit mask, 0 on
 * time-out, or -errno.
 */
int vvb_wait(const int *fds, uint32_t count, int timeout_ms);
int vvb_signal(int fd);
