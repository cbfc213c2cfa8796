/*
 * latchkey.h - IPsec connection latching (RFC 5660) for C programs.
 *
 * A latch pins a TCP or UDP connection to the identity that the peer proved to the IKE daemon, and to how the packets are
 * protected. Under another identity or protection no packet passes; by default the connection is then reset.
 *
 *     latchkey_client client;
 *     latchkey_latch latch;
 *     struct latchkey_wanted wanted = LATCHKEY_WANTED("db.example");
 *     if (latchkey_open(NULL, &client) != LATCHKEY_OK
 *         || latchkey_latch_socket(client, fd, address, length, &wanted, &latch) != LATCHKEY_OK)
 *             errx(1, "%s", latchkey_error());
 *     connect(fd, address, length);
 *     ...
 *     close(fd);
 *     latchkey_release(latch);
 *
 * Results. Every function gives LATCHKEY_OK (0) or another latchkey_status; then latchkey_error() says what happened, for a
 * human. A function that fails changes nothing that it was given, save where it says so.
 *
 * Ownership. Handles are numbers and never pointers: a wrong, closed or released one is refused with LATCHKEY_HANDLE,
 * and numbers are not used twice. What goes in is copied, what comes out is written into the caller's memory. Sockets
 * stay the caller's: the library neither closes them nor changes their mode. Any pointer may be null: where one is needed,
 * null is refused with LATCHKEY_ARGUMENT. The library cannot see whether a pointer that is not null points to memory.
 *
 * Threads. All functions may be called by any threads at once, on the same handles too. The library starts no threads,
 * handles no signals, and waits on through those that interrupt it.
 *
 * Processes. After fork the child must not use its parent's handles (LATCHKEY_FORKED), and calls latchkey_open itself.
 * Sockets that it inherits are latched for as long as the parent holds the latch.
 *
 * Version of the protocol below: 1. Link with `pkg-config --cflags --libs latchkey`.
 */
#ifndef LATCHKEY_H
#define LATCHKEY_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A connection to the daemon. */
typedef uint64_t latchkey_client;

/* A latch of a connection or of a listener, or what latchkey_whois and latchkey_peer tell. */
typedef uint64_t latchkey_latch;

enum latchkey_status {
    LATCHKEY_OK = 0,
    /* An argument is null, too long, not UTF-8, or not one of those that there are. */
    LATCHKEY_ARGUMENT = 1,
    /* There is no such handle, or it is of another kind. */
    LATCHKEY_HANDLE = 2,
    /* The handle is the parent process's. */
    LATCHKEY_FORKED = 3,
    /* The system refused. */
    LATCHKEY_SYSTEM = 4,
    /* The connection to the daemon has ended. */
    LATCHKEY_GONE = 5,
    /* The daemon says what it should not. */
    LATCHKEY_PROTOCOL = 6,
    /* The buffer is too small; the length that is needed has been stored. */
    LATCHKEY_TOO_SMALL = 7,
    /* There is no such item of this latch. */
    LATCHKEY_ABSENT = 8,
    /* Time is up; also when the daemon is there and has said nothing for ten seconds. */
    LATCHKEY_TIMEOUT = 9,
    /* A fault of the library; it goes on. */
    LATCHKEY_INTERNAL = 10,
    /* The peer's latch has ended. */
    LATCHKEY_ENDED = 11,

    /* The daemon refused, and nothing is latched (RFC 5660 section 2.3): no SA protects the connection; */
    LATCHKEY_NO_SA = 32,
    /* the peer is somebody else; */
    LATCHKEY_WRONG_PEER = 33,
    /* the SA protects otherwise than wanted; */
    LATCHKEY_WRONG_PROTECTION = 34,
    /* SAs of several peers claim the connection; */
    LATCHKEY_CONFLICT = 35,
    /* it, or the listener's port, is latched already; */
    LATCHKEY_EXISTS = 36,
    /* the accepted connection has no latch, or a broken one: close it, and accept the next; */
    LATCHKEY_NOT_ACCEPTED = 37,
    /* the latch has no channel binding of this type; */
    LATCHKEY_NO_BINDING = 38,
    /* the caller may not; */
    LATCHKEY_PERMISSION = 39,
    /* the descriptor is not a socket that can be latched; */
    LATCHKEY_SOCKET = 40,
    /* the wanted peer is not an identity; */
    LATCHKEY_IDENTITY = 41,
    /* the daemon cannot enforce latches; */
    LATCHKEY_UNENFORCED = 42,
    /* there are too many; */
    LATCHKEY_LIMIT = 43,
    /* the configuration has it otherwise; */
    LATCHKEY_POLICY = 44,
    /* something else. */
    LATCHKEY_REFUSED = 63
};

