/*
 * Makes system calls that busybox has no applet for, for the A/B suite (tests/e2e, compat).
 *
 *     probe calls            calls that every kernel has, with what it says to them
 *     probe options          calls that a kernel may be built without
 *     probe files DIRECTORY  what the file system of a directory can do
 *     probe unseen DIRECTORY what becomes of names in a directory of the image that nobody has looked at
 *     probe clock DIRECTORY  whether files made there are newer than the clock
 *     probe steps DIRECTORY COUNT  waits until the clock has been set so often, and says by how much, and for how long files
 *                            made there were of another time
 *
 * Prints one line for each: its name and `ok`, the name of an error, or what it found.
 *
 *     probe meet DIRECTORY   what passes by way of a directory from another container, in which this runs:
 *     probe hold DIRECTORY   says `holding` and goes on until it is killed
 *     probe lock DIRECTORY   waits for a lock of each kind, says `locked` and has them until it is killed
 *     probe try DIRECTORY    what becomes of locks that another `probe lock` has, or nobody
 *     probe count FILE TIMES raises the number of 8 digits in a file so often, each time under a lock
 *     probe turns FILE WHO TIMES   takes turns so often with another process, 0 with 1, at a number in a page of a file
 *     probe see DIRECTORY    says `looking`, and then when each change was seen that `probe change` makes elsewhere
 *     probe change DIRECTORY makes these changes, and says when
 *     probe record DIRECTORY...  writes records to files of each directory; the number of one is said when all are safe
 *     probe starve SECONDS   says `starving` and takes all of one processor, in real time and without the usual limit
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static void say(const char *name, long result)
{
    printf("%s: %s\n", name, result < 0 ? strerrorname_np(errno) : "ok");
    fflush(stdout);
}

/* Runs a call in a child, whose death by a signal or changed state is then its own. */
#define TRY(name, expression)                                          \
    do {                                                               \
        pid_t child = fork();                                          \
        if (child == 0) {                                              \
            errno = 0;                                                 \
            say(name, (long)(expression));                             \
            _exit(0);                                                  \
        }                                                              \
        int status = 0;                                                \
        waitpid(child, &status, 0);                                    \
        if (WIFSIGNALED(status))                                       \
            printf("%s: signal %d\n", name, WTERMSIG(status));         \
    } while (0)

static long bind_port(int port)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    return bind(fd, (struct sockaddr *)&address, sizeof address);
}

static long real_time(void)
{
    struct sched_param param = {.sched_priority = 1};
    return sched_setscheduler(0, SCHED_FIFO, &param);
}

static long set_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return clock_settime(CLOCK_REALTIME, &now);
}

/* To what it is, as other containers of the pod have the same. */
static long set_own_name(void)
{
    char name[65];
    gethostname(name, sizeof name);
    return sethostname(name, strlen(name));
}

/* The sibling does not agree to be traced: whether it may be is the kernel's and the filter's matter. */
static long trace_sibling(void)
{
    pid_t sibling = fork();
    if (sibling == 0) {
        pause();
        _exit(0);
    }
    long result = ptrace(PTRACE_SEIZE, sibling, 0, 0);
    int error = errno;
    kill(sibling, SIGKILL);
    errno = error;
    return result;
}

static long read_sibling(void)
{
    static char there = 'x', here;
    struct iovec local = {&here, 1}, remote = {&there, 1};
    return process_vm_readv(getpid(), &local, 1, &remote, 1, 0);
}

