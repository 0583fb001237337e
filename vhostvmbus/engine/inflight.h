/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The layout of one channel's part of the in-flight region, and what is kept beside it, for
 * inflight.c (which explains it) and inflightopen.c.
 */
#ifndef VVB_INFLIGHT_H
#define VVB_INFLIGHT_H

#include "ringbuf.h"

#define INFLIGHT_MAGIC 0x544c464e49425656ull /* "VVBINFLT" */
#define INFLIGHT_VERSION 1u
#define MOST_REPLAYS 32u /* then it is taken for what ends the back ends */

struct cursor {
    uint64_t number;
    uint32_t index;
    uint32_t reserved;
};

struct cursors {
    struct cursor at[2];
    uint32_t current;
    uint32_t reserved[7];
};

struct head {
    uint64_t magic; /* 0: never used */
    uint32_t version;
    uint32_t slots;
    uint32_t slot_bytes;
    uint32_t reserved[11];
    struct cursors rx;
    struct cursors tx;
    uint32_t note_length; /* 0: none, or one that was being written */
    uint32_t reserved_too;
    uint8_t note[VVB_NOTE_BYTES];
};

struct slot {
    uint64_t number; /* 0: free */
    uint64_t done;   /* head.tx's number with which it is; 0: not yet */
    struct descriptor descriptor;
    uint32_t ring_offset;
    uint32_t replays; /* how many back ends have been given it after the first */
    uint32_t reserved[6];
};

_Static_assert(sizeof(struct cursors) == 64 && sizeof(struct slot) == 64, "a cache line each");

/* What a slot of ours is. */
enum { FREE, TAKEN, MARKED };

/* A packet of the last back end's. */
struct again {
    uint64_t number;
    struct descriptor descriptor;
    uint32_t ring_offset;
    uint32_t slot;
    uint32_t replays;
};

struct vvb_record {
    char *map;
    size_t map_len;
    int guard;
    struct head *head;
    struct slot *slots;
    uint8_t *bytes;
    uint32_t count;
    uint32_t slot_bytes;

    /* for the thread that receives */
    uint64_t taken; /* the last number given */
    uint32_t rx_current;
    uint32_t *free;
    uint32_t free_count;
    struct again *again;
    uint32_t again_count, again_next;

    /* under the ring's tx_lock */
    uint64_t sent;
    uint32_t tx_current;
    uint8_t *state;
    uint32_t *marked;
    uint32_t marked_count;
    uint32_t *returned; /* free, and on their way to the thread that receives */
    uint32_t returned_count;
};

#endif
