// A file without a name for rows that were spilled, read and written past the page cache, many of them at once.
#pragma once

#include <linux/aio_abi.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace headwater {

// It can be shared between threads. The file lies in a folder, is gone with this object, and consists of units of one size.
class Disk {
 public:
  // Throws std::system_error when the file cannot be made, or the system works on no more of its kind.
  Disk(const std::string& folder, int64_t unit_bytes);
  ~Disk();
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  uint32_t take();            // a unit of the file, with room on the disk; throws std::system_error
  void give(uint32_t unit);   // back
  int64_t bytes();            // of the file

  struct Step {
    bool is_write;
    uint32_t unit;
  };
  // What to do with a unit, and a buffer of its size, at first (stage 0), after that (stage 1), and so on; nothing: it is through.
  using Task = std::function<std::optional<Step>(int64_t index, int stage, char* buffer)>;
  // Carries out task(0, …) … task(count − 1, …), of kDepth at once their reads and writes; the task itself is called on this thread, one at
  // a time; it must not call run or read. The first exception is thrown, or std::system_error, when nothing is under way any more; others
  // wait for their turn.
  void run(int64_t count, const Task& task);
  // Reads units and calls take(index, buffer) for each as it comes.
  void read(const std::vector<uint32_t>& units, const std::function<void(int64_t, const char*)>& take);

  static constexpr int kDepth = 64;  // that the disk works on

 private:
  void close_all();
  void check(bool is_write, int64_t moved) const;  // bytes, or −errno

  const int64_t unit_bytes_;
  int fd_ = -1;
  aio_context_t context_ = 0;
  char* buffers_ = nullptr;
  std::mutex turn_;  // held by the caller who uses them

  std::mutex space_;  // guards what follows
  std::vector<uint32_t> free_;
  uint32_t used_ = 0, allocated_ = 0;  // units
};

}  // namespace headwater
