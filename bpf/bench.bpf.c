// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * Load for the benchmarks: records like real ones, without system calls in the way.
 *
 * Never packaged and never attached: `benchmarks` runs these programs with BPF_PROG_TEST_RUN. They
 * emit through the same helpers as the hooks, into the same rings, and return how many events they
 * emitted. bpf_loop() needs kernel 5.17.
 */
#include "file.bpf.c"

#define BENCH_PROCESSES 16
#define BENCH_PATHS 64
#define BENCH_PATH_LEN 64
#define BENCH_REMOTES 32

/* What the next run is to do. */
struct bench_request {
	__u64 events;
	__u64 fd; /* of bench_hook: what open() returned */
};

struct bench_process {
	__u64 cgroup_id;
	__u32 pid;
	__u32 ppid;
	__u32 uid;
	__u32 pad;
	char comm[COMM_LEN];
};

struct bench_path {
	__u32 length;
	char bytes[BENCH_PATH_LEN];
};

#define BENCH_TABLE(name, entries, value_type)      \
	struct {                                    \
		__uint(type, BPF_MAP_TYPE_ARRAY);   \
		__uint(max_entries, entries);       \
		__type(key, __u32);                 \
		__type(value, value_type);          \
	} name SEC(".maps")

BENCH_TABLE(bench_requests, 1, struct bench_request);
BENCH_TABLE(bench_processes, BENCH_PROCESSES, struct bench_process);
BENCH_TABLE(bench_paths, BENCH_PATHS, struct bench_path);

static __always_inline struct bench_request *bench_request(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&bench_requests, &zero);
}

/* The current task, as every hook reads it, and then under the name of one of several. */
static __always_inline void bench_identify(struct event_task *who, __u32 random)
{
	__u32 index = random % BENCH_PROCESSES;
	struct bench_process *process = bpf_map_lookup_elem(&bench_processes, &index);

	identify(who);
	if (!process)
		return;
	who->cgroup_id = process->cgroup_id;
	who->pid = who->tid = who->ns_pid = process->pid;
	who->ppid = process->ppid;
	who->uid = who->gid = process->uid;
	__builtin_memcpy(who->comm, process->comm, COMM_LEN);
}

static __always_inline void bench_file_open(void *ctx, __u32 random)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct open_scratches *scratches = bpf_map_lookup_elem(&open_scratches, &cpu);
	__u32 index = random / BENCH_PROCESSES % BENCH_PATHS;
	struct bench_path *path = bpf_map_lookup_elem(&bench_paths, &index);
	struct file_open *record;
	__u32 length;

	if (!scratches || !path)
		return;
	record = &scratches->of[CALL_OPENAT].record;
	start_base(&record->base);
	bench_identify(&record->task, random);
	if (!admits(&record->base, &record->task, KIND_FILE_OPEN))
		return;
	record->latency_ns = 600 + (random >> 16) % 8192;
	record->inode = 131072 + index;
	record->dev = 65025;
	record->fd = 3 + (random >> 10) % 32;
	record->errno = 0;
	record->flags = random & 1 ? 02000000 : 02100000;
	record->mode = 0;
	record->mntns = 4026531841;
	record->mntns_initial = 1;
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	length = path->length & (BENCH_PATH_LEN - 1);
	bpf_probe_read_kernel(record->data, length, path->bytes);
	record->path_len = length;
	output(ctx, &bulk, &record->base, KIND_FILE_OPEN, RING_BULK,
	       offsetof(struct file_open, data) + length);
}

static __always_inline void bench_net_close(void *ctx, __u32 random)
{
	struct event_base base;
	struct event_task who;
	struct net_close *record;

	start_base(&base);
	bench_identify(&who, random);
	if (!admits(&base, &who, KIND_NET_CLOSE))
		return;
	record = begin(&bulk, &base, KIND_NET_CLOSE, RING_BULK, sizeof(*record));
	if (!record)
		return;
	record->task = who;
	record->duration_ns = 1000000 + random;
	record->bytes_sent = 200 + random % 4096;
	record->bytes_received = 500 + (random >> 8) % 65536;
	record->errno = 0;
	record->netns = 4026531840;
	record->local_port = 32768 + (random >> 4) % 28232;
	record->remote_port = random & 16 ? 443 : 5432;
	record->ip_version = 4;
	record->direction = DIRECTION_OUTBOUND;
	record->owner_known = 1;
	record->pad = 0;
	__builtin_memset(record->local_addr, 0, sizeof(record->local_addr));
	__builtin_memset(record->remote_addr, 0, sizeof(record->remote_addr));
	record->local_addr[0] = record->remote_addr[0] = 10;
	record->local_addr[3] = 7;
	record->remote_addr[3] = random % BENCH_REMOTES;
	submit(ctx, &bulk, RING_BULK, record);
}

/* What the callbacks of bpf_loop() are given: it wants it on the stack. */
struct bench_run {
	void *ctx; /* the program's */
	__u64 fd;
};

static long bench_emit_open(__u32 i, void *context)
{
	struct bench_run *run = context;

	bench_file_open(run->ctx, bpf_get_prandom_u32());
	return 0;
}

static long bench_emit_close(__u32 i, void *context)
{
	struct bench_run *run = context;

	bench_net_close(run->ctx, bpf_get_prandom_u32());
	return 0;
}

/* One file.open, one net.close, and so on. */
static long bench_emit_mixed(__u32 i, void *context)
{
	__u32 random = bpf_get_prandom_u32();
	struct bench_run *run = context;

	if (i & 1)
		bench_net_close(run->ctx, random);
	else
		bench_file_open(run->ctx, random);
	return 0;
}

/* The hook of openat() itself, with what it finds out about an open file. */
static long bench_emit_hook(__u32 i, void *context)
{
	struct bench_run *run = context;

	opened(run->ctx, run->fd, user_registers(), CALL_OPENAT);
	return 0;
}

static long bench_emit_nothing(__u32 i, void *context)
{
	return 0;
}

static __always_inline int bench_run(void *ctx, long (*emit)(__u32, void *))
{
	struct bench_request *wanted = bench_request();
	struct bench_run run = { .ctx = ctx };

	if (!wanted)
		return 0;
	run.fd = wanted->fd;
	return bpf_loop(wanted->events, emit, &run, 0);
}

#define BENCH_PROGRAM(name, emit)          \
	SEC("raw_tp/" #name)               \
	int name(void *ctx)                \
	{                                  \
		return bench_run(ctx, emit);    \
	}

BENCH_PROGRAM(bench_open, bench_emit_open)
BENCH_PROGRAM(bench_close, bench_emit_close)
BENCH_PROGRAM(bench_mixed, bench_emit_mixed)
BENCH_PROGRAM(bench_hook, bench_emit_hook)
BENCH_PROGRAM(bench_nothing, bench_emit_nothing)

/* What a packet costs that is let through and nothing else. */
SEC("xdp")
int xdp_pass(struct xdp_md *packet)
{
	return XDP_PASS;
}

/* The same, at an interface. */
SEC("tc")
int tc_pass(struct __sk_buff *skb)
{
	return -1; /* TC_ACT_UNSPEC */
}
