// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/* process.exec, process.fork, process.exit */
#define PATH_SLOTS 1
#include "core/path.bpf.h"

char LICENSE[] SEC("license") = "GPL";

/* Too large for the stack. The hook runs in the task that executes, never in an interrupt, and the
 * kernel does not run a tracing program inside itself on one CPU: nothing else writes here. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct process_exec);
} exec_records SEC(".maps") SIZED("cpus");

/* The strings of process_exec, in the order of its data. */
enum exec_string {
	EXEC_EXE,
	EXEC_ARGV,
	EXEC_CWD,
	EXEC_PARENT_EXE,
	EXEC_FILENAME,
	EXEC_INTERP,
};

static __always_inline void cut(struct event_base *base, int string)
{
	base->cut |= 1 << string;
}

/* A string could not be read at all. */
static __always_inline void unreadable(struct event_base *base, int string)
{
	cut(base, string);
	base->flags |= FLAG_INCOMPLETE;
	count_fault(FAULT_UNREADABLE);
}

static __always_inline __u32 append_path(struct process_exec *record, struct path_buffer *path,
					 __u32 position, const __u32 limit, enum exec_string string)
{
	if (!path)
		return 0;
	if (path->truncated)
		cut(&record->base, string);
	return path_append(path, record->data, position, limit);
}

static __always_inline __u32 append_argv(struct process_exec *record, struct mm_struct *mm,
					 __u32 position, const __u32 limit)
{
	unsigned long from = READ(struct mm_struct, mm, arg_start);
	unsigned long length = READ(struct mm_struct, mm, arg_end) - from;
	__u32 most = most_of_argv();
	__u8 *to = place(record->data, position, limit);
	char ends[2] = {};

	if (!to)
		return 0;
	if (length > ARGV_LEN + 1 || (most < ARGV_LEN && length > most)) {
		cut(&record->base, EXEC_ARGV);
		length = most < ARGV_LEN ? most : ARGV_LEN;
	} else if (length == ARGV_LEN + 1) {
		/* Its last byte is a NUL, which is not missed unless it is an argument: an empty one. */
		if (bpf_probe_read_user(ends, sizeof(ends), (void *)(from + ARGV_LEN - 1)) ||
		    !ends[0] || ends[1])
			cut(&record->base, EXEC_ARGV);
		length = ARGV_LEN;
	}
	if (bpf_probe_read_user(to, length, (void *)from)) {
		unreadable(&record->base, EXEC_ARGV);
		return 0;
	}
	return length;
}

/* A string of the kernel's, without its NUL. */
static __always_inline __u32 append_string(struct process_exec *record, const char *from,
					   __u32 position, const __u32 limit,
					   enum exec_string string)
{
	__u8 *to = place(record->data, position, limit);
	char last = 0;
	long length;

	if (!to)
		return 0;
	length = bpf_probe_read_kernel_str(to, PATH_LEN, from);
	if (length < 0) {
		unreadable(&record->base, string);
		return 0;
	}
	/* Of what execveat() runs below a directory the name is longer than any path. */
	if (length == PATH_LEN &&
	    (bpf_probe_read_kernel(&last, sizeof(last), from + PATH_LEN - 1) || last))
		cut(&record->base, string);
	/* Of an empty one kernels before "maccess: fix strncpy_from_user_nofault() empty string
	 * handling" do not count the NUL. */
	return length > 0 ? (length - 1) & (PATH_LEN - 1) : 0;
}

static __always_inline void fill_exe(struct process_exec *record, struct file *exe)
{
	struct path_buffer *path = path_of_file(0, exe);
	struct dentry *dentry = READ(struct file, exe, f_path.dentry);
	struct inode *inode = READ(struct file, exe, f_inode);

	record->exe_inode = READ(struct inode, inode, i_ino);
	record->exe_dev = dev_of(READ(struct inode, inode, i_sb, s_dev));
	record->exe_nlink = READ(struct inode, inode, i_nlink);
	record->exe_len = append_path(record, path, 0, 0, EXEC_EXE);
	record->exe_mntns = path ? path->mntns : 0;
	record->exe_mntns_initial = is_initial_mntns(record->exe_mntns);
	record->exe_memfd = path && path->memfd;
	/* As d_unlinked(): taken out of its directory, which need not have been its last name. */
	record->exe_deleted = path && !path->memfd &&
			      (!record->exe_nlink || !READ(struct dentry, dentry, d_hash.pprev));
}

