/* Loaded before libc: the k-th system call on files below one folder fails, is cut short, or is the last one.
 *
 * Calls are counted while the shim is armed: those that write, those that read, those that remove. Everything else goes
 * through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { NOTHING, KILL, TORN, FAIL, FAIL_ON, SHORT, INTERRUPT, SIGNAL, STOP, SHRINK, OVERWRITE, EMPTY };
enum side { WRITES, READS, REMOVALS };

static char root[PATH_MAX], victim[PATH_MAX];
static size_t root_length;
static atomic_int armed, counts[3];
static enum action action;
static enum side chosen;
static int at, value;
static int record = -1; /* where the names of counted calls go */

void shim_arm(const char *folder, int side, int what, int k, int number, const char *file, int names) {
    strncpy(root, folder, sizeof root - 1);
    strncpy(victim, file, sizeof victim - 1);
    root_length = strlen(root);
    chosen = side, action = what, at = k, value = number, record = names;
    counts[WRITES] = counts[READS] = counts[REMOVALS] = 0;
    armed = 1;
}

static int below_path(const char *path) {
    if (path[0] == '/') return strncmp(path, root, root_length) == 0;
    char here[PATH_MAX];
    return getcwd(here, sizeof here) && strncmp(here, root, root_length) == 0;
}

static int below(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return path[0] == '/' && strncmp(path, root, root_length) == 0;
}

/* What happens to this call: 0 go on, 1 short, -1 errno is set. */
static int meet(enum side side, const char *name) {
    int saved = errno, k = ++counts[side];
    if (record >= 0) {
        char line[64];
        int length = snprintf(line, sizeof line, "%d %s\n", side, name);
        syscall(SYS_write, record, line, length);
    }
    errno = saved;
    if (side != chosen || action == NOTHING) return 0;
    switch (action) {
        case KILL: if (k == at) kill(getpid(), SIGKILL); return 0;
        case TORN: return k == at ? 2 : 0;
        case FAIL: if (k == at) { errno = value; return -1; } return 0;
        case FAIL_ON: if (k >= at) { errno = value; return -1; } return 0;
        case SHORT: return k >= at;
        case INTERRUPT: if (strcmp(name, "mkdir") && strncmp(name, "rename", 6) && k % 2 == at % 2) { errno = EINTR; return -1; } return 0;
        case SIGNAL: if (k == at) kill(getpid(), value); return 0;
        case STOP: if (k == at) kill(getpid(), SIGSTOP); return 0;
        case SHRINK: if (k == at) syscall(SYS_truncate, victim, (long)value); return 0;
        case EMPTY: return k >= at ? 3 : 0;
        case OVERWRITE:
            if (k == at) {
                int fd = syscall(SYS_openat, AT_FDCWD, victim, O_WRONLY);
                syscall(SYS_pwrite64, fd, "changed", 7, (long)value);
                syscall(SYS_close, fd);
            }
            return 0;
        default: return 0;
    }
}

static long part(long count) { return count > 1 ? count / 2 : count; }

/* A call that moves `count` bytes; the last argument of CALL is how many it may move. */
#define MOVE(side, fd, name, count, CALL)                      \
    if (!armed || !below(fd)) return CALL(count);              \
    switch (meet(side, name)) {                                \
        case -1: return -1;                                    \
        case 1: return CALL(part(count));                      \
        case 2: CALL(part(count)); kill(getpid(), SIGKILL);    \
        case 3: return 0;                                      \
        default: return CALL(count);                           \
    }

ssize_t write(int fd, const void *data, size_t n) {
#define CALL(m) syscall(SYS_write, fd, data, m)
    MOVE(WRITES, fd, "write", n, CALL)
#undef CALL
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) {
#define CALL(m) syscall(SYS_pwrite64, fd, data, m, offset)
    MOVE(WRITES, fd, "pwrite64", n, CALL)
#undef CALL
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t offset) { return pwrite64(fd, data, n, offset); }
ssize_t read(int fd, void *data, size_t n) {
#define CALL(m) syscall(SYS_read, fd, data, m)
    MOVE(READS, fd, "read", n, CALL)
#undef CALL
}
ssize_t pread64(int fd, void *data, size_t n, off64_t offset) {
#define CALL(m) syscall(SYS_pread64, fd, data, m, offset)
    MOVE(READS, fd, "pread64", n, CALL)
#undef CALL
}
ssize_t pread(int fd, void *data, size_t n, off_t offset) { return pread64(fd, data, n, offset); }

/* Vectors are cut to their first half, or to half of their only piece. */
static long vector(long number, int fd, const struct iovec *pieces, int n, off64_t offset, long m) {
    if (m == n) return syscall(number, fd, pieces, (long)n, offset, (long)(offset >> 32) >> 31, 0L);
    struct iovec first = {pieces[0].iov_base, part(pieces[0].iov_len)};
    if (n > 1) return syscall(number, fd, pieces, (long)m, offset, (long)(offset >> 32) >> 31, 0L);
    return syscall(number, fd, &first, 1L, offset, (long)(offset >> 32) >> 31, 0L);
}
#define VECTOR(side, name, number, fd, pieces, n, offset)                                    \
    if (!armed || !below(fd)) return vector(number, fd, pieces, n, offset, n);               \
    switch (meet(side, name)) {                                                              \
        case -1: return -1;                                                                  \
        case 1: return vector(number, fd, pieces, n, offset, n > 1 ? n / 2 : 0);             \
        case 2: vector(number, fd, pieces, n, offset, n > 1 ? n / 2 : 0); kill(getpid(), SIGKILL); \
        case 3: return 0;                                                                    \
        default: return vector(number, fd, pieces, n, offset, n);                            \
    }
