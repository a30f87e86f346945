/*
 * Checks that a directory's file system does what POSIX and Linux's manual pages say of one.
 *
 *     posix DIRECTORY
 *
 * Prints a line for each assertion that fails, and ends with 1 if one did. Run as root. Each section (the table is at the
 * end) has a process and a directory of its own.
 *
 * Left out is what docs/compatibility.md lists. Where a file system may do without something (files without a name, extended
 * attributes, modes of fallocate), EOPNOTSUPP is no failure.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static const char *section;
static int failures;

static void failed(int line, const char *what, const char *found, const char *wanted)
{
    printf("%s, line %d: %s: %s instead of %s\n", section, line, what, found, wanted);
    failures++;
}

static const char *word(long result, char *buffer)
{
    if (result < 0)
        return strerrorname_np(-result);
    sprintf(buffer, "%ld", result);
    return buffer;
}

static void gives(int line, const char *what, long result, long wanted)
{
    char one[24], other[24];
    if (result != wanted)
        failed(line, what, word(result, one), word(wanted, other));
}

static long succeeds(int line, const char *what, long result)
{
    if (result < 0)
        failed(line, what, strerrorname_np(-result), "success");
    return result;
}

/* What a call returns, or its error as a negative number. */
#define RESULT(call) ({ long result = (long)(call); result == -1 ? -errno : result; })
#define IS(wanted, call) gives(__LINE__, #call, RESULT(call), wanted)
#define FAILS(error, call) gives(__LINE__, #call, RESULT(call), -(error))
#define OK(call) succeeds(__LINE__, #call, RESULT(call))
#define HOLDS(condition) ((condition) ? (void)0 : failed(__LINE__, #condition, "false", "true"))

/* Goes on as another user, with one more group than its own, or as root again. */
static void become(uid_t id)
{
    const gid_t more = 2000;
    OK(setresuid(-1, 0, -1));
    OK(setgroups(id ? 1 : 0, &more));
    OK(setresgid(id, id, 0));
    OK(setresuid(id, id, 0));
}

static const uid_t user = 1000;

/* A file with a text, open. */
static int file(const char *name, const char *text)
{
    int fd = OK(open(name, O_RDWR | O_CREAT | O_TRUNC, 0644));
    IS(strlen(text), write(fd, text, strlen(text)));
    return fd;
}

static void put(const char *name, const char *text)
{
    OK(close(file(name, text)));
}

static void put_owned(const char *name, uid_t owner, gid_t group, mode_t mode)
{
    put(name, "text");
    OK(chown(name, owner, group));
    OK(chmod(name, mode));
}

/* Whether an open file has this content and no more. */
static int has(int fd, const void *content, size_t size)
{
    static char found[1 << 18];
    return pread(fd, found, sizeof found, 0) == (ssize_t)size && !memcmp(found, content, size);
}

#define HAS(fd, text) HOLDS(has(fd, text, sizeof text - 1))

static int reads(const char *name, const char *text)
{
    int fd = open(name, O_RDONLY), is_so = fd >= 0 && has(fd, text, strlen(text));
    close(fd);
    return is_so;
}

static struct stat of(const char *name)
{
    struct stat status = {0};
    OK(lstat(name, &status));
    return status;
}

static struct stat of_open(int fd)
{
    struct stat status = {0};
    OK(fstat(fd, &status));
    return status;
}

static int same(const char *name, const char *other)
{
    return of(name).st_ino == of(other).st_ino;
}

/* Whether a name is there, for a process that has never asked. */
static int is_there(const char *name)
{
    pid_t child = fork();
    int status = -1;
    if (child == 0)
        _exit(access(name, F_OK) == 0);
    waitpid(child, &status, 0);
    return WEXITSTATUS(status);
}

static int listed(const char *directory, const char *name)
{
    DIR *all = opendir(directory);
    int found = 0;
    for (struct dirent *entry; all && (entry = readdir(all));)
        found += !strcmp(entry->d_name, name);
    if (all)
        closedir(all);
    return found;
}

static void opening(void)
{
    struct stat status;
    char text[4];
    int fd;

    mkdir("directory", 0755);
    put("file", "text");
    OK(symlink("file", "link"));
    OK(symlink("made-through-link", "dangling"));
    OK(symlink("directory", "to-directory"));

    FAILS(ENOENT, open("missing", O_RDONLY));
    FAILS(EEXIST, open("file", O_CREAT | O_EXCL | O_RDWR, 0644));
    FAILS(EEXIST, open("directory", O_CREAT | O_EXCL | O_RDWR, 0644));
    FAILS(EEXIST, open("link", O_CREAT | O_EXCL | O_RDWR, 0644));
    FAILS(EEXIST, open("dangling", O_CREAT | O_EXCL | O_RDWR, 0644));
    FAILS(EISDIR, open("directory", O_CREAT | O_RDWR, 0644));
    FAILS(EISDIR, open("directory", O_WRONLY));
    FAILS(EISDIR, open("directory", O_RDWR));
    FAILS(EISDIR, open("new/", O_CREAT | O_RDWR, 0644));
    FAILS(ENOTDIR, open("file/", O_RDONLY));
    FAILS(ENOTDIR, open("file", O_RDONLY | O_DIRECTORY));
    FAILS(ENOTDIR, open("link", O_RDONLY | O_DIRECTORY));
    FAILS(ENOTDIR, open("file/below", O_CREAT | O_RDWR, 0644));
    FAILS(ELOOP, open("link", O_RDONLY | O_NOFOLLOW));
    FAILS(ELOOP, open("dangling", O_CREAT | O_RDWR | O_NOFOLLOW, 0644));
    OK(open("link", O_PATH | O_NOFOLLOW));
    OK(open("to-directory", O_RDONLY | O_DIRECTORY));
    OK(open("to-directory/", O_RDONLY | O_NOFOLLOW));

    OK(close(OK(open("dangling", O_CREAT | O_RDWR, 0644))));
    HOLDS(S_ISREG(of("made-through-link").st_mode));
    OK(close(OK(open("file", O_CREAT | O_RDWR, 0600))));
    HOLDS(reads("file", "text") && (of("file").st_mode & 07777) == 0644);

    fd = OK(open("file", O_RDONLY));
    FAILS(EBADF, write(fd, "x", 1));
    FAILS(EINVAL, ftruncate(fd, 0));
    OK(close(fd));
    fd = OK(open("file", O_WRONLY));
    FAILS(EBADF, read(fd, text, 1));
    OK(close(fd));

    fd = OK(open("file", O_RDONLY));
    OK(close(OK(open("file", O_WRONLY | O_TRUNC))));
    HAS(fd, "");
    OK(close(OK(open("file", O_WRONLY | O_CREAT | O_TRUNC, 0600))));
    HOLDS((of("file").st_mode & 07777) == 0644);

    umask(027);
    OK(close(OK(open("masked", O_CREAT | O_WRONLY, 0666))));
    OK(mkdir("masked-directory", 0777));
    OK(mkfifo("masked-fifo", 0666));
    umask(022);
    HOLDS((of("masked").st_mode & 07777) == 0640);
    HOLDS((of("masked-directory").st_mode & 07777) == 0750);
    HOLDS((of("masked-fifo").st_mode & 07777) == 0640);

    /* What a descriptor may do is decided when it is opened. */
    OK(chmod(".", 0777));
    become(user);
    fd = OK(open("closed", O_CREAT | O_EXCL | O_RDWR, 0));
    FAILS(EACCES, open("closed", O_RDONLY));
    IS(4, write(fd, "text", 4));
    OK(fsync(fd));
    HAS(fd, "text");
    become(0);
    HOLDS(of("closed").st_uid == user && of("closed").st_gid == user && (of("closed").st_mode & 07777) == 0);
    OK(chown("closed", 1, 1));
    become(user);
    IS(4, pwrite(fd, "more", 4, 4));
    OK(ftruncate(fd, 6));
    HAS(fd, "textmo");
    become(0);

    fd = RESULT(open(".", O_TMPFILE | O_RDWR, 0600));
    if (fd == -EOPNOTSUPP)
        return;
    IS(4, write(fd, "text", 4));
    OK(fstat(fd, &status));
    HOLDS(status.st_nlink == 0);
}

