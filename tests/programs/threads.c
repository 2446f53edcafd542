/* Ten threads: thread-local values, ids, names, robust mutexes, joining (clear_child_tid), restartable sequences. */
#include "support.h"

#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/rseq.h>

#define COUNT 10

static __thread long local = -1;
static __thread char local_text[64] = "initial";
static pthread_key_t key;
static struct {
    pthread_t thread;
    pid_t tid;
    volatile long rounds;
    volatile int error;
    volatile int leave;
    void *robust_head;
    size_t robust_size;
} threads[COUNT];
static pthread_mutex_t robust;
static pthread_barrier_t ready;
static volatile int spoil_local = -1, spoil_name = -1, spoil_place, spoil_tsc;
static volatile unsigned long long counter;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

static void *run(void *argument) {
    long number = (long)argument;
    char name[16], seen[16];
    local = 1000 + number;
    snprintf(local_text, sizeof local_text, "text of %ld", number);
    pthread_setspecific(key, (void *)(number + 1));
    snprintf(name, sizeof name, "thread )%ld", number);
    prctl(PR_SET_NAME, name);
    threads[number].tid = syscall(SYS_gettid);
    syscall(SYS_get_robust_list, 0, &threads[number].robust_head, &threads[number].robust_size);
    if (number == 3)
        pthread_mutex_lock(&robust); /* held for ever: its death must be seen */
    if (number == 8 && (unshare(CLONE_FS) || chdir("/usr"))) /* a place of its own; its umask is 051 */
        die("unshare");
    if (number == 8)
        umask(051);
    if (number == 7)
        prctl(PR_SET_TSC, PR_TSC_SIGSEGV);
    pthread_barrier_wait(&ready);
    while (!threads[number].leave) {
        char expected[64];
        void *head;
        size_t size;
        snprintf(expected, sizeof expected, "text of %ld", number);
        if (spoil_local == number)
            local = 5;
        if (spoil_name == number)
            prctl(PR_SET_NAME, "other");
        if (local != 1000 + number || strcmp(local_text, expected) || pthread_getspecific(key) != (void *)(number + 1))
            threads[number].error |= 1;
        prctl(PR_GET_NAME, seen);
        if (strcmp(seen, name))
            threads[number].error |= 2;
        if (syscall(SYS_gettid) != threads[number].tid)
            threads[number].error |= 4;
        syscall(SYS_get_robust_list, 0, &head, &size);
        if (head != threads[number].robust_head || size != threads[number].robust_size)
            threads[number].error |= 8;
        if (number == 8 && spoil_place)
            threads[number].error |= chdir("/") + 16;
        if (number == 8 && !spoil_place) {
            char here[64];
            int mask = umask(0);
            umask(mask);
            if (!getcwd(here, sizeof here) || strcmp(here, "/usr") || mask != 051)
                threads[number].error |= 16;
        }
        int tsc = 0;
        prctl(PR_GET_TSC, &tsc);
        if (number == 7 && spoil_tsc)
            prctl(PR_SET_TSC, PR_TSC_ENABLE);
        if ((tsc == PR_TSC_SIGSEGV) != (number == 7))
            threads[number].error |= 32;
        pthread_mutex_lock(&counting);
        counter++;
        pthread_mutex_unlock(&counting);
        threads[number].rounds++;
        nap(3 + number);
    }
    return (void *)(number * 7);
}

static int start(long number) {
    threads[number].leave = 0;
    threads[number].error = 0;
    return pthread_create(&threads[number].thread, NULL, run, (void *)number);
}

static const char *check_run(void) {
    for (int i = 0; i < COUNT; i++) {
        long before = threads[i].rounds;
        for (int wait = 0; threads[i].rounds == before && wait < 500; wait++)
            nap(2);
        if (threads[i].rounds == before)
            return differ("thread %d stands still", i);
    }
    return NULL;
}

static const char *errors(int bit, const char *what) {
    for (int i = 0; i < COUNT; i++)
        if (threads[i].error & bit)
            return differ("%s of thread %d", what, i);
    return NULL;
}

static const char *check_local(void) { return errors(1, "thread-local value"); }
static const char *check_name(void) { return errors(2, "name"); }
static const char *check_tid(void) { return errors(4, "id"); }
static const char *check_robust_list(void) { return errors(8, "robust list"); }

