/*
 * Wrong input with a daemon that is there: `wrong_input PEER ADDRESS PORT` of a service behind the tunnel. Every line of
 * the output is what a wrong call gave. Ends with 0 if all were refused as they should be.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <latchkey.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int failures;

static void expect(const char *what, int status, int expected)
{
    printf("%s: %s: %s\n", what, latchkey_status_name(status), latchkey_error());
    if (status != expected || (status != LATCHKEY_OK && latchkey_error()[0] == 0)) {
        printf("WRONG: %d expected\n", expected);
        failures++;
    }
}

static latchkey_client client;
static latchkey_latch latch;

/* Threads use one latch while another releases it. */
static void *use(void *unused)
{
    (void)unused;
    for (int i = 0; i < 300; i++) {
        uint64_t number;
        int state;
        int status = latchkey_get_number(latch, LATCHKEY_NUMBER, &number);
        if (status != LATCHKEY_OK && status != LATCHKEY_HANDLE)
            return "get_number";
        status = latchkey_state(latch, &state);
        if (status != LATCHKEY_OK && status != LATCHKEY_HANDLE)
            return "state";
    }
    return NULL;
}

/* A socket that is not connected, with an echo server as its peer. */
static void datagrams(const struct sockaddr *remote, socklen_t length, struct latchkey_wanted *wanted, const char *name)
{
    struct sockaddr_in local = {.sin_family = AF_INET};
    int udp = socket(AF_INET, SOCK_DGRAM, 0), tcp = socket(AF_INET, SOCK_STREAM, 0), state;
    latchkey_latch endpoint, told, inquired;
    uint64_t peer, from, again = 0;
    char buffer[4096];
    size_t size;
    struct latchkey_change change;

    expect("not bound", latchkey_latch_datagrams(client, udp, wanted, &endpoint), LATCHKEY_SOCKET);
    inet_pton(AF_INET, "10.1.0.1", &local.sin_addr);
    if (bind(udp, (struct sockaddr *)&local, sizeof(local)) != 0)
        perror("bind"), failures++;
    expect("TCP has no datagrams", latchkey_latch_datagrams(client, tcp, wanted, &endpoint), LATCHKEY_SYSTEM);
    expect("UDP does not listen", latchkey_latch_listener(client, udp, wanted, &endpoint), LATCHKEY_SYSTEM);
    expect("datagrams", latchkey_latch_datagrams(client, udp, wanted, &endpoint), LATCHKEY_OK);
    expect("state", latchkey_state(endpoint, &state), LATCHKEY_OK);
    if (state != LATCHKEY_LISTENER)
        printf("WRONG: state %d\n", state), failures++;
    expect("nothing comes", latchkey_receive(endpoint, 20, buffer, sizeof(buffer), &size, &from), LATCHKEY_TIMEOUT);
    expect("nowhere to put it", latchkey_receive(endpoint, 0, NULL, 7, &size, &from), LATCHKEY_ARGUMENT);
    expect("to nobody", latchkey_send(endpoint, 4711, "x", 1), LATCHKEY_ENDED);
    expect("who is nobody", latchkey_peer(endpoint, 4711, &told), LATCHKEY_ENDED);
    expect("end nobody", latchkey_end_peer(endpoint, 4711), LATCHKEY_OK);
    wanted->peer = "somebody.else";
    expect("somebody else", latchkey_latch_peer(endpoint, remote, length, wanted, &peer), LATCHKEY_WRONG_PEER);
    wanted->peer = name;
    expect("a client has no peers", latchkey_latch_peer(client, remote, length, wanted, &peer), LATCHKEY_HANDLE);
    expect("a peer", latchkey_latch_peer(endpoint, remote, length, wanted, &peer), LATCHKEY_OK);
    expect("too long", latchkey_send(endpoint, peer, buffer, 70000), LATCHKEY_ARGUMENT);
    expect("send", latchkey_send(endpoint, peer, "hello", 5), LATCHKEY_OK);
    expect("receive", latchkey_receive(endpoint, 5000, buffer, 4, &size, &from), LATCHKEY_OK);
    if (from != peer || size != 4 || memcmp(buffer, "hell", 4) != 0)
        printf("WRONG: %zu octets of %llu\n", size, (unsigned long long)from), failures++;
    expect("who", latchkey_peer(endpoint, peer, &told), LATCHKEY_OK);
    expect("its name", latchkey_get(told, LATCHKEY_PEER_ID, buffer, sizeof(buffer), &size), LATCHKEY_OK);
    if (strcmp(buffer, name) != 0)
        printf("WRONG: %s\n", buffer), failures++;
    expect("inquire", latchkey_inquire(told, &inquired), LATCHKEY_OK);
    expect("forget", latchkey_release(inquired), LATCHKEY_OK);
    expect("a binding", latchkey_channel_binding(told, NULL, buffer, sizeof(buffer), &size), LATCHKEY_OK);
    expect("a peer is not waited for", latchkey_wait(told, 0, &change), LATCHKEY_HANDLE);
    expect("end it", latchkey_end_peer(endpoint, peer), LATCHKEY_OK);
    do {
        expect("told", latchkey_next(client, 5000, &change), LATCHKEY_OK);
    } while (failures == 0 && (change.number != peer || change.state != LATCHKEY_CLOSED));
    expect("its state", latchkey_state(told, &state), LATCHKEY_OK);
    if (state != LATCHKEY_CLOSED)
        printf("WRONG: state %d\n", state), failures++;
    expect("to who has ended", latchkey_send(endpoint, peer, "x", 1), LATCHKEY_ENDED);
    expect("not yet", latchkey_latch_peer(endpoint, remote, length, wanted, &again), LATCHKEY_EXISTS);
    for (int i = 0; i < 50 && again == 0; i++) {
        expect("nothing", latchkey_receive(endpoint, 100, buffer, sizeof(buffer), &size, &from), LATCHKEY_TIMEOUT);
        (void)latchkey_latch_peer(endpoint, remote, length, wanted, &again);
    }
    if (again == 0 || again == peer)
        printf("WRONG: %llu again\n", (unsigned long long)again), failures++;
    expect("forget who it was", latchkey_release(told), LATCHKEY_OK);
    expect("the end", latchkey_release(endpoint), LATCHKEY_OK);
    expect("ended: send", latchkey_send(endpoint, again, "x", 1), LATCHKEY_HANDLE);
    close(udp);
    close(tcp);
}