static void directories(void)
{
    struct stat parent;
    int fd;

    OK(mkdir("parent", 0755));
    parent = of("parent");
    OK(mkdir("parent/one", 0700));
    OK(mkdir("parent/two/", 0755));
    HOLDS(S_ISDIR(of("parent/one").st_mode) && (of("parent/one").st_mode & 07777) == 0700);
    /* Some file systems do not count (btrfs): their directories have one link. */
    if (parent.st_nlink > 1) {
        HOLDS(of("parent").st_nlink == 4 && of("parent/one").st_nlink == 2);
        OK(mkdir("other", 0755));
        OK(rename("parent/two", "other/two"));
        HOLDS(of("parent").st_nlink == 3 && of("other").st_nlink == 3);
        OK(rename("other/two", "parent/two"));
    }
    FAILS(EEXIST, mkdir("parent", 0755));
    FAILS(EEXIST, mkdir("parent/.", 0755));
    FAILS(ENOENT, mkdir("missing/one", 0755));
    put("file", "");
    FAILS(EEXIST, mkdir("file", 0755));
    FAILS(ENOTDIR, mkdir("file/one", 0755));
    OK(symlink("nowhere", "dangling"));
    FAILS(EEXIST, mkdir("dangling", 0755));

    FAILS(ENOTEMPTY, rmdir("parent"));
    FAILS(EINVAL, rmdir("parent/one/."));
    FAILS(ENOTDIR, rmdir("file"));
    FAILS(ENOTDIR, rmdir("dangling"));
    FAILS(ENOENT, rmdir("missing"));
    FAILS(EISDIR, unlink("parent"));
    FAILS(ENOTDIR, unlink("file/"));
    put("parent/one/last", "");
    FAILS(ENOTEMPTY, rmdir("parent/one"));
    OK(unlink("parent/one/last"));

    /* One that somebody is in. */
    fd = OK(open("parent/one", O_RDONLY | O_DIRECTORY));
    OK(rmdir("parent/one"));
    FAILS(ENOENT, access("parent/one", F_OK));
    FAILS(ENOENT, openat(fd, "file", O_CREAT | O_RDWR, 0644));
    FAILS(ENOENT, mkdirat(fd, "directory", 0755));
    FAILS(ENOENT, faccessat(fd, "file", F_OK, 0));
    HOLDS(of_open(fd).st_nlink == 0 || parent.st_nlink == 1);
    OK(mkdir("parent/one", 0755));
    HOLDS(of("parent/one").st_ino != of_open(fd).st_ino);
    OK(rmdir("parent/one"));
    OK(rmdir("parent/two/"));
    HOLDS(of("parent").st_nlink == parent.st_nlink);

    /* The way up follows a directory that moves. */
    OK(mkdir("up", 0755));
    OK(mkdir("parent/deep", 0755));
    HOLDS(same("parent/deep/..", "parent"));
    OK(rename("parent/deep", "up/deep"));
    HOLDS(same("up/deep/..", "up"));
    FAILS(ENOENT, access("parent/deep", F_OK));
    OK(rmdir("parent"));

    OK(mkdir("set-group", 0755));
    OK(chown("set-group", 0, 2000));
    OK(chmod("set-group", 02775));
    put("set-group/file", "");
    OK(mkdir("set-group/directory", 0755));
    HOLDS(of("set-group/file").st_gid == 2000 && !(of("set-group/file").st_mode & S_ISGID));
    HOLDS(of("set-group/directory").st_gid == 2000 && of("set-group/directory").st_mode & S_ISGID);
}

static void links(void)
{
    int fd = file("one", "text");

    OK(mkdir("directory", 0755));
    OK(symlink("one", "symbolic"));
    OK(link("one", "directory/two"));
    HOLDS(same("one", "directory/two") && of("one").st_nlink == 2 && of("directory/two").st_nlink == 2);
    IS(4, pwrite(fd, "TEXT", 4, 0));
    HOLDS(reads("directory/two", "TEXT"));
    OK(chmod("directory/two", 0600));
    HOLDS((of("one").st_mode & 07777) == 0600 && (of_open(fd).st_mode & 07777) == 0600);
    OK(truncate("directory/two", 2));
    HOLDS(of("one").st_size == 2);

    FAILS(EEXIST, link("one", "directory/two"));
    FAILS(EEXIST, link("one", "one"));
    FAILS(EEXIST, link("one", "symbolic"));
    FAILS(EEXIST, link("one", "directory"));
    FAILS(EPERM, link("directory", "other"));
    FAILS(ENOENT, link("missing", "other"));
    FAILS(ENOENT, link("one", "missing/other"));
    FAILS(ENOTDIR, link("one/below", "other"));
    FAILS(ENOTDIR, link("one", "symbolic/other"));

    OK(link("symbolic", "symbolic-too"));
    HOLDS(S_ISLNK(of("symbolic-too").st_mode) && of("symbolic").st_nlink == 2);
    OK(linkat(AT_FDCWD, "symbolic", AT_FDCWD, "three", AT_SYMLINK_FOLLOW));
    HOLDS(same("one", "three") && of("one").st_nlink == 3);

    OK(unlink("one"));
    FAILS(ENOENT, access("one", F_OK));
    FAILS(ENOENT, access("symbolic", F_OK));
    HOLDS(of_open(fd).st_nlink == 2 && of("three").st_nlink == 2 && reads("directory/two", "TE"));
    OK(rename("three", "one"));
    HOLDS(reads("symbolic", "TE") && of("one").st_nlink == 2);
    put("replacing", "new");
    OK(rename("replacing", "one"));
    HOLDS(of_open(fd).st_nlink == 1 && of("directory/two").st_nlink == 1 && of("one").st_nlink == 1);
    OK(unlink("directory/two"));
    HOLDS(of_open(fd).st_nlink == 0);
}

static void renames(void)
{
    int fd, number;

    put("file", "file");
    put("target", "target");
    put("full-file", "");
    OK(mkdir("empty", 0755));
    OK(mkdir("full", 0755));
    put("full/below", "");
    OK(mkdir("directory", 0755));

    FAILS(ENOENT, rename("missing", "target"));
    FAILS(ENOENT, rename("file", "missing/target"));
    FAILS(EISDIR, rename("file", "empty"));
    FAILS(ENOTDIR, rename("directory", "target"));
    FAILS(ENOTDIR, rename("file", "target/below"));
    FAILS(ENOTDIR, rename("file", "new/"));
    FAILS(ENOTEMPTY, rename("directory", "full"));
    FAILS(EINVAL, rename("directory", "directory/below"));
    OK(mkdir("directory/below", 0755));
    FAILS(EINVAL, rename("directory", "directory/below/itself"));
    FAILS(ENOTEMPTY, rename("directory/below", "directory"));
    HOLDS(reads("file", "file") && reads("target", "target"));

    OK(rename("file", "file"));
    HOLDS(reads("file", "file"));
    /* Two names of one file: nothing happens. */
    OK(link("file", "again"));
    OK(rename("file", "again"));
    HOLDS(of("file").st_nlink == 2 && same("file", "again"));
    OK(unlink("again"));

    fd = OK(open("target", O_RDWR));
    number = of("file").st_ino;
    OK(rename("file", "target"));
    FAILS(ENOENT, access("file", F_OK));
    HOLDS(!is_there("file") && !listed(".", "file") && listed(".", "target") == 1);
    HOLDS(reads("target", "file") && (int)of("target").st_ino == number);
    HOLDS(of_open(fd).st_nlink == 0);
    HAS(fd, "target");
    put("file", "other");
    HOLDS(reads("file", "other") && reads("target", "file"));

    /* A descriptor follows its file. */
    fd = OK(open("file", O_RDWR));
    OK(rename("file", "full/moved"));
    IS(5, pwrite(fd, "moved", 5, 0));
    HOLDS(reads("full/moved", "moved"));
    FAILS(ENOENT, open("file", O_RDONLY));

    OK(rename("directory", "empty"));
    HOLDS(S_ISDIR(of("empty/below").st_mode));
    FAILS(ENOENT, access("directory/below", F_OK));
    OK(rename("empty/", "moved/"));
    FAILS(ENOENT, access("empty/below", F_OK));
    OK(access("moved/below", F_OK));

    OK(symlink("target", "link"));
    OK(rename("link", "link-moved"));
    HOLDS(S_ISLNK(of("link-moved").st_mode) && reads("link-moved", "file"));
    put("over", "over");
    OK(rename("over", "link-moved"));
    HOLDS(S_ISREG(of("link-moved").st_mode) && reads("target", "file"));

    /* As editors and package managers replace a file. */
    for (int round = 0; round < 20; round++) {
        char text[8];
        sprintf(text, "%d", round);
        put("replacing", text);
        OK(rename("replacing", "replaced"));
        HOLDS(reads("replaced", text));
    }
    FAILS(ENOENT, access("replacing", F_OK));
}

static long rename_with(const char *from, const char *to, unsigned flags)
{
    return renameat2(AT_FDCWD, from, AT_FDCWD, to, flags);
}

static void renames_with_flags(void)
{
    put("one", "one");
    put("two", "two");
    OK(mkdir("directory", 0755));
    put("directory/below", "below");

    FAILS(EEXIST, rename_with("one", "two", RENAME_NOREPLACE));
    FAILS(EEXIST, rename_with("one", "one", RENAME_NOREPLACE));
    FAILS(EEXIST, rename_with("one", "directory", RENAME_NOREPLACE));
    FAILS(ENOENT, rename_with("missing", "new", RENAME_NOREPLACE));
    HOLDS(reads("one", "one") && reads("two", "two"));
    OK(rename_with("one", "new", RENAME_NOREPLACE));
    HOLDS(reads("new", "one") && !is_there("one"));
    OK(rename_with("new", "one", RENAME_NOREPLACE));

    FAILS(ENOENT, rename_with("one", "missing", RENAME_EXCHANGE));
    FAILS(ENOENT, rename_with("missing", "one", RENAME_EXCHANGE));
    FAILS(EINVAL, rename_with("one", "two", RENAME_EXCHANGE | RENAME_NOREPLACE));
    FAILS(EINVAL, rename_with("directory/below", "directory", RENAME_EXCHANGE));
    OK(rename_with("one", "two", RENAME_EXCHANGE));
    HOLDS(reads("one", "two") && reads("two", "one"));
    OK(rename_with("one", "directory", RENAME_EXCHANGE));
    HOLDS(reads("one/below", "below") && reads("directory", "two"));
    FAILS(ENOTDIR, access("directory/below", F_OK));
    OK(rename_with("two", "one/below", RENAME_EXCHANGE));
    HOLDS(reads("one/below", "one") && reads("two", "below"));
}

