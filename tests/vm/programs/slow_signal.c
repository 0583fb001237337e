/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preloaded into QEMU, this holds up each eventfd signal of its second vCPU until the descriptor
 * is closed or another one, for 0.2 s at most, and says so on stderr: there would have been time
 * to write to somebody else's file.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LOOKS 200

/* The number that the kernel has given the eventfd; -1 if it is none, or not open. */
static long identity(int fd)
{
	char path[40], text[256], *line;
	int info;
	ssize_t size;
	long id = -1;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = open(path, O_RDONLY | O_CLOEXEC);
	if (info < 0)
		return -1;
	size = read(info, text, sizeof(text) - 1);
	close(info);
	text[size < 0 ? 0 : size] = '\0';
	line = strstr(text, "eventfd-id:");
	if (line)
		sscanf(line, "eventfd-id: %ld", &id);
	return id;
}

ssize_t write(int fd, const void *data, size_t size)
{
	static ssize_t (*next)(int, const void *, size_t);
	char thread[16] = "";

	if (!next)
		next = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
	pthread_getname_np(pthread_self(), thread, sizeof(thread));
	if (size == 8 && !strcmp(thread, "CPU 1/TCG")) {
		long before = identity(fd);
		int i;

		fprintf(stderr, "signal\n");
		for (i = 0; i < LOOKS && identity(fd) == before; i++)
			usleep(1000);
		if (i < LOOKS)
			fprintf(stderr, "to a descriptor that is closed\n");
	}
	return next(fd, data, size);
}
