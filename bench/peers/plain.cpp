// What a plain array would cost: rows found by their number, the same row-wise Adagrad, the same care for the memory's latency.
// And what the disk itself gives: random reads past the page cache.

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <random>
#include <sys/syscall.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

constexpr int64_t AHEAD = 16; // rows

template <class Work> void share(int64_t count, int threads, Work work) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i)
    others.emplace_back(work, count * i / threads, count * (i + 1) / threads);
  work(int64_t{0}, count / threads);
  for (auto &other : others)
    other.join();
}

} // namespace

extern "C" {

void plain_pull(const float *rows, int64_t dim, const int64_t *ids, int64_t count, float *out, int threads) {
  share(count, threads, [=](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i) {
      if (i + AHEAD < stop)
        __builtin_prefetch(rows + ids[i + AHEAD] * dim);
      std::memcpy(out + i * dim, rows + ids[i] * dim, dim * sizeof(float));
    }
  });
}

void plain_push(float *rows, float *sums, int64_t dim, const int64_t *ids, const float *gradients, int64_t count, float lr,
                float eps, int threads) {
  share(count, threads, [=](int64_t start, int64_t stop) {
    for (int64_t i = start; i < stop; ++i) {
      if (i + AHEAD < stop) {
        __builtin_prefetch(rows + ids[i + AHEAD] * dim, 1);
        __builtin_prefetch(sums + ids[i + AHEAD], 1);
      }
      float *row = rows + ids[i] * dim;
      const float *gradient = gradients + i * dim;
      float square = 0;
      for (int64_t j = 0; j < dim; ++j)
        square += gradient[j] * gradient[j];
      float &sum = sums[ids[i]];
      sum += square / dim;
      const float rate = lr / (std::sqrt(sum) + eps);
      for (int64_t j = 0; j < dim; ++j)
        row[j] -= rate * gradient[j];
    }
  });
}

// Read blocks at random places of a file, so many at once; returns reads per second, or -errno.
double random_reads(const char *path, int64_t file_bytes, int64_t block, int depth, double seconds) {
  const int file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
  aio_context_t context = 0;
  if (file < 0 || syscall(SYS_io_setup, depth, &context) != 0)
    return -errno;
  char *buffers = static_cast<char *>(std::aligned_alloc(4096, depth * block));
  std::vector<iocb> blocks(depth);
  std::vector<iocb *> ready;
  std::vector<io_event> events(depth);
  std::mt19937_64 chance(0);
  const auto begin = [&](iocb *which) {
    *which = {};
    which->aio_data = reinterpret_cast<uint64_t>(which);
    which->aio_lio_opcode = IOCB_CMD_PREAD;
    which->aio_fildes = file;
    which->aio_buf = reinterpret_cast<uint64_t>(buffers + (which - blocks.data()) * block);
    which->aio_nbytes = block;
    which->aio_offset = static_cast<int64_t>(chance() % (file_bytes / block)) * block;
    ready.push_back(which);
  };
  for (iocb &each : blocks)
    begin(&each);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [=] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  int64_t reads = 0;
  int error = 0;
  while (!error && elapsed() < seconds) {
    const long begun = syscall(SYS_io_submit, context, ready.size(), ready.data());
    if (begun > 0)
      ready.erase(ready.begin(), ready.begin() + begun);
    else if (begun < 0 && errno != EAGAIN && errno != EINTR)
      error = errno;
    const long ended = syscall(SYS_io_getevents, context, 1, depth, events.data(), nullptr);
    for (long i = 0; i < ended; ++i, ++reads) {
      if (events[i].res != block)
        error = events[i].res < 0 ? static_cast<int>(-events[i].res) : EIO;
      begin(reinterpret_cast<iocb *>(events[i].data));
    }
  }
  const double rate = reads / elapsed();
  syscall(SYS_io_destroy, context);
  std::free(buffers);
  close(file);
  return error ? -error : rate;
}
}
