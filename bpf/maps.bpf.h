/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Rings, sequence, counters, filters: everything an event passes between its hook and its ring. */
#ifndef STREAMER_MAPS_H
#define STREAMER_MAPS_H

#include "kernel.bpf.h"
#include "settings.h"

const volatile struct settings settings;

/* Set by `whoami` before the first attach: the agent's pid as the hooks see it. */
__u32 agent_pid;

/* The loader sets the sizes of the rings and the number of CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} critical SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} bulk SEC(".maps");

/* Mapped by the agent, so that reading it costs no system call and needs no capability. An array
 * by CPU and not a per-CPU array, which cannot be mapped. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cpu_counters);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reader_state);
} reader SEC(".maps");

#define FILTER_MAP(name, key_type)            \
	struct {                              \
		__uint(type, BPF_MAP_TYPE_HASH); \
		__uint(max_entries, 1024);    \
		__type(key, key_type);        \
		__type(value, __u8);          \
	} name SEC(".maps")

struct comm_key {
	char comm[COMM_LEN];
};

FILTER_MAP(filter_pids, __u32);
FILTER_MAP(filter_uids, __u32);
FILTER_MAP(filter_comms, struct comm_key);
FILTER_MAP(filter_cgroups, __u64);
FILTER_MAP(filter_ports, __u16);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct path_prefix);
	__type(value, __u8);
} filter_paths SEC(".maps");

static __always_inline struct cpu_counters *my_counters(__u32 cpu)
{
	return bpf_map_lookup_elem(&counters, &cpu);
}

/* Adds without losing what an interrupting program adds on the same CPU. */
static __always_inline void count(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

static __always_inline bool enabled(enum event_kind kind)
{
	return settings.enabled_kinds & (1ULL << kind);
}

static __always_inline bool passes(__u8 mode, void *map, const void *key)
{
	__u8 *verdict;

	if (mode == FILTER_OFF)
		return true;
	verdict = bpf_map_lookup_elem(map, key);
	if (verdict)
		return *verdict == VERDICT_KEEP;
	return mode == FILTER_EXCLUDE;
}

static __always_inline bool passes_task_filters(const struct event_header *header)
{
	return passes(settings.filter_pid, &filter_pids, &header->pid) &&
	       passes(settings.filter_uid, &filter_uids, &header->uid) &&
	       passes(settings.filter_comm, &filter_comms, &header->comm) &&
	       passes(settings.filter_cgroup, &filter_cgroups, &header->cgroup_id);
}

static __always_inline void count_filtered(enum event_kind kind)
{
	struct cpu_counters *mine = my_counters(bpf_get_smp_processor_id());

	if (mine) {
		count(&mine->kinds[kind].produced);
		count(&mine->kinds[kind].filtered);
	}
}

/* Whether an event of this task is to be reported, as far as the task decides that. */
static __always_inline bool admits(const struct event_header *header, enum event_kind kind)
{
	if (!enabled(kind) || header->pid == agent_pid)
		return false;
	if (passes_task_filters(header))
		return true;
	count_filtered(kind);
	return false;
}

/* Who and when, of the current task. */
static __always_inline void identify_current(struct event_header *header)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u64 uid_gid = bpf_get_current_uid_gid();

	__builtin_memset(header, 0, sizeof(*header));
	header->boot_ns = bpf_ktime_get_boot_ns();
	header->pid = pid_tgid >> 32;
	header->tid = pid_tgid;
	header->uid = uid_gid;
	header->gid = uid_gid >> 32;
	header->cgroup_id = bpf_get_current_cgroup_id();
	header->ppid = BPF_CORE_READ(task, real_parent, tgid);
	bpf_get_current_comm(header->comm, sizeof(header->comm));
}

#define SEQ_ATTEMPTS 8

/*
 * The next sequence number, unique on this CPU whatever interrupts or preempts the program.
 *
 * An atomic add that returns the old value needs 5.12 and does not load on 5.10, not even where it
 * is never reached. So: read, add atomically, read again. The number is ours if exactly our add
 * happened in between; two programs cannot both see that of the same number. Otherwise a number is
 * given up, which the header reports in `skipped`, so that its absence is not taken for a loss.
 */
