/*
 * What `make bench` runs in a container (tests/e2e/src/bench).
 *
 *     bench serve PORT     takes orders on PORT, one connection after the other; streams of bytes go to and from PORT + 1
 *     bench sink BYTES     reads a byte of its standard input, and answers as to an order when it has read so many more
 *
 * An order is a line, VERB OPERAND, and its answer a line of JSON: how long it took by CLOCK_MONOTONIC and how many system calls
 * were made for it, or the error.
 *
 * The first byte of a stream says where it goes: `w` to here, until its end, which is answered with a byte; `r` from here, as many
 * bytes as the next eight say.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { FILES = 400, SMALL = 100, WRITES = 1600, RECORD = 512, READS = 400, PAGE = 4096, LINE = 1024, MIB = 1 << 20, BIG = 64 * MIB };

static char buffer[MIB];
static long calls;
static char problem[256];
#define CALL(call) (calls++, (call))

/* The path of a file in a directory. */
static const char *path(const char *directory, char kind, int number)
{
    static char both[2][512];
    static int turn;
    char *name = both[turn ^= 1];
    snprintf(name, sizeof both[0], "%s/%c%d", directory, kind, number);
    return name;
}

static int nothing(const char *operand)
{
    (void)operand;
    return 0;
}

static int make(const char *directory)
{
    for (int i = 0; i < FILES; i++) {
        int fd = CALL(open(path(directory, 'f', i), O_CREAT | O_EXCL | O_WRONLY, 0644));
        if (fd < 0 || CALL(write(fd, buffer, SMALL)) != SMALL || CALL(close(fd)) < 0)
            return -1;
    }
    return 0;
}

static int look(const char *directory)
{
    struct stat status;
    for (int i = 0; i < FILES; i++)
        if (CALL(stat(path(directory, 'f', i), &status)) < 0)
            return -1;
    return 0;
}

/* What `ls -l` does. */
static int list(const char *directory)
{
    int fd = CALL(open(directory, O_RDONLY | O_DIRECTORY)), found = 0;
    long length;
    struct stat status;
    if (fd < 0)
        return -1;
    while ((length = CALL(syscall(SYS_getdents64, fd, buffer, 32768))) > 0) {
        for (long at = 0; at < length;) {
            struct dirent64 *entry = (void *)(buffer + at);
            at += entry->d_reclen;
            if (entry->d_name[0] != '.' && ++found && CALL(fstatat(fd, entry->d_name, &status, AT_SYMLINK_NOFOLLOW)) < 0)
                return -1;
        }
    }
    if (length < 0 || CALL(close(fd)) < 0)
        return -1;
    if (found != FILES) {
        snprintf(problem, sizeof problem, "%d files instead of %d", found, FILES);
        return -1;
    }
    return 0;
}

static int look_into(const char *directory, int reads)
{
    for (int i = 0; i < FILES; i++) {
        int fd = CALL(open(path(directory, 'f', i), O_RDONLY));
        if (fd < 0 || (reads && CALL(read(fd, buffer, PAGE)) != SMALL) || CALL(close(fd)) < 0)
            return -1;
    }
    return 0;
}

static int open_close(const char *directory)
{
    return look_into(directory, 0);
}

static int read_small(const char *directory)
{
    return look_into(directory, 1);
}

static int rename_all(const char *directory)
{
    for (int i = 0; i < FILES; i++)
        if (CALL(rename(path(directory, 'f', i), path(directory, 'r', i))) < 0)
            return -1;
    return 0;
}

static int unlink_all(const char *directory)
{
    for (int i = 0; i < FILES; i++)
        if (CALL(unlink(path(directory, 'r', i))) < 0)
            return -1;
    return 0;
}

static int directory(const char *name)
{
    return CALL(mkdir(name, 0755));
}

static int write_records(const char *file)
{
    int fd = CALL(open(file, O_CREAT | O_TRUNC | O_WRONLY, 0644));
    if (fd < 0)
        return -1;
    for (int i = 0; i < WRITES; i++)
        if (CALL(write(fd, buffer, RECORD)) != RECORD)
            return -1;
    return CALL(close(fd));
}

static int write_big(const char *file)
{
    int fd = CALL(open(file, O_CREAT | O_TRUNC | O_WRONLY, 0644));
    if (fd < 0)
        return -1;
    for (int done = 0; done < BIG; done += MIB)
        if (CALL(write(fd, buffer, MIB)) != MIB)
            return -1;
    return CALL(fsync(fd)) < 0 ? -1 : CALL(close(fd));
}

static int read_big(const char *file)
{
    int fd = CALL(open(file, O_RDONLY));
    long sum = 0, length;
    if (fd < 0)
        return -1;
    while ((length = CALL(read(fd, buffer, MIB))) > 0)
        sum += length;
    if (length < 0 || CALL(close(fd)) < 0)
        return -1;
    if (sum != BIG) {
        snprintf(problem, sizeof problem, "%ld bytes instead of %d", sum, BIG);
        return -1;
    }
    return 0;
}

/* Each time elsewhere, by xorshift, but the same in every run. */
static int read_random(const char *file)
{
    static uint32_t state = 2463534242;
    int fd = CALL(open(file, O_RDONLY));
    if (fd < 0)
        return -1;
    for (int i = 0; i < READS; i++) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        if (CALL(pread(fd, buffer, PAGE, (off_t)(state % (BIG / PAGE)) * PAGE)) != PAGE)
            return -1;
    }
    return CALL(close(fd));
}

