/*
 * Hyper-V SynIC under KVM: SINTs are irqfds, events are signalled in-kernel
 *
 * Copyright (c) 2015-2018 Virtuozzo International GmbH.
 *
 * This work is licensed under the terms of the GNU GPL, version 2 or later.
 * See the COPYING file in the top-level directory.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "system/kvm.h"
#include "hw/hyperv/synic-backend.h"

static int kvm_connect_sint(uint32_t vp_index, uint32_t sint,
                            EventNotifier *set, EventNotifier *ack)
{
    struct kvm_irq_routing_entry entry = {
        .type = KVM_IRQ_ROUTING_HV_SINT,
        .u.hv_sint.vcpu = vp_index,
        .u.hv_sint.sint = sint,
    };
    int gsi, ret;

    if (!kvm_gsi_routing_enabled()) {
        return -ENOSYS;
    }

    gsi = kvm_irqchip_get_virq(kvm_state);
    if (gsi < 0) {
        return gsi;
    }

    entry.gsi = gsi;
    kvm_add_routing_entry(kvm_state, &entry);
    kvm_irqchip_commit_routes(kvm_state);

    ret = kvm_irqchip_add_irqfd_notifier_gsi(kvm_state, set, ack, gsi);
    if (ret) {
        kvm_irqchip_release_virq(kvm_state, gsi);
        return ret < 0 ? ret : -EINVAL;
    }
    return gsi;
}

static void kvm_disconnect_sint(int gsi, EventNotifier *set)
{
    kvm_irqchip_remove_irqfd_notifier_gsi(kvm_state, set, gsi);
    kvm_irqchip_release_virq(kvm_state, gsi);
}

static int kvm_connect_event(uint32_t conn_id, EventNotifier *notifier)
{
    struct kvm_hyperv_eventfd eventfd = {
        .conn_id = conn_id,
        .fd = notifier ? event_notifier_get_fd(notifier) : -1,
        .flags = notifier ? 0 : KVM_HYPERV_EVENTFD_DEASSIGN,
    };

    if (!kvm_check_extension(kvm_state, KVM_CAP_HYPERV_EVENTFD)) {
        warn_report_once("Hyper-V event signaling is not supported by this "
                         "kernel; using slower userspace hypercall processing");
        return -ENOSYS;
    }
    return kvm_vm_ioctl(kvm_state, KVM_HYPERV_EVENTFD, &eventfd);
}

const HvSynicBackend hyperv_kvm_synic_backend = {
    .connect_sint = kvm_connect_sint,
    .disconnect_sint = kvm_disconnect_sint,
    .connect_event = kvm_connect_event,
};
