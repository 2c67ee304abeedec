// SPDX-License-Identifier: Apache-2.0
/*
 * For each line on standard input: makes as many calls of getppid() as its argument says, and prints
 * the nanoseconds of one, in the fastest of some parts.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PARTS 20

static double own_ns(void)
{
	struct timespec now;

	if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now))
		exit(1);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static double fastest(long count)
{
	double best = 0;

	for (int part = 0; part < PARTS; part++) {
		double start = own_ns(), each;

		for (long i = 0; i < count; i++)
			syscall(SYS_getppid);
		each = (own_ns() - start) / count;
		if (part == 0 || each < best)
			best = each;
	}
	return best;
}

int main(int argc, char **argv)
{
	char line[16];

	if (argc != 2)
		return 2;
	while (fgets(line, sizeof(line), stdin)) {
		printf("%.2f\n", fastest(atol(argv[1]) / PARTS));
		fflush(stdout);
	}
	return 0;
}
