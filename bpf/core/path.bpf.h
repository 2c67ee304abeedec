/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Absolute paths of files, by walking up from the directory entry.
 *
 * A file that includes this says how many buffers it needs on each CPU (PATH_SLOTS): one for each
 * program, because a program can be interrupted by another one, but not by itself.
 */
#ifndef STREAMER_PATH_H
#define STREAMER_PATH_H

#include "filter.bpf.h"

#define NAME_LEN 256
#define MEMFD "memfd:" /* how the names of memory files begin */
#define MOST_PARTS 80 /* directories on the way up */
#define MOST_STEPS 96 /* and mounts that they are in; a multiple of: */
#define STEPS_AT_ONCE 4

/* Written from the end: the path is bytes[start .. PATH_LEN). The room behind PATH_LEN is never
 * part of a path; it lets the verifier see that a whole name fits at any masked offset. */
struct path_buffer {
	char bytes[PATH_LEN + NAME_LEN];
	/* How far the walk has come, as addresses. */
	__u64 dentry;     /* of the struct dentry whose name comes next */
	__u64 mount;      /* of the struct mount that it is in, */
	__u64 parent;     /* of that mount's parent, */
	__u64 mountpoint; /* of the dentry there that it is mounted on, */
	__u64 root;       /* and of its topmost dentry */
	__u32 start;
	__u32 mntns;    /* inode number of the mount namespace; 0: in none */
	__u8 truncated;
	__u8 nameless;  /* a pipe, for example: it is in no directory and has no name */
	__u8 memfd;
	__u8 parts;
	__u8 pad[4];
};

struct path_buffers {
	struct path_buffer of[PATH_SLOTS];
};

/* Too large for the stack. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct path_buffers);
} path_buffers SEC(".maps") SIZED("cpus");

static __always_inline struct path_buffer *path_buffer(__u32 slot)
{
	__u32 cpu = bpf_get_smp_processor_id();
	struct path_buffers *mine = bpf_map_lookup_elem(&path_buffers, &cpu);

	if (!mine || slot >= PATH_SLOTS)
		return NULL;
	return &mine->of[slot];
}

struct dentry_view {
	struct dentry *parent;
	const unsigned char *name;
	__u32 length;
};

/*
 * Where loads are not plain: what the walk needs of a struct, by one read instead of one for each
 * member. The members are neighbours wherever their order is not randomised; the offsets are known
 * when the program is loaded, and the branch that does not apply goes then.
 */
#define SPAN_WORDS 3

static __always_inline bool in_span(__u32 offset, __u32 size)
{
	return offset <= SPAN_WORDS * sizeof(__u64) - size;
}

static __always_inline void view_dentry(struct dentry_view *view, const struct dentry *dentry)
{
	const __u32 start = bpf_core_field_offset(struct dentry, d_parent);
	const __u32 name = bpf_core_field_offset(struct dentry, d_name.name) - start;
	const __u32 length = bpf_core_field_offset(struct dentry, d_name.len) - start;
	__u64 span[SPAN_WORDS];

	if (!plain_loads() && in_span(name, sizeof(view->name)) &&
	    in_span(length, sizeof(view->length))) {
		if (bpf_probe_read_kernel(span, sizeof(span), (const void *)dentry + start))
			count_fault(FAULT_UNREADABLE); /* which clears what it could not read */
		view->parent = (struct dentry *)span[0];
		view->name = *(const unsigned char **)((void *)span + name);
		view->length = *(__u32 *)((void *)span + length);
		return;
	}
	view->parent = READ(struct dentry, dentry, d_parent);
	view->name = READ(struct dentry, dentry, d_name.name);
	view->length = READ(struct dentry, dentry, d_name.len);
}

/* A struct mount is private to the kernel. Where its types come from headers it has been measured, or is
 * not known: then a path begins at the root of its mount, and says that it lacks its beginning. */
#define mounts_known() bpf_core_type_exists(struct mount)

