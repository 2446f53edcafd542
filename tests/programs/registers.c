/* Extended state: SSE, AVX and AVX-512 registers, mask registers, PKRU, rounding modes, as the processor has them.
 *
 * One thread for each set keeps a pattern in its registers while it spins, and compares them without any call
 * between, so that what a freeze and a rebuild do to them is seen. */
#include "support.h"

#include <cpuid.h>
#include <pthread.h>

static struct set {
    const char *name;
    int present;
    size_t size;
    volatile long rounds;
    volatile int error;
    volatile int spoil;
} sets[4];

#define SPIN 400000L
static unsigned char patterns[4][32 * 64 + 64] __attribute__((aligned(64)));

/* The registers stay loaded through the spin: it is one piece of assembly, with no call and no other register. */
#define SPIN_LOOP "1: pause\n dec %[count]\n jnz 1b\n"

static void round_sse(struct set *set, const unsigned char *in, unsigned char *out) {
    long count = SPIN;
    __asm__ volatile(
        "movdqu 0(%[in]), %%xmm0\n movdqu 16(%[in]), %%xmm1\n movdqu 32(%[in]), %%xmm7\n movdqu 48(%[in]), %%xmm15\n"
        SPIN_LOOP
        "movdqu %%xmm0, 0(%[out])\n movdqu %%xmm1, 16(%[out])\n movdqu %%xmm7, 32(%[out])\n movdqu %%xmm15, 48(%[out])\n"
        : [count] "+r"(count) : [in] "r"(in), [out] "r"(out) : "memory", "cc", "xmm0", "xmm1", "xmm7", "xmm15");
    set->size = 64;
}