static void calls(void)
{
    static char zeros[256];
    TRY("ptrace of a sibling", trace_sibling());
    TRY("process_vm_readv", read_sibling());
    TRY("reboot", syscall(SYS_reboot, 0, 0, 0, 0));
    TRY("clock_settime", set_clock());
    TRY("mount", syscall(SYS_mount, "none", "/tmp", "tmpfs", 0, ""));
    TRY("umount2", syscall(SYS_umount2, "/none", 0));
    TRY("pivot_root", syscall(SYS_pivot_root, "/none", "/none"));
    TRY("chroot", chroot("/"));
    TRY("unshare mount", unshare(CLONE_NEWNS));
    TRY("unshare network", unshare(CLONE_NEWNET));
    TRY("unshare ipc", unshare(CLONE_NEWIPC));
    TRY("setns to own", setns(open("/proc/self/ns/net", O_RDONLY), CLONE_NEWNET));
    TRY("clone3", syscall(SYS_clone3, 0, 0));
    TRY("open_by_handle_at", syscall(SYS_open_by_handle_at, AT_FDCWD, zeros, 0));
    TRY("syslog", syscall(SYS_syslog, 10, 0, 0));
    TRY("personality ADDR_NO_RANDOMIZE", syscall(SYS_personality, 0x0040000));
    TRY("modify_ldt", syscall(SYS_modify_ldt, 0, zeros, 16));
    TRY("sethostname", set_own_name());
    TRY("pidfd_open", syscall(SYS_pidfd_open, getpid(), 0));
    TRY("pidfd_getfd", syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, getpid(), 0), 1, 0));
    TRY("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 0, 1, 1));
    TRY("memfd_create", memfd_create("probe", 0));
    TRY("mlock", mlock(zeros, sizeof zeros));
    TRY("mlockall", mlockall(MCL_FUTURE));
    TRY("real-time scheduling", real_time());
    TRY("setpriority -5", setpriority(PRIO_PROCESS, 0, -5));
    TRY("raise of the limit of files", setrlimit(RLIMIT_NOFILE, &(struct rlimit){1 << 21, 1 << 21}));
    TRY("aio", syscall(SYS_io_setup, 1, zeros + 8));
    TRY("openat2", syscall(SYS_openat2, AT_FDCWD, "/", (char[24]){0}, 24));
    TRY("close_range", syscall(SYS_close_range, 100, 200, 0));
    TRY("membarrier", syscall(SYS_membarrier, 0, 0, 0));
    TRY("prctl PR_SET_SECCOMP by itself", prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    TRY("mq_open", syscall(SYS_mq_open, "probe", O_CREAT | O_RDWR, 0600, 0));
    TRY("shmget", syscall(SYS_shmget, 0, 4096, 0600 | 01000));
    TRY("semget", syscall(SYS_semget, 0, 1, 0600 | 01000));
    TRY("msgget", syscall(SYS_msgget, 0, 0600 | 01000));
    TRY("socket unix", socket(AF_UNIX, SOCK_STREAM, 0));
    TRY("socket raw", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
    TRY("socket raw 6", socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6));
    TRY("socket ping", socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP));
    TRY("socket packet", socket(AF_PACKET, SOCK_RAW, 0));
    TRY("socket netlink", socket(AF_NETLINK, SOCK_RAW, 0));
    TRY("socket udp 6", socket(AF_INET6, SOCK_DGRAM, 0));
    TRY("socket vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
    TRY("bind to port 81", bind_port(81));
    TRY("mknod of a null device", mknod("/tmp/probe-null", S_IFCHR | 0600, 1 << 8 | 3));
    TRY("mknod of a disk", mknod("/tmp/probe-disk", S_IFBLK | 0600, 8 << 8));
    TRY("open of that disk", open("/tmp/probe-disk", O_RDONLY));
    TRY("trusted xattr", setxattr("/tmp", "trusted.probe", "x", 1, 0));
    TRY("security.capability", setxattr("/tmp", "security.capability", "x", 1, 0));
    unlink("/tmp/probe-null");
    unlink("/tmp/probe-disk");
}

/* Without a stack the child is a copy, as of fork. */
static long clone_user(void)
{
    long child = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (child == 0)
        _exit(0);
    return child;
}

/* What a kernel may be built without, or the node forbid. */
static void options(void)
{
    static char zeros[256];
    TRY("add_key", syscall(SYS_add_key, "user", "probe", "x", 1, -3));
    TRY("keyctl", syscall(SYS_keyctl, 0, -3, 1));
    TRY("bpf", syscall(SYS_bpf, 5, zeros, 48));
    TRY("perf_event_open", syscall(SYS_perf_event_open, zeros, 0, -1, -1, 0));
    TRY("io_uring_setup", syscall(SYS_io_uring_setup, 1, zeros));
    TRY("userfaultfd", syscall(SYS_userfaultfd, 1));
    TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, ~0UL));
    TRY("init_module", syscall(SYS_init_module, zeros, 0, ""));
    TRY("delete_module", syscall(SYS_delete_module, "none", 0));
    TRY("acct", syscall(SYS_acct, "/none"));
    TRY("swapon", syscall(SYS_swapon, "/none", 0));
    TRY("unshare user", unshare(CLONE_NEWUSER));
    TRY("clone user", clone_user());
    TRY("unshare cgroup", unshare(CLONE_NEWCGROUP));
    TRY("fanotify_init", syscall(SYS_fanotify_init, 0, 0));
    TRY("quotactl", syscall(SYS_quotactl, 0x80000100, 0, 0, 0));
    TRY("iopl", syscall(SYS_iopl, 3));
    TRY("ioperm", syscall(SYS_ioperm, 0x80, 1, 1));
    TRY("memfd_secret", syscall(SYS_memfd_secret, 0));
    TRY("set_mempolicy", syscall(SYS_set_mempolicy, 0, 0, 0));
    TRY("move_pages", syscall(SYS_move_pages, 0, 0, 0, 0, 0, 0));
    TRY("landlock", syscall(SYS_landlock_create_ruleset, 0, 0, 1));
    /* Younger than the profiles of container engines: fchmodat2, mseal, and one that does not exist. */
    TRY("call 452", syscall(452, AT_FDCWD, "/none", 0600, 0));
    TRY("call 462", syscall(462, 0, 0, 1));
    TRY("call 1000", syscall(1000));
    TRY("socket alg", socket(AF_ALG, SOCK_SEQPACKET, 0));
    TRY("socket sctp", socket(AF_INET, SOCK_STREAM, 132));
}

static int make(const char *name, const char *text)
{
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (write(fd, text, strlen(text)) < 0)
        perror(name);
    return fd;
}

static long lock_conflict(int kind)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = make("lock", "x");
    long held = kind == 0 ? flock(fd, LOCK_EX) : fcntl(fd, kind == 1 ? F_SETLK : F_OFD_SETLK, &lock);
    if (held < 0)
        return held;
    pid_t child = fork();
    if (child == 0) {
        int other = open("lock", O_RDWR);
        struct flock wanted = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        long got = kind == 0 ? flock(other, LOCK_EX | LOCK_NB) : fcntl(other, kind == 1 ? F_SETLK : F_OFD_SETLK, &wanted);
        _exit(got < 0 ? errno : 0);
    }
    int status;
    waitpid(child, &status, 0);
    errno = WEXITSTATUS(status);
    return errno ? -1 : 0;
}

static long mapped_write(int flags)
{
    char text[8] = {0};
    int fd = make("mapped", "before");
    char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (map == MAP_FAILED)
        return -1;
    memcpy(map, "behind", 6);
    if (pread(fd, text, 6, 0) != 6)
        return -1;
    printf("mapping shows as %s\n", text);
    return msync(map, 4096, MS_SYNC);
}

static long direct(void)
{
    void *page;
    int fd = open("direct", O_RDWR | O_CREAT | O_DIRECT, 0644);
    if (fd < 0 || posix_memalign(&page, 4096, 4096))
        return -1;
    memset(page, 'd', 4096);
    return write(fd, page, 4096) == 4096 ? pread(fd, page, 4096, 0) : -1;
}