static void unlinked(void)
{
    int fd = file("file", "text"), other = OK(open("file", O_RDWR)), again;
    char *map;

    OK(unlink("file"));
    FAILS(ENOENT, access("file", F_OK));
    FAILS(ENOENT, unlink("file"));
    HOLDS(!listed(".", "file") && !is_there("file"));
    HOLDS(of_open(fd).st_nlink == 0 && of_open(fd).st_size == 4);
    IS(4, pwrite(fd, "more", 4, 4));
    HAS(other, "textmore");
    OK(ftruncate(other, 6));
    HAS(fd, "textmo");
    OK(fchmod(fd, 0600));
    HOLDS((of_open(other).st_mode & 07777) == 0600);
    OK(fsync(fd));

    map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    HOLDS(map != MAP_FAILED);
    map[0] = 'T';
    OK(close(fd));
    HAS(other, "Textmo");
    OK(munmap(map, 4096));

    again = file("file", "another");
    HOLDS(of_open(again).st_ino != of_open(other).st_ino);
    HAS(other, "Textmo");
    HAS(again, "another");

    /* Never read or written until it is gone. */
    put("late", "late");
    fd = OK(open("late", O_RDWR));
    OK(unlink("late"));
    HAS(fd, "late");
    IS(4, pwrite(fd, "more", 4, 0));
    HAS(fd, "more");
}

/* `count` links, each to the one before, down to a file: chain-0. */
static void chain(int count)
{
    char from[24], to[24];
    put("chain-0", "end");
    for (int i = 1; i <= count; i++) {
        sprintf(from, "chain-%d", i - 1);
        sprintf(to, "chain-%d", i);
        OK(symlink(from, to));
    }
}

static void names(void)
{
    char longest[NAME_MAX + 2] = {0}, path[PATH_MAX + 2] = {0}, target[1001] = {0}, found[1100] = {0};
    int fd;

    OK(symlink("target", "link"));
    IS(6, readlink("link", found, sizeof found));
    HOLDS(!memcmp(found, "target", 6) && of("link").st_size == 6 && S_ISLNK(of("link").st_mode));
    IS(3, readlink("link", found, 3));
    FAILS(ENOENT, open("link", O_RDONLY));
    put("target", "text");
    HOLDS(reads("link", "text"));
    FAILS(EINVAL, readlink("target", found, sizeof found));
    FAILS(ENOENT, readlink("missing", found, sizeof found));
    FAILS(EEXIST, symlink("other", "link"));
    FAILS(EEXIST, symlink("other", "target"));
    FAILS(ENOENT, symlink("", "empty"));
    FAILS(ENOENT, symlink("target", ""));
    FAILS(ENOTDIR, symlink("target", "target/below"));
    /* Another link under the same name. */
    OK(unlink("link"));
    OK(symlink("other", "link"));
    IS(5, readlink("link", found, sizeof found));
    HOLDS(!memcmp(found, "other", 5));
    memset(target, 't', 1000);
    OK(symlink(target, "long-link"));
    IS(1000, readlink("long-link", found, sizeof found));
    HOLDS(!memcmp(found, target, 1000));

    OK(symlink("loop", "loop"));
    OK(symlink("ping", "pong"));
    OK(symlink("pong", "ping"));
    FAILS(ELOOP, open("loop", O_RDONLY));
    FAILS(ELOOP, open("ping", O_CREAT | O_RDWR, 0644));
    FAILS(ELOOP, access("loop/below", F_OK));
    chain(41);
    HOLDS(reads("chain-40", "end"));
    FAILS(ELOOP, open("chain-41", O_RDONLY));

    FAILS(ENOTDIR, access("target/below", F_OK));
    FAILS(ENOTDIR, access("target/", F_OK));
    FAILS(ENOENT, access("missing/below", F_OK));
    FAILS(ENOENT, access("", F_OK));
    FAILS(ENOENT, open("missing/..", O_RDONLY));

    memset(longest, 'n', NAME_MAX);
    fd = OK(open(longest, O_CREAT | O_EXCL | O_RDWR, 0644));
    OK(close(fd));
    HOLDS(listed(".", longest) == 1);
    OK(unlink(longest));
    OK(mkdir(longest, 0755));
    OK(rmdir(longest));
    longest[NAME_MAX] = 'n';
    FAILS(ENAMETOOLONG, open(longest, O_CREAT | O_RDWR, 0644));
    FAILS(ENAMETOOLONG, access(longest, F_OK));
    FAILS(ENAMETOOLONG, mkdir(longest, 0755));
    FAILS(ENAMETOOLONG, symlink("target", longest));
    FAILS(ENAMETOOLONG, link("target", longest));
    FAILS(ENAMETOOLONG, rename("target", longest));
    FAILS(ENAMETOOLONG, mkfifo(longest, 0644));
    for (size_t i = 0; i < PATH_MAX; i++)
        path[i] = i % 2 ? '/' : '.';
    FAILS(ENAMETOOLONG, access(path, F_OK));
    path[PATH_MAX - 1] = 0;
    OK(access(path, F_OK));

    for (const char *const *name = (const char *[]){"\xff\xfe", "new\nline", " ", "-", "...", "\\", "*", 0}; *name; name++) {
        put(*name, *name);
        HOLDS(listed(".", *name) == 1 && reads(*name, *name));
        OK(unlink(*name));
    }
    put("Case", "upper");
    FAILS(ENOENT, access("case", F_OK));
}

static mode_t mode_of(int fd)
{
    return of_open(fd).st_mode & 07777;
}

/* By a descriptor that the user has opened, so that the mode matters only to what becomes of it. */
static void owners(void)
{
    int fd = file("file", "text");

    OK(fchmod(fd, 07654));
    HOLDS(mode_of(fd) == 07654 && (of("file").st_mode & 07777) == 07654);
    OK(chmod("file", 0));
    HOLDS(mode_of(fd) == 0);
    OK(fchown(fd, 1, 2));
    HOLDS(of("file").st_uid == 1 && of("file").st_gid == 2);
    OK(chown("file", -1, 3));
    HOLDS(of("file").st_uid == 1 && of("file").st_gid == 3);
    OK(chown("file", 4, -1));
    HOLDS(of("file").st_uid == 4 && of("file").st_gid == 3);
    OK(symlink("file", "link"));
    OK(lchown("link", 5, 6));
    HOLDS(of("link").st_uid == 5 && of("link").st_gid == 6 && of("file").st_uid == 4);
    OK(chown("link", 7, 8));
    HOLDS(of("link").st_uid == 5 && of("file").st_uid == 7 && of("file").st_gid == 8);
    FAILS(ENOENT, chown("missing", 0, 0));
    FAILS(ENOENT, chmod("missing", 0));
    FAILS(ENOTDIR, chmod("file/below", 0));

    /* chown(2): also of root's, if there is somebody who may execute it. */
    OK(fchmod(fd, 06755));
    OK(chown("file", 1, 1));
    HOLDS(mode_of(fd) == 0755);
    OK(fchmod(fd, 06745));
    OK(chown("file", 2, 2));
    HOLDS(mode_of(fd) == 02745);
    OK(mkdir("directory", 0755));
    OK(chmod("directory", 06755));
    OK(chown("directory", 1, 1));
    HOLDS((of("directory").st_mode & 07777) == 06755);

    /* A write by root leaves the bits, one by another takes them off; so does a change of the size. */
    OK(fchmod(fd, 06777));
    IS(1, pwrite(fd, "x", 1, 0));
    HOLDS(mode_of(fd) == 06777);
    become(user);
    IS(1, pwrite(fd, "y", 1, 0));
    become(0);
    HOLDS(mode_of(fd) == 0777 && (of("file").st_mode & 07777) == 0777);
    OK(fsync(fd));
    HOLDS(mode_of(fd) == 0777);
    OK(fchmod(fd, 06777));
    become(user);
    OK(ftruncate(fd, 2));
    become(0);
    HOLDS(mode_of(fd) == 0777);
    OK(fchmod(fd, 06777));
    become(user);
    OK(close(OK(open("file", O_WRONLY | O_TRUNC))));
    become(0);
    HOLDS(mode_of(fd) == 0777);
    /* The first write through a descriptor that was there before. */
    put_owned("owned", user, user, 06755);
    become(user);
    OK(close(fd));
    fd = OK(open("owned", O_WRONLY));
    IS(1, write(fd, "z", 1));
    HOLDS(mode_of(fd) == 0755);
    OK(chmod("owned", 06755));
    HOLDS(mode_of(fd) == 06755);
    OK(chown("owned", -1, 2000));
    HOLDS(mode_of(fd) == 0755 && of_open(fd).st_gid == 2000);
    become(0);
    /* Of a group that is not the owner's. */
    put_owned("foreign", user, 1, 0755);
    become(user);
    OK(chmod("foreign", 02755));
    HOLDS((of("foreign").st_mode & 07777) == 0755);
    become(0);
}

#define AT(time, seconds, nanoseconds) ((time).tv_sec == (seconds) && (time).tv_nsec == (nanoseconds))

