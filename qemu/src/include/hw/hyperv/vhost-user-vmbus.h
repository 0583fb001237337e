/*
 * VMBus device whose back end is another process (vhost-user)
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The protocol is in vhost-user-vmbus.md of the vhostvmbus project.  The
 * device is made of seven parts:
 *
 *   vhost-user-vmbus.c       the device: offer, reconnection, life cycle
 *   vhost-user-vmbus-chan.c  GPADLs and channels
 *   vhost-user-vmbus-offer.c offers that the back end makes later or takes
 *                            back; unplugging
 *   vhost-user-vmbus-conn.c  the connection: messages, time limit, negotiation,
 *                            thread that serves the back end's requests
 *   vhost-user-vmbus-inflight.c  the file with packets that are under way
 *   vhost-user-vmbus-code.c  what the back end knows of translated code
 *   vhost-user-vmbus-mem.c   guest memory: which parts of it the back end gets
 */

#ifndef HW_HYPERV_VHOST_USER_VMBUS_H
#define HW_HYPERV_VHOST_USER_VMBUS_H

#include "chardev/char-fe.h"
#include "exec/memory.h"
#include "qemu/thread.h"
#include "hw/hyperv/vmbus.h"
#include "hw/mem/memory-device.h"
#include "system/runstate.h"

/* vhost-user requests that are used here with their usual meaning */
enum {
    VUV_GET_FEATURES = 1,
    VUV_SET_FEATURES = 2,
    VUV_SET_OWNER = 3,
    VUV_GET_PROTOCOL_FEATURES = 15,
    VUV_SET_PROTOCOL_FEATURES = 16,
    VUV_SET_BACKEND_REQ_FD = 21,
    VUV_GET_INFLIGHT_FD = 31,
    VUV_SET_INFLIGHT_FD = 32,
    VUV_GET_MAX_MEM_SLOTS = 36,
    VUV_ADD_MEM_REG = 37,
    VUV_REM_MEM_REG = 38,
};

/* requests specific to VMBus */
enum {
    VUV_GET_OFFER = 1024,
    VUV_GPADL_CREATE = 1025,
    VUV_GPADL_TEARDOWN = 1026,
    VUV_OPEN = 1027,
    VUV_CLOSE = 1028,
    VUV_MODIFY = 1029,
    VUV_RESET = 1030,
    VUV_SET_CODE_MAP = 1031,
    VUV_UNPLUG = 1032,
    VUV_SUSPEND = 1033,
    VUV_CONTINUE = 1034,
};

/* the back end's requests */
enum {
    VUV_BACKEND_INVALIDATE_CODE = 1024,
    VUV_BACKEND_OFFER_CHANNEL = 1025,
    VUV_BACKEND_RESCIND_CHANNEL = 1026,
};

#define VUV_MAX_PAYLOAD         4096
#define VUV_ANSWER_TIMEOUT_MS   10000
#define VUV_UNPLUG_TIMEOUT_MS   10000
#define VUV_MAX_REGIONS         100
#define VUV_MAX_INVALIDATIONS   200
#define VUV_OPEN_RESUME         1
/* more than any VMBus device has: one per vCPU at most */
#define VUV_MAX_CHANNELS        1024
/* offers and rescinds of the back end that the main loop has yet to look at */
#define VUV_MAX_CHANGES         4096

enum {
    VUV_STATUS_SUCCESS = 0,
    VUV_STATUS_UNSUCCESSFUL = 0xc0000001,
    VUV_STATUS_INVALID_PARAMETER = 0xc000000d,
    VUV_STATUS_INSUFFICIENT_RESOURCES = 0xc000009a,
    VUV_STATUS_DEVICE_NOT_CONNECTED = 0xc000009d,
    VUV_STATUS_NOT_SUPPORTED = 0xc00000bb,
};

typedef struct VuvOffer {
    uint8_t class_id[16];
    uint8_t instance_id[16];
    uint16_t channel_flags;
    uint16_t mmio_megabytes;
    uint16_t channels;
    uint16_t max_channels;
    uint8_t user_defined[VMBUS_CHANNEL_USER_DATA_SIZE];
} QEMU_PACKED VuvOffer;

QEMU_BUILD_BUG_ON(sizeof(VuvOffer) != 160);

/* ---------------------------- connection ---------------------------- */

/*
 * Handler of one request from the back end; returns an NTSTATUS.  Runs in a
 * thread of its own, without the BQL, possibly while the main loop waits for
 * an answer from the same back end: it must not wait for the BQL.
 */
typedef uint32_t VuvBackendRequest(void *opaque, uint32_t request,
                                   const uint8_t *payload, uint32_t size);

