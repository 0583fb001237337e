// SPDX-License-Identifier: GPL-2.0-only
/*
 * vmbus_user: VMBus channels for user space.
 *
 * A driver for VMBus devices of any class that it is told of, by its parameter or through the
 * bus's new_id. Each device gets a node /dev/vmbus/<instance id>; vmbus_user.h says what can
 * be done with it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/idr.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>

#include "internal.h"

#define VU_MINORS	256
#define VU_CLASSES	16

static char *class_id[VU_CLASSES];
static int class_ids;
module_param_array(class_id, charp, &class_ids, 0444);
MODULE_PARM_DESC(class_id, "class ids (GUIDs) of the devices to take");

static struct hv_vmbus_device_id vu_ids[VU_CLASSES + 1];
static struct class vu_class = { .name = "vmbus_user" };
static DEFINE_IDA(vu_minors);
static dev_t vu_first;

static int vu_fop_open(struct inode *inode, struct file *file)
{
	/* The cdev, which the open file keeps, keeps its device. */
	file->private_data = container_of(inode->i_cdev, struct vu_device, cdev);
	return stream_open(inode, file);
}

static int vu_fop_release(struct inode *inode, struct file *file)
{
	struct vu_device *vd = file->private_data;

	mutex_lock(&vd->control);
	if (vd->session && vd->session->owner == file)
		vu_close_session(vd);
	mutex_unlock(&vd->control);
	return 0;
}

static __poll_t vu_fop_poll(struct file *file, poll_table *wait)
{
	struct vu_device *vd = file->private_data;
	__poll_t mask = EPOLLOUT | EPOLLWRNORM;
	struct vu_session *s;

	poll_wait(file, &vd->wait, wait);
	s = vu_session_get(vd, file);
	if (IS_ERR(s))
		return PTR_ERR(s) == -ENODEV ? EPOLLHUP | EPOLLERR : EPOLLERR;
	spin_lock(&s->lock);
	if (s->queued)
		mask |= EPOLLIN | EPOLLRDNORM;
	if (s->completed_count)
		mask |= EPOLLPRI;
	spin_unlock(&s->lock);
	vu_session_put(s);
	return mask;
}

static int vu_fop_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct vu_device *vd = file->private_data;
	struct vu_session *s = vu_session_get(vd, file);
	int ret;

	if (IS_ERR(s))
		return PTR_ERR(s);
	ret = vu_gpadl_mmap(s, vma);
	vu_session_put(s);
	return ret;
}

static long vu_info(struct vu_device *vd, void __user *arg)
{
	struct vmbus_user_info info = vd->offer;
	struct vu_session *s = vu_session_get(vd, NULL);

	if (!IS_ERR(s)) {
		vu_fill_info(s, &info);
		vu_session_put(s);
	} else if (PTR_ERR(s) == -ENODEV) {
		info.state = VMBUS_USER_GONE;
	}
	return copy_to_user(arg, &info, sizeof(info)) ? -EFAULT : 0;
}

/* The requests that wait for the host's answer, one at a time. */
static long vu_control(struct vu_device *vd, struct file *file, unsigned int cmd,
		       void __user *user)
{
	union {
		struct vmbus_user_open open;
		struct vmbus_user_gpadl gpadl;
		u32 handle;
	} arg = { };
	long ret;

	if (cmd != VMBUS_USER_IOC_CLOSE && copy_from_user(&arg, user, _IOC_SIZE(cmd)))
		return -EFAULT;
	if (mutex_lock_interruptible(&vd->control))
		return -EINTR;
	if (!vd->hdev)
		ret = -ENODEV;
	else if (cmd == VMBUS_USER_IOC_OPEN)
		ret = vu_open(vd, file, &arg.open);
	else if (!vd->session)
		ret = -ENOTCONN;
	else if (vd->session->owner != file)
		ret = -EBUSY;
	else if (cmd == VMBUS_USER_IOC_GPADL_CREATE)
		ret = vu_gpadl_create(vd->session, &arg.gpadl);
	else if (cmd == VMBUS_USER_IOC_GPADL_DELETE)
		ret = vu_gpadl_delete(vd->session, arg.handle);
	else
		ret = 0;
	if (!ret && cmd == VMBUS_USER_IOC_CLOSE)
		vu_close_session(vd);
	mutex_unlock(&vd->control);
	/* Who cannot be told of a new GPADL has it until the channel closes. */
	if (!ret && cmd == VMBUS_USER_IOC_GPADL_CREATE &&
	    copy_to_user(user, &arg.gpadl, sizeof(arg.gpadl)))
		ret = -EFAULT;
	return ret;
}