static void set_times(void)
{
    const struct timespec both[2] = {{1000000000, 123456789}, {1500000000, 987654321}};
    const struct timespec only_access[2] = {{1100000000, 1}, {0, UTIME_OMIT}};
    const struct timespec only_change[2] = {{0, UTIME_OMIT}, {1200000000, 2}};
    const struct timespec none[2] = {{0, UTIME_OMIT}, {0, UTIME_OMIT}}, now[2] = {{0, UTIME_NOW}, {0, UTIME_NOW}};
    const struct timespec far[2] = {{-1000, 5}, {4102444800, 6}}, wrong[2] = {{0, 1000000000}, {0, 0}};
    int fd = file("file", "text");
    struct stat status;

    OK(utimensat(AT_FDCWD, "file", both, 0));
    status = of("file");
    HOLDS(AT(status.st_atim, 1000000000, 123456789) && AT(status.st_mtim, 1500000000, 987654321));
    HOLDS(status.st_ctim.tv_sec > 1500000000);
    OK(futimens(fd, only_access));
    status = of("file");
    HOLDS(AT(status.st_atim, 1100000000, 1) && AT(status.st_mtim, 1500000000, 987654321));
    OK(futimens(fd, only_change));
    status = of("file");
    HOLDS(AT(status.st_atim, 1100000000, 1) && AT(status.st_mtim, 1200000000, 2));
    OK(futimens(fd, none));
    HOLDS(AT(of("file").st_mtim, 1200000000, 2));
    OK(utimensat(AT_FDCWD, "file", far, 0));
    status = of("file");
    HOLDS(AT(status.st_atim, -1000, 5) && AT(status.st_mtim, 4102444800, 6));
    OK(utimensat(AT_FDCWD, "file", now, 0));
    HOLDS(labs(of("file").st_mtim.tv_sec - time(0)) < 60);
    FAILS(EINVAL, utimensat(AT_FDCWD, "file", wrong, 0));
    FAILS(ENOENT, utimensat(AT_FDCWD, "missing", both, 0));

    OK(symlink("file", "link"));
    OK(utimensat(AT_FDCWD, "link", both, AT_SYMLINK_NOFOLLOW));
    HOLDS(AT(of("link").st_mtim, 1500000000, 987654321) && of("file").st_mtim.tv_sec != 1500000000);
    OK(utimensat(AT_FDCWD, "link", only_change, 0));
    HOLDS(AT(of("file").st_mtim, 1200000000, 2) && of("link").st_mtim.tv_sec == 1500000000);
    OK(mkdir("directory", 0755));
    OK(utimensat(AT_FDCWD, "directory", both, 0));
    HOLDS(AT(of("directory").st_mtim, 1500000000, 987654321));
    put("directory/file", "");
    HOLDS(of("directory").st_mtim.tv_sec > 1500000000);

    /* What was written before does not come with a time of its own. */
    IS(4, pwrite(fd, "more", 4, 0));
    OK(futimens(fd, both));
    OK(close(fd));
    HOLDS(AT(of("file").st_mtim, 1500000000, 987654321));
    fd = OK(open("file", O_RDWR));
    OK(fsync(fd));
    HOLDS(AT(of("file").st_mtim, 1500000000, 987654321) && reads("file", "more"));
    OK(link("file", "file-too"));
    OK(rename("file-too", "file-three"));
    HOLDS(AT(of("file-three").st_mtim, 1500000000, 987654321));

    /* Who may write may set the time to now, the owner to any. */
    OK(chmod("file", 0666));
    become(user);
    FAILS(EPERM, utimensat(AT_FDCWD, "file", both, 0));
    OK(utimensat(AT_FDCWD, "file", now, 0));
    OK(utimensat(AT_FDCWD, "file", 0, 0));
    become(0);
    OK(chmod("file", 0444));
    become(user);
    FAILS(EACCES, utimensat(AT_FDCWD, "file", 0, 0));
    OK(utimensat(AT_FDCWD, "file", none, 0));
    become(0);
    OK(chown("file", user, user));
    become(user);
    OK(utimensat(AT_FDCWD, "file", both, 0));
    become(0);
    HOLDS(AT(of("file").st_mtim, 1500000000, 987654321));
}

/* Longer than a tick of the clocks by which kernels stamp files, and than the difference of two of them. */
static void later(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, 0);
}

/* The times that an act changes: of modification and of change, of a file and of its directory. */
enum { FM = 1, FC = 2, DM = 4, DC = 8, FILE_TIMES = FM | FC, DIRECTORY_TIMES = DM | DC, ALL_TIMES = 15 };

struct times {
    struct timespec at[4];
};

static struct times times_of(int fd)
{
    struct stat one = of_open(fd), other = of("d");
    return (struct times){{one.st_mtim, one.st_ctim, other.st_mtim, other.st_ctim}};
}

static int is_later(struct timespec one, struct timespec other)
{
    return one.tv_sec > other.tv_sec || (one.tv_sec == other.tv_sec && one.tv_nsec > other.tv_nsec);
}

static void changed(int line, const char *what, struct times before, struct times after, int must, int may)
{
    static const char *const of_what[] = {"file's mtime", "file's ctime", "directory's mtime", "directory's ctime"};
    for (int i = 0; i < 4; i++) {
        int is_newer = is_later(after.at[i], before.at[i]), is_older = is_later(before.at[i], after.at[i]);
        char text[256];
        snprintf(text, sizeof text, "%s: %s", what, of_what[i]);
        if (is_older || (is_newer && !((must | may) & 1 << i)))
            failed(line, text, is_older ? "an older one" : "a newer one", "the same");
        else if (!is_newer && must & 1 << i)
            failed(line, text, "the same", "a newer one");
    }
}

