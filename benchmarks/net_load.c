// SPDX-License-Identifier: Apache-2.0
/*
 * What the network is used for in the benchmark of its sensor: reads `NAME COUNT` lines, does it so
 * often over loopback, and answers with the nanoseconds of CPU time that one took: others run, too.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct sockaddr_in at = { .sin_family = AF_INET };
static int sender, receiver, stream[2];

static void prepare(void)
{
	struct sockaddr_in listening = { .sin_family = AF_INET };
	socklen_t length = sizeof(at);
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	at.sin_addr.s_addr = listening.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	sender = socket(AF_INET, SOCK_DGRAM, 0);
	receiver = socket(AF_INET, SOCK_DGRAM, 0);
	stream[0] = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(receiver, (void *)&at, length) || getsockname(receiver, (void *)&at, &length) ||
	    bind(listener, (void *)&listening, length) || listen(listener, 1) ||
	    getsockname(listener, (void *)&listening, &length) ||
	    connect(stream[0], (void *)&listening, length))
		exit(1);
	stream[1] = accept(listener, NULL, NULL);
}

static int udp(void)
{
	char data[100] = {};

	return sendto(sender, data, sizeof(data), 0, (void *)&at, sizeof(at)) != sizeof(data) ||
	       recv(receiver, data, sizeof(data), 0) != sizeof(data);
}

static int tcp(void)
{
	char data[100] = {};

	return send(stream[0], data, sizeof(data), 0) != sizeof(data) ||
	       recv(stream[1], data, sizeof(data), 0) != sizeof(data);
}

static int drop(void)
{
	struct sockaddr_in nobody = at;

	nobody.sin_port = htons(9);
	return sendto(sender, "", 0, 0, (void *)&nobody, sizeof(nobody)) != 0;
}

static int bound(void)
{
	struct sockaddr_in any = { .sin_family = AF_INET };
	int made = socket(AF_INET, SOCK_DGRAM, 0);
	int failed = bind(made, (void *)&any, sizeof(any));

	return close(made) || failed;
}

static int closed(void)
{
	int made = socket(AF_INET, SOCK_DGRAM, 0);
	char data[8];

	return sendto(made, "", 1, 0, (void *)&at, sizeof(at)) != 1 ||
	       recv(receiver, data, sizeof(data), 0) != 1 || close(made);
}

#define QUESTION "\3www\7example\3org\0\0\1\0\1"
#define RECORD "\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1"

/* A query and its response, one after the other, between two sockets. */
static int dns(void)
{
	static char query[] = "\0\0\1\0\0\1\0\0\0\0\0\0" QUESTION;
	static char response[] = "\0\0\x81\x80\0\1\0\1\0\0\0\0" QUESTION RECORD;
	static int client = -1, server;
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(53) }, from;
	socklen_t length = sizeof(from);
	char data[512];

	here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (client < 0) {
		client = socket(AF_INET, SOCK_DGRAM, 0);
		server = socket(AF_INET, SOCK_DGRAM, 0);
		if (bind(server, (void *)&here, sizeof(here)) ||
		    connect(client, (void *)&here, sizeof(here)))
			return 1;
	}
	if (!++query[1])
		++query[0];
	memcpy(response, query, 2);
	return send(client, query, sizeof(query) - 1, 0) != sizeof(query) - 1 ||
	       recvfrom(server, data, sizeof(data), 0, (void *)&from, &length) < 0 ||
	       sendto(server, response, sizeof(response) - 1, 0, (void *)&from, length) < 0 ||
	       recv(client, data, sizeof(data), 0) != sizeof(response) - 1;
}

static const struct {
	const char *name;
	int (*once)(void);
} loads[] = { { "udp", udp }, { "tcp", tcp }, { "drop", drop }, { "bind", bound }, { "close", closed },
	    { "dns", dns } };

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

int main(void)
{
	char name[16];
	long count, i;
	size_t which;
	double begun;

	prepare();
	while (scanf("%15s %ld", name, &count) == 2) {
		for (which = 0; which < sizeof(loads) / sizeof(*loads); which++)
			if (!strcmp(name, loads[which].name))
				break;
		if (which == sizeof(loads) / sizeof(*loads))
			return 2;
		begun = now();
		for (i = 0; i < count; i++)
			if (loads[which].once())
				return 3;
		printf("%.1f\n", (now() - begun) / count);
		fflush(stdout);
	}
	return 0;
}