static __always_inline __u64 take_seq(struct cpu_counters *mine, enum event_stream stream,
				      __u16 *skipped)
{
	volatile __u64 *seq = &mine->seq[stream];
	__u64 before;
	int attempt;

#pragma unroll
	for (attempt = 0; attempt < SEQ_ATTEMPTS; attempt++) {
		before = *seq;
		__sync_fetch_and_add((__u64 *)seq, 1);
		if (*seq == before + 1)
			return before + 1;
		count(&mine->skipped[stream]);
		(*skipped)++;
	}
	return 0;
}

/*
 * Completes the header of an admitted event: counts it and numbers it. From here on the event is
 * either submitted or reported lost by the gap that its number leaves.
 */
static __always_inline struct cpu_counters *number(struct event_header *header,
						   enum event_kind kind, enum event_stream stream,
						   __u32 size)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct cpu_counters *mine = my_counters(cpu);

	if (!mine)
		return NULL;
	count(&mine->kinds[kind].produced);
	header->skipped = 0;
	header->seq = take_seq(mine, stream, &header->skipped);
	header->size = size;
	header->kind = kind;
	header->cpu = cpu;
	header->stream = stream;
	return mine;
}

/* An admitted event that cannot be reported for want of room in a table. */
static __always_inline void lose(struct event_header *header, enum event_kind kind,
				 enum event_stream stream)
{
	struct cpu_counters *mine = number(header, kind, stream, 0);

	if (mine)
		count(&mine->kinds[kind].lost);
}

/*
 * Wakes the reader only when it asked for it: a wake-up for each record costs thirty times the
 * record. Otherwise the reader's timer finds the records. `size` is of a record that is not
 * reserved yet.
 */
static __always_inline __u64 wakeup(void *ring, enum event_stream stream, __u64 size)
{
	__u32 zero = 0;
	struct reader_state *state = bpf_map_lookup_elem(&reader, &zero);

	if (!state || state->wake[stream] == WAKE_NEVER)
		return BPF_RB_NO_WAKEUP;
	if (state->wake[stream] == WAKE_FULL &&
	    bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA) + size < settings.wakeup_bytes[stream])
		return BPF_RB_NO_WAKEUP;
	state->wake[stream] = WAKE_NEVER;
	return BPF_RB_FORCE_WAKEUP;
}

/* A wake-up that was not given after all: the next record is to give it. */
static __always_inline void wake_later(enum event_stream stream)
{
	__u32 zero = 0;
	struct reader_state *state = bpf_map_lookup_elem(&reader, &zero);

	if (state)
		state->wake[stream] = WAKE_ANY;
}

/* Room for a record of constant `size`, with its header in place; NULL when it is lost. */
static __always_inline void *begin(void *ring, struct event_header *header, enum event_kind kind,
				   enum event_stream stream, const __u32 size)
{
	struct cpu_counters *mine = number(header, kind, stream, size);
	void *record;

	if (!mine)
		return NULL;
	record = header->seq ? bpf_ringbuf_reserve(ring, size, 0) : NULL;
	if (!record) {
		count(&mine->kinds[kind].lost);
		return NULL;
	}
	/* The kernel does not clear ring memory: what a hook leaves out must not leak. */
	__builtin_memset(record, 0, size);
	*(struct event_header *)record = *header;
	return record;
}

static __always_inline void submit(void *ring, enum event_stream stream, void *record)
{
	bpf_ringbuf_submit(record, wakeup(ring, stream, 0));
}

/* Copies a record of variable size, built elsewhere, into the ring. */
static __always_inline void output(void *ring, struct event_header *record, enum event_kind kind,
				   enum event_stream stream, __u32 size)
{
	struct cpu_counters *mine = number(record, kind, stream, size);
	__u64 flags;

	if (!mine)
		return;
	flags = wakeup(ring, stream, size);
	if (record->seq && !bpf_ringbuf_output(ring, record, size, flags))
		return;
	count(&mine->kinds[kind].lost);
	if (flags == BPF_RB_FORCE_WAKEUP)
		wake_later(stream);
}

#endif