static long tmpfile_linked(void)
{
    char path[64];
    int fd = open(".", O_RDWR | O_TMPFILE, 0600);
    if (fd < 0)
        return -1;
    sprintf(path, "/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, path, AT_FDCWD, "linked", AT_SYMLINK_FOLLOW);
}

static long holes(void)
{
    int fd = make("holes", "");
    struct stat status;
    if (ftruncate(fd, 1 << 20) < 0 || pwrite(fd, "x", 1, 1 << 19) != 1)
        return -1;
    fstat(fd, &status);
    printf("sparse file: size %ld, fewer blocks %d\n", (long)status.st_size, status.st_blocks * 512 < status.st_size);
    printf("first data at %ld, hole after at %ld\n", (long)lseek(fd, 0, SEEK_DATA), (long)lseek(fd, 1 << 19, SEEK_HOLE));
    if (fallocate(fd, 0, 0, 8192) < 0)
        return -1;
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 19, 4096);
}

static long unlinked(void)
{
    char text[8] = {0};
    struct stat status;
    int fd = make("unlinked", "still");
    unlink("unlinked");
    if (fstat(fd, &status) < 0 || pread(fd, text, 5, 0) != 5)
        return -1;
    printf("unlinked file: links %ld, text %s\n", (long)status.st_nlink, text);
    return ftruncate(fd, 2);
}

static long set_user_id_cleared(void)
{
    struct stat before, after;
    int fd = make("setuid", "x");
    fchmod(fd, 06755);
    fstat(fd, &before);
    if (fork() == 0) {
        setgid(1000);
        setuid(1000);
        int other = open("setuid", O_WRONLY);
        _exit(write(other, "y", 1) == 1);
    }
    wait(0);
    fstat(fd, &after);
    printf("setuid file: %o, after another's attempt %o\n", before.st_mode & 07777, after.st_mode & 07777);
    fchmod(fd, 06777);
    if (fork() == 0) {
        setgid(1000);
        setuid(1000);
        int other = open("setuid", O_WRONLY);
        _exit(write(other, "y", 1) == 1);
    }
    wait(0);
    fstat(fd, &after);
    printf("after another's write %o\n", after.st_mode & 07777);
    return 0;
}

static long notified(void)
{
    char buffer[4096] __attribute__((aligned(8)));
    int fd = inotify_init1(IN_NONBLOCK);
    if (inotify_add_watch(fd, ".", IN_CREATE | IN_MODIFY | IN_DELETE | IN_MOVED_TO | IN_CLOSE_WRITE | IN_ATTRIB) < 0)
        return -1;
    close(make("noticed", "x"));
    chmod("noticed", 0600);
    rename("noticed", "noticed2");
    unlink("noticed2");
    ssize_t length = read(fd, buffer, sizeof buffer);
    printf("events:");
    for (ssize_t at = 0; at < length;) {
        struct inotify_event *event = (void *)(buffer + at);
        printf(" %x %s", event->mask, event->len ? event->name : "");
        at += sizeof *event + event->len;
    }
    printf("\n");
    return length;
}

static long listing(void)
{
    struct dirent *entry;
    char name[32];
    long count = 0, sum = 0, position = -1;
    mkdir("many", 0755);
    for (int i = 0; i < 1000; i++) {
        sprintf(name, "many/entry-%d", i);
        close(open(name, O_CREAT | O_WRONLY, 0644));
    }
    DIR *directory = opendir("many");
    while ((entry = readdir(directory))) {
        count++;
        if (entry->d_name[0] == 'e')
            sum += atoi(entry->d_name + 6);
        if (count == 500)
            position = telldir(directory);
    }
    printf("entries %ld, their numbers' sum %ld\n", count, sum);
    seekdir(directory, position);
    for (count = 0; readdir(directory);)
        count++;
    printf("entries after the 500th: %ld\n", count);
    closedir(directory);
    return 0;
}

static long times(void)
{
    struct timespec both[2] = {{1000000001, 123456789}, {1000000002, 987654321}};
    struct stat status;
    close(make("times", "x"));
    if (utimensat(AT_FDCWD, "times", both, 0) < 0)
        return -1;
    stat("times", &status);
    printf("times: %ld.%09ld %ld.%09ld\n", (long)status.st_atim.tv_sec, status.st_atim.tv_nsec, (long)status.st_mtim.tv_sec,
           status.st_mtim.tv_nsec);
    return 0;
}

static long attribute(const char *name, const char *value, size_t size)
{
    char back[256];
    close(make("attributes", "x"));
    if (setxattr("attributes", name, value, size, 0) < 0)
        return -1;
    ssize_t length = getxattr("attributes", name, back, sizeof back);
    if (length != (ssize_t)size || memcmp(back, value, size))
        printf("%s reads back as %ld other bytes\n", name, (long)length);
    return length;
}

/* An ACL for user 1000 (xattr(7), acl(5)): version 2, then entries of tag, permissions, id. */
static long acl(void)
{
    struct {
        unsigned version;
        struct {
            unsigned short tag, permissions;
            unsigned id;
        } entries[5];
    } acl = {2, {{1, 6, -1u}, {2, 7, 1000}, {4, 4, -1u}, {16, 7, -1u}, {32, 0, -1u}}};
    struct stat status;
    long result = attribute("system.posix_acl_access", (void *)&acl, sizeof acl);
    stat("attributes", &status);
    printf("mode with an ACL: %o\n", status.st_mode & 07777);
    return result;
}

static long long_names(void)
{
    char name[258];
    memset(name, 'n', sizeof name);
    name[255] = 0;
    say("name of 255 bytes", close(make(name, "")));
    name[255] = 'n';
    name[256] = 0;
    return open(name, O_CREAT | O_WRONLY, 0644);
}

static long socket_file(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
    int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    unlink("socket");
    if (bind(server, (struct sockaddr *)&address, sizeof address) < 0 || listen(server, 1) < 0)
        return -1;
    return connect(client, (struct sockaddr *)&address, sizeof address);
}