/* What is executed, as far as nothing but the kernel's arguments of execve() has it. */
struct image {
	const char *filename;
	const char *interp; /* NULL: it is not known */
	int argc;
};

static __always_inline struct image image_of(struct linux_binprm *bprm)
{
	struct image image = {
		.filename = READ(struct linux_binprm, bprm, filename),
		.interp = READ(struct linux_binprm, bprm, interp),
		.argc = READ(struct linux_binprm, bprm, argc),
	};

	return image;
}

static __always_inline void fill_exec(struct process_exec *record, struct task_struct *task,
				      const struct image *image)
{
	struct task_struct *parent = READ(struct task_struct, task, real_parent);
	struct mm_struct *mm = READ(struct task_struct, task, mm);
	struct fs_struct *fs = READ(struct task_struct, task, fs);
	struct path_buffer *path;
	struct file *parent_exe;
	__u32 position;

	record->start_time_ns = record->task.start_boot_ns;
	record->euid = READ(struct task_struct, task, cred, euid.val);
	record->auid = -1;
	if (bpf_core_field_exists(task->loginuid))
		record->auid = READ(struct task_struct, task, loginuid.val);
	record->argc = image->argc;
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	__builtin_memset(record->parent_comm, 0, sizeof(record->parent_comm));
	if (bpf_probe_read_kernel_str(record->parent_comm, sizeof(record->parent_comm),
				      (void *)parent + bpf_core_field_offset(struct task_struct, comm)) < 0)
		record->base.flags |= FLAG_INCOMPLETE;

	fill_exe(record, READ(struct mm_struct, mm, exe_file));
	position = record->exe_len;
	record->argv_len = append_argv(record, mm, position, PATH_LEN);
	position += record->argv_len;

	path = path_build(0, READ(struct fs_struct, fs, pwd.dentry),
			  READ(struct fs_struct, fs, pwd.mnt));
	record->cwd_len = append_path(record, path, position, PATH_LEN + ARGV_LEN, EXEC_CWD);
	record->cwd_mntns = path ? path->mntns : 0;
	record->cwd_mntns_initial = is_initial_mntns(record->cwd_mntns);
	position += record->cwd_len;

	parent_exe = exe_file_of(parent);
	path = parent_exe ? path_of_file(0, parent_exe) : NULL;
	record->parent_exe_len = append_path(record, path, position, 2 * PATH_LEN + ARGV_LEN,
					     EXEC_PARENT_EXE);
	record->parent_exe_mntns = path ? path->mntns : 0;
	record->parent_exe_mntns_initial = is_initial_mntns(record->parent_exe_mntns);
	position += record->parent_exe_len;

	record->filename_len = append_string(record, image->filename, position,
					     3 * PATH_LEN + ARGV_LEN, EXEC_FILENAME);
	position += record->filename_len;
	record->interp_len = 0;
	if (!image->interp)
		unreadable(&record->base, EXEC_INTERP);
	else if (image->interp != image->filename)
		record->interp_len = append_string(record, image->interp, position,
						   4 * PATH_LEN + ARGV_LEN, EXEC_INTERP);
}

static __always_inline int executed(void *ctx, struct task_struct *task, const struct image *image)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct process_exec *record = bpf_map_lookup_elem(&exec_records, &cpu);
	__u32 size;

	if (!enabled(KIND_PROCESS_EXEC))
		return 0;
	if (!record) {
		count_fault(FAULT_NO_SLOT);
		return 0;
	}
	start_base(&record->base);
	identify(&record->task);
	if (!admits(&record->base, &record->task, KIND_PROCESS_EXEC))
		return 0;
	fill_exec(record, task, image);
	size = offsetof(struct process_exec, data) + record->exe_len + record->argv_len +
	       record->cwd_len + record->parent_exe_len + record->filename_len +
	       record->interp_len;
	if (size <= sizeof(*record))
		output(ctx, &critical, &record->base, KIND_PROCESS_EXEC, RING_CRITICAL, size);
	return 0;
}

/*
 * From 7.0 on raw tracepoints can be preempted (a46023d5616e), and a program is left out on a CPU for as long
 * as a task waits there that was preempted within it: at its end, where it lets go of the CPU. So long is up
 * to its user, who may have a task wait, and execute what he likes beside it. What is behind a perf event
 * of the tracepoint keeps the CPU from before the kernel's guard until after it (16718274ee75). So there
 * the programs are of that sort; but its record of an exec has less than its arguments have.
 */
