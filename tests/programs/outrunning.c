/* A child that writes memory faster than a slow network takes it, and looks at every page before it writes to it again;
 * and who would notice if somebody held it back by other means than standing still: a thread of it that makes short
 * waits, and its parent, which waits for any news of it.
 *
 * Arguments after the directory: MiB of memory, and microseconds from one written page to the next. How many pages it
 * has written is in the file "count", 8 bytes. */
#include "support.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

enum { PAGE = 4096, WORDS = PAGE / 8, OFTEN = 16 };

struct told {
    char wrong_page[100];
    char wrong_wait[100];
    char wrong_news[100];
};

static struct told *told;
static size_t pages;
static double every_s;
static int count_fd;
static pid_t writer;

static void spin(double until_s) {
    while (now_s() < until_s)
        ;
}

static void *write_pages(void *unused) {
    uint64_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *written = calloc(pages, sizeof *written), count = 0, dice = 1;
    if (memory == MAP_FAILED || !written)
        die("memory");
    for (;;) {
        double begun_s = now_s();
        dice = dice * 6364136223846793005ULL + 1442695040888963407ULL;
        size_t page = (dice >> 33) % pages;
        uint64_t *words = memory + page * WORDS;
        for (int at = 0; at < WORDS; at++)
            if (words[at] != written[page])
                snprintf(told->wrong_page, sizeof told->wrong_page, "page %zu word %d: %llu, not %llu", page, at,
                         (unsigned long long)words[at], (unsigned long long)written[page]);
        written[page] = ++count;
        for (int at = 0; at < WORDS; at++)
            words[at] = count;
        if (count % OFTEN == 0 && pwrite(count_fd, &count, sizeof count, 0) != sizeof count)
            die("count");
        spin(begun_s + every_s);
    }
    return unused;
}

static void *make_short_waits(void *unused) {
    int polled = epoll_create1(EPOLL_CLOEXEC), result;
    struct epoll_event event;
    struct timespec short_time = {0, 3000000};
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    for (;;) {
        if ((result = epoll_wait(polled, &event, 1, 3)) != 0)
            snprintf(told->wrong_wait, sizeof told->wrong_wait, "epoll_wait: %d, errno %d", result, errno);
        if ((result = sigtimedwait(&signals, NULL, &short_time)) != -1 || errno != EAGAIN)
            snprintf(told->wrong_wait, sizeof told->wrong_wait, "sigtimedwait: %d, errno %d", result, errno);
        if ((result = nanosleep(&short_time, NULL)))
            snprintf(told->wrong_wait, sizeof told->wrong_wait, "nanosleep: %d, errno %d", result, errno);
    }
    return unused;
}

static void *wait_for_news(void *unused) {
    siginfo_t news = {0};
    int result = waitid(P_PID, writer, &news, WEXITED | WSTOPPED | WCONTINUED);
    snprintf(told->wrong_news, sizeof told->wrong_news, "waitid: %d, errno %d, code %d, status %d", result, errno,
             news.si_code, news.si_status);
    return unused;
}

static void start(void *(*run)(void *)) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, NULL))
        die("pthread_create");
}

static const char *or_null(const char *text) {
    return *text ? text : NULL;
}

static const char *check_pages(void) {
    return or_null(told->wrong_page);
}

static const char *check_waits(void) {
    return or_null(told->wrong_wait);
}

static const char *check_news(void) {
    return or_null(told->wrong_news);
}

static void spoil_page(void) {
    strcpy(told->wrong_page, "spoiled");
}

static void spoil_waits(void) {
    strcpy(told->wrong_wait, "spoiled");
}

static void spoil_news(void) {
    strcpy(told->wrong_news, "spoiled");
}

int main(int argc, char **argv) {
    static const struct check checks[] = {
        {"pages", check_pages, spoil_page}, {"waits", check_waits, spoil_waits}, {"news", check_news, spoil_news}};
    open_directory(argc, argv);
    if (argc < 4)
        _exit(2);
    pages = (size_t)atoi(argv[2]) << 8;
    every_s = atoi(argv[3]) / 1e6;
    told = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    count_fd = openat(directory_fd, "count", O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (count_fd < 0)
        die("count");
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    writer = fork();
    if (writer < 0)
        die("fork");
    if (writer == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        start(make_short_waits);
        write_pages(NULL);
    }
    start(wait_for_news);
    serve(checks, sizeof checks / sizeof *checks);
}
