// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What all sensors share: the maps, and the program that finds out who the agent is. */
#include "core/filter.bpf.h"

char LICENSE[] SEC("license") = "GPL";

#define MOST_ANCESTORS 64

static __always_inline __u32 mntns_of_init(struct task_struct *task)
{
	int i;

	if (!bpf_core_type_exists(struct mnt_namespace))
		return 0;
	for (i = 0; i < MOST_ANCESTORS && BPF_CORE_READ(task, tgid) > 1; i++)
		task = BPF_CORE_READ(task, real_parent);
	if (BPF_CORE_READ(task, tgid) != 1)
		return 0;
	return BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
}

#define MOST_CHILDREN (MOST_FURTHER_WORKERS + 1)

/* The children of the agent's first process that are younger than the one that runs this: further
 * workers. An older one is whoever's was there before the agent, in the same process. They are in
 * the order in which they came, so these are the last ones. */
static __always_inline void learn_workers(struct identity *identity, struct task_struct *agent)
{
	void *head = (void *)agent + bpf_core_field_offset(struct task_struct, children);
	struct list_head *at = BPF_CORE_READ((struct list_head *)head, prev);
	struct task_struct *child;
	__u32 pid, found = 0;
	int i;

	for (i = 0; i < MOST_CHILDREN && at && at != head; i++) {
		child = (void *)at - bpf_core_field_offset(struct task_struct, sibling);
		pid = BPF_CORE_READ(child, tgid);
		if (pid == identity->agent_pids[1])
			break;
		if (found < MOST_FURTHER_WORKERS)
			identity->worker_pids[found] = pid;
		found++;
		at = BPF_CORE_READ(at, prev);
	}
	identity->further_workers = found;
}

/* Never attached: the agent's privileged process, the child of the first one, runs it in itself.
 * So it learns all pids as the hooks see them, whatever pid namespace the agent is in. */
SEC("raw_tp/streamer_learn_pids")
int learn_pids(void *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct identity *identity = ONLY_ENTRY(identities);

	if (!identity)
		return 1;
	identity->agent_pids[1] = bpf_get_current_pid_tgid() >> 32;
	if (bpf_core_type_exists(struct task_struct)) { /* else the loader knows, if anybody does */
		identity->agent_pids[0] = BPF_CORE_READ(task, real_parent, tgid);
		learn_workers(identity, BPF_CORE_READ(task, real_parent));
	}
	identity->initial_mntns = mntns_of_init(task);
	return 0;
}

#define LEAST_STACK_SHIFT 12
#define STACK_SIZES 6 /* to 128 KiB */
#define FRED_PADDING 16

/* Whether these are the registers of the call that runs the program: bpf(BPF_PROG_TEST_RUN, ...). */
static __always_inline bool of_this_call(struct pt_regs___user *registers)
{
	int number = -1;
#if defined(__TARGET_ARCH_x86)
	const int bpf = 321;

	number = BPF_CORE_READ(registers, orig_ax);
#elif defined(__TARGET_ARCH_arm64)
	const int bpf = 280;

	number = BPF_CORE_READ(registers, syscallno);
#endif
	return number == bpf && call_arguments(registers).at[0] == BPF_PROG_TEST_RUN;
}

/* Never attached either: the agent runs it in itself to find out where, from the beginning of its stack, a
 * task has the registers of a system call. That, or 0: nowhere. */
SEC("raw_tp/streamer_learn_registers")
int learn_registers(void *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u32 size, at;
	void *stack;
	int i;

	if (helper_tells_registers()) /* then nobody asks */
		return 1;
	if (!bpf_core_type_exists(struct task_struct)) /* nothing can be read of it anyway */
		return 0;
	size = bpf_core_type_size(struct pt_regs___user);
	stack = BPF_CORE_READ(task, stack);
	for (i = 0; i < STACK_SIZES; i++) {
		at = (1 << (LEAST_STACK_SHIFT + i)) - size;
		if (of_this_call(stack + at))
			return at;
		if (of_this_call(stack + at - FRED_PADDING))
			return at - FRED_PADDING;
	}
	return 0;
}

/* Never attached either: whether it loads tells whether events can travel as they are to. */
SEC("raw_tp/streamer_try_rings")
int try_rings(void *ctx)
{
	struct event_base base = {}, *record;

	record = begin(&critical, &base, 0, RING_CRITICAL, sizeof(*record));
	if (record)
		submit(ctx, &critical, RING_CRITICAL, record);
	output(ctx, &bulk, &base, 0, RING_BULK, sizeof(base));
	return 0;
}

/* Never attached either: whether it loads tells whether programs at functions do on this kernel. */
SEC("fexit/bpf_fentry_test1")
int try_function(void *ctx)
{
	return 0;
}

/*
 * Never attached either: whoever measures what the headers of a kernel do not tell (measured.py) runs it
 * in itself, and has it read the memory of the kernel at an address; at 0, the current task. It is not
 * loaded where the types of the kernel are known.
 */
struct peeked {
	__u64 address;
	__u64 pid_tgid;
	__u8 bytes[512];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct peeked);
} peeked SEC(".maps") NEEDS("option:peek");

SEC("raw_tp/streamer_peek")
int peek(void *ctx)
{
	struct peeked *peek = ONLY_ENTRY(peeked);

	if (!peek)
		return 1;
	peek->pid_tgid = bpf_get_current_pid_tgid();
	if (!peek->address)
		peek->address = bpf_get_current_task();
	if (bpf_probe_read_kernel(peek->bytes, sizeof(peek->bytes), (const void *)peek->address))
		return 2;
	return 0;
}