__attribute__((target("avx"))) static void round_avx(struct set *set, const unsigned char *in, unsigned char *out) {
    long count = SPIN;
    __asm__ volatile(
        "vmovdqu 0(%[in]), %%ymm0\n vmovdqu 32(%[in]), %%ymm3\n vmovdqu 64(%[in]), %%ymm9\n vmovdqu 96(%[in]), %%ymm15\n"
        SPIN_LOOP
        "vmovdqu %%ymm0, 0(%[out])\n vmovdqu %%ymm3, 32(%[out])\n vmovdqu %%ymm9, 64(%[out])\n vmovdqu %%ymm15, 96(%[out])\n"
        "vzeroupper\n"
        : [count] "+r"(count) : [in] "r"(in), [out] "r"(out)
        : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15");
    set->size = 128;
}

__attribute__((target("avx512f,avx512bw"))) static void round_avx512(struct set *set, const unsigned char *in,
                                                                     unsigned char *out) {
    long count = SPIN;
    __asm__ volatile(
        "vmovdqu64 0(%[in]), %%zmm0\n vmovdqu64 64(%[in]), %%zmm15\n vmovdqu64 128(%[in]), %%zmm16\n"
        "vmovdqu64 192(%[in]), %%zmm31\n kmovq 256(%[in]), %%k1\n kmovq 264(%[in]), %%k7\n"
        SPIN_LOOP
        "vmovdqu64 %%zmm0, 0(%[out])\n vmovdqu64 %%zmm15, 64(%[out])\n vmovdqu64 %%zmm16, 128(%[out])\n"
        "vmovdqu64 %%zmm31, 192(%[out])\n kmovq %%k1, 256(%[out])\n kmovq %%k7, 264(%[out])\n vzeroupper\n"
        : [count] "+r"(count) : [in] "r"(in), [out] "r"(out)
        : "memory", "cc", "k1", "k7", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
          "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm31");
    set->size = 272;
}

/* Control words and x87: rounding modes that are not the default, a value on the register stack; PKRU where there is one. */
static void round_control(struct set *set, const unsigned char *in, unsigned char *out) {
    long count = SPIN;
    unsigned short old_x87, x87 = 0x0c7f;
    unsigned old_mxcsr, mxcsr = 0x7f80;
    double value = 3.25 + in[0];
    __asm__ volatile(
        "fnstcw %[old_x87]\n stmxcsr %[old_mxcsr]\n fldcw %[x87]\n ldmxcsr %[mxcsr]\n fldl %[value]\n"
        SPIN_LOOP
        "fstpl 0(%[out])\n fnstcw 8(%[out])\n stmxcsr 12(%[out])\n fldcw %[old_x87]\n ldmxcsr %[old_mxcsr]\n"
        : [count] "+r"(count), [old_x87] "=m"(old_x87), [old_mxcsr] "=m"(old_mxcsr)
        : [out] "r"(out), [x87] "m"(x87), [mxcsr] "m"(mxcsr), [value] "m"(value)
        : "memory", "cc");
    set->size = 0;
    if (memcmp(out, &value, 8) || memcmp(out + 8, &x87, 2) || (*(unsigned *)(out + 12) & ~0x3f) != mxcsr)
        set->error = 1;
    if (set->spoil)
        set->error = 1;
}

static unsigned read_pkru(void) {
    unsigned low, high;
    __asm__ volatile("rdpkru" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int has_pku(void) {
    unsigned a, b, c = 0, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & 1 << 4);
}

static void (*const rounds[])(struct set *, const unsigned char *, unsigned char *) = {round_sse, round_avx, round_avx512,
                                                                                      round_control};

static void *spin(void *argument) {
    long number = (long)argument;
    struct set *set = &sets[number];
    unsigned char out[512] __attribute__((aligned(64)));
    unsigned pkru = 0;
    if (number == 3 && has_pku()) {
        int protection_key = syscall(SYS_pkey_alloc, 0, 1);
        pkru = protection_key >= 0 ? read_pkru() : 0;
    }
    for (;;) {
        rounds[number](set, patterns[number], out);
        if (set->spoil && set->size)
            out[set->size - 1] ^= 1;
        if (set->size && memcmp(out, patterns[number], set->size))
            set->error = 1;
        if (pkru && read_pkru() != pkru)
            set->error = 2;
        set->rounds++;
    }
    return NULL;
}

static const char *check_set(int number) {
    struct set *set = &sets[number];
    if (!set->present)
        return set->spoil ? "not there, and spoilt" : NULL;
    long before = set->rounds;
    for (int wait = 0; set->rounds < before + 2 && wait < 2000; wait++)
        nap(2);
    if (set->rounds < before + 2)
        return "stands still";
    return set->error ? differ("registers have changed (%d)", set->error) : NULL;
}

static const char *check_sse(void) { return check_set(0); }
static const char *check_avx(void) { return check_set(1); }
static const char *check_avx512(void) { return check_set(2); }
static const char *check_control(void) { return check_set(3); }
static void spoil_sse(void) { sets[0].spoil = 1; }
static void spoil_avx(void) { sets[1].spoil = 1; }
static void spoil_avx512(void) { sets[2].spoil = 1; }
static void spoil_control(void) { sets[3].spoil = 1; }

int main(int argc, char **argv) {
    open_directory(argc, argv);
    sets[0].present = sets[3].present = 1;
    sets[1].present = __builtin_cpu_supports("avx");
    sets[2].present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    for (size_t i = 0; i < sizeof patterns; i++)
        ((unsigned char *)patterns)[i] = i * 7 + (i >> 6) * 13 + 1;
    for (long i = 0; i < 4; i++) {
        pthread_t thread;
        if (sets[i].present)
            pthread_create(&thread, NULL, spin, (void *)i);
    }
    /* until its first round a thread may still have every signal blocked, as pthread_create(3) makes it */
    for (size_t i = 0; i < 4; i++)
        while (sets[i].present && !sets[i].rounds)
            nap(1);
    const struct check checks[] = {
        {"SSE", check_sse, spoil_sse},
        {"AVX", check_avx, spoil_avx},
        {"AVX-512", check_avx512, spoil_avx512},
        {"control words, x87, PKRU", check_control, spoil_control},
    };
    serve(checks, sizeof checks / sizeof *checks);
    _exit(0);
}