static long stable_numbers(void)
{
    struct stat one, two, link_status;
    close(make("number", "x"));
    stat("number", &one);
    link("number", "number2");
    rename("number", "number3");
    stat("number3", &two);
    stat("number2", &link_status);
    printf("inode number same after rename %d, by link %d, links %ld\n", one.st_ino == two.st_ino,
           one.st_ino == link_status.st_ino && one.st_dev == link_status.st_dev, (long)link_status.st_nlink);
    return 0;
}

static long copied_range(void)
{
    int from = make("from", "0123456789"), to = make("to", "");
    off64_t at = 2;
    return copy_file_range(from, &at, to, 0, 5, 0);
}

static long sane_statfs(void)
{
    struct statfs status;
    if (statfs(".", &status) < 0)
        return -1;
    printf("statfs: block %ld, size %d, free %d, inodes %d, names %ld\n", (long)status.f_bsize, status.f_blocks > 0,
           status.f_bavail > 0 && status.f_bfree <= status.f_blocks, status.f_files > 0, (long)status.f_namelen);
    return 0;
}

static long appended(void)
{
    char text[16] = {0};
    int one = make("append", ""), two = open("append", O_WRONLY | O_APPEND), three = open("append", O_WRONLY | O_APPEND);
    if (write(two, "a", 1) < 0 || write(three, "b", 1) < 0 || write(two, "c", 1) < 0 || pread(one, text, 8, 0) < 0)
        return -1;
    printf("appended: %s\n", text);
    return 0;
}

/* What a file has, or the name of the error. */
static long content_of(const char *name)
{
    char text[16] = {0};
    int fd = open(name, O_RDONLY);
    if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
        return -1;
    printf("%s has %s\n", name, text);
    return 0;
}

/* As the user who owns none of it. */
static long as_user(long (*act)(void))
{
    if (setgid(1000) < 0 || setuid(1000) < 0)
        return -1;
    return act();
}

static long replace_in_sticky(void)
{
    int fd = open("sticky/own", O_CREAT | O_WRONLY, 0644);
    return fd < 0 ? -1 : rename("sticky/own", "sticky/of-root");
}

static long create_in_closed(void)
{
    return open("closed/file", O_CREAT | O_WRONLY, 0644);
}

static long make_directory_in_closed(void)
{
    return mkdir("closed/directory", 0755);
}

/* Has an image's file open whose name is gone by the time it is first used. */
static long use_unlinked(const char *name, int flags)
{
    char text[16] = {0};
    int fd = open(name, flags);
    if (fd < 0 || unlink(name) < 0 || (flags != O_RDONLY && pwrite(fd, "new", 3, 0) < 0)
        || pread(fd, text, sizeof text - 1, 0) < 0)
        return -1;
    printf("%s has %s\n", name, text);
    return fsync(fd);
}

static long change_unlinked(const char *name)
{
    struct stat status;
    int fd = open(name, O_RDWR);
    if (fd < 0 || unlink(name) < 0 || ftruncate(fd, 2) < 0 || fchmod(fd, 0600) < 0 || fstat(fd, &status) < 0)
        return -1;
    printf("size %ld, mode %o, links %ld\n", (long)status.st_size, status.st_mode & 07777, (long)status.st_nlink);
    return 0;
}

/* The names are those of the image (tests/node/images/build), each used once: the second use knows it. */
static void unseen(const char *directory)
{
    umask(022);
    if (chdir(directory) < 0) {
        say(directory, -1);
        return;
    }
    TRY("open of a file to be created", open("one", O_CREAT | O_RDWR, 0600));
    TRY("its content", content_of("one"));
    TRY("exclusive creation of a file that is there", open("two", O_CREAT | O_EXCL | O_WRONLY, 0600));
    TRY("open to truncate", open("three", O_CREAT | O_TRUNC | O_WRONLY, 0600));
    TRY("its content", content_of("three"));
    TRY("creation through a symbolic link", open("link-to-new", O_CREAT | O_WRONLY, 0644));
    TRY("what it made", access("made-by-link", F_OK));
    TRY("exclusive creation through a symbolic link", open("link-to-one", O_CREAT | O_EXCL | O_WRONLY, 0644));
    TRY("creation of a directory's name", open("directory-one", O_CREAT | O_WRONLY, 0644));
    TRY("directory that is there", mkdir("directory-two", 0755));
    TRY("link to a name that is there", link("one", "four"));
    TRY("symbolic link to a name that is there", symlink("one", "five"));
    TRY("socket or pipe of a name that is there", mkfifo("six", 0644));
    TRY("rename over a file", (close(make("new", "new")), rename("new", "seven")));
    TRY("its content", content_of("seven"));
    TRY("rename without replacing", (close(make("new", "new")), renameat2(AT_FDCWD, "new", AT_FDCWD, "eight", RENAME_NOREPLACE)));
    TRY("rename over a directory", rename("new", "directory-three"));
    TRY("rename of a directory over a file", (mkdir("tree", 0755), rename("tree", "nine")));
    TRY("rename of a directory over an empty one", rename("tree", "directory-four"));
    TRY("rename of a directory over a full one", (mkdir("tree", 0755), rename("tree", "directory-full")));
    TRY("rename to a new name", rename("new", "newer"));
    TRY("its old name", access("new", F_OK));
    TRY("exchange", renameat2(AT_FDCWD, "newer", AT_FDCWD, "ten", RENAME_EXCHANGE));
    TRY("its content", content_of("ten"));
    TRY("rename over another's in a sticky directory", as_user(replace_in_sticky));
    TRY("creation where that is not allowed", as_user(create_in_closed));
    TRY("directory where that is not allowed", as_user(make_directory_in_closed));
    TRY("name that is not there", access("missing", F_OK));
    TRY("the same, made", (close(make("missing", "here")), content_of("missing")));
    TRY("the same, gone", (unlink("missing"), access("missing", F_OK)));
    TRY("read of what is unlinked", use_unlinked("eleven", O_RDONLY));
    TRY("write to what is unlinked", use_unlinked("twelve", O_RDWR));
    TRY("its name", access("twelve", F_OK));
    TRY("size and mode of what is unlinked", change_unlinked("thirteen"));
}

