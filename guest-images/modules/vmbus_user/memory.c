// SPDX-License-Identifier: GPL-2.0-only
/*
 * vmbus_user: the user's pages, and GPADLs.
 *
 * Pages stay pinned for as long as the host likes, so they are pinned for the long term and
 * count, within RLIMIT_MEMLOCK, as pinned memory of the process that sends them.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "internal.h"

static int vu_charge(struct vu_pages *set, unsigned long count)
{
	unsigned long limit = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;

	if (atomic64_add_return(count, &set->mm->pinned_vm) > limit && !capable(CAP_IPC_LOCK)) {
		atomic64_sub(count, &set->mm->pinned_vm);
		return -ENOMEM;
	}
	set->charged += count;
	return 0;
}

/* Make room for, and charge, room pages. */
int vu_pages_init(struct vu_pages *set, unsigned long room)
{
	int ret;

	set->page = kvmalloc_array(room, sizeof(*set->page), GFP_KERNEL_ACCOUNT);
	if (!set->page)
		return -ENOMEM;
	set->room = room;
	set->mm = current->mm;
	mmgrab(set->mm);
	ret = vu_charge(set, room);
	if (ret)
		vu_pages_release(set);
	return ret;
}

/*
 * Pin count pages from addr on, behind those already there.
 *
 * Private memory is made the caller's own even if only to be read: otherwise a page that was
 * never touched, or is shared since a fork, could be exchanged for another under the host's
 * eyes. Memory that cannot be written is pinned as it is, unless the host is going to write.
 */
int vu_pages_pin(struct vu_pages *set, u64 addr, unsigned long count, bool write)
{
	unsigned int flags = FOLL_LONGTERM | FOLL_WRITE;

	if (addr & ~PAGE_MASK || count > set->room - set->count ||
	    addr > ULONG_MAX - (count << PAGE_SHIFT))
		return -EINVAL;
	while (count) {
		int got = pin_user_pages_fast(addr, min(count, 4096UL), flags,
					      set->page + set->count);

		if (got == -EFAULT && !write && (flags & FOLL_WRITE)) {
			flags &= ~FOLL_WRITE;
			continue;
		}
		if (got <= 0)
			return got ? got : -EFAULT;
		set->count += got;
		count -= got;
		addr += (u64)got << PAGE_SHIFT;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

void vu_pages_release(struct vu_pages *set)
{
	if (set->count)
		unpin_user_pages_dirty_lock(set->page, set->count, set->dirty);
	if (set->mm) {
		atomic64_sub(set->charged, &set->mm->pinned_vm);
		mmdrop(set->mm);
	}
	kvfree(set->page);
	memset(set, 0, sizeof(*set));
}

static void vu_gpadl_free(struct kref *ref)
{
	struct vu_gpadl *g = container_of(ref, struct vu_gpadl, ref);

	if (g->from_kernel)
		vfree(g->memory);
	else
		vunmap(g->memory);
	vu_pages_release(&g->pages);
	kfree(g);
}

/* Called with vd->control held, as is vu_gpadl_delete(). */
int vu_gpadl_create(struct vu_session *s, struct vmbus_user_gpadl *arg)
{
	unsigned long count = arg->length >> PAGE_SHIFT;
	struct vu_gpadl *g;
	int ret;

	if (!arg->length || arg->length & ~PAGE_MASK || arg->reserved)
		return -EINVAL;
	if (arg->length > (u64)VU_MAX_GPADL_PAGES << PAGE_SHIFT)
		return -EMSGSIZE;
	g = kzalloc(sizeof(*g), GFP_KERNEL_ACCOUNT);
	if (!g)
		return -ENOMEM;
	kref_init(&g->ref);
	g->from_kernel = !arg->addr;
	ret = vu_pages_init(&g->pages, count);
	if (ret)
		goto free;
	ret = -ENOMEM;
	if (g->from_kernel) {
		g->memory = vmalloc_user(arg->length);
	} else {
		g->pages.dirty = true;
		ret = vu_pages_pin(&g->pages, arg->addr, count, true);
		if (ret)
			goto free;
		ret = -ENOMEM;
		g->memory = vmap(g->pages.page, count, VM_MAP, PAGE_KERNEL);
	}
	if (!g->memory)
		goto free;
	ret = vmbus_establish_gpadl(s->channel, g->memory, arg->length, &g->gpadl);
	if (ret)
		goto free;

	arg->handle = g->gpadl.gpadl_handle;
	arg->mmap_offset = g->from_kernel ? (u64)arg->handle << 32 : 0;
	atomic_long_add(g->pages.count, &s->pinned);
	spin_lock(&s->lock);
	list_add_tail(&g->node, &s->gpadls);
	s->gpadl_count++;
	spin_unlock(&s->lock);
	return 0;
free:
	kref_put(&g->ref, vu_gpadl_free);
	return ret;
}

static struct vu_gpadl *vu_gpadl_find(struct vu_session *s, u32 handle)
{
	struct vu_gpadl *g;

	list_for_each_entry(g, &s->gpadls, node)
		if (g->gpadl.gpadl_handle == handle)
			return g;
	return NULL;
}

static void vu_gpadl_remove(struct vu_session *s, struct vu_gpadl *g)
{
	/* Comes back when the host does not use the pages any more. */
	vmbus_teardown_gpadl(s->channel, &g->gpadl);
	if (g->gpadl.decrypted) {
		/* It did not: no memory to ask, or it cannot be made private again. */
		pr_warn("memory of GPADL %u is lost\n", g->gpadl.gpadl_handle);
		return;
	}
	atomic_long_sub(g->pages.count, &s->pinned);
	kref_put(&g->ref, vu_gpadl_free);
}

int vu_gpadl_delete(struct vu_session *s, u32 handle)
{
	struct vu_gpadl *g;

	spin_lock(&s->lock);
	g = vu_gpadl_find(s, handle);
	if (g) {
		list_del(&g->node);
		s->gpadl_count--;
	}
	spin_unlock(&s->lock);
	if (!g)
		return -ENOENT;
	vu_gpadl_remove(s, g);
	return 0;
}

void vu_gpadl_delete_all(struct vu_session *s)
{
	struct vu_gpadl *g, *next;

	list_for_each_entry_safe(g, next, &s->gpadls, node) {
		list_del(&g->node);
		vu_gpadl_remove(s, g);
	}
	s->gpadl_count = 0;
}

int vu_gpadl_mmap(struct vu_session *s, struct vm_area_struct *vma)
{
	u64 offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
	struct vu_gpadl *g;
	int ret;

	spin_lock(&s->lock);
	g = vu_gpadl_find(s, upper_32_bits(offset));
	if (g && g->from_kernel)
		kref_get(&g->ref);
	else
		g = NULL;
	spin_unlock(&s->lock);
	if (!g)
		return -ENXIO;
	/* The mapping keeps the pages themselves; the GPADL may go before it. */
	ret = remap_vmalloc_range(vma, g->memory, lower_32_bits(offset) >> PAGE_SHIFT);
	kref_put(&g->ref, vu_gpadl_free);
	return ret;
}
