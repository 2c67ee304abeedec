/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The parts of the kernel's types that the programs read.
 *
 * Only names and types of fields matter here: CO-RE relocates every access to where the running
 * kernel has the field. A hand-kept subset, instead of a vmlinux.h of one machine, makes the build
 * independent of the machine it runs on and shows at a glance what is read.
 */
#ifndef STREAMER_KERNEL_H
#define STREAMER_KERNEL_H

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define AF_INET 2
#define AF_INET6 10
#define AT_FDCWD (-100)
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define SOCK_DONE 1 /* enum sock_flags: the peer's FIN was received */
#define SIGNAL_GROUP_EXIT 4
#define PF_KTHREAD 0x00200000
#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define MAX_ERRNO 4095
#define ENOENT 2
#define ENOTDIR 20
#define EALREADY 114
#define EISCONN 106
#define RESOLVE_BENEATH 0x08
#define RESOLVE_IN_ROOT 0x10
#define EINTR 4
#define ERESTARTSYS 512
#define ERESTART_RESTARTBLOCK 516
#define EEXIST 17
#define ECONNABORTED 103
#define EINPROGRESS 115
#define O_WRONLY 01
#define O_CREAT 0100
#define O_TRUNC 01000
#define O_NONBLOCK 04000
#define O_TMPFILE 020000000

typedef enum {
	SS_UNCONNECTED = 1,
} socket_state;

enum tcp_state {
	TCP_ESTABLISHED = 1,
	TCP_SYN_SENT,
	TCP_SYN_RECV,
	TCP_FIN_WAIT1,
	TCP_FIN_WAIT2,
	TCP_TIME_WAIT,
	TCP_CLOSE,
	TCP_CLOSE_WAIT,
	TCP_LAST_ACK,
	TCP_LISTEN,
	TCP_CLOSING,
	TCP_NEW_SYN_RECV,
};

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

typedef struct {
	int counter;
} atomic_t;

struct qstr {
	__u32 len;
	const unsigned char *name;
};

struct timespec64 {
	__s64 tv_sec;
	long tv_nsec;
};

struct super_block {
	__u32 s_dev;
};

struct inode {
	unsigned short i_mode;
	unsigned int i_nlink;
	unsigned long i_ino;
	struct super_block *i_sb;
};

struct hlist_bl_node {
	struct hlist_bl_node **pprev; /* NULL: not in the hash table */
};

struct dentry {
	struct hlist_bl_node d_hash;
	struct dentry *d_parent;
	struct qstr d_name;
};

struct vfsmount {
	struct dentry *mnt_root;
};

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
	struct mnt_namespace *mnt_ns; /* NULL: detached */
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct fs_struct {
	struct path root;
	struct path pwd;
};