/* Files that were closed a moment ago, whose pages may still be on their way. */
static long closed_a_moment_ago(void)
{
    static char data[3 * 4096];
    struct stat status;
    memset(data, 'x', sizeof data);
    int fd = open("late", O_CREAT | O_WRONLY, 0666);
    if (pwrite(fd, data, sizeof data, 1 << 20) != sizeof data || close(fd) < 0 || stat("late", &status) < 0)
        return -1;
    printf("file just closed: size %ld, has blocks %d\n", (long)status.st_size, status.st_blocks > 0);
    fd = open("late", O_RDWR);
    printf("its first data at %ld\n", (long)lseek(fd, 0, SEEK_DATA));
    struct timespec old[2] = {{.tv_sec = 1000000000, .tv_nsec = 5}, {.tv_sec = 1000000000, .tv_nsec = 5}};
    if (pwrite(fd, "y", 1, 0) != 1 || futimens(fd, old) < 0 || fsync(fd) < 0 || fstat(fd, &status) < 0)
        return -1;
    printf("time set after a write: %ld.%09ld\n", (long)status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
    if (ftruncate(fd, (1 << 20) + 1) < 0 || ftruncate(fd, (1 << 20) + 2) < 0 || pread(fd, data, 2, 1 << 20) != 2)
        return -1;
    printf("cut off and longer again: %d %d\n", data[0], data[1]);
    return 0;
}

static long written_by_another(void)
{
    int fd = open("late", O_WRONLY);
    return fd < 0 ? -1 : write(fd, "z", 1);
}

static long loses_set_user_id(void)
{
    struct stat status;
    if (chmod("late", 06777) < 0)
        return -1;
    if (fork() == 0)
        _exit(as_user(written_by_another) != 1);
    int ended = 0;
    wait(&ended);
    if (ended != 0 || stat("late", &status) < 0)
        return -1;
    printf("mode after a write by another: %o\n", status.st_mode & 07777);
    return 0;
}

static void files(const char *directory)
{
    umask(022);
    if (chdir(directory) < 0) {
        say(directory, -1);
        return;
    }
    TRY("flock is exclusive", lock_conflict(0));
    TRY("fcntl lock is exclusive", lock_conflict(1));
    TRY("open file description lock is exclusive", lock_conflict(2));
    TRY("shared mapping", mapped_write(MAP_SHARED));
    TRY("private mapping", mapped_write(MAP_PRIVATE));
    TRY("O_DIRECT", direct());
    TRY("O_TMPFILE, linked", tmpfile_linked());
    TRY("holes", holes());
    TRY("unlinked file", unlinked());
    TRY("setuid bits", set_user_id_cleared());
    TRY("inotify", notified());
    TRY("directory of 1000", listing());
    TRY("times", times());
    TRY("user xattr", attribute("user.probe", "value", 5));
    TRY("large user xattr", attribute("user.large", (char[250]){1, 2, 3}, 250));
    TRY("trusted xattr", attribute("trusted.probe", "value", 5));
    TRY("security.capability", attribute("security.capability", "\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0", 20));
    TRY("ACL", acl());
    TRY("name of 256 bytes", long_names());
    TRY("socket", socket_file());
    TRY("inode numbers", stable_numbers());
    TRY("copy_file_range", copied_range());
    TRY("statfs", sane_statfs());
    TRY("O_APPEND of two", appended());
    TRY("mkfifo", mkfifo("fifo", 0640));
    TRY("mknod of a device", mknod("device", S_IFCHR | 0600, 1 << 8 | 3));
    TRY("open of the device", open("device", O_RDONLY));
    TRY("symbolic link loop", (symlink("loop", "loop"), open("loop", O_RDONLY)));
    TRY("file just closed", closed_a_moment_ago());
    TRY("set-user-ID and a write by another", loses_set_user_id());
    TRY("rename over", (close(make("old", "1")), close(make("new", "2")), rename("new", "old")));
    TRY("rename without replacing", (close(make("new", "2")), renameat2(AT_FDCWD, "new", AT_FDCWD, "old", RENAME_NOREPLACE)));
    TRY("rename as exchange", renameat2(AT_FDCWD, "new", AT_FDCWD, "old", RENAME_EXCHANGE));
    TRY("rename with whiteout", renameat2(AT_FDCWD, "new", AT_FDCWD, "gone", RENAME_WHITEOUT));
    TRY("rename into itself", (mkdir("tree", 0755), rename("tree", "tree/below")));
    TRY("rmdir of what is not empty", (close(make("tree/file", "")), rmdir("tree")));
    TRY("open of a directory for writing", open("tree", O_WRONLY));
    TRY("O_EXCL", open("old", O_CREAT | O_EXCL | O_WRONLY, 0644));
    TRY("O_NOATIME", open("old", O_RDONLY | O_NOATIME));
    TRY("lease", fcntl(open("old", O_RDONLY), F_SETLEASE, F_RDLCK));
    TRY("sync_file_range", sync_file_range(open("old", O_RDWR), 0, 0, SYNC_FILE_RANGE_WRITE));
    TRY("fsync of a directory", fsync(open(".", O_RDONLY)));
    TRY("file beyond 4 GiB", pwrite(make("beyond", ""), "x", 1, 5L << 30));
    TRY("syncfs", syncfs(open(".", O_RDONLY)));
    TRY("immutable flag", ioctl(open("old", O_RDONLY), FS_IOC_SETFLAGS, &(int){FS_IMMUTABLE_FL}));
}

static const struct sockaddr_un meeting = {.sun_family = AF_UNIX, .sun_path = "meeting"};

/* Does what `meet` asks for by one character, and answers with what it has found. */
static void serve(int peer, char *map, int fifo)
{
    char order;
    while (read(peer, &order, 1) == 1) {
        char answer[16] = "done";
        int grown = -1;
        switch (order) {
        case 'f':
            memset(answer, 0, sizeof answer);
            if (read(fifo, answer, sizeof answer - 1) < 0)
                strcpy(answer, "nothing");
            break;
        case 'm':
            strcpy(map, "changed");
            break;
        case 'g':
            grown = open("grown", O_WRONLY | O_APPEND);
            if (write(grown, "more", 4) != 4)
                perror("grown");
            close(grown);
            break;
        case 'c':
            close(make("made", ""));
            break;
        case 'r':
            rename("made", "renamed");
            break;
        }
        if (write(peer, answer, sizeof answer) < 0)
            perror("answer");
    }
    close(peer);
}

static int hold(const char *directory)
{
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (chdir(directory) < 0 || bind(listener, (struct sockaddr *)&meeting, sizeof meeting) < 0 || listen(listener, 1) < 0) {
        perror(directory);
        return 1;
    }
    int held = make("held", "as it was");
    char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, held, 0);
    int fifo = mkfifo("fifo", 0666) < 0 ? -1 : open("fifo", O_RDWR | O_NONBLOCK);
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (map == MAP_FAILED || fifo < 0 || flock(make("flock", ""), LOCK_EX) < 0
        || fcntl(make("posix", ""), F_SETLK, &all) < 0 || fcntl(make("ofd", ""), F_OFD_SETLK, &all) < 0) {
        perror(directory);
        return 1;
    }
    close(make("grown", "some"));
    puts("holding");
    fflush(stdout);
    for (;;)
        serve(accept(listener, 0, 0), map, fifo);
}