#define PREEMPTED NEEDS("variable:tracepoint_srcu_srcu_data,no function:srcu_free_old_probes")
/* Raw tracepoints there, where those perf events are not permitted. */
#define PREEMPTIBLE                                                                              \
	PREEMPTED LACKS("those that happen on a CPU where a task is preempted in the program")

/* Something can be kept with a task where the kernel has BTF of its own. */
#define PREPARED NEEDS("variable:tracepoint_srcu_srcu_data,no function:srcu_free_old_probes,own btf")

/* What is being executed, by the task that does: kept when nothing can fail any more, which is before it
 * happens. */
struct prepared {
	struct linux_binprm *bprm;
	__u32 execs; /* of the task, until then */
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct prepared);
} exec_prepared SEC(".maps") PREPARED;

#if PLAIN_LOADS

/* A task that is preempted in here can have it left out for others, too: of their exec is missing then
 * whether it has an interpreter, and it is said to. It is short, and lets go of no CPU. */
SEC("raw_tp/sched_prepare_exec") PREPARED COMPLETES("process.exec")
DOC("interpreters of scripts")
int BPF_PROG(on_prepare_exec, struct task_struct *task, struct linux_binprm *bprm)
{
	struct task_struct *current = bpf_get_current_task_btf();
	struct prepared *kept;

	if (!enabled(KIND_PROCESS_EXEC))
		return 0;
	kept = bpf_task_storage_get(&exec_prepared, current, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!kept) /* the event will say that it is incomplete */
		return 0;
	kept->bprm = bprm;
	kept->execs = READ(struct task_struct, current, self_exec_id);
	return 0;
}

/* As image_of(), where the arguments of execve() are not known: the new program finds the number of its
 * own where its stack begins. */
static __always_inline struct image image_from_outside(struct trace_event_raw_sched_process_exec *ctx,
						       struct task_struct *task)
{
	struct mm_struct *mm = READ(struct task_struct, task, mm);
	struct image image = {
		.filename = (const char *)ctx + (ctx->__data_loc_filename & 0xffff),
	};

	if (bpf_probe_read_user(&image.argc, sizeof(image.argc),
				(void *)READ(struct mm_struct, mm, start_stack)))
		count_fault(FAULT_UNREADABLE);
	return image;
}

SEC("tracepoint/sched/sched_process_exec") HOOK("exec") PREEMPTED EMITS("process.exec")
int on_exec_unpreempted(struct trace_event_raw_sched_process_exec *ctx)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct prepared *kept = bpf_task_storage_get(&exec_prepared, task, NULL, 0);
	struct image image;

	if (kept && kept->bprm && kept->execs + 1 == READ(struct task_struct, task, self_exec_id))
		image = image_of(kept->bprm);
	else
		image = image_from_outside(ctx, task);
	return AMONG_OTHERS(executed(ctx, task, &image));
}
#endif

SEC("raw_tp/sched_process_exec") HOOK("exec") PREEMPTIBLE EMITS("process.exec")
int BPF_PROG(on_exec_preemptible, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	struct image image = image_of(bprm);

	return UNPREEMPTED(executed(ctx, task, &image));
}

SEC("raw_tp/sched_process_exec") HOOK("exec") EMITS("process.exec")
int BPF_PROG(on_exec, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	struct image image = image_of(bprm);

	return UNPREEMPTED(executed(ctx, task, &image));
}

static __always_inline int forked(void *ctx, struct task_struct *child)
{
	struct event_base base;
	struct event_task who;
	struct process_fork *record;
	struct namespaced_pid inner;
	int child_pid;

	if (!enabled(KIND_PROCESS_FORK))
		return 0;
	child_pid = READ(struct task_struct, child, tgid);
	if (READ(struct task_struct, child, pid) != child_pid) /* a thread */
		return 0;
	start_base(&base);
	identify(&who);
	if (!admits(&base, &who, KIND_PROCESS_FORK))
		return 0;
	record = begin(&critical, &base, KIND_PROCESS_FORK, RING_CRITICAL, sizeof(*record));
	if (!record)
		return 0;
	inner = namespaced_pid_of(child);
	record->task = who;
	record->child_start_boot_ns = READ(struct task_struct, child, start_boottime);
	record->child_start_time_ns = record->child_start_boot_ns;
	record->child_pid = child_pid;
	record->child_ppid = READ(struct task_struct, child, real_parent, tgid);
	record->child_pidns = inner.pidns;
	record->child_ns_pid = inner.pid;
	submit(ctx, &critical, RING_CRITICAL, record);
	return 0;
}

