/* Threads that write, drop, move, unmap and map memory without pause, and know what has to be in every page; and a
 * child that still has the pages it was forked with, and writes to its half of what is shared with it.
 *
 * Arguments after the directory: "forks": children come and go, too, and write to what is shared; "huge": private
 * memory, but what is written slowly, consists of huge pages of hugetlbfs. */
#include "support.h"

#include <linux/mman.h>
#include <pthread.h>
#include <sys/prctl.h>

enum { THREADS = 3, PAGES = 2048, WORDS = 512, PAGE = 4096, IN_A_HUGE_PAGE = 512 };

struct arena {
    uint64_t *pages;
    uint32_t written[PAGES]; /* 0: reads as zeros */
    uint64_t state;
    pthread_mutex_t lock;
};

/* of the threads, of which one writes by turns two contents; then one of shared memory, whose odd pages are the child's;
 * and one that is written slowly, so that the child shares most of it */
enum { FLICKERING = 1, SHARED = THREADS, SLOW, ARENAS };

static struct arena arenas[ARENAS];
static const char *volatile wrong;
static char wrong_text[200];
static int forks;
static int is_child;
static int huge_flags;
/* so many pages are dropped, moved, unmapped at once */
static int chunk_pages = 64;
/* shared with the child: what it has found wrong */
static char *witnessed;

static uint64_t mix(uint64_t value) {
    value ^= value >> 33;
    value *= 0xff51afd7ed558ccdULL;
    value ^= value >> 29;
    return value * 0xc4ceb9fe1a85ec53ULL;
}

static uint64_t dice(struct arena *arena) {
    return arena->state = mix(arena->state + 0x9e3779b97f4a7c15ULL);
}

static uint64_t word(struct arena *arena, int page, uint32_t count, int at) {
    if (arena == &arenas[FLICKERING] && count)
        count = 1 + count % 2;
    return count ? mix((uint64_t)(arena - arenas) << 56 ^ (uint64_t)page << 40 ^ (uint64_t)count << 8 ^ (at & 255)) : 0;
}

static void put(struct arena *arena, int page) {
    uint32_t count = ++arena->written[page];
    uint64_t *words = arena->pages + (size_t)page * WORDS;
    for (int at = 0; at < WORDS; at++)
        words[at] = word(arena, page, count, at);
}

static int is_right(struct arena *arena, int page) {
    uint64_t *words = arena->pages + (size_t)page * WORDS;
    for (int at = 0; at < WORDS; at++)
        if (words[at] != word(arena, page, arena->written[page], at)) {
            if (!wrong) {
                snprintf(wrong_text, sizeof wrong_text, "arena %d page %d word %d: %llx, written %u times",
                         (int)(arena - arenas), page, at, (unsigned long long)words[at], arena->written[page]);
                wrong = wrong_text;
            }
            return 0;
        }
    return 1;
}

/* one that is ours to write */
static int some_page(struct arena *arena) {
    int page = dice(arena) % PAGES;
    return arena == &arenas[SHARED] ? (page & ~1) | is_child : page;
}

static void *place(struct arena *arena) {
    return (void *)(0x100000000000ULL + ((uint64_t)(arena - arenas) << 40) + (dice(arena) % 4096 << 24));
}

static uint64_t *map(void *at, size_t pages, int kind) {
    void *found = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, kind | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (found == MAP_FAILED)
        die("mmap");
    return found;
}

static void forget(struct arena *arena, int first) {
    memset(arena->written + first, 0, chunk_pages * sizeof *arena->written);
}

static void drop(struct arena *arena, int first) {
    if (madvise(arena->pages + (size_t)first * WORDS, chunk_pages * PAGE, MADV_DONTNEED))
        die("madvise");
    forget(arena, first);
}

static void change_mappings(struct arena *arena) {
    int first = dice(arena) % (PAGES / chunk_pages) * chunk_pages;
    uint64_t *chunk = arena->pages + (size_t)first * WORDS;
    size_t size = (size_t)chunk_pages * PAGE;
    switch (dice(arena) % 4) {
    case 0:
        drop(arena, first);
        break;
    case 1:
        if (munmap(chunk, size))
            die("munmap");
        map(chunk, chunk_pages, MAP_PRIVATE | huge_flags);
        forget(arena, first);
        break;
    case 2:
        if (mprotect(chunk, size, PROT_READ) || mprotect(chunk, size, PROT_READ | PROT_WRITE))
            die("mprotect");
        break;
    case 3: {
        /* chunk by chunk: what lies behind several mappings cannot be moved at once. Slowly: whoever looks from outside
         * finds some here and some there. */
        uint64_t *to = place(arena);
        if (to == arena->pages)
            break;
        for (int at = 0; at < PAGES; at += chunk_pages) {
            if (mremap(arena->pages + (size_t)at * WORDS, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
                       to + (size_t)at * WORDS) == MAP_FAILED)
                die("mremap");
            nap(1);
        }
        arena->pages = to;
    }
    }
}

