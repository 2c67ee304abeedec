// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * syscall.latency, syscall.slow
 *
 * A call is timed between two hooks: where it begins its number and the time are kept with its task,
 * and where it returns it is counted. Calls that are named are met at their own functions, so that no
 * other call pays for it: by programs at functions, else by kprobes. Where neither can be had, their
 * own tracepoints do the same, for which every call takes a longer way; all calls are met at the raw
 * tracepoints.
 *
 * At a function a call is met without what the kernel does around it (audit, seccomp, ptrace).
 */
#include "core/filter.bpf.h"

char LICENSE[] SEC("license") = "GPL";

OPTION(syscall_cgroups);

/* By place, and within that by CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct syscall_counts);
} syscalls SEC(".maps") SIZED("cpus,table:syscalls") NEEDS("option:syscalls");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, SYSCALL_NUMBERS);
	__type(key, __u32);
	__type(value, struct syscall_place);
} syscall_places SEC(".maps") NEEDS("option:syscalls");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct syscall_settings);
} syscall_settings SEC(".maps") NEEDS("option:syscalls");

/* The oldest goes first: the agent finds out that one has gone. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1);
	__type(key, struct syscall_cgroup_key);
	__type(value, struct syscall_cgroup_counts);
} syscall_cgroup_table SEC(".maps") SIZED("table:syscall_cgroups") NEEDS("option:syscall_cgroups");

/* Too large for the stack: an entry that is made, with nothing counted. Nobody writes to it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct syscall_cgroup_counts);
} syscall_nothing SEC(".maps") NEEDS("option:syscall_cgroups");

/* ---------------------------------------------------------------- what a task is doing */

struct call_start {
	__u64 ns; /* 0: it is in no call that is timed */
	__u32 number;
	__u32 pad;
};

/* Gone with the task. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct call_start);
} syscall_starts SEC(".maps") NEEDS("option:syscalls,function:bpf_task_storage_get");

/* The same for kernels before 5.12, and where the kernel's own types are not known: by the address of
 * the task, which stays when an exec gives it another pid. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct call_start);
} syscall_tasks SEC(".maps") SIZED("table:syscall_tasks") NEEDS("option:syscalls");

#define has_task_storage() \
	(PLAIN_LOADS && bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_storage_get))

static __always_inline struct call_start *start_kept(void)
{
	__u64 task;

	if (has_task_storage())
		return bpf_task_storage_get(&syscall_starts, bpf_get_current_task_btf(), NULL, 0);
	task = bpf_get_current_task();
	return bpf_map_lookup_elem(&syscall_tasks, &task);
}

static __always_inline struct call_start *start_made(void)
{
	struct call_start nothing = {}, *start;
	__u64 task;

	if (has_task_storage())
		return bpf_task_storage_get(&syscall_starts, bpf_get_current_task_btf(), NULL,
					    BPF_LOCAL_STORAGE_GET_F_CREATE);
	task = bpf_get_current_task();
	start = bpf_map_lookup_elem(&syscall_tasks, &task);
	if (start || bpf_map_update_elem(&syscall_tasks, &task, &nothing, BPF_ANY))
		return start;
	return bpf_map_lookup_elem(&syscall_tasks, &task);
}

/* ---------------------------------------------------------------- which call it is */

#define TS_COMPAT 0x2		   /* x86: thread_info.status, in a call by way of 32 bits */
#define TIF_32BIT 22		   /* arm64: a bit of thread_info.flags */
#define NO_NUMBER 0xffffffff
#define X32_SYSCALL_BIT 0x40000000 /* of numbers, in programs with pointers of 32 bits */

/* 32-bit programs number their calls otherwise. Some functions are behind both, so that even there
 * it has to be looked at. */
static __always_inline bool is_compat(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

#if defined(__TARGET_ARCH_x86)
	return READ(struct task_struct, task, thread_info.status) & TS_COMPAT;
#elif defined(__TARGET_ARCH_arm64)
	return READ(struct task_struct, task, thread_info.flags) >> TIF_32BIT & 1;
#endif
}