static int remove_file(const char *file)
{
    return CALL(unlink(file));
}

/* Its system calls are the program's, which nobody counts. */
static int run(const char *command)
{
    int status, null;
    pid_t child = fork();
    if (child == 0) {
        null = open("/dev/null", O_RDWR);
        dup2(null, 0);
        dup2(null, 1);
        execl("/bin/sh", "sh", "-c", command, NULL);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) < 0)
        return -1;
    if (status != 0) {
        snprintf(problem, sizeof problem, "it ended with status %#x", status);
        return -1;
    }
    return 0;
}

/* Lines of a KiB to standard output, so many MiB. */
static int say(const char *mib)
{
    enum { CHUNK = 64 * LINE };
    memset(buffer, 'x', CHUNK);
    for (int i = 1; i <= CHUNK / LINE; i++)
        buffer[i * LINE - 1] = '\n';
    for (long left = atol(mib) * MIB; left > 0;) {
        long written = CALL(write(1, buffer, left < CHUNK ? left : CHUNK));
        if (written < 0)
            return -1;
        left -= written;
        /* A short write ends in the middle of a line. Line ends are where they are: only the number of bytes is promised. */
    }
    return 0;
}

static int sink(const char *bytes)
{
    for (long left = atol(bytes); left > 0;) {
        long length = CALL(read(0, buffer, left < MIB ? left : MIB));
        if (length <= 0) {
            snprintf(problem, sizeof problem, "%ld bytes are missing", left);
            return -1;
        }
        left -= length;
    }
    return 0;
}

static const struct {
    const char *verb;
    int (*act)(const char *);
} orders[] = {
    {"nothing", nothing},
    {"mkdir", directory},
    {"create", make},
    {"stat", look},
    {"list", list},
    {"open", open_close},
    {"read", read_small},
    {"rename", rename_all},
    {"unlink", unlink_all},
    {"write-records", write_records},
    {"write-big", write_big},
    {"read-big", read_big},
    {"read-random", read_random},
    {"remove", remove_file},
    {"run", run},
    {"say", say},
    {"sink", sink},
};

static long long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void obey(const char *verb, const char *operand, FILE *answer)
{
    for (size_t i = 0; i < sizeof orders / sizeof *orders; i++) {
        if (strcmp(orders[i].verb, verb))
            continue;
        calls = 0;
        problem[0] = 0;
        long long begun = now();
        int failed = orders[i].act(operand) < 0;
        long long taken = now() - begun;
        if (failed)
            fprintf(answer, "{\"error\": \"%s: %s\"}\n", verb, problem[0] ? problem : strerror(errno));
        else
            fprintf(answer, "{\"ns\": %lld, \"calls\": %ld}\n", taken, calls);
        fflush(answer);
        return;
    }
    fprintf(answer, "{\"error\": \"no such order\"}\n");
    fflush(answer);
}

static void attend(int peer)
{
    static char *line;
    static size_t size;
    int one = 1;
    setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    FILE *in = fdopen(peer, "r"), *out = fdopen(dup(peer), "w");
    while (in && out && getline(&line, &size, in) > 0) {
        line[strcspn(line, "\n")] = 0;
        char *operand = strchr(line, ' ');
        if (operand)
            *operand++ = 0;
        obey(line, operand ? operand : "", out);
    }
    if (in)
        fclose(in);
    if (out)
        fclose(out);
}

static int listening(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 64) < 0) {
        perror("listen");
        exit(1);
    }
    return fd;
}

static void stream(int peer)
{
    char where;
    uint64_t left;
    long length;
    if (read(peer, &where, 1) != 1)
        return;
    if (where == 'w') {
        while ((length = read(peer, buffer, MIB)) > 0)
            ;
        if (length == 0 && write(peer, "", 1) != 1)
            perror("stream");
        return;
    }
    if (recv(peer, &left, sizeof left, MSG_WAITALL) != sizeof left)
        return;
    while (left > 0 && (length = write(peer, buffer, left < MIB ? left : MIB)) > 0)
        left -= length;
}

/* A process for each stream: there may be several at a time. */
static void streams(int listener)
{
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int peer = accept4(listener, 0, 0, SOCK_CLOEXEC);
        if (peer < 0)
            continue;
        if (fork() == 0) {
            stream(peer);
            _exit(0);
        }
        close(peer);
    }
}

static void end(int signal)
{
    (void)signal;
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "sink")) {
        if (read(0, buffer, 1) != 1)
            return 1;
        obey("sink", argv[2], stdout);
        return 0;
    }
    if (argc != 3 || strcmp(argv[1], "serve"))
        return 2;
    /* The init of a pid namespace has no default actions. */
    signal(SIGTERM, end);
    signal(SIGPIPE, SIG_IGN);
    int port = atoi(argv[2]), orders_come = listening(port), streams_come = listening(port + 1);
    if (fork() == 0)
        streams(streams_come);
    close(streams_come);
    puts("listening");
    fflush(stdout);
    for (;;) {
        int peer = accept4(orders_come, 0, 0, SOCK_CLOEXEC);
        if (peer >= 0)
            attend(peer);
    }
}
