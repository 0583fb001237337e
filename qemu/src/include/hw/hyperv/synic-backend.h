/*
 * Hyper-V SynIC: what the accelerator does for it
 *
 * hw/hyperv/hyperv.c owns the message and event flag pages, staged messages,
 * and the tables of connections.  How a SINT becomes an interrupt, and how a
 * HvSignalEvent hypercall reaches its EventNotifier, depends on who emulates
 * the hypervisor: KVM does both in the kernel, other accelerators have QEMU
 * do it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef HW_HYPERV_SYNIC_BACKEND_H
#define HW_HYPERV_SYNIC_BACKEND_H

#include "hw/hyperv/hyperv.h"
#include "qemu/event_notifier.h"

typedef struct HvSynicBackend {
    /*
     * Raise @sint of vCPU @cs as the guest has programmed it at this very
     * moment; a masked SINT or a disabled SynIC is no error.  Returns 0 or
     * -errno.  If NULL, SINTs are raised through notifiers, see below.
     */
    int (*raise_sint)(CPUState *cs, uint32_t sint);

    /*
     * Connect @set, which will raise @sint of vCPU @vp_index, and @ack (may
     * be NULL), to be signalled when the guest is done with a message of that
     * SINT.  Returns a positive handle for @disconnect_sint, or -errno.
     */
    int (*connect_sint)(uint32_t vp_index, uint32_t sint,
                        EventNotifier *set, EventNotifier *ack);
    void (*disconnect_sint)(int handle, EventNotifier *set);

    /*
     * Have the hypervisor signal @notifier on HvSignalEvent for @conn_id, or
     * (@notifier is NULL) stop that.  Returns 0 or -errno; -ENOSYS means that
     * hyperv_hcall_signal_event() has to do it.  May be NULL.
     */
    int (*connect_event)(uint32_t conn_id, EventNotifier *notifier);
} HvSynicBackend;

/* Only with CONFIG_KVM. */
extern const HvSynicBackend hyperv_kvm_synic_backend;

/*
 * Give @cs a SynIC.  All vCPUs must use the same @backend.
 */
void hyperv_synic_add(CPUState *cs, const HvSynicBackend *backend);

/*
 * The guest says that it has freed message slots: it wrote EOM.  To be called
 * with the BQL held by a backend that has no @ack notifiers.
 *
 * Not only the slots of the vCPU that wrote EOM may be free.  A Linux that
 * panics takes messages of vCPUs that it has stopped, one of them perhaps a
 * timer's in front of the UNLOAD response that it waits for, and it can write
 * only its own EOM.
 */
void hyperv_synic_eom(void);

/*
 * Put @msg into the slot of @sint in the message page of @cs, without raising
 * the SINT.  To be called in the thread of @cs with the BQL held.  Returns
 * 0; -ENXIO if there is no message page; -EAGAIN if the slot is occupied: the
 * guest has then been asked for an EOM.
 */
int hyperv_synic_put_msg(CPUState *cs, uint32_t sint,
                         const struct hyperv_message *msg);

#endif
