/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Who: the task block of a record, and what else identifies a task. */
#ifndef STREAMER_TASK_H
#define STREAMER_TASK_H

#include "core.bpf.h"

/* Whether the helpers that tell of the current task are there: not for programs at packets. */
#ifndef TASK_HELPERS
#define TASK_HELPERS 1
#endif

struct namespaced_pid {
	__u32 pidns;
	__u32 pid;
};

/* The process's id in the innermost pid namespace that it is in: not the one that its children
 * will be in, which nsproxy has. */
static __always_inline struct namespaced_pid namespaced_pid_of(struct task_struct *leader)
{
	struct pid *pid = READ(struct task_struct, leader, thread_pid);
	__u32 level = READ(struct pid, pid, level);
	struct namespaced_pid found = {};
	const void *innermost;
	struct pid_namespace *ns = NULL;

	if (!level) { /* the initial namespace */
		found.pid = READ(struct task_struct, leader, tgid);
		found.pidns = READ(struct pid, pid, numbers[0].ns, ns.inum);
		return found;
	}
	innermost = (const void *)pid + bpf_core_field_offset(struct pid, numbers) +
		    level * bpf_core_type_size(struct upid);
	if (bpf_probe_read_kernel(&found.pid, sizeof(found.pid),
				  innermost + bpf_core_field_offset(struct upid, nr)) ||
	    bpf_probe_read_kernel(&ns, sizeof(ns),
				  innermost + bpf_core_field_offset(struct upid, ns)))
		count_fault(FAULT_UNREADABLE);
	found.pidns = BPF_CORE_READ(ns, ns.inum);
	return found;
}

/* The helper costs more than all else that identifies a task. So these are plain loads of 16 bytes, as
 * a kernel type of two words; since 5.17 the kernel pads names itself. Kernels such as 6.1 have a
 * helper that does not. */
static __always_inline void read_comm(char *comm, struct task_struct *task)
{
#if PLAIN_LOADS
	const void *at = (void *)task + bpf_core_field_offset(struct task_struct, comm);
	__u64 *words = (__u64 *)comm;

	if (plain_loads()) {
		words[0] = AS_TYPE(struct timespec64, at)->tv_sec;
		words[1] = AS_TYPE(struct timespec64, at)->tv_nsec;
		return;
	}
#endif
	__builtin_memset(comm, 0, COMM_LEN);
#if TASK_HELPERS
	bpf_get_current_comm(comm, COMM_LEN);
#else
	if (bpf_probe_read_kernel_str(comm, COMM_LEN,
				      (void *)task +
					      bpf_core_field_offset(struct task_struct, comm)) < 0)
		count_fault(FAULT_UNREADABLE);
#endif
}

/* Who the current task is. */
static __always_inline void identify(struct event_task *who)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct task_struct *leader = READ(struct task_struct, task, group_leader);
	struct namespaced_pid inner = namespaced_pid_of(leader);
	struct cred *cred;

	who->start_boot_ns = READ(struct task_struct, leader, start_boottime);
	who->ppid = READ(struct task_struct, task, real_parent, tgid);
	who->pidns = inner.pidns;
	who->ns_pid = inner.pid;
	who->pad = 0;
	read_comm(who->comm, task);
	if (plain_loads() || !TASK_HELPERS) {
		cred = READ(struct task_struct, task, cred);
		who->pid = READ(struct task_struct, task, tgid);
		who->tid = READ(struct task_struct, task, pid);
		who->uid = READ(struct cred, cred, uid.val);
		who->gid = READ(struct cred, cred, gid.val);
		who->cgroup_id = READ(struct task_struct, task, cgroups, dfl_cgrp, kn, id);
		return;
	}
#if TASK_HELPERS
	__u64 ids = bpf_get_current_pid_tgid();

	who->pid = ids >> 32;
	who->tid = ids;
	ids = bpf_get_current_uid_gid();
	who->uid = ids;
	who->gid = ids >> 32;
	who->cgroup_id = bpf_get_current_cgroup_id();
