// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* What all sensors share: the maps, and the program that finds out who the agent is. */
#include "core/filter.bpf.h"

char LICENSE[] SEC("license") = "GPL";

#define MOST_ANCESTORS 64

static __always_inline __u32 mntns_of_init(struct task_struct *task)
{
	int i;

	for (i = 0; i < MOST_ANCESTORS && BPF_CORE_READ(task, tgid) > 1; i++)
		task = BPF_CORE_READ(task, real_parent);
	if (BPF_CORE_READ(task, tgid) != 1)
		return 0;
	return BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
}

/* Never attached: the agent's privileged process, the child of the other one, runs it in itself.
 * So it learns both pids as the hooks see them, whatever pid namespace the agent is in. */
SEC("raw_tp/streamer_learn_pids")
int learn_pids(void *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct identity *identity = ONLY_ENTRY(identities);

	if (!identity)
		return 1;
	identity->agent_pids[0] = BPF_CORE_READ(task, real_parent, tgid);
	identity->agent_pids[1] = bpf_get_current_pid_tgid() >> 32;
	identity->initial_mntns = mntns_of_init(task);
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