/* The requests that only use the rings, any number at a time. */
static long vu_traffic(struct vu_session *s, unsigned int cmd, void __user *user)
{
	union {
		struct vmbus_user_send send;
		struct vmbus_user_wait wait;
		struct vmbus_user_receive receive;
		struct vmbus_user_complete complete;
	} arg;
	long ret;

	if (copy_from_user(&arg, user, _IOC_SIZE(cmd)))
		return -EFAULT;
	switch (cmd) {
	case VMBUS_USER_IOC_SEND:
		ret = vu_send(s, &arg.send);
		break;
	case VMBUS_USER_IOC_WAIT:
		ret = vu_wait(s, &arg.wait);
		break;
	case VMBUS_USER_IOC_RECEIVE:
		ret = vu_receive(s, &arg.receive);
		break;
	default:
		return vu_complete(s, &arg.complete);
	}
	/* -EMSGSIZE comes with the size that it would take. */
	if ((!ret || ret == -EMSGSIZE) && copy_to_user(user, &arg, _IOC_SIZE(cmd)))
		ret = -EFAULT;
	return ret;
}

static long vu_fop_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct vu_device *vd = file->private_data;
	void __user *user = (void __user *)arg;
	struct vu_session *s;
	long ret;

	switch (cmd) {
	case VMBUS_USER_IOC_INFO:
		return vu_info(vd, user);
	case VMBUS_USER_IOC_OPEN:
	case VMBUS_USER_IOC_CLOSE:
	case VMBUS_USER_IOC_GPADL_CREATE:
	case VMBUS_USER_IOC_GPADL_DELETE:
		return vu_control(vd, file, cmd, user);
	case VMBUS_USER_IOC_SEND:
	case VMBUS_USER_IOC_WAIT:
	case VMBUS_USER_IOC_RECEIVE:
	case VMBUS_USER_IOC_COMPLETE:
		s = vu_session_get(vd, file);
		if (IS_ERR(s))
			return PTR_ERR(s);
		ret = vu_traffic(s, cmd, user);
		vu_session_put(s);
		return ret;
	default:
		return -ENOTTY;
	}
}