static void ask(int peer, char order)
{
    char answer[16] = {0};
    if (write(peer, &order, 1) != 1 || read(peer, answer, sizeof answer) <= 0)
        strcpy(answer, "no answer");
    printf("asked for %c: %s\n", order, answer);
}

static long announced(int peer, int events, char order)
{
    char buffer[4096];
    struct inotify_event *event = (void *)buffer;
    ask(peer, order);
    struct pollfd ready = {.fd = events, .events = POLLIN};
    if (poll(&ready, 1, 2000) != 1 || read(events, buffer, sizeof buffer) < (long)sizeof *event)
        return -1;
    printf("event %x of %s\n", event->mask, event->name);
    return 0;
}

static int meet(const char *directory)
{
    int peer = socket(AF_UNIX, SOCK_STREAM, 0), fifo, grown, events;
    char text[16] = {0};
    struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET}, found = all;
    struct stat before, after;

    if (chdir(directory) < 0)
        return 1;
    say("socket of the other", connect(peer, (struct sockaddr *)&meeting, sizeof meeting));
    say("fifo of the other", fifo = open("fifo", O_WRONLY | O_NONBLOCK));
    say("write to the fifo", write(fifo, "through", 7));
    ask(peer, 'f');
    char *map = mmap(0, 4096, PROT_READ, MAP_SHARED, open("held", O_RDONLY), 0);
    if (map != MAP_FAILED) {
        printf("mapping shows: %s\n", map);
        ask(peer, 'm');
        printf("mapping shows: %s\n", map);
    }
    say("file that grows", grown = open("grown", O_RDONLY));
    fstat(grown, &before);
    ask(peer, 'g');
    fstat(grown, &after);
    printf("grown by %ld, shows %s\n", (long)(after.st_size - before.st_size), pread(grown, text, 8, 0) == 8 ? text : "less");
    say("flock", flock(open("flock", O_RDONLY), LOCK_EX | LOCK_NB));
    say("POSIX lock", fcntl(open("posix", O_RDWR), F_SETLK, &all));
    say("open file description lock", fcntl(open("ofd", O_RDWR), F_OFD_SETLK, &all));
    say("who has the lock", fcntl(open("posix", O_RDONLY), F_GETLK, &found));
    printf("lock of type %d\n", found.l_type);
    events = inotify_init1(IN_CLOEXEC);
    inotify_add_watch(events, ".", IN_CREATE | IN_MOVED_TO);
    say("event of a creation", announced(peer, events, 'c'));
    say("event of a renaming", announced(peer, events, 'r'));
    say("new name", access("renamed", F_OK));
    unlink("renamed");
    return 0;
}

