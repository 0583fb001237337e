/*
 * VMBus device whose back end is another process: guest memory
 *
 * Copyright (c) 2026 The vhostvmbus maintainers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The back end gets every range of guest RAM that lies in a shared file.  It
 * doesn't get ROM, device memory and private RAM (firmware, option ROMs, video
 * memory): no driver puts rings or buffers there.
 *
 * The pages of the SynIC need care.  Each is a private page laid over main
 * RAM, and the guest turns them on and off while channels are open, when it
 * unplugs a CPU for instance.  To take main RAM away from the back end and to
 * give it back in two parts would cost every channel its ring.  So a private
 * single page amid RAM is passed over: the range includes the RAM beneath, of
 * which the guest is the only user anyway.
 *
 * For the same reason RAM is divided at 1 MiB: firmware hides and shows what's
 * below, also in a reset before the channels are closed.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "exec/address-spaces.h"
#include "exec/ramblock.h"
#include "hw/boards.h"
#include "hw/hyperv/vhost-user-vmbus.h"
#include "system/hostmem.h"
#include "system/numa.h"
#include "cpu.h"
#include "trace.h"

#define OVERLAY_SIZE        4096
#define LOW_END             0x100000
/* what firmware may divide the RAM below into, by turns of RAM and ROM */
#define LOW_RANGES          8

typedef struct WireRegion {
    uint64_t padding;
    uint64_t gpa;
    uint64_t size;
    uint64_t user_addr;
    uint64_t mmap_offset;
} QEMU_PACKED WireRegion;

static bool mr_is_shared(MemoryRegion *mr)
{
    return memory_region_is_ram(mr) && !memory_region_is_ram_device(mr) &&
           memory_region_get_fd(mr) >= 0 && qemu_ram_is_shared(mr->ram_block);
}

static bool check_ram(MemoryRegion *mr, Error **errp)
{
    if (mr_is_shared(mr)) {
        return true;
    }
    error_setg(errp, "guest RAM '%s' can't be shared with the back end",
               memory_region_name(mr));
    error_append_hint(errp, "Use -object memory-backend-memfd,id=mem,size=SIZE,"
                      "share=on -machine memory-backend=mem (or the same with "
                      "-numa node,memdev=mem).\n");
    return false;
}

bool vuv_mem_check(Error **errp)
{
    MachineState *ms = current_machine;
    bool by_node = false;

    for (int i = 0; ms->numa_state && i < ms->numa_state->num_nodes; i++) {
        HostMemoryBackend *be = ms->numa_state->nodes[i].node_memdev;

        if (be) {
            by_node = true;
            if (!check_ram(host_memory_backend_get_memory(be), errp)) {
                return false;
            }
        }
    }
    return by_node || !ms->ram || check_ram(ms->ram, errp);
}

static bool region_equal(const VuvRegion *a, const VuvRegion *b)
{
    return a->gpa == b->gpa && a->size == b->size && a->mr == b->mr &&
           a->offset == b->offset;
}

static bool region_in(GArray *a, const VuvRegion *r)
{
    for (guint i = 0; i < a->len; i++) {
        if (region_equal(vuv_region_at(a, i), r)) {
            return true;
        }
    }
    return false;
}

/* whether both are parts of one mapping of one block */
static bool same_mapping(const VuvRegion *a, const VuvRegion *b)
{
    return a->mr == b->mr && a->offset - a->gpa == b->offset - b->gpa;
}

static void regions_clear(GArray *a)
{
    for (guint i = 0; i < a->len; i++) {
        memory_region_unref(vuv_region_at(a, i)->mr);
    }
    g_array_set_size(a, 0);
}

/* ------------------ what the back end should know ------------------ */

static void listener_begin(MemoryListener *listener)
{
    g_array_set_size(container_of(listener, VuvMem, listener)->incoming, 0);
}

/* RAM that the user has forgotten to share; to the guest it's like any other */
static void warn_unshared(VuvMem *m, MemoryRegion *mr)
{
    if (mr != m->unshared &&
        object_dynamic_cast(memory_region_owner(mr), TYPE_MEMORY_BACKEND)) {
        m->unshared = mr;
        warn_report("vhost-user-vmbus: guest memory '%s' lacks share=on, and "
                    "the guest's I/O to it fails", memory_region_name(mr));
    }
}

