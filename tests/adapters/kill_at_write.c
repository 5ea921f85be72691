// Preloaded before libc: kills the process with SIGKILL just before its nth write to the disk.
// Calls that change a file or a folder, or make a change durable, count as writes. Counting starts
// with kill_at_write(n); writes_seen() returns the count.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long armed = 0, seen = 0;

void kill_at_write(long n) { armed = n; seen = 0; }
long writes_seen(void) { return seen; }

static void boundary(void) {
  if (armed && ++seen == armed) kill(getpid(), SIGKILL);
}

#define WRAP(result, name, parameters, arguments)                      \
  result name parameters {                                             \
    static result (*next) parameters;                                  \
    if (!next) next = (result(*) parameters)dlsym(RTLD_NEXT, #name);   \
    boundary();                                                        \
    return next arguments;                                             \
  }

WRAP(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
WRAP(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
WRAP(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRAP(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRAP(int, fsync, (int fd), (fd))
WRAP(int, fdatasync, (int fd), (fd))
WRAP(int, ftruncate, (int fd, off_t size), (fd, size))
WRAP(int, ftruncate64, (int fd, off64_t size), (fd, size))
WRAP(int, rename, (const char *from, const char *to), (from, to))
WRAP(int, renameat, (int f, const char *from, int t, const char *to), (f, from, t, to))
WRAP(int, unlink, (const char *path), (path))
WRAP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags))
WRAP(int, rmdir, (const char *path), (path))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode))

#define WRAP_OPEN(name)                                                          \
  int name(const char *path, int flags, ...) {                                   \
    static int (*next)(const char *, int, ...);                                  \
    if (!next) next = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name);  \
    mode_t mode = 0;                                                             \
    if (flags & O_CREAT) {                                                       \
      va_list rest;                                                              \
      va_start(rest, flags);                                                     \
      mode = va_arg(rest, mode_t);                                               \
      va_end(rest);                                                              \
      boundary();                                                                \
    }                                                                            \
    return next(path, flags, mode);                                              \
  }

WRAP_OPEN(open)
WRAP_OPEN(open64)
