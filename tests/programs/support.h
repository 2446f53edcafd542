/* How every test program in C is asked and how it answers: see support.py.
 *
 * Checks are functions that return NULL or a text that says what differs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct check {
    const char *name;
    const char *(*run)(void);
    void (*spoil)(void);
};

static int directory_fd = -1;

static void die(const char *what) {
    perror(what);
    _exit(1);
}

/* A difference as text; one static buffer is enough, answers are written at once. */
static const char *differ(const char *format, ...) {
    static char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

static void nap(long milliseconds) {
    struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    while (nanosleep(&time, &time) == -1 && errno == EINTR)
        ;
}

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void put_file(const char *name, const char *text) {
    char temporary[300];
    snprintf(temporary, sizeof temporary, ".%s", name);
    int fd = openat(directory_fd, temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        die(name);
    close(fd);
    renameat(directory_fd, temporary, directory_fd, name);
}

static void open_directory(int argc, char **argv) {
    if (argc < 2)
        _exit(2);
    directory_fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory_fd < 0)
        die(argv[1]);
}

static void serve(const struct check *checks, size_t count) {
    char answer[16384], name[64];
    size_t used = 0;
    answer[0] = 0;
    for (size_t i = 0; i < count; i++)
        used += snprintf(answer + used, sizeof answer - used, "main/%s\n", checks[i].name);
    put_file("ready.main", answer);
    for (int number = 1;; number++) {
        char request[16] = "";
        struct stat unused;
        snprintf(name, sizeof name, "request.%d", number);
        while (fstatat(directory_fd, name, &unused, 0) == -1)
            nap(4);
        int fd = openat(directory_fd, name, O_RDONLY | O_CLOEXEC);
        if (read(fd, request, sizeof request - 1) < 0)
            die(name);
        close(fd);
        if (!strcmp(request, "end"))
            return;
        answer[0] = 0;
        used = 0;
        for (size_t i = 0; i < count; i++) {
            if (!strcmp(request, "spoil")) {
                checks[i].spoil();
                continue;
            }
            const char *difference = checks[i].run();
            if (difference)
                used += snprintf(answer + used, sizeof answer - used, "main/%s\t%s\n", checks[i].name, difference);
        }
        snprintf(name, sizeof name, "answer.%d.main", number);
        put_file(name, answer);
    }
}
