// SPDX-License-Identifier: Apache-2.0
/*
 * The limit: libbpf's own consumer in C, which looks at each record's kind and length and no more.
 *
 *   consumer RING_FD KINDS_OFFSET WARM EVENTS
 *
 * Speaks as the measured processes do: `ready`, `warm`, and a line of JSON.
 */
#define _GNU_SOURCE
#include <bpf/libbpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { KINDS = 64 };

struct counted {
	uint64_t events, bytes;
	uint64_t kinds[KINDS];
	size_t kind_offset;
};

static int on_record(void *context, void *data, size_t size)
{
	struct counted *counted = context;
	uint16_t kind;

	memcpy(&kind, (char *)data + counted->kind_offset, sizeof(kind));
	counted->kinds[kind % KINDS]++;
	counted->bytes += size;
	counted->events++;
	return 0;
}

static double seconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

static void say(const char *word)
{
	puts(word);
	fflush(stdout);
}

/* Reads until so many events have been counted. */
static void read_until(struct ring_buffer *ring, const struct counted *counted, uint64_t events)
{
	while (counted->events < events) {
		if (ring_buffer__consume(ring) == 0)
			usleep(1000);
	}
}

int main(int argc, char **argv)
{
	struct counted counted = {0};
	struct ring_buffer *ring;
	uint64_t warm, events;
	double cpu, wall;

	if (argc != 5) {
		fputs("usage: consumer RING_FD KINDS_OFFSET WARM EVENTS\n", stderr);
		return 2;
	}
	counted.kind_offset = strtoull(argv[2], NULL, 10);
	warm = strtoull(argv[3], NULL, 10);
	events = strtoull(argv[4], NULL, 10);
	ring = ring_buffer__new(atoi(argv[1]), on_record, &counted, NULL);
	if (!ring) {
		perror("consumer: ring_buffer__new");
		return 1;
	}
	say("ready");
	read_until(ring, &counted, warm);
	cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
	wall = seconds(CLOCK_MONOTONIC);
	say("warm");
	read_until(ring, &counted, warm + events);
	printf("{\"events\":%llu,\"cpu_seconds\":%.9f,\"wall_seconds\":%.9f,\"resident_bytes\":0,"
	       "\"peak_bytes\":0}\n",
	       (unsigned long long)(counted.events - warm),
	       seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu, seconds(CLOCK_MONOTONIC) - wall);
	ring_buffer__free(ring);
	return 0;
}
