/* A process of several threads that executes a program or ends all the time. The second argument says how:
 *
 * thread  a thread that is not the first executes the program again
 * first   the first thread does
 * end     a child ends, all its threads at once, and the next one is made
 * leave   the first thread of a child ends, the others a while later, and the next one is made
 *
 * How often it did is the size of the file "count" in its directory. */
#include "support.h"

#include <pthread.h>

static char **arguments;

static void wait_a_moment(void) {
    static unsigned seed;
    struct timespec moment = {0, (now_s() * 1e6 + getpid() + seed++ * 7919) / 1};
    moment.tv_nsec = moment.tv_nsec % 300 * 1000;
    nanosleep(&moment, NULL);
}

static void *stay(void *unused) {
    for (;;)
        pause();
    return unused;
}

static void *execute(void *unused) {
    wait_a_moment();
    execv("/proc/self/exe", arguments);
    die("execve");
    return unused;
}

static void *end(void *unused) {
    wait_a_moment();
    _exit(3);
    return unused;
}

static void *end_later(void *unused) {
    nap(2);
    return unused;
}

static void count(void) {
    int fd = openat(directory_fd, "count", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, "x", 1) != 1)
        die("count");
    close(fd);
}

static void start(void *(*run)(void *)) {
    pthread_t thread;
    /* its predecessors may not have given back everything yet */
    while ((errno = pthread_create(&thread, NULL, run, NULL)) == EAGAIN)
        nap(1);
    if (errno)
        die("thread");
}

static void bear(void *(*run)(void *), int leaves) {
    pid_t child = fork();
    if (child == 0) {
        start(leaves ? run : stay);
        start(run);
        wait_a_moment();
        if (leaves)
            pthread_exit(NULL);
        stay(NULL);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != (leaves ? 0 : 3 << 8))
        die("child");
    count();
}

int main(int argc, char **argv) {
    arguments = argv;
    open_directory(argc, argv);
    const char *how = argc > 2 ? argv[2] : "";
    if (!strcmp(how, "end"))
        for (;;)
            bear(end, 0);
    if (!strcmp(how, "leave"))
        for (;;)
            bear(end_later, 1);
    count();
    start(stay);
    start(strcmp(how, "first") ? execute : stay);
    start(stay);
    (strcmp(how, "first") ? stay : execute)(NULL);
}