typedef struct VuvConn {
    CharBackend chr;
    VuvBackendRequest *backend_request;
    void *opaque;

    /* in negotiation or past it, and not given up since */
    bool up;
    /* the first request is on its way */
    bool hello_sent;
    /* and something has come back */
    bool heard;
    /* how long an answer may take: 10 seconds, less in tests */
    uint32_t answer_ms;
    /* the same for now, by vuv_conn_limit(); or 0 */
    uint32_t limit_ms;
    /* for all that is asked in one turn of the main loop; or 0 */
    int64_t turn_deadline;
    QEMUBH *turn_bh;
    /* what was last reported of connections that did not come to be */
    char *complaint;
    /* where the back end is, for messages */
    char *where;
    uint64_t max_mem_slots;
    /* the back end records which packets are under way */
    bool inflight;
    /* the back end wants to know before the device is unplugged */
    bool unplug;
    /* the back end can stand still while the machine does */
    bool suspend;

    bool thread_running;
    QemuThread thread;
    int backend_fd;
} VuvConn;

/*
 * All functions below are called with the BQL held.  A request blocks until it
 * is answered; after 10 seconds without an answer, and after any other
 * violation of the protocol, the connection is given up (@up becomes false).
 * All requests between two turns of the main loop have the 10 seconds together:
 * a reset closes many channels, and a back end that is slow with each would
 * stop the guest for their sum.
 */

void vuv_conn_init(VuvConn *c);
void vuv_conn_destroy(VuvConn *c);

/* Give each request from now on less time, @ms milliseconds; 0 ends that. */
void vuv_conn_limit(VuvConn *c, uint32_t ms);

/*
 * Report @err with the name of the chardev, and free it, but only once in a row:
 * a connection that fails is tried again all the time.
 */
void vuv_conn_complain(VuvConn *c, Error *err);

/* The connection has come to be: what was reported may be reported again. */
void vuv_conn_settled(VuvConn *c);

/* Set @errp to why a connection ended before anything came from the back end. */
void vuv_conn_unheard(VuvConn *c, Error **errp);

/*
 * Send the first request on a fresh connection of the chardev, without waiting
 * for the answer.  It lets the caller find out at leisure whether there's
 * anybody at the other end.
 */
bool vuv_conn_hello(VuvConn *c, Error **errp);

/* Take the connection through the negotiation; begins with hello if need be. */
bool vuv_conn_start(VuvConn *c, bool code_map, Error **errp);

/* Give up the connection; the chardev may make another one later. */
void vuv_conn_drop(VuvConn *c);

/* Release what belongs to a connection that was given up. */
void vuv_conn_cleanup(VuvConn *c);

/* Request with a reply of exactly @reply_size bytes. */
bool vuv_conn_get(VuvConn *c, uint32_t request, void *reply,
                  uint32_t reply_size, Error **errp);

/*
 * The same for a request with a payload.  A descriptor that comes with the
 * reply is stored in @fd, which is -1 else.
 */
bool vuv_conn_ask(VuvConn *c, uint32_t request, const void *payload,
                  uint32_t size, void *reply, uint32_t reply_size, int *fd,
                  Error **errp);

/*
 * Request that is acknowledged with a status.  Returns false, with @errp set,
 * if there's no answer; a status other than success isn't an error here.
 */
bool vuv_conn_ack(VuvConn *c, uint32_t request, const void *payload,
                  uint32_t size, const int *fds, int nfds,
                  uint32_t *status, Error **errp);

/* ---------------------------- memory ---------------------------- */

typedef struct VuvRegion {
    hwaddr gpa;
    uint64_t size;
    MemoryRegion *mr;           /* NULL for a page that hides RAM */
    hwaddr offset;              /* in @mr */
} VuvRegion;

typedef struct VuvMem {
    MemoryListener listener;
    VuvConn *conn;
    GArray *incoming;           /* VuvRegion: being collected */
    GArray *wanted;             /* VuvRegion: what the back end should know */
    /*
     * VuvRegion: what it knows.  Changed with the BQL and the lock held, so
     * readers need one of them.
     */
    GArray *sent;
    QemuMutex lock;
    int code_map_fd;            /* -1 if the guest isn't translated */
    MemslotLimit limit;         /* has memory devices refused that don't fit */
    MemoryRegion *unshared;     /* what was last warned about, only compared */
    Error **init_errp;          /* of whoever calls vuv_mem_init() just now */
} VuvMem;

static inline VuvRegion *vuv_region_at(GArray *a, guint i)
{
    return &g_array_index(a, VuvRegion, i);
}

/* Find out whether main memory can be shared at all, before anything else. */
bool vuv_mem_check(Error **errp);

/* Tell the back end of all memory, and from now on of each change. */
void vuv_mem_init(VuvMem *m, VuvConn *c, int code_map_fd, Error **errp);
void vuv_mem_destroy(VuvMem *m);

/* Forget what was sent, for a new connection. */
void vuv_mem_forget(VuvMem *m);

/* Make the back end's idea of guest memory equal to ours. */
bool vuv_mem_sync(VuvMem *m, Error **errp);

/* Tell the back end where in the map of translated code its regions are. */
bool vuv_code_map_send(VuvMem *m, Error **errp);

