// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* A sensor of the tests: hooks with several ways, and all that NEEDS, OPTION and SIZED can say. */
#include "core/core.bpf.h"

char LICENSE[] SEC("license") = "GPL";

OPTION(only_pid);

enum way {
	REFUSED_SECOND,
	REFUSED_THIRD,
	UNATTACHED_SECOND,
	UNATTACHED_THIRD,
	BEST_FIRST,
	BEST_SECOND,
	NEEDS_THIS_MACHINE,
	NEEDS_OTHER_MACHINE,
	NEEDS_FUNCTION,
	NEEDS_NO_FUNCTION,
	NEEDS_OPTION,
	NEEDS_BOTH,
	WAYS,
};

/* How often each was run by the process that the option names. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, WAYS);
	__type(key, __u32);
	__type(value, __u64);
} runs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} by_cpu SEC(".maps") SIZED("cpus");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} by_kind SEC(".maps") SIZED("cpus,kinds");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 7);
	__type(key, __u32);
	__type(value, __u64);
} rows SEC(".maps") SIZED("table:rows");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 7);
	__type(key, __u32);
	__type(value, __u64);
} optional SEC(".maps") NEEDS("option:extra");

static __always_inline int ran(__u32 way)
{
	__u64 *counter = bpf_map_lookup_elem(&runs, &way);

	if (counter && bpf_get_current_pid_tgid() >> 32 == only_pid)
		count(counter);
	return 0;
}

#define WAY(name, section, hook, way)                            \
	SEC(section) HOOK(hook) EMITS("process.exec")            \
	int name(void *ctx)                                      \
	{                                                        \
		return ran(way);                                 \
	}

#define AT_FCHDIR "tracepoint/syscalls/sys_enter_fchdir"
#define NOWHERE "raw_tp/no_such_tracepoint"

/* At its end: by then a verifier that tells of each instruction has told megabytes. */
#define REFUSED(name, hook)                                      \
	SEC(AT_FCHDIR) HOOK(hook) EMITS("process.exec")          \
	int name(void *ctx)                                      \
	{                                                        \
		volatile __u32 last = 0;                         \
                                                                 \
		for (__u32 i = 0; i < 20000; i++)                \
			last = i;                                \
		return *(volatile __u32 *)(last + (unsigned long)bpf_get_prandom_u32()); \
	}

REFUSED(refused_first, "refused")
WAY(refused_second, AT_FCHDIR, "refused", REFUSED_SECOND)
WAY(refused_third, AT_FCHDIR, "refused", REFUSED_THIRD)

WAY(unattached_first, NOWHERE, "unattached", UNATTACHED_SECOND)
REFUSED(unattached_refused, "unattached")
WAY(unattached_second, AT_FCHDIR, "unattached", UNATTACHED_SECOND)
WAY(unattached_third, AT_FCHDIR, "unattached", UNATTACHED_THIRD)

WAY(best_first, AT_FCHDIR, "best", BEST_FIRST)
WAY(best_second, AT_FCHDIR, "best", BEST_SECOND)

REFUSED(hopeless_first, "hopeless")
WAY(hopeless_second, NOWHERE, "hopeless", BEST_SECOND)
WAY(hopeless_third, "tp_btf/no_such_tracepoint", "hopeless", BEST_SECOND)
WAY(hopeless_fourth, "tracepoint/syscalls/no_such_call", "hopeless", BEST_SECOND)

#define NEEDING(name, needs, way)                                \
	SEC(AT_FCHDIR) NEEDS(needs) EMITS("process.exec")        \
	int name(void *ctx)                                      \
	{                                                        \
		return ran(way);                                 \
	}

#if defined(__TARGET_ARCH_x86)
#define THIS_MACHINE "x86_64"
#define OTHER_MACHINE "aarch64"
#else
#define THIS_MACHINE "aarch64"
#define OTHER_MACHINE "x86_64"
#endif

NEEDING(this_machine, THIS_MACHINE, NEEDS_THIS_MACHINE)
NEEDING(other_machine, OTHER_MACHINE, NEEDS_OTHER_MACHINE)
NEEDING(has_function, "function:vfs_read", NEEDS_FUNCTION)
NEEDING(has_no_function, "no function:vfs_read", NEEDS_OTHER_MACHINE)
NEEDING(lacks_function, "function:no_such_function", NEEDS_OTHER_MACHINE)
NEEDING(lacks_no_function, "no function:no_such_function", NEEDS_NO_FUNCTION)
NEEDING(has_both, "option:extra," THIS_MACHINE, NEEDS_BOTH)
NEEDING(has_one, "option:extra," OTHER_MACHINE, NEEDS_OTHER_MACHINE)

SEC(AT_FCHDIR) NEEDS("option:extra") EMITS("process.exec")
int has_option(void *ctx)
{
	__u32 key = 1;
	__u64 value = 1;

	if (bpf_get_current_pid_tgid() >> 32 == only_pid &&
	    bpf_map_update_elem(&optional, &key, &value, BPF_ANY))
		return 0;
	return ran(NEEDS_OPTION);
}
