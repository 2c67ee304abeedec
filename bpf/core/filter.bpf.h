/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Filters by task, port and path. They run before an event costs anything else. */
#ifndef STREAMER_FILTER_H
#define STREAMER_FILTER_H

#include "task.bpf.h"

/* Two lists share a map, what is kept and what is dropped; and so do two generations of them. */
#define FILTER_MAP(name, key_type)               \
	struct {                                 \
		__uint(type, BPF_MAP_TYPE_HASH); \
		__uint(max_entries, 2048);       \
		__type(key, key_type);           \
		__type(value, __u8);             \
	} name SEC(".maps") SHARED

FILTER_MAP(filter_pids, struct number_key);
FILTER_MAP(filter_uids, struct number_key);
FILTER_MAP(filter_comms, struct comm_key);
FILTER_MAP(filter_cgroups, struct number_key);
FILTER_MAP(filter_exes, struct exe_key);
FILTER_MAP(filter_ports, struct number_key);

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2048);
	__type(key, struct path_prefix);
	__type(value, __u8);
} filter_paths SEC(".maps") SHARED;

/*
 * The generation of filters that is in force. To be asked once for an event, which is judged by it as a
 * whole; what the agent changes meanwhile is the other generation, until no program can be using it.
 */
static __always_inline __u32 generation_in_force(void)
{
	struct settings *wanted = ONLY_ENTRY(settings);

	return wanted ? *(volatile __u64 *)&wanted->generation & (GENERATIONS - 1) : 0;
}

static __always_inline struct filter_modes *modes_of(__u32 generation)
{
	struct settings *wanted = ONLY_ENTRY(settings);

	return wanted && generation < GENERATIONS ? &wanted->filters[generation] : NULL;
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

static __always_inline __u8 *verdict_on(void *map, __u64 number, __u32 generation)
{
	struct number_key key = { .number = number, .generation = generation };

	return bpf_map_lookup_elem(map, &key);
}

static __always_inline bool passes_number(__u8 mode, void *map, __u64 number, __u32 generation)
{
	struct number_key key = { .number = number, .generation = generation };

	return passes(mode, map, &key);
}

static __always_inline bool passes_comm(__u8 mode, const struct event_task *who, __u32 generation)
{
	struct comm_key key = { .generation = generation };

	if (mode == FILTER_OFF)
		return true;
	__builtin_memcpy(key.comm, who->comm, sizeof(key.comm));
	return passes(mode, &filter_comms, &key);
}

#define MOST_CGROUP_LEVELS 32

/* The same without the helper, from 6.1 on. */
static __always_inline __u64 ancestor_by_pointer(struct task_struct *task, int level)
{
	struct cgroup___pointers *cgroup = (void *)BPF_CORE_READ(task, cgroups, dfl_cgrp);
	struct cgroup *ancestor = NULL;

	if (level > BPF_CORE_READ(cgroup, level))
		return 0;
	if (bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
				  (void *)cgroup +
					  bpf_core_field_offset(struct cgroup___pointers, ancestors) +
					  level * sizeof(ancestor)))
		count_fault(FAULT_UNREADABLE);
	return BPF_CORE_READ(ancestor, kn, id);
}

/* The id of the current task's cgroup's ancestor at a level, itself included; 0 where there is none.
 * Tracing programs have had the helper since about 5.12; kernels before it keep the ids at hand. */
static __always_inline __u64 ancestor_cgroup(int level)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct cgroup___ids *cgroup;
	__u64 id = 0;

	if (!bpf_core_field_exists(struct cgroup___ids, ancestor_ids))
#if TASK_HELPERS
		return bpf_get_current_ancestor_cgroup_id(level);
#else
		return ancestor_by_pointer(task, level);
#endif
	cgroup = (void *)BPF_CORE_READ(task, cgroups, dfl_cgrp);
	if (level > BPF_CORE_READ(cgroup, level))
		return 0;
	if (bpf_probe_read_kernel(&id, sizeof(id),
				  (void *)cgroup +
					  bpf_core_field_offset(struct cgroup___ids, ancestor_ids) +
					  level * sizeof(id)))
		count_fault(FAULT_UNREADABLE);
	return id;
}

/*
 * A cgroup that is listed stands for all below it. They are looked at from the root down, so that
 * none that is deeper than this loop goes can hide one that is listed above it. Not static: so it is
 * verified once in each program, and not wherever it is called, in whatever state.
 */
__noinline int passes_cgroup(__u32 mode, __u32 generation)
{
	__u8 *verdict = NULL, *found;
	__u64 id;
	int level;

	for (level = 0; level < MOST_CGROUP_LEVELS; level++) {
		id = ancestor_cgroup(level);
		if (!id)
			break;
		found = verdict_on(&filter_cgroups, id, generation);
		if (found)
			verdict = found;
		if (found && *found == VERDICT_DROP)
			return false; /* what excludes wins */
	}
	if (verdict)
		return true;
	return mode == FILTER_EXCLUDE;
}

/*
 * A process whose exe is not known passes: nobody can say that it is not meant. Before "exit: move and
 * extend sched_process_exit() tracepoint" (6.16) that is each one that ends.
 */
static __always_inline bool passes_exe(__u8 mode, __u32 generation)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct exe_key exe = exe_key_of(task);

	if (!exe.inode && !exe.dev && !(READ(struct task_struct, task, flags) & PF_KTHREAD))
		return true;
	exe.generation = generation;
	return passes(mode, &filter_exes, &exe);
}

/* What the filters of a generation say of the current task, which is `who`. */
static __always_inline bool passes_task_filters(const struct event_task *who, __u32 generation)
{
	struct filter_modes *modes = modes_of(generation);

	if (!modes || !modes->task)
		return true;
	if (!passes_number(modes->pid, &filter_pids, who->pid, generation) ||
	    !passes_number(modes->uid, &filter_uids, who->uid, generation) ||
	    !passes_comm(modes->comm, who, generation) ||
	    (modes->cgroup != FILTER_OFF && !passes_cgroup(modes->cgroup, generation)))
		return false;
	return modes->exe == FILTER_OFF || passes_exe(modes->exe, generation);
}

/* Whether an event of the current task, which is `who`, is to be reported as far as the task
 * decides that, by the filters of a generation. Completes the base with the weight of the event. */
static __always_inline bool admits_by(__u32 generation, struct event_base *base,
				      const struct event_task *who, enum event_kind kind)
{
	if (is_agent(who->pid))
		return false;
	if (!passes_task_filters(who, generation)) {
		count_filtered(kind);
		return false;
	}
	base->weight = sample(kind);
	return base->weight;
}

/* The same, of an event that only the task decides. */
static __always_inline bool admits(struct event_base *base, const struct event_task *who,
				   enum event_kind kind)
{
	return admits_by(generation_in_force(), base, who, kind);
}

#endif
