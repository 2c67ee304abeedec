// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* file.open */
#include "path.bpf.h"

/* A call under way, kept from its entry to its return. */
struct open_call {
	__u64 boot_ns;
	const char *filename; /* in the task's memory */
	__u32 flags;
	__u32 mode;
	__s32 dirfd;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); /* pid_tgid */
	__type(value, struct open_call);
} open_calls SEC(".maps");

struct open_scratch {
	struct file_open record;
	struct path_buffer path;
	struct path_prefix prefix;
};

/* The programs that need room to build a record. */
enum open_program {
	PROGRAM_OPEN,
	PROGRAM_CREAT,
	PROGRAM_OPENAT,
	PROGRAM_OPENAT2,
	PROGRAM_END,
};

/* Each has its own: up to 6.19 one program of a system call's tracepoint keeps every other from its
 * CPU, but 7.2 runs them preemptibly (trace_call_bpf_faultable), and only a program itself is not
 * started again on a CPU where it is under way. */
struct open_scratches {
	struct open_scratch of[PROGRAM_END];
};

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct open_scratches);
} open_scratch SEC(".maps");

static __always_inline int enter(int dirfd, const char *filename, __u32 flags, __u32 mode)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct open_call call = {
		.boot_ns = bpf_ktime_get_boot_ns(),
		.filename = filename,
		.flags = flags,
		.mode = flags & (O_CREAT | O_TMPFILE) ? mode : 0,
		.dirfd = dirfd,
	};
	struct event_header header;

	if (id >> 32 == agent_pid)
		return 0;
	if (bpf_map_update_elem(&open_calls, &id, &call, BPF_ANY)) {
		identify_current(&header);
		if (admits(&header, KIND_FILE_OPEN))
			lose(&header, KIND_FILE_OPEN, STREAM_BULK);
	}
	return 0;
}

SEC("tracepoint/syscalls/sys_enter_open") EMITS("file.open") DOC("opens by open()")
int on_open_enter(struct trace_event_raw_sys_enter *ctx)
{
	return enter(AT_FDCWD, (const char *)ctx->args[0], ctx->args[1], ctx->args[2]);
}

SEC("tracepoint/syscalls/sys_enter_creat") EMITS("file.open") DOC("opens by creat()")
int on_creat_enter(struct trace_event_raw_sys_enter *ctx)
{
	return enter(AT_FDCWD, (const char *)ctx->args[0], O_CREAT | O_WRONLY | O_TRUNC,
		     ctx->args[1]);
}

SEC("tracepoint/syscalls/sys_enter_openat") EMITS("file.open") DOC("opens by openat()")
int on_openat_enter(struct trace_event_raw_sys_enter *ctx)
{
	return enter(ctx->args[0], (const char *)ctx->args[1], ctx->args[2], ctx->args[3]);
}

SEC("tracepoint/syscalls/sys_enter_openat2") EMITS("file.open") DOC("opens by openat2()")
int on_openat2_enter(struct trace_event_raw_sys_enter *ctx)
{
	struct open_how how = {};

	bpf_probe_read_user(&how, sizeof(how), (void *)ctx->args[2]);
	return enter(ctx->args[0], (const char *)ctx->args[1], how.flags, how.mode);
}

/* Where an open file really is. 0 where that cannot be said: it is nameless, such as a pipe, or
 * another thread has closed it already. */
static __always_inline __u32 opened_path(struct open_scratch *scratch, struct task_struct *task,
					 int fd)
{
	struct file *file = file_of_fd(task, fd);

	if (!file)
		return 0;
	path_build(&scratch->path, &file->f_path);
	if (scratch->path.nameless)
		return 0;
	return path_append(&scratch->path, scratch->record.data, 0, 0, &scratch->record.header);
}

/* Where a path begins that is not absolute: cwd or a directory; or, if it is, the task's root. */
static __always_inline __u32 base_path(struct open_scratch *scratch, struct task_struct *task,
				       int dirfd, bool absolute)
{
	struct fs_struct *fs = BPF_CORE_READ(task, fs);

	if (!absolute && dirfd != AT_FDCWD)
		return opened_path(scratch, task, dirfd);
	path_build(&scratch->path, absolute ? &fs->root : &fs->pwd);
	return path_append(&scratch->path, scratch->record.data, 0, 0, &scratch->record.header);
}

