// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * file.open
 *
 * One hook at the end of each call says all: what came of it, and, in the registers that the task
 * entered the kernel with, what was asked. So nothing has to be kept meanwhile, and a call that is
 * under way when the agent starts is seen too.
 */
enum open_call {
	CALL_OPEN,
	CALL_CREAT,
	CALL_OPENAT,
	CALL_OPENAT2,
	CALL_END,
};

#define PATH_SLOTS CALL_END
#include "core/path.bpf.h"

char LICENSE[] SEC("license") = "GPL";

struct open_scratch {
	struct file_open record;
	struct path_prefix prefix;
};

/* Each call's programs have their own: kernels such as 7.2 run them preemptibly, and only a program
 * itself is not started again on a CPU where it is under way. */
struct open_scratches {
	struct open_scratch of[CALL_END];
};

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct open_scratches);
} open_scratches SEC(".maps") SIZED("cpus");

static __always_inline struct open_scratch *scratch_of(__u32 call)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct open_scratches *mine = bpf_map_lookup_elem(&open_scratches, &cpu);

	return mine && call < CALL_END ? &mine->of[call] : NULL;
}

/* What was asked for, whichever the call. */
struct request {
	__u64 filename; /* in the task's memory */
	__u64 resolve;  /* RESOLVE_*, of openat2() */
	__u32 flags;
	__u32 mode;
	__s32 dirfd;
	bool unreadable; /* what openat2() points to */
};

static __always_inline struct request request_of(const struct call_arguments *passed,
						 const enum open_call call)
{
	struct request asked = { .dirfd = AT_FDCWD, .filename = passed->at[0] };
	struct open_how how = {};

	if (call == CALL_OPEN) {
		asked.flags = passed->at[1];
		asked.mode = passed->at[2];
	} else if (call == CALL_CREAT) {
		asked.flags = O_CREAT | O_WRONLY | O_TRUNC;
		asked.mode = passed->at[1];
	} else {
		asked.dirfd = passed->at[0];
		asked.filename = passed->at[1];
		asked.flags = passed->at[2];
		asked.mode = passed->at[3];
	}
	if (call == CALL_OPENAT2) {
		/* The kernel has just read it: it is in memory now, wherever it was before. */
		asked.unreadable =
			bpf_probe_read_user(&how, sizeof(how), (void *)passed->at[2]);
		asked.flags = how.flags;
		asked.mode = how.mode;
		asked.resolve = how.resolve;
	}
	if (!(asked.flags & (O_CREAT | O_TMPFILE)))
		asked.mode = 0;
	return asked;
}

/* Where an open file really is, as the beginning of the record's data; 0 where that cannot be said:
 * it is nameless, such as a pipe, or another thread has closed it already. */
static __always_inline __u32 put_path(struct file_open *record, struct path_buffer *path)
{
	if (!path || path->nameless)
		return 0;
	record->mntns = path->mntns;
	record->mntns_initial = is_initial_mntns(path->mntns);
	if (path->truncated)
		record->base.cut = 1;
	return path_append(path, record->data, 0, 0);
}

static __always_inline __u32 put_opened(struct file_open *record, struct file *file, __u32 slot)
{
	struct inode *inode;

	if (!file)
		return 0;
	inode = READ(struct file, file, f_inode);
	record->inode = READ(struct inode, inode, i_ino);
	record->dev = dev_of(READ(struct inode, inode, i_sb, s_dev));
	return put_path(record, path_of_file(slot, file));
}

/* Where the search for a name begins: in a directory, in cwd, or at the task's root. */
static __always_inline __u32 put_start(struct file_open *record, struct task_struct *task,
				       const struct request *asked, bool absolute, __u32 slot)
{
	struct fs_struct *fs = READ(struct task_struct, task, fs);
	struct file *directory;

	/* Then a leading slash stands for the directory, or is refused. */
	if (asked->resolve & (RESOLVE_IN_ROOT | RESOLVE_BENEATH))
		absolute = false;
	if (!absolute && asked->dirfd != AT_FDCWD) {
		directory = file_of_fd(task, asked->dirfd);
		return directory ? put_path(record, path_of_file(slot, directory)) : 0;
	}
	if (absolute)
		return put_path(record, path_build(slot, READ(struct fs_struct, fs, root.dentry),
						   READ(struct fs_struct, fs, root.mnt)));
	return put_path(record, path_build(slot, READ(struct fs_struct, fs, pwd.dentry),
					   READ(struct fs_struct, fs, pwd.mnt)));
}

