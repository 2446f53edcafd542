/* Processes that share by clone(2): memory, handlers, descriptors, directories; with their parent, and two siblings.

What they tell each other is in sealed memory that ends within a page, and is written all the time.
*/
#include "support.h"

#include <sched.h>

#define STACK_BYTES (256 * 1024)

#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE)

enum { ALL, FILES, PLACE, FIRST, SECOND, COUNT };

struct view {
    pid_t pid;
    volatile long rounds, plain;
    volatile int has_fd, umask, leave, alone, look;
    void *volatile handler;
    char cwd[256];
};
static struct view *seen; /* shared by everybody */
static int seen_fd;
static volatile long plain; /* each address space has its own */
static volatile int probe_fd = -1;
static int locked_fd;
static volatile int *fd_to_look_at;

static void on_one(int number) {
    (void)number;
}

static void on_two(int number) {
    (void)number;
}

static int look(void *argument) {
    long role = (long)argument;
    struct view *mine = seen + role;
    struct timespec pause = {0, 1000000};
    while (!mine->leave) {
        struct sigaction action;
        mine->plain = plain;
        mine->has_fd = fcntl(*fd_to_look_at, F_GETFD) != -1;
        syscall(SYS_rt_sigaction, SIGUSR2, NULL, &action, 8);
        mine->handler = *(void **)&action;
        if (mine->look) { /* main waits meanwhile */
            syscall(SYS_getcwd, mine->cwd, sizeof mine->cwd);
            umask(mine->umask = umask(0));
            mine->look = 0;
        }
        if (mine->alone) {
            unshare(mine->alone);
            mine->alone = 0;
        }
        mine->rounds++;
        syscall(SYS_nanosleep, &pause, NULL);
    }
    syscall(SYS_exit, 7);
    return 0;
}

static pid_t start(long role, int flags) {
    char *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pid_t pid = clone(look, stack + STACK_BYTES, flags, (void *)role);
    if (pid == -1)
        die("clone");
    seen[role].pid = pid;
    return pid;
}

/* Waits until everybody of `roles` (bits) has looked once more. */
static const char *rounds(int roles) {
    for (int role = 0; role < COUNT; role++) {
        long before = seen[role].rounds;
        for (int i = 0; roles >> role & 1 && seen[role].rounds < before + 2; i++) {
            if (i > 1000)
                return differ("%d stands still", role);
            nap(1);
        }
    }
    return NULL;
}

static const char *check_memory(void) {
    plain = plain * 7 + 1;
    const char *still = rounds(1 << ALL);
    return still ? still : seen[ALL].plain == plain ? NULL : differ("%ld instead of %ld", seen[ALL].plain, plain);
}

static const char *check_handlers(void) {
    struct sigaction action = {0}, before;
    sigaction(SIGUSR2, NULL, &before);
    action.sa_handler = before.sa_handler == on_one ? on_two : on_one;
    sigaction(SIGUSR2, &action, NULL);
    const char *still = rounds(1 << ALL | 1 << FILES);
    if (still)
        return still;
    if (seen[FILES].handler == (void *)action.sa_handler)
        return "the handler of a process of its own has changed";
    return seen[ALL].handler == (void *)action.sa_handler ? NULL : "another handler";
}

/* A descriptor that is made is there for all who share the table, and gone for all when it is closed. */
static const char *check_descriptors(void) {
    for (int there = 1; there >= 0; there--) {
        if (there)
            probe_fd = *fd_to_look_at = fcntl(directory_fd, F_DUPFD_CLOEXEC, 150);
        else
            close(probe_fd);
        const char *still = rounds(1 << ALL | 1 << FILES | 1 << PLACE);
        if (still)
            return still;
        if (seen[ALL].has_fd != there || seen[FILES].has_fd != there || seen[PLACE].has_fd)
            return differ("%d: %d %d %d", there, seen[ALL].has_fd, seen[FILES].has_fd, seen[PLACE].has_fd);
    }
    return NULL;
}

/* A POSIX lock belongs to the table that several processes share: they all hold it, nobody else does. */
static const char *check_lock(void) {
    struct flock asked = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 2};
    int status = -1;
    pid_t pid = fork();
    if (!pid)
        _exit(fcntl(locked_fd, F_GETLK, &asked) ? 2 : asked.l_type == F_WRLCK && asked.l_start == 3);
    waitpid(pid, &status, 0);
    if (fcntl(locked_fd, F_GETLK, &asked) || asked.l_type != F_UNLCK)
        return "somebody else holds it";
    return WIFEXITED(status) && WEXITSTATUS(status) == 1 ? NULL : "nobody holds it";
}

