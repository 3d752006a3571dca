/* Rows of a table in a file, many requests at a time, whatever number of threads computes.

   Compiled into the library of native.c. A disk answers 4 to 6 times as many requests a second if it has dozens of them
   at once. They go past the page cache where the file was opened so (disk.py): requests then begin and end where
   sectors do. Threads share the file by chunks, so that no two of them write to one block. */

#include <errno.h>
#include <stdint.h>

typedef int64_t i64;

#ifdef _WIN32 /* has no such files */
i64 scratch_rows(i64 rows, i64 width, i64 blocks, const i64 *file, const i64 *row, char *values, uint8_t *written,
                 i64 *moved) {
  return ENOSYS;
}
#else

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DESCRIPTOR, BEGIN, END, SECTOR, WRITE }; /* `file`, as disk.py has it */
enum { THREADS = 32, CHUNK = 1 << 17, BLOCK = 4096, GAP = 4096, STACK = 1 << 18 };

typedef struct {
  const i64 *file, *row;
  i64 rows, width;
  char *values;
  uint8_t *written; /* a bit for each block of the file */
  i64 items, (*item)[2]; /* number of a chunk, and the first row that reaches into it */
  i64 next, moved[2]; /* bytes read and written */
  int error;
} work;

static i64 least(i64 a, i64 b) { return a < b ? a : b; }
static i64 most(i64 a, i64 b) { return a > b ? a : b; }
static i64 down(i64 place, i64 grain) { return place - place % grain; }
static i64 up(i64 place, i64 grain) { return down(place + grain - 1, grain); }

static int was_written(work *w, i64 block) {
  return __atomic_load_n(w->written + block / 8, __ATOMIC_RELAXED) >> block % 8 & 1;
}

/* What a request for bytes low to high must begin and end at a multiple of. A file system changes its own notes at the
   first write to a block, one writer after the other unless all of the block is written. */
static i64 grain_of(work *w, i64 low, i64 high) {
  if (w->file[SECTOR] == 1 || !w->file[WRITE]) return w->file[SECTOR];
  for (i64 block = low / BLOCK; block * BLOCK < high; block++)
    if (!was_written(w, block)) return BLOCK;
  return w->file[SECTOR];
}

static int transfer(work *w, int writes, char *memory, i64 count, i64 place) {
  __atomic_fetch_add(w->moved + writes, count, __ATOMIC_RELAXED);
  while (count) {
    ssize_t done = writes ? pwrite(w->file[DESCRIPTOR], memory, count, place)
                          : pread(w->file[DESCRIPTOR], memory, count, place);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    done -= done % w->file[SECTOR];
    if (done == 0) return EIO; /* the file ends, or half a sector was moved */
    memory += done, count -= done, place += done;
  }
  return 0;
}

/* All rows from the i-th on, as far as they lie in a chunk: those close to one another by one request. */
static int serve(work *w, i64 chunk, i64 i, char *buffer) {
  i64 left = chunk * CHUNK, right = left + CHUNK, begin = w->file[BEGIN], writes = w->file[WRITE];
  while (i < w->rows && begin + w->row[i] * w->width < right) {
    i64 first = i, low = right, high = left, covered = 0;
    for (; i < w->rows; i++) {
      i64 start = begin + w->row[i] * w->width;
      if (start >= right) break;
      i64 from = most(start, left), to = least(start + w->width, right), grain = grain_of(w, from, to);
      i64 wide_from = down(from, grain), wide_to = up(to, grain);
      if (i > first && wide_from > high + (writes ? 0 : GAP)) break;
      low = least(low, wide_from), high = most(high, wide_to), covered += to - from;
    }
    int error = writes && covered == high - low ? 0 : transfer(w, 0, buffer, high - low, low);
    if (error) return error;
    for (i64 k = first; k < i; k++) {
      i64 start = begin + w->row[k] * w->width, from = most(start, left), to = least(start + w->width, right);
      char *here = buffer + (from - low), *there = w->values + k * w->width + (from - start);
      memcpy(writes ? here : there, writes ? there : here, to - from);
    }
    if (writes) {
      if ((error = transfer(w, 1, buffer, high - low, low))) return error;
      for (i64 block = (low + BLOCK - 1) / BLOCK; (block + 1) * BLOCK <= high; block++)
        if (!was_written(w, block)) __atomic_fetch_or(w->written + block / 8, 1 << block % 8, __ATOMIC_RELAXED);
    }
  }
  return 0;
}

static void *run(void *shared) {
  work *w = shared;
  void *buffer = NULL;
  int error = posix_memalign(&buffer, BLOCK, CHUNK);
  while (!error && !__atomic_load_n(&w->error, __ATOMIC_RELAXED)) {
    i64 item = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
    if (item >= w->items) break;
    error = serve(w, w->item[item][0], w->item[item][1], buffer);
  }
  free(buffer);
  int none = 0;
  if (error) __atomic_compare_exchange_n(&w->error, &none, error, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return NULL;
}

static int list_items(work *w, i64 blocks) {
  i64 begin = w->file[BEGIN], end = w->file[END], width = w->width, last = -1;
  if (begin < 0 || end < begin || w->file[SECTOR] < 1 || end > blocks * 8 * BLOCK) return -1;
  w->item = malloc(most(w->rows, 1) * (width / CHUNK + 2) * sizeof *w->item);
  if (!w->item) return ENOMEM;
  for (i64 i = 0; i < w->rows; i++) {
    if (w->row[i] < 0 || w->row[i] >= (end - begin) / width) return -1;
    if (i && w->row[i] < w->row[i - 1] + w->file[WRITE]) return -1;
    i64 start = begin + w->row[i] * width;
    for (i64 chunk = most(start / CHUNK, last + 1); chunk * CHUNK < start + width; last = chunk++)
      w->item[w->items][0] = chunk, w->item[w->items++][1] = i;
  }
  return 0;
}

/* Read rows to values, or write these. Returns 0, an errno, or -1: rows that do not ascend, or that the file has not. To
   `moved` it adds the bytes that were read and written. */
i64 scratch_rows(i64 rows, i64 width, i64 blocks, const i64 *file, const i64 *row, char *values, uint8_t *written,
                 i64 *moved) {
  if (rows == 0 || width == 0) return 0;
  work w = {.file = file, .row = row, .rows = rows, .width = width, .values = values, .written = written};
  int error = list_items(&w, blocks), threads = 0;
  if (!error) {
    pthread_t thread[THREADS];
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK);
    while (threads < THREADS - 1 && threads < w.items - 1 && !pthread_create(thread + threads, &small, run, &w))
      threads++;
    pthread_attr_destroy(&small);
    run(&w);
    while (threads) pthread_join(thread[--threads], NULL);
    error = w.error;
  }
  free(w.item);
  for (int way = 0; way < 2; way++) moved[way] += w.moved[way];
  return error;
}
#endif
