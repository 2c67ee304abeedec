/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What a program or map needs, said beside it; `make gen` puts it into streamer/kernel/objects.py
 * for the loader.
 *
 * On a program:
 *   EMITS("A,B")       the kinds it reports. DOC("...") beside it says what is not observed without
 *                      it, or, without a DOC, that its kinds are not observed at all.
 *   COMPLETES("A,B")   in place of it: the kinds to whose events it adds what its DOC says
 *   KEEPS("A,B")       beside either: kinds of another sensor, whose owners it keeps for that one in
 *                      maps that are COMMON. It is loaded for them too
 *   LACKS("...")       what is not observed where this way to its hook is the one that is used
 *   HOOK("name")       programs of the same hook are ways to the same thing, best first: the first
 *                      that loads and attaches is used. Without it a program is a hook of its own.
 *   NEEDS("A,B")       used only where all of it is given, and not missed elsewhere:
 *                        x86_64, aarch64          the machine
 *                        function:NAME            a function of the running kernel (in its BTF)
 *                        no function:NAME         the lack of it
 *                        variable:NAME            a variable of each CPU's (in the kernel's own BTF)
 *                        own btf                  that the kernel has BTF of its own, and no file
 *                                                 stands in for it
 *                        fentry, no fentry        that programs at functions (fentry, fexit) load,
 *                                                 or that they do not
 *                        option:NAME              a setting of the configuration
 *                        option:kind.NAME         that this kind is wanted
 *                        interface, cgroup, rate  something to attach to: network interfaces (XDP),
 *                                                 a cgroup, a sampling rate in Hz (perf events)
 *                        functions                the same: functions of the kernel. The section of
 *                                                 the program names none that is of any meaning. At
 *                                                 tp/syscalls/sys_enter (or _exit): the tracepoints
 *                                                 of the system calls behind which they are.
 *   A program whose section is raw_tp/streamer_every_second is attached nowhere: the agent runs it
 *   before the others of its object are attached, and then every second.
 *   RUN                never attached: the agent runs it from time to time, in the helper
 * On a map:
 *   SIZED("cpus")      an entry for each CPU that may come up
 *   SIZED("cpus,kinds")  an entry for each kind on each of them
 *   SIZED("cpus,slots")  PERF_SLOTS entries for each of them
 *   SIZED("cpus,interfaces")  an entry for each interface that it attaches to on each of them
 *   SIZED("bulk_rings")  its own number, for each ring buffer for bulk
 *   SIZED("table:NAME")  as many entries as the configuration says
 *   SIZED("cpus,table:NAME")  as many on each CPU that may come up
 *   NEEDS("...")       as on a program: not made where that is not given
 *   SHARED             made by the core object, and used by all
 *   COMMON             made with the first sensor that is loaded of those that have it, and used by all
 *                      of them
 *   NAMED("ENUM")      an array of texts, into which the loader puts the names that the running kernel
 *                      has for the numbers of that enum, without the enum's own name before them
 *
 * OPTION(name) declares the setting for the program: 1 where it is given. A constant to the verifier,
 * so that what depends on it may need what the kernel has not.
 */
#ifndef STREAMER_TAGS_H
#define STREAMER_TAGS_H

#define EMITS(kinds) __attribute__((btf_decl_tag("emits:" kinds)))
#define COMPLETES(kinds) __attribute__((btf_decl_tag("completes:" kinds)))
#define KEEPS(kinds) __attribute__((btf_decl_tag("keeps:" kinds)))
#define LACKS(what) __attribute__((btf_decl_tag("lacks:" what)))
#define HOOK(name) __attribute__((btf_decl_tag("hook:" name)))
#define NEEDS(what) __attribute__((btf_decl_tag("needs:" what)))
#define SIZED(by) __attribute__((btf_decl_tag("sized:" by)))
#define OPTION(name) const volatile __u64 name SEC(".rodata." #name)
#define RUN __attribute__((btf_decl_tag("run:")))
#define SHARED __attribute__((btf_decl_tag("shared:core")))
#define COMMON __attribute__((btf_decl_tag("shared:sensors")))
#define NAMED(name) __attribute__((btf_decl_tag("named:" name)))

#endif