/* States of a latch (RFC 5660 section 2.2). */
enum latchkey_state {
    LATCHKEY_LISTENER = 1,
    LATCHKEY_ESTABLISHED = 2,
    /* No packet passes. */
    LATCHKEY_BROKEN = 3,
    /* Ended by the administrator, or with the daemon. */
    LATCHKEY_CLOSED = 4
};

/* What becomes of a connection whose latch breaks (RFC 5660 section 5.5). */
enum latchkey_on_break {
    /* LATCHKEY_RESET for TCP, LATCHKEY_WAIT for UDP. */
    LATCHKEY_DEFAULT = 0,
    /* It ends as if the peer had reset it. */
    LATCHKEY_RESET = 1,
    /* Packets are lost until the conflict is over. */
    LATCHKEY_WAIT = 2,
    /* As LATCHKEY_WAIT, and who sends hears that the destination is out of reach. */
    LATCHKEY_UNREACHABLE = 3
};

/* Whether the daemon makes SAs for a latch. */
enum latchkey_initiate {
    /* When there are none. */
    LATCHKEY_NEEDED = 0,
    /* One for this connection alone, in any case. */
    LATCHKEY_NARROW = 1,
    LATCHKEY_NEVER = 2
};

/* ESP algorithms by their IANA numbers as IKEv2 transforms. */
struct latchkey_suite {
    uint16_t encr;
    /* 0 if it is fixed. */
    uint16_t key_bits;
    /* 0 with a combined-mode cipher. */
    uint16_t integ;
};

/* What is wanted of a latch. Set all of it to zero, then size and peer, or begin with LATCHKEY_WANTED. */
struct latchkey_wanted {
    /* sizeof(struct latchkey_wanted). */
    size_t size;
    /* Identity that the peer must prove, in the notation of swanctl.conf; wildcards are allowed: "%any" is anybody. */
    const char *peer;
    /* Identity that we must have asserted, or null. */
    const char *local_id;
    /* "tunnel", "transport", or null. */
    const char *mode;
    /* suite_count suites, one of which the SA must have; null for any. */
    const struct latchkey_suite *suites;
    size_t suite_count;
    /* Not 0 if the SA must have replay protection. */
    int replay_protection;
    /* enum latchkey_on_break. */
    int on_break;
    /* enum latchkey_initiate. */
    int initiate;
    /* Not 0 if data may have come in on the TCP connection before, under no latch; else such a socket is refused. */
    int late;
};

#define LATCHKEY_WANTED(peer) { sizeof(struct latchkey_wanted), (peer), 0, 0, 0, 0, 0, 0, 0, 0 }

/* A change of a latch's state. */
struct latchkey_change {
    /* Number of the latch: latchkey_get_number(latch, LATCHKEY_NUMBER, ...). */
    uint64_t number;
    /* enum latchkey_state. */
    int state;
    /* Why, for a human; cut where it is too long. */
    char reason[256];
};

/* What latchkey_get and latchkey_get_number tell of a latch. */
enum latchkey_item {
    /* Texts. */
    LATCHKEY_PEER_ID = 1,
    LATCHKEY_LOCAL_ID = 2,
    /* How the peer proved its identity: "shared-key", "certificate", "raw-key", "eap"; "unauthenticated" is not at all, which "%null" alone admits. */
    LATCHKEY_PROOF = 3,
    /* "tunnel" or "transport". */
    LATCHKEY_MODE = 4,
    /* The ESP algorithms. */
    LATCHKEY_SUITE = 5,
    /* Both ends of the connection, such as 192.0.2.1:80 or [2001:db8::1]:80. */
    LATCHKEY_LOCAL_ADDRESS = 6,
    LATCHKEY_REMOTE_ADDRESS = 7,
    /* All of it as a JSON object, as docs/latch-protocol.md has it. */
    LATCHKEY_JSON = 8,
    /* What enforces the latch: "engine", "engine-and-system", "system",
     * "system-and-filter". */
    LATCHKEY_GUARD = 9,
    /* Of latchkey_inquire and latchkey_whois alone, what protects the connection now (the first SA; JSON has all): the
     * connection of the configuration; outer addresses, of whoever is behind a NAT our private and the peer's public one; */
    LATCHKEY_CONNECTION = 10,
    LATCHKEY_OUTER_LOCAL_ADDRESS = 11,
    LATCHKEY_OUTER_REMOTE_ADDRESS = 12,
    /* "udp", "udp-encapsulated", "tcp" or "tls"; */
    LATCHKEY_TRANSPORT = 13,
    /* how the remote address is bound to the peer's identity: "proved", "assigned", "reserved", "outer" or "configured". */
    LATCHKEY_ADDRESS_BINDING = 14,