struct file {
	unsigned int f_flags;
	struct path f_path;
	struct inode *f_inode;
	void *private_data;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct mm_struct {
	unsigned long arg_start, arg_end;
	unsigned long start_stack;
	struct file *exe_file;
};

struct ns_common {
	unsigned int inum;
};

struct mnt_namespace {
	struct ns_common ns;
};

struct user_namespace {
	struct user_namespace *parent;
	int level;
	kuid_t owner;
};

struct pid_namespace {
	struct user_namespace *user_ns;
	struct ns_common ns;
};

struct nsproxy {
	struct mnt_namespace *mnt_ns;
};

struct upid {
	int nr;
	struct pid_namespace *ns;
};

struct pid {
	unsigned int level;
	struct upid numbers[1];
};

struct kernfs_iattrs {
	kuid_t ia_uid;
};

struct kernfs_node {
	struct kernfs_iattrs *iattr; /* NULL: root's */
	__u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
};

struct cgroup___ids { /* until 6.1 */
	int level;
	__u64 ancestor_ids[1];
};

struct cgroup___pointers { /* since 6.1 */
	int level;
	struct cgroup *ancestors[1];
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct cred {
	kuid_t uid;
	kgid_t gid;
	kuid_t euid;
	struct user_namespace *user_ns;
};

struct signal_struct {
	atomic_t live;
	int group_exit_code;
	unsigned int flags;
};

struct thread_info {
	unsigned long flags;
	__u32 status; /* on x86 alone */
};

struct list_head {
	struct list_head *prev;
};

struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	int pid;
	int tgid;
	struct task_struct *real_parent;
	struct list_head children;
	struct list_head sibling;
	struct task_struct *group_leader;
	struct mm_struct *mm;
	struct fs_struct *fs;
	struct files_struct *files;
	struct signal_struct *signal;
	struct nsproxy *nsproxy;
	struct css_set *cgroups;
	struct pid *thread_pid;
	void *stack;
	struct cred *cred;
	kuid_t loginuid;
	__u64 start_boottime;
	int exit_code;
	__u32 self_exec_id;
	char comm[16];
};

struct linux_binprm {
	int argc;
	const char *filename;
	const char *interp;
};

struct net {
	struct ns_common ns;
	struct net_device *loopback_dev;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
};

struct sock_common {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	unsigned short skc_family;
	volatile unsigned char skc_state;
	unsigned char skc_reuseport : 1;
	unsigned short skc_num;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	unsigned long skc_flags;
};

struct net_device {
	char name[16];
	int ifindex;
	possible_net_t nd_net;
};

struct numa_drop_counters { /* since 6.18 */
	atomic_t drops0;
	atomic_t drops1;
};

typedef struct {
	int owned; /* by a task in a system call */
} socket_lock_t;

struct sock {
	struct sock_common __sk_common;
	socket_lock_t sk_lock;
	__u16 sk_protocol;
	int sk_err;
	struct socket *sk_socket;
	atomic_t sk_drops;
	struct numa_drop_counters *sk_drop_counters;
	kuid_t sk_uid;
	__u32 sk_max_ack_backlog;
	__u8 sk_shutdown;
};

struct inet_sock {
	__be16 inet_sport;
};

struct inet_connection_sock {
	__u8 icsk_ca_state : 5;
};

struct request_sock {
	struct sock_common __req_common;
};

typedef struct {
	atomic_t refs;
} refcount_t;

struct sk_buff {
	struct net_device *dev; /* also the room of other things, while the packet is in a queue */
	struct sock *sk;        /* likewise */
	char cb[48];
	unsigned int len;
	__be16 protocol;
	__u16 network_header;
	unsigned int tail;
	unsigned char *head;
	refcount_t users;
};

struct tcp_skb_cb {
	__u16 tcp_gso_segs;
	__u8 tcp_flags; /* wider since 6.15, with nothing in the upper half that is read here */
};

struct msghdr {
	void *msg_name;
	int msg_namelen;
};

struct tcp_sock {
	__u64 bytes_received;
	__u64 bytes_sent;
	__u64 bytes_retrans;
};

struct mptcp_sock {
	struct sock *first; /* of its TCP connections */
};

struct socket {
	socket_state state;
	struct file *file;
	struct sock *sk;
};

struct trace_event_raw_sys_enter {
	long id;
};

struct trace_event_raw_sys_exit {
	long id;
	long ret;
};

struct trace_event_raw_sched_process_exec {
	__u32 __data_loc_filename; /* where it is in the record, and above 16 bits its length */
};

struct trace_event_raw_sched_process_fork {
	int child_pid;
};

/* The registers of the task in user space, as the kernel keeps them on its stack. */
#if defined(__TARGET_ARCH_x86)
struct pt_regs___user {
	unsigned long di, si, dx, r10, ax, orig_ax, ss;
};
#elif defined(__TARGET_ARCH_arm64)
struct user_pt_regs___user {
	__u64 regs[4];
};

struct pt_regs___user {
	struct user_pt_regs___user user_regs;
	__u64 orig_x0;
	int syscallno;
};
#endif

struct bpf_subprog_info {
	_Bool might_sleep;
};

#pragma clang attribute pop

/*
 * Reading the kernel's memory: READ(struct task_struct, task, mm, exe_file) is task->mm->exe_file.
 *
 * bpf_rdonly_cast() (6.2, a35b9af4ec2c "bpf: Add a kfunc for generic type cast") lets the verifier
 * turn such a chain into plain loads, which a fault makes read zeroes; they cost a fraction of a
 * helper's call for each link. Where the kernel has none, and where the types come from a BTF file
 * and the kernel itself has no BTF to name them by (PLAIN_LOADS=0, see build.py), the helper reads.
 */
enum special_kfunc_type {
	KF_bpf_rdonly_cast,
	KF_bpf_preempt_disable,
};

#if PLAIN_LOADS
extern void *bpf_rdonly_cast(const void *object, __u32 type_id) __ksym __weak;

#define plain_loads() bpf_core_enum_value_exists(enum special_kfunc_type, KF_bpf_rdonly_cast)
#define AS_TYPE(type, pointer) \
	((type *)bpf_rdonly_cast((const void *)(pointer), bpf_core_type_id_kernel(type)))
#define READ(type, pointer, ...)                                              \
	({                                                                    \
		__typeof__(___arrow(((type *)0), __VA_ARGS__)) __value;         \
		if (plain_loads())                                            \
			__value = ___arrow(AS_TYPE(type, pointer), __VA_ARGS__); \
		else                                                          \
			__value = BPF_CORE_READ((type *)(pointer), __VA_ARGS__); \
		__value;                                                      \
	})
#else
#define plain_loads() false
#define READ(type, pointer, ...) BPF_CORE_READ((type *)(pointer), __VA_ARGS__)
#endif

/*
 * The work of a program, during which no other task gets the CPU.
 *
 * A program at a function can be preempted where the kernel preempts itself, and from 7.0 on one at
 * a raw tracepoint, too (a46023d5616e). What it has reserved in a ring would hold up all that comes
 * after, for as long as its user wants (SCHED_IDLE, and something else to do). Before 6.15, which came
 * to know of each function whether it might sleep, no global function could be called meanwhile.
 *
 * It does not keep a program from being preempted at its end, where the kernel still runs it for nobody
 * else on that CPU, and counts that.
 */
#if PLAIN_LOADS
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

#define can_hold_the_cpu()                                                                  \
	(bpf_core_enum_value_exists(enum special_kfunc_type, KF_bpf_preempt_disable) &&     \
	 bpf_core_field_exists(struct bpf_subprog_info, might_sleep))
#define UNPREEMPTED(work)                     \
	({                                    \
		if (can_hold_the_cpu())       \
			bpf_preempt_disable(); \
		work;                         \
		if (can_hold_the_cpu())       \
			bpf_preempt_enable(); \
		0;                            \
	})
#else
#define UNPREEMPTED(work) \
	({                \
		work;     \
		0;        \
	})
#endif

/*
 * The work of a program at the perf event of a tracepoint, of which all that are there are asked. Where one
 * gives back 0, nobody else is told what happens there who has opened such an event, as perf does.
 */
#define AMONG_OTHERS(work) \
	({                 \
		work;      \
		1;         \
	})

/* The error number of a system call's result; 0 when it succeeded. A call that a signal interrupts
 * has a number of the kernel's own here, which becomes EINTR unless the call is made anew. */
static __always_inline __u32 errno_of(long result)
{
	__u32 errno = result < 0 ? -result : 0;

	return errno >= ERESTARTSYS && errno <= ERESTART_RESTARTBLOCK ? EINTR : errno;
}

/* From the uapi headers, whose full inclusion would clash with the types above. */
struct sockaddr_in {
	__u16 family;
	__be16 port;
	__u8 addr[4];
};

struct sockaddr_in6 {
	__u16 family;
	__be16 port;
	__be32 flowinfo;
	__u8 addr[16];
};

struct open_how {
	__u64 flags;
	__u64 mode;
	__u64 resolve;
};

#endif
