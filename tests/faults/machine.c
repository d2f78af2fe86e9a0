/* A machine with faults, preloaded into a process: the disk below one folder fails or is slow, the clock of the day is set back. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char root[PATH_MAX];
static atomic_long operations, looks;
static long fails_at, fails_until, error_number, slow_microseconds, jump_at, jump_seconds;

/* Operations from number `at` up to `until` fail with `error`; each takes `slow` microseconds more. From look number `jump` on the clock
   of the day is `seconds` ahead. Numbers count from 1, 0 is never. */
void machine_plan(const char *folder, long at, long until, long error, long slow, long jump, long seconds) {
    strncpy(root, folder, sizeof root - 1);
    operations = looks = 0;
    fails_at = at, fails_until = until, error_number = error, slow_microseconds = slow, jump_at = jump, jump_seconds = seconds;
}
long machine_operations(void) { return operations; }
long machine_looks(void) { return looks; }

static int below(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int refused(void) {
    long number = ++operations;
    if (slow_microseconds) {
        struct timespec pause = {slow_microseconds / 1000000, slow_microseconds % 1000000 * 1000};
        nanosleep(&pause, NULL);
    }
    if (!fails_at || number < fails_at || number > fails_until) return 0;
    errno = (int)error_number;
    return 1;
}

static int refused_at(int folder, const char *path) {
    char whole[PATH_MAX] = "", link[64];
    if (!root[0]) return 0;
    if (path[0] == '/') return below(path) && refused();
    if (folder == AT_FDCWD) return getcwd(whole, sizeof whole) && below(whole) && refused();
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    return readlink(link, whole, sizeof whole - 1) > 0 && below(whole) && refused();
}

static int refused_on(int handle) { return refused_at(handle, ""); }

#define REAL(result, name, ...)                                                                                                            \
    static result (*real)(__VA_ARGS__);                                                                                                    \
    if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPENING(name)                                                                                                                      \
    int name(const char *path, int flags, ...) {                                                                                           \
        REAL(int, name, const char *, int, ...);                                                                                           \
        va_list rest;                                                                                                                      \
        va_start(rest, flags);                                                                                                             \
        mode_t mode = va_arg(rest, mode_t);                                                                                                \
        va_end(rest);                                                                                                                      \
        if ((flags & O_CREAT) && access(path, F_OK) && refused_at(AT_FDCWD, path)) return -1;                                              \
        return real(path, flags, mode);                                                                                                    \
    }
#define OPENING_AT(name)                                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                                               \
        REAL(int, name, int, const char *, int, ...);                                                                                      \
        va_list rest;                                                                                                                      \
        va_start(rest, flags);                                                                                                             \
        mode_t mode = va_arg(rest, mode_t);                                                                                                \
        va_end(rest);                                                                                                                      \
        if ((flags & O_CREAT) && faccessat(folder, path, F_OK, 0) && refused_at(folder, path)) return -1;                                  \
        return real(folder, path, flags, mode);                                                                                            \
    }
OPENING(open)
OPENING(open64)
OPENING_AT(openat)
OPENING_AT(openat64)

#define FUNCTION(result, name, condition, parameters, arguments)                                                                           \
    result name parameters {                                                                                                               \
        static result(*real) parameters;                                                                                                   \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                                                                         \
        return (condition) ? -1 : real arguments;                                                                                          \
    }
FUNCTION(int, mkdir, refused_at(AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
FUNCTION(int, mkdirat, refused_at(folder, path), (int folder, const char *path, mode_t mode), (folder, path, mode))
FUNCTION(int, rename, refused_at(AT_FDCWD, to), (const char *from, const char *to), (from, to))
FUNCTION(int, renameat, refused_at(place, to), (int folder, const char *from, int place, const char *to), (folder, from, place, to))
FUNCTION(int, link, refused_at(AT_FDCWD, to), (const char *from, const char *to), (from, to))
FUNCTION(int, linkat, refused_at(place, to), (int folder, const char *from, int place, const char *to, int flags), (folder, from, place, to, flags))
FUNCTION(int, fsync, refused_on(handle), (int handle), (handle))
FUNCTION(int, fdatasync, refused_on(handle), (int handle), (handle))
FUNCTION(ssize_t, write, refused_on(handle), (int handle, const void *data, size_t size), (handle, data, size))
FUNCTION(ssize_t, pwrite, refused_on(handle), (int handle, const void *data, size_t size, off_t at), (handle, data, size, at))
FUNCTION(ssize_t, pwrite64, refused_on(handle), (int handle, const void *data, size_t size, off64_t at), (handle, data, size, at))
FUNCTION(ssize_t, writev, refused_on(handle), (int handle, const struct iovec *parts, int count), (handle, parts, count))
FUNCTION(ssize_t, sendfile, refused_on(to), (int to, int from, off_t *at, size_t size), (to, from, at, size))
FUNCTION(ssize_t, sendfile64, refused_on(to), (int to, int from, off64_t *at, size_t size), (to, from, at, size))
FUNCTION(ssize_t, copy_file_range, refused_on(to), (int from, off64_t *start, int to, off64_t *at, size_t size, unsigned flags), (from, start, to, at, size, flags))

static long ahead(void) { return jump_at && ++looks >= jump_at ? jump_seconds : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += ahead();
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    REAL(int, gettimeofday, struct timeval *, void *);
    int result = real(now, zone);
    now->tv_sec += ahead();
    return result;
}
