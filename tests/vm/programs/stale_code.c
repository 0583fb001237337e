/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Does a guest execute what its disk delivered last?
 *
 *   stale_code DISK TRIES PROCESSES
 *
 * DISK holds, in its first two 4096-byte blocks, a function that returns 1 and a function that
 * returns 2. Each process reads them alternately with O_DIRECT into one locked page that is
 * writable and executable, and calls the page after each read. Prints "wrong=W tries=T";
 * exits 0 if W is 0, 1 if not, 2 if the test could not be made.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK 4096

static long run(const char *disk, long tries)
{
	long wrong = 0;
	int fd = open(disk, O_RDONLY | O_DIRECT);
	void *page = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE | PROT_EXEC,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (fd < 0)
		err(2, "%s", disk);
	if (page == MAP_FAILED || mlock(page, BLOCK))
		err(2, "one locked page that is writable and executable");
	for (long i = 0; i < tries; i++) {
		int which = i & 1;
		int (*function)(void) = (int (*)(void))page;

		if (pread(fd, page, BLOCK, which * BLOCK) != BLOCK)
			err(2, "read of block %d", which);
		if (function() != which + 1)
			wrong++;
	}
	return wrong;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		errx(2, "usage: stale_code DISK TRIES PROCESSES");
	long tries = atol(argv[2]), processes = atol(argv[3]), wrong = 0;
	int results[2];

	if (tries < 1 || processes < 1 || processes > 64 || pipe(results))
		errx(2, "TRIES from 1, PROCESSES from 1 to 64");
	for (long p = 0; p < processes; p++) {
		pid_t child = fork();

		if (child < 0)
			err(2, "fork");
		if (child == 0) {
			long mine = run(argv[1], tries / processes);

			_exit(write(results[1], &mine, sizeof(mine)) != sizeof(mine));
		}
	}
	for (long p = 0; p < processes; p++) {
		int status;
		long one;

		if (wait(&status) < 0 || !WIFEXITED(status) || WEXITSTATUS(status))
			errx(2, "a process failed");
		if (read(results[0], &one, sizeof(one)) != sizeof(one))
			errx(2, "a process told no result");
		wrong += one;
	}
	printf("wrong=%ld tries=%ld\n", wrong, tries / processes * processes);
	return wrong != 0;
}
