// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* process.exec, process.fork, process.exit */
#include "path.bpf.h"

struct exec_scratch {
	struct process_exec record;
	struct path_buffer path;
};

/* Too large for the stack. The hook runs in the task that executes, never in an interrupt, and the
 * kernel does not run a tracing program inside itself on one CPU: nothing else writes here. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct exec_scratch);
} exec_scratch SEC(".maps");

static __always_inline __u32 append_exe(struct exec_scratch *scratch, struct mm_struct *mm,
					__u32 position, const __u32 limit)
{
	struct file *exe = BPF_CORE_READ(mm, exe_file);

	if (!exe)
		return 0;
	path_build(&scratch->path, &exe->f_path);
	return path_append(&scratch->path, scratch->record.data, position, limit,
			   &scratch->record.header);
}

static __always_inline __u32 append_argv(struct process_exec *record, struct mm_struct *mm,
					 __u32 position, const __u32 limit)
{
	unsigned long from = BPF_CORE_READ(mm, arg_start);
	unsigned long length = BPF_CORE_READ(mm, arg_end) - from;

	if (length > ARGV_LEN) {
		length = ARGV_LEN;
		record->header.flags |= FLAG_TRUNCATED;
	}
	if (position > limit)
		return 0;
	if (bpf_probe_read_user(&record->data[position], length, (void *)from)) {
		record->header.flags |= FLAG_TRUNCATED;
		return 0;
	}
	return length;
}

static __always_inline void fill_exec(struct exec_scratch *scratch, struct task_struct *task,
				      struct linux_binprm *bprm)
{
	struct process_exec *record = &scratch->record;
	struct task_struct *parent = BPF_CORE_READ(task, real_parent);
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	struct fs_struct *fs = BPF_CORE_READ(task, fs);
	__u32 position = 0;

	record->start_boot_ns = BPF_CORE_READ(task, start_boottime);
	record->euid = BPF_CORE_READ(task, cred, euid.val);
	record->auid = -1;
	if (bpf_core_field_exists(task->loginuid))
		record->auid = BPF_CORE_READ(task, loginuid.val);
	record->argc = BPF_CORE_READ(bprm, argc);
	record->pad = 0;
	BPF_CORE_READ_STR_INTO(&record->parent_comm, parent, comm);

	record->exe_len = append_exe(scratch, mm, position, 0);
	position += record->exe_len;
	record->argv_len = append_argv(record, mm, position, PATH_LEN);
	position += record->argv_len;
	path_build(&scratch->path, &fs->pwd);
	record->cwd_len = path_append(&scratch->path, record->data, position, PATH_LEN + ARGV_LEN,
				      &record->header);
	position += record->cwd_len;
	record->parent_exe_len = append_exe(scratch, BPF_CORE_READ(parent, mm), position,
					    2 * PATH_LEN + ARGV_LEN);
}

SEC("raw_tp/sched_process_exec") EMITS("process.exec")
int BPF_PROG(on_exec, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct exec_scratch *scratch = bpf_map_lookup_elem(&exec_scratch, &cpu);
	struct process_exec *record;
	__u32 size;

	if (!scratch)
		return 0;
	record = &scratch->record;
	identify_current(&record->header);
	if (!admits(&record->header, KIND_PROCESS_EXEC))
		return 0;
	fill_exec(scratch, task, bprm);
	size = record->exe_len + record->argv_len + record->cwd_len + record->parent_exe_len;
	size += offsetof(struct process_exec, data);
	if (size <= sizeof(*record))
		output(&critical, &record->header, KIND_PROCESS_EXEC, STREAM_CRITICAL, size);
	return 0;
}

SEC("raw_tp/sched_process_fork") EMITS("process.fork")
int BPF_PROG(on_fork, struct task_struct *parent, struct task_struct *child)
{
	struct event_header header;
	struct process_fork *record;
	int child_pid = BPF_CORE_READ(child, tgid);

	if (BPF_CORE_READ(child, pid) != child_pid) /* a thread */
		return 0;
	identify_current(&header);
	if (!admits(&header, KIND_PROCESS_FORK))
		return 0;
	record = begin(&critical, &header, KIND_PROCESS_FORK, STREAM_CRITICAL, sizeof(*record));
	if (!record)
		return 0;
	record->child_start_boot_ns = BPF_CORE_READ(child, start_boottime);
	record->child_pid = child_pid;
	submit(&critical, STREAM_CRITICAL, record);
	return 0;
}

struct exit_key {
	__u64 start_boot_ns;
	__u64 pid;
};

/* Processes whose end was reported a moment ago. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct exit_key);
	__type(value, __u8);
} exited SEC(".maps");

/*
 * Whether this thread is the one that ends its process. `live` counts the threads that have not
 * begun to exit and is decremented before the hook, so with two threads exiting at once both can
 * find it at 0: the first to enter the key wins.
 */
static __always_inline bool ends_process(struct task_struct *task, struct exit_key *key)
{
	__u8 one = 1;

	if (BPF_CORE_READ(task, signal, live.counter) != 0)
		return false;
	/* Where there is no room to remember it, better twice than not at all. */
	return bpf_map_update_elem(&exited, key, &one, BPF_NOEXIST) != -EEXIST;
}

SEC("raw_tp/sched_process_exit") EMITS("process.exit")
int BPF_PROG(on_exit, struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct exit_key key = {
		.start_boot_ns = BPF_CORE_READ(leader, start_boottime),
		.pid = bpf_get_current_pid_tgid() >> 32,
	};
	struct event_header header;
	struct process_exit *record;
	__u32 code;

	if (!ends_process(task, &key))
		return 0;
	identify_current(&header);
	if (!admits(&header, KIND_PROCESS_EXIT))
		return 0;
	record = begin(&critical, &header, KIND_PROCESS_EXIT, STREAM_CRITICAL, sizeof(*record));
	if (!record)
		return 0;
	/* What wait() tells the parent. */
	if (BPF_CORE_READ(task, signal, flags) & SIGNAL_GROUP_EXIT)
		code = BPF_CORE_READ(task, signal, group_exit_code);
	else
		code = BPF_CORE_READ(leader, exit_code);
	record->start_boot_ns = key.start_boot_ns;
	record->duration_ns = header.boot_ns - key.start_boot_ns;
	record->exit_code = (code >> 8) & 0xff;
	record->signal = code & 0x7f;
	record->core_dumped = !!(code & 0x80);
	submit(&critical, STREAM_CRITICAL, record);
	return 0;
}