static __always_inline __u32 number_in(struct pt_regs___user *registers)
{
#if defined(__TARGET_ARCH_x86)
	return READ(struct pt_regs___user, registers, orig_ax);
#elif defined(__TARGET_ARCH_arm64)
	return READ(struct pt_regs___user, registers, syscallno);
#endif
}

static __always_inline __u32 place_number(__u32 number)
{
	number &= ~X32_SYSCALL_BIT;
	return number < SYSCALL_NUMBERS ? number : SYSCALL_NUMBERS - 1;
}

static __always_inline struct syscall_place *place_of(__u32 number)
{
	__u32 index = place_number(number);
	struct syscall_place *place = bpf_map_lookup_elem(&syscall_places, &index);

	return place && place->counts ? place : NULL;
}

static __always_inline struct syscall_counts *counts_of(const struct syscall_place *place)
{
	__u32 index = place->counts - 1 + bpf_get_smp_processor_id();
	struct syscall_counts *counts = bpf_map_lookup_elem(&syscalls, &index);

	if (!counts)
		count_fault(FAULT_NO_SLOT);
	return counts;
}

/* ---------------------------------------------------------------- the beginning */

/* A call of this task began and never returned, as far as a program saw. */
static __always_inline void count_missed(__u32 number)
{
	struct syscall_place *place = place_of(number);
	struct syscall_counts *counts = place ? counts_of(place) : NULL;

	if (counts)
		count(&counts->missed);
}

static __always_inline int began(__u32 number)
{
	struct syscall_place *place = place_of(number);
	struct call_start *start;

	if (!place || is_compat() || is_agent(bpf_get_current_pid_tgid() >> 32))
		return 0;
	start = start_made();
	if (!start) {
		count_fault(FAULT_SYSCALL_STARTS_FULL);
		return 0;
	}
	if (start->ns)
		count_missed(start->number);
	start->number = number & ~X32_SYSCALL_BIT;
	start->ns = bpf_ktime_get_ns();
	return 0;
}

/* ---------------------------------------------------------------- the end */

struct ended_call {
	__u64 duration_ns;
	__u64 period;
	__u32 number;
	__u32 errno;
};

static __always_inline __u32 highest_bit(__u64 value)
{
	__u32 bit = 0, step;

#pragma unroll
	for (step = 32; step; step >>= 1) {
		if (value >> step) {
			value >>= step;
			bit += step;
		}
	}
	return bit;
}

/*
 * Adds are atomic: where a program can be preempted, another task's may count on this CPU meanwhile.
 * There a maximum can be lost to a smaller one that was written at the very same moment.
 */
static __always_inline void count_call(struct syscall_counts *counts, const struct ended_call *call)
{
	struct syscall_longest *longest = &counts->longest[call->period & 1];
	__u32 bucket = highest_bit(call->duration_ns);

	count(&counts->count);
	if (call->errno)
		count(&counts->errors);
	__sync_fetch_and_add(&counts->total_ns, call->duration_ns);
	if (bucket >= SYSCALL_BUCKETS)
		bucket = SYSCALL_BUCKETS - 1;
	count(&counts->buckets[bucket]);
	if (longest->period != call->period) {
		longest->ns = call->duration_ns;
		longest->period = call->period;
	} else if (longest->ns < call->duration_ns) {
		longest->ns = call->duration_ns;
	}
}

