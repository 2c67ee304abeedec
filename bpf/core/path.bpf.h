/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Absolute paths of files, by walking up from the directory entry. */
#ifndef STREAMER_PATH_H
#define STREAMER_PATH_H

#include "maps.bpf.h"

#define NAME_LEN 256
#define MAX_DEPTH 64

/* Written from the end: the path is bytes[start .. PATH_LEN). The room behind PATH_LEN is never
 * part of a path; it lets the verifier see that a whole name fits at any masked offset. */
struct path_buffer {
	char bytes[PATH_LEN + NAME_LEN];
	__u32 start;
	__u16 truncated;
	__u16 nameless; /* a pipe, for example: it is in no directory and has no name */
};

/*
 * What the walk needs of a struct, by one read instead of one for each member: a read costs more
 * than the bytes it brings. The members are neighbours wherever their order is not randomised;
 * the offsets are known when the program is loaded, and the branch that does not apply goes then.
 */
#define SPAN_WORDS 3

static __always_inline bool in_span(__u32 offset, __u32 size)
{
	return offset <= SPAN_WORDS * sizeof(__u64) - size;
}

struct dentry_view {
	struct dentry *parent;
	const unsigned char *name;
	__u32 length;
};

static __always_inline void view_dentry(struct dentry_view *view, const struct dentry *dentry)
{
	const __u32 start = bpf_core_field_offset(struct dentry, d_parent);
	const __u32 name = bpf_core_field_offset(struct dentry, d_name.name) - start;
	const __u32 length = bpf_core_field_offset(struct dentry, d_name.len) - start;
	__u64 span[SPAN_WORDS];

	if (in_span(name, sizeof(view->name)) && in_span(length, sizeof(view->length))) {
		bpf_probe_read_kernel(span, sizeof(span), (const void *)dentry + start);
		view->parent = (struct dentry *)span[0];
		view->name = *(const unsigned char **)((void *)span + name);
		view->length = *(__u32 *)((void *)span + length);
		return;
	}
	view->parent = BPF_CORE_READ(dentry, d_parent);
	view->name = BPF_CORE_READ(dentry, d_name.name);
	view->length = BPF_CORE_READ(dentry, d_name.len);
}

struct mount_view {
	struct mount *parent;
	struct dentry *mountpoint;
	struct dentry *root;
};

static __always_inline void view_mount(struct mount_view *view, const struct mount *mount)
{
	const __u32 start = bpf_core_field_offset(struct mount, mnt_parent);
	const __u32 mountpoint = bpf_core_field_offset(struct mount, mnt_mountpoint) - start;
	const __u32 root = bpf_core_field_offset(struct mount, mnt.mnt_root) - start;
	__u64 span[SPAN_WORDS];

	if (in_span(mountpoint, sizeof(view->mountpoint)) && in_span(root, sizeof(view->root))) {
		bpf_probe_read_kernel(span, sizeof(span), (const void *)mount + start);
		view->parent = (struct mount *)span[0];
		view->mountpoint = *(struct dentry **)((void *)span + mountpoint);
		view->root = *(struct dentry **)((void *)span + root);
		return;
	}
	view->parent = BPF_CORE_READ(mount, mnt_parent);
	view->mountpoint = BPF_CORE_READ(mount, mnt_mountpoint);
	view->root = BPF_CORE_READ(mount, mnt.mnt_root);
}

static __always_inline void path_prepend(struct path_buffer *buffer,
					 const struct dentry_view *entry)
{
	__u32 length = entry->length & (NAME_LEN - 1);

	if (buffer->start < length + 1) {
		buffer->truncated = 1;
		return;
	}
	buffer->start -= length;
	bpf_probe_read_kernel(&buffer->bytes[buffer->start & (PATH_LEN - 1)], length, entry->name);
	buffer->start--;
	buffer->bytes[buffer->start & (PATH_LEN - 1)] = '/';
}

/* The name of what is in no directory, such as a memory file; of a root that name is a slash. */
static __always_inline void path_prepend_topmost(struct path_buffer *buffer,
						 const struct dentry_view *entry)
{
	char first = 0;

	bpf_probe_read_kernel(&first, sizeof(first), entry->name);
	if (first && first != '/')
		path_prepend(buffer, entry);
	else if (!first)
		buffer->nameless = 1;
}

/*
 * Builds the path of `path` as seen from the root of its mount namespace. A path of more than
 * MAX_DEPTH parts, or too long, loses its beginning and is marked truncated.
 */
static __always_inline void path_build(struct path_buffer *buffer, const struct path *path)
{
	struct dentry *dentry = BPF_CORE_READ(path, dentry);
	struct vfsmount *vfsmount = BPF_CORE_READ(path, mnt);
	struct mount *mount = (void *)vfsmount - bpf_core_field_offset(struct mount, mnt);
	struct dentry_view entry;
	struct mount_view on;
	int depth;

	buffer->start = PATH_LEN;
	buffer->truncated = 0;
	buffer->nameless = 0;
	view_mount(&on, mount);
	for (depth = 0; depth < MAX_DEPTH; depth++) {
		if (dentry == on.root) {
			if (on.parent == mount)
				break;
			dentry = on.mountpoint;
			mount = on.parent;
			view_mount(&on, mount);
			continue;
		}
		view_dentry(&entry, dentry);
		if (entry.parent == dentry) {
			path_prepend_topmost(buffer, &entry);
			break;
		}
		path_prepend(buffer, &entry);
		if (buffer->truncated)
			break;
		dentry = entry.parent;
	}
	if (depth == MAX_DEPTH)
		buffer->truncated = 1;
	if (buffer->start == PATH_LEN) {
		buffer->start = PATH_LEN - 1;
		buffer->bytes[PATH_LEN - 1] = '/';
	}
}

/*
 * Appends the path that was built to `data` at `position`, which must be at most `limit` (a
 * constant: PATH_LEN bytes fit there). Returns the length.
 */
static __always_inline __u32 path_append(struct path_buffer *buffer, __u8 *data, __u32 position,
					 const __u32 limit, struct event_header *header)
{
	__u32 start = buffer->start & (PATH_LEN - 1);
	__u32 length = PATH_LEN - start;

	if (position > limit || length > PATH_LEN)
		return 0;
	if (buffer->truncated)
		header->flags |= FLAG_TRUNCATED;
	if (bpf_probe_read_kernel(&data[position], length, &buffer->bytes[start]))
		return 0;
	return length;
}

static __always_inline struct file *file_of_fd(struct task_struct *task, int fd)
{
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd);
	struct file *file = NULL;

	if (fd < 0 || (__u32)fd >= BPF_CORE_READ(table, max_fds))
		return NULL;
	bpf_probe_read_kernel(&file, sizeof(file), &files[fd]);
	return file;
}

#endif