#define CHANGES(must, may, call)                                       \
    do {                                                               \
        struct times before = times_of(fd);                            \
        later();                                                       \
        call;                                                          \
        changed(__LINE__, #call, before, times_of(fd), must, may);     \
    } while (0)

static void times(void)
{
    char text[8], *map;
    int fd, other;

    OK(mkdir("d", 0755));
    OK(mkdir("e", 0755));
    fd = file("d/f", "text");
    other = file("other", "other");

    CHANGES(0, 0, OK(access("d/f", F_OK)));
    CHANGES(0, 0, IS(4, pread(fd, text, 8, 0)));
    CHANGES(0, 0, OK(close(OK(open("d/f", O_CREAT | O_RDWR, 0644)))));
    CHANGES(0, 0, FAILS(EEXIST, open("d/f", O_CREAT | O_EXCL | O_RDWR, 0644)));
    CHANGES(0, 0, OK(listed("d", "f")));
    CHANGES(FILE_TIMES, 0, IS(1, pwrite(fd, "x", 1, 0)));
    CHANGES(0, 0, IS(0, pwrite(fd, "x", 0, 0)));
    CHANGES(0, 0, OK(fsync(fd)));
    CHANGES(FILE_TIMES, 0, OK(ftruncate(fd, 2)));
    CHANGES(FILE_TIMES, 0, OK(ftruncate(fd, 9)));
    CHANGES(FILE_TIMES, 0, OK(ftruncate(fd, 9)));
    CHANGES(FILE_TIMES, 0, OK(truncate("d/f", 4)));
    CHANGES(FILE_TIMES, 0, OK(close(OK(open("d/f", O_TRUNC | O_RDWR)))));
    CHANGES(FILE_TIMES, 0, IS(5, copy_file_range(other, &(off64_t){0}, fd, &(off64_t){0}, 5, 0)));
    CHANGES(0, FILE_TIMES, RESULT(fallocate(fd, 0, 0, 8192)));
    CHANGES(FC, 0, OK(fchmod(fd, 0640)));
    CHANGES(FC, 0, OK(chown("d/f", 0, 5)));
    CHANGES(0, FC, RESULT(setxattr("d/f", "user.posix", "x", 1, 0)));
    /* The time of a store may be that of the first one, or of its writing. */
    map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHANGES(0, FILE_TIMES, (map[0] = 'm', OK(msync(map, 4096, MS_SYNC))));
    OK(munmap(map, 4096));

    CHANGES(FC | DIRECTORY_TIMES, 0, OK(link("d/f", "d/g")));
    CHANGES(FC | DIRECTORY_TIMES, 0, OK(unlink("d/g")));
    CHANGES(DIRECTORY_TIMES, FC, OK(rename("d/f", "d/h")));
    CHANGES(DIRECTORY_TIMES, FC, OK(rename("d/h", "e/f")));
    CHANGES(DIRECTORY_TIMES, FC, OK(rename("e/f", "d/f")));
    CHANGES(DIRECTORY_TIMES, 0, put("d/made", ""));
    CHANGES(0, 0, put("d/made", "x"));
    CHANGES(DIRECTORY_TIMES, FC, OK(rename_with("d/made", "d/f", RENAME_EXCHANGE)));
    CHANGES(DIRECTORY_TIMES, FC, OK(rename("d/made", "d/f")));
    CHANGES(DIRECTORY_TIMES, 0, OK(mkdir("d/below", 0755)));
    CHANGES(0, 0, put("d/below/file", ""));
    CHANGES(0, 0, OK(unlink("d/below/file")));
    CHANGES(DIRECTORY_TIMES, 0, OK(rmdir("d/below")));
    CHANGES(DIRECTORY_TIMES, 0, OK(symlink("x", "d/link")));
    CHANGES(DIRECTORY_TIMES, 0, OK(mkfifo("d/fifo", 0644)));
    CHANGES(DC, 0, OK(chmod("d", 0700)));
    CHANGES(DC, 0, OK(chown("d", 0, 5)));
    CHANGES(0, 0, FAILS(EEXIST, mkdir("d/f", 0755)));
    CHANGES(0, 0, FAILS(ENOENT, unlink("d/missing")));
    CHANGES(FC | DIRECTORY_TIMES, 0, OK(unlink("d/f")));
    CHANGES(FILE_TIMES, 0, IS(1, pwrite(fd, "x", 1, 0)));
}

static char zeros[1 << 16];

static void sizes(void)
{
    struct rlimit limit;
    char *map;
    int fd = file("file", "text"), other = OK(open("file", O_RDWR)), child, status;

    OK(ftruncate(fd, 8));
    HAS(other, "text\0\0\0\0");
    OK(ftruncate(fd, 2));
    HAS(other, "te");
    OK(ftruncate(fd, 4));
    HAS(other, "te\0\0");
    OK(truncate("file", 1));
    HOLDS(of_open(fd).st_size == 1);
    /* The end of what was cut off does not come back, whether it has been written by then or not. */
    for (int is_written = 0; is_written < 2; is_written++) {
        memset(zeros, 'x', sizeof zeros);
        IS(sizeof zeros, pwrite(fd, zeros, sizeof zeros, 0));
        if (is_written)
            OK(fsync(fd));
        memset(zeros, 0, sizeof zeros);
        OK(ftruncate(fd, 5000));
        OK(ftruncate(fd, sizeof zeros));
        map = mmap(0, sizeof zeros, PROT_READ, MAP_SHARED, other, 0);
        HOLDS(map[4999] == 'x' && map[5000] == 0 && !memcmp(map + 5000, zeros, sizeof zeros - 5000));
        OK(munmap(map, sizeof zeros));
        OK(ftruncate(fd, 0));
        HAS(other, "");
    }

    FAILS(EINVAL, ftruncate(fd, -1));
    FAILS(EINVAL, truncate("file", -1));
    FAILS(ENOENT, truncate("missing", 0));
    OK(mkdir("directory", 0755));
    FAILS(EISDIR, truncate("directory", 0));
    FAILS(ENOTDIR, truncate("file/below", 0));

    /* Memory behind the end of a file is not there. */
    OK(ftruncate(fd, 8192));
    map = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    map[0] = map[8191] = 'x';
    OK(ftruncate(fd, 100));
    for (int at = 0; at < 8192; at += 4096) {
        child = fork();
        if (child == 0) {
            signal(SIGBUS, SIG_DFL);
            _exit(((volatile char *)map)[at] != 'x');
        }
        waitpid(child, &status, 0);
        HOLDS(at == 0 ? status == 0 : WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    }
    OK(ftruncate(fd, 8192));
    HOLDS(map[0] == 'x' && map[100] == 0 && map[8191] == 0);
    OK(munmap(map, 8192));

    signal(SIGXFSZ, SIG_IGN);
    OK(getrlimit(RLIMIT_FSIZE, &limit));
    OK(setrlimit(RLIMIT_FSIZE, &(struct rlimit){10000, limit.rlim_max}));
    FAILS(EFBIG, pwrite(fd, "x", 1, 10000));
    FAILS(EFBIG, ftruncate(fd, 10001));
    IS(10, pwrite(fd, zeros, 100, 9990));
    OK(setrlimit(RLIMIT_FSIZE, &limit));
    HOLDS(of("file").st_size == 10000);
    OK(ftruncate(fd, 3L << 32));
    HOLDS(of("file").st_size == 3L << 32 && of("file").st_blocks < 1 << 20);
}

static void holes(void)
{
    const off_t data = 1 << 20, size = 3 << 20;
    struct stat status;
    char text[8];
    int fd = file("file", "");

    /* The file system may not know of holes and take all for data. */
    OK(ftruncate(fd, size));
    IS(4, pwrite(fd, "data", 4, data));
    HOLDS(lseek(fd, 0, SEEK_DATA) >= 0 && lseek(fd, 0, SEEK_DATA) <= data);
    IS(data, lseek(fd, data, SEEK_DATA));
    HOLDS(lseek(fd, data, SEEK_HOLE) >= data + 4 && lseek(fd, data, SEEK_HOLE) <= size);
    HOLDS(lseek(fd, 0, SEEK_HOLE) == 0 || lseek(fd, 0, SEEK_HOLE) == size);
    FAILS(ENXIO, lseek(fd, size, SEEK_DATA));
    FAILS(ENXIO, lseek(fd, size, SEEK_HOLE));
    FAILS(ENXIO, lseek(fd, size + 1, SEEK_DATA));
    FAILS(EINVAL, lseek(fd, -1, SEEK_SET));
    IS(4, pread(fd, text, 4, data - 2));
    HOLDS(!memcmp(text, "\0\0da", 4));
    status = of("file");
    HOLDS(status.st_blocks * 512 < status.st_size);

    if (RESULT(fallocate(fd, 0, 0, 4096)) == -EOPNOTSUPP)
        return;
    OK(fallocate(fd, 0, size, 4096));
    HOLDS(of("file").st_size == size + 4096);
    OK(fallocate(fd, FALLOC_FL_KEEP_SIZE, size, 1 << 20));
    HOLDS(of("file").st_size == size + 4096);
    IS(4, pread(fd, text, 4, data));
    HOLDS(!memcmp(text, "data", 4));
    FAILS(EINVAL, fallocate(fd, 0, 0, 0));
    FAILS(EINVAL, fallocate(fd, 0, -1, 10));
    FAILS(EBADF, fallocate(OK(open("file", O_RDONLY)), 0, 0, 10));

    OK(close(fd));
    fd = file("punched", "");
    memset(zeros, 'x', sizeof zeros);
    IS(sizeof zeros, pwrite(fd, zeros, sizeof zeros, 0));
    /* Not written to the disk yet, in part of a page, and with a mapping of it. */
    char *map = mmap(0, sizeof zeros, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    map[20000] = 'y';
    if (RESULT(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 10000, 20000)) != -EOPNOTSUPP) {
        memset(zeros + 10000, 0, 20000);
        HOLDS(has(fd, zeros, sizeof zeros));
        HOLDS(!memcmp(map, zeros, sizeof zeros));
        FAILS(EOPNOTSUPP, fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 4096));
    }
    OK(fsync(fd));
    if (RESULT(fallocate(fd, FALLOC_FL_ZERO_RANGE, 40000, 10000)) != -EOPNOTSUPP) {
        memset(zeros + 40000, 0, 10000);
        HOLDS(has(fd, zeros, sizeof zeros));
        HOLDS(!memcmp(map, zeros, sizeof zeros));
    }
    memset(zeros, 0, sizeof zeros);
}

static void positions(void)
{
    char text[16], page[4096];
    int fd = file("file", "text"), one, two;

    IS(4, lseek(fd, 0, SEEK_CUR));
    IS(0, read(fd, text, 8));
    IS(0, pread(fd, text, 8, 100));
    FAILS(EINVAL, pread(fd, text, 8, -1));
    FAILS(EINVAL, pwrite(fd, text, 8, -1));
    IS(2, pread(fd, text, 8, 2));
    IS(4, lseek(fd, 0, SEEK_CUR));
    IS(3, pwrite(fd, "end", 3, 8));
    HAS(fd, "text\0\0\0\0end");
    IS(100, lseek(fd, 100, SEEK_SET));
    IS(0, read(fd, text, 8));
    HOLDS(of("file").st_size == 11);
    IS(0, write(fd, "x", 0));
    HOLDS(of("file").st_size == 11);
    IS(11, lseek(fd, 0, SEEK_END));
    IS(5, lseek(fd, -6, SEEK_END));
    IS(1, write(fd, "!", 1));
    HAS(fd, "text\0!\0\0end");

    /* Far behind the end, across pages that are not there. */
    IS(1, pwrite(fd, "x", 1, 20000));
    IS(4096, pread(fd, page, 4096, 8192));
    HOLDS(!memcmp(page, zeros, 4096));
    IS(4, pread(fd, text, 16, 19997));
    HOLDS(!memcmp(text, "\0\0\0x", 4));

    put("appended", "");
    one = OK(open("appended", O_RDWR | O_APPEND));
    two = OK(open("appended", O_WRONLY | O_APPEND));
    for (int i = 0; i < 3; i++) {
        IS(1, write(one, "a", 1));
        IS(1, write(two, "b", 1));
    }
    IS(6, lseek(two, 0, SEEK_CUR));
    HAS(one, "ababab");
    OK(lseek(one, 0, SEEK_SET));
    IS(1, write(one, "c", 1));
    HAS(one, "abababc");
    /* pwrite(2), BUGS. */
    IS(1, pwrite(one, "d", 1, 0));
    HAS(one, "abababcd");
    OK(ftruncate(two, 1));
    IS(1, write(one, "e", 1));
    HAS(one, "ae");

    /* By processes at the same time: nothing is lost, no record is torn. */
    put("records", "");
    for (int child = 0; child < 4; child++) {
        if (fork() == 0) {
            char record[32];
            int file = OK(open("records", O_WRONLY | O_APPEND));
            memset(record, 'a' + child, sizeof record);
            for (int i = 0; i < 50; i++)
                IS(sizeof record, write(file, record, sizeof record));
            _exit(failures != 0);
        }
    }
    for (int child = 0, status = 0; child < 4; child++) {
        OK(wait(&status));
        HOLDS(status == 0);
    }
    char record[32];
    int counts[4] = {0};
    fd = OK(open("records", O_RDONLY));
    for (int i = 0; i < 200; i++) {
        IS(sizeof record, read(fd, record, sizeof record));
        for (size_t at = 1; at < sizeof record; at++)
            HOLDS(record[at] == record[0]);
        counts[(record[0] - 'a') & 3]++;
    }
    IS(0, read(fd, record, sizeof record));
    for (int child = 0; child < 4; child++)
        HOLDS(counts[child] == 50);

    fd = RESULT(open("direct", O_CREAT | O_RDWR | O_DIRECT, 0644));
    if (fd == -EINVAL)
        return;
    static char block[4096] __attribute__((aligned(4096)));
    one = OK(open("direct", O_RDWR));
    memset(page, 'b', sizeof page);
    IS(4096, pwrite(one, page, 4096, 0));
    IS(4096, pread(fd, block, 4096, 0));
    HOLDS(block[0] == 'b' && block[4095] == 'b');
    memset(block, 'd', sizeof block);
    IS(4096, pwrite(fd, block, 4096, 0));
    IS(4096, pread(one, page, 4096, 0));
    HOLDS(page[0] == 'd' && page[4095] == 'd');
}

enum { ENTRIES = 600 };

/* Long, so that it takes several calls to list them. */
static const char *entry_name(char *name, const char *kind, int number)
{
    sprintf(name, "%s-%03d-%0100d", kind, number, 0);
    return name;
}

static void listing(void)
{
    char name[128], next[ENTRIES][128];
    unsigned char seen[ENTRIES] = {0};
    long places[ENTRIES + 2];
    int count = 0, dots = 0;
    struct dirent *entry;

    OK(mkdir("many", 0755));
    OK(chdir("many"));
    for (int i = 0; i < ENTRIES; i++)
        put(entry_name(name, "stays", i), "");
    for (int i = 0; i < 100; i++)
        put(entry_name(name, "goes", i), "");

    /* Others come and go meanwhile: whether they are seen is open. */
    DIR *all = opendir(".");
    HOLDS(all);
    while ((entry = readdir(all))) {
        dots += !strcmp(entry->d_name, ".") + !strcmp(entry->d_name, "..");
        HOLDS(entry->d_type == DT_REG || entry->d_type == DT_DIR || entry->d_type == DT_UNKNOWN);
        if (!strncmp(entry->d_name, "stays-", 6)) {
            seen[atoi(entry->d_name + 6)]++;
            if (++count % 6 == 0) {
                put(entry_name(name, "comes", count / 6), "");
                OK(unlink(entry_name(name, "goes", count / 6 - 1)));
            }
        }
    }
    HOLDS(count == ENTRIES && dots == 2);
    for (int i = 0; i < ENTRIES; i++)
        HOLDS(seen[i] == 1);

    rewinddir(all);
    for (count = 0; (entry = readdir(all)); count++)
        HOLDS(strncmp(entry->d_name, "goes-", 5));
    HOLDS(count == ENTRIES + 100 + 2);
    put("new", "");
    OK(unlink(entry_name(name, "stays", 0)));
    rewinddir(all);
    for (count = 0; (entry = readdir(all)); count++)
        HOLDS(strcmp(entry->d_name, name));
    HOLDS(count == ENTRIES + 100 + 2 && listed(".", "new") == 1 && !listed(".", name));

    rewinddir(all);
    for (int i = 0; i < ENTRIES; i++) {
        places[i] = telldir(all);
        entry = readdir(all);
        strcpy(next[i], entry ? entry->d_name : "");
    }
    for (int i = ENTRIES - 1; i >= 0; i -= 37) {
        seekdir(all, places[i]);
        entry = readdir(all);
        HOLDS(entry && !strcmp(entry->d_name, next[i]));
    }
    closedir(all);

    /* What is listed is what is there. */
    OK(chdir(".."));
    OK(mkdir("few", 0755));
    put("few/file", "");
    OK(mkdir("few/directory", 0755));
    OK(symlink("file", "few/link"));
    all = opendir("few");
    while ((entry = readdir(all))) {
        struct stat status;
        OK(fstatat(dirfd(all), entry->d_name, &status, AT_SYMLINK_NOFOLLOW));
        HOLDS(!strcmp(entry->d_name, "..") || status.st_ino == entry->d_ino);
        HOLDS(entry->d_type == DT_UNKNOWN || (mode_t)DTTOIF(entry->d_type) == (status.st_mode & S_IFMT));
    }
    closedir(all);
    /* Names that were listed a moment ago. */
    for (int round = 0; round < 10; round++) {
        HOLDS(listed("few", "comes") == 0);
        put("few/comes", "");
        HOLDS(listed("few", "comes") == 1);
        OK(rename("few/comes", "few/goes"));
        HOLDS(listed("few", "comes") == 0 && listed("few", "goes") == 1);
        OK(unlink("few/goes"));
        HOLDS(listed("few", "goes") == 0);
    }
    FAILS(ENOTEMPTY, rmdir("many"));
}

static void mappings(void)
{
    char text[8], *map, *other, *own;
    int fd = file("file", "text"), reader = OK(open("file", O_RDONLY)), child, status;

    OK(ftruncate(fd, 8192));
    map = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    other = mmap(0, 8192, PROT_READ, MAP_SHARED, reader, 0);
    own = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE, reader, 0);
    HOLDS(map != MAP_FAILED && other != MAP_FAILED && own != MAP_FAILED);
    HOLDS(!memcmp(map, "text", 4) && !memcmp(other, "text", 4) && !memcmp(own, "text", 4));

    for (int i = 0; i < 20; i++) {
        sprintf(text, "w%03d", i);
        IS(4, pwrite(fd, text, 4, 4094));
        HOLDS(!memcmp(map + 4094, text, 4) && !memcmp(other + 4094, text, 4));
        map[4094] = 'm';
        IS(4, pread(reader, text, 4, 4094));
        HOLDS(text[0] == 'm' && other[4094] == 'm');
        if (i == 10)
            OK(msync(map, 8192, MS_SYNC));
        if (i == 15)
            OK(fsync(fd));
    }

    own[0] = 'T';
    HOLDS(map[0] == 't' && own[0] == 'T' && own[1] == 'e');
    IS(1, pread(reader, text, 1, 0));
    HOLDS(text[0] == 't');

    child = fork();
    if (child == 0) {
        map[5] = 'c';
        own[5] = 'p';
        _exit(0);
    }
    waitpid(child, &status, 0);
    HOLDS(other[5] == 'c' && own[5] != 'p');

    FAILS(EACCES, mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, reader, 0));
    FAILS(EACCES, mmap(0, 4096, PROT_READ, MAP_SHARED, OK(open("file", O_WRONLY)), 0));
    FAILS(ENODEV, mmap(0, 4096, PROT_READ, MAP_SHARED, OK(open(".", O_RDONLY)), 0));

    /* It outlives descriptor and name. */
    OK(close(fd));
    map[6] = 'd';
    HOLDS(other[6] == 'd');
    OK(rename("file", "moved"));
    map[7] = 'r';
    fd = OK(open("moved", O_RDONLY));
    IS(2, pread(fd, text, 2, 6));
    HOLDS(!memcmp(text, "dr", 2));
    OK(munmap(map, 8192));
    IS(2, pread(fd, text, 2, 6));
    HOLDS(!memcmp(text, "dr", 2));

    /* The rest of the last page is empty, and no part of the file. */
    fd = file("short", "text");
    map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    HOLDS(!memcmp(map + 4, zeros, 4092));
    map[2000] = 'x';
    OK(msync(map, 4096, MS_SYNC));
    HOLDS(of("short").st_size == 4);
    HAS(fd, "text");
    IS(4, pwrite(fd, "more", 4, 4));
    HOLDS(!memcmp(map, "textmore", 8));
}