    /* Octets: the data of the identities (RFC 7296 section 3.5), which programs should compare rather than texts; */
    LATCHKEY_PEER_ID_DATA = 32,
    LATCHKEY_LOCAL_ID_DATA = 33,
    /* the peer's certificate and that of the trust anchor, DER. */
    LATCHKEY_CERTIFICATE = 34,
    LATCHKEY_TRUST_ANCHOR = 35,
    /* the peer's raw public key (RFC 7670), a SubjectPublicKeyInfo in DER. */
    LATCHKEY_RAW_KEY = 36,

    /* Numbers: of the latch in the daemon; */
    LATCHKEY_NUMBER = 64,
    /* ID types of the identities; */
    LATCHKEY_PEER_ID_KIND = 65,
    LATCHKEY_LOCAL_ID_KIND = 66,
    /* IANA numbers of the transforms; */
    LATCHKEY_ENCR = 67,
    LATCHKEY_KEY_BITS = 68,
    LATCHKEY_INTEG = 69,
    /* 0 or 1: 64-bit sequence numbers; */
    LATCHKEY_ESN = 70,
    /* replay protection; */
    LATCHKEY_REPLAY_PROTECTION = 71,
    /* the same for connections to the same peer with the same credential and protection (RFC 5660 section 6.3). */
    LATCHKEY_CLASS = 72,
    /* Of latchkey_inquire and latchkey_whois alone: the AUTH method (IANA); whether we, or the peer, are behind a NAT. */
    LATCHKEY_AUTH_METHOD = 73,
    LATCHKEY_NAT_LOCAL = 74,
    LATCHKEY_NAT_REMOTE = 75,
    /* 0 or 1: the connection is in clear, and has neither peer nor protection (latchkey_bypass_socket). */
    LATCHKEY_BYPASS = 76
};

/* Why the last call of this thread failed. Valid until the thread's next call of the library; never null. */
const char *latchkey_error(void);

/* The name of a status, such as "wrong-peer"; never null. */
const char *latchkey_status_name(int status);

/* Connects to the daemon; path null is /run/latchkey/latch.sock. */
int latchkey_open(const char *path, latchkey_client *client);

/* Closes the connection to the daemon, once all latches that came from it are released. */
int latchkey_close(latchkey_client client);

/*
 * Stores a descriptor to wait on (select, poll, epoll, for reading): readable when latchkey_next may have something. It is
 * the library's, and goes when the client is closed and its latches are released.
 */
int latchkey_descriptor(latchkey_client client, int *descriptor);

/*
 * Latches a TCP or UDP socket that will connect to an address, or has; then call connect. A socket that is not bound
 * is bound to the address from which the system would reach the other end, and is left so when the latch is refused. Waits
 * until the daemon has made an SA where one is needed, a minute at most. What is read afterwards came under the latch: a UDP
 * socket is connected, and what waited in its queue is dropped; a TCP connection on which data has come in before is
 * refused with LATCHKEY_SOCKET, unless wanted->late is set.
 */
int latchkey_latch_socket(latchkey_client client, int socket, const struct sockaddr *remote, socklen_t length,
                          const struct latchkey_wanted *wanted, latchkey_latch *latch);

/*
 * Has the connection of a TCP or UDP socket to an address go in clear although the policy protects it, and none of it
 * otherwise (RFC 5660 section 3.1); for root, and whom the administrator lets. Then call connect. Sockets are bound as
 * by latchkey_latch_socket, and what waits in the queue of a UDP socket is dropped. The latch has the items
 * LATCHKEY_LOCAL_ADDRESS, LATCHKEY_REMOTE_ADDRESS, LATCHKEY_GUARD, LATCHKEY_JSON, LATCHKEY_NUMBER and LATCHKEY_BYPASS.
 * When it breaks, the connection is reset, or the UDP socket shut down.
 */
int latchkey_bypass_socket(latchkey_client client, int socket, const struct sockaddr *remote, socklen_t length,
                           latchkey_latch *latch);

/* Latches a bound TCP socket before listen is called on it (latchkey_latch_datagrams is for UDP): each connection to it is then latched or does not get in. */
int latchkey_latch_listener(latchkey_client client, int socket, const struct latchkey_wanted *wanted,
                            latchkey_latch *listener);

