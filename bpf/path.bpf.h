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

static __always_inline void path_prepend(struct path_buffer *buffer, struct dentry *dentry)
{
	struct qstr name;
	__u32 length;

	bpf_core_read(&name.name, sizeof(name.name), &dentry->d_name.name);
	length = BPF_CORE_READ(dentry, d_name.len);
	length &= NAME_LEN - 1;
	if (buffer->start < length + 1) {
		buffer->truncated = 1;
		return;
	}
	buffer->start -= length;
	bpf_probe_read_kernel(&buffer->bytes[buffer->start & (PATH_LEN - 1)], length, name.name);
	buffer->start--;
	buffer->bytes[buffer->start & (PATH_LEN - 1)] = '/';
}

/* The name of what is in no directory, such as a memory file; of a root that name is a slash. */
static __always_inline void path_prepend_topmost(struct path_buffer *buffer, struct dentry *dentry)
{
	const unsigned char *name = BPF_CORE_READ(dentry, d_name.name);
	char first = 0;

	bpf_probe_read_kernel(&first, sizeof(first), name);
	if (first && first != '/')
		path_prepend(buffer, dentry);
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
	struct dentry *mnt_root = BPF_CORE_READ(vfsmount, mnt_root);
	struct dentry *parent;
	struct mount *above;
	int depth;

	buffer->start = PATH_LEN;
	buffer->truncated = 0;
	buffer->nameless = 0;
	for (depth = 0; depth < MAX_DEPTH; depth++) {
		if (dentry == mnt_root) {
			above = BPF_CORE_READ(mount, mnt_parent);
			if (above == mount)
				break;
			dentry = BPF_CORE_READ(mount, mnt_mountpoint);
			mount = above;
			mnt_root = BPF_CORE_READ(mount, mnt.mnt_root);
			continue;
		}
		parent = BPF_CORE_READ(dentry, d_parent);
		if (parent == dentry) {
			path_prepend_topmost(buffer, dentry);
			break;
		}
		path_prepend(buffer, dentry);
		if (buffer->truncated)
			break;
		dentry = parent;
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