static long long nanoseconds(struct timespec time)
{
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static long long clock_of(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return nanoseconds(now);
}

/* By how much a new file is newer than the clock after its making. */
static long long newer(long long *now)
{
    struct stat status;
    int fd;
    unlink("stamp");
    fd = make("stamp", "x");
    fstat(fd, &status);
    *now = clock_of(CLOCK_REALTIME);
    close(fd);
    return nanoseconds(status.st_mtim) - *now;
}

static int compare_clock(const char *directory)
{
    int future = 0, past = 0;
    long long worst = 0, now;
    if (chdir(directory) < 0)
        return 1;
    for (int i = 0; i < 40; i++) {
        long long before = clock_of(CLOCK_REALTIME), ahead = newer(&now);
        if (ahead > 10000000)
            future++;
        /* The host's kernel stamps files by its tick, of 10 ms at most. */
        if (now + ahead < before - 20000000)
            past++;
        if (ahead > worst)
            worst = ahead;
    }
    printf("of 40 files %d newer than the clock by more than 10 ms, %d older than their making by more than 20 ms\n", future, past);
    fprintf(stderr, "the newest by %lld us\n", worst / 1000);
    return 0;
}

static int steps(const char *directory, int count)
{
    long long since = 0, now, second = 1000000000;
    long long offset = clock_of(CLOCK_REALTIME) - clock_of(CLOCK_BOOTTIME);
    if (chdir(directory) < 0)
        return 1;
    puts("waiting");
    fflush(stdout);
    while (count > 0) {
        long long ahead = llabs(newer(&now)), boot = clock_of(CLOCK_BOOTTIME), step = now - boot - offset;
        if (ahead > second && !since)
            since = boot;
        if (llabs(step) > second && ahead < second) {
            printf("set by %lld s, files of another time for %lld ms\n", (step + (step > 0 ? second : -second) / 2) / second,
                   since ? (boot - since) / 1000000 : 0);
            fflush(stdout);
            offset += step;
            since = 0;
            count--;
        }
        usleep(5000);
    }
    return 0;
}

static struct flock everything = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

static int open_for(const char *lock)
{
    return open(lock, O_RDWR | O_CREAT, 0666);
}

static int lock(const char *directory)
{
    int whole;
    if (chdir(directory) < 0 || (whole = open(".", O_RDONLY)) < 0 || flock(open_for("flock"), LOCK_EX) < 0
        || flock(whole, LOCK_EX) < 0 || fcntl(open_for("posix"), F_SETLKW, &everything) < 0
        || fcntl(open_for("ofd"), F_OFD_SETLKW, &everything) < 0) {
        perror(directory);
        return 1;
    }
    puts("locked");
    fflush(stdout);
    for (;;)
        pause();
}

static void nothing(int signal)
{
    (void)signal;
}

/* Waits for a lock until a signal comes. */
static long interrupted(int kind)
{
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGALRM, &action, 0);
    alarm(1);
    return kind == 0 ? flock(open_for("flock"), LOCK_EX) : fcntl(open_for("posix"), F_SETLKW, &everything);
}

static int try(const char *directory)
{
    struct flock found = everything;
    if (chdir(directory) < 0)
        return 1;
    TRY("flock", flock(open_for("flock"), LOCK_EX | LOCK_NB));
    TRY("flock of a reader", flock(open("flock", O_RDONLY), LOCK_SH | LOCK_NB));
    TRY("flock of a directory", flock(open(".", O_RDONLY), LOCK_SH | LOCK_NB));
    TRY("POSIX lock", fcntl(open_for("posix"), F_SETLK, &everything));
    TRY("open file description lock", fcntl(open_for("ofd"), F_OFD_SETLK, &everything));
    say("who has the lock", fcntl(open_for("posix"), F_GETLK, &found));
    printf("lock of type %d from %ld for %ld\n", found.l_type, (long)found.l_start, (long)found.l_len);
    fflush(stdout);
    TRY("flock that is waited for", interrupted(0));
    TRY("POSIX lock that is waited for", interrupted(1));
    return 0;
}

static int count(const char *file, int times)
{
    int fd = open(file, O_RDWR);
    while (times-- > 0) {
        char text[16] = {0};
        struct flock unlock = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
        if (fcntl(fd, F_SETLKW, &everything) < 0 || pread(fd, text, 8, 0) != 8)
            return 1;
        snprintf(text, sizeof text, "%08u", atoi(text) + 1u);
        if (pwrite(fd, text, 8, 0) != 8 || fcntl(fd, F_SETLK, &unlock) < 0)
            return 1;
    }
    return 0;
}

/*
 * The number is waited for by futex(2), so a store by one has to be the other's at once: in one page, of one inode. The first
 * has a mapping alone, the second reads and writes the file.
 */
static int turns(const char *file, unsigned who, unsigned times)
{
    int fd = open(file, O_RDWR);
    unsigned *number = mmap(0, sizeof *number, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), seen;
    if (number == MAP_FAILED) {
        perror(file);
        return 1;
    }
    for (unsigned mine = who; mine < 2 * times; mine += 2) {
        unsigned next = mine + 1;
        while ((seen = __atomic_load_n(number, __ATOMIC_SEQ_CST)) != mine)
            syscall(SYS_futex, number, FUTEX_WAIT, seen, 0, 0, 0);
        if (who == 0)
            __atomic_store_n(number, next, __ATOMIC_SEQ_CST);
        else if (pread(fd, &seen, sizeof seen, 0) != sizeof seen || seen != mine
                 || pwrite(fd, &next, sizeof next, 0) != sizeof next) {
            printf("read %u instead of %u\n", seen, mine);
            return 1;
        }
        syscall(SYS_futex, number, FUTEX_WAKE, 1, 0, 0, 0);
    }
    return 0;
}

static int is_changed(int fd)
{
    char text[8] = {0};
    int is_so = pread(fd, text, 6, 0) == 6 && !memcmp(text, "change", 6);
    close(fd);
    return is_so;
}

static int is_listed(const char *name)
{
    int found = 0;
    DIR *directory = opendir(".");
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        found |= !strcmp(entry->d_name, name);
    closedir(directory);
    return found;
}

static struct stat status_of(const char *name)
{
    struct stat status = {0};
    stat(name, &status);
    return status;
}

/* The changes, and whether one is seen. Each file has 6 bytes before. */
static int change(const char *directory)
{
    if (chdir(directory) < 0)
        return 1;
    long long now = clock_of(CLOCK_REALTIME);
    if (pwrite(open("content", O_WRONLY), "change", 6, 0) != 6 || pwrite(open("open", O_WRONLY), "change", 6, 0) != 6
        || truncate("length", 5) < 0 || chmod("mode", 0600) < 0 || close(make("new", "change")) < 0 || unlink("gone") < 0
        || rename("from", "to") < 0 || close(make("next", "change")) < 0 || rename("next", "replaced") < 0) {
        perror(directory);
        return 1;
    }
    printf("changed: %lld\n", now);
    return 0;
}

static const char *const changes[] = {
    "content", "content of an open file", "length", "mode", "new file", "new file in the list", "removed file",
    "new name", "old name", "file in the place of another",
};