/* Takes the latch of a connection that accept gave. On LATCHKEY_NOT_ACCEPTED close it, and accept the next. */
int latchkey_accept(latchkey_latch listener, int socket, latchkey_latch *latch);

/*
 * Latches a UDP socket that is bound to an address and a port and not connected, to talk with many (RFC 5660 section 5.3). Peers as
 * wanted can send to it; others do not get through. From now on the socket is read and written by the functions below alone; what
 * waits in its queue is dropped, which takes half a second. latchkey_release gives the latch back, with those of its peers.
 */
int latchkey_latch_datagrams(latchkey_client client, int socket, const struct latchkey_wanted *wanted,
                             latchkey_latch *endpoint);

/*
 * Receives a datagram, cut to the buffer, stores its length, and whose it is: the number of the peer's latch. Waits for so many
 * milliseconds, for ever if negative; LATCHKEY_TIMEOUT when time is up. Another number is another peer, also where address and port are
 * the same ones: no datagram is given out with another's number. The daemon is asked about each peer once.
 *
 * A peer ends when its latch breaks for good, and after five minutes of silence; latchkey_next tells. Who comes from the same address is
 * let in when this function has been called for about a second, or again after it: so call it with a time to wait, or once a
 * second.
 */
int latchkey_receive(latchkey_latch endpoint, int milliseconds, void *buffer, size_t size, size_t *length, uint64_t *peer);

/* Sends a datagram to the peer with this number, under its latch or not at all; LATCHKEY_ENDED if it has ended. */
int latchkey_send(latchkey_latch endpoint, uint64_t peer, const void *datagram, size_t size);

/*
 * Latches the flow to a remote end that has sent nothing, to talk to it first, and stores its number. on_break is that of the
 * endpoint's latch. An SA is made where one is needed.
 */
int latchkey_latch_peer(latchkey_latch endpoint, const struct sockaddr *remote, socklen_t length,
                        const struct latchkey_wanted *wanted, uint64_t *peer);

/*
 * Tells who has a number, by a handle for latchkey_get, latchkey_inquire, latchkey_state and latchkey_channel_binding. Release it: that
 * ends nothing, but the endpoint does not end before.
 */
int latchkey_peer(latchkey_latch endpoint, uint64_t peer, latchkey_latch *told);

/* Ends a peer: nothing more comes from it, and who comes from its address is another one. */
int latchkey_end_peer(latchkey_latch endpoint, uint64_t peer);

/* Tells who is at the other end of a connected socket now, latched or not. Latches nothing; release what it gives. */
int latchkey_whois(latchkey_client client, int socket, latchkey_latch *found);

/* Asks the daemon for all that it knows of a latch now, outer addresses too. Release what it gives: it holds no latch. */
int latchkey_inquire(latchkey_latch latch, latchkey_latch *told);

/*
 * Gives a latch back, and forgets the handle. The connection ends: what was written still goes out under the latch.
 * Needed even after the socket was closed: the daemon has a duplicate of it.
 */
int latchkey_release(latchkey_latch latch);

/* Stores the state of a latch (enum latchkey_state) by what the daemon has said until now. */
int latchkey_state(latchkey_latch latch, int *state);

/*
 * Waits until a latch of the client has changed, for so many milliseconds, for ever if negative; LATCHKEY_TIMEOUT when
 * time is up, LATCHKEY_GONE when the daemon has ended and all has been told. Of several changes at once the last is told.
 */
int latchkey_next(latchkey_client client, int milliseconds, struct latchkey_change *change);

/* Waits until a latch is not established any more, likewise. */
int latchkey_wait(latchkey_latch latch, int milliseconds, struct latchkey_change *change);

/*
 * Copies an item (enum latchkey_item) that is a text or octets, and stores its length, without the zero that ends a
 * text. A buffer that is too small is left alone (LATCHKEY_TOO_SMALL); null with size 0 asks for the length. A text needs an
 * octet more for its zero. Of a listener: LATCHKEY_LOCAL_ADDRESS and LATCHKEY_NUMBER alone.
 */
int latchkey_get(latchkey_latch latch, int item, void *buffer, size_t size, size_t *length);

/* Stores an item that is a number. */
int latchkey_get_number(latchkey_latch latch, int item, uint64_t *number);

/*
 * Copies the channel binding (RFC 5056) of a latch, as latchkey_get does; type null is "ipsec-ikev2-unique". Types are in
 * docs/latch-protocol.md.
 */
int latchkey_channel_binding(latchkey_latch latch, const char *type, void *buffer, size_t size, size_t *length);

#ifdef __cplusplus
}
#endif

#endif
