/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * vmbus-user: VMBus channels from the shell. See usage() below, and vmbus_user.h.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "vmbus_user.h"

#define PAGE		4096UL
#define GUID_LENGTH	36
#define REPLY_CAPACITY	(512U << 10)
#define DEVICES		"/sys/bus/vmbus/devices"
#define DRIVER		"/sys/bus/vmbus/drivers/vmbus_user"

struct options {
	const char *device;	/* class or instance id */
	const char *text, *hex, *file;
	const char *pages_from, *pages_to;
	unsigned long bytes, offset, count, ring_pages;
	int timeout;
	bool binary, no_completion;
};

static void usage(FILE *to)
{
	fputs("usage: vmbus-user COMMAND [OPTIONS]\n"
	      "  list                 VMBus devices: instance id, class id, driver\n"
	      "  bind CLASS...        take the devices of these classes, now and later\n"
	      "  info                 state and counters of a device's channel\n"
	      "  send                 send a packet, print the completion's payload\n"
	      "  receive              receive and complete packets of the host's, print them\n"
	      "options:\n"
	      "  -d ID                class or instance id; may be left out if only one device\n"
	      "                       has no other driver, or this one\n"
	      "  -t MS                time-out in milliseconds (30000; -1: none)\n"
	      "  -r PAGES             pages of each ring (64)\n"
	      "  -c COUNT             packets to send or receive (1; receive 0: for ever)\n"
	      "  -b                   print payloads as they are, not as hexadecimal digits\n"
	      "send:\n"
	      "  -m TEXT, -x HEX, -f FILE   what goes inline (nothing)\n"
	      "  -p FILE              send with external PFNs: pages with the file's bytes\n"
	      "  -n BYTES             so many bytes of external data, zeroes behind the file's\n"
	      "  -o OFFSET            where in the first page they begin (0)\n"
	      "  -w FILE              the host writes to the pages; store what they hold then\n"
	      "  -N                   ask for no completion\n"
	      "FILE may be -. Exit status: 0, 1 for an error, 2 for a time-out.\n", to);
}

static void *allocate(size_t size)
{
	void *memory = calloc(1, size ? size : 1);

	if (!memory)
		err(1, "memory");
	return memory;
}

