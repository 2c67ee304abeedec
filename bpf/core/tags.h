/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What a program or map needs, said beside it; `make gen` puts it into streamer/kernel/objects.py
 * for the loader.
 *
 * On a program:
 *   EMITS("A,B")       the kinds it reports. DOC("...") beside it says what is not observed without
 *                      it, or, without a DOC, that its kinds are not observed at all.
 *   COMPLETES("A,B")   in place of it: the kinds to whose events it adds what its DOC says
 *   HOOK("name")       programs of the same hook are ways to the same thing, best first: the first
 *                      that loads and attaches is used. Without it a program is a hook of its own.
 *   NEEDS("A,B")       used only where all of it is given, and not missed elsewhere:
 *                        x86_64, aarch64          the machine
 *                        function:NAME            a function of the running kernel (in its BTF)
 *                        no function:NAME         the lack of it
 *                        option:NAME              a setting of the configuration
 *                        interface, cgroup, rate  something to attach to: network interfaces (XDP),
 *                                                 a cgroup, a sampling rate in Hz (perf events)
 *                        functions                the same: functions of the kernel. The section of
 *                                                 the program names none that is of any meaning. At
 *                                                 tp/syscalls/sys_enter (or _exit): the tracepoints
 *                                                 of the system calls behind which they are.
 * On a map:
 *   SIZED("cpus")      an entry for each CPU that may come up
 *   SIZED("cpus,kinds")  an entry for each kind on each of them
 *   SIZED("cpus,interfaces")  an entry for each interface that it attaches to on each of them
 *   SIZED("table:NAME")  as many entries as the configuration says
 *   SIZED("cpus,table:NAME")  as many on each CPU that may come up
 *   NEEDS("...")       as on a program: not made where that is not given
 *   SHARED             made by the core object, and used by all
 *
 * OPTION(name) declares the setting for the program: 1 where it is given. A constant to the verifier,
 * so that what depends on it may need what the kernel has not.
 */
#ifndef STREAMER_TAGS_H
#define STREAMER_TAGS_H

#define EMITS(kinds) __attribute__((btf_decl_tag("emits:" kinds)))
#define COMPLETES(kinds) __attribute__((btf_decl_tag("completes:" kinds)))
#define HOOK(name) __attribute__((btf_decl_tag("hook:" name)))
#define NEEDS(what) __attribute__((btf_decl_tag("needs:" what)))
#define SIZED(by) __attribute__((btf_decl_tag("sized:" by)))
#define OPTION(name) const volatile __u64 name SEC(".rodata." #name)
#define SHARED __attribute__((btf_decl_tag("shared:core")))

#endif