#if PLAIN_LOADS /* without BTF of the kernel's own there is nothing to name them by */
extern struct task_struct *bpf_task_from_pid(__s32 pid) __ksym __weak;
extern void bpf_task_release(struct task_struct *task) __ksym __weak;

static __always_inline void forked_as(void *ctx, int child_pid)
{
	struct task_struct *child = bpf_task_from_pid(child_pid);

	if (!child) { /* it has not run yet, and cannot have ended */
		count_fault(FAULT_UNREADABLE);
		return;
	}
	forked(ctx, child);
	bpf_task_release(child);
}

SEC("tracepoint/sched/sched_process_fork") HOOK("fork") PREEMPTED EMITS("process.fork")
int on_fork_unpreempted(struct trace_event_raw_sched_process_fork *ctx)
{
	return AMONG_OTHERS(forked_as(ctx, ctx->child_pid));
}
#endif

SEC("raw_tp/sched_process_fork") HOOK("fork") PREEMPTIBLE EMITS("process.fork")
int BPF_PROG(on_fork_preemptible, struct task_struct *parent, struct task_struct *child)
{
	return UNPREEMPTED(forked(ctx, child));
}

SEC("raw_tp/sched_process_fork") HOOK("fork") EMITS("process.fork")
int BPF_PROG(on_fork, struct task_struct *parent, struct task_struct *child)
{
	return UNPREEMPTED(forked(ctx, child));
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
static __always_inline bool ends_process(const struct event_task *who)
{
	struct exit_key key = { .start_boot_ns = who->start_boot_ns, .pid = who->pid };
	__u8 one = 1;
	int result; /* before 6.4 it is one, of which the upper half of the register is not set */

	result = bpf_map_update_elem(&exited, &key, &one, BPF_NOEXIST);
	if (result == -EEXIST)
		return false;
	/* Where there is no room to remember it, better twice than not at all. */
	if (result)
		count_fault(FAULT_EXITED_FULL);
	return true;
}

static __always_inline int ended(void *ctx, struct task_struct *task)
{
	struct task_struct *leader;
	struct event_base base;
	struct event_task who;
	struct process_exit *record;
	__u32 code;

	if (!enabled(KIND_PROCESS_EXIT) || READ(struct task_struct, task, signal, live.counter))
		return 0;
	start_base(&base);
	identify(&who);
	if (!ends_process(&who) || !admits(&base, &who, KIND_PROCESS_EXIT))
		return 0;
	record = begin(&critical, &base, KIND_PROCESS_EXIT, RING_CRITICAL, sizeof(*record));
	if (!record)
		return 0;
	/* What wait() tells the parent. */
	leader = READ(struct task_struct, task, group_leader);
	if (READ(struct task_struct, task, signal, flags) & SIGNAL_GROUP_EXIT)
		code = READ(struct task_struct, task, signal, group_exit_code);
	else
		code = READ(struct task_struct, leader, exit_code);
	record->task = who;
	record->start_time_ns = who.start_boot_ns;
	record->duration_ns = base.boot_ns - who.start_boot_ns;
	record->exit_code = (code >> 8) & 0xff;
	record->signal = code & 0x7f;
	record->core_dumped = !!(code & 0x80);
	__builtin_memset(record->pad, 0, sizeof(record->pad));
	submit(ctx, &critical, RING_CRITICAL, record);
	return 0;
}

SEC("tracepoint/sched/sched_process_exit") HOOK("exit") PREEMPTED EMITS("process.exit")
int on_exit_unpreempted(void *ctx)
{
	return AMONG_OTHERS(ended(ctx, (struct task_struct *)bpf_get_current_task()));
}

SEC("raw_tp/sched_process_exit") HOOK("exit") PREEMPTIBLE EMITS("process.exit")
int BPF_PROG(on_exit_preemptible, struct task_struct *task)
{
	return UNPREEMPTED(ended(ctx, task));
}

SEC("raw_tp/sched_process_exit") HOOK("exit") EMITS("process.exit")
int BPF_PROG(on_exit, struct task_struct *task)
{
	return UNPREEMPTED(ended(ctx, task));
}