static bool read_attribute(const char *device, const char *name, char *text, size_t size)
{
	char path[PATH_MAX];
	ssize_t got;
	int fd;

	snprintf(path, sizeof(path), DEVICES "/%s/%s", device, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	got = read(fd, text, size - 1);
	close(fd);
	if (got < 0)
		return false;
	text[got] = '\0';
	return true;
}

/* An id as sysfs has it, without its braces. */
static bool read_id(const char *device, const char *name, char *id)
{
	char text[64];

	if (!read_attribute(device, name, text, sizeof(text)) || text[0] != '{' ||
	    strlen(text) < GUID_LENGTH + 1)
		return false;
	memcpy(id, text + 1, GUID_LENGTH);
	id[GUID_LENGTH] = '\0';
	return true;
}

/* The name of a device's driver; empty if it has none. */
static void read_driver(const char *device, char *driver, size_t size)
{
	char path[PATH_MAX], target[PATH_MAX];
	ssize_t got;
	char *last;

	snprintf(path, sizeof(path), DEVICES "/%s/driver", device);
	got = readlink(path, target, sizeof(target) - 1);
	driver[0] = '\0';
	if (got < 0)
		return;
	target[got] = '\0';
	last = strrchr(target, '/');
	last = last ? last + 1 : target;
	if (strlen(last) < size)
		strcpy(driver, last);
}

static void bind_class(const char *class_id)
{
	int fd;

	if (access(DRIVER, F_OK) && system("modprobe vmbus_user"))
		errx(1, "the module vmbus_user cannot be loaded");
	fd = open(DRIVER "/new_id", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		err(1, DRIVER "/new_id");
	if (write(fd, class_id, strlen(class_id)) < 0 && errno != EEXIST)
		err(1, "class %s", class_id);
	close(fd);
}

static int list(void)
{
	DIR *folder = opendir(DEVICES);
	struct dirent *entry;

	if (!folder)
		err(1, DEVICES);
	while ((entry = readdir(folder))) {
		char class_id[GUID_LENGTH + 1], instance[GUID_LENGTH + 1], driver[64];

		if (entry->d_name[0] == '.' || !read_id(entry->d_name, "class_id", class_id) ||
		    !read_id(entry->d_name, "device_id", instance))
			continue;
		read_driver(entry->d_name, driver, sizeof(driver));
		printf("%s %s %s\n", instance, class_id, driver[0] ? driver : "-");
	}
	closedir(folder);
	return 0;
}

/* Find the one device that is meant; make it ours if it has no driver. */
static void find_device(const char *id, char *instance)
{
	char class_id[GUID_LENGTH + 1] = "", driver[64], its_driver[64] = "";
	DIR *folder = opendir(DEVICES);
	struct dirent *entry;
	int found = 0;

	if (!folder)
		err(1, DEVICES);
	while ((entry = readdir(folder))) {
		char its_class[GUID_LENGTH + 1], its_instance[GUID_LENGTH + 1];

		if (entry->d_name[0] == '.' || !read_id(entry->d_name, "class_id", its_class) ||
		    !read_id(entry->d_name, "device_id", its_instance))
			continue;
		read_driver(entry->d_name, driver, sizeof(driver));
		if (id ? strcasecmp(id, its_class) && strcasecmp(id, its_instance) :
			 driver[0] && strcmp(driver, "vmbus_user"))
			continue;
		if (found++ && !id)
			errx(1, "several devices could be meant; name one with -d");
		if (found > 1)
			continue;
		strcpy(class_id, its_class);
		strcpy(instance, its_instance);
		strcpy(its_driver, driver);
	}
	closedir(folder);
	if (!found)
		errx(1, "no such device: %s", id ? id : "none without a driver of its own");
	if (!its_driver[0])
		bind_class(class_id);
	else if (strcmp(its_driver, "vmbus_user"))
		errx(1, "device %s has another driver: %s", instance, its_driver);
}

static int open_device(const struct options *options)
{
	char path[64], instance[GUID_LENGTH + 1];
	int fd, tries = 0;

	find_device(options->device, instance);
	for (char *c = instance; *c; c++)
		*c = tolower(*c);
	snprintf(path, sizeof(path), "/dev/vmbus/%s", instance);
	/* The kernel makes the node a little later than it binds the device. */
	while ((fd = open(path, O_RDWR | O_CLOEXEC)) < 0 && errno == ENOENT && tries++ < 500)
		nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
	if (fd < 0)
		err(1, "%s", path);
	return fd;
}

static void open_channel(int fd, const struct options *options)
{
	struct vmbus_user_open request = {
		.send_pages = options->ring_pages,
		.receive_pages = options->ring_pages,
	};

	if (ioctl(fd, VMBUS_USER_IOC_OPEN, &request))
		err(1, "the channel cannot be opened");
}

static void failed(const char *what)
{
	if (errno == ETIMEDOUT || errno == EAGAIN)
		errx(2, "%s: timed out", what);
	err(1, "%s", what);
}

static void print_bytes(const struct options *options, const unsigned char *data, size_t size)
{
	if (options->binary) {
		fwrite(data, 1, size, stdout);
	} else {
		for (size_t i = 0; i < size; i++)
			printf("%02x", data[i]);
		putchar('\n');
	}
	if (fflush(stdout))
		err(1, "standard output");
}

static unsigned char *read_all(const char *path, size_t *size)
{
	int fd = strcmp(path, "-") ? open(path, O_RDONLY | O_CLOEXEC) : dup(0);
	size_t room = 0;
	unsigned char *data = NULL;
	ssize_t got;

	if (fd < 0)
		err(1, "%s", path);
	*size = 0;
	do {
		if (*size == room) {
			room = room ? 2 * room : 1 << 16;
			data = realloc(data, room);
			if (!data)
				err(1, "memory");
		}
		got = read(fd, data + *size, room - *size);
		if (got < 0)
			err(1, "%s", path);
		*size += got;
	} while (got);
	close(fd);
	return data;
}

static void write_all(const char *path, const unsigned char *data, size_t size)
{
	int fd = strcmp(path, "-") ? open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666) :
				     dup(1);

	if (fd < 0)
		err(1, "%s", path);
	while (size) {
		ssize_t put = write(fd, data, size);

		if (put < 0)
			err(1, "%s", path);
		data += put;
		size -= put;
	}
	if (close(fd))
		err(1, "%s", path);
}

static unsigned char *from_hex(const char *hex, size_t *size)
{
	unsigned char *data = allocate(strlen(hex) / 2);

	for (*size = 0; *hex; hex += 2) {
		unsigned int byte;

		if (!isxdigit((unsigned char)hex[0]) || !isxdigit((unsigned char)hex[1]) || sscanf(hex, "%2x", &byte) != 1)
			errx(1, "not hexadecimal digits, two for each byte: %s", hex);
		data[(*size)++] = byte;
	}
	return data;
}

static unsigned char *inline_bytes(const struct options *options, size_t *size)
{
	*size = 0;
	if (options->hex)
		return from_hex(options->hex, size);
	if (options->file)
		return read_all(options->file, size);
	if (options->text) {
		*size = strlen(options->text);
		return (unsigned char *)options->text;
	}
	return NULL;
}

static unsigned char *external_bytes(const struct options *options, size_t *size)
{
	unsigned char *data = NULL, *memory;
	size_t given = 0;

	if (options->pages_from)
		data = read_all(options->pages_from, &given);
	*size = options->bytes ? options->bytes : given;
	if (!*size)
		return NULL;
	if (*size > UINT_MAX || options->offset >= PAGE)
		errx(1, "at most 4 GiB of external data, from an offset below 4096 on");
	memory = mmap(NULL, options->offset + *size, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		err(1, "memory");
	if (given)
		memcpy(memory + options->offset, data, given < *size ? given : *size);
	free(data);
	return memory + options->offset;
}

static int send_packets(const struct options *options)
{
	size_t inline_size, external_size;
	unsigned char *inline_data = inline_bytes(options, &inline_size);
	unsigned char *external_data = external_bytes(options, &external_size);
	unsigned char *reply = allocate(REPLY_CAPACITY);
	int fd = open_device(options);

	if ((options->pages_from || options->pages_to) && !external_data)
		errx(1, "no external data; say how much with -n");
	open_channel(fd, options);
	for (unsigned long i = 0; i < options->count; i++) {
		struct vmbus_user_range range = {
			.addr = (unsigned long)external_data,
			.byte_count = external_size,
		};
		struct vmbus_user_send send = {
			.buffer = (unsigned long)inline_data,
			.buffer_length = inline_size,
			.flags = options->no_completion ? 0 : VMBUS_USER_WAIT_FOR_COMPLETION,
			.ranges = (unsigned long)&range,
			.range_count = external_data ? 1 : 0,
			.reply_capacity = REPLY_CAPACITY,
			.timeout = options->timeout,
		};
		struct vmbus_user_wait wait = {
			.reply = (unsigned long)reply,
			.capacity = REPLY_CAPACITY,
			.timeout = options->timeout,
		};

		if (options->pages_to)
			send.flags |= VMBUS_USER_HOST_WRITES;
		if (ioctl(fd, VMBUS_USER_IOC_SEND, &send))
			failed("send");
		if (options->no_completion)
			continue;
		wait.transaction_id = send.transaction_id;
		if (ioctl(fd, VMBUS_USER_IOC_WAIT, &wait))
			failed("wait for the completion");
		print_bytes(options, reply, wait.copied);
	}
	if (options->pages_to)
		write_all(options->pages_to, external_data, external_size);
	return 0;
}

static int receive_packets(const struct options *options)
{
	unsigned char *data = allocate(REPLY_CAPACITY);
	int fd = open_device(options);

	open_channel(fd, options);
	for (unsigned long i = 0; i < options->count || !options->count; i++) {
		struct vmbus_user_receive receive = {
			.buffer = (unsigned long)data,
			.capacity = REPLY_CAPACITY,
			.timeout = options->timeout,
		};
		struct vmbus_user_complete complete = { .timeout = options->timeout };

		if (ioctl(fd, VMBUS_USER_IOC_RECEIVE, &receive))
			failed("receive");
		print_bytes(options, data, receive.length);
		complete.transaction_id = receive.transaction_id;
		if (receive.flags & VMBUS_USER_TO_COMPLETE &&
		    ioctl(fd, VMBUS_USER_IOC_COMPLETE, &complete))
			failed("complete");
	}
	return 0;
}

static int show_info(const struct options *options)
{
	static const char *const states[] = { "closed", "open", "gone" };
	struct vmbus_user_info info;
	int fd = open_device(options);

	if (ioctl(fd, VMBUS_USER_IOC_INFO, &info))
		err(1, "info");
	printf("abi %u\nstate %s\nvmbus %u.%u\nflags %#x\nmmio_megabytes %u\n", info.abi,
	       states[info.state % 3], info.vmbus_version >> 16, info.vmbus_version & 0xffff,
	       info.channel_flags, info.mmio_megabytes);
	printf("send_ring %u\nreceive_ring %u\nmax_packet %u\nin_flight %u\ncompleted %u\n"
	       "received %u\nto_complete %u\ngpadls %u\n", info.send_ring, info.receive_ring,
	       info.max_packet, info.in_flight, info.completed, info.received, info.to_complete,
	       info.gpadls);
	printf("pinned_pages %llu\nsent %llu\nring_full %llu\ncompletions %llu\n"
	       "stray_completions %llu\npackets %llu\ndropped %llu\n", info.pinned_pages, info.sent,
	       info.ring_full, info.completions, info.stray_completions, info.packets,
	       info.dropped);
	return 0;
}

static unsigned long number(const char *text, unsigned long highest)
{
	char *end;
	unsigned long value;

	errno = 0;
	value = strtoul(text, &end, 0);
	if (errno || end == text || *end || value > highest || *text == '-')
		errx(1, "not a number up to %lu: %s", highest, text);
	return value;
}

int main(int argc, char **argv)
{
	struct options options = { .count = 1, .ring_pages = 64, .timeout = 30000 };
	const char *command = argc > 1 ? argv[1] : "";
	int option;

	optind = 2;
	while (argc > 1 && (option = getopt(argc, argv, "d:t:r:c:bm:x:f:p:n:o:w:Nh")) != -1) {
		switch (option) {
		case 'd': options.device = optarg; break;
		case 't':
			options.timeout = strcmp(optarg, "-1") ? (int)number(optarg, INT_MAX) : -1;
			break;
		case 'r': options.ring_pages = number(optarg, 512); break;
		case 'c': options.count = number(optarg, ULONG_MAX); break;
		case 'b': options.binary = true; break;
		case 'm': options.text = optarg; break;
		case 'x': options.hex = optarg; break;
		case 'f': options.file = optarg; break;
		case 'p': options.pages_from = optarg; break;
		case 'n': options.bytes = number(optarg, UINT_MAX); break;
		case 'o': options.offset = number(optarg, PAGE - 1); break;
		case 'w': options.pages_to = optarg; break;
		case 'N': options.no_completion = true; break;
		case 'h':
			usage(stdout);
			return 0;
		default:
			usage(stderr);
			return 1;
		}
	}
	if (!strcmp(command, "bind") && optind < argc) {
		for (; optind < argc; optind++)
			bind_class(argv[optind]);
		return 0;
	}
	if (optind < argc) {
		usage(stderr);
		return 1;
	}
	if (!strcmp(command, "list"))
		return list();
	if (!strcmp(command, "info"))
		return show_info(&options);
	if (!strcmp(command, "send"))
		return send_packets(&options);
	if (!strcmp(command, "receive"))
		return receive_packets(&options);
	usage(strcmp(command, "help") ? stderr : stdout);
	return strcmp(command, "help") != 0;
}