static const struct file_operations vu_fops = {
	.owner = THIS_MODULE,
	.open = vu_fop_open,
	.release = vu_fop_release,
	.poll = vu_fop_poll,
	.mmap = vu_fop_mmap,
	.unlocked_ioctl = vu_fop_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static void vu_device_release(struct device *dev)
{
	struct vu_device *vd = container_of(dev, struct vu_device, dev);

	ida_free(&vu_minors, MINOR(dev->devt));
	kfree(vd);
}

static void vu_describe_offer(struct vu_device *vd)
{
	const struct vmbus_channel_offer *offer = &vd->hdev->channel->offermsg.offer;

	vd->offer.abi = VMBUS_USER_ABI;
	vd->offer.vmbus_version = vmbus_proto_version;
	vd->offer.channel_flags = offer->chn_flags;
	vd->offer.mmio_megabytes = offer->mmio_megabytes;
	memcpy(vd->offer.class_id, &vd->hdev->dev_type, sizeof(vd->offer.class_id));
	memcpy(vd->offer.instance_id, &vd->hdev->dev_instance, sizeof(vd->offer.instance_id));
	memcpy(vd->offer.user_defined, offer->u.std.user_def, sizeof(vd->offer.user_defined));
}

static int vu_probe(struct hv_device *hdev, const struct hv_vmbus_device_id *id)
{
	struct vu_device *vd;
	int minor, ret;

	vd = kzalloc(sizeof(*vd), GFP_KERNEL);
	if (!vd)
		return -ENOMEM;
	minor = ida_alloc_max(&vu_minors, VU_MINORS - 1, GFP_KERNEL);
	if (minor < 0) {
		kfree(vd);
		return minor;
	}
	vd->hdev = hdev;
	mutex_init(&vd->control);
	spin_lock_init(&vd->irq_lock);
	init_waitqueue_head(&vd->wait);
	vu_describe_offer(vd);

	device_initialize(&vd->dev);
	vd->dev.class = &vu_class;
	vd->dev.parent = &hdev->device;
	vd->dev.devt = MKDEV(MAJOR(vu_first), minor);
	vd->dev.release = vu_device_release;
	/* The exclamation mark becomes a slash in /dev. */
	ret = dev_set_name(&vd->dev, "vmbus!%pUl", &hdev->dev_instance);
	if (ret)
		goto put;
	cdev_init(&vd->cdev, &vu_fops);
	vd->cdev.owner = THIS_MODULE;
	hv_set_drvdata(hdev, vd);
	ret = cdev_device_add(&vd->cdev, &vd->dev);
	if (ret)
		goto put;
	return 0;
put:
	put_device(&vd->dev);
	return ret;
}

/* Unbound, unloaded or rescinded. Files that are open stay so, and are told ENODEV. */
static void vu_depart(struct hv_device *hdev)
{
	struct vu_device *vd = hv_get_drvdata(hdev);
	unsigned long flags;

	cdev_device_del(&vd->cdev, &vd->dev);
	spin_lock_irqsave(&vd->irq_lock, flags);
	vd->gone = true;
	spin_unlock_irqrestore(&vd->irq_lock, flags);
	mutex_lock(&vd->control);
	vu_close_session(vd);
	vd->hdev = NULL;
	mutex_unlock(&vd->control);
	wake_up_all(&vd->wait);
	put_device(&vd->dev);
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
static void vu_remove(struct hv_device *hdev)
{
	vu_depart(hdev);
}
#else
static int vu_remove(struct hv_device *hdev)
{
	vu_depart(hdev);
	return 0;
}
#endif

static struct hv_driver vu_driver = {
	.name = "vmbus_user",
	.id_table = vu_ids,
	.probe = vu_probe,
	.remove = vu_remove,
};

static int __init vu_init(void)
{
	int i, ret;

	BUILD_BUG_ON(PAGE_SIZE != HV_HYP_PAGE_SIZE);
	for (i = 0; i < class_ids; i++) {
		if (strlen(class_id[i]) != UUID_STRING_LEN ||
		    guid_parse(class_id[i], &vu_ids[i].guid)) {
			pr_err("class_id %s is not a GUID\n", class_id[i]);
			return -EINVAL;
		}
	}
	ret = vu_start();
	if (ret)
		return ret;
	ret = class_register(&vu_class);
	if (ret)
		goto stop;
	ret = alloc_chrdev_region(&vu_first, 0, VU_MINORS, "vmbus_user");
	if (ret)
		goto class;
	ret = vmbus_driver_register(&vu_driver);
	if (!ret)
		return 0;
	unregister_chrdev_region(vu_first, VU_MINORS);
class:
	class_unregister(&vu_class);
stop:
	vu_stop();
	return ret;
}

static void __exit vu_exit(void)
{
	vmbus_driver_unregister(&vu_driver);
	unregister_chrdev_region(vu_first, VU_MINORS);
	class_unregister(&vu_class);
	ida_destroy(&vu_minors);
	vu_stop();
}

module_init(vu_init);
module_exit(vu_exit);

MODULE_DESCRIPTION("VMBus channels for user space");
MODULE_LICENSE("GPL");