/* Thread 8 is in a place of its own, and all others are where the first one is. */
static const char *check_place(void) {
    char here[64];
    int mask = umask(0);
    umask(mask);
    if (!getcwd(here, sizeof here) || strcmp(here, "/tmp") || mask != 026)
        return differ("%s %o", here, mask);
    return errors(16, "place");
}

/* Thread 9 is told to leave and is joined: that waits for the kernel to clear its id. Then it is made again. */
static const char *check_join(void) {
    void *result = NULL;
    struct timespec deadline;
    threads[9].leave = 1;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 3;
    int code = pthread_timedjoin_np(threads[9].thread, &result, &deadline);
    if (code)
        return differ("pthread_join: %s", strerror(code));
    if (result != (void *)63)
        return differ("result %p", result);
    pthread_barrier_init(&ready, NULL, 2);
    start(9);
    pthread_barrier_wait(&ready);
    return NULL;
}

/* Thread 3 ends with the mutex locked: whoever locks it next is told so. */
static const char *check_robust(void) {
    struct timespec deadline;
    threads[3].leave = 1;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 3;
    int code = pthread_mutex_timedlock(&robust, &deadline);
    if (code != EOWNERDEAD)
        return differ("locking gives %d instead of EOWNERDEAD", code);
    pthread_mutex_consistent(&robust);
    pthread_mutex_unlock(&robust);
    pthread_join(threads[3].thread, NULL);
    pthread_barrier_init(&ready, NULL, 2);
    start(3);
    pthread_barrier_wait(&ready);
    return NULL;
}

/* glibc registers an rseq area for each thread: the kernel keeps its processor number current. */

static volatile int *rseq_cpu(void) {
    return (volatile int *)((char *)__builtin_thread_pointer() + __rseq_offset + 4);
}

static const char *check_rseq(void) {
    if (!__rseq_size)
        return "not registered by the C library";
    /* The kernel writes it when it returns to this task; a negative number means "not registered". */
    int old = *rseq_cpu();
    *rseq_cpu() = 12345;
    nap(3);
    int now = *rseq_cpu();
    *rseq_cpu() = now == 12345 ? old : now;
    return now >= 0 && now < 4096 && old != -1 ? NULL : differ("processor number %d, was %d", now, old);
}

static void spoil_run(void) { threads[5].leave = 1; nap(30); }
static void spoil_values(void) { spoil_local = 2; nap(30); }
static void spoil_names(void) { spoil_name = 4; nap(30); }
static const char *check_tsc(void) { return errors(32, "time stamp counter"); }
static void spoil_tscs(void) { spoil_tsc = 1; nap(60); }
static void spoil_places(void) { spoil_place = 1; nap(30); }
static void spoil_tid(void) { threads[6].tid = 1; nap(30); }
static void spoil_robust_list(void) { threads[7].robust_size = 1; nap(30); }
static void spoil_join(void) {
    threads[9].leave = 1;
    pthread_join(threads[9].thread, NULL);
    threads[9].thread = pthread_self();
}
static void spoil_robust(void) { pthread_mutex_destroy(&robust); pthread_mutex_init(&robust, NULL); }
static void spoil_rseq(void) {
    syscall(SYS_rseq, (char *)__builtin_thread_pointer() + __rseq_offset, 32, 1, 0x53053053);
}

int main(int argc, char **argv) {
    open_directory(argc, argv);
    umask(026);
    if (chdir("/tmp"))
        die("/tmp");
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&robust, &attributes);
    pthread_key_create(&key, NULL);
    pthread_barrier_init(&ready, NULL, COUNT + 1);
    for (long i = 0; i < COUNT; i++)
        if (start(i))
            die("pthread_create");
    pthread_barrier_wait(&ready);
    const struct check checks[] = {
        {"all run", check_run, spoil_run},
        {"thread-local values", check_local, spoil_values},
        {"names", check_name, spoil_names},
        {"ids", check_tid, spoil_tid},
        {"robust lists", check_robust_list, spoil_robust_list},
        {"time stamp counter", check_tsc, spoil_tscs},
        {"place", check_place, spoil_places},
        {"join", check_join, spoil_join},
        {"robust mutex", check_robust, spoil_robust},
        {"rseq", check_rseq, spoil_rseq},
    };
    serve(checks, sizeof checks / sizeof *checks);
    return 0;
}
