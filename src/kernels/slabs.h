// Memory for rows: large regions from the system, in huge pages where it has them, handed out in chunks of one size.
#pragma once

#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace headwater {

// It can be shared between threads.
class Slabs {
 public:
  // region_bytes: of every region, as region_of gives it; 0: they grow with what there is.
  Slabs(int64_t chunk_bytes, int64_t region_bytes) : chunk_bytes_(chunk_bytes), region_bytes_(region_bytes) {}
  ~Slabs();
  Slabs(const Slabs&) = delete;
  Slabs& operator=(const Slabs&) = delete;

  char* take();  // zeroed, 64 bytes aligned when chunk_bytes is a multiple of it; throws std::bad_alloc
  void give(char* chunk);  // back to the system; a chunk must be whole pages
  int64_t bytes();

  // The size of regions that leave at most about `slack` bytes unused.
  static int64_t region_of(int64_t chunk_bytes, int64_t slack);

 private:
  const int64_t chunk_bytes_, region_bytes_;
  std::mutex lock_;  // guards what follows
  std::vector<std::pair<void*, int64_t>> regions_;
  std::vector<char*> given_;
  char* next_ = nullptr;
  int64_t left_ = 0;   // chunks
  int64_t bytes_ = 0;  // of all regions
};

}  // namespace headwater
