/*
 * What a hostile container does that busybox has no applet for (tests/e2e, escape).
 *
 *     escape vsock               connects to every neighbour that a guest's socket can name, and prints what came of it
 *     escape swap ONE OTHER      exchanges two names of a directory, again and again
 *     escape module              loads a kernel module, by both system calls
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

static const unsigned cids[] = {VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL, VMADDR_CID_HOST, 3, 4, 5, 100};
static const unsigned ports[] = {1, 22, 1023, 1024, 1025, 1026, 1027, 5000, 9999};

static void vsock(void)
{
    for (size_t c = 0; c < sizeof(cids) / sizeof(*cids); c++) {
        for (size_t p = 0; p < sizeof(ports) / sizeof(*ports); p++) {
            for (int type = SOCK_STREAM; type <= SOCK_SEQPACKET; type += SOCK_SEQPACKET - SOCK_STREAM) {
                struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cids[c], .svm_port = ports[p]};
                struct timeval limit = {.tv_usec = 500000};
                int fd = socket(AF_VSOCK, type, 0);
                setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &limit, sizeof limit);
                int result = connect(fd, (struct sockaddr *)&address, sizeof address);
                printf("%u:%u: %s\n", cids[c], ports[p], result < 0 ? strerrorname_np(errno) : "connected");
                close(fd);
            }
        }
    }
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "vsock")) {
        vsock();
    } else if (argc == 4 && !strcmp(argv[1], "swap")) {
        for (;;)
            syscall(SYS_renameat2, AT_FDCWD, argv[2], AT_FDCWD, argv[3], 2 /* RENAME_EXCHANGE */);
    } else if (argc == 2 && !strcmp(argv[1], "module")) {
        static const char image[4096] = "\177ELF";
        long first = syscall(SYS_init_module, image, sizeof image, "");
        printf("init_module: %s\n", first < 0 ? strerrorname_np(errno) : "ok");
        int fd = open("/proc/self/exe", O_RDONLY);
        long second = syscall(SYS_finit_module, fd, "", 0);
        printf("finit_module: %s\n", second < 0 ? strerrorname_np(errno) : "ok");
    } else {
        return 2;
    }
    return 0;
}