/* called for all sections in ascending order, be they new or not */
static void listener_section(MemoryListener *listener,
                             MemoryRegionSection *section)
{
    VuvMem *m = container_of(listener, VuvMem, listener);
    VuvRegion r = {
        .gpa = section->offset_within_address_space,
        .size = int128_get64(section->size),
        .mr = section->mr,
        .offset = section->offset_within_region,
    };

    if (section->readonly || !memory_region_is_ram(r.mr) ||
        !QEMU_IS_ALIGNED(r.gpa | r.size | r.offset, TARGET_PAGE_SIZE)) {
        return;
    }
    if (!mr_is_shared(r.mr)) {
        if (memory_region_size(r.mr) != OVERLAY_SIZE) {
            warn_unshared(m, r.mr);
            return;
        }
        r.mr = NULL;
    }
    if (r.gpa < LOW_END && r.gpa + r.size > LOW_END) {
        VuvRegion low = r;

        low.size = LOW_END - low.gpa;
        g_array_append_val(m->incoming, low);
        r.gpa += low.size;
        r.offset += r.mr ? low.size : 0;
        r.size -= low.size;
    }
    g_array_append_val(m->incoming, r);
}

/*
 * Whether @r, which ends or begins where a hidden page does, went on across
 * that page before it was hidden.
 */
static bool known_across(VuvMem *m, const VuvRegion *r, const VuvRegion *hidden)
{
    for (guint i = 0; i < m->wanted->len; i++) {
        const VuvRegion *old = vuv_region_at(m->wanted, i);

        if (same_mapping(old, r) && old->gpa <= hidden->gpa &&
            old->gpa + old->size >= hidden->gpa + hidden->size) {
            return true;
        }
    }
    return false;
}

/* Join what is only kept apart by hidden pages. */
static GArray *join_regions(VuvMem *m)
{
    GArray *in = m->incoming;
    GArray *out = g_array_new(false, false, sizeof(VuvRegion));

    for (guint i = 0; i < in->len; i++) {
        VuvRegion r = *vuv_region_at(in, i);
        guint first, last;

        if (!r.mr) {
            continue;
        }

        /* hidden pages just before it: only if they were part of it */
        for (first = i; first > 0; first--) {
            VuvRegion *h = vuv_region_at(in, first - 1);

            if (h->mr || h->gpa + h->size != r.gpa ||
                !known_across(m, &r, h)) {
                break;
            }
            r.gpa -= h->size;
            r.offset -= h->size;
            r.size += h->size;
        }

        while (true) {
            VuvRegion *next = NULL;
            uint64_t hidden = 0;

            for (last = i + 1; last < in->len; last++) {
                next = vuv_region_at(in, last);
                if (next->mr || next->gpa != r.gpa + r.size + hidden) {
                    break;
                }
                hidden += next->size;
            }
            if (hidden && last < in->len && next->mr &&
                same_mapping(next, &r) &&
                next->gpa == r.gpa + r.size + hidden) {
                /* the same RAM goes on behind the hidden pages */
                r.size += hidden + next->size;
                i = last;
                continue;
            }
            break;
        }

        /* hidden pages just behind it */
        while (i + 1 < in->len) {
            VuvRegion *h = vuv_region_at(in, i + 1);

            if (h->mr || h->gpa != r.gpa + r.size || !known_across(m, &r, h)) {
                break;
            }
            r.size += h->size;
            i++;
        }

        memory_region_ref(r.mr);
        g_array_append_val(out, r);
    }
    return out;
}

static void listener_commit(MemoryListener *listener)
{
    VuvMem *m = container_of(listener, VuvMem, listener);
    GArray *old = m->wanted;
    Error *err = NULL;

    m->wanted = join_regions(m);
    regions_clear(old);
    g_array_free(old, true);

    if (!m->conn->up) {
        return;
    }
    if (m->init_errp) {
        vuv_mem_sync(m, m->init_errp);
        return;
    }
    if (!vuv_mem_sync(m, &err)) {
        vuv_conn_complain(m->conn, err);
    }
}

/* ---------------------- what the back end knows ---------------------- */

static void region_to_wire(const VuvRegion *r, WireRegion *w)
{
    RAMBlock *rb = r->mr->ram_block;

    *w = (WireRegion) {
        .gpa = cpu_to_le64(r->gpa),
        .size = cpu_to_le64(r->size),
        .user_addr = cpu_to_le64((uintptr_t)memory_region_get_ram_ptr(r->mr) +
                                 r->offset),
        .mmap_offset = cpu_to_le64(rb->fd_offset + r->offset),
    };
}

static bool region_request(VuvMem *m, uint32_t request, const VuvRegion *r,
                           Error **errp)
{
    WireRegion w;
    int fd = memory_region_get_fd(r->mr);
    uint32_t status;

    region_to_wire(r, &w);
    trace_vhost_user_vmbus_region(request, r->gpa, r->size,
                                  memory_region_name(r->mr));
    if (!vuv_conn_ack(m->conn, request, &w, sizeof(w), &fd,
                      request == VUV_ADD_MEM_REG ? 1 : 0, &status, errp)) {
        return false;
    }
    if (status) {
        error_setg(errp, "the back end refuses to %s guest memory at 0x%"
                   HWADDR_PRIx ", size 0x%" PRIx64 ": status 0x%x",
                   request == VUV_ADD_MEM_REG ? "take" : "let go of",
                   r->gpa, r->size, status);
        vuv_conn_drop(m->conn);
        return false;
    }
    return true;
}