int main(int argc, char **argv)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    const struct sockaddr *remote = (struct sockaddr *)&address;
    socklen_t length = sizeof(address);
    struct latchkey_change change;
    char small[2], large[4096];
    size_t size;
    uint64_t number;
    int descriptor;
    pthread_t threads[4];

    if (argc != 4 || inet_pton(AF_INET, argv[2], &address.sin_addr) != 1)
        return 64;
    address.sin_port = htons((uint16_t)atoi(argv[3]));
    struct latchkey_wanted wanted = LATCHKEY_WANTED(argv[1]);
    expect("open", latchkey_open(getenv("LATCH_SOCKET"), &client), LATCHKEY_OK);
    expect("not the socket", latchkey_open("/dev/null", &number), LATCHKEY_SYSTEM);
    expect("nowhere to put it", latchkey_open(getenv("LATCH_SOCKET"), NULL), LATCHKEY_ARGUMENT);
    if (strcmp(latchkey_status_name(4711), "unknown") != 0)
        printf("WRONG: a name for 4711\n"), failures++;

    int fd = socket(AF_INET, SOCK_STREAM, 0), file = open("/dev/null", O_RDWR);
    expect("no descriptor", latchkey_latch_socket(client, -1, remote, length, &wanted, &latch), LATCHKEY_SOCKET);
    expect("a closed one", latchkey_latch_socket(client, 999, remote, length, &wanted, &latch), LATCHKEY_SOCKET);
    expect("a file", latchkey_latch_socket(client, file, remote, length, &wanted, &latch), LATCHKEY_SYSTEM);
    expect("no address", latchkey_latch_socket(client, fd, remote, 3, &wanted, &latch), LATCHKEY_ARGUMENT);
    expect("nothing wanted", latchkey_latch_socket(client, fd, remote, length, NULL, &latch), LATCHKEY_ARGUMENT);
    wanted.peer = "";
    expect("nobody wanted", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_IDENTITY);
    wanted.peer = "somebody.else";
    expect("somebody else", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_WRONG_PEER);
    wanted.peer = argv[1];
    wanted.mode = "transport";
    expect("another mode", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_WRONG_PROTECTION);
    wanted.mode = NULL;
    expect("a latch as a client", latchkey_latch_listener(client + 1000, fd, &wanted, &latch), LATCHKEY_HANDLE);
    expect("a client as a latch", latchkey_release(client), LATCHKEY_HANDLE);
    expect("a client as a listener", latchkey_accept(client, fd, &latch), LATCHKEY_HANDLE);
    expect("null listener", latchkey_latch_listener(client, fd, &wanted, NULL), LATCHKEY_ARGUMENT);
    expect("a closed listener", latchkey_latch_listener(client, 999, &wanted, &number), LATCHKEY_SOCKET);
    int unbound = socket(AF_INET, SOCK_STREAM, 0);
    expect("not bound", latchkey_latch_listener(client, unbound, &wanted, &number), LATCHKEY_SOCKET);
    close(unbound);
    expect("null latch", latchkey_latch_socket(client, fd, remote, length, &wanted, NULL), LATCHKEY_ARGUMENT);
    expect("in clear, null latch", latchkey_bypass_socket(client, fd, remote, length, NULL), LATCHKEY_ARGUMENT);
    expect("in clear, no address", latchkey_bypass_socket(client, fd, remote, 3, &latch), LATCHKEY_ARGUMENT);
    expect("in clear, a closed one", latchkey_bypass_socket(client, 999, remote, length, &latch), LATCHKEY_SOCKET);
    expect("a closed flow", latchkey_whois(client, 999, &number), LATCHKEY_SOCKET);
    expect("null found", latchkey_whois(client, fd, NULL), LATCHKEY_ARGUMENT);
    expect("null descriptor", latchkey_descriptor(client, NULL), LATCHKEY_ARGUMENT);
    expect("null change", latchkey_next(client, 0, NULL), LATCHKEY_ARGUMENT);
    wanted.size--;
    expect("another size", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_ARGUMENT);
    wanted.size++;
    wanted.on_break = 4;
    expect("no disposition", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_ARGUMENT);
    wanted.on_break = LATCHKEY_DEFAULT;

    /* A listener latch, and who did not come through it. */
    struct sockaddr_in local = {.sin_family = AF_INET};
    int listening = socket(AF_INET, SOCK_STREAM, 0);
    latchkey_latch listener;
    inet_pton(AF_INET, "10.1.0.1", &local.sin_addr);
    if (bind(listening, (struct sockaddr *)&local, sizeof(local)) != 0)
        perror("bind"), failures++;
    expect("listen", latchkey_latch_listener(client, listening, &wanted, &listener), LATCHKEY_OK);
    expect("accept nothing", latchkey_accept(listener, 999, &number), LATCHKEY_SOCKET);
    expect("accept nowhere", latchkey_accept(listener, listening, NULL), LATCHKEY_ARGUMENT);
    expect("no connection", latchkey_accept(listener, fd, &number), LATCHKEY_SOCKET);
    expect("a listener's state", latchkey_state(listener, &descriptor), LATCHKEY_OK);
    if (descriptor != LATCHKEY_LISTENER)
        printf("WRONG: state %d\n", descriptor), failures++;
    expect("a listener has no peer", latchkey_get(listener, LATCHKEY_PEER_ID, large, sizeof(large), &size),
           LATCHKEY_ABSENT);
    expect("a listener is not inquired", latchkey_inquire(listener, &number), LATCHKEY_HANDLE);
    expect("its end", latchkey_release(listener), LATCHKEY_OK);
    close(listening);

    datagrams(remote, length, &wanted, argv[1]);

    /* What came before a latch would be read as if it had come under it. */
    int old = socket(AF_INET, SOCK_STREAM, 0);
    local.sin_port = 0;
    if (bind(old, (struct sockaddr *)&local, sizeof(local)) != 0 || connect(old, remote, length) != 0
        || write(old, "x", 1) != 1 || read(old, small, 1) != 1)
        perror("a connection without a latch"), failures++;
    expect("too late", latchkey_latch_socket(client, old, remote, length, &wanted, &latch), LATCHKEY_SOCKET);
    wanted.late = 1;
    expect("late", latchkey_latch_socket(client, old, remote, length, &wanted, &latch), LATCHKEY_OK);
    wanted.late = 0;
    expect("let it go", latchkey_release(latch), LATCHKEY_OK);
    close(old);
    expect("not connected", latchkey_whois(client, fd, &latch), LATCHKEY_REFUSED);

    /* One that goes in clear has no peer; that of a latch's socket may not. */
    latchkey_latch bypass;
    int clear = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(clear, (struct sockaddr *)&local, sizeof(local)) != 0)
        perror("bind"), failures++;
    expect("in clear", latchkey_bypass_socket(client, clear, remote, length, &bypass), LATCHKEY_OK);
    expect("twice", latchkey_bypass_socket(client, clear, remote, length, &latch), LATCHKEY_EXISTS);
    expect("latched as well", latchkey_latch_socket(client, clear, remote, length, &wanted, &latch), LATCHKEY_EXISTS);
    expect("it has no peer", latchkey_get(bypass, LATCHKEY_PEER_ID, large, sizeof(large), &size), LATCHKEY_ABSENT);
    expect("nor a mode", latchkey_get(bypass, LATCHKEY_MODE, large, sizeof(large), &size), LATCHKEY_ABSENT);
    expect("nor a binding", latchkey_channel_binding(bypass, NULL, large, sizeof(large), &size), LATCHKEY_HANDLE);
    expect("it is one", latchkey_get_number(bypass, LATCHKEY_BYPASS, &number), LATCHKEY_OK);
    expect("its guard", latchkey_get(bypass, LATCHKEY_GUARD, large, sizeof(large), &size), LATCHKEY_OK);
    expect("its state", latchkey_state(bypass, &descriptor), LATCHKEY_OK);
    if (number != 1 || descriptor != LATCHKEY_ESTABLISHED)
        printf("WRONG: %d, %d\n", (int)number, descriptor), failures++;
    expect("it lasts", latchkey_wait(bypass, 50, &change), LATCHKEY_TIMEOUT);
    expect("asked for", latchkey_inquire(bypass, &latch), LATCHKEY_OK);
    expect("told", latchkey_get(latch, LATCHKEY_REMOTE_ADDRESS, large, sizeof(large), &size), LATCHKEY_OK);
    expect("what was told", latchkey_release(latch), LATCHKEY_OK);
    expect("its end", latchkey_release(bypass), LATCHKEY_OK);
    close(clear);

    expect("latch", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_OK);
    expect("again", latchkey_latch_socket(client, fd, remote, length, &wanted, &number), LATCHKEY_EXISTS);
    if (connect(fd, remote, length) != 0)
        perror("connect"), failures++;
    expect("a small buffer", latchkey_get(latch, LATCHKEY_PEER_ID, small, 2, &size), LATCHKEY_TOO_SMALL);
    expect("the length", latchkey_get(latch, LATCHKEY_PEER_ID, NULL, 0, &size), LATCHKEY_TOO_SMALL);
    if (size != strlen(argv[1]))
        printf("WRONG: length %zu\n", size), failures++;
    expect("a buffer", latchkey_get(latch, LATCHKEY_PEER_ID, large, size + 1, &size), LATCHKEY_OK);
    if (strcmp(large, argv[1]) != 0)
        printf("WRONG: %s\n", large), failures++;
    expect("null buffer", latchkey_get(latch, LATCHKEY_PEER_ID, NULL, 7, &size), LATCHKEY_ARGUMENT);
    expect("null length", latchkey_get(latch, LATCHKEY_PEER_ID, large, 7, NULL), LATCHKEY_ARGUMENT);
    expect("no item", latchkey_get(latch, 4711, large, sizeof(large), &size), LATCHKEY_ARGUMENT);
    expect("no certificate", latchkey_get(latch, LATCHKEY_CERTIFICATE, large, sizeof(large), &size), LATCHKEY_ABSENT);
    expect("a number as a text", latchkey_get(latch, LATCHKEY_NUMBER, large, sizeof(large), &size), LATCHKEY_ARGUMENT);
    expect("inquire", latchkey_inquire(latch, &number), LATCHKEY_OK);
    expect("outer address", latchkey_get(number, LATCHKEY_OUTER_REMOTE_ADDRESS, large, sizeof(large), &size), LATCHKEY_OK);
    if (strncmp(large, "192.0.2.2:", 10) != 0)
        printf("WRONG: %s\n", large), failures++;
    expect("address binding", latchkey_get(number, LATCHKEY_ADDRESS_BINDING, large, sizeof(large), &size), LATCHKEY_OK);
    if (strcmp(large, "reserved") != 0)
        printf("WRONG: %s\n", large), failures++;
    expect("forget it", latchkey_release(number), LATCHKEY_OK);
    expect("inquire a client", latchkey_inquire(client, &number), LATCHKEY_HANDLE);
    expect("not inquired", latchkey_get(latch, LATCHKEY_OUTER_REMOTE_ADDRESS, large, sizeof(large), &size), LATCHKEY_ABSENT);
    expect("class", latchkey_get_number(latch, LATCHKEY_CLASS, &number), LATCHKEY_OK);
    expect("json", latchkey_get(latch, LATCHKEY_JSON, large, sizeof(large), &size), LATCHKEY_OK);
    expect("no such binding", latchkey_channel_binding(latch, "tls-unique", large, sizeof(large), &size),
           LATCHKEY_NO_BINDING);
    expect("a small binding", latchkey_channel_binding(latch, NULL, small, 2, &size), LATCHKEY_TOO_SMALL);
    if (size != 33)
        printf("WRONG: a binding of %zu octets\n", size), failures++;
    expect("a binding", latchkey_channel_binding(latch, NULL, large, size, &size), LATCHKEY_OK);
    expect("null binding", latchkey_channel_binding(latch, NULL, NULL, 33, &size), LATCHKEY_ARGUMENT);
    expect("null state", latchkey_state(latch, NULL), LATCHKEY_ARGUMENT);
    expect("null number", latchkey_get_number(latch, LATCHKEY_NUMBER, NULL), LATCHKEY_ARGUMENT);
    expect("a text as a number", latchkey_get_number(latch, LATCHKEY_PEER_ID, &number), LATCHKEY_ARGUMENT);
    expect("null told", latchkey_inquire(latch, NULL), LATCHKEY_ARGUMENT);
    expect("null wait", latchkey_wait(latch, 0, NULL), LATCHKEY_ARGUMENT);
    expect("no key pairs", latchkey_channel_binding(latch, "ipsec-ikev2-endpoint", large, sizeof(large), &size),
           LATCHKEY_NO_BINDING);
    expect("nothing happens", latchkey_wait(latch, 50, &change), LATCHKEY_TIMEOUT);
    expect("nothing at all", latchkey_next(client, 0, &change), LATCHKEY_TIMEOUT);
    expect("descriptor", latchkey_descriptor(client, &descriptor), LATCHKEY_OK);

    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        /* The child neither uses nor ends what is its parent's. */
        expect("the parent's latch", latchkey_release(latch), LATCHKEY_FORKED);
        expect("the parent's client", latchkey_close(client), LATCHKEY_FORKED);
        expect("its own client", latchkey_open(getenv("LATCH_SOCKET"), &client), LATCHKEY_OK);
        fflush(stdout);
        _exit(failures);
    }
    int ended;
    waitpid(child, &ended, 0);
    failures += !WIFEXITED(ended) || WEXITSTATUS(ended) != 0;
    expect("still there", latchkey_wait(latch, 50, &change), LATCHKEY_TIMEOUT);
    expect("who is there", latchkey_whois(client, fd, &number), LATCHKEY_OK);
    expect("told, not held", latchkey_wait(number, 0, &change), LATCHKEY_HANDLE);
    expect("forget", latchkey_release(number), LATCHKEY_OK);

    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, use, NULL);
    expect("release", latchkey_release(latch), LATCHKEY_OK);
    for (int i = 0; i < 4; i++) {
        void *wrong;
        pthread_join(threads[i], &wrong);
        if (wrong != NULL)
            printf("WRONG: %s in a thread\n", (char *)wrong), failures++;
    }
    expect("release twice", latchkey_release(latch), LATCHKEY_HANDLE);
    expect("close", latchkey_close(client), LATCHKEY_OK);
    expect("close twice", latchkey_close(client), LATCHKEY_HANDLE);
    expect("closed: next", latchkey_next(client, 0, &change), LATCHKEY_HANDLE);
    expect("closed: descriptor", latchkey_descriptor(client, &descriptor), LATCHKEY_HANDLE);
    expect("closed: latch", latchkey_latch_socket(client, fd, remote, length, &wanted, &latch), LATCHKEY_HANDLE);
    return failures != 0;
}
