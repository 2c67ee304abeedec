// SPDX-License-Identifier: Apache-2.0
/*
 * The program whose events are the golden records: it does one thing of every kind, always the
 * same, in its working directory. With GOLDEN in its environment it only exits, with argc.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define DEPTH 100 /* directories: more than a path is followed */
#define LONG 9000 /* characters of two bytes: more than fit into an argv or a path */

static char *leaf_environment[] = { "GOLDEN=leaf", NULL };

static void execute(const char *path, char **arguments)
{
	pid_t child = fork();

	if (!child) {
		execve(path, arguments, leaf_environment);
		_exit(99);
	}
	waitpid(child, NULL, 0);
}

/* Its characters have two bytes, so that a limit in bytes can fall within one. */
static char *long_text(const char *start)
{
	static char text[2 * LONG + 8];
	char *end = stpcpy(text, start);
	int i;

	for (i = 0; i < LONG; i++)
		end = stpcpy(end, "\u00e9");
	return text;
}

/* Of the program's own name, which becomes the name of the task. */
static void write_script(const char *directory, const char *name)
{
	const char *text = "#!./golden -x\n";
	int fd;

	if (mkdir(directory, 0755))
		exit(94);
	fd = open(name, O_CREAT | O_WRONLY, 0755);
	if (write(fd, text, strlen(text)) != (ssize_t)strlen(text) || close(fd))
		exit(95);
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

/* Bytes to itself over UDP, and some to where nobody is: 127.9.9.9, by which make.py knows them. */
static void use_udp(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int sender = socket(AF_INET, SOCK_DGRAM, 0), receiver = socket(AF_INET, SOCK_DGRAM, 0);
	char bytes[100] = {};

	if (bind(receiver, (void *)&address, length) ||
	    getsockname(receiver, (void *)&address, &length) ||
	    connect(sender, (void *)&address, length) || write(sender, bytes, 100) != 100 ||
	    read(receiver, bytes, 100) != 100)
		exit(93);
	address.sin_addr.s_addr = htonl(0x7f090909);
	address.sin_port = htons(9);
	if (sendto(receiver, bytes, 33, 0, (void *)&address, length) != 33)
		exit(92);
	close(sender);
	close(receiver);
}

#define DNS_QUESTION "\3www\5a.b\\c\4TEST\0\0\1\0\1"
#define DNS_QUERY "\1\0\0\1\0\0\0\0\0\0" DNS_QUESTION
#define DNS_RESPONSE(answers) "\x85\x80\0\1\0" answers "\0\0\0\0" DNS_QUESTION

/* Asks itself: for what is another's name, for what leads nowhere, and in vain. */
static void use_dns(void)
{
	static const char queries[3][sizeof(DNS_QUERY) + 2] = { "\0\1" DNS_QUERY, "\0\2" DNS_QUERY,
								"\0\3" DNS_QUERY };
	static const char alias[] = "\0\1" DNS_RESPONSE("\2") "\xc0\x0c\0\5\0\1\0\0\0\x3c\0\5\2xy"
				    "\xc0\x16\xc0\x2c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1";
	static const char loop[] = "\0\2" DNS_RESPONSE("\1") "\xc0\x20\0\1\0\1\0\0\0\x3c\0\4\1\2\3\4";
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(53),
				       .sin_addr.s_addr = htonl(0x7f080808) };
	struct sockaddr_in from;
	socklen_t length = sizeof(address);
	int client = socket(AF_INET, SOCK_DGRAM, 0), server = socket(AF_INET, SOCK_DGRAM, 0);
	char bytes[512];
	int i;

	if (bind(server, (void *)&address, length) || connect(client, (void *)&address, length))
		exit(90);
	for (i = 0; i < 3; i++) {
		length = sizeof(from);
		if (write(client, queries[i], sizeof(DNS_QUERY) + 1) != sizeof(DNS_QUERY) + 1 ||
		    recvfrom(server, bytes, sizeof(bytes), 0, (void *)&from, &length) < 0)
			exit(89);
		if (i == 2)
			break;
		if (sendto(server, i ? loop : alias, (i ? sizeof(loop) : sizeof(alias)) - 1, 0,
			   (void *)&from, length) < 0 ||
		    read(client, bytes, sizeof(bytes)) < 0)
			exit(88);
	}
	close(client);
	close(server);
}

/* Connects to who drops every packet, until the SYN has been sent again. */
static void connect_in_vain(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sock_filter nothing = BPF_STMT(BPF_RET | BPF_K, 0);
	struct sock_fprog filter = { .len = 1, .filter = &nothing };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	int client = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

	if (setsockopt(listener, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof(filter)) ||
	    listen(listener, 1) || getsockname(listener, (void *)&address, &length))
		exit(91);
	connect(client, (void *)&address, length);
	usleep(1500000);
	close(client);
	close(listener);
}

int main(int argc, char **argv)
{
	struct sockaddr_in v4 = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };
	struct timespec moment = { .tv_nsec = 2000000 };

	(void)argv;
	if (getenv("GOLDEN"))
		return argc;
	execute("./golden", (char *[]){ "golden", "plain", NULL });
	execute("./golden", (char *[]){ "golden", "", "two words", "pr\u00fcfung \u2603",
					"bad \xff byte", NULL });
	write_script("\u2603", "\u2603/golden");
	execute("./\u2603/golden", (char *[]){ "replaced", "argument", NULL });
	execute("./golden", (char *[]){ "golden", long_text("xy"), NULL });
	end_by_signal();
	open_and_close("made", O_CREAT | O_WRONLY | O_TRUNC, 0640);
	open_and_close("missing", O_RDONLY, 0);
	open_and_close("bad \xff byte", O_RDWR | O_CLOEXEC, 0);
	open_and_close(long_text("/"), O_RDONLY, 0);
	open_and_close(long_text("/x"), O_RDONLY, 0);
	use_tcp(AF_INET, (void *)&v4, sizeof(v4));
	use_tcp(AF_INET6, (void *)&v6, sizeof(v6));
	use_udp();
	use_dns();
	connect_in_vain();
	syscall(SYS_nanosleep, &moment, NULL);
	go_down();
	open_and_close("missing too", O_RDONLY, 0);
	return 0;
}
