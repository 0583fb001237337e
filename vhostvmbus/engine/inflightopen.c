/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Attaching to a channel's part of the in-flight region: an empty one, or one that a back end left
 * behind. See inflight.c for what is in it and when it counts.
 *
 * Nothing here trusts the file: it has been in other hands. What is used again and again is kept in
 * private memory; what is read is copied, then checked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "inflight.h"

#define MAX_SLOTS 65535u
#define MAX_SLOT_BYTES (1u << 20)

/* ---- sizes ---- */

static uint64_t pages(uint64_t bytes)
{
    return (bytes + VVB_PAGE_SIZE - 1) & ~(uint64_t)(VVB_PAGE_SIZE - 1);
}

static uint64_t bytes_start(uint32_t slots)
{
    return VVB_PAGE_SIZE + pages((uint64_t)slots * sizeof(struct slot));
}

uint64_t vvb_inflight_size(uint32_t slots, uint32_t slot_bytes)
{
    return bytes_start(slots) + pages((uint64_t)slots * ((slot_bytes + 63ull) & ~63ull));
}

/* The most that each slot of such a part has room for; 0 if it is none. */
static uint32_t slot_room(uint64_t size, uint32_t slots)
{
    uint64_t room;

    if (!slots || slots > MAX_SLOTS || size % VVB_PAGE_SIZE || size <= bytes_start(slots)) {
        return 0;
    }
    room = (size - bytes_start(slots)) / slots & ~63ull;
    return room > MAX_SLOT_BYTES ? 0 : (uint32_t)room;
}

int vvb_inflight_clear(int fd, uint64_t offset, uint64_t size)
{
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size)) {
        return -errno;
    }
    return 0;
}

/* ---- attaching to a part ---- */

static int by_number(const void *left, const void *right)
{
    const struct again *a = left, *b = right;

    return a->number < b->number ? -1 : a->number > b->number;
}

/*
 * Where one ring is, if the header says the same, or what the header said before the last step: the
 * process was killed amid it.
 */
static int read_cursor(const struct cursors *cursors, uint32_t *current, uint32_t header,
                       uint32_t size, struct cursor *cursor)
{
    struct cursor before;

    *current = vvb_load(&cursors->current);
    if (*current > 1) {
        return -EBADMSG;
    }
    memcpy(cursor, &cursors->at[*current], sizeof(*cursor));
    memcpy(&before, &cursors->at[!*current], sizeof(before));
    vvb_copied();
    if (!index_ok(cursor->index, size) || cursor->number > UINT64_MAX / 2) {
        return -EBADMSG;
    }
    return header == cursor->index || header == before.index ? 0 : -ESTALE;
}

/* One slot of the last back end's: free now, or to be given again. */
static int read_slot(struct vvb_ring *ring, uint32_t index, uint64_t taken, uint64_t sent)
{
    struct vvb_record *record = ring->record;
    struct slot *slot = &record->slots[index], copy;
    struct again *again;

    memcpy(&copy, slot, sizeof(copy));
    vvb_copied();
    if (!copy.number || copy.number > taken || (copy.done && copy.done <= sent)) {
        if (copy.number) {
            vvb_store(&slot->number, (uint64_t)0);
        }
        record->free[record->free_count++] = index;
        return 0;
    }
    if (copy.descriptor.len8 * 8u < DESCRIPTOR_SIZE ||
        copy.descriptor.len8 * 8u + TRAILER_SIZE >= ring->rx.size ||
        copy.descriptor.offset8 * 8u < DESCRIPTOR_SIZE ||
        copy.descriptor.offset8 > copy.descriptor.len8 ||
        !index_ok(copy.ring_offset, ring->rx.size)) {
        return -EBADMSG;
    }
    vvb_store(&slot->done, (uint64_t)0);
    if (copy.replays <= MOST_REPLAYS) {
        copy.replays++;
        vvb_store(&slot->replays, copy.replays);
    }
    record->state[index] = TAKEN;
    again = &record->again[record->again_count++];
    again->number = copy.number;
    again->descriptor = copy.descriptor;
    again->ring_offset = copy.ring_offset;
    again->slot = index;
    again->replays = copy.replays;
    return 0;
}

static int go_on(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;
    const struct head *head = record->head;
    struct cursor rx, tx;
    int ret;

    if (vvb_load(&head->magic) != INFLIGHT_MAGIC || head->version != INFLIGHT_VERSION ||
        head->slots != record->count || head->slot_bytes != record->slot_bytes) {
        return -EBADMSG;
    }
    ret = read_cursor(&head->rx, &record->rx_current, ring->read_index, ring->rx.size, &rx);
    if (!ret) {
        ret = read_cursor(&head->tx, &record->tx_current, ring->write_index, ring->tx.size, &tx);
    }
    for (uint32_t i = record->count; !ret && i-- > 0;) {
        ret = read_slot(ring, i, rx.number, tx.number);
    }
    if (ret) {
        return ret;
    }
    qsort(record->again, record->again_count, sizeof(*record->again), by_number);
    for (uint32_t i = 1; i < record->again_count; i++) {
        if (record->again[i].number == record->again[i - 1].number) {
            return -EBADMSG;
        }
    }
    record->taken = rx.number;
    record->sent = tx.number;
    ring->read_index = rx.index;
    vvb_store_release(&ring->rx.header->read_index, rx.index);
    ring->write_index = ring->published = tx.index;
    vvb_store_release(&ring->tx.header->write_index, tx.index);
    return 0;
}

