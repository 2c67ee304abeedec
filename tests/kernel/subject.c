// SPDX-License-Identifier: Apache-2.0
/*
 * A process to be observed. Environment variable SUBJECT says what it does; its arguments say
 * nothing, so that they can be anything.
 *
 *   (unset)      exit with argc
 *   group        a thread other than the leader calls exit_group(7)
 *   leaderless   the leader ends first, then a thread ends the process with 9
 *   raw          leader and thread end by themselves, with 3 and 4
 *   exec         a thread other than the leader executes SUBJECT_NEXT
 *   crowd        16 threads and the leader, all ending at once
 *   wait         wait for a signal, with two threads
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

extern char **environ;

static const char *mode;

static void *thread(void *unused)
{
	if (!strcmp(mode, "group"))
		_exit(7);
	if (!strcmp(mode, "exec")) {
		char *next = getenv("SUBJECT_NEXT");
		char *arguments[] = { "from a thread", NULL };

		unsetenv("SUBJECT");
		execve(next, arguments, environ);
		_exit(99);
	}
	if (!strcmp(mode, "crowd"))
		return NULL;
	if (!strcmp(mode, "wait"))
		pause();
	usleep(50000); /* the leader has ended by then */
	if (!strcmp(mode, "raw"))
		syscall(SYS_exit, 4);
	_exit(9);
}

static void start_thread(void)
{
	pthread_t id;

	if (pthread_create(&id, NULL, thread, NULL))
		_exit(98);
}

int main(int argc, char **argv)
{
	int i;

	(void)argv;
	mode = getenv("SUBJECT");
	if (!mode)
		return argc;
	for (i = 0; i < (strcmp(mode, "crowd") ? 1 : 16); i++)
		start_thread();
	if (!strcmp(mode, "leaderless") || !strcmp(mode, "crowd"))
		pthread_exit(NULL);
	if (!strcmp(mode, "raw"))
		syscall(SYS_exit, 3);
	pause();
	return 97;
}
