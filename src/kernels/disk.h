// A file without a name for rows that were spilled, read and written past the page cache by many threads at once.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace headwater {

// It can be shared between threads. The file lies in a folder, is gone with this object, and consists of units of one size.
class Disk {
 public:
  // Throws std::system_error when the file cannot be made.
  Disk(const std::string& folder, int64_t unit_bytes);
  ~Disk();
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  uint32_t take();            // a unit of the file, with room on the disk; throws std::system_error
  void give(uint32_t unit);   // back
  int64_t bytes();            // of the file
  int64_t memory_bytes() const { return kDepth * unit_bytes_; }

  // Runs task(0, buffer) … task(count − 1, buffer) on many threads, so that the disk always has much to do, and returns when all
  // have ended. A task reads and writes, with a buffer of one unit that is its own meanwhile. The first exception is thrown.
  using Task = std::function<void(int64_t index, char* buffer)>;
  void run(int64_t count, const Task& task);

  void read(uint32_t unit, char* buffer) const;  // throws std::system_error
  void write(uint32_t unit, const char* buffer) const;

  static constexpr int kDepth = 64;  // threads

 private:
  struct Job {
    const Task& task;
    const int64_t count;
    int64_t next = 0, ended = 0;
    std::exception_ptr failure;
  };
  void serve(char* buffer);

  const int64_t unit_bytes_;
  int fd_ = -1;
  char* buffers_ = nullptr;

  std::mutex lock_;  // guards what follows
  std::condition_variable wake_, done_;
  std::deque<Job*> jobs_;
  std::vector<std::thread> threads_;
  bool is_closing_ = false;

  std::mutex space_;  // guards what follows
  std::vector<uint32_t> free_;
  uint32_t used_ = 0, allocated_ = 0;  // units
};

}  // namespace headwater