/* Whether a name that filled the whole of PATH_LEN goes on behind it. */
static __always_inline bool is_longer(const char *name)
{
	char last = 0;

	bpf_probe_read_user(&last, sizeof(last), name + PATH_LEN - 1);
	return last;
}

/* Of an open that failed: what was asked for, after what it is relative to. Where there is no such
 * directory, the name alone, as if it were cut. */
static __always_inline __u32 requested_path(struct open_scratch *scratch, struct task_struct *task,
					    const struct open_call *call)
{
	struct file_open *record = &scratch->record;
	char first = 0;
	__u32 position;
	long length;

	bpf_probe_read_user(&first, sizeof(first), call->filename);
	position = base_path(scratch, task, call->dirfd, first == '/');
	if (position > PATH_LEN - 1)
		position = PATH_LEN - 1;
	if (!position)
		record->header.flags |= FLAG_TRUNCATED;
	else if (position == 1 && first == '/') /* the root directory, which ends in a slash */
		position = 0;
	else if (position > 1 && first && first != '/')
		record->data[position++] = '/';
	length = bpf_probe_read_user_str(&record->data[position], PATH_LEN, call->filename);
	/* Of an empty name, kernels before "maccess: fix strncpy_from_user_nofault() empty string
	 * handling" (6.12 is one) return 0 and not 1: they do not count its NUL. */
	if (length < 0 || (length >= PATH_LEN && is_longer(call->filename)))
		record->header.flags |= FLAG_TRUNCATED;
	if (length <= 0)
		return position;
	return position + length - 1; /* without the NUL */
}

static __always_inline bool passes_path_filter(struct open_scratch *scratch, __u32 length)
{
	if (settings.filter_path == FILTER_OFF)
		return true;
	if (length > PREFIX_LEN)
		length = PREFIX_LEN;
	scratch->prefix.bits = length * 8;
	bpf_probe_read_kernel(scratch->prefix.path, PREFIX_LEN, scratch->record.data);
	return passes(settings.filter_path, &filter_paths, &scratch->prefix);
}

static __always_inline int leave(long result, enum open_program program)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct open_call *call = bpf_map_lookup_elem(&open_calls, &id);
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	__u32 cpu = bpf_get_smp_processor_id();
	struct open_scratches *scratches;
	struct open_scratch *scratch;
	struct file_open *record;
	__u32 size;

	if (!call)
		return 0;
	scratches = bpf_map_lookup_elem(&open_scratch, &cpu);
	if (!scratches)
		return 0;
	scratch = &scratches->of[program];
	record = &scratch->record;
	identify_current(&record->header);
	if (!admits(&record->header, KIND_FILE_OPEN))
		goto out;
	record->latency_ns = record->header.boot_ns - call->boot_ns;
	record->fd = result < 0 ? -1 : result;
	record->errno = errno_of(result);
	record->flags = call->flags;
	record->mode = call->mode;
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	record->path_len = result < 0 ? 0 : opened_path(scratch, task, result);
	if (!record->path_len)
		record->path_len = requested_path(scratch, task, call);
	if (!passes_path_filter(scratch, record->path_len)) {
		count_filtered(KIND_FILE_OPEN);
		goto out;
	}
	size = offsetof(struct file_open, data) + record->path_len;
	if (size <= sizeof(*record))
		output(&bulk, &record->header, KIND_FILE_OPEN, STREAM_BULK, size);
out:
	bpf_map_delete_elem(&open_calls, &id);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_open") EMITS("file.open") DOC("opens by open()")
int on_open_exit(struct trace_event_raw_sys_exit *ctx)
{
	return leave(ctx->ret, PROGRAM_OPEN);
}

SEC("tracepoint/syscalls/sys_exit_creat") EMITS("file.open") DOC("opens by creat()")
int on_creat_exit(struct trace_event_raw_sys_exit *ctx)
{
	return leave(ctx->ret, PROGRAM_CREAT);
}

SEC("tracepoint/syscalls/sys_exit_openat") EMITS("file.open") DOC("opens by openat()")
int on_openat_exit(struct trace_event_raw_sys_exit *ctx)
{
	return leave(ctx->ret, PROGRAM_OPENAT);
}

SEC("tracepoint/syscalls/sys_exit_openat2") EMITS("file.open") DOC("opens by openat2()")
int on_openat2_exit(struct trace_event_raw_sys_exit *ctx)
{
	return leave(ctx->ret, PROGRAM_OPENAT2);
}