static unsigned int limit_max(MemslotLimit *limit)
{
    VuvMem *m = container_of(limit, VuvMem, limit);

    return MIN(m->conn->max_mem_slots, VUV_MAX_REGIONS);
}

static unsigned int limit_used(MemslotLimit *limit)
{
    VuvMem *m = container_of(limit, VuvMem, limit);
    unsigned int used = LOW_RANGES;

    for (guint i = 0; i < m->wanted->len; i++) {
        used += vuv_region_at(m->wanted, i)->gpa >= LOW_END;
    }
    return used;
}

/* Memory devices that came first did not know of the limit. */
static void check_reserved(VuvMem *m)
{
    unsigned int most = limit_used(&m->limit) +
                        memory_devices_get_reserved_memslots();

    if (most > limit_max(&m->limit)) {
        warn_report("vhost-user-vmbus: guest memory may come to have %u ranges, "
                    "and the back end takes %u; a memory device that is plugged "
                    "in after this device has fewer", most,
                    limit_max(&m->limit));
    }
}

bool vuv_mem_sync(VuvMem *m, Error **errp)
{
    bool changed = false;

    if (m->wanted->len > limit_max(&m->limit)) {
        error_setg(errp, "guest memory has %u ranges, more than the back end "
                   "can take (%u)", m->wanted->len, limit_max(&m->limit));
        vuv_conn_drop(m->conn);
        return false;
    }

    /* first make room, as ranges must not overlap */
    for (guint i = 0; i < m->sent->len; ) {
        VuvRegion r = *vuv_region_at(m->sent, i);

        if (region_in(m->wanted, &r)) {
            i++;
            continue;
        }
        /* until it's acknowledged, the back end may invalidate code in it */
        if (!region_request(m, VUV_REM_MEM_REG, &r, errp)) {
            return false;
        }
        WITH_QEMU_LOCK_GUARD(&m->lock) {
            g_array_remove_index(m->sent, i);
        }
        memory_region_unref(r.mr);
        changed = true;
    }

    for (guint i = 0; i < m->wanted->len; i++) {
        VuvRegion r = *vuv_region_at(m->wanted, i);

        if (region_in(m->sent, &r)) {
            continue;
        }
        memory_region_ref(r.mr);
        WITH_QEMU_LOCK_GUARD(&m->lock) {
            g_array_append_val(m->sent, r);
        }
        if (!region_request(m, VUV_ADD_MEM_REG, &r, errp)) {
            return false;
        }
        changed = true;
    }

    return !changed || m->code_map_fd < 0 || vuv_code_map_send(m, errp);
}

void vuv_mem_forget(VuvMem *m)
{
    QEMU_LOCK_GUARD(&m->lock);
    regions_clear(m->sent);
}

/* ---------------------------- life cycle ---------------------------- */

void vuv_mem_init(VuvMem *m, VuvConn *c, int code_map_fd, Error **errp)
{
    m->conn = c;
    m->code_map_fd = code_map_fd;
    m->incoming = g_array_new(false, false, sizeof(VuvRegion));
    m->wanted = g_array_new(false, false, sizeof(VuvRegion));
    m->sent = g_array_new(false, false, sizeof(VuvRegion));
    qemu_mutex_init(&m->lock);
    m->listener = (MemoryListener) {
        .name = "vhost-user-vmbus",
        .begin = listener_begin,
        .region_add = listener_section,
        .region_nop = listener_section,
        .commit = listener_commit,
        .priority = MEMORY_LISTENER_PRIORITY_DEV_BACKEND,
    };
    m->init_errp = errp;
    memory_listener_register(&m->listener, &address_space_memory);
    m->init_errp = NULL;
    m->limit = (MemslotLimit) {
        .name = TYPE_VHOST_USER_VMBUS,
        .max = limit_max,
        .used = limit_used,
    };
    memory_devices_add_limit(&m->limit);
    check_reserved(m);
}

void vuv_mem_destroy(VuvMem *m)
{
    memory_devices_remove_limit(&m->limit);
    memory_listener_unregister(&m->listener);
    regions_clear(m->wanted);
    regions_clear(m->sent);
    g_array_free(m->incoming, true);
    g_array_free(m->wanted, true);
    g_array_free(m->sent, true);
    qemu_mutex_destroy(&m->lock);
}
