/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Filters by task, port and path. They run before an event costs anything else. */
#ifndef STREAMER_FILTER_H
#define STREAMER_FILTER_H

#include "task.bpf.h"

/* Two lists share a map, what is kept and what is dropped. */
#define FILTER_MAP(name, key_type)               \
	struct {                                 \
		__uint(type, BPF_MAP_TYPE_HASH); \
		__uint(max_entries, 1024);       \
		__type(key, key_type);           \
		__type(value, __u8);             \
	} name SEC(".maps") SHARED

struct comm_key {
	char comm[COMM_LEN];
};

FILTER_MAP(filter_pids, __u32);
FILTER_MAP(filter_uids, __u32);
FILTER_MAP(filter_comms, struct comm_key);
FILTER_MAP(filter_cgroups, __u64);
FILTER_MAP(filter_exes, struct exe_key);
FILTER_MAP(filter_ports, __u16);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct path_prefix);
	__type(value, __u8);
} filter_paths SEC(".maps") SHARED;

#endif
