// SPDX-License-Identifier: Apache-2.0
/*
 * What observers are measured on: a program that does one thing so many times, as a user and in a
 * cgroup of its own, so that they can be told to record it alone.
 *
 *   host_load CGROUP UID exec COUNT        run this program, which then returns at once, and wait
 *   host_load CGROUP UID open COUNT PATH   open and close PATH
 *   host_load CGROUP UID connect COUNT     connect, accept, close both, over loopback in a network
 *                                          namespace of its own
 *   host_load CGROUP UID getppid COUNT     a system call that nobody observes
 *
 * It says `ready`, does it after a line on its standard input, and says `done` (of getppid: the
 * nanoseconds of one call). It ends with its input, so that its own end is not in the measurement.
 * Started as root; linked statically, so that exec opens no libraries.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char EXECUTED[] = "nothing";

static void fail(const char *what)
{
	fprintf(stderr, "host_load: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void say(const char *word)
{
	if (puts(word) == EOF || fflush(stdout) == EOF)
		fail("standard output");
}

/* Waits for a line, or for the end of the input. */
static void wait_for_line(void)
{
	char line[16];

	if (!fgets(line, sizeof(line), stdin) && ferror(stdin))
		fail("standard input");
}

static void execs(long count, char *self)
{
	char *arguments[] = {self, (char *)EXECUTED, "-l", "/usr/bin", NULL};
	char *environment[] = {NULL};
	int status;
	pid_t pid;

	while (count--) {
		errno = posix_spawn(&pid, self, NULL, NULL, arguments, environment);
		if (errno)
			fail("posix_spawn");
		if (waitpid(pid, &status, 0) != pid)
			fail("waitpid");
		if (status) {
			errno = ECHILD;
			fail("what was executed");
		}
	}
}

static void opens(long count, const char *path)
{
	while (count--) {
		int fd = openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			fail(path);
		if (close(fd))
			fail("close");
	}
}

/* Loopback is down in a new network namespace. */
static void isolate_network(void)
{
	struct ifreq loopback = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd;

	if (unshare(CLONE_NEWNET))
		fail("unshare");
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &loopback))
		fail("loopback");
	if (close(fd))
		fail("close");
}

static int listen_at(struct sockaddr_in *address)
{
	socklen_t size = sizeof(*address);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)address, size) || listen(fd, 16) ||
	    getsockname(fd, (struct sockaddr *)address, &size))
		fail("listen");
	return fd;
}

static void connections(long count, int listener, const struct sockaddr_in *address)
{
	while (count--) {
		int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), server;

		if (client < 0 || connect(client, (const struct sockaddr *)address, sizeof(*address)))
			fail("connect");
		server = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (server < 0)
			fail("accept4");
		if (close(client) || close(server))
			fail("close");
	}
}

static double own_ns(void)
{
	struct timespec now;

	if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now))
		fail("clock_gettime");
	return now.tv_sec * 1e9 + now.tv_nsec;
}

/* Nanoseconds of one call, in the fastest of some parts: what disturbs it only makes it slower. */
static double unrelated_calls(long count)
{
	enum { PARTS = 20 };
	double best = 0;

	for (int part = 0; part < PARTS; part++) {
		double start = own_ns(), each;

		for (long i = 0; i < count / PARTS; i++)
			syscall(SYS_getppid);
		each = (own_ns() - start) / (count / PARTS);
		if (part == 0 || each < best)
			best = each;
	}
	return best;
}

static void work(char *self, const char *what, long count, const char *path)
{
	struct sockaddr_in address = {.sin_family = AF_INET,
				      .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int listener = strcmp(what, "connect") ? -1 : listen_at(&address);

	say("ready");
	wait_for_line();
	if (!strcmp(what, "getppid")) {
		printf("%.3f\n", unrelated_calls(count));
		fflush(stdout);
	} else {
		if (!strcmp(what, "exec"))
			execs(count, self);
		else if (!strcmp(what, "open"))
			opens(count, path);
		else
			connections(count, listener, &address);
		say("done");
	}
	wait_for_line();
}

/* Other processes would slow the load down, and not by the same while an observer runs beside it. */
static void keep_others_away(void)
{
	struct sched_param lowest = {.sched_priority = sched_get_priority_min(SCHED_FIFO)};

	/* A cgroup may have no share of real time; a quiet machine does not need it. */
	if (sched_setscheduler(0, SCHED_FIFO, &lowest) && errno != EPERM)
		fail("sched_setscheduler");
}

static void enter_cgroup(const char *directory)
{
	int at = open(directory, O_DIRECTORY | O_CLOEXEC), fd;

	if (at < 0)
		fail(directory);
	fd = openat(at, "cgroup.procs", O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "0", 1) != 1)
		fail("cgroup.procs");
	if (close(fd) || close(at))
		fail("close");
}

static void become(uid_t uid)
{
	if (setgroups(0, NULL) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid))
		fail("changing the user");
}

static int known(int argc, char **argv)
{
	if (argc == 6)
		return !strcmp(argv[3], "open");
	return argc == 5 && (!strcmp(argv[3], "exec") || !strcmp(argv[3], "connect") ||
			     !strcmp(argv[3], "getppid"));
}

int main(int argc, char **argv)
{
	int status;
	pid_t pid;

	if (argc > 1 && !strcmp(argv[1], EXECUTED))
		return 0;
	if (!known(argc, argv)) {
		fputs("usage: host_load CGROUP UID exec|open|connect|getppid COUNT [PATH]\n", stderr);
		return 2;
	}
	enter_cgroup(argv[1]);
	keep_others_away();
	if (!strcmp(argv[3], "connect"))
		isolate_network();
	become(strtoul(argv[2], NULL, 10));
	/* The kernel decides at fork, by the user, whether audit looks at a task at all. */
	pid = fork();
	if (pid < 0)
		fail("fork");
	if (pid == 0) {
		work(argv[0], argv[3], strtol(argv[4], NULL, 10), argv[5]);
		return 0;
	}
	if (waitpid(pid, &status, 0) != pid)
		fail("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
