// What a plain array would cost: rows found by their number, the same row-wise Adagrad, the same care for the memory's latency.
// And what the disk itself gives: random reads past the page cache.

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <random>
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

// Read blocks at random places of a file with so many threads at once; returns reads per second, or -errno.
double random_reads(const char *path, int64_t file_bytes, int64_t block, int threads, double seconds) {
  const int file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (file < 0)
    return -errno;
  std::atomic<int64_t> reads{0};
  std::atomic<int> error{0};
  std::vector<std::thread> readers;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [=] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  for (int i = 0; i < threads; ++i)
    readers.emplace_back([&, i] {
      std::mt19937_64 chance(i);
      void *buffer = std::aligned_alloc(4096, block);
      while (!error && elapsed() < seconds) {
        const int64_t place = static_cast<int64_t>(chance() % (file_bytes / block)) * block;
        if (pread(file, buffer, block, place) != block)
          error = errno ? errno : EIO;
        ++reads;
      }
      std::free(buffer);
    });
  for (auto &reader : readers)
    reader.join();
  const double rate = reads / elapsed();
  close(file);
  return error ? -error : rate;
}
}