/* Whether a name that filled the whole of PATH_LEN goes on behind it. */
static __always_inline bool is_longer(__u64 name)
{
	char last = 0;

	return bpf_probe_read_user(&last, sizeof(last), (void *)(name + PATH_LEN - 1)) || last;
}

/* What was asked for, behind what it is relative to. Where there is no such directory, the name
 * alone, as if it were cut. */
static __always_inline __u32 put_requested(struct file_open *record, struct task_struct *task,
					   const struct request *asked, __u32 slot)
{
	char first = 0;
	__u32 position;
	long length;

	if (bpf_probe_read_user(&first, sizeof(first), (void *)asked->filename))
		first = 0; /* the name itself is not readable either, which is noted below */
	position = put_start(record, task, asked, first == '/', slot);
	if (position > PATH_LEN - 1)
		position = PATH_LEN - 1;
	if (!position)
		record->base.cut = 1;
	else if (position == 1 && first == '/') /* the root directory, which ends in a slash */
		position = 0;
	else if (position > 1 && first && first != '/')
		record->data[position++] = '/';
	length = bpf_probe_read_user_str(&record->data[position], PATH_LEN,
					 (void *)asked->filename);
	/* Of an empty name, kernels before "maccess: fix strncpy_from_user_nofault() empty string
	 * handling" (6.12 is one) return 0 and not 1: they do not count its NUL. */
	if (length < 0 || (length >= PATH_LEN && is_longer(asked->filename)))
		record->base.cut = 1;
	if (length <= 0)
		return position;
	return position + length - 1; /* without the NUL */
}

#define MOST_SCANNED 512

/* Whether the text that ends in the last bytes of `window` ends in a part that is `..`, `.` or empty. */
static __always_inline bool ends_in_dots(__u32 window)
{
	return window == 0x2f2e2e2f /* "/../" */ || (window & 0xffffff) == 0x2f2e2f ||
	       (window & 0xffff) == 0x2f2f;
}

/*
 * Whether the path that was asked for has no `..`, `.` or empty part, as far as its text says: then
 * it is what it seems. One that is too long to be sure is none. Not static, as path_walk().
 */
__noinline int path_is_plain(__u32 call)
{
	struct open_scratch *scratch = scratch_of(call);
	__u32 window = 0, length, i;

	if (!scratch)
		return 0;
	length = scratch->record.path_len;
	for (i = 0; i < MOST_SCANNED; i++) {
		if (i >= length)
			return !ends_in_dots(window << 8 | '/') || length == 1;
		window = window << 8 | scratch->record.data[i];
		if (ends_in_dots(window))
			return 0;
	}
	return 0;
}

/*
 * What the path filter says. In doubt it keeps the event: a path that was cut, or that asks for
 * something through `..`, may be any file's. What is left out must be beyond doubt: a path in the
 * initial mount namespace (a user can make any tree in one of his own), of a file that was opened and
 * really is there (`found`), or that is not there.
 */
static __always_inline bool passes_path(struct open_scratch *scratch, bool found, __u32 call,
					__u32 generation)
{
	struct file_open *record = &scratch->record;
	struct filter_modes *modes = modes_of(generation);
	__u32 length = record->path_len;
	__u8 *verdict;

	if (!modes || modes->path == FILTER_OFF || record->base.cut)
		return true;
	if (!found && !path_is_plain(call))
		return true;
	if (length > PREFIX_LEN)
		length = PREFIX_LEN;
	scratch->prefix.bits = (1 + length) * 8;
	scratch->prefix.generation = generation;
	if (bpf_probe_read_kernel(scratch->prefix.path, PREFIX_LEN, record->data))
		return true;
	verdict = bpf_map_lookup_elem(&filter_paths, &scratch->prefix);
	if (!verdict)
		return modes->path == FILTER_EXCLUDE;
	if (*verdict == VERDICT_KEEP)
		return true;
	return !record->mntns_initial ||
	       (!found && record->errno != ENOENT && record->errno != ENOTDIR);
}