static void attributes(void)
{
    char value[300] = {0}, list[4096];
    int fd = file("file", "text");

    if (RESULT(setxattr("file", "user.one", "value", 5, 0)) == -EOPNOTSUPP)
        return;
    IS(5, getxattr("file", "user.one", value, sizeof value));
    HOLDS(!memcmp(value, "value", 5));
    IS(5, fgetxattr(fd, "user.one", 0, 0));
    FAILS(ERANGE, getxattr("file", "user.one", value, 4));
    FAILS(ENODATA, getxattr("file", "user.none", value, sizeof value));
    FAILS(EEXIST, setxattr("file", "user.one", "x", 1, XATTR_CREATE));
    FAILS(ENODATA, setxattr("file", "user.none", "x", 1, XATTR_REPLACE));
    OK(setxattr("file", "user.one", "other", 5, XATTR_REPLACE));
    OK(fsetxattr(fd, "user.two", "", 0, XATTR_CREATE));
    IS(0, getxattr("file", "user.two", value, sizeof value));
    memset(value, 'v', 250);
    OK(setxattr("file", "user.three", value, 250, 0));
    IS(250, getxattr("file", "user.three", value, sizeof value));

    long length = OK(listxattr("file", list, sizeof list));
    int found = 0;
    for (long at = 0; at < length; at += strlen(list + at) + 1)
        found += !strcmp(list + at, "user.one") + !strcmp(list + at, "user.two") + !strcmp(list + at, "user.three");
    HOLDS(found == 3);
    IS(length, listxattr("file", 0, 0));
    FAILS(ERANGE, listxattr("file", list, length - 1));

    OK(rename("file", "moved"));
    OK(link("moved", "linked"));
    IS(5, getxattr("linked", "user.one", value, sizeof value));
    HOLDS(!memcmp(value, "other", 5));
    OK(removexattr("linked", "user.one"));
    FAILS(ENODATA, getxattr("moved", "user.one", value, sizeof value));
    FAILS(ENODATA, removexattr("moved", "user.one"));

    OK(mkdir("directory", 0755));
    OK(setxattr("directory", "user.one", "d", 1, 0));
    IS(1, getxattr("directory", "user.one", value, sizeof value));
    OK(symlink("moved", "link"));
    FAILS(EPERM, lsetxattr("link", "user.one", "x", 1, 0));
    OK(mkfifo("fifo", 0644));
    FAILS(EPERM, setxattr("fifo", "user.one", "x", 1, 0));
    FAILS(EOPNOTSUPP, setxattr("moved", "nonsense", "x", 1, 0));
    FAILS(ENOENT, setxattr("missing", "user.one", "x", 1, 0));

    become(user);
    FAILS(EACCES, setxattr("moved", "user.one", "x", 1, 0));
    IS(250, getxattr("moved", "user.three", value, sizeof value));
    become(0);
    OK(chmod("moved", 0));
    become(user);
    FAILS(EACCES, getxattr("moved", "user.three", value, sizeof value));
    become(0);
}