/* Serve VUV_BACKEND_INVALIDATE_CODE; called in the connection's thread. */
uint32_t vuv_mem_invalidate(VuvMem *m, const uint8_t *payload, uint32_t size);

/* ------------------- packets that are under way ------------------- */

typedef struct VuvInflightDesc {
    uint64_t mmap_size;
    uint64_t mmap_offset;
    uint16_t num_queues;
    uint16_t queue_size;
    uint32_t reserved;
} QEMU_PACKED VuvInflightDesc;

QEMU_BUILD_BUG_ON(sizeof(VuvInflightDesc) != 24);

/*
 * A file in which the back end notes which packets it has taken from the rings
 * and not completed.  Its contents are nobody else's business; it's kept here
 * since a back end may be killed.
 */
typedef struct VuvInflight {
    int fd;                     /* -1: none */
    VuvInflightDesc desc;       /* as on the wire */
} VuvInflight;

/*
 * Give a new back end the file of the one directly before, or have it make one.
 * Returns false, with @errp set, if the connection was given up meanwhile.
 */
bool vuv_inflight_share(VuvInflight *f, VuvConn *c, uint16_t num_queues,
                        Error **errp);
void vuv_inflight_forget(VuvInflight *f);

/* ---------------------------- offers ---------------------------- */

typedef struct VuvOffers {
    /* protects @changes and @max_channels */
    QemuMutex lock;
    GArray *changes;            /* VuvChange */
    uint16_t max_channels;
    QEMUBH *bh;
    /* the guest's closing of the primary channel is under way */
    bool closing;
    /* the device goes when the guest's driver is at rest */
    bool unplug_waits;
    /* runs while a back end brings it there */
    QEMUTimer *unplug_timer;
} VuvOffers;

/* ---------------------------- device ---------------------------- */

#define TYPE_VHOST_USER_VMBUS "vhost-user-vmbus"
OBJECT_DECLARE_SIMPLE_TYPE(VHostUserVMBus, VHOST_USER_VMBUS)

typedef struct VuvChannel {
    VMBusChannel *chan;
    /* set by the back end to signal the guest; valid while open */
    EventNotifier call;
    bool open;
} VuvChannel;

struct VHostUserVMBus {
    VMBusDevice parent_obj;

    VuvConn conn;
    VuvMem mem;
    VuvOffer offer;             /* as on the wire */
    bool have_offer;
    bool have_mem;
    /* the back end has been told something that a reset undoes */
    bool used;

    uint16_t num_chans;         /* of them, in @chans, some may not exist */
    VuvChannel *chans;
    VuvOffers offers;
    VuvInflight inflight;
    GPtrArray *gpadls;          /* VuvGpadl: all that the guest has created */

    QEMUBH *cleanup_bh;
    /* the back end has been told that the machine stands still */
    bool suspended;
    /* it came while the machine did: the guest's channels are to be opened yet */
    bool opens_due;
    VMChangeStateEntry *vm_state;

    /* for the first answer of a back end that comes later */
    guint hello_watch;
    QEMUTimer *hello_timer;
    Error *migration_blocker;
};

typedef struct VuvGpadl {
    uint32_t channel;
    VMBusGpadl *gpadl;
} VuvGpadl;

/* Report @err with the name of the chardev, and free it. */
void vuv_report(VHostUserVMBus *s, Error *err);

/* Bring a new back end to where the last one was. */
bool vuv_resume(VHostUserVMBus *s, Error **errp);

/* The machine has stopped, or is about to go on. */
void vuv_vm_state(void *opaque, bool running, RunState state);

void vuv_offers_init(VHostUserVMBus *s);
void vuv_offers_destroy(VHostUserVMBus *s);

/*
 * Serve VUV_BACKEND_OFFER_CHANNEL and VUV_BACKEND_RESCIND_CHANNEL; called in
 * the connection's thread.  Returns an NTSTATUS.
 */
uint32_t vuv_offers_request(VHostUserVMBus *s, uint32_t request,
                            const uint8_t *payload, uint32_t size);

/* Carry out what has been requested; with the BQL held. */
void vuv_offers_apply(VHostUserVMBus *s);

/* The back end has said how many channels there may be. */
void vuv_offers_limit(VHostUserVMBus *s, uint16_t max_channels);

/* A new connection begins with the device being offered, or unplugged. */
void vuv_offers_connected(VHostUserVMBus *s);

/* The guest has closed the primary channel, so subchannels go. */
void vuv_offers_primary_closed(VHostUserVMBus *s);

/* Callbacks of the class; see VMBusDeviceClass. */
uint32_t vuv_gpadl_create(VMBusChannel *chan, VMBusGpadl *gpadl);
void vuv_gpadl_teardown(VMBusChannel *chan, VMBusGpadl *gpadl);
int vuv_open_channel(VMBusChannel *chan);
void vuv_close_channel(VMBusChannel *chan);
void vuv_bus_reset(VMBusDevice *vdev);
bool vuv_defer_rescind(VMBusDevice *vdev);

#endif
