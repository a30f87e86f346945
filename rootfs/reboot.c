/*
 * The shortest life a guest can have: its init resets the machine at once. What remains is the time of the VMM and of
 * the kernel, which the boot benchmark and the boot soak measure. Needs no C library.
 */
#include <linux/reboot.h>
#include <sys/syscall.h>

void _start(void)
{
	long result;
	register long argument __asm__("r10") = 0;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(SYS_reboot), "D"(LINUX_REBOOT_MAGIC1), "S"(LINUX_REBOOT_MAGIC2),
			   "d"(LINUX_REBOOT_CMD_RESTART), "r"(argument)
			 : "rcx", "r11", "memory");
	for (;;)
		;
}
