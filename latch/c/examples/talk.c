/*
 * talk: standard input and output over a TCP connection that is latched to an IPsec peer.
 *
 *     cc -o talk talk.c $(pkg-config --cflags --libs latchkey)
 *     talk PEER ADDRESS PORT          connects; PEER is an identity such as db.example
 *     talk -l PEER ADDRESS PORT       waits for one connection
 *
 * LATCH_SOCKET in the environment is the daemon's latch socket, if it is not the usual one.
 */
#include <arpa/inet.h>
#include <latchkey.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Ends the program with what the library says. */
static void must(int status, const char *what)
{
    if (status == LATCHKEY_OK)
        return;
    fprintf(stderr, "%s: %s: %s\n", what, latchkey_status_name(status), latchkey_error());
    exit(1);
}

static void must_not_be_negative(int result, const char *what)
{
    if (result >= 0)
        return;
    perror(what);
    exit(1);
}

static void tell(latchkey_latch latch)
{
    char peer[512], suite[128];
    unsigned char binding[64];
    size_t length;

    must(latchkey_get(latch, LATCHKEY_PEER_ID, peer, sizeof(peer), &length), "peer");
    must(latchkey_get(latch, LATCHKEY_SUITE, suite, sizeof(suite), &length), "suite");
    fprintf(stderr, "latched to %s, %s\n", peer, suite);
    if (latchkey_channel_binding(latch, NULL, binding, sizeof(binding), &length) == LATCHKEY_OK) {
        fprintf(stderr, "channel binding ");
        for (size_t i = 0; i < length; i++)
            fprintf(stderr, "%02x", binding[i]);
        fprintf(stderr, "\n");
    }
}

/* Copies both ways until the peer has had enough, or the latch breaks. */
static int talk(latchkey_client client, int connection)
{
    struct pollfd polled[3] = {
        {.fd = connection, .events = POLLIN}, {.fd = -1, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    char buffer[4096];
    struct latchkey_change change;

    must(latchkey_descriptor(client, &polled[1].fd), "descriptor");
    for (;;) {
        must_not_be_negative(poll(polled, 3, -1), "poll");
        /* The reason first: the reset of the connection follows from it. */
        if (polled[1].revents) {
            int status = latchkey_next(client, 0, &change);
            if (status == LATCHKEY_OK) {
                fprintf(stderr, "latch %llu: state %d: %s\n", (unsigned long long)change.number, change.state,
                        change.reason);
                if (change.state != LATCHKEY_ESTABLISHED)
                    return 2;
            } else if (status != LATCHKEY_TIMEOUT) {
                must(status, "next");
            }
        }
        if (polled[0].revents) {
            ssize_t length = read(connection, buffer, sizeof(buffer));
            if (length < 0) {
                perror("read");
                if (latchkey_next(client, 1000, &change) == LATCHKEY_OK)
                    fprintf(stderr, "latch %llu: state %d: %s\n", (unsigned long long)change.number, change.state,
                            change.reason);
                return 2;
            }
            if (length == 0)
                return 0;
            fwrite(buffer, 1, (size_t)length, stdout);
            fflush(stdout);
        }
        if (polled[2].revents) {
            ssize_t length = read(STDIN_FILENO, buffer, sizeof(buffer));
            if (length <= 0) {
                shutdown(connection, SHUT_WR);
                polled[2].fd = -1;
            } else {
                must_not_be_negative((int)send(connection, buffer, (size_t)length, MSG_NOSIGNAL), "send");
            }
        }
    }
}

int main(int argc, char **argv)
{
    int listening = argc > 1 && strcmp(argv[1], "-l") == 0;
    latchkey_client client;
    latchkey_latch latch, listener = 0;
    struct sockaddr_in address = {.sin_family = AF_INET};
    int connection, result;

    argv += listening;
    if (argc - listening != 4 || inet_pton(AF_INET, argv[2], &address.sin_addr) != 1) {
        fprintf(stderr, "talk [-l] PEER ADDRESS PORT\n");
        return 64;
    }
    address.sin_port = htons((uint16_t)atoi(argv[3]));
    struct latchkey_wanted wanted = LATCHKEY_WANTED(argv[1]);

    must(latchkey_open(getenv("LATCH_SOCKET"), &client), "open");
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    must_not_be_negative(fd, "socket");
    if (listening) {
        must_not_be_negative(bind(fd, (struct sockaddr *)&address, sizeof(address)), "bind");
        must(latchkey_latch_listener(client, fd, &wanted, &listener), "listen");
        must_not_be_negative(listen(fd, 16), "listen");
        fprintf(stderr, "listening\n");
        for (;;) {
            connection = accept(fd, NULL, NULL);
            must_not_be_negative(connection, "accept");
            int status = latchkey_accept(listener, connection, &latch);
            if (status == LATCHKEY_OK)
                break;
            if (status != LATCHKEY_NOT_ACCEPTED)
                must(status, "accept");
            close(connection);
        }
    } else {
        must(latchkey_latch_socket(client, fd, (struct sockaddr *)&address, sizeof(address), &wanted, &latch), "latch");
        must_not_be_negative(connect(fd, (struct sockaddr *)&address, sizeof(address)), "connect");
        connection = fd;
    }
    tell(latch);
    result = talk(client, connection);
    close(connection);
    must(latchkey_release(latch), "release");
    if (listening)
        must(latchkey_release(listener), "release the listener");
    must(latchkey_close(client), "close");
    return result;
}
