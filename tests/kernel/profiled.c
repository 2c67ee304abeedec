// SPDX-License-Identifier: Apache-2.0
/* What the profiler's tests look at: functions that are known, busy for a known CPU time.
 *
 *   profiled spin SECONDS     three quarters of it in hot(), the rest in warm()
 *   profiled read SECONDS     in a system call
 *   profiled many SECONDS     in 4,096 different stacks
 *   profiled deep SECONDS     300 calls down
 *   profiled stuck SECONDS FILE    the same as spin, while a thread waits for the content of FILE, mapped
 *                             as code, and keeps the list of mappings from others
 *
 * With `stay` as one argument more, it says when that is done, and is there until standard input ends.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline, noclone))

static volatile unsigned long sink;
static void *volatile frame;
static double deadline;

static double used(void)
{
	struct timespec now;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

/* Compilers give a function that calls none no frame, unless it asks where that is. */
#define BURN(rounds)                                  \
	do {                                          \
		unsigned long i;                      \
		frame = __builtin_frame_address(0);   \
		for (i = 0; i < (rounds); i++)        \
			sink = sink * 2862933555 + 1; \
	} while (0)

NOINLINE void hot(void)
{
	BURN(3000000);
	sink++;
}

NOINLINE void warm(void)
{
	BURN(1000000);
	sink++;
}

NOINLINE void spin(void)
{
	while (used() < deadline) {
		hot();
		warm();
	}
	sink++;
}

NOINLINE void read_zeros(void)
{
	static char room[1 << 20];
	int fd = open("/dev/zero", O_RDONLY);

	while (used() < deadline)
		if (read(fd, room, sizeof(room)) < 0)
			exit(1);
	sink++;
}

NOINLINE void left(unsigned int way, int depth);

NOINLINE void right(unsigned int way, int depth)
{
	if (!depth)
		BURN(20000);
	else if (way & 1)
		left(way >> 1, depth - 1);
	else
		right(way >> 1, depth - 1);
	sink++;
}

NOINLINE void left(unsigned int way, int depth)
{
	if (!depth)
		BURN(20000);
	else if (way & 1)
		left(way >> 1, depth - 1);
	else
		right(way >> 1, depth - 1);
	sink++;
}

NOINLINE void many(void)
{
	unsigned int way = 0;

	while (used() < deadline)
		left(way++ & 4095, 12);
	sink++;
}

NOINLINE void deep(int depth)
{
	if (depth)
		deep(depth - 1);
	else
		spin();
	sink++;
}

static void *look(void *file)
{
	sink = *(volatile char *)file;
	return NULL;
}

static void *map_more(void *unused)
{
	usleep(500000); /* the other one waits by then */
	mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return NULL;
}

NOINLINE void stuck(const char *path)
{
	void *file = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, open(path, O_RDONLY), 0);
	pthread_t looking, mapping;

	if (file == MAP_FAILED || pthread_create(&looking, NULL, look, file) ||
	    pthread_create(&mapping, NULL, map_more, NULL))
		exit(1);
	spin();
	sink++;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	char byte;

	deadline = argc > 2 ? atof(argv[2]) : 1;
	if (!strcmp(what, "read")) {
		read_zeros();
	} else if (!strcmp(what, "many")) {
		many();
	} else if (!strcmp(what, "deep")) {
		deep(300);
	} else if (!strcmp(what, "stuck")) {
		stuck(argv[3]);
	} else {
		spin();
	}
	if (argc > 3) {
		puts("done");
		fflush(stdout);
		while (read(0, &byte, 1) > 0)
			;
	}
	return 0;
}