#endif
}

/* The base of a record of now; the rest of it is written when it is numbered. */
static __always_inline void start_base(struct event_base *base)
{
	__builtin_memset(base, 0, sizeof(*base));
	base->boot_ns = bpf_ktime_get_boot_ns();
	base->weight = 1;
}

/* A device as stat() gives it: see new_encode_dev() in include/linux/kdev_t.h. */
static __always_inline __u32 dev_of(__u32 kernel_dev)
{
	__u32 major = kernel_dev >> 20, minor = kernel_dev & 0xfffff;

	return (minor & 0xff) | major << 8 | (minor & ~0xffu) << 12;
}

static __always_inline struct file *exe_file_of(struct task_struct *task)
{
	return READ(struct task_struct, task, mm, exe_file);
}

static __always_inline struct exe_key exe_key_of(struct task_struct *task)
{
	struct inode *inode = READ(struct file, exe_file_of(task), f_inode);
	struct exe_key key = {};

	key.inode = READ(struct inode, inode, i_ino);
	key.dev = dev_of(READ(struct inode, inode, i_sb, s_dev));
	return key;
}

/* The open file behind a task's descriptor; NULL where there is none. */
static __always_inline struct file *file_of_fd(struct task_struct *task, int fd)
{
	struct fdtable *table = READ(struct task_struct, task, files, fdt);
	struct file **files = READ(struct fdtable, table, fd);
	struct file *file = NULL;

	if (fd < 0 || (__u32)fd >= READ(struct fdtable, table, max_fds))
		return NULL;
	if (bpf_probe_read_kernel(&file, sizeof(file), &files[fd])) {
		count_fault(FAULT_UNREADABLE);
		return NULL;
	}
	return file;
}

/*
 * The registers with which the current task entered its system call.
 *
 * bpf_task_pt_regs() came with 5.15 (dd6e10fbd9fb). Before, and where the kernel itself has no BTF by
 * which to name the type of a task, they are where the kernel puts them: at the end of the stack, or
 * 16 bytes before it where an x86_64 kernel knows of FRED (6.9, CONFIG_X86_FRED). How large stacks are
 * no type says (16 KiB mostly; more with KASAN or on arm64 with pages of 64 KiB), so where that is from
 * a stack's beginning was found out at the start: see learn_registers in core.bpf.c.
 */
OPTION(registers_at);

#define helper_tells_registers() \
	(PLAIN_LOADS && bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))

static __always_inline struct pt_regs___user *user_registers(void)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

	if (helper_tells_registers())
		return (void *)bpf_task_pt_regs(bpf_get_current_task_btf());
	return BPF_CORE_READ(task, stack) + registers_at;
}

struct call_arguments {
	__u64 at[4];
};

static __always_inline struct call_arguments call_arguments(struct pt_regs___user *regs)
{
	struct call_arguments found;

#if defined(__TARGET_ARCH_x86)
	found.at[0] = READ(struct pt_regs___user, regs, di);
	found.at[1] = READ(struct pt_regs___user, regs, si);
	found.at[2] = READ(struct pt_regs___user, regs, dx);
	found.at[3] = READ(struct pt_regs___user, regs, r10);
#elif defined(__TARGET_ARCH_arm64)
	found.at[0] = READ(struct pt_regs___user, regs, orig_x0); /* regs[0] is the result by now */
	found.at[1] = READ(struct pt_regs___user, regs, user_regs.regs[1]);
	found.at[2] = READ(struct pt_regs___user, regs, user_regs.regs[2]);
	found.at[3] = READ(struct pt_regs___user, regs, user_regs.regs[3]);
#endif
	return found;
}

/* The function behind a system call's number, called with a pointer to those registers. */
#if defined(__TARGET_ARCH_x86)
#define SYSTEM_CALL(name) "__x64_sys_" #name
#elif defined(__TARGET_ARCH_arm64)
#define SYSTEM_CALL(name) "__arm64_sys_" #name
#endif

#endif