static void bear(struct arena *arena) {
    pid_t child = fork();
    if (child == 0) {
        for (int number = 0; number < 200; number++)
            if (!is_right(arena, dice(arena) % PAGES))
                _exit(1);
        nap(2);
        for (int number = 0; number < 200; number++)
            if (!is_right(arena, dice(arena) % PAGES))
                _exit(1);
        _exit(0);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child)
        die("fork");
    if (status && !wrong)
        wrong = "a child has seen a wrong page";
}

/* Writes a page of shared memory in a way of which nothing is to be seen afterwards but the page. */
static void write_unseen(struct arena *arena) {
    int page = some_page(arena);
    uint64_t *words = arena->pages;
    int way = dice(arena) % (forks && !is_child ? 4 : 3);
    if (way == 0) { /* by a mapping that is gone then */
        arena->pages = mremap(words, 0, (size_t)PAGES * PAGE, MREMAP_MAYMOVE);
        if (arena->pages == MAP_FAILED)
            die("mremap");
        put(arena, page);
        if (munmap(arena->pages, (size_t)PAGES * PAGE))
            die("munmap");
        arena->pages = words;
    } else if (way == 1) { /* by page tables that are empty then */
        put(arena, page);
        if (madvise(words + (size_t)page * WORDS, PAGE, MADV_DONTNEED))
            die("madvise");
    } else if (way == 2) { /* by who makes a hole of it */
        if (madvise(words + (size_t)page * WORDS, PAGE, MADV_REMOVE))
            die("madvise");
        arena->written[page] = 0;
    } else { /* by a child that is gone then */
        pid_t child = fork();
        if (child == 0) {
            put(arena, page);
            _exit(0);
        }
        if (child < 0 || waitpid(child, NULL, 0) != child)
            die("fork");
        arena->written[page]++;
    }
}

static void *work(void *argument) {
    struct arena *arena = argument;
    int is_quick = arena < &arenas[THREADS];
    for (;;) {
        pthread_mutex_lock(&arena->lock);
        for (int number = 0; number < (arena == &arenas[SLOW] ? 1 : 24); number++) {
            put(arena, some_page(arena));
            is_right(arena, some_page(arena));
        }
        if (arena == &arenas[SHARED] && dice(arena) % 32 == 0)
            write_unseen(arena);
        if (is_quick && dice(arena) % 12 == 0)
            change_mappings(arena);
        if (arena == &arenas[SLOW] && dice(arena) % 64 == 0)
            drop(arena, dice(arena) % (PAGES / chunk_pages) * chunk_pages);
        if (forks && is_quick && dice(arena) % 256 == 0)
            bear(arena);
        pthread_mutex_unlock(&arena->lock);
        nap(2);
    }
    return NULL;
}

/* The child: looks at the pages of the time of the fork, which its parent has long written to, and at its own. */
static void stay_as_it_was(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    is_child = 1;
    for (;;) {
        for (int number = 0; number < 60; number++) {
            struct arena *arena = &arenas[number % 4 == 0 ? number % THREADS : number % 4 == 1 ? SHARED : SLOW];
            if (arena == &arenas[SHARED])
                put(arena, some_page(arena));
            if (!is_right(arena, some_page(arena)))
                strcpy(witnessed, wrong_text);
        }
        if (dice(&arenas[SHARED]) % 32 == 0)
            write_unseen(&arenas[SHARED]);
        nap(3);
    }
}

static const char *check_pages(void) {
    for (struct arena *arena = arenas; arena < &arenas[ARENAS]; arena++) {
        pthread_mutex_lock(&arena->lock);
        for (int page = 0; page < PAGES; page += arena == &arenas[SHARED] ? 2 : 1)
            is_right(arena, page);
        pthread_mutex_unlock(&arena->lock);
    }
    if (!*witnessed)
        return wrong;
    static char text[300];
    snprintf(text, sizeof text, "the child has pages that it did not have: %s", witnessed);
    return text;
}

static void spoil_pages(void) {
    pthread_mutex_lock(&arenas[0].lock);
    put(&arenas[0], 7);
    arenas[0].written[7]++;
    is_right(&arenas[0], 7);
    pthread_mutex_unlock(&arenas[0].lock);
}

static int kind_of(int number) {
    return number == SHARED ? MAP_SHARED : number == SLOW ? MAP_PRIVATE : MAP_PRIVATE | huge_flags;
}

int main(int argc, char **argv) {
    static const struct check checks[] = {{"pages", check_pages, spoil_pages}};
    open_directory(argc, argv);
    for (int number = 2; number < argc; number++) {
        forks |= !strcmp(argv[number], "forks");
        if (!strcmp(argv[number], "huge")) {
            huge_flags = MAP_HUGETLB | 21 << MAP_HUGE_SHIFT;
            chunk_pages = IN_A_HUGE_PAGE;
        }
    }
    witnessed = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int number = 0; number < ARENAS; number++) {
        struct arena *arena = &arenas[number];
        arena->state = number + 1;
        pthread_mutex_init(&arena->lock, NULL);
        arena->pages = map(place(arena), PAGES, kind_of(number));
        for (int page = 0; page < PAGES; page++)
            put(arena, page);
    }
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0)
        stay_as_it_was();
    for (int number = 0; number < ARENAS; number++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, &arenas[number]))
            die("pthread_create");
    }
    serve(checks, sizeof checks / sizeof *checks);
}