/* Goes on in another mount, from wherever `dentry` is. */
static __always_inline void enter_mount(struct path_buffer *buffer, struct mount *mount)
{
	const __u32 start = bpf_core_field_offset(struct mount, mnt_parent);
	const __u32 mountpoint = bpf_core_field_offset(struct mount, mnt_mountpoint) - start;
	const __u32 root = bpf_core_field_offset(struct mount, mnt.mnt_root) - start;
	__u64 span[SPAN_WORDS];

	buffer->mount = (__u64)mount;
	if (!mounts_known()) { /* and this is the struct vfsmount in it */
		buffer->parent = buffer->mount;
		buffer->root = (__u64)READ(struct vfsmount, mount, mnt_root);
		return;
	}
	if (!plain_loads() && in_span(mountpoint, sizeof(__u64)) && in_span(root, sizeof(__u64))) {
		if (bpf_probe_read_kernel(span, sizeof(span), (const void *)mount + start))
			count_fault(FAULT_UNREADABLE);
		buffer->parent = span[0];
		buffer->mountpoint = *(__u64 *)((void *)span + mountpoint);
		buffer->root = *(__u64 *)((void *)span + root);
		return;
	}
	buffer->parent = (__u64)READ(struct mount, mount, mnt_parent);
	buffer->mountpoint = (__u64)READ(struct mount, mount, mnt_mountpoint);
	buffer->root = (__u64)READ(struct mount, mount, mnt.mnt_root);
}

/* The mount namespace that a mount is in: the kernel's own have an error number in its place, and
 * detached ones none, or one that is not anybody's: without a number, or, from 6.18 on, with this. */
#define MNT_NS_ANON_INO 0xeffffff7

static __always_inline __u32 mntns_of_mount(const struct mount *mount)
{
	struct mnt_namespace *ns;
	__u32 inum;

	if (!mounts_known())
		return 0;
	ns = READ(struct mount, mount, mnt_ns);
	if (!ns || (unsigned long)ns >= (unsigned long)-MAX_ERRNO)
		return 0;
	inum = READ(struct mnt_namespace, ns, ns.inum);
	return inum == MNT_NS_ANON_INO ? 0 : inum;
}

static __always_inline void path_prepend(struct path_buffer *buffer,
					 const struct dentry_view *entry)
{
	__u32 length = entry->length & (NAME_LEN - 1);

	/* Longer names are FUSE's alone. */
	if (entry->length >= NAME_LEN || buffer->start < length + 1) {
		buffer->truncated = 1;
		return;
	}
	buffer->start -= length;
	if (bpf_probe_read_kernel(&buffer->bytes[buffer->start & (PATH_LEN - 1)], length,
				  entry->name)) {
		buffer->truncated = 1;
		count_fault(FAULT_UNREADABLE);
	}
	buffer->start--;
	buffer->bytes[buffer->start & (PATH_LEN - 1)] = '/';
}

/*
 * Of what is at the top, but of no mount: a memory file has a name; a pipe has none, nor has a file of
 * /proc/PID/ns/, whose name is a slash. What is below it has been moved out of its mount.
 */
static __always_inline void path_prepend_topmost(struct path_buffer *buffer,
						 const struct dentry_view *entry)
{
	char name[sizeof(MEMFD)] = {};
	bool memfd = true;
	int i;

	if (bpf_probe_read_kernel_str(name, sizeof(name), entry->name) < 0)
		count_fault(FAULT_UNREADABLE);
	if (buffer->start != PATH_LEN) {
		buffer->truncated = 1;
		return;
	}
	if (!name[0] || name[0] == '/') {
		buffer->nameless = 1;
		return;
	}
#pragma unroll
	for (i = 0; i < (int)sizeof(MEMFD) - 1; i++)
		memfd &= name[i] == MEMFD[i];
	buffer->memfd = memfd;
	path_prepend(buffer, entry);
}

/* One step up; false when the path is whole or can grow no more. */
static __always_inline bool step_up(struct path_buffer *buffer)
{
	struct dentry_view entry;

	if (buffer->dentry == buffer->root) {
		if (buffer->parent == buffer->mount)
			return false;
		buffer->dentry = buffer->mountpoint;
		enter_mount(buffer, (struct mount *)buffer->parent);
		return true;
	}
	view_dentry(&entry, (struct dentry *)buffer->dentry);
	if ((__u64)entry.parent == buffer->dentry) {
		path_prepend_topmost(buffer, &entry);
		return false;
	}
	if (buffer->parts++ == MOST_PARTS)
		buffer->truncated = 1;
	else
		path_prepend(buffer, &entry);
	buffer->dentry = (__u64)entry.parent;
	return !buffer->truncated;
}