static __always_inline void count_in_cgroup(const struct ended_call *call)
{
	struct syscall_settings *wanted = ONLY_ENTRY(syscall_settings);
	struct syscall_cgroup_counts *counts, *nothing;
	struct syscall_cgroup_key key = {};

	key.cgroup_id = bpf_get_current_cgroup_id();
	key.place = place_number(call->number);
	counts = bpf_map_lookup_elem(&syscall_cgroup_table, &key);
	if (!counts) {
		nothing = ONLY_ENTRY(syscall_nothing);
		/* One that another CPU has just made is as good. */
		if (nothing && wanted &&
		    !bpf_map_update_elem(&syscall_cgroup_table, &key, nothing, BPF_NOEXIST))
			count(&wanted->cgroup_entries);
		counts = bpf_map_lookup_elem(&syscall_cgroup_table, &key);
		if (!counts) {
			count_fault(FAULT_SYSCALL_CGROUPS_FULL);
			return;
		}
		if (!counts->since)
			counts->since = bpf_ktime_get_boot_ns();
	}
	count_call(&counts->counts, call);
}

static __always_inline void report(void *ctx, const struct ended_call *call,
				   const struct syscall_place *place, struct event_task *who,
				   long result)
{
	struct pt_regs___user *registers = user_registers();
	struct syscall_slow *record;
	struct event_base base;
	__s64 argument;

	start_base(&base);
	base.weight = sample(KIND_SYSCALL_SLOW);
	if (!base.weight)
		return;
	argument = call_arguments(registers).at[0];
	record = begin(&bulk, &base, KIND_SYSCALL_SLOW, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->task = *who;
	record->duration_ns = call->duration_ns;
	record->errno = call->errno;
	record->ret = call->errno ? -1 : place->flags & SYSCALL_GIVES_ADDRESS ? 0 : result;
	if (place->flags & SYSCALL_RESULT_UNKNOWN)
		record->ret = 0;
	record->number = call->number;
	/* As int or as unsigned int: which of the two, the upper half does not say. */
	record->arg0 = argument == (__s32)argument || argument == (__u32)argument ? argument : 0;
	record->pad = 0;
	__builtin_memcpy(record->syscall, place->name, sizeof(record->syscall));
	submit(ctx, &bulk, RING_BULK, record);
}

/* Whether it failed: a negative number is no error where addresses and times are returned. */
static __always_inline __u32 error_of(long result, const struct syscall_place *place)
{
	if (result >= 0 || result < -MAX_ERRNO || place->flags & SYSCALL_RESULT_UNKNOWN)
		return 0;
	return errno_of(result);
}

static __always_inline bool is_slow(const struct syscall_place *place, __u64 duration_ns,
				    const struct syscall_settings *wanted)
{
	return place->flags & SYSCALL_SLOW_TOLD && wanted->slow_ns &&
	       duration_ns >= wanted->slow_ns && enabled(KIND_SYSCALL_SLOW);
}

static __always_inline int ended(void *ctx, long result)
{
	struct call_start *start = start_kept();
	struct syscall_settings *wanted;
	struct ended_call call = {};
	struct syscall_counts *counts;
	struct syscall_place *place;
	struct filter_modes *modes;
	struct event_task who;
	__u32 generation;
	bool slow;

	if (!start || !start->ns)
		return 0; /* it began before anybody looked, or is none that is timed */
	wanted = ONLY_ENTRY(syscall_settings);
	generation = generation_in_force();
	modes = modes_of(generation);
	call.duration_ns = bpf_ktime_get_ns() - start->ns;
	call.number = start->number;
	start->ns = 0;
	place = place_of(call.number);
	if (!place || !wanted || !modes)
		return 0;
	call.errno = error_of(result, place);
	call.period = wanted->period;
	slow = is_slow(place, call.duration_ns, wanted);
	if (slow || modes->task)
		identify(&who);
	if (modes->task && !passes_task_filters(&who, generation)) {
		if (slow)
			count_filtered(KIND_SYSCALL_SLOW);
		return 0;
	}
	if (enabled((enum event_kind)SUMMARY_SYSCALL_LATENCY)) {
		counts = counts_of(place);
		if (counts)
			count_call(counts, &call);
		if (syscall_cgroups)
			count_in_cgroup(&call);
	}
	if (slow)
		report(ctx, &call, place, &who, result);
	return 0;
}

/* ---------------------------------------------------------------- hooks */

/* In this order they are attached, so that no call begins whose end is not seen. */

#define KINDS "syscall.latency,syscall.slow"

SEC("fexit/syscalls") HOOK("syscall_exit") EMITS(KINDS) NEEDS("option:syscalls,functions")
int BPF_PROG(on_call_fexit, struct pt_regs___user *registers, long result)
{
	return UNPREEMPTED(ended(ctx, result));
}

#if defined(__TARGET_ARCH_x86)
#define FIRST_ARGUMENT(ctx) ((ctx)->di)
#define RESULT(ctx) ((ctx)->ax)
#elif defined(__TARGET_ARCH_arm64)
#define FIRST_ARGUMENT(ctx) ((ctx)->user_regs.regs[0])
#define RESULT(ctx) ((ctx)->user_regs.regs[0])
#endif

/* The kernel follows a bounded number of calls at once with it: of calls that wait for long it misses
 * most, which the next call of the same task shows. */
SEC("kretprobe/syscalls") HOOK("syscall_exit") EMITS(KINDS) NEEDS("option:syscalls,functions")
int on_call_kretprobe(struct pt_regs___user *ctx)
{
	long result = RESULT(ctx);

	return UNPREEMPTED(ended(ctx, result));
}

SEC("tp/syscalls/sys_exit") HOOK("syscall_exit") EMITS(KINDS) NEEDS("option:syscalls,functions")
int on_call_tracepoint_exit(struct trace_event_raw_sys_exit *ctx)
{
	long result = ctx->ret;

	return AMONG_OTHERS(UNPREEMPTED(ended(ctx, result)));
}

/* Every call of every process comes by here, as a rule one that nobody asked about. Of some that
 * return the kernel has no number any more, such as rt_sigreturn. */
SEC("raw_tp/sys_exit") HOOK("syscall_exit") EMITS(KINDS) NEEDS("option:syscalls")
int on_call_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct pt_regs___user *registers = (void *)ctx->args[0];
	long result = ctx->args[1];
	__u32 number = number_in(registers);

	if (number != NO_NUMBER && !place_of(number))
		return 0;
	return UNPREEMPTED(ended(ctx, result));
}