static int is_seen(int what, int fd)
{
    switch (what) {
    case 0: return is_changed(open("content", O_RDONLY));
    case 1: return is_changed(dup(fd));
    case 2: return status_of("length").st_size == 5;
    case 3: return (status_of("mode").st_mode & 07777) == 0600;
    case 4: return is_changed(open("new", O_RDONLY));
    case 5: return is_listed("new");
    case 6: return access("gone", F_OK) < 0;
    case 7: return access("to", F_OK) == 0;
    case 8: return access("from", F_OK) < 0;
    default: return is_changed(open("replaced", O_RDONLY));
    }
}

/* Nothing tells of another machine's changes: this asks every 5 ms, for 20 s at most. */
static int see(const char *directory)
{
    enum { COUNT = sizeof changes / sizeof *changes };
    int left = COUNT, is_done[COUNT] = {0}, fd = -1;
    long long end = clock_of(CLOCK_MONOTONIC) + 20000000000;
    if (chdir(directory) < 0 || (fd = open("open", O_RDONLY)) < 0) {
        perror(directory);
        return 1;
    }
    for (int round = 0; left > 0 && clock_of(CLOCK_MONOTONIC) < end; round++) {
        for (int i = 0; i < COUNT; i++) {
            if (is_done[i] || !is_seen(i, fd))
                continue;
            printf("%s: %lld\n", changes[i], clock_of(CLOCK_REALTIME));
            is_done[i] = 1;
            left--;
        }
        if (round == 0)
            puts("looking");
        fflush(stdout);
        usleep(5000);
    }
    for (int i = 0; i < COUNT; i++) {
        if (!is_done[i])
            printf("%s: never\n", changes[i]);
    }
    return 0;
}

/* Of a record in bytes, no divisor of a page's, and how many there are at most. */
enum { RECORD = 3000, RECORDS = 20000 };

/* Where each record goes: to the end of one file, into the mapping of another, and into the place of a third. */
struct records {
    int directory, log;
    char *map;
};

static int open_records(struct records *to, const char *name)
{
    to->directory = open(name, O_RDONLY | O_DIRECTORY);
    to->log = openat(to->directory, "log", O_CREAT | O_WRONLY | O_APPEND, 0644);
    int mapped = openat(to->directory, "mapped", O_CREAT | O_RDWR, 0644);
    if (to->log < 0 || mapped < 0 || ftruncate(mapped, (long)RECORD * RECORDS) < 0 || fsync(to->directory) < 0)
        return -1;
    to->map = mmap(0, (long)RECORD * RECORDS, PROT_READ | PROT_WRITE, MAP_SHARED, mapped, 0);
    return to->map == MAP_FAILED ? -1 : 0;
}

static int keep(const struct records *to, int number, const char *record)
{
    char *place = to->map + (number - 1L) * RECORD, *page = place - (place - to->map) % 4096;
    int next = openat(to->directory, "next", O_CREAT | O_TRUNC | O_WRONLY, 0644);
    memcpy(place, record, RECORD);
    if (write(to->log, record, RECORD) != RECORD || fsync(to->log) < 0 || msync(page, place + RECORD - page, MS_SYNC) < 0
        || write(next, record, RECORD) != RECORD || fsync(next) < 0 || close(next) < 0
        || renameat(to->directory, "next", to->directory, "current") < 0 || fsync(to->directory) < 0)
        return -1;
    return 0;
}

/* A record is its number in 8 digits, over and over. */
static int record(char **directories, int count)
{
    struct records all[count];
    char text[RECORD + 1];
    for (int i = 0; i < count; i++) {
        if (open_records(&all[i], directories[i]) < 0) {
            perror(directories[i]);
            return 1;
        }
    }
    for (int number = 1; number <= RECORDS; number++) {
        for (int at = 0; at < RECORD; at += 8)
            sprintf(text + at, "%08d", number);
        for (int i = 0; i < count; i++) {
            if (keep(&all[i], number, text) < 0) {
                perror(directories[i]);
                return 1;
            }
        }
        printf("%d\n", number);
        fflush(stdout);
    }
    return 0;
}

static int starve(unsigned int seconds)
{
    FILE *limit = fopen("/proc/sys/kernel/sched_rt_runtime_us", "w");

    if (!limit || fputs("-1", limit) < 0 || fclose(limit)) {
        perror("sched_rt_runtime_us");
        return 1;
    }
    if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){ .sched_priority = 99 })) {
        perror("sched_setscheduler");
        return 1;
    }
    if (puts("starving") < 0 || fflush(stdout))
        return 1;
    for (time_t end = time(NULL) + seconds; time(NULL) < end;)
        ;
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "calls"))
        calls();
    else if (argc == 2 && !strcmp(argv[1], "options"))
        options();
    else if (argc == 3 && !strcmp(argv[1], "files"))
        files(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "unseen"))
        unseen(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "hold"))
        return hold(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "meet"))
        return meet(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "clock"))
        return compare_clock(argv[2]);
    else if (argc == 4 && !strcmp(argv[1], "steps"))
        return steps(argv[2], atoi(argv[3]));
    else if (argc == 3 && !strcmp(argv[1], "lock"))
        return lock(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "try"))
        return try(argv[2]);
    else if (argc == 4 && !strcmp(argv[1], "count"))
        return count(argv[2], atoi(argv[3]));
    else if (argc == 5 && !strcmp(argv[1], "turns"))
        return turns(argv[2], atoi(argv[3]), atoi(argv[4]));
    else if (argc == 3 && !strcmp(argv[1], "see"))
        return see(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "change"))
        return change(argv[2]);
    else if (argc > 2 && !strcmp(argv[1], "record"))
        return record(argv + 2, argc - 2);
    else if (argc == 3 && !strcmp(argv[1], "starve"))
        return starve(atoi(argv[2]));
    else
        return 2;
    return 0;
}