static void space(void)
{
    struct statvfs all, same_all;
    int fd = file("file", "text");

    OK(statvfs(".", &all));
    OK(fstatvfs(fd, &same_all));
    HOLDS(all.f_bsize >= 512 && all.f_frsize >= 512 && all.f_namemax == NAME_MAX);
    HOLDS(all.f_blocks > 0 && all.f_bfree <= all.f_blocks && all.f_bavail <= all.f_bfree && all.f_ffree <= all.f_files);
    HOLDS(all.f_blocks == same_all.f_blocks && all.f_bsize == same_all.f_bsize);
    HOLDS(!(all.f_flag & ST_RDONLY));
    FAILS(ENOENT, statvfs("missing", &all));
    HOLDS(of("file").st_blksize > 0 && of("file").st_size == 4);
    IS(65536, pwrite(fd, zeros, 65536, 0));
    OK(fsync(fd));
    HOLDS(of("file").st_blocks * 512 >= 65536);
}

static void special(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
    int server = OK(socket(AF_UNIX, SOCK_STREAM, 0)), client = OK(socket(AF_UNIX, SOCK_STREAM, 0)), reader, writer, peer;
    char text[8];

    OK(mkfifo("fifo", 0640));
    HOLDS(S_ISFIFO(of("fifo").st_mode) && (of("fifo").st_mode & 07777) == 0640);
    FAILS(EEXIST, mkfifo("fifo", 0640));
    FAILS(ENXIO, open("fifo", O_WRONLY | O_NONBLOCK));
    reader = OK(open("fifo", O_RDONLY | O_NONBLOCK));
    writer = OK(open("fifo", O_WRONLY | O_NONBLOCK));
    FAILS(EAGAIN, read(reader, text, 1));
    IS(4, write(writer, "text", 4));
    OK(link("fifo", "fifo-too"));
    OK(unlink("fifo"));
    peer = OK(open("fifo-too", O_WRONLY | O_NONBLOCK));
    IS(4, write(peer, "more", 4));
    IS(8, read(reader, text, 8));
    HOLDS(!memcmp(text, "textmore", 8));
    OK(close(peer));
    OK(close(writer));
    IS(0, read(reader, text, 1));
    FAILS(ESPIPE, lseek(reader, 0, SEEK_SET));
    HOLDS(of("fifo-too").st_size == 0);

    OK(bind(server, (struct sockaddr *)&address, sizeof address));
    HOLDS(S_ISSOCK(of("socket").st_mode));
    FAILS(ENXIO, open("socket", O_RDWR));
    FAILS(ECONNREFUSED, connect(client, (struct sockaddr *)&address, sizeof address));
    FAILS(EADDRINUSE, bind(client, (struct sockaddr *)&address, sizeof address));
    OK(listen(server, 1));
    /* By the name that it has now. */
    OK(rename("socket", "moved"));
    FAILS(ENOENT, connect(client, (struct sockaddr *)&address, sizeof address));
    strcpy(address.sun_path, "moved");
    OK(connect(client, (struct sockaddr *)&address, sizeof address));
    peer = OK(accept(server, 0, 0));
    IS(4, write(client, "text", 4));
    IS(4, read(peer, text, 8));
    OK(chmod("moved", 0700));
    become(user);
    FAILS(EACCES, connect(OK(socket(AF_UNIX, SOCK_STREAM, 0)), (struct sockaddr *)&address, sizeof address));
    become(0);
    OK(mknod("node", S_IFSOCK | 0600, 0));
    OK(mknod("plain", S_IFREG | 0600, 0));
    HOLDS(S_ISSOCK(of("node").st_mode) && S_ISREG(of("plain").st_mode));
    OK(unlink("moved"));
    FAILS(ENOENT, access("moved", F_OK));
}

/* Who may do what with a file of this mode, owner and group: user 1000, who is of the groups 1000 and 2000. */
static const struct {
    mode_t mode;
    uid_t owner;
    gid_t group;
    int asked, error;
} rights[] = {
    {0400, 1000, 1, R_OK, 0},          {0400, 1000, 1, W_OK, EACCES},     {0200, 1000, 1, W_OK, 0},
    {0200, 1000, 1, R_OK, EACCES},     {0040, 1, 1000, R_OK, 0},          {0040, 1, 2000, R_OK, 0},
    {0020, 1, 2000, W_OK, 0},          {0040, 1, 2000, W_OK, EACCES},     {0004, 1, 1, R_OK, 0},
    {0002, 1, 1, W_OK, 0},             {0660, 1, 1, R_OK, EACCES},        {0077, 1000, 1000, R_OK, EACCES},
    {0707, 1, 1000, R_OK, EACCES},     {0707, 1, 2000, W_OK, EACCES},     {0077, 1000, 2000, W_OK, EACCES},
    {0600, 0, 0, R_OK, EACCES},        {0666, 0, 0, R_OK | W_OK, 0},      {0644, 0, 0, R_OK | W_OK, EACCES},
    {0100, 1000, 1, X_OK, 0},          {0010, 1, 2000, X_OK, 0},          {0001, 1, 1, X_OK, 0},
    {0666, 1000, 1000, X_OK, EACCES},  {0000, 1000, 1000, F_OK, 0},
};

static void permissions(void)
{
    put("file", "text");
    for (size_t i = 0; i < sizeof rights / sizeof *rights; i++) {
        const int asked = rights[i].asked;
        char what[64];
        sprintf(what, "%04o %d:%d, %d asked", rights[i].mode, (int)rights[i].owner, (int)rights[i].group, asked);
        OK(chown("file", rights[i].owner, rights[i].group));
        OK(chmod("file", rights[i].mode));
        become(user);
        gives(__LINE__, what, RESULT(access("file", asked)), -rights[i].error);
        if (asked & (R_OK | W_OK)) {
            int fd = RESULT(open("file", asked == R_OK ? O_RDONLY : asked == W_OK ? O_WRONLY : O_RDWR));
            gives(__LINE__, what, fd < 0 ? fd : close(fd), -rights[i].error);
        }
        become(0);
    }
    OK(chmod("file", 0));
    OK(access("file", R_OK | W_OK));
    FAILS(EACCES, access("file", X_OK));

    OK(mkdir("directory", 0755));
    put("directory/file", "text");
    OK(mkdir("mine", 0755));
    OK(chown("mine", user, user));
    become(user);
    FAILS(EACCES, open("directory/new", O_CREAT | O_RDWR, 0644));
    FAILS(EACCES, mkdir("directory/new", 0755));
    FAILS(EACCES, symlink("x", "directory/new"));
    FAILS(EACCES, mkfifo("directory/new", 0644));
    FAILS(EACCES, unlink("directory/file"));
    FAILS(EACCES, rename("directory/file", "mine/file"));
    FAILS(EACCES, truncate("directory/file", 0));
    FAILS(EPERM, chmod("directory/file", 0777));
    FAILS(EPERM, chown("directory/file", user, user));
    FAILS(EEXIST, open("directory/file", O_CREAT | O_EXCL | O_RDWR, 0644));
    put("mine/file", "text");
    FAILS(EACCES, rename("mine/file", "directory/new"));
    FAILS(EACCES, link("mine/file", "directory/new"));
    FAILS(EPERM, chown("mine/file", 0, -1));
    FAILS(EPERM, chown("mine/file", -1, 0));
    OK(chown("mine/file", -1, 2000));
    HOLDS(of("mine/file").st_uid == user && of("mine/file").st_gid == 2000);
    become(0);
    /* Another's file goes by the directory's permission. */
    OK(chown("mine/file", 0, 0));
    OK(chmod("mine/file", 0600));
    become(user);
    OK(rename("mine/file", "mine/moved"));
    OK(unlink("mine/moved"));
    become(0);

    /* Of a group that is not the process's first. */
    OK(mkdir("groups", 0755));
    OK(chown("groups", 1, 2000));
    OK(chmod("groups", 0770));
    become(user);
    put("groups/file", "text");
    OK(mkdir("groups/directory", 0755));
    become(0);
    HOLDS(of("groups/file").st_uid == user && of("groups/file").st_gid == user);
    /* A file gets its directory's group, and no right of that group's that its maker does not have. */
    OK(chown("groups", 1, 1));
    OK(chmod("groups", 02777));
    become(user);
    OK(close(OK(open("groups/set-group", O_CREAT | O_EXCL | O_RDWR, 02755))));
    become(0);
    HOLDS(of("groups/set-group").st_gid == 1 && (of("groups/set-group").st_mode & 07777) == 0755);

    /* To search is not to list. */
    OK(chmod("directory", 0711));
    become(user);
    FAILS(EACCES, open("directory", O_RDONLY));
    HOLDS(reads("directory/file", "text"));
    become(0);
    OK(chmod("directory", 0744));
    become(user);
    OK(open("directory", O_RDONLY));
    FAILS(EACCES, access("directory/file", F_OK));
    FAILS(EACCES, access("directory/missing", F_OK));
    become(0);
    OK(chmod("directory", 0722));
    become(user);
    FAILS(EACCES, open("directory/new", O_CREAT | O_RDWR, 0644));
    become(0);
    OK(chmod("directory", 0700));
    become(user);
    FAILS(EACCES, access("directory/file", F_OK));
    FAILS(EACCES, open("directory/file", O_RDONLY));
    become(0);
    OK(chmod("directory", 0755));
    become(user);
    HOLDS(reads("directory/file", "text"));
    become(0);

    OK(mkdir("sticky", 0755));
    OK(chmod("sticky", 01777));
    put_owned("sticky/other", 1, 1, 0666);
    put_owned("sticky/mine", user, user, 0644);
    OK(mkdir("sticky/directory", 0777));
    become(user);
    FAILS(EPERM, unlink("sticky/other"));
    FAILS(EPERM, rename("sticky/other", "sticky/new"));
    FAILS(EPERM, rename("sticky/mine", "sticky/other"));
    FAILS(EPERM, rmdir("sticky/directory"));
    OK(rename("sticky/mine", "sticky/moved"));
    OK(unlink("sticky/moved"));
    put("sticky/new", "");
    become(0);
    OK(chown("sticky", user, user));
    become(user);
    OK(unlink("sticky/other"));
    become(0);
    HOLDS(of("sticky").st_mode & S_ISVTX);
}