/* When calls were entered, where somebody wants to know how long they take. Gone with the task. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} open_starts SEC(".maps") NEEDS("option:open_latency,function:bpf_task_storage_get");

OPTION(open_latency);

static __always_inline __u64 latency_until(__u64 now)
{
	__u64 *start, began;

	if (!PLAIN_LOADS || !open_latency ||
	    !bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_storage_get))
		return 0;
	start = bpf_task_storage_get(&open_starts, bpf_get_current_task_btf(), NULL, 0);
	if (!start || !*start)
		return 0;
	began = *start;
	*start = 0;
	return now - began;
}

static __always_inline int opened(void *ctx, long result, struct pt_regs___user *registers,
				  const enum open_call call)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct open_scratch *scratch = scratch_of(call);
	struct call_arguments passed;
	struct file_open *record;
	struct request asked;
	__u32 size, generation;
	bool found;

	if (!enabled(KIND_FILE_OPEN))
		return 0;
	if (!scratch) {
		count_fault(FAULT_NO_SLOT);
		return 0;
	}
	record = &scratch->record;
	start_base(&record->base);
	identify(&record->task);
	generation = generation_in_force();
	if (!admits_by(generation, &record->base, &record->task, KIND_FILE_OPEN))
		return 0;
	passed = call_arguments(registers);
	asked = request_of(&passed, call);
	if (asked.unreadable) {
		record->base.flags |= FLAG_INCOMPLETE;
		count_fault(FAULT_UNREADABLE);
	}
	record->latency_ns = latency_until(record->base.boot_ns);
	record->inode = 0;
	record->dev = 0;
	record->fd = result < 0 ? -1 : result;
	record->errno = errno_of(result);
	record->flags = asked.flags;
	record->mode = asked.mode;
	record->mntns = 0;
	record->mntns_initial = 0;
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	record->path_len = result < 0 ? 0 : put_opened(record, file_of_fd(task, result), call);
	found = record->path_len;
	if (!found)
		record->path_len = put_requested(record, task, &asked, call);
	if (!passes_path(scratch, found, call, generation)) {
		count_filtered(KIND_FILE_OPEN);
		return 0;
	}
	size = offsetof(struct file_open, data) + record->path_len;
	if (size <= sizeof(*record))
		output(ctx, &bulk, &record->base, KIND_FILE_OPEN, RING_BULK, size);
	return 0;
}

/*
 * At the return of the function behind the call, and where that cannot be attached, of the call:
 * a tracepoint of a system call taxes every other one of every process. No kretprobe: its kernel
 * follows a bounded number of calls at once, and opens of pipes that wait, which anybody can make,
 * would let it miss all others.
 */
#define ON_OPEN(name, call, needs)                                                       \
	SEC("fexit/" SYSTEM_CALL(name)) HOOK(#name) EMITS("file.open")                   \
	DOC("opens by " #name "()") needs                                                \
	int BPF_PROG(on_##name, struct pt_regs___user *registers, long result)           \
	{                                                                                \
		return UNPREEMPTED(opened(ctx, result, registers, call));                     \
	}                                                                                \
	SEC("tracepoint/syscalls/sys_exit_" #name) HOOK(#name) EMITS("file.open")        \
	DOC("opens by " #name "()") needs                                                \
	int on_##name##_exit(struct trace_event_raw_sys_exit *ctx)                       \
	{                                                                                \
		return AMONG_OTHERS(UNPREEMPTED(opened(ctx, ctx->ret, user_registers(), call))); \
	}

/* Newer architectures never had open() and creat(). */
ON_OPEN(open, CALL_OPEN, NEEDS("x86_64"))
ON_OPEN(creat, CALL_CREAT, NEEDS("x86_64"))
ON_OPEN(openat, CALL_OPENAT, )
ON_OPEN(openat2, CALL_OPENAT2, )

#if PLAIN_LOADS /* what is kept with a task is the kernel's own BTF's */
static __always_inline int entered(void)
{
	__u64 *start;

	start = bpf_task_storage_get(&open_starts, bpf_get_current_task_btf(), NULL,
				     BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (start)
		*start = bpf_ktime_get_boot_ns();
	else
		count_fault(FAULT_OPEN_STARTS_FULL);
	return 0;
}

#define ON_OPEN_START(name, needs)                                                        \
	SEC("fentry/" SYSTEM_CALL(name)) HOOK(#name "_start") COMPLETES("file.open")      \
	DOC("latencies of " #name "()") NEEDS("option:open_latency" needs)                \
	int BPF_PROG(on_##name##_start, struct pt_regs___user *registers)                 \
	{                                                                                 \
		return UNPREEMPTED(entered());                                            \
	}                                                                                 \
	SEC("tracepoint/syscalls/sys_enter_" #name) HOOK(#name "_start")                  \
	COMPLETES("file.open")                                                            \
	DOC("latencies of " #name "()") NEEDS("option:open_latency" needs)                \
	int on_##name##_enter(void *ctx)                                                  \
	{                                                                                 \
		return AMONG_OTHERS(UNPREEMPTED(entered()));                              \
	}

ON_OPEN_START(open, ",x86_64")
ON_OPEN_START(creat, ",x86_64")
ON_OPEN_START(openat, "")
ON_OPEN_START(openat2, "")
#endif
