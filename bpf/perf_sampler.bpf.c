// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * profile.sample: what runs on the CPUs, looked at so many times a second.
 *
 * A sample is counted under its process and its two stacks, in one of two sets of tables. The agent
 * tells which one (struct profile_settings), and reads and clears the other.
 *
 * Programs run here in an interrupt, or in an NMI: nothing waits, and only tables whose memory is
 * there from the start are used.
 */
#include "core/filter.bpf.h"
#include <linux/bpf_perf_event.h>

char LICENSE[] SEC("license") = "GPL";

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct profile_settings);
} profile_settings SEC(".maps") NEEDS("rate");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct profile_counts);
} profile_counts SEC(".maps") SIZED("cpus") NEEDS("rate");

#define SAMPLES(name)                                   \
	struct {                                        \
		__uint(type, BPF_MAP_TYPE_HASH);        \
		__uint(max_entries, 16384);             \
		__type(key, struct profile_key);        \
		__type(value, __u64);                   \
	} name SEC(".maps") SIZED("table:profile_stacks") NEEDS("rate")

#define STACKS(name)                                    \
	struct {                                        \
		__uint(type, BPF_MAP_TYPE_STACK_TRACE); \
		__uint(max_entries, 16384);             \
		__type(key, __u32);                     \
		__type(value, struct profile_stack);    \
	} name SEC(".maps") SIZED("table:profile_stacks") NEEDS("rate")

SAMPLES(profile_samples_0);
SAMPLES(profile_samples_1);
STACKS(profile_stacks_0);
STACKS(profile_stacks_1);

/* The stacks that had no place in the first table because of another one there. */
#define COLLIDED(name)                                  \
	struct {                                        \
		__uint(type, BPF_MAP_TYPE_STACK_TRACE); \
		__uint(max_entries, 1024);              \
		__type(key, __u32);                     \
		__type(value, struct profile_stack);    \
	} name SEC(".maps") NEEDS("rate")

COLLIDED(profile_collided_0);
COLLIDED(profile_collided_1);

static __always_inline bool in_user_mode(struct bpf_perf_event_data *ctx)
{
#if defined(__TARGET_ARCH_x86)
	return ctx->regs.cs & 3;
#elif defined(__TARGET_ARCH_arm64)
	return !(ctx->regs.pstate & 0xf); /* PSR_MODE_MASK; EL0t */
#endif
}

/* The place of a stack: see struct profile_key. */
static __always_inline __s32 stack_of(struct bpf_perf_event_data *ctx, void *stacks, void *collided,
				      __u64 which)
{
	long id = bpf_get_stackid(ctx, stacks, which);

	if (id == -EEXIST) {
		id = bpf_get_stackid(ctx, collided, which);
		if (id >= 0)
			return id + PROFILE_COLLIDED;
	}
	if (id >= 0)
		return id;
	if (id == -EEXIST)
		count_fault(FAULT_STACK_COLLIDED);
	else
		count_fault(FAULT_STACK_UNREADABLE);
	return PROFILE_LOST_STACK;
}

static __always_inline void sample_in(struct bpf_perf_event_data *ctx, struct profile_key *key,
				      struct profile_set *counts, void *samples, void *stacks,
				      void *collided, bool has_user)
{
	__u64 one = 1, *counter;
	long failed;

	key->kernel_stack = PROFILE_NO_STACK;
	if (!key->user_mode)
		key->kernel_stack = stack_of(ctx, stacks, collided, 0);
	key->user_stack = PROFILE_NO_STACK;
	if (has_user)
		key->user_stack = stack_of(ctx, stacks, collided, BPF_F_USER_STACK);
	counter = bpf_map_lookup_elem(samples, key);
	if (!counter) {
		failed = bpf_map_update_elem(samples, key, &one, BPF_NOEXIST);
		if (!failed)
			return;
		counter = bpf_map_lookup_elem(samples, key); /* another CPU may have been faster */
	}
	if (counter) {
		count(counter);
		return;
	}
	count(&counts->lost);
	count_fault(FAULT_SAMPLES_FULL);
}

static __always_inline void identify_sample(struct profile_key *key, const struct event_task *who,
					    struct task_struct *task)
{
	key->start_boot_ns = who->start_boot_ns;
	key->cgroup_id = who->cgroup_id;
	key->pid = who->pid;
	__builtin_memcpy(key->comm, who->comm, COMM_LEN);
	key->image = READ(struct task_struct, task, mm, arg_start);
}

#define MOST_SWITCHES 2

/*
 * The set that the agent wants filled, which it does not read before as many samples have ended in
 * it as have begun. It may change its mind between the look at it and the count: hence the second
 * look.
 */
static __always_inline int begin_sample(struct profile_counts *mine)
{
	volatile struct profile_settings *wanted = ONLY_ENTRY(profile_settings);
	__u32 set;
	int i;

	if (!wanted)
		return -1;
#pragma unroll
	for (i = 0; i < MOST_SWITCHES; i++) {
		set = wanted->active & 1;
		count(set ? &mine->sets[1].begun : &mine->sets[0].begun);
		if ((wanted->active & 1) == set)
			return set;
		count(set ? &mine->sets[1].ended : &mine->sets[0].ended);
	}
	return -1;
}

SEC("perf_event") EMITS("profile.sample") NEEDS("rate")
int on_clock(struct bpf_perf_event_data *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u32 cpu = bpf_get_smp_processor_id();
	struct profile_counts *mine;
	struct profile_set *counts;
	struct profile_key key = {};
	struct event_task who;
	bool has_user;
	int set;

	if (!enabled((enum event_kind)SUMMARY_PROFILE_SAMPLE))
		return 0;
	identify(&who);
	if (is_agent(who.pid))
		return 0;
	mine = bpf_map_lookup_elem(&profile_counts, &cpu);
	if (!mine) {
		count_fault(FAULT_NO_SLOT);
		return 0;
	}
	set = begin_sample(mine);
	if (set < 0) {
		count_fault(FAULT_NO_SLOT);
		return 0;
	}
	counts = set ? &mine->sets[1] : &mine->sets[0];
	count(&counts->taken);
	if (!who.pid) {
		count(&counts->idle);
	} else if (!passes_task_filters(&who, generation_in_force())) {
		count(&counts->filtered);
	} else {
		/* One that ends has given up its memory at some point. */
		has_user = !(READ(struct task_struct, task, flags) & PF_KTHREAD) &&
			   READ(struct task_struct, task, mm);
		identify_sample(&key, &who, task);
		key.user_mode = in_user_mode(ctx);
		if (set)
			sample_in(ctx, &key, counts, &profile_samples_1, &profile_stacks_1,
				  &profile_collided_1, has_user);
		else
			sample_in(ctx, &key, counts, &profile_samples_0, &profile_stacks_0,
				  &profile_collided_0, has_user);
	}
	count(&counts->ended);
	return 0;
}
