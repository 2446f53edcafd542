/* The stack: its content, its growth on demand after a rebuild, its guard; values in registers that callees save. */
#include "support.h"

#include <setjmp.h>

static unsigned char *deepest;
static sigjmp_buf escape;
static int depth_kib = 256;

static long stack_kib(void) {
    char line[256];
    long size = 0;
    int inside = 0;
    FILE *file = fopen("/proc/self/smaps", "re");
    while (fgets(line, sizeof line, file)) {
        if (strstr(line, "[stack]"))
            inside = 1;
        if (inside && sscanf(line, "Size: %ld kB", &size) == 1)
            break;
    }
    fclose(file);
    return size;
}

__attribute__((noinline)) static int dive(int kib, int seed) {
    volatile unsigned char block[1024];
    for (int i = 0; i < 1024; i++)
        block[i] = seed + i;
    if (!deepest || (unsigned char *)block < deepest)
        deepest = (unsigned char *)block;
    int below = kib > 1 ? dive(kib - 1, seed + 1) : 0;
    for (int i = 0; i < 1024; i++)
        if (block[i] != (unsigned char)(seed + i))
            return 1;
    return below;
}

/* Each check goes deeper than ever before: the mapping must grow. */
static const char *check_growth(void) {
    long before = stack_kib();
    depth_kib += 256;
    if (dive(depth_kib, 5))
        return "content of the stack has changed";
    long after = stack_kib();
    return after > before ? NULL : differ("%ld KiB before, %ld KiB after", before, after);
}

static void spoil_growth(void) {
    dive(depth_kib + 300, 5); /* what would have grown is there already */
}

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    siglongjmp(escape, 1);
}

/* Far below the limit nothing is mapped: SIGSEGV, handled on the alternate stack. */
static const char *check_fault(void) {
    volatile unsigned char here;
    volatile unsigned char *far = &here - (256UL << 20);
    if (sigsetjmp(escape, 1) == 0) {
        *far = 1;
        return "nothing happens far below the stack";
    }
    return NULL;
}

static void spoil_fault(void) {
    unsigned char here;
    uintptr_t far = ((uintptr_t)&here - (256UL << 20)) & ~4095UL;
    mmap((void *)(far - 65536), 131072, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

static volatile unsigned char *content;

static const char *check_content(void) {
    for (int i = 0; i < 100000; i++)
        if (content[i] != (unsigned char)(i * 3))
            return differ("byte %d", i);
    return NULL;
}

static void spoil_content(void) { content[4711]++; }

int main(int argc, char **argv) {
    open_directory(argc, argv);
    volatile unsigned char own[100000];
    for (int i = 0; i < 100000; i++)
        own[i] = i * 3;
    content = own;
    static unsigned char alternate[65536];
    stack_t stack = {alternate, 0, sizeof alternate};
    sigaltstack(&stack, NULL);
    struct sigaction action = {0};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, NULL);
    const struct check checks[] = {
        {"content", check_content, spoil_content},
        {"growth", check_growth, spoil_growth},
        {"fault below", check_fault, spoil_fault},
    };
    serve(checks, sizeof checks / sizeof *checks);
    return 0;
}