static void start(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;
    struct head *head = record->head;

    head->version = INFLIGHT_VERSION;
    head->slots = record->count;
    head->slot_bytes = record->slot_bytes;
    for (uint32_t i = 0; i < 2; i++) {
        head->rx.at[i] = (struct cursor){.index = ring->read_index};
        head->tx.at[i] = (struct cursor){.index = ring->write_index};
    }
    head->rx.current = head->tx.current = 0;
    vvb_store_release(&head->magic, INFLIGHT_MAGIC);
    for (uint32_t i = record->count; i-- > 0;) {
        record->free[record->free_count++] = i; /* the first slot first */
    }
}

void vvb_ring_keep_note(struct vvb_ring *ring, const char *data, uint32_t length)
{
    struct head *head = ring->record ? ring->record->head : NULL;

    if (head && length <= VVB_NOTE_BYTES) {
        vvb_store_release(&head->note_length, 0u);
        vvb_copied(); /* not below the copy */
        memcpy(head->note, data, length);
        /* release: the note is whole before it has a length */
        vvb_store_release(&head->note_length, length);
    }
}

uint32_t vvb_ring_get_note(struct vvb_ring *ring, char *data)
{
    const struct head *head = ring->record ? ring->record->head : NULL;
    uint32_t length = head ? vvb_load_acquire(&head->note_length) : 0;

    if (length > VVB_NOTE_BYTES) {
        return 0;
    }
    if (length) {
        memcpy(data, head->note, length);
    }
    return length;
}

static int map_part(struct vvb_record *record, int fd, uint64_t offset, uint64_t size)
{
    struct stat status;

    if (fstat(fd, &status)) {
        return -errno;
    }
    if (offset % VVB_PAGE_SIZE || offset > INT64_MAX - size || status.st_size < 0 ||
        (uint64_t)status.st_size < offset + size) {
        return -EINVAL;
    }
    record->map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (record->map == MAP_FAILED) {
        record->map = NULL;
        return -errno;
    }
    record->map_len = size;
    record->guard = vvb_guard_add(record->map, size, VVB_PAGE_SIZE);
    record->head = (struct head *)record->map;
    record->slots = (struct slot *)(record->map + VVB_PAGE_SIZE);
    record->bytes = (uint8_t *)record->map + bytes_start(record->count);
    return record->guard < 0 ? record->guard : 0;
}

int vvb_ring_record(struct vvb_ring *ring, int fd, uint64_t offset, uint64_t size, uint32_t slots,
                    int resume)
{
    uint32_t slot_bytes = slot_room(size, slots);
    struct vvb_record *record;
    int ret;

    if (!slot_bytes || ring->record) {
        return -EINVAL;
    }
    record = calloc(1, sizeof(*record));
    if (!record) {
        return -ENOMEM;
    }
    ring->record = record;
    record->guard = -1;
    record->count = slots;
    record->slot_bytes = slot_bytes;
    record->free = calloc(slots, sizeof(*record->free));
    record->returned = calloc(slots, sizeof(*record->returned));
    record->marked = calloc(slots, sizeof(*record->marked));
    record->state = calloc(slots, 1);
    record->again = calloc(slots, sizeof(*record->again));
    ret = record->free && record->returned && record->marked && record->state && record->again
              ? map_part(record, fd, offset, size)
              : -ENOMEM;
    if (!ret) {
        /* A part that no back end has used yet has nothing to be resumed. */
        if (resume && vvb_load(&record->head->magic)) {
            ret = go_on(ring);
        } else {
            start(ring);
        }
        if (vvb_guard_lost(record->guard)) {
            ret = -EBADMSG;
        }
    }
    if (ret) {
        vvb_record_free(ring);
    }
    return ret;
}

int vvb_record_forsake(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;

    if (record && mmap(record->map, record->map_len, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
                       0) == MAP_FAILED) {
        return -errno;
    }
    return 0;
}

void vvb_record_free(struct vvb_ring *ring)
{
    struct vvb_record *record = ring->record;

    ring->record = NULL;
    if (!record) {
        return;
    }
    vvb_guard_del(record->guard);
    if (record->map) {
        munmap(record->map, record->map_len);
    }
    free(record->free);
    free(record->returned);
    free(record->marked);
    free(record->state);
    free(record->again);
    free(record);
}