static void syncing(void)
{
    int fd = file("file", "text"), directory = OK(open(".", O_RDONLY)), ends[2];

    OK(fsync(fd));
    OK(fdatasync(fd));
    OK(fsync(OK(open("file", O_RDONLY))));
    OK(fsync(directory));
    OK(fdatasync(directory));
    OK(syncfs(fd));
    OK(pipe(ends));
    FAILS(EINVAL, fsync(ends[1]));
    FAILS(EBADF, fsync(-1));
    OK(ftruncate(fd, 1));
    OK(fsync(fd));
    OK(fchmod(fd, 0600));
    OK(fsync(fd));
    HOLDS(of("file").st_size == 1 && (of("file").st_mode & 07777) == 0600);
    for (int flag = 0; flag < 2; flag++) {
        fd = OK(open("through", O_CREAT | O_TRUNC | O_RDWR | (flag ? O_SYNC : O_DSYNC), 0644));
        IS(4, write(fd, "text", 4));
        HAS(fd, "text");
        OK(close(fd));
    }
    OK(unlink("file"));
    OK(fsync(directory));
}

static void copies(void)
{
    int from = file("from", "0123456789"), to = file("to", "abcdefghij"), again, ends[2];
    char text[16];
    off64_t in = 2, out = 4;
    off_t at = 6;

    /* What was read of it before must not be what is read after. */
    HAS(to, "abcdefghij");
    IS(3, copy_file_range(from, &in, to, &out, 3, 0));
    HOLDS(in == 5 && out == 7);
    HAS(to, "abcd234hij");
    in = 8;
    out = 20;
    IS(2, copy_file_range(from, &in, to, &out, 100, 0));
    HAS(to, "abcd234hij\0\0\0\0\0\0\0\0\0\0" "89");
    IS(0, copy_file_range(from, &in, to, &out, 100, 0));
    IS(0, lseek(from, 0, SEEK_SET));
    IS(10, lseek(to, 10, SEEK_SET));
    IS(4, copy_file_range(from, 0, to, 0, 4, 0));
    IS(4, lseek(from, 0, SEEK_CUR));
    IS(14, lseek(to, 0, SEEK_CUR));
    again = OK(open("from", O_RDWR));
    in = 0;
    out = 2;
    FAILS(EINVAL, copy_file_range(from, &in, again, &out, 4, 0));
    out = 6;
    IS(4, copy_file_range(from, &in, again, &out, 4, 0));
    HAS(from, "0123450123");
    FAILS(EBADF, copy_file_range(from, &in, OK(open("to", O_WRONLY | O_APPEND)), 0, 1, 0));
    FAILS(EBADF, copy_file_range(from, &in, OK(open("to", O_RDONLY)), 0, 1, 0));
    FAILS(EISDIR, copy_file_range(from, &in, OK(open(".", O_RDONLY)), 0, 1, 0));
    /* A mapping that was stored to a moment ago is copied too. */
    char *map = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, from, 0);
    map[0] = 'M';
    in = out = 0;
    IS(2, copy_file_range(from, &in, to, &out, 2, 0));
    IS(2, pread(to, text, 2, 0));
    HOLDS(!memcmp(text, "M1", 2));

    to = file("sent", "");
    IS(4, sendfile(to, from, &at, 100));
    HOLDS(at == 10);
    HAS(to, "0123");
    OK(pipe(ends));
    at = 0;
    IS(2, sendfile(ends[1], from, &at, 2));
    IS(2, splice(from, &(off64_t){2}, ends[1], 0, 2, 0));
    IS(4, read(ends[0], text, 16));
    HOLDS(!memcmp(text, "M123", 4));
    IS(4, write(ends[1], "pipe", 4));
    IS(4, splice(ends[0], 0, to, &(off64_t){2}, 4, 0));
    HAS(to, "01pipe");
}

/* Names that were asked for in vain, and then are made, in every way; and the other way round. */
static void absent(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "name"};
    put("other", "other");
    OK(mkdir("directory", 0755));
    for (int way = 0; way < 10; way++) {
        for (int i = 0; i < 2; i++)
            FAILS(ENOENT, access("name", F_OK));
        FAILS(ENOENT, open("name", O_RDWR));
        switch (way) {
        case 0: put("name", "other"); break;
        case 1: OK(mkdir("name", 0755)); break;
        case 2: OK(symlink("other", "name")); break;
        case 3: OK(link("other", "name")); break;
        case 4: OK(mkfifo("name", 0644)); break;
        case 5: OK(bind(OK(socket(AF_UNIX, SOCK_STREAM, 0)), (struct sockaddr *)&address, sizeof address)); break;
        case 6: OK(rename("other", "name")); break;
        case 7: OK(rename_with("other", "name", RENAME_NOREPLACE)); break;
        case 8: OK(rename("directory", "name")); break;
        case 9: OK(close(OK(open("name", O_CREAT | O_EXCL | O_RDWR, 0644)))); break;
        }
        OK(access("name", F_OK));
        HOLDS(is_there("name") && listed(".", "name") == 1);
        FAILS(EEXIST, open("name", O_CREAT | O_EXCL | O_RDWR, 0644));
        FAILS(EEXIST, mkdir("name", 0755));
        if (way == 6 || way == 7) {
            FAILS(ENOENT, access("other", F_OK));
            OK(rename("name", "other"));
        } else if (way == 8) {
            FAILS(ENOENT, access("directory", F_OK));
            OK(rename("name", "directory"));
        } else if (way == 1) {
            OK(rmdir("name"));
        } else {
            OK(unlink("name"));
        }
        HOLDS(!is_there("name"));
    }
    HOLDS(reads("other", "other") && S_ISDIR(of("directory").st_mode));

    /* Below a directory that was not there, and in one that goes and comes. */
    FAILS(ENOENT, access("new/below", F_OK));
    OK(mkdir("new", 0755));
    FAILS(ENOENT, access("new/below", F_OK));
    put("new/below", "first");
    OK(rename("new", "old"));
    FAILS(ENOENT, access("new/below", F_OK));
    OK(mkdir("new", 0755));
    FAILS(ENOENT, access("new/below", F_OK));
    put("new/below", "second");
    HOLDS(reads("new/below", "second") && reads("old/below", "first"));
    /* Made by another process. */
    FAILS(ENOENT, access("child", F_OK));
    pid_t child = fork();
    if (child == 0) {
        put("child", "child");
        _exit(0);
    }
    waitpid(child, 0, 0);
    HOLDS(reads("child", "child"));
}

static const struct {
    const char *name;
    void (*run)(void);
} sections[] = {
    {"opening", opening},
    {"directories", directories},
    {"links", links},
    {"renames", renames},
    {"renames-with-flags", renames_with_flags},
    {"unlinked", unlinked},
    {"names", names},
    {"owners", owners},
    {"set-times", set_times},
    {"times", times},
    {"sizes", sizes},
    {"holes", holes},
    {"positions", positions},
    {"listing", listing},
    {"mappings", mappings},
    {"attributes", attributes},
    {"space", space},
    {"special", special},
    {"permissions", permissions},
    {"syncing", syncing},
    {"copies", copies},
    {"absent", absent},
};

int main(int argc, char **argv)
{
    int is_wrong = 0;
    if (argc != 2 || chdir(argv[1]) < 0) {
        perror("posix");
        return 2;
    }
    umask(022);
    setvbuf(stdout, 0, _IOLBF, 0);
    for (size_t i = 0; i < sizeof sections / sizeof *sections; i++) {
        int status = 0;
        pid_t child = fork();
        section = sections[i].name;
        if (child == 0) {
            OK(mkdir(section, 0755));
            OK(chdir(section));
            sections[i].run();
            _exit(failures != 0);
        }
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status))
            printf("%s: ended by signal %d\n", section, WTERMSIG(status));
        is_wrong |= status != 0;
    }
    return is_wrong;
}
