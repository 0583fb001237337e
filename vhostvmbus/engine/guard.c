/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Surviving SIGBUS: the file behind a mapping was truncated and somebody touched a lost page.
 *
 * The handler puts a private page of zeros in the place of the lost one and marks the mapping, so
 * the access (a memcpy here, a memoryview in Python) finishes with zeros; who made it looks at the
 * mark afterwards and reports the named error. Each such page costs the process a mapping of its
 * own, of which it may have some 65000: so after the first VVB_LOST_PAGES, of all mappings together,
 * a lost page takes the whole mapping with it, which counts as lost anyway. A fault anywhere else
 * goes to the handler that was there before. Nothing in the handler but atomic loads and mmap(), which on Linux is a plain
 * system call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include "engine.h"

#define VVB_MAX_GUARDS 8192
#define VVB_LOST_PAGES 1024u

static struct {
    uintptr_t start;
    uintptr_t end; /* 0: free */
    size_t page_size;
    int lost;
    int taken;
} guards[VVB_MAX_GUARDS];
static int guards_used; /* high-water mark */
static unsigned lost_pages; /* that were replaced by themselves, ever */
static pthread_mutex_t guards_lock = PTHREAD_MUTEX_INITIALIZER;

static struct sigaction previous;
static __thread void *chained_addr;
static __thread unsigned chained_count;

static void chain(int sig, siginfo_t *info, void *context)
{
    /*
     * The same fault twice running: the previous handler did not help (it may even have called
     * us, its own predecessor). Let the default action end the process.
     */
    if (info->si_addr == chained_addr) {
        chained_count++;
    } else {
        chained_addr = info->si_addr;
        chained_count = 1;
    }
    if (chained_count <= 2) {
        if (previous.sa_flags & SA_SIGINFO) {
            previous.sa_sigaction(sig, info, context);
            return;
        }
        if (previous.sa_handler == SIG_IGN && info->si_code <= 0) {
            return;
        }
        if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
            previous.sa_handler(sig);
            return;
        }
    }
    signal(sig, SIG_DFL);
    if (info->si_code <= 0) {
        raise(sig); /* it was sent, not caused: it will not happen by itself again */
    }
}

/* Puts zeros in the place of a lost page, or of the whole mapping. Async-signal-safe. */
static bool put_zeros(uintptr_t start, uintptr_t end, uintptr_t addr, size_t page_size)
{
    if (__atomic_fetch_add(&lost_pages, 1u, __ATOMIC_RELAXED) < VVB_LOST_PAGES &&
        mmap((void *)(addr & ~(uintptr_t)(page_size - 1)), page_size, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) {
        return true;
    }
    __atomic_store_n(&lost_pages, VVB_LOST_PAGES, __ATOMIC_RELAXED);
    return mmap((void *)start, end - start, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    uintptr_t addr = (uintptr_t)info->si_addr;
    int used = vvb_load_acquire(&guards_used);

    if (info->si_code > 0) {
        for (int i = 0; i < used; i++) {
            /* end is acquired first: pairs with the release in vvb_guard_add() */
            uintptr_t end = vvb_load_acquire(&guards[i].end);
            uintptr_t start = vvb_load(&guards[i].start);

            if (addr < end && addr >= start) {
                if (!put_zeros(start, end, addr, vvb_load(&guards[i].page_size))) {
                    break;
                }
                vvb_store_release(&guards[i].lost, 1);
                errno = saved_errno;
                return;
            }
        }
    }
    chain(sig, info, context);
    errno = saved_errno;
}

/* Called with guards_lock held. Others (faulthandler) may have replaced us since the last time. */
static int install(void)
{
    struct sigaction now;
    struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};

    if (sigaction(SIGBUS, NULL, &now)) {
        return -errno;
    }
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus) {
        return 0;
    }
    previous = now;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

int vvb_guard_add(void *start, size_t len, size_t page_size)
{
    int ret;

    pthread_mutex_lock(&guards_lock);
    ret = install();
    if (ret) {
        goto out;
    }
    ret = -ENOSPC;
    for (int i = 0; i < VVB_MAX_GUARDS; i++) {
        if (guards[i].taken) {
            continue;
        }
        guards[i].taken = 1;
        vvb_store(&guards[i].lost, 0);
        vvb_store(&guards[i].page_size, page_size);
        vvb_store(&guards[i].start, (uintptr_t)start);
        /* the guard is whole before its end says that it counts: pairs with the handler */
        vvb_store_release(&guards[i].end, (uintptr_t)start + len);
        if (i >= guards_used) {
            vvb_store_release(&guards_used, i + 1);
        }
        ret = i;
        break;
    }
out:
    pthread_mutex_unlock(&guards_lock);
    return ret;
}

void vvb_guard_del(int guard)
{
    if (guard < 0) {
        return;
    }
    pthread_mutex_lock(&guards_lock);
    vvb_store_release(&guards[guard].end, (uintptr_t)0);
    guards[guard].taken = 0;
    pthread_mutex_unlock(&guards_lock);
}

bool vvb_guard_lost(int guard)
{
    /* acquire: pairs with the release in on_sigbus(), possibly in another thread */
    return guard >= 0 && vvb_load_acquire(&guards[guard].lost);
}
