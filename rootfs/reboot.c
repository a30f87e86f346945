/*
 * The shortest life a guest can have: its init says so on the console, if there is one, and resets the machine. What
 * remains is the time of the VMM and of the kernel, which the boot benchmark and the boot soak measure. The line tells a
 * boot from a kernel that panicked, which resets the machine as well. Needs no C library.
 */
#include <linux/reboot.h>
#include <sys/syscall.h>

static long call(long number, long a, long b, long c)
{
	long result;
	register long d __asm__("r10") = 0;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(d)
			 : "rcx", "r11", "memory");
	return result;
}

void _start(void)
{
	static const char line[] = "init reached\n";

	call(SYS_write, 1, (long)line, sizeof(line) - 1);
	call(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_RESTART);
	for (;;)
		;
}