SEC("fentry/syscalls") HOOK("syscall_enter") EMITS(KINDS) NEEDS("option:syscalls,functions")
int BPF_PROG(on_call_fentry, struct pt_regs___user *registers)
{
	return UNPREEMPTED(began(number_in(registers)));
}

SEC("kprobe/syscalls") HOOK("syscall_enter") EMITS(KINDS) NEEDS("option:syscalls,functions")
int on_call_kprobe(struct pt_regs___user *ctx)
{
	struct pt_regs___user *registers = (void *)FIRST_ARGUMENT(ctx);

	return UNPREEMPTED(began(number_in(registers)));
}

SEC("tp/syscalls/sys_enter") HOOK("syscall_enter") EMITS(KINDS) NEEDS("option:syscalls,functions")
int on_call_tracepoint_enter(struct trace_event_raw_sys_enter *ctx)
{
	__u32 number = ctx->id;

	return AMONG_OTHERS(UNPREEMPTED(began(number)));
}

SEC("raw_tp/sys_enter") HOOK("syscall_enter") EMITS(KINDS) NEEDS("option:syscalls")
int on_call_enter(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 number = ctx->args[1];

	if (!place_of(number))
		return 0;
	return UNPREEMPTED(began(number));
}

/* What is kept by the address of a task goes with it. */
SEC("raw_tp/sched_process_exit") COMPLETES(KINDS) DOC("ends of tasks of which a return was missed")
NEEDS("option:syscalls")
int on_call_task_exit(void *ctx)
{
	__u64 task = bpf_get_current_task();

	if (!has_task_storage())
		bpf_map_delete_elem(&syscall_tasks, &task); /* it may have had none */
	return 0;
}
