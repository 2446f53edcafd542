/* Threads that are inside a system call nearly always: each must come back with the right answer.
 *
 * Sleepers come back by themselves after the time they asked for, never earlier and never with EINTR.
 * Waiters come back when the check gives them what they wait for, and wait again. */
#include "support.h"

#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>

enum { SLEEP, CLOCK_SLEEP, ABSOLUTE_SLEEP, POLL_TIME, SELECT_TIME, EPOLL_TIME, FUTEX_TIME, SIGWAIT_TIME, SLEEPERS };
enum { READ, POLL, EPOLL, FUTEX, WAITPID, PAUSED, WRITE, WAITERS };
static const char *const sleeper_names[] = {"nanosleep", "clock_nanosleep", "absolute sleep", "poll timeout",
                                            "select timeout", "epoll_wait timeout", "futex timeout", "sigtimedwait"};

static struct {
    volatile long rounds;
    volatile int error;
    volatile double early;
} sleepers[SLEEPERS];
static struct {
    volatile long rounds;
    volatile int error;
} waiters[WAITERS];
static const double nap_s = 0.25;
static volatile int never;
static int pipes[WAITERS][2], epoll_fd;
static volatile int word;
static volatile pid_t child;
static pthread_t pausing;
/* of all threads: from here on they have the signal masks that they keep */
static pthread_barrier_t begun;
static volatile int usr1;

static void on_usr1(int number) {
    usr1 = number;
}

static void *sleeper(void *argument) {
    long kind = (long)argument;
    int empty = epoll_create1(0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_barrier_wait(&begun);
    for (;;) {
        struct timespec left, time = {0, (long)(nap_s * 1e9)};
        double begin = now_s();
        long result = 0;
        int expected_error = 0;
        errno = 0;
        switch (kind) {
        case SLEEP:
            result = nanosleep(&time, &left);
            break;
        case CLOCK_SLEEP:
            errno = clock_nanosleep(CLOCK_BOOTTIME, 0, &time, &left);
            break;
        case ABSOLUTE_SLEEP:
            clock_gettime(CLOCK_MONOTONIC, &left);
            left.tv_nsec += time.tv_nsec;
            left.tv_sec += left.tv_nsec / 1000000000;
            left.tv_nsec %= 1000000000;
            errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &left, NULL);
            break;
        case POLL_TIME:
            result = poll(NULL, 0, (int)(nap_s * 1000));
            break;
        case SELECT_TIME: {
            struct timeval span = {0, (long)(nap_s * 1e6)};
            result = select(0, NULL, NULL, NULL, &span);
            break;
        }
        case EPOLL_TIME: {
            struct epoll_event event;
            result = epoll_wait(empty, &event, 1, (int)(nap_s * 1000));
            break;
        }
        case FUTEX_TIME:
            result = syscall(SYS_futex, &never, FUTEX_WAIT_PRIVATE, 0, &time, NULL, 0);
            expected_error = ETIMEDOUT;
            break;
        case SIGWAIT_TIME:
            result = sigtimedwait(&set, NULL, &time);
            expected_error = EAGAIN;
            break;
        }
        double early = nap_s - (now_s() - begin);
        /* sigtimedwait(2) and epoll_wait(2) are interrupted by any stop, with a tracer or SIGCONT alike: signal(7) */
        int interrupted = errno == EINTR && (kind == SIGWAIT_TIME || kind == EPOLL_TIME);
        if (!interrupted && (errno != expected_error || (!expected_error && result != 0)))
            sleepers[kind].error = errno ? errno : -1;
        if (!interrupted && early > 0.001 && early > sleepers[kind].early)
            sleepers[kind].early = early;
        sleepers[kind].rounds++;
    }
    return NULL;
}

static void *waiter(void *argument) {
    long kind = (long)argument;
    char byte;
    pthread_barrier_wait(&begun);
    for (;;) {
        int error = 0;
        switch (kind) {
        case READ:
            if (read(pipes[READ][0], &byte, 1) != 1)
                error = errno;
            break;
        case POLL: {
            struct pollfd entry = {pipes[POLL][0], POLLIN, 0};
            if (poll(&entry, 1, -1) != 1 || entry.revents != POLLIN || read(entry.fd, &byte, 1) != 1)
                error = errno;
            break;
        }
        case EPOLL: {
            struct epoll_event event = {0};
            int count;
            do
                count = epoll_wait(epoll_fd, &event, 1, -1);
            while (count == -1 && errno == EINTR); /* as signal(7) says of a stop */
            if (count != 1 || event.data.u64 != 0x1234567890abcdef || read(pipes[EPOLL][0], &byte, 1) != 1)
                error = errno ? errno : -1;
            break;
        }
        case FUTEX:
            while (word == 0)
                if (syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == -1 && errno != EAGAIN)
                    error = errno;
            word = 0;
            break;
        case WAITPID: {
            int status;
            pid_t pid = child;
            pid_t found = waitpid(pid, &status, 0);
            if (found != pid || !WIFEXITED(status) || WEXITSTATUS(status) != 42)
                error = found == -1 ? errno : -1;
            child = 0;
            waiters[kind].error |= error;
            waiters[kind].rounds++;
            while (child == 0)
                nap(2);
            continue;
        }
        case PAUSED:
            if (pause() != -1 || errno != EINTR || usr1 != SIGUSR1)
                error = -1;
            usr1 = 0;
            break;
        case WRITE: {
            /* More than fits: the rest goes in as the check reads. A stop ends the call early with what went in. */
            static char block[200000];
            for (size_t sent = 0; sent < sizeof block && !error;) {
                ssize_t count = write(pipes[WRITE][1], block, sizeof block - sent);
                error = count <= 0 ? errno : 0;
                sent += count > 0 ? count : 0;
            }
            break;
        }
        }
        if (error)
            waiters[kind].error = error;
        waiters[kind].rounds++;
    }
    return NULL;
}

