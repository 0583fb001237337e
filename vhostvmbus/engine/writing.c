/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Writes of guest memory to files, and what they write if the guest takes the memory back.
 *
 * A write may hang in the kernel, and nobody can recall it. When its guest is told all the same
 * that its channel is closed, the region is forsaken: who uses it keeps addresses, but of private
 * pages. Such a page is the file's until somebody writes it, so a write that hangs would put on
 * the disk what the guest has there by the time that it goes on. Invariants:
 *
 * - the pages of writes under way are copied before vvb_region_forsake() returns, that is before
 *   the guest hears of it: what hangs writes what it was asked to;
 * - no write of a forsaken region begins.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "engine.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct vvb_writing *writings;

int vvb_writing_begin(struct vvb_writing *writing)
{
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < writing->count; i++) {
        if (writing->segs[i].region->forsaken) {
            pthread_mutex_unlock(&lock);
            return -ECANCELED;
        }
    }
    writing->previous = NULL;
    writing->next = writings;
    if (writings) {
        writings->previous = writing;
    }
    writings = writing;
    pthread_mutex_unlock(&lock);
    return 0;
}

void vvb_writing_end(struct vvb_writing *writing)
{
    pthread_mutex_lock(&lock);
    if (writing->next) {
        writing->next->previous = writing->previous;
    }
    *(writing->previous ? &writing->previous->next : &writings) = writing->next;
    pthread_mutex_unlock(&lock);
}

/* A store makes a private page of its own; the value is the page's. */
static void copy_pages(const struct vvb_seg *seg)
{
    uintptr_t end = (uintptr_t)seg->host + seg->len;

    for (uintptr_t at = (uintptr_t)seg->host; at < end; at = (at | (VVB_PAGE_SIZE - 1)) + 1) {
        volatile char *byte = (volatile char *)at;

        *byte = *byte;
    }
}

int vvb_region_forsake(struct vvb_region *region)
{
    int result = 0;

    pthread_mutex_lock(&lock);
    /* A system call that is copying goes on by these addresses: from here on, in private pages. */
    if (mmap(region->host, region->size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, region->fd,
             (off_t)region->file_offset) == MAP_FAILED) {
        result = -errno;
    } else {
        region->forsaken = true;
        for (struct vvb_writing *writing = writings; writing; writing = writing->next) {
            for (uint32_t i = 0; i < writing->count; i++) {
                if (writing->segs[i].region == region) {
                    copy_pages(&writing->segs[i]);
                }
            }
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}
