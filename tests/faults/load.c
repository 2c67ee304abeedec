// SPDX-License-Identifier: Apache-2.0
/*
 * What is offered to the agent: opens and processes, at a rate or as fast as it goes. It is linked
 * statically, so that it opens nothing but what it is told to.
 *
 *   load opens PREFIX RATE      open files that are not there, PREFIX0, PREFIX1 and so on
 *   load spawns WORD SIZE RATE  execute itself with the arguments WORD, NUMBER and SIZE bytes
 *   load bomb COUNT             processes that fork two each, until there were COUNT
 *
 * RATE is per second; 0 is as fast as it goes. Until SIGTERM (a bomb: until it is over). What was
 * done is printed as one number. With LOAD_UID that user does it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS 2000000L

extern char **environ;

static volatile sig_atomic_t ended;

static void end(int number)
{
	(void)number;
	ended = 1;
}

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

static void open_one(long number, const char *prefix, long unused)
{
	char path[128];

	(void)unused;
	snprintf(path, sizeof(path), "%s%ld", prefix, number);
	syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0);
}

static void spawn_one(long number, const char *word, long size)
{
	static char argument[65536];
	char text[24], copy[64];
	char *argv[] = { copy, text, argument, NULL };
	char *none[] = { NULL };
	pid_t pid;

	memset(argument, 'x', size);
	argument[size] = 0;
	snprintf(text, sizeof(text), "%ld", number);
	snprintf(copy, sizeof(copy), "%s", word);
	pid = vfork();
	if (pid < 0)
		fail("vfork");
	if (!pid) {
		execve("/proc/self/exe", argv, none);
		_exit(1);
	}
	while (waitpid(pid, NULL, 0) < 0)
		if (errno != EINTR)
			fail("waitpid");
}

/* At `rate` a second since the beginning, whatever was missed meanwhile: it is made up for. */
static long paced(void (*one)(long, const char *, long), const char *text, long size, long rate)
{
	long long begun = now_ns();
	long done = 0;

	while (!ended) {
		long due = rate ? (now_ns() - begun) * rate / 1000000000LL : done + 100;

		while (done < due && !ended)
			one(done++, text, size);
		if (rate) {
			struct timespec tick = { 0, TICK_NS };

			nanosleep(&tick, NULL);
		}
	}
	return done;
}

/* Each has two children and ends: so few are alive at once, as none waits for another. */
static long bomb(long most)
{
	long *left = mmap(NULL, sizeof(*left), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			  -1, 0);
	long reaped = 0;
	int child = 0, i;

	*left = most;
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	for (i = 0; i < 2; i++) {
		pid_t pid;

		if (__atomic_sub_fetch(left, 1, __ATOMIC_RELAXED) < 0)
			break;
		while ((pid = fork()) < 0)
			sched_yield();
		if (!pid) {
			child = 1;
			i = -1; /* it has two of its own */
		}
	}
	if (child)
		_exit(0);
	for (;;) {
		if (wait(NULL) > 0)
			reaped++;
		else if (errno == ECHILD)
			return reaped;
	}
}

int main(int argc, char **argv)
{
	const char *user = getenv("LOAD_UID");
	struct sigaction action = { .sa_handler = end };

	if (argc >= 3 && argv[1][0] >= '0' && argv[1][0] <= '9')
		return 0; /* one that was spawned */
	if (user) {
		uid_t uid = atoi(user);

		if (setresgid(uid, uid, uid) || setresuid(uid, uid, uid))
			fail("setresuid");
		prctl(PR_SET_DUMPABLE, 1);
	}
	sigaction(SIGTERM, &action, NULL);
	if (argc == 4 && !strcmp(argv[1], "opens"))
		printf("%ld\n", paced(open_one, argv[2], 0, atol(argv[3])));
	else if (argc == 5 && !strcmp(argv[1], "spawns"))
		printf("%ld\n", paced(spawn_one, argv[2], atol(argv[3]), atol(argv[4])));
	else if (argc == 3 && !strcmp(argv[1], "bomb"))
		printf("%ld\n", bomb(atol(argv[2])));
	else
		return 2;
	return 0;
}