static void spoil_lock(void) {
    struct flock none = {.l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 2};
    fcntl(locked_fd, F_SETLK, &none);
}

static const char *check_place(void) {
    char here[256];
    int mask = umask(0);
    mask = mask == 027 ? 055 : 027;
    umask(mask);
    if (!getcwd(here, sizeof here) || chdir(strcmp(here, "/tmp") ? "/tmp" : "/") || !getcwd(here, sizeof here))
        return "cannot change the directory";
    seen[PLACE].look = 1;
    const char *still = rounds(1 << PLACE);
    if (still)
        return still;
    if (strcmp(here, seen[PLACE].cwd) || seen[PLACE].umask != mask)
        return differ("%s %o instead of %s %o", seen[PLACE].cwd, seen[PLACE].umask, here, mask);
    return NULL;
}

static const char *check_seals(void) {
    struct stat state;
    if (fstat(seen_fd, &state) || state.st_size != sizeof *seen * COUNT || fcntl(seen_fd, F_GET_SEALS) != SEALS)
        return "it has another size, or other seals";
    return rounds((1 << COUNT) - 1);
}

static void spoil_seals(void) { close(seen_fd); }

/* The first one counts in the memory that both have; the second one sees it. */
static const char *check_siblings(void) {
    long before = seen[SECOND].plain;
    const char *still = rounds(1 << FIRST | 1 << SECOND);
    if (still)
        return still;
    if (seen[SECOND].plain <= before || seen[SECOND].plain < 1000)
        return differ("stays at %ld", before);
    return waitpid(seen[SECOND].pid, NULL, WNOHANG) || waitpid(seen[FIRST].pid, NULL, WNOHANG) ? "no child" : NULL;
}

static void first(void) {
    struct timespec pause = {0, 1000000};
    plain = 1000;
    start(SECOND, CLONE_PARENT | CLONE_VM | CLONE_FS | CLONE_FILES);
    for (;;) {
        plain++;
        seen[FIRST].rounds++;
        nanosleep(&pause, NULL);
    }
}

static void end(int role) {
    seen[role].leave = 1;
    nap(20);
}

static void spoil_memory(void) { end(ALL); }
static void spoil_descriptors(void) { seen[FILES].alone = CLONE_FILES; nap(20); }
static void spoil_place(void) { seen[PLACE].alone = CLONE_FS; nap(20); }
static void spoil_siblings(void) { end(SECOND); }

int main(int argc, char **argv) {
    open_directory(argc, argv);
    seen_fd = memfd_create("seen", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (ftruncate(seen_fd, sizeof *seen * COUNT))
        die("ftruncate");
    seen = mmap(NULL, sizeof *seen * COUNT, PROT_READ | PROT_WRITE, MAP_SHARED, seen_fd, 0);
    if (fcntl(seen_fd, F_ADD_SEALS, SEALS))
        die("seals");
    fd_to_look_at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    *fd_to_look_at = 150;
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 2};
    locked_fd = openat(directory_fd, "locked", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fcntl(locked_fd, F_SETLK, &lock))
        die("lock");
    pid_t pid = fork();
    if (!pid)
        first();
    seen[FIRST].pid = pid;
    start(PLACE, CLONE_FS | SIGCHLD);
    start(FILES, CLONE_FILES | SIGCHLD);
    start(ALL, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | SIGCHLD);
    const char *still = rounds((1 << COUNT) - 1);
    if (still)
        die(still);
    const struct check checks[] = {
        {"memory", check_memory, spoil_memory},
        {"handlers", check_handlers, spoil_memory},
        {"descriptors", check_descriptors, spoil_descriptors},
        {"lock of a table", check_lock, spoil_lock},
        {"directory and umask", check_place, spoil_place},
        {"siblings", check_siblings, spoil_siblings},
        {"seals of shared memory", check_seals, spoil_seals},
    };
    serve(checks, sizeof checks / sizeof *checks);
    for (int role = 0; role < COUNT; role++)
        kill(seen[role].pid, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0)
        ;
    return 0;
}
