/* Prints "watching", then for each inotify event in a directory what happened and to which name. */
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	static char buffer[65536] __attribute__((aligned(8)));
	int watch = inotify_init1(IN_CLOEXEC);

	if (argc != 2 || inotify_add_watch(watch, argv[1], IN_CREATE | IN_DELETE | IN_MOVED_TO | IN_MODIFY) < 0) {
		perror("watch DIRECTORY");
		return 1;
	}
	setvbuf(stdout, 0, _IOLBF, 0);
	puts("watching");
	for (;;) {
		ssize_t length = read(watch, buffer, sizeof buffer), at = 0;

		if (length <= 0)
			return 1;
		while (at < length) {
			struct inotify_event *event = (struct inotify_event *)(buffer + at);

			at += sizeof *event + event->len;
			printf("%s%s%s%s %s\n", event->mask & IN_CREATE ? "create" : "", event->mask & IN_DELETE ? "delete" : "",
			       event->mask & IN_MOVED_TO ? "moved-to" : "", event->mask & IN_MODIFY ? "modify" : "",
			       event->len ? event->name : ".");
		}
	}
}