ssize_t pwritev64(int fd, const struct iovec *p, int n, off64_t o) { VECTOR(WRITES, "pwritev", SYS_pwritev, fd, p, n, o) }
ssize_t pwritev(int fd, const struct iovec *p, int n, off_t o) { return pwritev64(fd, p, n, o); }
ssize_t pwritev64v2(int fd, const struct iovec *p, int n, off64_t o, int flags) { return pwritev64(fd, p, n, o); }
ssize_t pwritev2(int fd, const struct iovec *p, int n, off_t o, int flags) { return pwritev64(fd, p, n, o); }
ssize_t writev(int fd, const struct iovec *p, int n) { VECTOR(WRITES, "writev", SYS_writev, fd, p, n, 0) }
ssize_t preadv64(int fd, const struct iovec *p, int n, off64_t o) { VECTOR(READS, "preadv", SYS_preadv, fd, p, n, o) }
ssize_t preadv(int fd, const struct iovec *p, int n, off_t o) { return preadv64(fd, p, n, o); }
ssize_t preadv64v2(int fd, const struct iovec *p, int n, off64_t o, int flags) { return preadv64(fd, p, n, o); }
ssize_t preadv2(int fd, const struct iovec *p, int n, off_t o, int flags) { return preadv64(fd, p, n, o); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
#define CALL(m) syscall(SYS_copy_file_range, in, from, out, to, m, flags)
    MOVE(WRITES, out, "copy_file_range", n, CALL)
#undef CALL
}
ssize_t sendfile64(int out, int in, off64_t *from, size_t n) {
#define CALL(m) syscall(SYS_sendfile, out, in, from, m)
    MOVE(WRITES, out, "sendfile", n, CALL)
#undef CALL
}
ssize_t sendfile(int out, int in, off_t *from, size_t n) { return sendfile64(out, in, from, n); }

/* Calls that are done or not. */
#define WHOLE(name, is_below, CALL) DONE(WRITES, name, is_below, CALL)
#define DONE(side, name, is_below, CALL)                 \
    if (armed && (is_below))                             \
        switch (meet(side, name)) {                      \
            case -1: return -1;                          \
            case 2: CALL; kill(getpid(), SIGKILL);       \
        }                                                \
    return CALL;

int fsync(int fd) { WHOLE("fsync", below(fd), syscall(SYS_fsync, fd)) }
int fdatasync(int fd) { WHOLE("fdatasync", below(fd), syscall(SYS_fdatasync, fd)) }
int syncfs(int fd) { WHOLE("syncfs", below(fd), syscall(SYS_syncfs, fd)) }
int ftruncate64(int fd, off64_t n) { WHOLE("ftruncate", below(fd), syscall(SYS_ftruncate, fd, n)) }
int ftruncate(int fd, off_t n) { return ftruncate64(fd, n); }
int rename(const char *a, const char *b) { WHOLE("rename", below_path(b), syscall(SYS_rename, a, b)) }
int renameat(int d, const char *a, int e, const char *b) { WHOLE("renameat", below_path(b), syscall(SYS_renameat, d, a, e, b)) }
int mkdir(const char *p, mode_t m) { WHOLE("mkdir", below_path(p), syscall(SYS_mkdir, p, m)) }
int rmdir(const char *p) { DONE(REMOVALS, "rmdir", below_path(p), syscall(SYS_rmdir, p)) }
int unlink(const char *p) { DONE(REMOVALS, "unlink", below_path(p), syscall(SYS_unlink, p)) }
int unlinkat(int d, const char *p, int f) { DONE(REMOVALS, "unlinkat", below_path(p), syscall(SYS_unlinkat, d, p, f)) }
int link(const char *a, const char *b) { WHOLE("link", below_path(b), syscall(SYS_link, a, b)) }
int symlink(const char *a, const char *b) { WHOLE("symlink", below_path(b), syscall(SYS_symlink, a, b)) }
int fallocate64(int fd, int mode, off64_t o, off64_t n) { WHOLE("fallocate", below(fd), syscall(SYS_fallocate, fd, mode, o, n)) }
int fallocate(int fd, int mode, off_t o, off_t n) { return fallocate64(fd, mode, o, n); }
int posix_fallocate64(int fd, off64_t o, off64_t n) { return fallocate64(fd, 0, o, n) < 0 ? errno : 0; }
int posix_fallocate(int fd, off_t o, off_t n) { return posix_fallocate64(fd, o, n); }

static int opened(int folder, const char *path, int flags, mode_t mode) {
    WHOLE("open", (flags & O_CREAT) && below_path(path), syscall(SYS_openat, folder, path, flags, mode))
}
#define MODE va_list rest; va_start(rest, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; va_end(rest);
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
