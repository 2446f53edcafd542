/* A tree that forks all the time: a freeze must catch all of it, and no child and no status may be lost.
 *
 * Three workers fork children with hardly a pause (more would use up the machine's pids); each child forks one more, waits for it and ends with a code that
 * its parent expects. Whoever gets a wrong answer ends with code 99, which nobody expects. */
#include "support.h"

#define WORKERS 3

static struct shared {
    volatile long rounds[WORKERS];
    volatile int error[WORKERS];
} *shared;
static pid_t workers[WORKERS];

static int ends_with(pid_t pid, int code) {
    int status;
    pid_t found;
    do
        found = waitpid(pid, &status, 0);
    while (found == -1 && errno == EINTR);
    return found == pid && WIFEXITED(status) && WEXITSTATUS(status) == code;
}

static void work(int number) {
    for (long round = 0;; round++) {
        int code = round % 90 + 1;
        pid_t parent = getpid();
        pid_t child = fork();
        if (child == 0) {
            pid_t grandchild = fork();
            if (grandchild == 0)
                _exit(getppid() == 0 ? 99 : code - 1);
            _exit(grandchild > 0 && getppid() == parent && ends_with(grandchild, code - 1) ? code : 99);
        }
        if (child < 0 || !ends_with(child, code)) {
            shared->error[number] = errno ? errno : -1;
            _exit(99);
        }
        shared->rounds[number]++;
        nap(2);
    }
}

static const char *check_rounds(void) {
    for (int i = 0; i < WORKERS; i++) {
        long before = shared->rounds[i];
        for (int wait = 0; shared->rounds[i] == before && wait < 1000; wait++)
            nap(2);
        if (shared->error[i] || shared->rounds[i] == before)
            return differ("worker %d: error %d after %ld rounds", i, shared->error[i], shared->rounds[i]);
    }
    return NULL;
}

static void spoil_rounds(void) {
    kill(workers[1], SIGKILL);
    waitpid(workers[1], NULL, 0);
}

int main(int argc, char **argv) {
    open_directory(argc, argv);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < WORKERS; i++)
        if ((workers[i] = fork()) == 0)
            work(i);
    const struct check checks[] = {{"no child is lost", check_rounds, spoil_rounds}};
    serve(checks, 1);
    for (int i = 0; i < WORKERS; i++) {
        kill(workers[i], SIGKILL);
        waitpid(workers[i], NULL, 0);
    }
    return 0;
}
