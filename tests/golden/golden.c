// SPDX-License-Identifier: Apache-2.0
/*
 * The program whose events are the golden records: it does one thing of every kind, always the
 * same, in its working directory. With GOLDEN in its environment it only exits, with argc.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEPTH 70

static char *leaf_environment[] = { "GOLDEN=leaf", NULL };

static void execute(char **arguments)
{
	pid_t child = fork();

	if (!child) {
		execve("./golden", arguments, leaf_environment);
		_exit(99);
	}
	waitpid(child, NULL, 0);
}

static void end_by_signal(void)
{
	pid_t child = fork();

	if (!child)
		for (;;)
			pause();
	kill(child, SIGTERM);
	waitpid(child, NULL, 0);
}

static void open_and_close(const char *name, int flags, mode_t mode)
{
	int fd = open(name, flags, mode);

	if (fd >= 0)
		close(fd);
}

static void go_down(void)
{
	int depth;

	for (depth = 0; depth < DEPTH; depth++) {
		mkdir("d", 0755);
		if (chdir("d"))
			exit(98);
	}
}

static void transfer(int client, int server)
{
	char bytes[1000] = {};

	if (write(client, bytes, 1000) != 1000 || read(server, bytes, 1000) != 1000 ||
	    write(server, bytes, 77) != 77 || read(client, bytes, 77) != 77)
		exit(97);
}

/* Listens, connects to itself, and is refused once nobody listens any more. */
static void use_tcp(int family, struct sockaddr *address, socklen_t length)
{
	int listener = socket(family, SOCK_STREAM, 0), client = socket(family, SOCK_STREAM, 0);
	int late = socket(family, SOCK_STREAM, 0), server;

	if (bind(listener, address, length) || listen(listener, 1) ||
	    getsockname(listener, address, &length) || connect(client, address, length))
		exit(96);
	server = accept(listener, NULL, NULL);
	transfer(client, server);
	close(client);
	close(server);
	close(listener);
	connect(late, address, length);
	close(late);
}

int main(int argc, char **argv)
{
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };

	(void)argv;
	if (getenv("GOLDEN"))
		return argc;
	execute((char *[]){ "golden", "plain", NULL });
	execute((char *[]){ "golden", "", "two words", "pr\u00fcfung \u2603", "bad \xff byte", NULL });
	end_by_signal();
	open_and_close("made", O_CREAT | O_WRONLY | O_TRUNC, 0640);
	open_and_close("missing", O_RDONLY, 0);
	open_and_close("bad \xff byte", O_RDWR | O_CLOEXEC, 0);
	use_tcp(AF_INET, (void *)&v4, sizeof(v4));
	use_tcp(AF_INET6, (void *)&v6, sizeof(v6));
	go_down();
	open_and_close("missing too", O_RDONLY, 0);
	return 0;
}
