/*
 * The ceiling: how fast the client can go.
 *
 * One connection, structured replies, a raw file in the page cache, reads only. It looks for requests without ever
 * sleeping for SPIN microseconds, takes all there are, reads them with one pread each and answers them with one send.
 * No server that copies from the page cache does less, so what fio gets from this is what fio itself can do here.
 *
 * usage: ceiling SOCKET IMAGE SPIN
 */
#define _GNU_SOURCE
#include <endian.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PACKED __attribute__((packed))
enum { OPT_GO = 7, OPT_STRUCTURED_REPLY = 8, REP_ACK = 1, REP_INFO = 3, CMD_DISC = 2, SEND_AT = 128 << 10 };
#define REP_ERR_UNSUP 0x80000001u

struct PACKED option { uint64_t magic; uint32_t option, length; };
struct PACKED option_reply { uint64_t magic; uint32_t option, type, length; };
struct PACKED request { uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length; };
struct PACKED chunk { uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t length; uint64_t offset; };

static char in[1 << 20], out[4 << 20];

static void receive_all(int sock, void *to, size_t length)
{
    for (char *at = to; length;) {
        ssize_t count = recv(sock, at, length, 0);
        if (count <= 0)
            exit(0);
        at += count;
        length -= count;
    }
}

static void send_all(int sock, const void *from, size_t length)
{
    for (const char *at = from; length;) {
        ssize_t count = send(sock, at, length, MSG_NOSIGNAL);
        if (count <= 0)
            exit(0);
        at += count;
        length -= count;
    }
}

static void reply_option(int sock, uint32_t option, uint32_t type, const void *data, uint32_t length)
{
    struct option_reply head = {htobe64(0x3e889045565a9), htobe32(option), htobe32(type), htobe32(length)};
    send_all(sock, &head, sizeof head);
    send_all(sock, data, length);
}

static void negotiate(int sock, uint64_t size)
{
    struct PACKED { uint64_t magic, option; uint16_t flags; } hello = {
        htobe64(0x4e42444d41474943), htobe64(0x49484156454f5054), htobe16(3)};
    struct PACKED { uint16_t type; uint64_t size; uint16_t flags; } info = {0, htobe64(size), htobe16(3)};
    uint32_t client_flags;
    send_all(sock, &hello, sizeof hello);
    receive_all(sock, &client_flags, sizeof client_flags);
    for (;;) {
        struct option head;
        receive_all(sock, &head, sizeof head);
        uint32_t option = be32toh(head.option), length = be32toh(head.length);
        if (length > sizeof in)
            exit(1);
        receive_all(sock, in, length);
        if (option == OPT_GO) {
            reply_option(sock, option, REP_INFO, &info, sizeof info);
            reply_option(sock, option, REP_ACK, NULL, 0);
            return;
        }
        reply_option(sock, option, option == OPT_STRUCTURED_REPLY ? REP_ACK : REP_ERR_UNSUP, NULL, 0);
    }
}

static double microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

static size_t receive_some(int sock, size_t have, double spin)
{
    for (double idle_since = microseconds();;) {
        ssize_t count = recv(sock, in + have, sizeof in - have, MSG_DONTWAIT);
        if (count > 0)
            return have + count;
        if (count == 0)
            exit(0);
        if (microseconds() - idle_since >= spin) {
            struct pollfd readable = {sock, POLLIN, 0};
            poll(&readable, 1, -1);
        }
    }
}

static void serve(int sock, int image, double spin)
{
    for (size_t have = 0;;) {
        size_t position = 0, ready = 0;
        have = receive_some(sock, have, spin);
        for (; have - position >= sizeof(struct request); position += sizeof(struct request)) {
            const struct request *asked = (const void *)(in + position);
            uint32_t length = be32toh(asked->length);
            if (be16toh(asked->type) == CMD_DISC)
                return;
            if (be16toh(asked->type) || length > 1 << 20)
                exit(1);
            struct chunk *head = (void *)(out + ready);
            *head = (struct chunk){htobe32(0x668e33ef), htobe16(1), htobe16(1), asked->cookie, htobe32(length + 8), asked->offset};
            if (pread(image, head + 1, length, be64toh(asked->offset)) != (ssize_t)length)
                exit(1);
            ready += sizeof *head + length;
            if (ready >= SEND_AT) {
                send_all(sock, out, ready);
                ready = 0;
            }
        }
        send_all(sock, out, ready);
        memmove(in, in + position, have -= position);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {AF_UNIX, ""};
    struct stat status;
    int image = argc == 4 ? open(argv[2], O_RDONLY) : -1, buffer = 1 << 20;
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (image < 0 || fstat(image, &status) || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[1]);
    if (bind(listener, (void *)&address, sizeof address) || listen(listener, 8))
        return 1;
    for (;;) {
        int sock = accept(listener, NULL, NULL);
        pid_t child = fork();
        if (!child) {
            setsockopt(sock, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
            negotiate(sock, status.st_size);
            serve(sock, image, atof(argv[3]));
            return 0;
        }
        close(sock);
    }
}