/* Some steps up, in the buffer of a slot: 1, or 0 when there are no more. Not static, so it is
 * verified once, and not in each turn of a loop; what it leaves for the next turn is in the buffer. */
__noinline int path_climb(__u32 slot)
{
	struct path_buffer *buffer = path_buffer(slot);
	int i;

	if (!buffer)
		return 0;
#pragma unroll
	for (i = 0; i < STEPS_AT_ONCE; i++) {
		if (!step_up(buffer))
			return 0;
	}
	return 1;
}

/*
 * Builds, in the buffer of a slot, the path from `dentry` in it, as seen from the root of its mount
 * namespace. One of more than MOST_PARTS parts, or too long, loses its beginning and is marked
 * truncated.
 */
__noinline int path_walk(__u32 slot)
{
	struct path_buffer *buffer = path_buffer(slot);
	int step;

	if (!buffer)
		return 0;
	for (step = 0; step < MOST_STEPS; step += STEPS_AT_ONCE) {
		if (!path_climb(slot))
			break;
	}
	if (step == MOST_STEPS &&
	    (buffer->dentry != buffer->root || buffer->parent != buffer->mount))
		buffer->truncated = 1;
	buffer->mntns = mntns_of_mount((struct mount *)buffer->mount);
	if (buffer->start == PATH_LEN) {
		buffer->start = PATH_LEN - 1;
		buffer->bytes[PATH_LEN - 1] = '/';
	}
	return 0;
}

/* Builds the path of a file, cwd or root in the buffer of a slot; NULL if there is none. */
static __always_inline struct path_buffer *path_build(__u32 slot, struct dentry *dentry,
						      struct vfsmount *vfsmount)
{
	struct path_buffer *buffer = path_buffer(slot);

	if (!buffer || !dentry)
		return NULL;
	buffer->start = PATH_LEN;
	buffer->truncated = buffer->nameless = buffer->memfd = buffer->parts = 0;
	buffer->dentry = (__u64)dentry;
	buffer->mount = (__u64)vfsmount; /* once in memory, it is a number to the verifier */
	if (mounts_known())
		buffer->mount -= bpf_core_field_offset(struct mount, mnt);
	enter_mount(buffer, (struct mount *)buffer->mount);
	path_walk(slot);
	if (!mounts_known())
		buffer->truncated = 1;
	return buffer;
}

static __always_inline struct path_buffer *path_of_file(__u32 slot, struct file *file)
{
	return path_build(slot, READ(struct file, file, f_path.dentry),
			  READ(struct file, file, f_path.mnt));
}

/*
 * Where a string goes in `data`: at `position`, which must be at most `limit` (a constant); else NULL.
 * The compiler is kept from comparing one copy of the position and using another: kernels before 6.2
 * would not see that they are the same. A pointer, unlike a number, keeps its bounds on the stack.
 */
static __always_inline __u8 *place(__u8 *data, __u32 position, const __u32 limit)
{
	asm volatile("" : "+r"(position));
	if (position > limit)
		return NULL;
	asm volatile("" : "+r"(position));
	return data + position;
}

/*
 * Appends the path that was built to `data` at `position`, which must be at most `limit` (a
 * constant: PATH_LEN bytes fit there). Returns the length.
 */
static __always_inline __u32 path_append(struct path_buffer *buffer, __u8 *data, __u32 position,
					 const __u32 limit)
{
	__u8 *to = place(data, position, limit);
	__u32 start = buffer->start & (PATH_LEN - 1);
	__u32 length = PATH_LEN - start;

	if (!to || length > PATH_LEN)
		return 0;
	if (bpf_probe_read_kernel(to, length, &buffer->bytes[start]))
		return 0;
	return length;
}

#endif
