/* Threads that are inside a restartable sequence nearly always: one with the area of the C library, one with its own.
 *
 * In the sequence a thread looks whether it is still on the processor where it began. That can only differ if a
 * sequence was gone on with that should have been aborted. */
#include "support.h"

#include <pthread.h>
#include <sys/rseq.h>

#define SIGNATURE 0x53053053
#define OWN_BYTES 64

enum { LIBRARY, OWN, COUNT };

struct area {
    volatile unsigned cpu_id_start, cpu_id;
    volatile unsigned long sequence;
    volatile unsigned flags, node_id, mm_cid;
};
static struct {
    struct area *area;
    volatile long committed, aborted, violated;
    volatile int ask, answer, unregister;
} threads[COUNT];
static char own[OWN_BYTES] __attribute__((aligned(64)));

/* 1: committed, 2: on another processor in the middle, 3: aborted. */
static int sequence(struct area *area, long rounds) {
    int result;
    __asm__ volatile(".pushsection __rseq_cs, \"aw\"\n"
                     ".balign 32\n"
                     "3:\n .long 0, 0\n .quad 1f, (2f - 1f), 4f\n"
                     ".popsection\n"
                     "leaq 3b(%%rip), %%rax\n"
                     "movq %%rax, 8(%[area])\n"
                     "1:\n"
                     "movl (%[area]), %%ecx\n"
                     "5:\n"
                     "cmpl %%ecx, 4(%[area])\n"
                     "jne 6f\n"
                     "decq %[rounds]\n"
                     "jnz 5b\n"
                     "movl $1, %[result]\n"
                     "2:\n"
                     "jmp 7f\n"
                     "6:\n"
                     "movl $2, %[result]\n"
                     "jmp 7f\n"
                     ".long 0x53053053\n"
                     "4:\n"
                     "movl $3, %[result]\n"
                     "7:\n"
                     : [result] "=&r"(result), [rounds] "+r"(rounds)
                     : [area] "r"(area)
                     : "rax", "rcx", "memory", "cc");
    return result;
}

static void *run(void *argument) {
    long number = (long)argument;
    struct area *area = (struct area *)((char *)__builtin_thread_pointer() + __rseq_offset);
    if (number == OWN) {
        if (syscall(SYS_rseq, area, 32, RSEQ_FLAG_UNREGISTER, SIGNATURE))
            die("rseq of the C library");
        area = (struct area *)own;
        if (syscall(SYS_rseq, area, OWN_BYTES, 0, SIGNATURE))
            die("rseq");
    }
    threads[number].area = area;
    for (;;) {
        switch (sequence(area, 400000)) {
        case 1:
            threads[number].committed++;
            break;
        case 2:
            threads[number].violated++;
            break;
        default:
            threads[number].aborted++;
        }
        if (threads[number].unregister)
            threads[number].unregister = syscall(SYS_rseq, area, number == OWN ? OWN_BYTES : 32, 1, SIGNATURE);
        if (threads[number].ask) {
            area->mm_cid = area->node_id = 54321;
            nap(2); /* the kernel writes them when it comes back to this thread */
            int registered = syscall(SYS_rseq, area, number == OWN ? OWN_BYTES : 32, 0, SIGNATURE) == -1 && errno == EBUSY;
            threads[number].answer = registered && area->cpu_id < 4096 &&
                                     (number == LIBRARY || (area->mm_cid < 4096 && area->node_id < 4096));
            threads[number].ask = 0;
        }
    }
    return NULL;
}

static const char *check_sequences(void) {
    for (int i = 0; i < COUNT; i++) {
        long before = threads[i].committed + threads[i].aborted;
        for (int wait = 0; wait < 1000 && threads[i].committed + threads[i].aborted == before; wait++)
            nap(2);
        if (threads[i].committed + threads[i].aborted == before)
            return differ("thread %d stands still", i);
        if (threads[i].violated)
            return differ("thread %d went on %ld times on another processor", i, threads[i].violated);
    }
    return NULL;
}

static const char *check_registered(int number) {
    threads[number].ask = 1;
    for (int wait = 0; wait < 1000 && threads[number].ask; wait++)
        nap(2);
    return threads[number].ask || !threads[number].answer ? "not as it was registered" : NULL;
}

static const char *check_library(void) { return check_registered(LIBRARY); }
static const char *check_own(void) { return check_registered(OWN); }
static void spoil_sequences(void) { threads[OWN].violated = 1; }
static void spoil_library(void) { threads[LIBRARY].unregister = 1; nap(50); threads[LIBRARY].area->cpu_id = 9999; }
static void spoil_own(void) { threads[OWN].unregister = 1; nap(50); threads[OWN].area->cpu_id = 9999; }

int main(int argc, char **argv) {
    open_directory(argc, argv);
    for (long i = 0; i < COUNT; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, run, (void *)i))
            die("pthread_create");
    }
    while (!threads[LIBRARY].area || !threads[OWN].area)
        nap(1);
    const struct check checks[] = {
        {"sequences", check_sequences, spoil_sequences},
        {"area of the C library", check_library, spoil_library},
        {"area of its own", check_own, spoil_own},
    };
    serve(checks, sizeof checks / sizeof *checks);
    return 0;
}
