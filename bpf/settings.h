/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What the loader tells the programs before they are loaded, and the counters that they keep. */
#ifndef STREAMER_SETTINGS_H
#define STREAMER_SETTINGS_H

#include "events.h"

/* How a filter list is used. */
enum filter_mode {
	FILTER_OFF = 0,
	FILTER_EXCLUDE = 1, /* keep what is not listed */
	FILTER_INCLUDE = 2, /* keep only what is listed with VERDICT_KEEP */
};

enum filter_verdict {
	VERDICT_KEEP = 1,
	VERDICT_DROP = 2,
};

/* Read-only for the programs: the verifier removes what a setting makes unreachable. */
struct settings {
	__u64 enabled_kinds;            /* bit per enum event_kind */
	__u64 wakeup_bytes[STREAM_END]; /* wake the reader when a ring comes to hold this much */
	__u8 filter_pid;                /* enum filter_mode, for this and the next */
	__u8 filter_uid;
	__u8 filter_comm;
	__u8 filter_cgroup;
	__u8 filter_port;
	__u8 filter_path;
	__u8 pad[2];
};

/* produced = filtered + lost + submitted */
struct kind_counters {
	__u64 produced; /* events that happened, the agent's own not among them */
	__u64 filtered; /* kept back by a filter */
	__u64 lost;     /* no room in the ring, or in a table that the event needs */
};

/* One per CPU, mapped read-only by the agent. Multiple of a cache line. */
struct cpu_counters {
	__u64 seq[STREAM_END];     /* last sequence number taken */
	__u64 skipped[STREAM_END]; /* sequence numbers given up unused */
	struct kind_counters kinds[KIND_END];
	__u64 pad[4];
};

/* When a program is to wake the reader. */
enum wake {
	WAKE_NEVER = 0, /* it will look by itself */
	WAKE_FULL = 1,  /* when the ring holds wakeup_bytes */
	WAKE_ANY = 2,   /* at the next record: the reader sleeps */
};

/* Mapped: the reader asks for one wake-up for each ring, the program that gives it resets it. */
struct reader_state {
	__u32 wake[STREAM_END]; /* enum wake */
};

#define PREFIX_LEN 256

struct path_prefix {
	__u32 bits; /* length of the prefix, in bits */
	__u8 path[PREFIX_LEN];
};

#endif