static void new_child(void) {
    pid_t pid = fork();
    if (pid == 0) {
        char byte;
        if (read(pipes[WAITPID][0], &byte, 1) != 1)
            _exit(1);
        _exit(42);
    }
    child = pid;
}

static const char *check_sleepers(void) {
    static char text[512];
    int used = 0;
    long before[SLEEPERS];
    text[0] = 0;
    for (int i = 0; i < SLEEPERS; i++)
        before[i] = sleepers[i].rounds;
    for (int i = 0; i < SLEEPERS; i++) {
        for (int wait = 0; sleepers[i].rounds == before[i] && wait < 300; wait++)
            nap(5);
        if (sleepers[i].rounds == before[i])
            used += sprintf(text + used, "%s hangs; ", sleeper_names[i]);
        if (sleepers[i].error)
            used += sprintf(text + used, "%s: error %d; ", sleeper_names[i], sleepers[i].error);
        if (sleepers[i].early > 0)
            used += sprintf(text + used, "%s: %.3f s early; ", sleeper_names[i], sleepers[i].early);
    }
    return used ? text : NULL;
}

static const char *woken(int kind, long before) {
    for (int wait = 0; waiters[kind].rounds == before && wait < 500; wait++)
        nap(2);
    if (waiters[kind].rounds == before)
        return "does not come back";
    return waiters[kind].error ? differ("error %d", waiters[kind].error) : NULL;
}

static const char *through_pipe(int kind) {
    long before = waiters[kind].rounds;
    if (write(pipes[kind][1], "x", 1) != 1)
        return "cannot write";
    return woken(kind, before);
}

static const char *check_read(void) { return through_pipe(READ); }
static const char *check_poll(void) { return through_pipe(POLL); }
static const char *check_epoll(void) { return through_pipe(EPOLL); }

static const char *check_futex(void) {
    long before = waiters[FUTEX].rounds;
    word = 1;
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    return woken(FUTEX, before);
}

static const char *check_waitpid(void) {
    const char *difference = through_pipe(WAITPID);
    if (!child)
        new_child();
    return difference;
}

static const char *check_pause(void) {
    long before = waiters[PAUSED].rounds;
    nap(5);
    if (waiters[PAUSED].rounds != before || waiters[PAUSED].error)
        return "came back without a signal";
    pthread_kill(pausing, SIGUSR1);
    return woken(PAUSED, before);
}

static const char *check_write(void) {
    char block[65536];
    long before = waiters[WRITE].rounds;
    long total = 0;
    for (int i = 0; i < 200 && waiters[WRITE].rounds == before; i++) {
        ssize_t count = read(pipes[WRITE][0], block, sizeof block);
        if (count > 0)
            total += count;
        nap(2);
    }
    return woken(WRITE, before);
}

static void spoil_sleepers(void) { sleepers[SLEEP].error = EINTR; sleepers[POLL_TIME].early = 1; }
static void spoil_read(void) { waiters[READ].error = EINTR; }
static void spoil_poll(void) { dup2(epoll_fd, pipes[POLL][1]); }
static void spoil_epoll(void) { struct epoll_event e = {0, {0}}; epoll_ctl(epoll_fd, EPOLL_CTL_MOD, pipes[EPOLL][0], &e); }
static void spoil_futex(void) { waiters[FUTEX].error = EINTR; }
static void spoil_waitpid(void) { kill(child, SIGKILL); }
static void spoil_pause(void) { pthread_kill(pausing, SIGUSR1); nap(50); waiters[PAUSED].error = 1; }
static void spoil_write(void) { waiters[WRITE].error = EINTR; }

int main(int argc, char **argv) {
    open_directory(argc, argv);
    struct sigaction action = {0};
    action.sa_handler = on_usr1;
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < WAITERS; i++)
        if (pipe2(pipes[i], O_CLOEXEC))
            die("pipe");
    epoll_fd = epoll_create1(0);
    struct epoll_event event = {EPOLLIN, {0}};
    event.data.u64 = 0x1234567890abcdef;
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, pipes[EPOLL][0], &event);
    new_child();
    pthread_barrier_init(&begun, NULL, SLEEPERS + WAITERS + 1);
    for (long i = 0; i < SLEEPERS; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, sleeper, (void *)i);
    }
    for (long i = 0; i < WAITERS; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, waiter, (void *)i);
        if (i == PAUSED)
            pausing = thread;
    }
    pthread_barrier_wait(&begun);
    nap(50);
    const struct check checks[] = {
        {"sleepers", check_sleepers, spoil_sleepers}, {"read", check_read, spoil_read},
        {"poll", check_poll, spoil_poll},             {"epoll_wait", check_epoll, spoil_epoll},
        {"futex", check_futex, spoil_futex},          {"waitpid", check_waitpid, spoil_waitpid},
        {"pause", check_pause, spoil_pause},          {"write", check_write, spoil_write},
    };
    serve(checks, sizeof checks / sizeof *checks);
    if (child) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    return 0;
}
